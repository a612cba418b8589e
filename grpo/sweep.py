"""Several runs of one command, ``--multirun``: Hydra says which there are, and each is composed as it would be alone."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from hydra import main as hydra_main
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo.config import Config, ConfigError, keys
from grpo.recipe import BUILT_IN, first_line, groups, load_recipe, locate, parse, prepare, refuse_resume, replacements


def sweep(recipe: str, overrides: Sequence[str], job: Callable[[Config], None]) -> None:
    """Hydra's own ``--multirun``, launchers and sweepers included. Every single value is checked before the first job starts.

    Hydra says which jobs there are; each is then composed as it would be alone, by ``load_recipe``.

    Raises:
        ConfigError: a value is wrong, two jobs would have one name, or a job found that it cannot work.
    """
    configs = [load_recipe(recipe, *combination) for combination in _single_choices(overrides)]
    for config in configs:
        refuse_resume(config)
    _check_names(configs)
    folder, name = locate(recipe)
    whole = recipe if folder is None else str(folder / f"{name}.yaml")  # a job may be told to run in a folder of its own
    held_back, told = _of_hydra(overrides)
    search = [] if folder is None else [f"hydra.searchpath=[{BUILT_IN}]"]
    quiet = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]

    def task(_: DictConfig) -> None:
        hydra = HydraConfig.get()
        config = load_recipe(whole, *held_back, *hydra.overrides.task)
        if not config.run.name:
            label = re.sub(r"[^\w.=,+-]+", "_", hydra.job.override_dirname).replace("++", "")
            config.run.name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{hydra.job.num}_{label}"[:120]
        job(config)

    before = sys.argv
    GlobalHydra.instance().clear()
    try:
        with _errors_as_they_are(), _place_of_hydra(overrides) as place:
            sys.argv = ["grpo", "--multirun", *search, *quiet, *place, *told]
            hydra_main(version_base="1.3", config_path=BUILT_IN if folder is None else str(folder), config_name=name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("--multirun", first_line(error), "hydra/sweeper=… and hydra/launcher=… choose Hydra's plugins") from error
    finally:
        sys.argv = before


def _check_names(configs: Sequence[Config]) -> None:
    """Jobs that differ must not share a run folder. An empty name becomes one of the job's own."""
    seen = set()
    for run in (config.run for config in configs if config.run.name):
        place = (run.dir, run.recipe, run.name)
        if place in seen:
            remedy = "leave it out, and each gets a name of its own; or make it differ: 'run.name=seed${run.seed}'"
            raise ConfigError("run.name", f"would be {run.name!r} for several jobs of the sweep", remedy)
        seen.add(place)


def _of_hydra(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides that only ``load_recipe`` can take, those that Hydra is told so that it knows what to sweep and how).

    Hydra could not replace a node; so it is not told that one is given anew. A sweep it must know: there the node is merged with,
    ``++``, which does no harm, for jobs are not made of what Hydra composes.
    """
    fixed = [text for text, o in zip(overrides, parse(overrides), strict=True) if not o.is_sweep_override()]
    _, mergeable = replacements(fixed)
    held_back = [text for text in fixed if text not in mergeable]
    told = [text for text in overrides if text not in held_back]
    return held_back, [f"++{text}" if _open_node_anew(text) else text for text in prepare(told)]


def _open_node_anew(text: str) -> bool:
    """Whether this is a sweep over whole open nodes: ``algo.correction={},{mask: …}``."""
    (o,) = parse([text])
    if not o.is_sweep_override() or text.startswith(("+", "~")) or not isinstance(keys().get(o.key_or_group, (None,))[0], dict):
        return False
    anew = [value.startswith("{") for value in _values(o)]
    if any(anew) and not all(anew):
        raise ConfigError(o.key_or_group, "a sweep cannot have names, or null, beside {…}", "write every one as {…}, or sweep twice")
    return any(anew)


@contextmanager
def _place_of_hydra(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Where Hydra leaves notes of its own, which a sweep in this process has no use for. Other launchers keep jobs and logs there."""
    given = {o.key_or_group for o in parse(overrides)}
    if "hydra.sweep.dir" in given:
        yield []
    elif "hydra/launcher" in given:
        yield ["hydra.sweep.dir=runs/.hydra"]
    else:
        with TemporaryDirectory(prefix="grpo-sweep-") as folder:
            yield [f"hydra.sweep.dir='{folder}'"]


@contextmanager
def _errors_as_they_are() -> Iterator[None]:
    """Hydra would print a traceback of its own choice and end the process; the command line has words for what a job raises."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def _single_choices(overrides: Sequence[str]) -> Iterator[list[str]]:
    """One list of plain overrides for every value of every sweep, the other sweeps at their first value; no list twice."""
    parsed = parse(overrides)
    choices = [_values(o) for o in parsed]
    first = [c[0] for c in choices]
    yield [_with_value(o, v) for o, v in zip(parsed, first, strict=True)]
    for i, values in enumerate(choices):
        for value in values[1:]:
            row = [*first[:i], value, *first[i + 1 :]]
            yield [_with_value(o, v) for o, v in zip(parsed, row, strict=True)]


def _with_value(override: Override, value: str) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={value}"


def _values(override: Override) -> list[str]:
    """The values of a sweep as they are written: all of a list or a range, the ends of an interval. Else the one there is."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    value = override.value()
    if isinstance(value, Glob):
        names = list(value.filter(list(groups().get(override.key_or_group, ()))))
        if not names:
            raise ConfigError(override.key_or_group, f"{override.get_value_element_as_str()} matches nothing", "name the choices: a,b,c")
        return names
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return list(override.sweep_string_iterator())
