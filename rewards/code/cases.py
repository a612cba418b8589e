"""The tests of a problem: what stands in its ``tests`` column, checked and typed.

Plain JSON, so that it can stand in any data set; the adapters in ``grpo.data_code`` write it for the well-known ones. Three kinds::

    {"kind": "stdin", "cases": [{"input": "3 4\\n", "output": "7\\n"}]}
    {"kind": "call", "function": "add", "cases": [{"args": [3, 4], "expected": 7}]}
    {"kind": "asserts", "functions": ["add"], "programs": ["assert add(3, 4) == 7"]}

and, where needed: ``prelude`` (code that the task gives to the program), ``setup`` (code that the task gives to the asserts),
``cpu_s`` (CPU time of one run), ``live`` (the asserts need the program's own objects), ``accepted`` instead of ``expected``
(several right values).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.types import Problem

COLUMN = "tests"


class TestsError(ValueError):
    """The ``tests`` column of a problem is not what this module describes. Says where and what is allowed."""

    __test__ = False  # for pytest: not a class of tests


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinCase:
    """``StdinCase(input="3 4\\n", output="7\\n")``"""

    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCase:
    """``CallCase(args=(3, 4), accepted=(7,))``"""

    args: tuple[Any, ...]
    accepted: tuple[Any, ...]  # any of these values is right


@dataclass(frozen=True, slots=True, kw_only=True)
class StdinTests:
    """The program reads each input and prints the output."""

    cases: tuple[StdinCase, ...]
    prelude: str = ""
    cpu_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTests:
    """The function – or the method of ``class Solution`` – of that name returns one of the accepted values for each argument list."""

    function: str
    cases: tuple[CallCase, ...]
    prelude: str = ""
    cpu_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AssertTests:
    """Programs that call ``functions`` and assert. ``AssertTests(functions=("add",), programs=("assert add(3, 4) == 7",))``"""

    functions: tuple[str, ...]
    programs: tuple[str, ...]  # each is one case, and fails if it raises
    setup: str = ""
    prelude: str = ""
    cpu_s: float | None = None
    live: bool = False  # the programs need more than values: they run in one process with the model's code


Tests = StdinTests | CallTests | AssertTests

_FIELDS = {
    "stdin": ({"kind", "cases"}, {"prelude", "cpu_s"}),
    "call": ({"kind", "function", "cases"}, {"prelude", "cpu_s"}),
    "asserts": ({"kind", "functions", "programs"}, {"setup", "prelude", "cpu_s", "live"}),
}


def problem_tests(problem: Problem) -> Tests:
    """The tests of a problem.

    Raises:
        TestsError: it has none, or they are malformed.
    """
    if COLUMN not in problem.columns:
        raise TestsError(
            f"problem {problem.id!r} has no column {COLUMN!r}, but: {', '.join(map(str, problem.columns))}; "
            "choose data.problems.adapter for its data set, or write the column (docs/rewards.md)"
        )
    try:
        return parse_tests(problem.columns[COLUMN])
    except TestsError as error:
        raise TestsError(f"problem {problem.id!r}: {error}") from None


def check_tests(problem: Problem) -> str | None:
    """Why this problem's tests cannot be run; None if they can. For use when data is loaded."""
    try:
        problem_tests(problem)
    except TestsError as error:
        return str(error)
    return None


def parse_tests(value: Any) -> Tests:
    """A ``tests`` column, as a mapping or as JSON text, checked down to the last case.

    Raises:
        TestsError: naming the place.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise TestsError(f"tests is text, but not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise TestsError(f"tests is a {type(value).__name__}, not an object")
    value = {key: item for key, item in value.items() if item is not None}  # columns of parquet: a key that one row has, all have
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise TestsError(f"tests.kind is {kind!r}; it must be one of {', '.join(_FIELDS)}")
    required, optional = _FIELDS[kind]
    if missing := sorted(required - value.keys()):
        raise TestsError(f"tests of kind {kind!r} lack {', '.join(missing)}")
    if unknown := sorted(value.keys() - required - optional):
        raise TestsError(f"tests of kind {kind!r} do not have {', '.join(unknown)}; they have {', '.join(sorted(required | optional))}")
    prelude, cpu_s = _text(value, "prelude"), _seconds(value.get("cpu_s"))
    if kind == "stdin":
        return StdinTests(cases=tuple(map(_stdin_case, *_cases(value))), prelude=prelude, cpu_s=cpu_s)
    if kind == "call":
        call_cases = tuple(map(_call_case, *_cases(value)))
        return CallTests(function=_name(value["function"], "function"), cases=call_cases, prelude=prelude, cpu_s=cpu_s)
    return _assert_tests(value, prelude, cpu_s)


def _assert_tests(value: Mapping[str, Any], prelude: str, cpu_s: float | None) -> AssertTests:
    functions = tuple(_name(item, "functions") for item in _list(value["functions"], "functions"))
    programs = _list(value["programs"], "programs")
    for number, program in enumerate(programs):
        if not isinstance(program, str):
            raise TestsError(f"tests.programs[{number}] is a {type(program).__name__}, not text")
    live = value.get("live", False)
    if not isinstance(live, bool):
        raise TestsError(f"tests.live is {live!r}; it must be true or false")
    setup = _text(value, "setup")
    return AssertTests(functions=functions, programs=tuple(programs), setup=setup, prelude=prelude, cpu_s=cpu_s, live=live)


def _cases(value: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[str]]:
    cases = _list(value["cases"], "cases")
    return cases, [f"tests.cases[{number}]" for number in range(len(cases))]


def _stdin_case(case: Any, where: str) -> StdinCase:
    if not isinstance(case, Mapping) or case.keys() != {"input", "output"} or not all(isinstance(text, str) for text in case.values()):
        raise TestsError(f'{where} is {_short(case)}; it must be {{"input": text, "output": text}}')
    return StdinCase(input=case["input"], output=case["output"])


def _call_case(case: Any, where: str) -> CallCase:
    if not isinstance(case, Mapping) or case.keys() not in ({"args", "expected"}, {"args", "accepted"}):
        raise TestsError(f'{where} is {_short(case)}; it must be {{"args": […], "expected": value}}, or "accepted": [values]')
    accepted = _list(case["accepted"], f"{where}.accepted") if "accepted" in case else [case["expected"]]
    if not isinstance(case["args"], (list, tuple)):
        raise TestsError(f"{where}.args is {_short(case['args'])}, not a list")
    return CallCase(args=tuple(case["args"]), accepted=tuple(accepted))


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not value:
        raise TestsError(f"tests.{name.removeprefix('tests.')} is {_short(value)}; it must be a list with at least one item")
    return value


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name, "")
    if not isinstance(text, str):
        raise TestsError(f"tests.{name} is {_short(text)}, not text")
    return text


def _name(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise TestsError(f"tests.{name} holds {_short(value)}, which is not the name of a function")
    return value


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise TestsError(f"tests.cpu_s is {value!r}; it must be a positive number of seconds")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
