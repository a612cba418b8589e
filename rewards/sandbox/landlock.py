"""Landlock: which files a program may open, and nothing else (https://docs.kernel.org/userspace-api/landlock.html).

Landlock does not cover ``stat``, ``chmod``, ``utime`` and their like: ``seccomp.py`` does.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from grpo.rewards.sandbox.syscalls import syscall

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

# What the kernel can handle, by the version of its interface: 1 to 5 add rights on files, 4 TCP, 6 signals and abstract sockets.
_FILES = {1: (1 << 13) - 1, 2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}
_TCP = 0b11
_SCOPED = 0b11

READ = _READ_FILE | _READ_DIR
DEVICE = _READ_FILE | _WRITE_FILE
SCRATCH = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
_ON_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE | 1


def version() -> int:
    """The version of the kernel's Landlock interface; 0 without Landlock."""
    try:
        return syscall("landlock_create_ruleset", _CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def ruleset(rules: Iterable[tuple[str, int]], abi: int) -> int:
    """A file descriptor of the rules ``(path, rights)``: everything beneath the path may be used so, and nothing else at all.

    A rule holds for the directory that is at the path now, not for one that takes its place.
    """
    handled = sum(rights for since, rights in _FILES.items() if abi >= since)
    network = _TCP if abi >= 4 else 0
    scoped = _SCOPED if abi >= 6 else 0
    attributes = struct.pack("=QQQ", handled, network, scoped)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    fd = syscall("landlock_create_ruleset", _CREATE_RULESET, attributes, len(attributes), 0)
    for path, rights in rules:
        _add(fd, path, rights & handled)
    return fd


def _add(fd: int, path: str, rights: int) -> None:
    target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(target).st_mode):
            rights &= _ON_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, target), 12)
        syscall(f"landlock_add_rule {path}", _ADD_RULE, fd, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(target)


def restrict_self(fd: int) -> None:
    syscall("landlock_restrict_self", _RESTRICT_SELF, fd, 0)
