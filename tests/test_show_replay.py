"""``grpo show`` and ``grpo replay`` on a real run of the tiny model, and a table of rollouts there and back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from grpo import cli, recipe
from grpo.build import train
from grpo.cli import main
from grpo.config import Config
from grpo.recipe import load_recipe
from grpo.rollout_table import groups_of, rollout_table
from grpo.run import RunFolder
from grpo.toy import toy_group
from grpo.types import Completion, FinishReason, Group, Outcome, Problem, Rollout, Score

from .tiny_runs import DIGITS, write_recipe

REWARDS = f'''{DIGITS}
def broken(completion, problem):
    if completion.index == 1:
        raise RuntimeError("a bug of mine")
    return 1.0
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> RunFolder:
    folder = tmp_path_factory.mktemp("replay")
    file = write_recipe(
        folder,
        tiny_model,
        algo="deepseek_r1",
        rewards=REWARDS,
        rollout={"problems_per_step": 4, "completions_per_problem": 3},
        optim={"updates_per_step": 2},
        eval={"every": 0},
    )
    return train(load_recipe(file, "algo.reference_refresh=3")).run


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    assert main(list(words)) == status
    out = capsys.readouterr()
    return out.out if status == 0 else out.err


def test_groups_survive_a_table_and_back() -> None:
    problem = Problem(id="p/1", prompt="1 + 1 =", answer="2", columns={"a": 1, "b": [1, "x"]})
    completion = Completion(
        problem_id="p/1",
        index=3,
        prompt_ids=(4, 5),
        token_ids=(6, 7),
        text=" 2",
        logprobs=(-0.5, -0.25),
        policy_versions=(8, 9),
        finish_reason=FinishReason.length,
    )
    scores = {"right": Score(value=1.0, detail="2"), "slow": Score(value=0.5, outcome=Outcome.timeout, detail="took 5 s")}
    group = Group(problem=problem, rollouts=(Rollout(problem=problem, completion=completion, scores=scores, reward=1.5),))
    assert groups_of(rollout_table(7, [group], {}, {})) == (group,)
    failed = {"right": Score(value=math.nan, outcome=Outcome.error)}
    unscored = Rollout(problem=problem, completion=completion, scores=failed, reward=math.nan)
    (back,) = groups_of(rollout_table(7, [Group(problem=problem, rollouts=(unscored,))], {}, {}))
    assert math.isnan(back.rollouts[0].reward) and back.rollouts[0].scores["right"].outcome is Outcome.error


def test_show_orders_and_limits(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run.read_rollouts(3).to_pylist()
    text = said(capsys, "show", str(run.path), "--best", "--limit", "12")
    shown = [float(line.split(" · ")[0].removeprefix("reward ")) for line in text.splitlines() if line.startswith("reward ")]
    assert shown == pytest.approx(sorted((row["reward"] for row in rows), reverse=True), rel=1e-4)
    assert text.startswith("step 3: 12 completions of 4 problems") and "weights of step 2" in text
    text = said(capsys, "show", str(run.path), "--worst", "--step", "1", "--limit", "2")
    assert "… and 10 more (--limit)" in text and "weights of step 0" in text
    text = said(capsys, "show", str(run.path), "--problem", rows[0]["problem_id"])
    assert text.count("· completion") == 3
    assert ", finish reason length · " in text
    text = said(capsys, "show", str(run.path), "--outcome", "timeout")
    assert "· completion" not in text
    assert "no completion in this step has the outcome timeout; there are: ok 12" in text
    assert said(capsys, "show", str(run.path), "--eval", "--step", "0").startswith("step 0: 3 completions")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--step", "9"], "--step: there is no step 9 in rollouts\n  → there are 1–3"),
        (["--problem", "nope"], "--problem: there is no problem 'nope' in this step\n  → there are: train/"),
        (["--limit", "-1"], "--limit: is -1\n  → give how many rollouts to print; 0: the summary alone"),
        (["--outcome", "late"], "--outcome: there is no outcome 'late'\n  → there are: ok, wrong_format, timeout"),
    ],
)
def test_show_names_what_there_is(run: RunFolder, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in said(capsys, "show", str(run.path), *words, status=1)


def test_show_marks_the_groups_that_dynamic_sampling_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two problems of two completions, the second without signal and dropped."""
    groups = [toy_group("kept", [0, 1], [1, 2]), toy_group("dropped", [1, 1], [1, 2])]
    run = RunFolder.create(tmp_path, "recipe", "name")
    run.write_config("")
    dropped = {(group.problem.id, index): group.problem.id == "dropped" for group in groups for index in (0, 1)}
    run.write_rollouts(1, groups, {("kept", 0): -1.0, ("kept", 1): 1.0}, extra={"dropped": dropped})
    text = " ".join(said(capsys, "show", str(run.path)).split())  # the terminal's width breaks lines anywhere
    assert "dropped by dynamic sampling, their rewards being equal: 1 of the problems" in text
    of_kept, _, of_dropped = text.partition("dropped · completion 0")
    assert "not trained on" not in of_kept and of_dropped.count("not trained on: group dropped, without signal") == 2


@pytest.mark.parametrize("reward", ["format", "math", "r1_rules"])
def test_replay_takes_the_names_that_score_takes_and_the_presets(run: RunFolder, capsys: pytest.CaptureFixture[str], reward: str) -> None:
    text = said(capsys, "replay", str(run.path), "--step", "1", "--reward", reward)
    parts = ["accuracy", "format"] if reward == "r1_rules" else [reward]
    assert all(f"\n  {part:<22} – → " in text for part in parts)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--reward", "mat"], "--reward: there is no reward 'mat'\n  → did you mean"),
        (["--reward", "nothing"], "math, math-verify, r1_full"),
        (["--step", "9"], "--step: there is no step 9 in rollouts\n  → there are 1–3"),
        (["--train", "--step", "0"], "--step: there is no step 0 in rollouts\n  → there are 1–3"),
        (["--limit", "-1"], "--limit: is -1"),
    ],
)
def test_replay_names_what_there_is(run: RunFolder, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in said(capsys, "replay", str(run.path), *words, status=1)


@pytest.mark.parametrize("command", ["train", "show", "replay"])
def test_what_is_not_quite_the_run_folder(run: RunFolder, capsys: pytest.CaptureFixture[str], command: str) -> None:
    for inside in (run.best_checkpoint, run.metrics_file, run.rollout_file(1)):
        error = said(capsys, command, str(inside), status=1)
        assert f"{str(inside)!r} is a part of a run, not the run folder\n  → give {str(run.path)!r}" in error
    error = said(capsys, command, str(run.path.parent / "nope"), status=1)
    assert "does not exist" in error and "no built-in recipe" not in error


def test_home_and_a_trailing_slash(run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.path.parent))
    assert said(capsys, "show", f"~/{run.name}/", "--limit", "1").startswith("step 3: ")


def test_a_run_folder_that_stands_in_no_recipes_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Directly under ``/``: it would be looked for in ``/run``, a folder of another name."""
    config = Config()
    config.run.dir, config.run.name = "/", "first"
    monkeypatch.setattr(recipe, "load_run", lambda *_: config)
    monkeypatch.setattr(cli, "_names_a_run", lambda _: True)
    monkeypatch.setattr(cli, "_open", lambda _: RunFolder(Path("/first")))
    assert "run: '/first' stands in no folder of a recipe\n  → move it" in said(capsys, "train", "/first", status=1)


def test_replay_with_the_same_reward_changes_nothing(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "replay", str(run.path))
    assert "36 rollouts of 3 steps, scored again" in text and "rewards that changed   0 (0.0%)" in text
    assert "0 gain a signal, 0 lose it" in text


def test_replay_with_another_reward_reports_the_differences(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    broken = f"{run.path.parents[2] / 'my_rewards.py'}:broken"
    text = said(capsys, "replay", str(run.path), "--step", "2", "--reward", broken)
    assert "12 rollouts of 1 steps" in text
    assert "unscored               0 → 4" in text, "one of three completions of each of four problems"
    assert "RuntimeError: a bug of mine" in text
    assert "0 gain a signal" in text, "all that could be scored are equal"


def test_an_update_made_again_is_the_same_to_the_bit(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Two updates a step, a reference that was refreshed in between, from the checkpoint of step 2; and the first step from nothing."""
    for step in ("3", "1"):
        text = said(capsys, "replay", str(run.path), "--train", "--step", step)
        assert "policy/grad_norm" in text and "policy/kl" in text and "differs" not in text
    text = said(capsys, "replay", str(run.path), "--train", "--step", "1", "algo.objective.clip_high=0.0", "algo.objective.clip_low=0.0")
    assert "policy/clip_share" in text and "differs by" in text
    error = said(capsys, "replay", str(run.path), "--train", "--step", "2", status=1)
    assert "step 2 starts from the checkpoint of step 1, which is not kept\n  → there is: 1, 3" in error
