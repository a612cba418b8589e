"""Assert-style tests, as HumanEval and MBPP have them: programs that call a function and assert what it returns.

Such programs hold the answers, so they never run beside the model's code: the tests run in one sandbox (``proctor.py``), the
model's program in another (``candidate.py``), and only argument lists and plain values pass between them, through here. The tests
are run until a call has no answer, the calls are answered, and the tests run again from the start. Two runs of the tests and one of
the program are enough unless a call depends on an earlier answer, which takes one more round each.
"""

from __future__ import annotations

import marshal
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, cast

from grpo.rewards.code.bench import Bench, Box, ended, failed_call
from grpo.rewards.code.cases import AssertTests, TestsError
from grpo.rewards.code.verdict import PASSED, Case, Judgement, Verdict
from grpo.rewards.sandbox import Call, CallError, Limits

MAX_ROUNDS = 100
MAX_DEPTH = 150  # of what a call returns: it goes on to the tests, in lists of ours, and the sandbox takes 200 levels in all

Answer = list[Any]  # ["value", result, args, kwargs], ["error", type's name, message] or ["gone", why]


def _program(name: str) -> str:
    """A program of ours for the sandbox, which runs the same interpreter. Compiled here: there it would take longer than all else."""
    code = compile(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"), f"<{name}>", "exec", dont_inherit=True)
    return f"import marshal\nexec(marshal.loads({marshal.dumps(code)!r}))\n"


PROCTOR = _program("proctor.py")
CANDIDATE = _program("candidate.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one run of the tests came to: see ``proctor.run``."""

    results: Sequence[str]
    calls: Sequence[Sequence[Any]]  # [name, args, kwargs]
    answered: int  # how many of the calls had their answer
    live: str


def first_round(box: Box, tests: AssertTests, limits: Limits) -> Round:
    """What the tests ask for before any answer. Depends on the tests alone, so it can be kept for all completions of a problem.

    Raises:
        TestsError: they do not run, or call none of their functions.
    """
    opening = _ask(box, tests, [], limits)
    if isinstance(opening, Case):
        raise TestsError(f"its tests do not run: {opening.detail}")
    if not opening.live and not opening.calls:
        shown = "; ".join(result for result in opening.results if result) or "they passed without it"
        raise TestsError(f"its tests never call {' or '.join(tests.functions)}: {shown}")
    return opening


def judge_asserts(program: str, tests: AssertTests, opening: Round, bench: Bench) -> Judgement:
    """The tests in one process, the program in another.

    Args:
        opening: ``first_round`` of these tests.

    Raises:
        TestsError: given the same answers, the tests make other calls every time; or they turn out to need live objects.
    """
    total = len(tests.programs)
    answers: list[Answer] = []
    run = opening
    for _ in range(MAX_ROUNDS):
        call = _answer(program, tests, run.calls, bench)
        if failed := _not_loaded(call):
            return Judgement(cases=[failed] * total, total=total, cpu_s=bench.used_cpu_s)
        answers = answers[: run.answered] + [_as_answer(value, call) for value in call.values[1 + run.answered :]]
        transcript = [[*request, answer] for request, answer in zip(run.calls, answers, strict=True)]
        reached = run.answered
        following = _ask(bench.box, tests, transcript, bench.limits)
        if isinstance(following, Case):  # what the function returned was too much for them
            return Judgement(cases=[following] * total, total=total, cpu_s=bench.used_cpu_s)
        run = following
        if not run.calls:
            cases = [_as_case(result, answers, call) for result in run.results]
            return Judgement(cases=cases, total=total, cpu_s=bench.used_cpu_s)
        if run.live:
            raise TestsError(f"its tests need live objects ({run.live}); set live to true in them")
        if run.answered <= reached:
            raise TestsError("its tests make other calls every time they run; they must be deterministic")
        if bench.exhausted:
            break
    late = Case(verdict=Verdict.timeout, detail=f"the tests were not done after {len(answers)} calls")
    return Judgement(cases=[*(_as_case(result, answers, call) for result in run.results), late], total=total, cpu_s=bench.used_cpu_s)


def _ask(box: Box, tests: AssertTests, transcript: Sequence[Any], limits: Limits) -> Round | Case:
    """One run of the tests; a case that says why if it did not come to its end."""
    arguments = [tests.setup, list(tests.programs), list(tests.functions), transcript]
    call = box.call(PROCTOR, "run", [arguments], limits=limits)
    value = call.values[0]
    if isinstance(value, CallError):
        return Case(verdict=Verdict.wrong_answer, detail=f"the tests ended early ({call.status}): {value.type}: {value.message}")
    return Round(**cast(dict[str, Any], value))  # from a process without model code


def _answer(program: str, tests: AssertTests, calls: Sequence[Sequence[Any]], bench: Bench) -> Call:
    """One run of the model's program, which is loaded and then asked all calls from the first."""
    requests = [["load", tests.prelude, program, list(tests.functions)], *(["call", *call] for call in calls)]
    return bench.call(CANDIDATE, "serve", requests, num_cases=len(tests.programs))


def _not_loaded(call: Call) -> Case | None:
    loaded = call.values[0]
    if isinstance(loaded, CallError):
        return ended(call)
    match loaded:  # from the model's process: it may have been forged
        case (Verdict.compile_error | Verdict.runtime_error | Verdict.no_function as kind, str(detail)):
            return Case(verdict=Verdict(kind), detail=detail)
    return None


def _as_answer(value: Any, call: Call) -> Answer:
    """What the model's process sent for a call; whatever does not have the shape of an answer is none."""
    match value:
        case CallError(type="NotRun"):
            return ["gone", str(call.status)]
        case CallError():
            return ["error", value.type, value.message]
        case (_, list(), dict()) if _is_deeper(value, MAX_DEPTH):
            return ["error", "ResultNotPlain", f"it is nested deeper than {MAX_DEPTH} levels"]
        case (result, list(args), dict(kwargs)):
            return ["value", result, args, kwargs]
    return ["error", "TypeError", "the program sent no result"]


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if not isinstance(value, list | tuple | set | frozenset):
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)


def _as_case(result: str, answers: Sequence[Answer], call: Call) -> Case:
    """What a test program ended with. If that is what a call raised, the call is to blame, else what it returned."""
    if not result:
        return PASSED
    kind, _, message = result.removeprefix("CandidateError: ").partition(": ")
    if kind == "Gone":
        return ended(call)
    if kind in {answer[1] for answer in answers if answer[0] == "error"}:
        return failed_call(CallError(kind, message), call)
    return Case(verdict=Verdict.wrong_answer, detail=result)


def judge_together(program: str, tests: AssertTests, bench: Bench) -> Judgement:
    """Tests that need the program's own objects, in one process with it. It could change what they say, which is marked."""
    arguments = [tests.prelude, program, tests.setup, list(tests.programs), list(tests.functions)]
    call = bench.call(PROCTOR, "run_together", [arguments], num_cases=len(tests.programs))
    total = len(tests.programs)
    value = call.values[0]
    results = [result for result in value if isinstance(result, str)] if isinstance(value, list) else []
    cases = [_forgeable_case(result, call) for result in results] if len(results) == total and call.status == "ok" else [ended(call)]
    return Judgement(cases=cases, total=total, forgeable=True, cpu_s=bench.used_cpu_s)


def _forgeable_case(result: str, call: Call) -> Case:
    kind, _, message = result.partition(": ")
    if not result:
        return PASSED
    if kind == "AssertionError":
        return Case(verdict=Verdict.wrong_answer, detail=result)
    return failed_call(CallError(kind, message), call)
