"""Sampling without a generator: the randomness of a token is a pure function of (request seed, sample index, position).

Generators with a state are the usual way, and they are what makes sampled text depend on how requests were batched, preempted
or spread over engines. Here nothing is carried along: ``completion_key`` names a completion, ``uniforms`` hashes its key with
the position of the next token, and ``sample`` inverts the cumulative distribution at that number. The same rule serves every
engine of ours, on any device. (vLLM's per-request generators also crash its CPU build when a request is preempted.)

Inverting costs about one pass over the logits, where the usual exponential race draws one random number for every entry of the
vocabulary: on a CPU that took as long as the model itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grpo.kept import pack

_BLOCK = 256  # entries of the vocabulary summed into one entry of the first level
_CANDIDATES = 1024  # entries looked at first when truncating; on CPU torch.topk is faster for 1024 than for 50
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio: the odd increment of splitmix64
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def completion_key(seed: int, index: int) -> int:
    """The 64-bit key (signed, as tensors hold it) of sample ``index`` of the request with ``seed``."""
    return _signed(_mix_int(_mix_int(seed & _MASK) + (index + 1) * _GOLDEN & _MASK))


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) for each row: a hash of its key and the position of the token to be sampled.

    Args:
        keys: ``[rows]`` int64, from ``completion_key``.
        positions: ``[rows]`` int64, 0 for the first token of a completion.

    Returns:
        ``[rows]`` float64 with 53 random bits. Keys are hashed once more before the position is added, so that no two keys
        walk along the same sequence at an offset.
    """
    if keys.shape != positions.shape or keys.ndim != 1:
        raise ValueError(f"keys {tuple(keys.shape)} and positions {tuple(positions.shape)} must both be [rows]")
    bits = _mix(_mix(keys) + (positions + 1) * _signed(_GOLDEN))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


class Drawn(NamedTuple):
    """What ``sample`` drew, a row each."""

    tokens: Tensor  # [rows] int64
    logprobs: Tensor  # [rows] float64
    kept: list[bytes]  # the tokens that truncation left, as ``grpo.kept`` packs them; b"" where nothing was cut; [] if nowhere


def sample(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> Drawn:
    """One token a row by inverse CDF, its log-prob under the distribution it was drawn from, and what that was cut to.

    With w = softmax(logits / temperature), cut to the entries of at least ``min_p`` times the largest, then to the ``top_k`` largest
    and then to the smallest set of largest entries that holds ``top_p`` of what is left (vLLM's order), the token is the first t with
    w₀ + … + w_t > uniform · Σw, and its log-prob is log(w_t / Σw). An entry with w = 0 can not be the first to exceed anything, so it
    is never drawn. A row's result depends on that row alone.

    Args:
        logits: ``[rows, vocab]``; overwritten where that saves a copy of a whole vocabulary per row.
        uniforms: ``[rows]`` float64 in [0, 1).
        temperature: ``[rows]``; 0 is greedy: the argmax, with its log-prob at temperature 1 and without truncation.
        top_p: ``[rows]`` in (0, 1]; 1 is off.
        top_k: ``[rows]`` int64; 0 is off. Rows without truncation pay nothing for the others.
        min_p: ``[rows]`` in [0, 1); 0 is off.

    Raises:
        ValueError: a row of logits that is no distribution (NaN, +inf, or nothing but -inf).
    """
    _check_shapes(logits, uniforms, temperature, top_p, top_k, min_p)
    greedy = temperature == 0
    if not bool((temperature[~greedy] == 1).all()):
        logits = logits.div_(torch.where(greedy, 1.0, temperature).to(logits.dtype).unsqueeze(1))
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    truncated = ~greedy & ((top_p < 1) | (top_k > 0) | (min_p > 0))
    kept: list[bytes] = []
    if bool(truncated.any()):
        some = torch.nonzero(truncated).flatten()
        cut, sets = _truncate(weights[some], top_p[some], top_k[some], min_p[some])
        weights = weights.index_copy_(0, some, cut)
        kept = [b""] * len(weights)
        for row, ids in zip(some.tolist(), sets, strict=True):
            kept[row] = pack(ids, weights.shape[1])
    tokens, totals = _invert(weights, uniforms)
    if bool(greedy.any()):
        tokens[greedy] = weights[greedy].argmax(dim=-1)
    drawn = weights.gather(1, tokens.unsqueeze(1)).squeeze(1).double()
    return Drawn(tokens, torch.log(drawn / totals), kept)


def _invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry whose cumulative weight exceeds uniform · total, found in two levels; and the totals.

    A cumulative sum over 50,000 entries in float64 would cost several passes. Sums of blocks need one, and the cumulative sums
    are then taken over the block sums and inside a single block.
    """
    vocab = weights.shape[1]
    whole = vocab - vocab % _BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1, dtype=torch.float32)
    if whole < vocab:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], dim=1)
    edges = sums.double().cumsum(1)
    totals = edges[:, -1]
    if not bool(torch.isfinite(totals).all()):
        bad = torch.nonzero(~torch.isfinite(totals)).flatten().tolist()
        raise ValueError(f"the model's logits are no distribution (NaN, +inf or all -inf) in rows {bad[:8]}: its weights are broken")
    block = _first_above(edges, uniforms * totals)
    before = edges.gather(1, block) - sums.gather(1, block).double()
    fraction = ((uniforms * totals).unsqueeze(1) - before) / sums.gather(1, block).double()

    entries = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, entries.clamp(max=vocab - 1)).double().masked_fill_(entries >= vocab, 0.0).cumsum(1)
    # The block's sum was taken in float32 and this one in float64: compare shares, and stay strictly below the end.
    target = fraction.clamp(0.0, 1.0 - 2.0**-53).squeeze(1) * inside[:, -1]
    return entries.gather(1, _first_above(inside, target)).squeeze(1), totals


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """``[rows, 1]``: the first column of each row whose value is greater than the row's target."""
    return torch.searchsorted(cumulative, target.unsqueeze(1), right=True).clamp_(max=cumulative.shape[1] - 1)


def _truncate(weights: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> tuple[Tensor, list[np.ndarray]]:
    """Zero the weights below ``min_p`` times the largest, all but the ``top_k`` largest, and all that come after ``top_p`` of the rest.

    An entry stays if what comes before it, in descending order, is less than ``top_p``: at least one always does. A row is sorted as
    a whole only if its largest thousand entries do not hold all that stays. Overwrites ``weights``; returns them and the entries of
    each row that are not 0.
    """
    vocab = weights.shape[1]
    if bool((min_p > 0).any()):
        weights = weights.masked_fill_(weights < (min_p * weights.amax(-1)).unsqueeze(1), 0.0)
    for width in (min(vocab, max(_CANDIDATES, int(top_k.max()) + 1)), vocab):
        ordered, entries = weights.topk(width, dim=-1)
        beyond = (top_k > 0).unsqueeze(1) & (torch.arange(width, device=weights.device) >= top_k.unsqueeze(1))
        ordered = ordered.masked_fill_(beyond, 0.0)
        cumulative = ordered.double().cumsum(1)
        totals = torch.where(top_k > 0, cumulative[:, -1], weights.sum(-1).double())
        target = torch.where(top_p < 1, top_p.double() * totals, torch.inf)
        if bool(((cumulative[:, -1] >= target) | (ordered[:, -1] == 0)).all()):
            break
    kept = (cumulative - ordered.double() < target.unsqueeze(1)) & (ordered > 0)
    sizes = kept.sum(1)
    sets = entries[:, : int(sizes.max())].cpu().numpy()  # what a row keeps comes first in it
    return weights.zero_().scatter_(1, entries, ordered * kept), [ids[:size] for ids, size in zip(sets, sizes.tolist(), strict=True)]


def _check_shapes(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must be [rows, vocab], not {tuple(logits.shape)}")
    settings = {"uniforms": uniforms, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    for name, tensor in settings.items():
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{name} must be [rows] = [{logits.shape[0]}], not {tuple(tensor.shape)}")


def _mix_int(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014) on a Python integer."""
    x = (x ^ x >> 30) * _MIX_1 & _MASK
    x = (x ^ x >> 27) * _MIX_2 & _MASK
    return x ^ x >> 31


def _mix(x: Tensor) -> Tensor:
    """The same on int64 tensors, whose products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
