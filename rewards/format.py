"""Rewards for the shape of a completion."""

from __future__ import annotations

import re

from grpo.types import Completion, Outcome, Problem, Score

_R1_FORMAT = re.compile(r"\s*<think>(?P<think>.*)</think>\s*<answer>(?P<answer>.*)</answer>", re.DOTALL)
_R1_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def r1_format(completion: Completion, problem: Problem, opened: bool = False) -> Score:
    """1 if the completion is ``<think>…</think> <answer>…</answer>`` and nothing else, else 0 with outcome ``wrong_format``.

    The template of DeepSeek-R1-Zero (https://arxiv.org/abs/2501.12948, table 1). Each tag stands exactly once, neither part is
    blank, only white space stands before and between them, and the text ends with ``</answer>``.

    Args:
        opened: the prompt already ends with ``<think>``, so the completion begins inside it.
    """
    text = "<think>" + completion.text if opened else completion.text
    match = _R1_FORMAT.fullmatch(text)
    once = all(text.count(tag) == 1 for tag in _R1_TAGS)
    if match and once and match["think"].strip() and match["answer"].strip():
        return Score(value=1.0)
    return Score(value=0.0, outcome=Outcome.wrong_format)
