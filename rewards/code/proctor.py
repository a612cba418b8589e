"""What runs in the sandbox of the tests, which is given this file alone: it imports nothing of ours. No model code is there, but for
tests that cannot do without (``run_together``).

The test programs know the answers, so the functions they test are not here but in another sandbox. A call of one is looked up
among the answers that came from there so far. When one is missing, the tests cannot go on; what they would ask next is found by
running them once more forgivingly, every statement on its own, and returned. The caller has these calls answered and runs the
tests from the start again: test programs that are deterministic make the same calls again and get further.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import functools
import marshal
import random
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

MAX_CALLS = 2_000  # asked for at once
MAX_REPEATS = 20  # of one call asked for at once: a loop that waits for another answer would ask for ever

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_SIMPLE = (ast.Assert, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)


class Unanswered(BaseException):
    """There is no answer to this call yet."""


class Enough(BaseException):
    """As many calls as can be asked for at once, or one that cannot be asked for at all."""


class Gone(BaseException):
    """The process of the tested functions ended before it answered this call."""


class CandidateError(Exception):
    """The tested function raised something that is no built-in exception."""


def run(setup: str, programs: Sequence[str], functions: Sequence[str], answers: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """One run of the tests.

    Args:
        answers: ``[name, args, kwargs, answer]`` for each call so far, in order. An answer is ``["value", result, args, kwargs]``
            (both as the call left them), ``["error", type's name, message]`` or ``["gone", why]``.

    Returns:
        ``results``: for each program ``""`` if it passed, else what went wrong; shorter than ``programs`` if an answer is missing.
        ``calls``: then, all calls, ``[name, args, kwargs]`` each; the first ``answered`` of them had their answer.
        ``live``: why the calls cannot be sent elsewhere, or nothing.
    """
    talk = Talk(answers)
    results = _run_programs(talk, setup, programs, functions)
    if not talk.missed:
        return {"results": results, "calls": [], "answered": talk.answered, "live": talk.live}
    ahead = Talk(answers)
    _look_ahead(ahead, setup, programs, functions)
    more = len(ahead.asked) > len(talk.asked) and ahead.keys[: len(talk.keys)] == talk.keys
    calls = ahead.asked if more else talk.asked
    return {"results": results, "calls": calls, "answered": talk.answered, "live": talk.live or ahead.live}


def run_together(prelude: str, program: str, setup: str, programs: Sequence[str], functions: Sequence[str]) -> list[str]:
    """The tests and the model's program in one process, for tests that need its objects: results as above, and forgeable."""
    namespace = _namespace(prelude + program + setup + "".join(programs))
    found: dict[str, Any] = {}
    for name, text in (("given", prelude), ("program", program), ("setup", setup)):
        try:
            with contextlib.suppress(SystemExit):  # a script that ends with exit() has defined its functions
                exec(compile(text, f"<{name}>", "exec", dont_inherit=True), namespace)
            if name == "program":
                found = {function: _plain_results(_find(namespace, function)) for function in functions}
        except BaseException as error:
            return [describe(error)] * len(programs)
    namespace.update(found)  # methods of Solution by their names; and a setup may hold a stub of the same name
    return [_outcome(text, namespace) for text in programs]


def _find(namespace: dict[str, Any], name: str) -> Any:
    if name in namespace:
        return namespace[name]
    solution = namespace.get("Solution")
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    raise NameError(f"the program defines no {name}")


def _plain_results(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its results freed of the comparisons that a program may have given them. Makes forging harder, not impossible."""

    @functools.wraps(function)
    def tested(*args: Any, **kwargs: Any) -> Any:
        return _exact(function(*args, **kwargs))

    return tested


def _exact(value: Any) -> Any:
    """A value of a subclass of a builtin type as that type, and its items likewise; any other object as it is.

    Raises:
        TypeError: the object equals whatever it is compared with.
    """
    for base, exact in _EXACT.items():
        if isinstance(value, base):
            value = exact(value)
            if base in (list, tuple, set, frozenset):
                return base(map(_exact, value))
            return {_exact(k): _exact(v) for k, v in value.items()} if base is dict else value
    if value == object():
        raise TypeError(f"a {type(value).__name__} was returned that is equal to everything")
    return value


_EXACT: dict[type, Callable[[Any], Any]] = {  # by the builtin types' own methods, which a program cannot replace
    int: lambda value: value if type(value) is bool else int.__int__(value),
    float: float.__float__,
    complex: complex.__complex__,
    str: lambda value: str.__getitem__(value, slice(None)),
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    list: lambda value: list.__getitem__(value, slice(None)),
    tuple: lambda value: tuple.__getitem__(value, slice(None)),
    set: set.copy,
    frozenset: frozenset.copy,
    dict: lambda value: dict(dict.items(value)),
}


class Talk:
    """The calls of one run of the tests, answered as far as there are answers to these very calls in this order."""

    def __init__(self, answers: Sequence[Sequence[Any]]) -> None:
        self._answers = [(key([name, list(args), kwargs]), answer) for name, args, kwargs, answer in answers]
        self.asked: list[list[Any]] = []
        self.keys: list[bytes] = []
        self.answered = 0
        self._new: Counter[bytes] = Counter()
        self.missed = False
        self.gone = False
        self.live = ""

    def function(self, name: str) -> Callable[..., Any]:
        def candidate(*args: Any, **kwargs: Any) -> Any:
            return self._ask(name, args, kwargs)

        candidate.__name__ = candidate.__qualname__ = name
        return candidate

    def _ask(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request = [name, list(args), kwargs]
        try:
            this = key(request)
        except (TypeError, RecursionError) as error:
            self.missed, self.live = True, f"{name} is called with {error}"
            raise Enough from None
        index = len(self.asked)
        if not self.missed and index < len(self._answers) and self._answers[index][0] == this:
            self.asked.append(request)
            self.keys.append(this)
            self.answered += 1
            return self._reply(self._answers[index][1], args, kwargs)
        self.missed = True
        self._new[this] += 1
        if self._new[this] > MAX_REPEATS or self._new.total() > MAX_CALLS:
            raise Enough
        self.asked.append(copy.deepcopy(request))
        self.keys.append(this)
        raise Unanswered

    def _reply(self, answer: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind, *content = answer
        if kind == "gone":
            self.gone = True
            raise Gone(content[0])
        if kind == "error":
            raise _exception(*content)
        result, args_after, kwargs_after = content
        for before, after in [*zip(args, args_after), *((kwargs[name], kwargs_after.get(name)) for name in kwargs)]:  # noqa: B905
            _write_back(before, after)
        return copy.deepcopy(result)  # the tests may change it, and a run sees each answer once only


def key(value: Any) -> bytes:
    """The same bytes for the same plain value, whatever the order of its sets.

    Raises:
        TypeError: it is no plain value.
    """
    kind = type(value)
    if kind in _ATOMS:
        return marshal.dumps(value, 2)
    if kind in (list, tuple):
        return b"%s%d:" % (kind.__name__.encode(), len(value)) + b"".join(map(key, value))
    if kind is dict:
        return b"dict%d:" % len(value) + b"".join(key(k) + key(v) for k, v in value.items())
    if kind in (set, frozenset):
        return b"%s%d:" % (kind.__name__.encode(), len(value)) + b"".join(sorted(map(key, value)))
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__}")


def _write_back(before: Any, after: Any) -> None:
    """What a call did to its argument, done to the tests' own."""
    if type(before) is not type(after) or type(before) not in (list, dict, set) or key(before) == key(after):
        return
    if type(before) is list:
        before[:] = after
    else:
        before.clear()
        before.update(after)


def _exception(name: str, message: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its like take more than a message
            pass
    return CandidateError(f"{name}: {message}")


def _run_programs(talk: Talk, setup: str, programs: Sequence[str], functions: Sequence[str]) -> list[str]:
    namespace = _prepared(talk, setup, programs, functions)
    prepared = _outcome(setup, namespace)
    _bind(talk, functions, namespace)  # again: a setup may hold a stub of the same name
    results: list[str] = []
    for text in programs:
        if talk.missed:
            break
        result = prepared or _outcome(text, namespace)
        if talk.gone and not result:
            result = "the program ended before it answered"  # a test that catches everything has caught this, too
        if not talk.missed:
            results.append(result)
    return results


def _look_ahead(talk: Talk, setup: str, programs: Sequence[str], functions: Sequence[str]) -> None:
    """Run everything whatever fails, only to see which calls are made."""
    namespace = _prepared(talk, setup, programs, functions)
    namespace["__forgiven__"] = (Exception, Unanswered)
    _outcome(setup, namespace)
    _bind(talk, functions, namespace)
    for text in programs:
        _outcome(text, namespace, forgiving=True)


class _Forgive(ast.NodeTransformer):
    """Each simple statement → ``try: statement`` / ``except __forgiven__: pass``."""

    def visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, _SIMPLE):
            return self.generic_visit(node)
        handler = ast.ExceptHandler(type=ast.Name("__forgiven__", ast.Load()), name=None, body=[ast.Pass()])
        return ast.copy_location(ast.Try(body=[node], handlers=[handler], orelse=[], finalbody=[]), node)


def _prepared(talk: Talk, setup: str, programs: Sequence[str], functions: Sequence[str]) -> dict[str, Any]:
    namespace = _namespace(setup + "".join(programs))
    _bind(talk, functions, namespace)
    return namespace


def _namespace(text: str) -> dict[str, Any]:
    """The namespace of a fresh module, and the same random numbers for every run: its calls must be those of the last one."""
    module = types.ModuleType("tests")
    sys.modules["tests"] = module  # dataclasses and typing look a class's module up there
    random.seed(0)
    if "numpy" in text:
        import numpy

        numpy.random.seed(0)
    return module.__dict__


def _bind(talk: Talk, functions: Sequence[str], namespace: dict[str, Any]) -> None:
    namespace.update({name: talk.function(name) for name in functions})


def _outcome(text: str, namespace: dict[str, Any], forgiving: bool = False) -> str:
    tree = ast.parse(text, "<test>")
    if forgiving:
        _Forgive().visit(tree)
        ast.fix_missing_locations(tree)
    code = compile(tree, "<test>", "exec", dont_inherit=True)
    try:
        exec(code, namespace)
    except AssertionError as error:
        return describe(error) if str(error) else f"AssertionError: {_line(error, text)}"
    except BaseException as error:
        return describe(error)
    return ""


def _line(error: BaseException, text: str) -> str:
    """The innermost line of the test program that an error came from."""
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<test>"]
    return text.splitlines()[frames[-1] - 1].strip()[:500] if frames and frames[-1] else ""


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
