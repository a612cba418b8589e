"""What a program's process gives up before the program's code runs: built once by the fork-server, put on by each child."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from grpo.rewards.sandbox import landlock, namespaces
from grpo.rewards.sandbox import syscalls as sys_
from grpo.rewards.sandbox.levels import Level
from grpo.rewards.sandbox.seccomp import Filter, policy
from grpo.rewards.sandbox.wire import Job

STACK_SLACK = 512 << 20  # address space for stacks of threads, on top of what a program may use
MAX_THREADS = 200
_MAX_OPEN_FILES = 256
_COUNT_TASKS_EVERY_S = 1.0
_NEVER = (resource.RLIMIT_CORE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_NICE, resource.RLIMIT_RTPRIO)


class Confinement:
    """
    Args:
        owner: uid and gid of the programs, if they are others than this process's.
    """

    def __init__(self, level: Level, readable: Sequence[str], owner: tuple[int, int] | None) -> None:
        self._level = level
        self._readable = readable
        self._owner = owner
        self._abi = landlock.version()
        if level.landlock and not self._abi:
            raise OSError("the kernel has no Landlock (it needs Linux 5.13 or later, and `landlock` in /sys/kernel/security/lsm)")
        self._rules = -1
        self._filter = Filter(policy(sys_.MACHINE, own_files=level.namespaces)) if level.seccomp else None
        self._mapped = _mapped_bytes()
        self._tasks, self._tasks_counted = 0, -math.inf

    def allow_scratch(self, path: str) -> None:
        """Rebuild the rules for a new scratch directory."""
        if not self._abi or self._level.weakness:
            return
        if self._rules >= 0:
            os.close(self._rules)
        rules = [(path, landlock.SCRATCH), *((device, landlock.DEVICE) for device in namespaces.DEVICES if os.path.exists(device))]
        rules += [(each, landlock.READ) for each in self._readable]
        self._rules = landlock.ruleset(rules, self._abi)

    def count_tasks(self) -> None:
        """On a uid that is not the programs' alone, the limit of threads is one of all its tasks: look how many there are."""
        if self._owner is None and not self._level.namespaces and time.monotonic() > self._tasks_counted + _COUNT_TASKS_EVERY_S:
            self._tasks, self._tasks_counted = _tasks_of(os.getuid()), time.monotonic()

    def put_on(self, job: Job) -> None:
        """Confine this process to the job's limits and the level's means, for ever."""
        self._set_limits(job)
        if self._owner is not None:
            uid, gid = self._owner
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        if self._level.seccomp:
            sys_.drop_capabilities()
        if not self._level.namespaces:
            sys_.set_dumpable(True)  # the fork-server looks at the files that it has open: scratch.py
        sys_.die_with_parent(signal.SIGKILL)
        if self._rules >= 0:
            landlock.restrict_self(self._rules)

    def close_the_door(self) -> None:
        """The last step: only the allowed system calls from here on."""
        if self._filter is not None:
            self._filter.install(os.getpid())

    def _set_limits(self, job: Job) -> None:
        limit(resource.RLIMIT_CPU, math.ceil(job.cpu_s) + 1)  # the fork-server ends it earlier; this is for when it cannot
        limit(resource.RLIMIT_AS, self._mapped + job.memory + STACK_SLACK)
        limit(resource.RLIMIT_FSIZE, job.files)
        limit(resource.RLIMIT_NPROC, self._tasks + MAX_THREADS)


def limit(which: int, value: int) -> None:
    """Set a limit for good, or leave it if it is lower."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def give_up_the_rest() -> None:
    """What the fork-server itself can do without, and so none of its children has."""
    sys_.no_new_privileges()
    sys_.drop_bounding_set()
    sys_.set_dumpable(False)
    limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    for which in _NEVER:
        limit(which, 0)


def die_first() -> None:
    """When memory runs out, the kernel is to take a program and not the trainer."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass  # a read-only /proc: the kernel then takes the largest process


def own_ids() -> tuple[int, int]:
    """A uid and a gid that nobody else uses, derived from this process's id.

    Raises:
        OSError: this process may not change its ids.
    """
    if os.geteuid() != 0:
        raise OSError("only root can give programs a uid of their own")
    ids = _unused(Path("/proc/self/uid_map").read_text()), _unused(Path("/proc/self/gid_map").read_text())
    os.setgroups([])
    return ids


def _unused(id_map: str) -> int:
    """An id that is mapped: around two thousand million if there are so many, else among the last ones that there are."""
    start, count = max(((int(line.split()[0]), int(line.split()[2])) for line in id_map.splitlines()), key=lambda each: sum(each))
    room = min(1 << 22, max(count // 2, 1))
    last = min(start + count - 1, 2_000_000_000 + room)
    return last - os.getpid() % room


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _tasks_of(uid: int) -> int:
    """How many threads all processes of the user have."""
    total = 0
    for process in os.scandir("/proc"):
        if process.name.isdecimal():
            try:
                if process.stat().st_uid == uid:
                    total += num_threads(int(process.name))
            except OSError:
                pass  # it has just ended
    return total


def num_threads(pid: int) -> int:
    """
    Raises:
        OSError: the process has ended.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[17])
