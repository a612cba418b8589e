"""The code reward: does the program in a completion pass the problem's tests?"""

from __future__ import annotations

import atexit
from dataclasses import replace
from enum import StrEnum
from functools import cache, lru_cache
from types import TracebackType
from typing import Any, Self

from grpo.rewards.arguments import checked_by, flag, number, one_of, whole
from grpo.rewards.code.asserts import first_round, judge_asserts, judge_together
from grpo.rewards.code.bench import Bench, Box
from grpo.rewards.code.cases import AssertTests, CallTests, StdinTests, Tests, problem_tests
from grpo.rewards.code.compare import OutputRule
from grpo.rewards.code.extract import extract_program
from grpo.rewards.code.judge import Rules, judge_calls, judge_stdin
from grpo.rewards.code.verdict import Case, Judgement, Verdict
from grpo.rewards.sandbox import Limits, Sandbox, SandboxError, SandboxUnavailable
from grpo.types import Completion, Outcome, Problem, Score

ATTEMPTS = 2  # of a judgement during which the sandbox itself failed
KEPT_ROUNDS = 256  # problems whose tests' first round is remembered: the completions of a group come close together


class Credit(StrEnum):
    """What passing some of the cases is worth: nothing unless it is ``all`` of them, or their ``share``."""

    all = "all"
    share = "share"


_OUTCOMES = {
    Verdict.no_code: Outcome.wrong_format,
    Verdict.compile_error: Outcome.wrong_format,
    Verdict.no_function: Outcome.wrong_format,
    Verdict.timeout: Outcome.timeout,
    Verdict.memory: Outcome.memory,
}


def _check(
    score: str,
    output: str,
    tolerance: float,
    cpu_s: float,
    total_cpu_s: float,
    memory_mb: int,
    numpy: bool,
    allow_weak: bool,
    unsafe: bool,
) -> None:
    one_of("score", score, list(Credit))
    one_of("output", output, list(OutputRule))
    number("tolerance", tolerance)
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance!r}; it must be 0 (floats are compared exactly) or more")
    number("cpu_s", cpu_s, above=0)
    number("total_cpu_s", total_cpu_s, above=0)
    if total_cpu_s < cpu_s:
        raise ValueError(f"total_cpu_s is {total_cpu_s:g} and cpu_s {cpu_s:g}; all runs together need at least the time of one")
    whole("memory_mb", memory_mb, least=16)
    for name, value in (("numpy", numpy), ("allow_weak", allow_weak), ("unsafe", unsafe)):
        flag(name, value)


class CodeReward:
    """Scores completions by running their programs in a sandbox: ``CodeReward(score="share")(completion, problem)``.

    What the model caused – a wrong answer, no program, one that does not compile, crashes or runs too long – is worth 0. A failure
    of the sandbox is tried again and then raised, so that the completion stays unscored. Expected answers, checks and verdicts never
    enter a process that runs the model's code, except for tests that need its live objects; those scores say ``[forgeable]``.

    Use it as a context manager, or ``close`` it. In a recipe, name the function ``grpo.rewards.code.code_reward``.

    Args:
        score: ``all``: 1 if every case passed, else 0. ``share``: the share of cases that passed.
        output: how printed output is compared, ``tokens`` or ``lines``; see ``grpo.rewards.code.compare``.
        tolerance: how far a float may be off, ``|got − expected| ≤ tolerance · max(1, |expected|)``. 0: not at all.
        cpu_s: CPU time of the program on one case, unless the problem's tests say otherwise. Cases that share a run (calls, asserts)
            share their times.
        total_cpu_s: CPU time of one completion on all its cases.
        memory_mb: memory of the program.
        numpy: import numpy before programs are run, so that it costs them nothing.
        allow_weak, unsafe: accept a machine that offers little or no isolation; see ``docs/sandbox.md``.
        box: a sandbox to use and to leave open; default: one of its own, started when first needed.

    Raises:
        ValueError: an argument that cannot work: which one, its value, what is allowed.
    """

    def __init__(
        self,
        score: str = "all",
        output: str = "tokens",
        tolerance: float = 1e-6,
        cpu_s: float = 2.0,
        total_cpu_s: float = 10.0,
        memory_mb: int = 512,
        numpy: bool = False,
        allow_weak: bool = False,
        unsafe: bool = False,
        box: Box | None = None,
    ) -> None:
        _check(score, output, tolerance, cpu_s, total_cpu_s, memory_mb, numpy, allow_weak, unsafe)
        self._credit = Credit(score)
        self._rules = Rules(output=OutputRule(output), tolerance=tolerance)
        self._limits = Limits(cpu_s=cpu_s, wall_s=3 * cpu_s + 1, memory_mb=memory_mb)
        self._total_cpu_s = total_cpu_s
        self._open = lambda: Sandbox(workers=1, limits=self._limits, numpy=numpy, allow_weak=allow_weak, unsafe=unsafe)
        self._box = box
        self._own: Sandbox | None = None
        self._first_round = lru_cache(KEPT_ROUNDS)(lambda tests: first_round(self.box, tests, self._limits))

    @property
    def box(self) -> Box:
        """The sandbox, started now if it was not."""
        if self._box is None:
            self._box = self._own = self._open()
        return self._box

    def __call__(self, completion: Completion, problem: Problem) -> Score:
        """
        Raises:
            TestsError: the problem has no tests, or they cannot be run.
            SandboxError: the sandbox failed, repeatedly.
        """
        tests = problem_tests(problem)
        program = extract_program(completion.text, problem.prompt)
        if program is None:
            return self._score(Judgement(cases=[Case(verdict=Verdict.no_code)], total=num_cases(tests)))
        return self._score(self.judge(program, tests))

    def judge(self, program: str, tests: Tests) -> Judgement:
        """Every case of the tests, as far as the program's time went. Raises as a call does."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self._judge(program, tests)
            except SandboxUnavailable:
                raise
            except SandboxError:
                pass  # says nothing about the program: again, on a worker that the sandbox has replaced
        return self._judge(program, tests)

    def close(self) -> None:
        """End the sandbox, if it is this reward's own."""
        if self._own is not None:
            self._own.close()
            self._box = self._own = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _judge(self, program: str, tests: Tests) -> Judgement:
        limits = self._limits if tests.cpu_s is None else replace(self._limits, cpu_s=tests.cpu_s, wall_s=3 * tests.cpu_s + 1)
        bench = Bench(self.box, limits, left_cpu_s=max(self._total_cpu_s, limits.cpu_s))
        match tests:
            case StdinTests():
                return judge_stdin(program, tests, bench, self._rules, stop_early=self._credit is Credit.all)
            case CallTests():
                return judge_calls(program, tests, bench, self._rules)
            case AssertTests():
                if tests.live or (opening := self._first_round(tests)).live:
                    return judge_together(program, tests, bench)
                return judge_asserts(program, tests, opening, bench)

    def _score(self, judgement: Judgement) -> Score:
        share = judgement.passed / judgement.total
        return Score(
            value=share if self._credit is Credit.share else float(share == 1),
            outcome=_OUTCOMES.get(judgement.verdict, Outcome.ok),
            detail=judgement.describe(),
            tags=(str(judgement.verdict), *(("forgeable",) if judgement.forgeable else ()), *self._level()),
        )

    def _level(self) -> tuple[str, ...]:
        """How well what ran was confined, beside every score that came of it."""
        level = getattr(self._box, "level", None)
        return (f"sandbox:{level}",) if level else ()


def num_cases(tests: Tests) -> int:
    return len(tests.programs if isinstance(tests, AssertTests) else tests.cases)


@checked_by(_check)
def code_reward(
    completion: Completion,
    problem: Problem,
    score: str = "all",
    output: str = "tokens",
    tolerance: float = 1e-6,
    cpu_s: float = 2.0,
    total_cpu_s: float = 10.0,
    memory_mb: int = 512,
    numpy: bool = False,
    allow_weak: bool = False,
    unsafe: bool = False,
) -> Score:
    """``CodeReward`` for recipes: one for each process and setting, started when first needed and kept.

    Args: those of ``CodeReward``.
    """
    _check(score, output, tolerance, cpu_s, total_cpu_s, memory_mb, numpy, allow_weak, unsafe)
    reward = _of_this_process(
        score=score,
        output=output,
        tolerance=tolerance,
        cpu_s=cpu_s,
        total_cpu_s=total_cpu_s,
        memory_mb=memory_mb,
        box=_sandbox(numpy=numpy, allow_weak=allow_weak, unsafe=unsafe),
    )
    return reward(completion, problem)


def _warm_up(**settings: Any) -> None:
    try:
        _sandbox(**{name: settings.get(name, False) for name in ("numpy", "allow_weak", "unsafe")})
    except SandboxUnavailable:
        pass  # the first completion says so, where it is recorded


code_reward.warm_up = _warm_up  # type: ignore[attr-defined]
# A result that takes this process too long or too much memory to compare is the model's doing: wrong.
code_reward.timeout_value = code_reward.memory_value = 0.0  # type: ignore[attr-defined]
# The sandbox has limits of its own; these only stop a reward that hangs.
code_reward.limits = {"cpu_s": 30.0, "wall_s": 120.0}  # type: ignore[attr-defined]


@cache
def _of_this_process(**settings: Any) -> CodeReward:
    return CodeReward(**settings)


@cache
def _sandbox(*, numpy: bool, allow_weak: bool, unsafe: bool) -> Sandbox:
    sandbox = Sandbox(workers=1, numpy=numpy, allow_weak=allow_weak, unsafe=unsafe)
    atexit.register(sandbox.close)
    return sandbox
