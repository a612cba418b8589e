"""Engines that die, hang, crash again and again, and what a run notices of it: nothing but time."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.rollouts.base import Close, Feed, Finished, Job, ServedEngine, SyncReport, Weights, jobs_of
from grpo.rollouts.faults import Pulse, Restarts
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
from grpo.rollouts.proof import Arrivals, WeightProofError
from grpo.rollouts.sampling import completion_key
from grpo.rollouts.schedule import Schedule
from grpo.rollouts.scripted import ScriptedEngine
from grpo.rollouts.vllm import VLLMEngine
from grpo.rollouts.weights import WeightStream
from grpo.types import Completion, FinishReason, Request, Sampling

SAMPLING = Sampling(max_new_tokens=8)
# First token of a prompt: kills the engine; hangs; makes steps for ever, and no token; finds no memory; takes a second
POISON, SLEEP, SPIN, HUGE, SLOW = 666, 900, 901, 902, 300


class DiligentEngine(ServedEngine):
    """Without a model: its tokens depend on the request's seed, the index and the weights it was given, and take a few milliseconds."""

    slots = 6

    def __init__(self, flag: str = "", deceive: str = "", no_start: str = "") -> None:
        if no_start and os.path.exists(no_start):
            time.sleep(1000)
        self._flag = flag  # a file: SLEEP, SPIN and HUGE concern the engine that finds it, and removes it first
        self._spins, self._num_sampled = False, 0
        self._deceive = deceive
        self._version, self._total = 0, 0.0

    @property
    def progress(self) -> int:
        return self._num_sampled

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        running: list[tuple[Job, int]] = []  # with the steps it still needs
        more = True
        while more or running:
            jobs = feed(not running)
            if jobs is Close.pause:
                yield [(job.number, job.begun) for job, _ in running]
                return
            if isinstance(jobs, Close):
                more, jobs = False, ()
            running += [(job, 100 if job.request.prompt_ids[0] == SLOW else 1 + job.number % 7) for job in jobs]
            for job, _ in running[: self.slots]:
                self._obey(job.request.prompt_ids[0])
            time.sleep(0.01)
            while self._spins:
                time.sleep(0.01)
                yield []
            self._num_sampled += len(running[: self.slots])
            now = [(job, steps - 1) for job, steps in running[: self.slots]]
            running = [entry for entry in now if entry[1]] + running[self.slots :]
            yield [(job.number, self._answer(job)) for job, steps in now if not steps]

    def _obey(self, order: int) -> None:
        if order == POISON:
            os.kill(os.getpid(), signal.SIGKILL)
        if order in (SLEEP, SPIN, HUGE) and self._flag_taken():
            if order == HUGE:
                raise MemoryError("no room for 3 GiB")
            self._spins = order == SPIN
            time.sleep(1000 if order == SLEEP else 0)

    def _answer(self, job: Job) -> Completion:
        key = completion_key(job.request.seed, job.index)
        return Completion(
            problem_id=job.request.problem_id,
            index=job.index,
            prompt_ids=job.request.prompt_ids,
            token_ids=(key % 1000, os.getpid() if self._flag == "tell" else 0),
            text=f"{key} under {self._total}",
            logprobs=(-1.0, -1.0),
            policy_versions=(self._version,) * 2,
            finish_reason=FinishReason.stop,
        )

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        arrivals = Arrivals()
        arrived = dict(arrivals.passing(WeightStream.of(weights)))
        self._total = sum(float(weight.double().sum()) for weight in arrived.values())
        self._version = version
        digests = dict(arrivals.digests)
        if self._deceive == "version":
            version -= 1
        if self._deceive == "skipped" and self._flag_taken():
            digests.pop("b")
        if self._deceive == "stale" and self._flag_taken():
            digests["b"] = "0" * 32
        return SyncReport(version=version, digests=digests, num_bytes=arrivals.num_bytes, seconds=0.0, read_back=0)

    def _flag_taken(self) -> bool:
        """One engine of several takes the flag and is the one at fault."""
        try:
            os.unlink(self._flag)
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        pass


def requests(*orders: int, num_completions: int = 4) -> list[Request]:
    return [Request(problem_id=f"p{i}", prompt_ids=(order,), num_completions=num_completions, seed=i) for i, order in enumerate(orders)]


def weights_of(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value, dtype=torch.bfloat16), "b": torch.ones(4)}


def asked(wanted: Sequence[Request]) -> list[tuple[str, int]]:
    return [(request.problem_id, index) for request in wanted for index in range(request.num_completions)]


# --- plain parts ---


def test_a_pulse_stops_by_its_own_silence_alone() -> None:
    pulse = Pulse(timeout=2.0, now=0.0)
    pulse.beat(1)
    assert not any(pulse.hangs(now) for now in (0.5, 1.0, 1.5, 2.0))
    assert pulse.hangs(2.5)
    pulse.beat(2)
    assert not pulse.hangs(3.0)
    assert not pulse.hangs(500.0), "the driver itself was asleep: that counts as one second"
    pulse.beat(2)  # no new step: this is no sign of life
    assert pulse.hangs(501.0)


def test_restarts_are_bounded_however_slow_they_come() -> None:
    restarts = Restarts(limit=2)
    assert [restarts.allow() for _ in range(3)] == [True, True, False]
    useful = Restarts(limit=1)
    for _ in range(3):
        assert useful.allow()
        useful.progress()
    assert useful.allow() and not useful.allow()


# --- in processes ---


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(num_cpus=3, object_store_memory=100_000_000)
    yield
    stop_ray()


@pytest.fixture
def make_pool(ray_cluster: None) -> Iterator[Callable[..., EnginePool]]:
    pools: list[EnginePool] = []

    def make(num_engines: int = 2, kwargs: dict[str, Any] | None = None, **settings: Any) -> EnginePool:
        pools.append(EnginePool(num_engines=num_engines, cpus_per_engine=1, factory=DiligentEngine, kwargs=kwargs, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", Schedule)
def test_an_engine_that_is_killed_is_replaced_and_nothing_else_changes(make_pool: Callable[..., EnginePool], schedule: Schedule) -> None:
    pool, wanted = make_pool(schedule=schedule), requests(*[SLOW] * 2, *range(1, 9))
    pool.load_weights(weights_of(0.5), 3)
    expected = pool.generate(wanted, SAMPLING)
    pool.load_weights(weights_of(1.5), 4)
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if done and not killed:
            killed.append(pool.processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    completions = pool.generate(wanted, SAMPLING, kill_one)
    assert killed
    assert [(c.problem_id, c.index) for c in completions] == asked(wanted)
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert {c.policy_versions for c in completions} == {(4, 4)} and all(c.text.endswith("under 13.0") for c in completions)  # 6 · 1.5 + 4
    metrics = pool.metrics()
    assert metrics["engine/replaced"] == 1 and metrics["engine/given_up"] == metrics["engine/hung"] == 0
    assert metrics["engine/completions_redone"] > 0
    assert len(pool.generate(wanted, SAMPLING)) == len(wanted) * 4
    assert killed[0] not in pool.processes()


@pytest.mark.slow
def test_the_replacement_is_given_the_weights_of_now_and_proves_them(make_pool: Callable[..., EnginePool]) -> None:
    pool = make_pool(num_engines=1)
    pool.load_weights(weights_of(0.5), 6)
    os.kill(pool.processes()[0], signal.SIGKILL)
    (first, *_) = pool.generate(requests(1), SAMPLING)
    assert first.policy_versions == (6, 6) and first.text.endswith("under 7.0")  # 6 · 0.5 + 4
    os.kill(pool.processes()[0], signal.SIGKILL)
    report = pool.load_weights(weights_of(1.0), 7)  # the one engine dies before the sync, and is there again after it
    assert (report.version, report.num_engines) == (7, 1)
    assert pool.generate(requests(1), SAMPLING)[0].text.endswith("under 10.0")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleeps", "spins", "stopped"])
def test_an_engine_that_hangs_is_killed_and_replaced(make_pool: Callable[..., EnginePool], how: str, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    if how != "stopped":
        flag.touch()
    pool = make_pool(kwargs={"flag": str(flag)}, hang_timeout=3.0)
    before = pool.processes()
    stopped = [False]

    def stop_one(done: int, total: int) -> None:
        if how == "stopped" and not stopped[0]:
            stopped[0] = True
            os.kill(before[0], signal.SIGSTOP)

    wanted = requests(SPIN if how == "spins" else SLEEP, *[SLOW] * 3, *range(1, 4))
    completions = pool.generate(wanted, SAMPLING, stop_one)
    assert [(c.problem_id, c.index) for c in completions] == asked(wanted)
    assert pool.metrics()["engine/hung"] == pool.metrics()["engine/replaced"] == 1
    assert len(set(before) & set(pool.processes())) == 1
    assert not all(Path(f"/proc/{pid}").exists() for pid in before), "the hanging process is gone"


@pytest.mark.slow
def test_an_engine_that_waits_for_jobs_does_not_hang(make_pool: Callable[..., EnginePool]) -> None:
    pool, over = make_pool(hang_timeout=2.0), time.monotonic() + 5
    assert list(pool.serve(lambda idle: () if time.monotonic() < over else Close.finish, SAMPLING))
    assert pool.metrics()["engine/hung"] == 0


@pytest.mark.slow
def test_an_engine_without_memory_is_replaced(
    make_pool: Callable[..., EnginePool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    pool, wanted = make_pool(kwargs={"flag": str(flag)}), requests(HUGE, *range(1, 9))
    pool.load_weights(weights_of(0.5), 3)
    completions = pool.generate(wanted, SAMPLING)
    assert [(c.problem_id, c.index) for c in completions] == asked(wanted)
    assert {c.policy_versions for c in completions} == {(3, 3)}
    assert pool.metrics()["engine/replaced"] == 1 and "MemoryError: no room for 3 GiB" in caplog.text


@pytest.mark.slow
def test_a_crash_loop_ends_with_a_message(make_pool: Callable[..., EnginePool]) -> None:
    pool = make_pool(max_restarts=1)
    with pytest.raises(RuntimeError, match=r"no engine is left: engine \d of 2, the last one, died 2 times and fin") as error:
        pool.generate(requests(SLOW, POISON), SAMPLING)
    assert "died unexpectedly" in str(error.value) and "→ often the system was out of memory" in str(error.value)
    assert "p1" in str(error.value).partition("it was sampling:")[2], "the problem that kills them is named"
    assert pool.metrics()["engine/given_up"] == 2


@pytest.mark.slow
def test_replacements_that_do_not_start_are_given_up(
    make_pool: Callable[..., EnginePool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One, and the run goes on with the other engine; both, and it ends."""
    no_start, wanted = tmp_path / "no start", requests(*range(1, 9))
    pool = make_pool(kwargs={"no_start": str(no_start)}, max_restarts=1)
    pool._fleet._start_timeout = 1.0  # of replacements; a first engine, which is to start, may take longer
    no_start.touch()
    pool.load_weights(weights_of(0.5), 1)
    os.kill(pool.processes()[0], signal.SIGKILL)
    for _ in range(100):  # the other engine does not need long for it
        assert [(c.problem_id, c.index) for c in pool.generate(wanted, SAMPLING)] == asked(wanted)
        if pool.metrics()["engine/given_up"]:
            break
    metrics = pool.metrics()
    assert (metrics["engine/replaced"], metrics["engine/hung"], metrics["engine/alive"]) == (2, 1, 1)
    assert re.search(r"engine 0 of 2 died 2 times .*: its start has taken more than 1 s \(rollout.start_timeout_s\)", caplog.text)
    os.kill(pool.processes()[0], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"no engine is left: engine 1 of 2.*\n  the last time: its start has taken more than 1 s"):
        pool.generate(wanted, SAMPLING)


@pytest.mark.slow
def test_a_first_start_that_hangs_ends_with_a_message(make_pool: Callable[..., EnginePool], tmp_path: Path) -> None:
    no_start, wanted = tmp_path / "no start", requests(1, 2)
    no_start.touch()
    says = r"^engine \d of 2 did not start: its start has taken more than 1 s \(rollout.start_timeout_s\)\n  → "
    with pytest.raises(RuntimeError, match=says):
        make_pool(kwargs={"no_start": str(no_start)}, start_timeout=1.0)
    pool = make_pool()  # of all cores that there are: the others have given them back
    assert [(c.problem_id, c.index) for c in pool.generate(wanted, SAMPLING)] == asked(wanted)


@pytest.mark.slow
def test_the_run_goes_on_with_one_engine(make_pool: Callable[..., EnginePool]) -> None:
    pool, wanted = make_pool(max_restarts=0), requests(*[SLOW] * 2, *range(1, 9))
    pool.load_weights(weights_of(0.5), 1)
    os.kill(pool.processes()[1], signal.SIGKILL)
    completions = pool.generate(wanted, SAMPLING)
    assert [(c.problem_id, c.index) for c in completions] == asked(wanted)
    assert pool.metrics()["engine/given_up"] == 1 and pool.metrics()["engine/alive"] == 1
    report = pool.load_weights(weights_of(1.5), 2)
    assert report.num_engines == 1 and {c.policy_versions for c in pool.generate(wanted, SAMPLING)} == {(2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deceive", "message"),
    [
        ("version", r"engine 0 of 2 says it holds version 4 of the weights, and version 5 was sent|engine 1 of 2 says it holds version 4"),
        ("skipped", r"(?s)engine \d of 2 did not get the weights.*1 did not arrive: b"),
        ("stale", r"(?s)engine \d of 2 did not get the weights.*1 arrived with other values: b"),
    ],
)
def test_an_engine_with_other_weights_stops_the_run(
    make_pool: Callable[..., EnginePool], tmp_path: Path, deceive: str, message: str
) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    pool = make_pool(kwargs={"deceive": deceive, "flag": str(flag)})
    with pytest.raises(WeightProofError, match=message):
        pool.load_weights(weights_of(0.5), 5)
    if deceive == "version":  # every time
        return
    for sample in (pool.generate, pool.probe):
        with pytest.raises(RuntimeError, match=r"holds weights that were not proven: load_weights failed\n  → load weights again"):
            sample(requests(1), SAMPLING)
    pool.load_weights(weights_of(0.5), 5)
    assert {c.policy_versions for c in pool.generate(requests(1), SAMPLING)} == {(5, 5)}


@pytest.mark.slow
def test_long_answers_hold_up_nobody_and_a_group_may_come_from_several_engines(make_pool: Callable[..., EnginePool]) -> None:
    pool = make_pool(kwargs={"flag": "tell"})
    wanted = [Request(problem_id="group", prompt_ids=(SLOW,), num_completions=3, seed=0), *requests(*range(1, 13), num_completions=8)]
    order = [completion for completion in pool.stream(wanted, SAMPLING)]
    assert Counter((c.problem_id, c.index) for c in order) == Counter(asked(wanted))
    assert [c.problem_id for c in order[-3:]] == ["group"] * 3, "a second's work, done after everything else"
    sampled_by = {problem: {c.token_ids[1] for c in order if c.problem_id == problem} for problem in ("p0", "p5", "p11")}
    assert any(len(pids) == 2 for pids in sampled_by.values()) or len({c.token_ids[1] for c in order}) == 2


def prompts(count: int, tokenizer: Any) -> list[Request]:
    texts = [f"What is {i} + {i * i}?" + " Think." * (i % 3) for i in range(count)]
    return [
        Request(problem_id=f"p{i}", prompt_ids=tuple(tokenizer.encode(text)), num_completions=6, seed=1000 + i)
        for i, text in enumerate(texts)
    ]


def told(completions: Sequence[Completion]) -> dict[tuple[str, int], tuple[tuple[int, ...], str, FinishReason]]:
    return {(c.problem_id, c.index): (c.token_ids, c.text, c.finish_reason) for c in completions}


def scripted_engine(folder: str) -> ServedEngine:
    from transformers import AutoTokenizer

    return ScriptedEngine(AutoTokenizer.from_pretrained(folder), slow_answer)


def slow_answer(prompt: str, index: int, seed: int) -> str:
    time.sleep(0.01)
    return f"{prompt[-5:]}{seed}{index}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scripted", "hf"])
def test_the_same_completions_from_one_engine_and_from_three_in_any_order_under_fire(ray_cluster: None, tiny_model: str, kind: str) -> None:
    """What is sampled depends on seed and index: not on the number of engines, the order of the requests, or who died meanwhile."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted, sampling = prompts(12, AutoTokenizer.from_pretrained(tiny_model)), Sampling(max_new_tokens=40)
    weights = {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters()}
    factory = {
        "scripted": {"factory": scripted_engine, "kwargs": {"folder": tiny_model}},
        "hf": {"factory": HFEngine, "kwargs": {"model": tiny_model, "dtype": "float32", "batch_size": 16}},
    }[kind]
    results = []
    for num_engines, order in ((1, 1), (3, -1)):
        pool = EnginePool(num_engines=num_engines, cpus_per_engine=1, **factory)  # type: ignore[arg-type]
        try:
            pool.load_weights(weights, 2)
            victims = pool.processes()[1:2]

            def kill(done: int, total: int, victims: list[int] = victims) -> None:
                if done and victims:
                    os.kill(victims.pop(), signal.SIGKILL)

            results.append(told(pool.generate(wanted[::order], sampling, kill)))
            assert pool.metrics()["engine/replaced"] == num_engines // 2
        finally:
            pool.close()
    assert results[0] == results[1] and len(results[0]) == 72


class UnhurriedEngine(ScriptedEngine):
    """Says a token every few milliseconds."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        super().__init__(tokenizer, lambda prompt, index, seed: f"{prompt[-5:]}{seed}{index}" * (2 + index % 3), step_s=0.01)


def pausing(jobs: Sequence[Job], results: Finished, moment: str, victim: int) -> Iterator[Sequence[Job] | Close]:
    """Orders of a feed: a pause when some are finished and others under way, and a shot at that moment."""
    yield jobs
    while len(results) < 4:
        yield ()
    if moment == "before":
        os.kill(victim, signal.SIGKILL)
        yield ()
    if moment == "with":
        os.kill(victim, signal.SIGKILL)
    yield Close.finish if moment == "no pause" else Close.pause
    if moment == "after":
        os.kill(victim, signal.SIGKILL)
    while moment == "no pause":
        yield Close.finish


@pytest.mark.slow
@pytest.mark.parametrize("schedule", Schedule)
def test_a_pause_loses_and_doubles_nothing_though_engines_die_around_it(ray_cluster: None, tiny_model: str, schedule: Schedule) -> None:
    """Killed just before the pause, with the order for it on its way, and just after it: every job comes back once, with what it had."""
    from transformers import AutoTokenizer

    wanted, sampling = prompts(12, AutoTokenizer.from_pretrained(tiny_model)), Sampling(max_new_tokens=40)
    settings = {"factory": UnhurriedEngine, "kwargs": {"folder": tiny_model}, "schedule": schedule, "max_restarts": 100}
    pool = EnginePool(num_engines=2, cpus_per_engine=1, **settings)  # type: ignore[arg-type]
    try:
        expected = dict(enumerate(pool.generate(wanted, sampling)))
        open_jobs = {job.number: job for job in jobs_of(wanted)}
        done: dict[int, Completion] = {}
        for version, moment in enumerate(("no kill", "before", "with", "after", "no pause"), start=1):
            pool.load_weights(weights_of(version), version)
            results: Finished = []
            orders = pausing(list(open_jobs.values()), results, moment, pool.processes()[-1])
            for finished in pool.serve(lambda idle, orders=orders: next(orders), sampling):  # type: ignore[misc]
                results += finished
            next(orders, None)
            assert sorted(number for number, _ in results) == sorted(open_jobs)
            for number, result in results:
                before, whole = open_jobs[number].begun, expected[number].token_ids
                assert result.token_ids == whole[: len(result.token_ids)] and len(result.token_ids) >= len(before.token_ids)
                new = len(result.token_ids) - len(before.token_ids)
                assert result.policy_versions == before.policy_versions + (version,) * new
                if isinstance(result, Completion):
                    assert (result.text, result.token_ids) == (expected[number].text, whole)
                    done[number] = result
                    del open_jobs[number]
                else:
                    open_jobs[number] = replace(open_jobs[number], begun=result)
            if moment == "before":
                assert any(set(job.begun.policy_versions) == {1, 2} for job in open_jobs.values()), "none was gone on with and paused again"
        assert done.keys() == expected.keys() and pool.metrics()["engine/replaced"] == 3
        assert pool.metrics()["engine/completions_redone"] > 0
    finally:
        pool.close()


@pytest.mark.slow
def test_vllm_is_replaced_and_repeats_itself_to_the_bit_under_the_fixed_schedule(ray_cluster: None, tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted, sampling = prompts(12, AutoTokenizer.from_pretrained(tiny_model)), Sampling(max_new_tokens=40)
    weights = {
        name: p.detach().bfloat16() for name, p in AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).named_parameters()
    }
    pool = EnginePool(
        num_engines=1,
        cpus_per_engine=1,
        factory=VLLMEngine,
        kwargs={"model_path": tiny_model, "max_model_len": 128, "engine_args": {"kv_cache_memory_bytes": 64 << 20}},
        schedule=Schedule.fixed,
    )
    try:
        report = pool.load_weights(weights, 5)
        assert report.read_back == len(weights)
        first = pool.generate(wanted, sampling)
        assert pool.generate(wanted, sampling) == first, "what the first call left in the prefix cache changes nothing"
        victim = pool.processes()

        def kill(done: int, total: int) -> None:
            if victim:
                os.kill(victim.pop(), signal.SIGKILL)

        assert pool.generate(wanted, sampling, kill) == first
        assert pool.metrics()["engine/replaced"] == 1 and {c.policy_versions[0] for c in first} == {5}
    finally:
        pool.close()


@pytest.mark.slow
def test_a_group_is_counted_once_though_engines_die_at_random_moments(make_pool: Callable[..., EnginePool]) -> None:
    """A run of several steps under fire: the same completions as in peace, each once, from the weights of its step."""
    kills = random_kills(make_pool(num_engines=2), kills=5, seed=1)
    assert kills == 5


@pytest.mark.full
@pytest.mark.parametrize("schedule", Schedule)
def test_twenty_kills(make_pool: Callable[..., EnginePool], schedule: Schedule) -> None:
    assert random_kills(make_pool(num_engines=3, schedule=schedule), kills=20, seed=2) == 20


def random_kills(pool: EnginePool, kills: int, seed: int) -> int:
    """Steps of sync and generation, while a thread kills engines at random moments; returns how many it killed."""
    chance, killed, over = random.Random(seed), [], threading.Event()

    def fire() -> None:
        while len(killed) < kills and not over.wait(chance.uniform(0.0, 1.0)):
            pids = [pid for pid in pool.processes() if pid not in killed]
            if pids:
                victim = chance.choice(pids)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    gun = threading.Thread(target=fire)
    gun.start()
    try:
        step = 0
        while gun.is_alive() or step < 3:
            step += 1
            report = pool.load_weights(weights_of(step), step)
            assert report.version == step and report.num_engines >= 1
            wanted = [
                Request(problem_id=f"{step}/{i}", prompt_ids=(SLOW if i == 3 else 1,), num_completions=4, seed=100 * step + i)
                for i in range(16)
            ]
            completions = pool.generate(wanted, SAMPLING)
            assert [(c.problem_id, c.index) for c in completions] == asked(wanted)
            assert {c.policy_versions for c in completions} == {(step, step)}
            expected = [f"{completion_key(r.seed, i)} under {6.0 * step + 4}" for r in wanted for i in range(4)]
            assert [c.text for c in completions] == expected
    finally:
        over.set()
        gun.join()
    assert pool.metrics()["engine/replaced"] == len(killed)
    return len(killed)
