"""Reading the parameters back out of a loaded vLLM model, under their Hugging Face names. Runs in vLLM's worker.

vLLM merges projections (``qkv_proj``) and its CPU build keeps linear layers packed for the matrix unit, the original gone. A packed
layer is read by what it computes: the identity matrix through it gives its weight, exactly, since each sum has one term that
is not zero. For 135M parameters that is 0.2 TFLOP, a fraction of a second, and it reads the very copy the samples are computed
with: a tied head whose packed copy was not renewed shows at once.

Read back are linear layers, embeddings, norms and biases, unquantised, on one worker. Experts, shards (tensor parallel) and
derived matrices (MLA's absorbed ones) are not: ``proof.self_test`` covers those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from grpo.rollouts.proof import digest_of_values

_Read = Callable[[], Tensor]


def held_dtypes(worker: Any) -> dict[str, torch.dtype]:
    """Type of every tensor that ``read_back`` can read."""
    return {name: dtype for name, dtype, _ in _readable(worker.get_model(), _Bench())}


def read_back(worker: Any) -> dict[str, list[str]]:
    """Hash of every tensor that can be read: a list, as a tied tensor is held in two places, the embedding and the head."""
    digests: dict[str, list[str]] = {}
    for name, _, read in _readable(worker.get_model(), _Bench()):
        digests.setdefault(name, []).append(digest_of_values(read()))
    return digests


class _Bench:
    """Where packed layers are read out, one after another in the same memory: what was read is there until the next one is.

    Of 0.6 s for 135M parameters, fresh memory for every layer took 0.2.
    """

    def __init__(self) -> None:
        self._identities: dict[tuple[int, torch.dtype], Tensor] = {}
        self._room = torch.empty(0, dtype=torch.uint8)

    def through(self, module: Any, width: int) -> Tensor:
        """The weight ``[out, width]`` of a layer of the CPU build, by sending the identity through it."""
        dtype = module.params_dtype if hasattr(module, "params_dtype") else module.weight.dtype
        if (width, dtype) not in self._identities:
            self._identities[width, dtype] = torch.eye(width, dtype=dtype)
        product: Tensor = module.cpu_linear(self._identities[width, dtype], module.weight, None)
        size = product.numel() * product.element_size()
        if self._room.numel() < size:
            self._room = torch.empty(size, dtype=torch.uint8)
        return self._room[:size].view(product.dtype).view(product.shape[1], width).copy_(product.t())


def _readable(model: torch.nn.Module, bench: _Bench) -> Iterator[tuple[str, torch.dtype, _Read]]:
    """(Hugging Face name, type, how to read it) of every tensor that can be read."""
    merged: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    embedding = ""
    for name, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            if not isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                continue
            weight = f"{name}.weight"
            if isinstance(module, ParallelLMHead):
                yield embedding if tied else weight, module.weight.dtype, _head(module, bench)
            else:
                embedding = weight
                yield weight, module.weight.dtype, _rows(module.weight, 0, module.org_vocab_size)
        elif isinstance(module, LinearBase):
            if isinstance(module.quant_method, UnquantizedLinearMethod):
                yield from _linear(name, module, merged, bench)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{own}", parameter.dtype, _rows(parameter, 0, None)


def _linear(name: str, module: LinearBase, merged: Mapping[str, list[str]], bench: _Bench) -> Iterator[tuple[str, torch.dtype, _Read]]:
    """A linear layer, cut into those it was merged from."""
    parent, _, last = name.rpartition(".")
    parts = merged.get(last, [last])
    sizes: list[int] = getattr(module, "output_sizes", None) or [module.output_size]
    if len(parts) != len(sizes):
        return
    whole = _once(lambda: _linear_weight(module, bench))
    bias = getattr(module, "bias", None)
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        original = f"{parent}.{part}" if parent else part
        yield f"{original}.weight", module.params_dtype, _slice(whole, start, start + size)
        if isinstance(bias, Tensor):
            yield f"{original}.bias", bias.dtype, _rows(bias, start, start + size)
        start += size


def _linear_weight(module: Any, bench: _Bench) -> Tensor:
    if hasattr(module, "cpu_linear"):
        return bench.through(module, module.input_size_per_partition)
    weight: Tensor = module.weight
    return weight


def _head(module: Any, bench: _Bench) -> _Read:
    def read() -> Tensor:
        weight = bench.through(module, module.embedding_dim) if hasattr(module, "cpu_linear") else module.weight
        return weight[: module.org_vocab_size]

    return read


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
