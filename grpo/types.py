"""The nouns, in the order a training step meets them.

``Problem`` (a row of data) → ``Completion`` (what an engine returned) → ``Rollout`` (completion and scores) → ``Group`` (the
rollouts of one problem). Tensors come after: see ``grpo.batch``. Everything is frozen, plain Python, cheap to pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class FinishReason(StrEnum):
    """Why the engine stopped. ``stop``: an end token or a stop string; ``length``: the token limit cut it off."""

    stop = "stop"
    length = "length"


class Outcome(StrEnum):
    """How a score came about. With a value it judges the model, a timeout too; without one the grader failed: ``docs/rewards.md``."""

    ok = "ok"
    wrong_format = "wrong_format"
    timeout = "timeout"
    error = "error"
    crash = "crash"
    memory = "memory"
    invalid = "invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row of data. ``Problem(id="train/17", prompt="… What is 3 + 4 + 5?\\nAssistant:", answer="12", columns={"a": 3})``"""

    id: str
    prompt: str  # the whole text the policy sees, template included
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # every column of the data set, as it stands there


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled for one problem; the three per-token fields have the same length.

    ``Completion(problem_id="train/17", index=0, prompt_ids=(5, 9), token_ids=(7, 2), text="12", logprobs=(-0.1, -0.3),
    policy_versions=(4, 4), finish_reason=FinishReason.stop)``
    """

    problem_id: str
    index: int  # which completion of its problem's group
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]  # behavior policy, under the sampling temperature (and truncation, if any), in nats
    policy_versions: tuple[int, ...]  # the weights that sampled each token
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.logprobs), len(self.policy_versions)}
        if len(lengths) != 1:
            raise ValueError(
                f"completion {self.index} of problem {self.problem_id!r}: token_ids, logprobs and policy_versions have lengths "
                f"{len(self.token_ids)}, {len(self.logprobs)}, {len(self.policy_versions)}; they must be equal"
            )
        if not self.prompt_ids:
            raise ValueError(f"completion {self.index} of problem {self.problem_id!r}: prompt_ids is empty")

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one reward says of one completion. ``value`` is NaN when it could not be scored: that is not a zero."""

    value: float
    outcome: Outcome = Outcome.ok
    detail: str = ""  # what was extracted, or the traceback
    tags: tuple[str, ...] = ()  # counted in the metrics, e.g. ("wrong_answer",)

    @property
    def scored(self) -> bool:
        return not math.isnan(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A completion, its scores by reward part (before weighting), and their weighted sum (NaN = unscored)."""

    problem: Problem
    completion: Completion
    scores: Mapping[str, Score]
    reward: float

    @property
    def scored(self) -> bool:
        return not math.isnan(self.reward)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All rollouts of one problem in one step. They belong together by the problem's id, never by position."""

    problem: Problem
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        strangers = {rollout.problem.id for rollout in self.rollouts} - {self.problem.id}
        if strangers:
            raise ValueError(f"group of problem {self.problem.id!r} holds rollouts of other problems: {sorted(strangers)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy. ``stop`` strings end a completion and stay in its text."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """``num_completions`` samples for one prompt. Sample ``i`` draws its randomness from ``(seed, i)`` alone."""

    problem_id: str
    prompt_ids: tuple[int, ...]
    num_completions: int
    seed: int
