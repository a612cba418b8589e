"""A program and its tests → a judgement. Everything that decides happens here, outside the processes that run model code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo.rewards.code.bench import Bench, ended, failed_call
from grpo.rewards.code.cases import CallCase, CallTests, StdinCase, StdinTests
from grpo.rewards.code.compare import OutputRule, same_output, same_value
from grpo.rewards.code.verdict import PASSED, Case, Judgement, Verdict
from grpo.rewards.sandbox import Call, CallError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How outputs and values are compared; see ``compare.py``."""

    output: OutputRule = OutputRule.tokens
    tolerance: float = 1e-6


def judge_stdin(program: str, tests: StdinTests, bench: Bench, rules: Rules, stop_early: bool) -> Judgement:
    """Run the program on each input. After a timeout the rest is not run, nor, if ``stop_early``, after any case that fails."""
    source = with_prelude(tests.prelude, program)
    cases: list[Case] = []
    for case in tests.cases:
        cases.append(_judge_output(source, case, bench, rules))
        verdict = cases[-1].verdict
        if verdict in (Verdict.timeout, Verdict.compile_error) or (stop_early and verdict is not Verdict.passed):
            break
    return Judgement(cases=cases, total=len(tests.cases), cpu_s=bench.used_cpu_s)


def _judge_output(source: str, case: StdinCase, bench: Bench, rules: Rules) -> Case:
    if bench.exhausted:
        return Case(verdict=Verdict.timeout, detail="the CPU time of all cases together is used up")
    run = bench.run(source, case.input.encode())
    if run.status != "ok":
        return ended(run)
    got = run.stdout.decode("utf-8", "replace")
    if same_output(got, case.output, rules.output, rules.tolerance):
        return PASSED
    return Case(verdict=Verdict.wrong_answer, detail=f"expected {_short(case.output)}, got {_short(got)}")


def judge_calls(program: str, tests: CallTests, bench: Bench, rules: Rules) -> Judgement:
    """Call the function with each argument list, all in one run."""
    arguments = [list(case.args) for case in tests.cases]
    call = bench.call(with_prelude(tests.prelude, program), tests.function, arguments, num_cases=len(tests.cases))
    cases = [_judge_value(value, case, call, rules) for value, case in zip(call.values, tests.cases, strict=True)]
    return Judgement(cases=cases, total=len(tests.cases), cpu_s=bench.used_cpu_s)


def _judge_value(value: Any, case: CallCase, call: Call, rules: Rules) -> Case:
    if isinstance(value, CallError):
        return failed_call(value, call)
    if any(same_value(value, accepted, rules.tolerance) for accepted in case.accepted):
        return PASSED
    wanted = " or ".join(_short(accepted) for accepted in case.accepted)
    return Case(verdict=Verdict.wrong_answer, detail=f"{_short(list(case.args))}: expected {wanted}, got {_short(value)}")


def with_prelude(prelude: str, program: str) -> str:
    """One source that runs both, each on its own: ``from __future__`` may stand first in either."""
    if not prelude:
        return program
    parts = (("given", prelude), ("program", program))
    return "\n".join(f"exec(compile({text!r}, '<{name}>', 'exec', dont_inherit=True))" for name, text in parts)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with more digits than Python writes; very deep
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:199] + "…"
