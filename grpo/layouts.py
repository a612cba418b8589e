"""How rollouts are laid out for the model, and where each trained token's prediction stands. Nothing else knows of padding.

``padded``         one rollout a row, right-padded: any model; the oracle of the tests.
``shared_prompt``  one group a row: the prompt once, then every completion, each seeing the prompt and itself. The prompt of a
                   group of 16 is computed once instead of 16 times. Needs full attention in every layer.

A completion's last token predicts nothing, so it is a target and never an input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from grpo.batch import Batch
from grpo.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """What the model is called with, and ``gather`` [tokens]: positions in the flattened [rows · length] that predict ``targets``."""

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    attention_mask: Float[Tensor, "rows 1 length length"] | Int[Tensor, "rows length"]
    gather: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]

    def to(self, device: torch.device) -> ModelInputs:
        return ModelInputs(**{name: getattr(self, name).to(device) for name in self.__slots__})


def unsupported(config: Any) -> str | None:
    """Why this model (its transformers config) cannot share a prompt between completions; None if it can.

    Sliding windows and linear attention would compute something else without a word (measured), so they are named here.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    if other := layer_types - {"full_attention"}:
        return f"it has {', '.join(sorted(other))} layers"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "eager"):
        return f"its attention implementation {implementation!r} takes no mask of our own"
    return None


def rows(batch: Batch, shared: bool, budget: int) -> list[list[int]]:
    """Which rollouts (positions in the batch) stand in which row, longest row first, so that memory fails at once if at all.

    A group longer than ``budget`` tokens is cut into several rows, each with the prompt.
    """
    out: list[list[int]] = []
    group, used = -1, 0
    for i, rollout in enumerate(batch.rollouts):
        length, mine = len(rollout.completion.token_ids) - 1, int(batch.group_index[i])
        if shared and mine == group and used + length <= budget:
            out[-1].append(i)
            used += length
        else:
            out.append([i])
            group, used = mine, len(rollout.completion.prompt_ids) + length
    return sorted(out, key=lambda row: -row_length(batch, row))


def row_length(batch: Batch, row: Sequence[int]) -> int:
    completions = [batch.rollouts[i].completion for i in row]
    return len(completions[0].prompt_ids) + sum(len(c.token_ids) - 1 for c in completions)


def microbatches(batch: Batch, shared: bool, budget: int) -> Iterator[list[list[int]]]:
    """Rows filled up to ``budget`` padded tokens. A shared-prompt row stands alone on CPU-sized budgets: its mask is dense."""
    filled: list[list[int]] = []
    for row in rows(batch, shared, budget):
        width = row_length(batch, filled[0] if filled else row)  # rows come longest first
        if filled and (len(filled) + 1) * width > budget:
            yield filled
            filled = []
        filled.append(row)
    if filled:
        yield filled


def lay_out(rollout_rows: Sequence[Sequence[Rollout]], shared: bool, dtype: torch.dtype) -> ModelInputs:
    """Rows of rollouts (a row shares one prompt) → tensors. ``dtype`` is the model's: the mask is added to its attention scores."""
    length = max(len(row[0].completion.prompt_ids) + sum(len(r.completion.token_ids) - 1 for r in row) for row in rollout_rows)
    shape = (len(rollout_rows), length)
    input_ids, position_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    segment = torch.full(shape, -1, dtype=torch.long)  # 0: prompt, k: completion k of the row, -1: padding
    gather: list[Tensor] = []
    targets: list[int] = []
    for y, row in enumerate(rollout_rows):
        prompt = row[0].completion.prompt_ids
        ids, positions, segments = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for k, rollout in enumerate(row, start=1):
            tokens = rollout.completion.token_ids
            predictors = torch.arange(len(ids) - 1, len(ids) + len(tokens) - 1)
            predictors[0] = len(prompt) - 1  # the first token is predicted by the prompt's last
            gather.append(y * length + predictors)
            targets.extend(tokens)
            ids.extend(tokens[:-1])
            positions.extend(range(len(prompt), len(prompt) + len(tokens) - 1))
            segments.extend([k] * (len(tokens) - 1))
        end = len(ids)
        input_ids[y, :end], position_ids[y, :end], segment[y, :end] = torch.tensor(ids), torch.tensor(positions), torch.tensor(segments)
    return ModelInputs(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=_tree_mask(segment, dtype) if shared else (segment >= 0).long(),
        gather=torch.cat(gather),
        targets=torch.tensor(targets),
    )


def _tree_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where query may see key, the dtype's minimum elsewhere: causal, and key in the prompt or in the query's own completion.

    Additive, because eager attention adds whatever it is given: a boolean mask there is silently wrong.
    """
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    own = segment[:, :, None] == segment[:, None, :]
    visible = causal & (own | (segment == 0)[:, None, :])
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
