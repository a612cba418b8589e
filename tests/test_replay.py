"""``grpo replay`` on a run that has lost something: its model's files, or a bit of a checkpoint."""

from __future__ import annotations

import shutil

import pytest

from grpo.build import train
from grpo.cli import main
from grpo.recipe import load_recipe
from grpo.run import RunFolder

from .tiny_runs import write_recipe


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
