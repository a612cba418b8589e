"""A reward against going round in circles."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.rewards.arguments import checked_by, one_of, whole
from grpo.rewards.text import units
from grpo.types import Completion, Problem, Score

_UNITS = ("word", "token")


def _check(ngram: int, unit: str) -> None:
    whole("ngram", ngram, least=1)
    one_of("unit", unit, _UNITS)


@checked_by(_check)
def repetition(completion: Completion, problem: Problem, ngram: int = 3, unit: str = "word") -> Score:
    """Minus the share of n-grams that have occurred before: −(1 − distinct / all), from 0 (none) towards −1.

    The n-gram penalty of https://arxiv.org/abs/2502.03373 (appendix C.2) in its form for a whole completion; the part's
    ``weight`` is the largest penalty. A completion shorter than one n-gram scores 0.

    Args:
        ngram: n. Three words find any echo; ordinary prose repeats a few in a hundred of them. The paper takes 40 tokens, which
            finds loops only.
        unit: ``word``: what stands between spaces, ignoring case; in scripts written without spaces, a character. ``token``: a
            token of the model.
    """
    _check(ngram, unit)
    sequence: Sequence[str] | Sequence[int] = units(completion.text) if unit == "word" else completion.sampled_ids
    total = len(sequence) - ngram + 1
    if total < 1:
        return Score(value=0.0, detail=f"shorter than {ngram} {unit}s")
    distinct = len(set(zip(*(sequence[start:] for start in range(ngram)), strict=False)))
    return Score(value=(distinct - total) / total, detail=f"{total - distinct} of {total} {ngram}-grams have occurred before")
