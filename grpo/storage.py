"""Files that a crash at any byte leaves whole, and a disk that says in words what is wrong with it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class StorageError(OSError):
    """The run folder cannot be written. Says where, why and what to do; what was saved before is untouched."""

    def __init__(self, path: Path, cause: OSError) -> None:
        reason = cause.strerror or str(cause)
        super().__init__(f"run.dir: cannot write {str(path)!r}: {reason}\n  → {_remedy(path, cause)}; what was saved is whole")
        self.errno = cause.errno


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, sync it to disk, and rename it: readers see the old or the new file.

    Raises:
        StorageError: the disk is full, or the folder cannot be written; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)  # the rename itself


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn what the disk says about ``path`` into a ``StorageError``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(path, error) from error


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remedy(path: Path, cause: OSError) -> str:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(folder for folder in path.absolute().parents if folder.exists())
        if cause.errno == errno.ENOSPC and not os.statvfs(there).f_favail:
            return "there is no room for another file, however small (df -i): remove some, and go on"
        free = shutil.disk_usage(there).free / 2**20
        return f"{free:,.0f} MiB are free there: make room, or keep fewer checkpoints (run.keep_checkpoints), and go on"
    if cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "make the folder writable, or copy it to a place that is and go on with the copy"
    if cause.errno == errno.EFBIG:
        return "a file may not grow so large here: raise the limit (ulimit -f), and go on"
    return "see to the disk, and go on"
