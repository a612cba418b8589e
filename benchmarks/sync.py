"""What a weight sync takes: in one process, in an engine's process by every back-end, and as a share of a run's steps.

    python benchmarks/sync.py [--model FOLDER] [--side process|shared_memory|disk|gloo|all] [--repeats 7]
    python benchmarks/sync.py --run runs/r1_zero_arithmetic/NAME

The first form loads the recipe's model (SmolLM2-135M, 269 MB in bfloat16) into vLLM ``--repeats`` times, each with the whole proof, and
prints the best wall time beside its ratio to that in one process. *process*: trainer and engine in one. The others: a pool of one engine,
with all cores. The first load of each is not counted: it maps memory. The second form reads ``time/sync`` (with the probe) and
``time/step`` of a run's metrics and prints the share of all steps' time, evaluations included, and that of single steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

SIDES = ("process", "shared_memory", "disk", "gloo")


def measure(side: str, model: str, repeats: int) -> tuple[list[float], dict[str, float]]:
    """Seconds of every load but the first, and what the last one proved."""
    import torch
    from transformers import AutoModelForCausalLM

    from grpo.rollouts.vllm import VLLMEngine

    arguments: dict[str, Any] = {
        "model_path": model,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "engine_args": {"kv_cache_memory_bytes": 384 << 20},
    }
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    weights = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
    with ExitStack() as stack:
        engine = stack.enter_context(closing(VLLMEngine(**arguments) if side == "process" else pool(side, arguments, stack)))
        times = []
        for version in range(repeats + 1):
            start = time.perf_counter()
            report = engine.load_weights(weights, version)
            times.append(time.perf_counter() - start)
    return times[1:], report.metrics()


def pool(side: str, arguments: dict[str, Any], stack: ExitStack) -> Any:
    from grpo.environment import usable_cores
    from grpo.rollouts.peer import PeerToPeer
    from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
    from grpo.rollouts.transfer import Disk, SharedMemory, Transfer
    from grpo.rollouts.vllm import VLLMEngine

    start_ray(num_cpus=usable_cores())
    stack.callback(stop_ray)
    makers: dict[str, Callable[[], Transfer]] = {
        "shared_memory": SharedMemory,
        "disk": lambda: Disk(stack.enter_context(tempfile.TemporaryDirectory())),
        "gloo": lambda: stack.enter_context(closing(PeerToPeer("gloo"))),
    }
    return EnginePool(num_engines=1, cpus_per_engine=usable_cores(), factory=VLLMEngine, kwargs=arguments, transfer=makers[side]())


def share(run: Path) -> str:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["time/sync"], row["time/step"]) for row in rows if "time/sync" in row and "time/step" in row]
    if not steps:
        return f"{run} has no step with a sync"
    shares = [100 * sync / step for sync, step in steps]
    syncs, _ = zip(*steps, strict=True)
    all_steps = sum(row.get("time/step", 0.0) for row in rows)
    tested = [f"; self-test {row['time/self_test']:.1f} s" for row in rows if "time/self_test" in row]
    return (
        f"sync {sum(syncs):.1f} s of the {all_steps:.0f} s of all steps, {100 * sum(syncs) / all_steps:.1f} %; "
        f"of the {len(steps)} steps that had one {statistics.median(syncs):.2f} s and {statistics.median(shares):.1f} % in the median, "
        f"{min(shares):.1f} to {max(shares):.1f} %"
        + "".join(tested[:1])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face folder; without it, that of the recipe r1_zero_arithmetic")
    parser.add_argument("--side", choices=[*SIDES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--run", type=Path, help="a run folder")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.run:
        print(share(a.run))
        return
    if a.child:
        print(json.dumps(measure(a.side, a.model, a.repeats)))
        return
    if a.model is None:
        from grpo.models import resolve_model
        from grpo.recipe import load_recipe

        a.model = resolve_model(load_recipe("r1_zero_arithmetic").model.path)
    base = None
    for side in SIDES if a.side == "all" else [a.side]:
        seconds, proven = run_apart(side, a.model, a.repeats)
        base = min(seconds) if side == "process" else base
        ratio = f", {min(seconds) / base:.2f} × process" if base and side != "process" else ""
        read = f"{proven['sync/tensors_read_back']:.0f} of {proven['sync/tensors']:.0f} tensors read back"
        print(f"{side:14} {min(seconds):.2f} s{ratio} (all: {', '.join(f'{s:.2f}' for s in seconds)}); {read}", flush=True)


def run_apart(side: str, model: str, repeats: int) -> tuple[list[float], dict[str, float]]:
    """In a process of its own, with the threads that an engine's process has."""
    from grpo.environment import usable_cores
    from grpo.rollouts.actor import engine_environment

    environment = os.environ | engine_environment(usable_cores())
    command = [sys.executable, __file__, "--child", "--side", side, "--model", model, "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed\n{done.stderr[-3000:]}")
    seconds, proven = json.loads(done.stdout.splitlines()[-1])
    return seconds, proven


if __name__ == "__main__":
    main()
