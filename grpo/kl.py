"""KL(policy ‖ reference) from samples: ``f(log_ratio [tokens], drift [tokens]) -> [tokens]``.

``log_ratio`` = log π_θ − log π_ref and ``drift`` = log π_θ − log π_anchor, whose value is 0 with one update a step but whose gradient
is not. k1, k2 and k3 are J. Schulman's (joschu.net/blog/kl-approx.html); an unbiased value does not make an unbiased gradient, neither in
the loss, where the estimate is differentiated, nor in the reward, where it weighs ∇log π. Each says what its expected gradient is for
tokens that π_θ sampled. Proof, by sums over a vocabulary: tests/test_kl.py.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from grpo.notation import written

Tokens = Float[Tensor, " tokens"]


@written("log π_θ/π_ref", "Schulman 2020, k1")
def k1(log_ratio: Tokens, drift: Tokens) -> Tokens:
    """log π/π_ref: unbiased value. In the loss its expected gradient is zero; in the reward it is ∇KL(π ‖ π_ref): unbiased."""
    return log_ratio


@written("½ (log π_θ/π_ref)²", "Schulman 2020, k2")
def k2(log_ratio: Tokens, drift: Tokens) -> Tokens:
    """(log π/π_ref)² / 2: value biased by third order. In the loss its gradient is ∇KL(π ‖ π_ref): unbiased; in the reward biased."""
    return log_ratio.square() / 2


@written("π_ref/π_θ − log π_ref/π_θ − 1", "Schulman 2020, k3; DeepSeekMath 2402.03300 Eq. 4")
def k3(log_ratio: Tokens, drift: Tokens) -> Tokens:
    """π_ref/π − log(π_ref/π) − 1 (DeepSeekMath Eq. 4, R1 Eq. 2): unbiased value, never negative.

    Biased gradients: in the loss ∇KL(π_ref ‖ π), in the reward ∇KL(π ‖ π_ref) − ∇KL(π_ref ‖ π).
    """
    return (-log_ratio).expm1() + log_ratio


@written("π_θ/π_{anchor} · (π_ref/π_θ − log π_ref/π_θ − 1)", "DeepSeek-V3.2 2512.02556 Eq. 7")
def unbiased(log_ratio: Tokens, drift: Tokens) -> Tokens:
    """π/π_anchor · k3 (DeepSeek-V3.2 2512.02556 Eq. 7): for tokens of π_anchor the value is unbiased, and so is the gradient in the loss.

    The gradient because the weight is differentiated too. In the reward, where ``drift`` is 0, it is k3.
    """
    return drift.exp() * k3(log_ratio, drift)
