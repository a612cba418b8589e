"""The engine that sampled is not numerically the policy that trains: weights for proximal / behavior, never differentiated.

``f(log_ratio [tokens], rollout_index [tokens]) -> weights [tokens]`` with ``log_ratio`` = proximal_logprobs − behavior_logprobs.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def truncated_importance(
    log_ratio: Float[Tensor, " tokens"], rollout_index: Int[Tensor, " tokens"], *, cap: float = 2.0
) -> Float[Tensor, " tokens"]:
    """w_t = min(π_proximal / π_behavior, cap), a token at a time: truncated importance sampling (TIS)."""
    return log_ratio.detach().exp().clamp(max=cap)
