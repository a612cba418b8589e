"""A reward worker: a process that loads the reward functions once and scores what it is sent, until its parent is gone.

Started by ``grpo.rewards.worker_process`` as ``python -m grpo.rewards.worker FD PARENT``. It is replaceable at any moment: the parent
kills it when a task overstays, and nothing in here needs to survive that.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import math
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.rewards.adapters import Scorer, scorer
from grpo.rewards.base import RewardPart, attribute, describe
from grpo.rewards.limits import RewardLimits
from grpo.rewards.wire import Job, Ready, Result, Start, encode, receive
from grpo.types import Outcome, Score

_PARENT_CHECK_S = 0.5


def main(fd: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    # The connection ends when the parent closes the runtime, or dies.
    with socket.socket(fileno=fd) as channel, contextlib.suppress(EOFError, ConnectionError):
        channel.set_inheritable(False)  # else a program that a reward starts would keep the connection open
        serve(channel, receive(channel))


def serve(channel: socket.socket, start: Start) -> None:
    parts = [load(part) for part in start.parts]
    imports = _mapped_bytes()
    timeout_values = tuple(part.timeout_value for part in parts)
    channel.sendall(encode(Ready(timeout_values=timeout_values, cpu_clock=time.process_time())))
    while True:
        for job in receive(channel):
            for part in job.parts:
                channel.sendall(encode(_work(job, part, parts[part].score, start.limits[part], imports)))


def _work(job: Job, part: int, score: Scorer, limits: RewardLimits, imports: int) -> Result:
    allowed = limits.memory_mb * 2**20
    _limit_memory(imports + allowed)
    _limit_cpu(limits.for_batch(len(job.rows)).cpu_s)
    started = time.perf_counter()
    scores = _score(score, job)
    seconds = time.perf_counter() - started
    out_of_memory = any(score.outcome is Outcome.memory for score in scores)
    return Result(
        rows=job.rows,
        part=part,
        scores=tuple(scores),
        seconds=seconds,
        cpu_clock=time.process_time(),
        exhausted=out_of_memory and _mapped_bytes() > imports + allowed // 2,
    )


def _score(score: Scorer, job: Job) -> list[Score]:
    try:
        completions, problems = pickle.loads(job.payload)  # once a part: what one part does to the columns, the next does not see
    except Exception as error:  # a column whose class exists only in the trainer's process
        return _failed(error, len(job.rows))
    return score(completions, problems)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A part that can be called, and what its function says a completion is worth on which it ran out of CPU time."""

    score: Scorer
    timeout_value: float = math.nan


def load(part: RewardPart) -> Loaded:
    """The part's function, warmed up. If it does not load here, one that says so for every completion."""
    if part.ref.source is not None:  # so that a traceback shows the user's line although the file need not exist here
        path = part.ref.target.rpartition(":")[0]
        linecache.cache[path] = (len(part.ref.source), None, part.ref.source.splitlines(keepends=True), path)
    try:
        function = part.ref.load()
        _warm_up(function, part)
        return Loaded(scorer(function, part.style, part.columns), float(attribute(function, "timeout_value", math.nan)))
    except (Exception, SystemExit) as error:
        failure = _failed(error, 1)
    return Loaded(lambda completions, problems: failure * len(completions))


def _failed(error: BaseException, num_completions: int) -> list[Score]:
    outcome = Outcome.memory if isinstance(error, MemoryError) else Outcome.error
    return [Score(value=math.nan, outcome=outcome, detail=describe(error))] * num_completions


def _warm_up(function: Callable[..., Any], part: RewardPart) -> None:
    warm_up = attribute(function, "warm_up", None)
    if warm_up is not None:
        taken = inspect.signature(warm_up).parameters.values()
        names = {p.name for p in taken}
        everything = any(p.kind is p.VAR_KEYWORD for p in taken)
        warm_up(**{name: value for name, value in part.ref.kwargs.items() if everything or name in names})


def _mapped_bytes() -> int:
    """What this process has mapped; 0 where there is no /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0


def _limit_memory(limit: int) -> None:
    """Counted from what the imports mapped (torch alone maps gigabytes that it never uses)."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _limit_cpu(cpu_s: float) -> None:
    """The parent keeps the deadline. This is for the worker whose parent died while it computes: the kernel ends it."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + cpu_s) + 1, hard))


def _end_with_parent(parent: int) -> None:
    """End this worker and all that it started once its parent has died.

    PR_SET_PDEATHSIG would do this too soon: it fires when the *thread* that started the worker ends.
    """
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(fd=int(sys.argv[1]), parent=int(sys.argv[2]))
