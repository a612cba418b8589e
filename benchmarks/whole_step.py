"""A whole training step – rollouts, rewards, update, weight sync – by this toolkit and by TRL's GRPOTrainer on the same problems.

    python benchmarks/whole_step.py [--side ours|trl|both] [--steps 3] [--cap 16]

Both train SmolLM2-135M-Instruct on the sums of the recipe ``r1_zero_arithmetic``: 16 problems × 8 completions of at most 48 tokens at
temperature 1, with the recipe's prompts (two worked examples).

ours: the recipe as it stands, with vLLM as the engine, in ``grpo train``, with its two rewards. Timed: ``time/step`` of its metrics.
trl:  its defaults, with its transformers sampler, 8 rollouts a micro-batch, no activation checkpointing (slower), and a reward that costs
      nothing. Its sampler takes no stop string, so its completions go on to 48 tokens or an end token. Timed: from ``on_step_begin`` to
      ``on_step_end``.

The best of the steps after the first counts; the first, if it was the only one. Each side is a process of its own. It is ended when its
resident memory, that of its children included, passes ``--cap`` GiB: then the steps it finished are reported, and that it was ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 2**30
PROBLEMS, SAMPLES, LONGEST = 16, 8, 48


def ours(steps: int, scratch: Path) -> None:
    from grpo.cli import main

    overrides = [f"run.dir={scratch}", "run.name=bench", f"run.steps={steps}", "eval.problems=0", "logger=quiet"]
    if status := main(["train", "r1_zero_arithmetic", *overrides]):
        raise SystemExit(status)


def ours_seconds(scratch: Path) -> list[float]:
    files = list(scratch.rglob("metrics.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [row["time/step"] for row in rows if "time/step" in row]


def trl(steps: int, scratch: Path) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo.models import resolve_model
    from grpo.plan import load_split, plan
    from grpo.recipe import load_recipe

    config = load_recipe("r1_zero_arithmetic")
    folder, checked = resolve_model(config.model.path), plan(config)
    rows = load_split(checked, "train")[: PROBLEMS * steps]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(f"<answer>{a}</answer>" in c.replace(" ", "")) for c, a in zip(completions, answer, strict=True)]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            with (scratch / "seconds").open("a") as file:
                file.write(f"{time.perf_counter() - self.start}\n")

    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=right,
        train_dataset=Dataset.from_dict({"prompt": [p.prompt for p in rows], "answer": [p.answer for p in rows]}),
        args=GRPOConfig(
            output_dir=str(scratch),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=PROBLEMS * SAMPLES // 8,
            num_generations=SAMPLES,
            max_completion_length=LONGEST,
            max_steps=steps,
            learning_rate=3e-5,
            beta=0.0,
            loss_type="dapo",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        callbacks=[Clock()],
    ).train()


def trl_seconds(scratch: Path) -> list[float]:
    file = scratch / "seconds"
    return [float(line) for line in file.read_text().splitlines()] if file.exists() else []


SIDES = {"ours": (ours, ours_seconds), "trl": (trl, trl_seconds)}


def resident(root: int) -> int:
    """Bytes of this process and all that descend from it; memory they share is counted once for each."""
    parents, sizes = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            pages = (folder / "statm").read_text().split()
        except (OSError, IndexError):
            continue  # it has ended
        sizes[int(folder.name)] = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    return sum(size for process, size in sizes.items() if _descends(process, root, parents))


def _descends(process: int, root: int, parents: Mapping[int, int]) -> bool:
    while process in parents and process != root:
        process = parents[process]
    return process == root


def measure(side: str, steps: int, cap: float) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "log").open("w")  # noqa: SIM115 – as long as the process
        command = [sys.executable, __file__, "--child", scratch, "--side", side, "--steps", str(steps)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        peak, ended = 0, False
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            if peak > cap * GIB and not ended:
                ended = True
                process.terminate()  # ours then stops its engine as well
            time.sleep(0.5)
        seconds = SIDES[side][1](Path(scratch))
        tail = "" if seconds or ended else "\n" + Path(scratch, "log").read_text()[-2000:]
    how = f"ended at {cap:g} GiB" if ended else f"exit code {process.returncode}"
    taken = ", ".join(f"{s:.1f}" for s in seconds) or "none finished"
    best = f"{min(seconds[1:] or seconds):.1f} s a step" if seconds else "no step"
    return f"{side:5} {best} (steps: {taken}); {peak / GIB:.1f} GiB beside shared memory; {how}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cap", type=float, default=16.0, help="GiB")
    parser.add_argument("--child", metavar="FOLDER", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        SIDES[a.side][0](a.steps, Path(a.child))
        return
    for side in SIDES if a.side == "both" else [a.side]:
        print(measure(side, a.steps, a.cap), flush=True)


if __name__ == "__main__":
    main()
