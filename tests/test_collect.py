"""On-policy collection: what is sampled is scored and grouped, each rollout once."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from functools import partial

import pytest

from grpo.data import ProblemSource
from grpo.rollouts.assembly import ScoreWhen
from grpo.rollouts.base import Close, Feed, Finished, Job, Progress
from grpo.rollouts.collect import Collector, collect, request_seed
from grpo.rollouts.environments import Done, Environment, Message, SingleTurn
from grpo.types import Completion, Problem, Sampling, Score

from .counted_rollouts import SAMPLES, Lengths, TokenEngine, check_whole, groups_of, problems


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("when", list(ScoreWhen))
def test_everything_is_sampled_and_scored_once(when: ScoreWhen, lockstep: bool) -> None:
    runtime, wanted = Lengths(), problems(9)
    told: list[tuple[int, int]] = []
    found, times = collect(
        groups_of(TokenEngine(), runtime, score_when=when, lockstep=lockstep), wanted, 1, lambda done, total: told.append((done, total))
    )
    check_whole(found, wanted)
    assert sorted(pair for call in runtime.calls for pair in call) == [(p.id, i) for p in wanted for i in range(SAMPLES)]
    assert times.keys() == {"generate", "reward"} and told[-1] == (27, 27)
    if when is ScoreWhen.all:
        assert len(runtime.calls) == 1
    if when is ScoreWhen.group:
        assert all(set(Counter(problem for problem, _ in call).values()) == {SAMPLES} for call in runtime.calls), "groups are whole"


def test_rewards_begin_while_the_rest_is_still_being_sampled() -> None:
    runtime, engine = Lengths(), TokenEngine(width=1)
    sampled_before: list[int] = []
    score, asked = runtime.score, threading.Event()

    def noted(completions: Sequence[Completion], of: Sequence[Problem], progress: Progress | None = None) -> list[dict[str, Score]]:
        sampled_before.append(engine.steps)
        asked.set()
        return score(completions, of)

    runtime.score = noted  # type: ignore[method-assign]

    class Waits(TokenEngine):
        """After its first completion it goes on only when that is being scored."""

        def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
            for finished in super().serve(feed, sampling):
                yield finished
                if finished:
                    assert asked.wait(20), "nothing was scored before the end"

    check_whole(collect(groups_of(Waits(width=1), runtime), problems(3), 1)[0], problems(3))


def test_what_a_reward_raises_ends_the_call() -> None:
    class Broken(Lengths):
        def score(
            self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
        ) -> list[dict[str, Score]]:
            raise RuntimeError("reward workers do not start")

    with pytest.raises(RuntimeError, match="reward workers do not start"):
        collect(groups_of(TokenEngine(), Broken()), problems(3), 1)


def test_an_environment_that_fails_leaves_its_rollout_unscored() -> None:
    made = itertools.count()

    def sometimes() -> Environment:
        if next(made) % SAMPLES == 1:
            raise RuntimeError("no such tool")
        return SingleTurn()

    engine = TokenEngine()
    found, _ = collect(groups_of(engine, Lengths(), environment=sometimes), problems(3), 1)
    unscored = [r for group in found for r in group.rollouts if not r.scored]
    assert len(unscored) == 3 and all("no such tool" in r.scores["environment"].detail for r in unscored)


def test_a_prompt_without_room_is_one_rollouts_failure_and_not_the_runs() -> None:
    made = itertools.count()

    class Talks(SingleTurn):
        def start(self, problem: Problem) -> Sequence[Message]:
            return (Message("text", "?" * 3000 if next(made) % SAMPLES == 1 else problem.prompt),)

    class Small(TokenEngine):
        context_length = 2500

    engine = Small()
    found, _ = collect(groups_of(engine, Lengths(), environment=Talks), problems(3), 1)
    unscored = [r for group in found for r in group.rollouts if not r.scored]
    assert len(unscored) == 3 and all("first is 3000 tokens long" in r.scores["environment"].detail for r in unscored)


@pytest.mark.parametrize("count", [2, 12])
def test_as_many_environments_are_asked_at_once_as_they_say(count: int) -> None:
    """12 rollouts, each with a call that goes on only when ``count`` of them have come together."""
    together, lock = threading.Barrier(count, timeout=20), threading.Lock()
    under_way = most = 0

    class Waits(SingleTurn):
        at_once = count

        def step(self, completion: Completion) -> Sequence[Message] | Done:
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            together.wait()
            time.sleep(0.05)  # for others to come in, if they may
            with lock:
                under_way -= 1
            return Done()

    found, _ = collect(groups_of(TokenEngine(), Lengths(), environment=partial(Waits)), problems(4), 1)
    check_whole(found, problems(4))
    assert most == count


def test_two_problems_of_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="3 problems have only 2 ids"):
        collect(groups_of(TokenEngine(), Lengths()), [*problems(2), problems(1)[0]], 1)


def test_an_interrupted_collection_comes_back_after_resume() -> None:
    collector = Collector(groups=groups_of(TokenEngine(), Lengths()), source=ProblemSource(problems(20), 0))
    first = collector.take(4)
    collector.used()
    state_before, second = collector.state(), collector.take(4)
    assert collector.state() == state_before, "taken, and not trained on"
    again = Collector(groups=collector.groups, source=ProblemSource(problems(20), 0))
    again.load_state(state_before)
    assert again.take(4) == second != first


def test_request_seeds_depend_on_run_step_and_problem_alone() -> None:
    seeds = {request_seed(seed, step, problem) for seed in (0, 1) for step in (0, 1, 10) for problem in ("a", "b", "0/a")}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 0, "a") == 5050641589276093629  # recorded: another value would change every run


def test_in_lockstep_turns_are_sampled_in_order_whoever_answers_first() -> None:
    class Slow:
        """Two turns; the later the problem, the quicker the answer. The last to answer ends its rollout."""

        def start(self, problem: Problem) -> Sequence[Message]:
            self.number, self.turns = int(problem.id[1:]), 0
            return (Message("text", "?"),)

        def step(self, completion: Completion) -> Sequence[Message] | Done:
            self.turns += 1
            time.sleep(0.05 * (3 - self.number))
            return Done() if self.turns == 2 or self.number == 0 else (Message("text", "and?"),)

    class Notes(TokenEngine):
        def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
            def noted(idle: bool) -> Sequence[Job] | Close:
                jobs = feed(idle)
                if not isinstance(jobs, Close) and jobs:
                    deals.append([(job.request.problem_id, job.index) for job in jobs])
                return jobs

            return super().serve(noted, sampling)

    deals: list[list[tuple[str, int]]] = []
    groups = groups_of(Notes(), Lengths(), environment=Slow, lockstep=True, sampling=Sampling(max_new_tokens=400))
    collect(groups, problems(3), 1)
    assert deals == [
        [(f"p{i}", index) for i in range(3) for index in range(SAMPLES)],
        [(f"p{i}", index) for i in (1, 2) for index in range(SAMPLES)],
    ]
