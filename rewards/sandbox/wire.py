"""What the owner and a fork-server say to each other, and the files that they hand over.

They share a socket that keeps messages apart. First comes a ``Setup`` as JSON, answered by a ``Ready`` or a ``Failure``; then a
``Job`` with its file descriptors, answered by a ``Report`` or a ``Failure``, any number of times. The fork-server never reads a
job's files: only the program's own process does.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from enum import IntEnum

MAX_MESSAGE = 1 << 16
PROGRAM, STDIN, STDOUT, STDERR, RESULT = range(5)  # the order of a job's file descriptors
NUM_FILES = 5
RESULT_FD = 3  # where a program's process finds the last of them; the first three become 0, 1 and 2

VALUE, RAISED, ENDED = b"V", b"R", b"E"  # records in the result file: a value, a call's exception, the end
RECORD = struct.Struct("<cI")  # the record's kind, the bytes behind it


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a fork-server confines its programs."""

    level: str
    readable: tuple[str, ...]  # paths that programs may read
    site_packages: tuple[str, ...]
    imports: tuple[str, ...]  # modules to have ready
    scratch: str  # the directory to make on levels that need one on the disk

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, message: bytes) -> Setup:
        fields = json.loads(message)
        return cls(
            level=fields["level"],
            readable=tuple(fields["readable"]),
            site_packages=tuple(fields["site_packages"]),
            imports=tuple(fields["imports"]),
            scratch=fields["scratch"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The fork-server is up."""

    resident_mb: float  # what each program has before it allocates anything

    _FORMAT = struct.Struct("<1sd")

    def pack(self) -> bytes:
        return self._FORMAT.pack(b"y", self.resident_mb)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The limits of one run, in seconds and bytes."""

    cpu_s: float
    wall_s: float
    memory: int
    files: int

    _FORMAT = struct.Struct("<ddQQ")

    def pack(self) -> bytes:
        return self._FORMAT.pack(self.cpu_s, self.wall_s, self.memory, self.files)

    @classmethod
    def unpack(cls, message: bytes) -> Job:
        cpu_s, wall_s, memory, files = cls._FORMAT.unpack(message)
        return cls(cpu_s=cpu_s, wall_s=wall_s, memory=memory, files=files)


class Stopped(IntEnum):
    """Why the fork-server ended a program."""

    no = 0
    cpu = 1
    wall = 2
    files = 3
    threads = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a program's process ended, as the kernel tells it."""

    wait_status: int
    stopped: Stopped
    cpu_s: float
    wall_s: float
    max_rss_mb: float

    _FORMAT = struct.Struct("<1siBddd")

    def pack(self) -> bytes:
        return self._FORMAT.pack(b"r", self.wait_status, self.stopped, self.cpu_s, self.wall_s, self.max_rss_mb)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The sandbox failed, before the program ran or after it."""

    why: str

    def pack(self) -> bytes:
        return b"f" + self.why.encode("utf-8", "replace")[: MAX_MESSAGE - 1]


def unpack_answer(message: bytes) -> Ready | Report | Failure:
    """
    Raises:
        ValueError: it is none.
    """
    try:
        match message[:1]:
            case b"y":
                return Ready(resident_mb=Ready._FORMAT.unpack(message)[1])
            case b"r":
                _, wait_status, stopped, cpu_s, wall_s, max_rss_mb = Report._FORMAT.unpack(message)
                return Report(wait_status=wait_status, stopped=Stopped(stopped), cpu_s=cpu_s, wall_s=wall_s, max_rss_mb=max_rss_mb)
            case b"f":
                return Failure(why=message[1:].decode("utf-8", "replace"))
    except struct.error:
        pass
    raise ValueError(f"no answer of a fork-server: {message[:40]!r}")
