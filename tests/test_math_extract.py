"""What counts as the answer of a completion."""

from __future__ import annotations

import time

import pytest

from grpo.rewards.math import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>1 + 1</think> <answer>2</answer>", "2"),
        ("<think>is it \\boxed{7}?</think> <answer> 2 </answer>", "2"),  # an answer beats a box in the thought
        ("<think>x</think> <answer>so \\boxed{2}.</answer>", "2"),  # the box within the answer
        ("<think>\\boxed{7}</think> The answer is \\boxed{2}.", "2"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<think><answer>1</answer></think> <answer>2</answer>", "2"),
        ("1 + 1 = 2</think><answer>2</answer>", "2"),  # the prompt opened the thought
        ("Maybe \\boxed{3}? No. \\boxed{5}", "5"),
        ("\\boxed{3} and then \\boxed{5", "3"),  # truncated: the last box that is closed
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"),  # escaped braces are text
        ("\\boxed{\\{1}", "\\{1"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\fbox{4}", "4"),
        ("} \\boxed{4} {", "4"),
        ("so $\\boxed 5$", "5"),
        # plainly stated
        ("First 3, then 4. The answer is 12.", "12"),
        ("The answer is 3. Wait, no: the answer is 4.", "4"),
        ("Hence the final answer is $\\frac{1}{2}$, as claimed.", "\\frac{1}{2}"),
        ("**Final Answer**\n\n$$x = 5$$", "x = 5"),
        ("**Final answer:** **73**", "73"),
        ("Answer: (B)", "(B)"),
        ("The correct answer is (C) because it fits.", "(C) because it fits"),  # a choice and more
        ("She pays 18 dollars.\n#### 18", "18"),
        ("The answer is 3.5. Check it.", "3.5"),
        ("The answer is 5\nThis was easy.", "5"),
        # nothing but an answer
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("42", "42"),
        ("x = 3", "x = 3"),
        # no answer
        ("I am not able to determine the answer.", None),
        ("We have 12 unknowns and 13 equations. I cannot finish this problem.", None),
        ("The answer is not 5, I believe.", None),
        ("<think>\\boxed{2}</think>", None),  # thought, never said
        ("<think>\\boxed{2}", None),  # truncated within the thought
        ("<think><answer>2</answer>", None),
        ("<answer> </answer>", None),
        ("\\boxed{}", None),
        ("<answer>2", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "hostile",
    [
        "\\boxed{" * 20_000,
        "<answer>" * 20_000,
        "<think>" * 20_000,
        "{" * 100_000,
        "\\boxed{}" * 20_000,
        "answer " * 20_000,
        "the answer is" * 10_000,
        "answer: " * 20_000,
        "$" * 100_000,
        "$$ answer is $" * 10_000,
        "**" * 50_000,
        "\\(" * 50_000,
        "#### " * 20_000,
        "final answer\n" * 10_000,
    ],
    ids=lambda text: text[:14],
)
def test_extraction_is_linear_in_the_text(hostile: str) -> None:
    started = time.process_time()
    extract_answer(hostile)
    assert time.process_time() - started < 1.0
