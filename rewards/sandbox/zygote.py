"""The fork-server: a process that has everything ready, forks for each job, confines the child, watches it and reports how it ended.

Started by ``worker.py`` as a program of its own, never forked from the trainer. It sees no source, input, output or answer: those
are files that it hands to the child unread. It ends when the owner closes the connection or is gone.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import os
import select
import site
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

from grpo.rewards.sandbox import confinement, namespaces, program
from grpo.rewards.sandbox.confinement import Confinement
from grpo.rewards.sandbox.kept import keep_unreachable
from grpo.rewards.sandbox.levels import LEVELS
from grpo.rewards.sandbox.scratch import DiskScratch, MemoryScratch, Scratch
from grpo.rewards.sandbox.watch import OwnerGone, RunQueues, Watch
from grpo.rewards.sandbox.wire import MAX_MESSAGE, NUM_FILES, PROGRAM, RESULT, RESULT_FD, Failure, Job, Ready, Report, Setup

_JOB_FD, _DOOR_FD = RESULT_FD + 1, RESULT_FD + 2  # in the child: its program, and what it says to the fork-server
_FIRST_FREE_FD = 64  # file descriptors that are being sorted are put from here on
_CONFINED = b"confined"
_USUAL_FILES = 64 << 20  # what the scratch directory is limited to until a job says otherwise
_THREAD_STACK = 8 << 20  # the default would be RLIMIT_STACK, which is made for the main thread


def main(control_fd: int, owner_fd: int) -> NoReturn:
    control = socket.socket(fileno=control_fd)
    server: ForkServer | None = None
    try:
        server = ForkServer(control, owner_fd, Setup.unpack(control.recv(MAX_MESSAGE)))
        control.send(Ready(resident_mb=server.resident_mb).pack())
        server.serve()
    except (OwnerGone, ConnectionError):
        pass
    except Exception as error:
        control.send(Failure(why=f"{type(error).__name__}: {error}").pack())
    finally:
        if server is not None:
            server.scratch.remove()
        os._exit(0)


class ForkServer:
    def __init__(self, control: socket.socket, owner_fd: int, setup: Setup) -> None:
        confinement.die_first()
        level = LEVELS[setup.level]
        self._control = control
        self._owner_fd = owner_fd
        as_root = os.geteuid() == 0
        ids = confinement.own_ids() if level.own_uid or (as_root and (level.namespaces or level.weakness)) else None
        if level.namespaces:
            namespaces.enter(control)
        queues = RunQueues()
        _import(setup.site_packages, setup.imports)
        if ids is not None and not level.namespaces:
            keep_unreachable(setup.imports)
        self.resident_mb = confinement.resident_mb()
        self._confinement = Confinement(level, setup.readable, ids)
        self._processes = namespaces.ProcessNamespaces() if level.namespaces else None
        owner = ids or (os.geteuid(), os.getegid())
        self.scratch: Scratch
        if level.namespaces:
            self.scratch = MemoryScratch(namespaces.build_root(setup.readable), owner)
        else:
            self.scratch = DiskScratch(setup.scratch, owner)
        confinement.give_up_the_rest()
        os.chdir("/")
        os.umask(0o022)
        os.environ.update(HOME=self.scratch.path, TMPDIR=self.scratch.path)
        self._files = _USUAL_FILES
        self._watch = Watch(control, owner_fd, queues, self.scratch, looks=not level.namespaces)
        gc.collect()
        gc.freeze()

    def serve(self) -> NoReturn:
        idle = select.poll()
        for fd in (self._control.fileno(), self._owner_fd):
            idle.register(fd, select.POLLIN)
        while True:
            self._prepare()
            idle.poll()
            message, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE, NUM_FILES)
            if not message:
                raise OwnerGone
            try:
                answer = self._run(Job.unpack(message), fds).pack()
            except OSError as error:
                answer = Failure(why=f"{type(error).__name__}: {error}").pack()
            finally:
                for fd in fds:
                    os.close(fd)
            self._control.send(answer)

    def _prepare(self) -> None:
        """What the next job needs and can be done before it is there."""
        self._renew(self._files)
        if self._processes is not None:
            self._processes.next()

    def _renew(self, files: int) -> None:
        if self.scratch.renew(files):
            self._confinement.allow_scratch(self.scratch.path)
        self._files = files

    def _run(self, job: Job, fds: Sequence[int]) -> Report | Failure:
        self._renew(job.files)
        self._confinement.count_tasks()
        heard, door = os.pipe()
        try:
            started = time.monotonic()
            pid = os.fork()
            if pid == 0:
                self._become_program(job, fds, door)
            os.close(door)
            stopped = self._watch.until_end(pid, job)
            _, status, usage = os.wait4(pid, 0)
            wall_s = time.monotonic() - started
            said = os.read(heard, MAX_MESSAGE)
        finally:
            os.close(heard)
        if said != _CONFINED:
            return Failure(why=f"the program's process could not be confined: {said.decode('utf-8', 'replace') or status}")
        return Report(
            wait_status=status, stopped=stopped, cpu_s=usage.ru_utime + usage.ru_stime, wall_s=wall_s, max_rss_mb=usage.ru_maxrss / 1024
        )

    def _become_program(self, job: Job, fds: Sequence[int], door: int) -> NoReturn:
        try:
            try:
                self._confinement.put_on(job)
                os.chdir(self.scratch.path)
                if "numpy.random" in sys.modules:
                    sys.modules["numpy.random"].seed()
                _sort_files([*fds[PROGRAM + 1 : RESULT + 1], fds[PROGRAM], door])
                door = _DOOR_FD
                self._confinement.close_the_door()
            except BaseException as error:
                os.write(door, f"{type(error).__name__}: {error}".encode())
                raise
            os.write(door, _CONFINED)
            os.close(door)
            program.run(_JOB_FD)
        finally:
            os._exit(70)


def _sort_files(fds: Sequence[int]) -> None:
    """Make these file descriptors 0, 1, 2, … and close all others."""
    os.closerange(_FIRST_FREE_FD, 1 << 16)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FIRST_FREE_FD) for fd in fds]
    for target, fd in enumerate(high):
        os.dup2(fd, target)
    os.closerange(len(high), 1 << 16)


def _import(site_packages: Sequence[str], names: Sequence[str]) -> None:
    """Import what programs are likely to want. Nothing of it may start a thread: this process forks."""
    sys.path.extend(site_packages)
    site.setquit()
    for name in names:
        importlib.import_module(name)
    threading.stack_size(_THREAD_STACK)
    if threading.active_count() != 1:
        raise RuntimeError(f"importing {', '.join(names)} started threads")
