"""The process around one engine of a pool: a Ray actor.

Three kinds of calls run beside one another, each in a thread of its own (``CONCURRENCY``): ``work`` is what the engine does, one
call at a time; ``watch`` waits for what it finishes; ``control`` brings jobs and parcels, and cancels.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from grpo.imports import search_path
from grpo.memory import reuse_freed_pages
from grpo.rollouts.base import Close, Finished, Job, ServedEngine, SyncReport
from grpo.rollouts.transfer import Parcel, ParcelStream
from grpo.rollouts.weights import Spec
from grpo.types import Completion, Request, Sampling

CONCURRENCY = {"work": 1, "watch": 1, "control": 1}
_IDLE = 0.02  # seconds an idle engine waits for jobs before it looks whether it was cancelled
_LOOK = 0.5  # seconds a look waits for something to be finished


@dataclass(frozen=True, slots=True)
class Born:
    """An engine has started."""

    pid: int
    node: str  # ray's id of the machine it is on
    slots: int
    context_length: int


class EngineLost(RuntimeError):
    """The engine can do nothing more; its process is still there. Another in its place could."""


@dataclass(frozen=True, slots=True)
class Look:
    """What came of an engine since the last look: of which call, how many signs of life it has given in all, what it finished."""

    call: int
    beats: int
    finished: Finished


class EngineActor:
    """See the module's text. Calls of a pool are numbered, so that what is late for one does not hit the next."""

    def __init__(self) -> None:
        # Ctrl-C in a terminal reaches the whole process group. The driver decides what it means: it may want to save first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._engine: ServedEngine | None = None
        self._changed = threading.Condition()  # guards all below
        self._call = 0
        self._cancelled = 0
        self._beats = 0
        self._idle = True  # it waits for jobs
        self._progress: int | None = None
        self._ended = 0
        self._finished: Finished = []
        self._queues: defaultdict[int, queue.SimpleQueue[Any]] = defaultdict(queue.SimpleQueue)  # call → what was brought for it

    # work

    def start(self, factory: Callable[..., ServedEngine], kwargs: Mapping[str, Any]) -> Born:
        import ray

        self._engine = factory(**kwargs)
        reuse_freed_pages()
        node = ray.get_runtime_context().get_node_id()
        return Born(os.getpid(), node, self._engine.slots, self._engine.context_length)

    def serve(self, call: int, sampling: Sampling, jobs: Sequence[Job], exact: bool) -> Look:
        """Sample ``jobs``, then what ``bring`` brings until it brings a ``Close``; ``exact``: these alone, and remember nothing before."""
        assert self._engine is not None
        inbox = self._queue(call)
        inbox.put(jobs)
        if exact:
            inbox.put(Close.finish)
            self._engine.forget()

        def feed(idle: bool) -> Sequence[Job] | Close:
            coming = _next_jobs(inbox, idle)
            self._idle = idle and not coming
            return coming

        with self._at_work(call), closing(self._engine.serve(feed, sampling)) as steps:
            for finished in steps:
                if not self._step(call, finished):
                    break
        return self._drain()

    def load(self, call: int, version: int, specs: Mapping[str, Spec]) -> SyncReport:
        assert self._engine is not None
        with self._at_work(call):
            return self._engine.load_weights(ParcelStream(specs, self._arriving(call)), version)

    def probe(self, call: int, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        assert self._engine is not None
        with self._at_work(call):
            return self._engine.generate(requests, sampling, lambda done, total: self._beat())

    def sleep(self, call: int) -> None:
        assert self._engine is not None
        with self._at_work(call):
            self._engine.sleep()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    # watch

    def look(self, call: int) -> Look:
        """Wait a moment for something to be finished."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._ended >= call, timeout=_LOOK)
        return self._drain()

    # control

    def bring(self, call: int, parcel: Any) -> None:
        """Jobs or a ``Close`` for a call of ``serve``; for one of ``load`` a parcel of weights, or None: there will be no more."""
        self._queue(call).put(parcel)

    def cancel(self, call: int) -> None:
        """This call and all before it are no longer wanted."""
        with self._changed:
            self._cancelled = max(self._cancelled, call)

    def _queue(self, call: int) -> queue.SimpleQueue[Any]:
        with self._changed:
            return self._queues[call]

    @contextmanager
    def _at_work(self, call: int) -> Iterator[None]:
        """Raises:
        EngineLost: what the engine raised means that it is no more.
        """
        assert self._engine is not None
        with self._changed:
            self._call, self._finished = call, []
        try:
            yield
        except Exception as error:
            if self._engine.broken_by(error):
                raise EngineLost(f"{type(error).__name__}: {error}") from error
            raise
        finally:
            self._end(call)

    def _end(self, call: int) -> None:
        with self._changed:
            self._ended = call
            for past in [number for number in self._queues if number <= call]:
                del self._queues[past]
            self._changed.notify_all()

    def _beat(self) -> None:
        with self._changed:
            self._beats += 1

    def _step(self, call: int, finished: Finished) -> bool:
        """Note a step, which is a sign of life if it computed something or had nothing to compute; False if the call was cancelled."""
        assert self._engine is not None
        before, self._progress = self._progress, self._engine.progress
        with self._changed:
            self._beats += self._idle or bool(finished) or self._progress is None or self._progress != before
            self._finished += finished
            if finished:
                self._changed.notify_all()
            return call > self._cancelled

    def _drain(self) -> Look:
        with self._changed:
            finished, self._finished = self._finished, []
            return Look(self._call, self._beats, finished)

    def _arriving(self, call: int) -> Iterator[Parcel]:
        inbox = self._queue(call)
        parcel: Parcel | None
        while (parcel := inbox.get()) is not None:
            self._beat()
            yield parcel


def _next_jobs(inbox: queue.SimpleQueue[Any], idle: bool) -> Sequence[Job] | Close:
    try:
        coming: Sequence[Job] | Close = inbox.get(timeout=_IDLE) if idle else inbox.get_nowait()
    except queue.Empty:
        return ()
    return coming


def engine_environment(cpus: int) -> dict[str, str]:
    """Threads: as many as the engine was given, asleep while they wait. And modules are found where the driver finds them.

    Threads that spin for long take the cores from the trainer, or another engine, that could use them: training ran ten times
    slower. Those that sleep at once lose a tenth of the time in waking up after each of a thousand operations a token: they spin
    for some 50 µs (libgomp's count wins over the policy).
    """
    threads = str(max(cpus, 1))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "20000",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": search_path(),
    }
