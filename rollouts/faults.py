"""When an engine counts as hanging, and when a pool stops replacing one. Plain Python; the time is an argument."""

from __future__ import annotations

from collections import deque

_LONGEST_LOOK = 1.0  # seconds that count between two looks: a machine that slept, or a stopped process, is not a hanging engine


class Pulse:
    """Whether an engine still makes steps.

    Args:
        timeout: seconds without a step after which it hangs.
        now: of a monotonic clock.
    """

    def __init__(self, timeout: float, now: float) -> None:
        self._timeout = timeout
        self._beats = -1
        self._silent = 0.0
        self._looked = now

    def beat(self, beats: int) -> None:
        """The engine says how many steps it has made in all."""
        if beats != self._beats:
            self._beats, self._silent = beats, 0.0

    def hangs(self, now: float) -> bool:
        self._silent += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        return self._silent > self._timeout


class Restarts:
    """A bound on replacements, so that a crash loop ends: at most ``limit`` within any ``window`` seconds without progress in between."""

    def __init__(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        self._times: deque[float] = deque()

    def progress(self) -> None:
        """Something was finished: what was before is no crash loop."""
        self._times.clear()

    def allow(self, now: float) -> bool:
        """Note a replacement; False if it is one too many."""
        while self._times and now - self._times[0] > self._window:
            self._times.popleft()
        self._times.append(now)
        return len(self._times) <= self._limit
