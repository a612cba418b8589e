"""From rewards to advantages of tokens: the KL in the reward, parts combined after the advantage, whitening, truncated completions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo import advantages, kl
from grpo.batch import Batch, collate
from grpo.credit import Credit, reverse_cumsum
from grpo.toy import toy_group
from grpo.types import FinishReason


def batch_of(*groups: list[tuple[int, dict[str, float], FinishReason]], weights: dict[str, float]) -> Batch:
    """Each completion: (number of tokens, values of its reward parts, finish reason)."""
    made = []
    for g, rows in enumerate(groups):
        lengths, parts, reasons = zip(*rows, strict=True)
        rewards = [math.fsum(weights[name] * value for name, value in values.items()) for values in parts]
        made.append(toy_group(f"p{g}", rewards, lengths, parts=parts, truncated=[reason is LENGTH for reason in reasons]))
    return collate(made, tuple(weights))


STOP, LENGTH = FinishReason.stop, FinishReason.length
WEIGHTS = {"right": 1.0, "form": 0.5}
PAIR = batch_of([(2, {"right": 1.0, "form": 0.0}, STOP), (1, {"right": 0.0, "form": 0.01}, LENGTH)], weights=WEIGHTS)


def test_parts_are_summed_before_the_advantage_or_after_it() -> None:
    before = Credit(advantage=advantages.group_norm)(PAIR)
    assert before.tolist() == pytest.approx([1, 1, -1])  # r = 1 and 0.005: two rewards are always ±1 after normalisation
    after = Credit(advantage=advantages.group_norm, part_weights=WEIGHTS)(PAIR)
    assert after.tolist() == pytest.approx([0.5, 0.5, -0.5])  # 1·(+1) + 0.5·(−1), and 1·(−1) + 0.5·(+1)


def test_a_kl_in_the_reward_is_answered_for_by_the_tokens_before_it() -> None:
    reference = PAIR.behavior_logprobs - torch.tensor([0.1, 0.3, 0.2])  # log π_behav/π_ref of each token
    batch = replace(PAIR, reference_logprobs=reference)
    credit = Credit(advantage=advantages.group_norm, kl=kl.k1, kl_coef=2.0)
    # ±1 − 2·(0.1 + 0.3), −2·0.3 | −2·0.2
    assert credit(batch).tolist() == pytest.approx([1 - 0.8, 1 - 0.6, -1 - 0.4], abs=1e-6)
    assert credit.needs_reference and not Credit(advantage=advantages.group_norm, kl=kl.k1, kl_coef=0.0).needs_reference


def test_whitening_is_over_the_tokens_of_the_batch() -> None:
    whitened = Credit(advantage=advantages.reward_itself, normalise=advantages.whiten)(PAIR)
    # rewards 1, 1, 0.005: mean 0.668333, deviations 0.331667, 0.331667, −0.663333, so std = 0.331667·√2
    assert whitened.tolist() == pytest.approx([1 / math.sqrt(2), 1 / math.sqrt(2), -math.sqrt(2)])


@given(st.floats(-1e6, 1e6), st.integers(1, 9))
def test_whitening_equal_values_gives_exactly_zero(value: float, count: int) -> None:
    assert advantages.whiten(torch.full((count,), value, dtype=torch.float64)).tolist() == [0.0] * count


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=5), max_size=5))
def test_reverse_cumsum_stays_within_a_completion(rows: list[list[float]]) -> None:
    index = torch.tensor([i for i, row in enumerate(rows) for _ in row], dtype=torch.long)
    values = torch.tensor([v for row in rows for v in row], dtype=torch.float64)
    expected = [math.fsum(row[t:]) for row in rows for t in range(len(row))]
    assert reverse_cumsum(values, index).tolist() == pytest.approx(expected, abs=1e-12)


def test_truncated_completions_are_compared_with_but_leave_the_loss_and_its_denominators() -> None:
    won, lost = {"right": 1.0}, {"right": 0.0}
    batch = batch_of([(2, won, STOP), (5, lost, LENGTH)], [(3, won, LENGTH), (4, lost, LENGTH)], weights={"right": 1.0})
    batch = replace(batch, advantages=Credit(advantage=advantages.center)(batch)).without_truncated()
    assert batch.advantages is not None
    assert batch.advantages.tolist() == [0.5, 0.5]  # 1 − mean(1, 0): the truncated one is in the mean
    assert (batch.totals.tokens, batch.totals.rollouts, batch.totals.groups) == (2, 1, 1)
    assert batch.group_num_tokens.tolist() == [2, 0]


@given(st.lists(st.integers(0, 1), min_size=2, max_size=8))
def test_max_rl_is_the_mean_score_of_the_successes_less_the_mean_of_all(wins: list[int]) -> None:
    """MaxRL's estimator: Σ over successes of S_i / (number of successes) − mean S, as coefficients A_i/G of the scores S_i."""
    rewards: Tensor = torch.tensor(wins, dtype=torch.float64)
    got = advantages.max_rl(rewards, torch.zeros(len(wins), dtype=torch.long)) / len(wins)
    won = sum(wins)
    expected = [w / won - 1 / len(wins) if 0 < won < len(wins) else 0.0 for w in wins]
    assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("count", [2, 3, 6])
def test_max_rl_is_log_p_correct_to_order_g_minus_1(p: float, count: int) -> None:
    """Its expected gradient over all 2^G outcomes of a Bernoulli policy is w ∇p, w = Σ_{j < G−1} (1 − p)^j; 1/p for ∇log p, 1 for ∇p."""
    index = torch.zeros(count, dtype=torch.long)
    weight = 0.0
    for wins in itertools.product([0, 1], repeat=count):
        chance = math.prod(p if won else 1 - p for won in wins)
        scores = torch.tensor([1 / p if won else -1 / (1 - p) for won in wins], dtype=torch.float64)  # d log π(outcome) / dp
        weight += chance * float((advantages.max_rl(torch.tensor(wins), index) * scores).mean())
    assert weight == pytest.approx(sum((1 - p) ** j for j in range(count - 1)), rel=1e-12)


@pytest.mark.parametrize("rewards", [[0.0, -1.0], [2.0, -1.0], [1.0, 0.0, -0.001, math.nan]])
def test_max_rl_refuses_a_negative_reward_in_a_group_that_counts(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match=r"one of the rewards is -(1|0\.001); it is for rewards of 0 or more.*soft_overlong"):
        advantages.max_rl(torch.tensor(rewards), torch.zeros(len(rewards), dtype=torch.long))
    assert advantages.max_rl(torch.tensor([-1.0, -1.0]), torch.tensor([0, 0])).tolist() == [0, 0], "equal rewards divide by nothing"
