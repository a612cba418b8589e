"""Arguments of rewards, checked before a model is loaded.

A reward names a function that checks its arguments; ``grpo.imports.resolve`` calls it when the configuration is read, and the
reward calls it again for those who use it from Python. Such a check raises ``ValueError``: which argument, its value, what is
allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

_Reward = TypeVar("_Reward", bound=Callable[..., Any])


def checked_by(check: Callable[..., None]) -> Callable[[_Reward], _Reward]:
    """Decorator of a reward: ``check(**arguments)``, the reward's arguments with their defaults, raises if they cannot work."""

    def mark(function: _Reward) -> _Reward:
        function.check_arguments = check  # type: ignore[attr-defined]
        return function

    return mark


def whole(name: str, value: Any, least: int) -> None:
    """
    Raises:
        ValueError: unless ``value`` is an integer of at least ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")


def number(name: str, value: Any, above: float = -math.inf) -> None:
    """
    Raises:
        ValueError: unless ``value`` is a finite number greater than ``above``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
        raise ValueError(f"{name} is {value!r}; it must be a finite number" + (f" above {above:g}" if above > -math.inf else ""))


def flag(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: unless ``value`` is true or false.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """
    Raises:
        ValueError: unless ``value`` is one of ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of: {', '.join(allowed)}")


def column(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: unless ``value`` is the name of a column of the data, or None.
    """
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{name} is {value!r}; it must be the name of a column of the data")
