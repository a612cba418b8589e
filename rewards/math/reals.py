r"""Sets of real numbers as unions of intervals: ``[1, ∞)``, ``x ≥ 1``, ``\{x \mid x \ge 1\}`` and ``ℝ \ (−∞, 1)`` are one and the same.

End points are numbers of 300 bits and taken as equal within 250, where a digit more would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

from mpmath.ctx_mp import MPContext  # type: ignore[import-untyped]

from grpo.rewards.math import probes
from grpo.rewards.math import syntax as s
from grpo.rewards.math.evaluate import Evaluator, Undefined, Value
from grpo.rewards.math.limits import NotUnderstood

_PRECISION = 300
_SAME_BITS = 250
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_MOST_PIECES = 200


@dataclass(frozen=True)
class Piece:
    low: Value
    high: Value
    has_low: bool
    has_high: bool

    @property
    def empty(self) -> bool:
        return not _less(self.low, self.high) and not (_same(self.low, self.high) and self.has_low and self.has_high)


Reals = tuple[Piece, ...]  # disjoint, ascending, no two of them adjoining


def is_solution_set(node: s.Node) -> bool:
    """Whether this can only be read as a set of numbers; ``(2, 4)`` can also be a point, and ``{1, 2}`` is a list as well."""
    match node:
        case s.Group(brackets="(]" | "[)") | s.SetOperation() | s.Builder() | s.NamedSet(name="R"):
            return True
        case s.Relation():
            return any(operator in ("<", ">", "<=", ">=", "!=", "in", "notin") for operator in node.operators)
        case s.Group(brackets="", items=items):
            return any(isinstance(item, s.Relation) and is_solution_set(item) for item in items)
        case s.Group(brackets="()" | "[]", items=(left, right)):
            return any(_is_infinite(side) for side in (left, right))
    return False


def same_set(left: s.Node, right: s.Node) -> bool | None:
    """Whether both are the same set of real numbers; None if one of them is not such a set, as far as can be seen."""
    ctx = probes.context()
    ctx.prec = _PRECISION
    variables = _variables(left) | _variables(right)
    if len(variables) > 2:
        return None
    try:
        a, b = (_Reader(ctx, next(iter(_variables(node)), "")).read(node) for node in (left, right))
    except (NotUnderstood, Undefined, ZeroDivisionError, KeyError):
        return None
    named = [_variables(node) for node in (left, right)]
    if named[0] and named[1] and named[0] != named[1]:
        return None
    return len(a) == len(b) and all(_same_piece(x, y) for x, y in zip(a, b, strict=True))


def _variables(node: s.Node) -> frozenset[str]:
    return s.free_symbols(node)


def _is_infinite(node: s.Node) -> bool:
    return node == s.Constant("infinity") or (isinstance(node, s.Product) and any(_is_infinite(factor) for factor in node.factors))


class _Reader:
    def __init__(self, context: MPContext, variable: str) -> None:
        self._context = context
        self._variable = variable
        self._line: Reals = (Piece(-context.inf, context.inf, False, False),)

    def read(self, node: s.Node) -> Reals:
        match node:
            case s.NamedSet(name="R"):
                return self._line
            case s.Group(brackets="{}", items=items) if not any(isinstance(item, s.Relation) for item in items):
                return _normal(self._point(item) for item in items)
            case s.Group(brackets="{}", items=items):
                return self._all(items, any_of=False)
            case s.Group(brackets="", items=items, join=join):
                if any(isinstance(item, s.Relation) for item in items):
                    return self._all(items, any_of=join == "or")
                raise NotUnderstood("a list of numbers")
            case s.Group(items=(low, high)):
                piece = Piece(self._bound(low), self._bound(high), node.brackets[0] == "[", node.brackets[1] == "]")
                return () if piece.empty else (piece,)
            case s.SetOperation():
                one, other = self.read(node.left), self.read(node.right)
                if node.operator == "union":
                    return _normal((*one, *other))
                return _meet(one, other if node.operator == "intersection" else _complement(other, self._line))
            case s.Builder(head=head, conditions=conditions) if head == s.Symbol(self._variable):
                return self._all(conditions, any_of=False)
            case s.Relation():
                return self._relation(node)
        if s.is_expression(node):  # {2}, written as 2
            return (self._point(node),)
        raise NotUnderstood("no set of real numbers")

    def _all(self, conditions: tuple[s.Node, ...], any_of: bool) -> Reals:
        """``x > 2, x ≠ 3`` hold at once; ``x < 2, x > 3`` can not, and so is meant as either."""
        sets = [self.read(condition) for condition in conditions]
        both = self._line
        for one in sets:
            both = _meet(both, one)
        return _normal(piece for one in sets for piece in one) if any_of or not both else both

    def _relation(self, node: s.Relation) -> Reals:
        solution = self._line
        for left, operator, right in zip(node.sides, node.operators, node.sides[1:], strict=False):
            solution = _meet(solution, self._pair(left, operator, right))
        return solution

    def _pair(self, left: s.Node, operator: str, right: s.Node) -> Reals:
        if operator in ("in", "notin"):
            if left != s.Symbol(self._variable):
                raise NotUnderstood("what is in the set is not the variable")
            inside = self.read(right)
            return inside if operator == "in" else _complement(inside, self._line)
        if operator not in _FLIPPED:
            raise NotUnderstood(f"the relation {operator}")
        if _is_infinite(left) or _is_infinite(right):  # −∞ < x
            return self._line
        for side, bound, sign in ((left, right, operator), (right, left, _FLIPPED[operator])):
            if isinstance(side, s.Call) and side.name == "abs" and not s.free_symbols(bound):
                return self._absolute(side.arguments[0], sign, bound)
        intercept, slope = self._linear(s.difference(left, right))
        if slope == 0:
            raise NotUnderstood("a relation without the variable")
        root = -intercept / slope
        if slope < 0:
            operator = _FLIPPED[operator]
        infinity = self._context.inf
        match operator:
            case "<" | "<=":
                return (Piece(-infinity, root, False, operator == "<="),)
            case ">" | ">=":
                return (Piece(root, infinity, operator == ">=", False),)
            case "=":
                return (Piece(root, root, True, True),)
        return Piece(-infinity, root, False, False), Piece(root, infinity, False, False)

    def _absolute(self, inside: s.Node, operator: str, bound: s.Node) -> Reals:
        """|u| < c is −c < u < c, and |u| > c is u < −c or u > c."""
        if operator in ("!=", "=") or self._value(bound, None) < 0:
            raise NotUnderstood("an absolute value that is not bounded")
        above, below = self._pair(inside, operator, bound), self._pair(inside, _FLIPPED[operator], s.negative(bound))
        return _meet(above, below) if operator in ("<", "<=") else _normal((*above, *below))

    def _linear(self, node: s.Node) -> tuple[Value, Value]:
        values = [self._value(node, Fraction(at)) for at in (0, 1, 2, 7)]
        slope = values[1] - values[0]
        if not (_same(values[2] - values[1], slope) and _same(values[3] - values[0], 7 * slope)):
            raise NotUnderstood("a relation that is not linear")
        return values[0], slope

    def _value(self, node: s.Node, at: Fraction | None) -> Value:
        evaluate = Evaluator(self._context, {} if at is None else {self._variable: at})
        value = evaluate.inexact(evaluate(node))
        if isinstance(value, self._context.mpc):
            raise NotUnderstood("a number that is not real has no place on the line")
        return value

    def _point(self, node: s.Node) -> Piece:
        value = self._value(node, None)
        return Piece(value, value, True, True)

    def _bound(self, node: s.Node) -> Value:
        if _is_infinite(node):
            return self._context.inf if node == s.Constant("infinity") else -self._context.inf
        return self._value(node, None)


def _same(a: Value, b: Value) -> bool:
    ctx = probes.context()
    return a == b or (ctx.isfinite(a) and ctx.isfinite(b) and abs(a - b) <= ctx.ldexp(max(abs(a), abs(b), 1), -_SAME_BITS))


def _less(a: Value, b: Value) -> bool:
    return a < b and not _same(a, b)


def _same_piece(a: Piece, b: Piece) -> bool:
    return _same(a.low, b.low) and _same(a.high, b.high) and (a.has_low, a.has_high) == (b.has_low, b.has_high)


def _normal(pieces: Iterable[Piece]) -> Reals:
    """Sort, and join what overlaps or adjoins."""
    merged: list[Piece] = []
    ordered = sorted((piece for piece in pieces if not piece.empty), key=lambda piece: (piece.low, not piece.has_low))
    if len(ordered) > _MOST_PIECES:
        raise NotUnderstood(f"a set of more than {_MOST_PIECES} intervals")
    for piece in ordered:
        last = merged[-1] if merged else None
        if last is not None and (_less(piece.low, last.high) or (_same(piece.low, last.high) and (piece.has_low or last.has_high))):
            merged[-1] = _hull(last, piece)
        else:
            merged.append(piece)
    return tuple(merged)


def _hull(last: Piece, piece: Piece) -> Piece:
    has_low = last.has_low or (_same(piece.low, last.low) and piece.has_low)
    if _same(piece.high, last.high):
        return Piece(last.low, last.high, has_low, last.has_high or piece.has_high)
    longer = piece if last.high < piece.high else last
    return Piece(last.low, longer.high, has_low, longer.has_high)


def _meet(left: Reals, right: Reals) -> Reals:
    return _normal(_overlap(a, b) for a in left for b in right)


def _overlap(a: Piece, b: Piece) -> Piece:
    low, has_low = _tighter(a.low, a.has_low, b.low, b.has_low, _less)
    high, has_high = _tighter(a.high, a.has_high, b.high, b.has_high, lambda x, y: _less(y, x))
    return Piece(low, high, has_low, has_high)


def _tighter(a: Value, has_a: bool, b: Value, has_b: bool, before: Callable[[Value, Value], bool]) -> tuple[Value, bool]:
    if before(a, b):
        return b, has_b
    if before(b, a):
        return a, has_a
    return a, has_a and has_b


def _complement(pieces: Reals, line: Reals) -> Reals:
    rest = line
    whole = line[0]
    for piece in pieces:
        outside = Piece(whole.low, piece.low, False, not piece.has_low), Piece(piece.high, whole.high, not piece.has_high, False)
        rest = _meet(rest, _normal(outside))
    return rest
