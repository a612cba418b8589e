"""Corrections of the mismatch between sampler and trainer: golden weights, and where they are active."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo import corrections

from .small_batches import tensor


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
