"""The parent's end of one reward worker: what it was given, what it said, and whether it overstays.

Neither reading nor writing ever blocks.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from grpo.imports import search_path
from grpo.rewards.limits import RewardLimits
from grpo.rewards.wire import Job, Ready, Result, decode, encode
from grpo.types import Outcome, Score

TICK_S = 0.05  # how often running tasks are compared with their deadlines
_START_S = 60.0  # wall time for a worker to import the reward functions
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # the workers are the parallelism


class WorkerProcess:
    """See the module's text. ``start`` is the encoded ``wire.Start``, the first that it is sent."""

    def __init__(self, start: bytes) -> None:
        self.jobs: deque[Job] = deque()  # assigned and not done; the first part of the first one is running
        self.ready: Ready | None = None
        self.eof = False
        self.exhausted = False
        self.channel, theirs = socket.socketpair()
        self.channel.setblocking(False)
        self._incoming = bytearray()
        self.outgoing = bytearray(start)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "grpo.rewards.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints goes to standard error
                env={**_ONE_THREAD, **os.environ, "PYTHONPATH": search_path()},
                start_new_session=True,  # its own process group: killed with all that it started, and deaf to Ctrl-C
            )
        self.waited = 0.0  # wall time since the running task began, as the parent has seen it pass
        self._task_cpu_clock = 0.0
        self._queued: float | None = None  # seconds in the queue for a core, when the running task was first looked at
        self.exchange()

    @property
    def idle(self) -> bool:
        """Ready, without a task, and alive: a worker that died while idle must not be given a task to be blamed for."""
        return self.ready is not None and not self.jobs and not self.eof and self._process.poll() is None

    def assign(self, jobs: Iterable[Job]) -> None:
        self.jobs.extend(jobs)
        self.outgoing += encode(tuple(self.jobs))
        self._task_begins()
        self.send()  # and no more: an answer received here would wait for the next tick to be looked at

    def send(self) -> None:
        """What the channel takes at once."""
        try:
            while self.outgoing:
                del self.outgoing[: self.channel.send(self.outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            self.outgoing.clear()  # it is gone; reading will tell

    def exchange(self) -> None:
        """Send and receive what is possible at once."""
        self.send()
        try:
            while chunk := self.channel.recv(1 << 20):
                self._incoming += chunk
            self.eof = True
        except BlockingIOError:
            pass
        except OSError:
            self.eof = True

    def take_results(self) -> Iterable[Result]:
        for message in decode(self._incoming):
            self._task_begins()
            self._task_cpu_clock = message.cpu_clock
            if isinstance(message, Ready):
                self.ready = message
                continue
            self.part_done()
            self.exhausted = message.exhausted
            yield message

    def part_done(self) -> None:
        """Take the running task – the first part of the first job – off the list."""
        current = self.jobs.popleft()
        if len(current.parts) > 1:
            self.jobs.appendleft(replace(current, parts=current.parts[1:]))

    def _task_begins(self) -> None:
        self.waited = 0.0
        self._queued = None

    def verdict(self, limits: Sequence[RewardLimits]) -> Score | None:
        """Why this worker must go – as the score of the task it is at – or None while all is well."""
        if self.eof or self._process.poll() is not None:
            return self._obituary(limits)
        if self.waited <= TICK_S:
            return None
        if self._queued is None:
            self._queued = _seconds_in_queue(self._process.pid)
        if self.ready is None:
            late = self.waited > _START_S and self._waited_idle() > _START_S
            return Score(value=math.nan, outcome=Outcome.timeout, detail=f"a worker was not ready after {_START_S:g} s") if late else None
        if not self.jobs:
            return None
        allowed = self._allowed(limits)
        if _cpu_seconds(self._process.pid) - self._task_cpu_clock > allowed.cpu_s:
            return self._out_of_cpu(self.ready, allowed)
        if self.waited > allowed.wall and self._waited_idle() > allowed.wall:
            return Score(value=math.nan, outcome=Outcome.timeout, detail=f"took more than {allowed.wall:g} s")
        return None

    def _waited_idle(self) -> float:
        """Wall time of the running task without what it spent in the queue for a core: a busy machine is not its fault."""
        return self.waited - (_seconds_in_queue(self._process.pid) - (self._queued or 0.0))

    def _allowed(self, limits: Sequence[RewardLimits]) -> RewardLimits:
        current = self.jobs[0]
        return limits[current.parts[0]].for_batch(len(current.rows))

    def _obituary(self, limits: Sequence[RewardLimits]) -> Score:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)  # it closed the connection, so it is about to end
        code = self._process.returncode
        if self.ready and self.jobs and code == -signal.SIGXCPU:
            return self._out_of_cpu(self.ready, self._allowed(limits))
        return Score(value=math.nan, outcome=Outcome.crash, detail=f"the worker {_ending(code)}")

    def _out_of_cpu(self, ready: Ready, allowed: RewardLimits) -> Score:
        value = ready.timeout_values[self.jobs[0].parts[0]]
        return Score(value=value, outcome=Outcome.timeout, detail=f"took more than {allowed.cpu_s:g} s of CPU time")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also when it has ended: what it started may live on
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)  # longer only in the kernel's hands, where nobody can do more
        self.exchange()
        self.channel.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def exchange(workers: Iterable[WorkerProcess], timeout: float) -> None:
    """Wait until a worker has something to say, or can hear more, or the time is over."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
            selector.register(worker.channel, events, worker)
        for key, _ in selector.select(timeout):
            key.data.exchange()


def _seconds_in_queue(pid: int) -> float:
    """How long a process, its first thread, was ready to run and had no core; 0 where the kernel does not count it."""
    try:
        with open(f"/proc/{pid}/schedstat", "rb") as schedstat:
            return int(schedstat.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process; 0 where there is no /proc (the wall limit and the worker's own RLIMIT_CPU still hold)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
