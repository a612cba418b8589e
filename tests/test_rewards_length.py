"""The rewards for length and against repetition: the papers' formulas at values worked out by hand, and the laws they keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.imports import FunctionRef
from grpo.rewards.length import cosine, soft_overlong
from grpo.rewards.match import exact_match
from grpo.rewards.repetition import repetition
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

PROBLEM = Problem(id="p", prompt="1 + 1 =", answer="2")
EXACT = "grpo.rewards.match.exact_match"


def completion(text: str = "", num_tokens: int = 1, token_ids: tuple[int, ...] | None = None) -> Completion:
    ids = (0,) * num_tokens if token_ids is None else token_ids
    return Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=ids, text=text, logprobs=(0.0,) * len(ids), policy_versions=(0,) * len(ids),
        finish_reason=FinishReason.stop,
    )  # fmt: skip


# ---------------------------------------------------------------- soft overlong


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


def test_soft_overlong_with_the_numbers_of_the_paper() -> None:
    """L_max = 20,480, L_cache = 4,096: nothing up to 16,384, half at 18,432."""
    assert [soft_overlong(completion(num_tokens=n), PROBLEM, max_tokens=20_480, buffer=4_096) for n in (16_384, 18_432, 20_480)] == [
        0,
        -0.5,
        -1,
    ]


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 100), st.integers(0, 100))
def test_soft_overlong_never_rises_with_length(length: int, more: int, buffer: int, room: int) -> None:
    short, long = (
        soft_overlong(completion(num_tokens=n), PROBLEM, max_tokens=buffer + room, buffer=buffer) for n in (length, length + more)
    )
    assert -1 <= long <= short <= 0


@pytest.mark.parametrize(("max_tokens", "buffer"), [(100, 200), (100, 0), (0, 0), (100, 2.5), ("100", 20), (True, 1)])
def test_soft_overlong_refuses_what_makes_no_sense(max_tokens: Any, buffer: Any) -> None:
    with pytest.raises(ValueError, match=r"buffer is|max_tokens is"):
        soft_overlong.check_arguments(max_tokens=max_tokens, buffer=buffer)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"buffer is|max_tokens is"):
        soft_overlong(completion(), PROBLEM, max_tokens=max_tokens, buffer=buffer)


# ---------------------------------------------------------------- cosine

RIGHT, WRONG = "2", "3"


@pytest.mark.parametrize(
    ("text", "num_tokens", "reward"),
    [  # the paper's values: right 2 → 1, wrong −10 → 0, exceeded −10
        (RIGHT, 0, 2.0),  # 1 + (2 − 1)(1 + cos 0)/2
        (RIGHT, 50, 1.5),  # cos π/2 = 0: half way
        (RIGHT, 25, 1 + (1 + math.sqrt(0.5)) / 2),  # cos π/4 = √½
        (RIGHT, 99, 1.0002467),  # 1 + (1 + cos 0.99π)/2 = 1 + (1 − 0.9995066)/2
        (WRONG, 0, -10.0),
        (WRONG, 50, -5.0),
        (WRONG, 75, -10 * (1 - math.sqrt(0.5)) / 2),  # 0 + (−10 − 0)(1 + cos 3π/4)/2
        (RIGHT, 100, -10.0),  # exceeded, right or wrong
        (WRONG, 100, -10.0),
        (WRONG, 101, -10.0),
    ],
)
def test_cosine_at_its_corners(text: str, num_tokens: int, reward: float) -> None:
    assert cosine(completion(text, num_tokens), PROBLEM, correct=EXACT, max_tokens=100).value == pytest.approx(reward, abs=1e-6)


@given(st.integers(0, 99), st.integers(0, 99), st.booleans())
def test_cosine_is_monotonic_and_between_its_ends(first: int, second: int, right: bool) -> None:
    """Falling in length where right and rising where wrong, and never beyond either end."""
    short, long = sorted((first, second))
    values = [cosine(completion(RIGHT if right else WRONG, n), PROBLEM, correct=EXACT, max_tokens=100).value for n in (short, long)]
    assert values == sorted(values, reverse=right)
    assert all((1 <= value <= 2) if right else (-10 <= value <= 0) for value in values)


@pytest.mark.parametrize(
    "correct",
    [EXACT, {"fn": EXACT}, {"fn": EXACT, "strip": True}, FunctionRef(target=EXACT, kwargs={"strip": True}), exact_match],
    ids=["path", "node", "node with arguments", "reference", "function"],
)
def test_what_is_right_is_another_rewards_business(correct: Any) -> None:
    assert cosine(completion("2", 0), PROBLEM, correct=correct, max_tokens=10).value == 2
    assert cosine(completion("3", 0), PROBLEM, correct=correct, max_tokens=10).value == -10


def test_the_other_rewards_arguments_count() -> None:
    spaced = completion(" 2", 0)
    assert cosine(spaced, PROBLEM, correct={"fn": EXACT}, max_tokens=10).value == -10
    assert cosine(spaced, PROBLEM, correct={"fn": EXACT, "strip": True}, max_tokens=10).value == 2


def _fails(completion: Completion, problem: Problem) -> float:
    raise KeyError("no such column")


def _unscored(completion: Completion, problem: Problem) -> Score:
    return Score(value=math.nan, outcome=Outcome.invalid, detail="the gold answer cannot be read")


@pytest.mark.parametrize(
    ("correct", "outcome", "detail"), [(_fails, Outcome.error, "no such column"), (_unscored, Outcome.invalid, "gold")]
)
def test_what_cannot_be_judged_stays_unscored(correct: Callable[..., Any], outcome: Outcome, detail: str) -> None:
    score = cosine(completion("2", 5), PROBLEM, correct=correct, max_tokens=10)
    assert not score.scored and score.outcome is outcome and detail in score.detail


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"wrong_long": "0"}, "wrong_long is '0'"),
        ({"exceeded": math.nan}, "exceeded is nan"),
        ({"correct": "grpo.rewards.match.exact_mach"}, "exact_mach"),
        ({"correct": {"fn": EXACT, "stripp": True}}, "stripp"),
        ({"correct": 3}, "correct is 3; it must name a reward"),
    ],
)
def test_cosine_refuses_arguments_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    numbers = {"correct_short": 2.0, "correct_long": 1.0, "wrong_short": -10.0, "wrong_long": 0.0, "exceeded": -10.0}
    with pytest.raises(ValueError, match=message):
        cosine.check_arguments(**{"correct": EXACT, "max_tokens": 100, **numbers, **changes})  # type: ignore[attr-defined]


# ---------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    ("text", "ngram", "reward"),
    [
        ("", 3, 0.0),
        ("a b", 3, 0.0),  # shorter than one 3-gram
        ("a b c d e", 3, 0.0),  # abc bcd cde: all different
        ("a a a a a", 3, -2 / 3),  # aaa three times: 1 of 3 distinct
        ("a b c A B C", 3, -1 / 4),  # abc bca cab abc: 3 of 4 distinct, case ignored
        ("wait wait wait wait", 1, -3 / 4),
        ("我们我们我们", 2, -3 / 5),  # 我们 们我 我们 们我 我们: 2 of 5 distinct
        ("x = 1\nx = 1", 2, -2 / 5),  # x= =1 1x x= =1: 3 of 5 distinct
    ],
)
def test_repetition_counts_what_was_there_before(text: str, ngram: int, reward: float) -> None:
    assert repetition(completion(text), PROBLEM, ngram=ngram).value == pytest.approx(reward)


def test_repetition_of_tokens() -> None:
    """(1 2) (2 1) (1 2) (2 3): one of four has been there."""
    assert repetition(completion("words do not matter", token_ids=(1, 2, 1, 2, 3)), PROBLEM, ngram=2, unit="token").value == -0.25


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5), st.permutations([0, 1, 2, 3]))
def test_repetition_is_a_share_that_renaming_does_not_change(tokens: list[int], ngram: int, names: list[int]) -> None:
    value = repetition(completion(token_ids=tuple(tokens)), PROBLEM, ngram=ngram, unit="token").value
    assert -1 < value <= 0
    renamed = tuple(names[token] for token in tokens)
    assert repetition(completion(token_ids=renamed), PROBLEM, ngram=ngram, unit="token").value == value
    backwards = repetition(completion(token_ids=tuple(reversed(tokens))), PROBLEM, ngram=ngram, unit="token").value
    assert backwards == value


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_a_loop_approaches_minus_one(loop: list[int], ngram: int) -> None:
    """k rounds of a loop of length p hold at most p distinct n-grams among k·p − n + 1."""
    rounds = 50
    total = rounds * len(loop) - ngram + 1
    value = repetition(completion(token_ids=tuple(loop * rounds)), PROBLEM, ngram=ngram, unit="token").value
    assert value <= -1 + len(loop) / total


@pytest.mark.parametrize("changes", [{"ngram": 0}, {"ngram": 2.0}, {"unit": "letters"}])
def test_repetition_refuses_arguments_that_cannot_work(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ngram is|unit is 'letters'; it must be one of: word, token"):
        repetition.check_arguments(**{"ngram": 3, "unit": "word", **changes})  # type: ignore[attr-defined]
