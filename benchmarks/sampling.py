"""What sampling a step's rollouts takes on a CPU, and what the engine's threads have to do with it.

    python benchmarks/sampling.py [--repeats 4]

16 problems × 8 completions of the recipe ``r1_zero_arithmetic`` at temperature 1, by vLLM in a process of its own for each side, with an
engine's threads and with all cores. Printed is the best of ``--repeats``, after one that warms up.

as it is:  the engine as a run starts it.
sleeping:  threads that sleep as soon as they have nothing to do (``OMP_WAIT_POLICY=PASSIVE`` alone).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import closing

from grpo.environment import usable_cores
from grpo.rollouts.actor import engine_environment

SIDES: dict[str, tuple[str, ...]] = {"as it is": (), "sleeping": ("GOMP_SPINCOUNT",)}  # which variables an engine does not get


def measure(repeats: int) -> list[float]:
    from transformers import AutoTokenizer

    from grpo.models import resolve_model
    from grpo.plan import load_split, plan
    from grpo.recipe import load_recipe
    from grpo.rollouts.vllm import VLLMEngine
    from grpo.types import Request, Sampling

    config = load_recipe("r1_zero_arithmetic")
    rollout, folder = config.rollout, resolve_model(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = [
        Request(
            problem_id=problem.id,
            prompt_ids=tuple(tokenizer(problem.prompt).input_ids),
            num_completions=rollout.completions_per_problem,
            seed=seed,
        )
        for seed, problem in enumerate(load_split(plan(config), "train")[: rollout.problems_per_step])
    ]
    sampling = Sampling(max_new_tokens=rollout.max_new_tokens, stop=tuple(rollout.stop))
    taken = []
    with closing(VLLMEngine(folder, dtype="bfloat16", engine_args=dict(rollout.engine_args))) as engine:
        for _ in range(repeats + 1):
            engine.forget()
            start = time.perf_counter()
            engine.generate(requests, sampling)
            taken.append(time.perf_counter() - start)
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(measure(a.repeats)))
        return
    base = 0.0
    for side, without in SIDES.items():
        environment = {name: value for name, value in (os.environ | engine_environment(usable_cores())).items() if name not in without}
        command = [sys.executable, __file__, "--child", "--repeats", str(a.repeats)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side} failed\n{done.stderr[-3000:]}")
        seconds = json.loads(done.stdout.splitlines()[-1])
        base = base or min(seconds)
        print(
            f"{side:10} {min(seconds):.2f} s, {min(seconds) / base:.2f} × as it is (all: {', '.join(f'{s:.2f}' for s in seconds)})",
            flush=True,
        )


if __name__ == "__main__":
    main()
