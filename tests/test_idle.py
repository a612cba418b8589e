"""No setting that does nothing: it is refused with the reason, unless the command line has just switched off what it belongs to."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from grpo.build import plain
from grpo.config import Config, ConfigError, EngineName
from grpo.idle import IDLE
from grpo.plan import plan
from grpo.recipe import built_in, compose_recipe, groups, load_recipe, load_run, to_yaml

RECIPE = "r1_zero_arithmetic"
VLLM_ONLY = "the {} engine is in the trainer's process"
OWN_LIMITS = "{accuracy: {fn: grpo.rewards.math.accuracy, limits: {cpu_s: 1, memory_mb: 99}}}"
UNREWARDED = ["reward={}", "environment.weights.won=1.0", "eval.metric=won"]

# The key, its value, what leaves it without effect, a part of the reason.
REFUSED = [
    ("rollout.num_engines", "2", ["rollout=hf"], VLLM_ONLY.format("hf")),
    ("rollout.num_engines", "2", ["rollout=scripted"], VLLM_ONLY.format("scripted")),
    ("rollout.cpus_per_engine", "1", ["rollout=hf"], VLLM_ONLY.format("hf")),
    ("rollout.gpus_per_engine", "1", ["rollout=hf"], VLLM_ONLY.format("hf")),
    ("rollout.schedule", "fixed", ["rollout=hf"], VLLM_ONLY.format("hf")),
    ("rollout.transfer", "gloo", ["rollout=hf"], VLLM_ONLY.format("hf")),
    ("rollout.colocate", "true", ["rollout=hf"], VLLM_ONLY.format("hf")),
    ("rollout.hang_timeout_s", "60", ["rollout=scripted"], VLLM_ONLY.format("scripted")),
    ("rollout.start_timeout_s", "60", ["rollout=hf"], VLLM_ONLY.format("hf")),
    ("eval.temperature", "0.6", ["rollout=scripted"], "samples nothing"),
    ("eval.top_p", "0.9", ["rollout=scripted"], "samples nothing"),
    ("eval.min_p", "0.1", ["rollout=scripted"], "samples nothing"),
    ("eval.every", "5", ["eval.problems=0"], "there is no evaluation with eval.problems=0"),
    ("eval.samples", "4", ["eval.problems=0"], "there is no evaluation"),
    ("eval.temperature", "0.6", ["eval.problems=0"], "there is no evaluation"),
    ("eval.top_p", "0.9", ["eval.problems=0"], "there is no evaluation"),
    ("eval.min_p", "0.1", ["eval.problems=0"], "there is no evaluation"),
    ("eval.top_p", "0.9", ["eval.temperature=0"], "with eval.temperature=0.0 the likeliest token is taken"),
    ("eval.min_p", "0.1", ["eval.temperature=0"], "the likeliest token is taken"),
    ("data.prompt_key", "prompt", ["data.template='{question}'"], "data.template names the columns itself"),
    ("algo.combine_rewards", "after", ["reward=match"], "there is one score, of weight 1"),
    ("algo.combine_rewards", "after", ["reward.format.weight=0"], "there is one score, of weight 1"),
    ("algo.kl_in", "reward", ["algo.kl={}"], "there is no KL term"),
    ("algo.kl_in", "reward", ["algo=deepseek_r1", "algo.kl.coef=0"], "there is no KL term"),
    ("algo.reference_refresh", "5", ["algo=grpo"], "there is no KL term, and no reference"),
    ("optim.betas", "[0.9,0.95]", ["optim.name=sgd"], "sgd has none"),
    ("optim.eps", "1e-6", ["optim.name=sgd"], "sgd has none"),
    ("optim.min_lr_ratio", "0.5", ["optim.schedule=constant"], "a constant learning rate does not decay"),
    ("trainer.shard_gradients", "true", ["trainer.ranks=1"], "one rank has all of every gradient"),
    ("logger.sample_every", "1", ["logger=quiet"], "nothing is shown with logger.console=false"),
    ("logger.wandb.project", "mine", ["logger=quiet"], "nothing goes to W&B with logger.wandb.mode=disabled"),
    ("logger.wandb.entity", "us", ["logger.wandb.mode=disabled"], "nothing goes to W&B"),
    ("logger.wandb.tags", "[first]", ["logger.wandb.mode=disabled"], "nothing goes to W&B"),
    ("scoring.cpu_s", "9", [f"reward={OWN_LIMITS}"], "every reward part has a limit of its own"),
    ("scoring.memory_mb", "512", [f"reward={OWN_LIMITS}"], "every reward part has a limit of its own"),
    ("scoring.workers", "2", UNREWARDED, "without a reward part there is no reward process"),
    ("scoring.cpu_s", "9", UNREWARDED, "without a reward part"),
    ("scoring.memory_mb", "512", UNREWARDED, "without a reward part"),
    ("model.trust_remote_code", "true", ["model=smollm2_135m_instruct"], "brings no code"),
    ("environment.weights.won", "0.5", ["environment=single_turn"], "grpo.rollouts.environments.SingleTurn gives no score of this name"),
    ("environment.weights.won", "0.5", ["environment=python_tool", "rollout.stop=['</python>']"], "PythonTool gives no score of this name"),
]


def refusal(key: str, value: str, off: Sequence[str]) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        plan(load_recipe(RECIPE, *off, f"{key}={value}"))
    return error.value


@pytest.mark.parametrize(("key", "value", "off", "reason"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_value_that_does_nothing_is_refused_with_the_reason(key: str, value: str, off: Sequence[str], reason: str) -> None:
    error = refusal(key, value, off)
    assert error.key == key
    assert reason in str(error) and "\n  → " in str(error)


def test_every_row_of_the_table_is_tried() -> None:
    said = [(key, str(refusal(key, value, off))) for key, value, off, _ in REFUSED]
    for row in IDLE:
        pattern = ".*".join(map(re.escape, row.why.split("{}")))
        for key in row.keys:
            assert any(key == name and re.search(pattern, text) for name, text in said), f"{row.switch} → {key}"


# ---------------------------------------------------------------- what the command line switches off


@pytest.fixture
def for_vllm(tmp_path: Path) -> str:
    """A recipe of one's own with settings of the pool, of W&B, of a KL term and of evaluations in its own file."""
    groups_chosen = "{algo: grpo}, {model: tiny}, {data: sums}, {reward: r1_rules}, {rollout: vllm}, {logger: default}"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"defaults: [schema, {groups_chosen}, _self_]\n"
        "rollout: {num_engines: 2, cpus_per_engine: 1, schedule: fixed, hang_timeout_s: 60}\n"
        "algo: {kl: {fn: grpo.kl.k3, coef: 0.01}, kl_in: reward, reference_refresh: 3, combine_rewards: after}\n"
        "optim: {schedule: cosine, min_lr_ratio: 0.1, betas: [0.9, 0.95]}\n"
        "logger: {sample_every: 1, wandb: {project: mine, tags: [first]}}\n"
        "eval: {every: 3, samples: 4, temperature: 0.6, top_p: 0.95}\n"
    )
    return str(recipe)


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (["rollout=hf"], {"num_engines": 1, "cpus_per_engine": 0, "schedule": "free", "hang_timeout_s": 300.0}),
        (["rollout.engine=hf"], {"num_engines": 1, "cpus_per_engine": 0, "schedule": "free", "hang_timeout_s": 300.0}),
        (["eval.problems=0"], {"every": 10, "samples": 1, "temperature": 1.0, "top_p": 1.0}),
        (["eval.temperature=0"], {"top_p": 1.0}),
        (["reward=match"], {"combine_rewards": "before"}),
        (["algo.kl={}"], {"kl_in": "loss", "reference_refresh": 0}),
        (["algo.kl.coef=0"], {"kl_in": "loss", "reference_refresh": 0}),
        (["optim.name=sgd"], {"betas": [0.9, 0.999]}),
        (["optim.schedule=constant"], {"min_lr_ratio": 0.0}),
        (["logger=quiet"], {"sample_every": 5, "project": "grpo", "tags": []}),
    ],
    ids=" ".join,
)
def test_it_takes_along_what_the_recipe_had_set_for_it(for_vllm: str, words: Sequence[str], gone: dict[str, object]) -> None:
    before, now = leaves(load_recipe(for_vllm)), leaves(load_recipe(for_vllm, *words))
    changed = {key.rpartition(".")[2]: now[key] for key in before if now.get(key) != before[key] and not switched(key, words)}
    assert changed == gone


def test_a_row_that_looks_at_two_keys_is_switched_by_either(for_vllm: str, tmp_path: Path) -> None:
    played = tmp_path / "played.yaml"
    text = Path(for_vllm).read_text().replace("{reward: r1_rules}", "{reward: match}") + "environment: {weights: {won: 0.5}}\n"
    played.write_text(text)
    assert load_recipe(str(played)).algo.combine_rewards == "after"
    assert load_recipe(str(played), "environment.weights.won=0").algo.combine_rewards == "before"


def leaves(config: Config) -> dict[str, object]:
    found: dict[str, object] = {}
    for section, nodes in plain(config).items():
        for name, value in nodes.items():
            found |= {f"{section}.{name}.{inner}": v for inner, v in value.items()} if name == "wandb" else {f"{section}.{name}": value}
    return found


def switched(key: str, words: Sequence[str]) -> bool:
    """Whether the words name the key themselves, or are a group's choice that does."""
    named = {word.partition("=")[0] for word in words}
    by_groups = {"rollout.engine", "logger.console", "logger.wandb.mode"} if named & set(groups()) else set()
    return key.startswith("reward.") or any(key == name or name.startswith(f"{key}.") for name in named | by_groups)


def test_but_not_what_the_command_line_sets_as_well(for_vllm: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.num_engines: is 3, which does nothing"):
        load_recipe(for_vllm, "rollout=hf", "rollout.num_engines=3")


def test_nor_what_a_recipe_contradicts_itself_in(for_vllm: str, tmp_path: Path) -> None:
    contrary = tmp_path / "contrary.yaml"
    contrary.write_text(Path(for_vllm).read_text().replace("{rollout: vllm}", "{rollout: hf}"))
    said = r"rollout\.num_engines: is 2, which does nothing: the hf engine .*\n  → leave it at 1, or choose rollout=vllm"
    with pytest.raises(ConfigError, match=said):
        load_recipe(str(contrary))


def test_the_printed_recipe_is_the_one_that_runs(for_vllm: str, tmp_path: Path) -> None:
    words = ["rollout=hf", "logger=quiet", "eval.problems=0"]
    printed = tmp_path / "printed.yaml"
    printed.write_text("defaults: [schema, _self_]\n" + to_yaml(compose_recipe(for_vllm, words)))
    config, again = load_recipe(for_vllm, *words), load_recipe(str(printed))
    again.run.recipe = config.run.recipe
    assert again == config and config.rollout.engine is EngineName.hf


def test_a_run_that_exists_can_be_given_another_engine_or_reward(for_vllm: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(plain(load_recipe(for_vllm))))
    assert load_run(run).rollout.num_engines == 2
    assert load_run(run, ["rollout.engine=hf"]).rollout.num_engines == 1
    rescored = load_run(run, reward="match")
    assert rescored.algo.combine_rewards == "before" and rescored.eval.problems == 0 and rescored.eval.samples == 1
    with pytest.raises(ConfigError, match=r"rollout\.cpus_per_engine: is 2, which does nothing"):
        load_run(run, ["rollout.engine=hf", "rollout.cpus_per_engine=2"])


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize("recipe", built_in())
def test_no_preset_leaves_a_recipe_with_a_setting_that_does_nothing(recipe: str) -> None:
    for group in ("algo", "rollout", "logger"):  # the groups whose choices switch something off
        for choice in groups()[group]:
            assert load_recipe(recipe, f"{group}={choice}").run.recipe == recipe


def test_an_error_of_a_setting_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("optim.lr", "is 0", "raise it")))
    assert (error.key, str(error)) == ("optim.lr", "optim.lr: is 0\n  → raise it")
