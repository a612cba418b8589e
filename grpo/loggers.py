"""Where the numbers of a run go: ``metrics.jsonl``, Weights & Biases, TensorBoard; the terminal is ``grpo.console``.

One interface, and ``Loggers`` to write to several. Only the run folder's own file may stop a run; a service that is down may not.
"""

from __future__ import annotations

import netrc
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from grpo.config import ConfigError, WandbConfig, WandbMode
from grpo.rollout_table import RolloutKey, rollout_key
from grpo.run import RunFolder
from grpo.storage import write_text
from grpo.types import Group

Advantages = Mapping[RolloutKey, float]


class Logger:
    """A place to write to. Subclasses override what they have a use for; the rest does nothing."""

    def start(self, config: Mapping[str, Any], run: RunFolder, resumed_from: int | None) -> None:
        """Once, before anything else. ``resumed_from``: the step of the checkpoint that this run goes on from, if it does."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step, or of an evaluation after it."""

    def log_rollouts(self, step: int, groups: Sequence[Group], advantages: Advantages | None = None) -> None:
        """The rollouts of a training step, of which a logger may show some."""

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """What the run is doing right now, e.g. ``phase("generating", 87, 128)``; called often, so it must be cheap."""

    def note(self, text: str) -> None:
        """A line that is worth keeping, and no number of a step: what a check at the start found."""

    def finish(self, summary: Mapping[str, Any], failed: bool = False) -> None:
        """Once, at the end. ``failed``: the run ended by an exception."""


class Loggers(Logger):
    """Several loggers as one, in order."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = tuple(loggers)

    def start(self, config: Mapping[str, Any], run: RunFolder, resumed_from: int | None) -> None:
        for logger in self._loggers:
            logger.start(config, run, resumed_from)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(step, metrics)

    def log_rollouts(self, step: int, groups: Sequence[Group], advantages: Advantages | None = None) -> None:
        for logger in self._loggers:
            logger.log_rollouts(step, groups, advantages)

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        for logger in self._loggers:
            logger.phase(name, done, total)

    def note(self, text: str) -> None:
        for logger in self._loggers:
            logger.note(text)

    def finish(self, summary: Mapping[str, Any], failed: bool = False) -> None:
        """Finish every logger, even if one of them raises."""
        with ExitStack() as stack:
            for logger in reversed(self._loggers):
                stack.callback(logger.finish, summary, failed)


class JsonlLogger(Logger):
    """``metrics.jsonl`` in the run folder: the record that the report and ``--resume`` read. Every run has it."""

    def start(self, config: Mapping[str, Any], run: RunFolder, resumed_from: int | None) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.append_metrics({"step": step, **metrics})


class TensorBoardLogger(Logger):
    """Event files under ``tensorboard/`` in the run folder."""

    def start(self, config: Mapping[str, Any], run: RunFolder, resumed_from: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("logger.tensorboard", f"is true, but TensorBoard is missing ({error})", "pip install tensorboard") from error
        purge_step = None if resumed_from is None else resumed_from + 1  # hide what the crashed run wrote after its checkpoint
        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any], failed: bool = False) -> None:
        self._writer.close()


class WandbLogger(Logger):
    """Weights & Biases, in the run folder's ``wandb/``; a resumed run goes on with the same W&B run.

    It never asks for a key, and it never stops or holds up a training run: start and finish have deadlines, whatever fails is
    said once, and the run goes on without it.
    """

    max_rollouts = 32  # rows of the rollout table of a step

    def __init__(self, config: WandbConfig, init_timeout: float = 30.0, finish_timeout: float = 60.0) -> None:
        self._config = config
        self._init_timeout = init_timeout
        self._finish_timeout = finish_timeout
        self._run: Any = None
        self._warned = False

    def start(self, config: Mapping[str, Any], run: RunFolder, resumed_from: int | None) -> None:
        mode = wandb_mode(self._config.mode)
        if mode is WandbMode.disabled:
            return
        self._guard(lambda: self._init(mode, config, run))
        if self._run is None and mode is WandbMode.online:
            self._guard(_end_service)  # which holds the run's id as in use
            self._guard(lambda: self._init(WandbMode.offline, config, run))
            if self._run is not None:
                sync = f"wandb sync {run.path}/wandb/offline-run-*"
                print(f"  → it logs offline now; when its server can be reached: {sync}", file=sys.stderr)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log({"step": step, **metrics}))

    def log_rollouts(self, step: int, groups: Sequence[Group], advantages: Advantages | None = None) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.log({"step": step, "rollouts": _wandb_table(groups, advantages or {}, self.max_rollouts)}))

    def finish(self, summary: Mapping[str, Any], failed: bool = False) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.summary.update(dict(summary)))
            self._guard(lambda: self._run.finish(exit_code=int(failed)))
            if self._warned:  # a service that died would be missed once more, with a traceback, when the interpreter ends
                self._guard(_end_service)

    def _init(self, mode: WandbMode, config: Mapping[str, Any], run: RunFolder) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # its login speaks before it reads any settings
        import wandb

        mode_name: Any = mode.value  # ours is an enum, theirs a Literal
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            tags=list(self._config.tags),
            group=run.recipe,
            name=run.name,
            config=dict(config),
            dir=str(run.path),
            mode=mode_name,
            id=_wandb_id(run),
            resume="allow" if mode is WandbMode.online else None,  # offline, a second folder with the same id is synced as one run
            settings=wandb.Settings(
                silent=True,
                console="off",  # the terminal belongs to grpo.console
                init_timeout=self._init_timeout,
                finish_timeout=self._finish_timeout,
            ),
        )
        self._run.define_metric("step")  # our own axis: W&B's may not go back, and a resumed run does
        self._run.define_metric("*", step_metric="step")

    def _guard(self, call: Callable[[], object]) -> None:
        """Run a call into wandb and turn whatever it raises – network, service, disk – into one warning."""
        try:
            call()
        except Exception as error:  # the one place where any failure is survivable: W&B only holds a copy of the log
            if not self._warned:
                message = str(error).partition("\n")[0]
                print(f"warning: Weights & Biases failed, training goes on: {type(error).__name__}: {message}", file=sys.stderr)
            self._warned = True


def _end_service() -> None:
    import wandb

    wandb.teardown()


def wandb_mode(wanted: WandbMode) -> WandbMode:
    """``auto`` → what ``WANDB_MODE`` says, else ``online`` with an API key, else ``offline``.

    Raises:
        ConfigError: ``online`` without a key, where wandb would ask for one.
    """
    if wanted is WandbMode.auto:
        environment = os.environ.get("WANDB_MODE", "")
        if environment in list(WandbMode):
            wanted = WandbMode(environment)
    if wanted is WandbMode.auto:
        return WandbMode.online if has_wandb_key() else WandbMode.offline
    if wanted is WandbMode.online and not has_wandb_key():
        remedy = "run `wandb login`, set WANDB_API_KEY, or use offline"
        raise ConfigError("logger.wandb.mode", "is online, but there is no W&B API key", remedy)
    return wanted


def has_wandb_key() -> bool:
    """Whether this user is logged in to W&B, without asking, importing wandb, or touching the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_id(run: RunFolder) -> str:
    """The W&B run this folder belongs to: made once, found again on resume. Checkpoints hold it too."""
    if not run.wandb_id_file.is_file():
        write_text(run.wandb_id_file, uuid.uuid4().hex[:8])
    return run.wandb_id_file.read_text(encoding="utf-8").strip()


def _wandb_table(groups: Sequence[Group], advantages: Advantages, limit: int) -> Any:
    """At most ``limit`` rollouts as a W&B table, spread evenly over the step."""
    import wandb

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    shown = rollouts[:: max(1, -(-len(rollouts) // limit))]
    parts = list(dict.fromkeys(part for rollout in shown for part in rollout.scores))
    rows: list[Any] = [
        [r.problem.id, r.problem.prompt, r.completion.text, r.problem.answer, r.reward, advantages.get(rollout_key(r))]
        + [r.scores[part].value if part in r.scores else None for part in parts]
        for r in shown
    ]
    return wandb.Table(columns=["problem", "prompt", "completion", "answer", "reward", "advantage", *parts], data=rows)
