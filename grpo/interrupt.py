"""Ctrl-C, SIGTERM and a closed terminal: stop where nothing is lost. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self


class Interrupted(BaseException):
    """The user asked to stop. Not an ``Exception``: nobody's error handling should swallow it."""


class StopSignal:
    """While entered, SIGINT, SIGTERM and SIGHUP raise ``Interrupted`` – at once inside ``anywhere()``, else at the next ``check()``.

    Rollouts can be cut off anywhere; an optimiser step or a checkpoint must be finished first.
    """

    def __init__(self) -> None:
        self.requested = False
        self._anywhere = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.take()
        return self

    def take(self) -> None:
        """Install the handlers, again if need be: ``ray.init`` puts its own in their place."""
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals, and neither do we
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup: the run is meant to outlive its terminal
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        if self._anywhere:
            raise Interrupted

    def check(self) -> None:
        if self.requested:
            raise Interrupted

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        self.check()
        self._anywhere = True
        try:
            yield
        except SystemError:  # compiled code, such as ray.wait, that an exception of a signal handler went through
            self.check()
            raise
        finally:
            self._anywhere = False
        self.check()
