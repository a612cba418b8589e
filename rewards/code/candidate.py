"""What runs in the sandbox of the model's program when asserts test it, which is given this file alone: it imports nothing of ours.

Everything in this process belongs to the program: it may forge each value that leaves, but must know which value to forge.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

_module = types.ModuleType("solution")


def serve(*request: Any) -> Any:
    """``serve("load", prelude, program, functions)``, then ``serve("call", name, args, kwargs)`` any number of times."""
    kind, *content = request
    return (load if kind == "load" else call)(*content)


def load(prelude: str, program: str, functions: Sequence[str]) -> tuple[str, str]:
    """Define what the program defines. ``("", "")``, or what went wrong: ``compile_error``, ``runtime_error`` or ``no_function``."""
    sys.modules[_module.__name__] = _module  # dataclasses and typing look a class's module up there
    for name, text in (("given", prelude), ("program", program)):
        try:
            code = compile(text, f"<{name}>", "exec", dont_inherit=True)
        except BaseException as error:  # MemoryError and RecursionError too: nested too deeply
            return "compile_error", f"{type(error).__name__}: {error}"[:500]
        try:
            exec(code, _module.__dict__)
        except SystemExit:
            pass  # a script that ends with exit() has defined its functions
        except BaseException as error:
            return "runtime_error", f"{type(error).__name__}: {error}"[:500]
    missing = [name for name in functions if _find(name) is None]
    return ("no_function", f"the program defines no {', '.join(missing)}") if missing else ("", "")


def call(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    """What the function returns, and its arguments as it left them."""
    function = _find(name)
    if function is None:
        raise NameError(f"the program defines no {name}")
    return function(*args, **kwargs), args, kwargs


def _find(name: str) -> Callable[..., Any] | None:
    """The function, or the method of a fresh ``Solution`` (LeetCode)."""
    found = getattr(_module, name, None)
    if callable(found):
        return found
    solution = getattr(_module, "Solution", None)
    return getattr(solution(), name, None) if isinstance(solution, type) and hasattr(solution, name) else None
