r"""A text that is nothing but a number → ``Fraction``, without a parse. Most answers end here."""

from __future__ import annotations

import re
from fractions import Fraction

from grpo.rewards.math.limits import MAX_DIGITS, TooLarge

UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_DECIMAL = re.compile(rf"(?P<digits>{UNSIGNED})(?:[eE](?P<e>[+-]?[0-9]+)|\*10\^(?:\{{(?P<brace>[+-]?[0-9]+)\}}|(?P<bare>-?[0-9]+)))?")
_RECURRING = re.compile(r"(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)(?:\\overline|\\bar|\\dot)\s*(?:\{(?P<cycle>[0-9]+)\}|(?P<digit>[0-9]))")
_FRACTION = re.compile(
    r"(?:(?P<whole>[0-9]+)(?: |(?=\\)))?"
    rf"(?:(?P<a>{UNSIGNED})/(?P<b>{UNSIGNED})|\\frac\{{(?P<c>[+-]?[0-9]+)\}}\{{(?P<d>[+-]?[0-9]+)\}}|\\frac(?P<e>[0-9])(?P<f>[0-9]))"
)
_MOST_E = 4  # digits of a decimal exponent


def exact_number(text: str) -> Fraction | None:
    r"""The number that a squeezed text is, or None: ``-1,080.50``, ``4.4e7``, ``\frac{3}{4}``, ``2 1/2``, ``0.\overline{3}``, ``15\%``.

    Raises:
        TooLarge: more digits than are ever computed.
    """
    negative = text.startswith("-")
    text = text[1:].lstrip() if text[:1] in ("-", "+") else text
    percent = text.endswith("%")
    if percent:
        text = text[:-1].removesuffix("\\")
    if match := _DECIMAL.fullmatch(text):
        value = decimal(match["digits"], match["e"] or match["brace"] or match["bare"] or "0")
    elif match := _FRACTION.fullmatch(text):
        found = _fraction(match)
        if found is None:
            return None
        value = found
    elif match := _RECURRING.fullmatch(text):
        value = recurring(match["whole"], match["fixed"], match["cycle"] or match["digit"])
    else:
        return None
    value = value / 100 if percent else value
    return -value if negative else value


def _fraction(match: re.Match[str]) -> Fraction | None:
    top = _signed(match["a"] or match["c"] or match["e"])
    bottom = _signed(match["b"] or match["d"] or match["f"])
    if bottom == 0 or (match["whole"] is not None and not 0 <= top < bottom):  # 4 10/3 is no mixed number
        return None
    return decimal(match["whole"] or "0") + top / bottom


def _signed(text: str) -> Fraction:
    return -decimal(text[1:]) if text[0] == "-" else decimal(text.removeprefix("+"))


def decimal(digits: str, exponent: str = "0") -> Fraction:
    """``1,080.5`` times a power of ten.

    Raises:
        TooLarge: more than ``MAX_DIGITS`` digits.
    """
    digits = digits.replace(",", "")
    if len(digits) > MAX_DIGITS or len(exponent.lstrip("+-")) > _MOST_E or abs(int(exponent)) + len(digits) > MAX_DIGITS:
        raise TooLarge(f"a number of more than {MAX_DIGITS} digits")
    return Fraction(digits.removesuffix(".")) * Fraction(10) ** int(exponent)


def recurring(whole: str, fixed: str, cycle: str) -> Fraction:
    """``whole.fixed cycle cycle …``. The cycle of length c after f digits is worth cycle / (10^f · (10^c − 1)).

    Raises:
        TooLarge: more than ``MAX_DIGITS`` digits.
    """
    if len(whole) + len(fixed) + len(cycle) > MAX_DIGITS:
        raise TooLarge(f"a number of more than {MAX_DIGITS} digits")
    return Fraction(int((whole + fixed) or "0"), 10 ** len(fixed)) + Fraction(int(cycle), 10 ** len(fixed) * (10 ** len(cycle) - 1))
