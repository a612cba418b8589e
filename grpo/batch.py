"""Rollouts → flat tensors. Only tokens the policy sampled are in them: no prompt, no output of a tool, no padding, no mask.

Axes: ``tokens`` (all trained tokens of the batch, concatenated), ``rollouts``, ``groups``. ``rollout_index[t]`` says which
rollout token ``t`` belongs to, ``group_index[i]`` which group rollout ``i`` belongs to – so a ragged group is ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo.types import Group, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The denominators of one optimiser step, counted before any drop or split: ``Totals(tokens=4480, rollouts=128, groups=16)``"""

    tokens: int
    rollouts: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rollouts and, beside them, one tensor a quantity. A split takes whole rollouts and keeps ``totals``."""

    rollouts: tuple[Rollout, ...]
    behavior_logprobs: Float[Tensor, " tokens"]
    rollout_index: Int[Tensor, " tokens"]
    group_index: Int[Tensor, " rollouts"]
    group_num_tokens: Int[Tensor, " groups"]  # of the whole groups, also when this batch holds a part of one
    rewards: Float[Tensor, " rollouts"]
    totals: Totals
    part_rewards: Float[Tensor, "rollouts parts"] | None = None  # before weighting; for advantages that are taken part by part
    advantages: Float[Tensor, " tokens"] | None = None
    proximal_logprobs: Float[Tensor, " tokens"] | None = None  # None: the policy itself, detached
    reference_logprobs: Float[Tensor, " tokens"] | None = None

    @property
    def num_tokens(self) -> int:
        return self.rollout_index.numel()

    def with_advantages(self, advantage: Callable[..., Tensor]) -> Batch:
        """``advantage(rewards [rollouts], group_index [rollouts]) -> [rollouts]``, spread over each rollout's tokens."""
        return replace(self, advantages=advantage(self.rewards, self.group_index)[self.rollout_index])

    def without_truncated(self) -> Batch:
        """Without the completions that the token limit cut off, by the engine's finish reason. They leave the totals as well."""
        batch = self.select([i for i, rollout in enumerate(self.rollouts) if not rollout.completion.truncated])
        lengths = torch.bincount(batch.group_index[batch.rollout_index], minlength=len(self.group_num_tokens))
        totals = Totals(tokens=batch.num_tokens, rollouts=len(batch.rollouts), groups=len(batch.group_index.unique()))
        return replace(batch, group_num_tokens=lengths, totals=totals)

    def select(self, keep: Sequence[int]) -> Batch:
        """The rollouts at positions ``keep``, in that order, under unchanged totals and group numbers."""
        if list(keep) == list(range(len(self.rollouts))):
            return self
        tokens, rows = self.token_positions(keep), torch.tensor(list(keep), dtype=torch.long)
        lengths = self.rollout_index.bincount(minlength=len(self.rollouts))[rows]

        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[tokens]

        return replace(
            self,
            rollouts=tuple(self.rollouts[i] for i in keep),
            behavior_logprobs=self.behavior_logprobs[tokens],
            rollout_index=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
            group_index=self.group_index[rows],
            rewards=self.rewards[rows],
            part_rewards=None if self.part_rewards is None else self.part_rewards[rows],
            advantages=of(self.advantages),
            proximal_logprobs=of(self.proximal_logprobs),
            reference_logprobs=of(self.reference_logprobs),
        )

    def token_positions(self, rollouts: Sequence[int]) -> Tensor:
        """Where the tokens of these rollouts stand in the batch's tensors, in this order."""
        starts = torch.searchsorted(self.rollout_index, torch.arange(len(self.rollouts) + 1))
        return torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in rollouts] or [torch.arange(0)])

    def with_signal(self) -> Batch:
        """Without the rollouts whose advantages are all exactly zero: they move no weight, yet stay in ``totals``."""
        assert self.advantages is not None, "advantages come first"
        signal = torch.zeros(len(self.rollouts), dtype=torch.bool)
        signal[self.rollout_index[self.advantages != 0]] = True
        return self.select(signal.nonzero().flatten().tolist())

    def minibatches(self, num: int) -> Iterator[Batch]:
        """``num`` parts of whole groups, about equally many each, every part with totals of its own: one optimiser step each."""
        groups = self.group_index.unique().tolist()
        num = max(1, min(num, len(groups)))
        for part in range(num):
            mine = set(groups[part::num])
            batch = self.select([i for i, g in enumerate(self.group_index.tolist()) if g in mine])
            yield replace(batch, totals=Totals(tokens=batch.num_tokens, rollouts=len(batch.rollouts), groups=len(mine)))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there. To a GPU it is copied from pinned memory: an ordinary copy would wait for all that the GPU has yet to compute."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(groups: Sequence[Group], parts: Sequence[str] = ()) -> Batch:
    """Flatten groups. A completion without tokens of the policy, or one that could not be scored, is left out: of the loss, of its totals
    and of what its group is compared with.

    Args:
        parts: the reward parts whose values become ``part_rewards``, in this order.
    """
    kept = [[r for r in group.rollouts if r.completion.num_sampled and r.scored] for group in groups]
    kept = [rollouts for rollouts in kept if rollouts]
    rollouts = tuple(r for group in kept for r in group)
    lengths = torch.tensor([r.completion.num_sampled for r in rollouts], dtype=torch.long)
    group_lengths = torch.tensor([sum(r.completion.num_sampled for r in group) for group in kept], dtype=torch.long)
    return Batch(
        rollouts=rollouts,
        behavior_logprobs=torch.tensor([p for r in rollouts for p in r.completion.sampled_logprobs], dtype=torch.float32),
        rollout_index=torch.repeat_interleave(torch.arange(len(rollouts)), lengths),
        group_index=torch.repeat_interleave(torch.arange(len(kept)), torch.tensor([len(g) for g in kept], dtype=torch.long)),
        group_num_tokens=group_lengths,
        rewards=torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
        part_rewards=torch.tensor([[r.scores[p].value for p in parts] for r in rollouts], dtype=torch.float64) if parts else None,
        totals=Totals(tokens=int(lengths.sum()), rollouts=len(rollouts), groups=len(kept)),
    )
