"""Problems → scored groups, with the weights the engines have now. ``grpo.rollouts.paced`` is the collector that runs ahead."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from grpo.config import ConfigError
from grpo.rollouts.assembly import Assembly, GroupInMaking, Scorer, ScoreWhen
from grpo.rollouts.base import Engine, Progress
from grpo.rollouts.environments import Environment, SingleTurn
from grpo.rollouts.episode import Dialogue, Episode
from grpo.types import Group, Problem, Sampling


class Source(Protocol):
    """``grpo.data.ProblemSource``: an endless stream of problems, whose place is one number."""

    position: int

    @property
    def problems(self) -> Sequence[Problem]: ...

    def take(self, count: int, besides: Collection[str] = ()) -> Sequence[Problem]: ...


@dataclass(kw_only=True)
class Groups:
    """How groups are made: everything about a collector but when.

    Args:
        weights: reward part → its weight in the sum.
        judge: tells rewards that may score otherwise apart: what other ones have scored ahead is scored again when a run goes on.
        score_when: how much the rewards want to see at once.
        lockstep: see ``Assembly``; for schedules that are exact to the bit.
    """

    engine: Engine
    runtime: Scorer
    dialogue: Dialogue
    sampling: Sampling
    completions_per_problem: int
    weights: Mapping[str, float]
    seed: int
    judge: str = ""
    environment: Callable[[], Environment] = SingleTurn
    score_when: ScoreWhen = ScoreWhen.each
    lockstep: bool = False

    def begin(self, problem: Problem, draw: int | str) -> GroupInMaking:
        """A group of which nothing is there yet. ``draw``: see ``request_seed``."""
        seed, tokens = request_seed(self.seed, draw, problem.id), self.sampling.max_new_tokens
        episodes = [
            Episode(problem, index, seed, self.environment, self.dialogue, tokens, self.engine.context_length - tokens)
            for index in range(self.completions_per_problem)
        ]
        return GroupInMaking(problem=problem, draw=draw, episodes=episodes)

    def assembly(self) -> Assembly:
        return Assembly(self.runtime, self.weights, score_when=self.score_when, lockstep=self.lockstep)


@dataclass(kw_only=True)
class Collector:
    """Strictly on-policy: everything is sampled when it is asked for.

    ``timings`` holds the seconds of the last call by phase: until all is sampled, and what the rewards took beyond that.
    """

    groups: Groups
    source: Source
    progress: Progress | None = None
    timings: dict[str, float] = field(default_factory=dict)
    _used: int = 0  # problems of the source whose groups were trained on

    def take(self, count: int, besides: Collection[str] = ()) -> Sequence[Problem]:
        """The next problems but those with these ids; see ``ProblemSource``."""
        return self.source.take(count, besides)

    def collect(self, problems: Sequence[Problem], step: int) -> tuple[Group, ...]:
        """Scored groups of the problems, in their order.

        Raises:
            ValueError: two problems have the same id, by which groups are told apart.
        """
        groups, self.timings = collect(self.groups, problems, step, self.progress)
        return groups

    def used(self) -> None:
        """All that was taken is trained on: from now on ``state`` does not bring it back."""
        self._used = self.source.position

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The engines are free for other work."""
        yield

    def metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the place in the data, behind what was trained on."""
        return {"position": self._used}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ConfigError: the run has sampled ahead, and what it began would be lost.
        """
        if state.get("groups"):
            begun = len(state["groups"])
            raise ConfigError("rollout.max_staleness", f"is 0, and this run has begun {begun} groups ahead", "leave it as it was")
        self.source.position = self._used = state["position"]

    def close(self) -> None:
        """Nothing is under way."""


def collect(
    groups: Groups, problems: Sequence[Problem], step: int, progress: Progress | None = None
) -> tuple[tuple[Group, ...], dict[str, float]]:
    """Scored groups of the problems, in their order, and the seconds until all was sampled, and scored after that."""
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError(f"{len(problems)} problems have only {len({p.id for p in problems})} ids; groups are told apart by them")
    begun = [groups.begin(problem, step) for problem in problems]
    total = sum(len(group.episodes) for group in begun)
    start = time.monotonic()

    def told() -> None:
        if progress is not None:
            progress(total - assembly.unfinished, total)

    with groups.assembly() as assembly:
        assembly.open(begun)
        with closing(groups.engine.serve(assembly.feed, groups.sampling)) as steps:
            for finished in steps:
                assembly.note(finished)
                told()
        told()
        sampled = time.monotonic()
        assembly.wait(lambda: all(group.done for group in begun), told)
    return tuple(group.group() for group in begun), {"generate": sampled - start, "reward": time.monotonic() - sampled}


def request_seed(seed: int, draw: int | str, problem_id: str) -> int:
    """63 bits that depend on these three alone, in every process and on every machine.

    Args:
        seed: the run's.
        draw: tells how often the problem was drawn before: the step it was drawn for, or, where sampling runs ahead of steps, the place
            in the data it was drawn from.
    """
    digest = hashlib.blake2b(f"{seed}/{draw}/{problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
