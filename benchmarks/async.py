"""What sampling ahead of training gives: time and idleness by pacing alone, and what it does to learning.

    python benchmarks/async.py pacing [--updates 40]
    python benchmarks/async.py learning [--recipe r1_zero_arithmetic] [--staleness 0,1,2,4] [--runs runs] [OVERRIDE …]

pacing: the collectors as they are, with an engine and an update that take time and no cores, as on a machine whose engines and trainer
have GPUs of their own: 64 sequences at once, 10 ms a token for all of them, 16 groups of 8 with log-normal lengths (median 60 tokens,
σ = 0.9, at most 1,000: the longest of a batch is about ten times the median), an update of 1.5 s.
The trainer's idleness is the share of time in which it waits for groups, the engine's that in which it has nothing to sample.

learning: a recipe on this machine for each staleness, with the sampler's correction and without. A run that is there is not made again.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from grpo.data import ProblemSource
from grpo.metrics import staleness_metrics
from grpo.rollouts.base import Progress
from grpo.rollouts.collect import Collector, Groups
from grpo.rollouts.dialogue import PlainText
from grpo.rollouts.paced import PacedCollector
from grpo.rollouts.scripted import ScriptedEngine
from grpo.run import RunFolder
from grpo.toy import Characters
from grpo.types import Completion, Problem, Sampling, Score

BATCH, SAMPLES, WIDTH, LONGEST = 16, 8, 64, 1000
MEDIAN, SIGMA, STEP_S, UPDATE_S = 60, 0.9, 0.01, 1.5


def length(problem: str, index: int) -> int:
    return min(max(int(random.Random(f"{problem}/{index}").lognormvariate(0, SIGMA) * MEDIAN), 1), LONGEST)


class NoJudgement:
    """Rewards that cost nothing."""

    def score(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Score]]:
        return [{"reward": Score(value=0.0)}] * len(completions)


def pacing(updates: int) -> None:
    problems = [Problem(id=f"p{i}", prompt=f"p{i}", answer="") for i in range(BATCH * (updates + 8))]
    drawn = sorted(length(p.id, i) for p in problems for i in range(SAMPLES))
    print(f"lengths: median {drawn[len(drawn) // 2]}, mean {sum(drawn) / len(drawn):.0f}, longest {drawn[-1]}")
    busy = BATCH * SAMPLES * sum(drawn) / len(drawn) / WIDTH * STEP_S
    print(f"a batch at full width takes the engine {busy:.2f} s, an update {UPDATE_S:.2f} s: no pacing can be quicker than the longer\n")
    print("| max_staleness | s a step | trainer idle | engine idle | staleness, mean | max |\n|---|---|---|---|---|---|")
    for k in (0, 1, 2, 4):
        print("| " + " | ".join(measure(k, updates, problems)) + " |", flush=True)


def measure(k: int, updates: int, problems: Sequence[Problem]) -> list[str]:
    tokenizer = Characters()
    engine = ScriptedEngine(tokenizer, lambda prompt, index, seed: "x" * length(prompt, index), slots=WIDTH, step_s=STEP_S)
    groups = Groups(
        engine=engine,
        runtime=NoJudgement(),
        dialogue=PlainText(tokenizer),
        sampling=Sampling(max_new_tokens=LONGEST),
        completions_per_problem=SAMPLES,
        weights={"reward": 1.0},
        seed=0,
    )
    source = ProblemSource(problems, 0)
    collector: Any = (
        PacedCollector(groups=groups, source=source, batch=BATCH, max_staleness=k) if k else Collector(groups=groups, source=source)
    )
    waited, ages, oldest, tokens, start = 0.0, 0.0, 0.0, 0, 0.0
    warm = 3  # updates until as much is ahead as may be
    with closing(collector):
        for step in range(1, warm + updates + 1):
            if step == warm + 1:
                start = time.monotonic()
            with collector.resting():
                engine.load_weights({}, step - 1)
            batch = collector.collect(collector.take(BATCH), step)
            time.sleep(UPDATE_S)
            collector.used()
            if step > warm:
                waited += sum(collector.timings.values())
                stale = staleness_metrics(batch, step - 1)
                ages += stale["rollout/staleness_mean"]
                oldest = max(oldest, stale["rollout/staleness_max"])
                tokens += sum(len(r.completion.token_ids) for g in batch for r in g.rollouts)
        seconds = time.monotonic() - start
    used = tokens / WIDTH * STEP_S / seconds  # of the engine's places in a token's time
    return [str(k), f"{seconds / updates:.2f}", f"{waited / seconds:.0%}", f"{1 - used:.0%}", f"{ages / updates:.2f}", f"{oldest:.0f}"]


def learning(recipe: str, staleness: Sequence[int], folder: Path, overrides: Sequence[str]) -> None:
    print("| max_staleness | corrected | s a step | waiting | staleness | pass@1 at each evaluation |\n|---|---|---|---|---|---|")
    for k in staleness:
        for corrected in (True, False):
            name = f"async_{k}_{'corrected' if corrected else 'plain'}"
            if not (folder / recipe / name / "report.html").is_file():
                command = [sys.executable, "-m", "grpo.cli", "train", recipe, f"run.name={name}", f"run.dir={folder}", "logger=quiet"]
                command += ["run.checkpoint_every=0", f"rollout.max_staleness={k}", *overrides]
                command += [] if corrected else ["~algo.correction.tis"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            cells = [str(k), "yes" if corrected else "no", *summary(RunFolder.open(folder / recipe / name))]
            print("| " + " | ".join(cells) + " |", flush=True)


def summary(run: RunFolder) -> list[str]:
    """Seconds a step, the share in which the loop waited for rollouts, mean staleness, and the curve."""
    rows = [row for row in run.read_metrics() if "policy/loss" in row]
    seconds = sum(row["time/step"] - row.get("time/eval", 0.0) - row.get("time/checkpoint", 0.0) for row in rows)
    waited = sum(row.get("time/generate", 0.0) + row.get("time/reward", 0.0) + row.get("time/wait", 0.0) for row in rows)
    stale = sum(row["rollout/staleness_mean"] for row in rows) / len(rows)
    curve = ", ".join(f"{row['eval/pass@1']:.2f}" for row in run.read_metrics() if "eval/pass@1" in row)
    return [f"{seconds / len(rows):.1f}", f"{waited / seconds:.0%}", f"{stale:.2f}", curve]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pacing")
    command.add_argument("--updates", type=int, default=40)
    command = commands.add_parser("learning")
    command.add_argument("--recipe", default="r1_zero_arithmetic")
    command.add_argument("--staleness", type=lambda text: [int(k) for k in text.split(",")], default=[0, 1, 2, 4])
    command.add_argument("--runs", type=Path, default=Path("runs"))
    options, overrides = parser.parse_known_args()
    if options.command == "pacing":
        pacing(options.updates)
    else:
        learning(options.recipe, options.staleness, options.runs, overrides)


if __name__ == "__main__":
    main()
