"""Which GPUs an engine runs on that shares them with the trainer.

Ray hands out a GPU once. Fractions of GPUs would let two actors share one, but not one that is chosen, and an engine of several GPUs cannot
ask for fractions of them. So the trainer's processes claim the GPUs, and engines claim none: each is pinned to the machine of those that it
shares, and told their names – as verl starts its servers. A driver that trains by itself has a GPU that Ray need not even know of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GPU:
    """``node`` is Ray's id of its machine, ``name`` what CUDA_VISIBLE_DEVICES calls it there: a number or a UUID."""

    node: str
    name: str


@dataclass(frozen=True, slots=True)
class Place:
    """The machine and the GPUs of one engine."""

    node: str
    gpus: tuple[str, ...]

    def options(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Ray's options for an actor there. ``environment``: what it needs besides."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus), "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}  # else Ray sets it: to none
        return {
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=self.node, soft=False),
            "runtime_env": {"env_vars": {**environment, **own}},
        }


def places(gpus: Sequence[GPU], gpus_per_engine: int) -> tuple[Place, ...]:
    """The GPUs dealt to engines, each used once, an engine's on one machine.

    Raises:
        ValueError: a machine's GPUs do not make whole engines.
    """
    machines: dict[str, list[str]] = {}
    for gpu in gpus:
        machines.setdefault(gpu.node, []).append(gpu.name)
    found: list[Place] = []
    for node, names in machines.items():
        if len(names) % gpus_per_engine:
            raise ValueError(
                f"the trainer has {len(names)} GPUs on one machine, and engines of {gpus_per_engine} GPUs cannot share them: "
                "an engine does not reach across machines\n  → change trainer.ranks or rollout.gpus_per_engine"
            )
        found += [Place(node, tuple(names[at : at + gpus_per_engine])) for at in range(0, len(names), gpus_per_engine)]
    return tuple(found)


def visible_name(device: str, visible: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES calls a device of this process.

    Args:
        device: ``cuda``, which is the first one, or ``cuda:N``.
        visible: the variable in this process; None or empty: all devices, by number.
    """
    index = int(device.partition(":")[2] or 0)
    return visible.split(",")[index].strip() if visible else str(index)
