"""The reward of reasoning-gym's tasks: each judges an answer itself, for many problems have more than one."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from grpo.rewards.arguments import checked_by, one_of
from grpo.rewards.text import PARTS, part_of
from grpo.types import Completion, Outcome, Problem, Score

NEEDED = "pip install 'grpo-toolkit[reasoning-gym]'"


def _check(part: str) -> None:
    one_of("part", part, PARTS)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError(f"this reward needs the package reasoning-gym: {NEEDED}")


@checked_by(_check)
def score(completion: Completion, problem: Problem, part: str = "answer") -> Score:
    """What the task's own ``score_answer`` gives the answer, mostly 0 to 1 with shares for what is partly right.

    Args:
        part: where the answer stands: between ``<answer>`` and ``</answer>``, or in ``all`` of the text, or what is ``final``.
            Without that part, the task judges an answer that was not given, and the outcome is ``wrong_format``.
    """
    _check(part)
    made_by = problem.columns.get("reasoning_gym")
    if not isinstance(made_by, Mapping):
        raise ValueError(f"problem {problem.id!r} has no column 'reasoning_gym'; take the data from grpo.data_reasoning_gym.reasoning_gym")
    generated = dataset(made_by["task"], made_by["settings"])
    said = part_of(completion, problem, part)
    value = float(generated.score_answer(None if said is None else said.strip(), generated[made_by["index"]]))
    return Score(value=value, outcome=Outcome.wrong_format if said is None else Outcome.ok)


def dataset(task: str, settings: Mapping[str, Any]) -> Any:
    """The task's procedural data set: problem ``i`` is a function of the settings, the seed among them, and ``i``.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError, TypeError, AssertionError: there is no such task, or no such setting.
    """
    return _dataset(task, json.dumps(settings, sort_keys=True))


@lru_cache(64)
def _dataset(task: str, settings: str) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"tasks of reasoning-gym need the package: {error}") from error
    return reasoning_gym.create_dataset(task, **json.loads(settings))


def _warm_up(**settings: Any) -> None:
    importlib.import_module("reasoning_gym")  # takes seconds


score.warm_up = _warm_up  # type: ignore[attr-defined]
