"""The last resort: SymPy's own proof that a difference is zero, for what numbers can not tell.

SymPy's objects are built from the syntax tree, one by one; no text ever reaches its parser, which is ``eval``. It may take long:
this runs only where a process can be killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo.rewards.math import syntax as s
from grpo.rewards.math.vocabulary import names

if TYPE_CHECKING:
    import sympy

_MOST_NODES = 200
_LARGEST_EXPONENT = 10_000

_NAMES = {
    **{"ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arsinh": "asinh", "arcosh": "acosh"},
    **{"artanh": "atanh", "abs": "Abs", "max": "Max", "min": "Min", "ceil": "ceiling", "sgn": "sign"},
}
_SAME_NAMES = names("sin cos tan cot sec csc sinh cosh tanh coth sech csch exp log floor factorial factorial2 binomial gcd lcm")


def proves_equal(left: s.Node, right: s.Node) -> bool:
    """Whether SymPy simplifies the difference to zero. Not to know is False."""
    import sympy

    if sum(1 for node in (left, right) for _ in s.walk(node)) > _MOST_NODES or not all(map(_is_small, (left, right))):
        return False
    try:
        return bool(sympy.simplify(build(left) - build(right)) == 0)
    except (TypeError, ValueError, AttributeError, NotImplementedError, RecursionError, OverflowError):
        return False  # SymPy has no answer for this


def _is_small(node: s.Node) -> bool:
    """Numbers that SymPy would multiply out: none with an exponent, or under a factorial, beyond the limit."""
    for part in s.walk(node):
        if isinstance(part, (s.Power, s.Call, s.Series)):
            for inner in s.children(part):
                for number in s.walk(inner):
                    if isinstance(number, s.Number) and abs(number.value) > _LARGEST_EXPONENT:
                        return False
            if (
                isinstance(part, s.Power)
                and any(isinstance(inner, (s.Power, s.Call)) for inner in s.walk(part.exponent))
                and not s.free_symbols(part)
            ):
                return False
    return True


def build(node: s.Node) -> sympy.Expr:
    """The tree as a SymPy expression.

    Raises:
        ValueError: a part of it has no counterpart there.
    """
    import sympy

    match node:
        case s.Number(value=value):
            return sympy.Rational(value.numerator, value.denominator)
        case s.Based():
            return sympy.Integer(node.value)
        case s.Constant(name=name):
            return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infinity": sympy.oo}[name]
        case s.Symbol(name=name):
            return sympy.Symbol(name)
        case s.Sum(terms=terms):
            return sympy.Add(*map(build, terms))
        case s.Product(factors=factors):
            return sympy.Mul(*map(build, factors))
        case s.Power(base=base, exponent=exponent):
            return sympy.Pow(build(base), build(exponent))
        case s.Series(kind=kind, index=index, low=low, high=high, body=body):
            total = sympy.Sum if kind == "sum" else sympy.Product
            return total(build(body), (sympy.Symbol(index), build(low), build(high))).doit()
        case s.Call(name=name, arguments=arguments):
            return _call(name, [build(argument) for argument in arguments])
    raise ValueError(f"a {type(node).__name__} is no expression")


def _call(name: str, arguments: list[sympy.Expr]) -> sympy.Expr:
    import sympy

    if name == "degree":
        return arguments[0] * sympy.pi / 180
    if name == "log10":
        return sympy.log(*arguments, 10)
    name = _NAMES.get(name, name)
    if name in _SAME_NAMES or name in _NAMES.values():
        return getattr(sympy, name)(*arguments)
    return sympy.Function(name)(*arguments)
