"""What a recipe asks of its environment before anything is loaded, and what a problem tells an environment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grpo.config import ConfigError
from grpo.data import PromptFormat
from grpo.environment import usable_cores
from grpo.imports import resolve
from grpo.plan import plan_without_model
from grpo.recipe import load_recipe
from grpo.rollouts.environments import SingleTurn
from grpo.rollouts.guard import AT_ONCE, at_once
from grpo.rollouts.python_tool import PythonTool
from grpo.rollouts.verifiers_episodes import VerifiersTask
from grpo.types import Problem

ODD = """\
import threading

from grpo.rollouts.environments import Done, Message


class Odd:
    closed = 0

    def start(self, problem):
        return [Message("text", problem.prompt)]

    def step(self, completion):
        return Done({"won": 1.0})

    def close(self):
        type(self).closed += 1


class Hangs(Odd):
    timeout_s = 0.05

    def __init__(self, rounds: int = 1):
        threading.Event().wait(30 * rounds)


class Leaves(Odd):
    def __init__(self):
        raise SystemExit("no licence")


class Endless(Odd):
    max_turns = None


class Timeless(Odd):
    timeout_s = "soon"


class Crowd(Odd):
    at_once = 0


class Property(Odd):
    @property
    def timeout_s(self):
        raise RuntimeError("nobody knows")


class Rival(Odd):
    score_names = ("won", "accuracy")


class Secret(Odd):
    score_names = ("environment",)


class Chats(Odd):
    needs_chat = True


class Silent(Odd):
    @property
    def score_names(self):
        raise KeyError("names")


class Unnamed(Odd):
    score_names = None


class Unstopped(Odd):
    stop = None


class Letters(Odd):
    stop = "</tool>"


class Speaks(Odd):
    needs_chat = "no"


class Mute(Odd):
    @property
    def step(self):
        raise KeyError("step")


class Changing(Odd):
    @property
    def at_once(self):
        return 64


class Busy(Odd):
    def __init__(self, at_once: int = 64):
        self.at_once = at_once


class Waits(Odd):
    at_once = 64


def made_by_a_function():
    return Waits()


class Stays(Odd):
    def close(self):
        raise OSError("the door is stuck")
"""


@pytest.fixture
def odd(tmp_path: Path) -> str:
    (tmp_path / "odd.py").write_text(f"{ODD}# {tmp_path}")  # a module of its own: its classes count
    return f"environment.fn={tmp_path}/odd.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Hangs", r"environment: .*Hangs cannot be made: the environment did not answer in 0\.05 s \(its timeout_s\)"),
        ("Leaves", r"environment: .*Leaves cannot be made: SystemExit: no licence"),
        ("Endless", r"environment\.fn: .*Endless cannot be used: max_turns is None; it must be a whole number of at least 1"),
        ("Timeless", r"environment\.fn: .*Timeless cannot be used: timeout_s is 'soon'; it must be a finite number above 0, or None"),
        ("Crowd", r"environment\.fn: .*Crowd cannot be used: at_once is 0; it must be a whole number of at least 1"),
        ("Property", r"environment\.fn: .*Property cannot be used: RuntimeError: nobody knows"),
        ("Rival", r"reward\.accuracy: .*Rival gives a score of this name\n  → give the reward part another name"),
        ("Secret", r"environment\.fn: 'environment' cannot be the name of a score"),
        ("Chats", r"data\.chat: is false, and .*Chats speaks in roles, for which only a chat template has a form\n  → set data\.chat=true"),
        ("Silent", r"environment\.fn: .*Silent cannot be used: KeyError: 'names'"),
        ("Unnamed", r"environment\.fn: .*Unnamed cannot be used: score_names is None; it must be a list or tuple of strings"),
        ("Unstopped", r"environment\.fn: .*Unstopped cannot be used: stop is None; it must be a list or tuple of strings"),
        ("Letters", r"environment\.fn: .*Letters cannot be used: stop is '</tool>'; it must be a list or tuple of strings"),
        ("Speaks", r"environment\.fn: .*Speaks cannot be used: needs_chat is 'no'; it must be true or false"),
        ("Mute", r"environment\.fn: .*Mute cannot be used: KeyError: 'step'"),
        ("Changing", r"environment\.fn: .*Changing cannot be used: at_once is a property, but it is read before there is an instance"),
        ("Busy", r"environment\.at_once: is 64 in what .*Busy makes, but what counts is that of .*Busy itself: 8\n  → set it there"),
        ("Stays", r"environment\.fn: close\(\) of .*Stays failed, before anything was asked of it: OSError: the door is stuck"),
    ],
)
def test_an_environment_that_cannot_work_is_known_before_the_run(odd: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_without_model(load_recipe("tiny_digits", f"{odd}:{name}"))


def test_a_timeout_of_the_class_counts_where_there_are_arguments(odd: str) -> None:
    with pytest.raises(ConfigError, match=r"did not answer in 0\.05 s"):
        plan_without_model(load_recipe("tiny_digits", f"{odd}:Hangs", "environment.rounds=1"))


def test_what_needs_a_chat_template_and_has_one_is_welcome(odd: str) -> None:
    plan_without_model(load_recipe("tiny_digits", f"{odd}:Chats", "data.chat=true"))


def test_the_name_of_a_failure_is_no_name_of_a_score(odd: str) -> None:
    part = ["reward.environment.fn=grpo.rewards.math.accuracy"]
    with pytest.raises(ConfigError, match=r"reward\.environment: 'environment' cannot be the name of a score"):
        plan_without_model(load_recipe("tiny_digits", *part))
    with pytest.raises(ConfigError, match=r"environment\.weights\.environment: 'environment' cannot be the name of a score"):
        plan_without_model(load_recipe("tiny_digits", f"{odd}:Odd", "environment.weights.environment=1"))


def test_the_one_that_is_made_to_see_whether_it_can_be_is_closed(odd: str) -> None:
    made = plan_without_model(load_recipe("tiny_digits", f"{odd}:Odd"))
    assert made.environment.function().closed == 1


@pytest.mark.parametrize("name", ["Endless", "Timeless", "Crowd", "Property", "Rival", "Chats", "Silent", "Letters", "Busy"])
def test_one_that_is_refused_is_closed_too(odd: str, name: str) -> None:
    recipe = load_recipe("tiny_digits", f"{odd}:{name}")
    made = resolve(recipe.environment, "environment", positional=0).function()
    with pytest.raises(ConfigError):
        plan_without_model(recipe)
    assert made.closed == 1


def test_calls_at_once_are_no_argument(odd: str) -> None:
    with pytest.raises(ConfigError, match=r"environment\.at_once: is 9 in what .*Busy makes"):
        plan_without_model(load_recipe("tiny_digits", f"{odd}:Busy", "environment.at_once=9"))
    plan_without_model(load_recipe("tiny_digits", f"{odd}:Busy", "environment.at_once=8"))
    plan_without_model(load_recipe("tiny_digits", f"{odd}:made_by_a_function"))


def test_who_computes_has_a_core_for_each_call_and_who_waits_has_many() -> None:
    assert at_once(PythonTool) == usable_cores()
    assert at_once(VerifiersTask) > 100
    assert at_once(SingleTurn) == AT_ONCE == 8, "the number of the docs"


def test_a_problem_has_its_text_without_the_chat_template_too() -> None:
    form = PromptFormat(template="{q} = ?", prompt_key="q", chat=lambda text: f"<user>{text}<assistant>")
    problem = form.problem({"q": "1 + 1", "answer": 2}, "train", 0)
    assert (problem.prompt, problem.question) == ("<user>1 + 1 = ?<assistant>", "1 + 1 = ?")
    plain = PromptFormat(prompt_key="q").problem({"q": "1 + 1", "answer": 2}, "train", 0)
    assert plain.prompt == plain.question == "1 + 1"
    assert Problem(id="p", prompt="1 + 1", answer="2").question == "1 + 1"


def test_a_question_that_is_empty_stays_empty_in_the_template() -> None:
    form = PromptFormat(prompt_key="q", chat=lambda text: f"<user>{text}<assistant>")
    problem = form.problem({"q": "", "answer": 2}, "train", 0)
    assert (problem.prompt, problem.question) == ("<user><assistant>", "")
    assert replace(Problem(id="p", prompt="", answer="2"), prompt="<user><assistant>").question == ""
