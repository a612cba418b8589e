"""Batches of as many tokens as a test wants, the numbers to put into them, and the aggregations by name."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from grpo import aggregation
from grpo.batch import Batch, collate
from grpo.types import Completion, FinishReason, Group, Problem, Rollout

NAN = math.nan
LENGTH = 7  # of constant_length
AGGREGATIONS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "token_mean": aggregation.token_mean,
    "sequence_mean": aggregation.sequence_mean,
    "constant_length": partial(aggregation.constant_length, length=LENGTH),
    "group_mean": aggregation.group_mean,
    "sequence_sum": aggregation.sequence_sum,
}

Lengths = Sequence[Sequence[int]]  # tokens of every completion, by group
ragged = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4)


def make_groups(lengths: Lengths, rewards: Sequence[Sequence[float]] | None = None, seed: int = 0) -> list[Group]:
    rng, groups = random.Random(seed), []
    for g, row in enumerate(lengths):
        problem = Problem(id=f"p{g}", prompt="?", answer="1")
        rollouts = [
            Rollout(
                problem=problem,
                completion=Completion(
                    problem_id=problem.id,
                    index=i,
                    prompt_ids=(1,),
                    token_ids=tuple(range(n)),
                    text="",
                    logprobs=tuple(rng.uniform(-4, 0) for _ in range(n)),
                    policy_versions=(0,) * n,
                    finish_reason=FinishReason.stop,
                ),
                scores={},
                reward=rewards[g][i] if rewards else rng.choice([0.0, 1.0]),
            )
            for i, n in enumerate(row)
        ]
        groups.append(Group(problem=problem, rollouts=tuple(rollouts)))
    return groups


def make_batch(lengths: Lengths, rewards: Sequence[Sequence[float]] | None = None, seed: int = 0) -> Batch:
    return collate(make_groups(lengths, rewards, seed))


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def groups_of(*sizes: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def close(tolerance: float) -> dict[str, float]:
    return {"rtol": tolerance, "atol": tolerance}
