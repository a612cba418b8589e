"""What a reward is: a function ``f(completion, problem) -> float | Score | None``, and how several become one number.

A reward author writes plain Python and raises plain errors; ``call`` turns whatever happens into a ``Score``. An unscored
completion has the value NaN, never 0: a bug in a grader must not look like a weak model.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config import ConfigError
from grpo.imports import FunctionRef, resolve
from grpo.types import Completion, Outcome, Problem, Score

DETAIL_CHARS = 4_000  # of a score's detail: a step has thousands of scores, and all of them are logged


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPart:
    """One entry of ``reward:``. ``RewardPart(name="accuracy", ref=FunctionRef(target="grpo.rewards.math.accuracy"), weight=1.0)``"""

    name: str
    ref: FunctionRef
    weight: float


def parse_reward_config(node: Mapping[str, Mapping[str, Any]]) -> tuple[RewardPart, ...]:
    """The configuration's ``reward`` node → its parts, each checked down to its arguments.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    if not node:
        raise ConfigError("reward", "has no entry", "add one, e.g. reward.accuracy.fn=grpo.rewards.math.accuracy")
    return tuple(_parse_part(name, settings) for name, settings in node.items())


def _parse_part(name: str, settings: Mapping[str, Any]) -> RewardPart:
    key = f"reward.{name}"
    if not isinstance(settings, Mapping):
        raise ConfigError(key, f"is {settings!r}; it must hold fn, and optionally weight and arguments", f"write {key}.fn=…")
    arguments = dict(settings)
    weight = arguments.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ConfigError(f"{key}.weight", f"{weight!r} is not a finite number", "give a number such as 0.5; 0 only logs the part")
    return RewardPart(name=name, ref=resolve(arguments, key=key, positional=2), weight=float(weight))


def combine(scores: Mapping[str, Score], weights: Mapping[str, float]) -> float:
    """Σ weight · score. NaN if a part that counts (weight ≠ 0) is unscored."""
    return math.fsum(weight * scores[name].value for name, weight in weights.items() if weight != 0)


def call(function: Callable[..., Any], completion: Completion, problem: Problem) -> Score:
    """Score one completion, in this process and without a deadline; whatever the function raises is caught and reported.

    Call it from synchronous code: an ``async def`` reward is run to its end with ``asyncio.run``.
    """
    try:
        value = function(completion, problem)
        return to_score(asyncio.run(_wait_for(value)) if inspect.isawaitable(value) else value)
    except MemoryError as error:
        return Score(value=math.nan, outcome=Outcome.memory, detail=describe(error))
    except (Exception, SystemExit) as error:  # the user's code: anything; sys.exit() there must not end a worker
        return Score(value=math.nan, outcome=Outcome.error, detail=describe(error))


async def _wait_for(value: Any) -> Any:
    return await value


def to_score(value: Any) -> Score:
    """What a reward function returned → ``Score``. Anything that is not a finite number leaves the completion unscored."""
    if isinstance(value, Score):
        inner = to_score(value.value)
        outcome = value.outcome if inner.scored or value.outcome is not Outcome.ok else inner.outcome
        return Score(value=inner.value, outcome=Outcome(outcome), detail=shorten(str(value.detail) or inner.detail))
    if value is None:
        return Score(value=math.nan, outcome=Outcome.invalid)
    number = _as_float(value)
    if number is not None and math.isfinite(number):
        return Score(value=number)
    if number is not None and math.isnan(number):
        return Score(value=math.nan, outcome=Outcome.invalid)
    detail = f"returned {shorten(repr(value), 200)} ({type(value).__name__}); a reward returns a number, a Score or None"
    return Score(value=math.nan, outcome=Outcome.invalid, detail=detail)


def _as_float(value: Any) -> float | None:
    """Numbers and zero-dimensional array scalars (numpy, torch), without importing either; None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):  # bool and int included
        return None
    try:
        return float(value)
    except OverflowError:  # an int or a Fraction beyond 1.8e308
        return math.inf


def attribute(function: Callable[..., Any], name: str, default: Any) -> Any:
    """An attribute that a reward function may carry for the runtime, also when its keyword arguments are fixed.

    ``timeout_value``: the value (default: unscored) of a completion on which the function used up its CPU time.
    ``warm_up``: called once in each worker, before its first task, for imports that take long.
    """
    return getattr(getattr(function, "func", function), name, default)  # .func: functools.partial


def describe(error: BaseException) -> str:
    """The traceback as the author of the function wants to see it: from their own first line on, and not too long."""
    frames = error.__traceback__.tb_next if error.__traceback__ else None  # the first frame is ours
    return shorten("".join(traceback.format_exception(type(error), error, frames)))


def shorten(text: str, limit: int = DETAIL_CHARS) -> str:
    """Cut the middle out: a traceback names the user's line at its start and the error at its end."""
    if len(text) <= limit:
        return text
    gap = "\n…\n"
    head = (limit - len(gap)) // 2
    return text[:head] + gap + text[len(text) - (limit - len(gap) - head) :]
