"""N engines as Ray actors, together an ``Engine`` that survives the death of any of them. Ray is imported when a pool is made.

An engine whose process dies, or that makes no step for a settable time, is replaced. The new one gets the weights of the last sync,
proven as they were the first time, and what the old one held is sampled again: a completion's randomness depends on its request's
seed and its index alone, so it does not matter which engine samples it, nor how often it was begun. An engine that dies again and
again is given up, and the run goes on with the others; it ends, with a message, when none is left.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NoReturn

from grpo.rollouts.actor import CONCURRENCY, Born, EngineActor, Look, engine_environment
from grpo.rollouts.base import Finished, Job, Progress, ServedEngine, SyncReport, Weights, in_order, jobs_of
from grpo.rollouts.faults import Pulse, Restarts
from grpo.rollouts.proof import Arrivals, check_sent
from grpo.rollouts.schedule import Handout, Schedule, make_handout
from grpo.rollouts.transfer import Parcel, SharedMemory, Transfer, handfuls
from grpo.rollouts.weights import Spec, WeightStream
from grpo.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_POLL = 0.2  # seconds between two looks at the engines: what Ctrl-C waits for
_CLOSING = 5.0  # seconds an engine has to stop its own processes before it is killed
_LOG = logging.getLogger(__name__)

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


class EnginePool:
    """``Engine`` over several actors.

    Args:
        num_engines: actors to start, all at the same time.
        cpus_per_engine: threads of each.
        gpus_per_engine: GPUs of each.
        factory: makes an engine; called inside the actor.
        kwargs: its arguments.
        schedule: who samples what, ``free`` or ``fixed``; see ``grpo.rollouts.schedule``.
        transfer: how weights travel; None: shared memory.
        hang_timeout: seconds without a step after which a working engine is killed and replaced.
        start_timeout: seconds after which a replacement that has not started counts as dead.
        max_restarts: replacements of one engine within ``restart_window`` seconds before it is given up.
    """

    def __init__(
        self,
        *,
        num_engines: int,
        cpus_per_engine: int,
        gpus_per_engine: int = 0,
        factory: Callable[..., ServedEngine],
        kwargs: Mapping[str, Any] | None = None,
        schedule: Schedule | str = Schedule.free,
        transfer: Transfer | None = None,
        hang_timeout: float = 300.0,
        start_timeout: float = 1800.0,
        max_restarts: int = 4,
        restart_window: float = 600.0,
    ) -> None:
        import ray

        if not ray.is_initialized():
            raise RuntimeError("ray is not running; call grpo.rollouts.pool.start_ray first")
        _check_resources(ray.cluster_resources(), num_engines, cpus_per_engine, gpus_per_engine)
        actor_class = ray.remote(
            num_cpus=cpus_per_engine,
            num_gpus=gpus_per_engine,
            concurrency_groups=CONCURRENCY,
            runtime_env={"env_vars": engine_environment(cpus_per_engine)},
        )(EngineActor)
        self._new_actor: Callable[[], ActorHandle[Any]] = actor_class.remote
        self._factory, self._kwargs = factory, dict(kwargs or {})
        self._schedule = Schedule(schedule)
        self._transfer = transfer or SharedMemory()
        self._hang_timeout, self._start_timeout = hang_timeout, start_timeout
        self._max_restarts, self._restart_window = max_restarts, restart_window
        self._counts = dict.fromkeys(("replaced", "hung", "given_up", "completions_redone"), 0)
        self._calls = 0
        self._sent: _Sent | None = None
        self._handout: Handout | None = None
        self._slots = [_Slot(number=number, restarts=Restarts(max_restarts, restart_window)) for number in range(num_engines)]
        self._running = False
        try:
            for slot in self._slots:
                self._launch(slot)
            while any(slot.state is _State.starting for slot in self._slots):
                self._turn()
        except BaseException:
            self.close()
            raise
        self._running = True  # from here on, the dead are replaced; before, they are an error in the settings

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        """Sample everywhere. Whatever ``progress`` raises, and Ctrl-C, stops all engines within a second; they stay usable.

        Raises:
            RuntimeError: no engine is left.
            Exception: what an engine raised, as it raised it.
        """
        return in_order(requests, self.stream(requests, sampling, progress))

    def stream(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> Iterator[Completion]:
        self._settle()
        jobs = jobs_of(requests)
        left = {job.number for job in jobs}
        self._handout = make_handout(self._schedule, jobs, len(self._slots))
        try:
            while left:
                for slot in self._slots:
                    self._hand_out(slot, self._handout, sampling)
                for number, completion in self._turn():
                    if number in left:  # under the fixed schedule, what was finished of a dead engine's shard comes again
                        left.remove(number)
                        yield completion
                if progress is not None:
                    progress(len(jobs) - len(left), len(jobs))
        except BaseException:
            _cancel(self._slots, self._calls)
            raise
        finally:
            self._handout = None
            for slot in self._slots:
                slot.held.clear()
                if slot.state is _State.serving:
                    slot.call_actor("control", "bring", slot.call, None)

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        start = time.monotonic()
        self._settle()
        before, stream = self._sent, WeightStream.of(weights)
        sent = _Sent(version=version, specs=stream.specs)
        loading = [slot for slot in self._slots if slot.state is _State.idle]
        try:
            for slot in loading:
                self._begin(slot, _State.loading, "load", version, sent.specs)
                slot.holds = sent
            try:
                for tensors in handfuls(sent.arrivals.passing(stream)):
                    sent.parcels.append(self._transfer.send(tensors))
                    for slot in loading:
                        slot.call_actor("control", "bring", slot.call, sent.parcels[-1])
            finally:
                for slot in loading:
                    slot.call_actor("control", "bring", slot.call, None)
            self._sent = sent
            while not self._ready() or any(slot.state is _State.loading for slot in self._slots):
                self._turn()
        except BaseException:  # an engine that has taken them is given the last ones again before it goes on
            self._sent = before
            for slot in loading:
                slot.abandon()
                slot.holds = None if before is None else slot.holds
            self._transfer.discard(sent.parcels)
            raise
        if before is not None:
            self._transfer.discard(before.parcels)
        reports = [slot.report for slot in self._ready() if slot.report is not None]
        return SyncReport(
            version=version,
            digests=sent.arrivals.digests,
            num_bytes=sent.arrivals.num_bytes,
            seconds=time.monotonic() - start,
            read_back=min(report.read_back for report in reports),
            num_engines=len(reports),
        )

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """See ``Engine``. An engine that dies over it has no list; there is at least one."""
        answers: list[list[Completion]] = []
        while not answers:
            self._settle()
            asked = self._ready()
            for slot in asked:
                slot.answer = None
                self._begin(slot, _State.probing, "probe", requests, sampling)
            while any(slot.state is _State.probing for slot in asked):
                self._turn()
            answers = [slot.answer for slot in asked if slot.answer is not None]
        return answers

    def metrics(self) -> dict[str, float]:
        """Since the pool was made: engines replaced (for whatever reason) and of these the hung ones, given up, and ready now."""
        return {f"engine/{name}": float(count) for name, count in self._counts.items()} | {
            "engine/alive": float(sum(slot.state not in (_State.starting, _State.gone) for slot in self._slots))
        }

    def processes(self) -> list[int]:
        """Process ids of the engines that have started, on whatever machine."""
        return [slot.born.pid for slot in self._slots if slot.born is not None]

    def close(self) -> None:
        import ray

        slots, self._slots = self._slots, []
        actors = [slot.actor for slot in slots if slot.actor is not None]
        if not ray.is_initialized():
            return
        _cancel(slots, self._calls)
        closing = [actor.close.options(concurrency_group="work").remote() for actor in actors]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSING)
        for actor in actors:
            ray.kill(actor, no_restart=True)
        if self._sent is not None:
            self._transfer.discard(self._sent.parcels)
            self._sent = None

    # --- one engine ---

    def _launch(self, slot: _Slot) -> None:
        slot.actor = self._new_actor()
        slot.state = _State.starting
        slot.ref = slot.call_actor("work", "start", self._factory, self._kwargs)
        slot.pulse = Pulse(self._start_timeout if self._running else math.inf, time.monotonic())

    def _begin(self, slot: _Slot, state: _State, method: str, *args: Any) -> None:
        self._calls += 1
        slot.call, slot.state = self._calls, state
        slot.ref = slot.call_actor("work", method, slot.call, *args)
        slot.pulse = Pulse(self._hang_timeout, time.monotonic())

    def _reload(self, slot: _Slot, sent: _Sent) -> None:
        """Give an engine the weights that the others have."""
        self._begin(slot, _State.loading, "load", sent.version, sent.specs)
        slot.holds = sent
        for parcel in [*sent.parcels, None]:
            slot.call_actor("control", "bring", slot.call, parcel)

    def _hand_out(self, slot: _Slot, handout: Handout, sampling: Sampling) -> None:
        if slot.born is None or slot.holds is not self._sent:
            return
        if slot.state is _State.idle:
            jobs = handout.take(0, slot.born.slots)
            if jobs:
                self._begin(slot, _State.serving, "serve", sampling, jobs, handout.exact)
        elif slot.state is _State.serving and slot.ref is not None and not handout.exact:
            jobs = handout.take(len(slot.held), slot.born.slots)
            if jobs:
                slot.call_actor("control", "bring", slot.call, jobs)
        else:
            return
        slot.held |= {job.number: job for job in jobs}

    def _lost(self, slot: _Slot, why: str) -> None:
        """An engine's process is gone, with what it held: put that back, and start another in its place.

        Raises:
            RuntimeError: no engine is left, or it was a first one.
        """
        import ray

        who = f"engine {slot.number} of {len(self._slots)}"
        assert slot.actor is not None
        ray.kill(slot.actor, no_restart=True)
        held = list(slot.held.values())
        slot.reset()
        if not self._running:
            raise RuntimeError(f"{who} died: {why}\n  → {_REMEDY}")
        self._counts["replaced"] += 1
        if held and self._handout is not None:
            self._counts["completions_redone"] += len(self._handout.put_back(held))
        briefly = " ".join(why.split())[:300]
        if slot.restarts.allow(time.monotonic()):
            _LOG.warning("%s is replaced, and the %d completions it held are sampled again: %s", who, len(held), briefly)
            self._launch(slot)
            return
        slot.state = _State.gone
        self._counts["given_up"] += 1
        crashes = f"died {self._max_restarts + 1} times within {self._restart_window:g} s"
        if all(other.state is _State.gone for other in self._slots):
            held_by = ", ".join(sorted({job.request.problem_id for job in held})[:3]) or "nothing"
            raise RuntimeError(
                f"no engine is left: {who}, the last one, {crashes}\n  the last time: {why}\n  it was sampling: {held_by}\n  → {_REMEDY}"
            )
        _LOG.warning("%s %s and is given up; the run goes on without it: %s", who, crashes, briefly)

    # --- all engines ---

    def _settle(self) -> None:
        """Wait until engines are done with what was asked of them before, and one at least can be asked for more."""
        if not self._slots:
            raise RuntimeError("this engine pool is closed; make a new one")
        while not self._ready() or any(slot.state in (_State.serving, _State.probing, _State.loading) for slot in self._slots):
            self._turn()

    def _ready(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.state is _State.idle and slot.holds is self._sent]

    def _turn(self) -> Finished:
        """Wait for something to happen, a moment at the most, and deal with it. Returns what was finished."""
        import ray

        for slot in self._slots:
            if slot.state is _State.idle and self._sent is not None and slot.holds is not self._sent:
                self._reload(slot, self._sent)
            if slot.watched and slot.look is None:
                slot.look = slot.call_actor("watch", "look", slot.call)
        waiting = {ref: slot for slot in self._slots for ref in (slot.ref, slot.look) if ref is not None}
        if not waiting:
            return []
        ray.wait(list(waiting), num_returns=1, timeout=_POLL)
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        finished = [entry for ref in ready for entry in self._take(waiting[ref], ref)]
        for slot in self._slots:
            if slot.pulse is not None and slot.ref is not None and slot.pulse.hangs(time.monotonic()):
                self._kill_hung(slot)
        return finished

    def _take(self, slot: _Slot, ref: ObjectRef[Any]) -> Finished:
        """What an engine answered; dead ones answer too."""
        import ray

        if ref not in (slot.ref, slot.look):
            return []  # of a process that has been replaced meanwhile
        try:
            value = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if slot.state is _State.starting and self._running:
                self._lost(slot, str(error.cause or error).strip())
                return []
            slot.abandon()
            _raise_own(error)
        except ray.exceptions.RayError as error:  # the process died, or its node, or was out of memory
            self._lost(slot, str(error).strip())
            return []
        return self._note(slot, ref, value)

    def _note(self, slot: _Slot, ref: ObjectRef[Any], value: Any) -> Finished:
        finished: Finished = []
        if isinstance(value, Born):
            slot.born = value
        elif isinstance(value, Look) and value.call == slot.call:
            assert slot.pulse is not None
            slot.pulse.beat(value.beats)
            finished = [(number, completion) for number, completion in value.finished if slot.held.pop(number, None)]
        elif isinstance(value, SyncReport):
            assert slot.holds is not None
            slot.report = value
            check_sent(slot.holds.arrivals.digests, slot.holds.version, value, f"engine {slot.number} of {len(self._slots)}")
        elif isinstance(value, list):
            slot.answer = value
        slot.answered(ref)
        return finished

    def _kill_hung(self, slot: _Slot) -> None:
        import ray

        self._counts["hung"] += 1
        doing, seconds = slot.state.name, self._start_timeout if slot.state is _State.starting else self._hang_timeout
        if slot.born is not None and slot.born.node == ray.get_runtime_context().get_node_id():
            os.kill(slot.born.pid, signal.SIGKILL)  # a stopped process does not hear ray
        self._lost(slot, f"it hung: no step for {seconds:g} s while {doing}")


_REMEDY = "often the system was out of memory: lower rollout.num_engines, or kv_cache_memory_bytes in rollout.engine_args"


class _State(Enum):
    starting = auto()
    idle = auto()
    loading = auto()
    serving = auto()
    probing = auto()
    gone = auto()


@dataclass(eq=False, kw_only=True)
class _Sent:
    """The weights of one sync, kept for engines that start later."""

    version: int
    specs: Mapping[str, Spec]
    arrivals: Arrivals = field(default_factory=Arrivals)
    parcels: list[Parcel] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class _Slot:
    """One engine of the pool, through all the processes it has had."""

    number: int
    restarts: Restarts
    state: _State = _State.gone
    actor: ActorHandle[Any] | None = None
    born: Born | None = None  # once it has started
    holds: _Sent | None = None  # the weights it was last given
    report: SyncReport | None = None
    answer: list[Completion] | None = None
    call: int = 0  # number of the call it works on
    ref: ObjectRef[Any] | None = None  # of that call
    look: ObjectRef[Any] | None = None
    pulse: Pulse | None = None
    held: dict[int, Job] = field(default_factory=dict)  # given to it and not yet finished

    @property
    def watched(self) -> bool:
        return self.ref is not None and self.state in (_State.loading, _State.serving, _State.probing)

    def call_actor(self, group: str, method: str, *args: Any) -> ObjectRef[Any]:
        ref: ObjectRef[Any] = getattr(self.actor, method).options(concurrency_group=group).remote(*args)
        return ref

    def answered(self, ref: ObjectRef[Any]) -> None:
        """One of the two outstanding answers is here; with both, the engine is free."""
        if ref == self.look:
            self.look = None
        else:
            self.ref = None
        if self.ref is None and self.look is None:
            self.state = _State.idle

    def abandon(self) -> None:
        """Take no more interest in the call under way; the next one waits behind it."""
        if self.state is _State.loading:
            self.holds = None
        if self.state in (_State.loading, _State.serving, _State.probing):
            self.ref = self.look = None
            self.state = _State.idle

    def reset(self) -> None:
        self.actor = self.born = self.holds = self.report = self.answer = self.ref = self.look = self.pulse = None
        self.held.clear()


def _cancel(slots: Sequence[_Slot], call: int) -> None:
    """Tell all of them, busy or not: an interruption can fall between handing work out and noting it."""
    for slot in slots:
        if slot.actor is not None:
            slot.call_actor("control", "cancel", call)


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
