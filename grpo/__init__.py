"""Reinforcement learning for language models, centred on GRPO.

from grpo import load_recipe, train
result = train(load_recipe("tiny_digits", "run.steps=20"))
print(result.headline, result.run.path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.build import Result, evaluate, train
    from grpo.recipe import load_recipe
    from grpo.types import Completion, Problem, Score

__all__ = ["Completion", "Problem", "Result", "Score", "evaluate", "load_recipe", "train"]

_HOMES = {
    "Completion": "grpo.types",
    "Problem": "grpo.types",
    "Score": "grpo.types",
    "Result": "grpo.build",
    "evaluate": "grpo.build",
    "train": "grpo.build",
    "load_recipe": "grpo.recipe",
}


def __getattr__(name: str) -> Any:
    """Load on first use: ``import grpo.types`` must not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo' has no attribute {name!r}")
    from importlib import import_module

    from grpo.environment import prepare_process

    prepare_process()
    return getattr(import_module(_HOMES[name]), name)
