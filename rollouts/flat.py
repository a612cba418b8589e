"""Several tensors as one tensor of bytes, for what carries one buffer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from grpo.rollouts.weights import Spec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ALIGNED = 16  # bytes: a view of any type may begin there


def size(specs: Mapping[str, Spec]) -> int:
    """Bytes that these tensors take together."""
    return max((end for _, end in places(specs).values()), default=0)


def places(specs: Mapping[str, Spec]) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes begin and end."""
    import torch

    found, end = {}, 0
    for name, spec in specs.items():
        start = -(-end // _ALIGNED) * _ALIGNED
        end = start + torch.Size(spec.shape).numel() * getattr(torch, spec.dtype).itemsize
        found[name] = (start, end)
    return found


def joined(tensors: Mapping[str, Tensor], specs: Mapping[str, Spec], device: torch.device | None = None) -> Tensor:
    """A copy of all of them, uint8 ``[size(specs)]``; on ``device``, or where the first of them is."""
    import torch

    joint = torch.empty(size(specs), dtype=torch.uint8, device=device or next(iter(tensors.values())).device)
    for name, (start, end) in places(specs).items():
        joint[start:end].copy_(tensors[name].detach().contiguous().view(-1).view(torch.uint8))
    return joint


def parted(joint: Tensor, specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Views into what ``joined`` made."""
    import torch

    found = places(specs).items()
    return {name: joint[start:end].view(getattr(torch, specs[name].dtype)).view(specs[name].shape) for name, (start, end) in found}
