"""Rollouts that are given up: their scoring ends, their environments are closed once each, and none of them holds up the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from grpo.rollouts.base import Job, Progress
from grpo.rollouts.collect import collect
from grpo.rollouts.environments import Done, Environment, Message, SingleTurn
from grpo.types import Completion, FinishReason, Problem, Score

from .counted_rollouts import Lengths, TokenEngine, groups_of, problems


def test_scoring_that_nobody_waits_for_is_ended() -> None:
    """So that what is saved after an interruption need not wait for the evaluation that was cut off."""
    given_up = threading.Event()

    class Endless(Lengths):
        def score(
            self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
        ) -> list[dict[str, Score]]:
            assert progress is not None
            try:
                while True:
                    progress(0, len(completions))
                    time.sleep(0.005)
            finally:
                given_up.set()

    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(groups_of(TokenEngine(), Endless()), problems(3), 1, interrupt)
    assert given_up.wait(20)


@pytest.mark.parametrize("broken", [False, True])
def test_what_is_given_up_is_closed(broken: bool) -> None:
    """Three rollouts: one that is over, one whose next turn waits for an engine, and one that is with its environment, closed behind it."""
    closed: list[str] = []
    asked, let_go, all_closed = threading.Event(), threading.Event(), threading.Event()

    class Closes(SingleTurn):
        def start(self, problem: Problem) -> Sequence[Message]:
            self.id = problem.id
            return super().start(problem)

        def step(self, completion: Completion) -> Sequence[Message] | Done:
            if self.id == "p2":
                asked.set()
                let_go.wait(20)
            return Done() if self.id == "p0" else (Message("text", "and?"),)

        def close(self) -> None:
            closed.append(self.id)
            if len(closed) == 3:
                all_closed.set()
            if broken:
                raise RuntimeError("the door is stuck")

    groups = groups_of(TokenEngine(), Lengths(), environment=Closes, completions_per_problem=1)
    begun = [groups.begin(problem, 1) for problem in problems(3)]
    with pytest.raises(KeyboardInterrupt), groups.assembly() as assembly:
        assembly.open(begun)
        jobs: Any = ()
        while not jobs:
            jobs = assembly.feed(True)
        assembly.note([(job.number, turn_of(job)) for job in jobs])
        while assembly.unfinished > 2 or not assembly.sampling:
            time.sleep(0.002)
        assert asked.wait(20), "a call that has not begun is dropped, and its environment closed at once"
        raise KeyboardInterrupt
    assert sorted(closed) == ["p0", "p1"]
    let_go.set()
    assert all_closed.wait(20) and sorted(closed) == ["p0", "p1", "p2"]


def test_what_waits_for_its_environments_answer_is_given_up_too() -> None:
    """Five turns come back, one environment is asked at a time: the first is at work, the others have not been told, and all are closed."""
    at_work, let_go, all_closed = threading.Event(), threading.Event(), threading.Event()
    closed: list[Environment] = []

    class Closes(SingleTurn):
        at_once = 1
        timeout_s = None

        def step(self, completion: Completion) -> Sequence[Message] | Done:
            at_work.set()
            let_go.wait(20)
            return (Message("text", "and?"),)

        def close(self) -> None:
            closed.append(self)
            if len(closed) == 5:
                all_closed.set()

    groups = groups_of(TokenEngine(), Lengths(), environment=Closes, completions_per_problem=5)
    with pytest.raises(KeyboardInterrupt), groups.assembly() as assembly:
        assembly.open([groups.begin(problems(1)[0], 1)])
        jobs: Any = ()
        while not jobs:
            jobs = assembly.feed(True)
        assembly.note([(job.number, turn_of(job)) for job in jobs[:4]])
        assert at_work.wait(20)
        raise KeyboardInterrupt
    assert len(closed) == 4, "three whose turns waited, and the one with the engine"
    assembly.note([(jobs[4].number, turn_of(jobs[4]))])  # an engine's thread may come too late
    let_go.set()
    assert all_closed.wait(20)
    assert len(set(map(id, closed))) == 5, "none of them twice"


def turn_of(job: Job) -> Completion:
    return Completion(
        problem_id=job.request.problem_id, index=job.index, prompt_ids=job.request.prompt_ids, token_ids=(1,), text="x", logprobs=(0.0,),
        policy_versions=(0,), finish_reason=FinishReason.stop,
    )  # fmt: skip


HANGS = """
import sys, threading
from grpo.rollouts.assembly import Assembly, GroupInMaking
from grpo.rollouts.environments import SingleTurn
from grpo.rollouts.episode import Episode
from grpo.types import Problem

hangs = threading.Event()

class Hangs(SingleTurn):
    timeout_s = None if sys.argv[1] == "None" else float(sys.argv[1])

    def start(self, problem):
        hangs.set()
        threading.Event().wait()

class Dialogue:
    def opening(self, messages):
        return (1,)

problem = Problem(id="p", prompt="?", answer="")
episodes = [Episode(problem, index, 0, Hangs, Dialogue(), 10) for index in range(20)]
with Assembly(None, {}) as assembly:
    assembly.open([GroupInMaking(problem=problem, draw=1, episodes=episodes)])
    assert hangs.wait(20) and not assembly.feed(True)
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("timeout_s", [None, 1e6])
def test_a_process_ends_whatever_its_environments_do(timeout_s: float | None) -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS, str(timeout_s)], stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.stderr.endswith("KeyboardInterrupt\n")
