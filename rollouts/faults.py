"""When an engine counts as hanging, and when a pool stops replacing one. Plain Python."""

from __future__ import annotations

_LONGEST_LOOK = 1.0  # seconds that count between two looks: a machine that slept, or a stopped process, is not a hanging engine


class Pulse:
    """Whether an engine still gives signs of life.

    Args:
        timeout: seconds without one after which it hangs.
        now: of a monotonic clock.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self._timeout = timeout
        self._beats = -1
        self._silent = 0.0
        self._looked = now

    def beat(self, beats: int) -> None:
        """The engine says how many it has given in all."""
        if beats != self._beats:
            self._beats, self._silent = beats, 0.0

    def hangs(self, now: float) -> bool:
        self._silent += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        return self._silent > self._timeout


class Restarts:
    """A bound on replacements, so that a crash loop ends, however slow: at most ``limit`` of them without progress in between."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def progress(self) -> None:
        """Something was finished: what was before is no crash loop."""
        self._count = 0

    def allow(self) -> bool:
        """Note a replacement; False if it is one too many."""
        self._count += 1
        return self._count <= self._limit
