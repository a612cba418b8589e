"""N engines as Ray actors, together an ``Engine``. Ray is imported when a pool or a cluster is made.

A pool cuts the requests into chunks whose sizes depend on the requests and the number of engines alone, and gives a chunk to
whichever engine is free. With engines of one kind it does not matter which: the same chunk gives the same completions.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from grpo.rollouts.base import Engine, Progress, Weights
from grpo.rollouts.weights import PackedWeights
from grpo.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_POLL = 0.2  # seconds between two looks at the engines: what Ctrl-C waits for
_COMPLETIONS_PER_CHUNK = 256  # what vLLM runs at once by default; smaller chunks only to give every engine one
_CLOSING = 5.0  # seconds an engine has to stop its own processes before it is killed
_RAY_ENVIRONMENT = {  # read by ray's processes when they start; what the user has set stays
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; without it ray warns of the change
    "RAY_worker_niceness": "0",  # ray would run the engine, which the trainer waits for, behind everything else on the machine
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, ray would ship the working directory to every worker
}


def start_ray(*, num_cpus: int, num_gpus: int = 0, object_store_memory: int = 1_500_000_000) -> None:
    """Start a quiet cluster of this machine, or join the one that ``RAY_ADDRESS`` names. Does nothing if ray is running.

    Args:
        num_cpus: what actors may claim together; it binds nobody to a core.
        object_store_memory: bytes for weights in transit. They are in shared memory where /dev/shm has room for all of it, and
            in a file under /tmp otherwise (in a container it often has 64 MB).
    """
    import ray

    if ray.is_initialized():
        return
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=object_store_memory, include_dashboard=False, **quiet)


def stop_ray() -> None:
    """Stop the cluster that ``start_ray`` started (or leave the one it joined). Safe to call twice."""
    import ray

    ray.shutdown()


class EnginePool:
    """``Engine`` over several actors.

    Args:
        num_engines: actors to start, all at the same time.
        cpus_per_engine: threads of each.
        gpus_per_engine: GPUs of each.
        factory: makes an engine; called inside the actor.
        kwargs: its arguments.
    """

    def __init__(
        self,
        *,
        num_engines: int,
        cpus_per_engine: int,
        gpus_per_engine: int = 0,
        factory: Callable[..., Engine],
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        import ray

        if not ray.is_initialized():
            raise RuntimeError("ray is not running; call grpo.rollouts.pool.start_ray first")
        _check_resources(ray.cluster_resources(), num_engines, cpus_per_engine, gpus_per_engine)
        actor = ray.remote(
            num_cpus=cpus_per_engine,
            num_gpus=gpus_per_engine,
            concurrency_groups={"work": 1, "watch": 1},  # a thread for each: an engine at work still answers
            runtime_env={"env_vars": _engine_environment(cpus_per_engine)},
        )(_EngineActor)
        self._actors: list[ActorHandle[Any]] = [actor.remote() for _ in range(num_engines)]
        self._calls = 0
        try:
            self._all("start", factory, dict(kwargs or {}))
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        """Sample everywhere. Whatever ``progress`` raises, and Ctrl-C, stops all engines within a second; they stay usable.

        Raises:
            RuntimeError: an engine's process died.
            Exception: what an engine raised, as it raised it.
        """
        import ray

        self._calls += 1
        call = _Call(number=self._calls, chunks=_chunks(requests, len(self._actors)), sampling=sampling)
        results: list[list[Completion]] = [[] for _ in call.chunks]
        waiting = list(range(len(call.chunks)))[::-1]
        busy: dict[ObjectRef[Any], _Work] = {}
        total = sum(request.num_completions for request in requests)
        done = 0
        try:
            while waiting or busy:
                for engine in self._free(busy):
                    if waiting:
                        busy |= self._hand_out(engine, waiting.pop(), call)
                ready, _ = ray.wait(list(busy), num_returns=1, timeout=_POLL)
                for ref in ready:
                    work = busy.pop(ref)
                    results[work.chunk] = self._get(ref, work.engine)
                    done += len(results[work.chunk])
                if progress is not None:
                    progress(done + self._sampled_by([work.engine for work in busy.values()]), total)
        except BaseException:
            _cancel(self._actors, call.number)
            raise
        return [completion for result in results for completion in result]

    def load_weights(self, weights: Weights, version: int) -> None:
        import ray

        packed = ray.put(PackedWeights.pack(weights))
        versions = self._all("load_weights", packed, version)
        assert versions == [version] * len(self._actors), versions

    def close(self) -> None:
        import ray

        actors, self._actors = self._actors, []
        if not ray.is_initialized():
            return
        _cancel(actors, self._calls)
        closing = [actor.close.options(concurrency_group="work").remote() for actor in actors]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSING)
        for actor in actors:
            ray.kill(actor, no_restart=True)

    def _free(self, busy: Mapping[ObjectRef[Any], _Work]) -> list[int]:
        if not self._actors:
            raise RuntimeError("this engine pool is closed; make a new one")
        return sorted(set(range(len(self._actors))) - {work.engine for work in busy.values()})

    def _hand_out(self, engine: int, chunk: int, call: _Call) -> dict[ObjectRef[Any], _Work]:
        actor = self._actors[engine]
        ref = actor.generate.options(concurrency_group="work").remote(call.number, call.chunks[chunk], call.sampling)
        return {ref: _Work(engine=engine, chunk=chunk)}

    def _sampled_by(self, engines: Sequence[int]) -> int:
        """How many completions the busy engines have finished of their chunks; an engine too busy to answer counts 0."""
        import ray

        refs = [self._actors[engine].sampled.options(concurrency_group="watch").remote() for engine in engines]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=_POLL) if refs else ([], [])
        try:
            return sum(ray.get(ready))
        except ray.exceptions.RayError:
            return 0  # dead: the work it held says so itself

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every engine, at the same time, open to Ctrl-C."""
        import ray

        refs = [getattr(actor, method).options(concurrency_group="work").remote(*args) for actor in self._actors]
        results: list[Any] = [None] * len(refs)
        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL)
            for ref in ready:  # the first failure ends the wait, even if another engine hangs
                results[refs.index(ref)] = self._get(ref, refs.index(ref))
        return results

    def _get(self, ref: ObjectRef[Any], engine: int) -> Any:
        import ray

        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            _raise_own(error)
        except ray.exceptions.RayActorError as error:
            self._lost(engine, error)

    def _lost(self, engine: int, error: Exception) -> NoReturn:
        """An engine's process is gone, with the work it held."""
        raise RuntimeError(
            f"engine {engine} of {len(self._actors)} died: {str(error).strip()}\n"
            "  → often the system was out of memory: lower rollout.num_engines, or kv_cache_memory_bytes in rollout.engine_args"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One ``generate`` of the pool: its number, so that a late cancellation does not hit the next one."""

    number: int
    chunks: Sequence[Sequence[Request]]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class _Work:
    engine: int
    chunk: int


class _Cancelled(Exception):
    """The driver no longer wants this call."""


class _EngineActor:
    """The process around one engine. ``work`` methods run one at a time; ``watch`` methods answer beside them."""

    def __init__(self) -> None:
        # Ctrl-C in a terminal reaches the whole process group. The driver decides what it means: it may want to save first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._engine: Engine | None = None
        self._sampled = 0
        self._cancelled = 0
        self._lock = threading.Lock()

    def start(self, factory: Callable[..., Engine], kwargs: Mapping[str, Any]) -> None:
        self._engine = factory(**kwargs)

    def generate(self, call: int, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        assert self._engine is not None

        def progress(done: int, _: int) -> None:
            self._sampled = done
            with self._lock:
                if call <= self._cancelled:
                    raise _Cancelled

        self._sampled = 0
        try:
            progress(0, 0)
            return self._engine.generate(requests, sampling, progress)
        except _Cancelled:
            return []

    def load_weights(self, weights: PackedWeights, version: int) -> int:
        assert self._engine is not None
        self._engine.load_weights(weights.unpack(), version)
        return version

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def sampled(self) -> int:
        return self._sampled

    def cancel(self, call: int) -> None:
        with self._lock:
            self._cancelled = max(self._cancelled, call)


def _cancel(actors: Sequence[ActorHandle[Any]], call: int) -> None:
    """Tell all of them, busy or not: an interruption can fall between handing work out and noting it."""
    for actor in actors:
        actor.cancel.options(concurrency_group="watch").remote(call)


def _engine_environment(cpus: int) -> dict[str, str]:
    """Threads: as many as the engine was given, asleep while they wait. And modules are found where the driver finds them.

    Spinning threads take the cores from the trainer, or another engine, that could use them: training ran ten times slower.
    """
    threads = str(max(cpus, 1))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def _chunks(requests: Sequence[Request], num_engines: int) -> list[Sequence[Request]]:
    """Consecutive requests, about as many completions in each chunk; a request is never cut."""
    total = sum(request.num_completions for request in requests)
    num_chunks = max(num_engines, -(-total // _COMPLETIONS_PER_CHUNK))
    chunks: list[list[Request]] = [[] for _ in range(num_chunks)]
    before = 0
    for request in requests:
        chunks[before * num_chunks // total].append(request)
        before += request.num_completions
    return [chunk for chunk in chunks if chunk]


def _check_resources(resources: Mapping[str, float], num_engines: int, cpus: int, gpus: int) -> None:
    """Ray would wait for ever for what the cluster does not have."""
    for name, key, each in (("CPU", "cpus_per_engine", cpus), ("GPU", "gpus_per_engine", gpus)):
        there = resources.get(name, 0)
        if num_engines * each > there:
            raise ValueError(
                f"{num_engines} engines with {each} {name}s each need {num_engines * each}, and the ray cluster has {there:g}\n"
                f"  → lower rollout.num_engines or rollout.{key}"
            )


def _raise_own(error: Any) -> NoReturn:
    """Raise what the engine raised, not ray's wrapper with the remote traceback for a message; that follows as the cause."""
    own = error.cause
    if isinstance(own, Exception) and type(own).__module__ != "ray.exceptions":
        raise own from error
    raise RuntimeError(str(error)) from None
