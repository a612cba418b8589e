"""The reward ``accuracy``: outcomes, details, gold answers."""

from __future__ import annotations

import pytest

from grpo.rewards.base import attribute
from grpo.rewards.math import accuracy, check_gold
from grpo.types import Completion, FinishReason, Outcome, Problem, Score


def score(text: str, gold: str) -> Score:
    completion = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(2,), text=text, logprobs=(0.0,), policy_versions=(0,),
        finish_reason=FinishReason.stop,
    )  # fmt: skip
    return accuracy(completion, Problem(id="p", prompt="", answer=gold))


def test_outcomes_of_accuracy() -> None:
    assert score("\\boxed{12}", "12") == Score(value=1.0, detail="12")
    assert score("\\boxed{13}", "12") == Score(value=0.0, detail="13")
    assert score("I give up.", "12") == Score(value=0.0, outcome=Outcome.wrong_format)
    assert score("\\boxed{about 12 or so}", "12") == Score(value=0.0, outcome=Outcome.wrong_format, detail="about 12 or so")
    assert score("\\boxed{twelve pigs fly}", "12") == Score(value=0.0, detail="twelve pigs fly")  # words are an answer, and a wrong one
    assert score("\\boxed{12}", "(1") == Score(value=0.0, detail="12")  # a gold that can not be read is not the model's format error
    assert score("\\boxed{9^{9^{9^{9}}}}", "12") == Score(value=0.0, detail="9^{9^{9^{9}}}")


def test_what_overstays_or_eats_memory_is_wrong_and_not_unscored() -> None:
    assert attribute(accuracy, "timeout_value", None) == 0.0
    assert attribute(accuracy, "memory_value", None) == 0.0


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("\\boxed{3} or \\boxed{5}", "3"),  # the last one counts
        ("\\boxed{3 or 5}", "3"),
        ("\\boxed{3, 5}", "5"),
        ("\\boxed{\\text{(A) or (B)}}", "A"),
        ("\\boxed{A, B, C, D, E}", "C"),
        ("\\boxed{\\text{not } 5}", "5"),
        ("\\boxed{\\neq 5}", "5"),
        ("\\boxed{5 \\pm 1}", "5"),
        ("\\boxed{[4, 6]}", "5"),
        ("\\boxed{x = 5 \\text{ or } x = 6}", "x = 5"),
        ("\\boxed{15}", "5"),
        ("\\boxed{5 \\cdot 1.0000001}", "5"),
        ("\\boxed{5 + 0i + 10^{-100}}", "5"),
        ("\\boxed{}", "5"),
        ("\\boxed{\\text{}}", "5"),
        ("\\boxed{\\ldots}", "5"),
        ("\\boxed{nan}", "5"),
        ("\\boxed{\\infty}", "5"),
        ("\\boxed{\\frac{5}{0}}", "5"),
        ("\\boxed{" + "5" * 4_000 + "}", "5"),
        ("\\boxed{" * 50 + "6" + "}" * 50, "5"),
        ("\\boxed{\\{1, \\ldots, 100\\}}", "5"),
        ("\\boxed{\\mathbb{R}}", "5"),
        ("\\boxed{x}", "5"),
        ("\\boxed{5 \\text{ is wrong, it is } 6}", "5"),
        ("\\boxed{%d %s {0}}", "5"),
        ("\\boxed{５５}", "5"),
    ],
)
def test_hedges_lists_and_tricks_are_wrong(text: str, gold: str) -> None:
    assert score(text, gold).value == 0.0


# the forms of golds in GSM8K (integers, thousands, a few decimals and negatives) and in MATH
GOLDS = [
    "18",
    "3",
    "70000",
    "5.00",
    "1,080",
    "-3",
    "2,125",
    "0.75",
    "36,000",
    "\\frac{7}{12}",
    "2\\sqrt{6}",
    "(-2, 5]",
    "\\left( -1, \\frac{2}{7} \\right)",
    "x^2 - 7x + 10",
    "\\text{(D)}",
    "\\text{Thursday}",
    "120^\\circ",
    "\\$4.25",
    "11\\frac{1}{2}",
    "321_7",
    "4 - 3i",
    "2 \\pm \\sqrt{3}",
    "-4, 9",
    "\\begin{pmatrix} 2 \\\\ -1/2 \\end{pmatrix}",
    "y = 3x - 4",
    "(-\\infty, 1) \\cup (4, \\infty)",
    "x \\in [0, 3]",
    "25\\mbox{ cm}^2",
    "\\{2 \\pm \\sqrt{7}, 1\\}",
    "22,\\!500",
    "\\tan x",
    "35\\%",
    "6.2 \\text{ cents}",
]


@pytest.mark.parametrize("gold", GOLDS)
def test_every_gold_can_be_compared_and_scores_one(gold: str) -> None:
    assert check_gold(gold) is None
    for text in (
        f"<think>a</think> <answer>{gold}</answer>",
        f"so \\boxed{{{gold}}}.",
        f"The answer is ${gold}$.",
        f"<answer>${gold}$.</answer>",
    ):
        assert score(text, gold).value == 1.0


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("", "empty"),
        ("$$", "empty"),
        ("(1", "')'"),
        ("about 5", "about"),
        ("9^{9^{9}}", "digits"),
        ("7!!!", "factorial"),
        ("5" * 9_000, "characters"),
    ],
)
def test_a_gold_that_cannot_be_compared_is_named(gold: str, said: str) -> None:
    message = check_gold(gold)
    assert message is not None
    assert said in message
