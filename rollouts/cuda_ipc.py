"""Weights read straight out of the trainer's GPU by engines on the same machine: CUDA's interprocess memory.

A parcel is a copy of its tensors on the trainer's GPU, one buffer, and what travels is its handle. An engine maps the buffer into
its own memory: on the same GPU it reads it in place, on another one over NVLink or PCIe (peer access). No weights reach an engine
through the host, where only the copies go that are hashed (``proof.digest``). The trainer keeps the buffers of the last sync for
engines that start later: once more the weights' size on its GPU, and twice while a sync is under way.

PyTorch counts who has a buffer mapped, and its count knows one reader that opens it once. Here any number of engines open it, again
after a restart, or never. So readers are kept out of the count, and the trainer, who knows when nobody needs a buffer any more
(``discard``), settles it.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grpo.rollouts import flat
from grpo.rollouts.transfer import Parcel
from grpo.rollouts.weights import Spec

if TYPE_CHECKING:
    from torch import Tensor

# Places in the arguments of torch.multiprocessing.reductions.rebuild_cuda_tensor.
_DEVICE, _COUNTER, _COUNTER_PLACE, _EVENT_NEEDED = 6, 11, 12, 14
_NO_COUNTER = b"/grpo_nobody_counts"  # of this name there is no counter, and PyTorch goes on without
_REMEDY = "set rollout.transfer=nccl, which asks for no more than a network, or shared_memory"


class CudaIPC:
    """``Transfer`` by handles of buffers on the trainer's GPU."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._kept: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}

    def send(self, tensors: Mapping[str, Tensor]) -> Parcel:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
        first = next(iter(tensors.values())).device
        buffer = flat.joined(tensors, specs, first if first.type == "cuda" else torch.device("cuda"))
        _, handle = reduce_tensor(buffer)
        torch.cuda.current_stream(buffer.device).synchronize()  # readers do not wait for an event: see for_reader
        number = next(self._numbers)
        self._kept[number] = buffer, handle
        return _Mapped(PhysicalGPU.of(buffer.get_device()), number, handle, specs)

    def discard(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            assert isinstance(parcel, _Mapped)
            self._drop(parcel.number)

    def close(self) -> None:
        for number in list(self._kept):
            self._drop(number)

    def _drop(self, number: int) -> None:
        import torch

        if number in self._kept:
            _, handle = self._kept.pop(number)  # with this frame goes the last reference: by then the count must stand at 0
            torch.UntypedStorage._release_ipc_counter(handle[_COUNTER], handle[_COUNTER_PLACE])


@dataclass(frozen=True, slots=True)
class PhysicalGPU:
    """A physical GPU, under whatever number a process sees it. ``PhysicalGPU("5b1c…", "node7", "GPU-9f3a…", "NVIDIA H200")``"""

    boot: str  # of the machine's kernel: containers of one machine have the same
    host: str  # for messages
    uuid: str
    name: str

    @classmethod
    def of(cls, index: int) -> PhysicalGPU:
        """The one that has this number in this process."""
        import torch

        properties = torch.cuda.get_device_properties(index)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, socket.gethostname(), str(properties.uuid), properties.name)


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A parcel that stays on the trainer's GPU and is read there."""

    source: PhysicalGPU
    number: int
    handle: tuple[Any, ...]
    specs: Mapping[str, Spec]
    opens_anywhere: ClassVar[bool] = True

    def open(self) -> Mapping[str, Tensor]:
        """Raises:
        RuntimeError: this process cannot read the trainer's GPU.
        """
        import torch
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        own = torch.cuda.current_device()
        visible = {str(torch.cuda.get_device_properties(index).uuid): index for index in range(torch.cuda.device_count())}
        check_reachable(self.source, PhysicalGPU.of(own), visible, lambda index: torch.cuda.can_device_access_peer(own, index))
        try:
            buffer: Tensor = rebuild_cuda_tensor(*for_reader(self.handle, own))
        except RuntimeError as error:
            raise unreadable(self.source, PhysicalGPU.of(own), " ".join(str(error).split())[:200]) from error
        return flat.parted(buffer, self.specs)


def for_reader(handle: Sequence[Any], device: int) -> list[Any]:
    """The arguments of ``rebuild_cuda_tensor`` for a reader whose GPU has this number in its own process, and who does not count.

    Nor does it wait for the event with which the sender marks the end of its copy: that belongs to the sender's GPU, and PyTorch would
    open it on the reader's. ``send`` returns when the copy is there.
    """
    arguments = list(handle)
    arguments[_DEVICE], arguments[_COUNTER], arguments[_EVENT_NEEDED] = device, _NO_COUNTER, False
    return arguments


def check_reachable(source: PhysicalGPU, own: PhysicalGPU, visible: Mapping[str, int], can_access: Callable[[int], bool]) -> None:
    """Refuse a buffer that this process cannot map, as far as can be known before it is tried.

    Args:
        source: where the buffer is.
        own: where it is to be read.
        visible: UUID → number of every GPU that this process sees. CUDA maps the memory of GPUs hidden from it
            (CUDA_VISIBLE_DEVICES) too, but cannot be asked about them.
        can_access: whether the own GPU reaches the one with this number.

    Raises:
        RuntimeError: naming both GPUs.
    """
    if source.boot != own.boot:
        raise unreadable(source, own, "CUDA IPC stays within one machine")
    if source.uuid != own.uuid and source.uuid in visible and not can_access(visible[source.uuid]):
        raise unreadable(source, own, "there is no peer access between the two: see `nvidia-smi topo -p2p r`")


def unreadable(source: PhysicalGPU, own: PhysicalGPU, why: str) -> RuntimeError:
    return RuntimeError(
        f"the engine's process {os.getpid()} on {own.host} ({own.name}, {own.uuid}) cannot read the trainer's weights on {source.host} "
        f"({source.name}, {source.uuid}): {why}\n  → {_REMEDY}"
    )
