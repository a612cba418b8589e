"""Per-token values → one number, with the denominators of the whole optimiser step: ``f(values [tokens], batch) -> []``.

Because ``batch.totals`` is counted before anything is dropped or split, the sum over any split of a batch is the whole.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from grpo.batch import Batch
from grpo.notation import checked, number, whole, written

Tokens = Float[Tensor, " tokens"]
Scalar = Float[Tensor, ""]

_DAPO = "DAPO 2503.14476 §3.3, over the whole batch as in its code; Eq. 8 as printed is per prompt: group_mean"


@written("1/Σᵢ|oᵢ| · Σᵢ Σₜ", _DAPO)
def token_mean(values: Tokens, batch: Batch) -> Scalar:
    """1/Σ|o_i| Σ_i Σ_t: every token of the batch counts the same (DAPO 2503.14476 §3.3, as its code has it)."""
    return values.sum() / max(batch.totals.tokens, 1)


@written("1/N · Σᵢ 1/|oᵢ| · Σₜ", "DeepSeekMath 2402.03300 Eq. 3")
def sequence_mean(values: Tokens, batch: Batch) -> Scalar:
    """1/N Σ_i 1/|o_i| Σ_t over the N completions: every completion counts the same (DeepSeekMath Eq. 3, R1)."""
    # not bincount, which a GPU has to be waited for
    lengths = values.new_zeros(len(batch.rollouts)).index_add(0, batch.rollout_index, torch.ones_like(values))
    return (values / lengths[batch.rollout_index]).sum() / max(batch.totals.rollouts, 1)


@written("1/N · Σᵢ Σₜ", "REINFORCE and RLOO 2402.14740: a completion is one action")
def sequence_sum(values: Tokens, batch: Batch) -> Scalar:
    """1/N Σ_i Σ_t over the N completions: log π of a whole completion, not divided by its length (RLOO 2402.14740)."""
    return values.sum() / max(batch.totals.rollouts, 1)


@checked(lambda length: whole("length", length))
@written(lambda length: f"1/(N·{number(length)}) · Σᵢ Σₜ", "Dr. GRPO 2503.20783 §3.2")
def constant_length(values: Tokens, batch: Batch, *, length: int) -> Scalar:
    """1/(N·L) Σ_i Σ_t with a constant L, usually the token limit: no reward for being short or long (Dr. GRPO)."""
    return values.sum() / (max(batch.totals.rollouts, 1) * length)


@written("1/P · Σ_groups 1/Σ|oᵢ| · Σᵢ Σₜ", "prompt-level mean, ScaleRL 2510.13786; DAPO 2503.14476 Eq. 8 as printed")
def group_mean(values: Tokens, batch: Batch) -> Scalar:
    """Token mean inside each group, then the mean over the P groups: every problem counts the same."""
    lengths = batch.group_num_tokens.to(values)[batch.group_index][batch.rollout_index]
    return (values / lengths).sum() / max(batch.totals.groups, 1)
