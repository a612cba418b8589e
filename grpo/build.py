"""The composition root: a run from its start to its report, out of the objects that ``grpo.parts`` makes of a configuration.

Everything that can be wrong is found before anything heavy starts, in this order: numbers, functions, data, model files
(``grpo.plan``); then the run folder, the engine and the model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from grpo import checkpoint, config_file, randomness, replay
from grpo.anchor import anchor_paths
from grpo.card import objective_card
from grpo.conditions import check_conditions
from grpo.config import Config, ConfigError, RunConfig
from grpo.data import ProblemSource
from grpo.environment_record import environment
from grpo.interrupt import StopSignal
from grpo.loggers import Logger
from grpo.machine import Machine, machine, without_engines, without_trainer
from grpo.metrics import eval_metrics, headline
from grpo.models import resolve_model
from grpo.parts import (
    GroupMakers,
    conditions_of,
    inputs_of,
    make_collector,
    make_engine,
    make_learner,
    make_logger,
    make_policy,
    make_ranks,
    make_runtime,
    make_weight_sync,
    shared_by_environments,
)
from grpo.plan import Plan, check_sandbox, load_both_splits, load_split, plan, plan_without_model
from grpo.policy import NUM_MOMENTS
from grpo.prompts import chat_format, check_rows, in_chat, make_tokenizer
from grpo.replay import StepReplay
from grpo.report import write_report
from grpo.rewards.health import UnscoredStop
from grpo.rollout_table import groups_of
from grpo.rollouts.base import Progress
from grpo.rollouts.collect import collect
from grpo.rollouts.weights import checkpoint_shapes
from grpo.run import RunFolder
from grpo.trainer import Settings, Trainer
from grpo.types import Group, Problem


def plain(config: Config) -> dict[str, Any]:
    """The configuration as dicts, lists, strings and numbers."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left: its folder and one line that says what happened."""

    run: RunFolder
    headline: str

    @property
    def metrics(self) -> list[dict[str, float]]:
        return self.run.read_metrics()


def dry_run(config: Config) -> str:
    """The objective card, after every check that needs no model.

    Raises:
        ConfigError: if a setting cannot work.
    """
    checked = plan(config)
    machine(config)
    load_both_splits(checked)
    return objective_card(checked)


def train(config: Config) -> Result:
    """Run an experiment from its configuration to its report.

    Raises:
        ConfigError: before anything is loaded, if a setting cannot work.
        Interrupted: Ctrl-C or SIGTERM; what was done is saved.
    """
    checked = plan(config)
    where = machine(config)
    check_sandbox(checked)
    problems = load_both_splits(checked)
    run = RunFolder.create(Path(config.run.dir), config.run.recipe or "run", config.run.name, resume=config.run.resume)
    logger, failed = make_logger(config), True
    with StopSignal() as stop, ExitStack() as stack:
        stack.enter_context(run.held())
        anchor_paths(config)
        here = environment(conditions_of(config, where)) | {"inputs": inputs_of(checked, problems)}
        record = partial(_record, run, _settings_to_keep(config, run), here, objective_card(checked))
        resumed_from = go_back(run, here, config.run) if config.run.resume else None
        if resumed_from is None:  # at once: wherever it ends, it can be gone on with. What goes on is what it was until its first update
            record()
        randomness.seed_all(config.run.seed)
        logger.start(plain(config), run, resumed_from)
        try:
            with stop.anywhere():
                inputs, steps_left = here["inputs"], config.run.steps - (resumed_from or 0)
                trainer = assemble(checked, where, problems, run, logger, stack, stop, inputs=inputs, steps_left=steps_left)
                if resumed_from:
                    trainer.restore(resumed_from)
            trainer.train(stop, record)
            failed = False
        finally:
            rows = reported(run)
            logger.finish({"headline": headline(rows)}, failed=failed)
    return Result(run=run, headline=headline(rows))


def reported(run: RunFolder) -> list[dict[str, float]]:
    """Write the report, and give the metrics. It is the last thing of a run: what fails here neither fails it nor hides why it failed."""
    rows: list[dict[str, float]] = []
    try:
        rows = run.read_metrics()
        write_report(run)
    except Exception as error:
        warnings.warn(f"the report could not be written: {error}", stacklevel=2)
    return rows


def _settings_to_keep(config: Config, run: RunFolder) -> dict[str, Any]:
    """What is to be in ``config.yaml``. A ``run.exact=false`` that a run is gone on with answers for one start: the next is asked again."""
    settings = plain(config)
    if config.run.resume and not config.run.exact:
        try:
            settings["run"]["exact"] = config_file.read(run.config_file)["run"].get("exact", True)
        except (OSError, TypeError, KeyError, AttributeError) as error:
            what = f"{run.config_file} is not the configuration of a run: {' '.join(str(error).split())}"
            raise ConfigError("run.resume", what, "put it back as it was") from error
    return settings


def _record(run: RunFolder, settings: Mapping[str, Any], here: Mapping[str, Any], card: str) -> None:
    """What the steps from here on are made with. The configuration, which makes the folder a run, comes last: a kill leaves no half."""
    run.write_environment(run.read_environment() | dict(here))  # the weights' self-test has put its figures there
    run.write_objective(card)
    run.write_config(config_file.dump(settings))


def go_back(run: RunFolder, here: Mapping[str, Any], wanted: RunConfig) -> int:
    """Bring a run's folder to its last sound checkpoint: the step of it; 0 if none was due yet.

    Args:
        here: the environment of this start.
        wanted: how far to go, and whether to refuse to go on where that changes the bits.

    Raises:
        ConfigError: there is no checkpoint to go on from, or not to the bit, or it is of a later step than is wanted.
    """
    step = checkpoint.last_sound_step(run)
    if wanted.steps < step:
        raise ConfigError("run.steps", f"is {wanted.steps}, and this run has made {step} already", "raise it to go on")
    before = checkpoint.load(run, step)["run"]["environment"] if step else run.read_environment()
    for sentence in check_conditions(before, here, wanted.exact):
        warnings.warn(sentence, stacklevel=2)
    checkpoint.rewind(run, step)
    return step


def assemble(
    checked: Plan,
    where: Machine,
    problems: tuple[list[Problem], list[Problem]],
    run: RunFolder,
    logger: Logger,
    stack: ExitStack,
    stop: StopSignal,
    *,
    inputs: Mapping[str, Any],
    steps_left: int,
) -> Trainer:
    """Everything heavy, in the order in which it fails soonest."""
    config = checked.config
    logger.phase("preparing the model")
    folder = resolve_model(config.model.path, revision=config.model.revision, notify=logger.phase)
    tokenizer = make_tokenizer(folder, config)
    train_problems, heldout = (in_chat(split, tokenizer) for split in problems) if config.data.chat else problems
    heldout = heldout[: config.eval.problems]
    if given := config.rollout.engine_args.get("max_model_len"):  # else the engine says it, when it has started
        check_rows({"train": train_problems, "heldout": heldout}, checked, tokenizer, given)
    logger.phase(f"starting {config.rollout.engine}")
    ranks = make_ranks(config, folder, where, stack, stop)  # before the engines, which may have to share their GPUs
    engine = make_engine(config, folder, tokenizer, where, stack, stop, run.exchange, ranks)
    check_rows({"train": train_problems, "heldout": heldout}, checked, tokenizer, engine.context_length)
    stack.enter_context(shared_by_environments(checked))
    runtime = stack.enter_context(make_runtime(checked))
    logger.phase("loading the policy")
    policy = make_policy(config, folder, tokenizer, where, ranks)
    num_weights = sum(map(math.prod, checkpoint_shapes(folder, config.model.revision).values()))
    every = config.run.checkpoint_every or config.run.steps
    kept = min(config.run.keep_checkpoints, -(-config.run.steps // every) - 1)  # beside one that is written
    moments = NUM_MOMENTS[config.optim.name]
    if note := checkpoint.little_room(run, num_weights, where.dtype_name, moments, kept, best=bool(heldout)):
        warnings.warn(note, stacklevel=2)
    makers = GroupMakers(checked=checked, engine=engine, runtime=runtime, tokenizer=tokenizer)

    def progress(name: str) -> Progress:
        def told(done: int, total: int) -> None:
            stop.check()
            logger.phase(name, done, total)

        return told

    def evaluator(step: int) -> tuple[Group, ...]:
        return collect(makers.evaluation(), heldout, step, progress("evaluating"))[0]

    source = ProblemSource(train_problems, config.run.seed)
    return Trainer(
        settings=Settings(
            steps=config.run.steps,
            problems_per_step=config.rollout.problems_per_step,
            sampling_rounds=config.rollout.sampling_rounds,
            colocate=config.rollout.colocate,
            checkpoint_every=config.run.checkpoint_every,
            keep_checkpoints=config.run.keep_checkpoints,
            eval_every=config.eval.every,
            eval_metric=config.eval.metric,
        ),
        run=run,
        learner=make_learner(checked, policy),
        engine=engine,
        weights=make_weight_sync(config, policy, engine, tokenizer, train_problems, run, logger),
        collector=make_collector(config, makers.training(), source, progress("generating"), stack, steps_left),
        evaluator=evaluator if heldout else None,
        reward_weights=checked.reward_weights,
        graders=UnscoredStop(weights=checked.reward_weights, share=config.scoring.unscored_share),
        logger=logger,
        inputs=inputs,
    )


def rescore(config: Config, run: RunFolder, steps: Sequence[int]) -> Iterator[StepReplay]:
    """The stored rollouts of ``steps`` under the reward of ``config``, one step after the other.

    Raises:
        ConfigError: the reward cannot work.
    """
    checked = plan_without_model(config)
    with make_runtime(checked) as runtime:
        for step in steps:
            yield replay.rescore(step, groups_of(run.read_rollouts(step)), runtime, checked.reward_weights)


def retrain(config: Config, run: RunFolder, step: int, *, new_reward: bool) -> tuple[dict[str, float], dict[str, float]]:
    """The update of a stored step made again from the checkpoint before it: (its metrics then, its metrics now). Nothing is written.

    Args:
        new_reward: ``config`` has another reward than the run: its rollouts are scored by that, else their stored scores are learned.

    Raises:
        ConfigError: there is no checkpoint of the step before, or it is damaged, or no stored rollouts.
        RewardFailure: the new reward fails on too many of them, as it would end a run.
    """
    found = checkpoint.steps(run)
    if step != 1 and step - 1 not in found:
        there = ", ".join(str(s) for s in [1, *(s + 1 for s in found if s + 1 in run.rollout_steps())])
        raise ConfigError("--step", f"step {step} starts from the checkpoint of step {step - 1}, which is not kept", f"there is: {there}")
    if step > 1 and (damage := checkpoint.damaged_file(run.checkpoint(step - 1))):
        raise ConfigError("--step", f"step {step} starts from the checkpoint of step {step - 1}, and {damage}", "choose another step")
    table = run.read_rollouts(step)
    if "dropped" in table.column_names:  # of dynamic sampling: stored, and not trained on
        table = table.filter([not dropped for dropped in table["dropped"].to_pylist()])
    groups = stored = groups_of(table)
    checked = plan(config)
    if new_reward:
        with make_runtime(checked) as runtime:
            groups = replay.rescore(step, groups, runtime, checked.reward_weights).after
        UnscoredStop(weights=checked.reward_weights, share=config.scoring.unscored_share).check(groups)
    config = without_engines(config)
    where, folder = machine(config), resolve_model(config.model.path, revision=config.model.revision)
    with StopSignal() as stop, ExitStack() as stack, stop.anywhere():  # nothing is written: it can be cut off at any moment
        policy = make_policy(config, folder, make_tokenizer(folder, config), where, make_ranks(config, folder, where, stack, stop))
        learner = make_learner(checked, policy)
        if step > 1:
            state = checkpoint.load(run, step - 1)
            policy.load_state(state["policy"])
            learner.load_state(state["learner"])
        now = learner.learn(groups)[1]
    then = next((row for row in run.read_metrics() if row["step"] == step and "policy/loss" in row), {})
    return then | replay.reward_metrics(stored), now | replay.reward_metrics(groups)


def evaluate(config: Config, folder: str, samples: int | None = None) -> tuple[dict[str, float], tuple[Group, ...]]:
    """Score a model folder on the recipe's held-out problems with the recipe's evaluation sampling."""
    checked = plan(config)
    config = without_trainer(config)
    where = machine(config)
    with StopSignal() as stop, ExitStack() as stack, stop.anywhere():
        tokenizer = make_tokenizer(folder, config)
        heldout = load_split(checked, "heldout", chat_format(tokenizer) if config.data.chat else None)[: config.eval.problems]
        engine = make_engine(config, folder, tokenizer, where, stack, stop)
        stack.enter_context(shared_by_environments(checked))
        runtime = stack.enter_context(make_runtime(checked))
        makers = GroupMakers(checked=checked, engine=engine, runtime=runtime, tokenizer=tokenizer)
        groups, _ = collect(makers.evaluation(samples), heldout, 0)
    return eval_metrics(groups, config.eval.metric), groups
