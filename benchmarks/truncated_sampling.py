"""What training on truncated sampling costs: the size of the kept sets, the time of an update, and the mismatch without them.

    python benchmarks/truncated_sampling.py [OVERRIDE …]

One batch of ``r1_zero_arithmetic``, sampled by vLLM in this process with each truncation; the policy's update on it, and its log-probs
over the kept sets and over the whole vocabulary beside those of the engine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from grpo.aggregation import token_mean
from grpo.batch import Batch, collate
from grpo.kept import unpack
from grpo.losses import Loss
from grpo.models import resolve_model
from grpo.objectives import clipped_surrogate
from grpo.parts import load_model, train_sampling
from grpo.plan import load_both_splits, plan
from grpo.policy import HFPolicy, OptimSettings
from grpo.recipe import load_recipe
from grpo.rollouts.base import Engine
from grpo.rollouts.vllm import VLLMEngine
from grpo.types import Completion, Group, Problem, Request, Rollout, Sampling

CUTS: Sequence[dict[str, float]] = ({}, {"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.05}, {"top_p": 0.95, "temperature": 1.5})


def main(overrides: Sequence[str]) -> None:
    config = load_recipe("r1_zero_arithmetic", *overrides)
    folder = resolve_model(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = load_both_splits(plan(config))[0][: config.rollout.problems_per_step]
    engine = VLLMEngine(folder, max_model_len=512, engine_args={"kv_cache_memory_bytes": 384 << 20})
    print(f"{'':<32} {'tokens':>7} {'mean ids':>9} {'bytes a token':>14} {'update':>8} {'|Δ| kept':>9} {'|Δ| whole':>10}")
    for cut in CUTS:
        sampling = replace(train_sampling(config), **cut)  # type: ignore[arg-type]
        batch = sampled(engine, tokenizer, problems, config.rollout.completions_per_problem, sampling)
        policy = HFPolicy(
            load_model(folder, config),
            OptimSettings(lr=0.0),
            dtype=torch.bfloat16,
            temperature=sampling.temperature,
            tokens_per_microbatch=config.trainer.tokens_per_microbatch,
        )
        seconds = min(update_seconds(policy, batch) for _ in range(2))
        kept = [one for rollout in batch.rollouts for one in rollout.completion.kept]
        ids = np.mean([len(unpack(one, len(tokenizer))) for one in kept]) if kept else len(tokenizer)
        size = sum(map(len, kept)) / batch.num_tokens
        gaps = [gap(policy, some) for some in (batch, without_kept(batch))]
        name = ", ".join(f"{key} {value}" for key, value in cut.items()) or "the whole vocabulary"
        print(f"{name:<32} {batch.num_tokens:>7} {ids:>9.1f} {size:>14.1f} {seconds:>6.1f} s {gaps[0]:>9.4f} {gaps[1]:>10.4f}", flush=True)
    engine.close()


def sampled(engine: Engine, tokenizer: Any, problems: Sequence[Problem], samples: int, sampling: Sampling) -> Batch:
    """Groups with rewards 0 and 1 by turns: every completion is trained on."""
    requests = [
        Request(problem_id=p.id, prompt_ids=tuple(tokenizer(p.prompt).input_ids), num_completions=samples, seed=i)
        for i, p in enumerate(problems)
    ]
    completions = engine.generate(requests, sampling)
    batch = collate([group(p, completions[i * samples : (i + 1) * samples]) for i, p in enumerate(problems)])
    return batch.with_advantages(lambda rewards, index: rewards - 0.5)


def group(problem: Problem, completions: Sequence[Completion]) -> Group:
    return Group(
        problem=problem,
        rollouts=tuple(Rollout(problem=problem, completion=c, scores={}, reward=float(c.index % 2)) for c in completions),
    )


def update_seconds(policy: HFPolicy, batch: Batch) -> float:
    start = time.perf_counter()
    policy.update(batch, Loss(objective=clipped_surrogate, aggregate=token_mean))
    return time.perf_counter() - start


def gap(policy: HFPolicy, batch: Batch) -> float:
    return float((policy.score(batch).logprobs - batch.behavior_logprobs).abs().mean())


def without_kept(batch: Batch) -> Batch:
    return replace(batch, rollouts=tuple(replace(r, completion=replace(r.completion, kept=())) for r in batch.rollouts))


if __name__ == "__main__":
    main(sys.argv[1:])
