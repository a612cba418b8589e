"""Runs of a second: the million-parameter model, sums, and a reward that differs between its completions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# A random model never adds up, but it can write digits: a reward that tells its completions apart from the first step.
DIGITS = '''
def digits(completion, problem):
    """The share of digits in the text."""
    return sum(c.isdigit() for c in completion.text) / max(len(completion.text), 1)
'''


def write_recipe(folder: Path, model: str, *, algo: str = "grpo", rewards: str = DIGITS, **sections: Mapping[str, Any]) -> str:
    """``folder/digits.yaml``, three steps of two groups of four completions, and ``my_rewards.py`` beside it; the path of the former.

    Args:
        rewards: the text of ``my_rewards.py``, with a function ``digits``.
        sections: keys of the recipe that are to be otherwise, e.g. ``run={"steps": 6}``.
    """
    (folder / "my_rewards.py").write_text(rewards)
    groups = {"algo": algo, "model": "hub", "data": "sums", "rollout": "hf", "logger": "quiet"}
    usual: dict[str, dict[str, Any]] = {
        "run": {"steps": 3, "checkpoint_every": 2, "dir": str(folder / "runs")},
        "model": {"path": model, "precision": "fp32"},
        "data": {"problems": {"heldout": 20, "size": 50}, "template": "{question} ="},
        "reward": {"digits": {"fn": f"{folder / 'my_rewards.py'}:digits"}},
        "rollout": {"problems_per_step": 2, "completions_per_problem": 4, "max_new_tokens": 8},
        "optim": {"lr": 1e-3},
        "eval": {"every": 2, "problems": 3, "metric": "digits"},
    }
    recipe = usual | {name: {**usual.get(name, {}), **keys} for name, keys in sections.items()}
    defaults = ["schema", *({group: choice} for group, choice in groups.items()), "_self_"]
    file = folder / "digits.yaml"
    file.write_text(yaml.safe_dump({"defaults": defaults, **recipe}, sort_keys=False))
    return str(file)
