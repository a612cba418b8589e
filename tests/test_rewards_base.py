"""Reward configuration, what functions may return, and the weighted sum."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.config import ConfigError
from grpo.rewards.base import DETAIL_CHARS, call, combine, parse_reward_config, shorten, to_score
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

PROBLEM = Problem(id="p", prompt="1 + 1 =", answer="2")
COMPLETION = Completion(
    problem_id="p", index=0, prompt_ids=(1,), token_ids=(2,), text="2", logprobs=(0.0,), policy_versions=(0,),
    finish_reason=FinishReason.stop,
)  # fmt: skip


# ---- configuration


def test_a_part_has_its_weight_and_its_arguments() -> None:
    accuracy, overlong = parse_reward_config(
        {
            "accuracy": {"fn": "grpo.rewards.math.accuracy"},
            "overlong": {"fn": "grpo.rewards.length.soft_overlong", "weight": -2, "max_tokens": 100, "buffer": 20},
        }
    )
    assert (accuracy.name, accuracy.weight, dict(accuracy.ref.kwargs)) == ("accuracy", 1.0, {})
    assert (overlong.name, overlong.weight, dict(overlong.ref.kwargs)) == ("overlong", -2.0, {"max_tokens": 100, "buffer": 20})
    assert overlong.ref.load()(COMPLETION, PROBLEM) == 0.0


@pytest.mark.parametrize(
    ("node", "key"),
    [
        ({}, "reward"),
        ({"a": {"weight": 1.0}}, "reward.a.fn"),
        ({"a": "grpo.rewards.math.accuracy"}, "reward.a"),
        ({"a": {"fn": "grpo.rewards.math.accuracy", "weight": math.nan}}, "reward.a.weight"),
        ({"a": {"fn": "grpo.rewards.math.accuracy", "weight": "0.5"}}, "reward.a.weight"),
        ({"a": {"fn": "grpo.rewards.math.accuracy", "weight": True}}, "reward.a.weight"),
        ({"a": {"fn": "grpo.rewards.format.r1_format", "open": True}}, "reward.a.open"),
        ({"a": {"fn": "grpo.rewards.length.soft_overlong", "max_tokens": 100}}, "reward.a.fn"),  # buffer is missing
    ],
)
def test_a_setting_that_cannot_work_is_named(node: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_reward_config(node)
    assert caught.value.key == key


# ---- what a function may return


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (True, 1.0), (-0.5, -0.5), (Fraction(1, 4), 0.25), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.array(2.0), 2.0)],
)
def test_numbers_are_scores(value: Any, number: float) -> None:
    score = to_score(value)
    assert score == Score(value=number)
    assert type(score.value) is float


@pytest.mark.parametrize("value", [None, math.nan, np.float64("nan"), Score(value=math.nan)])
def test_none_and_nan_leave_the_completion_unscored(value: Any) -> None:
    assert to_score(value).outcome is Outcome.invalid
    assert not to_score(value).scored


@pytest.mark.parametrize("value", ["abc", [1.0], math.inf, 10**400, np.array([1.0, 2.0]), Decimal(1), 1j, Score(value=math.inf)])
def test_anything_else_is_invalid_and_says_what_it_was(value: Any) -> None:
    score = to_score(value)
    assert score.outcome is Outcome.invalid
    assert not score.scored
    assert score.detail.startswith("returned ")


def test_the_message_for_a_string() -> None:
    assert to_score("abc").detail == "returned 'abc' (str); a reward returns a number, a Score or None"


def test_a_score_is_kept() -> None:
    wrong = Score(value=0.0, outcome=Outcome.wrong_format, detail="no answer")
    assert to_score(wrong) == wrong
    late = Score(value=math.nan, outcome=Outcome.timeout)
    assert to_score(late).outcome is Outcome.timeout
    assert len(to_score(Score(value=1, detail="x" * 10_000)).detail) == DETAIL_CHARS


# ---- calling


def test_call_runs_plain_and_async_functions() -> None:
    async def later(completion: Completion, problem: Problem) -> float:
        return float(completion.text == problem.answer)

    assert call(lambda completion, problem: completion.text == problem.answer, COMPLETION, PROBLEM) == Score(value=1.0)
    assert call(later, COMPLETION, PROBLEM) == Score(value=1.0)


def _fails(completion: Completion, problem: Problem) -> float:
    return problem.columns["missing"]


def _exits(completion: Completion, problem: Problem) -> float:
    raise SystemExit(2)


def _recurses(completion: Completion, problem: Problem) -> float:
    return _recurses(completion, problem)


def _eats(completion: Completion, problem: Problem) -> float:
    raise MemoryError


@pytest.mark.parametrize(
    ("function", "outcome", "said"),
    [
        (_fails, Outcome.error, "KeyError: 'missing'"),
        (_exits, Outcome.error, "SystemExit: 2"),
        (_recurses, Outcome.error, "RecursionError"),
        (_eats, Outcome.memory, "MemoryError"),
        (lambda completion: 1.0, Outcome.error, "TypeError"),
    ],
)
def test_an_exception_is_reported_with_the_line_it_came_from(function: Any, outcome: Outcome, said: str) -> None:
    score = call(function, COMPLETION, PROBLEM)
    assert score.outcome is outcome
    assert not score.scored
    assert said in score.detail
    assert len(score.detail) <= DETAIL_CHARS
    assert "rewards/base.py" not in score.detail  # our own frame helps nobody
    if function is _fails:
        assert Path(__file__).name in score.detail
        assert 'problem.columns["missing"]' in score.detail


def test_shorten_keeps_both_ends() -> None:
    assert shorten("a" * 10, 10) == "a" * 10
    short = shorten("start" + "x" * 100 + "end", 20)
    assert (len(short), short[:5], short[-3:]) == (20, "start", "end")


# ---- the weighted sum


def test_combine() -> None:
    scores = {"accuracy": Score(value=1.0), "format": Score(value=0.5), "length": Score(value=math.nan, outcome=Outcome.error)}
    assert combine(scores, {"accuracy": 1.0, "format": 0.2, "length": 0.0}) == 1.1  # 1 · 1 + 0.2 · 0.5; what weighs nothing may fail
    assert math.isnan(combine(scores, {"accuracy": 1.0, "length": 0.1}))
