r"""Canonical text → syntax tree, by recursive descent: one method a rule, and every loop consumes tokens.

::

    answer    = list
    list      = item (("," | ";" | "and" | "or") item)*
    item      = set (relation set)* | ratio
    set       = amount (("∪" | "∩" | "\") amount)*
    amount    = currency? sum unit?

The rules for amounts' units, arithmetic and atoms are in ``parse_units``, ``parse_arithmetic`` and ``parse_atoms``.
"""

from __future__ import annotations

import re
from typing import Literal

from grpo.rewards.math import syntax as s
from grpo.rewards.math.limits import MAX_CHARS, MAX_DEPTH, MAX_ITEMS, NotUnderstood, TooLarge
from grpo.rewards.math.parse_atoms import AtomRules
from grpo.rewards.math.tokens import tokenize
from grpo.rewards.math.units import factor_between, spell_out
from grpo.rewards.math.vocabulary import NUMBER_WORDS

_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in", "notin": "notin", "approx": "~", "equiv": "=="}
_SET_OPERATORS: dict[str, Literal["union", "intersection", "difference"]] = {
    "cup": "union",
    "cap": "intersection",
    "setminus": "difference",
}
_CURRENCY = "$€£¥₹"
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?(?:[ ~]*([ap])\.?[ ~]*m\.?)?", re.IGNORECASE)
_IN_BASE = re.compile(r"([0-9A-Za-z]+)(?:_\{?|[ ~]*\(?(?:in )?base[ ~]*)\(?([0-9]{1,2}|[a-z]+)\)?\}?")


def parse(text: str, grouped: bool = True) -> s.Node:
    """
    Args:
        text: canonical text.
        grouped: read ``1,625`` as one number.

    Raises:
        NotUnderstood: the text is not an answer of the grammar above.
        TooLarge: it is too long or too deep, or a number in it is too large.
    """
    if len(text) > MAX_CHARS:
        raise TooLarge(f"{len(text)} characters; at most {MAX_CHARS} are read")
    if special := _clock(text) or _in_base(text):
        return special
    parser = _AnswerRules(tokenize(text, grouped))
    try:
        answer = parser.list()
    except RecursionError as error:  # MAX_NESTING comes first, unless the caller is deep already
        raise TooLarge("nested too deep") from error
    if parser.next.kind != "end":
        raise NotUnderstood(f"{parser.next.text!r} was not expected")
    if s.depth(answer) > MAX_DEPTH:  # 1 ∪ 2 ∪ 3 ∪ … nests without brackets
        raise TooLarge(f"nested more than {MAX_DEPTH} deep")
    return answer


def _clock(text: str) -> s.Clock | None:
    match = _CLOCK.fullmatch(re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r" \1", text))
    if match is None or not (match[4] or match[2].startswith("0") or match[3]):
        return None
    parts = tuple(int(part) for part in match.groups()[:3] if part)
    return s.Clock(parts, f"{match[4].lower()}m" if match[4] else "") if parts[0] < 25 and max(parts[1:]) < 60 else None


def _in_base(text: str) -> s.Based | None:
    match = _IN_BASE.fullmatch(re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r"\1", text))
    if match is None or not any(character.isdigit() for character in match[1]):
        return None
    try:
        base = int(match[2]) if match[2].isdigit() else NUMBER_WORDS.get(match[2], 0)
        int(match[1], base)
    except ValueError:
        return None
    return s.Based(match[1].upper(), base) if 2 <= base <= 36 else None


class _AnswerRules(AtomRules):
    def list(self) -> s.Node:
        items, joins = self._items()
        if len(items) == 1:
            return items[0]
        return s.Group("", items, "or" if "or" in joins else "and" if "and" in joins else ",")

    def _items(self) -> tuple[tuple[s.Node, ...], set[str]]:
        items = [self._item()]
        joins: set[str] = set()
        while self._at(",", ";", "and", "or") or self._opens_condition():
            while separator := self._accept(",", ";", "and", "or"):
                joins.add(separator)
            if self.next.kind == "end" or self._at("\\}", "}", ")", "]"):
                break
            items.append(self._item())
            if len(items) > MAX_ITEMS:
                raise TooLarge(f"a list of more than {MAX_ITEMS}")
        return tuple(items), joins

    def _opens_condition(self) -> bool:
        r"""``2k\pi (k \in \mathbb{Z})``: a bracket that holds a relation multiplies nothing."""
        if not self._at("("):
            return False
        for position in range(self._position + 1, len(self._tokens)):
            token = self._tokens[position]
            if token.kind in ("sign", "name") and token.text in (")", "("):
                return False
            if token.kind in ("sign", "name") and token.text in _RELATIONS:
                return True
        return False

    def _item(self) -> s.Node:
        sides, operators = [self._set()], []
        while self._at(*_RELATIONS):
            operators.append(_RELATIONS[self._take().text])
            sides.append(self._set())
        if operators:
            return s.Relation(tuple(operators), tuple(sides))
        if self._at(":") and not self._in_set:
            while self._accept(":"):
                sides.append(self._set())
            return s.Ratio(tuple(sides))
        return sides[0]

    def _set(self) -> s.Node:
        left = self._amount()
        while self._at(*_SET_OPERATORS):
            operator = _SET_OPERATORS[self._take().text]
            left = s.SetOperation(operator, left, self._amount())
        return left

    def _amount(self) -> s.Node:
        negative = self._at("-") and self._peek().text in _CURRENCY and self._peek().kind == "sign"
        if negative:
            self._take()
        currency = self._take().text if self.next.kind == "sign" and self.next.text in _CURRENCY else None
        value = self._sum()
        if negative:
            value = s.negative(value)
        unit = self._unit()
        if currency is not None:
            unit = spell_out(currency)
        while unit and self.next.kind == "number":  # 5 feet 6 inches
            more, smaller = self._number(), self._unit()
            factor = factor_between(smaller, unit) if smaller else None
            if factor is None:
                raise NotUnderstood("two quantities of different kinds")
            value = s.Sum((value, s.Product((more, s.Number(factor)))))
        return value if unit is None else s.Quantity(value, unit)
