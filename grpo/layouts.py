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
from jaxtyping import Int
from torch import Tensor

from grpo.batch import Batch
from grpo.tree_attention import Tree, build_tree
from grpo.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """What the model is called with, and ``gather`` [tokens]: positions in the flattened [rows · length] that predict ``targets``."""

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    gather: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    attention_mask: Int[Tensor, "rows length"] | None = None  # padded
    tree: Tree | None = None  # shared_prompt

    def to(self, device: torch.device) -> ModelInputs:
        return ModelInputs(**{name: None if (v := getattr(self, name)) is None else v.to(device) for name in self.__slots__})


def unsupported(config: Any) -> str | None:
    """Why this model (its transformers config) cannot share a prompt between completions; None if it can.

    Sliding windows and linear attention would compute something else without a word (measured), so they are named here.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    if other := layer_types - {"full_attention"}:
        return f"it has {', '.join(sorted(other))} layers"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    if getattr(config, "attention_dropout", 0):
        return "it has attention dropout"
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
    """Rows filled up to ``budget`` padded tokens."""
    filled: list[list[int]] = []
    for row in rows(batch, shared, budget):
        width = row_length(batch, filled[0] if filled else row)  # rows come longest first
        if filled and (len(filled) + 1) * width > budget:
            yield filled
            filled = []
        filled.append(row)
    if filled:
        yield filled


def lay_out(rollout_rows: Sequence[Sequence[Rollout]], shared: bool) -> ModelInputs:
    """Rows of rollouts (a row shares one prompt) → tensors: [prompt region | completion region], each padded on the right."""
    prompts = [row[0].completion.prompt_ids for row in rollout_rows]
    inputs = [[len(r.completion.token_ids) - 1 for r in row] for row in rollout_rows]
    if not shared:  # one completion a row: its tokens follow the prompt's at once, and padding stands only at the end
        width, region = 0, max(len(p) + sum(n) for p, n in zip(prompts, inputs, strict=True))
    else:
        width, region = max(map(len, prompts)), max(1, *(sum(n) for n in inputs))
    length = width + region
    input_ids, position_ids = torch.zeros(len(prompts), length, dtype=torch.long), torch.zeros(len(prompts), length, dtype=torch.long)
    gather: list[Tensor] = []
    for y, (row, prompt) in enumerate(zip(rollout_rows, prompts, strict=True)):
        input_ids[y, : len(prompt)] = torch.tensor(prompt)
        position_ids[y, : len(prompt)] = torch.arange(len(prompt))
        start = width if shared else len(prompt)
        for rollout in row:
            tokens = torch.tensor(rollout.completion.token_ids)
            end = start + len(tokens) - 1
            input_ids[y, start:end] = tokens[:-1]
            position_ids[y, start:end] = len(prompt) + torch.arange(len(tokens) - 1)
            predictors = torch.arange(start - 1, end)
            predictors[0] = len(prompt) - 1  # the first token is predicted by the prompt's last
            gather.append(y * length + predictors)
            start = end
    lengths = torch.tensor([len(p) + sum(n) for p, n in zip(prompts, inputs, strict=True)])
    return ModelInputs(
        input_ids=input_ids,
        position_ids=position_ids,
        gather=torch.cat(gather),
        targets=torch.tensor([t for row in rollout_rows for r in row for t in r.completion.token_ids]),
        attention_mask=None if shared else (torch.arange(length)[None] < lengths[:, None]).long(),
        tree=build_tree(list(map(len, prompts)), inputs) if shared else None,
    )
