r"""Canonical text → tokens. What a word means – a function, a unit, letters that are multiplied – is decided here, by tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from grpo.rewards.math.limits import NotUnderstood
from grpo.rewards.math.numbers import decimal, recurring
from grpo.rewards.math.units import is_unit
from grpo.rewards.math.vocabulary import COMMANDS, FUNCTIONS, PLAIN_NAMES, PREFIXES, SCALES, SEPARATORS, SYNONYMS

Kind = Literal["number", "letter", "name", "word", "sign", "end"]

_NUMBER = r"(?:[0-9]+(?:\.(?![0-9]*\.)[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+(?![0-9A-Za-z.]))?"
_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
_SPACED = r"[0-9]{1,3}(?:[ ][0-9]{3})+(?![0-9/ ])(?:\.[0-9]+)?"
_TOKEN = re.compile(
    rf"(?P<space>[ ~]*)(?:(?P<recurring>[0-9]*\.[0-9]*\\(?:overline|bar|dot)\s*(?:\{{[0-9]+\}}|[0-9]))"
    rf"|(?P<grouped>{_GROUPED})|(?P<spaced>{_SPACED})|(?P<number>{_NUMBER})"
    r"|\\(?P<text>(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?))\s*\{(?P<content>[^{}]*)\}"
    r"|\\(?P<command>[a-zA-Z]+)|(?P<word>[A-Za-z]+)"
    r"|(?P<sign>\\[{}%$&#|_\\]|[-+*/^_(){}\[\]=<>!|,;:%&°'$€£¥₹¢?]))"
)
_RECURRING = re.compile(r"([0-9]*)\.([0-9]*)\\[a-z]+\s*\{?([0-9]+)\}?")


@dataclass(frozen=True, slots=True)
class Token:
    kind: Kind
    text: str
    value: Fraction | None = None  # of a number
    thin: bool = False  # a space that TeX shows stands before it
    spaced: bool = False  # any space
    literal: bool = False  # a number of digits only, which TeX would take one by one
    prose: bool = False  # within \\text: never letters that are multiplied


END = Token("end", "the end")


def tokenize(text: str, grouped: bool = True) -> tuple[Token, ...]:
    """
    Args:
        grouped: read ``1,625`` as one number, outside of brackets; else as two.

    Raises:
        NotUnderstood: a character that no answer holds.
        TooLarge: a number of too many digits.
    """
    return (*_tokens(text, grouped), END)


def _tokens(text: str, grouped: bool, prose: bool = False) -> Iterator[Token]:
    position = depth = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            rest = text[position:].strip(" ~")
            if not rest:
                return
            raise NotUnderstood(f"{rest[:20]!r} can not be read")
        space = match["space"]
        thin, spaced = "~" in space, bool(space)
        position = match.end()
        if digits := match["grouped"] or match["spaced"]:
            if match["spaced"] or (grouped and depth == 0):
                yield Token("number", digits, decimal(digits.replace(" ", "")), thin, spaced)
            else:
                position = match.start() + len(space) + digits.index(",")
                yield Token("number", digits[: digits.index(",")], decimal(digits[: digits.index(",")]), thin, spaced)
        elif number := match["number"]:
            mantissa, _, exponent = number.lower().partition("e")
            yield Token("number", number, decimal(mantissa, exponent or "0"), thin, spaced, literal=number.isdigit())
        elif match["recurring"]:
            parts = _RECURRING.fullmatch(match["recurring"])
            assert parts is not None
            yield Token("number", match["recurring"], recurring(*parts.groups()), thin, spaced)
        elif match["text"]:
            yield from _text(match["text"], match["content"], thin, spaced)
        elif command := match["command"]:
            yield from _command(command, thin, spaced)
        elif word := match["word"]:
            yield from _word(word, prose, thin, spaced)
        else:
            sign = match["sign"]
            depth += (sign in ("(", "[", "\\{")) - (sign in (")", "]", "\\}"))
            yield Token("sign", {"\\%": "%", "\\$": "$"}.get(sign, sign), None, thin, spaced)


def _text(command: str, content: str, thin: bool, spaced: bool) -> Iterator[Token]:
    inside = content.strip(" ~")
    thin = thin or content[:1] in (" ", "~")
    if command.startswith("operatorname") and inside in FUNCTIONS | set(SYNONYMS):
        yield from _command(inside, thin, spaced)
    elif len(inside) == 1 and inside.isalpha():  # \mathrm{e}, \text{A}; behind a number, a unit: \mathrm{~m}
        yield Token("letter", inside, None, thin or command != "mathbf", spaced)
    else:
        yield from _tokens(inside, grouped=False, prose=True)


def _command(name: str, thin: bool, spaced: bool) -> Iterator[Token]:
    name = SYNONYMS.get(name, name)
    if name in SEPARATORS:
        yield Token("word", name, None, thin, spaced)
    elif name in PLAIN_NAMES or name in COMMANDS:
        yield Token("name", name, None, thin, spaced)
    elif name in ("imath", "jmath"):
        yield Token("letter", name[0], None, thin, spaced)
    elif name == "euro":
        yield Token("sign", "€", None, thin, spaced)
    elif name == "pounds":
        yield Token("sign", "£", None, thin, spaced)
    elif name == "lbrace":
        yield Token("sign", "\\{", None, thin, spaced)
    elif name == "percent":
        yield Token("sign", "%", None, thin, spaced)
    elif name not in ("rm", "bf", "it", "displaystyle", "operatorname"):
        raise NotUnderstood(f"the command \\{name} is not known")


def _word(word: str, prose: bool, thin: bool, spaced: bool) -> Iterator[Token]:
    lower = word.lower()
    if len(word) == 1:
        yield Token("letter", word, None, thin or prose, spaced)
    elif lower in SEPARATORS:
        yield Token("word", lower, None, thin, spaced)
    elif lower in ("percent", "pct", "percents"):
        yield Token("sign", "%", None, thin, spaced)
    elif lower in ("degree", "degrees", "deg"):
        yield Token("sign", "°", None, thin, spaced)
    elif lower == "to":
        yield Token("sign", ":", None, thin, spaced)
    elif lower in SCALES:
        yield Token("number", lower, Fraction(SCALES[lower]), thin, spaced)
    elif not prose and (name := SYNONYMS.get(word, word)) in PLAIN_NAMES | COMMANDS:
        yield Token("name", name, None, thin, spaced)
    elif not prose and not is_unit(word) and (name := next((n for n in PREFIXES if word.startswith(n)), "")):
        yield Token("name", name, None, thin, spaced)
        yield from _word(word[len(name) :], prose, False, False)
    else:
        yield Token("word", word, None, thin or prose, spaced, prose=prose)


def split_letters(word: str) -> tuple[Token, ...] | None:
    """A short word as the product of its letters: ``def`` → d·e·f. None if it is too long to be one."""
    return tuple(Token("letter", letter) for letter in word) if len(word) <= 4 else None
