"""Whole runs with the tiny model: what a run leaves behind, exact resume, interruption, and the user's own reward."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from grpo import checkpoint
from grpo.best import Best
from grpo.build import train
from grpo.cli import main
from grpo.config import ConfigError
from grpo.console import best_line, shown_path
from grpo.interrupt import Interrupted, StopSignal
from grpo.learner import Learner, merge_metrics
from grpo.recipe import load_recipe, load_run
from grpo.rewards.health import RewardFailure
from grpo.rollouts.collect import Collector
from grpo.rollouts.paced import PacedCollector
from grpo.run import RunFolder
from grpo.trainer import Trainer, best_of

from . import tiny_runs

REWARDS = f"""{tiny_runs.DIGITS}
def brevity(completion, problem, scale=1.0):
    return -scale * len(completion.token_ids)
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: str) -> str:
    return write_recipe(tmp_path, tiny_model)


def write_recipe(folder: Path, model: str, algo: str = "grpo") -> str:
    return tiny_runs.write_recipe(folder, model, algo=algo, rewards=REWARDS)


def run_recipe(recipe: str, *overrides: str) -> RunFolder:
    """Beside the recipe, whatever the working directory is."""
    return train(load_recipe(recipe, *overrides)).run


def go_on(run: RunFolder, *overrides: str) -> str:
    """Its last line."""
    config = load_run(run.path, overrides)
    config.run.resume = True
    return train(config).headline


def comparable(run: RunFolder) -> list[dict[str, float]]:
    """Metrics that depend on the algorithm alone; NaN as a string, which equals itself."""
    changing = ("time/", "throughput/", "progress/")
    rows = [{k: v for k, v in row.items() if not k.startswith(changing)} for row in run.read_metrics()]
    return json.loads(json.dumps(rows))  # type: ignore[no-any-return]


# ---------------------------------------------------------------- what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> RunFolder:
    return run_recipe(write_recipe(tmp_path_factory.mktemp("finished"), tiny_model), "run.name=first")


def test_the_run_folder_is_complete(finished: RunFolder) -> None:
    assert (finished.recipe, finished.name) == ("digits", "first")
    assert finished.config_file.is_file() and json.loads(finished.environment_file.read_text())["packages"]["torch"]
    card = finished.objective_file.read_text()
    assert "8 completions a step = 2 problems × 4" in card
    for part in ("group_norm", "clipped_surrogate", "truncated_importance", "sequence_mean", "1 · digits"):
        assert part in card, part
    assert "<html" in finished.report_file.read_text()
    assert finished.rollout_steps() == [1, 2, 3]
    assert finished.rollout_steps("eval") == [0, 2, 3]
    assert checkpoint.steps(finished) == [2, 3], "two are kept: one to go back to"
    assert (finished.best_checkpoint / "model.safetensors").is_file()
    assert not [f for f in finished.checkpoints.iterdir() if f.name.startswith(".")], "nothing half written"


def test_metrics_have_a_row_a_step(finished: RunFolder) -> None:
    rows = finished.read_metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [("eval/pass@1" in row, "policy/loss" in row) for row in rows] == [(True, False), (False, True), (True, True), (True, True)]
    for row in rows[1:]:
        for key in (
            "reward/mean", "reward/digits/mean", "rollout/groups_without_signal", "completion/length_mean", "policy/grad_norm",
            "policy/lr", "policy/entropy", "policy/ratio", "policy/clip_share", "sampler/logprob_diff", "time/generate", "time/update",
            "time/step", "throughput/tokens_per_s_generate", "progress/steps",
        ):  # fmt: skip
            assert math.isfinite(row[key]), key
        assert row["policy/lr"] == 1e-3 and row["policy/ratio"] == 1.0
        assert row["policy/version"] == row["step"] - (0 if "eval/pass@1" in row else 1), "an evaluation loads the new weights"
        assert 0 < row["sampler/logprob_diff"] < 1e-4, "sampler and trainer are the same weights in fp32"


def test_rollouts_are_on_disk(finished: RunFolder) -> None:
    for step in (1, 2, 3):
        rows = pq.read_table(finished.rollout_file(step)).to_pylist()
        assert len(rows) == 8
        assert {version for row in rows for version in row["policy_versions"]} == {step - 1}
        by_problem: dict[str, list[float]] = {}
        for row in rows:
            by_problem.setdefault(row["problem_id"], []).append(row["advantage"])
        assert len(by_problem) == 2
        assert all(abs(sum(values)) < 1e-5 for values in by_problem.values()), "advantages of a group are centred"
        expected = sum(c.isdigit() for c in rows[0]["completion"]) / len(rows[0]["completion"])
        assert rows[0]["reward"] == pytest.approx(expected)


def test_training_changed_the_weights_and_the_checkpoint_is_a_model(finished: RunFolder, tiny_model: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before, after = load_file(Path(tiny_model) / "model.safetensors"), load_file(finished.checkpoint(3) / "model.safetensors")
    assert before.keys() == after.keys() and all((before[name] != after[name]).any() for name in before)
    AutoModelForCausalLM.from_pretrained(finished.checkpoint(3))
    assert AutoTokenizer.from_pretrained(finished.checkpoint(3)).decode([5]) == AutoTokenizer.from_pretrained(tiny_model).decode([5])


def test_the_saved_configuration_gives_the_same_run(finished: RunFolder) -> None:
    config = load_run(finished.path)
    config.run.name = "again"
    assert comparable(train(config).run) == comparable(finished)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        pytest.param("grpo", [], id="grpo"),
        pytest.param("deepseek_r1", ["algo.kl.coef=0.5", "optim.updates_per_step=2", "algo.reference_refresh=3"], id="kl_and_two_updates"),
    ],
)
def test_resume_is_exact(tmp_path: Path, tiny_model: str, algo: str, settings: Sequence[str]) -> None:
    recipe = write_recipe(tmp_path, tiny_model, algo)
    straight = run_recipe(recipe, "run.steps=4", "run.name=straight", *settings)
    halves = run_recipe(recipe, "run.steps=2", "run.name=halves", *settings)
    assert checkpoint.steps(halves) == [2]
    go_on(halves, "run.steps=4")
    assert comparable(halves) == comparable(straight)
    a, b = (load_file(run.checkpoint(4) / "model.safetensors") for run in (straight, halves))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for folder in ("rollouts", "eval"):
        assert halves.rollout_steps(folder) == straight.rollout_steps(folder)  # type: ignore[arg-type]
        for step in straight.rollout_steps(folder):  # type: ignore[arg-type]
            assert halves.read_rollouts(step, folder).equals(straight.read_rollouts(step, folder)), (folder, step)  # type: ignore[arg-type]


def evaluated_each_step(folder: Path, model: str, rewards: str = REWARDS) -> str:
    run = {"steps": 4, "checkpoint_every": 2, "dir": str(folder / "runs")}
    return tiny_runs.write_recipe(folder, model, rewards=rewards, run=run, eval={"every": 1, "problems": 8})


THREE_DIGITS = '''
def digits(completion, problem):
    return float(sum(c.isdigit() for c in completion.text) >= 2)
'''


def test_the_best_model_of_a_killed_run_is_that_of_the_whole_one(tmp_path: Path, tiny_model: str) -> None:
    """Its steps 3 and 4 are made again, with a ``best`` from the first time there: no step is skipped, and none taken for better."""
    recipe = evaluated_each_step(tmp_path, tiny_model, THREE_DIGITS)
    straight, killed = (run_recipe(recipe, "optim.lr=1e-2", f"run.name={name}") for name in ("straight", "killed"))
    scores = {row["step"]: row["eval/pass@1"] for row in straight.read_metrics()}
    best = straight.read_best()
    assert best and best.score == max(scores.values()) == scores[best.step] and best.step > 2, scores
    shutil.rmtree(killed.checkpoint(4))
    go_on(killed)
    for file in straight.best_checkpoint.iterdir():
        assert file.read_bytes() == (killed.best_checkpoint / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("score", "beaten"), [(1.0, False), (0.5, True)])
def test_a_best_model_of_discarded_steps_stays_until_it_is_beaten(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], score: float, beaten: bool
) -> None:
    """Of step 9, in a run that goes on from step 2; here all pass, so that each evaluation gives 1."""
    recipe = evaluated_each_step(tmp_path, tiny_model, "def digits(completion, problem):\n    return 1.0\n")
    run = run_recipe(recipe, "run.steps=2", "run.name=first")
    assert step_and_score(run) == (0, 1.0), "the first of equals"

    class Other:
        def save(self, folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"of step 9")

    checkpoint.save_best(run, Other(), discarded := Best(step=9, score=score))  # type: ignore[arg-type]
    go_on(run, "run.steps=3", "logger.console=true")
    said = " ".join(capsys.readouterr().out.split())
    stays = f"checkpoints/best stays the model of step 9 (held-out pass@1 {score:.2f})"
    assert f"{stays} until it is beaten, though this run goes on from step 2" in said
    assert step_and_score(run) == ((3, 1.0) if beaten else (9, discarded.score))
    assert checkpoint.damaged_file(run.best_checkpoint, needed="model.safetensors") is None
    assert ("made before this run went back to an earlier checkpoint" in said) is not beaten


ALL_PASS = """
def digits(completion, problem):
    return 1.0

def short(completion, problem):
    return float(len(completion.text) < 0)
"""


def step_and_score(run: RunFolder) -> tuple[int, float]:
    best = run.read_best()
    assert best
    return best.step, best.score


@pytest.mark.parametrize(
    ("change", "score"),
    [
        pytest.param("repair", 0.0, id="a grader that was repaired"),
        pytest.param("reward.short.fn={folder}/my_rewards.py:short eval.metric=short", 0.0, id="another metric"),
        pytest.param("data.problems.heldout=19", 1.0, id="other held-out problems"),
    ],
)
def test_a_best_model_by_another_judge_is_no_measure(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], change: str, score: float
) -> None:
    run = run_recipe(evaluated_each_step(tmp_path, tiny_model, ALL_PASS), "run.steps=2", "run.name=first")
    assert step_and_score(run) == (0, 1.0)
    words = ["run.exact=false"] if change == "repair" else change.format(folder=tmp_path).split()
    if change == "repair":
        (tmp_path / "my_rewards.py").write_text(ALL_PASS.replace("return 1.0", "return 0.0"))
    go_on(run, "run.steps=3", "logger.console=true", *words)
    said = " ".join(capsys.readouterr().out.split())
    anew = "was the model of step 0 (held-out pass@1 1.00) by another reward, other problems or another eval.metric: it begins anew"
    assert said.count(anew) == 1
    assert step_and_score(run) == (3, score)
    go_on(run, "run.steps=4", "logger.console=true")
    assert "it begins anew" not in " ".join(capsys.readouterr().out.split())
    assert step_and_score(run) == (3, score), "the same judge: the first of equals"


def test_an_evaluation_before_the_first_update_is_by_the_reward_of_now(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before the evaluation of step 2, gone on with under another reward: it is made up for, and later ones are no better."""
    run = run_recipe(evaluated_each_step(tmp_path, tiny_model, ALL_PASS), "run.steps=2", "run.name=first")
    run.drop_metrics(2)
    (tmp_path / "my_rewards.py").write_text(ALL_PASS.replace("return 1.0", "return 0.0"))
    go_on(run, "run.steps=4", "logger.console=true", "run.exact=false")
    assert " ".join(capsys.readouterr().out.split()).count("it begins anew") == 1
    assert step_and_score(run) == (2, 0.0)


def test_a_best_model_that_was_deleted_is_made_again(tmp_path: Path, tiny_model: str) -> None:
    run = run_recipe(evaluated_each_step(tmp_path, tiny_model, ALL_PASS), "run.steps=2", "run.name=first")
    shutil.rmtree(run.best_checkpoint)
    go_on(run, "run.steps=3")
    assert step_and_score(run) == (3, 1.0), "though the rows of steps 0 to 2 are as good"


def test_a_best_model_that_was_damaged_is_made_again(tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_recipe(evaluated_each_step(tmp_path, tiny_model, ALL_PASS), "run.steps=2", "run.name=first")
    weights = run.best_checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    go_on(run, "run.steps=3", "logger.console=true")
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoints/best is damaged (model.safetensors is not what was written): it begins anew" in said
    assert step_and_score(run) == (3, 1.0) and checkpoint.damaged_model(run.best_checkpoint) is None


def test_a_step_that_was_evaluated_twice_was_not_gone_back_behind() -> None:
    """Killed between the best model and its row; what was evaluated again scored lower."""
    rows = [{"step": 2, "eval/pass@1": 0.25}, {"step": 4, "eval/pass@1": 0.5}]
    said = "checkpoints/best is the model of step 4 (held-out pass@1 0.75)"
    assert best_line(Best(step=4, score=0.75), rows) == best_line(Best(step=4, score=0.75), [*rows, {"step": 5}]) == said
    assert best_line(Best(step=4, score=0.5), rows) == "", "that of the last row"
    for step in (3, 6):
        assert best_line(Best(step=step, score=0.75), rows).endswith("0.75), made before this run went back to an earlier checkpoint")


def test_a_run_whose_best_model_has_no_record_goes_by_its_rows() -> None:
    """Of an older version: the first of the highest."""
    rows = [{"step": 0, "eval/pass@1": 0.25}, {"step": 1}, {"step": 2, "eval/pass@1": 0.5}, {"step": 4, "eval/pass@1": 0.5}]
    assert best_of(rows) == Best(step=2, score=0.5)
    assert best_of(rows[1:2]) is None and best_of([{"step": 0, "eval/pass@1": math.nan}]) is None


def test_a_report_neither_fails_a_run_nor_hides_why_it_failed(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_recipe(recipe, "run.steps=2", "run.name=first")
    run.rollout_file(1).write_bytes(b"PAR1")
    go_on(run, "run.steps=3")
    assert "step_000001.parquet" in run.report_file.read_text()
    run.report_file.unlink()
    run.report_file.mkdir()  # it cannot be written at all
    with pytest.warns(UserWarning, match="the report could not be written"):
        last = go_on(run, "run.steps=4", "logger.console=true")
    assert checkpoint.steps(run)[-1] == 4
    scores = [row["eval/pass@1"] for row in run.read_metrics() if "eval/pass@1" in row]
    assert last.startswith(f"held-out pass@1 {scores[0]:.2f} → {scores[-1]:.2f} in "), "what was read is not lost with it"
    assert " ".join(capsys.readouterr().out.split()).endswith(f"{last}; {shown_path(run.path)}")
    (Path(recipe).parent / "my_rewards.py").write_text("def digits(completion, problem):\n    raise RuntimeError('a bug of mine')\n")
    with pytest.warns(UserWarning, match="the report could not be written"), pytest.raises(RewardFailure, match="a bug of mine"):
        go_on(run, "run.steps=5", "run.exact=false")


def test_resume_without_its_checkpoints_says_so(recipe: str) -> None:
    run = RunFolder.create(Path(recipe).parent / "runs", "digits", "empty")
    run.write_config("run: {steps: 9}\n")
    run.append_metrics({"step": 2, "time/checkpoint": 0.1})
    with pytest.raises(ConfigError, match=r"(?s)run\.resume: the checkpoints of .*empty are gone\n  → "):
        run_recipe(recipe, "run.name=empty", "run.resume=true")
    assert run.config_file.read_text() == "run: {steps: 9}\n", "nothing was touched"
    with pytest.raises(ConfigError, match=r"does not exist .*\n  → "):
        run_recipe(recipe, "run.name=never_made", "run.resume=true")


# ---------------------------------------------------------------- interruption


@pytest.mark.parametrize("method", ["write_environment", "write_objective", "write_config"])
def test_a_start_that_is_cut_off_before_its_record_is_whole_is_no_run(recipe: str, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def cut(self: RunFolder, content: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(RunFolder, method, cut)
    with pytest.raises(Interrupted):
        run_recipe(recipe, "run.name=young")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"not a run folder: it has no config\.yaml"):
        RunFolder.open(Path(recipe).parent / "runs" / "digits" / "young")
    run = run_recipe(recipe, "run.name=young", "run.steps=1")
    assert run.read_environment()["conditions"]["exact"] is True


def test_an_interrupted_generation_leaves_the_last_step_and_its_problems(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run_recipe(recipe, "run.steps=3", "run.name=straight")
    collect, calls = Collector.collect, []

    def stopping(self: Collector, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # step 2
            collect(self, *args, **kwargs)
            raise Interrupted
        return collect(self, *args, **kwargs)

    monkeypatch.setattr(Collector, "collect", stopping)
    with pytest.raises(Interrupted):
        run_recipe(recipe, "run.steps=3", "run.name=cut")
    cut = RunFolder.open(straight.path.parent / "cut")
    assert checkpoint.steps(cut) == [1], "checkpoint_every is 2; this one is for the interruption"
    assert [row["step"] for row in cut.read_metrics()] == [0, 1]
    monkeypatch.undo()
    go_on(cut)
    assert comparable(cut) == comparable(straight), "step 2 drew the same problems again"


def test_a_step_whose_evaluation_is_interrupted_is_on_record(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Trainer.evaluate

    def stopping(self: Trainer, stop: StopSignal) -> Any:
        if self.step == 2:
            raise Interrupted
        return evaluate(self, stop)

    monkeypatch.setattr(Trainer, "evaluate", stopping)
    with pytest.raises(Interrupted):
        run_recipe(recipe, "run.name=cut")
    cut = RunFolder.open(Path(recipe).parent / "runs" / "digits" / "cut")
    assert checkpoint.steps(cut) == [2]
    assert [row["step"] for row in cut.read_metrics()] == [0, 1, 2]
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    run_recipe(recipe, "run.name=cut", "run.resume=true")  # makes up for it, then does the step that is left
    assert [row["step"] for row in cut.read_metrics() if "eval/pass@1" in row] == [0, 2, 3]


def test_what_fails_in_an_evaluation_costs_no_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Trainer.evaluate

    def failing(self: Trainer, stop: StopSignal) -> Any:
        if self.step == 2:
            raise RuntimeError("engine 0 of 1 died")
        return evaluate(self, stop)

    monkeypatch.setattr(Trainer, "evaluate", failing)
    with pytest.raises(RuntimeError, match="engine 0 of 1 died"):
        run_recipe(recipe, "run.name=died", "run.checkpoint_every=0")
    assert checkpoint.steps(RunFolder.open(Path(recipe).parent / "runs" / "digits" / "died")) == [2]


@pytest.mark.parametrize(
    ("owner", "method", "settings"),
    [
        (torch.optim.Optimizer, "load_state_dict", []),
        (PacedCollector, "load_state", ["rollout.max_staleness=1"]),
    ],
)
def test_an_interruption_while_a_run_is_restored_leaves_it_as_it_was(
    recipe: str, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, settings: list[str]
) -> None:
    run = run_recipe(recipe, "run.steps=2", "eval.every=0", *settings)
    before = {file: file.read_bytes() for file in (*run.checkpoints.rglob("*.*"), run.metrics_file)}
    load = getattr(owner, method)

    def signalled(self: Any, state: Any) -> None:
        load(self, state)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(owner, method, signalled)
    with pytest.raises(Interrupted):
        go_on(run, "run.steps=3")
    assert {file: file.read_bytes() for file in (*run.checkpoints.rglob("*.*"), run.metrics_file)} == before
    monkeypatch.undo()
    go_on(run, "run.steps=3")
    assert [row["step"] for row in run.read_metrics()] == [0, 1, 2, 3] and checkpoint.steps(run) == [2, 3]
    if not settings:
        straight = run_recipe(recipe, "run.name=straight", "eval.every=0")
        assert comparable(run)[1:2] == comparable(straight)[1:2] and comparable(run)[3] == comparable(straight)[3]


def test_an_update_cut_in_two_is_not_saved(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C stops at once, even inside an optimiser step: what is saved then must be the step before, or nothing."""
    update, calls = Learner.update, []

    def half(self: Learner, minibatch: Any) -> Any:
        done = update(self, minibatch)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Learner, "update", half)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, "run.name=half", "run.checkpoint_every=1")
    assert checkpoint.steps(RunFolder.open(Path(recipe).parent / "runs" / "digits" / "half")) == [1]


def test_stop_signal_waits_for_the_step_and_cuts_off_a_rollout() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)  # outside `anywhere`: an update goes on
        assert stop.requested
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    with StopSignal() as stop, pytest.raises(Interrupted), stop.anywhere():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def children(process: int) -> set[int]:
    """All living descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    found, new = set[int](), {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def wait_for(condition: Any, seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_is_done_and_leaves_no_process(recipe: str, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "grpo.cli", "train", recipe, "run.steps=100000", "run.name=cut", "run.checkpoint_every=0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "digits" / "cut" / "metrics.jsonl"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, 120, process)
        family = children(process.pid)
        assert family, "the reward workers"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "grpo: stopped; `grpo train" in errors and "Traceback" not in errors
    left = {child for child in family if Path(f"/proc/{child}/stat").exists()}
    assert left == set()
    run = RunFolder.open(metrics.parent)
    last = run.read_metrics()[-1]["step"]
    assert checkpoint.steps(run) == [last] and last >= 3
    assert [row["step"] for row in run.read_metrics()] == list(range(int(last) + 1))
    assert run.report_file.is_file()
    go_on(run, f"run.steps={int(last) + 2}")
    rows = run.read_metrics()
    assert [row["step"] for row in rows if "reward/mean" in row] == list(range(1, int(last) + 3)), "every step is trained once"
    evaluated = [row["step"] for row in rows if "eval/pass@1" in row]  # one that the signal cut off is made up for, in a row of its own
    assert len(set(evaluated)) == len(evaluated) and {0, last + 2} <= set(evaluated)


# ---------------------------------------------------------------- the user's own parts


def test_a_reward_from_a_file_on_the_command_line(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(elsewhere)
    words = ["reward.brevity.fn=./my_rewards.py:brevity", "reward.brevity.weight=0.1", "reward.brevity.scale=2.0"]
    assert main(["train", recipe, "run.steps=1", "run.dir=runs", "run.name=own", *words]) == 0
    assert "runs/digits/own" in capsys.readouterr().out
    run = RunFolder.open(elsewhere / "runs" / "digits" / "own")
    row = run.read_metrics()[-1]
    assert row["reward/brevity/mean"] == pytest.approx(-2 * row["completion/length_mean"])
    assert row["reward/brevity/weighted"] == pytest.approx(-0.2 * row["completion/length_mean"])
    assert row["reward/mean"] == pytest.approx(row["reward/digits/mean"] - 0.2 * row["completion/length_mean"])
    go_on(run, "run.steps=2")  # from a working directory where ./my_rewards.py is another file
    assert run.read_metrics()[-1]["reward/brevity/mean"] < 0


def test_the_scripted_engine_runs_too(recipe: str) -> None:
    form = ["reward.format.fn=grpo.rewards.format.r1_format", "eval.metric=format"]
    run = run_recipe(recipe, "rollout=scripted", "rollout.max_new_tokens=80", "run.steps=2", *form)
    rows = run.read_metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["reward/format/mean"] == 1.0 for row in rows[1:]), "its answers are in the R1 format"
    assert rows[0]["eval/pass@1"] == 1.0


def test_updates_without_a_metric_do_not_count_in_its_mean() -> None:
    """A minibatch without signal has no ratio: it must not pull the mean to zero."""
    updates = [{"policy/ratio": 1.0, "policy/grad_norm": 3.0}, {"policy/grad_norm": 0.0}]
    assert merge_metrics(updates) == {"policy/ratio": 1.0, "policy/grad_norm": 1.5}


def test_a_run_stops_when_its_graders_fail_and_keeps_what_they_said(recipe: str) -> None:
    (Path(recipe).parent / "my_rewards.py").write_text("def digits(completion, problem):\n    raise KeyError('anser')\n")
    with pytest.raises(RewardFailure, match=r"(?s)8 of 8 rollouts of the step unscored .*reward\.digits error × 8.*KeyError: 'anser'"):
        run_recipe(recipe, "run.name=failing", "eval.problems=0")
    run = RunFolder.open(Path(recipe).parent / "runs" / "digits" / "failing")
    assert all("KeyError: 'anser'" in row["detail/digits"] for row in run.read_rollouts(1).to_pylist())


@pytest.mark.slow
def test_two_ranks_follow_the_run_of_one(recipe: str) -> None:
    """The same recipe through FSDP2: the same groups are drawn, and every number of the updates is the same up to rounding."""
    overrides = ("run.steps=2", "optim.updates_per_step=2", "eval.problems=0")
    one = run_recipe(recipe, "run.name=one", *overrides).read_metrics()
    two = run_recipe(recipe, "run.name=two", "trainer.ranks=2", *overrides).read_metrics()
    for a, b in zip(one, two, strict=True):
        for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/ratio_max", "reward/mean", "sampler/logprob_diff"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
        assert a["policy/trained_rollouts"] == b["policy/trained_rollouts"]


# ---------------------------------------------------------------- sampling ahead


def problem_ids(run: RunFolder) -> list[str]:
    """Of all groups trained on, in order."""
    return [group for step in run.rollout_steps() for group in dict.fromkeys(run.read_rollouts(step)["group"].to_pylist())]


def test_a_run_that_samples_ahead_trains_on_the_same_problems_in_the_same_order(recipe: str) -> None:
    ahead = run_recipe(recipe, "run.name=ahead", "run.steps=5", "rollout.max_staleness=2")
    strict = run_recipe(recipe, "run.name=strict", "run.steps=5")
    assert problem_ids(ahead) == problem_ids(strict)
    rows = [row for row in ahead.read_metrics() if "policy/loss" in row]
    assert all(0 <= row["rollout/staleness_mean"] <= row["rollout/staleness_max"] <= 2 for row in rows)
    assert [row["async/groups_ahead"] for row in rows] == [4, 4, 4, 2, 0], "two batches of two, and never more than there are steps left"
    assert all("time/wait" in row for row in rows)
    assert "Sampling runs ahead by up to 2 steps" in ahead.objective_file.read_text()
    for step in range(1, 6):
        table = ahead.read_rollouts(step)
        assert table.num_rows == 8 and all(max(versions) < step for versions in table["policy_versions"].to_pylist())
    for run in (ahead, strict):
        go_on(run, "run.steps=6", "rollout.max_staleness=0")  # nothing was begun that would be lost
    assert problem_ids(ahead) == problem_ids(strict)


def test_a_resumed_run_that_samples_ahead_counts_every_group_once(recipe: str) -> None:
    ahead = ["rollout.max_staleness=2", "run.checkpoint_every=1", "run.keep_checkpoints=4", "run.steps=6"]
    straight, halves = (run_recipe(recipe, f"run.name={name}", *ahead) for name in ("straight", "halves"))
    for later in (4, 5, 6):
        shutil.rmtree(halves.checkpoint(later))
    go_on(halves)
    assert problem_ids(halves) == problem_ids(straight) and len(set(problem_ids(halves))) == 12
    versions = [v for row in halves.read_rollouts(4)["policy_versions"].to_pylist() for v in row]
    assert min(versions) < 3, "what had been sampled before the stop was trained on after it"
