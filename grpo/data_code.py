"""Programming problems: the rows of well-known data sets → a question, a reference program and tests for ``grpo.rewards.code``.

    data:
      problems:
        fn: grpo.data_code.code_problems
        rows: {fn: grpo.data.jsonl, train: train.jsonl, heldout: test.jsonl}
        adapter: {fn: grpo.data_code.mbpp}

An adapter is a function ``fn(row, **arguments) -> row`` whose result has the columns ``question``, ``answer`` (a program that passes,
or an empty text) and ``tests`` (see ``grpo.rewards.code.cases``). Write your own and name it as ``file.py:function``.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config import ConfigError
from grpo.data import Row
from grpo.imports import FunctionRef, resolve
from grpo.rewards.code.cases import COLUMN, TestsError, parse_tests

Component = Mapping[str, Any] | FunctionRef  # ``{fn: …, …}``


class RowError(ValueError):
    """A row that is not what its adapter expects, or that cannot be used. Says what is wrong with it."""


def code_problems(split: str, *, rows: Component, adapter: Component, drop_unusable: bool = False, seed: int = 0) -> list[Row]:
    """The rows that ``rows`` gives for this split, each through ``adapter``, its tests checked.

    Args:
        rows: a source of rows, as ``data.problems`` would name it: ``{fn: grpo.data.huggingface, path: …}``.
        adapter: ``{fn: grpo.data_code.apps, …}``.
        drop_unusable: leave out rows that the adapter cannot use and say how many, instead of stopping at the first.

    Raises:
        ConfigError: a row cannot be used.
    """
    source = _resolved(rows, "data.problems.rows", provided=("seed",)).load()
    adapting = _resolved(adapter, "data.problems.adapter")
    adapt = adapting.load()
    usable: list[Row] = []
    faults: list[str] = []
    for number, row in enumerate(source(split, seed=seed)):
        try:
            adapted = adapt(row)
            parse_tests(adapted[COLUMN])
            usable.append(adapted)
        except (RowError, TestsError) as error:
            faults.append(f"row {number} of the {split} split: {error}")
    if faults and not drop_unusable:
        remedy = "correct the data, or set data.problems.drop_unusable=true"
        raise ConfigError("data.problems.adapter", f"{adapting.target} cannot use {len(faults)} of the rows, e.g. {faults[0]}", remedy)
    if faults:
        warnings.warn(f"{len(faults)} of {len(faults) + len(usable)} rows were left out, e.g. {faults[0]}", stacklevel=2)
    return usable


def _resolved(component: Component, key: str, provided: tuple[str, ...] = ()) -> FunctionRef:
    """A recipe's nested components come resolved, those of a caller in Python as they are written."""
    return component if isinstance(component, FunctionRef) else resolve(component, key, positional=1, provided=provided)


# ---- HumanEval ---------------------------------------------------------------------------------------------------------


def humaneval(row: Row) -> Row:
    """HumanEval (https://arxiv.org/abs/2107.03374): the question is a signature with its docstring.

    Helpers that the question defines are given to the program and to the tests alike.
    """
    prompt, name, test = _texts(row, "prompt", "entry_point", "test")
    given = without_function(prompt, name)
    return _checked(row, prompt, prompt + str(row.get("canonical_solution", "")), name, test, given)


def _checked(row: Row, question: str, answer: str, name: str, test: str, given: str) -> Row:
    """A problem whose ``test`` defines ``check(candidate)``; what is ``given`` stands before the program and before the test."""
    return {
        **({"id": str(row["task_id"])} if "task_id" in row else {}),
        "question": question,
        "answer": answer,
        "tests": {
            "kind": "asserts",
            "functions": [name],
            "programs": [f"{test}\n\ncheck({name})\n"],
            "setup": given,
            "prelude": given,
        },
    }


def without_function(source: str, name: str) -> str:
    """A program without its top-level function ``name``.

    Raises:
        RowError: it does not compile, or has no such function.
    """
    found = [node for node in _parse(source, "prompt").body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise RowError(f"the prompt does not define {name}")
    lines = source.splitlines(keepends=True)
    for node in reversed(found):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        del lines[first - 1 : node.end_lineno]
    return "".join(lines).strip() + "\n"


# ---- MBPP --------------------------------------------------------------------------------------------------------------


def mbpp(row: Row, shown: int = 1) -> Row:
    """MBPP (https://arxiv.org/abs/2108.07732), the full and the sanitized edition.

    What the tests use of the reference program decides how they run: its functions are the tested ones, its imports go to the tests,
    and if they make objects of its classes, they are ``live``.

    Args:
        shown: how many of the tests the question shows; at least one, since only they say what the function is called. What is shown
            can be passed without solving the problem: leave some hidden, and do not score ``share``.
    """
    if shown < 1:
        raise ConfigError("data.problems.adapter.shown", f"is {shown}", "show 1 or more: nothing else names the function")
    text = row["text"] if "text" in row else _texts(row, "prompt")[0]
    programs = _list(row, "test_list")
    reference = _texts(row, "code")[0].replace("\r\n", "\n")
    setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code") or ""]).replace("\r\n", "\n").strip()
    used = names_in("\n".join([setup, *programs]))
    defined = Definitions.of(reference)
    functions = sorted(used & defined.functions)
    if not functions:
        raise RowError(f"its tests call no function of its reference program: {programs[0]}")
    shown_tests = "\n".join(programs[:shown])
    return {
        **({"id": f"mbpp/{row['task_id']}"} if "task_id" in row else {}),
        "question": f"{text}\nYour code should pass {'this test' if shown == 1 else 'these tests'}:\n{shown_tests}",
        "answer": reference,
        "tests": {
            "kind": "asserts",
            "functions": functions,
            "programs": programs,
            "setup": "\n".join([*defined.imports_of(used), setup]).strip(),
            "live": bool(used & defined.classes),
        },
    }


@dataclass(frozen=True, slots=True)
class Definitions:
    """What a program defines at its top level, by name."""

    functions: frozenset[str]
    classes: frozenset[str]
    imports: Mapping[str, str]  # name → the statement that imports it

    @classmethod
    def of(cls, source: str) -> Definitions:
        """
        Raises:
            RowError: it does not compile.
        """
        body = _parse(source, "reference program").body
        return cls(
            functions=frozenset(node.name for node in body if isinstance(node, ast.FunctionDef)),
            classes=frozenset(node.name for node in body if isinstance(node, ast.ClassDef)),
            imports={
                (alias.asname or alias.name).partition(".")[0]: ast.unparse(node)
                for node in body
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            },
        )

    def imports_of(self, names: Iterable[str]) -> list[str]:
        """The statements, each once, that import these names, as far as they are imported."""
        return list(dict.fromkeys(self.imports[name] for name in sorted(names) if name in self.imports))


def names_in(source: str) -> set[str]:
    """The names that a program uses.

    Raises:
        RowError: it does not compile.
    """
    return {node.id for node in ast.walk(_parse(source, "test program")) if isinstance(node, ast.Name)}


def _parse(source: str, what: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise RowError(f"its {what} does not compile: {error}") from None


# ---- LeetCode ----------------------------------------------------------------------------------------------------------


def leetcode(row: Row) -> Row:
    """LeetCodeDataset (https://arxiv.org/abs/2504.14655): a ``class Solution``, tested by ``check(candidate)``.

    Tests that build trees or linked lists need the program's own objects, which their first run finds out.
    """
    description, given, entry, test = _texts(row, "problem_description", "prompt", "entry_point", "test")
    name = entry.rpartition(".")[2].removesuffix("()")
    starter = row.get("starter_code") or ""
    question = f"{description}\n\nComplete this class:\n{starter}" if starter else description
    return _checked(row, question, str(row.get("completion") or ""), name, test, given)


# ---- APPS and TACO -----------------------------------------------------------------------------------------------------


def apps(row: Row, max_cases: int = 20) -> Row:
    """APPS (https://arxiv.org/abs/2105.09938) and TACO (https://arxiv.org/abs/2312.14852): ``input_output`` as JSON text.

    With ``fn_name`` in it, the cases are calls, else inputs and outputs of a script. Where every output of a problem is a list of one
    item, that item is right as well: the data sets wrap results so, and not always.

    Args:
        max_cases: at most so many of a problem's cases, the first ones.
    """
    if max_cases < 1:
        raise ConfigError("data.problems.adapter.max_cases", f"is {max_cases}", "use 1 or more")
    (question,) = _texts(row, "question")
    given = _json(row, "input_output")
    if not isinstance(given, Mapping):
        raise RowError("its input_output is not an object")
    inputs, outputs = _list(given, "inputs"), _list(given, "outputs")
    if len(inputs) != len(outputs):
        raise RowError(f"it has {len(inputs)} inputs, but {len(outputs)} outputs")
    starter = row.get("starter_code") or ""
    solutions = _json(row, "solutions") if row.get("solutions") else []
    name = given.get("fn_name")
    pairs = list(zip(inputs, outputs, strict=True))[:max_cases]
    tests: dict[str, Any]
    if name:
        wrapped = all(isinstance(output, list) and len(output) == 1 for output in outputs)
        tests = {"kind": "call", "function": name, "cases": [_call_case(case, output, wrapped) for case, output in pairs]}
        hint = f"Write a function named {name}."
    else:
        tests = {"kind": "stdin", "cases": [{"input": _lines(case), "output": _lines(output)} for case, output in pairs]}
        hint = "Read from standard input and print to standard output."
    return {
        **({"id": str(row["problem_id"])} if "problem_id" in row else {}),
        "question": "\n\n".join(part for part in (question.strip(), starter.strip(), hint) if part),
        "answer": str(solutions[0]) if solutions else "",
        "tests": tests,
    }


def _call_case(args: Any, output: Any, wrapped: bool) -> dict[str, Any]:
    if not isinstance(args, list):
        raise RowError(f"an input of its function is {args!r}, not a list of arguments")
    return {"args": args, "accepted": [output, output[0]]} if wrapped else {"args": args, "expected": output}


def _lines(text: Any) -> str:
    """Input and output are one text, or a list of lines."""
    if isinstance(text, list):
        return "\n".join(map(str, text)) + "\n"
    if not isinstance(text, str):
        raise RowError(f"an input or output is {text!r}, neither text nor a list of lines")
    return text


# ---- reading rows ------------------------------------------------------------------------------------------------------


def _texts(row: Mapping[str, Any], *names: str) -> list[str]:
    for name in names:
        if not isinstance(row.get(name), str):
            have = f"a {type(row[name]).__name__}, not text, in" if name in row else "no"
            raise RowError(f"it has {have} column {name!r}; its columns are: {', '.join(map(str, row))}")
    return [row[name] for name in names]


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list) or not value:
        raise RowError(f"its {name} holds no list, or an empty one")
    return value


def _json(row: Mapping[str, Any], name: str) -> Any:
    (text,) = _texts(row, name)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"its {name} is not JSON: {error}") from None
