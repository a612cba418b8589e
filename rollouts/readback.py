"""Reading the parameters back out of a loaded vLLM model, under their Hugging Face names. Runs in vLLM's worker.

vLLM merges projections (``qkv_proj``) and its CPU build keeps linear layers packed for the matrix unit, the original gone. A packed
layer is read by what it computes: rows of the identity matrix through it give columns of its weight, exactly, since each sum has one
term that is not zero; numbers below 2⁻¹²⁶, which bfloat16's products take for 0, count as 0. So the very copy is read that the samples are
computed with: a tied head whose packed copy was not renewed shows at once.

All columns of 135M parameters are 0.2 TFLOP, so a sixteenth of every matrix is read at a time, another each time. A stale tensor shows
in any of them: even the first step at a learning rate of 1e-6 changes one in a thousand of a bfloat16 matrix's entries, 129 at least in
SmolLM2-135M's. One number that was not applied shows within sixteen times, if it stays so.

Read back are linear layers, embeddings, norms and biases, unquantised; of several workers, each reads the shards it holds (``Part``).
Experts and derived matrices (MLA's absorbed ones) are not: of each kind of those, ``proof.self_test`` tries one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from grpo.rollouts.proof import Part, digest_of_values

TURNS = 16
_Read = Callable[[], Tensor]
_Parts = tuple[Part, ...]
_ROWS_SHARDED = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear)  # these, and no subclass: it may cut otherwise


@dataclass(frozen=True, slots=True)
class Readable:
    """A tensor that can be read back: type, what of it is read – of what this worker holds, some columns – and how."""

    name: str
    dtype: torch.dtype
    parts: tuple[Part, ...]
    read: _Read


def readable(model: torch.nn.Module, turn: int) -> list[Readable]:
    """Every tensor that can be read; a tied one is held in two places, the embedding and the head, and comes twice.

    Args:
        turn: counts the times; after ``TURNS`` of them all columns of packed layers were read.
    """
    return list(_readable(model, _Bench.of(model, turn)))


def read_back(model: torch.nn.Module, turn: int, wanted: Container[str]) -> dict[str, list[str]]:
    """Hash of every wanted tensor that can be read, of every copy.

    Args:
        wanted: names; what a model holds under others (merged experts, say) is not read, which on a GPU would be a copy to the host.
    """
    digests: dict[str, list[str]] = {}
    for tensor in _readable(model, _Bench.of(model, turn)):
        if tensor.name not in wanted:
            continue
        digests.setdefault(tensor.name, []).append(digest_of_values(tensor.read()))
    return digests


class _Bench:
    """Where matrices are read, a stretch of columns of each. Packed layers are read out one after another in the same memory.

    What was read of one is there until the next one is. Of 0.6 s for all of 135M parameters, fresh memory for every layer took 0.2.
    """

    def __init__(self, turn: int, turns: int) -> None:
        self._turn, self._turns = turn % turns, turns
        self._identities: dict[tuple[int, torch.dtype], Tensor] = {}
        self._room = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def of(cls, model: torch.nn.Module, turn: int) -> _Bench:
        """Where nothing is packed, such as on a GPU, all columns are read every time."""
        return cls(turn, TURNS if any(hasattr(module, "cpu_linear") for module in model.modules()) else 1)

    def columns(self, width: int) -> Part:
        """Which of a matrix's columns are read this time."""
        length = -(-width // self._turns)
        return Part(1, min(self._turn * length, width - length), length)

    def read(self, module: Any, width: int) -> Tensor:
        """Columns of the weight ``[out, width]`` of a layer."""
        if not hasattr(module, "cpu_linear"):
            return self.columns(width).of(module.weight.detach())
        dtype = module.params_dtype if hasattr(module, "params_dtype") else module.weight.dtype
        if (width, dtype) not in self._identities:
            columns = self.columns(width)
            rows = self._identities[width, dtype] = torch.zeros(columns.length, width, dtype=dtype)
            rows.diagonal(columns.start).fill_(1)
        product: Tensor = module.cpu_linear(self._identities[width, dtype], module.weight, None)
        size = product.numel() * product.element_size()
        if self._room.numel() < size:
            self._room = torch.empty(size, dtype=torch.uint8)
        return self._room[:size].view(product.dtype).view(product.shape[1], -1).copy_(product.t())


def _readable(model: torch.nn.Module, bench: _Bench) -> Iterator[Readable]:
    merged: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    alone = get_tensor_model_parallel_world_size() == 1
    embedding = ""
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            if not isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                continue
            weight = f"{name}.weight"
            start, stop = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
            shard = () if module.tp_size == 1 else (Part(0, start, stop - start),)
            parts, whole = (*shard, bench.columns(module.embedding_dim)), _once(partial(bench.read, module, module.embedding_dim))
            embedding = embedding if isinstance(module, ParallelLMHead) and tied else weight
            yield Readable(embedding, module.weight.dtype, parts, _slice(whole, 0, stop - start))
        elif isinstance(module, LinearBase):
            if isinstance(module.quant_method, UnquantizedLinearMethod):
                yield from _linear(name, module, merged, bench)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                # A loader of its own may cut it: then what this worker should hold is not known here.
                if alone or getattr(parameter, "weight_loader", default_weight_loader) is default_weight_loader:
                    yield Readable(f"{name}.{own}", parameter.dtype, (), _rows(parameter, 0, None))


def _linear(name: str, module: LinearBase, merged: Mapping[str, list[str]], bench: _Bench) -> Iterator[Readable]:
    """A linear layer, cut into those it was merged from."""
    parent, _, last = name.rpartition(".")
    parts = merged.get(last, [last])
    sizes: list[int] = getattr(module, "output_sizes", None) or [module.output_size]
    shards = _shards(module, sizes)
    if shards is None or len(parts) != len(sizes):
        return
    width = getattr(module, "input_size_per_partition", module.input_size)  # a replicated layer has no partitions
    columns, whole = bench.columns(width), _once(partial(bench.read, module, width))
    bias = getattr(module, "bias", None)
    start = 0
    for part, (held, of_weight, of_bias) in zip(parts, shards, strict=True):
        original = f"{parent}.{part}" if parent else part
        yield Readable(f"{original}.weight", module.params_dtype, (*of_weight, columns), _slice(whole, start, start + held))
        if isinstance(bias, Tensor):
            yield Readable(f"{original}.bias", bias.dtype, of_bias, _rows(bias, start, start + held))
        start += held


def _shards(module: LinearBase, sizes: list[int]) -> list[tuple[int, _Parts, _Parts]] | None:
    """Of each projection: the rows held here, and which part of its weight and its bias they are; None if that is not known."""
    workers, rank = module.tp_size, module.tp_rank
    if workers == 1 or isinstance(module, ReplicatedLinear):
        return [(size, (), ()) for size in sizes]
    if type(module) is RowParallelLinear:
        width = module.input_size_per_partition
        return [(size, (Part(1, rank * width, width),), ()) for size in sizes]
    if type(module) not in _ROWS_SHARDED:
        return None
    shards: list[tuple[int, _Parts, _Parts]] = []
    for number, size in enumerate(sizes):
        # With more workers than key-value heads, several hold the same head; sizes count it once for each of them.
        alike = getattr(module, "num_kv_head_replicas", 1) if number else 1
        rows = (Part(0, rank // alike * (size // workers), size // workers),)
        shards.append((size // workers, rows, rows))
    return shards


def _once(read: _Read) -> _Read:
    kept: list[Tensor] = []

    def reader() -> Tensor:
        if not kept:
            kept.append(read())
        return kept[0]

    return reader


def _slice(whole: _Read, start: int, stop: int) -> _Read:
    return lambda: whole()[start:stop]


def _rows(tensor: Tensor, start: int, stop: int | None) -> _Read:
    return lambda: tensor.detach()[start:stop] if tensor.ndim else tensor.detach()
