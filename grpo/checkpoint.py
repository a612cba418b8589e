"""Checkpoints: a Hugging Face folder that transformers and vLLM load as it is, beside the state that training goes on from.

Written next to its place, synced and renamed: a folder that has the name of a checkpoint is whole. What a disk does to it later is
found by the checksums in it; then the checkpoint before is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from grpo.config import ConfigError
from grpo.policy import Policy
from grpo.run import RunFolder

STATE_FILE = "trainer_state.pt"
CHECKSUM_FILE = "checksums.json"


def save_model(policy: Policy, folder: Path) -> None:
    """Only the model, e.g. the best by evaluation; replaces ``folder`` at once."""
    _write(folder, lambda beside: policy.save(beside))


def save(run: RunFolder, step: int, policy: Policy, state: Mapping[str, Any], keep: int) -> None:
    """The model and everything needed to go on after ``step``; older ones beyond ``keep`` lose their place.

    Raises:
        OSError: the disk is full or cannot be written; the checkpoints there are untouched.
    """

    def write(beside: Path) -> None:
        policy.save(beside)
        torch.save({"step": step, "policy": policy.state(), **state}, beside / STATE_FILE)

    _write(run.checkpoint(step), write)
    for old in steps(run)[:-keep]:
        shutil.rmtree(run.checkpoint(old))


def steps(run: RunFolder) -> list[int]:
    """Steps that have a checkpoint, in order."""
    folders = [f for f in run.checkpoints.glob("step_*") if (f / STATE_FILE).is_file()] if run.checkpoints.is_dir() else []
    return sorted(int(f.name.removeprefix("step_")) for f in folders)


def last_sound_step(run: RunFolder) -> int:
    """The step that this run goes on from: the last whose files are what they were when written. Warns of those that are not.

    Raises:
        ConfigError: it has no checkpoint, or none that is sound.
    """
    found = steps(run)
    if not found:
        raise ConfigError("run.resume", f"{run.path} has no checkpoint to go on from", "start it anew under another run.name")
    for step in reversed(found):
        damage = damaged_file(run.checkpoint(step))
        if damage is None:
            return step
        warnings.warn(f"checkpoint of step {step}: {damage}; going back to the one before", stacklevel=2)
    raise ConfigError("run.resume", f"none of the checkpoints in {run.checkpoints} is sound", "start anew under another run.name")


def damaged_file(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected: dict[str, str] = json.loads((folder / CHECKSUM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{CHECKSUM_FILE} cannot be read ({error})"
    for name, checksum in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _checksum(folder / name) != checksum:
            return f"{name} is not what was written"
    return None


def load(run: RunFolder, step: int) -> dict[str, Any]:
    """The state that ``save`` was given, and the policy's."""
    state: dict[str, Any] = torch.load(run.checkpoint(step) / STATE_FILE, map_location="cpu", mmap=True, weights_only=True)
    return state


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)  # left by a crash
    beside.mkdir(parents=True)
    try:
        write(beside)
        checksums = {file.name: _checksum(file) for file in sorted(beside.iterdir())}
        (beside / CHECKSUM_FILE).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)  # on a full disk, give the space back
        raise
    for file in beside.iterdir():
        _sync(file)
    _sync(beside)
    if folder.exists():  # a rename cannot replace a folder that is not empty
        retired = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        beside.rename(folder)
        shutil.rmtree(retired)
    else:
        beside.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
