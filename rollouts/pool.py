"""N engines as Ray actors, together an ``Engine`` that survives the death of any of them. Ray is imported when a pool is made.

``fleet.py`` keeps the engines alive, ``schedule.py`` says who samples what; here they serve, and take weights.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grpo.rollouts.actor import CONCURRENCY, EngineActor, engine_environment
from grpo.rollouts.base import Close, Feed, Finished, ServedEngine, Serving, SyncReport, Weights
from grpo.rollouts.fleet import Fleet
from grpo.rollouts.placement import Place
from grpo.rollouts.schedule import Handout, Schedule, make_handout
from grpo.rollouts.slot import Sent, Slot, State
from grpo.rollouts.transfer import SharedMemory, Transfer, handfuls
from grpo.rollouts.weights import WeightStream
from grpo.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_FREED = 60.0  # seconds to wait for cores and GPUs that others hold
_RAY_ENVIRONMENT = {  # read by ray's processes when they start; what the user has set stays
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; without it ray warns of the change
    "RAY_worker_niceness": "0",  # ray would run the engine, which the trainer waits for, behind everything else on the machine
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # what the pool does not ask for any more it does not want to hear of
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


class EnginePool(Serving):
    """``Engine`` over several actors. Any thread may use it, one at a time.

    Args:
        num_engines: actors to start, all at the same time.
        cpus_per_engine: threads of each.
        gpus_per_engine: GPUs of each, which Ray gives it and nobody else.
        places: where each engine runs, on GPUs that Ray has given to others: then it claims none.
        factory: makes an engine; called inside the actor.
        kwargs: its arguments.
        schedule: who samples what, ``free`` or ``fixed``; see ``grpo.rollouts.schedule``.
        transfer: how weights travel; None: shared memory.
        hang_timeout: seconds without a token (or, in a load, a parcel) after which a working engine is killed and replaced.
        start_timeout: seconds after which an engine that has not started counts as dead.
        max_restarts: replacements of one engine, none of which finished a completion, before it is given up.
    """

    def __init__(
        self,
        *,
        num_engines: int,
        cpus_per_engine: int,
        gpus_per_engine: int = 0,
        places: Sequence[Place] | None = None,
        factory: Callable[..., ServedEngine],
        kwargs: Mapping[str, Any] | None = None,
        schedule: Schedule | str = Schedule.free,
        transfer: Transfer | None = None,
        hang_timeout: float = 300.0,
        start_timeout: float = 1800.0,
        max_restarts: int = 10,
    ) -> None:
        import ray

        if not ray.is_initialized():
            raise RuntimeError("ray is not running; call grpo.rollouts.pool.start_ray first")
        if places is not None and (len(places) != num_engines or gpus_per_engine):
            raise ValueError(f"{len(places)} places are not those of {num_engines} engines that claim {gpus_per_engine} GPUs each")
        _check_resources(ray.cluster_resources(), num_engines, cpus_per_engine, gpus_per_engine)
        _check_machines([node["Resources"] for node in ray.nodes() if node["Alive"]], num_engines, cpus_per_engine, gpus_per_engine)
        _wait_for_resources(ray.available_resources, num_engines, cpus_per_engine, gpus_per_engine)
        environment = engine_environment(cpus_per_engine)
        actor_class = ray.remote(
            num_cpus=cpus_per_engine,
            num_gpus=gpus_per_engine,
            concurrency_groups=CONCURRENCY,
            runtime_env={"env_vars": environment},
        )(EngineActor)

        def new_actor(number: int) -> ActorHandle[Any]:
            options = {} if places is None else places[number].options(environment)
            actor: ActorHandle[Any] = actor_class.options(**options).remote()
            return actor

        self._num_engines = num_engines
        self._schedule = Schedule(schedule)
        self._transfer = transfer or SharedMemory()
        self._user = _OneAtATime()
        self._fleet = Fleet(
            num_engines=num_engines,
            new_actor=new_actor,
            factory=factory,
            kwargs=dict(kwargs or {}),
            hang_timeout=hang_timeout,
            start_timeout=start_timeout,
            max_restarts=max_restarts,
        )
        born = [slot.born for slot in self._fleet.slots if slot.born is not None]
        self.context_length = min(each.context_length for each in born)
        self.slots = min(each.slots for each in born)

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        """See ``Engine``. Ctrl-C, or closing the iterator, stops all engines within a second; they stay usable.

        Raises:
            RuntimeError: no engine is left, or another call is under way.
            Exception: what an engine raised, as it raised it.
        """
        fleet = self._fleet
        with self._user.doing("serve"):
            fleet.check_able()
            while not fleet.settled():
                fleet.turn()
                yield []
            handout = fleet.handout = make_handout(self._schedule, self._num_engines, self.slots)
            more = True
            try:
                while more or handout.open:
                    coming = feed(not handout.open)
                    if coming is Close.pause:
                        yield from self._pause(handout)
                        break
                    if isinstance(coming, Close):
                        more = False
                    else:
                        handout.add(coming)
                    able = fleet.able()
                    for slot in able:
                        self._hand_out(slot, handout, sampling, len(able))
                    yield fleet.turn()
            except BaseException:
                fleet.cancel()
                raise
            finally:
                fleet.handout = None
                for slot in fleet.slots:
                    if slot.state is State.serving:
                        slot.bring(Close.finish)

    def _hand_out(self, slot: Slot, handout: Handout, sampling: Sampling, able: int) -> None:
        assert slot.born is not None
        if slot.state is State.idle:
            jobs = handout.take(slot.number, slot.born.slots, able)
            if jobs:
                self._fleet.begin(slot, State.serving, "serve", sampling, jobs, handout.exact)
        elif slot.ref is not None and not handout.exact:
            jobs = handout.take(slot.number, slot.born.slots, able)
            if jobs:
                slot.bring(jobs)

    def _pause(self, handout: Handout) -> Iterator[Finished]:
        """Collect what engines have begun. Jobs that wait, or were held by an engine that dies over it, come back as they came."""
        for slot in self._fleet.slots:
            if slot.state is State.serving:
                slot.bring(Close.pause)
        while self._fleet.working(State.serving):
            yield self._fleet.turn()
        yield [(job.number, job.begun) for job in handout.open.values()]

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        start = time.monotonic()
        fleet = self._fleet
        with self._user.doing("load_weights"):
            fleet.settle()
            before, stream = fleet.sent, WeightStream.of(weights)
            sent = Sent(version=version, specs=stream.specs)
            loading = [slot for slot in fleet.slots if slot.state is State.idle]
            try:
                for slot in loading:
                    fleet.load(slot, sent)
                try:
                    for tensors in handfuls(sent.passed.passing(stream)):
                        sent.parcels.append(self._transfer.send(tensors))
                        for slot in loading:
                            slot.bring(sent.parcels[-1])
                finally:
                    for slot in loading:
                        slot.bring(None)
                fleet.sent = sent
                while not fleet.ready() or fleet.working(State.loading):
                    fleet.turn()
            except BaseException:  # an engine that has taken them is given the last ones again before it goes on
                fleet.sent, fleet.unproven = before, before is None
                for slot in loading:
                    slot.abandon()
                    slot.holds = None if before is None else slot.holds
                self._transfer.discard(sent.parcels)
                raise
            fleet.asleep = fleet.unproven = False
            if before is not None:
                self._transfer.discard(before.parcels)
            reports = [slot.report for slot in fleet.ready() if slot.report is not None]
        return SyncReport(
            version=version,
            digests=sent.passed.digests,
            num_bytes=sent.passed.num_bytes,
            seconds=time.monotonic() - start,
            read_back=min(report.read_back for report in reports),
            num_engines=len(reports),
        )

    def sleep(self) -> None:
        """See ``Engine``. All engines that live are asleep when this returns: one that is being replaced is waited for, since its
        memory is what the caller needs. The last weights are forgotten; an engine that starts after this waits awake for the next.
        """
        fleet = self._fleet
        with self._user.doing("sleep"):
            fleet.check_open()
            before, fleet.sent = fleet.sent, None  # no engine is given these again
            try:
                while awake := fleet.awake():
                    for slot in awake:
                        if slot.state is State.idle:
                            fleet.put_to_sleep(slot)
                    fleet.turn()
            except BaseException:  # those that sleep already are given the last weights again before they go on
                fleet.sent = before
                raise
            fleet.asleep = True
            if before is not None:
                self._transfer.discard(before.parcels)

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """See ``Engine``. An engine that dies over it has no list; there is at least one."""
        fleet = self._fleet
        answers: list[list[Completion]] = []
        with self._user.doing("probe"):
            fleet.check_able()
            while not answers:
                fleet.settle()
                asked = fleet.ready()
                for slot in asked:
                    slot.answer = None
                    fleet.begin(slot, State.probing, "probe", requests, sampling)
                while any(slot.state is State.probing for slot in asked):
                    fleet.turn()
                answers = [slot.answer for slot in asked if slot.answer is not None]
        return answers

    def metrics(self) -> dict[str, float]:
        """Since the pool was made: engines replaced (for whatever reason) and of these the hung ones, given up, and ready now."""
        return {f"engine/{name}": float(count) for name, count in self._fleet.counts.items()} | {
            "engine/alive": float(sum(slot.state not in (State.starting, State.gone) for slot in self._fleet.slots))
        }

    def processes(self) -> list[int]:
        """Process ids of the engines that have started, on whatever machine."""
        return [born.pid for slot in self._fleet.slots if (born := slot.born) is not None]

    def close(self) -> None:
        self._fleet.close()
        if self._fleet.sent is not None:
            self._transfer.discard(self._fleet.sent.parcels)
            self._fleet.sent = None


class _OneAtATime:
    """Refuses a call while another is under way, of whatever thread: a generator that was not closed is one too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = ""

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"an engine pool cannot {what} now: {self._under_way} is under way\n"
                "  → do one after the other, and close an iterator that is not used up"
            )
        self._under_way = f"{what} in thread {threading.current_thread().name!r}"
        try:
            yield
        finally:
            self._lock.release()


def _check_resources(resources: Mapping[str, float], num_engines: int, cpus: int, gpus: int, what: str = "has") -> None:
    """Ray would wait for ever for what the cluster does not have."""
    for name, key, each in (("CPU", "cpus_per_engine", cpus), ("GPU", "gpus_per_engine", gpus)):
        there = resources.get(name, 0)
        if num_engines * each > there:
            raise ValueError(
                f"{num_engines} engines with {each} {name}s each need {num_engines * each}, and the ray cluster {what} {there:g}\n"
                f"  → lower rollout.num_engines or rollout.{key}"
            )


def _check_machines(machines: Sequence[Mapping[str, float]], num_engines: int, cpus: int, gpus: int) -> None:
    """What the cluster has in all may lie on several machines, and an engine is on one."""
    each = {name: count for name, count in (("CPU", cpus), ("GPU", gpus)) if count}
    room = sum(min((int(there.get(name, 0) // count) for name, count in each.items()), default=num_engines) for there in machines)
    if room < num_engines:
        raise ValueError(
            f"{num_engines} engines with {cpus} CPUs and {gpus} GPUs each do not fit on the {len(machines)} machines of the ray cluster, "
            f"which have room for {room}\n  → lower rollout.num_engines, rollout.cpus_per_engine or rollout.gpus_per_engine"
        )


def _wait_for_resources(available: Callable[[], Mapping[str, float]], num_engines: int, cpus: int, gpus: int) -> None:
    """What a pool had that was closed just now comes back within moments; what others hold may not.

    Raises:
        ValueError: it did not.
    """
    patience = time.monotonic() + _FREED
    while True:
        try:
            return _check_resources(available(), num_engines, cpus, gpus, "has free")
        except ValueError as error:
            if time.monotonic() > patience:
                raise ValueError(f"{error}, or close what holds the others: another pool, another run on this cluster") from None
        time.sleep(0.1)
