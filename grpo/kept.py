"""Kept sets: the tokens that truncated sampling left to choose from, one set for each sampled token.

An engine packs them beside the tokens it samples; the trainer takes its log-probs over the same sets (``grpo.logprobs``). Packed, a set
is a letter and then whichever is shorter: ``i`` and the ids in ascending order as int32, or ``b`` and one bit for every entry of the
vocabulary, the lowest bit first. So no set takes more than an eighth of a byte an entry. An empty one means that nothing was cut,
``UNKNOWN`` that the engine cannot say what was: such completions can be scored, and not trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RULED_OUT = -1e30  # the logit of what cannot be sampled: far below any other, and far enough from −∞ to be multiplied
UNKNOWN = b"?"
_IDS, _BITS = b"i", b"b"
_FEW = 256  # sets of up to vocab / 256 ids are turned into bits all at once, larger ones one by one: that takes less memory


def pack(ids: np.ndarray, vocab: int) -> bytes:
    """A kept set in bytes. ``ids``: one or more of 0 … ``vocab`` − 1, each once, in any order."""
    if 4 * len(ids) <= (vocab + 7) // 8:
        return _IDS + np.sort(ids).astype("<i4").tobytes()
    return _BITS + _to_bits(ids, vocab).tobytes()


def unpack(packed: bytes, vocab: int) -> np.ndarray:
    """The ids of a kept set in ascending order, int64. An empty ``packed`` is the whole vocabulary."""
    if packed[:1] == _IDS:
        return np.frombuffer(packed, "<i4", offset=1).astype(np.int64)
    return np.flatnonzero(_from_bits(_bits(packed, vocab), vocab))


@dataclass(frozen=True, slots=True)
class Columns:
    """The kept sets of some tokens as a table of bits, with a column for each entry of the vocabulary that any of them keeps."""

    ids: Tensor  # [columns] int64, ascending: the entries of the vocabulary
    bits: Tensor  # [tokens, columns / 8] uint8, the lowest bit first
    penalties: Tensor  # [256, 8]: for each byte of bits, what is added to the logits of its eight entries

    @classmethod
    def of(cls, kept: Sequence[bytes], vocab: int, device: torch.device, dtype: torch.dtype) -> Columns:
        """
        Args:
            kept: one packed set a token.
            vocab: entries of the vocabulary, for all of them the same.
            dtype: of the logits.
        """
        few = [row for row, one in enumerate(kept) if one[:1] == _IDS and len(one) <= 1 + 4 * (vocab // _FEW)]
        many = sorted(set(range(len(kept))) - set(few))
        ids = np.frombuffer(b"".join(kept[row][1:] for row in few), "<i4")
        used = np.zeros(vocab, bool)
        used[ids] = True
        if many:
            used |= _from_bits(functools.reduce(np.bitwise_or, (_bits(kept[row], vocab) for row in many)), vocab)
        entries = np.flatnonzero(used)
        bits = np.zeros((len(kept), -(-len(entries) // 8)), np.uint8)
        for row in many:
            one = _bits(kept[row], vocab)
            bits[row] = one if len(entries) == vocab else np.packbits(_from_bits(one, vocab)[used], bitorder="little")
        if few:
            column = (np.cumsum(used) - 1)[ids]
            place = np.repeat(few, [len(kept[row]) // 4 for row in few]) * bits.shape[1] + column // 8
            first = np.flatnonzero(np.diff(place, prepend=-1))  # ids ascend, so what goes into one byte stands together
            bits.ravel()[place[first]] = np.add.reduceat(np.uint8(1) << (column % 8).astype(np.uint8), first)
        penalties = torch.from_numpy(_NOT_KEPT * RULED_OUT).to(device, dtype)
        return cls(torch.from_numpy(entries).to(device), torch.from_numpy(bits).to(device), penalties)

    def places(self, tokens: Tensor) -> Tensor:
        """The column of each of ``tokens``, −1 for one that has none."""
        place = torch.searchsorted(self.ids, tokens)
        return torch.where(self.ids[place.clamp(max=len(self.ids) - 1)] == tokens, place, -1)

    def rule_out(self, z: Tensor, start: int, buffer: Tensor) -> None:
        """Add ``RULED_OUT`` to the logits ``z`` [tokens, block] of what a token does not keep. ``start`` is the block's first column, a
        multiple of 8; ``buffer`` is overwritten, with as many numbers as ``z`` has where each row is filled up to a multiple of 8."""
        octets = self.bits[:, start // 8 : -(-(start + z.shape[1]) // 8)].int()
        penalty = buffer[: 8 * octets.numel()].view(-1, 8)
        torch.index_select(self.penalties, 0, octets.view(-1), out=penalty)
        z.add_(penalty.view(len(z), -1)[:, : z.shape[1]])


def _bits(packed: bytes, vocab: int) -> np.ndarray:
    """One bit for every entry of the vocabulary, in bytes."""
    if not packed:
        return np.full((vocab + 7) // 8, 255, np.uint8)
    if packed == UNKNOWN:
        raise ValueError(
            "a token was sampled by an engine that truncates and does not say what it kept (vLLM on a GPU): its log-prob over the same "
            "tokens cannot be had\n  → train on completions sampled without top_p, top_k and min_p, or by rollout.engine=hf"
        )
    if packed[:1] == _IDS:
        return _to_bits(unpack(packed, vocab), vocab)
    bits = np.frombuffer(packed, np.uint8, offset=1)
    if len(bits) != (vocab + 7) // 8:
        raise ValueError(
            f"a kept set goes over a vocabulary of {8 * len(bits) - 7} to {8 * len(bits)} entries, but the model's head has {vocab}: "
            "it is of another model"
        )
    return bits


def _to_bits(ids: np.ndarray, vocab: int) -> np.ndarray:
    kept = np.zeros(vocab, bool)
    kept[ids] = True
    return np.packbits(kept, bitorder="little")


def _from_bits(bits: np.ndarray, vocab: int) -> np.ndarray:
    return np.unpackbits(bits, count=vocab, bitorder="little").astype(bool)


_NOT_KEPT = np.unpackbits(~np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(float)
"""[256, 8]: for each byte of bits, which of its eight entries are not kept."""
