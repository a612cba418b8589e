"""A step's learning with a policy that only notes what it is asked: which completions are scored, when the reference follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from grpo import advantages, aggregation, kl, objectives
from grpo.batch import Batch
from grpo.credit import Credit
from grpo.learner import Learner
from grpo.losses import Loss, TokenScores
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


def test_a_group_of_which_nothing_would_be_trained_on_has_no_signal() -> None:
    """Rewards that differ are not enough where all that was cut off is masked; one answer that was not is."""
    cut, in_part = (toy_group("g", [1, 0, 0], [2, 3, 4], truncated=[True, True, last]) for last in (True, False))
    for masks, group, signal in (True, cut, False), (True, in_part, True), (False, cut, True), (True, SOLVED, False):
        assert learner(Notes(), mask_truncated=masks).has_signal(group) is signal


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
