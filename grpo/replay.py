"""``grpo replay``: the stored rollouts of a run, scored again by a changed reward, or trained on again; and what is different then."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from grpo.metrics import has_signal, mean
from grpo.rewards.health import Failure, failures
from grpo.rollouts.assembly import Scorer
from grpo.rollouts.episode import judged
from grpo.run import MEASURED
from grpo.show import number
from grpo.types import FAILURE, Group, Outcome, Rollout, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One completion that the two rewards judge differently."""

    step: int
    before: Rollout
    after: Rollout

    @property
    def size(self) -> float:
        """|after − before|; infinite where only one of them could be scored."""
        difference = self.after.reward - self.before.reward
        return math.inf if math.isnan(difference) else abs(difference)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReplay:
    """A step scored again."""

    step: int
    before: tuple[Group, ...]
    after: tuple[Group, ...]

    @property
    def changes(self) -> list[Change]:
        pairs = zip(rollouts(self.before), rollouts(self.after), strict=True)
        return [Change(step=self.step, before=b, after=a) for b, a in pairs if not _same(b.reward, a.reward)]


def rescore(step: int, groups: Sequence[Group], runtime: Scorer, weights: Mapping[str, float]) -> StepReplay:
    """The same completions under another reward. ``weights`` are of the parts and of the environment's scores, which stay."""
    stored = rollouts(groups)
    scores = runtime.score([r.completion for r in stored], [r.problem for r in stored])
    fresh = iter([_judged_again(r, parts, weights) for r, parts in zip(stored, scores, strict=True)])
    after = tuple(Group(problem=g.problem, rollouts=tuple(next(fresh) for _ in g.rollouts)) for g in groups)
    return StepReplay(step=step, before=tuple(groups), after=after)


def _judged_again(rollout: Rollout, parts: Mapping[str, Score], weights: Mapping[str, float]) -> Rollout:
    own = {name: score for name, score in rollout.scores.items() if name not in parts and (name in weights or name == FAILURE)}
    return judged(rollout.problem, rollout.completion, parts, own, weights)


def rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def report(replays: Iterable[StepReplay], limit: int = 5) -> str:
    """Means before and after, how many judgements and groups changed, the largest changes, and what could not be scored.

    One step is held at a time, and ``limit`` completions beside it: a run's rollouts need not fit into memory.
    """
    before, after = _Sums(), _Sums()
    steps = changed = gained = lost = 0
    largest: list[Change] = []
    failed: dict[tuple[str, Outcome], Failure] = {}
    for replayed in replays:
        steps += 1
        before.add(replayed.before)
        after.add(replayed.after)
        changes = replayed.changes
        changed += len(changes)
        largest = sorted([*largest, *changes], key=lambda c: -c.size)[:limit]
        signals = [(has_signal(b), has_signal(a)) for b, a in zip(replayed.before, replayed.after, strict=True)]
        gained += sum(a and not b for b, a in signals)
        lost += sum(b and not a for b, a in signals)
        for failure in failures(replayed.after):
            known = failed.get(key := (failure.part, failure.outcome))
            failed[key] = replace(failure, count=failure.count + (known.count if known else 0))
    lines = [
        f"{before.rollouts} rollouts of {steps} steps, scored again",
        f"  mean reward            {before.reward.shown()} → {after.reward.shown()}",
        f"  unscored               {before.rollouts - before.reward.count} → {after.rollouts - after.reward.count}",
        f"  rewards that changed   {changed} ({changed / max(before.rollouts, 1):.1%})",
        f"  groups                 {gained} gain a signal, {lost} lose it",
    ]
    for name in dict.fromkeys([*before.parts, *after.parts]):
        lines.append(f"  {name:<22} {before.part(name).shown()} → {after.part(name).shown()}")
    lines += [f"  {failure}" for failure in sorted(failed.values(), key=lambda f: -f.count)]
    for change in largest:
        lines.append(f"\nstep {change.step}, {change.before.problem.id}, completion {change.before.completion.index}: "
                     f"{number(change.before.reward)} → {number(change.after.reward)} (answer {change.before.problem.answer!r})")
        for part, score in change.after.scores.items():
            said = score.detail.strip().splitlines()[-1:]  # of a traceback, the error
            lines.append(f"  {part}: {number(score.value)} {score.outcome} {''.join(said)[:200]}")
        lines.append("  " + change.before.completion.text.strip()[-300:].replace("\n", "\n  "))
    return "\n".join(lines)


@dataclass(slots=True)
class _Mean:
    """Of numbers that are met one after the other; NaN, an unscored one, is left out."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        if not math.isnan(value):
            self.total += value
            self.count += 1

    def shown(self) -> str:
        return f"{self.total / self.count:.4g}" if self.count else "–"


@dataclass(slots=True)
class _Sums:
    """What the rollouts of all steps got, under one of the two rewards."""

    rollouts: int = 0
    reward: _Mean = field(default_factory=_Mean)
    parts: dict[str, _Mean] = field(default_factory=dict)

    def add(self, groups: Sequence[Group]) -> None:
        for rollout in rollouts(groups):
            self.rollouts += 1
            self.reward.add(rollout.reward)
            for name, score in rollout.scores.items():
                self.parts.setdefault(name, _Mean()).add(score.value)

    def part(self, name: str) -> _Mean:
        return self.parts.get(name, _Mean())


def reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the rewards of an update's groups were, beside the metrics of what was learned from them."""
    return {
        "reward/mean": mean(r.reward for r in rollouts(groups) if r.scored),
        "rollout/groups_without_signal": mean(not has_signal(group) for group in groups),
    }


def compare_updates(stored: Mapping[str, float], fresh: Mapping[str, float]) -> str:
    """The metrics of a stored update and of its rewards beside those of the same step trained again; not what the clock decides."""
    lines = [f"{'':<32} {'stored':>12} {'again':>12}"]
    for name in sorted(set(stored) & set(fresh)):
        if not name.startswith(MEASURED):
            mark = "" if _same(stored[name], fresh[name]) else f"   differs by {fresh[name] - stored[name]:+.3g}"
            lines.append(f"{name:<32} {stored[name]:>12.6g} {fresh[name]:>12.6g}{mark}")
    return "\n".join(lines)


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
