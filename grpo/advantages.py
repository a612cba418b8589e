"""Rewards of a group → advantages: ``f(rewards [rollouts], group_index [rollouts]) -> [rollouts]``.

One rule for all: a group whose rewards are all equal (``max == min``, not ``std > 0``: the standard deviation of equal floats
is often not zero) has advantage exactly 0, and so has a group of one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rewards = Float[Tensor, " rollouts"]
Groups = Int[Tensor, " rollouts"]


def group_norm(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = (r_i − mean(r)) / std(r) over the group, population standard deviation (DeepSeekMath 2402.03300 §4.1.2, R1 Eq. 3)."""
    centred, count = _centred(rewards, group_index)
    variance = _group_sum(centred**2, group_index) / count
    return torch.where(_has_signal(rewards, group_index), centred / variance[group_index].sqrt(), 0.0).float()


def center(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = r_i − mean(r) over the group: Dr. GRPO (2503.20783), which drops the division that favours easy and hard groups."""
    centred, _ = _centred(rewards, group_index)
    return torch.where(_has_signal(rewards, group_index), centred, 0.0).float()


def leave_one_out(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = r_i − mean of the others = G/(G−1) · (r_i − mean(r)): RLOO (2402.14740)."""
    centred, count = _centred(rewards, group_index)
    factor = (count / (count - 1).clamp(min=1))[group_index]
    return torch.where(_has_signal(rewards, group_index), centred * factor, 0.0).float()


def _group_sum(values: Tensor, group_index: Tensor) -> Tensor:
    num_groups = int(group_index.max()) + 1 if group_index.numel() else 0
    return torch.zeros(num_groups, dtype=values.dtype).index_add_(0, group_index, values)


def _centred(rewards: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """(r_i − mean of its group, completions per group), in float64: the difference is what matters."""
    rewards = rewards.double()
    count = _group_sum(torch.ones_like(rewards), group_index)
    return rewards - (_group_sum(rewards, group_index) / count)[group_index], count


def _has_signal(rewards: Tensor, group_index: Tensor) -> Tensor:
    num_groups = int(group_index.max()) + 1 if group_index.numel() else 0
    high = torch.full((num_groups,), -torch.inf, dtype=rewards.dtype).scatter_reduce(0, group_index, rewards, "amax")
    low = torch.full((num_groups,), torch.inf, dtype=rewards.dtype).scatter_reduce(0, group_index, rewards, "amin")
    return (high != low)[group_index]
