"""Does the thinking do the work? The same model on the same held-out problems, once as trained and once with an empty think part.

    python benchmarks/without_thinking.py runs/r1_zero_arithmetic/NAME [--samples 2]

The second prompt ends with `<think></think> <answer>`, so that the model must answer at once; its examples are those of the first.
"""

from __future__ import annotations

import argparse
import re
from contextlib import ExitStack
from pathlib import Path

from grpo import checkpoint, parts
from grpo.interrupt import StopSignal
from grpo.machine import machine, without_trainer
from grpo.plan import load_split, plan
from grpo.recipe import load_run
from grpo.rewards.math import math_equal
from grpo.rollouts.collect import request_seed
from grpo.run import RunFolder
from grpo.types import Request

SKIPPED = " <think></think> <answer>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=2)
    options = parser.parse_args()
    run = RunFolder.open(options.run)
    folder = str(run.checkpoint(checkpoint.steps(run)[-1]))
    config = without_trainer(load_run(options.run))
    problems = load_split(plan(config), "heldout")[: config.eval.problems]
    with StopSignal() as stop, ExitStack() as stack:
        tokenizer = parts.make_tokenizer(folder, config)
        engine = parts.make_engine(config, folder, tokenizer, machine(config), stack, stop)
        for name, ending in (("thinking", ""), ("without thinking", SKIPPED)):
            requests = [
                Request(
                    problem_id=p.id,
                    prompt_ids=tuple(tokenizer(p.prompt + ending).input_ids),
                    num_completions=options.samples,
                    seed=request_seed(parts.EVAL_SEED, 0, p.id),
                )
                for p in problems
            ]
            gold = {p.id: p.answer for p in problems}
            completions = engine.generate(requests, parts.eval_sampling(config))
            answers = [(gold[c.problem_id], re.search(r"<answer>(.*?)</answer>", ending + c.text, re.DOTALL)) for c in completions]
            right = sum(found is not None and math_equal(answer, found[1].strip()) for answer, found in answers)
            print(f"{name}: {right / len(answers):.3f} of {len(answers)} completions are right; e.g. {(ending + completions[0].text)!r}")


if __name__ == "__main__":
    main()
