"""Weights on their way to an engine: what its checkpoint holds, whether what arrives is that, and a form that travels.

Engines load by name and skip what they do not find: with a tensor missing, vLLM goes on with the old one and raises nothing, and
one stale tensor drowns in the numerical noise between engine and trainer. So names and shapes are compared before anything is
loaded.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 6  # names listed in a message


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a folder's safetensors files, from their headers alone; empty if it has none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def check_weights(weights: Mapping[str, Tensor], expected: Shapes, optional: Collection[str] = ()) -> None:
    """Refuse weights whose names or shapes are not the expected ones.

    Args:
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
        f"{len(names)} {what}: {', '.join(sorted(names)[:_SHOWN])}" + (", …" if len(names) > _SHOWN else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"these are not the weights of the engine's model ({len(weights)} tensors given, {len(expected)} expected)\n  "
            + "\n  ".join(problems)
            + "\n  → pass all parameters under their Hugging Face names, tied ones once; nothing was loaded"
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
        return cls(arrays=arrays, dtypes={name: str(w.dtype).removeprefix("torch.") for name, w in weights.items()})

    def unpack(self) -> dict[str, Tensor]:
        """Tensors over the same memory, which other processes share: read them, never write."""
        import torch

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return {name: torch.from_numpy(array).view(getattr(torch, self.dtypes[name])) for name, array in self.arrays.items()}
