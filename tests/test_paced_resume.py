"""States of the paced collector: what was begun comes back where it fits, or says why not; what hangs is not waited for."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing

import pytest

from grpo.config import ConfigError
from grpo.data import ProblemSource
from grpo.rollouts import assembly
from grpo.rollouts.base import Progress
from grpo.rollouts.collect import Collector
from grpo.rollouts.environments import Done, Message, SingleTurn
from grpo.rollouts.paced import PacedCollector
from grpo.types import Completion, Problem, Score

from .counted_rollouts import SAMPLES, Lengths, TokenEngine, check_whole, groups_of, paced, problems, train_on


def test_a_state_brings_back_what_was_begun() -> None:
    """Also from the middle of a step: nothing is lost, nothing comes twice, and tokens sampled before keep their versions."""
    import io

    import torch

    engine = TokenEngine(step_s=0.0005)
    first = paced(engine, Lengths(), 2)
    train_on(first, engine, [1, 2])
    first.take(4)  # and not trained on: the run is stopped here
    buffer = io.BytesIO()
    torch.save(first.state(), buffer)
    first.close()
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    begun = {
        (group["problem"], index): tuple(tokens["token_ids"])
        for group in state["groups"]
        for index, tokens in group["begun"].items()
        if tokens["token_ids"]
    }
    assert begun and any(group["rollouts"] for group in state["groups"]), "this moment has half-made rollouts and scored ones"
    engine, runtime = TokenEngine(step_s=0.0005), Lengths()
    with closing(paced(engine, runtime, 2)) as second:
        second.load_state(state)
        batches = train_on(second, engine, range(3, 9))
    check_whole([group for batch in batches for group in batch], ProblemSource(problems(60), 0).take(32)[8:])
    scored = {pair for call in runtime.calls for pair in call}
    there = {(group["problem"], index) for group in state["groups"] for index in group["rollouts"]}
    assert not scored & there, "what was scored is not scored again"
    for rollout in (r for batch in batches for g in batch for r in g.rollouts):
        kept = len(begun.get((rollout.problem.id, rollout.completion.index), ()))
        versions = rollout.completion.policy_versions
        if (rollout.problem.id, rollout.completion.index) not in there:
            assert all(v <= 1 for v in versions[:kept]) and all(v >= 2 for v in versions[kept:]), "the weights were there before it went on"


def test_a_reward_that_breaks_ends_the_run_and_loses_nothing_that_was_sampled() -> None:
    class Breaks(Lengths):
        def score(
            self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
        ) -> list[dict[str, Score]]:
            if len(self.calls) == 2:
                raise RuntimeError("reward workers do not start")
            return super().score(completions, problems)

    engine = TokenEngine(step_s=0.001)
    with closing(paced(engine, Breaks(), 1)) as collector:
        with pytest.raises(RuntimeError, match="reward workers do not start"):
            collector.collect(collector.take(4), 1)
        state = collector.state()
    assert len(state["groups"]) == 8 and any(group["rollouts"] or group["over"] or group["begun"] for group in state["groups"])
    with closing(paced(TokenEngine(), Lengths(), 1)) as again:
        again.load_state(state)
        check_whole(again.collect(again.take(4), 1), ProblemSource(problems(60), 0).take(4))


def test_what_could_not_be_scored_is_scored_again_after_a_resume() -> None:
    class Blind(Lengths):
        def score(
            self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
        ) -> list[dict[str, Score]]:
            return [{"length": Score(value=math.nan)} for _ in super().score(completions, problems)]

    with closing(paced(TokenEngine(), Blind(), 1)) as collector:
        found = collector.collect(collector.take(4), 1)
        assert not any(r.scored for g in found for r in g.rollouts)
        state = collector.state()
    with closing(paced(TokenEngine(), Lengths(), 1)) as again:
        again.load_state(state)
        check_whole(again.collect(again.take(4), 1), [group.problem for group in found])


def test_what_other_rewards_scored_ahead_is_scored_again() -> None:
    class Doubled(Lengths):
        def score(
            self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
        ) -> list[dict[str, Score]]:
            return [{"length": Score(value=2 * s["length"].value)} for s in super().score(completions, problems)]

    with closing(paced(TokenEngine(), Lengths(), 1, judge="lengths")) as collector:
        found = collector.collect(collector.take(4), 1)
        state = collector.state()
    finished = sum(len(plain["rollouts"]) for plain in state["groups"])
    for judge, runtime, factor, asked in (("lengths", Lengths(), 1, False), ("doubled", Doubled(), 2, True)):
        with closing(paced(TokenEngine(), runtime, 1, judge=judge)) as again:
            again.load_state(state)
            same = again.collect(again.take(4), 1)
        scored = {pair for call in runtime.calls for pair in call}
        assert [r.completion for g in same for r in g.rollouts] == [r.completion for g in found for r in g.rollouts]
        assert [r.reward for g in same for r in g.rollouts] == [factor * r.reward for g in found for r in g.rollouts]
        assert finished >= 4 * SAMPLES and ((found[0].problem.id, 0) in scored) is asked


def test_groups_are_not_put_back_under_another_question() -> None:
    """Rows that have no id of their own are called by their places, which other data have too."""
    with closing(paced(TokenEngine(), Lengths(), 1)) as collector:
        collector.collect(collector.take(4), 1)
        state = collector.state()
    others = [Problem(id=p.id, prompt=p.prompt + "!", answer="") for p in problems(60)]
    source = ProblemSource(others, 0)
    again = PacedCollector(groups=groups_of(TokenEngine(), Lengths()), source=source, batch=4, max_staleness=1)
    with closing(again), pytest.raises(ConfigError, match=r"data\.problems: problem 'p\d+', of which this run .* is another one now"):
        again.load_state(state)


def test_a_run_that_sampled_ahead_does_not_go_on_without() -> None:
    with closing(paced(TokenEngine(), Lengths(), 1)) as collector:
        collector.collect(collector.take(4), 1)
        state = collector.state()
    strict = Collector(groups=groups_of(TokenEngine(), Lengths()), source=ProblemSource(problems(60), 0))
    with pytest.raises(ConfigError, match=r"rollout\.max_staleness: is 0, and this run has begun 8 groups ahead"):
        strict.load_state(state)
    state = strict.state()
    with closing(paced(TokenEngine(), Lengths(), 1)) as ahead:  # the other way round there is nothing to lose
        ahead.load_state(state)
        assert len(ahead.collect(ahead.take(4), 1)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": SAMPLES - 1}, rf"rollout\.completions_per_problem: is {SAMPLES - 1}, and this run has begun a group of {SAMPLES}"),
        ({"problems": 9}, r"data\.problems: no longer have problem 'p\d+', of which this run has begun a group"),
        ({"k": 1}, r"rollout\.max_staleness: is 1 and was 2: some of the 8 groups"),
        ({"batch": 2}, r"rollout\.problems_per_step: is 2 and was 4"),
        ({"samples": SAMPLES + 1, "problems": 70, "k": 3, "batch": 5}, None),
    ],
    ids=["fewer completions", "other data", "less staleness", "a smaller batch", "more of all"],
)
def test_what_was_begun_goes_on_only_where_it_fits(change: dict[str, int], message: str | None) -> None:
    engine = TokenEngine()
    with closing(paced(engine, Lengths(), 2)) as collector:
        train_on(collector, engine, [1])
        state = collector.state()
    given = {"samples": SAMPLES, "problems": 60, "k": 2, "batch": 4} | change
    shape = {"batch": given["batch"], "count": given["problems"], "completions_per_problem": given["samples"]}
    with closing(paced(TokenEngine(), Lengths(), given["k"], **shape)) as second:
        if message:
            with pytest.raises(ConfigError, match=message):
                second.load_state(state)
        else:
            second.load_state(state)
            assert len(second.collect(second.take(5), 2)) == 5


# ---------------------------------------------------------------- what does not come back in time


class Stuck(SingleTurn):
    """Never answers to some problems, and has all the time in the world."""

    timeout_s = 1e6

    def __init__(self, *stuck: str) -> None:
        self.stuck = stuck
        self.id = ""

    def start(self, problem: Problem) -> Sequence[Message]:
        self.id = problem.id
        return super().start(problem)

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        if self.id in self.stuck:
            threading.Event().wait()
        return super().step(completion)


def test_a_state_does_not_wait_for_an_environment_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rollout begins anew when the run is gone on with; the others are there."""
    monkeypatch.setattr(assembly, "_COME_TO_REST", 0.2)
    order = ProblemSource(problems(60), 0).take(8)
    engine = TokenEngine()
    with closing(paced(engine, Lengths(), 1, environment=lambda: Stuck(order[5].id))) as collector:
        found = collector.collect(collector.take(4), 1)
        check_whole(found, order[:4])
        collector.used()
        deadline = time.monotonic() + 20
        while not all(group.done for group in collector._under_way if group.problem != order[5]):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        state = collector.state()
    stuck = next(group for group in state["groups"] if group["problem"] == order[5].id)
    assert not (stuck["rollouts"] or stuck["over"] or stuck["begun"])
    runtime = Lengths()
    with closing(paced(TokenEngine(), runtime, 1)) as again:
        again.load_state(state)
        check_whole(again.collect(again.take(4), 2), order[4:])
    assert Counter(pair for call in runtime.calls for pair in call if pair[0] in {p.id for p in order}) == {
        (order[5].id, index): 1 for index in range(SAMPLES)
    }


def test_a_state_does_not_wait_for_a_reward_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is at is scored again."""
    monkeypatch.setattr(assembly, "_COME_TO_REST", 0.2)
    at_it, enough = threading.Event(), threading.Event()

    class Long(Lengths):
        def score(
            self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
        ) -> list[dict[str, Score]]:
            at_it.set()
            enough.wait()
            return super().score(completions, problems)

    with closing(paced(TokenEngine(), Long(), 1)) as collector:
        taken = collector.take(4)
        assert at_it.wait(20)
        state = collector.state()
        enough.set()
        check_whole(collector.collect(taken, 1), taken)
    assert any(group["over"] for group in state["groups"]) and not any(group["rollouts"] for group in state["groups"])
    with closing(paced(TokenEngine(), Lengths(), 1)) as again:
        again.load_state(state)
        check_whole(again.collect(again.take(4), 1), taken)
