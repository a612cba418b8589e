"""The loss: objective + corrections + KL + entropy, aggregated. It sees tensors and totals, never a configuration.

L = −Agg( w · J(ρ, A) ) + kl_coef · Agg( KL ) − entropy_coef · Agg( H )

with ρ = π/π_anchor at the level of ``grpo.ratios``, w the product of the corrections of π_proximal/π_behavior, and Agg one of
``grpo.aggregation``. The anchor is the proximal policy (the policy before this step's updates), or the behavior policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from grpo import ratios
from grpo.batch import Batch
from grpo.corrections import Correction, Mismatch
from grpo.objectives import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What a policy says of a batch's tokens: log π of each and the entropy of the distribution it was drawn from, in nats."""

    logprobs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]


@dataclass(frozen=True, slots=True)
class Stat:
    """A metric that adds up over micro-batches and ranks: sum, count and maximum over tokens.

    The numbers stay tensors until they are read, so that a GPU is not waited for in the middle of an update.
    """

    total: Tensor
    count: int
    peak: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Stat:
        values = values.detach().float()
        return cls(values.sum(), values.numel(), values.max() if values.numel() else values.new_tensor(float("-inf")))

    def __add__(self, other: Stat) -> Stat:
        return Stat(self.total + other.total, self.count + other.count, torch.maximum(self.peak, other.peak))

    @property
    def mean(self) -> float:
        return float(self.total) / self.count if self.count else float("nan")

    @property
    def maximum(self) -> float:
        return float(self.peak) if self.count else float("nan")


def merge(stats: Iterable[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Per-name sums, counts and maxima over micro-batches."""
    merged: dict[str, Stat] = {}
    for part in stats:
        for name, stat in part.items():
            merged[name] = merged[name] + stat if name in merged else stat
    return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    loss: Float[Tensor, ""]  # this part's share: the parts of a split sum to the loss of the whole
    stats: Mapping[str, Stat]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A composition of functions of one argument kind each; ``None`` or nothing leaves its term out."""

    objective: Callable[[Tensor, Tensor, Tensor], Objective]
    aggregate: Callable[[Tensor, Batch], Tensor]
    ratio: Callable[[Tensor, Tensor], Tensor] = ratios.token
    corrections: Mapping[str, Callable[[Mismatch], Correction]] = field(default_factory=dict)
    kl: Callable[[Tensor, Tensor], Tensor] | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    anchor_is_behavior: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.kl is not None and self.kl_coef != 0

    @property
    def signal_only(self) -> bool:
        """Whether a rollout with advantage 0 has gradient exactly 0, so that it need not be computed."""
        return not self.needs_reference and self.entropy_coef == 0

    def __call__(self, scores: TokenScores, batch: Batch) -> LossOutput:
        """Args: ``scores`` of the policy being trained, with gradient; ``batch`` with advantages (and reference log-probs if asked for)."""
        assert batch.advantages is not None, "advantages come first"
        policy, behavior = scores.logprobs, batch.behavior_logprobs.to(scores.logprobs)
        proximal = policy.detach() if batch.proximal_logprobs is None else batch.proximal_logprobs.to(policy)
        anchor = behavior if self.anchor_is_behavior else proximal
        advantages = batch.advantages.to(policy)
        drift = policy - anchor
        log_ratio = self.ratio(drift, batch.rollout_index)

        objective = self.objective(log_ratio, advantages, policy)
        mismatch = Mismatch(
            policy=policy.detach(), proximal=anchor, behavior=behavior, advantages=advantages, rollout_index=batch.rollout_index
        )
        corrections = {name: correct(mismatch) for name, correct in self.corrections.items()}
        values = objective.values
        for correction in corrections.values():
            values = correction.weights * values
        loss = -self.aggregate(values, batch)

        gap = proximal - behavior
        stats = {
            "policy/ratio": Stat.of(log_ratio.exp()),
            "policy/clip_share": Stat.of(objective.clipped),
            "policy/entropy": Stat.of(scores.entropy),
            "sampler/logprob_diff": Stat.of(gap.abs()),
            "sampler/ratio": Stat.of(gap.exp()),
            "sampler/k3": Stat.of(gap.expm1() - gap),
        }
        for name, correction in corrections.items():
            stats[f"sampler/{name}/weight"] = Stat.of(correction.weights)
            stats[f"sampler/{name}/active_share"] = Stat.of(correction.active)
        if self.needs_reference:
            assert self.kl is not None and batch.reference_logprobs is not None, "a KL term needs the reference's log-probs"
            kl = self.kl(policy - batch.reference_logprobs.to(policy), drift)
            loss = loss + self.kl_coef * self.aggregate(kl, batch)
            stats["policy/kl"] = Stat.of(kl)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * self.aggregate(scores.entropy, batch)
        return LossOutput(loss=loss, stats=stats)
