"""Whether what a program gave is what was expected. Runs in the trainer, on bytes and on values of exact builtin types only.

Nothing here calls a method of the program's own: the sandbox hands over plain values, and a value of any other type is unequal.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Any

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")  # neither inf, nan nor 1_000
_MAX_NUMBER_CHARS = 400


class OutputRule(StrEnum):
    """How printed output is compared: ``tokens`` ignores how white space divides them, ``lines`` ignores it at line ends only."""

    tokens = "tokens"
    lines = "lines"


def same_output(got: str, expected: str, rule: OutputRule = OutputRule.tokens, tolerance: float = 1e-6) -> bool:
    """Whether two outputs are the same.

    ``tokens``: the same words in the same order, whatever white space is between them; where the *expected* word is written as a
    decimal fraction or with an exponent (``0.5``, ``1e-3``), any finite number within ``tolerance`` will do (``tolerance=0``: the
    same text). ``lines``: the same lines, without white space at the end of each and without empty lines at the end of the text.
    """
    if rule is OutputRule.lines:
        return _lines(got) == _lines(expected)
    gots, expecteds = got.split(), expected.split()
    return len(gots) == len(expecteds) and all(_same_token(g, e, tolerance) for g, e in zip(gots, expecteds, strict=True))


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_token(got: str, expected: str, tolerance: float) -> bool:
    if got == expected:
        return True
    if tolerance <= 0 or not _is_number(expected) or expected.lstrip("+-").isdigit() or not _is_number(got):
        return False
    return _close(float(got), float(expected), tolerance)


def _is_number(token: str) -> bool:
    return len(token) <= _MAX_NUMBER_CHARS and token.isascii() and _NUMBER.fullmatch(token) is not None


def _close(got: float, expected: float, tolerance: float) -> bool:
    """``|got − expected| ≤ tolerance · max(1, |expected|)``, both finite: NaN and infinity are close to nothing."""
    return math.isfinite(got) and math.isfinite(expected) and abs(got - expected) <= tolerance * max(1.0, abs(expected))


def same_value(got: Any, expected: Any, tolerance: float = 1e-6) -> bool:
    """Whether a returned value is the expected one, which comes from JSON.

    Python's ``==`` between builtin values (so ``1``, ``1.0`` and ``True`` are equal, as in every ``assert f(x) == 1``), except:

    * a tuple equals a list with the same items, since JSON has no tuples;
    * an expected ``float`` allows ``|got − expected| ≤ tolerance · max(1, |expected|)``; NaN equals nothing;
    * where all keys of an expected dictionary are strings, the other's keys are compared as JSON would write them (``1`` → ``"1"``);
    * a type that is no builtin, a set or bytes in place of a list or a string: unequal.
    """
    if type(expected) in _NUMBERS:
        return type(got) in _NUMBERS and _same_number(got, expected, tolerance)
    if type(expected) in (list, tuple):
        return (
            type(got) in (list, tuple)
            and len(got) == len(expected)
            and all(same_value(g, e, tolerance) for g, e in zip(got, expected, strict=True))
        )
    if type(expected) is dict:
        return type(got) is dict and _same_dict(got, expected, tolerance)
    if type(expected) in (str, bytes, type(None)):
        return type(got) is type(expected) and got == expected
    if type(expected) in (set, frozenset):
        return type(got) in (set, frozenset) and got == expected  # the sandbox hands over builtin items only
    return False


_NUMBERS = (bool, int, float, complex)


def _same_number(got: complex, expected: complex, tolerance: float) -> bool:
    if got == expected:
        return True
    if type(expected) is not float or tolerance <= 0 or isinstance(got, complex):
        return False
    try:
        return _close(float(got), expected, tolerance)
    except OverflowError:  # an integer beyond 1.8e308
        return False


def _same_dict(got: dict[Any, Any], expected: dict[Any, Any], tolerance: float) -> bool:
    if len(got) != len(expected):
        return False
    if all(type(key) is str for key in expected):
        got = {_json_key(key): value for key, value in got.items()}
    return all(key in got and same_value(got[key], value, tolerance) for key, value in expected.items())


def _json_key(key: Any) -> Any:
    """A key as ``json.dumps`` writes it."""
    if key is None or type(key) is bool:
        return {None: "null", True: "true", False: "false"}[key]
    try:
        return repr(key) if type(key) in (int, float) else key
    except ValueError:  # an integer with more digits than Python writes
        return key
