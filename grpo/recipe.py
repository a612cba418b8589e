"""Recipes → ``Config``, through Hydra. With ``grpo.sweep`` and ``grpo.cli``, the only place that knows Hydra and OmegaConf.

After ``load_recipe`` only dataclasses travel.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grpo import config_file
from grpo.config import Config, ConfigError, EngineName, keys, shown
from grpo.config_checks import validate
from grpo.environment import vllm_is_for_gpus
from grpo.idle import dropped
from grpo.imports import check_names_function

ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("share", lambda whole, share: max(1, round(whole * share)), replace=True)  # ${share:${key},0.2}

BUILT_IN = "pkg://grpo.recipes"


def load_recipe(recipe: str, *overrides: str) -> Config:
    """``load_recipe("r1_zero_arithmetic", "optim.lr=1e-5")`` or ``load_recipe("my_recipe.yaml")``.

    Raises:
        ConfigError: naming the key, what is allowed and the remedy.
    """
    return to_config(compose_recipe(recipe, overrides))


def built_in() -> dict[str, str]:
    """Name → first comment line of every built-in recipe."""
    found = {}
    for file in sorted(resources.files("grpo.recipes").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").splitlines()[0]
            found[file.name.removesuffix(".yaml")] = first.removeprefix("#").strip()
    return found


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """Config group → its choices, e.g. ``{"algo": ("grpo", …)}``."""
    folders = [f for f in resources.files("grpo.recipes").iterdir() if f.is_dir() and not f.name.startswith("_")]
    return {f.name: tuple(sorted(c.name.removesuffix(".yaml") for c in f.iterdir() if c.name.endswith(".yaml"))) for f in folders}


def locate(recipe: str) -> tuple[Path | None, str]:
    """(folder of the user's own YAML, or None for a built-in; config name)."""
    if not recipe.endswith((".yaml", ".yml")):
        if recipe not in built_in():
            near = [f"{recipe}.yaml"] if Path(f"{recipe}.yaml").expanduser().is_file() else get_close_matches(recipe, built_in(), n=1)
            there = f"there are: {', '.join(built_in())}; or give a path to a YAML file"
            raise ConfigError("recipe", f"there is no built-in recipe {recipe!r}", f"did you mean {near[0]!r}?" if near else there)
        return None, recipe
    file = Path(recipe).expanduser().resolve()
    if not file.is_file():
        raise ConfigError("recipe", f"the file {recipe!r} does not exist (looked in {Path.cwd()})", "check the path")
    if file.suffix == ".yml":
        raise ConfigError("recipe", f"{file.name} ends in .yml, and Hydra reads .yaml alone", f"rename it to {file.stem}.yaml")
    if (file.parent / "schema.yaml").exists():
        raise ConfigError("recipe", f"beside {file.name} stands a schema.yaml, which Hydra would take for ours", "rename or move it")
    if file.stem in built_in():
        raise ConfigError("recipe", f"{file.name} has the name of a built-in recipe, which Hydra would load instead", "rename your file")
    return file.parent, file.stem


def compose_recipe(recipe: str, overrides: Sequence[str]) -> DictConfig:
    """The composed configuration, types checked by the schema, ranges not yet."""
    folder, name = locate(recipe)
    replaced, rest = replacements(overrides)
    prepared = prepare(rest)
    GlobalHydra.instance().clear()
    try:
        if folder is None:
            with initialize_config_module("grpo.recipes", version_base="1.3"):
                composed = compose(name, prepared)
        else:
            with initialize_config_dir(str(folder), version_base="1.3"):
                composed = compose(name, [*prepared, f"hydra.searchpath=[{BUILT_IN}]"])
        if OmegaConf.get_type(composed) is not Config:
            raise ConfigError("defaults", f"recipe {recipe!r} does not start from the schema", "put `- schema` first in its defaults list")
        for key, node in replaced.items():
            OmegaConf.update(composed, key, node, merge=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error) from error
    except YAMLError as error:
        what = f"{recipe} or a file it names is not YAML: {' '.join(str(error).split())}"
        raise ConfigError("recipe", what, "correct the file") from error
    _drop_idle(composed, overrides)
    _give_a_gpu(composed, overrides)
    if not composed.run.recipe:
        composed.run.recipe = name
    return composed


def _drop_idle(composed: DictConfig, overrides: Sequence[str], *also_given: str) -> None:
    """What the recipe set for something that the command line has switched off goes with it: see ``grpo.idle``."""
    try:
        for key, default in dropped(cast(Config, composed), _given(overrides) | set(also_given)).items():
            OmegaConf.update(composed, key, default, merge=False)
    except OmegaConfBaseException as error:
        raise translate(error) from error


def _give_a_gpu(composed: DictConfig, overrides: Sequence[str]) -> None:
    """To an engine of the vLLM that is built for GPUs, which is none without: recipes for CPUs run on such a machine as they are."""
    rollout, key = composed.rollout, "rollout.gpus_per_engine"
    if rollout.engine == EngineName.vllm and not rollout.gpus_per_engine and key not in _given(overrides) and vllm_is_for_gpus():
        rollout.gpus_per_engine = 1


def _given(overrides: Sequence[str]) -> set[str]:
    return {override.key_or_group for override in parse(overrides)}


def replacements(overrides: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Open nodes that the command line gives anew, and the overrides that are left for Hydra.

    ``reward={}``, ``algo.correction={}`` and ``algo.objective.fn=…`` start from nothing: the arguments that a preset had for another
    function would not fit. ``reward.brevity.fn=…`` and ``algo.correction.mask.fn=…`` add an entry beside those that are there.
    """
    parsed = parse(overrides)
    whole = [name for name, (default, _) in keys().items() if isinstance(default, dict)]
    chosen = [o.key_or_group for o in parsed if o.key_or_group in groups() and not isinstance(o.value(), dict)]
    single = [name for name in whole if name not in ("algo.correction", "reward")]
    replaced: dict[str, dict[str, Any]] = {}
    for o in parsed:
        if o.key_or_group in whole and o.key_or_group not in chosen and not o.is_sweep_override():
            value = None if o.is_delete() else o.value()
            if value is not None and not isinstance(value, dict):
                raise ConfigError(o.key_or_group, f"is {value!r}", "write {} or {fn: …}")
            if o.key_or_group == "reward" and (loose := [name for name, part in (value or {}).items() if not isinstance(part, dict)]):
                raise ConfigError(f"reward.{loose[0]}", "is no part: each has a name and a fn", "write reward={NAME: {fn: …}}")
            replaced[o.key_or_group] = dict(value or {})
        elif o.key_or_group.removesuffix(".fn") in single and o.key_or_group.endswith(".fn") and not o.is_sweep_override():
            replaced[o.key_or_group.removesuffix(".fn")] = {"fn": o.value()}
    rest = []
    for text, o in zip(overrides, parsed, strict=True):
        node = next((name for name in replaced if o.key_or_group == name or o.key_or_group.startswith(name + ".")), None)
        if node is None:
            rest.append(text)
        elif o.key_or_group != node and not o.is_delete():
            *path, last = o.key_or_group.removeprefix(node + ".").split(".")
            inner = replaced[node]
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = o.value()
    return replaced, rest


def parse(overrides: Sequence[str]) -> list[Override]:
    """
    Raises:
        ConfigError: one of them is not written as Hydra wants it.
    """
    try:
        return cast(list[Override], OverridesParser.create().parse_overrides(list(overrides)))
    except HydraException as error:
        remedy = "overrides are written key=value; quote special characters: \"key='<value>'\""
        raise ConfigError("command line", first_line(error), remedy) from error


def to_config(composed: DictConfig) -> Config:
    """Resolve interpolations, convert to dataclasses, check ranges."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(missing[0], "has no value", f"set it in the recipe or as {missing[0]}=…")
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise translate(error) from error
    assert isinstance(config, Config)
    validate(config)
    return config


def prepare(overrides: Sequence[str]) -> list[str]:
    """Check every override's key, and mark new names under open nodes as additions, so that ``reward.brevity.fn=…`` just works."""
    return [_prepare_one(text, override) for text, override in zip(overrides, parse(overrides), strict=True)]


def _prepare_one(text: str, override: Override) -> str:
    key = override.key_or_group
    if key in groups() and override.value() is None:
        raise ConfigError(key, "cannot be null", f"choose from: {', '.join(groups()[key])}")
    if key in groups() or key.startswith("hydra"):
        if isinstance(value := override.value(), str) and key in groups() and value not in groups()[key]:
            near, there = get_close_matches(value, groups()[key], n=1), f"choose from: {', '.join(groups()[key])}"
            raise ConfigError(key, f"there is no {value!r}", f"did you mean {near[0]!r}?" if near else there)
        return text
    known = keys()
    if key in known:
        return text
    if any(key.startswith(name + ".") for name, (default, _) in known.items() if isinstance(default, dict)):
        return text if text.startswith(("+", "~")) else f"++{text}"
    if any(name.startswith(key + ".") for name in known):
        first = next(name for name in known if name.startswith(key + "."))
        raise ConfigError(key, "is a section, not a setting", f"set one of its keys, e.g. {first}=…")
    raise unknown_key(key)


def unknown_key(key: str) -> ConfigError:
    """An error with the nearest real key: by the whole name, else by the last word."""
    known = list(keys())
    near = get_close_matches(key, known, n=1, cutoff=0.75) or [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    near = near or get_close_matches(key, known, n=1, cutoff=0.5)
    return ConfigError(key, "there is no such key", f"did you mean {near[0]!r}?" if near else "`grpo recipes show` lists all keys")


def translate(error: Exception) -> ConfigError:
    """Hydra's and OmegaConf's errors in our words: the key first."""
    text = str(error.__cause__ or error)
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if match := re.search(r"full_key: (\S+)", f"{error}\n{text}"):
        key = match[1]
    first = first_line(text)
    if key and " not in " in first:
        return unknown_key(key)
    if key and first.endswith("is not Optional"):
        return ConfigError(key, "cannot be null", "give it a value, or leave it out")
    if match := re.search(r"Could not override '(\w+)'\. No match in the defaults list", text):
        return ConfigError(
            match[1], "the recipe chooses no such group, so there is nothing to replace", f"add `- {match[1]}: CHOICE` to its defaults list"
        )
    if match := re.search(r"Could not find '([^']+)'", str(error)):
        group, _, choice = match[1].rpartition("/")
        return ConfigError(group or "defaults", f"there is no {choice!r}", f"choose from: {', '.join(groups().get(group, built_in()))}")
    return ConfigError(key or "recipe", first, "`grpo recipes show` lists every key with its meaning")


def first_line(error: Any) -> str:
    lines = [line for line in str(error).strip().splitlines() if not line.endswith("raised while composing config:")]  # says nothing
    return lines[0] if lines else type(error).__name__


def to_yaml(composed: DictConfig) -> str:
    """The composed configuration, interpolations as they were written."""
    return OmegaConf.to_yaml(composed)


def load_run(folder: Path, overrides: Sequence[str] = (), reward: str | None = None) -> Config:
    """The configuration a run was made with, its name and place fixed, with overrides; ``reward``: a preset or function instead of its own.

    Overrides mean what they mean for a recipe, but that there are no groups any more.

    Raises:
        ConfigError: the file is not a configuration of this version, or an override is wrong.
    """
    folder = folder.resolve()
    for override in parse(overrides):
        _check_for_a_run(override)
    prepare(overrides)
    replaced, rest = replacements(overrides)
    kept = config_file.read(folder / "config.yaml")
    _check_whole(kept, folder / "config.yaml")
    try:
        composed = OmegaConf.merge(OmegaConf.structured(Config), _literal(kept))
        assert isinstance(composed, DictConfig)
        for key, name in _place(folder).items():
            OmegaConf.update(composed, key, _literal(name))
        if reward is not None:
            OmegaConf.update(composed, "reward", _reward_node(reward), merge=False)
            composed.eval.problems = 0  # eval.metric may name a part that this reward does not have
        for override in parse(rest):
            _lay(composed, override)
        for key, node in replaced.items():
            OmegaConf.update(composed, key, node, merge=False)
        _check_place(composed, folder)
        _check_goes_on(composed, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error) from error
    _drop_idle(composed, overrides, *(("reward", "eval.problems") if reward is not None else ()))
    _give_a_gpu(composed, overrides)
    return to_config(composed)


def _check_whole(kept: Mapping[str, Any], file: Path) -> None:
    """A key that is not there would take its default, and the run would go on as another one."""
    lacking = [key for key in keys() if not _has(kept, key.split("."))]
    if lacking:
        others = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        what = f"{file} has no {lacking[0]}{others}: it was cut off, or is of another version of grpo-toolkit"
        raise ConfigError("run.resume", what, "put it back as it was, or add them (`grpo recipes show` lists every key)")


def _has(node: Any, names: Sequence[str]) -> bool:
    if not names:
        return True
    return isinstance(node, Mapping) and names[0] in node and _has(node[names[0]], names[1:])


def _place(folder: Path) -> dict[str, str]:
    return {"run.dir": str(folder.parent.parent), "run.recipe": folder.parent.name, "run.name": folder.name}


def _check_for_a_run(override: Override) -> None:
    """What nobody can tell a run that exists."""
    key = override.key_or_group
    if override.is_sweep_override():
        what = "is given several values, and a run folder is one run"
        raise ConfigError(key, what, "give one; a sweep starts from a recipe: --multirun")
    if key.startswith("hydra"):
        raise ConfigError(key, "is of Hydra, which composes recipes; a run has its config.yaml", "leave it out")
    if key in groups():
        _check_is_no_group(override)
    elif override.is_delete():
        _check_can_be_taken_out(key)


def _check_is_no_group(override: Override) -> None:
    """``reward`` is both a group and an open node."""
    key = override.key_or_group
    is_node = key in keys()
    if not (is_node and isinstance(override.value(), dict)):
        whole = f", or the whole node, {key}={{…}}" if is_node else ""
        raise ConfigError(key, "a group cannot be chosen anew for a run that exists", f"set single keys{whole}; or start from the recipe")


def _check_can_be_taken_out(key: str) -> None:
    if key in keys() and not isinstance(default := keys()[key][0], dict):
        raise ConfigError(key, "cannot be taken out: every run has it", f"set it to its default: {key}={shown(default)}")


def _check_place(composed: DictConfig, folder: Path) -> None:
    """A run's name and place are its folder's. Looked at in the configuration, where every value has the type of its key."""
    for key, own in _place(folder).items():
        value = OmegaConf.select(composed, key)
        meant = str(Path(value).expanduser().resolve()) if key == "run.dir" else value
        if meant != own:
            what = f"is {shown(value)}, but a run that exists is where its folder is and is called as that is: {folder}"
            raise ConfigError(key, what, "move or rename the folder; or start another run from the recipe")
        OmegaConf.update(composed, key, _literal(own))  # the whole path, however it was typed


def _check_goes_on(composed: DictConfig, overrides: Sequence[str]) -> None:
    if "run.resume" in _given(overrides) and not composed.run.resume:
        what = "is false, but a run that exists is gone on with"
        raise ConfigError("run.resume", what, "leave it out; or start another run from the recipe")


def _lay(composed: DictConfig, override: Override) -> None:
    """One override over the configuration of a run."""
    key = override.key_or_group
    if not override.is_delete():
        OmegaConf.update(composed, key, override.value(), force_add=True)
        return
    around, _, name = key.rpartition(".")
    node = OmegaConf.select(composed, around)
    there = list(node) if isinstance(node, DictConfig) else []
    if name not in there:
        raise ConfigError(key, "is not there to be taken out", f"there is: {', '.join(map(str, there))}" if there else "leave it out")
    if override.value() is not None and override.value() != node[name]:
        raise ConfigError(key, f"is {shown(node[name])}, not {shown(override.value())}", f"to take it out whatever it is: ~{key}")
    with open_dict(node):
        del node[name]


def _literal(value: Any) -> Any:
    """``value`` with every ``${`` escaped, which OmegaConf would take for the beginning of a reference."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def refuse_resume(config: Config) -> None:
    """A recipe is no description of a run that exists: its settings, or those that were typed for it, may have been others.

    Raises:
        ConfigError: ``run.resume`` is true in a recipe.
    """
    if config.run.resume:
        folder = Path(config.run.dir) / (config.run.recipe or "run") / (config.run.name or "NAME")
        what = "is true, but this is a recipe: a run is gone on with by its folder, which has the settings it was made with"
        remedy = f"grpo train {shlex.quote(str(folder))}, with what is to be otherwise behind it; for another run, leave this out"
        raise ConfigError("run.resume", what, remedy)


def _reward_node(reward: str) -> DictConfig:
    """The ``reward`` node of a preset by its name; else one part whose function is ``reward``."""
    from grpo.rewards.named import BUILT_IN as SHORT_NAMES

    check_names_function(reward, "--reward")
    presets = groups()["reward"]
    if reward in presets:
        node = OmegaConf.create((resources.files("grpo.recipes") / "reward" / f"{reward}.yaml").read_text(encoding="utf-8"))
        assert isinstance(node, DictConfig)
        return node
    if reward in SHORT_NAMES:  # those of `grpo score --reward`
        return OmegaConf.create({reward: SHORT_NAMES[reward].node})
    if ":" not in reward and "." not in reward:
        known = sorted({*presets, *SHORT_NAMES})
        near = get_close_matches(reward, known, n=1)
        there = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}; or name a function"
        raise ConfigError("--reward", f"there is no reward {reward!r}", there)
    return OmegaConf.create({reward.rpartition(".")[2].rpartition(":")[2]: {"fn": reward}})
