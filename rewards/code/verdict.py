"""The nouns of judging a program: what can become of one test case, and of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """What became of a test case, or of a completion: the verdict of its first case that did not pass."""

    passed = "passed"
    wrong_answer = "wrong_answer"
    runtime_error = "runtime_error"  # an exception, or an exit code other than 0
    timeout = "timeout"
    memory = "memory"
    output = "output"  # printed or returned more than the limit
    killed = "killed"  # ended by a signal, or by the sandbox for what it tried
    compile_error = "compile_error"
    no_function = "no_function"  # the program defines no function of the wanted name
    no_code = "no_code"  # the completion holds no program


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``Case(verdict=Verdict.wrong_answer, detail="expected 7, got 8")``"""

    verdict: Verdict
    detail: str = ""


PASSED = Case(verdict=Verdict.passed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What all tests of a problem say of one program. Cases behind the last one listed were not run and did not pass."""

    cases: Sequence[Case]
    total: int
    forgeable: bool = False  # the tests ran in one process with the model's program, which could have changed what they say
    cpu_s: float = 0.0

    @property
    def passed(self) -> int:
        return sum(case.verdict is Verdict.passed for case in self.cases)

    @property
    def verdict(self) -> Verdict:
        """Of the first case that did not pass."""
        return next((case.verdict for case in self.cases if case.verdict is not Verdict.passed), Verdict.passed)

    def describe(self) -> str:
        """``wrong_answer: 2 of 3 cases passed; case 3: expected 7, got 8``"""
        head = f"{self.verdict}: {self.passed} of {self.total} cases passed" + (" [forgeable]" if self.forgeable else "")
        failed = next((number for number, case in enumerate(self.cases) if case.verdict is not Verdict.passed), None)
        if failed is None or not self.cases[failed].detail:
            return head
        return f"{head}; case {failed + 1}: {self.cases[failed].detail}"
