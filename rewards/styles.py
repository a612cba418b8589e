"""How reward functions want to be called, and whether one can be called so: checked before any model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from grpo.config import ConfigError
from grpo.imports import FunctionRef

_REMEDY = "choose the style it was written for, or give its other arguments beside fn; docs/rewards.md shows each style"
_ONLY_INSIDE_TRL = ("trainer_state", "log_metric", "environments")


class Style(StrEnum):
    """How a function wants to be called, and what it returns. The last four are how other toolkits call theirs."""

    plain = "plain"  # f(completion, problem) -> float | Score | None
    batch = "batch"  # f(completions, problems) -> list of them
    grader = "grader"  # f(gold: str, completion: str) -> bool | float
    trl = "trl"  # f(prompts, completions, **columns) -> list[float | None]
    trl_chat = "trl_chat"  # the same, prompts and completions as lists of messages
    verl = "verl"  # compute_score(data_source, solution_str, ground_truth, extra_info) -> float | {"score": …}
    openrlhf = "openrlhf"  # reward_func(queries, prompts, labels) -> tensor | {"rewards": …}

    @property
    def is_trl(self) -> bool:
        return self in (Style.trl, Style.trl_chat)

    @property
    def whole_batch(self) -> bool:
        """Whether one call scores all completions of a step."""
        return self is Style.batch or self.is_trl

    @property
    def num_positional(self) -> int | None:
        """How many positional arguments a call has; None where all are passed by name."""
        return {Style.openrlhf: 3, Style.verl: None, Style.trl: None, Style.trl_chat: None}.get(self, 2)

    @property
    def keywords(self) -> tuple[str, ...]:
        """What a call passes by name; TRL's adds the columns of the data."""
        if self is Style.verl:
            return ("data_source", "solution_str", "ground_truth", "extra_info")
        return ("prompts", "completions", "completion_ids", "log_extra") if self.is_trl else ()


def recognise(function: Callable[..., Any]) -> Style:
    """A function whose first two parameters are called ``completions, problems`` takes a batch; any other is a plain one."""
    parameters = _parameters(function)
    return Style.batch if parameters is not None and list(parameters)[:2] == ["completions", "problems"] else Style.plain


def check_keywords(function: Callable[..., Any], ref: FunctionRef, style: Style, key: str) -> None:
    """Whether a function that is called by name takes what its style passes, and asks for no more.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    parameters = _parameters(function)
    if parameters is None or not style.keywords:
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    required = [n for n, p in named.items() if p.default is p.empty and n not in style.keywords and n not in ref.kwargs]
    if style.is_trl:
        required = [name for name in required if name in _ONLY_INSIDE_TRL]  # any other name may be a column of the data
        useful = takes_any or bool({"prompts", "completions", "completion_ids"} & set(named))
        absent = [] if useful else list(style.keywords[:3])
    else:
        absent = [] if takes_any else [name for name in style.keywords if name not in named]
    if required or absent:
        fault = f"needs {', '.join(required)}" if required else f"does not take {', '.join(absent)}"
        passed = ", ".join(style.keywords) + (" and the columns of the data" if style.is_trl else "")
        raise ConfigError(f"{key}.fn", f"style {style} passes {passed}; {ref.target}{inspect.signature(function)} {fault}", _REMEDY)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """None for a builtin without a signature."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
