r"""The value of an expression at a point: exact (``Fraction``) as far as it goes, else to as many bits as asked for.

Over the reals unless told otherwise: √ of a negative number has no value, ∛(−8) is −2. Nothing is computed before its size is known.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

from grpo.rewards.math import syntax as s
from grpo.rewards.math.limits import MAX_EXACT_BITS, MAX_LOG2, MAX_SERIES, MAX_STEPS, NotUnderstood, TooLarge

Value = Any  # Fraction, mpf or mpc (mpmath has no types)

_MAX_FACTORIAL = 7_000  # 7000! has 23,878 digits
_MAX_ROOT_BITS = 4_096
_MAX_ANGLE_LOG2 = 2_000  # an angle loses as many bits as it has


class Undefined(ValueError):
    """The expression has no (real) value at this point."""


def _may_cancel(node: s.Node) -> bool:
    """Whether the size of a value may be that of a rounding error: √2 − √2, sin π, and their multiples.

    Where it is not, the sizes of what the value is made of say as much: a sine is small where its argument is, a product by its factors.
    """
    return isinstance(node, s.Sum | s.Product) or (isinstance(node, s.Call) and node.name in ("sin", "cos", "tan", "cot"))


class Evaluator:
    """Evaluates expressions at one point with one precision.

    ``weight`` adds up |log₂| of every value met, and the length of every number written: two different values that are made
    of so much differ, for all practical purposes, within that many bits.
    """

    def __init__(self, context: MPContext, point: Mapping[str, Fraction], complex_numbers: bool = False) -> None:
        self.context = context
        self.weight = 0
        self._point = dict(point)
        self._complex = complex_numbers
        self._steps = 0.0

    def __call__(self, node: s.Node) -> Value:
        """
        Raises:
            Undefined: no value here.
            TooLarge: nobody should compute this.
            NotUnderstood: this is no expression (a set, words).
        """
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TooLarge(f"more than {MAX_STEPS} steps")
        rule = _RULES.get(type(node))
        if rule is None:
            raise NotUnderstood(f"a {type(node).__name__} has no value")
        value = rule(self, node)
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            if bits > MAX_EXACT_BITS:
                raise TooLarge("a number of too many digits")
            self._steps += bits * bits / 2**23  # what arithmetic with it costs
            self.weight += bits
        elif value and not _may_cancel(node):
            self.weight += abs(int(self.context.mag(value)))
            if self.weight > 64 * MAX_LOG2:
                raise TooLarge("numbers of too large exponents")
        return value

    def inexact(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            return self.context.mpf(value.numerator) / value.denominator
        return value

    # ---- rules

    def _number(self, node: s.Number) -> Value:
        return node.value

    def _based(self, node: s.Based) -> Value:
        return Fraction(node.value)

    def _constant(self, node: s.Constant) -> Value:
        if node.name == "pi":
            return +self.context.pi
        if node.name == "e":
            return +self.context.e
        if node.name == "i":
            return self.context.mpc(0, 1)
        raise Undefined("infinity is no number")

    def _symbol(self, node: s.Symbol) -> Value:
        return self._point[node.name]

    def _sum(self, node: s.Sum) -> Value:
        total = self(node.terms[0])
        for term in node.terms[1:]:
            total = self._add(total, self(term))
        return total

    def _add(self, a: Value, b: Value) -> Value:
        return a + b if isinstance(a, Fraction) == isinstance(b, Fraction) else self.inexact(a) + self.inexact(b)

    def _product(self, node: s.Product) -> Value:
        total = self(node.factors[0])
        for factor in node.factors[1:]:
            total = self._multiply(total, self(factor))
        return total

    def _multiply(self, a: Value, b: Value) -> Value:
        if isinstance(a, Fraction) == isinstance(b, Fraction):
            return a * b
        if isinstance(a, Fraction):
            a, b = b, a
        return a * b.numerator / b.denominator

    def _power(self, node: s.Power) -> Value:
        base, exponent = self(node.base), self(node.exponent)
        if base == 0:
            if isinstance(exponent, Fraction) and exponent > 0:
                return Fraction(0)
            raise Undefined("a power of zero that has no value")
        if isinstance(base, Fraction) and isinstance(exponent, Fraction):
            return self._rational_power(base, exponent)
        return self._inexact_power(base, exponent)

    def _rational_power(self, base: Fraction, exponent: Fraction) -> Value:
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(base) != 1 and abs(exponent) * bits > MAX_EXACT_BITS:
                raise TooLarge("a power of too many digits")
            return base ** (int(exponent) if abs(base) != 1 else int(exponent) % 2)
        if base < 0:
            if self._complex:
                return self._inexact_power(base, exponent)
            if exponent.denominator % 2 == 0:
                raise Undefined("an even root of a negative number")
            value = self._rational_power(-base, exponent)
            return -value if exponent.numerator % 2 else value
        top, bottom = (_exact_root(part, exponent.denominator) for part in (base.numerator, base.denominator))
        if top is not None and bottom is not None:
            return self._rational_power(Fraction(top, bottom), Fraction(exponent.numerator))
        return self._inexact_power(base, exponent)

    def _inexact_power(self, base: Value, exponent: Value) -> Value:
        context = self.context
        if not self._complex and not (isinstance(exponent, Fraction) and exponent.denominator == 1) and base < 0:
            if isinstance(exponent, Fraction) and exponent.denominator % 2:
                return self._inexact_power(-base, exponent) * (-1 if exponent.numerator % 2 else 1)
            raise Undefined("a power of a negative number")
        size = abs(self.inexact(exponent)) * (abs(context.mag(self.inexact(base))) + 1)
        if size > MAX_LOG2:
            raise TooLarge("a power of too large an exponent")
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return self.inexact(base) ** int(exponent)
        return context.power(self.inexact(base), self.inexact(exponent))

    def _series(self, node: s.Series) -> Value:
        low, high = self(node.low), self(node.high)
        if not all(isinstance(bound, Fraction) and bound.denominator == 1 for bound in (low, high)):
            raise Undefined("bounds that are not whole")
        if high - low > MAX_SERIES:
            raise TooLarge(f"a sum of more than {MAX_SERIES} terms")
        outer = self._point.get(node.index)
        total: Value = Fraction(0 if node.kind == "sum" else 1)
        for index in range(int(low), int(high) + 1):
            self._point[node.index] = Fraction(index)
            total = (self._add if node.kind == "sum" else self._multiply)(total, self(node.body))
        self._point.pop(node.index, None)
        if outer is not None:
            self._point[node.index] = outer
        return total

    def _call(self, node: s.Call) -> Value:
        values = [self(argument) for argument in node.arguments]
        function = FUNCTIONS.get(node.name)
        if function is None:
            return self._unknown(node.name, values)
        low, high, rule = function
        if not low <= len(values) <= high:
            raise NotUnderstood(f"{node.name} of {len(values)} arguments")
        try:
            value = rule(self, *values)
        except (ZeroDivisionError, ValueError, OverflowError) as error:
            if isinstance(error, (Undefined, TooLarge, NotUnderstood)):
                raise
            raise Undefined(f"{node.name} has no value here") from error
        if not self._complex and isinstance(value, self.context.mpc):
            raise Undefined(f"{node.name} has no real value here")
        if not isinstance(value, Fraction) and not self.context.isfinite(value):
            raise Undefined(f"{node.name} is not finite here")
        return value

    def _unknown(self, name: str, values: list[Value]) -> Value:
        """f(2), F_{n-1}, O(log n): some function of its name and its arguments, without any law of its own."""
        seed = zlib.crc32(name.encode()) + len(values)
        angle = self.context.mpf(seed % 10_007) / 997
        for index, value in enumerate(values):
            if abs(self.inexact(value)) > 2**64:
                raise TooLarge(f"{name} of a huge number")
            angle = angle + self.inexact(value) * self.context.sqrt(2 + 3 * index)
        return self.context.cos(angle) + 2

    # ---- functions

    def _whole(self, value: Value) -> int:
        if not isinstance(value, Fraction) or value.denominator != 1:
            raise Undefined("not a whole number")
        return int(value)

    def _bounded(self, value: Value, log2: float) -> Value:
        value = self.inexact(value)
        if value and self.context.mag(value) > log2:
            raise TooLarge("a function of too large a number")
        return value

    def factorial(self, value: Value) -> Value:
        number = self._whole(value)
        if number < 0:
            raise Undefined("a factorial of a negative number")
        if number > _MAX_FACTORIAL:
            raise TooLarge(f"a factorial of more than {_MAX_FACTORIAL}")
        return Fraction(math.factorial(number))

    def factorial2(self, value: Value) -> Value:
        number = self._whole(value)
        if number < -1:
            raise Undefined("a double factorial of a negative number")
        if number > _MAX_FACTORIAL:
            raise TooLarge(f"a factorial of more than {_MAX_FACTORIAL}")
        return Fraction(math.prod(range(number, 1, -2)))

    def binomial(self, n: Value, k: Value) -> Value:
        top, bottom = self._whole(n), self._whole(k)
        if top < 0 or bottom < 0:
            raise Undefined("a binomial coefficient of negative numbers")
        bottom = min(bottom, top - bottom)
        if bottom < 0:
            return Fraction(0)
        if bottom * (top.bit_length() - max(bottom.bit_length() - 3, 0)) > MAX_EXACT_BITS:  # C(n, k) ≤ (e·n/k)^k
            raise TooLarge("a binomial coefficient of too many digits")
        return Fraction(math.comb(top, bottom))

    def log(self, value: Value, base: Value | None = None) -> Value:
        value = self.inexact(value)
        if value == 0 or (not self._complex and value < 0):
            raise Undefined("a logarithm of what is not positive")
        if base is None:
            return self.context.ln(value)
        bottom = self.log(base)
        if bottom == 0:
            raise Undefined("a logarithm to base one")
        return self.context.ln(value) / bottom

    def exp(self, value: Value) -> Value:
        return self.context.exp(self._bounded(value, math.log2(MAX_LOG2)))

    def absolute(self, value: Value) -> Value:
        return abs(value)

    def degree(self, value: Value) -> Value:
        return self._multiply(+self.context.pi, value) / 180 if value else value

    def floor(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            return Fraction(math.floor(value))
        if isinstance(value, self.context.mpc) or self.context.mag(value) > self.context.prec // 2:
            raise Undefined("a part of what is not real, or too large")
        nearest = self.context.nint(value)
        if abs(value - nearest) < self.context.ldexp(1, -self.context.prec // 2):  # log₂ 8 is 3, whatever its last bit
            return Fraction(int(nearest))
        return Fraction(int(self.context.floor(value)))

    def ceil(self, value: Value) -> Value:
        return -self.floor(-value)

    def extreme(self, choose: Callable[..., Value], *values: Value) -> Value:
        return choose(values) if all(isinstance(v, Fraction) for v in values) else choose(self.inexact(v) for v in values)

    def whole_fold(self, fold: Callable[..., int], *values: Value) -> Value:
        return Fraction(fold(*(self._whole(value) for value in values)))


def _exact_root(number: int, degree: int) -> int | None:
    if number <= 1:
        return number
    if number.bit_length() > _MAX_ROOT_BITS or degree >= number.bit_length():
        return None
    if degree == 2:
        root = math.isqrt(number)
    else:
        root = 1 << -(-number.bit_length() // degree)  # Newton's iteration from above
        while True:
            better = ((degree - 1) * root + number // root ** (degree - 1)) // degree
            if better >= root:
                break
            root = better
    return root if root**degree == number else None


def _elementary(name: str) -> Callable[[Evaluator, Value], Value]:
    def rule(evaluator: Evaluator, value: Value) -> Value:
        return getattr(evaluator.context, name)(evaluator._bounded(value, _MAX_ANGLE_LOG2))

    return rule


def _hyperbolic(name: str) -> Callable[[Evaluator, Value], Value]:
    def rule(evaluator: Evaluator, value: Value) -> Value:
        return getattr(evaluator.context, name)(evaluator._bounded(value, math.log2(MAX_LOG2)))

    return rule


_Rule = tuple[int, int, Callable[..., Value]]
FUNCTIONS: dict[str, _Rule] = {
    **{name: (1, 1, _elementary(name)) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{"arc" + name: (1, 1, _elementary("a" + name)) for name in ("sin", "cos", "tan", "cot")},
    **{name: (1, 1, _hyperbolic(name)) for name in ("sinh", "cosh", "tanh", "coth", "sech", "csch")},
    **{"ar" + name: (1, 1, _elementary("a" + name)) for name in ("sinh", "cosh", "tanh")},
    "ln": (1, 1, Evaluator.log),
    "log": (1, 2, Evaluator.log),
    "log10": (1, 1, lambda self, value: self.log(value, Fraction(10))),
    "exp": (1, 1, Evaluator.exp),
    "abs": (1, 1, Evaluator.absolute),
    "sgn": (1, 1, lambda self, value: Fraction((value > 0) - (value < 0))),
    "degree": (1, 1, Evaluator.degree),
    "floor": (1, 1, Evaluator.floor),
    "ceil": (1, 1, Evaluator.ceil),
    "factorial": (1, 1, Evaluator.factorial),
    "factorial2": (1, 1, Evaluator.factorial2),
    "binomial": (2, 2, Evaluator.binomial),
    "max": (1, 20, lambda self, *values: self.extreme(max, *values)),
    "min": (1, 20, lambda self, *values: self.extreme(min, *values)),
    "gcd": (1, 20, lambda self, *values: self.whole_fold(math.gcd, *values)),
    "lcm": (1, 20, lambda self, *values: self.whole_fold(math.lcm, *values)),
}
_RULES: dict[type, Callable[[Evaluator, Any], Value]] = {
    s.Number: Evaluator._number,
    s.Based: Evaluator._based,
    s.Constant: Evaluator._constant,
    s.Symbol: Evaluator._symbol,
    s.Sum: Evaluator._sum,
    s.Product: Evaluator._product,
    s.Power: Evaluator._power,
    s.Series: Evaluator._series,
    s.Call: Evaluator._call,
}
