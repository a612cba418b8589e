"""Problems → scored groups: generate, score, put together by problem id."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from grpo.rewards.base import combine
from grpo.rollouts.base import Engine, Progress
from grpo.types import Completion, Group, Problem, Request, Rollout, Sampling, Score


class Scorer(Protocol):
    """``grpo.rewards.runtime.RewardRuntime``: one dict part → ``Score`` a completion, in order."""

    def score(self, completions: Sequence[Completion], problems: Sequence[Problem]) -> list[dict[str, Score]]: ...


@dataclass(kw_only=True)
class Collector:
    """Strictly on-policy: everything is sampled with the weights the engine has now.

    ``timings`` holds the seconds of the last call by phase.
    """

    engine: Engine
    runtime: Scorer
    encode: Callable[[Problem], tuple[int, ...]]
    sampling: Sampling
    completions_per_problem: int
    weights: Mapping[str, float]
    seed: int
    progress: Progress | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def collect(self, problems: Sequence[Problem], step: int) -> tuple[Group, ...]:
        """``completions_per_problem`` scored rollouts of each problem, in the order of the problems.

        Raises:
            ValueError: two problems have the same id, by which groups are told apart.
        """
        by_id = {problem.id: problem for problem in problems}
        if len(by_id) < len(problems):
            raise ValueError(f"{len(problems)} problems have only {len(by_id)} ids; groups are told apart by them")
        requests = [
            Request(
                problem_id=problem.id,
                prompt_ids=self.encode(problem),
                num_completions=self.completions_per_problem,
                seed=request_seed(self.seed, step, problem.id),
            )
            for problem in problems
        ]
        start = time.monotonic()
        completions = self.engine.generate(requests, self.sampling, self.progress)
        generated = time.monotonic()
        scores = self.runtime.score(completions, [by_id[c.problem_id] for c in completions])
        self.timings = {"generate": generated - start, "reward": time.monotonic() - generated}

        rollouts: dict[str, list[Rollout]] = defaultdict(list)
        for completion, parts in zip(completions, scores, strict=True):
            rollouts[completion.problem_id].append(
                Rollout(problem=by_id[completion.problem_id], completion=completion, scores=parts, reward=combine(parts, self.weights))
            )
        return tuple(Group(problem=problem, rollouts=tuple(rollouts[problem.id])) for problem in problems)


def request_seed(seed: int, step: int, problem_id: str) -> int:
    """63 bits that depend on the run's seed, the step and the problem alone, in every process and on every machine."""
    digest = hashlib.blake2b(f"{seed}/{step}/{problem_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
