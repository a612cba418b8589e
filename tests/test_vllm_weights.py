"""Weights into engines of several workers: a real tensor-parallel vLLM, two processes on CPUs. Each failure is planted in one of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from grpo.config import ConfigError
from grpo.plan import plan
from grpo.recipe import load_recipe
from grpo.rollouts.peer import PeerToPeer
from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
from grpo.rollouts.proof import WeightProofError, changed, digest
from grpo.rollouts.transfer import Disk, ParcelStream, SharedMemory, Transfer, handfuls
from grpo.rollouts.vllm import VLLMEngine
from grpo.rollouts.weights import Spec, WeightStream
from grpo.types import Completion, Request, Sampling

Weights = dict[str, torch.Tensor]
ARGUMENTS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128}
CLOSE = 1e-4  # log-probs of the same weights, float32, summed up in another order
SMALL = {"kv_cache_memory_bytes": 64 << 20}
# Cut by rows, by rows of a merged layer, by columns, by the vocabulary, and not at all.
TENSORS = [
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.2.self_attn.v_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.embed_tokens.weight",
    "model.layers.3.input_layernorm.weight",
]


@pytest.fixture(scope="module")
def weights(tiny_model: str) -> Weights:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def pair(tiny_model: str) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(tiny_model, **ARGUMENTS, engine_args={"tensor_parallel_size": 2, **SMALL})
    yield engine
    engine.close()


def far(weights: Weights) -> Weights:
    """Other weights, whose log-probs have little to do with those of these."""
    return {name: changed(name, tensor) for name, tensor in weights.items()}


def greedy(engine: VLLMEngine | EnginePool) -> list[Completion]:
    requests = [Request(problem_id=str(i), prompt_ids=tuple(range(5 + i, 50)), num_completions=1, seed=0) for i in range(2)]
    return engine.generate(requests, Sampling(temperature=0, max_new_tokens=6))


@pytest.mark.slow
def test_two_workers_sample_as_a_fresh_engine_does_that_has_these_weights(
    pair: VLLMEngine, tiny_model: str, weights: Weights, tmp_path: Path
) -> None:
    before = greedy(pair)
    other = far(weights)
    report = pair.load_weights(other, 1)
    assert report.read_back == len(weights) == len(report.digests)
    assert report.num_bytes == sum(4 * tensor.numel() for tensor in weights.values())
    after = greedy(pair)

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.load_state_dict(other, strict=False)
    model.save_pretrained(tmp_path)
    for file in Path(tiny_model).glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fresh = VLLMEngine(str(tmp_path), **ARGUMENTS, engine_args=SMALL)
    try:
        expected = greedy(fresh)
    finally:
        fresh.close()
    for old, new, true in zip(before, after, expected, strict=True):
        assert new.token_ids == true.token_ids and new.logprobs == pytest.approx(true.logprobs, abs=CLOSE)
        assert set(new.policy_versions) == {1}
        assert max(abs(a - b) for a, b in zip(old.logprobs, new.logprobs, strict=True)) > 100 * CLOSE, "old weights would be seen"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(num_cpus=2, object_store_memory=100_000_000)
    yield
    stop_ray()


@pytest.mark.slow
@pytest.mark.parametrize(
    "transfer",
    [
        pytest.param(lambda folder: SharedMemory(), id="shared_memory, opened by the engine and handed on"),
        pytest.param(lambda folder: Disk(folder), id="disk, opened by the workers"),
        pytest.param(lambda folder: PeerToPeer("gloo", timeout=20), id="gloo, asked for by the workers"),
    ],
)
def test_workers_get_what_every_back_end_brings(
    pair: VLLMEngine, weights: Weights, ray_cluster: None, tmp_path: Path, transfer: Callable[[Path], Transfer]
) -> None:
    sent = transfer(tmp_path)
    specs = {name: Spec.of(tensor) for name, tensor in weights.items()}
    parcels = [sent.send(tensors) for tensors in handfuls(weights.items(), num_bytes=1 << 20)]
    assert len(parcels) > 3
    report = pair.load_weights(ParcelStream(specs, parcels), 2)
    sent.discard(parcels)
    if isinstance(sent, PeerToPeer):
        sent.close()
    assert report.read_back == len(weights)
    assert report.digests == {name: digest(tensor) for name, tensor in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TENSORS)
def test_one_worker_that_does_not_apply_a_tensor_is_caught(pair: VLLMEngine, weights: Weights, name: str) -> None:
    """With changes as small as those of an optimiser step: log-probs would not tell."""
    pair.load_weights(weights, 3)
    old = weights[name]

    def plant(worker: Any) -> None:
        model = worker.get_model()
        load = model.load_weights

        def stale(coming: Any) -> Any:
            return load((n, old if n == name else tensor) for n, tensor in coming)

        model.load_weights = stale if worker.rank == 1 else load

    def uproot(worker: Any) -> None:
        del worker.get_model().load_weights

    nudged = {n: changed(n, tensor, 1e-4) for n, tensor in weights.items()}
    pair._running.collective_rpc(plant)
    try:
        with pytest.raises(WeightProofError, match=rf"1 of {len(weights)} tensors arrived and are not what .*: {name}") as caught:
            pair.load_weights(nudged, 4)
    finally:
        pair._running.collective_rpc(uproot)
    assert caught.value.__notes__ == ["in worker 1 of 2 of this engine"]
    assert pair.load_weights(nudged, 5).read_back == len(weights), "the engine can be used again"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("missing", ValueError, f"1 tensors were announced and did not come: {TENSORS[0]}"),
        ("cut off", ValueError, f"'{TENSORS[0]}' was announced as .* and came as"),
        ("bent", WeightProofError, f"worker 1 of 2 of this engine got 1 tensors otherwise than worker 0: {TENSORS[0]}"),
    ],
)
def test_one_worker_that_is_given_something_else_is_caught(
    pair: VLLMEngine, weights: Weights, fault: str, error: type[Exception], message: str
) -> None:
    name = TENSORS[0]

    class Faulty:
        def __init__(self, parcel: Any) -> None:
            self.parcel = parcel

        def open(self) -> Weights:
            tensors = dict(self.parcel.open())
            right = tensors.pop(name)
            return tensors if fault == "missing" else {**tensors, name: right[:-1] if fault == "cut off" else right * 1.001}

    def plant(worker: Any) -> None:
        receiver = worker.weight_transfer_engine
        receive = receiver.receive_weights

        def faulty(update_info: Any) -> None:
            update_info.parcel = Faulty(update_info.parcel)
            receive(update_info)

        receiver.receive_weights = faulty if worker.rank == 1 else receive

    def uproot(worker: Any) -> None:
        del worker.weight_transfer_engine.receive_weights

    pair._running.collective_rpc(plant)
    try:
        with pytest.raises(error, match=message):
            pair.load_weights(weights, 6)
    finally:
        pair._running.collective_rpc(uproot)
    assert pair.load_weights(weights, 7).read_back == len(weights), "the engine can be used again"


@pytest.mark.slow
def test_a_stream_that_breaks_off_leaves_an_engine_that_can_be_given_weights(pair: VLLMEngine, weights: Weights) -> None:
    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(weights.items())[:9]
        raise OSError("the trainer is gone")

    specs = {name: Spec.of(tensor) for name, tensor in weights.items()}
    with pytest.raises(OSError, match="the trainer is gone"):
        pair.load_weights(WeightStream(specs, breaking()), 8)
    assert pair.load_weights(weights, 9).read_back == len(weights)


@pytest.mark.full
@pytest.mark.parametrize("victim", ["engine", "worker"])
def test_an_engine_of_two_workers_is_replaced_when_it_or_one_of_them_is_killed_and_none_is_left(
    ray_cluster: None, tiny_model: str, weights: Weights, victim: str
) -> None:
    arguments = {"model_path": tiny_model, **ARGUMENTS, "engine_args": {"tensor_parallel_size": 2, **SMALL}}
    pool = EnginePool(num_engines=1, cpus_per_engine=1, factory=VLLMEngine, kwargs=arguments)
    try:
        assert pool.load_weights(far(weights), 1).read_back == len(weights)
        before = greedy(pool)
        (process,) = pool.processes()
        workers = [pid for pid in children(process) if b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(process if victim == "engine" else workers[1], signal.SIGKILL)
        after = greedy(pool)
        assert pool.metrics()["engine/replaced"] == 1
        assert [c.token_ids for c in after] == [c.token_ids for c in before]
        assert all(set(c.policy_versions) == {1} for c in after)
        until = time.monotonic() + 60  # generous: the machine may be busy
        while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < until, left
            time.sleep(0.1)
    finally:
        pool.close()


def children(process: int) -> list[int]:
    return [int(pid) for task in Path(f"/proc/{process}/task").iterdir() for pid in (task / "children").read_text().split()]


@pytest.mark.slow
def test_experts_compute_with_new_weights_as_with_the_first(tiny_model: str, tmp_path: Path) -> None:
    """vLLM packs them for the CPU's kernel when it starts and not when it gets others: they would compute with rows in the wrong order."""
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=128, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    for file in Path(tiny_model).glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    engine = VLLMEngine(str(tmp_path), **ARGUMENTS, engine_args=SMALL)
    with closing(engine):
        started = greedy(engine)
        engine.load_weights(load_file(tmp_path / "model.safetensors"), 1)
        reloaded = greedy(engine)
    for before, after in zip(started, reloaded, strict=True):
        ids = torch.tensor([[*before.prompt_ids, *before.token_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(before.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(before.token_ids)[:, None])[:, 0].tolist()
        assert before.token_ids == after.token_ids
        assert before.logprobs == pytest.approx(expected, abs=CLOSE) and after.logprobs == pytest.approx(expected, abs=CLOSE)


def test_only_what_was_sent_is_read_back_and_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM holds experts merged, under names that nobody sends: half of a model and more."""
    from grpo.rollouts import readback

    hashed: list[torch.Tensor] = []

    def hashing(tensor: torch.Tensor) -> str:
        hashed.append(tensor)
        return digest(tensor)

    monkeypatch.setattr(readback, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(readback, "digest_of_values", hashing)
    model = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(4), "experts": torch.nn.ParameterDict({"w13_weight": torch.zeros(2, 3)})})
    assert readback.read_back(model, 1, wanted={"norm.weight", "experts.0.gate_proj.weight"}) == {"norm.weight": [digest(torch.ones(4))]}
    assert len(hashed) == 1


def test_what_the_engine_sets_itself_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.engine_args\.worker_extension_cls: is how new weights get into vLLM"):
        plan(load_recipe("r1_zero_arithmetic", "+rollout.engine_args.worker_extension_cls=my.Extension"))


def test_what_the_engine_sets_itself_is_refused(tiny_model: str) -> None:
    with pytest.raises(ValueError, match=r"rollout\.engine_args has worker_extension_cls: by these, new weights get into vLLM"):
        VLLMEngine(tiny_model, engine_args={"worker_extension_cls": "my.Extension"})
