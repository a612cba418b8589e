"""Settings that cannot work together, and components that cannot work at all, are named before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.config import ConfigError
from grpo.plan import Plan, plan
from grpo.recipe import load_recipe


def planned(*overrides: str) -> Plan:
    return plan(load_recipe("r1_zero_arithmetic", *overrides))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["algo=grpo", "rollout.completions_per_problem=1"], "rollout.completions_per_problem"),
        (["algo=grpo", "algo.anchor=behavior"], "algo.correction.tis"),
        (["algo=reinforce_pp", "rollout.sampling_rounds=3"], "rollout.sampling_rounds"),
        (["algo=dppo", "algo.ratio.fn=grpo.ratios.sequence"], "algo.ratio"),
        (["algo=grpo", "algo.kl.fn=grpo.kl.k3"], "algo.kl.coef"),
        (["algo=grpo", "algo.kl={fn: grpo.kl.k3, coef: .inf}"], "algo.kl.coef"),
    ],
)
def test_settings_that_do_nothing_together_are_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(*overrides)
    assert caught.value.key == key


OWN = '''
import torch
def best_of(rewards, group_index):
    """1 for the best of a group whose rewards differ."""
    out = torch.zeros_like(rewards)
    for group in group_index.unique():
        mine = rewards[group_index == group]
        out[group_index == group] = ((mine == mine.max()) & (mine.max() != mine.min())).double()
    return out
def unguarded(rewards, group_index):
    return (rewards - rewards.mean()) / rewards.std()
def above_half(rewards, group_index):
    return rewards - 0.5
def fails_on_equals(rewards, group_index):
    assert len(rewards) != 4, "I divide by the spread"
    return rewards
'''


def test_an_advantage_of_ones_own_is_asked_not_known_by_name(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    assert planned("algo=dapo", f"algo.advantage.fn={file}:best_of").config.rollout.sampling_rounds > 1
    with pytest.raises(ConfigError, match=r"sampling_rounds: .* with .*above_half a group whose rewards are equal moves the policy too"):
        planned("algo=dapo", f"algo.advantage.fn={file}:above_half")
    with pytest.raises(ConfigError, match=r"advantage: .*fails_on_equals fails for a group .* I divide by the spread"):
        planned("algo=dapo", f"algo.advantage.fn={file}:fails_on_equals")
    with pytest.raises(ConfigError, match=r"advantage: .*unguarded gives \[nan, nan, nan, nan\] for a group with the rewards \[0.3"):
        planned("algo=dapo", f"algo.advantage.fn={file}:unguarded")
    alone = "rollout.completions_per_problem=1"
    with pytest.raises(ConfigError, match=r"best_of compares the completions of a problem: nothing would be learned"):
        planned("algo=grpo", f"algo.advantage.fn={file}:best_of", alone)
    assert planned("algo=grpo", f"algo.advantage.fn={file}:above_half", alone).config.rollout.completions_per_problem == 1


WRONG = '''
import torch
def five(rewards, group_index):
    return torch.zeros(5)
def bare(log_ratio, advantages, logprobs):
    return log_ratio.exp() * advantages
def weights(mismatch):
    return mismatch.log_ratio.exp()
def local_mean(values, batch):
    return values.mean()
def breaks(values, batch):
    return values.summ()
'''


@pytest.mark.parametrize(
    ("setting", "key", "says"),
    [
        ("algo.advantage.fn={file}:five", "algo.advantage", "one advantage a rollout"),
        ("algo.objective.fn={file}:bare", "algo.objective", "must return grpo.objectives.Objective"),
        ("algo.correction={{x: {{fn: {file}:weights}}}}", "algo.correction.x", "must return grpo.corrections.Correction"),
        ("algo.aggregation.fn={file}:local_mean", "algo.aggregation", "do not add up to the whole"),
        ("algo.aggregation.fn={file}:breaks", "algo.aggregation", "no attribute 'summ'"),
    ],
)
def test_a_component_that_returns_the_wrong_thing_is_named_before_the_run(tmp_path: Path, setting: str, key: str, says: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(WRONG)
    with pytest.raises(ConfigError, match=says) as caught:
        planned(setting.format(file=file))
    assert caught.value.key == key
