"""Where things run: the trainer's device, how many cores and GPUs everybody has, and Ray with room for all of them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grpo.config import BETWEEN_GPUS, Config, ConfigError, Precision
from grpo.environment import usable_cores
from grpo.interrupt import StopSignal

if TYPE_CHECKING:
    from grpo.ranks import Ranks
    from grpo.rollouts.placement import GPU


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where things run. Resolved once from ``trainer.device``, ``model.precision`` and the hardware."""

    device: str
    dtype_name: str  # "bfloat16" or "float32"
    cores: int


def machine(config: Config) -> Machine:
    import torch

    device = config.trainer.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.device", f"is {device!r}, but torch sees no GPU here", "set it to auto or cpu")
    if config.rollout.colocate and not device.startswith("cuda"):
        raise ConfigError("rollout.colocate", f"is true, but the trainer is on {device}: there is no GPU to share", "set it to false")
    gpus = gpus_of_engines(config)
    if gpus > torch.cuda.device_count() and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("rollout.gpus_per_engine", f"asks for {gpus} GPUs, but torch sees {torch.cuda.device_count()}", "lower it")
    ranks = config.trainer.ranks
    transfer = config.rollout.transfer
    if transfer in BETWEEN_GPUS and not device.startswith("cuda"):
        between = f"is {transfer}, between GPUs, but the trainer is on {device}"
        raise ConfigError("rollout.transfer", between, "set it to shared_memory or gloo")
    if ranks > 1 and device.startswith("cuda"):
        if ":" in device:
            raise ConfigError("trainer.device", f"is {device!r}, but trainer.ranks={ranks} takes {ranks} GPUs", "set it to cuda")
        if gpus + ranks > torch.cuda.device_count() and not os.environ.get("RAY_ADDRESS"):
            there = torch.cuda.device_count()
            asked = f"is {ranks}: with the engines' {gpus} that is {gpus + ranks} GPUs, and torch sees {there}"
            raise ConfigError("trainer.ranks", asked, "lower it")
    wanted = config.model.precision
    fast_bf16 = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    bf16 = wanted is Precision.bf16 or (wanted is Precision.auto and fast_bf16)
    return Machine(device=device, dtype_name="bfloat16" if bf16 else "float32", cores=usable_cores())


def without_trainer(config: Config) -> Config:
    """For what only samples: the engines have the machine to themselves."""
    return replace(config, rollout=replace(config.rollout, colocate=False), trainer=replace(config.trainer, ranks=1))


def cpus_per_engine(config: Config, where: Machine) -> int:
    return config.rollout.cpus_per_engine or max(1, where.cores // config.rollout.num_engines)


def cpus_per_rank(config: Config, where: Machine) -> int:
    return max(1, where.cores // config.trainer.ranks)


def gpus_of_engines(config: Config) -> int:
    """That they have beside the trainer's."""
    return 0 if config.rollout.colocate else config.rollout.num_engines * config.rollout.gpus_per_engine


def gpus_of_trainer(where: Machine, ranks: Ranks | None) -> list[GPU]:
    """``ray`` must be running."""
    import ray

    from grpo.rollouts.placement import GPU, visible_name

    if ranks is not None:
        return ranks.gpus()
    return [GPU(ray.get_runtime_context().get_node_id(), visible_name(where.device, os.environ.get("CUDA_VISIBLE_DEVICES")))]


def need_ray(config: Config, where: Machine, stack: ExitStack, stop: StopSignal) -> None:
    """Start Ray, unless it is running, with room for engines and ranks; ``stack`` stops it. They take turns, so both may have all cores."""
    import ray

    from grpo.rollouts.pool import start_ray, stop_ray

    if ray.is_initialized():
        return
    rollout, ranks = config.rollout, config.trainer.ranks
    cpus = rollout.num_engines * cpus_per_engine(config, where) + (ranks * cpus_per_rank(config, where) if ranks > 1 else 0)
    gpus = gpus_of_engines(config) + (ranks if ranks > 1 and where.device == "cuda" else 0)
    start_ray(num_cpus=max(where.cores, cpus), num_gpus=gpus)
    stack.callback(stop_ray)
    stop.take()
