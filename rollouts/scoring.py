"""Scoring on several machines: one reward runtime a node, each in a Ray actor, together with the interface of one.

On one machine the runtime itself is used; Ray is imported only where a cluster is.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from grpo.rewards.base import RewardPart
from grpo.rewards.runtime import Judgement, Progress, RewardRuntime
from grpo.types import Completion, Problem, Score

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_POLL_S = 0.2  # between two looks at the actors: what Ctrl-C waits for
_CHUNKS_PER_NODE = 4  # so that a quick node takes over from a slow one
_ATTEMPTS = 3  # actors that one chunk may lose


def scoring_runtime(
    parts: Sequence[RewardPart], num_workers: int = 0, cpu_s: float = 5.0, wall_s: float | None = None, memory_mb: int = 2048
) -> RewardRuntime | RemoteRuntimes:
    """The runtime of this machine; where Ray runs on several nodes, one on each. ``num_workers`` counts those of one node."""
    ray = sys.modules.get("ray")  # not imported: no cluster
    spread = ray is not None and ray.is_initialized() and len(_living_nodes()) > 1
    runtime = RemoteRuntimes if spread else RewardRuntime
    return runtime(parts, num_workers=num_workers, cpu_s=cpu_s, wall_s=wall_s, memory_mb=memory_mb)


@dataclass(slots=True)
class _Chunk:
    """Some of the completions by some of the parts."""

    rows: Sequence[int]
    parts: Sequence[str]
    attempts: int = 0


class RemoteRuntimes:
    """``RewardRuntime`` over the nodes of a Ray cluster. The arguments are the same and hold for each node.

    A part that takes whole batches is scored on one node; everything else is spread. What an actor held when it was lost is
    scored again by another; its node gets a new actor at the next call.

    Raises:
        RuntimeError: Ray does not run.
        ValueError: a limit that cannot work.
    """

    def __init__(self, parts: Sequence[RewardPart], **limits: Any) -> None:
        import ray

        if not ray.is_initialized():
            raise RuntimeError("ray is not running; call grpo.rollouts.pool.start_ray first")
        self._parts = tuple(parts)
        self._limits = limits
        self._actors: dict[str, ActorHandle[Any]] = {}  # by node
        self._closed = False
        self._lock = threading.Lock()
        try:
            self._start_missing()
            ray.get([actor.ready.remote() for actor in self._actors.values()])  # what its limits raise is raised here
        except ray.exceptions.RayTaskError as error:
            self.close()
            raise error.cause from None
        except BaseException:
            self.close()
            raise

    @property
    def num_nodes(self) -> int:
        """Nodes that score at present."""
        return len(self._actors)

    def score(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Score]]:
        """``RewardRuntime.score``. Whatever ``progress`` raises, and Ctrl-C, ends the work everywhere.

        Raises:
            RuntimeError: the actors were lost again and again.
            Exception: what a runtime raised, as it raised it.
        """
        judged = self.judge(completions, problems, progress)
        return [{name: judgement.score for name, judgement in by_name.items()} for by_name in judged]

    def judge(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Judgement]]:
        """``RewardRuntime.judge``."""
        if self._closed:
            raise RuntimeError("these reward runtimes are closed")
        if len(completions) != len(problems):
            raise ValueError(f"{len(completions)} completions but {len(problems)} problems; give one problem for each completion")
        with self._lock:  # calls at the same time take turns
            return self._judge(completions, problems, progress)

    def _judge(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None
    ) -> list[dict[str, Judgement]]:
        self._start_missing()
        waiting = deque(self._chunks(len(completions)))
        busy: dict[ObjectRef[Any], tuple[str, _Chunk]] = {}
        judged: list[dict[str, Judgement]] = [{} for _ in completions]
        num_done = 0
        try:
            while waiting or busy:
                if self._closed:
                    raise RuntimeError("these reward runtimes were closed while they scored")
                if progress is not None:
                    progress(num_done, len(completions))
                self._hand_out(waiting, busy, completions, problems)
                for chunk, scores in self._take_back(waiting, busy):
                    for row, by_name in zip(chunk.rows, scores, strict=True):
                        judged[row] |= by_name
                        if len(judged[row]) == len(self._parts):
                            num_done += 1
                            if progress is not None:
                                progress(num_done, len(completions))
        except BaseException:
            for node, _ in busy.values():  # nobody waits for what they do
                self._end(node)
            raise
        return [{part.name: by_name[part.name] for part in self._parts} for by_name in judged]

    def close(self) -> None:
        """End all actors and their workers. Safe to call twice."""
        self._closed = True
        for node in list(self._actors):
            self._end(node)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _chunks(self, num_completions: int) -> list[_Chunk]:
        """Whole batches first: they take longest."""
        batched = [part.name for part in self._parts if part.style.whole_batch]
        singly = [part.name for part in self._parts if part.name not in batched]
        chunks = [_Chunk(rows=range(num_completions), parts=[name]) for name in batched if num_completions]
        if singly:
            size = max(-(-num_completions // (_CHUNKS_PER_NODE * max(len(self._actors), 1))), 1)
            chunks += [
                _Chunk(rows=range(start, min(start + size, num_completions)), parts=singly) for start in range(0, num_completions, size)
            ]
        return chunks

    def _hand_out(
        self,
        waiting: deque[_Chunk],
        busy: dict[ObjectRef[Any], tuple[str, _Chunk]],
        completions: Sequence[Completion],
        problems: Sequence[Problem],
    ) -> None:
        at_work = {node for node, _ in busy.values()}
        for node, actor in self._actors.items():
            if waiting and node not in at_work:
                chunk = waiting.popleft()
                mine = [completions[row] for row in chunk.rows], [problems[row] for row in chunk.rows]
                busy[actor.judge.remote(*mine, chunk.parts)] = node, chunk

    def _take_back(
        self, waiting: deque[_Chunk], busy: dict[ObjectRef[Any], tuple[str, _Chunk]]
    ) -> list[tuple[_Chunk, list[dict[str, Judgement]]]]:
        import ray

        done, _ = ray.wait(list(busy), num_returns=1, timeout=_POLL_S)
        results = []
        for reference in done:
            node, chunk = busy.pop(reference)
            try:
                results.append((chunk, ray.get(reference)))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:  # the actor is gone, with its node or alone
                self._end(node)
                if not self._actors:
                    self._start_missing()
                chunk.attempts += 1
                if chunk.attempts == _ATTEMPTS or not self._actors:
                    raise RuntimeError(f"{chunk.attempts} reward actors were lost at the same work, the last on node {node}") from error
                waiting.appendleft(chunk)
        return results

    def _start_missing(self) -> None:
        """An actor for each living node that has none; those of dead nodes are given up."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = _living_nodes()
        for node in set(self._actors) - set(nodes):
            self._end(node)
        for node in nodes:
            if node not in self._actors:
                here = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
                actor = ray.remote(num_cpus=0, scheduling_strategy=here)(_RuntimeActor)  # scores while the engines rest
                self._actors[node] = actor.remote(self._parts, self._limits)

    def _end(self, node: str) -> None:
        import ray

        if (actor := self._actors.pop(node, None)) is not None:
            with contextlib.suppress(Exception):  # it, its node or the whole cluster is gone already
                ray.kill(actor)


class _RuntimeActor:
    """A runtime in a Ray actor. Its workers end with it, however it ends."""

    def __init__(self, parts: Sequence[RewardPart], limits: dict[str, Any]) -> None:
        self._parts = parts
        self._limits = limits
        self._runtime: RewardRuntime | None = None

    def ready(self) -> None:
        self._started()

    def judge(self, completions: Sequence[Completion], problems: Sequence[Problem], parts: Sequence[str]) -> list[dict[str, Judgement]]:
        return self._started().judge(completions, problems, parts=parts)

    def _started(self) -> RewardRuntime:
        if self._runtime is None:  # here, not in the constructor: what that raises arrives as a dead actor
            self._runtime = RewardRuntime(self._parts, **self._limits)
        return self._runtime


def _living_nodes() -> list[str]:
    """Ids of the nodes that can run something, in a fixed order."""
    import ray

    return sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0)
