"""From a completion to the program that it commits to. Text only: nothing a model wrote is parsed, compiled or run here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from grpo.rewards.text import final_part

PYTHON_NAMES = frozenset({"python", "python3", "py", "py3"})
MAX_NESTED_FENCES = 16  # how many fences inside strings a block may hold before its first one is taken for the end after all

_FENCE = r"(?P<fence>`{3,}|~{3,})[ \t]*"
_OPENING = re.compile(rf"(?P<indent>[ \t]*(?:(?:[-*+]|\d{{1,9}}[.)])[ \t]+)?){_FENCE}(?:\{{\.?)?(?P<language>[\w+#-]*)[^`]*")
_CLOSING = re.compile(rf"(?P<indent>[ \t]*){_FENCE}")
# What of a line of Python matters for the question whether a triple-quoted string is open behind it.
_OUTSIDE = re.compile(r"""\\.|(?P<triple>"{3}|'{3})|\#.*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""")
_INSIDE = {mark: re.compile(rf"\\.|(?P<end>{mark})") for mark in ('"""', "'''")}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language in lower case (empty if none is written) and its lines without the fence's own indentation."""

    language: str
    text: str


def extract_program(text: str, prompt: str = "") -> str | None:
    """The Python program that a completion commits to; None if there is none.

    Only what follows the last ``</think>`` counts, and of that only the last ``<answer>`` if there is one. There, the last block
    fenced as Python is the program (```` ```python ````, ``py``, ``~~~``; indented or not, closed or cut off by the end of the
    text); without such a block, the last one fenced without a language. An ``<answer>`` without any fence is the program itself.

    A fence inside a triple-quoted string of the program, or indented further than the opening fence, closes nothing.

    Args:
        prompt: what the model was given: if it ends with ``<think>`` or with a line that opens a Python block, the completion
            begins inside.
    """
    opening = _OPENING.fullmatch(prompt.rstrip().rpartition("\n")[2])
    if opening is not None and opening["language"].lower() in PYTHON_NAMES:
        said: str | None = f"{opening.group().strip()}\n{text}"
    else:
        said = final_part(text, opened=prompt.rstrip().endswith("<think>"))
    if said is None:
        return None
    _, tag, answer = said.rpartition("<answer>")
    body = answer.partition("</answer>")[0] if tag else said
    blocks = list(fenced_blocks(body))
    programs = [b.text for b in blocks if b.language in PYTHON_NAMES] or [b.text for b in blocks if not b.language]
    if tag and not blocks:
        programs = [body]
    return programs[-1] if programs and programs[-1].strip() else None


def fenced_blocks(text: str) -> Iterator[Block]:
    """All fenced blocks, in order. The last one may lack its closing fence."""
    lines = text.replace("\r\n", "\n").split("\n")
    number = 0
    while number < len(lines):
        opening = _OPENING.fullmatch(lines[number])
        number += 1
        if opening is not None:
            end = _end_of_block(lines, number, opening)
            inside = (_dedent(line, len(opening["indent"])) for line in lines[number:end])
            yield Block(opening["language"].lower(), "\n".join(inside) + "\n")
            number = end + 1


def _end_of_block(lines: list[str], start: int, opening: re.Match[str]) -> int:
    """Number of the line that closes the block: the first fence outside strings, else the first one, else the end of the text."""
    in_strings: list[int] = []
    open_string = ""
    for number in range(start, len(lines)):
        if _closes(lines[number], opening):
            if not open_string:
                return number
            in_strings.append(number)
            if len(in_strings) == MAX_NESTED_FENCES:
                break
        open_string = _string_after(lines[number], open_string)
    return in_strings[0] if in_strings else len(lines)  # a stray quote mark must not swallow the rest of the text


def _closes(line: str, opening: re.Match[str]) -> bool:
    closing = _CLOSING.fullmatch(line)
    return closing is not None and closing["fence"].startswith(opening["fence"]) and len(closing["indent"]) <= len(opening["indent"])


def _string_after(line: str, open_string: str) -> str:
    """The mark of the triple-quoted string that is open behind this line, or nothing."""
    position = 0
    while True:
        name = "end" if open_string else "triple"
        pattern = _INSIDE[open_string] if open_string else _OUTSIDE
        found = next((match for match in pattern.finditer(line, position) if match[name]), None)
        if found is None:
            return open_string
        position, open_string = found.end(), "" if open_string else found[name]


def _dedent(line: str, width: int) -> str:
    """The line without the white space among its first ``width`` characters."""
    head = line[:width]
    return line[width - len(head.lstrip(" \t")) :] if len(head) == width else line.lstrip(" \t")
