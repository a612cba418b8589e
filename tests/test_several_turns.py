"""Training on rollouts of several turns: the environment's tokens condition what is trained, and are no part of it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from grpo import aggregation, corrections, kl, objectives
from grpo.batch import Batch, collate
from grpo.build import train
from grpo.console import sample_table
from grpo.layouts import LayoutName
from grpo.losses import Loss
from grpo.policy import HFPolicy, OptimSettings
from grpo.recipe import load_recipe
from grpo.replay import rescore
from grpo.report import write_report
from grpo.rollout_table import groups_of, rollout_table
from grpo.run import RunFolder
from grpo.show import Choice, show
from grpo.toy import toy_llama, toy_rollout
from grpo.types import Completion, FinishReason, Group, Problem, Rollout, Score

VOCAB = 24
LAYOUTS: tuple[LayoutName, ...] = ("padded", "packed", "shared_prompt")
# who wrote each token: s the policy, . the environment. Never both ends alike, a whole completion, one token, an environment's end
TURNS = ("ss...sss", "s.s.s.s", "sssss", "ss....s", "s", ".ss", "ssss..", "sss..ss..s")


def model() -> Any:
    return toy_llama()


def make_groups(seed: int = 0) -> list[Group]:
    rng, groups = random.Random(seed), []
    for g in range(2):
        problem, prompt = Problem(id=f"p{g}", prompt="?", answer="1"), tuple(rng.randrange(VOCAB) for _ in range(4 + g))
        rollouts = []
        for i, turns in enumerate(TURNS[4 * g : 4 * g + 4]):
            own = tuple(letter == "s" for letter in turns)
            tokens = [rng.randrange(VOCAB) for _ in own]
            logprobs = tuple(-3.0 + rng.random() if mine else 0.0 for mine in own)
            rollout = toy_rollout(problem, i, prompt, tokens, logprobs=logprobs, sampled=own)
            rollouts.append(replace(rollout, reward=rng.choice([0.0, 1.0, 2.0])))
        groups.append(Group(problem=problem, rollouts=tuple(rollouts)))
    return groups


def with_completions(change: Callable[[Completion], Completion]) -> list[Group]:
    return [replace(group, rollouts=tuple(replace(r, completion=change(r.completion)) for r in group.rollouts)) for group in make_groups()]


def batch_of(groups: list[Group]) -> Batch:
    batch = collate(groups)
    return replace(batch, advantages=(batch.rewards - 0.8).float()[batch.rollout_index], reference_logprobs=batch.behavior_logprobs - 0.1)


def naive_logprobs(policy: Any, groups: list[Group]) -> list[tuple[Tensor, Tensor]]:
    """For each rollout its tokens' log-probs, one forward pass each over all of its tokens, and the mask of those that are the policy's."""
    out = []
    for completion in (r.completion for group in groups for r in group.rollouts):
        ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
        logprobs = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
        of_tokens = logprobs.gather(1, ids[0, 1:, None])[len(completion.prompt_ids) - 1 :, 0]
        out.append((of_tokens, torch.tensor(completion.sampled)))
    return out


# ---------------------------------------------------------------- the batch


def test_the_batch_holds_the_policys_tokens_alone() -> None:
    groups = make_groups()
    batch = batch_of(groups)
    own = [turns.count("s") for turns in TURNS]  # 5 4 5 3 | 1 2 4 6
    assert torch.bincount(batch.rollout_index).tolist() == own == [5, 4, 5, 3, 1, 2, 4, 6]
    assert batch.totals.tokens == batch.num_tokens == sum(own) == 30
    assert batch.group_num_tokens.tolist() == [17, 13]
    logprobs = [p for g in groups for r in g.rollouts for p, mine in zip(r.completion.logprobs, r.completion.sampled, strict=True) if mine]
    assert batch.behavior_logprobs.tolist() == pytest.approx(logprobs)


def test_a_rollout_without_a_token_of_the_policys_takes_no_part() -> None:
    (group, _) = make_groups()
    first = group.rollouts[0]
    silent = replace(first, completion=replace(first.completion, sampled=(False,) * len(first.completion.token_ids)))
    batch = collate([replace(group, rollouts=(silent, *group.rollouts[1:]))])
    assert len(batch.rollouts) == 3 and batch.totals.rollouts == 3


# ---------------------------------------------------------------- log-probs and gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [10_000, 20])
def test_log_probs_are_those_of_a_forward_pass_over_everything_and_a_mask(layout: LayoutName, budget: int) -> None:
    groups = make_groups()
    policy = HFPolicy(model(), OptimSettings(), dtype=torch.float64, layout=layout, tokens_per_microbatch=budget)
    got = policy.score(batch_of(groups)).logprobs
    with torch.no_grad():
        wanted = torch.cat([logprobs[mask] for logprobs, mask in naive_logprobs(model().double(), groups)])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)  # RMSNorm computes in float32


LOSSES = {
    "reinforce": Loss(objective=objectives.policy_gradient, aggregate=aggregation.token_mean),
    "grpo": Loss(
        objective=objectives.clipped_surrogate,
        aggregate=aggregation.sequence_mean,
        corrections={"tis": corrections.truncated_importance},
        kl=kl.k3,
        kl_coef=0.1,
    ),
}


def gradients(policy: HFPolicy, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    """By the weights that one step of SGD at rate 1 moves."""
    before = {name: p.detach().clone() for name, p in policy.masters.items()}
    policy.update(batch, loss)
    return {name: before[name] - p.detach() for name, p in policy.masters.items()}


def sgd_policy(layout: LayoutName, budget: int = 10_000) -> HFPolicy:
    optim = OptimSettings(name="sgd", lr=1.0, max_grad_norm=0.0)
    return HFPolicy(model(), optim, dtype=torch.float64, layout=layout, tokens_per_microbatch=budget)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", [10_000, 20])
def test_gradients_are_those_of_a_forward_pass_over_everything_and_a_mask(layout: LayoutName, budget: int) -> None:
    """REINFORCE, token mean: −(1/30) Σ mask · A · log π, written out with a mask over all tokens."""
    groups = make_groups()
    batch = batch_of(groups)
    got = gradients(sgd_policy(layout, budget), batch, LOSSES["reinforce"])
    plain = model().double()
    rewards = [r.reward - 0.8 for g in groups for r in g.rollouts]
    terms = [(mask * logprobs).sum() * a for (logprobs, mask), a in zip(naive_logprobs(plain, groups), rewards, strict=True)]
    (-sum(terms) / 30).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_noted_of_an_environments_tokens_changes_nothing(name: str, layout: LayoutName) -> None:
    """Other log-probs, versions and texts there, another token at the very end: bit for bit the same update. Another token between: not."""

    def noted(completion: Completion, **changes: Any) -> Completion:
        own = completion.sampled
        last = completion.token_ids[-1] if own[-1] else (completion.token_ids[-1] + 1) % VOCAB
        return replace(
            completion,
            token_ids=(*completion.token_ids[:-1], last),
            logprobs=tuple(p if mine else -99.0 for p, mine in zip(completion.logprobs, own, strict=True)),
            policy_versions=tuple(v if mine else 77 for v, mine in zip(completion.policy_versions, own, strict=True)),
            transcript=(("forged", True), ("forged", False)),
        )

    def altered(completion: Completion) -> Completion:
        ids = [t if mine else (t + 1) % VOCAB for t, mine in zip(completion.token_ids, completion.sampled, strict=True)]
        return replace(completion, token_ids=tuple(ids))

    same = gradients(sgd_policy(layout), batch_of(make_groups()), LOSSES[name])
    other = gradients(sgd_policy(layout), batch_of(with_completions(noted)), LOSSES[name])
    assert all(torch.equal(same[key], other[key]) for key in same)
    other = gradients(sgd_policy(layout), batch_of(with_completions(altered)), LOSSES[name])
    assert not all(torch.allclose(same[key], other[key]) for key in same), "what stands between is seen by what is trained"


def test_one_turn_is_the_same_with_and_without_saying_so() -> None:
    def said(completion: Completion, by_all: bool) -> Completion:
        return replace(completion, sampled=(True,) * len(completion.token_ids) if by_all else ())

    for layout in LAYOUTS:
        first, second = (
            gradients(sgd_policy(layout), batch_of(with_completions(lambda c, by_all=by_all: said(c, by_all))), LOSSES["grpo"])
            for by_all in (True, False)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- for readers


def conversation() -> Group:
    problem = Problem(id="p/1", prompt="17 * 23 = ?", answer="391")
    completion = Completion(
        problem_id="p/1",
        index=0,
        prompt_ids=(4, 5),
        token_ids=(6, 7, 8, 9, 10),
        text="<python>print(17 * 23)</python>\n391 it is",
        logprobs=(-0.5, -0.25, 0.0, 0.0, -0.125),
        policy_versions=(8,) * 5,
        finish_reason=FinishReason.stop,
        sampled=(True, True, False, False, True),
        transcript=(("<python>print(17 * 23)</python>", True), ("391\n<b>bold</b>", False), ("391 it is", True)),
    )
    scores = {"accuracy": Score(value=1.0)}
    other = replace(completion, index=1, transcript=(), sampled=(), text="no idea")
    return Group(
        problem=problem,
        rollouts=(
            Rollout(problem=problem, completion=completion, scores=scores, reward=1.0),
            Rollout(problem=problem, completion=other, scores={"accuracy": Score(value=0.0)}, reward=0.0),
        ),
    )


def test_turns_survive_a_table_and_back() -> None:
    table = rollout_table(7, [conversation()], {}, {})
    assert groups_of(table) == (conversation(),)
    older = table.drop_columns(["sampled", "transcript"])
    (group,) = groups_of(older)
    assert group.rollouts[0].completion.sampled == () and group.rollouts[0].completion.text == conversation().rollouts[0].completion.text


def test_a_reader_can_tell_who_said_what(tmp_path: Any) -> None:
    run = RunFolder.create(tmp_path, "recipe", "name", resume=False)
    run.write_rollouts(1, [conversation()], {("p/1", 0): 0.5, ("p/1", 1): -0.5})
    console = Console(width=160, record=True, force_terminal=False)
    show(run, Choice(), console)
    text = console.export_text()
    assert "<python>print(17 * 23)</python>\n│ 391\n│ <b>bold</b>\n391 it is" in text
    assert "3 tokens and 2 of the environment" in text and "5 tokens, finish reason stop" in text
    console = Console(width=160, record=True, force_terminal=False)
    console.print(sample_table(1, conversation().rollouts, {}))
    text = console.export_text()
    assert "│ │ 391" in text and "3 tokens" in text
    run.write_config("run: {}\n")
    (run.path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5, "time/elapsed": 1.0}\n')
    write_report(run)
    page = (run.path / "report.html").read_text()
    assert '<span class="environment">│ 391\n│ &lt;b&gt;bold&lt;/b&gt;</span>' in page and "3 tokens" in page


def test_a_reward_changed_afterwards_leaves_the_environments_scores() -> None:
    """Stored: accuracy 1, and the environment's own `won` 0.5; the new reward part says 3: 3 + 2 · 0.5."""

    class Threes:
        def score(self, completions: Any, problems: Any, progress: Any = None) -> Any:
            return [{"new": Score(value=3.0)} for _ in completions]

    group = conversation()
    won = replace(group.rollouts[0], scores=group.rollouts[0].scores | {"won": Score(value=0.5)})
    failed = replace(group.rollouts[1], scores={"environment": Score(value=float("nan"))}, reward=float("nan"))
    (after,) = rescore(1, [replace(group, rollouts=(won, failed))], Threes(), {"new": 1.0, "won": 2.0}).after
    assert after.rollouts[0].reward == 4.0 and set(after.rollouts[0].scores) == {"new", "won"}
    assert not after.rollouts[1].scored


# ---------------------------------------------------------------- a whole run

GAME = """\
from grpo.rollouts.environments import Done, Message

class Digits:
    closed = 0

    def __init__(self, turns: int = 3):
        self.left = self.max_turns = turns
        self.found = 0

    def start(self, problem):
        if problem.columns["question"].startswith("9,9"):
            raise RuntimeError("this one is broken")
        return [Message("text", problem.prompt)]

    def step(self, completion):
        self.left, self.found = self.left - 1, self.found + completion.text[-1:].isdigit()
        return [Message("text", "? ")] if self.left else Done({"found": self.found / self.max_turns})

    @classmethod
    def close_shared(cls):
        cls.closed += 1
"""
RECIPE = """\
defaults: [schema, {{algo: grpo}}, {{model: tiny}}, {{data: digits}}, {{rollout: hf}}, {{logger: quiet}}, _self_]
run: {{steps: 3, checkpoint_every: 1, name: r, dir: "{folder}/runs"}}
model: {{path: "{model}", precision: fp32}}
environment: {{fn: "{folder}/game.py:Digits", turns: 3, weights: {{found: 1.0}}}}
rollout: {{problems_per_step: 8, completions_per_problem: 4, max_new_tokens: 40, stop: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]}}
optim: {{lr: 1.0e-3}}
eval: {{every: 0, problems: 4, metric: found}}
scoring: {{unscored_share: 1.0}}
"""


@pytest.mark.slow
def test_a_recipe_whose_environment_judges_trains_and_goes_on(tmp_path: Any, tiny_model: str) -> None:
    """No reward part at all; a game of three turns that some rollouts do not finish within 40 tokens."""
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, model=tiny_model))
    result = train(load_recipe(str(tmp_path / "recipe.yaml"), "run.steps=2"))
    rows = {row["step"]: row for row in result.metrics if "reward/mean" in row}
    groups = groups_of(result.run.read_rollouts(2))
    completions = [r.completion for g in groups for r in g.rollouts]
    assert rows[2]["reward/mean"] == pytest.approx(sum(r.reward for g in groups for r in g.rollouts) / 32)
    assert rows[2]["rollout/turns_mean"] == pytest.approx(sum(c.num_turns for c in completions) / 32)
    assert 1 < rows[2]["rollout/turns_mean"] <= 3
    assert rows[2]["completion/length_mean"] == pytest.approx(sum(c.num_sampled for c in completions) / 32)
    assert all(len(c.token_ids) <= 40 and c.sampled[-1:] != (False,) for c in completions)
    cut = [r for g in groups for r in g.rollouts if r.completion.truncated]
    assert cut and all(r.scores["found"].value == 0 and "cut off" in r.scores["found"].detail for r in cut)
    finished = [r for g in groups for r in g.rollouts if not r.completion.truncated and r.scored]
    for r in finished:
        said = [text for text, own in r.completion.transcript if own]
        assert len(said) == 3 and r.reward == pytest.approx(sum(text[-1:].isdigit() for text in said) / 3, abs=1e-11)
    assert {r.problem.columns["question"][:3] == "9,9" for g in groups for r in g.rollouts if not r.scored} <= {True}
    (game,) = {m for name, m in sys.modules.items() if name.startswith("grpo_user_game_") and hasattr(m, "Digits")}
    assert game.Digits.closed == 1, "what environments share is closed at the end of the run"
    whole = train(load_recipe(str(tmp_path / "recipe.yaml"), "run.name=whole")).metrics[-1]
    resumed = train(load_recipe(str(tmp_path / "recipe.yaml"), "run.resume=true")).metrics[-1]
    for key in ("reward/mean", "rollout/turns_mean", "policy/loss", "eval/pass@1"):
        assert resumed[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
