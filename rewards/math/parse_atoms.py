r"""What arithmetic is made of.

::

    atom = number | letter | constant | bracket | matrix | "|" sum "|" | function argument | \frac argument argument | \sum body

Where TeX and mathematicians differ, mathematicians win: ``x^10`` is x to the tenth, ``\sqrt12`` the root of twelve.
"""

from __future__ import annotations

from abc import abstractmethod
from fractions import Fraction

from grpo.rewards.math import syntax as s
from grpo.rewards.math.limits import MAX_ITEMS, NotUnderstood, TooLarge
from grpo.rewards.math.parse_arithmetic import ArithmeticRules
from grpo.rewards.math.tokens import split_letters
from grpo.rewards.math.vocabulary import DECORATIONS, FIGURES, FUNCTIONS, GREEK, NOT_UNITS, NUMBER_WORDS

_BRACKETS: dict[tuple[bool, bool], s.Brackets] = {(True, True): "()", (True, False): "(]", (False, True): "[)", (False, False): "[]"}
_CLOSING = {"(": (")", "]"), "[": ("]", ")", "["), "\\{": ("\\}",), "{": ("}",), "]": ("[", "]")}
_APPLIED_TO_NAMES = frozenset("fghpqrsuvyCFGHPQRSTVABELN")  # f(x), but k(k+1)
_FUNCTION_SYNONYMS = {"lg": "log10"}
_ENVIRONMENTS = ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "cases", "array")


class AtomRules(ArithmeticRules):
    @abstractmethod
    def _items(self) -> tuple[tuple[s.Node, ...], set[str]]:
        """What stands in a bracket, and what parts it: ``parse``."""

    @abstractmethod
    def _item(self) -> s.Node:
        """One of them: ``parse``."""

    def _atom(self) -> s.Node:
        token = self.next
        if token.kind == "number":
            return self._number()
        if token.kind == "letter":
            return self._letter()
        if token.kind == "word":
            letters = None if (token.prose and not token.text.isupper()) or token.text in NOT_UNITS else split_letters(token.text)
            if letters is None:
                raise NotUnderstood(f"the word {token.text!r} is not known")
            self._tokens[self._position : self._position + 1] = letters
            return self._letter()
        if token.kind == "name":
            return self._name()
        if self._at("(", "[", "{", "\\{", "]"):
            return self._bracket()
        if self._accept("|"):
            self._bars += 1
            inside = self._nested(self._sum)
            self._expect("|")
            self._bars -= 1
            return s.Call("abs", (inside,))
        raise NotUnderstood(f"{token.text!r} stands where a value was expected")

    def _number(self) -> s.Node:
        token = self._take()
        assert token.value is not None
        if token.literal and self._at("_"):
            self._take()
            braces = self._accept("{")
            base = self._take()
            if braces:
                self._expect("}")
            number = int(base.value) if base.value is not None else NUMBER_WORDS.get(base.text.lower(), 0)
            if not 2 <= number <= 36 or any(int(digit, 36) >= number for digit in token.text):
                raise NotUnderstood(f"{token.text!r} is no number in base {base.text!r}")
            return s.Based(token.text, number)
        return s.Number(token.value)

    def _letter(self) -> s.Node:
        token = self._take()
        name = token.text
        if name == "e" and not self._at("_"):
            return s.Constant("e")
        if name == "i" and not self._at("_"):
            return s.Constant("i")
        return self._named(name)

    def _named(self, name: str) -> s.Node:
        """A variable, with its index if it has one, applied to its arguments if it is a function."""
        index: tuple[s.Node, ...] = ()
        if self._accept("_"):
            index = (self._nested(self._atom),)
            name += "_"
        while self._at("'"):
            name += self._take().text
        if self._at("(") and self._is_applied(name):
            arguments = self._nested(self._bracket)
            return s.Call(name, (*index, *(arguments.items if isinstance(arguments, s.Group) else (arguments,))))
        return s.Call(name, index) if index else s.Symbol(name)

    def _is_applied(self, name: str) -> bool:
        if name.startswith("f") or name in ("O", "Theta", "Omega"):
            return True
        position, names_only = self._position + 1, True
        for _ in range(2 * MAX_ITEMS):
            token = self._tokens[min(position, len(self._tokens) - 1)]
            if token.text == ")" or token.kind == "end":
                break
            names_only = names_only and (token.kind in ("letter", "number") or token.text == ",")
            position += 1
        arguments = position - self._position - 1
        defined = self._tokens[min(position + 1, len(self._tokens) - 1)].text == "="
        return names_only and arguments % 2 == 1 and (defined or (arguments == 1 and name[0] in _APPLIED_TO_NAMES))

    def _bracket(self) -> s.Node:
        opening = self._take().text
        if opening == "\\{":
            return self._set_in_braces()
        was_in_set, self._in_set = self._in_set, False
        bars, self._bars = self._bars, 0
        items = () if self._at(*_CLOSING[opening]) else self._nested(self._items)[0]
        if opening == "{" and len(items) == 1 and self._at("over", "choose"):
            over = self._take().text
            below = self._nested(self._sum)
            items = (s.quotient(items[0], below) if over == "over" else s.Call("binomial", (items[0], below)),)
        closing = self._expect(*_CLOSING[opening])
        self._in_set, self._bars = was_in_set, bars
        if opening == "{":
            if not items:
                raise NotUnderstood("empty braces")
            return items[0] if len(items) == 1 else s.Group("{}", items)
        if len(items) == 1 and (opening, closing) in (("(", ")"), ("[", "]")):
            return items[0]
        return s.Group(_BRACKETS[opening in ("(", "]"), closing in (")", "[")], items)

    def _set_in_braces(self) -> s.Node:
        was_in_set, self._in_set = self._in_set, True
        bars, self._bars = self._bars, 0
        items: tuple[s.Node, ...] = () if self._at("\\}") else self._nested(self._items)[0]
        conditions: tuple[s.Node, ...] | None = None
        if self._accept("|", ":"):
            self._in_set = False
            conditions, joins = self._nested(self._items)
            if "or" in joins:
                conditions = (s.Group("", conditions, "or"),)
        self._expect("\\}")
        self._in_set, self._bars = was_in_set, bars
        if conditions is None:
            return s.Group("{}", items)
        if len(items) != 1:
            raise NotUnderstood("a set of several things under one condition")
        head = items[0]
        if isinstance(head, s.Relation) and head.operators == ("in",):  # {x ∈ R | …}
            return s.Builder(head.sides[0], (head, *conditions))
        return s.Builder(head, conditions)

    def _name(self) -> s.Node:
        name = self._take().text
        if name == "frac":
            top = self._nested(self._argument)
            return s.quotient(top, self._nested(self._argument))
        if name == "sqrt":
            degree: s.Node = self._bracket() if self._at("[") else s.Number(Fraction(2))
            return s.Power(self._nested(self._radicand), s.Power(degree, s.MINUS_ONE))
        if name == "binom":
            return s.Call("binomial", (self._nested(self._argument), self._nested(self._argument)))
        if name == "pi":
            return s.Constant("pi")
        if name == "infty":
            return s.Constant("infinity")
        if name == "emptyset":
            return s.Group("{}", ())
        if name == "ldots":
            return s.Dots()
        if name == "mathbb":
            self._accept("{")
            letter = self._take()
            self._accept("}")
            return s.NamedSet(letter.text)
        if name in FUNCTIONS:
            return self._function(name)
        if name in ("sum", "prod"):
            return self._series(name)
        if name in ("lfloor", "lceil"):
            inside = self._nested(self._sum)
            self._expect("r" + name[1:])
            return s.Call(name[1:], (inside,))
        if name == "langle":
            items = self._nested(self._items)[0]
            self._expect("rangle")
            return s.Group("()", items)
        if name == "begin":
            return self._matrix()
        if name in DECORATIONS:
            return self._named(f"{name}({self._nested(self._argument)})")
        if name in FIGURES:
            return self._named(f"{name} {self._take().text}")
        if name in GREEK:
            return self._named(name)
        raise NotUnderstood(f"{name!r} stands where a value was expected")

    def _argument(self) -> s.Node:
        if self.next.kind == "number" and self.next.literal:
            token = self._one_digit()
            assert token.value is not None
            return s.Number(token.value)
        return self._atom()

    def _radicand(self) -> s.Node:
        return self._atom()

    def _function(self, name: str) -> s.Node:
        base = exponent = None
        while True:
            if name == "log" and base is None and self._accept("_"):
                base = self._nested(self._argument if self.next.kind == "number" else self._atom)
            elif exponent is None and self._accept("^"):
                exponent = self._exponent()
            else:
                break
        arguments = self._arguments()
        if name == "cis":
            value: s.Node = s.Sum((s.Call("cos", arguments), s.Product((s.Constant("i"), s.Call("sin", arguments)))))
            return value if exponent is None else s.Power(value, exponent)
        if base is not None:
            arguments = (*arguments, base)
        if exponent == s.MINUS_ONE and ("arc" + name) in FUNCTIONS:
            return s.Call("arc" + name, arguments)
        value = s.Call(_FUNCTION_SYNONYMS.get(name, name), arguments)
        return value if exponent is None else s.Power(value, exponent)

    def _arguments(self) -> tuple[s.Node, ...]:
        r"""``(x)``, or as far as products go without a sign: ``\sin 2x\cos x`` is sin(2x)·cos(x)."""
        if self._at("("):
            inside = self._nested(self._bracket)
            return inside.items if isinstance(inside, s.Group) and inside.brackets == "()" else (inside,)
        factors = [self._nested(lambda: self._mixed() or self._power())]
        while self._may_multiply() and not self._at("(", "|") and not (self.next.kind == "name" and self.next.text in FUNCTIONS):
            if isinstance(factors[-1], s.Call) and factors[-1].name in FUNCTIONS:
                break
            factors.append(self._nested(self._power))
        if isinstance(factors[0], s.Group) and factors[0].brackets == "{}" and len(factors) == 1:  # \\max\\{a, b\\}
            return factors[0].items
        return (factors[0] if len(factors) == 1 else s.Product(tuple(factors)),)

    def _series(self, kind: str) -> s.Node:
        self._expect("_")
        self._expect("{")
        index = self._take()
        self._expect("=")
        low = self._nested(self._sum)
        self._expect("}")
        self._expect("^")
        high = self._exponent()
        body = self._nested(self._product)
        if index.kind != "letter":
            raise NotUnderstood(f"{index.text!r} is no index of a sum")
        if index.text == "i":
            body = _with_index_i(body)
        return s.Series("sum" if kind == "sum" else "prod", index.text, low, high, body)

    def _matrix(self) -> s.Node:
        environment = self._environment()
        if environment == "array":
            self._expect("{")
            while not self._accept("}"):
                if self._take().kind == "end":
                    raise NotUnderstood("an array without an end")
        elif environment not in ("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "cases", "vmatrix", "aligned"):
            raise NotUnderstood(f"the environment {environment!r} is not known")
        rows: list[tuple[s.Node, ...]] = []
        cells: list[s.Node] = []
        while not self._at("end"):
            if self._accept("\\\\"):
                rows.append(tuple(cells))
                cells = []
            elif not self._accept("hline", "\\&", "&"):
                cells.append(self._nested(self._item))
            if len(rows) + len(cells) > MAX_ITEMS:
                raise TooLarge(f"a matrix of more than {MAX_ITEMS} rows or columns")
        if cells:
            rows.append(tuple(cells))
        self._take()
        if self._environment() != environment:
            raise NotUnderstood("an environment that ends as another")
        if not rows or len({len(row) for row in rows}) != 1:
            raise NotUnderstood("a matrix whose rows differ in length")
        if environment == "vmatrix":
            raise NotUnderstood("a determinant that is not computed")
        if environment == "cases" and len(rows[0]) == 1:
            return s.Group("", tuple(row[0] for row in rows), "and")
        return s.Matrix(tuple(rows))

    def _environment(self) -> str:
        self._expect("{")
        name = ""
        while not self._accept("}"):
            if self.next.kind == "end":
                raise NotUnderstood("an environment without a name")
            name += self._take().text
        return name


def _with_index_i(node: s.Node) -> s.Node:
    """Under a sum over i, i is no imaginary unit."""
    return s.Symbol("i") if node == s.Constant("i") else s.rebuild(node, _with_index_i)
