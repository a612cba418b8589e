r"""The parts of a completion, and text cut into units that can be counted. One pass over the text each, whatever it holds.

A completion of the R1 kind is ``<think>…</think> <answer>…</answer>``. The rewards read one of four parts of it:

* ``all``: the text as it is.
* ``think``: the chain of thought, from the first ``<think>`` to the last ``</think>``, or to the end if it was cut off.
* ``final``: what follows the last ``</think>``; all of it where there is no thinking; none where the thinking never ends.
* ``answer``: the last ``<answer>…</answer>`` of the final part.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from grpo.types import Completion, Problem

PARTS = ("all", "think", "final", "answer")


def begins_in_thought(problem: Problem) -> bool:
    """Whether the prompt ends with ``<think>``, so that the completion begins inside it."""
    return problem.prompt.rstrip().endswith("<think>")


def part_of(completion: Completion, problem: Problem, name: str) -> str | None:
    """The part of a completion with that name (of ``PARTS``); None if the completion has none."""
    text = completion.text
    if name == "all":
        return text
    opened = begins_in_thought(problem)
    if name == "think":
        return think_part(text, opened)
    final = final_part(text, opened)
    return final if name == "final" or final is None else answer_part(final)


def think_part(text: str, opened: bool = False) -> str | None:
    before, closed, _ = text.rpartition("</think>")
    thought = before if closed else text
    _, start, inside = thought.partition("<think>")
    if opened or (closed and not start):
        return thought
    return inside if start else None


def final_part(text: str, opened: bool = False) -> str | None:
    _, closed, after = text.rpartition("</think>")
    if closed:
        return None if "<think>" in after else after
    return None if opened or "<think>" in text else text


def answer_part(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def is_blank(text: str) -> bool:
    """Whether nothing of it is visible: white space, control and format characters (zero-width space, …) only."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def column(problem: Problem, name: str) -> str:
    """A column of the problem as text.

    Raises:
        ValueError: the problem has no such column, or it is not text.
    """
    value = problem.columns.get(name)
    if not isinstance(value, str):
        have = ", ".join(sorted(problem.columns)) or "none"
        what = "has no column" if value is None else f"has a {type(value).__name__}, not text, in its column"
        raise ValueError(f"problem {problem.id!r} {what} {name!r}; its columns are: {have}")
    return value


@dataclass(frozen=True, slots=True)
class Box:
    r"""One ``\boxed{…}``: where it begins and ends, and what is in it. ``Box(start=7, end=16, content="C")``"""

    start: int
    end: int
    content: str


_BRACE = re.compile(r"(?P<box>\\f?boxed\s*\{)|\\.|[{}]", re.DOTALL)  # \\.: an escaped brace is text


def boxes(text: str) -> list[Box]:
    r"""The outermost closed ``\boxed{…}`` of a text, in their order."""
    found: list[Box] = []
    open_braces: list[tuple[int, int, bool]] = []  # where the brace's command begins, where its content does, whether it is a box
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace.group() == "{":
            open_braces.append((brace.start(), brace.end(), bool(brace["box"])))
        elif brace.group() == "}" and open_braces:
            start, inside, is_box = open_braces.pop()
            if is_box:
                while found and found[-1].start > start:
                    found.pop()  # it stands inside this one
                found.append(Box(start=start, end=brace.end(), content=text[inside : brace.start()]))
    return found


# ---- words ---------------------------------------------------------------------------------------------------------------------

# Scripts in blocks of Unicode, their digits and punctuation left out. Those written without spaces have no words to see: there,
# a character is a word, as Unicode's default word boundaries (UAX #29) have it.
_SPACED = {
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u036f\u1e00-\u1eff",
    "Greek": "\u0370-\u0373\u0376\u0377\u037b-\u037d\u0386\u0388-\u03ff\u1f00-\u1fff",
    "Cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff",
    "Armenian": "\u0531-\u0556\u0561-\u0587",
    "Hebrew": "\u0591-\u05bd\u05c1\u05c2\u05d0-\u05f2",
    "Arabic": "\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06e1-\u06e8\u06ea-\u06ef\u06fa-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc",
    "Devanagari": "\u0900-\u0963\u0971-\u097f",
    "Bengali": "\u0980-\u09e3\u09f0\u09f1",
    "Gurmukhi": "\u0a01-\u0a51\u0a59-\u0a5e\u0a70-\u0a75",
    "Gujarati": "\u0a81-\u0ae3",
    "Tamil": "\u0b82-\u0bd7",
    "Telugu": "\u0c00-\u0c63",
    "Georgian": "\u10a0-\u10fa\u10fc-\u10ff\u1c90-\u1cbf\u2d00-\u2d2f",
    "Hangul": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
}
_UNSPACED = {
    "Han": "\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f",
    "Kana": "\u3041-\u3096\u309d\u309e\u30a1-\u30fa\u30fc-\u30fe\u31f0-\u31ff\uff66-\uff9d",
    "Thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
}
SCRIPTS = (*_SPACED, *_UNSPACED)

_WORD = re.compile(
    "|".join(
        [
            r"(?P<name>https?://\S+|[A-Za-z_]*[\d_][\w]*|[a-z]+[A-Z]\w*|\\[A-Za-z]+|[A-Za-z]+(?=\())",  # identifiers: x1, n_max, f(
            *(rf"(?P<{script}>[{chars}]+(?:['’][{chars}]+)*)" for script, chars in _SPACED.items()),
            *(rf"(?P<{script}>[{chars}])" for script, chars in _UNSPACED.items()),
            r"(?P<other>[^\W\d_]+)",
            r"(?P<stop>[.!?。！？\n])",
        ]
    )
)


@dataclass(frozen=True, slots=True)
class Word:
    """``Word(text="Gleichung", script="Latin", sentence=3)``: sentences end at a full stop or a line's end, counted from 0."""

    text: str
    script: str  # of SCRIPTS, or "other"
    sentence: int


def words(text: str) -> Iterator[Word]:
    """The words of a text. Numbers, identifiers (``x1``, ``n_max``, ``isPrime``, ``f(``, TeX commands) and web addresses are none."""
    sentence = 0
    for match in _WORD.finditer(unicodedata.normalize("NFKC", text)):
        kind = match.lastgroup
        assert kind is not None  # every alternative is named
        if kind == "stop":
            sentence += 1
        elif kind != "name":
            yield Word(match.group(), kind, sentence)


_UNIT = re.compile(rf"[{''.join(_UNSPACED.values())}\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff]|[^\s{''.join(_UNSPACED.values())}]+")


def units(text: str) -> list[str]:
    """What stands between spaces, in lower case; of scripts written without spaces, each character."""
    return _UNIT.findall(text.lower())
