"""What the owner makes of what a program leaves, whatever that is."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.sandbox import CallError, Limits, Sandbox, codec
from grpo.rewards.sandbox.outcome import Outcome
from grpo.rewards.sandbox.wire import ENDED, RAISED, RECORD, VALUE, Failure, Job, Ready, Report, Setup, Stopped, unpack_answer

LIMITS = Limits(cpu_s=1, wall_s=4, memory_mb=100, output_mb=1)


def record(kind: bytes, value: Any) -> bytes:
    content = codec.encode(value)
    return RECORD.pack(kind, len(content)) + content


END = record(ENDED, None)


def outcome(result: bytes, wait_status: int = 0, **changes: Any) -> Outcome:
    report = {"wait_status": wait_status, "stopped": Stopped.no, "cpu_s": 0.01, "wall_s": 0.01, "max_rss_mb": 30.0}
    files = {"stdout": b"", "stderr": b"", "result": result}
    report |= {name: value for name, value in changes.items() if name in report}
    files |= {name: value for name, value in changes.items() if name in files}
    return Outcome(report=Report(**report), resident_mb=20.0, **files)


@given(st.binary(max_size=300), st.integers(0, 5))
def test_any_bytes_give_one_entry_a_call(result: bytes, num_calls: int) -> None:
    call = outcome(result).call(LIMITS, num_calls)
    assert len(call.values) == num_calls
    codec.encode([value for value in call.values if not isinstance(value, CallError)])  # so they are plain


@given(st.lists(st.tuples(st.sampled_from([VALUE, RAISED, ENDED, b"?"]), st.binary(max_size=20)), max_size=8), st.integers(0, 3))
def test_any_records_give_one_entry_a_call(records: list[tuple[bytes, bytes]], num_calls: int) -> None:
    result = b"".join(RECORD.pack(kind, len(content)) + content for kind, content in records)
    assert len(outcome(result).call(LIMITS, num_calls).values) == num_calls
    outcome(result).execution(LIMITS)


def test_values_and_exceptions_in_order() -> None:
    call = outcome(record(VALUE, 49) + record(RAISED, ("KeyError", "'x'")) + END).call(LIMITS, 2)
    assert call.values == (49, CallError("KeyError", "'x'"))
    assert call.status == "ok" and call.error == CallError("KeyError", "'x'")


def test_calls_that_were_not_made() -> None:
    call = outcome(record(VALUE, 49)).call(LIMITS, 3)
    assert call.values[0] == 49 and [value.type for value in call.values[1:]] == ["NotRun", "NotRun"]
    assert call.status == "error"  # nothing says that it came to its end
    failed = outcome(record(ENDED, ("ImportError", "no")), wait_status=1 << 8).call(LIMITS, 2)
    assert failed.values == (CallError("ImportError", "no"),) * 2


def test_more_values_than_calls_are_ignored() -> None:
    assert outcome(record(VALUE, 1) * 5 + END).call(LIMITS, 2).values == (1, 1)


def test_a_forged_error_is_not_believed() -> None:
    """A CallError is only ever made here; a value that looks like one stays a value."""
    call = outcome(record(VALUE, ("NotRun", "")) + record(RAISED, 5) + END).call(LIMITS, 2)
    assert call.values[0] == ("NotRun", "") and call.values[1].type == "Garbled"


def test_long_messages_are_cut() -> None:
    (error,) = outcome(record(RAISED, ("E" * 10_000, "m" * 1_000_000)) + END).call(LIMITS, 1).values
    assert len(error.type) <= 100 and len(error.message) <= 2_000


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"wait_status": 3 << 8}, "error"),
        ({"wait_status": int(signal.SIGSEGV)}, "killed"),
        ({"wait_status": int(signal.SIGKILL), "stopped": Stopped.cpu}, "timeout"),
        ({"wait_status": int(signal.SIGKILL), "stopped": Stopped.wall}, "timeout"),
        ({"cpu_s": 1.0}, "timeout"),  # it ended by itself, but not in time
        ({"max_rss_mb": 121.0}, "memory"),  # 20 of the interpreter + 100
        ({"max_rss_mb": 119.0}, "ok"),
        ({"stdout": b"x" * 2**20}, "output"),
        ({"stderr": b"x" * 2**20}, "output"),
        ({"stdout": b"x" * (2**20 - 1)}, "ok"),
        ({"wait_status": int(signal.SIGKILL), "stopped": Stopped.files}, "output"),
        ({"wait_status": int(signal.SIGKILL), "stopped": Stopped.threads}, "killed"),
    ],
)
def test_status(changes: dict[str, Any], status: str) -> None:
    run = outcome(END, **changes).execution(LIMITS)
    assert run.status == status
    assert run.exit_code == (None if run.status == "killed" or changes.get("wait_status") == 9 else changes.get("wait_status", 0) >> 8)


def test_a_memory_error_is_a_matter_of_memory() -> None:
    for name in ("MemoryError", "_ArrayMemoryError"):
        assert outcome(record(ENDED, (name, "")), wait_status=1 << 8).execution(LIMITS).status == "memory"


@given(st.binary(max_size=100))
def test_answers_of_a_fork_server(message: bytes) -> None:
    try:
        answer = unpack_answer(message)
    except ValueError as error:
        assert message[:1] not in b"f" or not message, error  # any text is a failure's
    else:
        assert isinstance(answer, (Ready, Report, Failure))


def test_messages_come_back() -> None:
    report = Report(wait_status=9, stopped=Stopped.cpu, cpu_s=1.5, wall_s=2.5, max_rss_mb=30.5)
    assert unpack_answer(report.pack()) == report
    assert unpack_answer(Ready(resident_mb=20.5).pack()) == Ready(resident_mb=20.5)
    assert unpack_answer(Failure(why="because").pack()) == Failure(why="because")
    job = Job(cpu_s=1.5, wall_s=2.5, memory=3, files=4)
    assert Job.unpack(job.pack()) == job
    setup = Setup(level="landlock", readable=("/usr/lib",), site_packages=(), imports=("os",), scratch="/tmp")
    assert Setup.unpack(setup.pack()) == setup


FORGED = record(VALUE, "mine") + END


@pytest.mark.parametrize(
    ("source", "first"),
    [
        (f"import os\nos.write(3, {FORGED!r})\ndef solve(x): return x", "mine"),  # it may say what it likes: it does not know the answer
        ("import os\nos.write(3, os.urandom(5000))\ndef solve(x): return x", None),
        ("import os\nos.close(3)\ndef solve(x): return x", None),
        ("import os\nos.dup2(1, 3)\ndef solve(x): return x", None),
        ("import os\nos.write(3, b'V\\xff\\xff\\xff\\xff' + b'l' * 100)\ndef solve(x): return x", None),
        ("import os\nos.write(3, b'V\\x00\\x00\\x08\\x00' + b'l\\x01\\x00\\x00\\x00' * 104858)\ndef solve(x): return x", None),
        ("import os\nos.lseek(3, 0, 2)\ndef solve(x): return x", None),
        ("import os\nos.ftruncate(3, 10)\ndef solve(x): return x", None),
        ("import sys\nfor n, m in list(sys.modules.items()):\n    if 'codec' in n: vars(m).clear()\ndef solve(x): return x", None),
        ("import sys\nsys.modules.clear()\ndef solve(x): return x", None),
        ("import builtins\nvars(builtins).clear()\ndef solve(x): return x", None),
    ],
)
def test_a_program_that_meddles_with_its_results(box: Sandbox, source: str, first: str | None) -> None:
    call = box.call(source, "solve", [[7], [8]], limits=Limits(output_mb=2))
    assert len(call.values) == 2
    if first is None:
        assert call.values == (7, 8) or any(isinstance(value, CallError) for value in call.values)
    else:
        assert call.values[0] == first
    assert box.run("print(6 * 7)").stdout == b"42\n"
