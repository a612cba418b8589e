"""An engine without a model, for trying rewards, recipes and configurations in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from grpo.rollouts.base import Progress, Weights, end_of_first_stop
from grpo.types import Completion, FinishReason, Request, Sampling

Answer = Callable[[str, int, int], str]  # (text of the prompt, index of the completion, seed of the request) → its text


def plausible_answer(prompt: str, index: int, seed: int) -> str:
    """A completion in the R1 format, whose answer is a small number that depends on seed and index."""
    return f" <think> Let me see. </think> <answer> {(seed + 7 * index) % 20} </answer>"


class ScriptedEngine:
    """``Engine`` whose completions come from a function of yours.

    Its ``logprobs`` are those of a uniform choice from the vocabulary, −log V for each token: they are **not** the policy's.
    Training on its rollouts exercises the plumbing and teaches the model nothing true about them.

    Args:
        tokenizer: encodes the answers and decodes the prompts; anything with ``encode``, ``decode`` and ``__len__``.
        answer: see ``Answer``. A text longer than ``max_new_tokens`` is cut and finishes with ``length``; otherwise the first stop
            string ends it, or the tokenizer's end token is appended.
    """

    def __init__(self, tokenizer: Any, answer: Answer = plausible_answer) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self.loaded_versions: list[int] = []  # every version this engine was given, in order

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        total = sum(request.num_completions for request in requests)
        completions: list[Completion] = []
        for request in requests:
            prompt = self._tokenizer.decode(list(request.prompt_ids))
            for index in range(request.num_completions):
                completions.append(self._complete(request, prompt, index, sampling))
            if progress is not None:
                progress(len(completions), total)
        return completions

    def load_weights(self, weights: Weights, version: int) -> None:
        """Note the version. There is no model whose names and shapes the weights could differ from."""
        self.loaded_versions.append(version)

    def close(self) -> None:
        """Nothing to stop."""

    def _complete(self, request: Request, prompt: str, index: int, sampling: Sampling) -> Completion:
        text = self._answer(prompt, index, request.seed)
        end = end_of_first_stop(text, sampling.stop)
        token_ids = self._tokenizer.encode(text[:end], add_special_tokens=False)
        if end is None and self._tokenizer.eos_token_id is not None:
            token_ids = [*token_ids, self._tokenizer.eos_token_id]
        cut = len(token_ids) > sampling.max_new_tokens
        token_ids = token_ids[: sampling.max_new_tokens]
        version = self.loaded_versions[-1] if self.loaded_versions else 0
        return Completion(
            problem_id=request.problem_id,
            index=index,
            prompt_ids=request.prompt_ids,
            token_ids=tuple(token_ids),
            text=self._tokenizer.decode(token_ids, skip_special_tokens=True) if cut else text[:end],
            logprobs=(-math.log(len(self._tokenizer)),) * len(token_ids),
            policy_versions=(version,) * len(token_ids),
            finish_reason=FinishReason.length if cut else FinishReason.stop,
        )
