"""Rewards of a group → advantages: ``f(rewards [rollouts], group_index [rollouts]) -> [rollouts]``, and what may follow, per token.

One rule for all that compare within a group: a group whose rewards are all equal (``max == min``, not ``std > 0``: the standard
deviation of equal floats is often not zero) has advantage exactly 0, and so has a group of one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo.notation import written

Rewards = Float[Tensor, " rollouts"]
Groups = Int[Tensor, " rollouts"]
Tokens = Float[Tensor, " tokens"]


@written("(rᵢ − mean(r)) / std(r), over the group", "DeepSeekMath 2402.03300 §4.1.2; DeepSeek-R1 2501.12948 Eq. 3")
def group_norm(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = (r_i − mean(r)) / std(r) over the group, population standard deviation (DeepSeekMath 2402.03300 §4.1.2, R1 Eq. 3)."""
    centred, count = _centred(rewards, group_index)
    variance = _group_sum(centred**2, group_index) / count
    return torch.where(has_signal(rewards, group_index), centred / variance[group_index].sqrt(), 0.0)


@written("rᵢ − mean(r), over the group", "Dr. GRPO 2503.20783 §3.1")
def center(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = r_i − mean(r) over the group: Dr. GRPO (2503.20783), which drops the division that favours easy and hard groups."""
    centred, _ = _centred(rewards, group_index)
    return torch.where(has_signal(rewards, group_index), centred, 0.0)


@written("rᵢ − mean(r of the others), over the group", "RLOO 2402.14740 §2.3")
def leave_one_out(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = r_i − mean of the others = G/(G−1) · (r_i − mean(r)): RLOO (2402.14740)."""
    centred, count = _centred(rewards, group_index)
    factor = (count / (count - 1).clamp(min=1))[group_index]
    return torch.where(has_signal(rewards, group_index), centred * factor, 0.0)


@written("(rᵢ − mean(r)) / mean(r), over the group", "MaxRL 2602.02710")
def max_rl(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = (r_i − mean(r)) / mean(r) over the group (MaxRL 2602.02710): the gradient of log p(correct), not of p(correct).

    Raises:
        ValueError: a group whose rewards differ has a mean of 0 or less; the formula is for rewards ≥ 0, such as 0 and 1.
    """
    centred, count = _centred(rewards, group_index)
    signal = has_signal(rewards, group_index)
    mean = (_group_sum(rewards.double(), group_index) / count)[group_index]
    if bool((signal & (mean <= 0)).any()):
        worst = float(mean[signal].min())
        raise ValueError(f"max_rl divides by a group's mean reward, and one is {worst:g}; it is for rewards of 0 or more, such as 0 and 1")
    return torch.where(signal, centred / mean, 0.0)


@written("rᵢ", "REINFORCE; the batch is the baseline: REINFORCE++ 2501.03262 Eq. 6")
def reward_itself(rewards: Rewards, group_index: Groups) -> Rewards:
    """A_i = r_i: no baseline from the group. With ``normalise: whiten`` it is REINFORCE++ (2501.03262)."""
    return rewards.double()


@written("(Aₜ − mean(A)) / std(A), over all tokens of the batch", "REINFORCE++ 2501.03262 Eq. 7")
def whiten(advantages: Tokens) -> Tokens:
    """(A_t − mean(A)) / std(A) over all tokens of the batch (REINFORCE++ 2501.03262); exactly 0 where all are equal."""
    if advantages.numel() == 0 or bool(advantages.max() == advantages.min()):
        return torch.zeros_like(advantages)
    centred = advantages.double() - advantages.double().mean()
    return centred / centred.square().mean().sqrt()


def has_signal(rewards: Rewards, group_index: Groups) -> Tensor:
    """``[rollouts]`` of bool: whether the rewards of the rollout's group differ at all."""
    num_groups = int(group_index.max()) + 1 if group_index.numel() else 0
    high = torch.full((num_groups,), -torch.inf, dtype=rewards.dtype).scatter_reduce(0, group_index, rewards, "amax")
    low = torch.full((num_groups,), torch.inf, dtype=rewards.dtype).scatter_reduce(0, group_index, rewards, "amin")
    return (high != low)[group_index]


def _group_sum(values: Tensor, group_index: Tensor) -> Tensor:
    num_groups = int(group_index.max()) + 1 if group_index.numel() else 0
    return torch.zeros(num_groups, dtype=values.dtype).index_add_(0, group_index, values)


def _centred(rewards: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor]:
    """(r_i − mean of its group, completions per group), in float64: the difference is what matters."""
    rewards = rewards.double()
    count = _group_sum(torch.ones_like(rewards), group_index)
    return rewards - (_group_sum(rewards, group_index) / count)[group_index], count
