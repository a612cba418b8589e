"""Rewards of a group → advantages: ``f(rewards [rollouts], group_index [rollouts]) -> [rollouts]``, and what may follow, per token.

One rule for all that compare within a group: a group whose rewards are all equal (``max == min``, not ``std > 0``: the standard
deviation of equal floats is often not zero) has advantage exactly 0, and so has a group of one. A reward that is NaN takes no part in
its group and has advantage 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from grpo.notation import written

Rewards = Real[Tensor, " rollouts"]
Advantages = Float[Tensor, " rollouts"]  # float64
Groups = Int[Tensor, " rollouts"]
Tokens = Float[Tensor, " tokens"]


@written("(rᵢ − mean(r)) / std(r), over the group; 0 where all are equal", "DeepSeekMath 2402.03300 §4.1.2; DeepSeek-R1 2501.12948 Eq. 3")
def group_norm(rewards: Rewards, group_index: Groups) -> Advantages:
    """A_i = (r_i − mean(r)) / std(r) over the group, population standard deviation (DeepSeekMath 2402.03300 §4.1.2, R1 Eq. 3)."""
    centred, count, _ = _centred(rewards, group_index)
    variance = _group_sum(centred**2, group_index) / count
    return torch.where(has_signal(rewards, group_index), centred / variance[group_index].sqrt(), 0.0)


@written("rᵢ − mean(r), over the group", "Dr. GRPO 2503.20783 §3.1")
def center(rewards: Rewards, group_index: Groups) -> Advantages:
    """A_i = r_i − mean(r) over the group: Dr. GRPO (2503.20783), which drops the division that scales up easy and hard groups."""
    centred, _, exponent = _centred(rewards, group_index)
    return torch.where(has_signal(rewards, group_index), _times_power_of_two(centred, exponent), 0.0)


@written("rᵢ − mean(r of the others), over the group; 0 where all are equal", "RLOO 2402.14740 §2.3")
def leave_one_out(rewards: Rewards, group_index: Groups) -> Advantages:
    """A_i = r_i − mean of the others = G/(G−1) · (r_i − mean(r)): RLOO (2402.14740)."""
    centred, count, exponent = _centred(rewards, group_index)
    factor = (count / (count - 1).clamp(min=1))[group_index]
    return torch.where(has_signal(rewards, group_index), _times_power_of_two(centred * factor, exponent), 0.0)


@written("(rᵢ − mean(r)) / mean(r), over the group; 0 where all are equal", "MaxRL 2602.02710")
def max_rl(rewards: Rewards, group_index: Groups) -> Advantages:
    """A_i = (r_i − mean(r)) / mean(r) over the group of G (MaxRL 2602.02710).

    For rewards of 0 and 1 with p = p(correct), the expected gradient is Σ_{j < G−1} (1 − p)^j ∇p: that of log p to order G − 1, not of p.
    A group without a success is left out, and a group of two is plain RL.

    Raises:
        ValueError: a group whose rewards differ holds one below 0; the formula is for rewards ≥ 0, such as 0 and 1.
    """
    centred, count, exponent = _centred(rewards, group_index)
    signal = has_signal(rewards, group_index)
    if bool((signal & (rewards < 0)).any()):
        raise ValueError(
            f"max_rl divides by a group's mean reward, and one of the rewards is {float(rewards[signal].min()):g}; it is for rewards of 0 "
            "or more, such as 0 and 1: take out penalties (a part such as soft_overlong, a negative weight), or use another advantage"
        )
    scaled = _times_power_of_two(torch.where(rewards.isnan(), 0.0, rewards.double()), -exponent)
    mean = (_group_sum(scaled, group_index) / count)[group_index]
    return torch.where(signal, centred / torch.where(signal, mean, 1.0), 0.0)


@written("rᵢ", "REINFORCE; the batch is the baseline: REINFORCE++ 2501.03262 v1 §3.1")
def reward_itself(rewards: Rewards, group_index: Groups) -> Advantages:
    """A_i = r_i: no baseline from the group. With ``normalise: whiten`` it is REINFORCE++ (2501.03262)."""
    return rewards.double().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


@written("(Aₜ − mean(A)) / std(A), over all tokens of the batch; 0 where all are equal", "REINFORCE++ 2501.03262 v1 §3.5")
def whiten(advantages: Tokens) -> Tokens:
    """(A_t − mean(A)) / std(A) over all tokens of the batch (REINFORCE++ 2501.03262); exactly 0 where all are equal."""
    if advantages.numel() == 0 or bool(advantages.max() == advantages.min()):
        return torch.zeros_like(advantages)
    scaled = _times_power_of_two(advantages.double(), -_exponent(advantages.double().abs().max()))
    centred = scaled - scaled.mean()
    return centred / centred.square().mean().sqrt()


def has_signal(rewards: Rewards, group_index: Groups) -> Tensor:
    """``[rollouts]`` of bool: whether the rewards of the rollout's group differ at all; False where its own reward is NaN."""
    rewards = rewards.double()
    scored = ~rewards.isnan()
    high = _group_extreme(torch.where(scored, rewards, -torch.inf), group_index, "amax")
    low = _group_extreme(torch.where(scored, rewards, torch.inf), group_index, "amin")
    return (high != low)[group_index] & scored


def _num_groups(group_index: Tensor) -> int:
    return int(group_index.max()) + 1 if group_index.numel() else 0


def _group_sum(values: Tensor, group_index: Tensor) -> Tensor:
    return values.new_zeros(_num_groups(group_index)).index_add_(0, group_index, values)


def _group_extreme(values: Tensor, group_index: Tensor, which: str) -> Tensor:
    return values.new_zeros(_num_groups(group_index)).scatter_reduce(0, group_index, values, which, include_self=False)


def _centred(rewards: Tensor, group_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_i, scored completions per group – at least 1, e_i) in float64, with r_i − mean of its group = c_i · 2^e_i.

    2^e_i is the size of the group's largest reward: neither the square of 1e-170 becomes 0 nor the sum of two 1e308 infinite. The mean is
    taken of r − min, so that what all rewards of a group have in common is gone before anything is rounded.
    """
    rewards = rewards.double()
    scored = ~rewards.isnan()
    count = _group_sum(scored.double(), group_index).clamp(min=1)
    exponent = _exponent(_group_extreme(torch.where(scored, rewards.abs(), 0.0), group_index, "amax"))[group_index]
    scaled = _times_power_of_two(rewards, -exponent)
    low = _group_extreme(torch.where(scored, scaled, torch.inf), group_index, "amin")
    above = torch.where(scored, scaled - low[group_index], 0.0)
    return torch.where(scored, above - (_group_sum(above, group_index) / count)[group_index], 0.0), count, exponent


def _exponent(peak: Tensor) -> Tensor:
    """The e for which ½ ≤ peak · 2^−e < 1; 0 for 0."""
    return torch.frexp(peak).exponent.long()


def _times_power_of_two(values: Tensor, exponent: Tensor) -> Tensor:
    """values · 2^exponent, without rounding. In two halves, for 2^1074 is no float64; made of bits, for ``exp2`` rounds."""
    half = exponent // 2
    return values * _power_of_two(half) * _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 1023) << 52).view(torch.float64)
