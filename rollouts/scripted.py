"""An engine without a model, for trying rewards, recipes and configurations in seconds."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from grpo.rollouts.base import (
    Asleep,
    Begun,
    Close,
    Feed,
    Finished,
    Job,
    ServedEngine,
    SyncReport,
    Weights,
    check_begun,
    check_lengths,
    end_of_first_stop,
)
from grpo.rollouts.proof import Passing
from grpo.rollouts.weights import WeightStream
from grpo.types import Completion, FinishReason, Sampling

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
        slots: answers at the same time, a token each a step, as engines with a model do.
        step_s: seconds that a step takes.
    """

    def __init__(self, tokenizer: Any, answer: Answer = plausible_answer, *, slots: int = 16, step_s: float = 0.0) -> None:
        self._tokenizer = tokenizer
        self._answer = answer
        self._slots = slots
        self._step_s = step_s
        self.loaded_versions: list[int] = []  # every version this engine was given, in order
        self._asleep = False

    @property
    def slots(self) -> int:
        return self._slots

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        if self._asleep:
            raise Asleep
        waiting: deque[Job] = deque()
        running: list[_Recital] = []
        more = True
        while more or waiting or running:
            coming = feed(not waiting and not running)
            if coming is Close.pause:
                begun: Finished = [(recital.job.number, recital.so_far(self._logprob, self._version)) for recital in running]
                yield begun + [(job.number, job.begun) for job in waiting]
                return
            if isinstance(coming, Close):
                more = False
            else:
                check_lengths(coming, sampling, self.context_length)
                waiting.extend(coming)
            while waiting and len(running) < self.slots:
                running.append(self._recital(waiting.popleft(), sampling))
            if running:
                time.sleep(self._step_s)
            for recital in running:
                recital.said = min(recital.said + 1, len(recital.token_ids))
            ended = [recital for recital in running if recital.said == len(recital.token_ids)]
            running = [recital for recital in running if recital.said < len(recital.token_ids)]
            yield [(recital.job.number, self._completion(recital)) for recital in ended]

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Note the version, and hash what came. There is no model whose names and shapes the weights could differ from."""
        start = time.monotonic()
        passed = Passing()
        for _ in passed.passing(WeightStream.of(weights)):
            pass
        self.loaded_versions.append(version)
        self._asleep = False
        return SyncReport(
            version=version, digests=passed.digests, num_bytes=passed.num_bytes, seconds=time.monotonic() - start, read_back=0
        )

    def sleep(self) -> None:
        """There is no memory to give back: it keeps the contract, and is silent until new weights come."""
        self._asleep = True

    def close(self) -> None:
        """Nothing to stop."""

    def _recital(self, job: Job, sampling: Sampling) -> _Recital:
        request, begun = job.request, job.begun.token_ids
        check_begun(job, self._tokenizer.decode(list(begun), skip_special_tokens=True), sampling, {self._tokenizer.eos_token_id})
        text = self._answer(self._tokenizer.decode(list(request.prompt_ids)), job.index, request.seed)
        end = end_of_first_stop(text, sampling.stop)
        answer = self._tokenizer.encode(text[:end], add_special_tokens=False)
        if end is None and self._tokenizer.eos_token_id is not None:
            answer = [*answer, self._tokenizer.eos_token_id]
        token_ids = (*begun, *answer[len(begun) :])
        cut = len(token_ids) > job.limit(sampling)
        token_ids = token_ids[: job.limit(sampling)]
        as_said = not cut and list(token_ids) == answer  # another engine may have begun it with other words
        return _Recital(
            job=job,
            token_ids=token_ids,
            text=text[:end] if as_said else self._tokenizer.decode(list(token_ids), skip_special_tokens=True),
            finish_reason=FinishReason.length if cut else FinishReason.stop,
            said=len(begun),
        )

    def _completion(self, recital: _Recital) -> Completion:
        return recital.job.completion(recital.so_far(self._logprob, self._version), recital.text, recital.finish_reason)

    @property
    def _logprob(self) -> float:
        return -math.log(len(self._tokenizer))

    @property
    def _version(self) -> int:
        return self.loaded_versions[-1] if self.loaded_versions else 0


@dataclass(slots=True)
class _Recital:
    """An answer on its way: a token a step."""

    job: Job
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    said: int  # tokens so far

    def so_far(self, logprob: float, version: int) -> Begun:
        new = self.token_ids[len(self.job.begun.token_ids) : self.said]
        return self.job.begun.extended(new, [logprob] * len(new), version)
