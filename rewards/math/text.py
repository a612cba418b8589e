r"""One spelling for an answer's text: no math delimiters, no LaTeX spacing, unicode as LaTeX. Linear in the text's length."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ", "0123456789+-=()n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ]+")
_ROOTS = str.maketrans({"√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] "})
_FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6),
    "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8), "⅑": (1, 9), "⅒": (1, 10),
}  # fmt: skip
_GREEK = (
    ("αβγδεζηθικλμ", "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu"),
    ("νξπρστυφχψω", "nu xi pi rho sigma tau upsilon phi chi psi omega"),
    ("ΓΔΘΛΞΠΣΦΨΩ", "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"),
)
_COMMANDS = {
    **{"±": "pm", "∓": "mp", "∞": "infty", "≤": "le", "⩽": "le", "≦": "le", "≥": "ge", "⩾": "ge", "≧": "ge", "≠": "ne", "≈": "approx"},
    **{"≡": "equiv", "∈": "in", "∉": "notin", "∪": "cup", "∩": "cap", "∖": "setminus", "∅": "emptyset", "⌀": "emptyset", "∑": "sum"},
    **{"∏": "prod", "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "⟨": "langle", "⟩": "rangle", "…": "ldots", "⋯": "cdots"},
    **{letter: name for letters, names in _GREEK for letter, name in zip(letters, names.split(), strict=True)},
}
_SIGNS = str.maketrans(
    {sign: rf"\frac{{{a}}}{{{b}}}" for sign, (a, b) in _FRACTIONS.items()}
    | {sign: rf"\{name} " for sign, name in _COMMANDS.items()}
    | {sign: rf"\mathbb{{{letter}}}" for sign, letter in zip("ℝℤℕℚℂ", "RZNQC", strict=True)}
    | dict.fromkeys("−–—‐‑", "-")
    | dict.fromkeys("×·⋅∙∗⁎", "*")
    | dict.fromkeys("÷∕⁄", "/")
    | dict.fromkeys("′’‘", "'")
    | dict.fromkeys("º˚∘", "°")
    | {"∣": "|", "∶": ":", "∼": "~"}
)

_THIN = r"\\[,;:> ]|~|\\(?:quad|qquad|enspace|thinspace|medspace|hfill|newline)(?![a-zA-Z])"
_REWRITES = (
    (re.compile(r"\s+"), " "),
    (
        re.compile(
            r"\\left\s*\\\{\s*\\begin\{(?:array|aligned|matrix)\}(?:\{[a-z|]*\})?((?:(?!\\end\{).)*)\\end\{[a-z]*\}\s*\\right\s*\.",
            re.DOTALL,
        ),
        r"\\begin{cases}\1\\end{cases}",
    ),
    (re.compile(r"\\(?:begin|end)\{(?:align|equation|gather|split|aligned|eqnarray)\*?\}"), " "),
    (re.compile(r"(?<!\\)&\s*(?==)"), ""),  # what an alignment is aligned by
    (re.compile(r"\\\\\s*\[[0-9.]+\s*(?:pt|ex|em|mm|cm)\]"), r"\\\\ "),  # extra space between rows
    (re.compile(r"\\\\\s*$"), ""),
    (re.compile(r"\\!\s*|\\(?:displaystyle|textstyle|limits|nolimits|phantom\{\})(?![a-zA-Z])|\\hspace\s*\{[^{}]*\}"), ""),
    (re.compile(r"\{\s*,\s*\}|(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))"), "\x00"),  # a comma that groups thousands, and surely no list's
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-zA-Z])"), r"\\binom"),
    (re.compile(r"\{\s*([:=<>])\s*\}"), r"\1"),
    (re.compile(r"\\(?:left|right)\s*\.(?![0-9])|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),  # math delimiters
    (re.compile(r"(?<!\\)\$"), " "),
    (re.compile(rf"(?<!\\)(?:{_THIN})"), "~"),
    (re.compile(r"\^\s*(?:\\(?:circ|degree)(?![a-zA-Z])|\{\s*\\(?:circ|degree)\s*\})|\\degree(?![a-zA-Z])|\\textdegree(?![a-zA-Z])"), "°"),
    (re.compile(r"\\(?:cdot|times|ast)(?![a-zA-Z])|\*\*(?=[^*])"), lambda match: "^" if match.group() == "**" else "*"),
    (re.compile(r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)"), "*"),
    (re.compile(r"\bRs\b\.?|\bINR\b"), "₹"),
    (re.compile(r"\\div(?![a-zA-Z])"), "/"),
    (re.compile(r"\^\s*(?:\\prime(?![a-zA-Z])|\{\s*\\prime\s*\})"), "'"),
    (re.compile(r"\\(?:leqslant|leq|leqq|le)(?![a-zA-Z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|geqq|ge)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|ne)(?![a-zA-Z])|\\not\s*=|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:mid|vert|lvert|rvert)(?![a-zA-Z])"), "|"),
    (re.compile(r"\\(?:lbrace|\{)"), r"\\{"),
    (re.compile(r"\\(?:rbrace|\})"), r"\\}"),
    (re.compile(r"\\lbrack(?![a-zA-Z])"), "["),
    (re.compile(r"\\rbrack(?![a-zA-Z])"), "]"),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\\(?:boxed|fbox|bm|boldsymbol|mathstrut)(?![a-zA-Z])"), ""),
    (re.compile(r"\x00\s*"), ""),
    (re.compile(r"[\s~]*~[\s~]*"), "~"),
    (re.compile(r"\s+"), " "),
)
_EDGE = " ~\n\t"
_LEAD = re.compile(
    r"(?:(?:the |my )?(?:final |correct )?(?:answer|solution|result)s?(?: (?:is|are))?\s*[:=]\s*|"
    r"(?:the )?(?:final )?(?:answer|solution)s? (?:is|are) |"
    r"\\text\s*\{[^{}]*(?:\b(?:is|are)|[:=])\s*\}|[=:~]\s*|\\(?:therefore|approx)(?![a-zA-Z])\s*)+",
    re.IGNORECASE,
)
_FINAL_STOP = re.compile(r"(?<![.])[.,;:]$")
_MARKDOWN = re.compile(r"^\*\*(.*)\*\*$|^`(.*)`$", re.DOTALL)
_BETWEEN_WORDS = re.compile(r"(?<![\w,])[ ~]+|[ ~]+(?!\w)|(?<=,)[ ~]+(?![0-9]{3}(?![0-9]))")
_LONE_BRACES = re.compile(r"(?<=[_^])\{(\w)\}")


@lru_cache(maxsize=1_024)
def canonical(text: str) -> str:
    r"""The answer in one spelling. Spaces that TeX shows (``\,`` or ``~``) are ``~``, as a unit often stands behind one."""
    if match := _MARKDOWN.match(text.strip()):
        text = match[1] or match[2] or ""
    if not text.isascii():
        text = _from_unicode(text)
    for pattern, spelling in _REWRITES:
        text = pattern.sub(spelling, text)
    text = text.strip(_EDGE)
    if match := _LEAD.match(text):
        text = text[match.end() :]
    return _FINAL_STOP.sub("", text.strip(_EDGE)).strip(_EDGE)


def _from_unicode(text: str) -> str:
    text = _SUPERSCRIPT.sub(lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda match: "_{" + match.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.translate(_ROOTS).translate(_SIGNS)
    return unicodedata.normalize("NFKC", text) if not text.isascii() else text  # full-width digits, mathematical letters, spaces


def squeezed(canonical_text: str) -> str:
    """The canonical text without the spaces that mean nothing; two answers of the same squeezed text are equal."""
    return _LONE_BRACES.sub(r"\1", _BETWEEN_WORDS.sub("", canonical_text).replace("~", " "))


# ---- plain words

_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:normal|bf|it|rm|sf|tt|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?)\s*\{([^{}]*)\}"
)
_PROSE = re.compile(r"[A-Za-z][A-Za-z'., \-]*[A-Za-z.]|[A-Za-z]")
_WORD = re.compile(r"[A-Za-z']+")
_ARTICLES = frozenset(("a", "an", "the"))
_SHORT_WORDS = frozenset(("no", "ok", "up", "go", "he", "we", "it", "is", "in", "of", "if", "or", "to", "by", "on", "at"))
_ROMAN = re.compile(r"(?!I$|V$|X$)[IVX]+")
_VARIABLE_RUNS = ("abcdef", "xyzuvwt", "pqrst", "mnkl", "ijk")  # letters that stand side by side in products


def plain_text(canonical_text: str) -> str:
    r"""The text without ``\text{…}`` around its words."""
    for _ in range(3):
        canonical_text = _TEXT_COMMAND.sub(r"\1", canonical_text)
    return canonical_text.replace("~", " ")


def as_phrase(canonical_text: str) -> str | None:
    """What can not be read as mathematics, but holds a word, as words for comparison: ``Row 1``. None if it holds none."""
    words = re.findall(r"[A-Za-z0-9.:]+", plain_text(canonical_text).lower())
    return " ".join(words) if any(len(word) > 2 and word.isalpha() for word in words) else None


def as_words(canonical_text: str, known: frozenset[str]) -> str | None:
    """The answer as plain words, in lower case and without articles: ``an Ellipse`` → ``ellipse``; None if it is not plain words.

    Args:
        known: words that belong to mathematics (``pi``, ``sin``).
    """
    text = plain_text(canonical_text).strip()
    if not _PROSE.fullmatch(text):
        return None
    words = [word for word in _WORD.findall(text) if word.lower() not in _ARTICLES or word == "A"]
    if not any(_is_word(word, known) for word in words):
        return None
    return " ".join(word.lower() for word in words)


def _is_word(word: str, known: frozenset[str]) -> bool:
    lower = word.lower()
    if word in known or lower in known or len(word) < 2 or lower in ("and", "or"):
        return False
    if _ROMAN.fullmatch(word):
        return True
    if len(word) == 2:
        return lower in _SHORT_WORDS
    return not (word.isupper() or any(set(word) <= set(run) for run in _VARIABLE_RUNS))  # ABC: a triangle, or three choices
