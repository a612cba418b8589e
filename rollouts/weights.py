"""Weights on their way to an engine: what its checkpoint holds, whether what comes is that, and a form that travels.

Engines load by name and skip what they do not find: with a tensor missing, vLLM goes on with the old one and raises nothing, and
one stale tensor drowns in the numerical noise between engine and trainer. So names and shapes are compared before anything is
loaded, and ``grpo.rollouts.proof`` compares the bytes.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from grpo.rollouts.base import Weights

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 6  # names listed in a message


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Spec:
    """What a tensor will be. ``Spec((576,), "bfloat16")``"""

    shape: tuple[int, ...]
    dtype: str  # name of its torch dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


class WeightStream:
    """Weights that come one tensor after another: all names and shapes are known at once, the tensors can be had in order, once.

    For a policy that gathers a sharded tensor only when its turn has come, and for engines that load one while the next travels.

    Args:
        specs: what will come.
        tensors: the tensors, in any order.
    """

    def __init__(self, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        self.specs = dict(specs)
        self._tensors = tensors

    @classmethod
    def of(cls, weights: Weights) -> WeightStream:
        """A stream as it is, or the tensors of a mapping."""
        if isinstance(weights, WeightStream):
            return weights
        return cls({name: Spec.of(tensor) for name, tensor in weights.items()}, weights.items())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors.

        Raises:
            ValueError: one that was not announced, or that came twice, or has another shape or type, or did not come.
        """
        announced = Announced(self.specs)
        for name, tensor in self._tensors:
            announced.check(name, tensor)
            yield name, tensor
        announced.check_all_came()


class Announced:
    """What will come, ticked off as it comes."""

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        self._specs, self._left = specs, dict(specs)

    def check(self, name: str, tensor: Tensor) -> None:
        """Take the next one.

        Raises:
            ValueError: it was not announced, or came twice, or has another shape or type.
        """
        announced = self._left.pop(name, None)
        if announced is None:
            raise ValueError(f"the tensor {name!r} came twice" if name in self._specs else f"the tensor {name!r} was not announced")
        if Spec.of(tensor) != announced:
            raise ValueError(f"the tensor {name!r} was announced as {announced} and came as {Spec.of(tensor)}")

    def check_all_came(self) -> None:
        """Raises:
        ValueError: one did not come.
        """
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were announced and did not come: {shown(self._left)}")


def shown(names: Collection[str]) -> str:
    """The first few of some names, for a message."""
    return ", ".join(sorted(names)[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def checkpoint_shapes(model: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a model's safetensors files, from their headers alone; empty if it has none.

    Args:
        model: a folder, or a hub id that has been downloaded.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=["*.safetensors"]))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def check_weights(weights: Mapping[str, _Shaped], expected: Shapes, optional: Collection[str] = ()) -> None:
    """Refuse weights whose names or shapes are not the expected ones.

    Args:
        weights: tensors, or what is known of them (``WeightStream.specs``).
        optional: names that may be left out, such as the head of a model that ties it to its embedding.

    Raises:
        ValueError: listing what is missing, unexpected, or of another shape.
    """
    missing = expected.keys() - weights.keys() - set(optional)
    unexpected = weights.keys() - expected.keys() - set(optional)
    common = expected.keys() & weights.keys()
    misshapen = [
        f"{name} {list(weights[name].shape)} instead of {list(expected[name])}"
        for name in common
        if tuple(weights[name].shape) != tuple(expected[name])
    ]
    problems = [
        f"{len(names)} {what}: {shown(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"these are not the weights of the engine's model ({len(weights)} tensors given, {len(expected)} expected)\n  "
            + "\n  ".join(problems)
            + "\n  → pass all parameters under their Hugging Face names, tied ones once; nothing was loaded"
        )


def check_kinds(specs: Mapping[str, Spec], held: Mapping[str, torch.dtype]) -> None:
    """Refuse what a model that holds real numbers would have to make real numbers of. From one precision to another is no matter.

    Args:
        held: the types of the model's own tensors.

    Raises:
        ValueError: naming the tensors.
    """
    import torch

    wrong = [name for name, dtype in held.items() if dtype.is_floating_point and name in specs]
    wrong = [name for name in wrong if not getattr(torch, specs[name].dtype).is_floating_point]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors are {', '.join(sorted({specs[name].dtype for name in wrong}))}, and the model computes with "
            f"floating-point numbers: {shown(wrong)}\n  → send what the trainer computes with; nothing was loaded"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeights:
    """Weights as NumPy arrays: Ray places those in shared memory and hands them to every actor without a copy.

    NumPy has no bfloat16, so a tensor's bytes travel as integers of the same width beside the name of its type.
    """

    arrays: Mapping[str, np.ndarray[Any, Any]]
    dtypes: Mapping[str, str]  # name of the parameter → name of its torch dtype

    @classmethod
    def pack(cls, weights: Mapping[str, Tensor]) -> PackedWeights:
        import torch

        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        arrays = {name: w.detach().cpu().contiguous().view(integers[w.element_size()]).numpy() for name, w in weights.items()}
        return cls(arrays=arrays, dtypes={name: Spec.of(w).dtype for name, w in weights.items()})

    def unpack(self) -> dict[str, Tensor]:
        """Tensors over the same memory, which other processes share: read them, never write."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return {name: torch.from_numpy(array).view(getattr(torch, self.dtypes[name])) for name, array in self.arrays.items()}
