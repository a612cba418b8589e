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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config import ConfigError
from grpo.imports import FunctionRef, resolve
from grpo.rewards.limits import RewardLimits
from grpo.rewards.styles import Style, check_keywords, recognise
from grpo.types import Completion, Outcome, Problem, Score

DETAIL_CHARS = 4_000  # of a score's detail: a step has thousands of scores, and all of them are logged


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardPart:
    """One entry of ``reward:``. ``RewardPart(name="accuracy", ref=FunctionRef(target="grpo.rewards.math.accuracy"), weight=1.0)``"""

    name: str
    ref: FunctionRef
    weight: float
    style: Style = Style.plain
    columns: Mapping[str, str] = field(default_factory=dict)  # TRL styles: argument → column, where their names differ
    limits: Mapping[str, Any] = field(default_factory=dict)  # changes to the runtime's ``RewardLimits`` for this part


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
    written = arguments.pop("style", None)
    if written is not None and written not in list(Style):
        raise ConfigError(f"{key}.style", f"{written!r} is no style", f"choose one of: {', '.join(Style)}; docs/rewards.md shows each")
    columns = _mapping(arguments.pop("columns", {}), f"{key}.columns", "{argument: column}")
    changes = _mapping(arguments.pop("limits", {}), f"{key}.limits", "{cpu_s: 10}")
    style = Style(written or Style.plain)
    ref = resolve(arguments, key=key, positional=style.num_positional)
    function = ref.function()
    if written is None:
        style = recognise(function)
    check_keywords(function, ref, style, key)
    if columns and not style.is_trl:
        raise ConfigError(f"{key}.columns", f"means nothing to style {style}", "take it out; only style trl has its arguments from columns")
    limits = {**attribute(function, "limits", {}), **changes}
    try:
        RewardLimits().with_changes(limits)
    except ValueError as error:
        raise ConfigError(f"{key}.limits", str(error), "docs/rewards.md says what each limit means") from error
    return RewardPart(name=name, ref=ref, weight=float(weight), style=style, columns=columns, limits=limits)


def _mapping(value: Any, key: str, example: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(key, f"is {value!r}; it must be a mapping", f"write it as {example}")
    return dict(value)


def combine(scores: Mapping[str, Score], weights: Mapping[str, float]) -> float:
    """Σ weight · score. NaN if a part that counts (weight ≠ 0) is unscored.

    Rounded to 12 significant digits of its largest term: 0.1 · 1 + 1 · 0.2 is 0.30000000000000004 in floats, and a group that holds it
    beside 0.3 must count as a group of equal rewards, not be blown up to advantages of size one. A float holds 15 to 17 digits.
    """
    terms = [weight * scores[name].value for name, weight in weights.items() if weight != 0]
    total = math.fsum(terms)
    largest = max(map(abs, terms), default=0.0)
    if largest == 0 or not math.isfinite(total):
        return total
    return round(total, 11 - math.floor(math.log10(largest))) + 0.0  # + 0.0: a sum of −0.0 is 0.0


def call(function: Callable[..., Any], completion: Completion, problem: Problem) -> Score:
    """Score one completion, in this process and without a deadline; whatever the function raises is caught and reported.

    Call it from synchronous code: an ``async def`` reward is run to its end with ``asyncio.run``.
    """
    return _call(function, (completion, problem), lambda value: [to_score(value)], num_scores=1)[0]


def call_batch(function: Callable[..., Any], completions: Sequence[Completion], problems: Sequence[Problem]) -> list[Score]:
    """``call`` for a function that scores a whole batch: one score a completion, in order. What fails, fails for all of them."""
    return _call(function, (completions, problems), lambda value: to_scores(value, len(completions)), num_scores=len(completions))


def _call(function: Callable[..., Any], arguments: tuple[Any, Any], read: Callable[[Any], list[Score]], num_scores: int) -> list[Score]:
    try:
        value = function(*arguments)
        return read(asyncio.run(_wait_for(value)) if inspect.isawaitable(value) else value)
    except MemoryError as error:
        value = float(attribute(function, "memory_value", math.nan))
        return [Score(value=value, outcome=Outcome.memory, detail=describe(error))] * num_scores
    except (Exception, SystemExit) as error:  # the user's code: anything; sys.exit() there must not end a worker
        return [Score(value=math.nan, outcome=Outcome.error, detail=describe(error))] * num_scores


async def _wait_for(value: Any) -> Any:
    return await value


def to_score(value: Any) -> Score:
    """What a reward function returned → ``Score``. Anything that is not a finite number leaves the completion unscored."""
    if isinstance(value, Score):
        inner = to_score(value.value)
        outcome = value.outcome if inner.scored or value.outcome is not Outcome.ok else inner.outcome
        tags = tuple(map(str, value.tags))  # of a user's own enum, say: plain text is what files hold
        return Score(value=inner.value, outcome=Outcome(outcome), detail=shorten(str(value.detail) or inner.detail), tags=tags)
    if value is None:
        return Score(value=math.nan, outcome=Outcome.invalid, detail="returned None")
    number = _as_float(value)
    if number is not None and math.isfinite(number):
        return Score(value=number)
    if number is not None and math.isnan(number):
        return Score(value=math.nan, outcome=Outcome.invalid, detail="returned NaN")
    detail = f"returned {shorten(repr(value), 200)} ({type(value).__name__}); a reward returns a number, a Score or None"
    return Score(value=math.nan, outcome=Outcome.invalid, detail=detail)


def to_scores(value: Any, num_completions: int) -> list[Score]:
    """What a batch function returned → one ``Score`` a completion; all unscored unless it is a list (or an array) of that length."""
    if getattr(value, "shape", ()) and hasattr(value, "tolist"):  # a numpy array, a torch tensor
        value = value.tolist()
    if not isinstance(value, list | tuple):
        problem = f"returned {shorten(repr(value), 200)} ({type(value).__name__}); a batch function returns a list"
    elif len(value) != num_completions:
        problem = f"returned {len(value)} values for {num_completions} completions; a batch function returns one a completion, in order"
    else:
        return [to_score(item) for item in value]
    return [Score(value=math.nan, outcome=Outcome.invalid, detail=problem)] * num_completions


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

    ``timeout_value``, ``memory_value``: the value (default: unscored) of a completion on which the function used up its CPU time,
    or its memory: 0 says that such a completion is the model's doing, and wrong.
    ``limits``: changes to the runtime's limits, e.g. ``{"wall_s": 60}`` for a function that waits for a server.
    ``warm_up``: called once in each worker, before its first task, for imports that take long; with the function's configured
    arguments if it takes any.
    """
    return getattr(getattr(function, "func", function), name, default)  # .func: functools.partial


def describe(error: BaseException) -> str:
    """The traceback as the author of the function wants to see it: from their own first line on, and not too long."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__") in _OUR_FRAMES:
        frames = frames.tb_next
    return shorten("".join(traceback.format_exception(type(error), error, frames)))


_OUR_FRAMES = (__name__, "grpo.rewards.adapters", "grpo.rewards.worker", "grpo.imports", "asyncio.runners", "asyncio.base_events")


def shorten(text: str, limit: int = DETAIL_CHARS) -> str:
    """Cut the middle out: a traceback names the user's line at its start and the error at its end."""
    if len(text) <= limit:
        return text
    gap = "\n…\n"
    head = (limit - len(gap)) // 2
    return text[:head] + gap + text[len(text) - (limit - len(gap) - head) :]
