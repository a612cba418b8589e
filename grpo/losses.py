"""The loss: objective + correction + KL + entropy, aggregated. It sees tensors and totals, never a configuration.

L = −Agg( w · J(ρ, A) ) + coef · Agg( KL ) − entropy_coef · Agg( H )

with ρ = π/π_proximal, w the sampler correction of π_proximal/π_behavior, and Agg one of ``grpo.aggregation``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from grpo.batch import Batch
from grpo.objectives import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What a policy says of a batch's tokens: log π of each and the entropy of the distribution it was drawn from, in nats."""

    logprobs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]


@dataclass(frozen=True, slots=True)
class Stat:
    """A metric that adds up over micro-batches and ranks: sum, count and maximum over tokens."""

    total: float
    count: int
    maximum: float

    @classmethod
    def of(cls, values: Tensor) -> Stat:
        values = values.detach().float()
        return cls(float(values.sum()), values.numel(), float(values.max()) if values.numel() else float("nan"))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")


def merge(stats: Iterable[Mapping[str, Stat]]) -> dict[str, Stat]:
    """Per-name sums, counts and maxima over micro-batches."""
    merged: dict[str, Stat] = {}
    for part in stats:
        for name, stat in part.items():
            old = merged.get(name)
            merged[name] = stat if old is None else Stat(old.total + stat.total, old.count + stat.count, max(old.maximum, stat.maximum))
    return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    loss: Float[Tensor, ""]  # this part's share: the parts of a split sum to the loss of the whole
    stats: Mapping[str, Stat]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A composition of functions of one argument kind each; ``None`` leaves its term out."""

    objective: Callable[[Tensor, Tensor], Objective]
    aggregate: Callable[[Tensor, Batch], Tensor]
    correct: Callable[[Tensor, Tensor], Tensor] | None = None
    kl: Callable[[Tensor], Tensor] | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

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
        policy = scores.logprobs
        proximal = policy.detach() if batch.proximal_logprobs is None else batch.proximal_logprobs
        log_ratio = policy - proximal
        mismatch = proximal - batch.behavior_logprobs

        objective = self.objective(log_ratio, batch.advantages.to(policy))
        weights = torch.ones_like(policy) if self.correct is None else self.correct(mismatch, batch.rollout_index)
        loss = -self.aggregate(weights * objective.values, batch)
        stats = {
            "policy/ratio": Stat.of(log_ratio.exp()),
            "policy/clip_share": Stat.of(objective.clipped),
            "policy/entropy": Stat.of(scores.entropy),
            "sampler/logprob_diff": Stat.of(mismatch.abs()),
            "sampler/k3": Stat.of(mismatch.detach().expm1() - mismatch),
        }
        if self.correct is not None:
            stats |= {"sampler/weight": Stat.of(weights), "sampler/weight_truncated_share": Stat.of(weights < mismatch.exp())}
        if self.needs_reference:
            assert self.kl is not None and batch.reference_logprobs is not None, "a KL term needs the reference's log-probs"
            kl = self.kl(policy - batch.reference_logprobs)
            loss = loss + self.kl_coef * self.aggregate(kl, batch)
            stats["policy/kl"] = Stat.of(kl)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * self.aggregate(scores.entropy, batch)
        return LossOutput(loss=loss, stats=stats)
