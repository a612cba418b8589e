"""The directory that a program may write to: limited in size, and empty and untouched for the next program."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from typing import Protocol

from grpo.rewards.sandbox import syscalls as sys_

MAX_FILES = 8192
_PREFIX = "grpo-sandbox-"
_YOUNG_S = 300.0  # a directory this young may be about to be locked


class Scratch(Protocol):
    path: str

    def renew(self, max_bytes: int) -> bool:
        """Make it empty and untouched; whether that took a new directory (rules that named the old one do not hold for it)."""

    def over(self, max_bytes: int, pid: int) -> bool:
        """Whether the program ``pid`` holds more than that."""

    def remove(self) -> None: ...


class MemoryScratch:
    """A file system of its own, in memory; the kernel keeps its limits. For a process in a mount namespace of its own."""

    def __init__(self, path: str, owner: tuple[int, int]) -> None:
        self.path = path
        self._owner = owner
        self._max_bytes = 0
        self._untouched: tuple[int, ...] = ()

    def renew(self, max_bytes: int) -> bool:
        if self._state() == self._untouched:
            if max_bytes != self._max_bytes:
                sys_.mount("none", self.path, "", sys_.MS_REMOUNT | _FLAGS, f"size={max_bytes}")
                self._max_bytes = max_bytes
            return False
        if self._untouched:
            sys_.unmount(self.path)
        options = "size={},nr_inodes={},mode=700,uid={},gid={}".format(max_bytes, MAX_FILES, *self._owner)
        sys_.mount("tmpfs", self.path, "tmpfs", _FLAGS, options)
        self._max_bytes = max_bytes
        self._untouched = self._state()
        return True

    def _state(self) -> tuple[int, ...]:
        """Differs after anything was made, removed or changed in it. A file that nobody can reach any more has no inode either."""
        status = os.stat(self.path)
        return os.statvfs(self.path).f_ffree, status.st_ctime_ns, status.st_mtime_ns, status.st_mode, status.st_ino, status.st_dev

    def over(self, max_bytes: int, pid: int) -> bool:
        return False

    def remove(self) -> None:
        pass  # it ends with its namespace


_FLAGS = sys_.MS_NOSUID | sys_.MS_NODEV | sys_.MS_NOEXEC | sys_.MS_NOATIME


class DiskScratch:
    """A directory among the machine's temporary files. The kernel limits single files; what they come to together is looked up.

    Args:
        home: made here and removed at the end. It is locked meanwhile, which ends with this process however that ends.
    """

    def __init__(self, home: str, owner: tuple[int, int]) -> None:
        os.mkdir(home, 0o711)
        self._home = home
        self._lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        remove_abandoned(os.path.dirname(home))
        self._owner = owner
        self._untouched: tuple[int, ...] = ()
        self.path = os.path.join(self._home, "box")

    def renew(self, max_bytes: int) -> bool:
        if self._untouched and self._state() == self._untouched:
            return False
        if self._untouched:
            _remove_tree(self.path, self._home)
        os.mkdir(self.path, 0o700)
        if self._owner != (os.geteuid(), os.getegid()):
            os.chown(self.path, *self._owner)
        self._untouched = self._state()
        return True

    def _state(self) -> tuple[int, ...]:
        status = os.stat(self.path)
        return len(os.listdir(self.path)), status.st_ctime_ns, status.st_mtime_ns, status.st_mode, status.st_ino

    def over(self, max_bytes: int, pid: int) -> bool:
        try:
            return self._named(max_bytes) + self._deleted(pid) > max_bytes
        except (OSError, RecursionError):
            return True  # paths too long or too deep to look at

    def _named(self, max_bytes: int) -> int:
        """Bytes of all files with a name; more than allowed also when there are too many of them."""
        used = num_files = 0
        for directory, _, names in os.walk(self.path, onerror=_raise_unless_gone):
            num_files += 1 + len(names)
            used += sum(_bytes(os.path.join(directory, name)) for name in names)
            if used > max_bytes or num_files > MAX_FILES:
                return max_bytes + 1
        return used

    def _deleted(self, pid: int) -> int:
        """Bytes of files that are open and have no name any more."""
        group, user = os.getegid(), os.geteuid()
        os.setegid(self._owner[1])  # only a process of the same user may look
        os.seteuid(self._owner[0])
        try:
            entries = os.scandir(f"/proc/{pid}/fd")
            statuses = [_status(entry.path) for entry in entries]
        except OSError:
            return 0  # the process has just ended
        finally:
            os.seteuid(user)
            os.setegid(group)
        device = os.stat(self._home).st_dev
        files = [status for status in statuses if status and stat.S_ISREG(status.st_mode) and status.st_dev == device]
        return sum({status.st_ino: status.st_blocks * 512 for status in files if status.st_nlink == 0}.values())

    def remove(self) -> None:
        remove_home(self._home)


def new_home(parent: str) -> str:
    """Where a ``DiskScratch`` may be made."""
    return os.path.join(parent, _PREFIX + os.urandom(8).hex())


def remove_abandoned(parent: str) -> None:
    """Remove this user's scratch directories whose fork-server and owner were both killed."""
    for entry in os.scandir(parent):
        if entry.name.startswith(_PREFIX):
            try:
                status = entry.stat(follow_symlinks=False)
                ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
                if ours and status.st_mtime < time.time() - _YOUNG_S and not _locked(entry.path):
                    remove_home(entry.path)
            except OSError:
                pass  # somebody else is removing it


def _locked(directory: str) -> bool:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def remove_home(home: str) -> None:
    """Remove a scratch directory with what is in it, if it is there."""
    if os.path.isdir(home):
        for name in os.listdir(home):
            _remove_tree(os.path.join(home, name), home)
        os.rmdir(home)


def _remove_tree(root: str, home: str) -> None:
    """Remove it however deep it is: directories are first moved up to ``home``, so that no path becomes too long."""
    pending = [root]
    while pending:
        directory = pending.pop()
        os.chmod(directory, 0o700)
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                target = os.path.join(home, f"removed-{os.urandom(8).hex()}")
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, target)
                pending.append(target)
            else:
                os.unlink(entry.path)
        os.rmdir(directory)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _bytes(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
