"""Checkpoints: whole or not there, found out when a disk has damaged them, and none lost to a full disk."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from grpo import checkpoint, randomness
from grpo.best import Best
from grpo.config import ConfigError
from grpo.run import RunFolder
from grpo.storage import StorageError


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
        (lambda folder: (folder / "trainer_state.pt").unlink(), "trainer_state.pt is missing"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "checksums.json cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("{}"), "model.pt is not in checksums.json"),
        (lambda folder: (folder / "checksums.json").write_text("[]"), "checksums.json holds no names of files"),
        (lambda folder: _leave(folder, {"checksums.json": "{}"}), "trainer_state.pt is missing"),
    ],
    ids=[
        "a flipped bit", "a lost file", "a cut file", "a lost state", "damaged checksums", "no checksums", "checksums of another kind",
        "nothing but no checksums",
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run: RunFolder, damage: Any, says: str) -> None:
    damage(run.checkpoint(3))
    with pytest.warns(UserWarning, match=rf"checkpoint of step 3: {says}.*going back to the one before"):
        assert checkpoint.last_sound_step(run) == 2
    assert checkpoint.load(run, 2)["position"] == 20
    damage(run.checkpoint(2))
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match=r"none of the checkpoints in .* is sound"):
        checkpoint.last_sound_step(run)


def test_a_file_put_beside_is_no_damage_unless_it_holds_weights(run: RunFolder) -> None:
    (run.checkpoint(3) / "notes.txt").write_text("the good one")
    assert checkpoint.last_sound_step(run) == 3
    (run.checkpoint(3) / "adapter.safetensors").write_bytes(b"")
    assert checkpoint.damaged_file(run.checkpoint(3)) == "adapter.safetensors is not in checksums.json"


def test_without_a_checkpoint_a_run_goes_on_from_its_beginning_unless_one_was_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "recipe", "young")
    run.append_metrics({"step": 1})
    assert checkpoint.last_sound_step(run) == 0
    run.append_metrics({"step": 2, "time/checkpoint": 0.5})
    with pytest.raises(ConfigError, match=r"the checkpoints of .*young are gone"):
        checkpoint.last_sound_step(run)


def test_a_checkpoint_that_no_row_tells_of_is_missed_too(run: RunFolder) -> None:
    """One that is saved on the way out: its step's row was written before it."""
    assert run.read_metrics() == []
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ConfigError, match=r"the checkpoints of .*run are gone"):
        checkpoint.last_sound_step(run)
    anew = RunFolder.create(run.path.parents[1], "recipe", "run")  # allowed: it holds nothing
    assert anew == run and checkpoint.last_sound_step(anew) == 0


def test_a_crash_in_the_first_save_does_not_make_a_run_that_has_lost_its_checkpoints(tmp_path: Path) -> None:
    for number in itertools.count():
        run = RunFolder.create(tmp_path, "recipe", f"first_{number}")
        killed = killed_at(number, lambda: checkpoint.save(run, 1, Numbers(1.0), {}, keep=1))  # type: ignore[arg-type]  # noqa: B023
        assert checkpoint.last_sound_step(run) in ((0, 1) if killed else (1,))  # and none is refused
        if not killed:
            break
    assert number > 8, "there are more operations than that: the patches hold"


@pytest.mark.parametrize("damage", [lambda folder: _flip(folder / "model.pt"), lambda folder: (folder / "trainer_state.pt").unlink()])
def test_going_back_moves_damaged_checkpoints_out_of_the_way(run: RunFolder, damage: Callable[[Path], None]) -> None:
    """Left where it is, the damaged one of step 3 would be kept as the newest, and what is saved after it thrown away."""
    damage(run.checkpoint(3))
    checkpoint.rewind(run, 2)
    assert checkpoint.steps(run) == [2] and (run.checkpoints / "damaged_step_000003").is_dir()
    checkpoint.save(run, 3, Numbers(3.0), {}, keep=1)  # type: ignore[arg-type]
    assert checkpoint.steps(run) == [3] and checkpoint.last_sound_step(run) == 3


def test_a_state_of_another_version_is_refused_in_words(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    with pytest.raises(ConfigError, match=r"(?s)step 3 was written by another version of grpo-toolkit\n  → .*model.path=.*step_000003"):
        checkpoint.load(run, 3)


def test_the_wandb_run_and_the_end_of_the_metrics_are_in_it(run: RunFolder) -> None:
    run.append_metrics({"step": 4})
    run.wandb_id_file.write_text("abc")
    checkpoint.save(run, 4, Numbers(4.0), {}, keep=2)  # type: ignore[arg-type]
    facts = checkpoint.load(run, 4)["run"]
    assert (facts["metrics_bytes"], facts["wandb_id"]) == (len('{"step": 4}\n'), "abc")
    run.wandb_id_file.unlink()
    run.metrics_file.write_text("")
    with pytest.warns(UserWarning, match="metrics.jsonl is shorter than it was at step 4"):
        checkpoint.rewind(run, 4)
    assert run.wandb_id_file.read_text() == "abc"


def test_a_copy_under_another_steps_name_is_not_gone_on_from(run: RunFolder) -> None:
    shutil.copytree(run.checkpoint(3), run.checkpoint(5))
    with pytest.warns(UserWarning, match="checkpoint of step 5: it is that of step 3, under another name; going back"):
        assert checkpoint.last_sound_step(run) == 3
    checkpoint.rewind(run, 3)
    assert checkpoint.steps(run) == [2, 3] and (run.checkpoints / "damaged_step_000005").is_dir()


class Talkative(Numbers):
    """Its tokenizer has two chat templates, and transformers a folder for the second."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(4.0)
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}" * 100}

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.tokenizer.save_pretrained(folder)


def test_files_in_folders_are_synced_checked_and_counted(run: RunFolder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append(path.name))
    checkpoint.save(run, 4, Talkative(tokenizer), {}, keep=1)  # type: ignore[arg-type]
    assert "tool_use.jinja" in synced and synced.index("additional_chat_templates") < synced.index(".step_000004.writing")
    assert checkpoint.last_sound_step(run) == 4
    # Two of (2 + 4 + 2 × 4) bytes a weight: 28. On a full disk there is room for as many as what is there makes when it goes.
    files = [run.checkpoint(4) / name for name in json.loads((run.checkpoint(4) / "checksums.json").read_text())]
    there = sum(file.stat().st_size for file in (*files, run.checkpoint(4) / "checksums.json"))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    assert checkpoint.little_room(run, there // 28, "bfloat16", moments=2, keep=1, best=False) is None
    assert checkpoint.little_room(run, there // 28 + 1, "bfloat16", moments=2, keep=1, best=False) is not None
    _flip(run.checkpoint(4) / "additional_chat_templates" / "tool_use.jinja")
    assert checkpoint.damaged_file(run.checkpoint(4)) == "additional_chat_templates/tool_use.jinja is not what was written"


# ---------------------------------------------------------------- random states


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(), float(np.random.standard_normal()), float(torch.rand(()))


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    randomness.seed_all(7)
    first = draw()
    run = RunFolder.create(tmp_path, "recipe", "random")
    checkpoint.save(run, 1, Numbers(1.0), {}, keep=1)  # type: ignore[arg-type]
    second = draw()
    randomness.seed_all(7)
    assert draw() == first, "seeded"
    randomness.seed_all(8)
    randomness.restore(checkpoint.load(run, 1)["random"])
    assert draw() == second, "the second halves of Python's and NumPy's pairs of normal numbers included"


# ---------------------------------------------------------------- a disk that is full


class Large(Numbers):
    """Some 4 MB, written by the libraries that write real models."""

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        if self.value > 0:
            save_file({"w": torch.full((1_000_000,), self.value)}, folder / "model.safetensors")

    def state(self) -> dict[str, Any]:
        return {"w": torch.full((1_000_000,), self.value)}


@pytest.mark.parametrize("value", [4.0, -4.0], ids=["while the model is written", "while the state is written"])
def test_a_full_disk_costs_nothing_that_was_saved(run: RunFolder, value: float, tmp_path: Path) -> None:
    """For real on a small file system, where one can be mounted; else by the limit on the size of a file."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mounted:
            shutil.move(run.path, place / "run")
            run = RunFolder(place / "run")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, hard))
        said = "No space left on device" if mounted else "File too large"
        with pytest.raises(StorageError, match=rf"run\.dir: cannot write '.*/step_000004': {said}\n  → .*saved is whole") as caught:
            checkpoint.save(run, 4, Large(value), {}, keep=2)  # type: ignore[arg-type]
        assert caught.value.errno == (errno.ENOSPC if mounted else errno.EFBIG)
        assert checkpoint.steps(run) == [2, 3] and checkpoint.last_sound_step(run) == 3
        assert sorted(f.name for f in run.checkpoints.iterdir()) == ["step_000002", "step_000003"], "its own leftovers are gone"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


class Third(Numbers):
    """A disk that holds two checkpoints and not a third."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(4.0)
        self.run = run

    def save(self, folder: Path) -> None:
        if len(checkpoint.steps(self.run)) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().save(folder)


def test_keeping_fewer_is_a_remedy_for_a_full_disk(run: RunFolder) -> None:
    with pytest.raises(StorageError, match=r"keep fewer checkpoints \(run\.keep_checkpoints\)"):
        checkpoint.save(run, 4, Third(run), {}, keep=2)  # type: ignore[arg-type]
    assert checkpoint.steps(run) == [2, 3]
    checkpoint.save(run, 4, Third(run), {}, keep=1)  # type: ignore[arg-type]
    assert checkpoint.steps(run) == [4] and checkpoint.last_sound_step(run) == 4


def test_no_room_is_made_with_the_last_sound_checkpoint(run: RunFolder) -> None:
    """The newest has been damaged since the run was gone on with."""
    _flip(run.checkpoint(3) / "model.pt")
    with pytest.raises(StorageError):
        checkpoint.save(run, 4, Third(run), {}, keep=1)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="checkpoint of step 3: model.pt is not what was written"):
        assert checkpoint.last_sound_step(run) == 2


def test_too_small_a_disk_is_known_before_the_run(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 million weights: 2 bytes in bf16, 4 in fp32, 2 × 4 of AdamW = 140 MB, which is 133.5 MiB. Two are kept, one is written: 400.5 MiB.
    free = 0
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))
    there = sum(file.stat().st_size for step in (2, 3) for file in run.checkpoint(step).iterdir())  # what goes for the new ones
    free = 3 * 140_000_000 - there
    assert checkpoint.little_room(run, 10_000_000, "bfloat16", moments=2, keep=2, best=False) is None
    free -= 1
    said = checkpoint.little_room(run, 10_000_000, "bfloat16", moments=2, keep=2, best=False)
    assert said and "(2 that are kept and one that is written, 134 MiB each)" in said and "run.keep_checkpoints" in said
    assert checkpoint.little_room(run, 10_000_000, "bfloat16", moments=0, keep=2, best=False) is None
    said = checkpoint.little_room(run, 10_000_000, "float32", moments=2, keep=2, best=False)  # 2 bytes a weight more: 152.6 MiB
    assert said and "153 MiB each" in said
    assert checkpoint.little_room(run, 10_000_000, "bfloat16", moments=2, keep=1, best=False) is None


def test_the_best_model_counts_as_room(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 million weights: 40 MB + 20 MB a checkpoint without moments, two of them; the best in bf16: 20 MB, which is 19.1 MiB.
    free = 0
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))
    checkpoint.save_best(run, Numbers(1.0), Best(step=1, score=0.25))  # type: ignore[arg-type]
    there = sum(file.stat().st_size for name in ("step_000002", "step_000003", "best") for file in (run.checkpoints / name).iterdir())
    free = 2 * 60_000_000 + 20_000_000 - there
    assert checkpoint.little_room(run, 10_000_000, "bfloat16", moments=0, keep=1, best=True) is None
    free -= 1
    said = checkpoint.little_room(run, 10_000_000, "bfloat16", moments=0, keep=1, best=True)
    assert said and "57 MiB each, and 19 MiB of the best model)" in said
    assert checkpoint.little_room(run, 10_000_000, "bfloat16", moments=0, keep=1, best=False) is None


def test_the_best_model_says_which_it_is_under_its_checksums(run: RunFolder) -> None:
    assert run.read_best() is None
    checkpoint.save_best(run, Numbers(1.0), best := Best(step=7, score=1 / 3))  # type: ignore[arg-type]
    assert run.read_best() == best
    assert str(best) == "the model of step 7 (held-out pass@1 0.33)"
    _flip(run.best_checkpoint / "evaluation.json")
    assert checkpoint.damaged_file(run.best_checkpoint, needed="model.pt") == "evaluation.json is not what was written"
    (run.best_checkpoint / "evaluation.json").write_text("[]")
    assert run.read_best() is None
    (run.best_checkpoint / "evaluation.json").write_text('{"step": 7, "eval/pass@1": 0.5}')  # of a version that kept no judge
    assert run.read_best() == Best(step=7, score=0.5, judge={})


def test_the_best_model_says_what_it_was_judged_by(run: RunFolder) -> None:
    judge = {"eval.metric": "math", "inputs": {"files": {"/ü.py": "1"}, "problems": {"heldout": "2"}}}
    checkpoint.save_best(run, Numbers(1.0), best := Best(step=7, score=0.5, judge=judge))  # type: ignore[arg-type]
    assert run.read_best() == best
    assert best.judged_by(judge) and best.judged_by({"eval.metric": "math"}) and best.judged_by({})
    assert Best(step=7, score=0.5).judged_by(judge), "of a version that kept none"
    assert not best.judged_by(judge | {"eval.metric": "format"})
    assert not best.judged_by(judge | {"inputs": {"files": {"/ü.py": "1"}, "problems": {"heldout": "3"}}})
    assert not best.judged_by(judge | {"inputs": {"files": {"/ü.py": "0"}, "problems": {"heldout": "2"}}})


def test_an_error_that_is_not_the_disks_stays_what_it_is(run: RunFolder) -> None:
    class Wrong(Numbers):
        def save(self, folder: Path) -> None:
            raise KeyError("weight")

    with pytest.raises(KeyError, match="weight"):
        checkpoint.save(run, 4, Wrong(4.0), {}, keep=2)  # type: ignore[arg-type]
    assert sorted(f.name for f in run.checkpoints.iterdir()) == ["step_000002", "step_000003"]


# ---------------------------------------------------------------- SIGKILL between any two operations on files

OPERATIONS = ((os, "fsync"), (os, "rename"), (os, "rmdir"), (os, "unlink"), (os, "mkdir"), (checkpoint, "_exchange"))


def killed_at(number: int, action: Callable[[], None]) -> bool:
    """Whether ``action``, in a process of its own, was killed before file operation ``number`` (from 0); if not, it had fewer."""
    count = itertools.count()

    def deadly(plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        return operation

    child = os.fork()
    if child == 0:
        for module, name in OPERATIONS:
            setattr(module, name, deadly(getattr(module, name)))
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), "the action itself failed"
    return status != 0


def crashes(run: RunFolder, action: Callable[[], None], fresh: Path) -> Iterator[int]:
    """After each crash ``action`` can have, with the folder as it was before; the number of the operation."""
    shutil.copytree(run.checkpoints, fresh)
    number = 0
    while killed_at(number, action):
        yield number
        shutil.rmtree(run.checkpoints)
        shutil.copytree(fresh, run.checkpoints)
        number += 1
    assert number > 8, "there are more operations than that: the patches hold"


@pytest.mark.parametrize(
    ("keep", "left"),
    [(2, [[2, 3], [2, 3, 4], [3, 4]]), (1, [[2, 3], [3], [3, 4], [4]])],
    ids=["as many as before", "fewer"],
)
def test_a_crash_at_any_moment_of_a_save_leaves_a_sound_checkpoint(
    run: RunFolder, tmp_path: Path, keep: int, left: list[list[int]]
) -> None:
    seen = set()
    for _ in crashes(run, lambda: checkpoint.save(run, 4, Numbers(4.0), {"position": 40}, keep=keep), tmp_path / "fresh"):  # type: ignore[arg-type]
        step = checkpoint.last_sound_step(run)  # no warning: under the name of a checkpoint there is nothing half
        seen.add(step)
        assert checkpoint.load(run, step)["position"] == 10 * step
        checkpoint.rewind(run, step)
        assert sorted(f.name for f in run.checkpoints.iterdir()) in [[f"step_{s:06d}" for s in kept] for kept in left]
    assert seen == {3, 4}, "some crashes come before the rename, some after it"


@pytest.mark.parametrize("exchanged", [True, False], ids=["renameat2", "a file system without it"])
def test_the_best_model_is_there_at_every_moment_of_its_replacement(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    checkpoint.save_best(run, Numbers(1.0), Best(step=1, score=0.25))  # type: ignore[arg-type]
    if not exchanged:
        def refuse(*_: Path) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

        monkeypatch.setattr(checkpoint, "_exchange", refuse)
    seen = set()
    for _ in crashes(run, lambda: checkpoint.save_best(run, Numbers(2.0), Best(step=2, score=0.5)), tmp_path / "fresh"):  # type: ignore[arg-type]
        if not exchanged:  # between its two renames there is none, until the run is gone on with
            checkpoint.rewind(run, 3)
        assert checkpoint.damaged_file(run.best_checkpoint, needed="model.pt") is None
        seen.add(value := float(torch.load(run.best_checkpoint / "model.pt")["w"][0]))
        assert run.read_best() == Best(step=int(value), score=value / 4), "the record goes with its model"
        checkpoint.rewind(run, 3)
        assert sorted(f.name for f in run.checkpoints.iterdir()) == ["best", "step_000002", "step_000003"]
    assert seen == {1.0, 2.0}


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _leave(folder: Path, texts: dict[str, str]) -> None:
    for file in folder.iterdir():
        file.unlink()
    for name, text in texts.items():
        (folder / name).write_text(text)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
