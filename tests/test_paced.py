"""Collection ahead of the trainer: no staler than allowed, in the order of the data, each group once, through pauses for weights."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

import pytest

from grpo.data import ProblemSource
from grpo.metrics import staleness_metrics
from grpo.rollouts.assembly import ScoreWhen
from grpo.rollouts.base import Feed, Finished
from grpo.rollouts.collect import Collector, request_seed
from grpo.rollouts.paced import PacedCollector
from grpo.types import Group, Sampling

from .counted_rollouts import SAMPLES, Lengths, TokenEngine, check_whole, groups_of, paced, problems, train_on


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ahead_by_no_more_than_allowed_and_in_the_order_of_the_data(k: int) -> None:
    engine = TokenEngine(step_s=0.0005)
    with closing(paced(engine, Lengths(), k)) as collector:
        batches = train_on(collector, engine, range(1, 13), lambda step: time.sleep(0.01))
    expected = ProblemSource(problems(60), 0).take(48)
    check_whole([group for batch in batches for group in batch], expected)
    assert max(oldest(batches)) <= k
    mixed = [r for batch in batches for g in batch for r in g.rollouts if len(set(r.completion.policy_versions)) > 1]
    assert mixed, "weights change in the middle of completions"
    assert all(list(r.completion.policy_versions) == sorted(r.completion.policy_versions) for r in mixed)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_update_that_takes_long_is_overtaken_as_far_as_may_be(k: int) -> None:
    engine = TokenEngine()

    def update(step: int) -> None:
        deadline = time.monotonic() + 20
        while not all(group.done for group in collector._under_way):
            assert time.monotonic() < deadline, "what may be begun is sampled while the trainer is busy"
            time.sleep(0.002)

    with closing(paced(engine, Lengths(), k)) as collector:
        batches = train_on(collector, engine, range(1, 9), update)
    # Batches 1 to 1 + k are begun under version 0, and every batch after that as soon as there is room: k updates before its own.
    assert oldest(batches) == [min(step - 1, k) for step in range(1, 9)]


def oldest(batches: Sequence[Sequence[Group]]) -> list[float]:
    return [
        staleness_metrics([rollout for group in batch for rollout in group.rollouts], step - 1)["rollout/staleness_max"]
        for step, batch in enumerate(batches, start=1)
    ]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_more_is_begun_than_the_steps_that_are_left_will_use(k: int) -> None:
    """Six steps of four groups, and three more when the run is gone on with: the order and the seeds are those of a run without end."""
    order = ProblemSource(problems(60), 0).take(36)
    state, drawn = dict[str, Any](position=0), list[tuple[str, str]]()
    for steps, found in ((range(1, 7), order[:24]), (range(7, 10), order[24:])):
        engine, ahead = TokenEngine(), list[float]()

        def update(step: int, ahead: list[float] = ahead) -> None:
            ahead.append(collector.metrics()["async/groups_ahead"])
            drawn.extend((group.problem.id, str(group.draw)) for group in collector._under_way[:4])

        with closing(paced(engine, Lengths(), k, steps=len(steps))) as collector:
            collector.load_state(state)
            batches = train_on(collector, engine, steps, update)
            state = collector.state()
        check_whole([group for batch in batches for group in batch], found)
        assert ahead == [4 * min(k, steps[-1] - step) for step in steps]
        assert state["groups"] == [], "so that it can be gone on with on-policy, too"
    assert drawn == [(problem.id, f"place {place}") for place, problem in enumerate(order)]


def test_groups_are_replaced_in_the_last_step_too() -> None:
    order = ProblemSource(problems(60), 0).take(10)
    with closing(paced(TokenEngine(), Lengths(), 2, steps=2)) as collector:
        for step, replaced, begun in ((1, 0, 8), (2, 2, 6)):
            taken = [*collector.take(4)]
            collector.collect(taken, step)
            if replaced:
                more = collector.take(replaced, [problem.id for problem in taken])
                assert list(more) == order[8:]
                check_whole(collector.collect(more, step), more)
            assert len(collector._under_way) == begun
            collector.used()
        assert collector.state()["groups"] == []


def test_each_group_is_scored_once_however_often_it_is_paused() -> None:
    engine, runtime = TokenEngine(step_s=0.0005), Lengths()
    with closing(paced(engine, runtime, 2, score_when=ScoreWhen.group)) as collector:
        for step in range(1, 8):
            taken = collector.take(4)
            for _ in range(3):
                with collector.resting():
                    before = engine.steps
                    assert engine.steps == before, "nothing is sampled meanwhile"
            check_whole(collector.collect(taken, step), taken)
            collector.used()
    scored = Counter(pair for call in runtime.calls for pair in call)
    assert set(scored.values()) == {1}


def test_what_goes_wrong_in_the_background_is_raised_in_front() -> None:
    class Dies(TokenEngine):
        def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
            for number, finished in enumerate(super().serve(feed, sampling)):
                if number == 5:
                    raise RuntimeError("no engine is left")
                yield finished

    with closing(paced(Dies(), Lengths(), 1)) as collector, pytest.raises(RuntimeError, match="no engine is left"):
        collector.collect(collector.take(4), 1)


def test_a_small_data_set_is_never_begun_twice_at_once() -> None:
    """Across the end of an epoch a problem may come again while it is under way."""
    engine = TokenEngine()
    with closing(paced(engine, Lengths(), 2, batch=2, count=5)) as collector:
        batches = train_on(collector, engine, range(1, 20), batch=2)
    for batch in batches:
        assert len({group.problem.id for group in batch}) == len(batch) == 2


def test_no_two_draws_of_a_problem_share_their_randomness() -> None:
    """Few problems, groups that are replaced within a step, resumed from on-policy and then with a larger batch: the seeds stay apart."""
    drawn: list[tuple[str, int | str]] = []  # of every group that was trained on, or replaced

    def train(collector: PacedCollector, steps: Sequence[int], batch: int) -> None:
        for step in steps:
            for rounds in range(1 + step % 2):
                wanted = collector.take(batch - rounds, [g.problem.id for g in collector._under_way[: collector._num_taken]])
                collector.collect(wanted, step)
            drawn.extend((group.problem.id, group.draw) for group in collector._under_way[: collector._num_taken])
            collector.used()

    strict = Collector(groups=groups_of(TokenEngine(), Lengths()), source=ProblemSource(problems(6), 0))
    for step in (1, 2, 3):
        drawn += [(group.problem.id, step) for group in strict.collect(strict.take(3), step)]
        strict.used()
    state = strict.state()
    for steps, k, batch in ((range(4, 14), 1, 3), (range(14, 24), 1, 4)):
        with closing(paced(TokenEngine(), Lengths(), k, batch=batch, count=6)) as collector:
            collector.load_state(state)
            train(collector, steps, batch)
            state = collector.state()
    seeds = {request_seed(0, draw, problem) for problem, draw in drawn}
    assert len(drawn) > 70 and len(seeds) == len(drawn)


def test_staleness_below_one_is_the_other_collector() -> None:
    with pytest.raises(ValueError, match="max_staleness is 0"):
        paced(TokenEngine(), Lengths(), 0)


def test_metrics_say_how_busy_the_engines_were() -> None:
    engine = TokenEngine()
    with closing(paced(engine, Lengths(), 1)) as collector:
        collector.collect(collector.take(4), 1)
        deadline = time.monotonic() + 20
        while not all(group.done for group in collector._under_way) and time.monotonic() < deadline:
            time.sleep(0.01)
        steps = engine.steps
        time.sleep(0.3)
        assert engine.steps - steps <= 30, "an engine that has nothing to sample rests"
        assert collector.metrics()["async/rollouts_waiting"] == 8 * SAMPLES
        collector.used()
        found: Mapping[str, float] = collector.metrics()
    assert 0 < found["async/engine_idle_share"] <= 1, "what may be begun was sampled, and then the engine waited"
    assert found["async/groups_ahead"] == 4 and found["async/rollouts_waiting"] == 4 * SAMPLES
