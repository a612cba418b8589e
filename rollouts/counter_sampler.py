"""Our sampling rule inside vLLM, as one of its logits processors. Imports vLLM: it is loaded by the engine process alone.

vLLM samples greedily (temperature 0) and returns the logits it saw as log-probs (``logprobs_mode="processed_logits"``). This
processor runs before that and leaves one token standing: the one drawn by ``grpo.rollouts.sampling``, at the value of its
log-prob, with all others at -inf. So the argmax picks it, and what comes back is the log-prob under any temperature and
truncation, without another pass over the vocabulary. The stock sampler costs an exponential variate for every entry of the
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
    sampled: list[int]  # the request's running output: vLLM appends to it


def counter_arguments(key: int, sampling: Sampling) -> dict[str, Any]:
    """What ``CounterSampler`` needs to know of a request: its ``SamplingParams.extra_args``."""
    return {_ARGUMENT: (key, sampling.temperature, sampling.top_p, sampling.top_k)}


class CounterSampler(LogitsProcessor):
    """Keeps a row of settings for every row of vLLM's batch and samples all rows at once."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, _Row] = {}
        self._settings: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # of the rows as they stand, made when needed

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
            keys, temperature, top_p, top_k, _ = zip(*rows, strict=True)
            self._settings = torch.tensor(keys), torch.tensor(temperature), torch.tensor(top_p), torch.tensor(top_k)
        keys_rows, temperature_rows, top_p_rows, top_k_rows = self._settings
        positions = torch.tensor([len(row.sampled) for row in rows])
        tokens, logprobs = sample(logits, uniforms(keys_rows, positions), temperature_rows, top_p_rows, top_k_rows)
        return logits.fill_(-math.inf).scatter_(1, tokens.unsqueeze(1), logprobs.to(logits.dtype).unsqueeze(1))


def _row(params: SamplingParams, sampled: list[int]) -> _Row:
    key, temperature, top_p, top_k = (params.extra_args or {})[_ARGUMENT]
    return _Row(key, temperature, top_p, top_k, sampled)
