"""The command line: every mistake is one message that names the key and a remedy; and what it does when nothing is wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from grpo.anchor import anchor_paths
from grpo.build import train
from grpo.cli import main
from grpo.config import Config, ConfigError, keys
from grpo.plan import plan
from grpo.recipe import built_in, compose_recipe, groups, load_recipe, load_run, locate
from grpo.sweep import sweep

# The real command, but its last line of output says whether torch was loaded on the way.
PROGRAM = "import sys; from grpo.cli import main; code = main(); print(f'torch={\"torch\" in sys.modules}'); sys.exit(code)"
# Were a mistake not found, this would end at once all the same: no steps, no model worth its name, no engine.
HARMLESS = ["run.steps=0", "eval.problems=4", "model=tiny", "rollout=scripted", "logger=quiet"]
FILES = {
    "my_rewards.py": "def takes_one(completion):\n    return 1.0\n\ndef scaled(completion, problem, scale=1.0):\n    return scale\n",
    "broken.py": "import no_such_module\n\ndef f(completion, problem):\n    return 1.0\n",
    "r1_zero_arithmetic.yaml": "defaults: [schema, _self_]\n",
    "short.yml": "defaults: [schema, _self_]\n",
    "no_schema.yaml": "run: {steps: 1}\n",
    "no_reward_group.yaml": "defaults: [schema, {algo: grpo}, {model: tiny}, {data: sums}, _self_]\n",
    "typo.yaml": "defaults: [schema, {algo: grpo}, {model: tiny}, {data: sums}, {reward: r1_rules}, _self_]\nrun: {stepps: 1}\n",
    "bad_choice.yaml": "defaults: [schema, {algo: drgrpo}, _self_]\n",
    "type.yaml": "defaults: [schema, {algo: grpo}, {model: tiny}, {data: sums}, {reward: r1_rules}, _self_]\nrun: {steps: many}\n",
    "not_yaml.yaml": "defaults: [schema\nrun: {{",
    "train.jsonl": '{"question": "1 + 1", "answer": "2"}\n{"question": "2 + 2", "answer": "4"}\n',
    "test.jsonl": '{"question": "2 + 2", "answer": "4"}\n',
    "damaged.jsonl": '{"question": "1 + 1", "answer": "2"}\n{"question": \n',
}
JSONL = ["data.problems.fn=grpo.data.jsonl", "~data.problems.terms", "~data.problems.low", "~data.problems.high", "data.template=''"]
JSONL += ["rollout.problems_per_step=1"]
OVERLAP = ["data.problems.train=train.jsonl", "data.problems.heldout=test.jsonl"]


def grpo(*words: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *words], cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    return folder


BUILT_IN = "r1_zero_arithmetic"


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        pytest.param([BUILT_IN, "optim.learning_rate=1e-5"], "optim.learning_rate", "no such key", id="unknown key"),
        pytest.param([BUILT_IN, "optim.lrr=1e-5"], "optim.lrr", "did you mean 'optim.lr'?", id="typo in a key"),
        pytest.param([BUILT_IN, "steps=5"], "steps", "did you mean 'run.steps'?", id="key without its section"),
        pytest.param([BUILT_IN, "algo=drgrpo"], "algo", "did you mean 'dr_grpo'?", id="unknown choice"),
        pytest.param(["short.yml"], "recipe", "rename it to short.yaml", id="yml"),
        pytest.param([BUILT_IN, "--multirun", "--cfg", "job"], "--multirun", "leave out --cfg", id="multirun with cfg"),
        pytest.param([BUILT_IN, "run.steps=many"], "run.steps", "many", id="wrong type"),
        pytest.param([BUILT_IN, "trainer.layout=packd"], "trainer.layout", "shared_prompt", id="wrong value of a list"),
        pytest.param([BUILT_IN, "run.steps=-1"], "run.steps", "is -1", id="out of range"),
        pytest.param([BUILT_IN, "rollout=scripted", "rollout.top_p=0.9"], "rollout.top_p", "set it to 1", id="no kept sets"),
        pytest.param([BUILT_IN, "optim=3"], "optim", "is a section", id="section"),
        pytest.param([BUILT_IN, "hello"], "command line", "key=value", id="not an override"),
        pytest.param([BUILT_IN, "reward={fn: f}"], "reward.fn", "write reward={NAME: {fn: …}}", id="part without a name"),
        pytest.param([BUILT_IN, "model=hub"], "model.path", "has no value", id="missing value"),
        pytest.param([BUILT_IN, "eval.metric=nothing"], "eval.metric", "accuracy, format", id="metric that is no reward"),
        pytest.param(["r1_zero_aritmetic"], "recipe", "did you mean 'r1_zero_arithmetic'?", id="typo in the recipe"),
        pytest.param(["nowhere.yaml"], "recipe", "does not exist", id="missing YAML"),
        pytest.param(["./no_schema"], "recipe", "did you mean './no_schema.yaml'?", id="YAML without its ending"),
        pytest.param(["r1_zero_arithmetic.yaml"], "recipe", "rename your file", id="name of a built-in"),
        pytest.param(["no_schema.yaml"], "defaults", "put `- schema` first", id="no schema"),
        pytest.param(["no_reward_group.yaml", "reward=r1_rules"], "reward", "add `- reward: CHOICE`", id="group the recipe lacks"),
        pytest.param(["typo.yaml"], "run.stepps", "did you mean 'run.steps'?", id="typo in a YAML"),
        pytest.param(["type.yaml"], "run.steps", "'many'", id="wrong type in a YAML"),
        pytest.param(["bad_choice.yaml"], "algo", "dr_grpo, grpo", id="unknown choice in a YAML"),
        pytest.param(["not_yaml.yaml"], "recipe", "not_yaml.yaml", id="not YAML"),
    ],
)
def test_a_mistake_in_the_configuration(folder: Path, words: Sequence[str], key: str, says: str) -> None:
    result = grpo("train", *words, cwd=folder)
    check(result.returncode, result.stderr, key, says)
    assert result.stdout == "torch=False\n", "found without loading torch: in a second or two"


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        pytest.param(["model.path=./nowhere"], "model.path", "neither a folder", id="missing model folder"),
        pytest.param(["model.path=./empty"], "model.path", "no config.json", id="folder without a model"),
        pytest.param(["reward.x.fn=./nowhere.py:f"], "reward.x.fn", "does not exist", id="missing reward file"),
        pytest.param(["reward.x.fn=./my_rewards.py:nothing"], "reward.x.fn", "defines no 'nothing'", id="missing reward function"),
        pytest.param(["reward.x.fn=./my_rewards.py:takes_one"], "reward.x.fn", "with 2 arguments", id="wrong signature"),
        pytest.param(["reward.x.fn=./broken.py:f"], "reward.x.fn", "no_such_module", id="file that does not import"),
        pytest.param(
            ["reward.x.fn=./my_rewards.py:scaled", "reward.x.scal=2"], "reward.x.scal", "did you mean 'scale'?", id="unknown argument"
        ),
        pytest.param(["reward.x.fn=grpo.rewards.math.acuracy"], "reward.x.fn", "acuracy", id="missing import path"),
        pytest.param(["reward.x.weight=2"], "reward.x.fn", "is missing", id="reward without a function"),
        pytest.param(["algo.aggregation.length=5"], "algo.aggregation.length", "takes no argument", id="argument of an algorithm"),
        pytest.param(["data.template='{nope}'"], "data.template", "'nope'", id="unknown column in the template"),
        pytest.param(["data.template='{question.x}'"], "data.template", "question, answer", id="attribute in the template"),
        pytest.param(["data.template=''", "data.prompt_key=nope"], "data.prompt_key", "question, answer", id="missing prompt column"),
        pytest.param(["rollout.problems_per_step=9000"], "rollout.problems_per_step", "lower it", id="more than there are"),
        pytest.param([*JSONL, *OVERLAP], "data.problems", "1 of 1 held-out problems are also", id="held-out overlap"),
        pytest.param([*JSONL, *OVERLAP, "data.problems.heldout=nowhere.jsonl"], "data.problems.heldout", "does not exist", id="no data"),
        pytest.param([*JSONL, *OVERLAP, "data.problems.train=damaged.jsonl"], "data.problems.train", "line 2", id="damaged data"),
    ],
)
def test_a_mistake_in_what_the_configuration_names(
    folder: Path, words: Sequence[str], key: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has torch loaded already: the command needs it here, and then takes some seconds."""
    monkeypatch.chdir(folder)
    check(main(["train", BUILT_IN, *HARMLESS, *words]), capsys.readouterr().err, key, says)
    assert not (folder / "runs").exists(), "found before anything was made"


def check(status: int, errors: str, key: str, says: str) -> None:
    assert status == 1, errors
    assert "Traceback" not in errors
    message = errors[errors.index(f"grpo: {key}: ") :]
    assert says in message
    assert "\n  → " in message, "a remedy"


@pytest.mark.slow
def test_a_mistake_in_a_reward_leaves_no_traceback_in_a_real_command(folder: Path) -> None:
    result = grpo("train", BUILT_IN, *HARMLESS, "reward.x.fn=./my_rewards.py:takes_one", cwd=folder)
    check(result.returncode, result.stderr, "reward.x.fn", "with 2 arguments")


@pytest.mark.parametrize("words", [["eval", "nowhere"], ["eval", "empty"]])
def test_eval_of_no_model(folder: Path, words: Sequence[str]) -> None:
    result = grpo(*words, cwd=folder)
    check(result.returncode, result.stderr, "eval", "neither a run folder nor a model folder")


# ---------------------------------------------------------------- when nothing is wrong


def test_cfg_job_prints_yaml_that_is_the_same_configuration(folder: Path) -> None:
    words = ["optim.lr=1e-5", "algo=dr_grpo", "reward.x.fn=./my_rewards.py:scaled", "reward.x.scale=3"]
    result = grpo("train", BUILT_IN, *words, "--cfg", "job", cwd=folder)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.removesuffix("torch=False\n")
    assert printed != result.stdout
    loaded = yaml.safe_load(printed)
    assert loaded["optim"]["lr"] == 1e-5 and loaded["reward"]["x"] == {"fn": "./my_rewards.py:scaled", "scale": 3}
    assert loaded["algo"]["aggregation"]["length"] == "${rollout.max_new_tokens}", "as it was written"
    (folder / "printed.yaml").write_text("defaults: [schema, _self_]\n" + printed)
    assert load_recipe(str(folder / "printed.yaml")) == load_recipe(BUILT_IN, *words)


def test_a_users_recipe_from_outside_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text(
        "defaults: [schema, {algo: rloo}, {model: tiny}, {data: sums}, {reward: r1_rules}, {rollout: hf}, {logger: quiet}, _self_]\n"
        "run: {steps: 7}\ndata: {problems: {terms: 2, heldout: 20}}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = load_recipe("sub/mine.yaml", "optim.lr=0.5")
    assert (config.run.recipe, config.run.steps, config.optim.lr) == ("mine", 7, 0.5)
    assert config.algo.advantage["fn"] == "grpo.advantages.leave_one_out"
    assert config.data.problems.items() >= {"fn": "grpo.data.sums", "terms": 2, "heldout": 20}.items()
    plan(config)


def test_interpolations_are_resolved() -> None:
    config = load_recipe(BUILT_IN, "algo=dr_grpo", "rollout.max_new_tokens=77")
    assert config.algo.aggregation["length"] == 77


@pytest.mark.slow
def test_multirun_makes_a_folder_a_job(folder: Path, tmp_path: Path, tiny_model: str) -> None:
    words = [f"model.path={tiny_model}", "run.steps=1", "rollout.problems_per_step=1", "rollout.completions_per_problem=2"]
    result = grpo("train", BUILT_IN, *HARMLESS, *words, "--multirun", "run.seed=3,4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = [f for f in sorted((tmp_path / "runs" / BUILT_IN).iterdir()) if f.is_dir()]
    assert [yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"] for run in runs] == [3, 4]
    for run in runs:
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 1]


def test_multirun_checks_every_value_before_the_first_job(folder: Path) -> None:
    result = grpo("train", BUILT_IN, *HARMLESS, "--multirun", "optim.lr=1e-5,-1", cwd=folder)
    check(result.returncode, result.stderr, "optim.lr", "is -1.0")
    assert not (folder / "runs").exists()


CLIPPED = ["algo=grpo", "algo.objective.fn=grpo.objectives.sapo"]  # the preset's clip bounds are no arguments of SAPO


TIS = "{tis: {fn: grpo.corrections.truncated_importance}}"
SAPO, PLAIN = "grpo.objectives.sapo", "grpo.objectives.policy_gradient"
ONE_PART = "reward={a: {fn: ./my_rewards.py:scaled}}"


def test_jobs_of_multirun_can_warn() -> None:
    """Hydra's ``disabled`` logging switches off every logger there is."""
    log, heard = logging.getLogger("grpo.rollouts.fleet"), list[bool]()
    sweep(BUILT_IN, ["run.seed=0,1"], lambda config: heard.append(log.isEnabledFor(logging.WARNING)))
    assert heard == [True, True] and log.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    ("words", "name", "swept", "alone"),
    [
        pytest.param(CLIPPED, "run.seed", "0,1", ["0", "1"], id="a new fn"),
        pytest.param(["algo.correction={}", ONE_PART, "eval.metric=a"], "run.seed", "0,1", ["0", "1"], id="{…}"),
        pytest.param(["~algo.correction.tis"], "optim.lr", "1e-5,1e-6", ["1e-5", "1e-6"], id="left out"),
        pytest.param([], "algo.objective.fn", f"{SAPO},{PLAIN}", [SAPO, PLAIN], id="a sweep of fn"),
        pytest.param([], "algo.correction", "{}," + TIS, ["{}", TIS], id="a sweep of {…}"),
        pytest.param([], "algo", "glob(r*)", ["reinforce_pp", "rloo"], id="glob"),
    ],
)
def test_a_job_of_multirun_is_what_it_would_be_alone(
    folder: Path, words: list[str], name: str, swept: str, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    jobs: list[Config] = []
    sweep(BUILT_IN, [*words, f"{name}={swept}"], jobs.append)
    assert len(jobs) == len(alone) == 2
    assert len({job.run.name for job in jobs}) == 2
    for job, value in zip(jobs, alone, strict=True):
        job.run.name = ""
        assert job == load_recipe(BUILT_IN, *words, f"{name}={value}")
        plan(job)


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        pytest.param(["run.seed=0,1", "run.name=x"], "run.name", "would be 'x' for several jobs", id="one name for two jobs"),
        pytest.param(["run.seed=0,1", "optim.lr=1,2", "run.name='s${run.seed}'"], "run.name", "for several jobs", id="a name too vague"),
        pytest.param(["optim.lr=interval(1e-6,1e-4)"], "--multirun", "BasicSweeper does not support", id="not of this sweeper"),
        pytest.param(["algo=glob(x*)"], "algo", "matches nothing", id="glob of nothing"),
        pytest.param(["reward=match,{a: {fn: ./my_rewards.py:scaled}}", "eval.problems=0"], "reward", "names, or null, beside", id="mixed"),
        pytest.param(["run.seed=0,1", "reward.x.fn=./nowhere.py:f"], "reward.x.fn", "does not exist", id="found by a job"),
    ],
)
def test_a_mistake_in_a_sweep(
    tmp_path: Path, words: list[str], key: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    check(main(["train", BUILT_IN, *HARMLESS, "--multirun", *words]), capsys.readouterr().err, key, says)


def test_jobs_may_have_names_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jobs: list[Config] = []
    sweep(BUILT_IN, ["run.seed=0,1", "run.name='s${run.seed}'"], jobs.append)
    assert [job.run.name for job in jobs] == ["s0", "s1"]
    assert list(tmp_path.iterdir()) == [], "Hydra's own notes are gone"


def test_hydra_writes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep(BUILT_IN, ["run.seed=0,1", "hydra.sweep.dir=notes"], lambda _: None)
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]


# ---------------------------------------------------------------- paths


def test_a_run_can_be_gone_on_with_from_anywhere(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every relative path of a user's file is absolute in the configuration that the run keeps; what only looks like one is not touched."""
    here = tmp_path / "a folder"
    (here / "org" / "name").mkdir(parents=True)  # of the name of a model of the hub
    (here / "train").mkdir()  # of the name of a split
    (here / "m").symlink_to(tiny_model)
    for name in ("my_rewards.py", "train.jsonl", "test.jsonl"):
        (here / name).write_text(FILES[name])
    (here / "my_data.py").write_text(
        "def nothing(row):\n    return None\n\n"
        "def rows(split, *, seed, files, adapter, source, name, note):\n    return [{'question': split, 'answer': '1'}]\n"
    )
    (here / "answers.py").write_text("def answer(prompt, index, seed):\n    return '2'\n")
    monkeypatch.chdir(here)
    words = ["model.path=./m", "reward={x: {fn: ./my_rewards.py:scaled}}", "eval.metric=x"]
    words.append("rollout.engine_args.answer=./answers.py:answer")
    rows = "data.problems={fn: ./my_data.py:rows, files: [train.jsonl, ./test.jsonl], adapter: {fn: my_data.py:nothing}, "
    rows += "source: train, name: org/name, note: a.b}"
    config = load_recipe(BUILT_IN, *HARMLESS, *words, rows)
    plan(config)
    anchor_paths(config)
    assert config.model.path == str(Path(tiny_model).resolve())
    assert config.rollout.engine_args == {"answer": f"{here}/answers.py:answer"}
    assert config.reward == {"x": {"fn": f"{here}/my_rewards.py:scaled"}}
    assert config.data.problems == {
        "fn": f"{here}/my_data.py:rows",
        "files": [f"{here}/train.jsonl", f"{here}/test.jsonl"],
        "adapter": {"fn": f"{here}/my_data.py:nothing"},
        "source": "train",
        "name": "org/name",
        "note": "a.b",
    }
    assert config.algo == load_recipe(BUILT_IN, *HARMLESS, *words, rows).algo, "import paths stay"
    monkeypatch.chdir(tmp_path)
    plan(config)


@pytest.mark.parametrize("path", ["org/name", "name", "make:grpo.tiny.digits_model"])
def test_a_model_that_is_no_folder_keeps_its_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name").write_text("a file of the user's")
    config = load_recipe(BUILT_IN, *HARMLESS, f"model.path={path}")
    plan(config)
    anchor_paths(config)
    assert config.model.path == path


@pytest.mark.slow
def test_the_commands_on_a_run_from_another_folder(tmp_path: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (tmp_path / "there").mkdir()
    here.mkdir()
    (here / "m").symlink_to(tiny_model)
    (here / "train.jsonl").write_text(FILES["train.jsonl"])
    (here / "held.jsonl").write_text('{"question": "3 + 3", "answer": "6"}\n')
    (here / "answers.py").write_text("def answer(prompt, index, seed):\n    return '2'\n")
    (here / "my_rewards.py").write_text(FILES["my_rewards.py"])
    (here / "mine.yaml").write_text(
        "defaults: [schema, {algo: grpo}, {model: hub}, {data: jsonl}, {rollout: scripted}, {logger: quiet}, _self_]\n"
        "run: {steps: 1, name: first}\nmodel: {path: ./m, precision: fp32}\n"
        "data: {problems: {train: train.jsonl, heldout: ./held.jsonl}, template: '{question} ='}\n"
        "reward: {x: {fn: './my_rewards.py:scaled'}}\neval: {problems: 1, metric: x}\n"
        "rollout: {problems_per_step: 2, completions_per_problem: 2, max_new_tokens: 4, engine_args: {answer: './answers.py:answer'}}\n"
    )
    monkeypatch.chdir(here)
    assert main(["train", "mine.yaml"]) == 0
    monkeypatch.chdir(tmp_path / "there")
    run = "../here/runs/mine/first"
    assert main(["eval", run]) == 0
    assert main(["replay", run, "--reward", "../here/my_rewards.py:scaled"]) == 0
    assert main(["train", run, "run.steps=2"]) == 0
    monkeypatch.chdir(here / "runs" / "mine")
    assert main(["train", "first", "run.steps=3"]) == 0
    assert [file.name for file in Path().iterdir()] == ["first"]
    assert [json.loads(line)["step"] for line in Path("first/metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]


def test_recipes_lists_and_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*built_in(), *groups(), "dr_grpo", "r1_rules"])
    assert main(["recipes", "show", BUILT_IN]) == 0
    shown = capsys.readouterr().out
    for key, (_, meaning) in keys().items():
        assert f"{key} = " in shown and meaning in shown and meaning, key


# ---------------------------------------------------------------- every recipe file

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@pytest.mark.parametrize("name", sorted(file.stem for file in RECIPES.glob("*.yaml")))
def test_every_recipe_can_be_planned(name: str) -> None:
    assert locate(name) == (None, name)
    assert len(built_in()[name]) > 20, "its first line is a comment that says what it is"
    config = load_recipe(name)
    assert isinstance(config, Config) and config.run.recipe == name
    checked = plan(config)
    assert checked.loss().aggregate is not None and checked.problems.load() is not None
    assert all(part.ref.load() is not None for part in checked.rewards)


@pytest.mark.parametrize("file", sorted(str(file.relative_to(RECIPES)) for file in RECIPES.glob("*/*.yaml")))
def test_every_choice_of_a_group_fits_the_schema(file: str) -> None:
    group, _, choice = file.removesuffix(".yaml").partition("/")
    assert choice in groups()[group]
    assert (RECIPES / file).read_text().startswith("# "), "its first line says what it is"
    composed = compose_recipe(BUILT_IN, [f"{group}={choice}", "run.steps=1"])
    assert composed.run.steps == 1
    if group == "algo":
        plan(load_recipe(BUILT_IN, f"algo={choice}"))


def test_a_component_given_on_the_command_line_starts_from_nothing() -> None:
    """The preset's clip bounds are no arguments of policy_gradient; `{}` leaves a term out."""
    config = load_recipe(
        BUILT_IN, "algo.objective.fn=grpo.objectives.policy_gradient", "algo.correction={}", "algo.advantage={fn: grpo.advantages.center}"
    )
    assert config.algo.objective == {"fn": "grpo.objectives.policy_gradient"}
    assert config.algo.correction == {}
    assert config.algo.advantage == {"fn": "grpo.advantages.center"}
    assert plan(config).corrections == {}
    config = load_recipe(BUILT_IN, "algo.objective.clip_high=0.28")  # without a new fn, the preset's other arguments stay
    assert config.algo.objective == {"fn": "grpo.objectives.clipped_surrogate", "clip_low": 0.2, "clip_high": 0.28}


def test_a_run_whose_configuration_is_damaged_is_refused_in_words(tmp_path: Path) -> None:
    run = tmp_path / "tiny_digits" / "one"
    run.mkdir(parents=True)
    words = ["rollout=scripted", "logger=quiet", f"run.dir={tmp_path}", "run.name=one", "run.resume=true", "run.exact=false"]
    for damaged in "run: [", "[]", "run: 3", "":
        (run / "config.yaml").write_text(damaged)
        with pytest.raises(ConfigError, match=r"run\.resume: .*config\.yaml is not the configuration of a run"):
            train(load_recipe("tiny_digits", *words))
    (run / "config.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match=r"run\.resume: .*config\.yaml is not the configuration of a run"):
        load_run(run)
