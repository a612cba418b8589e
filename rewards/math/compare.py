r"""Are two answers the same mathematical object? From cheap to dear: the same text, the same number, the same structure part by part,
the same values at probing points, the same expression for SymPy. Symmetric, and exact: 0.3333 is not 1/3.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from grpo.rewards.math import probes, symbolic
from grpo.rewards.math import syntax as s
from grpo.rewards.math.evaluate import FUNCTIONS
from grpo.rewards.math.limits import MAX_CHARS, NotUnderstood, TooLarge
from grpo.rewards.math.numbers import exact_number
from grpo.rewards.math.parse import parse
from grpo.rewards.math.reals import is_solution_set, same_set
from grpo.rewards.math.text import as_phrase, as_words, canonical, plain_text, squeezed
from grpo.rewards.math.units import LONE_LETTERS, factor_between, spell_out
from grpo.rewards.math.vocabulary import KNOWN_WORDS, MEANINGS

_GROUPED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")
_CHOICE = re.compile(r"\(?([A-Z])\)?[.)]?")
_WHOLE_NUMBERS = (s.NamedSet("Z"), s.NamedSet("N"))
_CHOICE_WORD = re.compile(r"(?:the )?(?:option|choice|answer)\s+(?=\(?[A-Z]\b)", re.IGNORECASE)
_CHOICES = re.compile(r"(?:\(?[A-H][.)]{0,2}\s*(?:(?:,|;|&|and\b)\s*)*)+")  # B, (B), AC, A and C
_CAPITAL = re.compile(r"[A-H]")
_CHOICE_AND_MORE = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:])\s*(\S.*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])\(?[A-Z]\)?(?![A-Za-z])|\bor\b|\band\b|\bnot\b")


def equal(gold: str, answer: str) -> bool:
    """Whether the answer, as a model wrote it, is the gold answer.

    Raises:
        NotUnderstood: the answer is neither mathematics nor plain words. (A gold that is neither equals nothing but its own text.)
        TooLarge: one of them is too large to read or to compare.
    """
    verdict = at_once(gold, answer)
    if verdict is not None:
        return verdict
    try:
        return _same_texts(canonical(gold), canonical(answer))
    except RecursionError as error:  # the caller is deep already
        raise TooLarge("too deep to compare") from error


def at_once(gold: str, answer: str) -> bool | None:
    """The verdict if it takes no parser: the same text, or two numbers; else None. Microseconds, on any text.

    Raises:
        TooLarge: one of them is too long, or a number of too many digits.
    """
    if gold.strip() == answer.strip():
        return bool(gold.strip())
    if max(len(gold), len(answer)) > 2 * MAX_CHARS:
        raise TooLarge(f"an answer of more than {2 * MAX_CHARS} characters")
    left, right = squeezed(canonical(gold)), squeezed(canonical(answer))
    if left == right or not left or not right:
        return left == right and bool(left)
    first = exact_number(left)
    second = exact_number(right) if first is not None else None
    return None if first is None or second is None else first == second


@lru_cache(maxsize=1_024)
def read(text: str) -> tuple[s.Node, ...]:
    """Canonical text → what it may mean: one syntax tree, or two where ``100,200`` may be a number or a list.

    Raises:
        NotUnderstood, TooLarge: as ``parse``.
    """
    text = MEANINGS.get(plain_text(text).strip(" .").lower(), text)
    words = as_words(text, KNOWN_WORDS)
    if words is not None:
        return (s.Words(MEANINGS.get(words, words)),)
    if not _GROUPED.search(text):
        return (parse(text),)
    return parse(text), parse(text, grouped=False)


def _same_texts(gold: str, answer: str) -> bool:
    chosen = _same_choice(gold, answer)
    if chosen is not None:
        return chosen
    try:
        answers = read(answer)
    except NotUnderstood:
        if (phrase := as_phrase(answer)) is not None and phrase == as_phrase(gold):
            return True
        raise
    try:
        golds = read(gold)
        pairs = zip(golds, answers, strict=True) if len(golds) == len(answers) else ((g, a) for g in golds for a in answers)
        return any(same(left, right) for left, right in pairs)
    except NotUnderstood:
        return False


def is_choice(text: str) -> bool:
    """Whether this is a choice with what it says, ``(C) 17``, or without."""
    shown = _CHOICE_WORD.sub("", plain_text(text).strip())
    return bool(_CHOICE.fullmatch(shown) or _CHOICE_AND_MORE.fullmatch(shown))


def _same_choice(gold: str, answer: str) -> bool | None:
    """``B`` and ``(B) 12``: a choice, and a choice with what it says. None if this is not such a pair."""
    gold, answer = (_CHOICE_WORD.sub("", plain_text(text).strip()) for text in (gold, answer))
    if _CHOICES.fullmatch(gold) and _CHOICES.fullmatch(answer):
        return sorted(_CAPITAL.findall(gold)) == sorted(_CAPITAL.findall(answer))
    for one, other in ((gold, answer), (answer, gold)):
        letter, named = _CHOICE.fullmatch(one), _CHOICE_AND_MORE.fullmatch(other)
        if letter and named and not _OTHER_CHOICE.search(named[3]):
            return letter[1] == (named[1] or named[2])
    return None


# ---- structure


def same(left: s.Node, right: s.Node) -> bool:
    """Whether two trees mean the same.

    Raises:
        NotUnderstood: a part can not be compared.
        TooLarge: a part is too large to compute.
    """
    if left == right:
        return True
    left, right = _spread(left), _spread(right)
    if left == right:
        return True
    if isinstance(left, s.Words) or isinstance(right, s.Words):
        return False
    for one, other in ((left, right), (right, left)):
        if (sides := _approximated(one)) is not None:
            return any(same(side, other) for side in sides)
    left, right = _as_reals(left, right), _as_reals(right, left)
    first, second = _assignments(left), _assignments(right)
    if first is not None or second is not None:
        return _same_assignments(left, right, first, second)
    if is_solution_set(left) or is_solution_set(right):
        verdict = same_set(left, right)
        if verdict is not None:
            return verdict
    if isinstance(left, s.Relation) and isinstance(right, s.Relation):
        return _same_relation(left, right)
    if isinstance(left, s.Relation):
        return (value := _unlabelled(left)) is not None and same(value, right)
    if isinstance(right, s.Relation):
        return (value := _unlabelled(right)) is not None and same(left, value)
    if _is_list(left) or _is_list(right):
        return _same_lists(left, right)
    return _same_single(left, right)


def _same_single(left: s.Node, right: s.Node) -> bool:
    match left, right:
        case (s.Quantity(), _) | (_, s.Quantity()):
            return _same_quantity(left, right)
        case (s.Group(), s.Group()):
            assert isinstance(left, s.Group) and isinstance(right, s.Group)
            return left.brackets == right.brackets and _same_in_order(left.items, right.items)
        case (s.Matrix(rows=a), s.Matrix(rows=b)):
            return len(a) == len(b) and all(_same_in_order(x, y) for x, y in zip(a, b, strict=True))
        case (s.Matrix(rows=rows), s.Group(brackets="()", items=items)) | (s.Group(brackets="()", items=items), s.Matrix(rows=rows)):
            entries = tuple(entry for row in rows for entry in row)
            return 1 in (len(rows), len(rows[0])) and _same_in_order(entries, items)
        case (s.Ratio(parts=a), s.Ratio(parts=b)):
            return _same_in_order(a, b) or _same_ratio(a, b)
        case (s.Ratio(parts=(top, bottom)), other) | (other, s.Ratio(parts=(top, bottom))) if s.is_expression(other):
            return _same_expression(s.quotient(top, bottom), other)
        case (s.Clock(parts=a, half=x), s.Clock(parts=b, half=y)):
            return a == b and (x == y or "" in (x, y))
        case (s.Based(), _) | (_, s.Based()):
            return False  # in another base, or in none: another answer, even if the same number
        case (s.SetOperation(operator=a, left=p, right=q), s.SetOperation(operator=b, left=u, right=v)):
            return a == b and ((same(p, u) and same(q, v)) or (a != "difference" and same(p, v) and same(q, u)))
        case (s.Builder(), s.Builder()):
            assert isinstance(left, s.Builder) and isinstance(right, s.Builder)
            return _same_builder(left, right)
    return s.is_expression(left) and s.is_expression(right) and _same_expression(left, right)


def _same_in_order(left: Sequence[s.Node], right: Sequence[s.Node]) -> bool:
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


# ---- rewriting before comparing


def _spread(node: s.Node) -> s.Node:
    r"""Write out ``\pm``, scalars before matrices, and unions of finite sets."""
    if isinstance(node, s.Group) and node.brackets in ("", "{}"):
        items: list[s.Node] = []
        for item in node.items if node.brackets else _unconditional(node.items):
            spread = _spread(item)
            items += spread.items if isinstance(spread, s.Group) and spread.brackets == "" else (spread,)
        if node.join == "and" and (total := _total(items)) is not None:
            return total
        if len(items) == 1 and not (isinstance(items[0], s.Group) and items[0].brackets == "{}") and not isinstance(items[0], s.Relation):
            return items[0]  # {5} is as good as 5
        return s.Group(node.brackets, tuple(items), node.join)
    if any(isinstance(part, s.PlusMinus) for part in s.walk(node)):
        return s.Group("", (_spread(with_sign(node, 1)), _spread(with_sign(node, -1))))
    if isinstance(node, s.SetOperation) and node.operator == "union":
        left, right = _spread(node.left), _spread(node.right)
        finite = [side for side in (node.left, node.right) if isinstance(side, s.Group) and side.brackets == "{}"]
        if len(finite) == 2:
            return _spread(s.Group("{}", (*finite[0].items, *finite[1].items)))
        return s.SetOperation("union", left, right)
    if (point := _named_point(node)) is not None:
        return point
    if isinstance(node, s.Product):
        return _scaled(node)
    if isinstance(node, s.Builder):
        return _direct(node)
    return node


def _unconditional(items: tuple[s.Node, ...]) -> tuple[s.Node, ...]:
    r"""``2k\pi, k \in \mathbb{Z}`` → ``2k\pi``, its letter renamed: which one stands for the whole numbers says nothing."""
    letters = [
        item.sides[0] for item in items if isinstance(item, s.Relation) and item.operators == ("in",) and item.sides[1] in _WHOLE_NUMBERS
    ]
    rest = tuple(item for item in items if not (isinstance(item, s.Relation) and item.sides[0] in letters and item.operators == ("in",)))
    if not rest:
        return items
    for index, letter in enumerate(letters):
        if isinstance(letter, s.Symbol):
            rest = tuple(_renamed(item, letter.name, f"whole {index}") for item in rest)
    return rest


def _total(items: Sequence[s.Node]) -> s.Quantity | None:
    """``3 hours and 20 minutes`` is one quantity; ``3 cm and 4 cm`` are two."""
    quantities = [item for item in items if isinstance(item, s.Quantity) and item.unit]
    if len(quantities) != len(items) or len({item.unit for item in quantities}) != len(items):
        return None
    factors = [factor_between(item.unit, quantities[0].unit) for item in quantities]
    terms = [s.Product((item.value, s.Number(factor))) for item, factor in zip(quantities, factors, strict=True) if factor is not None]
    return s.Quantity(s.Sum(tuple(terms)), quantities[0].unit) if len(terms) == len(items) > 1 else None


def with_sign(node: s.Node, sign: int) -> s.Node:
    r"""The node with one choice of sign for all its ``\pm``."""
    if isinstance(node, s.PlusMinus):
        value = with_sign(node.value, sign)
        return value if sign * node.sign > 0 else s.negative(value)
    return s.rebuild(node, lambda child: with_sign(child, sign))


def _named_point(node: s.Node) -> s.Group | None:
    """``P(3, −1)`` → (3, −1)."""
    match node:
        case s.Call(name=name, arguments=coordinates) if len(coordinates) > 1 and len(name) == 1 and name.isupper():
            return s.Group("()", coordinates)
        case s.Product(factors=(s.Symbol(name=name), s.Group(brackets="()") as group)) if len(name) == 1 and name.isupper():
            return group
    return None


def _scaled(node: s.Product) -> s.Node:
    """A number times a vector or matrix, entry by entry."""
    arrays = [factor for factor in node.factors if isinstance(factor, (s.Matrix, s.Group))]
    if len(arrays) != 1:
        return node
    scalars = tuple(factor for factor in node.factors if factor is not arrays[0])
    array = arrays[0]
    if isinstance(array, s.Matrix):
        return s.Matrix(tuple(tuple(s.Product((*scalars, entry)) for entry in row) for row in array.rows))
    return s.Group(array.brackets, tuple(s.Product((*scalars, item)) for item in array.items), array.join)


def _direct(node: s.Builder) -> s.Builder:
    r"""``\{x | x = 3k, k ∈ ℤ\}`` as ``\{3k | k ∈ ℤ\}``."""
    for condition in node.conditions:
        if isinstance(condition, s.Relation) and condition.operators == ("=",) and condition.sides[0] == node.head:
            return s.Builder(condition.sides[1], tuple(other for other in node.conditions if other is not condition))
    return node


# ---- lists


def _is_list(node: s.Node) -> bool:
    return isinstance(node, s.Group) and node.brackets in ("", "{}")


def _same_lists(left: s.Node, right: s.Node) -> bool:
    first, second = (node.items if isinstance(node, s.Group) and _is_list(node) else (node,) for node in (left, right))
    if any(isinstance(item, s.Dots) for item in (*first, *second)):
        return _same_in_order(first, second)
    is_set = any(isinstance(node, s.Group) and node.brackets == "{}" for node in (left, right))
    if is_set and len(first) != len(second):
        first, second = _distinct(first), _distinct(second)
    return _same_in_any_order(first, second)


def _same_in_any_order(left: Sequence[s.Node], right: Sequence[s.Node]) -> bool:
    if len(left) != len(right):
        return False
    common = Counter(left) & Counter(right)
    first, second = list((Counter(left) - common).elements()), list((Counter(right) - common).elements())
    for item in first:  # equality is transitive: the first match is as good as any
        match = next((index for index, other in enumerate(second) if same(item, other)), None)
        if match is None:
            return False
        del second[match]
    return True


def _distinct(items: Sequence[s.Node]) -> tuple[s.Node, ...]:
    kept: list[s.Node] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return tuple(kept)


# ---- relations


def _is_label(node: s.Node) -> bool:
    """What may stand before = to name an answer: ``x``, ``f(x)``, ``a_n``, ``(x, y)``."""
    if isinstance(node, s.Group):
        return bool(node.items) and all(isinstance(item, s.Symbol) for item in node.items)
    return isinstance(node, s.Symbol) or (isinstance(node, s.Call) and node.name not in FUNCTIONS)


def _unlabelled(node: s.Relation) -> s.Node | None:
    """``x = 5 + 6 = 11`` → 11, ``x ∈ S`` → S, ``2 + 3 = 5`` → 5; None if this is an equation, or a chain that does not hold."""
    if node.operators == ("in",) and _is_label(node.sides[0]):
        return node.sides[1]
    if set(node.operators) != {"="}:
        return None
    if _is_label(node.sides[0]):
        values = node.sides[1:]
    elif _is_label(node.sides[-1]):
        values = node.sides[:-1]
    elif probes.free_symbols(*node.sides):
        return None
    else:
        values = node.sides
    return values[-1] if all(same(value, values[-1]) for value in values[:-1]) else None


def _as_reals(node: s.Node, other: s.Node) -> s.Node:
    r"""``\mathbf{R}`` beside a set of numbers: the reals."""
    return s.NamedSet("R") if node == s.Symbol("R") and is_solution_set(other) else node


def _approximated(node: s.Node) -> tuple[s.Node, ...] | None:
    r"""``2\pi \approx 6.28`` states two answers, the exact and the rounded; ``x = 2\pi \approx 6.28`` as well."""
    if not isinstance(node, s.Relation) or node.operators[-1] != "~" or not set(node.operators[:-1]) <= {"="}:
        return None
    exact, rounded = node.sides[-2:]
    if not (isinstance(rounded, s.Number) and s.is_expression(exact) and probes.near(exact, rounded)):
        return ()  # 12 \\approx 13 states nothing
    stated = exact if len(node.sides) == 2 else s.Relation(node.operators[:-1], node.sides[:-1])
    return (stated,) if rounded.value.denominator == 1 else (stated, rounded)


def _same_relation(left: s.Relation, right: s.Relation) -> bool:
    if set(left.operators) == set(right.operators) == {"="}:
        return _same_equation(left, right)
    left, right = _ascending(left), _ascending(right)
    if left.operators == right.operators and _same_in_order(left.sides, right.sides):
        return True
    if left.operators != right.operators or len(left.operators) > 1 or not all(map(s.is_expression, (*left.sides, *right.sides))):
        return False
    operator = left.operators[0]
    if operator not in ("<", "<=", "!="):
        return False
    return bool(probes.proportional(s.difference(*left.sides), s.difference(*right.sides), positive=operator != "!="))


def _ascending(node: s.Relation) -> s.Relation:
    if set(node.operators) <= {">", ">="}:
        flipped = {">": "<", ">=": "<="}
        return s.Relation(tuple(flipped[operator] for operator in reversed(node.operators)), tuple(reversed(node.sides)))
    return node


def _same_equation(left: s.Relation, right: s.Relation) -> bool:
    if len(left.sides) > 2 or len(right.sides) > 2:
        values = _unlabelled(left), _unlabelled(right)
        return values[0] is not None and values[1] is not None and same(values[0], values[1])
    (a, b), (c, d) = left.sides, right.sides
    if _is_label(a) and _is_label(c) and (a == c or _same_label(a, c)) and same(b, d):
        return True
    if all(map(s.is_expression, (a, b, c, d))):
        return bool(probes.proportional(s.difference(a, b), s.difference(c, d)))
    return (same(a, c) and same(b, d)) or (same(a, d) and same(b, c))


def _same_label(left: s.Node, right: s.Node) -> bool:
    """``y`` and ``f(x)`` name the same function; ``H`` and ``h`` the same height."""
    if isinstance(left, s.Call) != isinstance(right, s.Call):
        return True
    return isinstance(left, s.Symbol) and isinstance(right, s.Symbol) and left.name.casefold() == right.name.casefold()


def _assignments(node: s.Node) -> dict[str, s.Node] | None:
    """``x = 8, y = −2`` or ``(x, y) = (8, −2)`` → what each name stands for. Not ``x = 1 or x = 2``: that is a list."""
    if isinstance(node, s.Group) and len(node.items) > 1 and all(isinstance(i, s.Relation) and i.operators == ("=",) for i in node.items):
        pairs = [item.sides for item in node.items if isinstance(item, s.Relation)]
    elif isinstance(node, s.Relation) and node.operators == ("=",) and all(isinstance(side, s.Group) for side in node.sides):
        names, values = (side.items for side in node.sides if isinstance(side, s.Group))
        if len(names) != len(values):
            return None
        pairs = list(zip(names, values, strict=True))
    else:
        return None
    found = {name.name: value for name, value in pairs if isinstance(name, s.Symbol)}
    return found if len(found) == len(pairs) else None


def _same_assignments(left: s.Node, right: s.Node, first: dict[str, s.Node] | None, second: dict[str, s.Node] | None) -> bool:
    if first is not None and second is not None:
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    named, other = (first, right) if first is not None else (second, left)
    assert named is not None
    if not isinstance(other, s.Group) or other.brackets not in ("()", "", "[]"):
        return False
    return _same_in_order([named[name] for name in sorted(named)], other.items) or _same_in_order(list(named.values()), other.items)


def _same_builder(left: s.Builder, right: s.Builder) -> bool:
    names = [sorted(s.free_symbols(node)) for node in (left, right)]
    if len(names[0]) == len(names[1]) == 1 and names[0] != names[1]:  # {3k | k ∈ ℤ} and {3n | n ∈ ℤ}
        right = _renamed(right, names[1][0], names[0][0])  # type: ignore[assignment]
    return same(left.head, right.head) and _same_in_any_order(left.conditions, right.conditions)


def _renamed(node: s.Node, old: str, new: str) -> s.Node:
    return s.Symbol(new) if node == s.Symbol(old) else s.rebuild(node, lambda child: _renamed(child, old, new))


# ---- quantities and expressions


def _same_quantity(left: s.Node, right: s.Node) -> bool:
    """An answer without a unit is its number; with one, the other's must measure the same."""
    if isinstance(left, s.Quantity) and isinstance(right, s.Quantity):
        factor = factor_between(left.unit, right.unit) if left.unit and right.unit else Fraction(1)
        if factor is None:
            return False
        return same(left.value if factor == 1 else s.Product((left.value, s.Number(factor))), right.value)
    quantity, other = (left, right) if isinstance(left, s.Quantity) else (right, left)
    assert isinstance(quantity, s.Quantity)
    if isinstance(lettered := _as_quantity(other), s.Quantity) and same(quantity, lettered):
        return True
    if quantity.unit == (("radians", Fraction(1)),) or _in_degrees(other):
        return _in_degrees(other) != bool(quantity.unit) and _same_expression(quantity.value, other)
    return same(quantity.value, other)


def _as_quantity(node: s.Node) -> s.Node:
    """``3 L`` beside litres: a letter behind a number that can be a unit."""
    if isinstance(node, s.Product) and isinstance(node.factors[-1], s.Symbol) and node.factors[-1].name in LONE_LETTERS:
        return s.Quantity(s.Product(node.factors[:-1]), spell_out(node.factors[-1].name))
    return node


def _same_ratio(left: tuple[s.Node, ...], right: tuple[s.Node, ...]) -> bool:
    if len(left) != len(right) or not all(map(s.is_expression, (*left, *right))):
        return False
    return all(_same_expression(s.Product((a, right[0])), s.Product((b, left[0]))) for a, b in zip(left, right, strict=True))


def _in_degrees(node: s.Node) -> bool:
    """Whether this is an angle in degrees; the degrees within sin 15° are not meant."""
    if isinstance(node, s.Call):
        return node.name == "degree"
    return isinstance(node, (s.Sum, s.Product)) and any(map(_in_degrees, s.children(node)))


def _without_degrees(node: s.Node) -> s.Node:
    if isinstance(node, s.Call):
        return node.arguments[0] if node.name == "degree" else node
    return s.rebuild(node, _without_degrees)


def _same_expression(left: s.Node, right: s.Node) -> bool:
    if _in_degrees(left) != _in_degrees(right) and _same_values(_without_degrees(left), _without_degrees(right)):
        return True  # 90° and 90
    return _same_values(left, right)


def _same_values(left: s.Node, right: s.Node) -> bool:
    verdict = probes.equal(left, right)
    return symbolic.proves_equal(left, right) if verdict is None else verdict
