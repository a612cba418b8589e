"""Run reward functions where they can do no harm: in worker processes that the parent kills when a task overstays.

A reward may loop forever, eat the memory, crash the interpreter or print to stdout; that costs its own completion its score,
and no other. Workers are fresh interpreters (never forked from a trainer that holds threads or a GPU, and never importing
the user's ``__main__``), started once and kept. The parent never blocks on a worker, uses no signals and no threads, and so
works from any thread and under asyncio.
"""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from grpo.rewards.base import RewardPart
from grpo.rewards.limits import RewardLimits
from grpo.rewards.wire import Job, Result, Start, encode
from grpo.rewards.worker_process import TICK_S, WorkerProcess, exchange
from grpo.types import Completion, Outcome, Problem, Score

Progress = Callable[[int, int], None]  # (completions scored, completions in all); a few times a second, and what it raises ends the work

_LONGEST_TICK_S = 0.2  # what one tick counts at most: while the machine sleeps or this process gets no time, no worker overstays
_START_ATTEMPTS = 3
_MOST_WORKERS = 16  # of one process, unless it is told otherwise
_JOBS_PER_MESSAGE = 16  # hides the way there and back; what hangs behind an overstaying task is handed to another worker


@dataclass(frozen=True, slots=True)
class Judgement:
    """A score, and the seconds its function took for it on the clock (of a batch: an equal share)."""

    score: Score
    seconds: float


class RewardRuntime:
    """Scores completions by all parts of a reward, in worker processes with deadlines.

    ``score`` may be called from any thread; calls at the same time take turns. Use it as a context manager, or ``close`` it.

    Args:
        parts: the reward, from ``parse_reward_config``.
        num_workers: tasks that run at the same time; 0: one a core that this process may use, 16 at most. One more worker is kept
            warm, so that a kill costs no start.
        cpu_s: CPU time of one part on one completion. Beyond it, the score is the function's ``timeout_value`` (default NaN)
            with ``Outcome.timeout``.
        wall_s: wall-clock time of the same, for functions that wait; default 3 · cpu_s + 1, so that a loaded machine does not
            turn right answers into timeouts. Beyond it, the completion is unscored.
        memory_mb: memory a worker may allocate beyond its imports.

    A part's own ``limits`` change these three for it; ``grpo.rewards.limits`` says what a batch function may take.

    Raises:
        ValueError: a limit that cannot work.
    """

    def __init__(
        self, parts: Sequence[RewardPart], num_workers: int = 0, cpu_s: float = 5.0, wall_s: float | None = None, memory_mb: int = 2048
    ) -> None:
        if not parts:
            raise ValueError("a reward runtime takes at least one part")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 1 or more, or 0 for one a core")
        self._parts = tuple(parts)
        self._num_workers = num_workers or min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
        general = RewardLimits(cpu_s=cpu_s, wall_s=wall_s, memory_mb=memory_mb)
        self._limits = tuple(_limits_of(part, general) for part in parts)
        self._start = encode(Start(parts=self._parts, limits=self._limits))
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._closed = False
        self._workers = [WorkerProcess(self._start) for _ in range(self._num_workers + 1)]

    def score(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Score]]:
        """One ``{part's name: score}`` for each completion, in their order. ``problems[i]`` is the problem of ``completions[i]``."""
        judged = self.judge(completions, problems, progress)
        return [{name: judgement.score for name, judgement in by_name.items()} for by_name in judged]

    def judge(
        self,
        completions: Sequence[Completion],
        problems: Sequence[Problem],
        progress: Progress | None = None,
        parts: Sequence[str] | None = None,
    ) -> list[dict[str, Judgement]]:
        """``score`` with the time that each score took; by these parts only, if they are named."""
        names = [part.name for part in self._parts if parts is None or part.name in parts]
        jobs = deque(self._jobs(completions, problems, names))
        judged: list[dict[str, Judgement]] = [{} for _ in completions]
        with self._lock:
            if self._closed:
                raise RuntimeError("this reward runtime is closed")
            try:
                num_done = 0 if names else len(judged)
                while num_done < len(judged):
                    if self._closed:
                        raise RuntimeError("this reward runtime was closed while it scored")
                    if progress is not None:
                        progress(num_done, len(judged))
                    self._dispatch(jobs)
                    for result in self._collect(jobs):
                        for row, score in zip(result.rows, result.scores, strict=True):
                            judged[row][self._parts[result.part].name] = Judgement(score, result.seconds / len(result.rows))
                            if len(judged[row]) == len(names):
                                num_done += 1
                                if progress is not None:
                                    progress(num_done, len(judged))
            finally:  # only after an exception is anyone still busy, with tasks that nobody waits for
                for worker in [worker for worker in self._workers if worker.jobs]:
                    self._replace(worker)
        return [{name: by_name[name] for name in names} for by_name in judged]

    async def score_async(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Score]]:
        """``score`` in a thread, so that the event loop goes on."""
        return await asyncio.to_thread(self.score, completions, problems, progress)

    def close(self) -> None:
        """End all workers, and whatever they started. A ``score`` under way in another thread ends with RuntimeError."""
        self._closed = True
        with self._lock:
            while self._workers:
                self._workers.pop().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _jobs(self, completions: Sequence[Completion], problems: Sequence[Problem], names: Sequence[str]) -> list[Job]:
        """Batches first: they take longest. An empty call has no job."""
        if len(completions) != len(problems):
            raise ValueError(f"{len(completions)} completions but {len(problems)} problems; give one problem for each completion")
        _check_pairs(completions, problems)
        wanted = [index for index, part in enumerate(self._parts) if part.name in names]
        batched = [index for index in wanted if self._parts[index].style.whole_batch]
        singly = tuple(index for index in wanted if index not in batched)
        jobs = []
        if batched and completions:
            payload = _payload(completions, problems)
            jobs += [Job(rows=tuple(range(len(completions))), parts=(index,), payload=payload) for index in batched]
        if singly:
            jobs += [
                Job(rows=(row,), parts=singly, payload=_payload([completion], [problem]))
                for row, (completion, problem) in enumerate(zip(completions, problems, strict=True))
            ]
        return jobs

    def _dispatch(self, jobs: deque[Job]) -> None:
        num_free = self._num_workers - sum(bool(worker.jobs) for worker in self._workers)
        for worker in [worker for worker in self._workers if worker.idle][:num_free]:
            size = min(max(len(jobs) // (4 * self._num_workers), 1), _JOBS_PER_MESSAGE, len(jobs))  # small at the end: all finish together
            if jobs and len(jobs[0].rows) > 1:
                size = 1  # nothing waits behind a batch
            if size:
                worker.assign([jobs.popleft() for _ in range(size)])

    def _collect(self, jobs: deque[Job]) -> list[Result]:
        """Wait up to a tick; return what came in, and a verdict for each task whose worker had to be replaced.

        What else a replaced worker held goes back to the head of ``jobs``.
        """
        started = time.monotonic()
        exchange(self._workers, timeout=TICK_S)
        passed = min(time.monotonic() - started, _LONGEST_TICK_S)
        for worker in self._workers:
            worker.waited += passed
        results = [result for worker in self._workers for result in worker.take_results()]
        for worker in list(self._workers):
            if worker.exhausted:
                results += self._replace_and_requeue(worker, None, jobs)
            elif verdict := worker.verdict(self._limits):
                results += self._replace_and_requeue(worker, verdict, jobs)
        return results

    def _replace_and_requeue(self, worker: WorkerProcess, verdict: Score | None, jobs: deque[Job]) -> list[Result]:
        """End a worker; blame the task it is at for the verdict, if there is one and the task did not end in the meantime."""
        self._failed_starts = 0 if any(other.ready for other in self._workers) else self._failed_starts + 1
        if verdict is not None and self._failed_starts >= _START_ATTEMPTS:
            raise RuntimeError(f"reward workers do not start: {verdict.detail}; what they say is on standard error")
        waited = worker.waited
        self._replace(worker)
        results = list(worker.take_results())  # what it could still send
        in_time = bool(results) and verdict is not None and verdict.outcome is Outcome.timeout
        if worker.jobs and verdict is not None and not in_time:
            rows, part = worker.jobs[0].rows, worker.jobs[0].parts[0]
            results.append(Result(rows=rows, part=part, scores=(verdict,) * len(rows), seconds=waited, cpu_clock=math.nan))
            worker.part_done()
        jobs.extendleft(reversed(worker.jobs))
        worker.jobs.clear()
        return results

    def _replace(self, worker: WorkerProcess) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = WorkerProcess(self._start)


def _limits_of(part: RewardPart, general: RewardLimits) -> RewardLimits:
    try:
        return general.with_changes(part.limits)
    except ValueError as error:
        raise ValueError(f"reward.{part.name}.limits: {error}") from error


def _check_pairs(completions: Sequence[Completion], problems: Sequence[Problem]) -> None:
    for completion, problem in zip(completions, problems, strict=True):
        if completion.problem_id != problem.id:
            raise ValueError(f"completion {completion.index} of problem {completion.problem_id!r} was given problem {problem.id!r}")


def _payload(completions: Sequence[Completion], problems: Sequence[Problem]) -> bytes:
    try:
        return pickle.dumps((completions, problems), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        which = f"problem {problems[0].id!r}" if len(problems) == 1 else f"one of {len(problems)} problems"
        raise ValueError(f"{which} cannot be sent to a reward worker: {error}; its columns must be picklable") from error
