"""Rollouts known beforehand: an engine that counts as far as its problem says, a reward of how far it came, and their collectors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from grpo.data import ProblemSource
from grpo.rollouts.base import Feed, Finished, Progress, ServedEngine
from grpo.rollouts.collect import Groups
from grpo.rollouts.dialogue import PlainText
from grpo.rollouts.paced import PacedCollector
from grpo.rollouts.scripted import ScriptedEngine
from grpo.toy import Characters
from grpo.types import Completion, Group, Problem, Sampling, Score

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


def paced(
    engine: ServedEngine, runtime: Any, k: int, batch: int = 4, count: int = 60, steps: int | None = None, **changes: Any
) -> PacedCollector:
    source = ProblemSource(problems(count), 0)
    return PacedCollector(groups=groups_of(engine, runtime, **changes), source=source, batch=batch, max_staleness=k, steps=steps)


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
