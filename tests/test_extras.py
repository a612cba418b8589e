"""Tasks of reasoning-gym and of verifiers as data and reward. What needs the packages is skipped without them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo import data_reasoning_gym
from grpo.config import ConfigError
from grpo.data import PromptFormat, Row, check_disjoint, load_problems
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
    [
        ({"task": "no_such"}, "'no_such' not registered"),
        ({"task": "chain_sum", "min_trms": 1}, "min_trms"),
        ({"task": "chain_sum", "heldout": 0}, r"^data.problems.heldout: is 0, .*\n.*eval.problems=0"),
        ({"task": "chain_sum", "size": 0}, "^data.problems.size: is 0"),
        ({"task": "time_intervals", "min_date": date(2000, 1, 1)}, "date is not JSON serializable; write it as text"),
        ({"task": "composite", "datasets": [{"name": "chain_sum", "config": {"min_trms": 1}}]}, "min_trms"),
    ],
)
def test_wrong_settings_of_a_task_are_named(arguments: dict[str, Any], message: str) -> None:
    from grpo.data_reasoning_gym import reasoning_gym

    with pytest.raises(ConfigError, match=message):
        reasoning_gym("train", **arguments)


HASHED = ("codeio", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")  # walk through sets


@needs_gym
def test_problems_are_the_same_in_every_process() -> None:
    """Else a resumed run would go on with other problems, and no two figures on held-out ones could be compared."""
    program = "import json, sys; from grpo.data_reasoning_gym import *; print(json.dumps(reasoning_gym(**json.loads(sys.argv[1]))))"
    order = {"split": "train", "task": "composite", "datasets": [{"name": name} for name in HASHED], "size": 24, "heldout": 12}
    for split in ("train", "heldout"):
        one, other = (
            subprocess.run(
                [sys.executable, "-c", program, json.dumps({**order, "split": split})],
                env={**os.environ, "PYTHONHASHSEED": hash_seed},
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
            for hash_seed in ("1", "2")
        )
        assert one == other
    sources = {ast.literal_eval(row["reasoning_gym"]["entry"])["metadata"]["source_dataset"] for row in json.loads(one)}
    assert len(sources) >= 4, "twelve draws from six"


@needs_gym
def test_gold_answers_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where entries hold tuples (arc_agi) or numpy's strings (knights_knaves)."""
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # of the workers
    _check_gold([*HASHED, "arc_agi", "knights_knaves"], count=2)


@needs_gym
@pytest.mark.full
def test_gold_answers_of_every_task_are_right() -> None:
    from reasoning_gym.factory import DATASETS

    _check_gold(sorted(DATASETS.keys() - {"composite"}), count=2)


def _check_gold(tasks: list[str], count: int) -> None:
    from grpo.data_reasoning_gym import reasoning_gym

    found = [problem for task in tasks for problem in problems(reasoning_gym, "train", task=task, size=count, heldout=1)]
    assert len(found) == count * len(tasks)
    with_gold = [problem for problem in found if problem.answer]  # few tasks only say what is right when they see it
    assert len(with_gold) > 0.9 * len(found)
    judged = scores("grpo.rewards.reasoning_gym.score", [(f"<answer>{problem.answer}</answer>", problem) for problem in with_gold])
    assert {problem.id: score for problem, score in zip(with_gold, judged, strict=True) if score.value != 1} == {}


@needs_gym
def test_an_answer_that_the_task_cannot_read_is_wrong_and_not_unscored() -> None:
    from grpo.data_reasoning_gym import reasoning_gym

    (problem,) = problems(reasoning_gym, "heldout", task="prime_factorization", heldout=1)
    broken = {**problem.columns["reasoning_gym"], "entry": "{'question': '?', 'answer': 'many', 'metadata': {}}"}
    said = [("<answer>two times three</answer>", problem), ("<answer>2</answer>", replace(problem, columns={"reasoning_gym": broken}))]
    unread, ill = scores("grpo.rewards.reasoning_gym.score", said)
    assert (unread.value, unread.outcome) == (0, Outcome.wrong_format) and "cannot read it: ValueError: invalid literal" in unread.detail
    assert not ill.scored and ill.outcome is Outcome.error, "its gold answer cannot be read either"


@needs_gym
def test_a_mixture_of_tasks_each_with_its_settings() -> None:
    """A sum of two terms has one operator; words in capitals are what an enum's member, which YAML cannot write, asks for."""
    from grpo.data_reasoning_gym import reasoning_gym

    datasets = [
        {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "allow_negation": False}},
        {"name": "word_sorting", "weight": 2, "config": {"transformation": "uppercase"}},
    ]
    mixed = problems(reasoning_gym, "heldout", task="composite", datasets=datasets, heldout=30)
    sums = [problem for problem in mixed if problem.answer.lstrip("-").isdigit()]
    words = [problem for problem in mixed if problem not in sums]
    assert len(words) > len(sums) > 0
    assert all(len(re.findall(r"\d+ [+-] \d+", problem.prompt)) == 1 for problem in sums)
    assert all(problem.answer == problem.answer.upper() for problem in words)
    judged = scores("grpo.rewards.reasoning_gym.score", [(f"<answer>{problem.answer}</answer>", problem) for problem in mixed])
    assert {score.value for score in judged} == {1}


class Generator:
    """Of problems that count how often they were made, as reasoning-gym's data sets look from outside."""

    def __init__(self, metadata: list[dict[str, Any]]) -> None:
        self.metadata, self.made = metadata, 0

    def __len__(self) -> int:
        return len(self.metadata)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.made += 1
        return {"question": f"{index}?", "answer": str(self.made), "metadata": self.metadata[index]}


def generated(monkeypatch: pytest.MonkeyPatch, *metadata: dict[str, Any]) -> list[Row]:
    monkeypatch.setattr("grpo.data_reasoning_gym.dataset", lambda task, settings: Generator(list(metadata)))
    return data_reasoning_gym._rows("train", "t", seed=0, wanted=5, settings={}, without=frozenset())


def test_only_problems_that_can_be_stored_exactly_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """No literal says NaN, infinity or an object; numpy's scalars are numbers and strings like others."""
    rows = generated(
        monkeypatch,
        {"pair": (1, [2.5])},
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": object()},
        {"x": np.float64(0.1), np.str_("y"): {np.int64(3)}},
    )
    assert [row["id"] for row in rows] == ["t/train/0", "t/train/4"]
    entries = [row["reasoning_gym"]["entry"] for row in rows]
    assert entries[0] == "{'question': '0?', 'answer': '1', 'metadata': {'pair': (1, [2.5])}}"
    assert entries[1] == "{'question': '4?', 'answer': '5', 'metadata': {'x': 0.1, 'y': {3}}}"
    with pytest.raises(ValueError, match=r"what no Python literal says.*'x': inf"):
        generated(monkeypatch, {"x": float("inf")})


def test_programs_that_return_something_else_each_time_are_no_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = generated(monkeypatch, {"source_dataset": "codeio"}, {"source_dataset": "chain_sum"})
    assert [row["id"] for row in rows] == ["t/train/1"]


def test_a_generator_that_dies_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    died = r"task 'chain_sum' with \{\}: the process that generates the problems was ended by signal 9\n  → what it wrote to stderr"
    with pytest.raises(ConfigError, match=died):
        data_reasoning_gym.reasoning_gym("train", task="chain_sum")


GYM_OF_ONE_TASK = """\
import types, sys  # the real one

print("Have a nice day!")


def create_dataset(task, **settings):
    if task == "quits":
        sys.exit(0)
    return [{"question": "1?", "answer": str(types.SimpleNamespace(one=1).one), "metadata": {}}]
"""


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A folder with a reasoning_gym of its own, and modules that are called as some of the standard library's."""
    package = tmp_path / "notebook" / "reasoning_gym"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(GYM_OF_ONE_TASK)
    (package / "factory.py").write_text("DATASETS = {}\n")
    (package / "composite.py").write_text("DatasetSpec = None\n")
    for name in ("types", "random"):
        (package.parent / f"{name}.py").write_text("raise RuntimeError('a file of the user')\n")
    return package.parent


def test_a_generators_process_imports_as_ours_and_may_print(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    startup = tmp_path / "startup"
    startup.mkdir()
    (startup / "sitecustomize.py").write_text("print('hello from the machine')\n")
    monkeypatch.chdir(notebook)
    monkeypatch.setattr(sys, "path", ["", str(startup), *sys.path])
    order = {"split": "heldout", "task": "one", "seed": 0, "size": 1, "heldout": 1, "settings": {}}
    answer = data_reasoning_gym._in_a_child(order)
    assert [row["answer"] for row in answer.get("rows", [])] == ["1"], answer
    ended = data_reasoning_gym._in_a_child({**order, "task": "quits"})
    assert ended["error"] == "the process that generates the problems exited with code 0" and "stderr" in ended["remedy"]


def test_a_problem_without_its_entry_is_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.rewards import reasoning_gym as reward

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    completion = Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=(1,), text="<answer>1</answer>", logprobs=(0.0,), policy_versions=(0,),
        finish_reason=FinishReason.stop,
    )  # fmt: skip
    stored = Problem(id="p", prompt="?", answer="1", columns={"reasoning_gym": {"task": "chain_sum", "settings": {}, "index": 0}})
    with pytest.raises(ValueError, match="problem 'p' has no column 'reasoning_gym' with its entry"):
        reward.score(completion, stored)


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
