"""Attention over one line of tokens that is a tree of segments: what the packed and the shared-prompt layout need.

A line holds segments one after the other, children behind their parent: [prefix of all prompts | rest of a prompt | its completions
| rest of the next prompt | …], or for the packed layout simply [rollout | rollout | …]. A token sees its own segment up to itself, and
all of its segment's ancestors. Behind a segment stand its descendants and nothing else, so one number a token says it all: token k is
seen by token q exactly if k ≤ q < seen_until[k].

Three ways to compute it, one meaning:

* **by parts** (CPU): every segment with itself, and every segment with what descends from it. What must not see each other is never
  multiplied, and no scores are kept for the backward pass.
* **FlexAttention** (CUDA): a block mask from ``seen_until``; blocks that nobody sees cost nothing.
* **dense**: SDPA under a mask of the square of the line; other devices, and the oracle of the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from grpo.batch import on_device

NAME = "grpo_shared_prompt"
PIECE = 512  # longer segments are cut: a piece sees its predecessors whole, so most of the future is never computed
SLACK = 2**14  # scores a head that may be computed for nothing before one more part is cheaper
CHUNK = 2**22  # scores held at a time: they should stay in the processor's cache
NEVER = -3e4  # as a score: e^NEVER is 0, and NEVER is finite in every floating-point type


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens ``start … end - 1`` of the line, seen by their successors up to ``until``, where the last descendant ends."""

    start: int
    end: int
    until: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Runs of a line as equally wide blocks, padded on the right with the number ``length``: one row more than the line has.

    ``line`` and ``flat`` name the real tokens: their positions in the line, and in the flattened blocks.
    """

    positions: Int[Tensor, "blocks width"]
    line: Int[Tensor, " tokens"]
    flat: Int[Tensor, " tokens"]

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int]], length: int) -> Blocks:
        starts, ends = torch.tensor(runs).T[:, :, None]
        positions = starts + torch.arange(int((ends - starts).max()))
        real = positions < ends
        return cls(positions.where(real, length), positions[real], real.flatten().nonzero().flatten())

    def rows(self, heads: int) -> Int[Tensor, " rows"]:
        """Of a line [length + 1, heads, …] flattened to a row a token and head: what these blocks hold, in order [blocks, heads, width]."""
        return (self.positions[:, None] * heads + torch.arange(heads)[:, None]).flatten()


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks of queries, each against the block of keys of the same number; ``causal`` where the two are one."""

    queries: Blocks
    keys: Blocks
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tree:
    """How a line of tokens is to be attended to."""

    seen_until: Int[Tensor, " length"]
    parts: tuple[Part, ...]  # every token is a query of one causal part, and of one more for each piece of its ancestors
    longest: int  # tokens of the longest branch, from the root: the longest sequence that stands in this line
    block_mask: Any = None  # FlexAttention's, on CUDA

    def to(self, device: torch.device) -> Tree:
        seen_until = on_device(self.seen_until, device)
        return replace(self, seen_until=seen_until, block_mask=flex_mask(seen_until) if device.type == "cuda" else None)


def build_tree(prefix: int, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> Tree:
    """A line [prefix | prompt | its completions | prompt | …]. What has length 0 is no segment.

    Args:
        prefix: tokens that all prompts begin with.
        prompts: of each row, the tokens after the prefix.
        completions: of each row, the inputs of each completion.
    """
    segments = []
    at = prefix
    for prompt, lengths in zip(prompts, completions, strict=True):
        start, at = at, at + prompt
        segments.append(Segment(start=start, end=at, until=at + sum(lengths)))
        for length in lengths:
            segments.append(Segment(start=at, end=at + length, until=at + length))
            at += length
    segments.append(Segment(start=0, end=prefix, until=at))
    longest = max(prefix + prompt + max(lengths, default=0) for prompt, lengths in zip(prompts, completions, strict=True))
    return tree_of([s for s in segments if s.end > s.start], longest)


def tree_of(segments: Sequence[Segment], longest: int) -> Tree:
    """``segments`` hold every token of the line once."""
    length = max(s.end for s in segments)
    seen_until = torch.zeros(length, dtype=torch.long)
    for s in segments:
        seen_until[s.start : s.end] = s.until
    pieces = [replace(s, start=at, end=min(at + PIECE, s.end)) for s in segments for at in range(s.start, s.end, PIECE)]
    parts = []
    for some in _alike(pieces, lambda s: (s.end - s.start, s.end - s.start)):
        blocks = Blocks.of([(s.start, s.end) for s in some], length)
        parts.append(Part(blocks, blocks, True))
    for some in _alike([s for s in pieces if s.until > s.end], lambda s: (s.until - s.end, s.end - s.start)):
        queries, keys = [(s.end, s.until) for s in some], [(s.start, s.end) for s in some]
        parts.append(Part(Blocks.of(queries, length), Blocks.of(keys, length), False))
    return Tree(seen_until=seen_until, parts=tuple(parts), longest=longest)


def _alike(segments: Sequence[Segment], shape: Callable[[Segment], tuple[int, int]]) -> Iterator[list[Segment]]:
    """Those of like (queries, keys) together: a block is as large as the largest of its part in both directions."""
    some: list[Segment] = []
    most_queries = most_keys = needed = 0
    for segment in sorted(segments, key=shape, reverse=True):
        queries, keys = shape(segment)
        most = max(most_queries, queries), max(most_keys, keys)
        if some and (len(some) + 1) * most[0] * most[1] > (needed + queries * keys) * 5 // 4 + SLACK:
            yield some
            some, needed, most = [], 0, (queries, keys)
        some.append(segment)
        (most_queries, most_keys), needed = most, needed + queries * keys
    if some:
        yield some


def tree_attention(
    query: Float[Tensor, "1 heads length width"],
    key: Float[Tensor, "1 kv_heads length width"],
    value: Float[Tensor, "1 kv_heads length value_width"],
    tree: Tree,
    scaling: float,
) -> Float[Tensor, "1 heads length value_width"]:
    """softmax(scaling · q kᵀ) v by parts, each query over what it may see."""
    query, key, value = (line[0].transpose(0, 1) for line in (query, key, value))
    return _ByParts.apply(query, key, value, tree, scaling).transpose(0, 1)[None]


class _ByParts(torch.autograd.Function):
    """Lines [length, heads, size]. With M a row's largest score: o = Σ e^(s−M) v / Σ e^(s−M) over the keys of all parts.

    A score itself is never rounded to bf16, only its distance from M or from L = log Σ e^s, which is small where it matters: see
    ``_queries``. Backward, with p = e^(s−L): ∂v = pᵀ do, ∂s = p (do·v − do·o), ∂q = ∂s k, ∂k = ∂sᵀ q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        rows = _rows(tree, query.shape[1], key.shape[1])
        query_line, key_line, value_line = _queries(query * scaling), _keys(key), F.pad(value, (0, 0, 0, 0, 0, 1))
        blocks = [(part, part.queries(query_line), part.keys(key_line)) for part in rows.parts]
        largest = [_largest(scores).flatten() for part, q, k in blocks for _, scores in _scores(part, q, k)]
        highest = torch.cat([*largest, query.new_full((1,), -torch.inf)])[rows.query_places].amax(-1).view(*query.shape[:2], 1)
        offset = F.pad(highest, (0, 0, 0, 0, 0, 1))
        outs, sums = [], []
        for part, q, k in blocks:
            q[..., -3:-2] = -part.queries(offset)
            v = part.keys(value_line)
            for some, scores in _scores(part, q, k):
                p = scores.exp_()
                outs.append(p @ v[some])
                sums.append(p.sum(-1, keepdim=True, dtype=exact))
        both = [torch.cat([part.to(exact), total], -1) for part, total in zip(outs, sums, strict=True)]
        out, total = _summed(both, rows.query_places, query.shape[1]).split((value.shape[-1], 1), -1)
        out = (out / total).to(query.dtype)
        ctx.save_for_backward(query, key, value, out, total.log().add_(highest))
        ctx.rows, ctx.scaling = rows, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, log_total = ctx.saved_tensors
        grad, rows = grads[0], ctx.rows
        query_line, key_line, value_line = _queries(query * ctx.scaling, -log_total), _keys(key), _keys(value)
        grad_line = _queries(grad, -(grad.to(log_total.dtype) * out).sum(-1, keepdim=True))
        into_query, into_key, into_value = [], [], []
        for part in rows.parts:
            q, g, k, v = part.queries(query_line), part.queries(grad_line), part.keys(key_line), part.keys(value_line)
            for some, scores in _scores(part, q, k):
                p = scores.exp_()
                into_value.append(p.mT @ g[some, :, :-3])
                into_scores = torch.bmm(g[some], v[some].mT).mul_(p)
                into_query.append(into_scores @ k[some, :, :-3])
                into_key.append(into_scores.mT @ q[some, :, :-3])
        grad_query = _summed(into_query, rows.query_places, query.shape[1]).mul_(ctx.scaling)
        grad_key, grad_value = (_summed(values, rows.key_places, key.shape[1]) for values in (into_key, into_value))
        return grad_query, grad_key, grad_value, None, None


@dataclass(frozen=True, slots=True)
class _PartRows:
    """A part in rows of flattened lines: [blocks · kv_heads, rows a block], the queries of heads that share a key one behind the other."""

    query_rows: Int[Tensor, " rows"]
    key_rows: Int[Tensor, " rows"]
    blocks: int  # times the number of kv heads
    causal: bool

    def queries(self, line: Float[Tensor, "length_1 heads size"]) -> Float[Tensor, "blocks rows size"]:
        return line.flatten(0, 1).index_select(0, self.query_rows).view(self.blocks, -1, line.shape[-1])

    def keys(self, line: Float[Tensor, "length_1 kv_heads size"]) -> Float[Tensor, "blocks rows size"]:
        return line.flatten(0, 1).index_select(0, self.key_rows).view(self.blocks, -1, line.shape[-1])


@dataclass(frozen=True, slots=True)
class _Rows:
    """``places`` say, for each row of a line, where it stands among the rows of all parts laid one behind the other."""

    parts: tuple[_PartRows, ...]
    query_places: Int[Tensor, "rows most"]
    key_places: Int[Tensor, "rows most"]


@functools.lru_cache(maxsize=2)  # every layer asks for the same, forward and backward
def _rows(tree: Tree, heads: int, kv_heads: int) -> _Rows:
    parts = tuple(
        _PartRows(part.queries.rows(heads), part.keys.rows(kv_heads), len(part.queries.positions) * kv_heads, part.causal)
        for part in tree.parts
    )
    length = len(tree.seen_until)
    queries, keys = [part.queries for part in tree.parts], [part.keys for part in tree.parts]
    return _Rows(parts, _places(queries, heads, length), _places(keys, kv_heads, length))


def _places(all_blocks: Sequence[Blocks], heads: int, length: int) -> Int[Tensor, "rows most"]:
    """Of each row (token, head) of a line: its places among the rows of all these blocks; those that lack one name the row behind all."""
    tokens, firsts, widths, end = [], [], [], 0
    for blocks in all_blocks:
        count, width = blocks.positions.shape
        tokens.append(blocks.line)
        firsts.append(end + blocks.flat // width * (heads * width) + blocks.flat % width)  # of the first head; the others follow
        widths.append(torch.full_like(blocks.line, width))
        end += count * heads * width
    token, order = torch.cat(tokens).sort(stable=True)
    rank = torch.arange(len(token)) - torch.searchsorted(token, token)
    places = torch.full((length, heads, int(rank.max()) + 1), end)
    places[token, :, rank] = torch.cat(firsts)[order, None] + torch.arange(heads) * torch.cat(widths)[order, None]
    return places.flatten(0, 1)


def _summed(values: Sequence[Float[Tensor, "blocks rows size"]], places: Tensor, heads: int) -> Float[Tensor, "length heads size"]:
    """For each row of a line the sum, rounded once, of what the parts have for it."""
    size = values[0].shape[-1]
    table = torch.cat([*(v.reshape(-1, size) for v in values), values[0].new_zeros(1, size)])
    return F.embedding_bag(places, table, mode="sum").view(-1, heads, size)


def _queries(line: Tensor, constant: Tensor | None = None) -> Tensor:
    """[length + 1, heads, size + 3]: rows [x | c, what c lost by rounding | 1] and, for padding, a row of zeros.

    Times a row of ``_keys`` this is x·y + c for a token and ``NEVER`` for padding, in one matrix product and rounded once.
    """
    out = F.pad(line, (0, 3, 0, 0, 0, 1))
    if constant is not None:
        out[:-1, :, -3:-2] = constant
        out[:-1, :, -2:-1] = constant - out[:-1, :, -3:-2]
    out[:-1, :, -1] = 1
    return out


def _keys(line: Tensor) -> Tensor:
    """[length + 1, heads, size + 3]: rows [y | 1, 1 | 0] and, for padding, a row [0 | 0, 0 | NEVER]."""
    out = F.pad(line, (0, 3, 0, 0, 0, 1))
    out[:-1, :, -3:-1] = 1
    out[-1, :, -1] = NEVER
    return out


def _largest(scores: Tensor) -> Tensor:
    """``scores.amax(-1, keepdim=True)``, which is slow on a CPU where the last axis is short: halves against halves instead."""
    while (half := scores.shape[-1] // 2) > 4:
        halves = torch.maximum(scores[..., :half], scores[..., half : 2 * half])
        if scores.shape[-1] % 2:
            halves[..., 0] = torch.maximum(halves[..., 0], scores[..., -1])
        scores = halves
    return scores.amax(-1, keepdim=True)


def _scores(part: _PartRows, q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """q kᵀ, ``CHUNK`` numbers at a time, the future at ``NEVER``; and which blocks these are."""
    step = max(1, CHUNK // (q.shape[1] * k.shape[1]))
    future = _future(k.shape[1], q.dtype) if part.causal else None
    for start in range(0, len(q), step):
        some = slice(start, start + step)
        scores = torch.bmm(q[some], k[some].mT)
        if future is not None:
            scores.view(-1, *future.shape).add_(future)
        yield some, scores


@functools.lru_cache(maxsize=16)
def _future(width: int, dtype: torch.dtype) -> Tensor:
    """[query, key]: ``NEVER`` where the key comes later. The same few widths return in every layer."""
    return torch.full((width, width), NEVER, dtype=dtype).triu_(1)


# ---------------------------------------------------------------- the same by masks


def dense_mask(seen_until: Int[Tensor, " length"]) -> Bool[Tensor, "length length"]:
    """[q, k]: token k is seen by token q."""
    at = torch.arange(len(seen_until), device=seen_until.device)
    return _sees(at[:, None], at, seen_until)


def flex_mask(seen_until: Int[Tensor, " length"]) -> Any:
    """The same as FlexAttention's block mask, for all heads. Blocks without a visible pair are never computed."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _sees(query, key, seen_until)

    length, device = len(seen_until), seen_until.device
    return _make_block_mask(device.type)(visible, None, None, length, length, device=device)


@functools.cache
def _make_block_mask(device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask  # compiled, it never holds the square


def _sees(query: Tensor, key: Tensor, seen_until: Tensor) -> Tensor:
    return (key <= query) & (query < seen_until[key])


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scaling: float) -> Tensor:
    """``tree_attention`` by FlexAttention."""
    shared = query.shape[1] != key.shape[1]  # by any number of heads: the kernel for powers of two gives way to the general one
    return _flex(query.device.type)(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=shared)


@functools.cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def dense_tree_attention(query: Tensor, key: Tensor, value: Tensor, seen_until: Tensor, scaling: float) -> Tensor:
    """``tree_attention`` by SDPA under a mask of the square of the line."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=dense_mask(seen_until), scale=scaling)


# ---------------------------------------------------------------- transformers


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
    """transformers' attention interface; ``tree`` travels through the model's keyword arguments, and there is no mask to make.

    Raises:
        ValueError: the model wants something of its attention that this one does not do.
    """
    if tree is None:
        raise ValueError("this model does not hand its keyword arguments down to its attention: set trainer.layout=padded")
    if kwargs.get("dropout"):
        raise ValueError("attention over a line of rollouts has no dropout; set the model's attention_dropout to 0")
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"attention over a line of rollouts does not know this model's {', '.join(unknown)}: set trainer.layout=padded")
    if kwargs.get("is_causal") is False:
        raise ValueError("this model's attention is not causal: set trainer.layout=padded")
    if (window := kwargs.get("sliding_window")) is not None and window < tree.longest:
        raise ValueError(f"a rollout of {tree.longest} tokens exceeds this model's sliding_window of {window}: set trainer.layout=padded")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tree.block_mask is not None:
        out = flex_tree_attention(query, key, value, tree.block_mask, scaling)
    elif query.device.type == "cpu":
        out = tree_attention(query, key, value, tree, scaling)
    else:
        out = dense_tree_attention(query, key, value, tree.seen_until, scaling)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make ``model.set_attn_implementation(NAME)`` work. Without a mask function of that name, transformers makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
