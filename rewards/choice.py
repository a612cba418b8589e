r"""The accuracy reward of multiple choice: which letter does a completion commit to?

The letter is read where the completion states it – ``\boxed{C}``, "the answer is (C)", "Answer: **C**", "C is correct", 答案是C –
and the last statement wins; else from an answer that is nothing but a choice (``C``, ``(C)``, ``C. Paris``, ``Paris``). Letters
that are merely mentioned ("B and D are too small") do not count. A statement of two letters ("A or C", "A, but maybe C") is a
hedge and never right.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from grpo.rewards.arguments import checked_by, column
from grpo.rewards.text import answer_part, boxes, part_of
from grpo.types import Completion, Outcome, Problem, Score

Options = Mapping[str, str]  # letter → the option's text

_LINE_CHARS = 400  # an answer of more characters is no mere choice


def _check(letters: str, options: str | None) -> None:
    if not isinstance(letters, str) or not re.fullmatch("[A-Z]{2,}", letters) or len(set(letters)) != len(letters):
        raise ValueError(f"letters is {letters!r}; it must be different capital letters, e.g. ABCDE")
    column("options", options)


@checked_by(_check)
def choice(completion: Completion, problem: Problem, letters: str = "ABCDE", options: str | None = None) -> Score:
    """1 if the completion commits to the letter of the problem's answer, else 0; ``wrong_format`` if it commits to none.

    Read is what stands in the last ``<answer>…</answer>``, else what follows the thinking.

    Args:
        letters: the letters that there are.
        options: the column with the options' texts, so that an answer in their words counts too: a list in the order of the
            letters, a mapping from letter to text, or ``{label: [...], text: [...]}``.
    """
    _check(letters, options)
    texts = _options(problem, options, letters) if options else {}
    gold = Reader(letters, texts).choice(problem.answer)
    if len(gold) != 1:
        allowed = f"one of {letters}" + (" or the text of an option" if texts else "")
        raise ValueError(f"problem {problem.id!r}: the answer {problem.answer[:80]!r} is no choice; it must be {allowed}")
    final = part_of(completion, problem, "final")
    answer = None if final is None else answer_part(final)
    said = extract_choice(final or "" if answer is None else answer, letters, texts)
    if not said:
        return Score(value=0.0, outcome=Outcome.wrong_format, detail="commits to no letter")
    return Score(value=float(said == gold), detail=" or ".join(sorted(said)))


def extract_choice(text: str, letters: str = "ABCDE", options: Options | None = None) -> frozenset[str]:
    """The letters that a text commits to: one, several if it hedges, none if it states nothing."""
    return Reader(letters, options or {}).extract(text)


def _options(problem: Problem, name: str, letters: str) -> Options:
    value = problem.columns.get(name)
    if isinstance(value, Mapping) and {"label", "text"} <= set(value):
        value = dict(zip(value["label"], value["text"], strict=True))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = dict(zip(letters, value, strict=False)) if len(value) <= len(letters) else value
    if not isinstance(value, Mapping) or not value or not set(value) <= set(letters):
        raise ValueError(f"problem {problem.id!r}: column {name!r} does not hold the options of {letters}: {repr(value)[:200]}")
    return {letter: str(text) for letter, text in value.items()}


# ---- text that only decorates ----------------------------------------------------------------------------------------------------

_DECORATION = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathit|bf|rm|left|right)(?![A-Za-z])|\\[()\[\],;! ]"
    r"|[*`$~{}]|(?<!\w)_+|_+(?!\w)"
)
_FILLER = (
    r"(?:(?:therefore|thus|then|clearly|definitely|indeed|actually|really|probably|likely|most|either|just|simply|only|the|final|correct|best"
    r"|answer|option|choice|letter|number)\b[\s:,]*)*"
)
_HEDGE = r"(?:or|maybe|perhaps|possibly|alternatively|could|might|may|also|either|unless|otherwise)"
_REASON = re.compile(
    r"\b(?:because|since|as|so|which|while|whereas|not|rather|instead|cannot|given|due|by|for|with)\b|n't\b", re.IGNORECASE
)
_UNREAL = re.compile(
    r"(?:n't|\b(?:not|never|neither|nor|if|suppose|assume|assuming|whether|unless|than|why|had))\s+(?:[\w']+\s+){0,3}$", re.IGNORECASE
)
_NO_ARTICLE = r"(?!\s+(?!(?:because|since|as|so|and|or|but|for|where|when|if|is|was|by|with|given|due|not)\b)[a-z])"  # nor a pronoun
_BOX, _END_BOX = "⟦", "⟧"


def _plain(text: str) -> str:
    return _DECORATION.sub("", unicodedata.normalize("NFKC", text))


def _spelled(text: str) -> str:
    """An option's text as it is compared: no decoration, case, or punctuation at its end; single spaces."""
    return " ".join(_plain(text).casefold().split()).strip(" .,;:!\"'“”‘’")


# ---- reading ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Patterns:
    """What statements look like for one set of letters."""

    letter: re.Pattern[str]
    listed: re.Pattern[str]
    statement: re.Pattern[str]
    answer: re.Pattern[str]
    alone: re.Pattern[str]
    small: re.Pattern[str]
    enumerated: re.Pattern[str]


@lru_cache(maxsize=32)
def _patterns(letters: str) -> _Patterns:
    words = [letter + _NO_ARTICLE if letter in "AI" else letter for letter in letters]
    one = (
        rf"[{_BOX}(\[\"'“‘]{{0,4}}\s{{0,8}}(?<![A-Za-z0-9])(?:{'|'.join(words)})"
        rf"(?!['’]?[A-Za-z0-9]|\s*[+=^<>]|-\w)\s{{0,8}}[{_END_BOX})\]\"'”’]{{0,4}}"
    )
    joint = rf"\s*(?:[,;/&+、或和与]|,?\s*\b(?:and|or|nor)\b)\s*(?:{_HEDGE}\b\s*)*(?:(?:option|choice|answer)\s+)?"
    listed = rf"{one}(?:{joint}{one})*"
    cues = [
        rf"(?i:\b(?:answer|choice|option|solution)\b\s*(?:is|are|would\s+be|should\s+be|must\s+be|will\s+be|:|=|→|->|–|—|-)+[\s:]*{_FILLER})(?P<a>{listed})",
        rf"(?i:\b(?:choose|chose|pick|picked|select|selected|go\s+with|going\s+with|went\s+with|settle\s+on|corresponds\s+to|matches)[\s:]+{_FILLER})(?P<b>{listed})",
        rf"(?i:\b(?:it|this|that|which)(?:'s|’s|\s+is|\s+must\s+be|\s+has\s+to\s+be)\s+{_FILLER})(?P<c>{listed})",
        rf"(?P<d>{listed})\s+(?i:(?:is|are)\s+(?:(?:the|indeed|clearly|only|a)\s+)*(?:correct|right|true|best|answer)\b)",
        rf"(?:答案|选项|选择|故选|应选|所以选|选)\s*(?:应该是|应为|是|为|选|项|:)*\s*(?P<e>{listed})",
        rf"(?=\s*{_BOX})(?P<f>{listed})",
    ]
    return _Patterns(
        letter=re.compile(rf"(?<![A-Za-z0-9])[{letters}](?!['’]?[A-Za-z0-9])"),
        listed=re.compile(listed),
        statement=re.compile("|".join(f"(?:{cue})" for cue in cues)),
        answer=re.compile(r"\b(?:answer|choice|option)\b\s*(?:\bis\b|:)[\s:]*(?=(?P<text>[^\n]{1,400}))", re.IGNORECASE),
        alone=re.compile(rf"(?i:{_FILLER}(?:is\s+|:\s*)?)(?P<letters>{listed})(?P<mark>\s*[.:,)\-–—]*\s*)(?P<rest>.*)", re.DOTALL),
        small=re.compile(rf"[(\[]?\s*([{letters.lower()}])\s*[)\]]?\s*[.:]?"),
        enumerated=re.compile(rf"^[\s\-•]*\(?([{letters}])[).:][ \t]*\S", re.MULTILINE),
    )


class Reader:
    """Reads the choice out of texts about one set of letters and, if they are known, their options' texts."""

    def __init__(self, letters: str, options: Options) -> None:
        self._patterns = _patterns(letters)
        self._options = {letter: _spelled(text) for letter, text in options.items()}

    def extract(self, text: str) -> frozenset[str]:
        text = _plain(self._unbox(text)).strip()
        if said := self.choice(text):
            return said
        if stated := self._last_statement(text):
            return stated
        return self._last_line(text)

    def choice(self, text: str) -> frozenset[str]:
        """The letters of a text that is nothing but a choice; none if it is something else."""
        text = _plain(text).strip().strip(_BOX + _END_BOX).strip()
        if not text or len(text) > _LINE_CHARS:
            return frozenset()
        if small := self._patterns.small.fullmatch(text):
            return frozenset(small[1].upper())
        by_text = [letter for letter, option in self._options.items() if option == _spelled(text)]
        if by_text:
            return frozenset(by_text)
        match = self._patterns.alone.fullmatch(text)
        if match is None:
            return frozenset()
        said, rest = self._letters(match["letters"]), match["rest"].strip()
        if not rest:
            return said
        if len(said) > 1:
            return frozenset()
        return self._with_option(said, rest, marked=bool(match["mark"].strip()) or not match["letters"].strip().isalnum())

    def _with_option(self, said: frozenset[str], rest: str, marked: bool) -> frozenset[str]:
        """``C. Paris``: a letter and what follows it."""
        (letter,) = said
        spelled = _spelled(rest)
        others = {other for other, option in self._options.items() if option == spelled}
        if others:
            return said if letter in others else said | others  # "C. London" of B. London: which?
        if not marked or "\n" in rest or self._last_statement(rest):
            return frozenset()
        return said | self._hedged(letter, rest) | self.choice(rest)

    def _last_statement(self, text: str) -> frozenset[str]:
        last, said = -1, frozenset[str]()
        for match in self._patterns.statement.finditer(text):
            group = match.lastgroup
            assert group is not None
            if self._is_meant(text, match.start(group) if group == "d" else match.start(), match.end()):
                stated = self._letters(match[group])
                last, said = match.start(), stated | (self._hedged(min(stated), text[match.end() :]) if len(stated) == 1 else frozenset())
        for match in self._patterns.answer.finditer(text):  # "The answer is Paris."
            line = match["text"]
            by_text = self._by_text(line) or self._by_text(re.split(r"[.;](?:\s|$)", line)[0])
            if by_text and match.start() > last and self._is_meant(text, match.start(), match.start("text")):
                last, said = match.start(), by_text
        return said

    def _is_meant(self, text: str, start: int, end: int) -> bool:
        """Not "if the answer is C", "I would not choose C", "the answer is C?"."""
        return not _UNREAL.search(text[max(start - 60, 0) : start].rpartition(".")[2]) and not re.match(r"\s*\?", text[end:])

    def _by_text(self, text: str) -> frozenset[str]:
        spelled = _spelled(text)
        return frozenset(letter for letter, option in self._options.items() if option == spelled)

    def _last_line(self, text: str) -> frozenset[str]:
        """A last line that is nothing but a choice – unless the text is a list of options, whose last line is the last option."""
        line = text.rpartition("\n")[2]
        enumerated = self._patterns.enumerated
        if enumerated.match(line) and len({match[1] for match in enumerated.finditer(text)}) > 1:
            return frozenset()
        return self.choice(line)

    def _hedged(self, letter: str, rest: str) -> frozenset[str]:
        """Other letters that the same sentence also holds possible: "…, or maybe C". Not those it gives reasons against."""
        sentence = _REASON.split(re.split(r"[.!?\n](?:\s|$)|\n", rest, maxsplit=1)[0], maxsplit=1)[0]
        cue = re.search(rf"\b{_HEDGE}\b|/", sentence, re.IGNORECASE)
        return frozenset(self._patterns.letter.findall(sentence[cue.start() :])) - {letter} if cue else frozenset()

    def _letters(self, text: str) -> frozenset[str]:
        return frozenset(self._patterns.letter.findall(text))

    def _unbox(self, text: str) -> str:
        """Boxes that hold a choice become ``⟦C⟧``; the others are text."""
        pieces, position = [], 0
        for box in boxes(text):
            said = self.choice(box.content)
            content = " or ".join(f"{_BOX}{letter}{_END_BOX}" for letter in sorted(said)) if said else box.content
            pieces += [text[position : box.start], f" {content} "]
            position = box.end
        return "".join([*pieces, text[position:]])
