"""Are two expressions equal? By their values at a few points: a mismatch is final, and agreement is to as many digits as could differ.

Two values that are made of numbers of w bits altogether are compared to 3w + 200 bits, so that x and x + 10⁻⁴⁰, or √2 and its first
fifty digits, differ. What the points can not tell – no value at any of them, or too many digits – is ``None``, and for SymPy to decide.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from fractions import Fraction

from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

from grpo.rewards.math import syntax as s
from grpo.rewards.math.evaluate import Evaluator, Undefined, Value
from grpo.rewards.math.limits import MAX_PRECISION, NotUnderstood

_FIRST_PRECISION = 320  # bits
_SPARE = 200
_local = threading.local()


def context() -> MPContext:
    """A context of mpmath that belongs to this thread: the user's precision is theirs."""
    if not hasattr(_local, "context"):
        _local.context = MPContext()
        _local.context.prec = _FIRST_PRECISION
    return _local.context


def equal(left: s.Node, right: s.Node) -> bool | None:
    """Whether two expressions have the same values wherever both have one; None if that can not be told.

    Raises:
        NotUnderstood: one of them is no expression.
        TooLarge: one of them is too large to compute.
    """
    imaginary = any(part == s.Constant("i") for node in (left, right) for part in s.walk(node))
    for complex_numbers in (True,) if imaginary else (False, True):  # the second if there is no real value anywhere: √−3
        verdict: bool | None = None
        for point in points(free_symbols(left, right)):
            found = _same_value(left, right, point, complex_numbers)
            if found is False:
                return False
            verdict = found if verdict is None else verdict
        if verdict is not None:
            return verdict
    return None


def proportional(left: s.Node, right: s.Node, positive: bool = False) -> bool | None:
    """Whether left = c · right for one number c ≠ 0: then left = 0 and right = 0 say the same. ``positive``: for c > 0, as in left < 0.

    Raises:
        NotUnderstood, TooLarge: as ``equal``.
    """
    symbols = free_symbols(left, right)
    if not symbols:
        return None
    verdict: bool | None = None
    first: tuple[Value, Value] | None = None
    for point in points(symbols):
        values = _values(left, right, point, complex_numbers=False, precision=2 * _FIRST_PRECISION)
        if values is None:
            continue
        a, b = values
        if (a == 0) != (b == 0):
            return False
        if a == 0:
            continue
        if positive and (a.imag or b.imag):
            raise NotUnderstood("an inequality between numbers that are not real")
        if positive and (a.real > 0) != (b.real > 0):
            return False
        if first is None:
            first = values
        elif not _close(a * first[1], b * first[0], _FIRST_PRECISION):
            return False
        else:
            verdict = True
    return verdict


def near(left: s.Node, right: s.Node) -> bool:
    """Whether two constants differ by 1 % at most, as an answer and its rounded value do."""
    if free_symbols(left, right):
        return False
    values = _values(left, right, {}, complex_numbers=False, precision=_FIRST_PRECISION)
    return values is not None and bool(100 * abs(values[0] - values[1]) <= abs(values[0]))


def free_symbols(*nodes: s.Node) -> tuple[str, ...]:
    return tuple(sorted(frozenset[str]().union(*(s.free_symbols(node) for node in nodes))))


def points(symbols: tuple[str, ...]) -> Iterator[dict[str, Fraction]]:
    """Fixed points without small relations between their coordinates: positive, of both signs, and whole (for n!, (−1)ⁿ).

    The denominators are even, so that (−1)ⁿ has no value between the whole numbers, as it should.
    """
    if not symbols:
        yield {}
        return
    for numerators, denominator, alternate in (((131, 36), 98, 1), ((59, 12), 106, 1), ((-73, 28), 94, -1), ((-211, -42), 118, 1)):
        first, step = numerators
        yield {name: Fraction(alternate**index * (first + step * index), denominator) for index, name in enumerate(symbols)}
    for first, step in ((4, 3), (9, 2), (17, -3), (6, 1), (7, 4)):
        yield {name: Fraction(max(first + step * index, 1)) for index, name in enumerate(symbols)}


def _same_value(left: s.Node, right: s.Node, point: dict[str, Fraction], complex_numbers: bool) -> bool | None:
    ctx = context()
    precision = _FIRST_PRECISION
    while True:
        ctx.prec = precision
        evaluate = Evaluator(ctx, point, complex_numbers)
        try:
            a, b = evaluate(left), evaluate(right)
        except (Undefined, ZeroDivisionError):
            return None
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b
        needed = 3 * evaluate.weight + _SPARE
        difference = abs(evaluate.inexact(a) - evaluate.inexact(b))
        if difference == 0 and precision >= needed:
            return True
        size = ctx.mag(difference) if difference else -precision
        if size > evaluate.weight - precision // 2:  # more than rounding can have done
            return False
        if precision >= needed:
            return size <= evaluate.weight - precision * 4 // 5
        if needed > MAX_PRECISION:
            return None
        precision = needed


def _values(left: s.Node, right: s.Node, point: dict[str, Fraction], complex_numbers: bool, precision: int) -> tuple[Value, Value] | None:
    ctx = context()
    ctx.prec = precision
    evaluate = Evaluator(ctx, point, complex_numbers)
    try:
        return evaluate.inexact(evaluate(left)), evaluate.inexact(evaluate(right))
    except (Undefined, ZeroDivisionError):
        return None


def _close(a: Value, b: Value, bits: int) -> bool:
    return abs(a - b) <= context().ldexp(max(abs(a), abs(b)), -bits)
