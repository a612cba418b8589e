"""The sandbox as the judges use it: which limits a run has, and what a completion has used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from grpo.rewards.code.verdict import Case, Verdict
from grpo.rewards.sandbox import Call, CallError, Execution, Limits, Status

_Run = TypeVar("_Run", bound=Execution)


class Box(Protocol):
    """What of ``grpo.rewards.sandbox.Sandbox`` is used here."""

    def run(self, source: str, stdin: bytes = b"", *, limits: Limits | None = None) -> Execution: ...

    def call(self, source: str, function: str, arguments: Sequence[Sequence[Any]], *, limits: Limits | None = None) -> Call: ...


@dataclass(slots=True)
class Bench:
    """Runs one completion's program.

    ``limits`` holds for a run of one case; a run that holds ``n`` cases has ``n`` times its CPU time. What is left of
    ``left_cpu_s`` bounds every run. Wall time is three times CPU time and a second, so that a busy machine turns no right answer
    into a timeout.
    """

    box: Box
    limits: Limits
    left_cpu_s: float
    used_cpu_s: float = 0.0

    def run(self, program: str, stdin: bytes) -> Execution:
        return self._charged(self.box.run(program, stdin, limits=self._limits(1)))

    def call(self, source: str, function: str, arguments: Sequence[Sequence[Any]], num_cases: int) -> Call:
        return self._charged(self.box.call(source, function, arguments, limits=self._limits(num_cases)))

    @property
    def exhausted(self) -> bool:
        return self.left_cpu_s <= 0

    def _limits(self, num_cases: int) -> Limits:
        cpu_s = max(min(self.limits.cpu_s * num_cases, self.left_cpu_s), 0.01)
        return replace(self.limits, cpu_s=cpu_s, wall_s=3 * cpu_s + 1)

    def _charged(self, run: _Run) -> _Run:
        self.left_cpu_s -= run.cpu_s
        self.used_cpu_s += run.cpu_s
        return run


_VERDICTS = {
    Status.ok: Verdict.runtime_error,  # it ended itself, before the call that was asked for
    Status.error: Verdict.runtime_error,
    Status.timeout: Verdict.timeout,
    Status.memory: Verdict.memory,
    Status.output: Verdict.output,
    Status.killed: Verdict.killed,
}


_ERRORS = {
    "SyntaxError": Verdict.compile_error,
    "IndentationError": Verdict.compile_error,
    "TabError": Verdict.compile_error,
    "MemoryError": Verdict.memory,
    "ResultNotPlain": Verdict.wrong_answer,
    "ResultTooLarge": Verdict.output,
    "Garbled": Verdict.wrong_answer,
}


def ended(run: Execution) -> Case:
    """What a run that ended too early means for the case it was at."""
    if run.error is not None:
        return Case(verdict=_ERRORS.get(run.error.type, _VERDICTS[run.status]), detail=f"{run.error.type}: {run.error.message}"[:500])
    how = "a signal" if run.exit_code is None else f"exit code {run.exit_code}"
    return Case(verdict=_VERDICTS[run.status], detail=f"ended by {how} after {run.cpu_s:.2f} s of CPU time, {run.wall_s:.1f} s in all")


def failed_call(error: CallError, run: Call) -> Case:
    """What a call without a value means for its case."""
    if error.type == "NotRun":
        return ended(run)
    return Case(verdict=_ERRORS.get(error.type, Verdict.runtime_error), detail=f"{error.type}: {error.message}"[:500])
