"""The owner's side of the sandbox: a pool of fork-servers, each leased to one run at a time."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from grpo.rewards.sandbox import codec, probe
from grpo.rewards.sandbox.interpreter import IMPORTS
from grpo.rewards.sandbox.levels import LEVELS, STRONG
from grpo.rewards.sandbox.outcome import Outcome
from grpo.rewards.sandbox.types import Call, Execution, Limits, SandboxError, SandboxUnavailable
from grpo.rewards.sandbox.worker import Worker, WorkerLost

_log = logging.getLogger(__name__)

_ATTEMPTS = 3  # a worker that is lost is replaced and the program run again
_PROBE_LIMITS = Limits(cpu_s=30, wall_s=120)


class Sandbox:
    """Runs Python programs that nobody has read. Safe to use from threads, from asyncio (``asyncio.to_thread``), in Ray actors.

    Args:
        workers: how many programs run at the same time; one more call waits for its turn. One a core is enough.
        limits: of every run that does not bring its own.
        numpy: import NumPy once in advance, instead of 60 ms in each program that uses it.
        level: insist on this level instead of the strongest one that holds.
        allow_weak: rather than refuse, go down to "seccomp", where programs can read and change the files of this user.
        unsafe: rather than refuse, run programs without any isolation.

    Raises:
        SandboxUnavailable: no (allowed) level holds on this machine.
    """

    def __init__(
        self,
        workers: int = 2,
        limits: Limits | None = None,
        *,
        numpy: bool = False,
        level: str | None = None,
        allow_weak: bool = False,
        unsafe: bool = False,
    ) -> None:
        if workers < 1:
            raise ValueError(f"Sandbox(workers={workers}): at least one is needed")
        if numpy and importlib.util.find_spec("numpy") is None:
            raise ValueError("Sandbox(numpy=True): NumPy is not installed")
        self.limits = limits or Limits()
        imports = (*IMPORTS, "numpy", "numpy.random") if numpy else IMPORTS
        candidates = _candidates(level, allow_weak, unsafe)
        #: "namespaces", "landlock+uid" or "landlock"; "seccomp" only with allow_weak, "none" only with unsafe
        self.level: str
        self.level, first = _strongest(candidates, imports)
        #: what the level leaves open, or nothing; it begins every line that this sandbox logs
        self.weakness = LEVELS[self.level].weakness
        start = functools.partial(_start, self.level, imports)  # without a reference to self, which would then never be collected
        self._workers = _Workers(workers, first, start)
        self._end = weakref.finalize(self, self._workers.close)
        self._say(logging.INFO, f"{workers} workers")

    def _say(self, severity: int, text: str) -> None:
        warning = f"NOT SAFE, {self.weakness}: " if self.weakness else ""
        _log.log(max(severity, logging.WARNING) if self.weakness else severity, "sandbox at level %r: %s%s", self.level, warning, text)

    def run(self, source: str | bytes, stdin: bytes | str = b"", *, limits: Limits | None = None) -> Execution:
        """Run ``source`` as a script, with ``stdin`` to read.

        Raises:
            SandboxError: the sandbox failed, several times; nothing is known of the program.
        """
        limits = limits or self.limits
        data = stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else bytes(stdin)
        return self._do(codec.encode((None, _as_bytes(source), [])), data, limits).execution(limits)

    def call(self, source: str | bytes, function: str, arguments: Sequence[Sequence[Any]], *, limits: Limits | None = None) -> Call:
        """Run ``source``, then call its ``function``, or that method of its ``class Solution``, once per argument list.

        The limits are those of all calls together. A call that raises does not keep the later ones from being made; the status
        is ``ok`` when all of them were made and the process came to its end.

        Raises:
            SandboxError: the sandbox failed, several times; nothing is known of the program.
            TypeError: an argument is not of a builtin plain type.
        """
        limits = limits or self.limits
        job = codec.encode((function, _as_bytes(source), [list(each) for each in arguments]))
        return self._do(job, b"", limits).call(limits, len(arguments))

    def _do(self, job: bytes, stdin: bytes, limits: Limits) -> Outcome:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._workers.lease() as worker:
                    return worker.run(job, stdin, limits)
            except WorkerLost as error:
                if attempt == _ATTEMPTS or self._workers.closed:
                    raise
                self._say(logging.WARNING, f"attempt {attempt} of {_ATTEMPTS} failed, trying again: {error}")
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End all workers. Runs that are under way raise ``SandboxError``."""
        self._end()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a Sandbox cannot be pickled: make one in the process, or in the Ray actor, that uses it")


def _as_bytes(source: str | bytes) -> bytes:
    return source.encode("utf-8", "surrogatepass") if isinstance(source, str) else bytes(source)


class _Workers:
    """Fork-servers, started when first needed, and replaced after one was lost."""

    def __init__(self, count: int, first: Worker, start: Callable[[], Worker]) -> None:
        self._start = start
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._all = {first}
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()  # the one last used first: its memory is in the caches
        for _ in range(count - 1):
            self._idle.put(None)
        self._idle.put(first)
        self.closed = False

    @contextmanager
    def lease(self) -> Iterator[Worker]:
        if self._process != os.getpid():
            raise SandboxError("this Sandbox was made before this process was forked from its owner: make one here")
        worker = self._idle.get()
        try:
            if self.closed:
                raise SandboxError("this Sandbox is closed")
            if worker is None:
                worker = self._started()
            yield worker
        except BaseException:
            if worker is not None:
                self._drop(worker)
                worker = None
            raise
        finally:
            self._idle.put(worker)

    def _started(self) -> Worker:
        worker = self._start()
        with self._lock:
            if not self.closed:
                self._all.add(worker)
                return worker
        worker.close()
        raise SandboxError("this Sandbox is closed")

    def _drop(self, worker: Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.close()

    def close(self) -> None:
        if self._process != os.getpid():
            return  # a copy, in a child that was forked from the owner
        with self._lock:
            self.closed = True
            workers, self._all = self._all, set()
        for worker in workers:
            worker.abort()
        for worker in workers:
            worker.close()


def _candidates(level: str | None, allow_weak: bool, unsafe: bool) -> tuple[str, ...]:
    allowed = (*STRONG, *(["seccomp"] if allow_weak or unsafe else []), *(["none"] if unsafe else []))
    if level is None:
        return allowed
    if level not in LEVELS:
        raise ValueError(f"Sandbox(level={level!r}): there are {', '.join(LEVELS)}")
    if level not in allowed:
        switch = "allow_weak" if level == "seccomp" else "unsafe"
        raise ValueError(f"Sandbox(level={level!r}) needs {switch}=True: {LEVELS[level].weakness}")
    return (level,)


def _strongest(candidates: Sequence[str], imports: Sequence[str]) -> tuple[str, Worker]:
    reasons = []
    for name in candidates:
        try:
            return name, _start(name, imports)
        except WorkerLost as error:
            reasons.append(f"  {name}: {error}")
            _log.info("sandbox level %r does not hold here: %s", name, error)
    raise SandboxUnavailable("\n".join(["no level of isolation holds on this machine:", *reasons, _ADVICE]))


_ADVICE = """One of these helps:
  - Linux 5.13 or later with Landlock: `cat /sys/kernel/security/lsm` must list `landlock` (kernel parameter lsm=landlock,…). In a
    container, the seccomp profile must allow landlock_create_ruleset, landlock_add_rule, landlock_restrict_self (Docker 20.10.10+ does);
  - or user namespaces: `unshare -Ur true` must succeed (sysctl user.max_user_namespaces > 0; on Ubuntu 23.10+
    kernel.apparmor_restrict_unprivileged_userns=0; in a container, root with --cap-add SYS_ADMIN and an unconfined seccomp profile);
  - or Sandbox(allow_weak=True), which leaves files open, or Sandbox(unsafe=True), on a machine that holds nothing of value.
docs/sandbox.md says more."""


def _start(level: str, imports: Sequence[str]) -> Worker:
    """A worker whose self-test held.

    Raises:
        WorkerLost: it does not start, or the level does not hold.
    """
    worker = Worker(level, imports)
    if LEVELS[level].weakness:
        return worker  # what is open is known
    try:
        with probe.bait() as arguments:
            job = codec.encode((probe.FUNCTION, probe.SOURCE.encode(), [arguments]))
            found = probe.found_open(worker.run(job, b"", _PROBE_LIMITS).call(_PROBE_LIMITS, 1))
    except BaseException:
        worker.close()
        raise
    if found:
        worker.close()
        raise WorkerLost(f"in the self-test a program could {'; '.join(found)}")
    return worker
