"""The directory that a program may write to: limited in size, and empty and untouched for the next program."""

from __future__ import annotations

import os
import stat
from typing import Protocol

from grpo.rewards.sandbox import syscalls as sys_

MAX_FILES = 8192
PREFIX = "grpo-sandbox-"


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
    """A directory among the machine's temporary files. The kernel limits single files; what they come to together is looked up."""

    def __init__(self, parent: str, owner: tuple[int, int]) -> None:
        self._home = os.path.join(parent, PREFIX + os.urandom(8).hex())
        os.mkdir(self._home, 0o711)
        self._owner = owner
        self._untouched: tuple[int, ...] = ()
        self.path = os.path.join(self._home, "box")

    def renew(self, max_bytes: int) -> bool:
        if self._untouched and self._state() == self._untouched:
            return False
        if self._untouched:
            self._remove_tree(self.path)
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
        if self._untouched:
            self._remove_tree(self.path)
        os.rmdir(self._home)

    def _remove_tree(self, root: str) -> None:
        """Remove it however deep it is: directories are first moved up, so that no path becomes too long."""
        pending, moved = [root], 0
        while pending:
            directory = pending.pop()
            os.chmod(directory, 0o700)
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    moved += 1
                    target = os.path.join(self._home, f"removed-{moved}")
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
