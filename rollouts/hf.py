"""A transformers model as an engine: every model that ``AutoModelForCausalLM`` loads, no vLLM, no Ray.

A loop of its own around ``forward`` instead of ``model.generate``: our sampling rule needs a uniform for each completion, and
log-probs under the temperature and truncation that drew the token. Prompts are computed once for all their completions, and a
completion that has ended leaves the batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from grpo.rollouts.proof import Arrivals, digest_of_values
from grpo.rollouts.sampling import Drawn, completion_key, sample, uniforms
from grpo.rollouts.weights import WeightStream, check_kinds, check_weights
from grpo.types import Completion, FinishReason, Sampling

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_CONTEXT = 8  # prompt tokens decoded before a completion: some tokenizers drop the space in front of a text's first word


class HFEngine(ServedEngine):
    """``Engine`` over a transformers model.

    Args:
        model: a Hugging Face folder or hub id, or a loaded model (used as it is: ``dtype`` and the rest are then ignored).
        tokenizer: None: the one in the folder.
        dtype: ``float32``, ``bfloat16`` or ``auto`` (the checkpoint's). In float32 a completion's tokens are the same in any company; the
            rounding of bfloat16 now and then makes another of one.
        batch_size: completions sampled at the same time; the key-value cache grows with it.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 128,
    ) -> None:
        if isinstance(model, (str, Path)):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **origin)
            model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **origin).to(device)
        elif tokenizer is None:
            raise ValueError("a loaded model brings no tokenizer with it; pass tokenizer=")
        self._model: PreTrainedModel | None = model.eval()
        self._device, self._asleep = model.device, False
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._end_ids = _end_ids(model, tokenizer)
        self._version = 0

    @property
    def slots(self) -> int:
        return self._batch_size

    @property
    def context_length(self) -> int:
        return getattr(self._running.config, "max_position_embeddings", None) or 2**31

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        if self._asleep:
            raise Asleep
        waiting: deque[Job] = deque()
        batch: _Batch | None = None
        more = True
        while more or waiting or batch is not None:
            coming = feed(batch is None and not waiting)
            if coming is Close.pause:
                under_way = batch.drafts if batch is not None else []
                begun: Finished = [(draft.job.number, draft.so_far(self._version)) for draft in under_way]
                yield begun + [(job.number, job.begun) for job in waiting]
                return
            if isinstance(coming, Close):
                more = False
            else:
                check_lengths(coming, sampling, self.context_length)
                waiting.extend(coming)
            if batch is None and waiting:
                drafts = [self._draft(waiting.popleft(), sampling) for _ in range(min(self._batch_size, len(waiting)))]
                batch = _Batch(self._running, drafts)
            ended = self._step(batch, sampling) if batch is not None else []
            if batch is not None and not batch.drafts:
                batch = None
            yield [(draft.job.number, self._completion(draft)) for draft in ended]

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        start = time.monotonic()
        model, stream = self._running, WeightStream.of(weights)
        parameters = dict(model.named_parameters())
        tied_head = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        check_weights(stream.specs, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, optional=tied_head)
        check_kinds(stream.specs, {name: parameter.dtype for name, parameter in parameters.items()})
        model.to(self._device)
        arrivals = Arrivals(dtypes={name: parameter.dtype for name, parameter in parameters.items()})
        model.load_state_dict(dict(arrivals.passing(stream)), strict=False)  # the names are checked; not strict, as tied ones come once
        read_back = arrivals.check_held({name: [digest_of_values(parameter)] for name, parameter in parameters.items()})
        self._version, self._asleep = version, False
        return SyncReport(
            version=version,
            digests=arrivals.digests,
            num_bytes=arrivals.num_bytes,
            seconds=time.monotonic() - start,
            read_back=read_back,
        )

    def sleep(self) -> None:
        """The model moves into the host's memory; on a CPU it is there already."""
        import torch

        self._running.to("cpu")
        self._asleep = True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self._model = None

    @property
    def _running(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("this engine is closed; make a new one")
        return self._model

    def _draft(self, job: Job, sampling: Sampling) -> _Draft:
        draft = _Draft(job)
        check_begun(job, self._decode(draft, draft.token_ids), sampling, self._end_ids)
        return draft

    def _step(self, batch: _Batch, sampling: Sampling) -> list[_Draft]:
        """Sample a token for every draft of the batch; returns those that it ended, which leave the batch."""
        import torch

        with torch.no_grad():
            drawn = _draw(batch.next_logits(), batch.drafts, sampling)
        for draft, kept in zip(batch.drafts, drawn.kept, strict=False):  # there are none if nothing is truncated
            draft.kept.append(kept)
        for draft, token, logprob in zip(batch.drafts, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True):
            draft.token_ids.append(token)
            draft.logprobs.append(logprob)
            self._end(draft, sampling)
        ended = [draft for draft in batch.drafts if draft.finish_reason is not None]
        batch.advance(drawn.tokens, [row for row, draft in enumerate(batch.drafts) if draft.finish_reason is None])
        return ended

    def _end(self, draft: _Draft, sampling: Sampling) -> None:
        """Set the finish reason as vLLM does: an end token, else a complete stop string, else the limit."""
        if draft.token_ids[-1] in self._end_ids:
            draft.text, draft.finish_reason = self._decode(draft, draft.token_ids[:-1]), FinishReason.stop
            return
        if sampling.stop and end_of_first_stop(self._tail(draft, sampling.stop), sampling.stop) is not None:
            text = self._decode(draft, draft.token_ids)
            end = end_of_first_stop(text, sampling.stop)
            if end is not None:  # None: the tail began inside a character or word that reads otherwise in its place
                draft.text, draft.finish_reason = text[:end], FinishReason.stop
                return
        if len(draft.token_ids) == draft.job.limit(sampling):
            draft.text, draft.finish_reason = self._decode(draft, draft.token_ids), FinishReason.length

    def _tail(self, draft: _Draft, stop: Sequence[str]) -> str:
        """Enough of the end of a text to hold any stop string, at four tokens a character at the worst."""
        text: str = self._tokenizer.decode(draft.token_ids[-4 * (max(map(len, stop)) + 1) :], skip_special_tokens=True)
        return text

    def _decode(self, draft: _Draft, token_ids: Sequence[int]) -> str:
        context = list(draft.job.request.prompt_ids[-_CONTEXT:])
        before: str = self._tokenizer.decode(context, skip_special_tokens=True)
        whole: str = self._tokenizer.decode([*context, *token_ids], skip_special_tokens=True)
        return whole[len(before) :]

    def _completion(self, draft: _Draft) -> Completion:
        assert draft.finish_reason is not None
        return draft.job.completion(draft.so_far(self._version), draft.text, draft.finish_reason)


class _Draft:
    """A completion on its way."""

    __slots__ = ("finish_reason", "job", "kept", "key", "logprobs", "text", "token_ids")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.key = completion_key(job.request.seed, job.index)
        self.token_ids = list(job.begun.token_ids)
        self.logprobs: list[float] = []  # of the new tokens
        self.kept: list[bytes] = []  # of the new tokens, if sampling truncates
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def so_far(self, version: int) -> Begun:
        return self.job.begun.extended(self.token_ids[len(self.job.begun.token_ids) :], self.logprobs, version, self.kept)


class _Batch:
    """Drafts that are sampled together, with their key-value cache. What stands before the next token is padded on the left."""

    def __init__(self, model: PreTrainedModel, drafts: Sequence[_Draft]) -> None:
        import torch
        from transformers import DynamicCache

        self.drafts = list(drafts)
        self._model = model
        self._cache = DynamicCache(config=model.config)
        given = [(*draft.job.request.prompt_ids, *draft.token_ids) for draft in drafts]
        prompts = list(dict.fromkeys(given))
        width = max(map(len, prompts))
        filler = prompts[0][0]  # masked; any token will do
        self._ids = torch.tensor([[filler] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        self._mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        self._rows: Tensor | None = torch.tensor([row_of[prompt] for prompt in given], device=model.device)

    def next_logits(self) -> Tensor:
        """``[drafts, vocab]`` in float32. The first pass goes over the prompts, each once, and spreads them over the drafts."""
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        if self._rows is not None:
            rows, self._rows = self._rows, None
            self._select(rows)
            logits = logits[rows]
        return logits

    def advance(self, tokens: Tensor, going: Sequence[int]) -> None:
        """Append the tokens; only the drafts in the rows ``going`` go on."""
        import torch

        self.drafts = [self.drafts[row] for row in going]
        if not going:
            return
        if len(going) < len(tokens):
            rows = torch.tensor(going, device=tokens.device)
            tokens = tokens[rows]
            self._select(rows)
        self._ids = tokens.unsqueeze(1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions[:, -1:] + 1

    def _select(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


def _draw(logits: Tensor, drafts: Sequence[_Draft], sampling: Sampling) -> Drawn:
    import torch

    rows, device = len(drafts), logits.device
    keys = torch.tensor([draft.key for draft in drafts], device=device)
    positions = torch.tensor([len(draft.token_ids) for draft in drafts], device=device)
    return sample(
        logits,
        uniforms(keys, positions),
        torch.full((rows,), sampling.temperature, device=device),
        torch.full((rows,), sampling.top_p, device=device),
        torch.full((rows,), sampling.top_k, device=device),
        torch.full((rows,), sampling.min_p, device=device),
    )


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation settings."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)
