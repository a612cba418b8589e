"""The environment of a plan, tried before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from grpo.config import ConfigError
from grpo.rollouts.guard import EnvironmentFailed, Guarded, at_once
from grpo.types import FAILURE

if TYPE_CHECKING:
    from grpo.plan import Plan


def check_environment(made: Plan) -> None:
    """One environment is made, as each rollout will make one, and closed.

    Raises:
        ConfigError: it cannot be made, is none, or does not go with the rest of the recipe.
    """
    target, make = made.environment.target, made.environment.load()
    try:
        guarded = Guarded(make)
    except EnvironmentFailed as failure:
        what = f"{target} cannot be made: {failure}"
        raise ConfigError("environment", what, "correct its arguments; docs/rollouts.md says what the built-in ones take") from failure
    try:
        _check_attributes(made, guarded)
    except ConfigError:
        with suppress(EnvironmentFailed):
            guarded.close()
        raise
    try:
        guarded.close()
    except EnvironmentFailed as failure:
        raise ConfigError("environment.fn", f"close() of {target} failed, before anything was asked of it: {failure}") from failure


def _check_attributes(made: Plan, guarded: Guarded) -> None:
    """What it says of itself can be read, and goes with the rest of the recipe."""
    target = made.environment.target
    try:
        if missing := guarded.missing:
            raise ConfigError("environment.fn", f"{target} makes something without {' and '.join(missing)}", "see docs/extending.md")
        _check_numbers(made, guarded)
        _check_scores(made, guarded.score_names)
        _check_needs(made, guarded)
    except (EnvironmentFailed, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("environment.fn", f"{target} cannot be used: {error}", "see docs/extending.md") from error


def _check_numbers(made: Plan, guarded: Guarded) -> None:
    """They can be read. An instance cannot say ``at_once``: the first are made before any of them could be asked.

    A function that makes instances of a class need not repeat what the class says.
    """
    target, counts = made.environment.target, at_once(made.environment.load())
    said, _, _ = guarded.at_once, guarded.max_turns, guarded.timeout_s
    if said not in (None, counts, at_once(type(guarded.itself))):
        what = f"is {said!r} in what {target} makes, but what counts is that of {target} itself: {counts}"
        raise ConfigError("environment.at_once", what, "set it there: at_once = … in the body of the class, or function.at_once = …")


def _check_scores(made: Plan, known: Sequence[str] | None) -> None:
    """The names of its scores, as far as they are known: each of those that have a weight is one, and none is anything else's."""
    target, parts = made.environment.target, [part.name for part in made.rewards]
    names = made.environment_weights if known is None else known
    for key, taken in (("reward", parts), ("environment.weights", made.environment_weights), ("environment.fn", names)):
        if FAILURE in taken:
            where = key if key == "environment.fn" else f"{key}.{FAILURE}"
            what = f"{FAILURE!r} cannot be the name of a score: an environment's failures are kept under it"
            raise ConfigError(where, what, "give the score another name")
    if unknown := [name for name in made.environment_weights if name not in names]:
        there = f"it gives {', '.join(names)}" if names else "it gives none; reward parts have their weight beside them, reward.NAME.weight"
        raise ConfigError(f"environment.weights.{unknown[0]}", f"{target} gives no score of this name", there)
    if twice := [name for name in parts if name in names]:
        raise ConfigError(f"reward.{twice[0]}", f"{target} gives a score of this name", "give the reward part another name")


def _check_needs(made: Plan, environment: Guarded) -> None:
    """A stop string, or a chat template, that it cannot do without."""
    target, stop = made.environment.target, made.config.rollout.stop
    if missing := [wanted for wanted in environment.stop if wanted not in stop]:
        raise ConfigError(
            "rollout.stop",
            f"is {list(stop)!r}, but {target} answers turns that end with {' or '.join(map(repr, missing))}",
            f"set it to {[*stop, *missing]!r}",
        )
    if environment.needs_chat and not made.config.data.chat:
        what = f"is false, and {target} speaks in roles, for which only a chat template has a form"
        raise ConfigError("data.chat", what, "set data.chat=true, with a model that has a chat template")
