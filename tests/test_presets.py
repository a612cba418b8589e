"""Every preset, as its YAML is composed, against the paper's formula as plain loops (tests/paper_losses.py): loss and gradient, float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.batch import Batch, collate
from grpo.config import ConfigError
from grpo.credit import Credit
from grpo.losses import Loss, TokenScores
from grpo.plan import plan
from grpo.recipe import groups, load_recipe
from grpo.toy import toy_group

from . import paper_losses as papers

PRESETS = groups()["algo"]
BOUND = {"rtol": 1e-9, "atol": 1e-14}
completion_lengths = st.lists(st.lists(st.integers(1, papers.MAX_TOKENS), min_size=1, max_size=4), min_size=1, max_size=4)


@functools.cache
def preset(name: str) -> tuple[Credit, Loss]:
    made = plan(load_recipe("r1_zero_arithmetic", f"algo={name}", f"rollout.max_new_tokens={papers.MAX_TOKENS}"))
    return made.credit(), made.loss()


@dataclass(frozen=True)
class Case:
    """The same random numbers, once as our batch and once as the papers' loops take them."""

    batch: Batch
    policy: Tensor

    def ours(self, name: str) -> tuple[Tensor, Tensor]:
        credit, loss = preset(name)
        batch = replace(self.batch, advantages=credit(self.batch))
        leaf = self.policy.clone().requires_grad_()
        value = loss(TokenScores(logprobs=leaf, entropy=torch.zeros_like(leaf)), batch).loss
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    def paper(self, name: str) -> tuple[Tensor, Tensor]:
        leaf = self.policy.clone().requires_grad_()
        b, tokens = self.batch, self.batch.rollout_index.tolist()
        assert b.proximal_logprobs is not None and b.reference_logprobs is not None
        made: dict[int, list[object]] = {}
        for i, g in enumerate(b.group_index.tolist()):
            mine = [t for t, owner in enumerate(tokens) if owner == i]
            columns = [[float(x[t]) for t in mine] for x in (b.proximal_logprobs, b.behavior_logprobs, b.reference_logprobs)]
            made.setdefault(g, []).append(papers.Completion(float(b.rewards[i]), [leaf[t] for t in mine], *columns))
        value = papers.PAPERS[name](list(made.values()))
        if not value.requires_grad:  # every token is at its bound, a constant
            return value, torch.zeros_like(leaf)
        return value.detach(), torch.autograd.grad(value, leaf, materialize_grads=True, allow_unused=True)[0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(completion_lengths)
    rewards = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.1, 0.3, 0.95])
    made = [toy_group(f"p{g}", [draw(rewards) for _ in row], row) for g, row in enumerate(rows)]
    batch, noise = collate(made), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(spread: float) -> Tensor:
        return spread * torch.randn(batch.num_tokens, dtype=torch.float64, generator=noise)

    wide = draw(st.sampled_from([1e-4, 0.1, 1.0]))  # near the anchor, where GSPO's bounds lie; and far from it, where all others do
    behavior = -normal(1.0).abs() - 0.01
    proximal = behavior + normal(wide)
    policy = torch.minimum(proximal + normal(wide), torch.tensor(-1e-3, dtype=torch.float64))
    reference = behavior + normal(0.5)
    return Case(batch=replace(batch, behavior_logprobs=behavior, proximal_logprobs=proximal, reference_logprobs=reference), policy=policy)


def test_every_preset_has_a_paper() -> None:
    assert set(papers.PAPERS) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=40)
@given(case=cases())
def test_loss_and_gradient_are_the_papers(name: str, case: Case) -> None:
    (loss, gradient), (expected, by_logprob) = case.ours(name), case.paper(name)
    scale = max(1.0, float(case.batch.rewards.abs().max()))  # a loss that cancels to about 0 is compared on the scale of its terms
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9 * scale * 1e-3)
    torch.testing.assert_close(gradient, by_logprob, **BOUND)


@pytest.mark.parametrize("name", PRESETS)
@settings(max_examples=25)
@given(case=cases(), data=st.data())
def test_no_split_changes_the_gradient(name: str, case: Case, data: st.DataObject) -> None:
    """Micro-batches, accumulation, ranks: whatever part computes which completions, the gradients add up to the whole."""
    credit, loss = preset(name)
    batch = replace(case.batch, advantages=credit(case.batch))
    _, whole = case.ours(name)
    owner = data.draw(st.lists(st.integers(0, 3), min_size=len(batch.rollouts), max_size=len(batch.rollouts)))
    total = torch.zeros_like(case.policy)
    for part in range(4):
        keep = [i for i, p in enumerate(owner) if p == part]
        tokens = [t for i in keep for t, j in enumerate(batch.rollout_index.tolist()) if i == j]
        leaf = case.policy[tokens].requires_grad_()
        value = loss(TokenScores(logprobs=leaf, entropy=torch.zeros_like(leaf)), batch.select(keep)).loss
        (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True, allow_unused=True)
        total[tokens] += gradient
    torch.testing.assert_close(total, whole, **BOUND)


WITHIN_A_GROUP = [name for name in PRESETS if name != "reinforce_pp"]  # whose baseline is the batch


@pytest.mark.parametrize("name", WITHIN_A_GROUP)
@settings(max_examples=25)
@given(case=cases(), reward=st.floats(-1e6, 1e6))
def test_equal_rewards_of_any_value_teach_nothing(name: str, case: Case, reward: float) -> None:
    """Whatever the float: exactly 0, but for a KL term."""
    credit, loss = preset(name)
    batch = replace(case.batch, rewards=torch.full_like(case.batch.rewards, reward))
    advantages = credit(batch)
    assert advantages.tolist() == [0.0] * batch.num_tokens
    if not loss.needs_reference:
        leaf = case.policy.clone().requires_grad_()
        value = loss(TokenScores(logprobs=leaf, entropy=torch.zeros_like(leaf)), replace(batch, advantages=advantages)).loss
        assert float(value.detach()) == 0.0 and not torch.autograd.grad(value, leaf)[0].any()


@pytest.mark.parametrize("name", WITHIN_A_GROUP)
def test_a_group_of_one_teaches_nothing(name: str) -> None:
    rewards, index = torch.tensor([0.7, 1.0, 0.0]), torch.tensor([0, 1, 1])
    advantage = preset(name)[0].advantage(rewards, index)
    assert float(advantage[0]) == 0.0 and float(advantage[1]) > 0 > float(advantage[2])


# ---------------------------------------------------------------- values that the formulas are not for

CLIP = "grpo.objectives.clipped_surrogate"


def refused(key: str, function: str, arguments: str, message: str) -> object:
    return pytest.param(key, f"{{fn: {function}, {arguments}}}", message, id=f"{function.rpartition('.')[2]} {arguments}")


@pytest.mark.parametrize(
    ("key", "node", "message"),
    [
        refused("objective", CLIP, "clip_low: -0.1", "clip_low is -0.1; it must be a finite number of 0 or more"),
        refused("objective", CLIP, "clip_high: -1", "clip_high is -1; it must be a finite number of 0 or more"),
        refused("objective", CLIP, "clip_high: inf", "clip_high is inf; it must be a finite number"),
        refused("objective", CLIP, "clip_high: nan", "clip_high is nan; it must be a finite number"),
        refused("objective", CLIP, "clip_high: high", "clip_high is 'high'; it must be a finite number"),
        refused("objective", CLIP, "clip_high: true", "clip_high is True; it must be a finite number"),
        refused("objective", CLIP, "dual_clip: 1", "dual_clip is 1; it must be a finite number above 1, or null for none"),
        refused("objective", CLIP, "dual_clip: 0", "dual_clip is 0; it must be a finite number above 1"),
        refused("objective", "grpo.objectives.cispo", "clip_high: -0.5", "clip_high is -0.5; it must be a finite number of 0 or more"),
        refused("objective", "grpo.objectives.cispo", "clip_low: -0.5", "clip_low is -0.5; it must be a finite number of 0 or more"),
        refused("objective", "grpo.objectives.sapo", "tau_positive: 0", "tau_positive is 0; it must be a finite number above 0"),
        refused("objective", "grpo.objectives.sapo", "tau_negative: -1", "tau_negative is -1; it must be a finite number above 0"),
        refused("objective", "grpo.objectives.dppo_tv", "delta: 0", "delta is 0; it must be a finite number above 0"),
        refused("objective", "grpo.objectives.dppo_kl", "delta: -0.1", "delta is -0.1; it must be a finite number above 0"),
        refused("correction.c", "grpo.corrections.truncated_importance", "cap: 0", "cap is 0; it must be a finite number above 0"),
        refused("correction.c", "grpo.corrections.truncated_importance", "cap: inf", "cap is inf; it must be a finite number above 0"),
        refused(
            "correction.c", "grpo.corrections.truncated_sequence_importance", "cap: -2", "cap is -2; it must be a finite number above 0"
        ),
        refused("correction.c", "grpo.corrections.token_mask", "low: -0.5", "low is -0.5; it must be a finite number of 0 or more"),
        refused("correction.c", "grpo.corrections.token_mask", "high: 0.5", "high is 0.5 and low is 0.5; high must be a number above low"),
        refused("correction.c", "grpo.corrections.sequence_mask", "high: 0", "high is 0 and low is 0.0; high must be a number above low"),
        refused(
            "correction.c", "grpo.corrections.geometric_mask", "low: 1.5", "high is 1.01 and low is 1.5; high must be a number above low"
        ),
        refused("correction.c", "grpo.corrections.off_policy_sequence_mask", "delta: 0", "delta is 0; it must be a finite number above 0"),
        refused("aggregation", "grpo.aggregation.constant_length", "length: 0", "length is 0; it must be a whole number of at least 1"),
        refused("aggregation", "grpo.aggregation.constant_length", "length: 7.5", "length is 7.5; it must be a whole number of at least 1"),
    ],
)
def test_a_value_outside_its_range_is_refused_by_its_key(key: str, node: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(load_recipe("r1_zero_arithmetic", f"algo.{key}={node}"))
    assert error.value.key == f"algo.{key}" and message in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        f"algo.objective={{fn: {CLIP}, clip_low: 0.0, clip_high: 0.0, dual_clip: 1.5}}",
        f"algo.objective={{fn: {CLIP}, clip_low: 10.0, clip_high: 10.0}}",  # DeepSeek-R1's own
        "algo.objective={fn: grpo.objectives.cispo, clip_low: null, clip_high: 0.28}",
        "algo.correction.c={fn: grpo.corrections.token_mask, low: 0.0, high: inf}",
    ],
)
def test_the_ends_of_the_ranges_are_allowed(override: str) -> None:
    assert plan(load_recipe("r1_zero_arithmetic", override)).loss() is not None
