"""Runs of the `grpo` command that can be killed at a moment one names.

``Runs`` starts one interpreter (this file as a script), which imports the libraries once; each run is a fork of it, in a session of its
own, and takes a second instead of five. Nothing of `grpo` runs in the interpreter itself: no thread, no state is inherited.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# Where a phase begins: the function whose calls are counted. The reward's moments are in the reward function of the test.
PHASES = {
    "generation": "grpo.rollouts.collect:Collector.collect",  # of training; nearly all of it is sampling
    "generation/ahead": "grpo.rollouts.paced:PacedCollector.collect",  # sampling goes on outside it too
    "update": "grpo.learner:Learner.learn",
    "sync": "grpo.weight_sync:WeightSync.send",  # the first with the self-test, then one before each step
    "checkpoint": "grpo.trainer:Trainer.save",
    "evaluation": "grpo.trainer:Trainer.evaluate",
    "row": "grpo.run:RunFolder.append_metrics",
}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL for the whole session in call ``call`` (from 1) of a phase's function, ``share`` of the way through it.

    How long a call takes is told by the quickest before it, so a moment in the middle is a random one. 0 is before it begins, 1 after
    it has returned.
    """

    phase: str
    call: int
    share: float


class Runs:
    """``run`` gives the exit status, -9 for one that was killed."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.folder = folder
        self.log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
        )

    def run(self, *words: str, kill: Kill | None = None, pool: int = 0) -> int:
        """``pool``: of so many engines, instead of one in the trainer's process."""
        assert self._process.stdin and self._process.stdout
        job = {"words": words, "kill": asdict(kill) if kill else None, "log": str(self.log), "pool": pool}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve(jobs: Iterator[str]) -> None:
    for module in ("grpo.build", "grpo.cli", "grpo.recipe", "grpo.rollouts.hf", "grpo.rollouts.scripted", "pyarrow.parquet"):
        import_module(module)
    import_module("transformers").LlamaForCausalLM  # noqa: B018  # transformers imports a model when it is asked for
    for line in jobs:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            run(job["words"], Kill(**job["kill"]) if job["kill"] else None, job["log"], job["pool"])
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(words: Sequence[str], kill: Kill | None, log: str, pool: int) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 70
    try:
        from grpo.cli import main

        if pool:
            sample_in_a_pool(pool)
        if kill is not None:
            arm(kill)
        status = main(list(words))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def sample_in_a_pool(num_engines: int) -> None:
    """Of transformers: a recipe makes pools of vLLM alone, which take half a minute to start."""
    from grpo import build, parts
    from grpo.rollouts.hf import HFEngine
    from grpo.rollouts.pool import EnginePool

    def make_engine(config: Any, folder: str, tokenizer: Any, where: Any, stack: Any, stop: Any, *_: Any) -> EnginePool:
        parts.need_ray(config, where, stack, stop, folder)
        kwargs = {"model": folder, "dtype": where.dtype_name}
        pool = EnginePool(num_engines=num_engines, cpus_per_engine=1, factory=HFEngine, kwargs=kwargs, schedule="free")
        stack.callback(pool.close)
        return pool

    build.make_engine = make_engine


def arm(kill: Kill) -> None:
    module, _, path = PHASES[kill.phase].partition(":")
    owner: Any = import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    plain: Callable[..., Any] = getattr(owner, name)
    count, quickest = 0, 0.0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count, quickest
        count += 1
        if count == kill.call:
            if kill.share == 0:
                die()
            if kill.share < 1:
                threading.Timer(kill.share * quickest, die).start()
        start = time.monotonic()
        result = plain(*args, **kwargs)
        took = time.monotonic() - start
        quickest = took if count == 1 else min(quickest, took)
        if count == kill.call and kill.share == 1:
            die()
        return result

    setattr(owner, name, counted)


def die() -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    serve(iter(sys.stdin.readline, ""))
