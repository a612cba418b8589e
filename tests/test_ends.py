"""How the command ends where something is not as it should be: a reader that has gone, a disk, a damaged model; and what it says."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo import checkpoint, cli
from grpo.build import train
from grpo.cli import main
from grpo.recipe import load_recipe
from grpo.run import RunFolder
from grpo.storage import StorageError

from .tiny_runs import write_recipe

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}  # what is printed goes out late, as it does at a shell


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> RunFolder:
    return train(load_recipe(write_recipe(tmp_path_factory.mktemp("ends"), tiny_model))).run


def read_by_nobody(*words: str, folder: Path) -> tuple[int, str]:
    """Exit status and what is said on standard error where ``grpo … | head`` has read its lines."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        command = [sys.executable, "-m", "grpo.cli", *words]
        done = subprocess.run(command, cwd=folder, stdout=out, stderr=subprocess.PIPE, text=True, timeout=300, env=ENVIRONMENT)
    return done.returncode, done.stderr


def test_what_shows_something_ends_like_any_command_before_head(run: RunFolder) -> None:
    for command in ("show", "recipes"):  # one prints with rich, one does not
        words = [str(run.path)] if command == "show" else []
        assert read_by_nobody(command, *words, folder=run.path) == (141, ""), command


def test_a_run_before_head_stops_in_words_and_is_saved(tmp_path: Path, tiny_model: str) -> None:
    run = {"steps": 200, "checkpoint_every": 0, "dir": str(tmp_path / "runs")}
    recipe = write_recipe(tmp_path, tiny_model, run=run, eval={"every": 0})
    command = [sys.executable, "-m", "grpo.cli", "train", recipe, "run.name=piped", "logger.console=true"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout and process.stderr
    lines = [process.stdout.readline() for _ in range(4)]  # the folder, the evaluation, the header, the first step
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=300) == 141, (lines, said)
    assert "grpo: stopped, for nobody reads the output any more; `grpo train <run folder>` goes on" in said and "Traceback" not in said
    piped = RunFolder.open(tmp_path / "runs" / "digits" / "piped")
    assert checkpoint.steps(piped) == [piped.read_metrics()[-1]["step"]] and checkpoint.last_sound_step(piped) < 200


@pytest.mark.parametrize("command", ["_train", "_show"])
def test_a_broken_pipe_that_is_not_the_outputs_is_an_error(
    command: str, run: RunFolder, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox's or a worker's."""

    def written_to_one_that_has_died(options: object) -> int:
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            pipe.write(b"work")
        return 0

    monkeypatch.delenv("GRPO_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, command, written_to_one_that_has_died)
    assert main([command.removeprefix("_"), str(run.path)]) == 1
    assert capfd.readouterr().err == "grpo: [Errno 32] Broken pipe\n  (GRPO_TRACEBACK=1 shows where)\n"


def test_what_a_disk_says_is_said_without_a_hint_at_tracebacks(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(options: object) -> int:
        raise StorageError(run.path, OSError(errno.EROFS, "Read-only file system"))

    monkeypatch.setattr(cli, "_show", full)
    assert main(["show", str(run.path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("grpo: run.dir: cannot write ") and "GRPO_TRACEBACK" not in error


@pytest.mark.parametrize("folder", ["best", "step_000003"])
def test_a_damaged_model_is_not_evaluated(run: RunFolder, capsys: pytest.CaptureFixture[str], folder: str) -> None:
    model = run.checkpoints / folder
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    weights.write_bytes(flipped)
    try:
        assert main(["eval", str(model)]) == 1
    finally:
        weights.write_bytes(whole)
    assert capsys.readouterr().err.startswith(f"grpo: eval: {str(model)!r} is damaged: model.safetensors is not what was written\n  → ")
    assert checkpoint.damaged_model(model) is None


def edit(name: str, more: str = "\n") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + more)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("source", "change", "says"),
    [
        pytest.param("step_000003", without("trainer_state.pt"), "", id="shipped without its state"),
        pytest.param("best", edit("generation_config.json"), "{}/generation_config.json is not what was written", id="edited"),
        pytest.param("best", without("evaluation.json"), "{}/evaluation.json is missing", id="no record"),
        pytest.param("best", lambda folder: (folder / "x.safetensors").touch(), "{}/x.safetensors is not in checksums.json", id="beside"),
        pytest.param("best", edit("checksums.json", "[]"), "{}: checksums.json cannot be read (", id="no checksums"),
    ],
)
def test_a_model_folder_is_its_owners_to_edit(
    run: RunFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    source: str,
    change: Callable[[Path], object],
    says: str,
) -> None:
    """It is evaluated like any other Hugging Face folder, though what is not as it was written is said."""
    model = shutil.copytree(run.checkpoints / source, tmp_path / "model")
    change(model)
    assert main(["eval", str(model), "--recipe", str(run.path.parents[2] / "digits.yaml")]) == 0
    assert capsys.readouterr().out.startswith(f"{model}\nheld-out pass@1 ")
    warned = [str(warning.message) for warning in recwarn if str(model) in str(warning.message)]
    assert len(warned) == bool(says) and all(warning.startswith(says.format(model)) for warning in warned)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_model_folder_without_what_it_cannot_be_without_is_refused(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = shutil.copytree(run.best_checkpoint, tmp_path / "model")
    (model / name).unlink()
    assert main(["eval", str(model), "--recipe", str(run.path.parents[2] / "digits.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"grpo: eval: {str(model)!r} is damaged: {name} is missing\n  → ")


def test_a_run_before_its_first_row_is_known_for_one(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = RunFolder.create(tmp_path, "digits", "young")
    young.write_config(run.config_file.read_text())
    young.write_environment({})
    assert main(["eval", str(young.path)]) == 1
    assert capsys.readouterr().err == f"grpo: eval: {young.path} has no checkpoint yet\n  → let the run reach run.checkpoint_every steps\n"


def test_show_says_which_model_is_the_best(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run.path), "--eval", "--limit", "0"]) == 0
    assert f"checkpoints/best is {run.read_best()}" in " ".join(capsys.readouterr().out.split())
