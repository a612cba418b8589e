"""From rollouts to a batch, and from a batch to parts of it: who takes part, and what is counted."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo import advantages
from grpo.batch import Totals

from .small_batches import NAN, Lengths, make_batch, ragged


def test_collate_golden() -> None:
    batch = make_batch([[2, 0, 1], [3], [1, 1]], [[1, 1, 0], [NAN], [0.5, NAN]])
    # the empty completion of p0, the unscored one of p1 (its whole group) and of p2 take no part
    assert [(r.problem.id, r.completion.index) for r in batch.rollouts] == [("p0", 0), ("p0", 2), ("p2", 0)]
    assert batch.rollout_index.tolist() == [0, 0, 1, 2]
    assert batch.group_index.tolist() == [0, 0, 1]
    assert batch.group_num_tokens.tolist() == [3, 1]
    assert batch.rewards.tolist() == [1, 0, 0.5]
    assert batch.totals == Totals(tokens=4, rollouts=3, groups=2)
    expected = [p for r in batch.rollouts for p in r.completion.logprobs]
    torch.testing.assert_close(batch.behavior_logprobs, torch.tensor(expected))


def test_advantages_are_spread_over_the_tokens() -> None:
    batch = make_batch([[2, 1], [1, 3]], [[1, 0], [0, 4]]).with_advantages(advantages.center)
    assert batch.advantages is not None
    assert batch.advantages.tolist() == [0.5, 0.5, -0.5, -2, 2, 2, 2]


@given(ragged, st.randoms(use_true_random=False))
def test_select_takes_whole_rollouts_and_keeps_what_belongs_to_them(lengths: Lengths, rng: random.Random) -> None:
    batch = make_batch(lengths).with_advantages(advantages.center)
    where: list[list[int]] = [[] for _ in batch.rollouts]  # the tokens of each rollout, by a plain loop
    for t, i in enumerate(batch.rollout_index.tolist()):
        where[i].append(t)
    keep = rng.sample(range(len(where)), rng.randint(0, len(where)))
    part = batch.select(keep)
    tokens = [t for i in keep for t in where[i]]
    assert part.rollouts == tuple(batch.rollouts[i] for i in keep)
    assert part.rollout_index.tolist() == [n for n, i in enumerate(keep) for _ in where[i]]
    assert part.behavior_logprobs.tolist() == batch.behavior_logprobs[tokens].tolist()
    assert batch.advantages is not None and part.advantages is not None
    assert part.advantages.tolist() == batch.advantages[tokens].tolist()
    assert part.group_index.tolist() == batch.group_index[keep].tolist()
    assert part.rewards.tolist() == batch.rewards[keep].tolist()
    assert part.totals == batch.totals and part.group_num_tokens.tolist() == batch.group_num_tokens.tolist()


@given(ragged, st.integers(1, 6))
def test_minibatches_are_whole_groups_with_totals_of_their_own(lengths: Lengths, num: int) -> None:
    batch = make_batch(lengths)
    parts = list(batch.minibatches(num))
    assert len(parts) == min(num, len(lengths))
    seen: list[str] = []
    for part in parts:
        mine = sorted({r.problem.id for r in part.rollouts})
        seen += mine
        rows = [lengths[int(name[1:])] for name in mine]
        assert part.totals == Totals(tokens=sum(map(sum, rows)), rollouts=sum(map(len, rows)), groups=len(rows))
        assert len(part.rollouts) == part.totals.rollouts, "a group is not cut"
    assert sorted(seen) == [f"p{g}" for g in range(len(lengths))]
    assert max(p.totals.groups for p in parts) - min(p.totals.groups for p in parts) <= 1
