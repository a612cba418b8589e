"""Checkpoints: a Hugging Face folder that transformers and vLLM load as it is, beside the state that training goes on from.

Written next to its place, synced and renamed: a folder that has the name of a checkpoint is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grpo.config import ConfigError
from grpo.policy import Policy
from grpo.run import RunFolder

STATE_FILE = "trainer_state.pt"


def save_model(policy: Policy, folder: Path) -> None:
    """Only the model, e.g. the best by evaluation; replaces ``folder`` at once."""
    _write(folder, lambda beside: policy.save(beside))


def save(run: RunFolder, step: int, policy: Policy, state: Mapping[str, Any], keep: int) -> None:
    """The model and everything needed to go on after ``step``; older ones beyond ``keep`` lose their place."""

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


def last_step(run: RunFolder) -> int:
    """The step that this run goes on from.

    Raises:
        ConfigError: it has no checkpoint.
    """
    found = steps(run)
    if not found:
        raise ConfigError("run.resume", f"{run.path} has no checkpoint to go on from", "start it anew under another run.name")
    return found[-1]


def load_last(run: RunFolder) -> dict[str, Any]:
    """The state of the last checkpoint.

    Raises:
        ConfigError: the run has none.
    """
    file = run.checkpoint(last_step(run)) / STATE_FILE
    state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return state


def _write(folder: Path, write: Any) -> None:
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)  # left by a crash
    beside.mkdir(parents=True)
    write(beside)
    for file in beside.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if folder.exists():  # a rename cannot replace a folder that is not empty
        retired = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
        beside.rename(folder)
        shutil.rmtree(retired)
    else:
        beside.rename(folder)
