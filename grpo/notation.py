"""How a function writes itself in the objective card: its formula with the numbers it is called with, and where it comes from.

A component without this decorator – a user's own – is shown by its name, its arguments and the first paragraph of its docstring.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def written(formula: str | Callable[..., str], source: str) -> Callable[[F], F]:
    """Attach a formula: a text, or a function of the component's keyword arguments that returns one."""

    def attach(function: F) -> F:
        function.formula = formula  # type: ignore[attr-defined]
        function.source = source  # type: ignore[attr-defined]
        return function

    return attach


def formula(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    """The formula of ``function`` with ``arguments`` (and its defaults) in it; None if it has none."""
    template = getattr(function, "formula", None)
    if template is None or isinstance(template, str):
        return template
    keywords = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return str(template(**(keywords | dict(arguments))))


def source(function: Callable[..., Any]) -> str:
    return str(getattr(function, "source", ""))
