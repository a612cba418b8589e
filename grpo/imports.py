"""``fn:`` strings → functions. An import path (``grpo.advantages.group_norm``) or a file (``./my_rewards.py:brevity``).

A function from a file travels as its source: the path need not exist where the function runs (a worker process, another node).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from grpo.config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionRef:
    """A function by name, with its file's source if it came from one, and the keyword arguments it is called with."""

    target: str  # as the user wrote it
    source: str | None = None  # text of the file; None for an import path
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        """Import the function, in whichever process this runs, and fix its keyword arguments.

        Raises:
            Exception: whatever the user's file raises while it is executed.
        """
        function = self.function()
        return functools.partial(function, **self.kwargs) if self.kwargs else function

    def function(self) -> Callable[..., Any]:
        """The function itself, its arguments not yet fixed."""
        if self.source is None:
            module_name, _, name = self.target.rpartition(".")
            return getattr(importlib.import_module(module_name), name)
        path, _, name = self.target.rpartition(":")
        return getattr(_module_from_source(path, self.source), name)


def _module_from_source(path: str, source: str) -> types.ModuleType:
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    module_name = f"grpo_user_{Path(path).stem}_{digest}"  # one module a content: a changed file is a new module
    if module_name not in sys.modules:
        module = types.ModuleType(module_name)
        module.__file__ = path
        folder = str(Path(path).resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # last, so that the user's file names shadow nothing
        sys.modules[module_name] = module
        try:
            exec(compile(source, path, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]


def search_path() -> str:
    """Where this process finds modules, as the PYTHONPATH of one that it starts: the user's own are found there too.

    The standard library comes first: a ``types.py`` beside a notebook does no harm here, where the real one was imported before.
    """
    library = os.path.dirname(os.path.abspath(os.__file__))
    ours = (library, os.path.join(library, "lib-dynload"))
    return os.pathsep.join(sorted(map(os.path.abspath, sys.path), key=lambda folder: folder not in ours))


def resolve(settings: Mapping[str, Any], key: str, positional: int | None, provided: tuple[str, ...] = ()) -> FunctionRef:
    """Check a ``{fn: …, **arguments}`` node completely – it exists, imports, and takes these arguments – and freeze it.

    Args:
        settings: the node of the configuration.
        key: where it stands, for messages, e.g. ``reward.brevity``.
        positional: how many positional arguments the toolkit will call it with; None: do not check.
        provided: keyword arguments that the toolkit itself will pass.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    arguments = {
        name: resolve(value, f"{key}.{name}", positional) if isinstance(value, Mapping) and "fn" in value else value
        for name, value in settings.items()
    }
    target = arguments.pop("fn", None)
    if not isinstance(target, str) or not target:
        raise ConfigError(f"{key}.fn", "is missing", "give an import path or `file.py:function`")
    ref = FunctionRef(target=target, source=_read_source(target, f"{key}.fn"), kwargs=arguments)
    try:
        function = ref.function()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}.fn", f"cannot load {target!r}: {error}", "give an import path or `file.py:function`") from error
    except (Exception, SystemExit) as error:  # the user's file: anything
        raise ConfigError(
            f"{key}.fn", f"{target!r} failed while it was imported: {type(error).__name__}: {error}", "correct the file"
        ) from error
    if ref.source is None:
        _check_shadows_nothing(target, f"{key}.fn")
    _check_signature(function, arguments, key, target, positional, provided)
    _check_arguments(function, arguments, key, positional, provided)
    if ref.source is not None:  # the path must mean the same from any working directory
        path, _, name = target.rpartition(":")
        ref = FunctionRef(target=f"{Path(path).expanduser().resolve()}:{name}", source=ref.source, kwargs=arguments)
    return ref


def _check_shadows_nothing(target: str, key: str) -> None:
    """Refuse a user's module that is called like one of Python's: other processes would find Python's (``search_path``)."""
    name = target.partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None)
    if name in sys.stdlib_module_names and file is not None and not Path(file).resolve().is_relative_to(Path(os.__file__).resolve().parent):
        raise ConfigError(key, f"{file!r} has the name of a module of Python's own", f"rename it, or give its path: {name}.py:function")


def _check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], key: str, positional: int | None, provided: tuple[str, ...]
) -> None:
    """What the function itself says of its arguments' values: its ``check_arguments``, if it has one, takes them by name."""
    check = getattr(function, "check_arguments", None)
    if check is None:
        return
    bound = inspect.signature(function).bind(*([None] * (positional or 0)), **dict.fromkeys(provided), **arguments)
    bound.apply_defaults()
    called_with = list(bound.arguments)[: positional or 0]
    values = {name: value for name, value in bound.arguments.items() if name not in (*called_with, *provided)}
    try:
        check(**values)
    except ImportError as error:  # its message says what to install
        raise ConfigError(key, str(error)) from error
    except (ValueError, TypeError) as error:
        page = "objectives" if key.startswith("algo") else "rewards"
        raise ConfigError(key, str(error), f"correct the argument; docs/{page}.md says what each one means") from error


def check_names_function(target: str, key: str) -> None:
    """
    Raises:
        ConfigError: a file alone is named.
    """
    if target.endswith(".py"):
        raise ConfigError(key, f"{target!r} names a file, and none of its functions", f"write {target}:FUNCTION")


def _read_source(target: str, key: str) -> str | None:
    check_names_function(target, key)
    path, _, name = target.rpartition(":")
    if not path.endswith(".py"):
        if ":" in target or "." not in target:
            raise ConfigError(
                key, f"{target!r} is neither an import path nor a file", "write `package.module.function` or `file.py:function`"
            )
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            key,
            f"the file {str(file)!r} does not exist (looked in {Path.cwd()})",
            "check the path; it is relative to where you run the command",
        )
    source = file.read_text(encoding="utf-8")
    if f"def {name}" not in source and name not in source:
        raise ConfigError(key, f"{str(file)!r} defines no {name!r}", "write the name of one of its functions behind the colon")
    return source


def _check_signature(
    function: Callable[..., Any], arguments: Mapping[str, Any], key: str, target: str, positional: int | None, provided: tuple[str, ...]
) -> None:
    if not callable(function):
        raise ConfigError(f"{key}.fn", f"{target!r} is a {type(function).__name__}, not a function", "give the name of a function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin without a signature: nothing to check against
    names = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in arguments:
        if name not in names and not takes_any:
            near = get_close_matches(name, names, n=1)
            raise ConfigError(
                f"{key}.{name}",
                f"{target} takes no argument {name!r}",
                f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(names)}",
            )
    if positional is None:
        return
    try:
        signature.bind(*([None] * positional), **dict.fromkeys(provided), **arguments)
    except TypeError as error:
        raise ConfigError(
            f"{key}.fn",
            f"{target}{signature} cannot be called with {positional} arguments"
            + (f" and {', '.join(arguments)}" if arguments else "")
            + f": {error}",
            "see docs/extending.md for the signature of each kind of function",
        ) from error
