"""Rewards for the length of a completion, in tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from grpo.imports import FunctionRef, resolve
from grpo.rewards.arguments import checked_by, number, whole
from grpo.rewards.base import call
from grpo.types import Completion, Problem, Score

Correct = str | Mapping[str, Any] | FunctionRef | Callable[..., Any]


def _check_soft_overlong(max_tokens: int, buffer: int) -> None:
    whole("max_tokens", max_tokens, least=1)
    whole("buffer", buffer, least=1)
    if buffer > max_tokens:
        raise ValueError(f"soft_overlong: buffer is {buffer} and max_tokens {max_tokens}; it takes 0 < buffer ≤ max_tokens")


@checked_by(_check_soft_overlong)
def soft_overlong(completion: Completion, problem: Problem, max_tokens: int, buffer: int) -> float:
    """Soft overlong punishment, Eq. 13 of DAPO (https://arxiv.org/abs/2503.14476).

    With |y| tokens, L_max = ``max_tokens`` and L_cache = ``buffer``::

        0                                    if |y| ≤ L_max − L_cache
        ((L_max − L_cache) − |y|) / L_cache  if L_max − L_cache < |y| ≤ L_max
        −1                                   if |y| > L_max
    """
    _check_soft_overlong(max_tokens, buffer)
    excess = completion.num_sampled - (max_tokens - buffer)
    return -min(excess / buffer, 1.0) if excess > 0 else 0.0


def _check_cosine(
    correct: Correct, max_tokens: int, correct_short: float, correct_long: float, wrong_short: float, wrong_long: float, exceeded: float
) -> None:
    whole("max_tokens", max_tokens, least=1)
    values = {"correct_short": correct_short, "correct_long": correct_long, "wrong_short": wrong_short, "wrong_long": wrong_long}
    for name, value in {**values, "exceeded": exceeded}.items():
        number(name, value)
    _load(correct)


@checked_by(_check_cosine)
def cosine(
    completion: Completion,
    problem: Problem,
    correct: Correct,
    max_tokens: int,
    correct_short: float = 2.0,
    correct_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
) -> Score:
    """Cosine length reward (https://arxiv.org/abs/2502.03373, section 4.2; the defaults are those of its scripts).

    With L tokens and L_max = ``max_tokens``::

        exceeded                                                    if L ≥ L_max
        r_L + ½ (r_0 − r_L) (1 + cos(π L / L_max))                  otherwise

    where r_0 → r_L is ``correct_short`` → ``correct_long`` for a right answer and ``wrong_short`` → ``wrong_long`` for a wrong one:
    right and short is best, and a wrong answer costs less after longer thought. (The paper writes the limits of its ``CosFn`` the
    other way round; its code computes this.)

    Args:
        correct: the reward that says what is right (a value of at least 1), e.g. ``{fn: grpo.rewards.math.accuracy}`` with its
            arguments, or its import path alone. Where it leaves a completion unscored, so does this one, with the same outcome.
    """
    _check_cosine(correct, max_tokens, correct_short, correct_long, wrong_short, wrong_long, exceeded)
    verdict = call(_load(correct), completion, problem)
    if not verdict.scored:
        return verdict
    num_tokens, right = completion.num_sampled, verdict.value >= 1
    detail = f"{'right' if right else 'wrong'}, {num_tokens} of {max_tokens} tokens"
    if num_tokens >= max_tokens:
        return Score(value=float(exceeded), detail=detail)
    short, long = (correct_short, correct_long) if right else (wrong_short, wrong_long)
    return Score(value=long + (short - long) * (1 + math.cos(math.pi * num_tokens / max_tokens)) / 2, detail=detail)


def _load(correct: Correct) -> Callable[..., Any]:
    if isinstance(correct, FunctionRef):
        return correct.load()
    if isinstance(correct, str | Mapping):
        return resolve({"fn": correct} if isinstance(correct, str) else correct, key="correct", positional=2).load()
    if not callable(correct):
        raise ValueError(f"correct is {correct!r}; it must name a reward, e.g. {{fn: grpo.rewards.math.accuracy}}")
    return correct
