"""Tasks of reasoning-gym and of verifiers as data and reward. What needs the packages is skipped without them."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.config import ConfigError
from grpo.data import PromptFormat, check_disjoint, load_problems
from grpo.rewards.base import parse_reward_config
from grpo.rewards.runtime import RewardRuntime
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

GYM = importlib.util.find_spec("reasoning_gym") is not None
VERIFIERS = importlib.util.find_spec("verifiers") is not None
needs_gym = pytest.mark.skipif(not GYM, reason="needs the package reasoning-gym")
needs_verifiers = pytest.mark.skipif(not VERIFIERS, reason="needs the package verifiers")


def problems(fn: Callable[..., Any], split: str, **arguments: Any) -> list[Problem]:
    return load_problems(fn(split, **arguments), split, PromptFormat())


def scores(name: str, said: list[tuple[str, Problem]]) -> list[Score]:
    """By a reward's workers, the problems as they come back from a stored run."""
    completions = [
        Completion(
            problem_id=problem.id, index=0, prompt_ids=(1,), token_ids=(1,), text=text, logprobs=(0.0,), policy_versions=(0,),
            finish_reason=FinishReason.stop,
        )
        for text, problem in said
    ]  # fmt: skip
    stored = [Problem(id=p.id, prompt=p.prompt, answer=p.answer, columns=json.loads(json.dumps(dict(p.columns)))) for _, p in said]
    with RewardRuntime(parse_reward_config({"accuracy": {"fn": name}}), num_workers=1) as runtime:
        return [parts["accuracy"] for parts in runtime.score(completions, stored)]


# ---------------------------------------------------------------- reasoning-gym


@needs_gym
def test_tasks_are_generated_and_judged_by_themselves() -> None:
    """Countdown has many right answers; the one it names and another one are both right, a wrong number and none are not."""
    from grpo.data_reasoning_gym import reasoning_gym

    sums = problems(reasoning_gym, "heldout", task="chain_sum", heldout=3, min_terms=2, max_terms=2)
    (countdown,) = problems(reasoning_gym, "heldout", task="countdown", heldout=1)
    wrong = str(int(sums[0].answer) + 1)
    judged = scores(
        "grpo.rewards.reasoning_gym.score",
        [
            (f"<answer>{sums[0].answer}</answer>", sums[0]),
            (f"<answer> {sums[1].answer}\n</answer>", sums[1]),
            (f"<answer>{wrong}</answer>", sums[0]),
            (sums[0].answer, sums[0]),
            (f"<answer>{countdown.answer}</answer>", countdown),
            (f"<answer>({countdown.answer})</answer>", countdown),
        ],
    )
    assert [score.value for score in judged[:2]] == [1, 1]
    assert judged[2].value < 1 and judged[2].outcome is Outcome.ok
    assert judged[3].value < 1 and judged[3].outcome is Outcome.wrong_format
    assert [score.value for score in judged[4:]] == [1, 1], "judged by what it comes to, not letter by letter"


@needs_gym
def test_splits_share_no_problem_even_where_there_are_few() -> None:
    from grpo.data_reasoning_gym import reasoning_gym

    few = {"task": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "size": 100, "heldout": 20}
    train, heldout = problems(reasoning_gym, "train", seed=1, **few), problems(reasoning_gym, "heldout", seed=1, **few)
    check_disjoint(train, heldout)
    assert len(heldout) == 20 and len({p.prompt for p in train}) == len(train) == 100
    assert problems(reasoning_gym, "heldout", seed=2, **few) == heldout, "the same in every run"
    assert problems(reasoning_gym, "train", seed=2, **few) != train


@needs_gym
@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"task": "no_such"}, "'no_such' not registered"), ({"task": "chain_sum", "min_trms": 1}, "min_trms")],
)
def test_wrong_settings_of_a_task_are_named(arguments: dict[str, Any], message: str) -> None:
    from grpo.data_reasoning_gym import reasoning_gym

    with pytest.raises(ConfigError, match=message):
        reasoning_gym("train", **arguments)


# ---------------------------------------------------------------- verifiers

TASKSET = """\
import verifiers.v1 as vf

__all__ = ["Sums"]


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 5 and not trace.is_truncated)

    @vf.metric
    async def thought(self, trace: vf.Trace) -> float:
        return float(len(trace.assistant_messages[-1].reasoning_content or ""))


class SumsConfig(vf.TasksetConfig):
    low: int = 0


class Sums(vf.Taskset[SumTask, SumsConfig]):
    INFINITE = True

    def load(self):
        n = self.config.low
        while True:
            yield SumTask(SumData(prompt=f"{n} + 1 = ?", system_prompt="Only the number.", answer=str(n + 1)), self.config.task)
            n += 1
"""
BOXED = TASKSET.replace("async def correct(self, trace: vf.Trace)", "async def correct(self, trace: vf.Trace, runtime: vf.Runtime)")


@pytest.fixture
def tasksets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two installed tasksets."""
    (tmp_path / "toy_sums.py").write_text(TASKSET)
    (tmp_path / "boxed_sums.py").write_text(BOXED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    yield tmp_path
    for name in ("toy_sums", "boxed_sums"):
        sys.modules.pop(name, None)


@needs_verifiers
def test_a_taskset_is_data_and_reward(tasksets: Path) -> None:
    """2 · correct + 0.5 · short, as the task weighs them."""
    from grpo.data_verifiers import verifiers_tasks

    found = {"taskset": "toy-sums", "size": 30, "heldout": 10, "low": 100}
    train, heldout = problems(verifiers_tasks, "train", **found), problems(verifiers_tasks, "heldout", **found)
    check_disjoint(train, heldout)
    assert (len(train), len(heldout)) == (30, 10)
    assert {int(p.answer) for p in train + heldout} == set(range(101, 141))
    problem = train[0]
    assert problem.prompt == f"Only the number.\n\n{int(problem.answer) - 1} + 1 = ?"
    said = [problem.answer, f"<think>Hm, {problem.answer}.</think> {problem.answer}", "I do not know.", "7"]
    judged = scores("grpo.rewards.verifiers.score", [(text, problem) for text in said])
    assert [score.value for score in judged] == [2.5, 2.5, 0.0, 0.5]
    assert judged[1].detail == "correct 1.0, short 1.0, thought 8.0"


@needs_verifiers
def test_a_task_that_needs_more_than_the_conversation_is_refused(tasksets: Path) -> None:
    from grpo.data_verifiers import verifiers_tasks

    with pytest.raises(ConfigError, match=r"by the conversation alone: correct looks into its runtime\n  → .* environment=verifiers"):
        verifiers_tasks("train", taskset="boxed-sums")
    found = problems(verifiers_tasks, "train", taskset="boxed-sums", size=1, heldout=1, in_environment=True)
    (judged,) = scores("grpo.rewards.verifiers.score", [("1", found[0])])
    assert not judged.scored and "correct looks into its runtime; with environment=verifiers the task itself judges" in judged.detail
    with pytest.raises(ConfigError, match=r"'no-such'.*not found"):
        verifiers_tasks("train", taskset="no-such")
    with pytest.raises(ConfigError, match="hihg"):
        verifiers_tasks("train", taskset="toy-sums", hihg=3)


# ---------------------------------------------------------------- without the packages


def test_what_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.data_reasoning_gym import reasoning_gym
    from grpo.data_verifiers import verifiers_tasks
    from grpo.rewards import reasoning_gym as gym_reward
    from grpo.rewards import verifiers as verifiers_reward

    gym_reward._dataset.cache_clear()
    verifiers_reward._taskset.cache_clear()
    for name in ("reasoning_gym", "verifiers", "verifiers.v1", "verifiers.v1.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"→ pip install 'grpo-toolkit\[reasoning-gym\]'"):
        reasoning_gym("train", task="chain_sum")
    with pytest.raises(ConfigError, match=r"pip install 'grpo-toolkit\[verifiers\]'"):
        verifiers_tasks("train", taskset="x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("reasoning_gym", "verifiers"):
        with pytest.raises(ConfigError, match=rf"this reward needs the package .*: pip install 'grpo-toolkit\[{name.replace('_', '-')}\]'"):
            parse_reward_config({"accuracy": {"fn": f"grpo.rewards.{name}.score"}})
