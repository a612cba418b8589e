"""A reward worker: a process that loads the reward functions once and scores what it is sent, until its parent is gone.

Started by ``grpo.rewards.runtime`` as ``python -m grpo.rewards.worker FD PARENT``. It is replaceable at any moment: the parent
kills it when a task overstays, and nothing in here needs to survive that.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo.imports import FunctionRef
from grpo.rewards.base import attribute, call, describe
from grpo.rewards.wire import Job, Ready, Result, Start, encode, receive
from grpo.types import Completion, Outcome, Problem, Score

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
    functions = [load(ref) for ref in start.refs]
    _limit_memory(start.memory_mb)
    timeout_values = tuple(float(attribute(function, "timeout_value", math.nan)) for function in functions)
    channel.sendall(encode(Ready(timeout_values=timeout_values, cpu_clock=time.process_time())))
    while True:
        for job in receive(channel):
            _work(channel, job, functions, start.cpu_s)


def _work(channel: socket.socket, job: Job, functions: Sequence[Callable[..., Any]], cpu_s: float) -> None:
    for part in job.parts:
        _limit_cpu(cpu_s)
        score = _score(functions[part], job.payload)
        channel.sendall(encode(Result(index=job.index, part=part, score=score, cpu_clock=time.process_time())))


def _score(function: Callable[..., Any], payload: bytes) -> Score:
    try:
        completion, problem = pickle.loads(payload)  # once a part: what one part does to the columns, the next does not see
    except Exception as error:  # a column whose class exists only in the trainer's process
        return Score(value=math.nan, outcome=Outcome.error, detail=describe(error))
    return call(function, completion, problem)


def load(ref: FunctionRef) -> Callable[..., Any]:
    """The function, warmed up. If it does not load here, a function that says so for every completion."""
    if ref.source is not None:  # so that a traceback shows the user's line although the file need not exist here
        path = ref.target.rpartition(":")[0]
        linecache.cache[path] = (len(ref.source), None, ref.source.splitlines(keepends=True), path)
    try:
        function = ref.load()
        attribute(function, "warm_up", _nothing)()
        return function
    except (Exception, SystemExit) as error:
        failure = Score(value=math.nan, outcome=Outcome.error, detail=describe(error))

    def not_loaded(completion: Completion, problem: Problem) -> Score:
        return failure

    return not_loaded


def _nothing() -> None:
    pass


def _limit_memory(memory_mb: int) -> None:
    """Let the functions allocate this much beyond what their imports mapped (torch alone maps gigabytes that it never uses)."""
    statm = Path("/proc/self/statm")
    mapped = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    limit = mapped + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


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
