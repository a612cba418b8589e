"""Per-token policy objectives, to be maximised: ``f(log_ratio [tokens], advantages [tokens]) -> Objective``.

``log_ratio`` = policy_logprobs − proximal_logprobs; ρ = exp(log_ratio). With one optimiser update a step the proximal policy
is the policy itself, detached: ρ is exactly 1 and its gradient is that of the log-prob.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Tokens = Float[Tensor, " tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """``values`` [tokens] to maximise; ``clipped`` [tokens] where the bound, not the ratio, decides (no gradient there)."""

    values: Tokens
    clipped: Bool[Tensor, " tokens"]


def clipped_surrogate(log_ratio: Tokens, advantages: Tokens, *, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A), one ρ a token (DeepSeekMath Eq. 3; PPO 1707.06347 Eq. 7)."""
    ratio = log_ratio.exp()
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return Objective(values=torch.minimum(free, bounded), clipped=bounded < free)


def policy_gradient(log_ratio: Tokens, advantages: Tokens) -> Objective:
    """ρ A without a bound: REINFORCE when the proximal policy is the policy."""
    return Objective(values=log_ratio.exp() * advantages, clipped=torch.zeros_like(advantages, dtype=torch.bool))
