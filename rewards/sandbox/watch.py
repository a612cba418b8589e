"""Watching a program's process until it ends, or until it has used up what it may use."""

from __future__ import annotations

import os
import select
import signal
import socket
import time

from grpo.rewards.sandbox.confinement import MAX_THREADS, num_threads
from grpo.rewards.sandbox.scratch import Scratch
from grpo.rewards.sandbox.wire import Job, Stopped

_CLOCKS_EVERY_S = 0.25
_PAUSE_S = 1.0  # wall time this far beyond what was waited for: the machine or this process stood still, and that does not count
_FEW_THREADS = 8
_FIRST_LOOK_S, _LAST_LOOK_S = 0.005, 0.05  # at files and threads, where the kernel does not limit them
_NUM_CPUS = os.cpu_count() or 1


class OwnerGone(Exception):
    """Nobody waits for the report any more."""


class RunQueues:
    """How long a program was ready to run while others had the cores: on a busy machine that is most of its wall time.

    Made while ``/proc`` is there; it works after the fork-server has left it behind.
    """

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)

    def waited_s(self, process: int) -> float:
        """Of the thread that waited longest; 0 where the kernel does not tell.

        Args:
            process: a pidfd.
        """
        try:
            pid = int(_field(self._read(f"self/fdinfo/{process}"), "Pid:"))  # as /proc knows it, not as we do
            tasks = os.open(f"{pid}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._proc)
            try:
                return max(int(self._read(f"{pid}/task/{task}/schedstat").split()[1]) for task in os.listdir(tasks)) / 1e9
            finally:
                os.close(tasks)
        except (OSError, ValueError, IndexError, StopIteration):
            return 0.0

    def _read(self, path: str) -> str:
        fd = os.open(path, os.O_RDONLY, dir_fd=self._proc)
        try:
            return os.read(fd, 4096).decode()
        finally:
            os.close(fd)


def _field(text: str, name: str) -> str:
    return next(line.removeprefix(name) for line in text.splitlines() if line.startswith(name))


class Watch:
    """
    Args:
        looks: whether files and threads must be looked at, because no kernel limit covers them.
    """

    def __init__(self, control: socket.socket, owner_fd: int, queues: RunQueues, scratch: Scratch, looks: bool) -> None:
        self._owner = (control.fileno(), owner_fd)
        self._queues = queues
        self._scratch = scratch
        self._looks = looks

    def until_end(self, pid: int, job: Job) -> Stopped:
        """Wait until the process is a zombie; why it was killed, if it was, or that it left more files than it may.

        Raises:
            OwnerGone: the process was killed because of that.
        """
        process = os.pidfd_open(pid)
        poll = select.poll()
        for fd in (process, *self._owner):
            poll.register(fd, select.POLLIN)
        try:
            return self._until_end(pid, process, poll, job)
        finally:
            os.close(process)

    def _until_end(self, pid: int, process: int, poll: select.poll, job: Job) -> Stopped:
        cpu_s = wall_s = queued_s = 0.0
        look_s = _FIRST_LOOK_S if self._looks else _CLOCKS_EVERY_S
        while True:
            wait_s = min((job.cpu_s - cpu_s) / _NUM_CPUS + 0.001, job.wall_s + queued_s - wall_s, look_s)
            before = time.monotonic()
            ready = [fd for fd, _ in poll.poll(max(wait_s, 0.001) * 1000)]
            wall_s += min(time.monotonic() - before, wait_s + _PAUSE_S)
            if process in ready:
                return Stopped.files if self._looks and self._scratch.over(job.files, pid) else Stopped.no
            cpu_s = time.clock_gettime(~pid << 3 | 2)  # its clock: see clock_getcpuclockid(3)
            if wall_s - queued_s >= job.wall_s:
                queued_s = self._queues.waited_s(process)
            stopped = self._verdict(pid, job, cpu_s, wall_s - queued_s)
            if stopped is not Stopped.no or ready:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                if ready:
                    os.waitpid(pid, 0)
                    raise OwnerGone
                return stopped
            many = self._looks and _more_threads_than(pid, _FEW_THREADS)  # on its way to the limit: keep looking
            look_s = _FIRST_LOOK_S if many else min(look_s * 2, _LAST_LOOK_S if self._looks else _CLOCKS_EVERY_S)

    def _verdict(self, pid: int, job: Job, cpu_s: float, wall_s: float) -> Stopped:
        if cpu_s >= job.cpu_s:
            return Stopped.cpu
        if wall_s >= job.wall_s:
            return Stopped.wall
        if self._looks and self._scratch.over(job.files, pid):
            return Stopped.files
        if self._looks and _more_threads_than(pid, MAX_THREADS):
            return Stopped.threads
        return Stopped.no


def _more_threads_than(pid: int, limit: int) -> bool:
    try:
        return num_threads(pid) > limit
    except OSError:
        return False  # it has just ended
