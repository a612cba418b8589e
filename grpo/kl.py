"""KL(policy ‖ reference) from samples: ``f(log_ratio [tokens]) -> [tokens]``, log_ratio = policy_logprobs − reference_logprobs.

The names are J. Schulman's (joschu.net/blog/kl-approx.html). Used in the loss; which of them have a biased gradient there is
said with each.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, " tokens"]


def k1(log_ratio: Tokens) -> Tokens:
    """log π/π_ref: unbiased value; as a loss its expected gradient is zero, so use it for reading, not for training."""
    return log_ratio


def k2(log_ratio: Tokens) -> Tokens:
    """(log π/π_ref)² / 2: biased value, but on-policy its gradient is that of the exact KL."""
    return log_ratio.square() / 2


def k3(log_ratio: Tokens) -> Tokens:
    """π_ref/π − log(π_ref/π) − 1 (DeepSeekMath Eq. 4, R1 Eq. 2): unbiased value, never negative; the gradient is that of KL(π_ref ‖ π)."""
    return (-log_ratio).expm1() + log_ratio
