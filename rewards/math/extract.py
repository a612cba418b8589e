r"""The answer that a completion commits to. One pass each, whatever the text.

In this order: the last ``<answer>``, the last ``\boxed``, the last sentence that says "the answer is …", a text that is nothing but an
answer. What stands in ``<think>`` is thought and never said.
"""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)  # \\.: an escaped brace is text
_SHORT_BOX = re.compile(r"\\boxed\s+([0-9A-Za-z])")
_NO_ANSWER = r"(?! (?:consistent|correct|wrong|not\b|that\b|in\b|as\b|clear))"  # the answer is consistent with …
_STATED = re.compile(
    rf"(?:\banswer\b(?:[^.:\n=]{{0,60}}?\b(?:is|are|be|was)\b{_NO_ANSWER}|[^.:\n=]{{0,40}}?[:=])"
    r"|\b(?:final|exact) result\b[^.:\n]{0,20}?(?:\bis\b|:)|\bfinal answer\b[* \t]*(?=\n)|^####)[ \t:*]*(?:\n\s*)?",
    re.IGNORECASE | re.MULTILINE,
)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*(.+?)\*\*", re.DOTALL)
_SENTENCE_END = re.compile(r"\.(?=\s|$)(?<!\d\.(?=\d))")
_TAG = re.compile(r"</?[a-z]+>")
_WORD = re.compile(r"(?<!\\)\b[A-Za-z]{2,}\b|\bI\b")
_SIGN = re.compile(r"[0-9\\=+<>]")
_MOST_PLAIN_CHARS = 300


def extract_answer(text: str) -> str | None:
    """The text of the answer, or None if the completion gives none."""
    said = text.rpartition("</think>")[2].partition("<think>")[0]
    tagged = _ANSWER.findall(said)
    if tagged:
        boxed = _last_box(tagged[-1])
        return (tagged[-1] if boxed is None else boxed).strip() or None
    boxed = _last_box(said)
    if boxed is not None:
        return boxed.strip() or None
    return _stated(said) or _bare(said)


def _last_box(text: str) -> str | None:
    """The content of the last box that is closed (a truncated completion may end in an open one)."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    open_braces: list[tuple[int, bool]] = []  # where its content starts; whether it is a box
    last, content = -1, None
    for brace in _BRACE.finditer(text):
        if brace["box"] or brace.group() == "{":
            open_braces.append((brace.end(), bool(brace["box"])))
        elif brace.group() == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and start > last:
                last, content = start, text[start : brace.start()]
    if content is None and (short := _SHORT_BOX.findall(text)):
        return short[-1]  # \boxed 5
    return content


def _stated(text: str) -> str | None:
    """What follows the last "the answer is", up to the end of its formula, or else of its sentence."""
    end = None
    for match in _STATED.finditer(text):
        end = match.end()
    if end is None:
        return None
    rest = text[end:].lstrip()
    if formula := _MATH.match(rest):
        return next(group for group in formula.groups() if group is not None).strip() or None
    return _SENTENCE_END.split(rest.partition("\n")[0], maxsplit=1)[0].strip(" *") or None


def _bare(text: str) -> str | None:
    """A completion that is nothing but one formula, or one short line without a sentence."""
    text = text.strip()
    if not text or len(text) > _MOST_PLAIN_CHARS or _TAG.search(text):
        return None
    formula = _MATH.fullmatch(text.rstrip("."))
    if formula:
        return next(group for group in formula.groups() if group is not None).strip() or None
    words = len(_WORD.findall(text))
    return text if "\n" not in text and (words < 2 or (words == 2 and _SIGN.search(text))) else None
