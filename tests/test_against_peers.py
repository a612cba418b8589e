"""The same numbers as other toolkits, where they are right: TRL's own code, and verl's published formulas.

Both work on padded tensors [completions, tokens] with a mask; ours on flat tokens. Loss and gradient by log-prob are compared in
float64 on ragged batches. Where a peer differs by design, the difference is the test: TRL and verl divide by the sample standard
deviation plus a constant.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo import advantages, aggregation, corrections, kl, objectives, ratios
from grpo.batch import Batch, collate
from grpo.losses import Loss, TokenScores
from grpo.toy import toy_group

pytestmark = pytest.mark.slow  # TRL is a large import

LOW, HIGH, BETA, MAX_LENGTH = 0.2, 0.28, 0.04, 9
CLIPPED = partial(objectives.clipped_surrogate, clip_low=LOW, clip_high=HIGH)
lengths = st.lists(st.lists(st.integers(1, MAX_LENGTH), min_size=2, max_size=4), min_size=1, max_size=3)


class Case:
    """One ragged batch, flat and padded, with random log-probs of all four policies."""

    def __init__(self, rows: list[list[int]], seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)

        def normal(spread: float) -> Tensor:
            return spread * torch.randn(sum(map(sum, rows)), dtype=torch.float64, generator=noise)

        rewards = [torch.rand(len(row), generator=noise, dtype=torch.float64).tolist() for row in rows]
        groups = [toy_group(f"p{g}", rewards[g], row) for g, row in enumerate(rows)]
        behavior = normal(1).abs().neg()
        batch = collate(groups)
        self.batch: Batch = replace(
            batch.with_advantages(advantages.group_norm),
            behavior_logprobs=behavior,
            proximal_logprobs=behavior + normal(0.1),
            reference_logprobs=behavior + normal(0.3),
        )
        assert self.batch.proximal_logprobs is not None
        self.policy = (self.batch.proximal_logprobs + normal(0.3)).requires_grad_()
        self.mask = torch.arange(MAX_LENGTH) < torch.bincount(self.batch.rollout_index)[:, None]

    def padded(self, flat: Tensor | None) -> Tensor:
        assert flat is not None
        return torch.zeros(self.mask.shape, dtype=torch.float64).masked_scatter(self.mask, flat)

    def ours(self, **parts: Any) -> tuple[float, Tensor]:
        loss = Loss(**parts)(TokenScores(logprobs=self.policy, entropy=torch.zeros_like(self.policy)), self.batch).loss
        return float(loss.detach()), torch.autograd.grad(loss, self.policy)[0]

    def trl(
        self, loss_type: str, level: str = "token", beta: float = 0.0, sampler_weight: Tensor | None = None, **settings: Any
    ) -> tuple[float, Tensor]:
        """``GRPOTrainer._compute_loss`` as it stands, on a stand-in that holds its settings and returns our log-probs for the model's."""
        from trl import GRPOTrainer

        per_token = self.padded(self.policy)
        accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x)
        stand_in = SimpleNamespace(
            model=SimpleNamespace(training=True),
            loss_type=loss_type,
            importance_sampling_level=level,
            beta=beta,
            epsilon_low=LOW,
            epsilon_high=settings.pop("epsilon_high", HIGH),
            top_entropy_quantile=1.0,
            aux_loss_enabled=False,
            use_vllm=sampler_weight is not None,
            vllm_importance_sampling_correction=sampler_weight is not None,
            off_policy_mask_threshold=settings.pop("off_policy_mask_threshold", None),
            max_completion_length=MAX_LENGTH,
            current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False,
            accelerator=accelerator,
            _metrics={"train": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (per_token, torch.zeros_like(per_token), None),
            get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
            args=SimpleNamespace(
                **({"delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05} | settings),
                steps_per_generation=1,
            ),
        )
        first = torch.searchsorted(self.batch.rollout_index, torch.arange(len(self.batch.rollouts)))
        assert self.batch.advantages is not None
        inputs = {
            "prompt_ids": torch.ones(len(first), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(first), 1, dtype=torch.long),
            "completion_ids": torch.ones(self.mask.shape, dtype=torch.long),
            "completion_mask": self.mask.double(),
            "advantages": self.batch.advantages[first],
            "old_per_token_logps": self.padded(self.batch.proximal_logprobs),
            "ref_per_token_logps": self.padded(self.batch.reference_logprobs),
            "sampling_per_token_logps": self.padded(self.batch.behavior_logprobs),
            "importance_sampling_ratio": None if sampler_weight is None else self.padded(sampler_weight),
            "num_items_in_batch": self.mask.sum(),
        }
        loss = GRPOTrainer._compute_loss(stand_in, None, inputs)
        return float(loss.detach()), torch.autograd.grad(loss, self.policy)[0]


def same(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-9, atol=1e-12)


AGGREGATIONS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "grpo": aggregation.sequence_mean,
    "dr_grpo": partial(aggregation.constant_length, length=MAX_LENGTH),
    "dapo": aggregation.token_mean,
}


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_grpo_dr_grpo_and_dapo(loss_type: str, rows: list[list[int]], seed: int) -> None:
    case = Case(rows, seed)
    same(case.ours(objective=CLIPPED, aggregate=AGGREGATIONS[loss_type]), case.trl(loss_type))


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_gspo(rows: list[list[int]], seed: int) -> None:
    case = Case(rows, seed)
    same(
        case.ours(objective=CLIPPED, ratio=ratios.sequence, aggregate=aggregation.sequence_mean),
        case.trl("grpo", level="sequence"),
    )


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_cispo(rows: list[list[int]], seed: int) -> None:
    """TRL's ``epsilon_high`` is the cap itself, ours is what is added to 1."""
    case = Case(rows, seed)
    ours = case.ours(objective=partial(objectives.cispo, clip_high=0.3), aggregate=aggregation.token_mean)
    same(ours, case.trl("cispo", epsilon_high=1.3))


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_sapo(rows: list[list[int]], seed: int) -> None:
    """At a τ that float32 holds exactly: TRL rounds 1.05 to it, also in float64."""
    case = Case(rows, seed)
    ours = case.ours(objective=partial(objectives.sapo, tau_negative=1.0625), aggregate=aggregation.sequence_mean)
    same(ours, case.trl("sapo", sapo_temperature_neg=1.0625))


@pytest.mark.parametrize(("estimator", "corrected"), [(kl.k3, False), (kl.unbiased, True)])
@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_kl(estimator: Any, corrected: bool, rows: list[list[int]], seed: int) -> None:
    case = Case(rows, seed)
    ours = case.ours(objective=CLIPPED, aggregate=aggregation.token_mean, kl=estimator, kl_coef=BETA)
    same(ours, case.trl("dapo", beta=BETA, use_bias_correction_kl=corrected))


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_two_sided_clipping_is_dual_clip(rows: list[list[int]], seed: int) -> None:
    case = Case(rows, seed)
    ours = case.ours(objective=partial(CLIPPED, dual_clip=1.4), aggregate=aggregation.token_mean)
    same(ours, case.trl("dapo", delta=1.4))


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_off_policy_sequence_mask(rows: list[list[int]], seed: int) -> None:
    case = Case(rows, seed)
    mask = {"opsm": partial(corrections.off_policy_sequence_mask, delta=0.05)}
    ours = case.ours(objective=CLIPPED, aggregate=aggregation.sequence_mean, corrections=mask)
    same(ours, case.trl("grpo", off_policy_mask_threshold=0.05))


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_trl_token_truncated_importance(rows: list[list[int]], seed: int) -> None:
    case = Case(rows, seed)
    assert case.batch.proximal_logprobs is not None
    weight = (case.batch.proximal_logprobs - case.batch.behavior_logprobs).exp().clamp(max=1.1)  # TRL's "token_truncate"
    tis = {"tis": partial(corrections.truncated_importance, cap=1.1)}
    ours = case.ours(objective=CLIPPED, aggregate=aggregation.token_mean, corrections=tis)
    same(ours, case.trl("dapo", sampler_weight=weight))


# ---------------------------------------------------------------- verl: its formulas, written out


def verl_aggregate(values: Tensor, mask: Tensor, mode: str) -> Tensor:
    """verl's ``agg_loss`` for a whole batch: docs, "loss_agg_mode"."""
    sums = (values * mask).sum(-1)
    if mode == "token-mean":
        return sums.sum() / mask.sum()
    if mode == "seq-mean-token-sum":
        return sums.mean()
    if mode == "seq-mean-token-mean":
        return (sums / mask.sum(-1)).mean()
    assert mode == "seq-mean-token-sum-norm"  # Dr. GRPO: divided by a constant, the padded length
    return sums.sum() / (mask.shape[0] * mask.shape[1])


VERL_MODES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "token-mean": aggregation.token_mean,
    "seq-mean-token-sum": aggregation.sequence_sum,
    "seq-mean-token-mean": aggregation.sequence_mean,
    "seq-mean-token-sum-norm": partial(aggregation.constant_length, length=MAX_LENGTH),
}


def verl_loss(case: Case, mode: str, per_token: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
    policy = case.padded(case.policy)
    values = per_token(policy, case.padded(case.batch.proximal_logprobs), case.padded(case.batch.advantages))
    loss = verl_aggregate(values, case.mask.double(), mode)
    return float(loss.detach()), torch.autograd.grad(loss, case.policy)[0]


@pytest.mark.parametrize("mode", VERL_MODES)
@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_verl_vanilla_with_dual_clip(mode: str, rows: list[list[int]], seed: int) -> None:
    def per_token(policy: Tensor, old: Tensor, a: Tensor) -> Tensor:
        ratio = (policy - old).exp()
        clipped = torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))
        return torch.where(a < 0, torch.minimum(-a * 3.0, clipped), clipped)

    case = Case(rows, seed)
    ours = case.ours(objective=partial(CLIPPED, dual_clip=3.0), aggregate=VERL_MODES[mode])
    same(ours, verl_loss(case, mode, per_token))


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_verl_gspo(rows: list[list[int]], seed: int) -> None:
    """verl writes s_i with the gradient of each token (GSPO-token); with one advantage a completion that is ``sequence_token``."""
    case = Case(rows, seed)
    mask = case.mask.double()

    def per_token(policy: Tensor, old: Tensor, a: Tensor) -> Tensor:
        mean = ((policy - old) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        ratio = (policy - policy.detach() + mean.detach()).exp()
        return torch.maximum(-a * ratio, -a * ratio.clamp(1 - LOW, 1 + HIGH))

    theirs = verl_loss(case, "seq-mean-token-mean", per_token)
    same(case.ours(objective=CLIPPED, ratio=ratios.sequence_token, aggregate=aggregation.sequence_mean), theirs)
    same(case.ours(objective=CLIPPED, ratio=ratios.sequence, aggregate=aggregation.sequence_mean), theirs)


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_verl_leave_one_out_advantage(rows: list[list[int]], seed: int) -> None:
    """verl: r·n/(n−1) − mean·n/(n−1)."""
    case = Case(rows, seed)
    rewards, index = case.batch.rewards, case.batch.group_index
    for g in range(len(rows)):
        r, n = rewards[index == g], len(rows[g])
        torch.testing.assert_close(
            advantages.leave_one_out(rewards, index)[index == g], r * n / (n - 1) - r.mean() * n / (n - 1), rtol=1e-9, atol=1e-12
        )


@settings(max_examples=15)
@given(rows=lengths, seed=st.integers(0, 10**6))
def test_group_norm_is_theirs_but_for_the_sample_standard_deviation(rows: list[list[int]], seed: int) -> None:
    """The paper's std(r) is that of the group; TRL and verl take n − 1 and add 1e-4 or 1e-6, which scales a whole group by √((n−1)/n)."""
    case = Case(rows, seed)
    rewards, index = case.batch.rewards, case.batch.group_index
    for g in range(len(rows)):
        r, n = rewards[index == g], len(rows[g])
        theirs = (r - r.mean()) / r.std()
        torch.testing.assert_close(advantages.group_norm(rewards, index)[index == g], theirs * (n / (n - 1)) ** 0.5, rtol=1e-9, atol=1e-12)
