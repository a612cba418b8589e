"""Reward functions written for other toolkits, called as they are: TRL's own, and functions in the form verl and OpenRLHF document."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.config import ConfigError
from grpo.rewards.adapters import scorer
from grpo.rewards.base import parse_reward_config
from grpo.rewards.runtime import RewardRuntime
from grpo.rewards.styles import Style
from grpo.types import Completion, FinishReason, Outcome, Problem, Score


def completion(text: str, num_tokens: int = 2, problem_id: str = "p0") -> Completion:
    return Completion(
        problem_id=problem_id,
        index=0,
        prompt_ids=(1,),
        token_ids=tuple(range(num_tokens)),
        text=text,
        logprobs=(0.0,) * num_tokens,
        policy_versions=(0,) * num_tokens,
        finish_reason=FinishReason.stop,
    )


def problem(answer: str = "12", number: int = 0, **columns: Any) -> Problem:
    return Problem(id=f"p{number}", prompt="7 + 5 =", answer=answer, columns=columns)


def run(
    function: Callable[..., Any], style: Style, pairs: Sequence[tuple[Completion, Problem]], columns: Mapping[str, str] | None = None
) -> list[Score]:
    return scorer(function, style, columns)([c for c, _ in pairs], [p for _, p in pairs])


# ---- f(gold, completion)


def test_a_grader_of_two_strings() -> None:
    pairs = [(completion("so 12"), problem()), (completion("so 13"), problem())]
    assert run(lambda gold, said: gold in said, Style.grader, pairs) == [Score(value=1.0), Score(value=0.0)]


# ---- verl


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> Any:
    """The four arguments of verl's documentation; chooses by data source, as its default does."""
    if data_source == "openai/gsm8k":
        return float(solution_str.rpartition("####")[2].strip() == ground_truth)
    if data_source == "dict":
        return {"score": 0.5, "acc": True, "pred": solution_str}
    if data_source == "levels":
        return extra_info["level"] / ground_truth["best"]
    if data_source == "no score":
        return {"acc": 1.0}
    raise NotImplementedError(f"Reward function is not implemented for data_source={data_source!r}")


async def compute_score_later(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> Any:
    return compute_score(data_source, solution_str, ground_truth, extra_info)


@pytest.mark.parametrize("function", [compute_score, compute_score_later])
def test_verl(function: Callable[..., Any]) -> None:
    scores = run(
        function,
        Style.verl,
        [
            (completion("5 + 7 is 12\n#### 12"), problem(data_source="openai/gsm8k")),
            (completion("#### 13"), problem(data_source="openai/gsm8k")),
            (completion("so 12"), problem(data_source="dict")),
            (
                completion(""),
                problem(data_source="levels", extra_info={"level": 3}, reward_model={"style": "rule", "ground_truth": {"best": 4}}),
            ),
            (completion(""), problem(data_source="no score")),
            (completion(""), problem()),
        ],
    )
    assert scores[:4] == [Score(value=1.0), Score(value=0.0), Score(value=0.5, detail="acc: True\npred: so 12"), Score(value=0.75)]
    assert (scores[4].outcome, scores[4].detail) == (Outcome.invalid, "returned {'acc': 1.0}, without the key 'score'")
    assert scores[5].outcome is Outcome.error
    assert "NotImplementedError: Reward function is not implemented for data_source=''" in scores[5].detail
    assert "rewards/adapters.py" not in scores[5].detail and Path(__file__).name in scores[5].detail


# ---- OpenRLHF


def reward_tensor(queries: list[str], prompts: list[str], labels: list[str]) -> Any:
    return torch.tensor([float(query == prompt + " " + label) for query, prompt, label in zip(queries, prompts, labels, strict=True)])


def reward_dict(queries: list[str], prompts: list[str], labels: list[str], **kwargs: Any) -> Any:
    rewards = reward_tensor(queries, prompts, labels)
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"length": torch.tensor([float(len(q)) for q in queries])}}


def test_openrlhf() -> None:
    pairs = [(completion(" 12"), problem()), (completion(" 13"), problem())]
    assert run(reward_tensor, Style.openrlhf, pairs) == [Score(value=1.0), Score(value=0.0)]
    # "7 + 5 = 12" has 10 characters
    assert run(reward_dict, Style.openrlhf, pairs) == [Score(value=1.0, detail="length: 10.0"), Score(value=0.0, detail="length: 10.0")]
    (score,) = run(lambda queries, prompts, labels: torch.zeros(3), Style.openrlhf, pairs[:1])
    assert (score.outcome, score.scored) == (Outcome.invalid, False)


# ---- TRL


def seen(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    seen.arguments = {"prompts": prompts, "completions": completions, **kwargs}  # type: ignore[attr-defined]
    return [0.0] * len(completions)


def test_what_trl_functions_are_given() -> None:
    pairs = [(completion("a", 1), problem(level=3, prompt="raw")), (completion("b", 3), problem(level=4, prompt="raw", hint="h"))]
    run(seen, Style.trl, pairs)
    given = seen.arguments  # type: ignore[attr-defined]
    log = given.pop("log_extra")
    assert given == {
        "prompts": ["7 + 5 =", "7 + 5 ="],
        "completions": ["a", "b"],
        "completion_ids": [[0], [0, 1, 2]],
        "level": [3, 4],
        "hint": [None, "h"],
    }
    assert callable(log)


def test_trl_functions_get_messages_where_the_prompt_is_a_chat() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 + 5?"}]
    run(seen, Style.trl, [(completion("12"), problem(prompt=chat))])
    given = seen.arguments  # type: ignore[attr-defined]
    assert given["prompts"] == [chat]
    assert given["completions"] == [[{"role": "assistant", "content": "12"}]]
    run(seen, Style.trl_chat, [(completion("12"), problem())])
    given = seen.arguments  # type: ignore[attr-defined]
    assert given["prompts"] == [[{"role": "user", "content": "7 + 5 ="}]]
    assert given["completions"] == [[{"role": "assistant", "content": "12"}]]


def test_what_trl_functions_may_return() -> None:
    def some(completions: list[str], **kwargs: Any) -> Any:
        kwargs["log_extra"]("words", [len(text.split()) for text in completions])
        return [1, None, 0.5]

    async def later(completions: list[str]) -> Any:  # no **kwargs: gets what it names
        return np.array([len(text) for text in completions])

    pairs = [(completion("a b"), problem()), (completion("c"), problem()), (completion(""), problem())]
    first, none, last = run(some, Style.trl, pairs)
    assert (first, last) == (Score(value=1.0, detail="words: 2"), Score(value=0.5, detail="words: 0"))
    assert none.outcome is Outcome.invalid and not none.scored
    assert [s.value for s in run(later, Style.trl, pairs)] == [3.0, 1.0, 0.0]


def test_columns_can_be_renamed() -> None:
    def accuracy(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
        return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    pairs = [(completion("12"), problem(target="12")), (completion("12"), problem(target="13"))]
    assert [s.value for s in run(accuracy, Style.trl, pairs, {"solution": "target"})] == [1.0, 0.0]
    (missing, _) = run(accuracy, Style.trl, pairs, {"solution": "gold"})
    assert missing.outcome is Outcome.error
    assert "solution is to be the column 'gold', which the data does not have; it has: target" in missing.detail


def test_functions_of_trl_itself() -> None:
    rewards = pytest.importorskip("trl.rewards")
    importlib.import_module("math_verify")
    boxed = [r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", "no idea"]
    pairs = [(completion(text), problem(target=r"$\frac{1}{3}$")) for text in boxed]
    scores = run(rewards.accuracy_reward, Style.trl_chat, pairs, {"solution": "target"})
    assert [s.value for s in scores] == [1.0, 0.0, 0.0]
    assert scores[2].detail == "solution: $\\frac{1}{3}$\ngold_parsed: [1/3, '\\\\frac{1}{3}']\nanswer_parsed: [unparseable]"
    (unparsed,) = run(rewards.accuracy_reward, Style.trl_chat, [(completion("x"), problem(solution=""))])
    assert unparsed.outcome is Outcome.invalid and not unparsed.scored  # TRL's None: left out
    thoughts = [(completion("<think>7 + 5</think>12"), problem()), (completion("<think>12"), problem())]
    assert [s.value for s in run(rewards.think_format_reward, Style.trl_chat, thoughts)] == [1.0, 0.0]
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    # Eq. 13 of DAPO: 80 free, then a linear fall over 20 tokens: (80 − 90) / 20 = −0.5
    assert [s.value for s in run(overlong, Style.trl, [(completion("", n), problem()) for n in (80, 90, 101)])] == [0.0, -0.5, -1.0]


# ---- in the workers, from a configuration

FILE = """
import math

def reward_len(completions, **kwargs):
    return [-abs(4 - len(text)) for text in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "loop":
        while True:
            pass
    return {"score": solution_str == ground_truth}

compute_score.timeout_value = -1.0

def reward_func(queries, prompts, labels, **kwargs):
    if queries[0].endswith("crash"):
        import os
        os._exit(1)
    return {"rewards": [float(q[len(p):] == l) for q, p, l in zip(queries, prompts, labels)]}

def needs_state(completions, trainer_state, **kwargs):
    return [0.0]

def wants_more(data_source, solution_str, ground_truth, extra_info, tokenizer):
    return 0.0

def two(queries, prompts):
    return [0.0]

def half(completion, problem, factor):
    return factor
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "theirs.py"
    path.write_text(FILE)
    return path


def test_every_style_in_the_workers(file: Path) -> None:
    parts = parse_reward_config(
        {
            "trl": {"fn": f"{file}:reward_len", "style": "trl"},
            "verl": {"fn": f"{file}:compute_score", "style": "verl"},
            "openrlhf": {"fn": f"{file}:reward_func", "style": "openrlhf"},
        }
    )
    texts = ["12", "loop", "crash", "13"]
    with RewardRuntime(parts, num_workers=2, cpu_s=0.3) as runtime:
        scores = runtime.score([completion(text) for text in texts], [problem(data_source="d")] * 4)
    assert [s["trl"].value for s in scores] == [-2.0, 0.0, -1.0, -2.0]
    assert [s["verl"].value for s in scores] == [1.0, -1.0, 0.0, 0.0]
    assert scores[1]["verl"].outcome is Outcome.timeout  # the attribute works through the adapter
    assert [s["openrlhf"].value for s in scores[:2]] == [1.0, 0.0] and scores[3]["openrlhf"].value == 0.0
    assert scores[2]["openrlhf"].outcome is Outcome.crash and math.isnan(scores[2]["openrlhf"].value)


@pytest.mark.parametrize(
    ("name", "settings", "key", "said"),
    [
        ("reward_len", {"style": "tlr"}, "reward.a.style", "'tlr' is no style"),
        ("reward_len", {"style": "verl"}, "reward.a.fn", "does not take|needs completions"),
        ("needs_state", {"style": "trl"}, "reward.a.fn", "needs trainer_state"),
        ("wants_more", {"style": "verl"}, "reward.a.fn", "needs tokenizer"),
        ("half", {"style": "verl"}, "reward.a.fn", "needs completion, problem, factor"),
        ("two", {"style": "openrlhf"}, "reward.a.fn", "cannot be called with 3 arguments"),
        ("compute_score", {}, "reward.a.fn", "cannot be called with 2 arguments"),
        ("reward_len", {"style": "trl", "columns": "x"}, "reward.a.columns", "must be a mapping"),
        ("half", {"factor": 1.0, "columns": {"a": "b"}}, "reward.a.columns", "means nothing to style plain"),
        ("half", {"factor": 1.0, "limits": {"cpu": 3}}, "reward.a.limits", "cpu is no limit; there are: cpu_s, wall_s, memory_mb"),
        ("half", {"factor": 1.0, "limits": {"cpu_s": 0}}, "reward.a.limits", "cpu_s is 0"),
    ],
)
def test_a_style_that_does_not_fit_is_refused_before_anything_runs(
    file: Path, name: str, settings: dict[str, Any], key: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_reward_config({"a": {"fn": f"{file}:{name}", **settings}})
    assert caught.value.key == key


def test_arguments_beside_a_foreign_function(file: Path) -> None:
    (part,) = parse_reward_config({"a": {"fn": f"{file}:wants_more", "style": "verl", "tokenizer": "none"}})
    assert run(part.ref.load(), part.style, [(completion("12"), problem())]) == [Score(value=0.0)]
