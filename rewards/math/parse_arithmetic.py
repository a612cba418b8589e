r"""Sums, products and powers.

::

    sum       = term (("+" | "-" | "±" | "∓") term)*
    product   = power (("*" | "/")? power)*                2x, 3(x+1), 2\sqrt{3}, 1/2x = (1/2)x
    power     = atom postfix* ("^" exponent)? postfix*      postfix: ! % ° '
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction

from grpo.rewards.math import syntax as s
from grpo.rewards.math.limits import NotUnderstood
from grpo.rewards.math.parse_units import UnitRules
from grpo.rewards.math.tokens import Token
from grpo.rewards.math.units import is_unit
from grpo.rewards.math.vocabulary import NOT_UNITS, STARTS


class ArithmeticRules(UnitRules, ABC):
    def __init__(self, tokens: tuple[Token, ...]) -> None:
        super().__init__(tokens)
        self._bars = 0  # how many |…| are open
        self._in_set = False  # directly within \{ \}: a bar begins the conditions

    @abstractmethod
    def _atom(self) -> s.Node:
        """What arithmetic is made of: ``parse_atoms``."""

    @abstractmethod
    def _opens_condition(self) -> bool:
        """Whether the conditions of a set begin here: ``parse``."""

    def _sum(self) -> s.Node:
        terms = [self._term()]
        while self._at("+", "-", "pm", "mp"):
            terms.append(self._term())
        return terms[0] if len(terms) == 1 else s.Sum(tuple(terms))

    def _term(self) -> s.Node:
        signs = []
        while sign := self._accept("+", "-", "pm", "mp"):
            signs.append(sign)
            if len(signs) > 2:
                raise NotUnderstood("three signs in a row")
        value = self._product()
        for sign in reversed(signs):
            if sign == "-":
                value = s.negative(value)
            elif sign != "+":
                value = s.PlusMinus(value, 1 if sign == "pm" else -1)
        return value

    def _product(self) -> s.Node:
        factors = [self._mixed() or self._power()]
        while True:
            if self._at("*") and not self._is_unit_word(self._peek()):
                self._take()
                factors.append(self._signed())
            elif self._at("/"):
                self._take()
                factors.append(s.Power(self._signed(), s.MINUS_ONE))
            elif self._may_multiply():
                factors.append(self._power())
            else:
                return factors[0] if len(factors) == 1 else s.Product(tuple(factors))

    def _signed(self) -> s.Node:
        """A factor behind a sign: ``2 * -3``."""
        if self._accept("-"):
            return s.negative(self._power())
        self._accept("+")
        return self._mixed() or self._power()

    def _mixed(self) -> s.Node | None:
        r"""``2 1/2`` or ``2\frac12``. ``4\frac{10}{3}`` is neither a mixed number nor surely a product, and so nothing."""
        whole = self.next
        if whole.kind != "number" or not whole.literal:
            return None
        start = self._position
        if self._peek().kind == "number" and self._peek(2).text == "/" and self._peek(3).kind == "number":
            self._take()
            top, _, bottom = self._take(), self._take(), self._take()
        elif self._peek().text == "frac" and self._peek().kind == "name":
            self._take()
            self._take()
            above, below = self._digits(), self._digits()
            if above is None or below is None:
                self._position = start
                return None
            top, bottom = above, below
        else:
            return None
        assert whole.value is not None
        if top.value is None or bottom.value is None or not 0 < top.value < bottom.value or not (top.literal and bottom.literal):
            raise NotUnderstood("a mixed number whose fraction is not between 0 and 1")
        return self._postfixes(s.Number(whole.value + top.value / bottom.value))

    def _digits(self) -> Token | None:
        """An argument of TeX that is a natural number: ``{12}``, or a single digit."""
        if self._at("{") and self._peek().kind == "number" and self._peek(2).text == "}":
            self._take()
            token = self._take()
            self._take()
            return token if token.literal else None
        if self.next.kind == "number" and self.next.literal:
            return self._one_digit()
        return None

    def _one_digit(self) -> Token:
        token = self.next
        if len(token.text) > 1:  # \frac12: TeX takes one digit
            first, rest = token.text[0], token.text[1:]
            self._tokens[self._position : self._position + 1] = [
                Token("number", digits, Fraction(int(digits)), literal=True) for digits in (first, rest)
            ]
        return self._take()

    def _may_multiply(self) -> bool:
        token = self.next
        if token.kind == "letter":
            return not (token.thin and self._is_unit_word(token) and self._follows_number())
        if token.kind == "number":
            return token.value is not None and token.text.isalpha()  # 3 million
        if token.kind == "word":
            return (
                token.text.isalpha()
                and len(token.text) <= 4
                and not is_unit(token.text)
                and not token.thin
                and token.text not in NOT_UNITS
                and self._letters_fit()
            )
        if token.kind == "name":
            return token.text in STARTS and not (token.text == "frac" and self._peek().text == "{" and self._is_unit_word(self._peek(2)))
        if token.text == "|":
            return self._bars == 0 and not self._in_set
        if token.text == "(":
            return not self._opens_unit() and not self._opens_condition()
        if token.text == "[":  # not [0, 2\pi[
            return self._peek().kind != "end" and self._peek().text not in (",", ";", "cup", "cap", ")", "]", "\\}", "and", "or")
        return token.text == "{"

    def _letters_fit(self) -> bool:
        """Whether a short word behind a factor can be letters: behind a number only if no unit is likelier, as in ``9 apples``."""
        return not self.next.spaced or not self._follows_number()

    def _follows_number(self) -> bool:
        return self._position > 0 and (self._last.kind == "number" or self._last.text in ("}", "pi", ")", "%"))

    def _power(self) -> s.Node:
        base = self._postfixes(self._atom())
        if self._accept("^"):
            if self._accept("'"):
                return base
            base = self._postfixes(s.Power(base, self._exponent()))
        return base

    def _exponent(self) -> s.Node:
        if self._at("{"):
            return self._nested(self._atom)
        if self._accept("-"):
            return s.negative(self._nested(self._power))
        self._accept("+")
        return self._nested(self._power)

    def _postfixes(self, value: s.Node) -> s.Node:
        while True:
            if self._at("!"):
                marks = 0
                while self._accept("!"):
                    marks += 1
                if marks > 2:
                    raise NotUnderstood("a factorial of more than two marks")
                value = s.Call("factorial" if marks == 1 else "factorial2", (value,))
            elif self._at("%"):
                self._take()
                value = s.Product((value, s.Number(Fraction(1, 100))))
            elif self._at("°") and not (self._peek().kind == "letter" and self._peek().text in "CF"):
                self._take()
                value = s.Call("degree", (value,))
            elif self._at("°"):
                self._take()
                scale = self._take().text
                self._tokens.insert(self._position, Token("word", "celsius" if scale == "C" else "fahrenheit", thin=True))
                return value
            elif self._at("'") and isinstance(value, s.Symbol):
                self._take()
                value = s.Symbol(value.name + "'")
            else:
                return value
