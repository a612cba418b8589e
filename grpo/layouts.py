"""How rollouts are laid out for the model, and where each trained token's prediction stands. Nothing else knows of padding.

``padded``         one rollout a row, right-padded: any model; the oracle of the tests.
``shared_prompt``  a tree: what all prompts begin with, once; then a row a group: the rest of its prompt and every completion, each
                   seeing the prompt and itself. Needs full attention in every layer.

A completion's last token predicts nothing, so it is a target and never an input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
        return replace(self, **{name: v.to(device) for name in self.__slots__ if (v := getattr(self, name)) is not None})


def unsupported(config: Any) -> str | None:
    """Why this model (its transformers config) cannot share a prompt between completions; None if it can.

    Sliding windows and linear attention would compute something else without a word (measured), so they are named here.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a multimodal model: its language model
    layer_types = set(getattr(config, "layer_types", None) or ())
    if other := layer_types - {"full_attention"}:
        return f"it has {', '.join(sorted(other))} layers"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    if getattr(config, "attention_dropout", 0):
        return "it has attention dropout"
    return None


def microbatches(batch: Batch, shared: bool, budget: int) -> Iterator[list[list[int]]]:
    """Rows of rollouts (positions in the batch), filled up to ``budget`` tokens, padding included; longest first, so that memory
    fails at once if at all."""
    prefix = common_prefix([r.completion.prompt_ids for r in batch.rollouts]) if shared and batch.rollouts else 0
    filled: list[list[int]] = []
    prompt = region = 0
    for row in rows(batch, shared, budget):
        mine = row_shape(batch, row, shared, prefix)
        prompt, region = max(prompt, mine[0]), max(region, mine[1])
        if filled and prefix + (len(filled) + 1) * (prompt + region) > budget:
            yield filled
            filled, (prompt, region) = [], mine
        filled.append(row)
    if filled:
        yield filled


def rows(batch: Batch, shared: bool, budget: int) -> list[list[int]]:
    """Which rollouts stand in which row. A group longer than ``budget`` tokens is cut into several rows, each with the prompt."""
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
    """Input tokens of a row, its whole prompt included."""
    completions = [batch.rollouts[i].completion for i in row]
    return len(completions[0].prompt_ids) + sum(len(c.token_ids) - 1 for c in completions)


def row_shape(batch: Batch, row: Sequence[int], shared: bool, prefix: int) -> tuple[int, int]:
    """Tokens in the two regions of a row, each of which ``lay_out`` pads to the longest of its rows."""
    length, prompt = row_length(batch, row), len(batch.rollouts[row[0]].completion.prompt_ids)
    return (prompt - prefix, length - prompt) if shared else (0, length)


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with, one less than the shortest at most: a row keeps the token that predicts its first."""
    first, last = min(prompts), max(prompts)  # in dictionary order, no other two differ sooner
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def lay_out(rollout_rows: Sequence[Sequence[Rollout]], shared: bool) -> ModelInputs:
    """Rows of rollouts (a row shares one prompt) → tensors."""
    return _lay_out_tree(rollout_rows) if shared else _lay_out_padded([r for row in rollout_rows for r in row])


def _lay_out_padded(rollouts: Sequence[Rollout]) -> ModelInputs:
    sequences = [torch.tensor(r.completion.prompt_ids + r.completion.token_ids[:-1]) for r in rollouts]
    lengths = torch.tensor([len(s) for s in sequences])
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    positions = torch.arange(input_ids.shape[1])
    starts = [len(r.completion.prompt_ids) - 1 for r in rollouts]
    return ModelInputs(
        input_ids=input_ids,
        position_ids=positions.expand_as(input_ids),
        gather=torch.cat(
            [y * len(positions) + torch.arange(start, len(s)) for y, (start, s) in enumerate(zip(starts, sequences, strict=True))]
        ),
        targets=_targets(rollouts),
        attention_mask=(positions < lengths[:, None]).long(),
    )


def _lay_out_tree(rollout_rows: Sequence[Sequence[Rollout]]) -> ModelInputs:
    """One line of tokens [prefix | row | row | …], a row being [prompt region | completion region]."""
    prompts = [row[0].completion.prompt_ids for row in rollout_rows]
    prefix = common_prefix(prompts)
    tree = build_tree(prefix, [len(p) - prefix for p in prompts], [[len(r.completion.token_ids) - 1 for r in row] for row in rollout_rows])
    width = tree.prompt + tree.region
    input_ids = torch.zeros(prefix + len(prompts) * width, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    input_ids[:prefix], position_ids[:prefix] = torch.tensor(prompts[0][:prefix]), torch.arange(prefix)
    gather: list[Tensor] = []
    for y, (row, prompt) in enumerate(zip(rollout_rows, prompts, strict=True)):
        start = prefix + y * width
        end = start + len(prompt) - prefix
        input_ids[start:end], position_ids[start:end] = torch.tensor(prompt[prefix:]), torch.arange(prefix, len(prompt))
        last_of_prompt, start = end - 1, start + tree.prompt
        for rollout in row:
            tokens = torch.tensor(rollout.completion.token_ids)
            end = start + len(tokens) - 1
            input_ids[start:end], position_ids[start:end] = tokens[:-1], len(prompt) + torch.arange(len(tokens) - 1)
            predictors = torch.arange(start - 1, end)
            predictors[0] = last_of_prompt  # the first token is predicted by the prompt's last
            gather.append(predictors)
            start = end
    return ModelInputs(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        gather=torch.cat(gather),
        targets=_targets([r for row in rollout_rows for r in row]),
        tree=tree,
    )


def _targets(rollouts: Sequence[Rollout]) -> Tensor:
    return torch.tensor([token for r in rollouts for token in r.completion.token_ids])
