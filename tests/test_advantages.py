"""Advantages: golden values with their arithmetic, exact zeros, and what must not change them – shifts, scales, order, the unscored."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo import advantages
from grpo.rewards.base import combine
from grpo.types import Score

from .small_batches import NAN, close, groups_of, make_batch, tensor

ADVANTAGES = [advantages.group_norm, advantages.center, advantages.leave_one_out]  # each a difference to the group


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
