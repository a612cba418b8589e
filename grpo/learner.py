"""What happens to a step's groups: advantages, the log-probs to compare with, the updates, the reference that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.batch import Batch, collate
from grpo.credit import Credit
from grpo.losses import Loss
from grpo.metrics import has_signal
from grpo.policy import Policy
from grpo.types import Group

Metrics = dict[str, float]


@dataclass(kw_only=True)
class Learner:
    """One policy, its objective and its reference.

    Attributes:
        updates_per_step: optimiser updates made from the rollouts of one step.
        reference_refresh: optimiser updates after which the reference becomes the policy, as the R1 paper counts; 0: never.
        mask_truncated: completions cut off by the token limit take no part in the loss.
        make_reference: a frozen copy of the policy as it is now.
    """

    policy: Policy
    credit: Credit
    loss: Loss
    make_reference: Callable[[], Policy]
    updates_per_step: int = 1
    reference_refresh: int = 0
    mask_truncated: bool = False
    reference: Policy | None = None
    reference_age: int = 0

    def learn(self, groups: Sequence[Group], phase: Callable[[str], None] = lambda name: None) -> tuple[Batch, Metrics]:
        """All updates of one step: (the batch with its advantages, the metrics of the updates as one row)."""
        if (self.loss.needs_reference or self.credit.needs_reference) and self.reference is None:
            self.reference = self.make_reference()
        phase("preparing")
        batch = self.prepare(collate(groups, tuple(self.credit.part_weights)))
        phase("updating")
        return batch, merge_metrics([self.update(minibatch) for minibatch in batch.minibatches(self.updates_per_step)])

    def has_signal(self, group: Group) -> bool:
        """Whether a group can move the policy: not if its rewards are equal – where advantages are taken part by part, in every part –
        nor if all of it is masked."""
        if self.mask_truncated and all(rollout.completion.truncated for rollout in group.rollouts if rollout.scored):
            return False
        parts = self.credit.part_weights
        return any(has_signal(group, part) for part in parts) if parts else has_signal(group)

    def prepare(self, batch: Batch) -> Batch:
        """Add what the objective asks for: the log-probs of the policies it compares with, and advantages."""
        if self.credit.needs_reference:
            batch = self.referred(batch)
        batch = replace(batch, advantages=self.credit(batch))
        if self.mask_truncated:  # after the advantages: a truncated completion was still an answer to compare with
            batch = batch.without_truncated()
        if batch.reference_logprobs is None and self.loss.needs_reference:
            batch = self.referred(batch)
        if self.updates_per_step > 1 and not self.loss.anchor_is_behavior:  # with one update the proximal policy is the policy
            batch = replace(batch, proximal_logprobs=self.proximal(batch))
        return batch

    def referred(self, batch: Batch) -> Batch:
        assert self.reference is not None, "the reference is made before the first step"
        return replace(batch, reference_logprobs=self.reference.score(batch).logprobs)

    def proximal(self, batch: Batch) -> Tensor:
        """Log-probs of the policy as it is now; those of completions without signal, which no update looks at, stay 0."""
        assert batch.advantages is not None, "advantages come first"
        if not self.loss.signal_only:
            return self.policy.score(batch).logprobs
        trained = batch.with_signal()
        moves = torch.zeros(len(batch.rollouts), dtype=torch.bool)
        moves[batch.rollout_index[batch.advantages != 0]] = True
        logprobs = self.policy.score(trained).logprobs
        return logprobs.new_zeros(batch.num_tokens).masked_scatter(moves[batch.rollout_index], logprobs)

    def update(self, minibatch: Batch) -> Metrics:
        metrics = self.policy.update(minibatch, self.loss)
        metrics["policy/empty_updates"] = float(metrics["policy/trained_rollouts"] == 0)
        self.reference_age += 1
        if self.reference is not None and self.reference_refresh and self.reference_age >= self.reference_refresh:
            self.reference, self.reference_age = self.make_reference(), 0
        return metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, the policy aside."""
        return {"reference_age": self.reference_age, "reference": None if self.reference is None else self.reference.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.reference_age = state["reference_age"]
        if state["reference"] is not None:
            self.reference = self.make_reference()
            self.reference.load_state(state["reference"])


def merge_metrics(updates: Sequence[Metrics]) -> Metrics:
    """Several updates of one step → one row: maxima of ``…_max``, sums of counts, means of the rest, each where it exists."""
    values: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            values.setdefault(name, []).append(value)
    return {name: _merged(name, found) for name, found in sorted(values.items())}


def _merged(name: str, values: Sequence[float]) -> float:
    if name.endswith("_max"):
        return max(values)
    total = sum(values)
    return total if name in ("policy/trained_rollouts", "policy/empty_updates", "throughput/update_tokens") else total / len(values)
