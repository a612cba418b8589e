"""Attention for the shared-prompt layout: a tree of [prefix of all prompts | rest of a prompt | its completions].

A dense mask over [prompt | completion 1 | … | completion n] costs the square of the row, most of it between completions that
must not see each other. Here the parts that count are computed alone – everything with the prefix, a row with its prompt, each
completion with itself – and joined under one softmax. ``benchmarks/attention.py`` compares it with
SDPA under a dense mask. It needs no mask of the square of the row, and worked examples that stand before every question
are computed once a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NAME = "grpo_shared_prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Where things stand in [prefix | row 1 | row 2 | …], a row being [prompt region | completion region], each padded on the right.

    ``to_blocks`` [completions · longest] and ``to_rows`` [rows · region] are inverse to each other on real tokens: positions in
    the flattened completion regions, and in the flattened [completions, longest] blocks.
    """

    prefix: int  # tokens that all prompts begin with
    prompt: int  # width of the prompt region: what follows the prefix
    region: int  # width of the completion region
    longest: int  # width of a block: inputs of the longest completion
    prompt_padding: Bool[Tensor, "rows prompt"]
    to_blocks: Int[Tensor, " blocked"]
    to_rows: Int[Tensor, " flat"]
    row_padding: Bool[Tensor, " flat"]
    block_padding: Bool[Tensor, " blocked"]

    def to(self, device: torch.device) -> Tree:
        return replace(self, **{n: v.to(device) for n in self.__slots__ if isinstance(v := getattr(self, n), Tensor)})  # type: ignore[arg-type]


def build_tree(prefix: int, prompts: list[int], completions: list[list[int]]) -> Tree:
    """``prompts[row]``: tokens after the prefix; ``completions[row]``: inputs of each (a completion's last token is no input)."""
    region = max([1, *(sum(lengths) for lengths in completions)])
    longest = max([1, *(length for lengths in completions for length in lengths)])
    num_blocks = sum(len(lengths) for lengths in completions)
    to_blocks = torch.zeros(num_blocks, longest, dtype=torch.long)
    to_rows = torch.zeros(len(prompts), region, dtype=torch.long)
    row_padding = torch.ones(len(prompts), region, dtype=torch.bool)
    block_padding = torch.ones(num_blocks, longest, dtype=torch.bool)
    block = 0
    for row, lengths in enumerate(completions):
        start = 0
        for length in lengths:
            to_blocks[block, :length] = row * region + start + torch.arange(length)
            to_rows[row, start : start + length] = block * longest + torch.arange(length)
            row_padding[row, start : start + length] = False
            block_padding[block, :length] = False
            start, block = start + length, block + 1
    return Tree(
        prefix=prefix,
        prompt=max(prompts),
        region=region,
        longest=longest,
        prompt_padding=torch.arange(max(prompts))[None] >= torch.tensor(prompts)[:, None],
        to_blocks=to_blocks.flatten(),
        to_rows=to_rows.flatten(),
        row_padding=row_padding.flatten(),
        block_padding=block_padding.flatten(),
    )


def tree_attention(
    query: Float[Tensor, "1 heads length width"],
    key: Float[Tensor, "1 kv_heads length width"],
    value: Float[Tensor, "1 kv_heads length value_width"],
    tree: Tree,
    scaling: float,
) -> Float[Tensor, "1 heads length value_width"]:
    """softmax(scaling · q kᵀ) v, each query over what it may see: causal in prefix and prompt; a completion sees both and its own past."""
    rows, kv_heads, x, p, c = len(tree.prompt_padding), key.shape[1], tree.prefix, tree.prompt, tree.region
    shared, lowest = query.shape[1] // kv_heads, torch.finfo(query.dtype).min

    def grouped(q: Tensor) -> Tensor:
        """[…, heads, length, width] → […, kv_heads, shared · length, width]: query heads that share a key head are more rows of it."""
        return q.reshape(*q.shape[:-3], kv_heads, shared * q.shape[-2], q.shape[-1])

    def in_rows(values: Tensor) -> Tensor:
        """What follows the prefix: [rows, heads, prompt + region, width]."""
        return values[0, :, x:].unflatten(1, (rows, p + c)).transpose(0, 1)

    query = query * scaling
    prefix_key, prefix_value = key[0, :, :x], value[0, :, :x]  # [kv_heads, prefix, width]
    q, k, v = in_rows(query), in_rows(key), in_rows(value)

    prefix_scores = _future_masked(grouped(query[0, :, :x]) @ prefix_key.transpose(-1, -2), shared, x, lowest)
    prefix_out = (prefix_scores.softmax(-1) @ prefix_value).view(1, kv_heads * shared, x, value.shape[-1])

    to_prefix = (grouped(q) @ prefix_key.transpose(-1, -2)).unflatten(2, (shared, p + c))

    prompt_key, prompt_value = k[:, :, :p], v[:, :, :p]
    in_prompt = _future_masked(grouped(q[:, :, :p]) @ prompt_key.transpose(-1, -2), shared, p, lowest).unflatten(2, (shared, p))
    weights = torch.cat([to_prefix[..., :p, :], in_prompt], -1).softmax(-1).flatten(2, 3)
    prompt_out = (weights[..., :x] @ prefix_value + weights[..., x:] @ prompt_value).view(rows, kv_heads * shared, p, -1)

    def blocks(values: Tensor) -> Tensor:
        """[rows, heads, region, width] → [completions, kv_heads, heads a kv head · longest, width]"""
        flat = _Rearrange.apply(values.transpose(1, 2).flatten(0, 1).flatten(1), tree.to_blocks, tree.to_rows, tree.row_padding)
        split = flat.view(-1, tree.longest, kv_heads, values.shape[1] // kv_heads, values.shape[-1])
        return split.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def back(blocked: Tensor) -> Tensor:
        """[completions, kv_heads, shared · longest, width] → [rows, kv_heads, shared, region, width]"""
        split = blocked.view(-1, kv_heads, shared, tree.longest, blocked.shape[-1]).permute(0, 3, 1, 2, 4).flatten(0, 1)
        flat = _Rearrange.apply(split.flatten(1), tree.to_rows, tree.to_blocks, tree.block_padding)
        return flat.view(rows, c, kv_heads, shared, -1).permute(0, 2, 3, 1, 4)

    own_key, own_value = blocks(k[:, :, p:]), blocks(v[:, :, p:])
    to_own = _future_masked(blocks(q[:, :, p:]) @ own_key.transpose(-1, -2), shared, tree.longest, lowest)
    to_prompt = (grouped(q[:, :, p:]) @ prompt_key.transpose(-1, -2)).unflatten(2, (shared, c))
    to_prompt = to_prompt.masked_fill(tree.prompt_padding[:, None, None, None], lowest)
    weights = torch.cat([to_prefix[..., p:, :], to_prompt, back(to_own)], -1).softmax(-1)
    seen = weights[..., :x].flatten(2, 3) @ prefix_value + weights[..., x : x + p].flatten(2, 3) @ prompt_value
    own = back(blocks(weights[..., x + p :].flatten(1, 2)) @ own_value)
    completion_out = (seen.view(own.shape) + own).flatten(1, 2)

    rows_out = torch.cat([prompt_out, completion_out], 2).transpose(0, 1).flatten(1, 2)
    return torch.cat([prefix_out, rows_out[None]], 2)


def _future_masked(scores: Tensor, shared: int, length: int, lowest: float) -> Tensor:
    """Scores [..., shared · length, length] of tokens with themselves, the future at ``lowest``."""
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.unflatten(-2, (shared, length)).masked_fill(future, lowest).flatten(-3, -2)


class _Rearrange(torch.autograd.Function):
    """Rows by index, where the gradient is rows by the inverse index: no slow scatter-add, as none is ever taken twice.

    ``padding`` marks the source's positions that are nobody's tokens: their gradient is zero.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, padding)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inverse, padding = ctx.saved_tensors
        return grads[0].index_select(0, inverse).masked_fill_(padding[:, None], 0), None, None, None


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``tree`` travels through the model's keyword arguments, and there is no mask to make."""
    if tree is None:
        raise ValueError("this model does not hand its keyword arguments down to its attention: set trainer.layout=padded")
    if kwargs.get("dropout"):
        raise ValueError("the shared-prompt layout has no attention dropout; set the model's attention_dropout to 0")
    if unknown := [name for name in ("softcap", "s_aux", "sliding_window") if kwargs.get(name) is not None]:
        raise ValueError(f"the shared-prompt layout does not know this model's {', '.join(unknown)}: set trainer.layout=padded")
    out_heads = tree_attention(query, key, value, tree, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return out_heads.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make ``model.set_attn_implementation(NAME)`` work. Without a mask function of that name, transformers makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
