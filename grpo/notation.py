"""What a function of the maths says of itself: its formula with the numbers it is called with, where it comes from, what it allows.

A component without a formula – a user's own – is shown in the objective card by its name, its arguments and the first paragraph of its
docstring.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def written(formula: str | Callable[..., str], source: str) -> Callable[[F], F]:
    """Attach a formula: a text, or a function of the component's arguments that returns one."""

    def attach(function: F) -> F:
        function.formula = formula  # type: ignore[attr-defined]
        function.source = source  # type: ignore[attr-defined]
        return function

    return attach


def formula(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    """The formula of ``function`` with ``arguments`` (and its defaults) in it; None if it has none, or one that cannot be written."""
    template = getattr(function, "formula", None)
    if template is None or isinstance(template, str):
        return template
    try:
        defaults = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}
        return str(template(**(defaults | dict(arguments))))
    except Exception:  # the user's code: a formula that fails is no reason not to train
        return None


def number(value: int | float) -> str:
    """As it stands in a formula: 1048576, 0.9999999. A whole number in full; else twelve digits, so that 1 − 0.9 is 0.1 as in decimal."""
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def source(function: Callable[..., Any]) -> str:
    return str(getattr(function, "source", ""))


def checked(check: Callable[..., None]) -> Callable[[F], F]:
    """``check(**arguments)``, the component's own arguments with their defaults, raises ``ValueError`` if they cannot work.

    ``grpo.imports.resolve`` calls it when a configuration is read, before a model is loaded.
    """

    def attach(function: F) -> F:
        function.check_arguments = check  # type: ignore[attr-defined]
        return function

    return attach


def positive(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: unless ``value`` is a finite number above 0.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number above 0")


def not_negative(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: unless ``value`` is a finite number of 0 or more.
    """
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number of 0 or more")


def above_one_or_none(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: unless ``value`` is a finite number above 1, or None.
    """
    if value is not None and (not _is_number(value) or not 1 < value < math.inf):
        raise ValueError(f"{name} is {value!r}; it must be a finite number above 1, or null for none")


def whole(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: unless ``value`` is an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def interval(low: Any, high: Any) -> None:
    """
    Raises:
        ValueError: unless 0 ≤ ``low`` < ``high``; ``high`` may be infinite: no upper bound.
    """
    not_negative("low", low)
    if not _is_number(high) or not low < high:
        raise ValueError(f"high is {high!r} and low is {low!r}; high must be a number above low (inf is no upper bound)")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
