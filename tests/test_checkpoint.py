"""Checkpoints: whole or not there, found out when a disk has damaged them, and none lost to a full disk."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo import checkpoint
from grpo.config import ConfigError
from grpo.run import RunFolder


class Numbers:
    """The part of a policy that a checkpoint needs."""

    def __init__(self, value: float) -> None:
        self.value = value

    def save(self, folder: Path) -> None:
        torch.save({"w": torch.full((100,), self.value)}, folder / "model.pt")

    def state(self) -> dict[str, Any]:
        return {"value": torch.tensor(self.value)}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path, "recipe", "run")
    for step in (1, 2, 3):
        checkpoint.save(run, step, Numbers(float(step)), {"position": 10 * step}, keep=2)  # type: ignore[arg-type]
    return run


def test_a_checkpoint_comes_back_and_the_oldest_goes(run: RunFolder) -> None:
    assert checkpoint.steps(run) == [2, 3] and checkpoint.last_sound_step(run) == 3
    state = checkpoint.load(run, 3)
    assert (state["step"], state["position"], float(state["policy"]["value"])) == (3, 30, 3.0)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: _flip(folder / "model.pt"), "model.pt is not what was written"),
        (lambda folder: (folder / "model.pt").unlink(), "model.pt is missing"),
        (lambda folder: _cut(folder / "trainer_state.pt"), "trainer_state.pt is not what was written"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "checksums.json cannot be read"),
    ],
    ids=["a flipped bit", "a lost file", "a cut file", "damaged checksums"],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run: RunFolder, damage: Any, says: str) -> None:
    damage(run.checkpoint(3))
    with pytest.warns(UserWarning, match=rf"checkpoint of step 3: {says}.*going back to the one before"):
        assert checkpoint.last_sound_step(run) == 2
    assert checkpoint.load(run, 2)["position"] == 20
    damage(run.checkpoint(2))
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match=r"none of the checkpoints in .* is sound"):
        checkpoint.last_sound_step(run)


def test_a_full_disk_costs_nothing_that_was_saved(run: RunFolder) -> None:
    class Full(Numbers):
        def save(self, folder: Path) -> None:
            (folder / "model.pt").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(run, 4, Full(4.0), {}, keep=2)  # type: ignore[arg-type]
    assert checkpoint.steps(run) == [2, 3] and checkpoint.last_sound_step(run) == 3
    assert sorted(f.name for f in run.checkpoints.iterdir()) == ["step_000002", "step_000003"], "its own leftovers are gone"


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
