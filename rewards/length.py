"""Rewards for the length of a completion."""

from __future__ import annotations

from grpo.types import Completion, Problem


def soft_overlong(completion: Completion, problem: Problem, max_tokens: int, buffer: int) -> float:
    """Soft overlong punishment, Eq. 13 of DAPO (https://arxiv.org/abs/2503.14476).

    With |y| tokens, L_max = ``max_tokens`` and L_cache = ``buffer``::

        0                                    if |y| ≤ L_max − L_cache
        ((L_max − L_cache) − |y|) / L_cache  if L_max − L_cache < |y| ≤ L_max
        −1                                   if |y| > L_max
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"soft_overlong: buffer is {buffer} and max_tokens {max_tokens}; it takes 0 < buffer ≤ max_tokens")
    excess = len(completion.token_ids) - (max_tokens - buffer)
    return -min(excess / buffer, 1.0) if excess > 0 else 0.0
