"""``grpo replay``: the stored rollouts of a run, scored again by a changed reward, or trained on again; and what is different then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo.metrics import has_signal
from grpo.rewards.health import failures
from grpo.rollouts.assembly import Scorer
from grpo.rollouts.episode import FAILURE, judged
from grpo.types import Group, Rollout, Score


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


def report(replays: Sequence[StepReplay], limit: int = 5) -> str:
    """Means before and after, how many judgements and groups changed, the largest changes, and what could not be scored."""
    before = [r for replayed in replays for r in rollouts(replayed.before)]
    after = [r for replayed in replays for r in rollouts(replayed.after)]
    changes = sorted((c for replayed in replays for c in replayed.changes), key=lambda c: -c.size)
    gained, lost = _signal_changes(replays)
    lines = [
        f"{len(before)} rollouts of {len(replays)} steps, scored again",
        f"  mean reward            {_mean(before):.4g} → {_mean(after):.4g}",
        f"  unscored               {sum(not r.scored for r in before)} → {sum(not r.scored for r in after)}",
        f"  rewards that changed   {len(changes)} ({len(changes) / max(len(before), 1):.1%})",
        f"  groups                 {gained} gain a signal, {lost} lose it",
    ]
    for name in dict.fromkeys([*_parts(before), *_parts(after)]):
        lines.append(f"  {name:<22} {_part_mean(before, name)} → {_part_mean(after, name)}")
    lines += [f"  {failure}" for failure in failures([g for replayed in replays for g in replayed.after])]
    for change in changes[:limit]:
        lines.append(f"\nstep {change.step}, {change.before.problem.id}, completion {change.before.completion.index}: "
                     f"{change.before.reward:g} → {change.after.reward:g} (answer {change.before.problem.answer!r})")
        lines += [f"  {part}: {score.value:g} {score.outcome} {score.detail[:200]}" for part, score in change.after.scores.items()]
        lines.append("  " + change.before.completion.text.strip()[-300:].replace("\n", "\n  "))
    return "\n".join(lines)


def compare_updates(stored: Mapping[str, float], fresh: Mapping[str, float]) -> str:
    """The metrics of a stored update beside those of the same step trained again, those of time and speed aside."""
    lines = [f"{'':<32} {'stored':>12} {'again':>12}"]
    for name in sorted(set(stored) & set(fresh)):
        if name.startswith(("policy/", "sampler/")):
            mark = "" if _same(stored[name], fresh[name]) else f"   differs by {fresh[name] - stored[name]:+.3g}"
            lines.append(f"{name:<32} {stored[name]:>12.6g} {fresh[name]:>12.6g}{mark}")
    return "\n".join(lines)


def _signal_changes(replays: Sequence[StepReplay]) -> tuple[int, int]:
    pairs = [(has_signal(b), has_signal(a)) for r in replays for b, a in zip(r.before, r.after, strict=True)]
    return sum(a and not b for b, a in pairs), sum(b and not a for b, a in pairs)


def _parts(found: Sequence[Rollout]) -> list[str]:
    return list(dict.fromkeys(part for r in found for part in r.scores))


def _part_mean(found: Sequence[Rollout], part: str) -> str:
    values = [r.scores.get(part, Score(value=math.nan)).value for r in found]
    kept = [v for v in values if not math.isnan(v)]
    return f"{math.fsum(kept) / len(kept):.4g}" if kept else "–"


def _mean(found: Sequence[Rollout]) -> float:
    kept = [r.reward for r in found if r.scored]
    return math.fsum(kept) / len(kept) if kept else math.nan


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
