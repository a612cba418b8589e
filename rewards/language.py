"""Does the chain of thought keep to one language?

Only words are judged. Formulas, code, numbers, identifiers, abbreviations and names are no words of any language. A word in another
script than the language's is foreign at once; between languages that share a script, lingua's probabilities decide, and since single words
say little ("die", "in", "modulo"), all words of a text are labelled together: the likeliest sequence of languages, in which
each change costs ``_SWITCH`` nats (Viterbi).
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from grpo.rewards.arguments import checked_by, column, number, one_of
from grpo.rewards.text import PARTS, Word, part_of, words
from grpo.rewards.text import column as text_column
from grpo.types import Completion, Outcome, Problem, Score

if TYPE_CHECKING:
    from lingua import Language

# Languages that a model drifts into, by script; the other scripts have one. (lingua knows 75, at some 25 MB each.)
_COMMON = {
    "Latin": ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi", "id", "sv"),
    "Cyrillic": ("ru", "uk", "bg"),
    "Arabic": ("ar", "fa", "ur"),
    "Devanagari": ("hi", "mr"),
}
_SCRIPT_OF = {  # the others are written in Latin letters
    "ar": "Arabic", "be": "Cyrillic", "bg": "Cyrillic", "bn": "Bengali", "el": "Greek", "fa": "Arabic", "gu": "Gujarati", "he": "Hebrew",
    "hi": "Devanagari", "hy": "Armenian", "ja": "Kana", "ka": "Georgian", "kk": "Cyrillic", "ko": "Hangul", "mk": "Cyrillic",
    "mn": "Cyrillic", "mr": "Devanagari", "pa": "Gurmukhi", "ru": "Cyrillic", "sr": "Cyrillic", "ta": "Tamil", "te": "Telugu", "th": "Thai",
    "uk": "Cyrillic", "ur": "Arabic", "zh": "Han",
}  # fmt: skip

_SWITCH = 4.0  # nats: no English word of GSM8K is then taken for foreign; of a foreign clause of six words, nine tenths are seen
_FLOOR = 1e-3  # the least probability of a word in a language
_ECHO = 10  # a word that returns within so many words is no new evidence
_NAME_WORDS = 3  # so many capitalised words in a row may be a name; more are none
_ABBREVIATION = 4  # so many capital letters may be points, units or an abbreviation
_CHINESE_HAN = 8  # a Japanese sentence of so many Chinese characters has kana among them


def _check(target: str, part: str, question: str | None, rivals: Sequence[str] | None, wordless: float) -> None:
    one_of("part", part, PARTS)
    column("question", question)
    number("wordless", wordless)
    if target != "auto":
        code = _code(target)
        if rivals is not None and (alien := [rival for rival in rivals if _script(_code(rival)) != _script(code)]):
            raise ValueError(f"rivals holds {', '.join(alien)}, of another script than {target}; give languages of its own script")
    elif rivals is not None:
        raise ValueError("rivals is given, but target is auto, which compares with the common languages of the script; leave one out")


def _warm_up(target: str = "en", rivals: Sequence[str] | None = None) -> None:
    """Load the models, a second or two, before the first task."""
    candidates = _candidates("en" if target == "auto" else _code(target), rivals)
    if len(candidates) > 1:
        _labeller(candidates)


@checked_by(_check)
def consistency(
    completion: Completion,
    problem: Problem,
    target: str = "en",
    part: str = "think",
    question: str | None = None,
    rivals: Sequence[str] | None = None,
    wordless: float = 0.0,
) -> Score:
    """The share of target-language words in the chain of thought, 0 to 1 (DeepSeek-R1, https://arxiv.org/abs/2501.12948 v2, Eq. 7).

    ``Num(words of the target language) / Num(words)``. In Chinese, Japanese and Thai, written without spaces, each character is a
    word. Needs lingua: ``pip install "grpo-toolkit[language]"``.

    Args:
        target: the language's name or ISO 639-1 code (``en``, ``German``); ``auto``: that of the problem's text.
        part: the part of the completion that is judged; one that is missing scores 0 with outcome ``wrong_format``.
        question: for ``auto``: the column with the bare question. Without it the whole prompt counts, its template included.
        rivals: the languages that the target is told apart from, of its own script; default: the common ones. Each costs a worker
            some 25 MB.
        wordless: the value where there is no word at all to judge: nothing but formulas, or nothing.
    """
    _check(target, part, question, rivals, wordless)
    text = part_of(completion, problem, part)
    if text is None:
        return Score(value=0.0, outcome=Outcome.wrong_format, detail=f"no {part} part")
    code = _language_of(problem, question) if target == "auto" else _code(target)
    counted = list(judged_words(text, code, rivals))
    if not counted:
        return Score(value=float(wordless), detail="no words")
    foreign = [word for word, is_target in counted if not is_target]
    detail = f"{len(counted) - len(foreign)} of {len(counted)} words are {_name(code)}"
    return Score(value=1 - len(foreign) / len(counted), detail=detail + (f"; not: {' '.join(foreign[:10])}" if foreign else ""))


consistency.warm_up = _warm_up  # type: ignore[attr-defined]


def judged_words(text: str, code: str, rivals: Sequence[str] | None = None) -> Iterator[tuple[str, bool]]:
    """Every word of a text that can be judged, in order, and whether it is one of the language ``code``."""
    found = [word for word in words(prose(text)) if not _is_symbol(word, code)]
    own = _own_script(found, code)
    if code in ("zh", "ja"):
        native = own
    else:
        labels = iter(_label([word for word, mine in zip(found, own, strict=True) if mine], code, rivals))
        native = [mine and next(labels) == code for mine in own]
    for is_own, run in itertools.groupby(zip(found, own, native, strict=True), key=lambda entry: entry[1]):
        entries = list(run)
        if is_own or not all(word.text in _FUNCTIONS or word.text[0].isupper() for word, _, _ in entries) or len(entries) > _NAME_WORDS:
            yield from ((word.text, is_native) for word, _, is_native in entries)


# ---- what is no word -----------------------------------------------------------------------------------------------------------

_CODE = re.compile(r"```.*?```|~~~.*?~~~|`[^`\n]*`", re.DOTALL)
_MATH = re.compile(
    r"\$\$.{1,2000}?\$\$|\\\[.{1,2000}?\\\]|\\\(.{1,2000}?\\\)"
    r"|\$(?=\S)[^$\n]+?(?<=\S)\$(?!\d)"  # pandoc's rule, so that "$5 and $6" is no formula
    r"|\\begin\{(?P<name>equation|align|gather|cases|array|[pbvB]?matrix|aligned)\*?\}.{0,2000}?\\end\{(?P=name)\*?\}",
    re.DOTALL,
)
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|operatorname)\b\s*|\\[A-Za-z]+")
_SENTENCE = re.compile(
    r"(?<![^\W\d_])(?:[^\W\d_]{2,}+[\s,]++){3,}[^\W\d_]{2,}|[\u3041-\u30ff\u3400-\u9fff]{5}"
)  # words that hide in a formula
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg", "exp"}
    | {"lim", "max", "min", "sup", "inf", "gcd", "lcm", "mod", "det"}
)


def prose(text: str) -> str:
    """The text without its code and its formulas. A formula that holds a sentence is not taken for one."""
    return _MATH.sub(lambda match: match.group() if _SENTENCE.search(_COMMAND.sub("", match.group())) else " ", _CODE.sub(" ", text))


def _is_symbol(word: Word, code: str) -> bool:
    """Single letters, ABC, πr: in scripts with spaces these are variables, points and abbreviations."""
    if word.script in ("Han", "Kana", "Thai"):
        return False
    if word.script == "Greek" and code != "el":
        return len(word.text) <= 2
    return len(word.text) == 1 or (len(word.text) <= _ABBREVIATION and word.text.isupper())


# ---- scripts -------------------------------------------------------------------------------------------------------------------


def _own_script(found: Sequence[Word], code: str) -> list[bool]:
    script = _script(code)
    if code not in ("zh", "ja"):
        return [word.script == script for word in found]
    japanese = _japanese_sentences(found)
    return [word.script in ("Han", "Kana") and (word.sentence in japanese) == (code == "ja") for word in found]


def _japanese_sentences(found: Sequence[Word]) -> set[int]:
    """Sentences of Chinese characters and kana that are Japanese: with kana, a tenth at least; or next to one, and short."""
    han = Counter(word.sentence for word in found if word.script == "Han")
    kana = Counter(word.sentence for word in found if word.script == "Kana")
    mixed = {sentence for sentence in han | kana if 10 * kana[sentence] >= han[sentence] + kana[sentence]}
    if not mixed:
        return mixed
    return mixed | {sentence for sentence in han if kana[sentence] == 0 and han[sentence] < _CHINESE_HAN}


# ---- languages of one script -----------------------------------------------------------------------------------------------------


def _label(found: Sequence[Word], code: str, rivals: Sequence[str] | None) -> Sequence[str]:
    candidates = _candidates(code, rivals)
    return [code] * len(found) if len(candidates) == 1 else _labeller(candidates)(found, home=code)


def _candidates(code: str, rivals: Sequence[str] | None = None) -> tuple[str, ...]:
    others = _COMMON.get(_script(code), ()) if rivals is None else tuple(_code(rival) for rival in rivals)
    return (code, *(other for other in others if other != code))


@dataclass(frozen=True, slots=True)
class _Labeller:
    """The likeliest sequence of languages of a sequence of words."""

    codes: tuple[str, ...]
    evidence: Callable[[str], tuple[float, ...]]  # a word → its log-probability in each language

    def __call__(self, found: Sequence[Word], home: str | None = None) -> list[str]:
        """Viterbi. To begin or to end in another language than ``home``, if there is one, is a change like any other."""
        abroad = [0.0 if home in (None, code) else -_SWITCH for code in self.codes]
        scores = list(abroad)
        pointers: list[list[int]] = []
        for weighs, word in zip(_is_evidence(found), found, strict=True):
            best = max(scores)
            leader, switched = scores.index(best), best - _SWITCH
            pointers.append([index if score >= switched else leader for index, score in enumerate(scores)])
            scores = [max(score, switched) for score in scores]
            if weighs:
                scores = [score + log for score, log in zip(scores, self.evidence(word.text.lower()), strict=True)]
        scores = [score + cost for score, cost in zip(scores, abroad, strict=True)]
        state, labels = scores.index(max(scores)), []
        for pointer in reversed(pointers):
            labels.append(self.codes[state])
            state = pointer[state]
        return labels[::-1]


def _is_evidence(found: Sequence[Word]) -> list[bool]:
    """Not a name, which says nothing of the language around it; nor a word that was there a moment ago."""
    capital = [word.text[0].isupper() for word in found]
    runs = [(is_capital, len(list(run))) for is_capital, run in itertools.groupby(capital)]
    is_name = [is_capital and length <= _NAME_WORDS for is_capital, length in runs for _ in range(length)]
    last: dict[str, int] = {}
    evidence = []
    for index, word in enumerate(found):
        text = word.text.lower()
        evidence.append(not is_name[index] and index - last.get(text, -_ECHO) >= _ECHO)
        last[text] = index
    return evidence


@lru_cache(maxsize=8)
def _labeller(codes: tuple[str, ...]) -> _Labeller:
    languages = [_languages()[code] for code in codes]
    detector = _lingua().LanguageDetectorBuilder.from_languages(*languages).with_preloaded_language_models().build()

    @lru_cache(maxsize=100_000)
    def evidence(word: str) -> tuple[float, ...]:
        confidence = {entry.language: entry.value for entry in detector.compute_language_confidence_values(word)}
        if not any(confidence.values()):
            return (0.0,) * len(languages)
        return tuple(math.log(max(confidence[language], _FLOOR)) for language in languages)

    return _Labeller(codes, evidence)


# ---- names of languages ----------------------------------------------------------------------------------------------------------


def _lingua() -> Any:
    try:
        import lingua
    except ImportError as error:
        raise ValueError('the language reward needs lingua, which is not installed; run `pip install "grpo-toolkit[language]"`') from error
    return lingua


@lru_cache(maxsize=1)
def _languages() -> Mapping[str, Language]:
    return {language.iso_code_639_1.name.lower(): language for language in _lingua().Language.all()}


def _code(name: str) -> str:
    """The ISO 639-1 code of a language given by name or code.

    Raises:
        ValueError: lingua does not know it, or is not installed.
    """
    languages = _languages()
    wanted = str(name).strip().lower()
    if wanted in languages:
        return wanted
    for code, language in languages.items():
        if language.name.lower() == wanted:
            return code
    raise ValueError(f"the language {name!r} is not known; give a name or an ISO 639-1 code such as en, German, zh")


def _name(code: str) -> str:
    return _languages()[code].name.capitalize()


def _script(code: str) -> str:
    return _SCRIPT_OF.get(code, "Latin")


_BY_SCRIPT = {script: code for code, script in _SCRIPT_OF.items() if script not in _COMMON and code not in ("zh", "ja")}


def _language_of(problem: Problem, question: str | None) -> str:
    """The language that most words of the problem are in.

    Raises:
        ValueError: it has no words.
    """
    text = problem.prompt if question is None else text_column(problem, question)
    found = [word for word in words(prose(text)) if not _is_symbol(word, "") and word.script != "other"]
    if not found:
        raise ValueError(f"problem {problem.id!r} has no words to tell its language by; set target to a language")
    scripts = Counter("Han" if word.script == "Kana" else word.script for word in found)
    script = scripts.most_common(1)[0][0]
    if script == "Han":
        japanese = _japanese_sentences(found)
        num_japanese = sum(word.sentence in japanese for word in found if word.script in ("Han", "Kana"))
        return "ja" if 2 * num_japanese > scripts["Han"] else "zh"
    if script not in _COMMON:
        return _BY_SCRIPT[script]
    labels = _labeller(_COMMON[script])([word for word in found if word.script == script])
    return Counter(labels).most_common(1)[0][0]
