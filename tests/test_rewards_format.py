"""The format reward: what fits R1's template, and everything that nearly does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.format import r1_format
from grpo.types import Completion, FinishReason, Outcome, Problem

PROBLEM = Problem(id="p", prompt="1 + 1 =", answer="2")
INSIDE = Problem(id="p", prompt="1 + 1 =\n<think>\n", answer="2")


def completion(text: str = "") -> Completion:
    return Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(), finish_reason=FinishReason.stop
    )


@pytest.mark.parametrize(
    "text",
    [
        "<think>1 + 1</think> <answer>2</answer>",
        "\n <think>\n1 + 1\n</think>\n\n<answer>\n2\n</answer>\n",
        "<think>a < b</think><answer>$x<2$</answer>",
        "<think>I think > 2, so the answer < 3</think> <answer>2</answer>",  # words of the tags, and signs
        "<think>`x</y>` <b>bold</b></think> <answer>2</answer>",  # other tags
        "<think>" + "a" * 200_000 + "</think> <answer>2</answer>",
    ],
)
def test_the_template_scores_one(text: str) -> None:
    assert r1_format(completion(text), PROBLEM).value == 1.0
    opened = completion(text.partition("<think>")[2])  # the same where the prompt ends with <think>
    assert r1_format(opened, PROBLEM, opened=True).value == 1.0
    assert r1_format(opened, INSIDE).value == 1.0
    assert r1_format(opened, PROBLEM).value == 0.0
    assert r1_format(completion(text), INSIDE).value == 0.0  # <think> twice


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "<think> stands 0 times"),
        ("2", "<think> stands 0 times"),
        ("<answer>2</answer>", "<think> stands 0 times"),
        ("<think>1 + 1</think>", "<answer> stands 0 times"),
        ("<think></think> <answer>2</answer>", "<think> is blank"),
        ("<think>\u200b\u2060 \t</think> <answer>2</answer>", "<think> is blank"),  # nothing that can be seen
        ("<think>1 + 1</think> <answer> \n</answer>", "<answer> is blank"),
        ("<think>1 + 1</think> <answer>\ufeff</answer>", "<answer> is blank"),
        ("Well: <think>1 + 1</think> <answer>2</answer>", "text stands outside the tags"),
        ("<think>1 + 1</think> so <answer>2</answer>", "text stands outside the tags"),
        ("<think>1 + 1</think> <answer>2</answer> Done.", "text stands outside the tags"),
        ("\u200b<think>1 + 1</think> <answer>2</answer>", "text stands outside the tags"),
        ("```\n<think>1 + 1</think> <answer>2</answer>\n```", "text stands outside the tags"),
        ("<answer>2</answer> <think>1 + 1</think>", "the tags are not in order"),
        ("</think>1 + 1<think> <answer>2</answer>", "the tags are not in order"),
        ("<think>1 <answer>2</answer></think>", "the tags are not in order"),
        ("<think>1 + 1 <answer></think> 2</answer>", "the tags are not in order"),
        ("<think>1</think> <think>2</think> <answer>2</answer>", "<think> stands 2 times"),
        ("<think>a <think>b</think> c</think> <answer>2</answer>", "<think> stands 2 times"),  # nested
        ("<think>1</think> <answer>1</answer> <answer>2</answer>", "<answer> stands 2 times"),
        ("<think>so <answer>1</answer></think> <answer>2</answer>", "<answer> stands 2 times"),  # an answer within the thought
        ("<think>write `</think>` then</think> <answer>2</answer>", "</think> stands 2 times"),  # in code
        ("<think>1 + 1</think> <answer>2", "</answer> stands 0 times"),  # truncated
        ("<Think>1 + 1</Think> <answer>2</answer>", "<think> stands 0 times"),
        ("＜think＞1 + 1＜/think＞ ＜answer＞2＜/answer＞", "<think> stands 0 times"),
        ("<think>1 + 1</THINK>2</think> <answer>2</answer>", "</THINK> is like a tag, and is none"),
        ("<think>1 < think >2</think> <answer>2</answer>", "< think > is like a tag, and is none"),
        ("<think>1</think> <answer>2＜/answer＞</answer>", "＜/answer＞ is like a tag, and is none"),
        ("<think>1 <think/></think> <answer>2</answer>", "<think/> is like a tag, and is none"),
    ],
)
def test_anything_else_scores_zero_and_says_why(text: str, why: str) -> None:
    score = r1_format(completion(text), PROBLEM)
    assert (score.value, score.outcome, score.detail) == (0.0, Outcome.wrong_format, why)


PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "x", "2", "<", ">"])


@given(st.lists(PIECES, max_size=12))
def test_a_text_that_fits_is_those_four_tags_in_order_around_two_parts(pieces: list[str]) -> None:
    text = "".join(pieces)
    tags = [piece for piece in pieces if len(piece) > 2]
    fits = r1_format(completion(text), PROBLEM).value == 1.0
    if fits:
        before, _, rest = text.partition("<think>")
        think, _, rest = rest.partition("</think>")
        between, _, rest = rest.partition("<answer>")
        answer, _, after = rest.partition("</answer>")
        assert tags == ["<think>", "</think>", "<answer>", "</answer>"]
        assert before.strip() == between.strip() == after.strip() == ""
        assert think.strip() and answer.strip()


def test_opened_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="opened is 'yes'; it must be true or false"):
        r1_format.check_arguments(opened="yes")  # type: ignore[attr-defined]
