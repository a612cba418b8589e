"""Settings that another setting leaves without effect: a table of which, where and why.

A value that does nothing is refused, for whoever set it believes that it does something. What the command line switches off takes along
what the recipe had set for it: ``rollout=hf`` drops the ``rollout.num_engines`` of a recipe for vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config import Config, ConfigError, EngineName, Optimiser, Schedule, WandbMode, keys, shown, value_of

DEFAULTS: Mapping[str, Any] = {key: default for key, (default, _) in keys().items()}


@dataclass(frozen=True, slots=True)
class Idle:
    """``keys`` do nothing ``where`` the value of ``switch`` is such. ``why`` says so, with that value at ``{}``; ``instead`` what to do."""

    switch: str
    where: Callable[[Config], bool]
    why: str
    instead: str
    keys: tuple[str, ...]
    also: tuple[str, ...] = ()  # further keys that ``where`` looks at


def _one_score_counts(config: Config) -> bool:
    """What is trained on is one score, with weight 1."""
    weights = [part.get("weight", 1.0) for part in config.reward.values() if part]
    of_environment = config.environment.get("weights")
    weights += of_environment.values() if isinstance(of_environment, Mapping) else ()
    return [weight for weight in weights if weight != 0] == [1]


IDLE = (
    Idle(
        switch="rollout.engine",
        where=lambda c: c.rollout.engine is not EngineName.vllm,
        why="the {} engine is in the trainer's process, one of its kind, with the trainer's threads and device",
        instead="choose rollout=vllm",
        keys=(
            "rollout.num_engines",
            "rollout.cpus_per_engine",
            "rollout.gpus_per_engine",
            "rollout.colocate",
            "rollout.schedule",
            "rollout.transfer",
            "rollout.hang_timeout_s",
            "rollout.start_timeout_s",
        ),
    ),
    Idle(
        switch="rollout.engine",
        where=lambda c: c.rollout.engine is EngineName.scripted,
        why="the {} engine samples nothing, its answers are fixed",
        instead="choose rollout=vllm",
        keys=("eval.temperature", "eval.top_p", "eval.min_p"),
    ),
    Idle(
        switch="eval.problems",
        where=lambda c: c.eval.problems == 0,
        why="there is no evaluation with eval.problems={}",
        instead="raise eval.problems",
        keys=("eval.every", "eval.samples", "eval.temperature", "eval.top_p", "eval.min_p"),
    ),
    Idle(
        switch="eval.temperature",
        where=lambda c: c.eval.temperature == 0,
        why="with eval.temperature={} the likeliest token is taken",
        instead="raise eval.temperature",
        keys=("eval.top_p", "eval.min_p"),
    ),
    Idle(
        switch="data.template",
        where=lambda c: bool(c.data.template),
        why="data.template names the columns itself",
        instead="set data.template=''",
        keys=("data.prompt_key",),
    ),
    Idle(
        switch="reward",
        where=lambda c: not c.reward,
        why="without a reward part there is no reward process: the environment judges by itself",
        instead="add a part, reward.NAME.fn=…",
        keys=("scoring.workers", "scoring.cpu_s", "scoring.memory_mb"),
    ),
    Idle(
        switch="reward",
        where=_one_score_counts,
        why="there is one score, of weight 1, and nothing to combine it with",
        instead="add another part, reward.NAME.fn=…",
        keys=("algo.combine_rewards",),
        also=("environment.weights",),
    ),
    Idle(
        switch="algo.kl",
        where=lambda c: not c.algo.kl or c.algo.kl.get("coef") == 0,
        why="there is no KL term, and no reference",
        instead="set algo.kl.fn and algo.kl.coef",
        keys=("algo.kl_in", "algo.reference_refresh"),
    ),
    Idle(
        switch="optim.name",
        where=lambda c: c.optim.name is not Optimiser.adamw,
        why="{} has none",
        instead="set optim.name=adamw",
        keys=("optim.betas", "optim.eps"),
    ),
    Idle(
        switch="optim.schedule",
        where=lambda c: c.optim.schedule is Schedule.constant,
        why="a {} learning rate does not decay",
        instead="set optim.schedule=linear or cosine",
        keys=("optim.min_lr_ratio",),
    ),
    Idle(
        switch="trainer.ranks",
        where=lambda c: c.trainer.ranks == 1,
        why="one rank has all of every gradient",
        instead="raise trainer.ranks",
        keys=("trainer.shard_gradients",),
    ),
    Idle(
        switch="logger.console",
        where=lambda c: not c.logger.console,
        why="nothing is shown with logger.console={}",
        instead="set logger.console=true",
        keys=("logger.sample_every",),
    ),
    Idle(
        switch="logger.wandb.mode",
        where=lambda c: c.logger.wandb.mode is WandbMode.disabled,
        why="nothing goes to W&B with logger.wandb.mode={}",
        instead="set logger.wandb.mode=auto",
        keys=("logger.wandb.project", "logger.wandb.entity", "logger.wandb.tags"),
    ),
)


def refuse_idle(config: Config) -> None:
    """No value that differs from its default may be without effect.

    Raises:
        ConfigError: for the first that is.
    """
    for row, key in _idle(config):
        why = row.why.format(shown(value_of(config, row.switch)))
        raise ConfigError(key, f"is {shown(value_of(config, key))}, which does nothing: {why}", f"{_leave(key)}, or {row.instead}")


def dropped(config: Config, given: Collection[str]) -> dict[str, Any]:
    """What a recipe set for something that the command line has switched off: key → its default.

    Args:
        config: as composed; OmegaConf's form of it will do.
        given: the keys and groups on the command line. A key that is among them is not dropped: it is there to be refused.
    """
    return {key: DEFAULTS[key] for row, key in _idle(config) if key not in given and _touched(row, given)}


def _idle(config: Config) -> Iterator[tuple[Idle, str]]:
    for row in IDLE:
        if row.where(config):
            yield from ((row, key) for key in row.keys if value_of(config, key) != DEFAULTS[key])


def _touched(row: Idle, given: Collection[str]) -> bool:
    return any(_touches(name, switch) for name in given for switch in (row.switch, *row.also))


def _touches(given: str, switch: str) -> bool:
    """A choice of the group ``rollout`` touches ``rollout.engine``; ``algo.kl.coef`` touches ``algo.kl``."""
    return f"{switch}.".startswith(f"{given}.") or f"{given}.".startswith(f"{switch}.")


def _leave(key: str) -> str:
    return f"leave it at {shown(DEFAULTS[key])}" if DEFAULTS[key] not in (None, []) else "leave it out"
