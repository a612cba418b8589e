"""The KL estimators: each cell of the table in docs/objectives.md, by exact sums over a vocabulary instead of samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo import kl

Estimator = Callable[[Tensor, Tensor], Tensor]
ALL: list[Estimator] = [kl.k1, kl.k2, kl.k3, kl.unbiased]
BOUND = {"rtol": 1e-10, "atol": 1e-12}
logits = st.lists(st.floats(-2, 2), min_size=2, max_size=6)
seeds = st.integers(0, 1000)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logprobs(size: int, seed: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


class Vocabulary:
    """One token: a policy with parameters θ, its reference, and expectations over who samples, as sums."""

    def __init__(self, theta: Tensor, reference: Tensor, sampler: Tensor | None = None) -> None:
        self.theta = theta.clone().requires_grad_()
        self.log_p, self.log_q = self.theta.log_softmax(-1), reference
        self.log_old = self.log_p.detach() if sampler is None else sampler

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta, retain_graph=True)[0]

    @property
    def exact(self) -> Tensor:
        """KL(π_θ ‖ π_ref)."""
        return (self.log_p.exp() * (self.log_p - self.log_q)).sum()

    @property
    def reverse(self) -> Tensor:
        """KL(π_ref ‖ π_θ)."""
        return (self.log_q.exp() * (self.log_q - self.log_p)).sum()

    def in_loss(self, estimator: Estimator) -> tuple[float, Tensor]:
        """Expected value and gradient of the estimate; sampling itself has no gradient."""
        value = (self.log_old.exp() * estimator(self.log_p - self.log_q, self.log_p - self.log_old)).sum()
        return float(value.detach()), self.gradient(value)

    def in_reward(self, estimator: Estimator) -> Tensor:
        """Expected gradient of a penalty in the reward, on-policy: E[ sg(estimate) · ∇log π_θ ]."""
        penalty = estimator((self.log_p - self.log_q).detach(), torch.zeros_like(self.log_q))
        return self.gradient((self.log_p.detach().exp() * penalty * self.log_p).sum())


def test_golden() -> None:
    log_ratio, none = tensor(math.log(2), 0, -math.log(2)), tensor(0, 0, 0)
    k3 = [1 / 2 + math.log(2) - 1, 0, 2 - math.log(2) - 1]
    assert kl.k1(log_ratio, none).tolist() == pytest.approx([math.log(2), 0, -math.log(2)])
    assert kl.k2(log_ratio, none).tolist() == pytest.approx([math.log(2) ** 2 / 2, 0, math.log(2) ** 2 / 2])
    assert kl.k3(log_ratio, none).tolist() == pytest.approx(k3)
    assert kl.unbiased(log_ratio, tensor(math.log(3), 0, math.log(2))).tolist() == pytest.approx([3 * k3[0], 0, 2 * k3[2]])


@given(st.floats(-20, 20))
def test_k3_is_never_negative(log_ratio: float) -> None:
    assert float(kl.k3(tensor(log_ratio), tensor(0))) >= 0


def test_the_gradient_of_k3_has_no_bound_on_tokens_that_the_policy_has_given_up() -> None:
    leaf = tensor(-20).requires_grad_()
    (gradient,) = torch.autograd.grad(kl.k3(leaf, tensor(0)).sum(), leaf)
    assert float(gradient) == pytest.approx(1 - math.exp(20))  # d/du (e^−u − 1 + u)


@given(logits, seeds)
def test_on_policy_values(theta: list[float], seed: int) -> None:
    case = Vocabulary(tensor(*theta), random_logprobs(len(theta), seed))
    for estimator in (kl.k1, kl.k3, kl.unbiased):
        assert case.in_loss(estimator)[0] == pytest.approx(float(case.exact.detach()), abs=1e-12)


@given(logits, seeds)
def test_on_policy_gradients_in_the_loss(theta: list[float], seed: int) -> None:
    case = Vocabulary(tensor(*theta), random_logprobs(len(theta), seed))
    torch.testing.assert_close(case.in_loss(kl.k1)[1], torch.zeros_like(case.theta), **BOUND)
    torch.testing.assert_close(case.in_loss(kl.k2)[1], case.gradient(case.exact), **BOUND)
    torch.testing.assert_close(case.in_loss(kl.k3)[1], case.gradient(case.reverse), **BOUND)
    torch.testing.assert_close(case.in_loss(kl.unbiased)[1], case.gradient(case.exact), **BOUND)


@given(logits, seeds)
def test_gradients_in_the_reward(theta: list[float], seed: int) -> None:
    case = Vocabulary(tensor(*theta), random_logprobs(len(theta), seed))
    exact, reverse = case.gradient(case.exact), case.gradient(case.reverse)
    torch.testing.assert_close(case.in_reward(kl.k1), exact, **BOUND)
    torch.testing.assert_close(case.in_reward(kl.k3), exact - reverse, **BOUND)
    torch.testing.assert_close(case.in_reward(kl.unbiased), exact - reverse, **BOUND)


FAR = [(tensor(1.0, -0.5, 0.2, 0.0), random_logprobs(4, seed), random_logprobs(4, seed + 100)) for seed in range(5)]  # θ, π_ref, π_old


@pytest.mark.parametrize(("theta", "reference", "sampler"), FAR)
def test_what_is_called_biased_is_biased(theta: Tensor, reference: Tensor, sampler: Tensor) -> None:
    on, exact = Vocabulary(theta, reference), Vocabulary(theta, reference).exact.detach()
    gradient = on.gradient(on.exact)
    assert abs(on.in_loss(kl.k2)[0] - float(exact)) > 1e-3, "value of k2"
    assert float((on.in_loss(kl.k3)[1] - gradient).abs().max()) > 1e-3, "k3 in the loss"
    for estimator in (kl.k2, kl.k3, kl.unbiased):
        assert float((on.in_reward(estimator) - gradient).abs().max()) > 1e-3, f"{estimator.__name__} in the reward"
    off = Vocabulary(theta, reference, sampler)
    for estimator in (kl.k1, kl.k2, kl.k3):
        value, slope = off.in_loss(estimator)
        assert abs(value - float(exact)) > 1e-3 and float((slope - gradient).abs().max()) > 1e-3, f"{estimator.__name__} off-policy"


@given(logits, seeds, seeds)
def test_unbiased_is_so_for_tokens_of_another_policy(theta: list[float], seed: int, other: int) -> None:
    case = Vocabulary(tensor(*theta), random_logprobs(len(theta), seed), sampler=random_logprobs(len(theta), other + 2000))
    value, gradient = case.in_loss(kl.unbiased)
    assert value == pytest.approx(float(case.exact.detach()), abs=1e-11)
    torch.testing.assert_close(gradient, case.gradient(case.exact), **BOUND)


def test_the_bias_of_k2_is_of_third_order() -> None:
    """E[e^−u] = 1 gives E[u²/2] − E[u] = E[u³]/6 − …: an eighth at half the distance."""
    theta, direction = tensor(1.0, -0.5, 0.2, 0.0), tensor(0.3, -1.0, 0.8, 2.0)

    def bias_and_third_moment(distance: float) -> tuple[float, float]:
        case = Vocabulary(theta, (theta + distance * direction).log_softmax(-1))
        u = (case.log_p - case.log_q).detach()
        return case.in_loss(kl.k2)[0] - float(case.exact.detach()), float((case.log_p.detach().exp() * u**3).sum()) / 6

    (far, moment), (near, _) = bias_and_third_moment(2e-3), bias_and_third_moment(1e-3)
    assert far / near == pytest.approx(8, rel=0.02)
    assert far == pytest.approx(moment, rel=0.02)


@given(logits, seeds)
def test_k1_in_the_loss_is_noise(theta: list[float], seed: int) -> None:
    """Its gradient is ∇log π of each token, whatever the reference: mean 0, but not 0."""
    case = Vocabulary(tensor(*theta), random_logprobs(len(theta), seed))
    estimate = kl.k1(case.log_p - case.log_q, torch.zeros_like(case.log_q))
    for token in range(len(theta)):
        slope = case.gradient(estimate[token])
        torch.testing.assert_close(slope, case.gradient(case.log_p[token]), **BOUND)
        assert float(slope.abs().max()) > 0
