"""Exact resume: a run that is killed at any moment and gone on with ends in the same bits as one that is not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grpo import checkpoint
from grpo.run import MEASURED, RunFolder

from .killable_runs import Kill
from .workshop import ENGINES, STEPS, Workshop, name_of

# ---------------------------------------------------------------- what has to be the same


def differences(whole: RunFolder, other: RunFolder) -> list[str]:
    """Everything in which two runs differ, measured times aside: weights, trainer state, metrics, rollouts, and the names of files."""
    found = []
    if files(whole) != files(other):
        found.append(f"files: {sorted(files(whole) ^ files(other))}")
    for step in checkpoint.steps(whole):
        found += [f"checkpoint {step}: {place}" for place in unequal(state(whole, step), state(other, step))]
    for file in sorted([*whole.checkpoints.glob("*/*.safetensors"), *whole.best_checkpoint.glob("*.json")]):
        if file.read_bytes() != (other.checkpoints / file.relative_to(whole.checkpoints)).read_bytes():
            found.append(str(file.relative_to(whole.path)))
    found += [f"metrics {place}" for place in unequal(rows(whole), rows(other))]
    for folder in ("rollouts", "eval"):
        for step in whole.rollout_steps(folder):  # type: ignore[arg-type]
            if not whole.read_rollouts(step, folder).equals(other.read_rollouts(step, folder)):  # type: ignore[arg-type]
                found.append(f"{folder} of step {step}")
    return found


def files(run: RunFolder) -> set[str]:
    return {str(file.relative_to(run.path)) for file in run.path.rglob("*")} - {".lock"}


def rows(run: RunFolder) -> list[dict[str, Any]]:
    return [calculated(row) for row in json.loads(f"[{','.join(run.metrics_file.read_text().splitlines())}]")]


def state(run: RunFolder, step: int) -> dict[str, Any]:
    held = checkpoint.load(run, step)
    return held | {"row": calculated(held["row"]), "elapsed": None, "run": None}


def calculated(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(MEASURED)}


def unequal(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two nested values are not the same to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = dict.fromkeys([*one, *other])
        return [p for name in names for p in unequal(one.get(name, "absent"), other.get(name, "absent"), f"{place}/{name}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [p for i, (a, b) in enumerate(zip(one, other, strict=True)) for p in unequal(a, b, f"{place}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    else:
        same = repr(one) == repr(other)  # as their digits: NaN is NaN, and 1 is not 1.0
    return [] if same else [f"{place}: {str(one)[:80]} against {str(other)[:80]}"]


# ---------------------------------------------------------------- killed at any moment


def random_moments(engine: str) -> list[Kill]:
    """20 of a seed: four in each phase, spread over the run, so that the kill comes before, between and after its checkpoints."""
    chance = random.Random(engine)
    phases = {"generation": 6, "update": 5, "sync": 6, "checkpoint": 3}
    drawn = [Kill(phase=p, call=chance.randint(1, calls), share=chance.random() * 0.9) for p, calls in phases.items() for _ in range(4)]
    return drawn + [Kill(phase="reward", call=chance.randint(1, STEPS), share=chance.random()) for _ in range(4)]


def survives(workshop: Workshop, engine: str, kill: Kill) -> None:
    name = name_of(kill).replace("/", "_").replace(" ", "_") + f"_{engine}"
    whole = workshop.whole(engine)
    if kill.phase == "reward":  # the trainer alone is killed, while this completion of step ``call`` is scored
        asked = whole.read_rollouts(kill.call).to_pylist()
        victim = asked[int(kill.share * len(asked))]
        (workshop.folder / f"kill {victim['problem_id'].replace('/', ' ')} {victim['index']}").touch()
        assert workshop.train(name, *ENGINES[engine]) == -9, workshop.said()
    else:
        assert workshop.train(name, *ENGINES[engine], kill=kill) == -9, workshop.said()
    assert workshop.go_on(name) == 0, workshop.said()
    assert differences(whole, RunFolder.open(workshop.path(name))) == []
    shutil.rmtree(workshop.path(name))


EDGES = [
    Kill(phase="generation", call=2, share=0.5),  # before the first checkpoint: from the beginning
    Kill(phase="update", call=4, share=0.5),
    Kill(phase="sync", call=4, share=0),
    Kill(phase="checkpoint", call=2, share=0.5),
    Kill(phase="checkpoint", call=2, share=1),  # saved; neither evaluated nor in the metrics
    Kill(phase="row", call=5, share=0),  # evaluated, the best model saved, not in the metrics
]


@pytest.mark.slow
@pytest.mark.parametrize("kill", EDGES, ids=name_of)
def test_a_killed_run_ends_as_the_whole_one(workshop: Workshop, kill: Kill) -> None:
    survives(workshop, "hf", kill)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [Kill(phase="reward", call=4, share=0.6), Kill(phase="evaluation", call=3, share=0.5)], ids=name_of)
def test_a_killed_run_of_the_scripted_engine_ends_as_the_whole_one(workshop: Workshop, kill: Kill) -> None:
    survives(workshop, "scripted", kill)


@pytest.mark.full
@pytest.mark.parametrize(("engine", "kill"), [(e, k) for e in ENGINES for k in random_moments(e)], ids=name_of)
def test_a_run_killed_at_random_ends_as_the_whole_one(workshop: Workshop, engine: str, kill: Kill) -> None:
    survives(workshop, engine, kill)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_whole_one(workshop: Workshop) -> None:
    """Five times, the resumed runs too: in the evaluation that is made up for, in the row of it, and in what follows."""
    whole = workshop.whole("hf")
    assert workshop.train("often", *ENGINES["hf"], kill=Kill(phase="checkpoint", call=1, share=1)) == -9
    for kill in (
        Kill(phase="evaluation", call=1, share=1),
        Kill(phase="row", call=1, share=0),
        Kill(phase="row", call=1, share=1),
        Kill(phase="checkpoint", call=1, share=0),
    ):
        assert workshop.go_on("often", kill=kill) == -9, workshop.said()
    assert workshop.go_on("often") == 0, workshop.said()
    assert differences(whole, RunFolder.open(workshop.path("often"))) == []


@pytest.mark.slow
def test_the_one_before_a_damaged_checkpoint_leads_to_the_same_end(workshop: Workshop) -> None:
    whole = workshop.whole("hf")
    assert workshop.train("damaged", *ENGINES["hf"], kill=Kill(phase="row", call=6, share=1)) == -9  # step 5
    run = RunFolder.open(workshop.path("damaged"))
    assert checkpoint.steps(run) == [2, 4]
    with (run.checkpoint(4) / "trainer_state.pt").open("r+b") as file:
        file.truncate(10_000)
    assert workshop.go_on("damaged") == 0, workshop.said()
    assert "grpo: warning: checkpoint of step 4: trainer_state.pt is not what was written; going back to the one before" in workshop.said()
    assert checkpoint.steps(run) == [4, 6], "step 4 was made again"
    shutil.rmtree(run.checkpoints / "damaged_step_000004")
    assert differences(whole, run) == []


# ---------------------------------------------------------------- what the bits rest on


REFUSED = (
    "grpo: run.exact: this run would not go on to the same bits: trainer_threads was 8 and is 1\n"
    "  → OMP_NUM_THREADS=8 in front of the command; or go on all the same: run.exact=false\n"
)


def contents(run: RunFolder) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


def of_eight_threads(run: RunFolder, step: int) -> None:
    """As if the checkpoint had been written by a process with other threads."""
    folder = run.checkpoint(step)
    whole = torch.load(folder / "trainer_state.pt", weights_only=True)
    whole["run"]["environment"]["conditions"]["trainer_threads"] = 8
    torch.save(whole, folder / "trainer_state.pt")
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums["trainer_state.pt"] = hashlib.sha256((folder / "trainer_state.pt").read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(checksums))


def test_another_number_of_threads_is_refused_in_words(workshop: Workshop) -> None:
    assert workshop.train("threads", *ENGINES["hf"], "run.steps=1") == 0, workshop.said()
    run = RunFolder.open(workshop.path("threads"))
    recorded = run.read_environment()["conditions"]
    assert (recorded["trainer_threads"], recorded["exact"]) == (1, True)
    of_eight_threads(run, 1)
    before = contents(run)
    assert workshop.go_on("threads", "run.steps=2") == 1
    assert workshop.said() == REFUSED
    assert contents(run) == before, "nothing was touched"
    assert workshop.go_on("threads", "run.steps=2", "run.exact=false") == 0, workshop.said()
    assert "grpo: warning: trainer_threads was 8 and is 1: from here on the bits may be others" in workshop.said()
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2]
    assert checkpoint.load(run, 2)["run"]["environment"]["conditions"]["trainer_threads"] == 1
    of_eight_threads(run, 2)
    assert workshop.go_on("threads", "run.steps=3") == 1
    assert workshop.said() == REFUSED, "the word was for one start"


@pytest.mark.slow
def test_a_run_that_begins_with_exact_false_keeps_it(workshop: Workshop) -> None:
    assert workshop.train("lax", *ENGINES["scripted"], "run.steps=1", "run.exact=false") == 0, workshop.said()
    run = RunFolder.open(workshop.path("lax"))
    for steps in (2, 3):
        of_eight_threads(run, steps - 1)
        assert workshop.go_on("lax", f"run.steps={steps}") == 0, workshop.said()
        assert "grpo: warning: trainer_threads was 8 and is 1" in workshop.said()


@pytest.mark.slow
def test_conditions_are_in_the_checkpoint_and_before_the_first_in_the_environment(workshop: Workshop) -> None:
    assert workshop.train("record", *ENGINES["scripted"], "run.steps=2") == 0, workshop.said()
    run = RunFolder.open(workshop.path("record"))
    run.environment_file.unlink()
    assert workshop.go_on("record", "run.steps=3") == 0, workshop.said()
    assert "warning" not in workshop.said() and run.read_environment()["conditions"]["trainer_threads"] == 1
    assert workshop.train("young", *ENGINES["scripted"], kill=Kill(phase="update", call=1, share=0)) == -9, workshop.said()
    young = RunFolder.open(workshop.path("young"))
    young.environment_file.write_text("{")
    assert workshop.go_on("young", "run.steps=1") == 0, workshop.said()
    assert "warning: the record of what this run was started with (environment.json) is gone or damaged" in workshop.said()


# ---------------------------------------------------------------- settings that a run is to go on with


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "override", "says"),
    [
        (("rollout.max_staleness=1",), "rollout.max_staleness=0", "rollout.max_staleness: is 0, and this run has begun"),
        ((), "rollout.max_new_tokens=5000", "do not fit, with rollout.max_new_tokens=5000"),
    ],
    ids=["by the trainer's state", "for want of room"],
)
def test_a_setting_that_is_refused_is_not_kept(workshop: Workshop, words: tuple[str, ...], override: str, says: str) -> None:
    name = f"refused_{len(words)}"
    assert workshop.train(name, *ENGINES["hf"], *words, "eval.problems=0", kill=Kill(phase="row", call=3, share=1)) == -9, workshop.said()
    run = RunFolder.open(workshop.path(name))
    before = record(run)
    assert workshop.go_on(name, override) == 1
    assert says in workshop.said()
    assert record(run) == before
    assert workshop.go_on(name) == 0, workshop.said()
    assert [row["step"] for row in run.read_metrics()] == list(range(1, STEPS + 1))


def test_a_setting_is_kept_from_the_first_update_on(workshop: Workshop) -> None:
    assert workshop.train("setting", *ENGINES["scripted"], "run.steps=2") == 0, workshop.said()
    run, words = RunFolder.open(workshop.path("setting")), ("run.steps=4", "algo.objective.clip_high=0.5")
    run.write_environment(run.read_environment() | {"python": "2.7"})
    before = record(run)
    assert workshop.go_on("setting", *words, kill=Kill(phase="generation", call=1, share=1)) == -9, workshop.said()
    assert record(run) == before
    assert workshop.go_on("setting", *words, kill=Kill(phase="update", call=1, share=0)) == -9, workshop.said()
    kept = yaml.safe_load(run.config_file.read_text())
    assert (kept["algo"]["objective"]["clip_high"], kept["run"]["steps"]) == (0.5, 4)
    assert "clip(ρ, 0.8, 1.5)" in run.objective_file.read_text() and "clip(ρ, 0.8, 1.5)" not in before[1]
    assert run.read_environment()["python"] == platform.python_version()
    assert workshop.go_on("setting") == 0, workshop.said()
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2, 3, 4]


def record(run: RunFolder) -> tuple[str, str, dict[str, Any]]:
    """What is kept of the settings and the machine. The figures of the weights' self-test stand there too as soon as it has passed."""
    environment = {name: value for name, value in run.read_environment().items() if name != "weight_self_test"}
    return run.config_file.read_text(), run.objective_file.read_text(), environment


# ---------------------------------------------------------------- a checkpoint that is gone

STOPPING = '''
import os
import signal
from pathlib import Path

ASKED = Path({file!r})

def answer(prompt, index, seed):
    """SIGTERM with the first completion of step 3: there are 2 × 4 in each."""
    asked = len(ASKED.read_text()) if ASKED.exists() else 0
    ASKED.write_text("." * (asked + 1))
    if asked == 16:
        os.kill(os.getpid(), signal.SIGTERM)
    return str(index)
'''


def test_a_checkpoint_of_the_way_out_is_missed_when_it_is_deleted(workshop: Workshop) -> None:
    """``run.checkpoint_every=0`` and SIGTERM: its row was written before it."""
    (workshop.folder / "my_answers.py").write_text(STOPPING.format(file=str(workshop.folder / "asked")))
    answer = f"rollout.engine_args.answer={workshop.folder / 'my_answers.py'}:answer"
    words = (*ENGINES["scripted"], "run.checkpoint_every=0", "eval.problems=0", answer)
    assert workshop.train("stopped", *words) == 130, workshop.said()
    run = RunFolder.open(workshop.path("stopped"))
    assert checkpoint.steps(run) == [2] and not any("time/checkpoint" in row for row in run.read_metrics())
    shutil.rmtree(run.checkpoints)
    before = contents(run)
    assert workshop.go_on("stopped") == 1
    assert workshop.said().startswith(f"grpo: run.resume: the checkpoints of {run.path} are gone\n  → put them back")
    assert contents(run) == before


# ---------------------------------------------------------------- a disk that is full, a folder that is read-only


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a size that can be changed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_words_and_costs_nothing_that_was_saved(workshop: Workshop, small_disk: Path) -> None:
    whole = workshop.whole("hf")
    used = sum(file.stat().st_size for file in whole.checkpoint(STEPS).iterdir())
    best = sum(file.stat().st_size for file in whole.best_checkpoint.iterdir())
    room = int(best + 1.5 * used) // 2**20  # the checkpoint of step 2 fits, that of step 4 does not
    remount(small_disk, f"size={room}m")
    on_disk = f"run.dir={small_disk}"
    assert workshop.train("full", *ENGINES["hf"], on_disk) == 1
    said = workshop.said()
    warned = re.search(rf"grpo: warning: run\.dir: {small_disk}/digits/full has (\d+) MiB of disk free, and checkpoints will take", said)
    assert warned and int(warned[1]) <= room  # known before the first step
    assert f"grpo: run.dir: cannot write '{small_disk}/digits/full/checkpoints/step_000004': No space left on device\n  → " in said
    assert "make room, or keep fewer checkpoints (run.keep_checkpoints)" in said and "Traceback" not in said
    run = RunFolder.open(small_disk / "digits" / "full")
    assert checkpoint.steps(run) == [2] and checkpoint.last_sound_step(run) == 2
    remount(small_disk, "size=64m")
    assert workshop.runs.run("train", str(run.path)) == 0, workshop.said()
    assert differences(whole, run) == []
    remount(small_disk, "ro")
    assert workshop.runs.run("train", str(run.path), "run.steps=9") == 1
    assert workshop.said().startswith(f"grpo: run.dir: cannot write '{run.path}': Read-only file system\n  → make the folder writable")
    assert "Traceback" not in workshop.said()
    remount(small_disk, "rw")
    assert differences(whole, run) == []


@pytest.mark.slow
def test_wherever_the_disk_is_full_the_run_can_be_gone_on_with(workshop: Workshop, small_disk: Path) -> None:
    """No room for the first file that is written, and nearly enough for a checkpoint."""
    on_disk, run = f"run.dir={small_disk}", small_disk / "digits" / "fill"
    assert workshop.train("fill", *ENGINES["hf"], on_disk, kill=Kill(phase="row", call=4, share=1)) == -9  # step 3
    refused = set()
    for kib in (0, 4000):
        filler, room = small_disk / "filler", os.statvfs(small_disk)
        with filler.open("wb") as file:
            file.write(bytes(room.f_bavail * room.f_bsize - kib * 1024))
        assert workshop.runs.run("train", str(run)) == 1, workshop.said()
        message = re.search(rf"(?m)^grpo: run\.dir: cannot write '{run}/?(.*)': No space left on device\n  → .* make room", workshop.said())
        assert message and "Traceback" not in workshop.said(), workshop.said()
        refused.add(message[1])
        filler.unlink()
    assert refused == {"metrics.jsonl", "checkpoints/step_000004"}
    assert workshop.runs.run("train", str(run)) == 0, workshop.said()
    assert differences(workshop.whole("hf"), RunFolder.open(run)) == []


@pytest.mark.slow
def test_a_run_that_filled_its_disk_goes_on_with_fewer_checkpoints(workshop: Workshop, small_disk: Path) -> None:
    whole = workshop.whole("hf")
    used = sum(file.stat().st_size for file in whole.checkpoint(STEPS).iterdir())
    best = sum(file.stat().st_size for file in whole.best_checkpoint.iterdir())
    remount(small_disk, f"size={int(best + 2.5 * used) // 2**20}m")  # steps 2 and 4 fit, and step 6 beside one of them
    assert workshop.train("two", *ENGINES["hf"], f"run.dir={small_disk}") == 1
    assert "step_000006': No space left on device" in workshop.said()
    run = RunFolder.open(small_disk / "digits" / "two")
    assert checkpoint.steps(run) == [2, 4]
    assert workshop.runs.run("train", str(run.path), "run.keep_checkpoints=1") == 0, workshop.said()
    assert checkpoint.steps(run) == [STEPS]


# ---------------------------------------------------------------- vLLM, the real command and all its processes

TINY_VLLM = (
    "tiny_digits", "rollout=vllm_small", "rollout.engine_args.max_model_len=64", "rollout.max_new_tokens=16", "rollout.problems_per_step=4",
    "rollout.completions_per_problem=4", "eval.problems=4", "eval.every=2", "run.steps=3", "run.checkpoint_every=1", "logger.console=false",
    "logger.wandb.mode=offline",
)  # fmt: skip


def command(*words: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "grpo.cli", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def family(process: int) -> list[int]:
    """The process and its descendants: what a machine that loses its power would end."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    found = [process]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def kill_in_step(step: int, run: Path, process: subprocess.Popen[str], seconds: float) -> None:
    """SIGKILL for everything, ``seconds`` after the row of the step before was written."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 500
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    time.sleep(seconds)
    assert process.poll() is None, process.communicate()
    for member in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    process.communicate()


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["fixed", "free"])
def test_a_killed_run_with_vllm_goes_on(tmp_path: Path, schedule: str) -> None:
    """The same bits under the fixed schedule; under the free one every group of every step once, and whole."""
    pytest.importorskip("vllm", reason="needs vLLM (scripts/setup.sh installs it)")
    runs = tmp_path / "runs" / "tiny_digits"
    words = ("train", *TINY_VLLM, f"rollout.schedule={schedule}")
    whole = command(*words, "run.name=whole", folder=tmp_path)
    said, _ = whole.communicate(timeout=500)
    assert whole.returncode == 0, said
    for step, seconds in ((1, 0.1), (2, 0.4)):  # before the first checkpoint, and after it
        name = f"killed_in_{step}"
        kill_in_step(step, runs / name, command(*words, f"run.name={name}", folder=tmp_path), seconds)
        resumed = command("train", str(runs / name), folder=tmp_path)
        said, _ = resumed.communicate(timeout=500)
        assert resumed.returncode == 0, said
        one, other = RunFolder.open(runs / "whole"), RunFolder.open(runs / name)
        assert (other.path / "wandb_id").read_text() in "".join(f.name for f in (other.path / "wandb").iterdir())
        if schedule == "fixed":
            assert [d for d in differences(one, other) if not d.startswith("files: ")] == []
        assert [row["step"] for row in other.read_metrics()] == [0, 1, 2, 3]
        assert other.rollout_steps() == [1, 2, 3] and other.rollout_steps("eval") == [0, 2, 3]
        for step in (1, 2, 3):
            assert keys(one, step) == keys(other, step), "the same problems in the same order"
            assert len(set(keys(other, step))) == 16, "4 problems × 4 completions, each once"


def keys(run: RunFolder, step: int) -> list[tuple[str, int]]:
    return [(row["problem_id"], row["index"]) for row in run.read_rollouts(step).to_pylist()]
