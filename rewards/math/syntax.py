r"""What an answer is, once read: a tree of small frozen values. The parser builds it, everything else looks at it.

``\frac{x}{2}`` is ``Product((Symbol("x"), Power(Number(2), Number(-1))))``. Nothing is simplified, and nothing computed, here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal, get_args

# ---- expressions


@dataclass(frozen=True, slots=True)
class Number:
    """``3``, ``0.25``, ``4.4e7``, ``0.\\overline{3}``, ``2\\frac12``: exact."""

    value: Fraction


@dataclass(frozen=True, slots=True)
class Constant:
    name: Literal["pi", "e", "i", "infinity"]


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str


@dataclass(frozen=True, slots=True)
class Sum:
    terms: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Power:
    base: Node
    exponent: Node


@dataclass(frozen=True, slots=True)
class Call:
    r"""A function of ``grpo.rewards.math.functions``, or one that only has a name: ``f(2)``, ``F_{n-1}`` (``F_``)."""

    name: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class PlusMinus:
    r"""``\pm value`` (sign 1) or ``\mp value`` (sign −1): two values, with one choice of sign for the whole answer it stands in."""

    value: Node
    sign: int


@dataclass(frozen=True, slots=True)
class Series:
    r"""``\sum_{index=low}^{high} body``, or ``\prod``."""

    kind: Literal["sum", "prod"]
    index: str
    low: Node
    high: Node
    body: Node


@dataclass(frozen=True, slots=True)
class Based:
    """``204_5``: the number 54, written in base five."""

    digits: str
    base: int

    @property
    def value(self) -> int:
        return int(self.digits, self.base)


# ---- structures

Brackets = Literal["", "()", "[]", "(]", "[)", "{}"]  # "": a list without any


@dataclass(frozen=True, slots=True)
class Group:
    """Several answers: a list, a tuple or point, an interval, a vector, a set. ``(2, 4)`` is a point and an interval."""

    brackets: Brackets
    items: tuple[Node, ...]
    join: Literal[",", "and", "or"] = ","


@dataclass(frozen=True, slots=True)
class SetOperation:
    operator: Literal["union", "intersection", "difference"]
    left: Node
    right: Node


@dataclass(frozen=True, slots=True)
class NamedSet:
    name: str  # R, Z, N, Q, C


@dataclass(frozen=True, slots=True)
class Builder:
    r"""``\{ head | conditions \}``"""

    head: Node
    conditions: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain: ``a < b <= c`` has three sides and the operators ``("<", "<=")``."""

    operators: tuple[str, ...]
    sides: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day. ``half`` is am, pm or, if it is not said, empty."""

    parts: tuple[int, ...]
    half: str


@dataclass(frozen=True, slots=True)
class Quantity:
    value: Node
    unit: tuple[tuple[str, Fraction], ...]  # (name, exponent), sorted by name: m/s² is (("m", 1), ("s", −2))


@dataclass(frozen=True, slots=True)
class Words:
    text: str


@dataclass(frozen=True, slots=True)
class Dots:
    pass


Expression = Number | Constant | Symbol | Sum | Product | Power | Call | PlusMinus | Series | Based
Structure = Group | SetOperation | NamedSet | Builder | Relation | Matrix | Ratio | Clock | Quantity | Words | Dots
Node = Expression | Structure

_FIELDS = {kind: tuple(field.name for field in fields(kind)) for kind in get_args(Node)}

MINUS_ONE = Number(Fraction(-1))


def negative(node: Node) -> Node:
    return Number(-node.value) if isinstance(node, Number) else Product((MINUS_ONE, node))


def difference(left: Node, right: Node) -> Node:
    return Sum((left, negative(right)))


def quotient(top: Node, bottom: Node) -> Node:
    return Product((top, Power(bottom, MINUS_ONE)))


def children(node: Node) -> tuple[Node, ...]:
    found: list[Node] = []
    for name in _FIELDS[type(node)]:
        _collect(getattr(node, name), found)
    return tuple(found)


def _collect(value: object, found: list[Node]) -> None:
    if type(value) is tuple:
        for part in value:
            _collect(part, found)
    elif type(value) in _FIELDS:
        found.append(value)  # type: ignore[arg-type]


def walk(node: Node) -> Iterator[Node]:
    """The node and all that it is made of."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(children(node))


def depth(node: Node) -> int:
    """How many nodes stand above one another."""
    deepest, waiting = 0, [(node, 1)]
    while waiting:
        node, level = waiting.pop()
        deepest = max(deepest, level)
        waiting += [(child, level + 1) for child in children(node)]
    return deepest


def free_symbols(node: Node) -> frozenset[str]:
    if isinstance(node, Symbol):
        return frozenset((node.name,))
    found = frozenset[str]().union(*(free_symbols(child) for child in children(node)))
    return found - {node.index} if isinstance(node, Series) else found


def is_expression(node: Node) -> bool:
    return all(isinstance(part, Expression) for part in walk(node))


def rebuild(node: Node, change: Callable[[Node], Node]) -> Node:
    """The same node with ``change`` applied to each of its children."""
    return type(node)(*(_rebuilt(getattr(node, name), change) for name in _FIELDS[type(node)]))  # type: ignore[arg-type]


def _rebuilt(value: object, change: Callable[[Node], Node]) -> object:
    if type(value) is tuple:
        return tuple(_rebuilt(part, change) for part in value)
    return change(value) if type(value) in _FIELDS else value  # type: ignore[arg-type]
