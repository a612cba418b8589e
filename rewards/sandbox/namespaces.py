"""A world of its own for a fork-server: users, processes, files, network, names and messages (namespaces(7)).

Its files are a read-only root directory that holds the interpreter, shared libraries and four devices, and the programs' scratch
directory. There is no ``/proc`` and no ``/sys``.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Sequence

from grpo.rewards.sandbox import syscalls as sys_

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_STAGING = "/tmp"  # any directory that exists everywhere; what is in it disappears from view
_USER = 1000  # the only user, in a user namespace


def enter(control: socket.socket) -> None:
    """Move into new namespaces, in a new process; the calling one stays behind, waits for it and ends with it."""
    outside = os.getuid(), os.getgid()
    users = 0 if os.geteuid() == 0 else sys_.CLONE_NEWUSER
    sys_.unshare(users | sys_.CLONE_NEWPID | sys_.CLONE_NEWNS | sys_.CLONE_NEWNET | sys_.CLONE_NEWIPC | sys_.CLONE_NEWUTS)
    if users:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{_USER} {outside[0]} 1")
        _write("/proc/self/gid_map", f"{_USER} {outside[1]} 1")
    socket.sethostname("sandbox")
    if (first := os.fork()) != 0:
        control.close()
        os.closerange(0, 256)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)
    sys_.die_with_parent(signal.SIGKILL)


def build_root(readable: Sequence[str]) -> str:
    """Replace the root directory by one that holds these paths, read-only, and the devices. Where the scratch directory is to be."""
    sys_.mount("none", "/", "", sys_.MS_REC | sys_.MS_PRIVATE)
    copies = {path: _copy(path) for path in (*readable, *DEVICES)}
    sys_.mount("tmpfs", _STAGING, "tmpfs", sys_.MS_NOSUID | sys_.MS_NODEV | sys_.MS_NOEXEC, "size=1m,mode=755")
    for path, copy in copies.items():  # short paths come first
        target = _STAGING + path
        if not os.path.lexists(target):  # else it came with a path above it
            _make_target(target, directory=stat.S_ISDIR(os.fstat(copy).st_mode))
            sys_.attach_mount(copy, target)
        os.close(copy)
    scratch = "/scratch" if os.path.exists(_STAGING + "/tmp") else "/tmp"  # an interpreter may be installed in /tmp
    os.makedirs(_STAGING + scratch)
    os.chdir(_STAGING)
    sys_.pivot_root_here()
    sys_.restrict_mount_at("/", sys_.MOUNT_ATTR_RDONLY)
    return scratch


def _copy(path: str) -> int:
    copy = sys_.clone_mount(path)
    attributes = sys_.MOUNT_ATTR_NOSUID if path in DEVICES else sys_.MOUNT_ATTR_NOSUID | sys_.MOUNT_ATTR_NODEV | sys_.MOUNT_ATTR_RDONLY
    sys_.restrict_mount(copy, attributes)
    return copy


def _make_target(path: str, directory: bool) -> None:
    os.makedirs(path if directory else os.path.dirname(path), exist_ok=True)
    if not directory:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class ProcessNamespaces:
    """A fresh process namespace for the next child, as often as needed. All that a child starts ends with it."""

    def __init__(self) -> None:
        self._ours = os.pidfd_open(os.getpid())

    def next(self) -> None:
        sys_.setns(self._ours, sys_.CLONE_NEWPID)
        sys_.unshare(sys_.CLONE_NEWPID)
