"""The reward of reasoning-gym's tasks: each judges an answer itself, for many problems have more than one."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import enum
import importlib
import importlib.util
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args, get_origin, get_type_hints

from grpo.rewards.arguments import checked_by, one_of
from grpo.rewards.text import PARTS, part_of
from grpo.types import Completion, Outcome, Problem, Score

NEEDED = "pip install 'grpo-toolkit[reasoning-gym]'"
COLUMN = "reasoning_gym"  # of a problem: its task, the task's settings, and what the task itself calls the problem's entry


def _check(part: str) -> None:
    one_of("part", part, PARTS)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError(f"this reward needs the package reasoning-gym: {NEEDED}")


@checked_by(_check)
def score(completion: Completion, problem: Problem, part: str = "answer") -> Score:
    """What the task's own ``score_answer`` gives the answer, mostly 0 to 1 with shares for what is partly right.

    Args:
        part: where the answer stands: between ``<answer>`` and ``</answer>``, or in ``all`` of the text, or what is ``final``.
            Without that part, the task judges an answer that was not given, and the outcome is ``wrong_format``; so it is, with a 0,
            where the task cannot read the answer: a few raise an error at words where they expect numbers.
    """
    _check(part)
    made_by = problem.columns.get(COLUMN)
    if not isinstance(made_by, Mapping) or "entry" not in made_by:
        raise ValueError(
            f"problem {problem.id!r} has no column {COLUMN!r} with its entry; take the data from grpo.data_reasoning_gym.reasoning_gym"
        )
    said = part_of(completion, problem, part)
    judge = dataset(made_by["task"], made_by["settings"])
    entry = ast.literal_eval(made_by["entry"])
    try:
        value = float(judge.score_answer(None if said is None else said.strip(), entry))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        judge.score_answer(entry["answer"], entry)  # if this fails too, the fault is not the answer's, and the error says so
        return Score(value=0.0, outcome=Outcome.wrong_format, detail=f"the task cannot read it: {type(error).__name__}: {error}")
    return Score(value=value, outcome=Outcome.wrong_format if said is None else Outcome.ok)


def dataset(task: str, settings: Mapping[str, Any]) -> Any:
    """The task's procedural data set.

    What it generates is *not* a function of the settings, the seed among them, alone: some tasks walk through sets of strings, whose
    order is another in every process. So problems are generated once, and travel with their rows.

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
    return reasoning_gym.create_dataset(task, **_typed(task, json.loads(settings)))


def _typed(task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the task's configuration wants them."""
    from reasoning_gym.factory import DATASETS

    types = get_type_hints(DATASETS[task][1]) if task in DATASETS else {}
    return {name: _as(types.get(name), value) for name, value in settings.items()}


def _as(wanted: Any, value: Any) -> Any:
    """What a configuration file cannot write, from what it can: the parts of a ``composite``, a date, a member of an enum."""
    from reasoning_gym.composite import DatasetSpec

    if get_origin(wanted) is list and isinstance(value, list):
        return [_as(get_args(wanted)[0], each) for each in value]
    if wanted is DatasetSpec and isinstance(value, Mapping):
        given = {"weight": 1.0, "config": {}, **value}
        return DatasetSpec(**{**given, "config": _typed(given.get("name", ""), given["config"])})
    if not isinstance(wanted, type):
        return value
    if dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        return wanted(**value)
    if issubclass(wanted, enum.Enum):
        return wanted(value)
    if issubclass(wanted, datetime.date | datetime.time) and isinstance(value, str):
        return wanted.fromisoformat(value)
    return value


def _warm_up(**settings: Any) -> None:
    importlib.import_module("reasoning_gym")  # takes seconds


score.warm_up = _warm_up  # type: ignore[attr-defined]
