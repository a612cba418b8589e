"""Groups written by hand, a model of some thousand weights, a tokenizer without files: what a loss is tried on before a run, and what tests
are made of."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from grpo.types import Completion, FinishReason, Group, Problem, Rollout, Score


def toy_group(
    name: str,
    rewards: Sequence[float],
    lengths: Sequence[int],
    *,
    logprobs: Sequence[Sequence[float]] = (),
    truncated: Sequence[bool] = (),
    parts: Sequence[Mapping[str, float]] = (),
) -> Group:
    """One completion a reward: ``toy_group("a", [1, 0], [3, 5])`` has a right one of three tokens and a wrong one of five.

    Args:
        logprobs: of each completion's tokens under the engine; −1 where not given.
        truncated: whether the token limit cut it off; no where not given.
        parts: values by reward part; none where not given.
    """
    problem = Problem(id=name, prompt="?", answer="1")

    def rollout(i: int, reward: float, length: int) -> Rollout:
        said = {"logprobs": tuple(logprobs[i])} if logprobs else {}
        reason = FinishReason.length if truncated and truncated[i] else FinishReason.stop
        scores = {part: Score(value=value) for part, value in parts[i].items()} if parts else {}
        return replace(toy_rollout(problem, i, (1,), (7,) * length, finish_reason=reason, **said), scores=scores, reward=reward)

    return Group(problem=problem, rollouts=tuple(rollout(i, r, n) for i, (r, n) in enumerate(zip(rewards, lengths, strict=True))))


def toy_rollout(problem: Problem, index: int, prompt_ids: Sequence[int], token_ids: Sequence[int], **completion: Any) -> Rollout:
    """Unscored, with reward 0; every token has log-prob −1 and version 0.

    Args:
        completion: fields of ``Completion`` that are to be otherwise.
    """
    num = len(token_ids)
    fields = {"text": "", "logprobs": (-1.0,) * num, "policy_versions": (0,) * num, "finish_reason": FinishReason.stop} | completion
    own = Completion(problem_id=problem.id, index=index, prompt_ids=tuple(prompt_ids), token_ids=tuple(token_ids), **fields)
    return Rollout(problem=problem, completion=own, scores={}, reward=0.0)


def toy_llama(seed: int = 0, **shape: Any) -> Any:
    """A random Llama of two layers, width 16 and a vocabulary of 24; ``shape``: changes to its ``LlamaConfig``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**usual | {"num_key_value_heads": 2, "initializer_range": 0.2} | shape)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


class Characters:
    """A tokenizer whose tokens are characters, by their code points: what ``PlainText`` and ``ScriptedEngine`` ask of one, and no more."""

    eos_token_id = None
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def __len__(self) -> int:
        return sys.maxunicode + 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> Characters.Encoded:
        return Characters.Encoded(self.encode(text))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))

    @dataclass(frozen=True, slots=True)
    class Encoded:
        input_ids: list[int]
