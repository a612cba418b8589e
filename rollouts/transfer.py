"""How weights travel from the trainer to engines in other processes. A back-end turns a handful of tensors into a parcel.

A sync is a sequence of parcels: engines load one while the trainer packs the next, and hold no more of them than they need. The
pool keeps the parcels of the last sync, from which an engine that replaces a dead one is given the same weights.

* ``SharedMemory`` (default): Ray's object store. Engines on the trainer's machine read the trainer's pages, without a copy; other
  machines are sent a copy. Where /dev/shm is too small, Ray keeps the store in a file under /tmp.
* ``Disk``: safetensors files in a folder that every machine can read, for engines that no object store reaches.
* ``grpo.rollouts.peer``: from memory to memory by torch.distributed, NCCL between GPUs, gloo between CPUs.
* ``grpo.rollouts.cuda_ipc``: engines on the trainer's machine read the trainer's GPU.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from grpo.rollouts.weights import PackedWeights, Spec, WeightStream

if TYPE_CHECKING:
    from ray import ObjectRef
    from torch import Tensor

PARCEL_BYTES = 64 << 20  # small enough to begin early, large enough that a parcel's fixed cost, a millisecond, does not count


class Parcel(Protocol):
    """Tensors on their way: small to pickle, opened in the engine's process."""

    opens_anywhere: ClassVar[bool]
    """In processes of the engine's own too, which Ray does not know (vLLM's workers, where there are several)."""

    def open(self) -> Mapping[str, Tensor]: ...


class Transfer(Protocol):
    """A back-end, in the trainer's process."""

    def send(self, tensors: Mapping[str, Tensor]) -> Parcel:
        """Put the tensors where engines find them; theirs may change as soon as this returns."""
        ...

    def discard(self, parcels: Sequence[Parcel]) -> None:
        """Nobody will open these again."""
        ...


class SharedMemory:
    """``Transfer`` through Ray's object store."""

    def send(self, tensors: Mapping[str, Tensor]) -> Parcel:
        import ray

        return _Stored(ray.put(PackedWeights.pack(tensors)))

    def discard(self, parcels: Sequence[Parcel]) -> None:
        """Ray drops an object with the last reference to it."""


@dataclass(frozen=True, slots=True)
class _Stored:
    ref: ObjectRef[PackedWeights]
    opens_anywhere: ClassVar[bool] = False

    def open(self) -> Mapping[str, Tensor]:
        import ray

        return ray.get(self.ref).unpack()


class Disk:
    """``Transfer`` through safetensors files.

    Args:
        folder: readable under this path by every engine, and for this trainer alone. Files of the last sync stay there until the next one,
            or until ``discard``; those of a process that was killed are for whoever made the folder to remove.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).absolute()
        self._folder.mkdir(parents=True, exist_ok=True)

    def send(self, tensors: Mapping[str, Tensor]) -> Parcel:
        from safetensors.torch import save_file

        path = self._folder / f"{uuid.uuid4().hex}.safetensors"
        unfinished = path.with_suffix(".part")
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, unfinished)
            os.replace(unfinished, path)  # no engine can open half a file
        finally:
            unfinished.unlink(missing_ok=True)
        return _File(path)

    def discard(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            assert isinstance(parcel, _File)
            parcel.path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    opens_anywhere: ClassVar[bool] = True

    def open(self) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.path)


@dataclass(frozen=True, slots=True)
class _Here:
    """Tensors that never leave this process."""

    tensors: Mapping[str, Tensor]
    opens_anywhere: ClassVar[bool] = False

    def open(self) -> Mapping[str, Tensor]:
        return self.tensors


class ParcelStream(WeightStream):
    """Weights that come in parcels: opened one after another, or by whom they are handed to (``parcels_of``).

    Args:
        specs: what will come.
        parcels: in any order. They can be had once.
    """

    def __init__(self, specs: Mapping[str, Spec], parcels: Iterable[Parcel]) -> None:
        super().__init__(specs, (entry for parcel in parcels for entry in parcel.open().items()))
        self.parcels = parcels


def parcels_of(stream: WeightStream) -> Iterator[Parcel]:
    """A stream's parcels, unopened. What does not come in parcels is taken up by the handful."""
    return iter(stream.parcels) if isinstance(stream, ParcelStream) else (_Here(tensors) for tensors in handfuls(stream))


def handfuls(tensors: Iterable[tuple[str, Tensor]], num_bytes: int = PARCEL_BYTES) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors, of together at most ``num_bytes`` unless a single one is larger."""
    handful: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if handful and size + more > num_bytes:
            yield handful
            handful, size = {}, 0
        handful[name] = tensor
        size += more
    if handful:
        yield handful
