"""Whether the graders work: what could not be scored, and when to stop because of it.

A completion is unscored (NaN) only where its grader failed; one that used up time or memory as the model's doing has a value.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.types import FAILURE, Group, Outcome, Rollout, Score


class RewardFailure(RuntimeError):
    """Too many completions could not be scored for training to mean anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What one part could not score in a step: how often, and the last of its messages in one line."""

    part: str
    outcome: Outcome
    count: int
    message: str

    def __str__(self) -> str:
        return f"{_called(self.part)}: {self.count} unscored ({self.outcome}): {self.message}"


def failures(groups: Iterable[Group]) -> list[Failure]:
    """The unscored scores of a step by part and outcome, the most frequent first. For a console; the rollout files hold each one."""
    count: Counter[tuple[str, Outcome]] = Counter()
    last: dict[tuple[str, Outcome], str] = {}
    for _, part, score in _unscored(rollout for group in groups for rollout in group.rollouts):
        count[part, score.outcome] += 1
        last[part, score.outcome] = score.detail
    return [Failure(part=p, outcome=o, count=n, message=_last_line(last[p, o])) for (p, o), n in count.most_common()]


@dataclass(kw_only=True)
class UnscoredStop:
    """Stops a run whose graders fail: once a step, give it the step's groups.

    With ``u`` unscored of ``n`` rollouts over the last ``steps`` steps (over fewer, as if the missing ones were like them and
    fully scored), it raises when ``u > share · n``: after ``steps`` steps with a little more than ``share`` unscored, and at the
    first step if more than ``steps · share`` of it is.

    Args:
        weights: weight of each part in the reward; a part of weight 0 is only watched and stops nothing.
        share: of the rollouts; 1 never stops.
        steps: how many steps are looked at together.
    """

    weights: Mapping[str, float]
    share: float = 0.2
    steps: int = 3
    _seen: deque[_Step] = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share!r}; it must be a number from 0 to 1")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps is {self.steps!r}; it must be a whole number, 1 or more")
        self._seen = deque(maxlen=self.steps)

    def check(self, groups: Sequence[Group]) -> None:
        """
        Raises:
            RewardFailure: too much was unscored; the message names the parts, their outcomes, and the last traceback.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if not rollouts:
            return
        counted = [
            (rollout, part, score)
            for rollout, part, score in _unscored(r for r in rollouts if not r.scored)
            if self.weights.get(part, 1.0) != 0
        ]
        causes = Counter((part, str(score.outcome)) for _, part, score in counted)
        self._seen.append(_Step(total=len(rollouts), unscored=sum(not r.scored for r in rollouts), causes=dict(causes)))
        total = sum(step.total for step in self._seen)
        unscored = sum(step.unscored for step in self._seen)
        if unscored > self.share * total * self.steps / len(self._seen):
            message = self._message(unscored, total, counted[-1] if counted else None)
            self._seen.pop()  # the step is not trained on; with the reward repaired, it is made and looked at again
            raise RewardFailure(message)

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps, so that a resumed run stops where the whole one would have. Plain data."""
        return [
            {"total": s.total, "unscored": s.unscored, "causes": [[part, outcome, n] for (part, outcome), n in s.causes.items()]}
            for s in self._seen
        ]

    def load_state(self, state: Iterable[Mapping[str, Any]]) -> None:
        self._seen.clear()
        for s in state:
            causes = {(part, outcome): n for part, outcome, n in s["causes"]}
            self._seen.append(_Step(total=s["total"], unscored=s["unscored"], causes=causes))

    def _message(self, unscored: int, total: int, last: tuple[Rollout, str, Score] | None) -> str:
        steps = f"the last {len(self._seen)} steps" if len(self._seen) > 1 else "the step"
        causes: Counter[tuple[str, str]] = Counter()
        for step in self._seen:
            causes.update(step.causes)
        lines = [
            f"the rewards left {unscored} of {total} rollouts of {steps} unscored ({unscored / total:.0%}; "
            f"a run stops above {self.share:.0%} over {self.steps} steps): "
            + ", ".join(f"{_called(part)} {outcome} × {n}" for (part, outcome), n in causes.most_common())
        ]
        if last is not None:
            rollout, part, score = last
            lines.append(f"  the last one, {_called(part)} on completion {rollout.completion.index} of problem {rollout.problem.id!r}:")
            lines += [f"    {line}" for line in (score.detail or str(score.outcome)).splitlines()]
        lines.append("  → correct the function, or raise its limits; the rollout files hold every message (docs/rewards.md)")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    total: int
    unscored: int
    causes: Mapping[tuple[str, str], int]  # (part, outcome) → how often; a rollout may have several


def _unscored(rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, str, Score]]:
    """Where the environment failed, that alone: it is why its own scores are missing."""
    for rollout in rollouts:
        unscored = {part: score for part, score in rollout.scores.items() if not score.scored}
        for part in [FAILURE] if FAILURE in unscored else unscored:
            yield rollout, part, unscored[part]


def _called(part: str) -> str:
    return part if part == FAILURE else f"reward.{part}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"
