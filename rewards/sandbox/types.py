"""The nouns of the sandbox: what limits a program, what came of it, what a call returned, and what can go wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum

#: What a program can hand back: these builtin types exactly, nested as they like.
Plain = (
    None
    | bool | int | float | complex | str | bytes
    | list["Plain"] | tuple["Plain", ...] | dict["Plain", "Plain"] | set["Plain"] | frozenset["Plain"]
)  # fmt: skip


class SandboxError(RuntimeError):
    """The sandbox itself failed. It says nothing about the program: run it again, never score it."""


class SandboxUnavailable(SandboxError):
    """This machine offers no level of isolation that held in the self-test; the message says what is missing and how to get it."""


class Status(StrEnum):
    """How a program ended. A ``StrEnum``: ``run.status == "ok"`` works."""

    ok = "ok"  #: it ran to its end, and its exit code is 0
    error = "error"  #: an exception, or another exit code
    timeout = "timeout"  #: it used up its CPU time, or (much later) its wall time
    memory = "memory"  #: a MemoryError, or its resident memory went over the limit
    output = "output"  #: it printed, returned or stored more than it may
    killed = "killed"  #: a signal ended it: a segmentation fault, a forbidden system call interface, its own ``kill``


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use.

    CPU time decides. The wall limit is there for programs that sleep; it is generous, so that a busy machine
    cannot turn a right answer into a zero, and time in which the sandbox itself is paused does not count.
    """

    cpu_s: float = 2.0  #: seconds of CPU time of all threads together, the start included (about 2 ms)
    wall_s: float = 7.0  #: seconds of wall time
    memory_mb: int = 512  #: resident memory beyond the interpreter's; address space is limited to this plus 512 MB for thread stacks
    output_mb: int = 16  #: standard output, standard error and returned values, each
    files_mb: int = 64  #: files in the scratch directory, together

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"Limits({field.name}={value!r}): a positive number is needed")
        for name in ("memory_mb", "output_mb", "files_mb"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"Limits({name}={getattr(self, name)!r}): whole megabytes are needed")
        if self.wall_s < self.cpu_s:
            raise ValueError(
                f"Limits(wall_s={self.wall_s:g}) is below cpu_s={self.cpu_s:g}: CPU time should decide; 3 * cpu_s + 1 is a good wall limit"
            )


@dataclass(frozen=True, slots=True)
class CallError:
    """A call that has no value.

    ``type`` is the name of the exception that the program raised; or ``"ResultNotPlain"`` (it returned something that is not
    of builtin types, or is too deep), ``"ResultTooLarge"``, ``"NotRun"`` (the program ended before or during this call: see
    ``Execution.status``), ``"Garbled"`` (what came back is no value at all).
    """

    type: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What came of one run. Only ``stdout`` and ``values`` may count for a score, compared outside with what was expected.

    ``status``, ``error`` and ``exit_code`` are partly the program's own words: good for metrics and messages, never a verdict.

    >>> Execution(status=Status.ok, stdout=b"49\\n", stderr=b"", exit_code=0, cpu_s=0.003, wall_s=0.004, max_rss_mb=14.2)  # doctest: +SKIP
    """

    status: Status
    stdout: bytes
    stderr: bytes
    exit_code: int | None  #: None when a signal ended the program
    cpu_s: float
    wall_s: float
    max_rss_mb: float  #: peak resident memory, the interpreter's own (shared) memory included
    error: CallError | None = None  #: the exception that ended the program, or the first one of its calls


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Execution):
    """What came of calling a function. ``values`` has one entry per argument list, in their order, whatever happened."""

    values: tuple[Plain | CallError, ...]
