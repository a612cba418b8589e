"""An engine without a model, for trying rewards, recipes and configurations in seconds."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from grpo.rollouts.base import Feed, Finished, Job, ServedEngine, SyncReport, Weights, end_of_first_stop
from grpo.rollouts.proof import Arrivals
from grpo.rollouts.weights import WeightStream
from grpo.types import Completion, FinishReason, Request, Sampling

Answer = Callable[[str, int, int], str]  # (text of the prompt, index of the completion, seed of the request) → its text


def plausible_answer(prompt: str, index: int, seed: int) -> str:
    """A completion in the R1 format, whose answer is a small number that depends on seed and index."""
    return f" <think> Let me see. </think> <answer> {(seed + 7 * index) % 20} </answer>"


class ScriptedEngine(ServedEngine):
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

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        waiting: deque[Job] = deque()
        more = True
        while more or waiting:
            if more:
                jobs = feed(not waiting)
                more = jobs is not None
                waiting.extend(jobs or ())
            if waiting:
                job = waiting.popleft()
                yield [(job.number, self._complete(job.request, job.index, sampling))]
            else:
                yield []

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Note the version, and hash what came. There is no model whose names and shapes the weights could differ from."""
        start = time.monotonic()
        arrivals = Arrivals()
        for _ in arrivals.passing(WeightStream.of(weights)):
            pass
        self.loaded_versions.append(version)
        return SyncReport(
            version=version, digests=arrivals.digests, num_bytes=arrivals.num_bytes, seconds=time.monotonic() - start, read_back=0
        )

    def close(self) -> None:
        """Nothing to stop."""

    def _complete(self, request: Request, index: int, sampling: Sampling) -> Completion:
        text = self._answer(self._tokenizer.decode(list(request.prompt_ids)), index, request.seed)
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
