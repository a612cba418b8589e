"""The configuration of a run that exists, and what may be typed over it: nothing is dropped in silence."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from grpo import config_file
from grpo.build import plain
from grpo.cli import main
from grpo.config import Config, ConfigError
from grpo.recipe import load_recipe, load_run
from grpo.run import RunFolder

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
        ("run.dir=3", r"run\.dir: is '3', but a run that exists is where its folder is"),
        ("run.dir=null", r"run\.dir: cannot be null\n"),
        ("run.name=null", r"run\.name: cannot be null\n"),
        ("run.name=7", r"run\.name: is '7', but a run that exists"),
        ("run.resume=off", r"run\.resume: is false, but a run that exists is gone on with"),
        ("run.resume=maybe", r"run\.resume: .*maybe"),
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


@pytest.mark.parametrize("word", ["run.name=7", "run.name='7'", "run.dir=3"])
def test_a_number_may_name_a_run_and_a_place(run: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a recipe, whose ``run.name=7`` makes a folder ``7``."""
    monkeypatch.chdir(run.parent.parent)
    folder = Path("3", RECIPE, "7").absolute()
    folder.parent.mkdir(parents=True)
    run.rename(folder)
    config = load_run(folder, [word])
    assert (config.run.name, config.run.dir) == ("7", str(folder.parent.parent))


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


def test_a_name_that_is_taken_is_gone_on_with_by_a_command_that_can_be_typed(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "my runs", RECIPE, "one & two")
    run.append_metrics({"step": 0})
    with pytest.raises(ConfigError, match="holds a run already") as caught:
        RunFolder.create(tmp_path / "my runs", RECIPE, "one & two")
    command = str(caught.value).partition("go on with it: ")[2]
    assert shlex.split(command) == ["grpo", "train", str(run.path)]


def test_a_configuration_that_was_cut_off_is_refused(run: Path) -> None:
    """With defaults in the place of what is missing, the run would go on as another one."""
    file = run / "config.yaml"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[: lines.index("optim:")]))
    with pytest.raises(ConfigError, match=r"run\.resume: .*config\.yaml has no optim\.name and \d+ more: it was cut off, or is of another"):
        load_run(run)
