"""The engine that sampled is not numerically the policy that trains, and may be older: ``f(mismatch) -> Correction``.

Weights are never differentiated, and several corrections multiply. A token with weight 0 stays in the denominators.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo.notation import checked, interval, number, positive, written
from grpo.ratios import sequence_mean, sequence_sum

Tokens = Float[Tensor, " tokens"]

_TIS = (
    "Ionides, Truncated Importance Sampling, JCGS 2008; "
    "Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
)
_MISMATCH = "Liu et al. 2025, When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch"
_ICEPOP = "IcePop, beside truncated_importance with cap ≥ high: Ling team 2025, Small Leak Can Sink a Great Ship; AReaL 2505.24298"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """The log-probs that three policies give the same sampled tokens, all detached.

    ``policy``: being trained, ``proximal``: what the objective's ratio is anchored at, ``behavior``: the engine's.
    """

    policy: Tokens
    proximal: Tokens
    behavior: Tokens
    advantages: Tokens
    rollout_index: Int[Tensor, " tokens"]

    @property
    def log_ratio(self) -> Tokens:
        """log π_proximal − log π_behavior."""
        return self.proximal - self.behavior


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """``weights`` [tokens] for the objective; ``active`` [tokens] where the cap or the mask decided."""

    weights: Tokens
    active: Bool[Tensor, " tokens"]


@checked(lambda cap: positive("cap", cap))
@written(lambda cap: f"min( π_prox(oₜ)/π_behav(oₜ), {number(cap)} )", f"truncated importance sampling: {_TIS}")
def truncated_importance(mismatch: Mismatch, *, cap: float = 2.0) -> Correction:
    """w_t = min(π_proximal / π_behavior, cap), a token at a time: truncated importance sampling (TIS)."""
    return _capped(mismatch.log_ratio.exp(), cap)


@checked(lambda cap: positive("cap", cap))
@written(lambda cap: f"min( π_prox(oᵢ)/π_behav(oᵢ), {number(cap)} ), one for the whole completion", f"sequence-level TIS: {_MISMATCH}")
def truncated_sequence_importance(mismatch: Mismatch, *, cap: float = 2.0) -> Correction:
    """w_i = min(Π_t π_proximal / π_behavior, cap), one for the whole completion: less biased, with a variance that grows with length."""
    return _capped(sequence_sum(mismatch.log_ratio, mismatch.rollout_index).exp(), cap)


def _bounds(what: str, low: float, high: float) -> str:
    return f"1 if {number(low)} ≤ {what} ≤ {number(high)}, else 0"


@checked(interval)
@written(lambda low, high: _bounds("π_prox(oₜ)/π_behav(oₜ)", low, high), _ICEPOP)
def token_mask(mismatch: Mismatch, *, low: float = 0.5, high: float = 2.0) -> Correction:
    """1 where low ≤ π_proximal / π_behavior ≤ high, else 0. Beside ``truncated_importance`` with a cap of ``high`` it is IcePop."""
    return _within(mismatch.log_ratio.exp(), low, high)


@checked(interval)
@written(lambda low, high: _bounds("π_prox(oᵢ)/π_behav(oᵢ)", low, high), f"masked importance sampling: {_MISMATCH}")
def sequence_mask(mismatch: Mismatch, *, low: float = 0.0, high: float = 2.0) -> Correction:
    """1 for completions with low ≤ Π_t π_proximal / π_behavior ≤ high, else 0.

    The product drifts with length: use it for short completions only.
    """
    return _within(sequence_sum(mismatch.log_ratio, mismatch.rollout_index).exp(), low, high)


@checked(interval)
@written(lambda low, high: _bounds("(π_prox(oᵢ)/π_behav(oᵢ))^(1/|oᵢ|)", low, high), f"geometric mean: {_MISMATCH}")
def geometric_mask(mismatch: Mismatch, *, low: float = 0.99, high: float = 1.01) -> Correction:
    """1 for completions with low ≤ (Π_t π_proximal / π_behavior)^(1/|o|) ≤ high, else 0: a bound on the mean log-ratio at any length."""
    return _within(sequence_mean(mismatch.log_ratio, mismatch.rollout_index).exp(), low, high)


@checked(lambda delta: positive("delta", delta))
@written(lambda delta: f"0 if Aᵢ < 0 and 1/|oᵢ| Σₜ log π_behav(oₜ)/π_θ(oₜ) > {number(delta)}, else 1", "DeepSeek-V3.2 2512.02556 Eq. 8–9")
def off_policy_sequence_mask(mismatch: Mismatch, *, delta: float = 0.1) -> Correction:
    """0 for completions with A < 0 whose mean log π_behavior/π_θ exceeds δ, else 1 (DeepSeek-V3.2 2512.02556 Eq. 8–9).

    The paper does not give δ. It is compared with the policy as it is now, so it also masks what later updates of a step drift from.
    """
    drift = sequence_mean(mismatch.behavior - mismatch.policy, mismatch.rollout_index)
    return _mask((mismatch.advantages < 0) & (drift > delta), drift)


def _capped(ratio: Tensor, cap: float) -> Correction:
    return Correction(weights=ratio.clamp(max=cap), active=ratio > cap)


def _within(ratio: Tensor, low: float, high: float) -> Correction:
    return _mask((ratio < low) | (ratio > high), ratio)


def _mask(masked: Tensor, like: Tensor) -> Correction:
    return Correction(weights=(~masked).to(like), active=masked)
