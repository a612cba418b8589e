"""Threads for calls that may never return, such as those of a user's environment."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[Callable[..., None], tuple[Any, ...]]


class Hands:
    """Makes calls, in the order in which they come, in daemon threads.

    ``concurrent.futures`` joins its threads when the interpreter exits, so that one call that hangs keeps the whole process. These are
    left behind. What a call raises is its own affair: it must deal with it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        lock = threading.RLock()  # guards all below
        self._changed, self._returned = threading.Condition(lock), threading.Condition(lock)
        self._calls: deque[Call] = deque()
        self._threads = self._free = 0
        self._closed = False

    def submit(self, at_once: int, call: Callable[..., None], *args: Any) -> bool:
        """Have it called soon, with up to ``at_once`` calls under way; False: it is too late, ``close`` has been called."""
        with self._changed:
            if self._closed:
                return False
            self._calls.append((call, args))
            self._changed.notify()
            if len(self._calls) > self._free and self._threads < at_once:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name} {self._threads}", daemon=True).start()
            return True

    def finish(self, timeout: float) -> None:
        """Wait until all calls have returned, for ``timeout`` seconds at most; then ``close``."""
        with self._returned:
            self._returned.wait_for(lambda: not self._calls and self._free == self._threads, timeout)
        self.close()

    def close(self) -> Sequence[Call]:
        """Begin nothing more: returns the calls that were not begun. What is under way is not waited for."""
        with self._changed:
            self._closed = True
            dropped = tuple(self._calls)
            self._calls.clear()
            self._changed.notify_all()
            return dropped

    def _work(self) -> None:
        while True:
            with self._changed:
                self._free += 1
                self._returned.notify()
                self._changed.wait_for(lambda: self._calls or self._closed)
                self._free -= 1
                if self._closed:
                    return
                call, args = self._calls.popleft()
            call(*args)
