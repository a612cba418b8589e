"""Rewards for short answers that are right only letter by letter."""

from __future__ import annotations

from grpo.rewards.arguments import checked_by, flag, one_of
from grpo.rewards.text import PARTS, part_of
from grpo.types import Completion, Outcome, Problem, Score


def _check(part: str, strip: bool, ignore_case: bool) -> None:
    one_of("part", part, PARTS)
    flag("strip", strip)
    flag("ignore_case", ignore_case)


@checked_by(_check)
def exact_match(completion: Completion, problem: Problem, part: str = "all", strip: bool = False, ignore_case: bool = False) -> Score:
    """1 if the completion is the answer and nothing else – no space, no word more – else 0.

    Args:
        part: what is compared: ``all`` of the text, what is ``final`` (after thinking), or the ``answer`` between its tags. A
            completion without that part scores 0 with outcome ``wrong_format``.
        strip: white space around either side does not count.
        ignore_case: nor do upper and lower case.
    """
    _check(part, strip, ignore_case)
    said = part_of(completion, problem, part)
    if said is None:
        return Score(value=0.0, outcome=Outcome.wrong_format, detail=f"no {part} part")
    written, wanted = (_normalize(text, strip, ignore_case) for text in (said, problem.answer))
    return Score(value=float(written == wanted))


def _normalize(text: str, strip: bool, ignore_case: bool) -> str:
    text = text.strip() if strip else text
    return text.casefold() if ignore_case else text


def prefix_match(completion: Completion, problem: Problem) -> float:
    """The share of the answer that is right before the first mistake; what comes after the answer does not count.

    With the answer ``472``: ``472`` and ``472abc`` → 1, ``479`` → 2/3, ``972`` → 0. A policy that is never exactly right still
    finds out which of its attempts came closest.
    """
    if not problem.answer:
        raise ValueError(f"prefix_match: problem {problem.id!r} has an empty answer; it needs one to compare with")
    right = 0
    for written, wanted in zip(completion.text, problem.answer, strict=False):
        if written != wanted:
            break
        right += 1
    return right / len(problem.answer)
