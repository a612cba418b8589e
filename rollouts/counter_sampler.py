"""Our sampling rule inside vLLM, as one of its logits processors. Imports vLLM: it is loaded by the engine process alone.

vLLM samples greedily (temperature 0) and returns the logits it saw as log-probs (``logprobs_mode="processed_logits"``). This
processor runs before that and leaves one token standing: the one drawn by ``grpo.rollouts.sampling``, at the value of its
log-prob, with all others at -inf. So the argmax picks it, and what comes back is the log-prob under any temperature and
truncation, without another pass over the vocabulary. What truncation kept goes into a list that came with the request: it is the
caller's own, because the engine runs in the caller's process. The stock sampler costs an exponential variate for every entry of the
vocabulary, and its per-request generators crash the CPU build when a request is preempted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from grpo.rollouts.sampling import sample, uniforms
from grpo.types import Sampling

_ARGUMENT = "grpo"  # our entry in SamplingParams.extra_args


class _Row(NamedTuple):
    key: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    kept: list[bytes]  # see ``counter_arguments``
    begun: int
    sampled: list[int]  # the request's running output: vLLM appends to it


def counter_arguments(key: int, sampling: Sampling, kept: list[bytes], begun: int) -> dict[str, Any]:
    """What ``CounterSampler`` needs to know of a request: its ``SamplingParams.extra_args``.

    Args:
        kept: filled with the kept set of each token that is sampled, if ``sampling`` truncates. Only in this process, and only if the
            parameters are not cloned.
        begun: tokens of the completion that vLLM is given with the prompt.
    """
    return {_ARGUMENT: (key, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, kept, begun)}


class CounterSampler(LogitsProcessor):
    """Keeps a row of settings for every row of vLLM's batch and samples all rows at once."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._settings: tuple[Tensor, ...] | None = None  # of the rows as they stand, made when needed

    def is_argmax_invariant(self) -> bool:
        return False  # it decides the argmax

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow vLLM's batch: requests leave, enter, and change places, in this order."""
        if batch_update is None:
            return
        self._settings = None
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, sampled in batch_update.added:
            self._rows[index] = _row(params, sampled)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction is MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        rows = [self._rows[index] for index in range(logits.shape[0])]
        if self._settings is None:
            self._settings = tuple(torch.tensor(column) for column in zip(*(row[:5] for row in rows), strict=True))
        keys, *settings = self._settings
        positions = torch.tensor([row.begun + len(row.sampled) for row in rows])
        drawn = sample(logits, uniforms(keys, positions), *settings)
        for row, kept in zip(rows, drawn.kept, strict=False):  # there are none if no row is truncated
            row.kept[len(row.sampled) :] = [kept]  # of a prompt that is computed in parts, vLLM throws away all samples but the last
        return logits.fill_(-math.inf).scatter_(1, drawn.tokens.unsqueeze(1), drawn.logprobs.to(logits.dtype).unsqueeze(1))


def _row(params: SamplingParams, sampled: list[int]) -> _Row:
    key, temperature, top_p, top_k, min_p, kept, begun = (params.extra_args or {})[_ARGUMENT]
    return _Row(key, temperature, top_p, top_k, min_p, kept, begun, sampled)
