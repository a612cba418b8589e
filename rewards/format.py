"""Rewards for the shape of a completion."""

from __future__ import annotations

import re

from grpo.rewards.arguments import checked_by, flag
from grpo.rewards.text import begins_in_thought, is_blank
from grpo.types import Completion, Outcome, Problem, Score

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_R1_FORMAT = re.compile(r"\s*<think>(?P<think>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
_LIKE_A_TAG = re.compile(r"[<＜〈‹]\s{0,9}[/／]?\s{0,9}(?:think|answer)\s{0,9}[/／]?\s{0,9}[>＞〉›]", re.IGNORECASE)


def _check(opened: bool) -> None:
    flag("opened", opened)


@checked_by(_check)
def r1_format(completion: Completion, problem: Problem, opened: bool = False) -> Score:
    """1 if the completion is ``<think>…</think> <answer>…</answer>`` and nothing else, else 0 with outcome ``wrong_format``.

    The template of DeepSeek-R1-Zero (https://arxiv.org/abs/2501.12948, table 1). Each tag stands exactly once, also counting what
    only looks like one (``<Think>``, ``< think >``, ``＜think＞``) and what stands in code or quotes; neither part is blank; only
    white space stands around and between them. The detail says what is wrong.

    Args:
        opened: the prompt already ends with ``<think>``, so that the completion begins inside it. Needed only where the prompt is
            not at hand: a prompt that ends so is recognised.
    """
    _check(opened)
    text = "<think>" + completion.text if opened or begins_in_thought(problem) else completion.text
    fault = _fault(text)
    return Score(value=0.0, outcome=Outcome.wrong_format, detail=fault) if fault else Score(value=1.0)


def _fault(text: str) -> str:
    """What is wrong with it; empty if nothing is."""
    for tag in _TAGS:
        if (times := text.count(tag)) != 1:
            return f"{tag} stands {times} times"
    for like in _LIKE_A_TAG.findall(text):
        if like not in _TAGS:
            return f"{like} is like a tag, and is none"
    if sorted(_TAGS, key=text.index) != list(_TAGS):
        return "the tags are not in order"
    match = _R1_FORMAT.fullmatch(text)
    if match is None:
        return "text stands outside the tags"
    for name, inside in match.groupdict().items():
        if is_blank(inside):
            return f"<{name}> is blank"
    return ""
