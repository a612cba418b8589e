"""The nouns, in the order a training step meets them.

``Problem`` (a row of data) → ``Completion`` (what an engine returned) → ``Rollout`` (completion and scores) → ``Group`` (the
rollouts of one problem). Tensors come after: see ``grpo.batch``. Everything is frozen, plain Python, cheap to pickle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import compress
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
    # What data.template made of the row: the prompt without the chat template around it, and so the prompt itself where data.chat is false.
    question: str = None  # type: ignore[assignment]  # not given: the prompt; an empty one stays empty, whatever the prompt becomes

    def __post_init__(self) -> None:
        if self.question is None:
            object.__setattr__(self, "question", self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came of one problem's prompt; the per-token fields have the same length.

    In several turns the tokens of an environment, such as a tool's output, stand between those that the policy sampled: ``sampled``
    tells them apart, and only the policy's are trained. ``text`` is the policy's own, a turn a line: whatever a tool printed, it is not
    the policy's answer, so no reward finds it there. ``transcript`` has everything, in order.

    ``Completion(problem_id="train/17", index=0, prompt_ids=(5, 9), token_ids=(7, 2), text="12", logprobs=(-0.1, -0.3),
    policy_versions=(4, 4), finish_reason=FinishReason.stop)``
    """

    problem_id: str
    index: int  # which completion of its problem's group
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]  # behavior policy, under the sampling temperature (and truncation, if any), in nats; 0 where not sampled
    policy_versions: tuple[int, ...]  # the weights that sampled each token
    finish_reason: FinishReason
    sampled: tuple[bool, ...] = ()  # whether the policy sampled each token; empty: all of them
    kept: tuple[bytes, ...] = ()  # of each sampled token, what truncation left to choose from (``grpo.kept``); empty: all
    transcript: tuple[tuple[str, bool], ...] = ()  # (text, whether it is the policy's) turn by turn; empty: ``text`` is all there is

    def __post_init__(self) -> None:
        lengths = {len(self.token_ids), len(self.logprobs), len(self.policy_versions)}
        if len(lengths) != 1:
            raise ValueError(
                f"completion {self.index} of problem {self.problem_id!r}: token_ids, logprobs and policy_versions have lengths "
                f"{len(self.token_ids)}, {len(self.logprobs)}, {len(self.policy_versions)}; they must be equal"
            )
        if self.sampled and len(self.sampled) != len(self.token_ids):
            raise ValueError(
                f"completion {self.index} of problem {self.problem_id!r}: sampled has length {len(self.sampled)} and token_ids "
                f"{len(self.token_ids)}; they must be equal, or sampled empty"
            )
        if self.kept and len(self.kept) != self.num_sampled:
            raise ValueError(
                f"completion {self.index} of problem {self.problem_id!r}: kept has length {len(self.kept)}, but {self.num_sampled} tokens "
                "were sampled; they must be equal, or kept empty"
            )
        if not self.prompt_ids:
            raise ValueError(f"completion {self.index} of problem {self.problem_id!r}: prompt_ids is empty")

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.length

    @property
    def num_sampled(self) -> int:
        """Tokens of the policy: those that are trained."""
        return sum(self.sampled) if self.sampled else len(self.token_ids)

    @property
    def sampled_ids(self) -> tuple[int, ...]:
        """The policy's tokens without those of the environment."""
        return tuple(compress(self.token_ids, self.sampled)) if self.sampled else self.token_ids

    @property
    def sampled_logprobs(self) -> tuple[float, ...]:
        """``logprobs`` of the policy's tokens."""
        return tuple(compress(self.logprobs, self.sampled)) if self.sampled else self.logprobs

    @property
    def num_turns(self) -> int:
        """Stretches of text that the policy wrote."""
        return sum(own for _, own in self.transcript) if self.transcript else 1


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


FAILURE = "environment"  # the name under which a failure of the environment stands among a rollout's scores


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
    """How to sample. ``temperature`` 0 is greedy, without truncation. ``stop`` strings end a completion and stay in its text."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability are cut; 0: off
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    @property
    def truncates(self) -> bool:
        """Whether some tokens are ruled out: then log-probs are those of what is left, and completions say what that was (``kept``)."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """``num_completions`` samples for one prompt. Sample ``i`` draws its randomness from ``(seed, i)`` alone."""

    problem_id: str
    prompt_ids: tuple[int, ...]
    num_completions: int
    seed: int
    max_new_tokens: int | None = None  # a limit of its own, below the sampling's: what an earlier turn has left
