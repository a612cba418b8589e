"""When a run stops because its graders fail."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.base import combine
from grpo.rewards.health import RewardFailure, UnscoredStop, failures
from grpo.types import Completion, FinishReason, Group, Outcome, Problem, Rollout, Score

WEIGHTS = {"accuracy": 1.0, "watched": 0.0}
RIGHT = Score(value=1.0)
LATE = Score(value=math.nan, outcome=Outcome.timeout, detail="took more than 5 s of CPU time")
BROKEN = Score(value=math.nan, outcome=Outcome.error, detail="Traceback …\n  File \"mine.py\", line 3\nKeyError: 'level'")
TOO_LARGE = Score(value=0.0, outcome=Outcome.timeout, detail="9^{9^{9^{9}}}")


def group(*scores: Mapping[str, Score] | Score) -> Group:
    problem = Problem(id="train/7", prompt="", answer="")
    rollouts = []
    for index, given_score in enumerate(scores):
        parts = {"accuracy": given_score} if isinstance(given_score, Score) else dict(given_score)
        parts = {"accuracy": RIGHT, "watched": RIGHT} | parts
        completion = Completion(
            problem_id="train/7",
            index=index,
            prompt_ids=(1,),
            token_ids=(),
            text="",
            logprobs=(),
            policy_versions=(),
            finish_reason=FinishReason.stop,
        )
        rollouts.append(Rollout(problem=problem, completion=completion, scores=parts, reward=combine(parts, WEIGHTS)))
    return Group(problem=problem, rollouts=tuple(rollouts))


def steps_survived(stop: UnscoredStop, *unscored_of_ten: int) -> int:
    for step, count in enumerate(unscored_of_ten):
        try:
            stop.check([group(*[BROKEN] * count, *[RIGHT] * (10 - count))])
        except RewardFailure:
            return step
    return len(unscored_of_ten)


@pytest.mark.parametrize(
    ("unscored", "survived"),
    [
        ([2, 2, 2, 2], 4),  # 6 of 30 is 20 %: not more than that
        ([2, 2, 3], 2),  # 7 of 30
        ([6, 0, 0, 6, 0, 0], 6),  # 6 of 30 in any three steps in a row
        ([6, 0, 1], 2),  # 7 of 30
        ([7], 0),  # whatever two more steps bring, 7 of 30 are unscored
        ([4, 3], 1),
        ([0, 0, 0, 0, 7], 4),
    ],
)
def test_more_than_a_fifth_over_three_steps(unscored: list[int], survived: int) -> None:
    assert steps_survived(UnscoredStop(weights=WEIGHTS), *unscored) == survived


def test_the_threshold_can_be_set() -> None:
    assert steps_survived(UnscoredStop(weights=WEIGHTS, share=0.0), 0, 0, 1) == 2
    assert steps_survived(UnscoredStop(weights=WEIGHTS, share=1.0), 10, 10, 10, 10) == 4
    assert steps_survived(UnscoredStop(weights=WEIGHTS, share=0.5, steps=1), 5, 6) == 1
    for wrong in ({"share": 1.5}, {"share": "a"}, {"steps": 0}, {"steps": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            UnscoredStop(weights=WEIGHTS, **wrong)  # type: ignore[arg-type]


def test_what_the_model_caused_and_what_is_only_watched_stop_nothing() -> None:
    stop = UnscoredStop(weights=WEIGHTS)
    for _ in range(5):
        stop.check([group(*[TOO_LARGE] * 10)])  # scored as wrong
        stop.check([group(*[{"watched": BROKEN}] * 10)])
        stop.check([])


def test_the_message_names_part_share_outcomes_and_the_last_traceback() -> None:
    stop = UnscoredStop(weights=WEIGHTS)
    stop.check([group(*[LATE] * 3, *[RIGHT] * 7)])
    with pytest.raises(RewardFailure) as caught:
        stop.check([group(LATE, RIGHT, {"accuracy": BROKEN, "watched": LATE}, *[BROKEN] * 4, *[RIGHT] * 3)])
    assert str(caught.value).splitlines() == [
        "the rewards left 9 of 20 rollouts of the last 2 steps unscored (45%; a run stops above 20% over 3 steps): "
        "reward.accuracy error × 5, reward.accuracy timeout × 4",
        "  the last one, reward.accuracy on completion 6 of problem 'train/7':",
        "    Traceback …",
        '      File "mine.py", line 3',
        "    KeyError: 'level'",
        "  → correct the function, or raise its limits; the rollout files hold every message (docs/rewards.md)",
    ]


def test_where_the_environment_failed_that_is_the_cause_and_not_the_scores_it_did_not_give() -> None:
    failed = {"accuracy": LATE, "environment": BROKEN, "won": Score(value=math.nan, outcome=Outcome.error, detail="the environment failed")}
    assert [str(failure) for failure in failures([group(failed, LATE)])] == [
        "environment: 1 unscored (error): KeyError: 'level'",
        f"reward.accuracy: 1 unscored (timeout): {LATE.detail}",
    ]
    with pytest.raises(RewardFailure) as caught:
        UnscoredStop(weights=WEIGHTS).check([group(*[failed] * 7, *[RIGHT] * 3)])
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("over 3 steps): environment error × 7") and "KeyError: 'level'" in lines[-2]
    assert lines[1] == "  the last one, environment on completion 6 of problem 'train/7':"


@given(st.lists(st.integers(0, 10), min_size=1, max_size=12), st.integers(0, 11), st.floats(0, 1), st.integers(1, 5))
def test_a_resumed_run_stops_where_the_whole_one_does(unscored: list[int], cut: int, share: float, steps: int) -> None:
    whole = steps_survived(UnscoredStop(weights=WEIGHTS, share=share, steps=steps), *unscored)
    cut = min(cut, whole)
    first = UnscoredStop(weights=WEIGHTS, share=share, steps=steps)
    assert steps_survived(first, *unscored[:cut]) == cut
    second = UnscoredStop(weights=WEIGHTS, share=share, steps=steps)
    second.load_state(json.loads(json.dumps(first.state())))
    assert cut + steps_survived(second, *unscored[cut:]) == whole


def test_a_run_that_was_stopped_goes_on_when_the_reward_is_repaired() -> None:
    """The step that stopped it is made again: it must not be counted twice, and its first failure not at all."""
    stop = UnscoredStop(weights={"main": 1.0})
    good, bad = group(*[Score(value=1.0)] * 5), group(*[Score(value=math.nan, outcome=Outcome.error)] * 5)
    stop.check([good])
    before = stop.state()
    with pytest.raises(RewardFailure):
        stop.check([bad] * 4)
    resumed = UnscoredStop(weights={"main": 1.0})
    resumed.load_state(stop.state())
    assert resumed.state() == before
    resumed.check([good] * 4)


def test_failures_for_the_console() -> None:
    found = failures([group(BROKEN, RIGHT, LATE), group(BROKEN, TOO_LARGE, {"watched": LATE})])
    assert [str(failure) for failure in found] == [
        "reward.accuracy: 2 unscored (error): KeyError: 'level'",
        "reward.accuracy: 1 unscored (timeout): took more than 5 s of CPU time",
        "reward.watched: 1 unscored (timeout): took more than 5 s of CPU time",
    ]
    assert failures([group(RIGHT)]) == []
