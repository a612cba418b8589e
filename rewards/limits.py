"""How much time and memory a reward function may take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

COMPLETIONS_PER_SHARE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardLimits:
    """The limits of one part on one completion. ``RewardLimits(cpu_s=5.0)`` allows 5 s of CPU time and waits 16 s at most.

    Attributes:
        cpu_s: seconds of CPU time of the worker. The limit that decides: it is the same on an idle and on a busy machine.
        wall_s: seconds on the clock, for functions that wait; time in which the worker stood in the queue for a core is not
            counted. None: 3 · ``cpu_s`` + 1.
        memory_mb: MiB that a worker may map beyond its imports.

    Raises:
        ValueError: a limit that cannot work: which one, its value, what is allowed.
    """

    cpu_s: float = 5.0
    wall_s: float | None = None
    memory_mb: int = 2048

    def __post_init__(self) -> None:
        if not _positive(self.cpu_s):
            raise ValueError(f"cpu_s is {self.cpu_s!r}; it must be a positive number of seconds")
        if self.wall_s is not None and not _positive(self.wall_s):
            raise ValueError(f"wall_s is {self.wall_s!r}; it must be a positive number of seconds, or null for 3 · cpu_s + 1")
        if self.wall_s is not None and self.wall_s < self.cpu_s:
            raise ValueError(f"wall_s is {self.wall_s:g} and cpu_s {self.cpu_s:g}; wall_s must be at least cpu_s, which else never applies")
        if isinstance(self.memory_mb, bool) or not isinstance(self.memory_mb, int) or self.memory_mb < 1:
            raise ValueError(f"memory_mb is {self.memory_mb!r}; it must be a whole number of MiB, 1 or more")

    @property
    def wall(self) -> float:
        return 3 * self.cpu_s + 1 if self.wall_s is None else self.wall_s

    def with_changes(self, changes: Mapping[str, Any]) -> RewardLimits:
        """These limits with some of them changed. A new ``cpu_s`` brings its own ``wall_s`` unless one is given beside it.

        Raises:
            ValueError: a name that is no limit, or a value that cannot work.
        """
        names = [field.name for field in fields(self)]
        for name in changes:
            if name not in names:
                raise ValueError(f"{name} is no limit; there are: {', '.join(names)}")
        derived = {"wall_s": None} if "cpu_s" in changes else {}
        return replace(self, **{**derived, **changes})

    def for_batch(self, num_completions: int) -> RewardLimits:
        """The limits of one call on so many completions: the times, once for every 16 completions begun."""
        shares = max(math.ceil(num_completions / COMPLETIONS_PER_SHARE), 1)
        return replace(self, cpu_s=self.cpu_s * shares, wall_s=None if self.wall_s is None else self.wall_s * shares)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
