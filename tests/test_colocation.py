"""Engines on the trainer's GPUs: where they are put, when they sleep, and what a pool does about those that die meanwhile."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grpo.build
from grpo import checkpoint
from grpo.build import train
from grpo.config import Config, ConfigError
from grpo.distributed import DistributedPolicy
from grpo.interrupt import StopSignal
from grpo.learner import Learner
from grpo.machine import Machine, gpus_of_cluster, gpus_of_trainer, machine, need_ray, without_trainer
from grpo.parts import vllm_arguments
from grpo.plan import plan
from grpo.policy import HFPolicy
from grpo.ranks import RankActor
from grpo.recipe import load_recipe, load_run
from grpo.rollouts.base import Asleep, ServedEngine
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.placement import GPU, Place, places, visible_name
from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
from grpo.rollouts.scripted import ScriptedEngine
from grpo.rollouts.transfer import Disk
from grpo.run import RunFolder
from grpo.toy import Characters
from grpo.trainer import Settings
from grpo.types import Completion, Request, Sampling

# ---------------------------------------------------------------- where


def test_engines_are_put_on_the_gpus_that_train() -> None:
    four = [GPU("a", "0"), GPU("a", "1"), GPU("b", "0"), GPU("b", "1")]
    assert places(four, 1) == (Place("a", ("0",)), Place("a", ("1",)), Place("b", ("0",)), Place("b", ("1",)))
    assert places(four, 2) == (Place("a", ("0", "1")), Place("b", ("0", "1")))
    mixed = [four[0], four[2], four[1], four[3]]  # the ranks of two machines in turns
    assert places(mixed, 2) == places(four, 2)
    with pytest.raises(ValueError, match=r"has 2 GPUs on one machine, and engines of 4 GPUs .*\n  → change trainer.ranks"):
        places(four, 4)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 7)), unique=True, max_size=12), st.integers(1, 4))
def test_every_gpu_has_one_engine_and_no_engine_reaches_across_machines(gpus: list[tuple[str, int]], each: int) -> None:
    machines = [sum(node == name for node, _ in gpus) for name in "abc"]
    given = [GPU(node, str(number)) for node, number in gpus]
    if any(count % each for count in machines):
        with pytest.raises(ValueError, match="does not reach across machines"):
            places(given, each)
        return
    found = places(given, each)
    assert all(len(place.gpus) == each for place in found)
    assert sorted((place.node, gpu) for place in found for gpu in place.gpus) == sorted((gpu.node, gpu.name) for gpu in given)


@pytest.mark.parametrize(
    ("device", "visible", "name"),
    [
        ("cuda", None, "0"),
        ("cuda:2", None, "2"),
        ("cuda", "", "0"),
        ("cuda", "5,7", "5"),
        ("cuda:1", "5, 7", "7"),
        ("cuda:1", "GPU-8f1b,GPU-03aa", "GPU-03aa"),
    ],
)
def test_a_device_is_named_as_other_processes_see_it(device: str, visible: str | None, name: str) -> None:
    assert visible_name(device, visible) == name


# ---------------------------------------------------------------- the configuration

SHARED = ("rollout.colocate=true", "rollout.gpus_per_engine=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.gpus_per_engine=0"], "is true, but engines on a CPU share the machine's memory with the trainer anyway"),
        (["trainer.device=cpu"], "only GPU memory can be given back"),
        (
            ["trainer.ranks=2"],
            r"rollout\.num_engines=1 × rollout\.gpus_per_engine=1 GPUs, and the trainer trainer\.ranks=2\n  → make them equal",
        ),
        (["rollout.num_engines=2"], r"rollout\.num_engines=2 × rollout\.gpus_per_engine=1 GPUs"),
        (["rollout.max_staleness=1"], r"rollout\.max_staleness=1 engines sample during updates, when these sleep"),
        (["rollout.transfer=nccl"], "NCCL .* does not connect two processes on one GPU"),
        (["rollout.engine_args.enable_sleep_mode=false"], "without it vLLM keeps its memory"),
    ],
)
def test_what_can_not_share_gpus_is_refused(overrides: Sequence[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(load_recipe("r1_zero_arithmetic", *SHARED, *overrides))
    assert caught.value.key == "rollout.colocate"


@pytest.mark.parametrize("engine", ["hf", "scripted"])
def test_an_engine_in_the_trainers_process_has_no_turns_to_take(engine: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.colocate: is true, which does nothing: the \w+ engine is in the trainer's process"):
        plan(load_recipe("r1_zero_arithmetic", f"rollout.engine={engine}", "rollout.colocate=true"))


def test_a_trainer_without_a_gpu_has_none_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"rollout\.colocate: is true, but the trainer is on cpu: there is no GPU to share"):
        machine(load_recipe("r1_zero_arithmetic", *SHARED))


def config_of(ranks: int, num_engines: int, colocate: bool, **engine_args: Any) -> Config:
    config = load_recipe("r1_zero_arithmetic")
    config.trainer.ranks, config.trainer.device = ranks, "cuda"
    config.rollout.num_engines, config.rollout.gpus_per_engine, config.rollout.colocate = num_engines, ranks // num_engines, colocate
    config.rollout.engine_args = engine_args
    return config


def test_vllm_is_told_to_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, cpu = (Machine(device=device, dtype_name="bfloat16", cores=8) for device in ("cuda", "cuda:1", "cpu"))
    assert [vllm_arguments(config_of(1, 1, colocate=False), where) for where in (second, cpu)] == [{}, {}]
    assert vllm_arguments(config_of(1, 1, colocate=False), first) == {"gpu_memory_utilization": 0.35}, "engine 0 has the first GPU too"
    assert vllm_arguments(config_of(4, 2, colocate=False), first) == {"tensor_parallel_size": 2}, "four ranks have GPUs of their own"
    assert vllm_arguments(config_of(1, 1, colocate=True), first) == {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}
    found = vllm_arguments(config_of(4, 2, colocate=True, gpu_memory_utilization=0.3), first)
    assert found == {"tensor_parallel_size": 2, "enable_sleep_mode": True, "gpu_memory_utilization": 0.3}


@pytest.mark.parametrize(
    ("ranks", "colocate", "claimed"),
    [
        (1, True, 0),  # the driver's own GPU, which ray need not know of
        (1, False, 1),
        (4, True, 4),  # the ranks'
        (4, False, 8),  # and as many again for engines
    ],
)
def test_a_shared_gpu_is_claimed_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: int, colocate: bool, claimed: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("grpo.rollouts.pool.start_ray", lambda *, num_gpus, **_: asked.append(num_gpus))
    with ExitStack() as stack, StopSignal() as stop:
        need_ray(config_of(ranks, ranks, colocate), Machine(device="cuda", dtype_name="bfloat16", cores=8), stack, stop, str(tmp_path))
        stack.pop_all()
    assert asked == [claimed]


def test_the_machine_needs_the_gpus_of_the_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert machine(config_of(4, 4, colocate=True)).device == "cuda"
    with pytest.raises(ConfigError, match="with the engines' 4 that is 8 GPUs, and torch sees 4"):
        machine(config_of(4, 4, colocate=False))
    with pytest.raises(ConfigError, match=r"trainer\.ranks: is 5: with the engines' 0 that is 5 GPUs"):
        machine(config_of(5, 5, colocate=True))
    alone = without_trainer(config_of(4, 4, colocate=True))  # `grpo eval`: the engines have the four to themselves
    assert (alone.rollout.colocate, alone.rollout.num_engines, alone.trainer.ranks) == (False, 4, 1)
    assert machine(alone).device == "cuda"


# ---------------------------------------------------------------- the loop


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the loop asks for, in order. Engines and policies do it all the same."""
    noted: list[str] = []

    def note(owner: Any, method: str, what: Callable[..., str]) -> None:
        own = getattr(owner, method)

        def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
            noted.append(what(*args, **kwargs))
            return own(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, noting)

    note(HFEngine, "sleep", lambda: "sleep")
    note(HFEngine, "load_weights", lambda weights, version: f"load {version}")
    note(HFEngine, "serve", lambda feed, sampling: "sample")
    note(Learner, "learn", lambda *args: "learn")
    for policy in (HFPolicy, DistributedPolicy):
        note(policy, "empty_cache", lambda: "empty cache")
    return noted


def colocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line refuses this without a GPU; the loop itself does not mind."""
    monkeypatch.setattr(grpo.build, "Settings", lambda **settings: Settings(**{**settings, "colocate": True}))


def run_digits(folder: Path, model: str, name: str, *overrides: str) -> RunFolder:
    small = ["rollout.problems_per_step=2", "rollout.completions_per_problem=4", "eval.problems=3", "logger.console=false"]
    return train(load_recipe("tiny_digits", f"run.dir={folder}", f"run.name={name}", f"model.path={model}", *small, *overrides)).run


def numbers(run: RunFolder) -> list[str]:
    """Of all rows, what the clock does not decide; as text, in which NaN equals itself."""
    return [str({k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "progress/"))}) for row in run.read_metrics()]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_engines_sleep_during_updates_and_nothing_else_changes(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch, calls: list[str], ranks: int
) -> None:
    settings = ["run.steps=3", "eval.every=2", "run.checkpoint_every=1", f"trainer.ranks={ranks}"]
    apart = run_digits(tmp_path, tiny_model, "apart", *settings)
    assert "sleep" not in calls and "empty cache" not in calls
    calls.clear()
    colocated(monkeypatch)
    together = run_digits(tmp_path, tiny_model, "together", *settings)
    assert numbers(together) == numbers(apart)
    first = calls.index("empty cache", 1) + 1  # the first sync, in which the self-test loads and samples again and again
    assert calls[0] == calls[first - 1] == "empty cache" and not {"sleep", "learn"} & set(calls[:first]) and "load 0" in calls[:first]
    evaluation, step, probe = ["sample"], ["sample", "sleep", "learn"], ["sample"]

    def sync(version: int) -> list[str]:
        return ["empty cache", f"load {version}", *probe, "empty cache"]

    assert calls[first:] == [*evaluation, *step, *sync(1), *step, *sync(2), *evaluation, *step, *sync(3), *evaluation]
    assert all("time/sleep" in row for row in together.read_metrics()[1:])


def test_a_run_that_shares_its_gpu_is_gone_on_with(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is written while the engine sleeps."""
    colocated(monkeypatch)
    straight = run_digits(tmp_path, tiny_model, "straight", "run.steps=4", "run.checkpoint_every=2")
    halves = run_digits(tmp_path, tiny_model, "halves", "run.steps=2", "run.checkpoint_every=2")
    assert checkpoint.steps(halves) == [2]
    config = load_run(halves.path, ["run.steps=4"])
    config.run.resume = True
    train(config)
    for step in (3, 4):
        assert halves.read_rollouts(step).equals(straight.read_rollouts(step))


# ---------------------------------------------------------------- a pool


class SleepyEngine(ScriptedEngine):
    """Answers with its process id and the GPUs it sees. Writes down when it fell asleep; the one that finds the file has a fault then."""

    def __init__(self, diary: str) -> None:
        super().__init__(Characters(), lambda *_: f"{os.getpid()}:{os.environ.get('CUDA_VISIBLE_DEVICES', '-')}")
        self._diary = Path(diary)

    def sleep(self) -> None:
        try:
            fault = (self._diary / "fault").rename(self._diary / f"fault.{os.getpid()}").read_text()
        except FileNotFoundError:
            fault = ""
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "fails":
            raise RuntimeError("CUDA error: unknown error")
        super().sleep()
        (self._diary / f"asleep.{os.getpid()}").touch()


SAMPLING = Sampling(max_new_tokens=40)
REQUESTS = [Request(problem_id=f"p{i}", prompt_ids=(5, 6), num_completions=4, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(num_cpus=3, num_gpus=2, object_store_memory=100_000_000)  # ray takes our word for the GPUs
    yield
    stop_ray()


@pytest.fixture(scope="module")
def diary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diary")


def make_pool(num_engines: int, diary: Path, **settings: Any) -> EnginePool:
    return EnginePool(
        num_engines=num_engines, cpus_per_engine=1, factory=SleepyEngine, kwargs={"diary": str(diary)}, max_restarts=100, **settings
    )


@pytest.fixture(scope="module")
def two(ray_cluster: None, diary: Path) -> Iterator[EnginePool]:
    pool = make_pool(2, diary, transfer=Disk(diary / "weights"))
    yield pool
    pool.close()


@pytest.fixture
def pool(two: EnginePool, diary: Path) -> EnginePool:
    """Two engines, awake, with version 1; whatever other tests did to them."""
    for file in diary.glob("asleep.*"):
        file.unlink()
    while two.load_weights(weights_of(1), 1).num_engines < 2:
        pass
    return two


def weights_of(version: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), float(version)), "b": torch.ones(4)}


def asleep(diary: Path) -> set[int]:
    return {int(file.suffix[1:]) for file in diary.glob("asleep.*")}


def of_every_engine(pool: EnginePool, num_engines: int) -> list[list[Completion]]:
    """Also of those that are being replaced."""
    while len(answers := pool.probe(REQUESTS, SAMPLING)) < num_engines:
        pass
    return answers


def versions(*answers: Sequence[Completion]) -> set[int]:
    return {version for completion in itertools.chain(*answers) for version in completion.policy_versions}


@pytest.mark.slow
def test_a_pool_sleeps_as_a_whole_and_keeps_no_weights(pool: EnginePool, diary: Path) -> None:
    replaced = pool.metrics()["engine/replaced"]
    assert len(list(diary.glob("weights/*"))) > 0
    pool.sleep()
    assert asleep(diary) == set(pool.processes()) and len(asleep(diary)) == 2
    assert not list(diary.glob("weights/*")), "nobody will be given the old weights again"
    for ask in (pool.generate, pool.probe):
        with pytest.raises(Asleep, match=r"it has given its memory back\n  → load_weights wakes it"):
            ask(REQUESTS, SAMPLING)
    pool.sleep()
    assert pool.load_weights(weights_of(2), 2).num_engines == 2
    assert versions(pool.generate(REQUESTS, SAMPLING)) == {2}
    assert pool.metrics()["engine/replaced"] == replaced


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "falling asleep"])
def test_an_engine_that_dies_over_it_is_replaced_by_one_that_sleeps(pool: EnginePool, diary: Path, moment: str) -> None:
    """What replaces it would otherwise take the memory that the update needs."""
    before = pool.processes()
    if moment == "before":
        os.kill(before[0], signal.SIGKILL)
    else:
        (diary / "fault").write_text("dies")
    pool.sleep()
    assert len(set(before) & set(pool.processes())) == 1
    assert set(pool.processes()) <= asleep(diary) and len(pool.processes()) == 2
    assert pool.load_weights(weights_of(2), 2).num_engines == 2
    assert versions(pool.generate(REQUESTS, SAMPLING)) == {2}


@pytest.mark.slow
def test_an_engine_that_dies_asleep_is_replaced_and_has_the_next_weights(pool: EnginePool) -> None:
    pool.sleep()
    before = pool.processes()
    os.kill(before[0], signal.SIGKILL)
    assert pool.load_weights(weights_of(2), 2).num_engines >= 1
    assert versions(*of_every_engine(pool, 2)) == {2}
    assert len(set(before) & set(pool.processes())) == 1


@pytest.mark.slow
def test_the_only_engine_dies_asleep(ray_cluster: None, tmp_path: Path) -> None:
    pool = make_pool(1, tmp_path)
    try:
        pool.sleep()  # before it was ever given weights, as at the start of a run
        (before,) = pool.processes()
        os.kill(before, signal.SIGKILL)
        with pytest.raises(Asleep):  # whether or not another has started by now
            pool.generate(REQUESTS, SAMPLING)
        assert pool.load_weights(weights_of(1), 1).num_engines == 1
        assert versions(pool.generate(REQUESTS, SAMPLING)) == {1} and pool.processes() != [before]
    finally:
        pool.close()


@pytest.mark.slow
def test_a_pool_of_which_one_cannot_sleep_says_so_and_goes_on_awake(pool: EnginePool, diary: Path) -> None:
    (diary / "fault").write_text("fails")
    with pytest.raises(RuntimeError, match=r"^CUDA error: unknown error$"):
        pool.sleep()
    assert versions(*of_every_engine(pool, 2)) == {1}, "the one that slept has its weights again"


@pytest.mark.slow
def test_engines_see_the_gpus_of_their_place_and_claim_none(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    node = ray.get_runtime_context().get_node_id()
    free = ray.available_resources()["GPU"]
    pool = make_pool(1, tmp_path, places=[Place(node, ("1", "GPU-8f1b"))])
    try:
        assert ray.available_resources()["GPU"] == free

        def seen() -> str:
            return pool.generate(REQUESTS[:1], SAMPLING)[0].text.partition(":")[2]

        assert seen() == "1,GPU-8f1b"
        (before,) = pool.processes()
        os.kill(before, signal.SIGKILL)
        assert seen() == "1,GPU-8f1b" and pool.processes() != [before], "whoever replaces an engine is in its place"
        with pytest.raises(ValueError, match=r"^1 places are not those of 2 engines"):
            make_pool(2, tmp_path, places=[Place(node, ("0",))])
    finally:
        pool.close()


@pytest.mark.slow
def test_ray_hands_out_the_first_gpus_first(ray_cluster: None) -> None:
    """What ``trainer_device`` rests on: the trainer's is behind those of the engines."""
    import ray

    assert gpus_of_cluster() == 2
    actor = ray.remote(num_gpus=1, num_cpus=0)(RankActor).remote(1.0)
    assert ray.get(actor.born.remote()).gpu == "0"
    ray.kill(actor)


@pytest.mark.slow
def test_ranks_and_a_driver_say_which_gpu_is_theirs(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    ranks = [ray.remote(num_gpus=1, num_cpus=0)(RankActor).remote(1.0) for _ in range(2)]
    born = ray.get([rank.born.remote() for rank in ranks])
    node = ray.get_runtime_context().get_node_id()
    assert sorted((b.node, b.gpu) for b in born) == [(node, "0"), (node, "1")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert gpus_of_trainer(Machine(device="cuda:1", dtype_name="bfloat16", cores=1), None) == [GPU(node, "4")]
    for rank in ranks:
        ray.kill(rank)


def test_an_engine_that_does_not_know_how_does_not_seem_to_sleep() -> None:
    class Sleepless(ScriptedEngine):
        sleep = ServedEngine.sleep

    with pytest.raises(NotImplementedError, match="Sleepless cannot sleep"):
        Sleepless(tokenizer=None).sleep()


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_a_run_on_one_gpu_has_the_engines_memory_during_its_updates(
    tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: dict[str, list[int]] = {"sample": [], "learn": []}
    learn, draw = Learner.learn, grpo.trainer.Trainer.draw

    def learning(self: Learner, *args: Any) -> Any:
        free["learn"].append(torch.cuda.mem_get_info()[0])
        return learn(self, *args)

    def drawing(self: Any, step: int) -> Any:
        free["sample"].append(torch.cuda.mem_get_info()[0])
        return draw(self, step)

    monkeypatch.setattr(Learner, "learn", learning)
    monkeypatch.setattr(grpo.trainer.Trainer, "draw", drawing)
    on_gpu = ["trainer.device=cuda", "rollout.engine=vllm", "rollout.gpus_per_engine=1", "rollout.colocate=true", "model.precision=bf16"]
    engine = ["rollout.engine_args.gpu_memory_utilization=0.3", "rollout.engine_args.max_model_len=128"]
    run = run_digits(tmp_path, tiny_model, "shared", "run.steps=3", "eval.every=1", "run.checkpoint_every=1", *on_gpu, *engine)
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all("eval/pass@1" in row for row in rows)
    assert all(row["sync/probe_logprob_diff"] < 0.1 for row in rows), "the weights that woke are the trainer's"
    total = torch.cuda.mem_get_info()[1]
    assert len(free["learn"]) == len(free["sample"]) == 3
    for sampling, learning_ in zip(free["sample"], free["learn"], strict=True):
        assert learning_ - sampling > 0.2 * total, "most of the engine's 0.3 came back"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("transfer", ["shared_memory", "nccl", "cuda_ipc"])
def test_a_run_on_two_gpus_has_its_engine_on_one_and_trains_on_the_other(tmp_path: Path, tiny_model: str, transfer: str) -> None:
    on_gpus = ["trainer.device=auto", "rollout.engine=vllm", "rollout.gpus_per_engine=1", f"rollout.transfer={transfer}"]
    engine = ["rollout.engine_args.gpu_memory_utilization=0.5", "rollout.engine_args.max_model_len=128"]
    run = run_digits(tmp_path, tiny_model, "apart", "run.steps=2", "eval.every=1", *on_gpus, *engine)
    assert run.read_environment()["conditions"]["device"] == "cuda:1"
    assert torch.cuda.memory_reserved(0) == 0 < torch.cuda.memory_reserved(1), "nothing of the trainer's is beside the engine"
    assert all(row["sync/probe_logprob_diff"] < 0.1 for row in run.read_metrics())


@pytest.mark.gpu
def test_vllm_asleep_holds_no_weights_and_samples_the_same_when_it_has_them_again(tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM

    from grpo.rollouts.vllm import VLLMEngine

    weights = dict(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).named_parameters())
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    arguments = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.3}
    engine = VLLMEngine(tiny_model, max_model_len=128, engine_args=arguments)
    try:
        engine.load_weights(weights, 1)
        expected = engine.generate(REQUESTS, greedy)
        awake, total = torch.cuda.mem_get_info()
        for version in (2, 3):
            engine.sleep()
            assert torch.cuda.mem_get_info()[0] - awake > 0.2 * total
            with pytest.raises(Asleep):
                engine.generate(REQUESTS, greedy)
            engine.load_weights(weights, version)
            again = engine.generate(REQUESTS, greedy)
            assert [c.token_ids for c in again] == [c.token_ids for c in expected] and versions(again) == {version}
    finally:
        engine.close()


@pytest.mark.gpu
def test_a_transformers_model_asleep_is_not_on_the_gpu(tiny_model: str) -> None:
    engine = HFEngine(tiny_model, dtype="float32", device="cuda")
    weights = {name: p.detach().cpu().clone() for name, p in engine._running.named_parameters()}
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    engine.load_weights(weights, 1)
    expected = engine.generate(REQUESTS, greedy)
    awake = torch.cuda.memory_allocated()
    engine.sleep()
    assert awake - torch.cuda.memory_allocated() >= sum(w.nbytes for w in weights.values())
    engine.load_weights(weights, 2)
    again = engine.generate(REQUESTS, greedy)
    assert [c.token_ids for c in again] == [c.token_ids for c in expected] and versions(again) == {2}
