"""Collectors: what is sampled is scored and grouped, each rollout once – on-policy and ahead of it, through pauses and restarts."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import pytest

from grpo.config import ConfigError
from grpo.data import ProblemSource
from grpo.metrics import staleness_metrics
from grpo.rollouts import assembly
from grpo.rollouts.assembly import ScoreWhen
from grpo.rollouts.base import Close, Feed, Finished, Job, Progress, ServedEngine
from grpo.rollouts.collect import Collector, Groups, collect, request_seed
from grpo.rollouts.dialogue import PlainText
from grpo.rollouts.environments import Done, Environment, Message, SingleTurn
from grpo.rollouts.paced import PacedCollector
from grpo.rollouts.scripted import ScriptedEngine
from grpo.toy import Characters
from grpo.types import Completion, FinishReason, Group, Problem, Sampling, Score

SAMPLES = 3
WEIGHTS = {"length": 1.0}


class TokenEngine(ScriptedEngine):
    """A token a step for each of ``width`` jobs. How long a completion becomes depends on its problem and index; a few are very long."""

    def __init__(self, width: int = 4, step_s: float = 0.0) -> None:
        super().__init__(Characters(), slots=width, step_s=step_s, answer=lambda prompt, index, seed: counting(length(prompt, index)))
        self.steps = 0

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        for finished in super().serve(feed, sampling):
            self.steps += 1
            yield finished


def counting(tokens: int) -> str:
    """A text whose tokens are 0, 1, 2, …"""
    return "".join(map(chr, range(tokens)))


def length(problem: str, index: int) -> int:
    rng = random.Random(f"{problem}/{index}")
    return 60 if rng.random() < 0.1 else rng.randint(1, 8)


class Lengths:
    """A reward that notes what it was asked, in calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, int]]] = []
        self.delay = 0.0

    def score(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Score]]:
        assert [c.problem_id for c in completions] == [p.id for p in problems]
        self.calls.append([(c.problem_id, c.index) for c in completions])
        time.sleep(self.delay)
        return [{"length": Score(value=float(len(c.token_ids)))} for c in completions]


def problems(count: int) -> list[Problem]:
    return [Problem(id=f"p{i}", prompt=f"p{i}", answer="") for i in range(count)]


def groups_of(engine: ServedEngine, runtime: Any, **changes: Any) -> Groups:
    settings = {"sampling": Sampling(max_new_tokens=100), "completions_per_problem": SAMPLES, "weights": WEIGHTS, "seed": 0}
    return Groups(engine=engine, runtime=runtime, dialogue=PlainText(Characters()), **(settings | changes))


def check_whole(found: Sequence[Group], wanted: Sequence[Problem]) -> None:
    assert [g.problem for g in found] == list(wanted)
    for group in found:
        assert [r.completion.index for r in group.rollouts] == list(range(SAMPLES))
        for rollout in group.rollouts:
            expected = length(group.problem.id, rollout.completion.index)
            assert rollout.completion.token_ids == tuple(range(expected)) and rollout.reward == expected


# ---------------------------------------------------------------- on-policy


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


# ---------------------------------------------------------------- ahead, by pacing


def paced(engine: ServedEngine, runtime: Any, k: int, batch: int = 4, count: int = 60, **changes: Any) -> PacedCollector:
    return PacedCollector(
        groups=groups_of(engine, runtime, **changes), source=ProblemSource(problems(count), 0), batch=batch, max_staleness=k
    )


def train_on(
    collector: PacedCollector, engine: ServedEngine, steps: Sequence[int], update: Callable[[int], None] = lambda step: None, batch: int = 4
) -> list[tuple[Group, ...]]:
    """The loop of the trainer: weights, groups, update."""
    batches = []
    for step in steps:
        with collector.resting():
            engine.load_weights({}, step - 1)
        batches.append(collector.collect(collector.take(batch), step))
        update(step)
        collector.used()
    return batches


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
    return [staleness_metrics(batch, step - 1)["rollout/staleness_max"] for step, batch in enumerate(batches, start=1)]


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


# ---------------------------------------------------------------- when something fails


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


# ---------------------------------------------------------------- what does not come back


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
