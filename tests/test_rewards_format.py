"""The format and length rewards: golden cases."""

from __future__ import annotations

import pytest

from grpo.rewards.format import r1_format
from grpo.rewards.length import soft_overlong
from grpo.types import Completion, FinishReason, Outcome, Problem

PROBLEM = Problem(id="p", prompt="1 + 1 =", answer="2")


def completion(text: str = "", num_tokens: int = 1) -> Completion:
    zeros = (0,) * num_tokens
    return Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=zeros, text=text, logprobs=(0.0,) * num_tokens, policy_versions=zeros,
        finish_reason=FinishReason.stop,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "<think>1 + 1</think> <answer>2</answer>",
        "\n <think>\n1 + 1\n</think>\n\n<answer>\n2\n</answer>",
        "<think>a < b</think><answer>$x<2$</answer>",
    ],
)
def test_the_template_scores_one(text: str) -> None:
    assert r1_format(completion(text), PROBLEM).value == 1.0
    opened = completion(text.partition("<think>")[2])  # the same where the prompt ends with <think>
    assert r1_format(opened, PROBLEM, opened=True).value == 1.0
    assert r1_format(opened, PROBLEM).value == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2",
        "<answer>2</answer>",
        "<think>1 + 1</think>",
        "<think></think> <answer>2</answer>",  # no thought
        "<think>1 + 1</think> <answer> \n</answer>",  # no answer
        "Well: <think>1 + 1</think> <answer>2</answer>",  # text before
        "<think>1 + 1</think> so <answer>2</answer>",  # text between
        "<think>1 + 1</think> <answer>2</answer> Done.",  # text after
        "<think>1 + 1</think> <answer>2</answer>\n",
        "<answer>2</answer> <think>1 + 1</think>",  # order
        "<think>1</think> <think>2</think> <answer>2</answer>",  # twice
        "<think>1</think> <answer>1</answer> <answer>2</answer>",
        "<think>so <answer>1</answer></think> <answer>2</answer>",  # an answer within the thought
        "<think>1 <answer>2</answer></think>",
        "<think>1 + 1</think> <answer>2",  # truncated
        "<Think>1 + 1</Think> <answer>2</answer>",
    ],
)
def test_anything_else_scores_zero(text: str) -> None:
    score = r1_format(completion(text), PROBLEM)
    assert (score.value, score.outcome) == (0.0, Outcome.wrong_format)


@pytest.mark.parametrize(
    ("num_tokens", "reward"),
    [
        (1, 0.0),
        (80, 0.0),  # L_max − L_cache = 100 − 20
        (85, -0.25),  # (80 − 85) / 20
        (90, -0.5),  # (80 − 90) / 20
        (100, -1.0),  # (80 − 100) / 20
        (101, -1.0),
        (500, -1.0),
    ],
)
def test_soft_overlong_is_equation_13(num_tokens: int, reward: float) -> None:
    assert soft_overlong(completion(num_tokens=num_tokens), PROBLEM, max_tokens=100, buffer=20) == reward


def test_soft_overlong_refuses_a_buffer_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="buffer is 200 and max_tokens 100"):
        soft_overlong(completion(), PROBLEM, max_tokens=100, buffer=200)
