"""From rewards to what each token is credited with: baseline, the KL in the reward, normalisation. ``Credit(batch) -> [tokens]``.

    A_i = advantage(Σ_k w_k r_ik)      or, with ``per_part``,      A_i = Σ_k w_k advantage(r_ik)
    A_t = A_i − kl_coef · Σ_{s ≥ t} KL_s        with a KL in the reward: each token answers for the drift that follows it
    A_t = normalise(A_t)                        over all tokens of the batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from grpo.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Credit:
    """How rewards become advantages; ``part_weights`` is empty where the parts are summed before the advantage is taken."""

    advantage: Callable[[Tensor, Tensor], Tensor]
    part_weights: Mapping[str, float] = field(default_factory=dict)
    kl: Callable[[Tensor, Tensor], Tensor] | None = None
    kl_coef: float = 0.0
    normalise: Callable[[Tensor], Tensor] | None = None

    @property
    def needs_reference(self) -> bool:
        return self.kl is not None and self.kl_coef != 0

    def __call__(self, batch: Batch) -> Float[Tensor, " tokens"]:
        credit = self._of_rollouts(batch)[batch.rollout_index]
        if self.needs_reference:
            credit = credit - self.kl_coef * reverse_cumsum(self._kl(batch), batch.rollout_index)
        return credit if self.normalise is None else self.normalise(credit)

    def _of_rollouts(self, batch: Batch) -> Tensor:
        if not self.part_weights:
            return self.advantage(batch.rewards, batch.group_index)
        assert batch.part_rewards is not None, "advantages part by part need the rewards part by part"
        parts = batch.part_rewards.unbind(1)
        weighted = [w * self.advantage(part, batch.group_index) for w, part in zip(self.part_weights.values(), parts, strict=True)]
        return torch.stack(weighted).sum(0)

    def _kl(self, batch: Batch) -> Tensor:
        """Of the policy that sampled: its log-probs are at hand, and the reward belongs to what it did."""
        assert self.kl is not None and batch.reference_logprobs is not None, "a KL in the reward needs the reference's log-probs"
        log_ratio = (batch.behavior_logprobs - batch.reference_logprobs).double()
        return self.kl(log_ratio, torch.zeros_like(log_ratio))


def reverse_cumsum(values: Float[Tensor, " tokens"], rollout_index: Tensor) -> Float[Tensor, " tokens"]:
    """Σ_{s ≥ t} of each token's own completion."""
    if not values.numel():
        return values
    to_go = values.flip(0).cumsum(0).flip(0)
    last = torch.searchsorted(rollout_index, rollout_index, right=True) - 1  # the last token of each completion
    return to_go - to_go[last] + values[last]
