"""The ``Engine`` protocol: anything that turns prompts into completions and takes new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from grpo.types import Completion, Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]  # Hugging Face parameter names → CPU or GPU tensors, tied ones once
Progress = Callable[[int, int], None]  # (completions done, completions asked for)


class Engine(Protocol):
    """One contract for vLLM, transformers and the scripted engine; ``tests/test_engines.py`` runs it over all three."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Completion]:
        """Sample ``request.num_completions`` completions for every request.

        Returned in the order of the requests, then by ``index``. ``logprobs`` are those of the sampled tokens under
        ``sampling`` (temperature and truncation applied). The stop string, if one ended the completion, is part of ``text``
        and of ``token_ids``; so is the end token of ``token_ids``.
        """
        ...

    def load_weights(self, weights: Weights, version: int) -> None:
        """Replace all weights and forget everything computed with the old ones; later tokens carry ``version``.

        Raises:
            ValueError: the names or shapes are not those of the engine's model.
        """
        ...

    def close(self) -> None:
        """Stop every process this engine started. Safe to call twice."""
        ...


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
