"""The whole loss and its gradient against a per-token loop that was written from the formula; its parts, and what it reports."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grpo import advantages, aggregation, corrections, kl, objectives
from grpo.batch import Batch, Totals, collate
from grpo.losses import Loss, Stat, TokenScores, merge

from .small_batches import AGGREGATIONS, LENGTH, close, make_batch, ragged, tensor

KLS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
CLIP_LOW, CLIP_HIGH, CAP = 0.2, 0.3, 1.5


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
