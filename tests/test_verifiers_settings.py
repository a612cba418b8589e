"""Settings of ``environment=verifiers``: one preset fits data and environment together, and what cannot work is named before the run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from grpo.config import ConfigError
from grpo.data_verifiers import verifiers_tasks
from grpo.plan import plan_without_model
from grpo.recipe import load_recipe

from .played_episodes import needs_verifiers

ANY = ("r1_zero_arithmetic", "environment=verifiers", "data=verifiers", "data.problems.taskset=x")


@needs_verifiers
def test_one_preset_makes_data_and_environment_fit(toy_tasksets: Path) -> None:
    settings = ["data=verifiers", "data.problems.size=20", "data.problems.heldout=5", "reward={}"]
    config = load_recipe("r1_zero_arithmetic", *settings, "data.problems.taskset=toy-own", "environment=verifiers")
    made = plan_without_model(config)
    assert dict(made.reward_weights) == {"verifiers": 1.0} and config.eval.metric == "verifiers"
    assert len(made.problems.load()("train", seed=0)) == 20
    with pytest.raises(ConfigError, match=r"it has tool servers\n  → let verifiers run them: environment=verifiers reward=\{\}"):
        verifiers_tasks("train", taskset="toy-own")
    with pytest.raises(ConfigError, match="by the conversation alone: it has an Env of its own"):
        verifiers_tasks("train", taskset="toy-guess")
    with pytest.raises(ConfigError, match=r"several agents act in a rollout of 'toy-two' \(pro, contra\)"):
        verifiers_tasks("train", taskset="toy-two", in_environment=True)


@needs_verifiers
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_turns=0", "max_turns is 0"),
        ("timeout_s=0", "timeout_s is 0"),
        ("agent.harness.id=nope", "harness 'nope' not found"),
        ("agent.runtme.type=docker", "runtme"),
    ],
)
def test_wrong_settings_are_found_before_the_run(setting: str, message: str) -> None:
    config = load_recipe(*ANY, f"environment.{setting}")
    with pytest.raises(ConfigError, match=message):
        plan_without_model(config)


@needs_verifiers
def test_plain_text_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"data\.chat: is false, and .*VerifiersTask speaks in roles"):
        plan_without_model(load_recipe(*ANY, "data.chat=false"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_recipe(*ANY)
    with pytest.raises(ConfigError, match=r"needs the package verifiers: pip install 'grpo-toolkit\[verifiers\]'"):
        plan_without_model(config)
