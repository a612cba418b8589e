"""``grpo replay`` with another reward, interrupted, and on a run that has lost something: its model's files, or a bit of one of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo import build
from grpo.build import train
from grpo.cli import main
from grpo.learner import Learner
from grpo.recipe import load_recipe, load_run
from grpo.replay import StepReplay, report
from grpo.run import RunFolder
from grpo.toy import toy_group

from .tiny_runs import write_recipe

OTHERS = """
def half(completion, problem):
    return 0.5

def boom(completion, problem):
    raise RuntimeError("a bug of mine")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> RunFolder:
    """Of a model in a folder that is there no more."""
    folder = tmp_path_factory.mktemp("replay")
    model = shutil.copytree(tiny_model, folder / "model")
    run = train(load_recipe(write_recipe(folder, str(model), run={"steps": 2, "checkpoint_every": 1}, eval={"every": 0}))).run
    shutil.rmtree(model)
    return run


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int) -> str:
    assert main(list(words)) == status
    return "".join(capsys.readouterr())


def test_a_reward_needs_no_model(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "replay", str(run.path), "--reward", f"{run.path.parents[2] / 'my_rewards.py'}:digits", status=0)
    assert "16 rollouts of 2 steps, scored again" in text and "rewards that changed   0 (0.0%)" in text
    assert "model.path" in said(capsys, "replay", str(run.path), "--train", status=1), "an update does"


def test_an_update_is_not_made_again_from_a_damaged_checkpoint(run: RunFolder, capsys: pytest.CaptureFixture[str], tiny_model: str) -> None:
    words = ("replay", str(run.path), "--train", "--step", "2", f"model.path={tiny_model}")
    assert "policy/grad_norm" in said(capsys, *words, status=0)
    state = run.checkpoint(1) / "trainer_state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1  # of a weight: it loads all the same
    state.write_bytes(content)
    text = said(capsys, *words, status=1)
    assert "--step: step 2 starts from the checkpoint of step 1, and trainer_state.pt is not what was written" in text


# ---------------------------------------------------------------- an update with another reward


@pytest.fixture
def others(tmp_path: Path) -> Path:
    (tmp_path / "r.py").write_text(OTHERS)
    return tmp_path / "r.py"


def again(text: str, metric: str) -> tuple[float, float]:
    """(stored, again)"""
    line = re.search(rf"(?m)^{re.escape(metric)} +(\S+) +(\S+)", text)
    assert line, text
    return float(line[1]), float(line[2])


def test_an_update_learns_another_reward(run: RunFolder, capsys: pytest.CaptureFixture[str], tiny_model: str, others: Path) -> None:
    words = ("replay", str(run.path), "--train", f"model.path={tiny_model}")
    text = said(capsys, *words, "--reward", f"{others}:half", status=0)
    assert again(text, "policy/empty_updates") == (0, 1), "equal rewards move nothing"
    assert again(text, "rollout/groups_without_signal") == (0, 1) and again(text, "reward/mean")[1] == 0.5
    text = said(capsys, *words, "reward.digits.weight=3", status=0)
    stored, fresh = again(text, "reward/mean")
    assert stored > 0 and fresh == pytest.approx(3 * stored, rel=1e-4), "as many digits as are printed"
    assert "differs" not in said(capsys, *words, status=0)


def test_an_update_is_not_made_with_a_reward_that_fails(
    run: RunFolder, capsys: pytest.CaptureFixture[str], tiny_model: str, others: Path
) -> None:
    text = said(capsys, "replay", str(run.path), "--train", f"model.path={tiny_model}", "--reward", f"{others}:boom", status=1)
    assert "the rewards left 8 of 8 rollouts of the step unscored" in text and "RuntimeError: a bug of mine" in text


def test_a_file_without_its_function(run: RunFolder, capsys: pytest.CaptureFixture[str], others: Path) -> None:
    says = f"grpo: --reward: {str(others)!r} names a file, and none of its functions\n  → write {others}:FUNCTION\n"
    assert said(capsys, "replay", str(run.path), "--reward", str(others), status=1) == says
    assert said(capsys, "score", str(others), "--reward", str(others), status=1) == says


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_update(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_model: str, number: int
) -> None:
    went_on = []

    def signalled(self: Learner, *_: Any) -> Any:
        os.kill(os.getpid(), number)
        went_on.append(number)
        return None, {}

    monkeypatch.setattr(Learner, "learn", signalled)
    text = said(capsys, "replay", str(run.path), "--train", f"model.path={tiny_model}", status=130)
    assert not went_on and "stored" not in text


# ---------------------------------------------------------------- many steps, damaged ones


def test_steps_are_scored_one_after_the_other(run: RunFolder) -> None:
    """There is no step 99: that is met when its turn has come."""
    replays = build.rescore(load_run(run.path), run, [1, 99])
    assert next(replays).step == 1
    with pytest.raises(FileNotFoundError, match="no rollouts of step 99"):
        next(replays)


def test_a_report_adds_up_over_steps_and_shows_the_largest_changes() -> None:
    def replays() -> Iterator[StepReplay]:
        for step in (1, 2, 3):  # rewards 0 and 1 become 0 and 1 + step: a signal there and then; and 1, 1 become 1, 0
            before = (toy_group("a", [0, 1], [1, 1]), toy_group("b", [1, 1], [1, 1]))
            yield StepReplay(step=step, before=before, after=(toy_group("a", [0, 1 + step], [1, 1]), toy_group("b", [1, 0], [1, 1])))

    text = report(replays(), limit=2)
    assert "12 rollouts of 3 steps" in text
    assert "mean reward            0.75 → 1\n" in text, "(0 + 1 + 1 + 1) / 4; (0 + 2 + 1 + 0 + 0 + 3 + 1 + 0 + 0 + 4 + 1 + 0) / 12"
    assert "rewards that changed   6 (50.0%)" in text and "3 gain a signal, 0 lose it" in text
    assert re.findall(r"(?m)^step .*: (.*) \(answer", text) == ["1 → 4", "1 → 3"]


@pytest.mark.parametrize("words", [("show",), ("replay",), ("replay", "--train")], ids=" ".join)
def test_damaged_rollouts_are_named_with_a_remedy(run: RunFolder, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    file = run.rollout_file(1)
    content = file.read_bytes()
    file.write_bytes(content[:500])
    try:
        text = said(capsys, words[0], str(run.path), *words[1:], "--step", "1", status=1)
    finally:
        file.write_bytes(content)
    assert text.startswith(f"grpo: rollouts: {str(file)!r} cannot be read: ")
    assert text.endswith("\n  → choose another --step, or remove the file: training needs it no more\n")
