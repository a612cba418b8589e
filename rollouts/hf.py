"""A transformers model as an engine: every model that ``AutoModelForCausalLM`` loads, no vLLM, no Ray.

A loop of its own around ``forward`` instead of ``model.generate``: our sampling rule needs a uniform for each completion, and
log-probs under the temperature and truncation that drew the token. Prompts are computed once for all their completions, and a
completion that has ended leaves the batch.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.rollouts.base import Feed, Finished, Job, ServedEngine, SyncReport, Weights, check_lengths, end_of_first_stop
from grpo.rollouts.proof import Arrivals, digest_of_values
from grpo.rollouts.sampling import completion_key, sample, uniforms
from grpo.rollouts.weights import WeightStream, check_weights
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
        dtype: ``bfloat16``, ``float32`` or ``auto`` (the checkpoint's).
        batch_size: completions sampled at the same time; the key-value cache grows with it.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        tokenizer: Any = None,
        dtype: str = "bfloat16",
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
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._end_ids = _end_ids(model, tokenizer)
        self._version = 0

    @property
    def slots(self) -> int:
        return self._batch_size

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        limit = getattr(self._running.config, "max_position_embeddings", None) or 2**31
        waiting: list[Job] = []
        more = True
        while more or waiting:
            if more:
                jobs = feed(not waiting)
                more = jobs is not None
                check_lengths([job.request for job in jobs or ()], sampling, limit)
                waiting += jobs or ()
            drafts = [_Draft(job) for job in waiting[: self._batch_size]]
            waiting = waiting[self._batch_size :]
            for ended in self._sample(drafts, sampling) if drafts else [()]:
                yield [(draft.number, self._completion(draft)) for draft in ended]

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        start = time.monotonic()
        model, stream = self._running, WeightStream.of(weights)
        parameters = dict(model.named_parameters())
        tied_head = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        check_weights(stream.specs, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, optional=tied_head)
        arrivals = Arrivals(dtypes={name: parameter.dtype for name, parameter in parameters.items()})
        model.load_state_dict(dict(arrivals.passing(stream)), strict=False)  # the names are checked; not strict, as tied ones come once
        read_back = arrivals.check_held({name: [digest_of_values(parameter)] for name, parameter in parameters.items()})
        self._version = version
        return SyncReport(
            version=version,
            digests=arrivals.digests,
            num_bytes=arrivals.num_bytes,
            seconds=time.monotonic() - start,
            read_back=read_back,
        )

    def close(self) -> None:
        self._model = None

    @property
    def _running(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("this engine is closed; make a new one")
        return self._model

    def _sample(self, drafts: Sequence[_Draft], sampling: Sampling) -> Iterator[list[_Draft]]:
        """Sample all drafts to their end, a token each at a time; yields those that it ended."""
        import torch

        active = list(drafts)
        steps = _Steps(self._running, active)
        while active:
            with torch.no_grad():
                tokens, logprobs = _draw(steps.next_logits(), active, sampling)
            for draft, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
                draft.token_ids.append(token)
                draft.logprobs.append(logprob)
                self._end(draft, sampling)
            going = [row for row, draft in enumerate(active) if draft.finish_reason is None]
            ended = [draft for draft in active if draft.finish_reason is not None]
            active = [active[row] for row in going]
            if active:
                steps.advance(tokens, going)
            yield ended

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
        if len(draft.token_ids) == sampling.max_new_tokens:
            draft.text, draft.finish_reason = self._decode(draft, draft.token_ids), FinishReason.length

    def _tail(self, draft: _Draft, stop: Sequence[str]) -> str:
        """Enough of the end of a text to hold any stop string, at four tokens a character at the worst."""
        text: str = self._tokenizer.decode(draft.token_ids[-4 * (max(map(len, stop)) + 1) :], skip_special_tokens=True)
        return text

    def _decode(self, draft: _Draft, token_ids: Sequence[int]) -> str:
        context = list(draft.request.prompt_ids[-_CONTEXT:])
        before: str = self._tokenizer.decode(context, skip_special_tokens=True)
        whole: str = self._tokenizer.decode([*context, *token_ids], skip_special_tokens=True)
        return whole[len(before) :]

    def _completion(self, draft: _Draft) -> Completion:
        assert draft.finish_reason is not None
        return Completion(
            problem_id=draft.request.problem_id,
            index=draft.index,
            prompt_ids=draft.request.prompt_ids,
            token_ids=tuple(draft.token_ids),
            text=draft.text,
            logprobs=tuple(draft.logprobs),
            policy_versions=(self._version,) * len(draft.token_ids),
            finish_reason=draft.finish_reason,
        )


class _Draft:
    """A completion on its way."""

    __slots__ = ("finish_reason", "index", "key", "logprobs", "number", "request", "text", "token_ids")

    def __init__(self, job: Job) -> None:
        self.number = job.number
        self.request = job.request
        self.index = job.index
        self.key = completion_key(job.request.seed, job.index)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None


class _Steps:
    """The model's forward passes over a batch of drafts, with a key-value cache, prompts padded on the left."""

    def __init__(self, model: PreTrainedModel, drafts: Sequence[_Draft]) -> None:
        import torch
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        prompts = list(dict.fromkeys(draft.request.prompt_ids for draft in drafts))
        width = max(map(len, prompts))
        filler = prompts[0][0]  # masked; any token will do
        self._ids = torch.tensor([[filler] * (width - len(p)) + list(p) for p in prompts], device=model.device)
        self._mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        self._rows: Tensor | None = torch.tensor([row_of[draft.request.prompt_ids] for draft in drafts], device=model.device)

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


def _draw(logits: Tensor, drafts: Sequence[_Draft], sampling: Sampling) -> tuple[Tensor, Tensor]:
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
    )


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation settings."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)
