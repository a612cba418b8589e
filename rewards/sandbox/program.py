"""A program's own process, from the moment its confinement stands: run the source, call its function, say how it ended.

Everything here shares a process with hostile code, so nothing that it reports is more than that code's word.
"""

from __future__ import annotations

import atexit
import builtins
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from io import BufferedReader, BufferedWriter, FileIO, TextIOWrapper
from typing import Any, NoReturn

from grpo.rewards.sandbox import codec
from grpo.rewards.sandbox.wire import ENDED, RAISED, RECORD, RESULT_FD, VALUE

_FILE_NAME = "program.py"
_MAX_MESSAGE_CHARS = 2_000
_KEPT_BYTES = 1 << 16  # of the result file, for exceptions and the end


def run(job_fd: int) -> NoReturn:
    """Run the job in this file to its end, and end the process."""
    function, source, arguments = _read_job(job_fd)
    files = _open_standard_files()
    results = _Results()
    code = _finish(results, files, lambda: _run_script(source) if function is None else _run_calls(source, function, arguments, results))
    os._exit(code)


def _read_job(fd: int) -> tuple[str | None, bytes, Sequence[Any]]:
    with open(fd, "rb") as file:
        function, source, arguments = codec.decode(file.read())
    return function, source, arguments


def _open_standard_files() -> list[TextIOWrapper]:
    """Those to write to. As the interpreter itself does it, on what file descriptors 0 to 2 are since the fork."""
    stdin = TextIOWrapper(BufferedReader(FileIO(0, "r", closefd=False)), encoding="utf-8", errors="surrogateescape")
    stdout = TextIOWrapper(BufferedWriter(FileIO(1, "w", closefd=False)), encoding="utf-8", errors="surrogateescape")
    stderr = TextIOWrapper(BufferedWriter(FileIO(2, "w", closefd=False)), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    sys.stdin = sys.__stdin__ = stdin  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = stdout  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = stderr  # type: ignore[misc]
    return [stdout, stderr]


class _Results:
    """The result file: one record after another."""

    def __init__(self) -> None:
        self._left = os.fstat(RESULT_FD).st_size
        self._encoder = codec.Encoder(self._left - _KEPT_BYTES)

    def value(self, value: Any) -> None:
        try:
            encoded = self._encoder.encode(value)
        except codec.NotPlain as error:
            self.raised("ResultNotPlain", str(error))
        except codec.TooLarge as error:
            self.raised("ResultTooLarge", str(error))
        else:
            self._write(VALUE, encoded)

    def exception(self, error: BaseException) -> None:
        self.raised(*describe(error))

    def raised(self, kind: str, message: str) -> None:
        self._write(RAISED, codec.encode((kind, message)))

    def ended(self, error: tuple[str, str] | None) -> None:
        self._write(ENDED, codec.encode(error))

    def _write(self, kind: bytes, content: bytes) -> None:
        record = RECORD.pack(kind, len(content)) + content
        if len(record) <= self._left:
            self._left -= os.write(RESULT_FD, record)


def describe(error: BaseException) -> tuple[str, str]:
    try:
        message = str(error)
    except BaseException:
        message = "its message cannot be shown"
    return type(error).__name__, message[:_MAX_MESSAGE_CHARS]


def _new_module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    module.__dict__.update(__builtins__=builtins, __file__=_FILE_NAME)
    sys.modules[name] = module
    sys.argv = [_FILE_NAME]
    return module.__dict__


def _run_script(source: bytes) -> None:
    exec(compile(source, _FILE_NAME, "exec", dont_inherit=True), _new_module("__main__"))


def _run_calls(source: bytes, name: str, arguments: Sequence[Sequence[Any]], results: _Results) -> None:
    namespace = _new_module("program")
    try:
        exec(compile(source, _FILE_NAME, "exec", dont_inherit=True), namespace)
    except SystemExit:
        pass  # a script that ends with exit() has defined its functions
    for each in arguments:
        try:
            value = _find(namespace, name)(*each)
        except BaseException as error:
            results.exception(error)
            del error
        else:
            results.value(value)
            del value


def _find(namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function of that name, or that method of a fresh ``Solution`` (LeetCode)."""
    if callable(found := namespace.get(name)):
        return found
    solution = namespace.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    raise NameError(f"the program defines no function {name!r}")


def _finish(results: _Results, files: list[TextIOWrapper], work: Callable[[], None]) -> int:
    """Do the work and what a Python process does at its end: wait for threads, call exit functions, write out what is buffered."""
    code, error = _attempt(work)
    for step in (threading._shutdown, atexit._run_exitfuncs, lambda: _flush(files)):  # type: ignore[attr-defined]
        late_code, late_error = _attempt(step)
        code, error = code or late_code, error or late_error
    _attempt(lambda: results.ended(error))
    return code


def _attempt(step: Callable[[], None]) -> tuple[int, tuple[str, str] | None]:
    try:
        step()
    except SystemExit as error:
        return _exit_code(error.code), None
    except BaseException as error:
        return 1, _report(error)
    return 0, None


def _exit_code(code: Any) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return int(code) & 0xFF
    try:
        print(code, file=sys.stderr)
    except BaseException:
        pass  # it is the program's own object, or the program has closed its file
    return 1


def _report(error: BaseException) -> tuple[str, str]:
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != _FILE_NAME:  # our own frames
            trace = trace.tb_next
        sys.stderr.write("".join(traceback.format_exception(type(error), error, trace)))
    except BaseException:
        pass  # no memory left, or the program has closed or replaced the file
    return describe(error)


def _flush(files: list[TextIOWrapper]) -> None:
    """Write out what the program left in its files, and in those that it may have put in their place."""
    for file in (sys.stdout, sys.stderr, *files):
        if file is not None and not getattr(file, "closed", False):
            file.flush()
