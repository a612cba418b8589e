"""The run folder: everything a run leaves behind, under ``runs/<recipe>/<name>/``.

A crash may happen at any byte, so each file is either replaced whole (written beside its place, synced, renamed) or, for
``metrics.jsonl``, appended to a line at a time and read with a tolerance for the one line a crash can cut.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo.best import BEST_FILE, Best
from grpo.config import ConfigError
from grpo.rollout_table import RolloutKey, rollout_table
from grpo.storage import storage, sync, write_atomically, write_text
from grpo.types import Group

if TYPE_CHECKING:
    import pyarrow as pa

RolloutFolder = Literal["rollouts", "eval"]

# Columns of the metrics that the clock and the machine's faults decide. All others are the same whenever a run is made again exactly.
MEASURED = ("time/", "throughput/", "engine/")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the files of one run stand. ``RunFolder.create(Path("runs"), "r1_zero_arithmetic")`` or ``RunFolder.open(path)``."""

    path: Path

    @classmethod
    def create(cls, root: Path, recipe: str, name: str = "", resume: bool = False) -> RunFolder:
        """Make ``<root>/<recipe>/<name>``; an empty ``name`` becomes the time (UTC), made unique.

        Raises:
            ConfigError: the folder holds a run already, cannot be made, or (``resume``) is not there.
        """
        _check_component("run.recipe", recipe)
        if not name:
            if resume:
                raise ConfigError("run.resume", "is true but run.name is empty", "name the run to go on with: run.name=…")
            return cls(_make_unique(root / recipe, datetime.now(UTC).strftime("%Y-%m-%d_%H-%M-%S")))
        _check_component("run.name", name)
        path = root / recipe / name
        if resume:
            return cls.open(path)
        if path.is_dir() and any((path / mark).exists() for mark in ("metrics.jsonl", "checkpoints", "rollouts", "eval")):
            go_on = f"go on with it: grpo train {shlex.quote(str(path))}"
            raise ConfigError("run.name", f"{str(path)!r} holds a run already", f"choose another name, or {go_on}")
        _make_folder(path, exist_ok=True)
        with storage(path):
            (run := cls(path)).saved_mark.unlink(missing_ok=True)  # of a run whose files were removed by hand
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run folder at ``path``.

        Raises:
            ConfigError: there is no run there.
        """
        if path.is_file():
            raise ConfigError("run", f"{str(path)!r} is a file, not a run folder", "give runs/<recipe>/<name>")
        if not path.is_dir():
            raise ConfigError("run", f"the folder {str(path)!r} does not exist (looked in {Path.cwd()})", "check the path")
        if not (path / "config.yaml").is_file():
            raise ConfigError("run", f"{str(path)!r} is not a run folder: it has no config.yaml", "give runs/<recipe>/<name>")
        return cls(path)

    @property
    def recipe(self) -> str:
        return self.path.parent.name

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def objective_file(self) -> Path:
        return self.path / "objective.md"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def exchange(self) -> Path:
        """Where weights lie for the engines, with ``rollout.transfer=disk``; of no use to anyone when the process has ended."""
        return self.path / "weights"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / _step_name(step)

    @property
    def best_checkpoint(self) -> Path:
        return self.checkpoints / "best"

    def read_best(self) -> Best | None:
        """Which model ``checkpoints/best`` is; None where there is none, or of an older version that kept no record."""
        try:
            return Best.from_json((self.best_checkpoint / BEST_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def saved_mark(self) -> Path:
        """There once there has been a checkpoint, whether it is there still or not."""
        return self.path / ".saved"

    def write_config(self, yaml: str) -> None:
        write_text(self.config_file, yaml)

    def write_objective(self, markdown: str) -> None:
        write_text(self.objective_file, markdown)

    @property
    def wandb_id_file(self) -> Path:
        return self.path / "wandb_id"

    @contextmanager
    def held(self) -> Iterator[None]:
        """While entered, no other process trains in this folder. A process that dies lets go of it.

        Raises:
            ConfigError: another one does.
            StorageError: the folder cannot be written.
        """
        with storage(self.path):
            file = (self.path / ".lock").open("a")
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError("run", f"another process trains in {str(self.path)!r}", "wait for its end, or stop it") from None
                # else: a file system without locks
            yield

    def write_environment(self, record: Mapping[str, Any]) -> None:
        """Record what ``environment()`` gives at this start; a resumed run overwrites it with its own when its first step begins."""
        write_text(self.environment_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def read_environment(self) -> dict[str, Any]:
        """What ``write_environment`` wrote; empty if it is not there or damaged: it is a record, no part of the training."""
        try:
            record: dict[str, Any] = json.loads(self.environment_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def append_metrics(self, row: Mapping[str, float]) -> None:
        """Add one line to ``metrics.jsonl``. JSON knows no NaN and no infinity: they become null.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        with storage(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_format_row(row))

    def sync_metrics(self) -> None:
        """Have the rows so far on disk: they survive the machine now, not only the process."""
        if self.metrics_file.exists():
            with storage(self.metrics_file):
                sync(self.metrics_file)

    def read_metrics(self) -> list[dict[str, float]]:
        """The rows of ``metrics.jsonl`` (null → NaN), without the last one if a crash left it half written.

        Raises:
            ConfigError: another line is damaged.
        """
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8", errors="replace").split("\n")
        complete, torn = lines[:-1], lines[-1]  # every complete line ends in \n, so the last piece is empty or torn
        rows = [_parse_row(line, number, self.metrics_file) for number, line in enumerate(complete, 1) if line.strip()]
        if torn:
            try:
                rows.append(_parse_row(torn, len(lines), self.metrics_file))
            except ConfigError:
                pass  # what a crash leaves: the step is not in a checkpoint either
        return rows

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of this folder: where its metrics end, the W&B run it belongs to, what its steps were made with."""
        return {
            "metrics_bytes": self.metrics_file.stat().st_size if self.metrics_file.exists() else 0,
            "wandb_id": self.wandb_id_file.read_text(encoding="utf-8") if self.wandb_id_file.is_file() else None,
            "environment": self.read_environment(),
        }

    def rewind(self, step: int, facts: Mapping[str, Any]) -> None:
        """Forget what was recorded after ``step`` or half written: a run that goes on from its checkpoint will record it again.

        Only while the folder is ``held``: what belongs to a process that trains in it must not go.

        Args:
            facts: what ``facts()`` was when the checkpoint was written; empty: unknown. What is missing since is put back or warned of.

        Raises:
            StorageError: the folder cannot be written.
        """
        rows = self.read_metrics()
        size = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        if size < facts.get("metrics_bytes", 0):
            warnings.warn(f"{self.metrics_file} is shorter than it was at step {step}: rows of earlier steps are lost", stacklevel=2)
        if facts.get("wandb_id") and not self.wandb_id_file.is_file():
            write_text(self.wandb_id_file, facts["wandb_id"])
        self._write_metrics([row for row in rows if row["step"] <= step])
        folders: tuple[RolloutFolder, ...] = ("rollouts", "eval")
        with storage(self.path):
            if self.exchange.exists():
                shutil.rmtree(self.exchange)
            for place in (self.path, *(self.path / folder for folder in folders)):
                for unfinished in place.glob(".*.tmp"):
                    unfinished.unlink()
            for folder in folders:
                for later in self.rollout_steps(folder):
                    if later > step:
                        self.rollout_file(later, folder).unlink()

    def drop_metrics(self, step: int) -> None:
        """Take out the row of a step that is about to be recorded again, whole."""
        self._write_metrics([row for row in self.read_metrics() if row["step"] != step])

    def _write_metrics(self, rows: Sequence[Mapping[str, float]]) -> None:
        if self.metrics_file.exists():
            write_text(self.metrics_file, "".join(map(_format_row, rows)))

    def rollout_file(self, step: int, folder: RolloutFolder = "rollouts") -> Path:
        return self.path / folder / f"{_step_name(step)}.parquet"

    def rollout_steps(self, folder: RolloutFolder = "rollouts") -> list[int]:
        """The steps whose rollouts are on disk, ascending."""
        names = (re.fullmatch(r"step_(\d+)\.parquet", file.name) for file in (self.path / folder).glob("step_*.parquet"))
        return sorted(int(match[1]) for match in names if match)

    def write_rollouts(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Mapping[RolloutKey, float] | None = None,
        extra: Mapping[str, Mapping[RolloutKey, Any]] | None = None,
        folder: RolloutFolder = "rollouts",
    ) -> Path:
        """Write the rollouts of a step as parquet, one row a rollout.

        Args:
            step: the training step that sampled them.
            groups: the rollouts.
            advantages: by rollout; a rollout it does not name gets null.
            extra: further columns by name, each by rollout, e.g. ``{"proximal_logprobs": {("train/17", 0): [-0.1, -0.3]}}``.
            folder: ``rollouts`` for training, ``eval`` for held-out problems.
        """
        import pyarrow.parquet as pq

        table = rollout_table(step, groups, advantages or {}, extra or {})
        file = self.rollout_file(step, folder)
        _make_folder(file.parent, exist_ok=True)
        write_atomically(file, lambda temporary: pq.write_table(table, temporary, compression="zstd"))
        return file

    def read_rollouts(self, step: int, folder: RolloutFolder = "rollouts") -> pa.Table:
        """The rollouts of a step, as ``write_rollouts`` wrote them.

        Raises:
            FileNotFoundError: there are none; the message names the steps there are.
            ConfigError: the file is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.rollout_file(step, folder)
        if not file.is_file():
            steps = self.rollout_steps(folder)
            there = f"there are {len(steps)}, from step {steps[0]} to {steps[-1]}" if steps else "there are none"
            raise FileNotFoundError(f"no {folder} of step {step} in {str(self.path)!r}: {there}")
        try:
            return pq.read_table(file, partitioning=None)  # the path is ours: nothing in it is a partition key
        except (pa.ArrowException, OSError) as error:
            problem = f"{str(file)!r} cannot be read: {' '.join(str(error).split())}"
            raise ConfigError(folder, problem, "choose another --step, or remove the file: training needs it no more") from error


def _format_row(row: Mapping[str, float]) -> str:
    clean = {key: value if math.isfinite(value) else None for key, value in row.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


def _parse_row(line: str, number: int, file: Path) -> dict[str, float]:
    """
    Raises:
        ConfigError: it is not what ``_format_row`` wrote.
    """
    where, damaged = f"{str(file)!r}, line {number}", "the file was edited or damaged"
    try:
        row = {key: math.nan if value is None else value for key, value in json.loads(line).items()}
    except (ValueError, AttributeError):
        raise ConfigError("metrics", f"{where} is not a JSON object: {damaged}", "remove the line") from None
    if "step" not in row or not all(isinstance(value, int | float) for value in row.values()):
        raise ConfigError("metrics", f"{where} is no row of a step's numbers: {damaged}", "remove the line")
    return row


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _check_component(key: str, value: str) -> None:
    if not value or value in (".", "..") or "/" in value or os.sep in value:
        raise ConfigError(key, f"{value!r} cannot name a folder", "use a plain name, without slashes")


def _make_folder(path: Path, exist_ok: bool) -> None:
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        if not exist_ok:
            raise
        raise ConfigError("run.dir", f"{str(path)!r} is a file, not a folder", "choose another name or folder") from None
    except OSError as error:
        problem = f"cannot make {str(path)!r}: {error.strerror}"
        raise ConfigError("run.dir", problem, "choose a folder you can write to: run.dir=…") from error


def _make_unique(parent: Path, name: str) -> Path:
    """Make ``parent/name``, or ``name-2``, ``name-3``…: two runs started in the same second must not share a folder."""
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            _make_folder(path, exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return path
