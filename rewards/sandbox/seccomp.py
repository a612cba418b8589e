"""Which system calls a program may make: an allow-list with checks of arguments, as a seccomp program.

What is not here fails with EPERM: sockets, processes, other programs, tracing, mounts, keys, memory files, devices. A program that
uses another architecture's calls is killed.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from grpo.rewards.sandbox.bpf import (
    ARCHITECTURE,
    IF_AT_LEAST,
    NUMBER,
    Fragment,
    argument,
    assemble,
    branch,
    dispatch,
    give,
    if_one_of,
    if_zero,
    load,
)
from grpo.rewards.sandbox.syscall_numbers import NUMBERS, number
from grpo.rewards.sandbox.syscalls import FilterProgram, install_filter

_KILL = give(0x80000000)  # SECCOMP_RET_KILL_PROCESS
_ALLOW = give(0x7FFF0000)


def _fail(error: int) -> Fragment:
    return give(0x00050000 | error)  # SECCOMP_RET_ERRNO


_FORBID = _fail(errno.EPERM)
_ABSENT = _fail(errno.ENOSYS)
_PRETEND = _fail(0)  # the call is not made and returns 0

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
_FIRST_UNKNOWN = 450  # calls that are younger than this policy look absent, so that libraries use the older ones

_OWN_PID = 0x50494421  # stands in the assembled program where each child's pid goes

_CLONE_THREAD = 0x00010000
_CLONE_NEW_ANYTHING = 0x7E020000  # CLONE_NEWNS, …CGROUP, …UTS, …IPC, …USER, …PID, …NET
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000
_SPECIAL_MODE_BITS = 0o7000
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_FCNTLS = (*range(8), 36, 37, 38, 1030, 1031, 1032, 1034)  # flags, locks, duplicates, sizes of pipes, GET_SEALS; no owner, signal, lease
# GET_DUMPABLE, SET_NAME, GET_NAME, GET_SECCOMP, CAPBSET_READ, GET_NO_NEW_PRIVS, SET_VMA (the names that malloc gives)
_PRCTLS = (3, 15, 16, 21, 23, 39, 0x53564D41)

_XATTRS = tuple(f"{prefix}{verb}xattr" for verb in ("set", "get", "list", "remove") for prefix in ("", "l", "f"))
_ABSENT_NAMES = ("clone3", "openat2", "io_uring_setup", "io_uring_enter", "io_uring_register", "futex_waitv")


def policy(machine: str, own_files: bool) -> Fragment:
    """
    Args:
        own_files: the program sees a file system of its own, with a limited size, so it may change modes and times there. Else
            these calls pretend to succeed and do nothing: Landlock does not cover them, and ``shutil.copy`` needs them.
    """
    actions = {n: fragment for name, fragment in _by_name(own_files).items() if (n := number(name, machine)) is not None}
    calls = branch(IF_AT_LEAST, _FIRST_UNKNOWN, _ABSENT, dispatch(actions, _FORBID))
    if machine == "x86_64":
        calls = branch(IF_AT_LEAST, _X32_BIT, _KILL, calls)
    return if_one_of(ARCHITECTURE, [_AUDIT_ARCH[machine]], (load(NUMBER), *calls), _KILL)


def _by_name(own_files: bool) -> dict[str, Fragment]:
    own = [_OWN_PID]
    change = _ALLOW if own_files else _PRETEND
    special: dict[str, Fragment] = {
        **{name: _ABSENT for name in _ABSENT_NAMES},
        **dict.fromkeys(_XATTRS, _fail(errno.EOPNOTSUPP)),  # as on a file system that has none
        **{name: change for name in ("utime", "utimes", "futimesat", "utimensat")},
        "chmod": _mode(1, change),
        "fchmod": _mode(1, change),
        "fchmodat": _mode(2, change),
        # O_TRUNC without writing: old Landlock sees a mere read
        "open": if_one_of(argument(1), [_O_TRUNC], _FORBID, _ALLOW, mask=_O_TRUNC | _O_ACCMODE),
        "openat": if_one_of(argument(2), [_O_TRUNC], _FORBID, _ALLOW, mask=_O_TRUNC | _O_ACCMODE),
        "truncate": _ALLOW if own_files else _FORBID,  # old Landlock does not see it
        "fallocate": _ALLOW if own_files else _fail(errno.EOPNOTSUPP),  # fills a disk faster than anybody looks
        "clone": if_one_of(argument(0), [_CLONE_THREAD], _ALLOW, _FORBID, mask=_CLONE_THREAD | _CLONE_NEW_ANYTHING),
        "kill": if_one_of(argument(0), own, _ALLOW, _FORBID),
        "tgkill": if_one_of(argument(0), own, _ALLOW, _FORBID),
        "prlimit64": if_one_of(argument(0), [0, *own], _ALLOW, _FORBID),
        "prctl": if_one_of(argument(0), _PRCTLS, _ALLOW, _FORBID),
        "fcntl": if_one_of(argument(1), _FCNTLS, _ALLOW, _FORBID),
        "ioctl": if_one_of(argument(1), _IOCTLS, _ALLOW, _FORBID),
        "socketpair": if_one_of(
            argument(0), [_AF_UNIX], if_one_of(argument(1), [_SOCK_STREAM], _ALLOW, _FORBID, mask=_SOCK_TYPE_MASK), _FORBID
        ),
        "sendto": if_zero(4, _ALLOW, _FORBID),  # to whom it is connected only
    }
    return {**dict.fromkeys(NUMBERS, _ALLOW), **special}


def _mode(index: int, change: Fragment) -> Fragment:
    """No set-uid, set-gid or sticky bit."""
    return if_one_of(argument(index), [0], change, _FORBID, mask=_SPECIAL_MODE_BITS)


class Filter:
    """A policy assembled once; ``install`` puts in what differs for each process."""

    def __init__(self, program: Fragment) -> None:
        code = assemble(program)
        self._buffer = (ctypes.c_char * len(code)).from_buffer(code)
        self._code = code
        self._own_pid = [8 * index + 4 for index, instruction in enumerate(program) if instruction[3] == _OWN_PID]
        self._program = FilterProgram(len(program), ctypes.addressof(self._buffer))

    def install(self, own_pid: int) -> None:
        for offset in self._own_pid:
            struct.pack_into("=I", self._code, offset, own_pid)
        install_filter(self._program)
