"""Objectives and ratios: golden values and gradients with their arithmetic, up to ratios beyond the floats."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo import objectives, ratios

from .small_batches import tensor


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
