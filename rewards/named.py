"""Rewards as they are named on a command line: by a short name, an import path or ``file.py:function``."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from grpo.config import ConfigError
from grpo.imports import check_names_function
from grpo.rewards.base import RewardPart, parse_reward_config


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A reward with a short name. ``gold``: how a model would write a gold answer ``{}``; None: there is none to compare with."""

    target: str
    gold: str | None = "{}"
    style: str | None = None

    @property
    def node(self) -> dict[str, Any]:
        """What a recipe has for it below ``reward.NAME``."""
        return {"fn": self.target} | ({"style": self.style} if self.style else {})


BUILT_IN: Mapping[str, BuiltIn] = {
    "math": BuiltIn(target="grpo.rewards.math.accuracy", gold=r"\boxed{{}}"),
    "math-verify": BuiltIn(target="grpo.rewards.named.math_verify", gold=r"\boxed{{}}", style="grader"),
    "match": BuiltIn(target="grpo.rewards.match.exact_match"),
    "choice": BuiltIn(target="grpo.rewards.choice.choice", gold="The answer is ({})."),
    "code": BuiltIn(target="grpo.rewards.code.code_reward", gold=None),  # the tests of a row stand in its own column
    "format": BuiltIn(target="grpo.rewards.format.r1_format", gold=None),
}


def math_verify(gold: str, completion: str) -> float:
    """The ``math-verify`` package, with its default extraction, to compare with. Its own timeouts are off: the runtime has better."""
    import math_verify as package

    expected = package.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    return float(package.verify(expected, package.parse(completion, parsing_timeout=None), timeout_seconds=None))


def _import_math_verify() -> None:
    """Takes seconds, paid before the first task; and it warns at every call that its timeouts are off."""
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)


math_verify.warm_up = _import_math_verify  # type: ignore[attr-defined]
math_verify.timeout_value = 0.0  # type: ignore[attr-defined]  # as its own timeouts count


def parse_reward(spec: str, option: str) -> tuple[RewardPart, BuiltIn]:
    """``math``, ``package.module.function``, ``file.py:function``, or ``module:function`` for a grader ``f(gold, completion)``.

    Behind it may stand what a recipe has beside ``fn``: ``"./mine.py:brevity style=trl limits.cpu_s=10 target=100"``.

    Raises:
        ConfigError: naming the option and the remedy.
    """
    words = shlex.split(spec)
    if not words:
        raise ConfigError(option, "is empty", f"give one of {', '.join(BUILT_IN)}, an import path, or file.py:function")
    name, *settings = words
    check_names_function(name, option)
    path, colon, function = name.rpartition(":")
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
    elif colon and not path.endswith(".py"):
        built_in = BuiltIn(target=f"{path}.{function}", style="grader")
    elif colon or "." in name:
        built_in = BuiltIn(target=name)
    else:
        raise ConfigError(
            option, f"{name!r} is no built-in reward", f"give one of {', '.join(BUILT_IN)}, an import path, or file.py:function"
        )
    node = built_in.node
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ConfigError(option, f"{setting!r} is not of the form key=value", "write e.g. max_tokens=256 behind the reward")
        *outer, last = key.split(".")
        inner = node
        for word in outer:
            inner = inner.setdefault(word, {})
        inner[last] = yaml.safe_load(value)
    label = function if colon else name.rpartition(".")[2]
    try:
        (part,) = parse_reward_config({label: node})
    except ConfigError as error:
        raise ConfigError(option, str(error).removeprefix(f"reward.{label}").lstrip(".")) from error
    return part, built_in
