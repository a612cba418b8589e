"""Files in memory that go to a program and come back: inputs that nobody can change, outputs that cannot grow beyond their size.

No pipes: nothing blocks when a program does not read, nobody has to read while it runs, and nothing is buffered without a limit.
"""

from __future__ import annotations

import fcntl
import os

_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_READ_ONLY = _FIXED_SIZE | fcntl.F_SEAL_WRITE


def sealed_input(content: bytes) -> int:
    fd = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _READ_ONLY)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sealed_output(max_bytes: int) -> int:
    """An empty file of a fixed size: what is not written takes no memory, and a write behind the end fails with EPERM."""
    fd = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def written(fd: int, max_bytes: int) -> bytes:
    """What the program wrote: up to where it stands in the file, which it shares with us."""
    left = min(os.lseek(fd, 0, os.SEEK_CUR), max_bytes)
    chunks = bytearray()
    while len(chunks) < left:
        chunk = os.pread(fd, left - len(chunks), len(chunks))
        if not chunk:
            break
        chunks += chunk
    return bytes(chunks)
