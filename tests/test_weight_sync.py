"""The weights' way in a whole run and in a pool: each of the known failures is planted there, and must stop the run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo import weight_sync
from grpo.build import train
from grpo.config import ConfigError
from grpo.policy import HFPolicy, OptimSettings
from grpo.recipe import load_recipe, load_run
from grpo.rollouts.base import SyncReport, Weights
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.peer import PeerToPeer
from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
from grpo.rollouts.proof import Arrivals, SelfTest, WeightProofError, changed
from grpo.rollouts.transfer import Disk, SharedMemory, Transfer
from grpo.rollouts.vllm import VLLMEngine
from grpo.rollouts.weights import WeightStream
from grpo.run import RunFolder
from grpo.types import Completion, FinishReason
from grpo.weight_sync import Probe, Rescored, WeightSync, logprobs

from .tiny_runs import write_recipe

TENSOR = "model.layers.2.mlp.up_proj.weight"
pytestmark = pytest.mark.usefixtures("one_thread")


def policy_of(folder: str) -> HFPolicy:
    return HFPolicy(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), OptimSettings())


def answers_of(*lengths: int) -> list[Completion]:
    """Two for each prompt."""
    return [
        Completion(
            problem_id=f"p{i // 2}",
            index=i % 2,
            prompt_ids=tuple(range(5, 9 + i // 2)),
            token_ids=tuple(range(6 + i, 6 + i + length)),
            text="",
            logprobs=(-1.0,) * length,
            policy_versions=(0,) * length,
            finish_reason=FinishReason.length,
        )
        for i, length in enumerate(lengths)
    ]


# --- the trainer's side ---


def test_log_probs_are_scored_under_other_weights_and_the_policy_stays_as_it_is(tiny_model: str) -> None:
    policy, answers = policy_of(tiny_model), answers_of(3, 1, 5, 2)
    weights = {name: tensor.clone() for name, tensor in policy.weights().items()}
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before, rescored = logprobs(policy, answers), Rescored(policy.snapshot())
    other = {**weights, TENSOR: changed(TENSOR, weights[TENSOR])}
    model.load_state_dict(other, strict=False)
    for found, of in ((rescored(other, answers), answers), (rescored(weights, answers), answers)):
        assert [len(row) for row in found] == [3, 1, 5, 2]
        for row, answer in zip(found, of, strict=True):
            ids = torch.tensor([[*answer.prompt_ids, *answer.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(answer.prompt_ids) - 1 : -1]
            true = logits.log_softmax(-1).gather(1, ids[0, len(answer.prompt_ids) :, None])[:, 0]
            assert row == pytest.approx(true.tolist(), abs=1e-4)
        model.load_state_dict(weights, strict=False)
    assert logprobs(policy, answers) == before and logprobs(policy, ()) == []
    assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.weights().items())


def test_a_probe_is_long_enough_for_the_cache_and_fits_into_the_engine() -> None:
    probe = Probe.of([range(5, 8), range(5, 8), range(300), range(9)], room=400, temperature=0.7)
    short, long = probe.requests
    assert short.prompt_ids == (6, 7) + (5, 6, 7) * 26 and long.prompt_ids == tuple(range(220, 300))  # 80: two blocks of 32, and more
    assert len({request.problem_id for request in probe.requests}) == 2 and short.seed != long.seed
    assert [request.prompt_ids for request in probe.gauge.requests] == [(6, 7) + (5, 6, 7) * 2, tuple(range(292, 300))]  # the last 8
    assert (probe.gauge.sampling.temperature, probe.gauge.sampling.max_new_tokens) == (0.7, 1)
    assert (probe.sampling.temperature, probe.sampling.max_new_tokens) == (0.7, 4)
    for room in (2, 5, 9, 40):
        small = Probe.of([(5, 6, 7)], room)
        assert [len(r.prompt_ids) + small.sampling.max_new_tokens for r in small.requests] == [room]
        assert all(len(r.prompt_ids) + small.gauge.sampling.max_new_tokens <= room for r in small.gauge.requests)


# --- a run ---


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: str) -> str:
    return write_recipe(tmp_path, tiny_model, eval={"every": 10, "problems": 0})


def run_of(recipe: str) -> RunFolder:
    return RunFolder.open(Path(recipe).parent / "runs" / "digits" / "one")


def test_a_run_tests_its_weights_when_it_starts_and_when_it_is_resumed(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[SelfTest] = []
    real = weight_sync.self_test

    def noted(*args: Any, **keywords: Any) -> SelfTest:
        found.append(real(*args, **keywords))
        return found[-1]

    monkeypatch.setattr(weight_sync, "self_test", noted)
    run = train(load_recipe(recipe, "run.name=one", "run.steps=2")).run
    assert len(found) == 1 and found[0].report.version == 0
    recorded = json.loads(run.environment_file.read_text())["weight_self_test"]
    assert recorded["without_effect"] == [] and len(recorded["stale_tensor"]) == 11, "one of each kind"
    assert recorded["noise"] < 1e-5 < min(recorded["stale_tensor"].values()), "float32"
    assert recorded["loads"] == 6, "the weights, 9 kinds of layers in fives, the 2 at the ends, all, the weights"
    rows = run.read_metrics()
    assert all(0 <= row["sync/probe_logprob_diff"] < 1e-4 for row in rows)
    assert "time/self_test" in rows[0] and "time/sync" not in rows[0] and "time/sync" in rows[1]
    config = load_run(run.path, ["run.steps=3"])
    config.run.resume = True
    train(config)
    assert [entry.report.version for entry in found] == [0, 2]
    resumed = run.read_metrics()
    straight = train(load_recipe(recipe, "run.name=straight", "run.steps=3")).run.read_metrics()
    assert [row["step"] for row in resumed] == [1, 2, 3]
    for row, other in zip(resumed, straight, strict=True):
        for key in ("sync/probe_logprob_diff", "policy/loss", "reward/mean"):
            assert row[key] == other[key], "the test of the weights leaves no trace"


def test_what_the_start_took_is_in_the_row_of_its_evaluation(tmp_path: Path, tiny_model: str) -> None:
    words = ["run.name=one", "run.steps=1"]
    rows = train(load_recipe(write_recipe(tmp_path, tiny_model), *words)).run.read_metrics()
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["time/self_test"] > 0 and rows[0]["time/eval"] > 0 and "time/self_test" not in rows[1]


def faulty(monkeypatch: pytest.MonkeyPatch, fault: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], first: int) -> None:
    """From the load with version ``first`` on, an engine applies what ``fault`` makes of the weights."""
    load = HFEngine.load_weights

    def load_weights(self: HFEngine, weights: Weights, version: int) -> SyncReport:
        model, apply = self._running, self._running.load_state_dict
        with monkeypatch.context() as planted:
            if version >= first:
                planted.setattr(model, "load_state_dict", lambda state, strict: apply(fault(dict(state)), strict=strict))
            return load(self, weights, version)

    monkeypatch.setattr(HFEngine, "load_weights", load_weights)


def without(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name != TENSOR}


def test_a_run_stops_in_the_step_in_which_an_engine_skips_a_tensor(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, without, first=2)
    with pytest.raises(WeightProofError, match=rf"1 of 38 tensors arrived and are not what the engine computes with: {TENSOR}"):
        train(load_recipe(recipe, "run.name=one", "optim.lr=1e-6"))
    assert [row["step"] for row in run_of(recipe).read_metrics()] == [1, 2]


@pytest.mark.parametrize(
    ("forgets", "message"),
    [
        ("all", "the engine says it holds version 0 of the weights, and version 1 was sent"),
        ("tensors", rf"the engine did not get the weights .* version 1 .*\n  1 did not arrive: {TENSOR}"),
        ("values", r"\d+ arrived with other values"),
    ],
)
def test_a_run_stops_in_the_step_in_which_its_engine_reports_what_was_not_sent(
    recipe: str, monkeypatch: pytest.MonkeyPatch, forgets: str, message: str
) -> None:
    """In the trainer's process too the report is held against what left the policy."""
    load, last = HFEngine.load_weights, list[SyncReport]()

    def load_weights(self: HFEngine, weights: Weights, version: int) -> SyncReport:
        if version < 1:
            last.append(load(self, weights, version))
            return last[-1]
        if forgets == "all":
            return last[-1]
        digests = dict(last[-1].digests)
        if forgets == "tensors":
            digests = dict(load(self, weights, version).digests)
            del digests[TENSOR]
        return replace(last[-1], version=version, digests=digests)

    monkeypatch.setattr(HFEngine, "load_weights", load_weights)
    with pytest.raises(WeightProofError, match=message):
        train(load_recipe(recipe, "run.name=one", "optim.lr=1e-3"))
    assert [row["step"] for row in run_of(recipe).read_metrics()] == [1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (without, rf"after {TENSOR} was changed, the log-probs of engine 0 differ"),
        (lambda state: {}, "was changed, the log-probs of engine 0 differ"),
    ],
    ids=["one tensor stale", "all stale"],
)
def test_a_run_does_not_start_with_an_engine_whose_weights_can_not_be_read_back_and_are_stale(
    recipe: str, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str
) -> None:
    """As in engines of several workers: the log-probs alone must tell."""
    monkeypatch.setattr(Arrivals, "check_held", lambda arrivals, held: 0)
    faulty(monkeypatch, fault, first=-100)
    with pytest.raises(WeightProofError, match=message):
        train(load_recipe(recipe, "run.name=one"))
    assert run_of(recipe).read_metrics() == []


# --- a pool ---


class PlantedEngine(HFEngine):
    """At fault in the one load in which it finds the file: what the file says. Of several engines one finds it."""

    def __init__(self, model: str, file: str = "") -> None:
        torch.set_num_threads(1)
        super().__init__(model, dtype="float32")
        self._file = file
        self._last: SyncReport | None = None
        self._before: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        stream = WeightStream.of(weights)
        came = dict(stream)
        before, self._before = self._before, {name: tensor.clone() for name, tensor in came.items()}
        fault = taken(self._file) if version > 0 else ""
        if fault == "one engine behind":
            assert self._last is not None
            return self._last
        model, apply = self._running, self._running.load_state_dict

        def applied(state: dict[str, torch.Tensor], strict: bool) -> None:
            if fault == "stale weights":
                state = {}
            elif fault == "one tensor skipped":
                state = without(state)
            elif fault == "one tensor stale":
                state = {**state, TENSOR: before[TENSOR]}
            apply(state, strict=strict)

        model.load_state_dict = applied  # type: ignore[method-assign, assignment]
        try:
            self._last = super().load_weights(WeightStream(stream.specs, came.items()), version)
        finally:
            model.load_state_dict = apply  # type: ignore[method-assign]
        return self._last


def taken(file: str) -> str:
    mine = f"{file}.{os.getpid()}"
    try:
        os.rename(file, mine)
    except FileNotFoundError:
        return ""
    return Path(mine).read_text()


class RememberingEngine(VLLMEngine):
    """vLLM that keeps its prefix cache when it is told to drop it."""

    def forget(self) -> None:
        pass


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(num_cpus=2, object_store_memory=200_000_000)
    yield
    stop_ray()


def nudged(policy: HFPolicy) -> None:
    """As after an optimiser step at a learning rate of 1e-6, where log-probs tell nothing."""
    state = policy.state()
    policy.load_state({**state, "masters": {name: changed(name, master, 1e-6) for name, master in state["masters"].items()}})


def sync_of(policy: HFPolicy, engine: EnginePool) -> WeightSync:
    probe = Probe.of([range(5, 45), range(9, 50)], room=120)
    return WeightSync(policy, policy.snapshot, engine, probe, lambda found: None)


@pytest.mark.slow
def test_one_engine_of_two_at_fault_is_caught_at_a_small_learning_rate(ray_cluster: None, tiny_model: str, tmp_path: Path) -> None:
    file, policy = tmp_path / "fault", policy_of(tiny_model)
    read_back = r"tensors arrived and are not what the engine computes with"
    planted = {
        "one engine behind": r"engine \d of 2 says it holds version \d of the weights, and version \d was sent",
        "one tensor skipped": f"1 of 38 {read_back}: {TENSOR}",
        "one tensor stale": f"1 of 38 {read_back}: {TENSOR}",
        "stale weights": f"38 of 38 {read_back}",
    }
    pool = EnginePool(num_engines=2, cpus_per_engine=1, factory=PlantedEngine, kwargs={"model": tiny_model, "file": str(file)})
    try:
        sync = sync_of(policy, pool)
        sync.send(0)
        for version, (fault, message) in enumerate(planted.items(), start=1):
            nudged(policy)
            file.write_text(fault)
            with pytest.raises(WeightProofError, match=message):
                sync.send(version)
            assert not file.exists()
            assert sync.send(version)["sync/engines"] == 2, "without the fault, the same weights are proven"
    finally:
        pool.close()


@pytest.mark.slow
def test_a_prefix_cache_that_stays_is_caught_by_a_pool(ray_cluster: None, tiny_model: str) -> None:
    policy = policy_of(tiny_model)
    arguments = {"model_path": tiny_model, "dtype": "float32", "max_model_len": 128, "engine_args": {"kv_cache_memory_bytes": 64 << 20}}
    pool = EnginePool(num_engines=1, cpus_per_engine=1, factory=RememberingEngine, kwargs=arguments)
    try:
        with pytest.raises(WeightProofError, match=r"prefix cache still holds \d+ blocks computed with the weights of before"):
            sync_of(policy, pool).send(0)
    finally:
        pool.close()


# --- the back-ends ---

TRANSFERS: dict[str, Callable[[Path], Transfer]] = {
    "shared_memory": lambda folder: SharedMemory(),
    "disk": lambda folder: Disk(folder / "weights"),
    "gloo": lambda folder: PeerToPeer("gloo", timeout=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFERS)
def test_every_engine_gets_the_weights_and_so_does_the_one_that_replaces_it(
    ray_cluster: None, tiny_model: str, tmp_path: Path, name: str
) -> None:
    policy, transfer = policy_of(tiny_model), TRANSFERS[name](tmp_path)
    pool = EnginePool(num_engines=2, cpus_per_engine=1, factory=PlantedEngine, kwargs={"model": tiny_model}, transfer=transfer)
    try:
        sync = sync_of(policy, pool)
        first = sync.send(0)
        assert (first["sync/engines"], first["sync/tensors_read_back"]) == (2, 38)
        state = policy.state()
        policy.load_state({**state, "masters": {name: changed(name, master, 0.1) for name, master in state["masters"].items()}})
        assert sync.send(1)["sync/probe_logprob_diff"] < 1e-4
        os.kill(pool.processes()[0], signal.SIGKILL)
        probe = Probe.of([range(5, 45)], room=120)
        while pool.metrics()["engine/replaced"] < 1 or pool.metrics()["engine/alive"] < 2 or len(pool.processes()) < 2:
            answers = pool.probe(probe.requests, probe.sampling)
        answers = pool.probe(probe.requests, probe.sampling)
        for own in answers:
            assert {version for c in own for version in c.policy_versions} == {1}
            for c, row in zip(own, logprobs(policy, own), strict=True):
                assert c.logprobs == pytest.approx(row, abs=1e-4)
        assert sync.send(2)["sync/engines"] == 2
    finally:
        pool.close()
        if isinstance(transfer, PeerToPeer):
            transfer.close()
    assert not list(tmp_path.glob("weights/*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout=hf", "rollout.transfer=disk"], r"rollout\.transfer: is disk, which does nothing: the hf engine is in the trainer's"),
        (["rollout.transfer=nccl"], r"rollout\.transfer: is .*nccl.*, but it goes from the one GPU of the trainer to engines on GPUs"),
        (["rollout.transfer=cuda_ipc"], r"not with trainer\.ranks=1, rollout\.gpus_per_engine=0"),
        (["rollout.transfer=cuda_ipc", "rollout=hf"], "the hf engine is in the trainer's process"),
        (["rollout.transfer=nccl", "rollout.gpus_per_engine=1", "trainer.ranks=2"], "not with trainer.ranks=2"),
        (["rollout.transfer=carrier_pigeon"], "transfer"),
    ],
)
def test_a_back_end_that_can_not_work_here_is_refused(overrides: Sequence[str], message: str) -> None:
    from grpo.plan import plan

    with pytest.raises(ConfigError, match=message):
        plan(load_recipe("r1_zero_arithmetic", *overrides))
