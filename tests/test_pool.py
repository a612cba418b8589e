"""The pool with engines that hold no model: order, failures, interruption, and that nothing stays behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.rollouts.base import Begun, Close, Feed, Finished, Job, ServedEngine, SyncReport, Weights, jobs_of
from grpo.rollouts.pool import EnginePool, _check_machines, start_ray, stop_ray
from grpo.rollouts.proof import Arrivals
from grpo.rollouts.weights import WeightStream
from grpo.types import Completion, FinishReason, Request, Sampling

SAMPLING = Sampling(max_new_tokens=4)


class DrillEngine(ServedEngine):
    """Answers with its process id. A prompt that starts with 666 kills it, 500 is an error in it, 300 takes a while, 900 hangs."""

    slots = 4

    def __init__(self, greeting: str = "") -> None:
        if greeting == "broken":
            raise ValueError("this model does not exist\n  → check model.path")
        self._version = 0
        self._total = 0.0

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        waiting: list[Job] = []
        more = True
        while more or waiting:
            jobs = feed(not waiting)
            if jobs is Close.pause:
                yield [(job.number, job.begun) for job in waiting]
                return
            more = more and not isinstance(jobs, Close)
            waiting += () if isinstance(jobs, Close) else jobs
            if waiting:
                job = waiting.pop(0)
                yield from self._obey(job.request.prompt_ids[0])
                yield [(job.number, self._answer(job.request, job.index))]
            else:
                yield []

    def _obey(self, order: int) -> Generator[Finished, None, None]:
        if order == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        if order == 900:
            time.sleep(1000)
        if order == 500:
            raise ValueError("logits are NaN\n  → lower optim.lr")
        for _ in range(15 if order == 300 else 0):  # a second and a half in steps
            time.sleep(0.1)
            yield []

    def _answer(self, request: Request, index: int) -> Completion:
        return Completion(
            problem_id=request.problem_id,
            index=index,
            prompt_ids=request.prompt_ids,
            token_ids=(os.getpid(),),
            text=str(self._total),
            logprobs=(-1.0,),
            policy_versions=(self._version,),
            finish_reason=FinishReason.stop,
        )

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        stream, arrivals = WeightStream.of(weights), Arrivals()
        if "unknown" in stream.specs:
            raise ValueError("1 unexpected: unknown")
        self._total = sum(float(weight.double().sum()) for _, weight in arrivals.passing(stream))
        self._version = version
        return SyncReport(version=version, digests=arrivals.digests, num_bytes=arrivals.num_bytes, seconds=0.0, read_back=0)

    def close(self) -> None:
        pass


def requests(*orders: int, num_completions: int = 2) -> list[Request]:
    return [Request(problem_id=f"p{i}", prompt_ids=(order,), num_completions=num_completions, seed=i) for i, order in enumerate(orders)]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(num_cpus=2, object_store_memory=100_000_000)
    start_ray(num_cpus=2)  # a second call does nothing
    yield
    stop_ray()
    stop_ray()


def make_pool(num_engines: int = 2, greeting: str = "") -> EnginePool:
    return EnginePool(num_engines=num_engines, cpus_per_engine=1, factory=DrillEngine, kwargs={"greeting": greeting})


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[EnginePool]:
    pool = make_pool()
    yield pool
    pool.close()
    pool.close()


def processes_of(pool: EnginePool) -> set[int]:
    return {completion.token_ids[0] for completion in pool.generate(requests(300, 300), SAMPLING)}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_completions_come_in_the_order_of_the_requests(pool: EnginePool) -> None:
    calls: list[tuple[int, int]] = []
    asked = requests(300, *range(1, 6))
    completions = pool.generate(asked, SAMPLING, lambda done, total: calls.append((done, total)))
    assert [(c.problem_id, c.index) for c in completions] == [(r.problem_id, i) for r in asked for i in range(2)]
    assert len({c.token_ids for c in completions}) == 2, "both engines worked"
    assert calls[-1] == (12, 12) and all(done <= total for done, total in calls)
    assert any(0 < done < 12 for done, _ in calls), "progress is told while engines work"
    assert pool.generate([], SAMPLING) == []


@pytest.mark.slow
def test_every_engine_gets_the_weights(pool: EnginePool) -> None:
    weights = {"a": torch.full((3, 2), 0.5, dtype=torch.bfloat16), "b": torch.ones(4)}
    pool.load_weights(weights, 6)
    completions = pool.generate(requests(300, 300), SAMPLING)
    assert {c.policy_versions for c in completions} == {(6,)} and {c.text for c in completions} == {"7.0"}
    with pytest.raises(ValueError, match=r"^1 unexpected: unknown$"):
        pool.load_weights({"unknown": torch.zeros(1)}, 7)


@pytest.mark.slow
def test_what_an_engine_raises_arrives_as_it_is(pool: EnginePool) -> None:
    with pytest.raises(ValueError, match=r"^logits are NaN\n  → lower optim.lr$"):
        pool.generate(requests(1, 1, 1, 500), SAMPLING)
    assert len(pool.generate(requests(1, 2), SAMPLING)) == 4


@pytest.mark.slow
def test_an_interruption_is_quick_and_the_engines_stay_usable(pool: EnginePool) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = processes_of(pool)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.generate(requests(*[300] * 20), SAMPLING, stop)  # a minute's work
    assert len(pool.generate(requests(1, 2), SAMPLING)) == 4
    assert time.monotonic() - start < 5
    assert processes_of(pool) == before


class Serving(threading.Thread):
    """A pool that serves in the background what is put into ``orders``."""

    def __init__(self, pool: EnginePool) -> None:
        super().__init__(name="rollouts")
        self.orders: queue.SimpleQueue[Sequence[Job] | Close] = queue.SimpleQueue()
        self.results: Finished = []
        self.error: BaseException | None = None
        self._pool = pool
        self.start()

    def run(self) -> None:
        try:
            for finished in self._pool.serve(self._feed, SAMPLING):
                self.results += finished
        except BaseException as error:
            self.error = error

    def _feed(self, idle: bool) -> Sequence[Job] | Close:
        try:
            return self.orders.get(timeout=0.02)
        except queue.Empty:
            return ()


@pytest.mark.slow
def test_a_pool_serves_in_another_thread_and_does_one_thing_at_a_time(pool: EnginePool) -> None:
    serving = Serving(pool)
    serving.orders.put(jobs_of(requests(1, 2)))
    assert wait_until(lambda: len(serving.results) == 4)
    weights = {"a": torch.ones(3)}
    with pytest.raises(RuntimeError, match=r"cannot load_weights now: serve in thread 'rollouts' is under way\n  → do one after the other"):
        pool.load_weights(weights, 8)
    with pytest.raises(RuntimeError, match="cannot serve now"):
        pool.generate(requests(1), SAMPLING)
    serving.orders.put([replace(job, number=10 + job.number) for job in jobs_of(requests(*[300] * 20))])
    serving.orders.put(Close.pause)
    serving.join(timeout=20)
    numbers = [number for number, _ in serving.results]
    assert not serving.is_alive() and sorted(numbers) == [*range(4), *range(10, 50)]
    assert sum(isinstance(result, Begun) for _, result in serving.results) > 30, "what was not begun did not come back"
    assert pool.load_weights(weights, 9).version == 9
    steps = pool.serve(lambda idle: jobs_of(requests(300)), SAMPLING)
    next(steps)
    with pytest.raises(RuntimeError, match="close an iterator that is not used up"):
        pool.probe(requests(1), SAMPLING)
    steps.close()
    assert {c.policy_versions for c in pool.generate(requests(1, 2), SAMPLING)} == {(9,)}


@pytest.mark.slow
def test_a_pool_that_can_not_start_says_why(ray_cluster: None, pool: EnginePool) -> None:
    pool.close()  # its CPUs are needed
    with pytest.raises(RuntimeError, match="closed"):
        pool.generate(requests(1), SAMPLING)
    with pytest.raises(ValueError, match=r"^this model does not exist\n  → check model.path$"):
        make_pool(greeting="broken")
    with pytest.raises(ValueError, match=r"need 99, and the ray cluster has 2\n  → lower rollout.num_engines"):
        make_pool(num_engines=99)
    with pytest.MonkeyPatch.context() as hurried:
        hurried.setattr("grpo.rollouts.pool._FREED", 0.5)
        first = make_pool()  # it has both cores
        with pytest.raises(ValueError, match=r"need 1, and the ray cluster has free 0\n.*close what holds the others: another pool"):
            make_pool(num_engines=1)
        first.close()
    with pytest.raises(ValueError, match="GPUs each need 1, and the ray cluster has 0"):
        EnginePool(num_engines=1, cpus_per_engine=1, gpus_per_engine=1, factory=DrillEngine)


@pytest.mark.parametrize(
    ("machines", "num_engines", "cpus", "gpus", "room"),
    [
        ([{"CPU": 3}, {"CPU": 3}], 3, 2, 0, 2),  # 6 CPUs are enough for three engines, and no machine has 4
        ([{"CPU": 64, "GPU": 3}, {"CPU": 64, "GPU": 1}], 2, 1, 2, 1),
        ([{"CPU": 2, "GPU": 8}, {"memory": 1}], 4, 1, 1, 2),
    ],
)
def test_engines_must_fit_on_machines(machines: list[dict[str, float]], num_engines: int, cpus: int, gpus: int, room: int) -> None:
    with pytest.raises(
        ValueError, match=rf"do not fit on the 2 machines of the ray cluster, which have room for {room}\n  → lower rollout"
    ):
        _check_machines(machines, num_engines, cpus, gpus)
    _check_machines(machines, room, cpus, gpus)


@pytest.mark.slow
def test_close_leaves_no_engine_process(ray_cluster: None) -> None:
    drill = make_pool()
    pids = processes_of(drill)
    assert len(pids) == 2 and all(map(is_alive, pids))
    serving = Serving(drill)
    serving.orders.put(jobs_of(requests(*[300] * 20)))
    assert wait_until(lambda: len(serving.results) > 0)
    drill.close()
    serving.join(timeout=10)
    assert not serving.is_alive() and "this engine pool is closed" in str(serving.error)
    assert wait_until(lambda: not any(map(is_alive, pids)))


DRIVER = """
from test_pool import DrillEngine, SAMPLING, make_pool, processes_of, requests
from grpo.rollouts.pool import start_ray, stop_ray
import ray

start_ray(num_cpus=2, object_store_memory=100_000_000)
pool = make_pool()
pids = processes_of(pool)
print("ready", ray._private.worker.global_worker.node.get_session_dir_path(), *pids, flush=True)
try:
    pool.generate(requests(*[300] * 20), SAMPLING)
except KeyboardInterrupt:
    assert processes_of(pool) == pids, "the engines did not outlive Ctrl-C"
    print("saved", flush=True)
finally:
    pool.close()
    stop_ray()
"""


@pytest.mark.slow
def test_ctrl_c_reaches_the_driver_alone_and_nothing_stays(repository: Path) -> None:
    """SIGINT to the whole process group, as a terminal sends it: the driver can still use its engines, then all are gone."""
    environment = os.environ | {"PYTHONPATH": f"{repository}:{repository / 'tests'}"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    assert driver.stdout is not None
    ready = driver.stdout.readline().split()
    assert ready and ready[0] == "ready", driver.communicate()[1]
    session, pids = ready[1], [int(pid) for pid in ready[2:]]
    time.sleep(1)
    os.killpg(driver.pid, signal.SIGINT)
    interrupted = time.monotonic()
    assert driver.stdout.readline() == "saved\n", driver.communicate()[1]
    assert time.monotonic() - interrupted < 20, "the engines went on with half a minute of cancelled work"
    _, errors = driver.communicate(timeout=60)
    assert errors.strip() == "", "starting and stopping ray is silent"
    assert wait_until(lambda: not any(map(is_alive, pids)) and not running_with(session))


def running_with(text: str) -> list[str]:
    """Command lines that hold ``text``: Ray's daemons name their session's folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if text in line]
