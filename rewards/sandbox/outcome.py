"""What came of a job, from what the kernel reported and what the program left in its files. The files are hostile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo.rewards.sandbox import codec
from grpo.rewards.sandbox.types import Call, CallError, Execution, Limits, Plain, Status
from grpo.rewards.sandbox.wire import ENDED, RAISED, RECORD, VALUE, Report, Stopped

_MB = 1 << 20
_MAX_TYPE_CHARS, _MAX_MESSAGE_CHARS = 100, 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``result`` holds the records that ``program.py`` writes, or anything else."""

    report: Report
    stdout: bytes
    stderr: bytes
    result: bytes
    resident_mb: float  # what the program's process had before it allocated anything

    def execution(self, limits: Limits) -> Execution:
        records = list(_records(self.result, num_calls=0))
        return Execution(**self._common(limits, records, needs_end=False))

    def call(self, limits: Limits, num_calls: int) -> Call:
        records = list(_records(self.result, num_calls))
        common = self._common(limits, records, needs_end=True)
        values = [value for kind, value in records if kind != ENDED][:num_calls]
        if len(values) < num_calls:
            error = next((value for kind, value in records if kind == ENDED and value is not None), None)
            missing = error or CallError("NotRun", f"the program ended before it was done with this call: {common['status']}")
            values += [missing] * (num_calls - len(values))
        return Call(**common, values=tuple(values))

    def _common(self, limits: Limits, records: list[tuple[bytes, Any]], needs_end: bool) -> dict[str, Any]:
        errors = [value for _, value in records if isinstance(value, CallError)]
        ended = any(kind == ENDED for kind, _ in records)
        exit_code = os.waitstatus_to_exitcode(self.report.wait_status)
        return {
            "status": self._status(limits, exit_code, errors, ended or not needs_end),
            "stdout": self.stdout,
            "stderr": self.stderr,
            "exit_code": exit_code if exit_code >= 0 else None,
            "cpu_s": self.report.cpu_s,
            "wall_s": self.report.wall_s,
            "max_rss_mb": self.report.max_rss_mb,
            "error": errors[0] if errors else None,
        }

    def _status(self, limits: Limits, exit_code: int, errors: list[CallError], complete: bool) -> Status:
        full = max(len(self.stdout), len(self.stderr)) >= limits.output_mb * _MB
        if full or self.report.stopped is Stopped.files:
            return Status.output
        if self.report.stopped in (Stopped.cpu, Stopped.wall) or self.report.cpu_s >= limits.cpu_s:
            return Status.timeout
        if self.report.max_rss_mb > self.resident_mb + limits.memory_mb or any(error.type.endswith("MemoryError") for error in errors):
            return Status.memory
        if exit_code < 0 or self.report.stopped is Stopped.threads:
            return Status.killed
        return Status.ok if exit_code == 0 and complete else Status.error


def _records(result: bytes, num_calls: int) -> Iterator[tuple[bytes, Plain | CallError]]:
    """The whole records, at most one a call and the end; what is none ends the list."""
    decoder, position, view = codec.Decoder(), 0, memoryview(result)
    calls = 0
    while position + RECORD.size <= len(view):
        kind, size = RECORD.unpack_from(view, position)
        content = view[position + RECORD.size : position + RECORD.size + size]
        position += RECORD.size + size
        if len(content) < size or kind not in (VALUE, RAISED, ENDED) or (kind != ENDED and calls == num_calls):
            return
        calls += kind != ENDED
        yield kind, _value(kind, content, decoder)
        if kind == ENDED:
            return


def _value(kind: bytes, content: memoryview, decoder: codec.Decoder) -> Plain | CallError:
    try:
        value = decoder.decode(content)
    except codec.Garbled as error:
        return CallError("Garbled", str(error))
    if kind == VALUE or (kind == ENDED and value is None):
        return value
    match value:
        case (str(name), str(message)):
            return CallError(name[:_MAX_TYPE_CHARS], message[:_MAX_MESSAGE_CHARS])
    return CallError("Garbled", "an exception without a type and a message")
