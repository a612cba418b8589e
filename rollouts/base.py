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
