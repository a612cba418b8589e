"""The presets in recipes/reward: each one can be composed, bound to its functions, and judges a completion as its comment says."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.recipe import load_recipe
from grpo.rewards.base import RewardPart, call, combine, parse_reward_config
from grpo.types import Completion, FinishReason, Problem

GROUP = Path(__file__).resolve().parent.parent / "recipes" / "reward"
NEEDED = {"judge": ["reward.accuracy.model=some-model"]}  # what a preset leaves to the user


def parts(preset: str, *overrides: str) -> tuple[RewardPart, ...]:
    config = load_recipe("r1_zero_arithmetic", f"reward={preset}", *NEEDED.get(preset, []), *overrides)
    return parse_reward_config(config.reward)


def total(preset: str, text: str, answer: str, *overrides: str, num_tokens: int = 10) -> float:
    completion = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=tuple(range(num_tokens)), text=text, logprobs=(0.0,) * num_tokens,
        policy_versions=(0,) * num_tokens, finish_reason=FinishReason.stop,
    )  # fmt: skip
    found = parts(preset, *overrides)
    problem = Problem(id="p", prompt="What is 3 + 4?", answer=answer)
    scores = {part.name: call(part.ref.load(), completion, problem) for part in found}
    assert all(score.scored for score in scores.values()), scores
    return combine(scores, {part.name: part.weight for part in found})


EXTRAS = ("reasoning_gym", "verifiers")  # presets named after the package they need


@pytest.mark.parametrize("preset", sorted(file.stem for file in GROUP.glob("*.yaml")))
def test_every_preset_binds_to_its_functions(preset: str) -> None:
    if preset in EXTRAS:
        pytest.importorskip(preset)
    found = parts(preset)
    assert "accuracy" in {part.name for part in found}  # what eval.metric asks for
    for part in found:
        assert callable(part.ref.load())


@pytest.mark.parametrize(
    ("preset", "text", "answer", "value"),
    [
        ("r1_full", "<think>We add three and four.</think> <answer>7</answer>", "7", 3.0),  # 1 + 1 + 1
        ("r1_full", "<think>We add three 和 四.</think> <answer>8</answer>", "7", 0 + 1 + 3 / 5),
        ("choice", "<think>Hm.</think> <answer>(B)</answer>", "B", 1.2),
        ("choice", "The answer is B.", "B", 1.0),
        ("json", '{"a": 1}', "", 1.0),
        ("json", "a: 1", "", 0.0),
    ],
)
def test_presets_add_up(preset: str, text: str, answer: str, value: float) -> None:
    assert total(preset, text, answer) == pytest.approx(value)


def test_the_cosine_preset_takes_its_length_from_the_rollout() -> None:
    """Half of 20 tokens: (2 + 1) / 2 for a right answer; ten different tokens hold no 40-gram."""
    assert total("cosine", r"\boxed{7}", "7", "rollout.max_new_tokens=20") == pytest.approx(1.5)
    assert total("cosine", r"\boxed{7}", "7", "rollout.max_new_tokens=10") == pytest.approx(-10)


def test_the_json_preset_can_be_narrowed() -> None:
    assert total("json", '{"a": 1}', "", "reward.accuracy.schema={type: object, required: [b]}") == 0.0
    assert total("json", '{"a": 1}', "", "reward.accuracy.keys=[a]") == 1.0


def test_the_judge_preset_scores_batches_and_may_wait() -> None:
    (part,) = parts("judge")
    assert part.style.whole_batch and part.limits["wall_s"] > 60
