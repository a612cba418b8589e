"""The ``Engine`` protocol: anything that turns prompts into completions and takes new weights.

``ServedEngine`` is what an engine in one process is made of: it says how to work through a feed of jobs, and has the rest of the
protocol from that. ``EnginePool`` is the other kind, many of these together.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from grpo.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.rollouts.weights import WeightStream

Weights: TypeAlias = "Mapping[str, Tensor] | WeightStream"  # Hugging Face parameter names → CPU or GPU tensors, tied ones once
Progress = Callable[[int, int], None]  # (completions done, completions asked for)


@dataclass(frozen=True, slots=True)
class Job:
    """One completion to be sampled. ``number`` tells the jobs of one call apart: their place in its order."""

    number: int
    request: Request
    index: int


Feed = Callable[[bool], Sequence[Job] | None]
"""Where a working engine gets its jobs: ``feed(idle)`` returns those that came since the last time, None when no more will come.
An idle engine may be kept waiting for a moment."""

Finished = list[tuple[int, Completion]]  # numbers of jobs, with what became of them


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What an engine, or every engine of a pool, was proven to hold after ``load_weights``.

    ``SyncReport(version=7, digests={"model.norm.weight": "9f…"}, num_bytes=269030016, seconds=0.7, read_back=272, num_engines=1)``
    """

    version: int
    digests: Mapping[str, str]  # tensor → hash of the type, shape and bytes that arrived
    num_bytes: int
    seconds: float
    read_back: int  # tensors that were also read back from the model and found to be those; of a pool: by every engine
    num_engines: int = 1

    @property
    def digest(self) -> str:
        """One hash over all names and tensors: equal for equal weights, in whatever order they came."""
        lines = "\n".join(f"{name} {value}" for name, value in sorted(self.digests.items()))
        return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()

    def metrics(self) -> dict[str, float]:
        return {
            "sync/megabytes": self.num_bytes / 1e6,
            "sync/tensors": float(len(self.digests)),
            "sync/tensors_read_back": float(self.read_back),
            "sync/engines": float(self.num_engines),
        }


class Engine(Protocol):
    """One contract for vLLM, transformers, the scripted engine and pools of them; ``tests/test_engines.py`` runs it over all."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        """Sample ``request.num_completions`` completions for every request.

        Returned in the order of the requests, then by ``index``. ``logprobs`` are those of the sampled tokens under
        ``sampling`` (temperature and truncation applied). The stop string, if one ended the completion, is part of ``text``
        and of ``token_ids``; so is the end token of ``token_ids``.
        """
        ...

    def stream(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> Iterator[Completion]:
        """The same completions, each as soon as it is finished. Closing the iterator early stops the sampling."""
        ...

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Replace all weights and forget everything computed with the old ones; later tokens carry ``version``.

        Raises:
            ValueError: the names or shapes are not those of the engine's model; nothing was loaded.
            WeightProofError: what arrived, or what the model holds now, is not what was sent.
        """
        ...

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """What ``generate`` returns, asked of every engine there is: one list for each."""
        ...

    def metrics(self) -> dict[str, float]:
        """Counts of what happened to the engines so far (``engine/…``)."""
        ...

    def close(self) -> None:
        """Stop every process this engine started. Safe to call twice."""
        ...


class ServedEngine(ABC):
    """An engine in one process. ``EnginePool`` can spread work over several of any subclass."""

    @property
    def slots(self) -> int:
        """Completions it samples at the same time: a pool does not leave more than these waiting with it."""
        return 1

    @abstractmethod
    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        """Work through a feed until it ends. Yields after every step, of about a token, whatever that step finished: mostly nothing.

        Closing the iterator drops the jobs not yet finished and leaves an engine that can go on.
        """

    @abstractmethod
    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """See ``Engine``."""

    @abstractmethod
    def close(self) -> None:
        """See ``Engine``."""

    def forget(self) -> None:  # noqa: B027 – most engines remember nothing
        """Drop what is kept of earlier requests, so that it cannot change the last bit of later log-probs."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        return in_order(requests, self.stream(requests, sampling, progress))

    def stream(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> Iterator[Completion]:
        jobs = jobs_of(requests)
        coming = iter([jobs])
        done = 0
        with closing(self.serve(lambda idle: next(coming, None), sampling)) as steps:
            for finished in steps:
                done += len(finished)
                if progress is not None:
                    progress(done, len(jobs))
                yield from (completion for _, completion in finished)

    def probe(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        return [self.generate(requests, sampling)]

    def metrics(self) -> dict[str, float]:
        return {}


def jobs_of(requests: Sequence[Request]) -> list[Job]:
    """Every completion asked for, in the order in which ``generate`` returns them."""
    pairs = [(request, index) for request in requests for index in range(request.num_completions)]
    return [Job(number, request, index) for number, (request, index) in enumerate(pairs)]


def in_order(requests: Sequence[Request], completions: Iterable[Completion]) -> list[Completion]:
    """By request, then by index."""
    position = {request.problem_id: place for place, request in enumerate(requests)}
    if len(position) < len(requests):
        raise ValueError(f"{len(requests)} requests have only {len(position)} problem ids; completions are told apart by them")
    return sorted(completions, key=lambda completion: (position[completion.problem_id], completion.index))


def check_lengths(requests: Sequence[Request], sampling: Sampling, limit: int) -> None:
    """Refuse a request that cannot have all its tokens: engines would cut its completions short without a word.

    Raises:
        ValueError: naming the problem.
    """
    for request in requests:
        if len(request.prompt_ids) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"problem {request.problem_id!r}: a prompt of {len(request.prompt_ids)} tokens and max_new_tokens="
                f"{sampling.max_new_tokens} do not fit in the {limit} tokens of the engine\n"
                "  → shorten the prompt, lower rollout.max_new_tokens, or raise max_model_len in rollout.engine_args"
            )


def end_of_first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first ends in ``text``; None if there is none."""
    ends = [position + len(string) for string in stop if (position := text.find(string)) >= 0]
    return min(ends, default=None)
