"""The configuration of a run that exists, and what may be typed over it: nothing is dropped in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo import config_file
from grpo.build import plain
from grpo.cli import main
from grpo.config import Config, ConfigError
from grpo.recipe import load_recipe, load_run

RECIPE = "r1_zero_arithmetic"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / RECIPE / "one"
    write(load_recipe(RECIPE, "rollout=hf", "algo=dapo", "logger=quiet", "model=tiny"), folder)
    return folder


def write(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_file.dump(plain(config)), encoding="utf-8")


@pytest.mark.parametrize(
    "override",
    [
        "algo.correction={}",
        "~algo.correction",
        "algo.objective.fn=grpo.objectives.cispo",
        "algo.kl={fn: grpo.kl.k3, coef: 0.1}",
        "algo.objective.clip_high=0.5",
        "reward={other: {fn: grpo.rewards.math.accuracy}}",
        "reward.other.fn=grpo.rewards.match.exact",
        "~reward.format",
        "optim.betas=[0.8, 0.9]",
        "data.template='\\${question} and ${data.answer_key}'",
    ],
)
def test_an_override_means_what_it_means_for_a_recipe(run: Path, override: str) -> None:
    also = ["eval.metric=other"] if "reward={" in override else []
    expected = plain(load_recipe(RECIPE, "rollout=hf", "algo=dapo", "logger=quiet", "model=tiny", override, *also))
    config = plain(load_run(run, [override, *also]))
    assert config["run"].pop("dir") == str(run.parent.parent) and config["run"].pop("name") == "one"
    del expected["run"]["dir"], expected["run"]["name"]
    assert config == expected
    assert config != plain(load_run(run)), "it changes something"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.name=other", r"run\.name: is 'other', but a run that exists .* is called as that is: .*/one\n  → move or rename the folder"),
        ("run.recipe=other", r"run\.recipe: is 'other', but a run that exists"),
        ("run.dir=elsewhere", r"run\.dir: is 'elsewhere', but a run that exists is where its folder is"),
        ("run.resume=false", r"run\.resume: is false, but a run that exists is gone on with"),
        ("run.seed=0,1", r"run\.seed: is given several values, and a run folder is one run\n  → give one; a sweep .* --multirun"),
        ("algo=grpo", r"algo: a group cannot be chosen anew .*\n  → set single keys; or start from the recipe"),
        ("reward=math", r"reward: a group cannot be chosen anew .*\n  → set single keys, or the whole node, reward=\{…\}; or start"),
        ("~reward.nothing", r"reward\.nothing: is not there to be taken out\n  → there is: overlong, accuracy, format"),
        ("~algo.objective.clip_high=0.5", r"algo\.objective\.clip_high: is 0\.28, not 0\.5\n  → .* ~algo\.objective\.clip_high$"),
        ("~optim.lr", r"optim\.lr: cannot be taken out: every run has it\n  → set it to its default: optim\.lr=1e-06"),
        ("hydra.verbose=true", r"hydra\.verbose: is of Hydra, which composes recipes"),
        ("optim={lr: 1}", r"optim: is a section, not a setting"),
    ],
)
def test_what_a_run_cannot_be_told_is_refused_in_words(run: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{says}"):
        load_run(run, [override])


def test_its_own_name_and_place_are_no_contradiction(run: Path) -> None:
    config = load_run(run, ["run.name=one", f"run.recipe={RECIPE}", f"run.dir={run.parent.parent}", "run.resume=true"])
    assert (config.run.name, config.run.dir) == ("one", str(run.parent.parent))


@pytest.mark.parametrize("name", ["${y}", r"\${y}", "a,b", "1e3", "null", "[x]"])
def test_a_folder_may_have_any_name(run: Path, name: str) -> None:
    config = load_run(run.rename(run.parent / name), ["data.answer_key='${run.name}'"])
    assert (config.run.name, config.data.answer_key) == (name, name)


@pytest.mark.parametrize("sweep", [[], ["--multirun", "run.seed=0,1"]], ids=["alone", "a sweep"])
def test_a_recipe_is_no_way_to_go_on_with_a_run(
    tmp_path: Path, sweep: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings may be others than those that the run was made with."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", RECIPE, "run.name=my run", "run.resume=true", *sweep]) == 1
    said = capsys.readouterr().err
    assert "grpo: run.resume: is true, but this is a recipe" in said
    assert f"\n  → grpo train 'runs/{RECIPE}/my run', with what is to be otherwise behind it; for another run, leave this out\n" in said
