"""The maths: golden values with their arithmetic, and the whole loss against a per-token loop that was written from the formula."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo import advantages, aggregation, corrections, kl, objectives, ratios
from grpo.batch import Batch, Totals, collate
from grpo.losses import Loss, Stat, TokenScores, merge
from grpo.rewards.base import combine
from grpo.types import Completion, FinishReason, Group, Problem, Rollout, Score

NAN = math.nan
LENGTH = 7  # of constant_length
ADVANTAGES = [advantages.group_norm, advantages.center, advantages.leave_one_out]  # each a difference to the group
AGGREGATIONS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "token_mean": aggregation.token_mean,
    "sequence_mean": aggregation.sequence_mean,
    "constant_length": partial(aggregation.constant_length, length=LENGTH),
    "group_mean": aggregation.group_mean,
    "sequence_sum": aggregation.sequence_sum,
}
KLS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
CLIP_LOW, CLIP_HIGH, CAP = 0.2, 0.3, 1.5

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


# ---------------------------------------------------------------- rollouts → batch


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


# ---------------------------------------------------------------- advantages


def test_advantages_golden() -> None:
    rewards, groups = tensor(1, 0, 0, 1, 1, 0, 0), groups_of(4, 3)
    # group 0: mean 1/2, variance 1/4, std 1/2; group 1: mean 1/3, variance (4/9 + 1/9 + 1/9)/3 = 2/9, std √2/3
    root = math.sqrt(2)
    expected = [1, -1, -1, 1, (2 / 3) / (root / 3), (-1 / 3) / (root / 3), (-1 / 3) / (root / 3)]
    assert advantages.group_norm(rewards, groups).tolist() == pytest.approx(expected, rel=1e-6)
    assert advantages.center(rewards, groups).tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 2 / 3, -1 / 3, -1 / 3], rel=1e-6)
    # group 0: 1 − 1/3, 0 − 2/3; group 1: 1 − 0, 0 − 1/2
    assert advantages.leave_one_out(rewards, groups).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 1, -0.5, -0.5], rel=1e-6)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 9))
def test_equal_rewards_of_any_float_give_exactly_zero(advantage: Any, reward: float, count: int) -> None:
    """0.1 · 3 / 3 is not 0.1: a test of ``std > 0`` lets rounding noise through, blown up to size one."""
    rewards, groups = tensor(*[reward] * count, 1, 0), groups_of(count, 2)
    out = advantage(rewards, groups)
    assert out[:count].tolist() == [0.0] * count
    assert out[-2] > 0 > out[-1], "the group beside it keeps its signal"


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_group_of_one_is_zero(advantage: Any) -> None:
    assert advantage(tensor(3.7, 1, 0), torch.tensor([1, 0, 0]))[0] == 0.0


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_unscored_rollouts_leave_their_group(advantage: Any) -> None:
    with_unscored = make_batch([[1, 1, 1, 1]], [[1, NAN, 0, 0]]).with_advantages(advantage)
    without = make_batch([[1, 1, 1]], [[1, 0, 0]]).with_advantages(advantage)
    assert with_unscored.advantages is not None and without.advantages is not None
    assert with_unscored.advantages.tolist() == without.advantages.tolist()
    assert with_unscored.totals == without.totals


reward_groups = st.lists(st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=6), min_size=1, max_size=4)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(reward_groups, st.integers(-100, 100), st.randoms(use_true_random=False))
def test_advantages_ignore_a_shift_and_follow_a_permutation(
    advantage: Any, rows: list[list[float]], shift: int, rng: random.Random
) -> None:
    rewards, groups = tensor(*[r for row in rows for r in row]), groups_of(*map(len, rows))
    plain = advantage(rewards, groups)
    torch.testing.assert_close(advantage(rewards + shift, groups), plain, **close(1e-6))
    order = rng.sample(range(len(rewards)), len(rewards))  # mixes the groups
    torch.testing.assert_close(advantage(rewards[order], groups[order]), plain[order], **close(1e-6))


@given(reward_groups, st.sampled_from([1e-3, 0.5, 7.0]))
def test_group_norm_has_mean_0_and_spread_1_whatever_the_scale(rows: list[list[float]], scale: float) -> None:
    groups = groups_of(*map(len, rows))
    out = advantages.group_norm(tensor(*[scale * r for row in rows for r in row]), groups).double()
    for g, row in enumerate(rows):
        mine = out[groups == g]
        assert float(mine.mean()) == pytest.approx(0, abs=1e-6)
        assert float(mine.square().mean()) == pytest.approx(1.0 if max(row) != min(row) else 0.0, abs=1e-5)


@pytest.mark.parametrize("size", [5e-324, 1e-170, 1.0, 1e200, 8e307])
def test_no_size_of_rewards_is_too_small_or_too_large(size: float) -> None:
    """The square of 1e-170 is 0, that of 1e200 is ∞, and so is 8e307 − (−1.6e308): 1.6e308 is nearly the largest float64."""
    rewards, groups = torch.tensor([size, -2 * size, size], dtype=torch.float64), groups_of(3)
    root = math.sqrt(2)  # mean 0, variance (1 + 4 + 1)/3 · size² = 2 · size²
    assert advantages.group_norm(rewards, groups).tolist() == pytest.approx([1 / root, -root, 1 / root], rel=1e-12)
    assert advantages.whiten(rewards).tolist() == pytest.approx([1 / root, -root, 1 / root], rel=1e-12)
    assert advantages.center(rewards, groups).tolist() == pytest.approx(rewards.tolist(), rel=1e-12)
    # mean (0 + 2 + 1)/3 · size = size: (0 − 1)/1, (2 − 1)/1, (1 − 1)/1
    successes = torch.tensor([0, 2 * size, size], dtype=torch.float64)
    assert advantages.max_rl(successes, groups).tolist() == pytest.approx([-1, 1, 0], abs=1e-12)


@given(reward_groups)
def test_leave_one_out_is_the_difference_to_the_others(rows: list[list[float]]) -> None:
    out = advantages.leave_one_out(tensor(*[r for row in rows for r in row]), groups_of(*map(len, rows))).tolist()
    expected = [r - (sum(row) - r) / (len(row) - 1) if len(row) > 1 and max(row) != min(row) else 0.0 for row in rows for r in row]
    assert out == pytest.approx(expected, abs=1e-5)


decimals = st.integers(-5000, 5000).map(lambda n: n / 1000)  # 0.1 and 0.3 are no floats: sums and shifts round


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(st.lists(decimals, min_size=1, max_size=8), st.integers(-(10**5), 10**5).map(lambda n: n / 1000))
def test_a_shift_by_any_decimal_changes_nothing(advantage: Any, row: list[float], shift: float) -> None:
    rewards, groups = tensor(*row), groups_of(len(row))
    torch.testing.assert_close(advantage(rewards + shift, groups), advantage(rewards, groups), **close(1e-9))


@pytest.mark.parametrize("advantage", ADVANTAGES)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_a_shift_that_rounds_nothing_changes_not_a_bit(advantage: Any, row: list[int]) -> None:
    """2^52 + 1 is a float, 2^52 + ½ is none: a mean of the rewards themselves would be off by ½."""
    rewards, groups = tensor(*row), groups_of(len(row))
    assert advantage(rewards + 2.0**52, groups).tolist() == advantage(rewards, groups).tolist()


@given(st.lists(st.tuples(st.integers(-30, 30), st.integers(0, 30)), min_size=1, max_size=5), st.data())
def test_decimal_parts_that_sum_to_the_same_number_are_equal_rewards(terms: list[tuple[int, int]], data: st.DataObject) -> None:
    """Σ weight · value, both with one decimal, is Σ w v / 100 exactly: the rest, in one part of weight 0.01, makes it any number wanted."""
    total = data.draw(st.integers(-900, 900))
    rest = total - sum(w * v for w, v in terms)
    scores = {str(k): Score(value=v / 10) for k, (_, v) in enumerate(terms)} | {"rest": Score(value=float(rest))}
    weights = {str(k): w / 10 for k, (w, _) in enumerate(terms)} | {"rest": 0.01}
    other = combine({"all": Score(value=total / 10)}, {"all": 0.1})
    assert combine(scores, weights) == other == total / 100
    for advantage in ADVANTAGES:
        assert advantage(tensor(combine(scores, weights), other), groups_of(2)).tolist() == [0, 0]


def test_a_sum_keeps_what_its_terms_can_tell_apart() -> None:
    scores = {"a": Score(value=1.0), "b": Score(value=1e-9), "c": Score(value=1e-170)}
    assert combine(scores, {"a": 1.0, "b": 1.0}) == 1.000000001
    assert combine(scores, {"c": 2.0}) == 2e-170
    assert combine(scores, {"a": 1e200}) == 1e200
    assert combine({}, {}) == 0


@pytest.mark.parametrize("advantage", [*ADVANTAGES, advantages.max_rl])
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.3, NAN]), min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_reward_that_is_nan_leaves_its_group(advantage: Any, rows: list[list[float]]) -> None:
    rewards, groups = tensor(*[r for row in rows for r in row]), groups_of(*map(len, rows))
    out, scored = advantage(rewards, groups), ~rewards.isnan()
    assert not out[~scored].any() and not advantages.has_signal(rewards, groups)[~scored].any()
    assert out[scored].tolist() == advantage(rewards[scored], groups[scored]).tolist()


@pytest.mark.parametrize("advantage", [*ADVANTAGES, advantages.max_rl, advantages.reward_itself])
def test_whole_numbers_and_float32_are_rewards_too(advantage: Any) -> None:
    rewards, groups = torch.tensor([3, 0, 1, 1, 1]), groups_of(3, 2)
    expected = advantage(rewards.double(), groups)
    assert expected.dtype == torch.float64
    assert advantage(rewards, groups).tolist() == expected.tolist() == advantage(rewards.float(), groups).tolist()


@pytest.mark.parametrize("advantage", [*ADVANTAGES, advantages.max_rl, advantages.reward_itself])
def test_advantages_stay_on_the_device_of_the_rewards(advantage: Any) -> None:
    """Without a GPU, a default device that is not the rewards': a tensor made without ``device=`` lands there, and mixing raises."""
    if not torch.cuda.is_available():
        with torch.device("meta"):
            out = advantage(torch.tensor([1.0, 0.0], device="cpu"), torch.tensor([0, 0], device="cpu"))
        assert out.device.type == "cpu"
    else:
        assert advantage(torch.tensor([1.0, 0.0], device="cuda"), torch.tensor([0, 0], device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("size", [1e-170, 1.0, 1e200])
def test_group_norm_has_no_scale(size: float) -> None:
    """Two different rewards are ±1 whatever they are: (r − m)² of 1e-170 is 0 and of 1e200 is ∞."""
    assert advantages.group_norm(tensor(0, size, 0, size), groups_of(4)).tolist() == [-1, 1, -1, 1]


def test_group_norm_of_the_smallest_difference_is_finite() -> None:
    low, high = advantages.group_norm(tensor(0, 5e-324), groups_of(2)).tolist()  # half of it, the mean, is no float
    assert low <= 0 < high < 2


# ---------------------------------------------------------------- objectives


def objective_gradient(objective: Any, log_ratio: Tensor, advantage: Tensor) -> tuple[list[float], list[float], list[bool]]:
    leaf = log_ratio.clone().requires_grad_()
    out = objective(leaf, advantage, leaf)  # log π itself: an anchor of log-prob 0
    (gradient,) = torch.autograd.grad(out.values.sum(), leaf)
    return out.values.tolist(), gradient.tolist(), out.clipped.tolist()


def test_clipped_surrogate_golden() -> None:
    log_ratio = tensor(0.5, 1, 1.5, 0.5, 1, 1.5, 1.5).log()
    values, gradient, clipped = objective_gradient(objectives.clipped_surrogate, log_ratio, tensor(1, 1, 1, -1, -1, -1, 0))
    # A = 1:  min(0.5, 0.8), min(1, 1), min(1.5, 1.2);  A = −1: min(−0.5, −0.8), −1, min(−1.5, −1.2);  A = 0: 0
    assert values == pytest.approx([0.5, 1, 1.2, -0.8, -1, -1.5, 0])
    assert clipped == [False, False, True, True, False, False, False]
    assert gradient == pytest.approx([0.5, 1, 0, 0, -1, -1.5, 0])  # ρ A, or 0 where the bound decides


def test_clip_bounds_are_independent() -> None:
    objective = partial(objectives.clipped_surrogate, clip_low=0.1, clip_high=0.4)
    values, _, clipped = objective_gradient(objective, tensor(1.3, 1.5, 0.95, 0.5).log(), tensor(2, 2, -2, -2))
    assert values == pytest.approx([2.6, 2.8, -1.9, -1.8])  # 1.3·2 free; 1.4·2; −0.95·2 free; −0.9·2
    assert clipped == [False, True, False, True]


def test_r1_clip_of_10_binds_only_above_11() -> None:
    objective = partial(objectives.clipped_surrogate, clip_low=10.0, clip_high=10.0)
    values, gradient, _ = objective_gradient(objective, tensor(12, 10.9, 0.01).log(), tensor(1, 1, -1))
    assert values == pytest.approx([11, 10.9, -0.01])
    assert gradient == pytest.approx([0, 10.9, -0.01])


def test_policy_gradient_golden() -> None:
    values, gradient, clipped = objective_gradient(objectives.policy_gradient, tensor(5, 1, 0.1).log(), tensor(2, -3, -1))
    assert values == pytest.approx([10, -3, -0.1])
    assert gradient == pytest.approx([10, -3, -0.1])
    assert clipped == [False] * 3


def test_dual_clip_bounds_the_loss_of_a_negative_advantage() -> None:
    objective = partial(objectives.clipped_surrogate, dual_clip=3.0)
    values, gradient, clipped = objective_gradient(objective, tensor(5, 2, 5).log(), tensor(-1, -1, 1))
    assert values == pytest.approx([-3, -2, 1.2])  # max(−5, 3·(−1)); −2 is above −3; A > 0 is clipped at 1.2 as ever
    assert gradient == pytest.approx([0, -2, 0])
    assert clipped == [True, False, True]


def test_cispo_golden() -> None:
    objective = partial(objectives.cispo, clip_low=0.5, clip_high=1.0)
    ratio = [4.0, 0.25, 1.5]
    values, gradient, clipped = objective_gradient(objective, tensor(*ratio).log(), tensor(1, -2, 3))
    # sg[clip(ρ, 0.5, 2)] A log π, and log π = log ρ here: 2·ln 4, −2·0.5·ln ¼, 3·1.5·ln 1.5; the gradient is the weight times A
    assert values == pytest.approx([2 * math.log(4), -1 * math.log(0.25), 4.5 * math.log(1.5)])
    assert gradient == pytest.approx([2, -1, 4.5])
    assert clipped == [True, True, False]


def test_sapo_golden() -> None:
    values, gradient, clipped = objective_gradient(objectives.sapo, tensor(1, 1, 3).log(), tensor(1, -1, 1))
    # σ(0) = ½: 4/τ · ½ · A = 2 and −2/1.05; slope 4/τ · σ'(0) τ ρ A = 4 · ¼ · A = ±1; at ρ = 3: 4 σ(2), 4 σ(2)(1 − σ(2)) · 3
    s = 1 / (1 + math.exp(-2))
    assert values == pytest.approx([2, -2 / 1.05, 4 * s])
    assert gradient == pytest.approx([1, -1, 12 * s * (1 - s)])
    assert clipped == [False] * 3


@pytest.mark.parametrize(("objective", "delta"), [(objectives.dppo_tv, 0.15), (objectives.dppo_kl, 0.05)])
def test_dppo_masks_only_what_moves_away_and_too_far(objective: Any, delta: float) -> None:
    anchor, policy = tensor(0.5, 0.5, 0.5, 0.5, 0.01).log(), tensor(0.8, 0.8, 0.2, 0.55, 0.05).log().requires_grad_()
    advantage = tensor(1, -1, -1, 1, 1)
    out = objective(policy - anchor, advantage, policy, delta=delta)
    # 0.5 → 0.8 with A > 0 is masked, with A < 0 it moves back; 0.5 → 0.2 with A < 0 is masked; 0.05 away is near;
    # 0.01 → 0.05 is a ratio of 5 and still a small step in probability: |Δ| = 0.04, KL = 0.024
    assert out.clipped.tolist() == [True, False, True, False, False]
    assert out.values.tolist() == pytest.approx([0, -1.6, 0, 1.1, 5])
    (gradient,) = torch.autograd.grad(out.values.sum(), policy)
    assert gradient.tolist() == pytest.approx([0, -1.6, 0, 1.1, 5])


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize(
    "objective",
    [
        objectives.clipped_surrogate,
        partial(objectives.clipped_surrogate, dual_clip=3.0),
        objectives.policy_gradient,
        objectives.cispo,
        objectives.sapo,
        objectives.dppo_tv,
        objectives.dppo_kl,
    ],
)
def test_a_ratio_beyond_the_floats_gives_finite_values_and_gradients(objective: Any, advantage: float) -> None:
    """e^200 is ∞ in float32, and 0 · ∞ is NaN: in the gradient of a bound, of a closed gate, and where A is 0."""
    logprobs = torch.tensor([-1.0, -201.0, -0.5], dtype=torch.float32, requires_grad=True)
    anchor = torch.tensor([-201.0, -1.0, -0.5])  # log ρ = 200, −200, 0
    out = objective(logprobs - anchor, torch.full((3,), advantage), logprobs)
    (gradient,) = torch.autograd.grad(out.values.sum(), logprobs)
    assert out.values.isfinite().all() and gradient.isfinite().all()
    assert gradient[2] == pytest.approx(advantage), "ρ = 1 beside them has its gradient, A"
    if advantage == 0:
        assert not gradient.any() and not out.values.any()
    elif objective is objectives.cispo:  # the weight is bounded at 5 and at 0, and never differentiated
        assert gradient[:2].tolist() == pytest.approx([5 * advantage, 0])
    else:  # no bound lets a gradient through at e^200, and ρ is 0 at e^−200
        assert gradient[:2].tolist() == [0, 0]


def test_bounds_decide_at_ratios_beyond_the_floats() -> None:
    far = torch.tensor([200.0, -200.0, 200.0])
    a = torch.tensor([1.0, -1.0, -1.0])
    assert objectives.clipped_surrogate(far, a, far, dual_clip=3.0).values.tolist() == pytest.approx([1.2, -0.8, -3])
    assert objectives.sapo(far[:2], a[:2], far[:2]).values.tolist() == pytest.approx([4, -4 / 1.05 / (1 + math.exp(1.05))])  # σ(∞), σ(−τ)
    probable, rare = torch.tensor([-1e-6, -200.0]), torch.tensor([-200.0, -1e-6])
    for masked in (objectives.dppo_tv, objectives.dppo_kl):
        assert masked(probable - rare, a[:2], probable).clipped.tolist() == [True, True]


def test_dppo_kl_takes_an_anchor_that_is_rounded_above_probability_1() -> None:
    """log π − log ρ is 1e-9 here: log(1 − p) of it is not a number, and a comparison with NaN would never mask."""
    policy = tensor(-1.0)
    out = objectives.dppo_kl(tensor(-1.0 - 1e-9), tensor(-1), policy)
    assert out.clipped.tolist() == [True]  # KL(Bern(1) ‖ Bern(1/e)) = 1 > 0.05, and ρ < 1 with A < 0 moves away


def test_a_ratio_of_the_whole_completion_golden() -> None:
    leaf = tensor(4, 1, 2).log().requires_grad_()
    index = torch.tensor([0, 0, 1])
    assert ratios.sequence(leaf, index).exp().tolist() == pytest.approx([2, 2, 2])  # √(4·1), and 2
    (gradient,) = torch.autograd.grad(ratios.sequence(leaf, index).exp()[0], leaf)
    assert gradient.tolist() == pytest.approx([1, 1, 0])  # s · 1/|o| for both tokens
    by_token = ratios.sequence_token(leaf, index).exp()
    assert by_token.tolist() == pytest.approx([2, 2, 2])
    assert torch.autograd.grad(by_token[0], leaf)[0].tolist() == pytest.approx([2, 0, 0])


# ---------------------------------------------------------------- corrections


def test_truncated_importance_golden() -> None:
    weights, active = weights_of(corrections.truncated_importance, [0.5, 1, 1.5, 4], cap=2.0)
    assert weights == pytest.approx([0.5, 1, 1.5, 2]) and active == [False, False, False, True]


def weights_of(correct: Any, ratios: list[float], advantages: list[float] | None = None, **kwargs: float) -> tuple[list[float], list[bool]]:
    """Two completions of two tokens each, sampled with log-prob −1; the policy is the proximal policy."""
    log_ratio = tensor(*ratios).log()
    behavior = torch.full((4,), -1.0, dtype=torch.float64)
    mismatch = corrections.Mismatch(
        policy=behavior + log_ratio,
        proximal=behavior + log_ratio,
        behavior=behavior,
        advantages=tensor(*(advantages or [1, 1, 1, 1])),
        rollout_index=torch.tensor([0, 0, 1, 1]),
    )
    out = correct(mismatch, **kwargs)
    return out.weights.tolist(), out.active.tolist()


def test_corrections_of_whole_completions_golden() -> None:
    ratios = [2.0, 1.0, 1.5, 2.0]  # products 2 and 3, geometric means √2 and √3
    assert weights_of(corrections.truncated_sequence_importance, ratios, cap=2.5)[0] == pytest.approx([2, 2, 2.5, 2.5])
    assert weights_of(corrections.sequence_mask, ratios, low=0.5, high=2.5)[0] == [1, 1, 0, 0]
    assert weights_of(corrections.geometric_mask, ratios, low=1.42, high=1.8)[0] == [0, 0, 1, 1]  # √2 = 1.414, √3 = 1.732
    assert weights_of(corrections.token_mask, ratios, low=1.2, high=1.9)[0] == [0, 0, 1, 0]
    assert weights_of(corrections.token_mask, ratios, low=1.2, high=1.9)[1] == [True, True, False, True]


def test_off_policy_sequence_mask_golden() -> None:
    """DeepSeek-V3.2 Eq. 9: only completions with a negative advantage whose mean log π_old/π_θ is above δ."""
    ratios = [0.5, 1.0, 0.5, 1.0]  # mean log π_behav/π_θ = ln 2 / 2 = 0.347 for both
    assert weights_of(corrections.off_policy_sequence_mask, ratios, [-1, -1, 1, 1], delta=0.3) == ([0, 0, 1, 1], [True, True, False, False])
    assert weights_of(corrections.off_policy_sequence_mask, ratios, [-1, -1, -1, -1], delta=0.35)[0] == [1, 1, 1, 1]
    assert weights_of(corrections.off_policy_sequence_mask, [2.0, 2.0, 2.0, 2.0], [-1, -1, -1, -1], delta=0.1)[0] == [1, 1, 1, 1]


# ---------------------------------------------------------------- aggregation


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_mean", 21 / 6),  # (1 + 2 + 3 + 4 + 5 + 6) / 6
        ("sequence_mean", (2 + 4 + 11 / 2) / 3),  # means of (1 2 3), (4), (5 6)
        ("constant_length", 21 / (3 * LENGTH)),
        ("group_mean", (10 / 4 + 11 / 2) / 2),  # (1 2 3 4) and (5 6)
        ("sequence_sum", 21 / 3),
    ],
)
def test_aggregation_golden(name: str, expected: float) -> None:
    batch = make_batch([[3, 1], [2]])
    assert float(AGGREGATIONS[name](tensor(1, 2, 3, 4, 5, 6), batch)) == pytest.approx(expected)


def test_constant_length_does_not_care_how_long_completions_are() -> None:
    """Dr. GRPO's point: the same sum over tokens weighs the same, however many tokens there are."""
    short, long = make_batch([[1, 1]]), make_batch([[1, 5]])
    one, other = (AGGREGATIONS["constant_length"](v, b) for v, b in ((tensor(3, 2), short), (tensor(3, 1, 1, 0, 0, 0), long)))
    assert float(one) == pytest.approx(float(other)) == pytest.approx(5 / (2 * LENGTH))


# ---------------------------------------------------------------- the whole loss


@dataclass(frozen=True, kw_only=True)
class Case:
    """A batch with random numbers in all its fields, and the composition of a loss by name."""

    batch: Batch
    policy: Tensor
    entropy: Tensor
    aggregate: str
    objective: str
    correct: bool
    kl: str | None
    kl_coef: float
    entropy_coef: float

    def loss(self) -> Loss:
        clipped = partial(objectives.clipped_surrogate, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
        return Loss(
            objective=clipped if self.objective == "clipped" else objectives.policy_gradient,
            aggregate=AGGREGATIONS[self.aggregate],
            corrections={"tis": partial(corrections.truncated_importance, cap=CAP)} if self.correct else {},
            kl=KLS[self.kl] if self.kl else None,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
        )

    def run(self, batch: Batch, tokens: Sequence[int]) -> tuple[float, Tensor, Tensor]:
        """Loss of (a part of) the batch that holds ``tokens``, and its gradients spread over all tokens."""
        policy, entropy = self.policy[tokens].requires_grad_(), self.entropy[tokens].requires_grad_()
        loss = self.loss()(TokenScores(logprobs=policy, entropy=entropy), batch).loss
        grads = torch.autograd.grad(loss, (policy, entropy), allow_unused=True, materialize_grads=True)
        spread = [torch.zeros_like(self.policy).index_add(0, torch.tensor(tokens, dtype=torch.long), g) for g in grads]
        return float(loss.detach()), spread[0], spread[1]


@st.composite
def cases(draw: st.DrawFn, signal_only: bool = False) -> Case:
    lengths = draw(ragged)
    batch = make_batch(lengths, seed=draw(st.integers(0, 10**6)))
    noise = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def around(centre: Tensor, spread: float) -> Tensor:
        return centre + spread * torch.randn(batch.num_tokens, dtype=torch.float64, generator=noise)

    behavior = batch.behavior_logprobs.double()
    advantage = draw(
        st.lists(st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.3, -2.5]), min_size=len(batch.rollouts), max_size=len(batch.rollouts))
    )
    on_policy = draw(st.booleans())  # one update a step: the proximal policy is the policy
    kl_name = None if signal_only else draw(st.sampled_from([None, *KLS]))
    policy = around(behavior, 0.5)
    return Case(
        batch=replace(
            batch,
            advantages=tensor(*advantage)[batch.rollout_index],
            proximal_logprobs=None if on_policy else around(policy, 0.4),
            reference_logprobs=around(policy, 0.5),
        ),
        policy=policy,
        entropy=around(behavior, 1.0).abs(),
        aggregate=draw(st.sampled_from(list(AGGREGATIONS))),
        objective=draw(st.sampled_from(["clipped", "plain"])),
        correct=draw(st.booleans()),
        kl=kl_name,
        kl_coef=draw(st.sampled_from([0.0, 0.001, 0.5])) if kl_name else 0.0,
        entropy_coef=0.0 if signal_only else draw(st.sampled_from([0.0, 0.02])),
    )


def naive(case: Case) -> tuple[float, list[float], list[float]]:
    """The loss and its derivatives by log-prob and entropy, token by token, in plain Python, derivatives by hand."""
    batch = case.batch
    rollout, group = batch.rollout_index.tolist(), batch.group_index.tolist()
    policy, entropy, behavior = case.policy.tolist(), case.entropy.tolist(), batch.behavior_logprobs.tolist()
    proximal = policy if batch.proximal_logprobs is None else batch.proximal_logprobs.tolist()
    assert batch.reference_logprobs is not None and batch.advantages is not None
    reference, advantage = batch.reference_logprobs.tolist(), batch.advantages.tolist()
    num_tokens, num_rollouts, num_groups = len(rollout), len(group), max(group) + 1
    loss, by_logprob, by_entropy = 0.0, [], []
    for t, i in enumerate(rollout):
        share = {
            "token_mean": 1 / num_tokens,
            "sequence_mean": 1 / (num_rollouts * rollout.count(i)),
            "constant_length": 1 / (num_rollouts * LENGTH),
            "group_mean": 1 / (num_groups * sum(group[j] == group[i] for j in rollout)),
            "sequence_sum": 1 / num_rollouts,
        }[case.aggregate]
        ratio, a = math.exp(policy[t] - proximal[t]), advantage[t]
        value, slope = ratio * a, ratio * a  # dρ/dlog π = ρ
        if case.objective == "clipped":
            bound = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH) * a
            if bound < value:
                value, slope = bound, 0.0
        weight = min(math.exp(proximal[t] - behavior[t]), CAP) if case.correct else 1.0
        loss -= share * weight * value
        gradient = -share * weight * slope
        if case.kl:
            d = policy[t] - reference[t]
            estimate, by_d = {"k1": (d, 1), "k2": (d * d / 2, d), "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d))}[case.kl]
            loss += case.kl_coef * share * estimate
            gradient += case.kl_coef * share * by_d
        loss -= case.entropy_coef * share * entropy[t]
        by_logprob.append(gradient)
        by_entropy.append(-case.entropy_coef * share)
    return loss, by_logprob, by_entropy


@given(cases())
def test_loss_and_gradient_against_the_naive_loop(case: Case) -> None:
    loss, by_logprob, by_entropy = case.run(case.batch, range(case.batch.num_tokens))
    expected_loss, expected_by_logprob, expected_by_entropy = naive(case)
    assert loss == pytest.approx(expected_loss, abs=1e-9)
    assert by_logprob.tolist() == pytest.approx(expected_by_logprob, abs=1e-9)
    assert by_entropy.tolist() == pytest.approx(expected_by_entropy, abs=1e-9)


def tokens_of(batch: Batch, rollouts: Sequence[int]) -> list[int]:
    return [t for i in rollouts for t, j in enumerate(batch.rollout_index.tolist()) if i == j]


@given(cases(), st.randoms(use_true_random=False))
def test_the_parts_of_any_split_sum_to_the_whole(case: Case, rng: random.Random) -> None:
    whole = case.run(case.batch, range(case.batch.num_tokens))
    order = rng.sample(range(len(case.batch.rollouts)), len(case.batch.rollouts))
    cuts = sorted(rng.choices(range(len(order) + 1), k=rng.randint(0, 4)))  # parts may be empty, and may cut a group
    pieces = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    parts = [case.run(case.batch.select(piece), tokens_of(case.batch, piece)) for piece in pieces]
    assert sum(p[0] for p in parts) == pytest.approx(whole[0], abs=1e-9)
    torch.testing.assert_close(sum(p[1] for p in parts), whole[1], **close(1e-9))
    torch.testing.assert_close(sum(p[2] for p in parts), whole[2], **close(1e-9))


@given(cases(signal_only=True))
def test_dropping_rollouts_without_signal_changes_nothing(case: Case) -> None:
    assert case.loss().signal_only and case.batch.advantages is not None
    kept = case.batch.with_signal()
    keep = [i for i in range(len(case.batch.rollouts)) if any(case.batch.advantages[case.batch.rollout_index == i] != 0)]
    assert kept.rollouts == tuple(case.batch.rollouts[i] for i in keep)
    whole, part = case.run(case.batch, range(case.batch.num_tokens)), case.run(kept, tokens_of(case.batch, keep))
    assert part[0] == pytest.approx(whole[0], abs=1e-9)
    torch.testing.assert_close(part[1], whole[1], **close(1e-9))


@pytest.mark.parametrize(("kl_coef", "entropy_coef", "expected"), [(0.0, 0.0, True), (0.1, 0.0, False), (0.0, 0.1, False)])
def test_a_kl_or_entropy_term_needs_every_rollout(kl_coef: float, entropy_coef: float, expected: bool) -> None:
    loss = Loss(
        objective=objectives.policy_gradient, aggregate=aggregation.token_mean, kl=kl.k3, kl_coef=kl_coef, entropy_coef=entropy_coef
    )
    assert loss.signal_only is expected and loss.needs_reference is (kl_coef > 0)


def test_totals_are_counted_before_dropping() -> None:
    batch = make_batch([[3, 1], [3, 3]], [[1, 0], [1, 1]]).with_advantages(advantages.center)
    kept = batch.with_signal()
    assert [r.problem.id for r in kept.rollouts] == ["p0", "p0"] and kept.num_tokens == 4
    scores = TokenScores(logprobs=torch.zeros(4), entropy=torch.zeros(4))

    def loss(name: str) -> float:
        return float(Loss(objective=objectives.policy_gradient, aggregate=AGGREGATIONS[name])(scores, kept).loss)

    # ρ = 1, so the objective is A: +½ on three tokens, −½ on one
    assert loss("token_mean") == pytest.approx(-(3 / 2 - 1 / 2) / 10)  # of all 10 tokens, not of the 4 kept
    assert loss("sequence_mean") == pytest.approx(-(1 / 2 - 1 / 2) / 4)
    assert loss("constant_length") == pytest.approx(-(3 / 2 - 1 / 2) / (4 * LENGTH))
    assert loss("group_mean") == pytest.approx(-((3 / 2 - 1 / 2) / 4) / 2)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_empty_batch_gives_a_finite_zero(name: str) -> None:
    batch = collate([]).with_advantages(advantages.group_norm)
    batch = replace(batch, reference_logprobs=torch.zeros(0)).with_signal()
    assert batch.totals == Totals(tokens=0, rollouts=0, groups=0)
    assert [part.totals.tokens for part in batch.minibatches(3)] == [0]
    policy = torch.zeros(0, requires_grad=True)
    loss = Loss(objective=objectives.clipped_surrogate, aggregate=AGGREGATIONS[name], kl=kl.k3, kl_coef=0.1, entropy_coef=0.1)
    output = loss(TokenScores(logprobs=policy, entropy=torch.zeros(0)), batch)
    output.loss.backward()  # type: ignore[no-untyped-call]
    assert float(output.loss.detach()) == 0.0
    assert math.isnan(output.stats["policy/ratio"].mean), "a mean over nothing is not a number"


# ---------------------------------------------------------------- what the loss reports


def test_stats_golden() -> None:
    batch = make_batch([[2, 1]], [[1, 0]])
    behavior = batch.behavior_logprobs.double()
    proximal = behavior + tensor(2, 1, 0.5).log()
    batch = replace(batch, advantages=tensor(1, 1, -1), proximal_logprobs=proximal, reference_logprobs=proximal)
    policy = proximal + tensor(1.5, 1, 0.5).log()
    loss = Loss(
        objective=objectives.clipped_surrogate,
        aggregate=aggregation.token_mean,
        corrections={"tis": partial(corrections.truncated_importance, cap=1.5)},
        kl=kl.k1,
        kl_coef=0.1,
    )
    output = loss(TokenScores(logprobs=policy, entropy=tensor(1, 2, 6)), batch)
    mean = {name: stat.mean for name, stat in output.stats.items()}
    assert mean["policy/ratio"] == pytest.approx((1.5 + 1 + 0.5) / 3)
    assert output.stats["policy/ratio"].maximum == pytest.approx(1.5)
    assert mean["policy/clip_share"] == pytest.approx(2 / 3)  # 1.5 > 1.2 with A > 0; 0.5 < 0.8 with A < 0
    assert mean["policy/entropy"] == pytest.approx(3)
    assert mean["policy/kl"] == pytest.approx(math.log(1.5 * 1 * 0.5) / 3)
    assert mean["sampler/logprob_diff"] == pytest.approx((math.log(2) + 0 + math.log(2)) / 3)
    # e^d − 1 − d with d = ln 2, 0, −ln 2: never negative, whose mean under the sampler is KL(behavior ‖ proximal)
    assert mean["sampler/k3"] == pytest.approx(((1 - math.log(2)) + 0 + (math.log(2) - 0.5)) / 3)
    assert mean["sampler/tis/weight"] == pytest.approx((1.5 + 1 + 0.5) / 3)  # min(2, 1.5), 1, 0.5
    assert mean["sampler/tis/active_share"] == pytest.approx(1 / 3)
    # −(1.5·1.2 + 1·1 − 0.5·0.8)/3 + 0.1·(ln 1.5 + 0 + ln 0.5)/3
    assert float(output.loss.detach()) == pytest.approx(-(1.8 + 1 - 0.4) / 3 + 0.1 * math.log(0.75) / 3)


def test_stats_of_parts_merge_to_those_of_the_whole() -> None:
    parts: list[dict[str, Stat]] = [{"x": Stat.of(tensor(1, 5))}, {"x": Stat.of(tensor(3)), "y": Stat.of(tensor(-2))}]
    merged = merge(parts)
    assert (merged["x"].mean, merged["x"].maximum, merged["x"].count) == (3, 5, 3)
    assert (merged["y"].mean, merged["y"].maximum) == (-2, -2)
