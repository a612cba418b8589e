"""``config.yaml`` of a run: plain values, nothing to resolve, and what is read is what was written, whatever its strings look like.

A recipe is Hydra's: ``1e-3`` is a number there, and ``${…}`` a reference. Here ``${…}`` is text, such as LaTeX in a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from grpo.config import ConfigError

# YAML 1.1, as PyYAML has it, takes 1e-3 for a string. Recipes, and whoever edits this file, mean a number: so the string is quoted.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Dumper(yaml.SafeDumper):
    pass


class _Loader(yaml.SafeLoader):
    pass


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks that few know are escaped: PyYAML would write them so that it reads spaces."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if re.search("[\x85\u2028\u2029]", text) else None)


_Dumper.add_representer(str, _string)
for _side in (_Dumper, _Loader):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def dump(settings: Mapping[str, Any]) -> str:
    text: str = yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read(file: Path) -> dict[str, Any]:
    """The settings that ``dump`` wrote to ``file``.

    Raises:
        ConfigError: it was damaged since, or is something else.
    """
    try:
        settings = yaml.load(file.read_bytes().decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise _no_configuration(file, f"it is not text in UTF-8 (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise _no_configuration(file, " ".join(str(error).split())) from error
    if not isinstance(settings, dict):
        raise _no_configuration(file, "it has no keys")
    return settings


def _no_configuration(file: Path, why: str) -> ConfigError:
    return ConfigError("run.resume", f"{file} is not the configuration of a run: {why}", "put it back as it was")
