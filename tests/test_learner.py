"""A step's learning with a policy that only notes what it is asked: which completions are scored, when the reference follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo import advantages, aggregation, kl, objectives
from grpo.batch import Batch
from grpo.card import objective_card
from grpo.config import ConfigError
from grpo.credit import Credit
from grpo.learner import Learner
from grpo.losses import Loss, TokenScores
from grpo.plan import plan
from grpo.recipe import load_recipe
from grpo.toy import toy_group


@dataclass
class Notes:
    """A policy whose log-probs are the number of updates it has had."""

    scored: list[int] = field(default_factory=list)  # tokens a pass
    trained: list[Batch] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)  # updates made when a reference was taken

    def score(self, batch: Batch) -> TokenScores:
        self.scored.append(batch.num_tokens)
        values = torch.full((batch.num_tokens,), -1.0 - len(self.trained))
        return TokenScores(logprobs=values, entropy=values)

    def update(self, minibatch: Batch, loss: Loss) -> dict[str, float]:
        self.trained.append(minibatch)
        return {"policy/trained_rollouts": float(len(minibatch.rollouts))}

    def snapshot(self) -> Notes:
        self.snapshots.append(len(self.trained))
        return Notes()

    def state(self) -> Mapping[str, Any]:
        return {}


def learner(policy: Notes, **settings: Any) -> Learner:
    loss = settings.pop("loss", Loss(objective=objectives.policy_gradient, aggregate=aggregation.token_mean))
    credit = settings.pop("credit", Credit(advantage=advantages.center))
    return Learner(policy=policy, credit=credit, loss=loss, make_reference=policy.snapshot, **settings)  # type: ignore[arg-type]


MIXED, SOLVED = toy_group("mixed", [1, 0], [3, 5]), toy_group("solved", [1, 1], [20, 30])
WITH_KL = Loss(objective=objectives.policy_gradient, aggregate=aggregation.token_mean, kl=kl.k3, kl_coef=0.1)


def test_one_update_needs_no_pass_and_several_need_one_over_what_they_train_on() -> None:
    policy = Notes()
    learner(policy).learn([MIXED, SOLVED])
    assert policy.scored == [], "with one update the proximal policy is the policy"
    batch, _ = learner(policy, updates_per_step=2).learn([MIXED, SOLVED])
    assert policy.scored == [8], "the 50 tokens of the solved group have no gradient, so nothing is computed for them"
    assert batch.proximal_logprobs is not None
    assert batch.proximal_logprobs.tolist() == [-2.0] * 8 + [0.0] * 50
    policy = Notes()
    learner(policy, updates_per_step=2, loss=WITH_KL).learn([MIXED, SOLVED])
    assert policy.scored == [58], "a KL term needs every completion"


def test_no_pass_at_all_when_the_ratio_is_to_the_sampler() -> None:
    policy = Notes()
    loss = Loss(objective=objectives.dppo_tv, aggregate=aggregation.token_mean, anchor_is_behavior=True)
    batch, _ = learner(policy, updates_per_step=2, loss=loss).learn([MIXED, SOLVED])
    assert policy.scored == [] and batch.proximal_logprobs is None


@pytest.mark.parametrize(
    ("refresh", "updates", "steps", "expected"),
    [
        (0, 2, 3, [0]),  # never: the model the run started from
        (4, 2, 5, [0, 4, 8]),  # every second step
        (3, 2, 4, [0, 3, 6]),  # also in the middle of a step
        (1, 1, 3, [0, 1, 2, 3]),
    ],
)
def test_the_reference_follows_exactly_every_so_many_updates(refresh: int, updates: int, steps: int, expected: list[int]) -> None:
    policy = Notes()
    learns = learner(policy, updates_per_step=updates, loss=WITH_KL, reference_refresh=refresh)
    for _ in range(steps):
        learns.learn([MIXED, SOLVED])
    assert policy.snapshots == expected


def test_truncated_completions_count_in_their_group_and_are_not_trained_on() -> None:
    policy = Notes()
    learner(policy, mask_truncated=True).learn([toy_group("g", [1, 0, 0], [2, 3, 4], truncated=[False, True, False])])
    (trained,) = policy.trained
    assert trained.advantages is not None
    assert trained.advantages.tolist() == pytest.approx([2 / 3] * 2 + [-1 / 3] * 4)  # the mean is that of all three
    assert trained.totals.tokens == 6 and trained.totals.rollouts == 2


def test_the_reference_scores_what_is_trained_on_unless_the_reward_needs_it_of_all() -> None:
    cut = toy_group("g", [1, 0, 0], [2, 3, 4], truncated=[False, True, False])
    in_loss = learner(Notes(), mask_truncated=True, loss=WITH_KL, credit=Credit(advantage=advantages.center))
    in_reward = learner(Notes(), mask_truncated=True, credit=Credit(advantage=advantages.center, kl=kl.k3, kl_coef=0.1))
    for learns, tokens in (in_loss, 6), (in_reward, 9):
        learns.learn([cut])
        assert isinstance(learns.reference, Notes) and learns.reference.scored == [tokens]


def test_when_nothing_is_left_the_step_is_counted_as_empty() -> None:
    policy = Notes()
    everything_cut = toy_group("g", [1, 0], [2, 3], truncated=[True, True])
    _, metrics = learner(policy, mask_truncated=True).learn([everything_cut])
    assert metrics["policy/empty_updates"] == 1
    assert learner(Notes()).learn([MIXED])[1]["policy/empty_updates"] == 0


def test_a_user_s_partial_is_an_objective_too() -> None:
    policy = Notes()
    loss = Loss(objective=partial(objectives.cispo, clip_high=1.0), aggregate=aggregation.sequence_sum)
    assert learner(policy, loss=loss).learn([MIXED])[1]["policy/trained_rollouts"] == 2


# ---------------------------------------------------------------- the card says only what is true


def card(*overrides: str) -> str:
    return objective_card(plan(load_recipe("r1_zero_arithmetic", *overrides)))


@pytest.mark.parametrize(
    ("overrides", "says", "never"),
    [
        (["algo=grpo"], "ρ is exactly 1, and no bound on it can bind", "act from the second"),
        (["algo=grpo", "optim.updates_per_step=4"], "ρ is 1 in the first of 4 updates; its bounds act from the second on", "exactly 1"),
        (["algo=rloo", "optim.updates_per_step=4"], "ρ is 1 in the first of 4 updates.", "bounds"),
        (["algo=dppo"], "compares with the engine's own log-probs: its bounds act", "π_prox is"),
        (["algo=grpo"], "a loss value near 0 is normal", "how long completions are"),
        (["algo=dapo"], "depends on how long completions are", "near 0 is normal"),
        (["algo=grpo", "algo.mask_truncated=true"], "take no part in the loss", "near 0 is normal"),
        (["algo=grpo", "algo.correction={}"], "Nothing corrects for the difference", "truncated at"),
        (["algo=grpo"], "the engine's log-probs and the trainer's, is truncated at 2", "Nothing corrects"),
        (["algo=dapo"], "Up to 128 completions a step", "Groups of one"),
        (["algo=deepseek_r1", "optim.updates_per_step=16"], "every 400 optimiser updates, that is, every 25 steps", "started from"),
        (["algo=deepseek_r1", "optim.updates_per_step=3"], "a refresh within a step acts from the next step on", "every 133"),
        (["algo=deepseek_v3_2"], "π_ref is the model the run started from", "becomes the policy"),
        (["algo=grpo", "algo.kl={fn: grpo.kl.k3, coef: 0}"], "no reference model is loaded", "KL    ="),
        (["algo=grpo", "algo.combine_rewards=after"], "accuracy with w = 1, format with w = 0.2", "r     ="),
        (["algo=grpo", "rollout.temperature=0.6"], "are those at temperature 0.6", "temperature 1"),
        (["algo=grpo"], "one optimiser update of all 128", "temperature"),
    ],
)
def test_a_sentence_stands_where_it_is_true_and_nowhere_else(overrides: list[str], says: str, never: str) -> None:
    text = card(*overrides)
    assert says in text and never not in text, text


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
        card(*overrides)
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
    assert "Groups without signal are replaced" in card("algo=dapo", f"algo.advantage.fn={file}:best_of")
    with pytest.raises(ConfigError, match=r"sampling_rounds: .* with .*above_half a group whose rewards are equal moves the policy too"):
        card("algo=dapo", f"algo.advantage.fn={file}:above_half")
    with pytest.raises(ConfigError, match=r"advantage: .*fails_on_equals fails for a group .* I divide by the spread"):
        card("algo=dapo", f"algo.advantage.fn={file}:fails_on_equals")
    with pytest.raises(ConfigError, match=r"advantage: .*unguarded gives \[nan, nan, nan, nan\] for a group with the rewards \[0.3"):
        card("algo=dapo", f"algo.advantage.fn={file}:unguarded")
    alone = "rollout.completions_per_problem=1"
    with pytest.raises(ConfigError, match=r"best_of compares the completions of a problem: nothing would be learned"):
        card("algo=grpo", f"algo.advantage.fn={file}:best_of", alone)
    assert "16 completions a step" in card("algo=grpo", f"algo.advantage.fn={file}:above_half", alone)


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
        card(setting.format(file=file))
    assert caught.value.key == key
