"""The system calls that Python's standard library does not offer, as functions that raise ``OSError``.

Numbers are per architecture only where they differ; system calls from 424 on have the same number everywhere.
"""

from __future__ import annotations

import ctypes
import os
import platform
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_REC, MS_PRIVATE = 0x4000, 0x40000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME = 0x2, 0x4, 0x8, 0x20, 0x400
MNT_DETACH = 2

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = 0o2000000
_MOVE_MOUNT_F_EMPTY_PATH = 0x4

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442

MACHINE = platform.machine()


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: Any) -> int:
    """Make system call ``number``; integers are passed as C longs, the rest as ctypes passes it."""
    return _check(_libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)), what)


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, flags: int) -> None:
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)), "setns")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(_libc.mount(*arguments), f"mount {kind or 'flags'} on {target}")


def unmount(target: str) -> None:
    """Detach the mount at ``target``; it is gone as soon as nobody uses it."""
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(MNT_DETACH)), f"umount {target}")


def pivot_root_here() -> None:
    """Make the working directory the root directory, and detach what was the root."""
    syscall("pivot_root", _PIVOT_ROOT[MACHINE], b".", b".")
    unmount(".")
    os.chdir("/")


def clone_mount(path: str) -> int:
    """A detached copy of the mounts at and below ``path``, as a file descriptor."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return syscall(f"open_tree {path}", _OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def attach_mount(fd: int, target: str) -> None:
    syscall(f"move_mount to {target}", _MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def restrict_mount(fd: int, attributes: int) -> None:
    """Add ``MOUNT_ATTR_…`` to all mounts of a detached copy."""
    _set_mount_attributes(fd, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes)


def restrict_mount_at(path: str, attributes: int) -> None:
    _set_mount_attributes(_AT_FDCWD, os.fsencode(path), 0, attributes)


def _set_mount_attributes(fd: int, path: bytes, flags: int, attributes: int) -> None:
    attr = _MountAttr(attr_set=attributes)
    syscall("mount_setattr", _MOUNT_SETATTR, fd, path, flags, ctypes.byref(attr), ctypes.sizeof(attr))


def _prctl(what: str, option: int, *arguments: Any) -> None:
    padded = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(ctypes.c_int(option), *padded), what)


def die_with_parent(signal: int) -> None:
    _prctl("prctl(PR_SET_PDEATHSIG)", _PR_SET_PDEATHSIG, signal)


def set_dumpable(dumpable: bool) -> None:
    """Whether other processes of the same user may look into this one."""
    _prctl("prctl(PR_SET_DUMPABLE)", _PR_SET_DUMPABLE, int(dumpable))


def no_new_privileges() -> None:
    _prctl("prctl(PR_SET_NO_NEW_PRIVS)", _PR_SET_NO_NEW_PRIVS, 1)


def drop_bounding_set() -> None:
    """Empty the capability bounding set, as far as this process may."""
    for capability in range(64):
        try:
            _prctl("prctl(PR_CAPBSET_DROP)", _PR_CAPBSET_DROP, capability)
        except OSError:
            return  # EINVAL: behind the last one that the kernel knows; EPERM: without CAP_SETPCAP, and without capabilities to lose


_NO_CAPABILITIES = ctypes.create_string_buffer(24)
_CAPABILITY_HEADER = (ctypes.c_uint32 * 2)(0x20080522, 0)


def drop_capabilities() -> None:
    syscall("capset", _CAPSET[MACHINE], _CAPABILITY_HEADER, _NO_CAPABILITIES)


class FilterProgram(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def install_filter(program: FilterProgram) -> None:
    """Confine this process to what the seccomp program allows, for ever."""
    _prctl("prctl(PR_SET_SECCOMP)", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))
