r"""Units behind a number: ``cm^2``, ``ft/sec``, ``N·m``, ``square inches``, ``(apples)``, ``\frac{\text{m}}{\text{s}}``."""

from __future__ import annotations

from fractions import Fraction

from grpo.rewards.math.cursor import Cursor
from grpo.rewards.math.limits import NotUnderstood
from grpo.rewards.math.tokens import Token
from grpo.rewards.math.units import LONE_LETTERS, Unit, combine, is_unit, spell_out
from grpo.rewards.math.vocabulary import NOT_UNITS

_CURRENCY = ("$", "€", "£", "¥", "₹", "¢")
_MOST_WORDS = 6


class UnitRules(Cursor):
    def _unit(self) -> Unit | None:
        """``cm^2``, ``ft/sec``, ``N·m``, ``square inches``, ``(apples)``: what may follow a number."""
        if self._at("frac") and self._peek().text == "{" and self._is_unit_word(self._peek(2)):
            return self._unit_fraction()
        bracket = self._opens_unit()
        if bracket:
            self._take()
        if not self._is_unit_word(self.next):
            return None
        parts: list[tuple[str, Fraction]] = []
        sign, power = 1, None
        while True:
            word = self._take().text
            if word in ("square", "sq", "squared", "cubic", "cubed"):
                exponent = Fraction(2 if word.startswith("sq") else 3)
                if word.endswith("ed") and parts:
                    parts[-1] = (parts[-1][0], parts[-1][1] * exponent)
                else:
                    power = exponent
            elif word in ("per", "a", "an", "each"):
                sign = -1
            elif word == "of":  # liters of fruit punch: what there is of it says no more about how much
                while self.next.kind in ("word", "letter"):
                    self._take()
                break
            else:
                name = {"C": "celsius", "F": "fahrenheit"}.get(word, word) if self._tokens[self._position - 2].text == "°" else word
                exponent = self._unit_exponent() * (power or 1) * sign
                parts += [(part, own * exponent) for part, own in spell_out("celsius" if word == "°C" else name)]
                power = None
                if self._at("/"):
                    sign = -1
            if self._at("/", "*", "-") and self._is_unit_word(self._peek(), alone=True):
                self._take()
            elif not self._is_unit_word(self.next):
                break
            if len(parts) > 6:
                raise NotUnderstood("a unit of more than six words")
        if bracket:
            self._expect(")")
        return combine(parts)

    def _unit_fraction(self) -> Unit:
        r"""``\frac{\text{m}}{\text{s}}``"""
        self._take()
        halves = []
        for _ in range(2):
            self._expect("{")
            halves.append(self._unit() or ())
            self._expect("}")
        return combine([*halves[0], *((name, -exponent) for name, exponent in halves[1])])

    def _opens_unit(self) -> bool:
        """``(apples)``, but not ``(ab)``"""
        word = self._peek()
        return self._at("(") and word.kind == "word" and (len(word.text) > 3 or is_unit(word.text)) and self._is_unit_word(word)

    def _is_unit_word(self, token: Token, alone: bool = False) -> bool:
        if token.kind == "sign":
            return token.text in ("€", "£", "¥", "₹", "¢", "$") and not alone
        if token.kind == "letter":
            return (token.text in LONE_LETTERS and (alone or token.thin)) or (token.text == "a" and token.thin)
        return token.kind == "word" and token.text.isalpha() and token.text not in NOT_UNITS and not token.text.endswith("ly")

    def _unit_exponent(self) -> Fraction:
        if not self._accept("^"):
            return Fraction(1)
        braces = self._accept("{")
        sign = -1 if self._accept("-") else 1
        token = self._take()
        if token.value is None:
            raise NotUnderstood(f"{token.text!r} is no exponent of a unit")
        if braces:
            self._expect("}")
        return sign * token.value
