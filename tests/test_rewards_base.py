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
from grpo.rewards.base import DETAIL_CHARS, call, call_batch, combine, parse_reward_config, shorten, to_score, to_scores
from grpo.rewards.limits import RewardLimits
from grpo.rewards.styles import Style
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


def test_how_a_function_wants_to_be_called(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def one(completion, problem): ...\n"
        "def many(completions, problems, scale=1.0): ...\n"
        "def listed(rows, golds): ...\n"
        "def slow(completion, problem): ...\n"
        "slow.limits = {'wall_s': 60, 'memory_mb': 100}\n"
    )
    parts = parse_reward_config(
        {
            "one": {"fn": f"{path}:one"},
            "many": {"fn": f"{path}:many", "scale": 2},
            "listed": {"fn": f"{path}:listed"},
            "batch": {"fn": f"{path}:listed", "style": "batch"},
            "slow": {"fn": f"{path}:slow", "limits": {"memory_mb": 200, "cpu_s": 10}},
        }
    )
    assert [part.style for part in parts] == [Style.plain, Style.batch, Style.plain, Style.batch, Style.plain]
    assert [dict(part.limits) for part in parts[:4]] == [{}] * 4
    assert dict(parts[4].limits) == {"wall_s": 60, "memory_mb": 200, "cpu_s": 10}  # the configuration has the last word


# ---- limits


def test_limits() -> None:
    assert RewardLimits(cpu_s=2.0).wall == 7.0  # 3 · 2 + 1
    assert RewardLimits(cpu_s=2.0, wall_s=60.0).wall == 60.0
    waits = RewardLimits(cpu_s=2.0, wall_s=60.0)
    assert waits.with_changes({}) == waits
    assert waits.with_changes({"cpu_s": 1.0}).wall == 4.0  # 3 · 1 + 1
    assert waits.with_changes({"cpu_s": 1.0, "wall_s": 5.0}).wall == 5.0
    assert [waits.for_batch(n).cpu_s for n in (0, 1, 16, 17, 64)] == [2.0, 2.0, 2.0, 4.0, 8.0]
    assert [waits.for_batch(n).wall for n in (16, 17)] == [60.0, 120.0]
    assert RewardLimits(cpu_s=2.0).for_batch(32).wall == 13.0  # 3 · 4 + 1


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"cpu_s": 0}, "cpu_s is 0; it must be a positive number"),
        ({"cpu_s": math.nan}, "cpu_s is nan"),
        ({"cpu_s": True}, "cpu_s is True"),
        ({"wall_s": -1.0}, "wall_s is -1.0"),
        ({"wall_s": 4.0}, "wall_s is 4 and cpu_s 5; wall_s must be at least cpu_s"),
        ({"memory_mb": 0}, "memory_mb is 0"),
        ({"memory_mb": 1.5}, "memory_mb is 1.5; it must be a whole number"),
    ],
)
def test_a_limit_that_cannot_work_is_refused(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardLimits(**limits)


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


def test_what_a_batch_function_may_return() -> None:
    assert to_scores([1, None, 0.5], 3) == [Score(value=1.0), to_score(None), Score(value=0.5)]
    assert to_scores((True,), 1) == to_scores(np.array([1.0]), 1) == [Score(value=1.0)]
    assert to_scores(np.array([1.0, math.nan]), 2)[1].outcome is Outcome.invalid
    assert to_scores([], 0) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        (np.ones(3), "returned 3 values for 2 completions"),
        (1.0, "returned 1.0 (float); a batch function returns a list"),
        ("ab", "returned 'ab' (str); a batch function returns a list"),
        ({0: 1.0, 1: 1.0}, "a batch function returns a list"),
        (None, "returned None (NoneType)"),
    ],
)
def test_a_wrong_number_or_type_leaves_the_whole_batch_unscored(value: Any, said: str) -> None:
    scores = to_scores(value, 2)
    assert [(s.outcome, s.scored) for s in scores] == [(Outcome.invalid, False)] * 2
    assert said in scores[0].detail


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


def test_what_a_function_says_running_out_of_memory_is_worth() -> None:
    def eats(completion: Completion, problem: Problem) -> float:
        raise MemoryError

    eats.memory_value = 0.0  # type: ignore[attr-defined]
    score = call(eats, COMPLETION, PROBLEM)
    assert (score.value, score.outcome) == (0.0, Outcome.memory)


def test_a_batch_fails_together() -> None:
    def fails(completions: list[Completion], problems: list[Problem]) -> list[float]:
        return [1.0, problems[1].columns["missing"]]

    async def later(completions: list[Completion], problems: list[Problem]) -> list[float]:
        return [float(c.text == p.answer) for c, p in zip(completions, problems, strict=True)]

    scores = call_batch(fails, [COMPLETION] * 2, [PROBLEM] * 2)
    assert [(s.outcome, s.scored) for s in scores] == [(Outcome.error, False)] * 2
    assert "KeyError: 'missing'" in scores[0].detail
    assert call_batch(later, [COMPLETION] * 2, [PROBLEM] * 2) == [Score(value=1.0)] * 2


async def _fails_later(completion: Completion, problem: Problem) -> float:
    return problem.columns["missing"]


def test_the_traceback_of_an_async_function_begins_at_its_own_line() -> None:
    lines = call(_fails_later, COMPLETION, PROBLEM).detail.splitlines()
    assert lines[1].strip().startswith(f'File "{__file__}"')


def test_shorten_keeps_both_ends() -> None:
    assert shorten("a" * 10, 10) == "a" * 10
    short = shorten("start" + "x" * 100 + "end", 20)
    assert (len(short), short[:5], short[-3:]) == (20, "start", "end")


# ---- the weighted sum


def test_combine() -> None:
    scores = {"accuracy": Score(value=1.0), "format": Score(value=0.5), "length": Score(value=math.nan, outcome=Outcome.error)}
    assert combine(scores, {"accuracy": 1.0, "format": 0.2, "length": 0.0}) == 1.1  # 1 · 1 + 0.2 · 0.5; what weighs nothing may fail
    assert math.isnan(combine(scores, {"accuracy": 1.0, "length": 0.1}))
