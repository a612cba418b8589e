"""The user's files in a configuration by their absolute paths, so that a run can be gone on with from any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from grpo.config import Config


def anchor_paths(config: Config) -> None:
    """Write the paths into the configuration: of functions, of the model's folder, of files and folders among the arguments."""
    if os.path.isdir(os.path.expanduser(config.model.path)):  # else a name on the hub, or what makes a model
        config.model.path = _absolute(config.model.path)
    open_nodes: list[tuple[Any, tuple[str, ...]]] = [
        (config, ("environment", "reward")),
        (config.model, ("args",)),
        (config.data, ("problems",)),
        (config.rollout, ("engine_args",)),
        (config.algo, ("advantage", "normalise", "ratio", "objective", "correction", "kl", "aggregation")),
    ]
    for section, names in open_nodes:
        for name in names:
            setattr(section, name, _anchored(getattr(section, name)))
    path = config.data.problems.get("path")  # whoever loads a data set looks for a folder first, and then on the hub
    if isinstance(path, str) and os.path.exists(os.path.expanduser(path)):
        config.data.problems["path"] = _absolute(path)


def _anchored(value: Any) -> Any:
    """``value`` with the files and folders in it made absolute, however deep they stand."""
    if isinstance(value, Mapping):
        return {key: _anchored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_anchored(item) for item in value]
    if not isinstance(value, str):
        return value
    path, colon, function = value.rpartition(":")
    if path.endswith(".py") and os.path.isfile(os.path.expanduser(path)):
        return _absolute(path) + colon + function
    return _absolute(value) if _is_local(value) else value


def _is_local(text: str) -> bool:
    """Whether an argument means a file or folder here. That one exists is not enough: ``train`` may be a split, ``org/name`` on the hub."""
    there, written_as_path = os.path.expanduser(text), text.startswith(("./", "../", "~/"))
    return (os.path.isfile(there) and (written_as_path or "/" in text or "." in text)) or (os.path.isdir(there) and written_as_path)


def _absolute(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
