"""What the objective card prints is true of the settings: the numbers, the rewards, and what it says of the loss value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.batch import collate
from grpo.card import objective_card
from grpo.losses import TokenScores
from grpo.notation import number
from grpo.plan import Plan, plan
from grpo.recipe import groups, load_recipe
from grpo.toy import toy_group

PRESETS = groups()["algo"]
DEPENDS, NEAR_0, KL_ALONE = "depends on how long completions are", "near 0 is normal", "about that of its KL term alone"
NEUTRAL = "Watch the reward and the gradient norm, not the loss value."


def planned(*overrides: str) -> Plan:
    return plan(load_recipe("r1_zero_arithmetic", *overrides))


def card(*overrides: str) -> str:
    return objective_card(planned(*overrides))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1048576, "1048576"),
        (10**15 + 1, "1000000000000001"),
        (2.0, "2"),
        (0.00123456789, "0.00123456789"),
        (1 - 1e-7, "0.9999999"),
        (1 + 4e-4, "1.0004"),
        (1 - 0.9, "0.1"),  # 0.09999999999999998 in float64
        (1 - 10.0, "-9"),
    ],
)
def test_a_number_is_written_in_full(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("overrides", "equation"),
    [
        (["algo=dr_grpo", "algo.aggregation.length=1048576"], "1/(N·1048576) · Σᵢ Σₜ"),
        (["algo=grpo", "algo.objective.clip_low=1e-7", "algo.objective.clip_high=1e-7"], "clip(ρ, 0.9999999, 1.0000001)"),
        (["algo=grpo", "algo.objective.dual_clip=3.0000001"], "3.0000001·A"),
        (["algo=cispo", "algo.objective.clip_high=1048575.0"], "clip(ρ, 0, 1048576)"),
        (["algo=sapo", "algo.objective.tau_negative=1.0000001"], "τ = 1 where A > 0, else 1.0000001"),
        (["algo=dppo", "algo.objective.delta=0.12345678"], "> 0.12345678"),
        (["algo=grpo", "algo.correction.tis.cap=2.0000001"], "π_behav(oₜ), 2.0000001 )"),
        (["algo=deepseek_v3_2", "algo.correction.off_policy.delta=0.12345678"], "> 0.12345678, else 1"),
        (["algo=grpo", "algo.kl={fn: grpo.kl.k3, coef: 0.00123456789}"], "+ 0.00123456789 ·"),
        (["algo=grpo", "algo.entropy_coef=0.00123456789"], "− 0.00123456789 ·"),
        (["algo=reinforce_pp", "algo.kl.coef=0.00123456789"], "Aᵢ − 0.00123456789 ·"),
        (["algo=grpo", "reward.format.weight=0.123456789"], "0.123456789 · format"),
    ],
)
def test_no_setting_is_rounded(overrides: list[str], equation: str) -> None:
    assert equation in card(*overrides).split("```")[1]


# ---------------------------------------------------------------- rewards


GAME = """
from grpo.rollouts.environments import Done, Message

class Guess:
    score_names = ("won", "kept")

    def start(self, problem):
        return [Message("text", problem.prompt)]

    def step(self, completion):
        return Done({"won": 1.0, "kept": 1.0})
"""


@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        (["reward={}"], "r     = 1 · won\n"),
        ([], "r     = 1 · accuracy + 0.2 · format + 1 · won\n"),
        (["algo.combine_rewards=after"], "r_k, w_k = accuracy with w = 1, format with w = 0.2, won with w = 1\n"),
    ],
)
def test_the_scores_of_the_environment_stand_among_the_rewards(tmp_path: Path, overrides: list[str], row: str) -> None:
    file = tmp_path / "guess.py"
    file.write_text(GAME, encoding="utf-8")
    game = f"environment={{fn: {file}:Guess, weights: {{won: 1, kept: 0}}}}"  # a weight of 0 only logs
    assert row in card("algo=grpo", "eval.metric=won", game, *overrides)


def test_equal_rewards_are_not_0_divided_by_0() -> None:
    for preset in ("grpo", "max_rl", "rloo"):
        assert "over the group; 0 where all are equal\n" in card(f"algo={preset}")
    assert "over all tokens of the batch; 0 where all are equal\n" in card("algo=reinforce_pp")


# ---------------------------------------------------------------- the loss value


LENGTHS = [(1, 1, 1), (2, 2, 2), (1, 2, 7), (7, 2, 1), (3, 9, 1)]
K3_OF_HALF = 0.1065306597126334  # e^−0.5 − 1 + 0.5, where log π_θ/π_ref is 0.5 at every token


def loss_value(made: Plan, lengths: Sequence[int]) -> float:
    """Of one update, rewards 0, 1, 1 and 0, 0, 1: engine and trainer agree (−1 a token), and the reference says −1.5."""
    rows = [("a", [0.0, 1.0, 1.0], lengths), ("b", [0.0, 0.0, 1.0], (2, 5, 3))]
    made_groups = [toy_group(name, row, long, parts=[dict.fromkeys(made.reward_weights, r) for r in row]) for name, row, long in rows]
    batch = collate(made_groups, tuple(made.credit().part_weights))
    behavior = batch.behavior_logprobs.double()
    batch = replace(batch, behavior_logprobs=behavior, reference_logprobs=behavior - 0.5)
    batch = replace(batch, advantages=made.credit()(batch))
    return float(made.loss()(TokenScores(logprobs=behavior, entropy=torch.ones_like(behavior)), batch).loss)


def check_what_is_said(made: Plan) -> str:
    """The sentence on the loss value, held against the loss."""
    (said,) = [line for line in objective_card(made).splitlines() if "loss value" in line]
    values = [loss_value(made, lengths) for lengths in LENGTHS]
    if DEPENDS in said:
        assert max(values) - min(values) > 1e-4, values
    elif NEAR_0 in said:
        assert values == pytest.approx([0.0] * len(LENGTHS), abs=1e-9)
    elif KL_ALONE in said:
        assert values == pytest.approx([made.kl_coef * K3_OF_HALF] * len(LENGTHS), abs=1e-9)
    elif "entropy term alone" in said:
        assert values == pytest.approx([-made.config.algo.entropy_coef] * len(LENGTHS), abs=1e-9)  # H is 1 at every token
    elif "KL and entropy terms alone" in said:
        assert values == pytest.approx([made.kl_coef * K3_OF_HALF - made.config.algo.entropy_coef] * len(LENGTHS), abs=1e-9)
    else:
        assert NEUTRAL in said
    return said


SAID = {"grpo": NEAR_0, "gspo": NEAR_0, "reinforce_pp": NEAR_0, "deepseek_r1": KL_ALONE, "sapo": NEUTRAL, "deepseek_v3_2": NEUTRAL}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_card_of_a_preset_says_of_the_loss_value_is_so(preset: str) -> None:
    made = planned(f"algo={preset}", "rollout.max_new_tokens=16")
    said = check_what_is_said(made)
    assert SAID.get(preset, DEPENDS) in said
    if NEUTRAL in said:  # else the card would have to say so
        values = [loss_value(made, lengths) for lengths in LENGTHS]
        assert values == pytest.approx([values[0]] * len(LENGTHS), abs=1e-9) and abs(values[0]) > 1e-6


K3 = "algo.kl={fn: grpo.kl.k3, coef: 0.1}"
WHITENED = "algo.normalise={fn: grpo.advantages.whiten}"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["algo=grpo", K3], KL_ALONE),
        (["algo=grpo", "algo.entropy_coef=0.01"], "entropy term alone"),
        (["algo=grpo", K3, "algo.entropy_coef=0.01"], "KL and entropy terms alone"),
        (["algo=grpo", K3, "algo.kl_in=reward"], NEUTRAL),
        (["algo=grpo", "algo.advantage.fn=grpo.advantages.reward_itself"], NEUTRAL),
        (["algo=grpo", "algo.combine_rewards=after"], NEAR_0),
        (["algo=grpo", WHITENED], NEUTRAL),
        (["algo=grpo_token_mean", WHITENED], NEAR_0),
        (["algo=dr_grpo", WHITENED, "algo.aggregation.length=16"], NEAR_0),
        (["algo=rloo", WHITENED], NEAR_0),
        (["algo=grpo", WHITENED, "algo.aggregation.fn=grpo.aggregation.group_mean"], NEUTRAL),
        (["algo=grpo", "algo.aggregation.fn=grpo.aggregation.group_mean"], DEPENDS),
        (["algo=dapo", "algo.advantage.fn=grpo.advantages.reward_itself", "rollout.sampling_rounds=1"], DEPENDS),
    ],
)
def test_what_the_card_says_of_the_loss_value_is_so(overrides: list[str], says: str) -> None:
    assert says in check_what_is_said(planned(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=grpo", "optim.updates_per_step=4"],
        ["algo=gspo", "optim.updates_per_step=4"],
        ["algo=grpo", "rollout.max_staleness=1", "rollout.schedule=free"],
        ["algo=grpo", "algo.mask_truncated=true"],
        ["algo=reinforce_pp", "algo.mask_truncated=true"],
        ["algo=reinforce_pp", "optim.updates_per_step=4"],
    ],
)
def test_where_neither_is_known_the_card_claims_nothing(overrides: list[str]) -> None:
    assert NEUTRAL in card(*overrides)


# ---------------------------------------------------------------- a step in words


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


OWN = '''
def double(log_ratio, rollout_index):
    """ρ is 2 where nothing has moved."""
    return log_ratio + 0.6931471805599453

def mine(log_ratio, advantages, logprobs):
    """Where its bounds are, only I know."""
    from grpo.objectives import policy_gradient
    return policy_gradient(log_ratio, advantages, logprobs)

def capped(mismatch, *, cap=3):
    """What cap means, only I know."""
    from grpo.corrections import truncated_importance
    return truncated_importance(mismatch)

def every_tenth(values, batch):
    return values.sum() / 10
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "own.py"
    file.write_text(OWN, encoding="utf-8")
    return str(file)


def test_what_only_our_ratios_do_is_not_said_of_the_users_own(own: str) -> None:
    ratio = f"algo.ratio.fn={own}:double"
    text = card("algo=grpo", ratio)
    assert "π_prox is π_θ itself." in text and "exactly 1" not in text and "bound" not in text and NEAR_0 not in text
    several = card("algo=grpo", ratio, "optim.updates_per_step=4")
    assert "π_prox is the policy at the start of the step." in several and "ρ is 1 in the first" not in several


def test_what_only_our_objectives_do_is_not_said_of_the_users_own(own: str) -> None:
    objective = f"algo.objective={{fn: {own}:mine}}"
    once = card("algo=grpo", objective)
    assert "so ρ is exactly 1." in once and "bound" not in once.replace("Where its bounds are", "") and NEAR_0 not in once
    assert "ρ is 1 in the first of 4 updates." in card("algo=grpo", objective, "optim.updates_per_step=4")
    assert "compares with the engine's own log-probs." in card("algo=dppo", objective)
    assert NEUTRAL in card("algo=grpo_token_mean", objective)


def test_what_only_our_corrections_and_aggregations_do_is_not_said_of_the_users_own(own: str) -> None:
    text = card("algo=grpo", f"algo.correction={{x: {{fn: {own}:capped}}}}")
    assert "truncated at" not in text and "w_x, for the difference" in text and NEUTRAL in text
    assert NEUTRAL in card("algo=grpo", f"algo.aggregation={{fn: {own}:every_tenth}}")


@pytest.mark.parametrize(
    ("refresh", "updates", "says"),
    [
        (400, 16, "400 optimiser updates, that is, every 25 steps."),
        (1, 1, "optimiser update, that is, every step."),
        (400, 3, "400 optimiser updates; its log-probs are taken once a step, so a refresh within a step acts from the next step on."),
        (2, 4, "2 optimiser updates; its log-probs are taken once a step, so a refresh within a step acts from the next step on."),
    ],
)
def test_a_reference_refreshed_within_a_step_acts_from_the_next(refresh: int, updates: int, says: str) -> None:
    text = card("algo=deepseek_r1", f"algo.reference_refresh={refresh}", f"optim.updates_per_step={updates}")
    assert f"π_ref becomes the policy every {says}" in text


@pytest.mark.parametrize(
    ("overrides", "says", "never"),
    [
        (["algo=grpo"], "the token limit are compared with, but take no part", "of all 128"),
        (["algo=reinforce_pp"], "the token limit are compared with, but take no part", "of all 128"),
        (["algo=grpo", "algo.advantage.fn=grpo.advantages.reward_itself"], "the token limit take no part", "compared with, but"),
        (["algo=grpo"], "one optimiser update of all that were not cut off.", "of all 128"),
        (["algo=grpo", "optim.updates_per_step=3"], "of up to 48 (whole groups, less what was cut off)", "40 or 48"),  # 16 = 6 + 5 + 5
    ],
)
def test_what_is_cut_off_is_not_counted_among_what_is_trained_on(overrides: list[str], says: str, never: str) -> None:
    text = card(*overrides, "algo.mask_truncated=true")
    assert says in text and never not in text


def test_a_step_that_may_stay_smaller_has_updates_of_up_to_so_many() -> None:
    assert "one optimiser update of all of them." in card("algo=dapo")
    assert "4 optimiser updates of up to 32 (whole groups)." in card("algo=dapo", "optim.updates_per_step=4")
    assert "3 optimiser updates of 40 or 48 (whole groups)." in card("algo=grpo", "optim.updates_per_step=3")
