"""Per-token policy objectives, to be maximised: ``f(log_ratio [tokens], advantages [tokens], logprobs [tokens]) -> Objective``.

``log_ratio`` = log ρ at the level that ``grpo.ratios`` gives it; ``logprobs`` = log π_θ of each token; both with gradient. With one
optimiser update a step and the proximal policy as anchor, ρ is exactly 1 and its gradient is that of the log-prob.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from grpo.notation import above_one_or_none, checked, not_negative, number, positive, written

Tokens = Float[Tensor, " tokens"]

MAX_LOG_RATIO = 60.0  # ρ ≤ e^60 = 1e26: were ρ infinite, the gradient of a bound, of a closed gate or of A = 0 would be 0 · ∞ = NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """``values`` [tokens] to maximise; ``clipped`` [tokens] where the bound, not the ratio, decides (no gradient there)."""

    values: Tokens
    clipped: Bool[Tensor, " tokens"]


def _ratio(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ, whether it was cut at e^MAX_LOG_RATIO, where it has no gradient)."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp(), log_ratio.detach() > MAX_LOG_RATIO


def _check_clipped(clip_low: Any, clip_high: Any, dual_clip: Any) -> None:
    not_negative("clip_low", clip_low)
    not_negative("clip_high", clip_high)
    above_one_or_none("dual_clip", dual_clip)


def _clipped_formula(clip_low: float, clip_high: float, dual_clip: float | None) -> str:
    inner = f"min( ρ·A, clip(ρ, {number(1 - clip_low)}, {number(1 + clip_high)})·A )"
    return f"max( {inner}, {number(dual_clip)}·A ) where A < 0, {inner} where A ≥ 0" if dual_clip else inner


@checked(_check_clipped)
@written(_clipped_formula, "PPO 1707.06347 Eq. 7; DeepSeekMath 2402.03300 Eq. 3")
def clipped_surrogate(
    log_ratio: Tokens,
    advantages: Tokens,
    logprobs: Tokens,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Objective:
    """min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A) (DeepSeekMath Eq. 3; PPO 1707.06347 Eq. 7).

    ``dual_clip`` = c > 1 bounds the loss where A < 0 and ρ is huge: max(…, c A) (dual-clip PPO 1912.09729 Eq. 5).
    """
    ratio, cut = _ratio(log_ratio)
    free = ratio * advantages
    values = torch.minimum(free, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        values = torch.where(advantages < 0, torch.maximum(values, dual_clip * advantages), values)
    return Objective(values=values, clipped=(values.detach() != free.detach()) | (cut & (advantages != 0)))


def _check_cispo(clip_low: Any, clip_high: Any) -> None:
    if clip_low is not None:
        not_negative("clip_low", clip_low)
    not_negative("clip_high", clip_high)


def _cispo_formula(clip_low: float | None, clip_high: float) -> str:
    return f"sg[ clip(ρ, {number(0 if clip_low is None else 1 - clip_low)}, {number(1 + clip_high)}) ]·A·log π_θ(oₜ)"


@checked(_check_cispo)
@written(_cispo_formula, "CISPO, MiniMax-M1 2506.13585 Eq. 4–5")
def cispo(log_ratio: Tokens, advantages: Tokens, logprobs: Tokens, *, clip_low: float | None = None, clip_high: float = 4.0) -> Objective:
    """sg[clip(ρ, 1 − clip_low, 1 + clip_high)] A log π: the weight is clipped, the gradient never dropped (MiniMax-M1 2506.13585 Eq. 4–5).

    ``clip_low`` None is no lower bound, as in the paper's experiments; ``clip_high`` 4 caps ρ at 5 (ScaleRL 2510.13786).
    """
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    return Objective(values=weight * advantages * logprobs, clipped=weight != ratio)


@written("ρ·A", "REINFORCE, Williams 1992, with importance weights")
def policy_gradient(log_ratio: Tokens, advantages: Tokens, logprobs: Tokens) -> Objective:
    """ρ A, without a bound that matters: REINFORCE when the anchor is the policy itself, importance-weighted where the tokens are older."""
    ratio, cut = _ratio(log_ratio)
    return Objective(values=ratio * advantages, clipped=cut)


def _check_sapo(tau_positive: Any, tau_negative: Any) -> None:
    positive("tau_positive", tau_positive)
    positive("tau_negative", tau_negative)


def _sapo_formula(tau_positive: float, tau_negative: float) -> str:
    return f"(4/τ)·σ( τ·(ρ − 1) )·A with τ = {number(tau_positive)} where A > 0, else {number(tau_negative)}"


@checked(_check_sapo)
@written(_sapo_formula, "SAPO 2511.20347 Eq. 5–6")
def sapo(log_ratio: Tokens, advantages: Tokens, logprobs: Tokens, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Objective:
    """(4/τ) σ(τ (ρ − 1)) A with a τ for each sign of A (SAPO 2511.20347 Eq. 5–6): a gate that closes smoothly where others clip."""
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_positive), advantages.new_tensor(tau_negative))
    ratio, cut = _ratio(log_ratio)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return Objective(values=gate * advantages, clipped=cut)


def _dppo_formula(divergence: str, where: str) -> str:
    return f"M·ρ·A with M = 0 where ρ moves away from 1 in the direction of A and {divergence} > {where}, else 1"


@checked(lambda delta: positive("delta", delta))
@written(lambda delta: _dppo_formula("|π_θ(oₜ) − π_{anchor}(oₜ)|", number(delta)), "DPPO 2602.04879 Eq. 12–13")
def dppo_tv(log_ratio: Tokens, advantages: Tokens, logprobs: Tokens, *, delta: float = 0.15) -> Objective:
    """M ρ A; M = 0 where the update would leave the trust region, |π − μ| > δ (DPPO, binary total variation, 2602.04879 Eq. 12–13).

    The paper's trust region is around the policy that sampled: use it with ``algo.anchor: behavior``, a token ratio, no correction.
    """
    policy = logprobs.detach()
    divergence = (policy.exp() - (policy - log_ratio.detach()).exp()).abs()
    return _masked(log_ratio, advantages, divergence > delta)


@checked(lambda delta: positive("delta", delta))
@written(lambda delta: _dppo_formula("KL(Bern(π_{anchor}(oₜ)) ‖ Bern(π_θ(oₜ)))", number(delta)), "DPPO 2602.04879 Eq. 12, 14")
def dppo_kl(log_ratio: Tokens, advantages: Tokens, logprobs: Tokens, *, delta: float = 0.05) -> Objective:
    """M ρ A with the divergence of the two-outcome distributions, KL(Bern(μ) ‖ Bern(π)) (DPPO 2602.04879 Eq. 12 and 14)."""
    policy = logprobs.detach().clamp(max=0.0)
    anchor = (logprobs - log_ratio).detach().clamp(max=0.0)  # rounded above 0 it would have no log(1 − p)
    rest_policy, rest_anchor = (-policy.exp()).log1p(), (-anchor.exp()).log1p()  # log(1 − p); −∞ where p is 1
    others = torch.where(rest_anchor.isneginf(), 0.0, rest_anchor.exp() * (rest_anchor - rest_policy))
    return _masked(log_ratio, advantages, anchor.exp() * (anchor - policy) + others > delta)


def _masked(log_ratio: Tensor, advantages: Tensor, outside: Tensor) -> Objective:
    moving_away = log_ratio.detach() * advantages > 0
    masked = outside & moving_away
    ratio, cut = _ratio(torch.where(masked, 0.0, log_ratio))  # masked before exp, for what it does not see has no gradient
    return Objective(values=torch.where(masked, 0.0, ratio * advantages), clipped=masked | cut)
