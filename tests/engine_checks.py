"""What engines are asked in tests, and what their answers are held against: a forward pass of transformers, or another completion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.types import Completion, Request, Sampling

PROMPTS = ("1+2=", "What is 17 + 4?", "a", "Assistant: (3 * 5) / 2 =")
SHORT = Sampling(max_new_tokens=12)
LONG = Sampling(max_new_tokens=60)
LOGPROB_BOUND = {  # largest |Δ| seen against transformers' own forward pass in fp32, with room
    "hf": 1e-4,  # seen: 4e-6
    "vllm": 1e-4,  # seen: 4e-6
}


def counting(prompt: str, index: int, seed: int) -> str:
    return f"{prompt[:4]}{seed % 97}+{index}" * (1 + index % 3)


def requests_for(tokenizer: Any, num_completions: int = 3, seed: int = 0) -> list[Request]:
    return [
        Request(problem_id=f"p{i}", prompt_ids=tuple(tokenizer.encode(prompt)), num_completions=num_completions, seed=seed + i)
        for i, prompt in enumerate(PROMPTS)
    ]


def weights_of(folder: str, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """The checkpoint's parameters, tied ones once, with Gaussian noise of ``noise`` times their own spread."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    return {
        name: parameter.detach() + noise * parameter.detach().std().nan_to_num(0.0) * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


def reference(folder: str, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if weights is not None:
        model.load_state_dict(dict(weights), strict=False)
    return model


def true_logprobs(model: Any, completion: Completion, sampling: Sampling) -> list[float]:
    """Of the completion's tokens, by one forward pass over prompt and completion, without a cache."""
    prompt, tokens = completion.prompt_ids, completion.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
    logits /= sampling.temperature or 1.0
    if sampling.top_k and sampling.temperature:
        logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -math.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist()


def assert_same(completion: Completion, expected: Completion, bound: float) -> None:
    assert replace(completion, logprobs=expected.logprobs) == expected
    assert completion.logprobs == pytest.approx(expected.logprobs, abs=bound)
