"""Rewards for short answers that are right only letter by letter."""

from __future__ import annotations

from grpo.types import Completion, Problem


def exact_match(completion: Completion, problem: Problem) -> float:
    """1 if the completion is the answer and nothing else – no space, no word more – else 0."""
    return float(completion.text == problem.answer)


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
