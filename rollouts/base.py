"""The ``Engine`` protocol: anything that turns prompts into completions and takes new weights.

An engine says how to work through a feed of jobs (``serve``) and has ``stream`` and ``generate`` from that. ``ServedEngine`` is one in
one process, ``EnginePool`` many of these together.

A call can be paused: what its completions have so far comes back (``Begun``), and any engine can go on from there, with the same weights or
newer ones. So weights change in the middle of long completions, evaluations come between, and a checkpoint holds half-made rollouts.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol, TypeAlias

from grpo.types import Completion, FinishReason, Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from grpo.rollouts.weights import WeightStream

Weights: TypeAlias = "Mapping[str, Tensor] | WeightStream"  # Hugging Face parameter names → CPU or GPU tensors, tied ones once
Progress = Callable[[int, int], None]  # (completions done, completions asked for)


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """What a completion has so far: sampling goes on after it, and these tokens keep their log-probs and versions."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    policy_versions: tuple[int, ...] = ()
    kept: tuple[bytes, ...] = ()  # what truncation left to choose from, for each token; empty: nothing was cut

    def __post_init__(self) -> None:
        lengths = [len(self.token_ids), len(self.logprobs), len(self.policy_versions)]
        if len(set(lengths)) != 1:
            raise ValueError(f"a begun completion has token_ids, logprobs and policy_versions of lengths {lengths}; they must be equal")
        if self.kept and len(self.kept) != len(self.token_ids):
            raise ValueError(f"a begun completion has {len(self.token_ids)} tokens, but kept sets of {len(self.kept)} of them")

    def extended(self, token_ids: Sequence[int], logprobs: Sequence[float], version: int, kept: Sequence[bytes] = ()) -> Begun:
        """With the tokens that the weights of one version sampled after these."""
        return Begun(
            token_ids=(*self.token_ids, *token_ids),
            logprobs=(*self.logprobs, *logprobs),
            policy_versions=(*self.policy_versions, *[version] * len(token_ids)),
            kept=(*self.kept, *kept),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One completion to be sampled. ``number`` tells the jobs of one call apart: their place in its order."""

    number: int
    request: Request
    index: int
    begun: Begun = Begun()

    def limit(self, sampling: Sampling) -> int:
        """Tokens the completion may have in all, those that are begun included."""
        own = self.request.max_new_tokens
        return sampling.max_new_tokens if own is None else min(own, sampling.max_new_tokens)

    def completion(self, whole: Begun, text: str, finish_reason: FinishReason) -> Completion:
        """What became of it: ``begun``, extended to the end."""
        return Completion(
            problem_id=self.request.problem_id,
            index=self.index,
            prompt_ids=self.request.prompt_ids,
            token_ids=whole.token_ids,
            text=text,
            logprobs=whole.logprobs,
            policy_versions=whole.policy_versions,
            kept=whole.kept,
            finish_reason=finish_reason,
        )


class Close(Enum):
    """Why no more jobs will come."""

    finish = auto()  # work through those that are there
    pause = auto()  # stop now: what is not finished comes back as ``Begun``, every job once, begun or not


Feed = Callable[[bool], "Sequence[Job] | Close"]
"""Where a working engine gets its jobs: ``feed(idle)`` returns those that came since the last time, or that no more will come. It is asked
before every step, also after ``Close.finish``, for that may turn into ``Close.pause``. An idle engine may be kept waiting for a moment."""

Finished = list[tuple[int, "Completion | Begun"]]  # numbers of jobs, with what became of them


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
    """One contract for vLLM, transformers, the scripted engine and pools of them; ``tests/test_engines*.py`` run it over all."""

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        ...

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        """Work through a feed until it closes. Yields after every step whatever that step finished: mostly nothing.

        Every job comes back once: as its completion, or, if the feed closed with ``pause``, as what it has so far. A job that was begun
        comes back whole, its earlier tokens first. Closing the iterator drops the jobs not yet finished and leaves an engine that
        can go on.
        """
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        """Sample ``request.num_completions`` completions for every request.

        Returned in the order of the requests, then by ``index``. ``logprobs`` are those of the sampled tokens under
        ``sampling`` (temperature and truncation applied), and ``kept`` is what truncation left, if it truncates. The stop string, if
        one ended the completion, is part of ``text`` and of ``token_ids``; so is the end token of ``token_ids``.
        """
        ...

    def stream(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> Iterator[Completion]:
        """The same completions, each as soon as it is finished. Closing the iterator early stops the sampling."""
        ...

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """Replace all weights and forget everything computed with the old ones; later tokens carry ``version``. Wakes who sleeps.

        Raises:
            ValueError: the names or shapes are not those of the engine's model; nothing was loaded.
            WeightProofError: what arrived, or what the model holds now, is not what was sent.
        """
        ...

    def sleep(self) -> None:
        """Give the accelerator's memory back, the weights' included, to whoever shares it, until ``load_weights`` brings new ones.

        An engine that sleeps samples nothing (``Asleep``). To put it to sleep again does nothing.
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


class Asleep(RuntimeError):
    """What an engine raises that was asked for completions while it sleeps."""

    def __init__(self, message: str = "this engine is asleep: it has given its memory back\n  → load_weights wakes it") -> None:
        super().__init__(message)


class Serving(ABC):
    """``stream`` and ``generate`` for whoever can ``serve``."""

    @abstractmethod
    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        """See ``Engine``."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        return in_order(requests, self.stream(requests, sampling, progress))

    def stream(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> Iterator[Completion]:
        jobs = jobs_of(requests)
        coming = iter([jobs])
        done = 0
        with closing(self.serve(lambda idle: next(coming, Close.finish), sampling)) as steps:
            for finished in steps:
                done += len(finished)
                if progress is not None:
                    progress(done, len(jobs))
                yield from (result for _, result in finished if isinstance(result, Completion))


class ServedEngine(Serving):
    """An engine in one process. ``EnginePool`` can spread work over several of any subclass."""

    @property
    def slots(self) -> int:
        """Completions it samples at the same time: a pool does not leave more than these waiting with it."""
        return 1

    @property
    def context_length(self) -> int:
        """See ``Engine``; as good as none where no model has a limit."""
        return 1 << 31

    @property
    def progress(self) -> int | None:
        """A number that is another one when tokens were computed: if it stands still, and nothing is finished, the engine hangs.

        None: each step counts.
        """
        return None

    def broken_by(self, error: Exception) -> bool:
        """Whether it can do nothing more after this error of its own, and another in its place could: it ran out of memory."""
        return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's

    @abstractmethod
    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        """See ``Engine``."""

    @abstractmethod
    def close(self) -> None:
        """See ``Engine``."""

    def sleep(self) -> None:
        """See ``Engine``. An engine that cannot give memory back must not seem to."""
        raise NotImplementedError(f"{type(self).__name__} cannot sleep: it has no way to give its memory back")

    def forget(self) -> None:
        """Drop what is kept of earlier requests, so that it cannot change the last bit of later log-probs."""

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


def check_lengths(jobs: Sequence[Job], sampling: Sampling, limit: int) -> None:
    """Refuse a job without a prompt, for there is nothing to predict a first token from; one that cannot have all its tokens, for
    engines would cut its completion short without a word; and one that has them already.

    Raises:
        ValueError: naming the problem.
    """
    for job in jobs:
        prompt, tokens = len(job.request.prompt_ids), job.limit(sampling)
        if not prompt:
            raise ValueError(
                f"problem {job.request.problem_id!r}: its prompt is empty\n"
                "  → see data.template and data.prompt_key, or take the row out of the data"
            )
        if len(job.begun.token_ids) >= tokens:
            raise _complete(job, f"it has {len(job.begun.token_ids)} tokens, and max_new_tokens={tokens}")
        if prompt + tokens > limit:
            raise ValueError(
                f"problem {job.request.problem_id!r}: a prompt of {prompt} tokens and max_new_tokens={tokens} do not fit in the "
                f"{limit} tokens of the engine\n"
                "  → shorten the prompt, lower rollout.max_new_tokens, or raise max_model_len in rollout.engine_args"
            )


def check_begun(job: Job, text: str, sampling: Sampling, end_ids: Collection[int]) -> None:
    """Refuse to go on with what has ended: a sampler would look at its new tokens only, and never see it.

    Args:
        text: of ``job.begun``.
        end_ids: tokens that end a completion.

    Raises:
        ValueError: naming the completion.
    """
    if job.begun.token_ids and job.begun.token_ids[-1] in end_ids:
        raise _complete(job, f"it ends with the end token {job.begun.token_ids[-1]}")
    if end_of_first_stop(text, sampling.stop) is not None:
        raise _complete(job, f"its text holds one of the stop strings {list(sampling.stop)}")


def _complete(job: Job, why: str) -> ValueError:
    return ValueError(
        f"completion {job.index} of problem {job.request.problem_id!r} cannot be gone on with: {why}\n"
        "  → it is finished; go on with what an engine gave back as begun, and with the sampling it was begun with"
    )


def end_of_first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first ends in ``text``; None if there is none."""
    ends = [position + len(string) for string in stop if (position := text.find(string)) >= 0]
    return min(ends, default=None)
