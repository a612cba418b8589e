"""Dynamic sampling (DAPO 2503.14476 §3.2): groups without signal are replaced by further problems until the batch is full, with a bound."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from grpo.types import Group, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What one step sampled: ``kept`` is trained on; ``dropped`` had no signal and was replaced. Nothing is forgotten: both are stored."""

    kept: tuple[Group, ...]
    dropped: tuple[Group, ...] = ()

    @property
    def all(self) -> tuple[Group, ...]:
        return self.kept + self.dropped


def draw_groups(
    collect: Callable[[Sequence[Problem]], Sequence[Group]],
    take: Callable[[int, Collection[str]], Sequence[Problem]],
    has_signal: Callable[[Group], bool],
    wanted: int,
    rounds: int,
) -> Draw:
    """Groups for one step.

    Every round draws as many problems as are missing, so that no group with signal is thrown away. What the last round gives is kept as
    it is; where the data has no problem left that this step has not drawn, the batch stays smaller. An epoch may end in the middle.

    Args:
        collect: problems → their scored groups.
        take: the next so many problems but those with these ids, which this step has drawn already.
        has_signal: whether a group's rewards differ.
        wanted: groups in the batch.
        rounds: at most so many; 1 is ordinary sampling.
    """
    kept: list[Group] = []
    dropped: list[Group] = []
    seen: set[str] = set()
    for number in range(1, rounds + 1):
        problems = take(wanted - len(kept), seen)
        if not problems:
            break
        seen |= {problem.id for problem in problems}
        groups = collect(problems)
        if number == rounds:
            kept += groups
            break
        kept += [group for group in groups if has_signal(group)]
        dropped += [group for group in groups if not has_signal(group)]
        if len(kept) == wanted:
            break
    return Draw(kept=tuple(kept), dropped=tuple(dropped))
