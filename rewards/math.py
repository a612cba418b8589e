r"""The accuracy reward of mathematics: take the answer out of a completion and decide whether it equals the gold answer.

Equality is exact – 0.3333 is not 1/3, 28% is neither 28 nor 0.28 – and symmetric. The steps go from cheap to dear: the same text,
the same number (``Fraction``), the same value to 25 digits (a mismatch is final), the same expression (SymPy).

Nothing that a model wrote is ever evaluated as code: a small parser of our own builds the SymPy objects (``sympify`` and
``parse_expr`` are ``eval``). And nothing is computed before its size is known: ``9^{9^{9^{9}}}`` costs a microsecond.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from grpo.types import Completion, Outcome, Problem, Score

if TYPE_CHECKING:
    import sympy

MAX_CHARS = 2_000
MAX_NESTING = 50
MAX_EXPONENT = 10_000
MAX_DIGITS = 4_300  # of any integer, written or computed: Python's own limit for text → int

_PROBE_DIGITS = 30
_PROBE_EPS = Fraction(1, 10**25)
_SIMPLIFY_OPS = 100  # what SymPy simplifies in well under a second
_SIMPLIFY_EXPONENT = 30


class _NotUnderstood(ValueError):
    """The text is not an expression of the small language below."""


class TooLarge(ValueError):
    """The text is an expression, but one that nobody should compute."""


# ---- the reward ----------------------------------------------------------------------------------------------------------------


def accuracy(completion: Completion, problem: Problem) -> Score:
    """1 if the completion's answer equals the problem's, else 0; ``wrong_format`` if it gives none, or none that can be read."""
    answer = extract_answer(completion.text)
    if answer is None:
        return Score(value=0.0, outcome=Outcome.wrong_format)
    try:
        return Score(value=float(_equal(problem.answer, answer)), detail=answer)
    except _NotUnderstood:
        return Score(value=0.0, outcome=Outcome.wrong_format, detail=answer)
    except TooLarge:
        return Score(value=0.0, detail=answer)


def _warm_up() -> None:
    import sympy  # noqa: F401 – half a second, paid before the first task


accuracy.timeout_value = 0.0  # type: ignore[attr-defined]  # an answer that takes too long to compare is the model's doing: wrong
accuracy.warm_up = _warm_up  # type: ignore[attr-defined]


def math_equal(gold: str, answer: str) -> bool:
    """Whether two answers are the same mathematical object; False if one of them can not be read or is too large to compute."""
    try:
        return _equal(gold, answer)
    except (_NotUnderstood, TooLarge):
        return False


def check_gold(answer: str) -> str | None:
    """Why this gold answer can not be compared with anything but its own spelling; None if it can. For use when data is loaded."""
    text = normalize(answer)
    if not text:
        return "the answer is empty"
    try:
        if exact_number(text) is None:
            _parse(text)
    except (_NotUnderstood, TooLarge) as error:
        return f"the answer {answer[:80]!r} can not be compared: {error}"
    return None


# ---- from a completion to an answer --------------------------------------------------------------------------------------------

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)  # \\.: an escaped brace is text


def extract_answer(text: str) -> str | None:
    r"""The answer that a completion commits to: what stands in its last ``<answer>``, else in its last ``\boxed``, after thinking.

    Inside ``<answer>``, a box is the answer. Nothing within ``<think>`` counts, nor after a ``<think>`` that never ends.
    """
    said = text.rpartition("</think>")[2].partition("<think>")[0]
    tagged = _ANSWER.findall(said)
    if tagged:
        boxed = _last_box(tagged[-1])
        return (tagged[-1] if boxed is None else boxed).strip() or None
    return (_last_box(said) or "").strip() or None


def _last_box(text: str) -> str | None:
    """The content of the last box that is closed (a truncated completion may end in an open one). One pass, whatever the text."""
    open_braces: list[tuple[int, bool]] = []  # where its content starts; whether it is a box
    last, content = -1, None
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace.group() == "{":
            open_braces.append((brace.end(), bool(brace["box"])))
        elif brace.group() == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and start > last:
                last, content = start, text[start : brace.start()]
    return content


# ---- text ----------------------------------------------------------------------------------------------------------------------

_SPELLINGS = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt ", "\u00a0": " "})
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"\{\s*,\s*\}|(?<=\d)\\,(?=\d{3}(?!\d))"), ","),  # thousands
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[ ,;:()\[\]]|~"), " "),  # spacing and math delimiters
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\([%$])"), r"\1"),
    (re.compile(r"\*\*"), "^"),
)
_NEEDLESS_SPACE = re.compile(r"(?<![\w,])\s+|\s+(?!\w)|(?<=,)\s+(?!\d{3}(?!\d))")  # not between words, nor as in "1, 234"


def normalize(text: str) -> str:
    """The same answer in one spelling: no math delimiters, no currency sign, no LaTeX spacing, no full stop at the end."""
    if len(text) > MAX_CHARS:
        return text  # the parser will say that it is too long
    text = text.translate(_SPELLINGS)
    for pattern, spelling in _COMMANDS:
        text = pattern.sub(spelling, text)
    return _NEEDLESS_SPACE.sub("", text.replace("$", "")).strip().rstrip(".").strip()


# ---- numbers -------------------------------------------------------------------------------------------------------------------

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_DECIMAL = re.compile(rf"(?P<sign>[+-]?)\s*(?P<digits>{_UNSIGNED})(?:[eE](?P<exponent>[+-]?\d+))?")
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:(?P<whole>\d+)(?:\s+|(?=\\)))?"
    rf"(?:(?P<a>{_UNSIGNED})/(?P<b>{_UNSIGNED})|\\frac\{{(?P<c>[+-]?\d+)\}}\{{(?P<d>\d+)\}}|\\frac\s*(?P<e>\d)\s*(?P<f>\d))"
)


def exact_number(text: str) -> Fraction | None:
    r"""A normalised text that is a number: ``-1,080.50``, ``4.4e7``, ``3/4``, ``\frac{3}{4}``, ``2 1/2``. None if it is not one.

    Raises:
        TooLarge: more digits than are ever computed.
    """
    if match := _DECIMAL.fullmatch(text):
        value = _decimal(match["digits"], match["exponent"] or "0")
    elif match := _FRACTION.fullmatch(text):
        top, bottom = (_decimal(match[a] or match[c] or match[e], "0") for a, c, e in (("a", "c", "e"), ("b", "d", "f")))
        if bottom == 0 or (match["whole"] is not None and not 0 <= top < bottom):
            return None
        value = _decimal(match["whole"] or "0", "0") + top / bottom
    else:
        return None
    return -value if match["sign"] == "-" else value


def _decimal(digits: str, exponent: str) -> Fraction:
    digits = digits.replace(",", "")
    if len(digits) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent)) + len(digits) > MAX_DIGITS:
        raise TooLarge(f"a number of more than {MAX_DIGITS} digits")
    return Fraction(digits if digits[-1] != "." else digits[:-1]) * Fraction(10) ** int(exponent)


# ---- equality ------------------------------------------------------------------------------------------------------------------


def _equal(gold: str, answer: str) -> bool:
    """
    Raises:
        _NotUnderstood: the answer is not an expression. (A gold that is none equals nothing but its own spelling.)
        TooLarge: one of them is too large to compute.
    """
    gold, answer = normalize(gold), normalize(answer)
    if gold == answer:
        return bool(gold)
    left, right = exact_number(gold), exact_number(answer)
    if left is not None and right is not None:
        return left == right
    right_expression = _parse(answer) if right is None else _rational(right)
    try:
        left_expression = _parse(gold) if left is None else _rational(left)
    except _NotUnderstood:
        return False
    try:
        return _same_expression(left_expression, right_expression)
    except (MemoryError, OverflowError, RecursionError) as error:
        raise TooLarge(f"too large to compare ({type(error).__name__})") from error


def _same_expression(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Equal as expressions: numeric probes first, since most answers are wrong and a mismatch is final; then SymPy's proof."""
    import sympy

    if left == right:
        return True
    if any(_differ(left, right, point) for point in _points(left.free_symbols | right.free_symbols)):
        return False
    difference = left - right
    return _is_small(difference) and sympy.simplify(difference) == 0


def _points(symbols: set[sympy.Symbol]) -> Iterator[dict[sympy.Symbol, sympy.Rational]]:
    """Two fixed points: positive (roots stay real), with no small relation between their coordinates."""
    import sympy

    for first in (30, 80):  # 113/97, 127/97, 131/97, … and 409/97, 419/97, …
        yield {symbol: sympy.Rational(sympy.prime(first + index), 97) for index, symbol in enumerate(sorted(symbols, key=str))}


def _differ(left: sympy.Expr, right: sympy.Expr, point: dict[sympy.Symbol, sympy.Rational]) -> bool:
    """Whether two values differ in their first 25 digits. False if that can not be told: both vanish, or one is not finite, here."""
    a, b = left.evalf(_PROBE_DIGITS, subs=point), right.evalf(_PROBE_DIGITS, subs=point)
    if not (a.is_finite and b.is_finite):
        return False
    scale = max(abs(a), abs(b))
    return bool(scale > _PROBE_EPS and abs(a - b) > _PROBE_EPS * scale)


def _is_small(expression: sympy.Expr) -> bool:
    import sympy

    exponents = [abs(power.exp) for power in expression.atoms(sympy.Pow) if power.exp.is_Rational]
    return expression.count_ops() <= _SIMPLIFY_OPS and max(exponents, default=0) <= _SIMPLIFY_EXPONENT


# ---- the parser ----------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(rf"\s*(?:(?P<number>(?:{_UNSIGNED})(?:[eE][+-]?\d+(?!\w))?)|(?P<word>\\?[a-zA-Z]+)|(?P<sign>[-+*/^(){{}}\[\]%]))")


def _parse(text: str) -> sympy.Expr:
    """A normalised text → a SymPy expression, built object by object.

    Raises:
        _NotUnderstood: the text is not an expression.
        TooLarge: it is too long, too deep, or a number in it is too large.
    """
    if len(text) > MAX_CHARS:
        raise TooLarge(f"{len(text)} characters; at most {MAX_CHARS} are read")
    parser = _Parser(tuple(_tokens(text)))
    expression = parser.sum()
    if parser.kind == "%":
        expression = _checked(expression * _symbol("%"))  # a unit like any letter: 28% equals 28.0%, and not 28
        parser.take()
    if parser.kind != "end":
        raise _NotUnderstood(f"{parser.text!r} was not expected")
    return expression


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # number, letter, word (a LaTeX command or a name), end, or the sign itself
    text: str


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _NotUnderstood(f"{text[position:].strip()[:20]!r} can not be read")
        position = match.end()
        if number := match["number"]:
            yield _Token("number", number)
        elif word := match["word"]:
            yield _Token("letter" if len(word) == 1 else "word", word.removeprefix("\\"))
        else:
            yield _Token(match["sign"], match["sign"])
    yield _Token("end", "the end")


class _Parser:
    r"""Recursive descent, one method a rule. Every operation checks the size of its result, or of its operands, first.

    ::

        sum     = product (("+" | "-") product)*
        product = signed (("*" | "/") signed | power)*        the second is a product without a sign: 2x, 3(x+1), 2\sqrt{3}
        signed  = ("+" | "-") signed | power
        power   = atom ("^" signed)?
        atom    = number | letter | pi | "(" sum ")" | "{" sum "}" | sqrt argument | \sqrt[number] argument | \frac argument argument
    """

    def __init__(self, tokens: tuple[_Token, ...]) -> None:
        self._tokens = tokens
        self._position = 0
        self._depth = 0

    @property
    def kind(self) -> str:
        return self._tokens[self._position].kind

    @property
    def text(self) -> str:
        return self._tokens[self._position].text

    def take(self, kind: str | None = None) -> str:
        if kind is not None and self.kind != kind:
            raise _NotUnderstood(f"{self.text!r} stands where {kind!r} was expected")
        self._position += 1
        return self._tokens[self._position - 1].text

    def sum(self) -> sympy.Expr:
        total = self._product()
        while self.kind in ("+", "-"):
            sign = self.take()
            term = self._product()
            total = _checked(total + term if sign == "+" else total - term)
        return total

    def _product(self) -> sympy.Expr:
        left = self.kind
        product = self._signed()
        while True:
            if self.kind in ("*", "/"):
                sign, left = self.take(), self.kind
                factor = self._signed()
                product = _checked(product * factor) if sign == "*" else _quotient(product, factor)
            elif self._multiplies(left):
                left = self.kind
                product = _checked(product * self._power())
            else:
                return product

    def _multiplies(self, left: str) -> bool:
        r"""Whether the next factor may follow without a sign. Not ``2 3``, ``2\frac12`` (a mixed number?), ``f(x)``, ``xy`` (a word?)."""
        if self.kind == "word":
            return self.text in ("pi", "sqrt") or (self.text == "frac" and left not in ("number", "-", "+"))
        if self.kind == "(":
            return left != "letter"
        return self.kind == "letter" and left != "letter"

    def _signed(self) -> sympy.Expr:
        if self.kind not in ("+", "-"):
            return self._power()
        sign = self.take()
        value = self._nested(self._signed)
        return -value if sign == "-" else value

    def _power(self) -> sympy.Expr:
        base = self._atom()
        if self.kind != "^":
            return base
        self.take()
        return _power(base, self._nested(self._signed))

    def _atom(self) -> sympy.Expr:
        import sympy

        if self.kind == "number":
            value = exact_number(self.take())
            assert value is not None
            return _rational(value)
        if self.kind == "letter":
            return _symbol(self.take())
        if self.kind in ("(", "{"):
            return self._bracketed()
        if self.kind == "word":
            word = self.take()
            if word == "pi":
                return sympy.pi
            if word == "sqrt":
                return self._root()
            if word == "frac":
                return _quotient(self._argument(), self._argument())
            raise _NotUnderstood(f"the word {word!r} is not known")
        raise _NotUnderstood(f"{self.text!r} stands where a value was expected")

    def _bracketed(self) -> sympy.Expr:
        opening = self.take()
        inside = self._nested(self.sum)
        self.take({"(": ")", "{": "}", "[": "]"}[opening])
        return inside

    def _root(self) -> sympy.Expr:
        import sympy

        degree = self._bracketed() if self.kind == "[" else sympy.Integer(2)
        return _power(self._argument(), _quotient(sympy.Integer(1), degree))

    def _argument(self) -> sympy.Expr:
        r"""What a command applies to: a bracket, or as TeX reads ``\frac12``, one digit or letter."""
        import sympy

        if self.kind == "number" and self.text.isdigit():
            digit, rest = self.text[0], self.text[1:]
            here = self._position
            unread = (_Token("number", rest),) if rest else ()
            self._tokens = (*self._tokens[: here + 1], *unread, *self._tokens[here + 1 :])
            self.take()
            return sympy.Integer(int(digit))
        return self._nested(self._atom)

    def _nested(self, rule: Callable[[], sympy.Expr]) -> sympy.Expr:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise TooLarge(f"nested more than {MAX_NESTING} deep")
        value = rule()
        self._depth -= 1
        return value


def _symbol(name: str) -> sympy.Symbol:
    import sympy

    return sympy.Symbol(name)


def _rational(value: Fraction) -> sympy.Rational:
    import sympy

    return sympy.Rational(value.numerator, value.denominator)


def _quotient(top: sympy.Expr, bottom: sympy.Expr) -> sympy.Expr:
    if bottom == 0:
        raise _NotUnderstood("a division by zero")
    return _checked(top / bottom)


def _power(base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
    """``base ** exponent`` if its size allows. SymPy multiplies out the numbers in a base, so they all count."""
    import sympy

    if base == 0 and not exponent.is_positive:
        raise _NotUnderstood("a power of zero that is not defined")
    if exponent.is_Rational:
        magnitude = abs(exponent)
        digits = math.fsum(_log10(number) for number in base.atoms(sympy.Rational))
        if magnitude > MAX_EXPONENT or float(magnitude) * digits > MAX_DIGITS:
            raise TooLarge(f"an exponent above {MAX_EXPONENT}, or a power of more than {MAX_DIGITS} digits")
    return _checked(base**exponent)


def _log10(number: sympy.Rational) -> float:
    """log₁₀ of the larger of numerator and denominator; an integer of any size has one."""
    return max(math.log10(abs(int(number.p)) or 1), math.log10(int(number.q)))


def _checked(expression: sympy.Expr) -> sympy.Expr:
    if expression.is_Rational and _log10(expression) > MAX_DIGITS:
        raise TooLarge(f"a number of more than {MAX_DIGITS} digits")
    return expression
