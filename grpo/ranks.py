"""N processes with a shard of the policy each (``grpo.sharded``), as Ray actors that make the same calls in the same order.

A rank that dies leaves the others waiting for it. The driver hears of the death from Ray, ends the others and says what happened;
a rank that is alive and does not answer is found by the others' ``timeout``.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from grpo.layouts import LayoutName
from grpo.rollouts.actor import engine_environment
from grpo.rollouts.fleet import raise_own
from grpo.rollouts.placement import GPU
from grpo.sharded import MakeModel, RankSettings, ShardedPolicy

if TYPE_CHECKING:
    from ray import ObjectRef

_GRACE = 10.0  # seconds that ray has to report the death over which the other ranks have lost their connection
_PLACING = 60.0  # seconds to wait for CPUs and GPUs that the cluster has, and has given to others
_REMEDY = "often the system was out of memory: lower trainer.tokens_per_microbatch, or use more machines; then `grpo train <run folder>`"


class Ranks:
    """N processes that make the same calls in the same order. ``ray`` must be running.

    Every call is made by a thread that no signal interrupts: Ctrl-C cannot fall between telling one rank and telling the next, after
    which the two would wait for each other for ever.

    Args:
        num_ranks: processes. On ``device="cuda"`` each has a GPU of its own.
        cpus_per_rank: threads of each, and what it claims of Ray.
        timeout: seconds that a rank waits for the others before it gives up, which ends them all.

    Raises:
        ValueError: the cluster does not have that many CPUs or GPUs.
        RuntimeError: they are taken, or a rank died.
    """

    def __init__(self, num_ranks: int, *, cpus_per_rank: int = 1, device: str = "cpu", timeout: float = 1800.0) -> None:
        import ray

        if not ray.is_initialized():
            raise RuntimeError("ray is not running; call grpo.rollouts.pool.start_ray first")
        self.num_ranks = num_ranks
        self.numbers = itertools.count()  # of snapshots: a late ``forget`` finds its own or none
        self._ended: str | None = None
        self._actors: list[Any] = []
        self._born: list[Born] = []
        self._told: set[str] = set()
        self._teller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ranks")
        resources = {"CPU": cpus_per_rank, "GPU": int(device == "cuda")}
        _check_resources(ray.cluster_resources(), num_ranks, resources)
        self._place = ray.util.placement_group([{k: v for k, v in resources.items() if v}] * num_ranks, strategy="PACK")
        try:
            if not self._place.wait(_PLACING):
                raise RuntimeError(
                    f"the ray cluster has what {num_ranks} ranks need, but not free: {ray.available_resources()}\n"
                    "  → lower trainer.ranks or rollout.num_engines, or add machines"
                )
            environment = {"env_vars": engine_environment(cpus_per_rank)}
            actor_class = ray.remote(num_cpus=cpus_per_rank, num_gpus=resources["GPU"], runtime_env=environment)(RankActor)
            for number in range(num_ranks):
                where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=number)
                self._actors.append(actor_class.options(scheduling_strategy=where).remote(timeout))
            self._born = self._ask("born", [()] * num_ranks, "start")
            (meeting_point,) = self._ask("meeting_point", [()], "start")
            self._ask("join", [(rank, num_ranks, meeting_point, device) for rank in range(num_ranks)], "start")
        except BaseException:
            self.close()
            raise

    def load(self, make_model: MakeModel, settings: RankSettings) -> LayoutName:
        """Make a policy on the ranks, in place of the one that is there. Returns the layout that its model allows."""
        layout: LayoutName = self._values(self._ask("load", [(make_model, settings)] * self.num_ranks, "load"))[0]
        return layout

    def all(self, method: str, *args: Any) -> Any:
        """A method of the policy on every rank, with the same arguments; rank 0's answer."""
        import ray

        stored = [ray.put(arg) for arg in args]
        return self.each(method, [stored] * self.num_ranks)[0]

    def each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """A method of the policy on every rank, each with its own arguments; all answers.

        Raises:
            RuntimeError: a rank died. All are ended.
            Exception: what a rank raised, as it raised it. All are ended.
        """
        return self._values(self._ask("call", [(method, *args) for args in arguments], doing=method))

    def forget(self, number: int) -> None:
        """Not waited for: the garbage collector may call this from any thread, the telling one included."""
        if self._ended is None:
            self._submit("call", [("forget", number)] * self.num_ranks)

    def processes(self) -> list[int]:
        """Process ids, on whatever machines."""
        return [born.pid for born in self._born]

    def gpus(self) -> list[GPU]:
        """Of each rank, on ``device="cuda"``."""
        return [GPU(born.node, born.gpu) for born in self._born]

    def close(self) -> None:
        import ray

        self._end("these ranks are closed; make new ones")
        actors, self._actors = self._actors, []
        self._teller.shutdown(wait=True)
        if not ray.is_initialized():
            return
        for actor in actors:
            ray.kill(actor, no_restart=True)
        here = ray.get_runtime_context().get_node_id()
        for born in self._born if actors else ():
            if born.node == here:
                _kill(born.pid)
        ray.util.remove_placement_group(self._place)

    def _end(self, why: str) -> None:
        self._ended = self._ended or why

    def _ask(self, method: str, arguments: Sequence[tuple[Any, ...]], doing: str) -> list[Any]:
        if self._ended is not None:
            raise RuntimeError(self._ended)
        return self._results(self._submit(method, arguments).result(), doing)

    def _submit(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Future[list[ObjectRef[Any]]]:
        actors = self._actors[: len(arguments)]
        return self._teller.submit(lambda: [getattr(actor, method).remote(*args) for actor, args in zip(actors, arguments, strict=True)])

    def _values(self, answers: Sequence[Answer]) -> list[Any]:
        """What the ranks returned. What rank 0 warned of is warned of here, once."""
        for text in answers[0].warnings:
            if text not in self._told:
                self._told.add(text)
                warnings.warn(text, stacklevel=2)
        return [answer.value for answer in answers]

    def _results(self, refs: list[ObjectRef[Any]], doing: str) -> list[Any]:
        import ray

        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            try:
                ray.get(ready)
            except ray.exceptions.RayError:
                self._fail(refs, doing)
        values: list[Any] = ray.get(refs)
        return values

    def _fail(self, refs: list[ObjectRef[Any]], doing: str) -> NoReturn:
        """End all and say why. A death explains what the other ranks raised over it, so if that is all there is, wait for the news."""
        import ray

        deadline = time.monotonic() + _GRACE
        while True:
            errors = {rank: error for rank, ref in enumerate(refs) if (error := _error(ref)) is not None}
            dead = [rank for rank, error in errors.items() if not isinstance(error, ray.exceptions.RayTaskError)]
            _, waiting = ray.wait(refs, num_returns=len(refs), timeout=0)
            silent = [refs.index(ref) for ref in waiting]
            lost = all(_of_connection(error) for error in errors.values())
            if dead or not silent or not lost or time.monotonic() > deadline:
                break
            ray.wait([refs[rank] for rank in silent], num_returns=1, timeout=0.2)
        rank = min(errors, key=lambda rank: (rank not in dead, _of_connection(errors[rank]), rank))  # causes before consequences
        error = errors[rank]
        says = str(getattr(error, "cause", None) or error).strip()
        what = f"rank {rank} of {self.num_ranks} {'died' if dead else 'failed'} in {doing!r}: {says}"
        if not dead and silent and lost:
            what += f"\n  no answer came from {', '.join(f'rank {number}' for number in silent)}: look there for the reason"
        self._end(what + f"\n  → {_REMEDY}" * bool(dead))
        self.close()
        if dead or lost:
            raise RuntimeError(self._ended) from error
        raise_own(error)


def _error(ref: ObjectRef[Any]) -> Exception | None:
    """What a call raised, if it has ended."""
    import ray

    try:
        ray.get(ref, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return None
    except ray.exceptions.RayError as error:
        found: Exception = error
        return found
    return None


def _of_connection(error: Exception) -> bool:
    """Whether a rank may have raised this because of another one: torch's collectives raise plain RuntimeErrors, or their own."""
    cause = getattr(error, "cause", None)
    return type(cause) is RuntimeError or isinstance(cause, dist.DistError)


def _kill(pid: int) -> None:
    """A process that is stopped, or stands in a collective, does not hear ray."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it heard


def _check_resources(there: Mapping[str, float], num_ranks: int, each: Mapping[str, int]) -> None:
    """Ray would wait for ever for what the cluster does not have."""
    for name, number in each.items():
        if num_ranks * number > there.get(name, 0):
            raise ValueError(
                f"{num_ranks} ranks with {number} {name} each need {num_ranks * number}, and the ray cluster has {there.get(name, 0):g}\n"
                "  → lower trainer.ranks, or add machines"
            )


# ---------------------------------------------------------------- one process


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned, and what it warned of: a rank's own output is not shown."""

    value: Any
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Born:
    """A rank's process."""

    pid: int
    node: str  # ray's id of the machine it is on
    gpu: str  # the one that ray gave it, as CUDA_VISIBLE_DEVICES names it; on a CPU: whatever stands there


class RankActor:
    """The process around a ``ShardedPolicy``: a Ray actor that makes one call after the other."""

    def __init__(self, timeout: float) -> None:
        # Ctrl-C in a terminal reaches the whole process group. The driver decides what it means: it may want to save first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._timeout = timedelta(seconds=timeout)
        self._store: dist.TCPStore | None = None
        self._policy: ShardedPolicy | None = None

    def born(self) -> Born:
        import ray

        return Born(os.getpid(), ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    def meeting_point(self) -> tuple[str, int]:
        """Rank 0 alone: open the port where the others find it."""
        import ray

        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        return host, self._store.port

    def join(self, rank: int, num_ranks: int, meeting_point: tuple[str, int], device: str) -> None:
        """Wait there for the others."""
        if self._store is None:
            self._store = dist.TCPStore(*meeting_point, is_master=False, timeout=self._timeout)
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=num_ranks, timeout=self._timeout)

    def load(self, make_model: MakeModel, settings: RankSettings) -> Answer:
        """Make the policy; returns the layout that its model allows."""
        self._policy = None  # the one before, if any, gives its memory back first

        def make() -> LayoutName:
            self._policy = ShardedPolicy(make_model, settings)
            return self._policy.plan.layout

        return _answer(make)

    def call(self, method: str, *args: Any) -> Answer:
        """A method of the policy."""
        return _answer(lambda: getattr(self._policy, method)(*args))


def _answer(make: Callable[[], Any]) -> Answer:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        value = make()
    return Answer(value, tuple(str(w.message) for w in caught if w.category is UserWarning))
