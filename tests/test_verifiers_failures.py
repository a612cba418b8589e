"""Rollouts of verifiers that fail: each says why, by whose setting it can be helped, and takes no other with it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from grpo.rollouts.verifiers_episodes import VerifiersTask
from grpo.types import FAILURE, Outcome

from .played_episodes import needs_verifiers, of_verifiers, play, problems, turn_of, values, wait_until


@needs_verifiers
@pytest.mark.parametrize(("broken", "said"), [("setup", "no disk is left"), ("reward", "the judge is ill")])
def test_a_hook_that_raises_leaves_the_rollout_unscored(toy_tasksets: Path, broken: str, said: str) -> None:
    (problem,) = problems("toy-hooks", broken=broken)
    episode = play(problem, ["hello"])
    failure = episode.scores[FAILURE]
    assert failure.outcome is Outcome.error and said in failure.detail and "toy_hooks.py" in failure.detail
    assert math.isnan(episode.rollout({}, {"verifiers": 1.0}).reward)


@needs_verifiers
def test_a_turn_that_comes_after_verifiers_gave_up_fails_the_rollout(toy_tasksets: Path) -> None:
    """It is right, and verifiers' limit, which counts the time in the queue of our engines, would have it scored as wrong."""
    (problem,) = problems("toy-timed")
    episode = play(problem, [])
    wait_until(lambda: not of_verifiers().rollouts)
    episode.advance(turn_of(episode, problem.answer))
    detail = episode.scores[FAILURE].detail
    assert "gave up while the policy was sampling (ended by agent_timeout)" in detail and "environment.agent.timeout.rollout" in detail
    assert math.isnan(episode.rollout({}, {"verifiers": 1.0}).reward)
    assert values(play(problem, [problem.answer]))["verifiers"] == 1


@needs_verifiers
def test_a_failure_to_serve_is_that_of_the_rollouts_that_met_it(toy_tasksets: Path) -> None:
    (problem,) = problems("toy-flaky")
    assert "could not serve the taskset 'toy-flaky': the port is taken" in play(problem, [problem.answer]).scores[FAILURE].detail
    assert values(play(problem, [problem.answer]))["verifiers"] == 2.25


@needs_verifiers
def test_a_rewritten_history_ends_the_rollout(toy_tasksets: Path) -> None:
    (problem,) = problems("toy-hooks")
    episode = play(problem, ["hello", "again"], environment=lambda: VerifiersTask(agent={"harness": {"id": "toy-forgets"}}))
    assert episode.num_turns == 1
    detail = episode.scores[FAILURE].detail
    assert "the harness rewrote the conversation: message 1 of 2 is not what it was" in detail and "environment.agent.harness" in detail
    assert math.isnan(episode.rollout({}, {"verifiers": 1.0}).reward)


@needs_verifiers
def test_verifiers_that_does_not_come_back_is_given_up(toy_tasksets: Path) -> None:
    (problem,) = problems("toy-own")
    environment = VerifiersTask(timeout_s=0.01)  # its tool server takes longer to start
    with pytest.raises(TimeoutError, match=r"did not end for 0\.01 s \(environment\.timeout_s\)"):
        environment.start(problem)
