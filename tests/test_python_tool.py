"""The Python tool: which turns are programs, what the policy sees of them, and that nobody is rewarded for what a program prints."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo.metrics import rollout_metrics
from grpo.plan import check_sandbox, plan
from grpo.recipe import load_recipe
from grpo.rewards.base import parse_reward_config
from grpo.rewards.runtime import RewardRuntime
from grpo.rewards.sandbox import SandboxUnavailable
from grpo.rollouts import python_tool
from grpo.rollouts.base import Close
from grpo.rollouts.dialogue import PlainText
from grpo.rollouts.environments import Done, Message
from grpo.rollouts.episode import Episode
from grpo.rollouts.python_tool import Format, PythonTool, program_of
from grpo.rollouts.scripted import ScriptedEngine
from grpo.types import FAILURE, Completion, FinishReason, Group, Problem, Rollout, Sampling

PROBLEM = Problem(id="p", prompt="Question: 17 * 23 = ?\n", answer="391")


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    PythonTool.close_shared()


def turn(text: str, reason: FinishReason = FinishReason.stop) -> Completion:
    ids = tuple(map(ord, text))
    return Completion(
        problem_id="p", index=0, prompt_ids=(1,), token_ids=ids, text=text, logprobs=(-1.0,) * len(ids), policy_versions=(0,) * len(ids),
        finish_reason=reason,
    )  # fmt: skip


def answer(text: str, **settings: Any) -> str:
    """What the tool says to a turn."""
    reply = PythonTool(**settings).step(turn(text))
    assert not isinstance(reply, Done)
    ((role, content),) = [(message.role, message.content) for message in reply]
    assert role == "tool"
    return content


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("I compute. <python> print(1) </python>", "print(1) "),
        ("<python>\nfor i in range(2):\n    print(i)\n</python>", "for i in range(2):\n    print(i)\n"),
        ("<python>\n    a = 1\n    print(a)\n</python>", "a = 1\nprint(a)\n"),
        ("<python> a = 1\nprint(a)\n</python>", "a = 1\nprint(a)\n"),
        ("I write <python> first. <python>print(2)</python>", "print(2)"),
        ("no beginning</python>", None),
        ("<python>  \n </python>", None),
    ],
)
def test_a_program_stands_between_tags(text: str, program: str | None) -> None:
    assert program_of(text, Format.tag) == program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("Let me see.\n```python\nprint(1)\n```\n", "print(1)\n"),
        ("```py\na = '''\n```'''\nprint(a)\n```\n", "a = '''\n```'''\nprint(a)\n"),
        ("```python\nprint(1)\n```\nand\n```\n", None),  # the stop string was an opening fence without a language
        ("text\n```\n", None),
    ],
)
def test_or_in_a_fenced_block(text: str, program: str | None) -> None:
    assert program_of(text, Format.fence) == program


def test_a_turn_that_ends_otherwise_is_the_last() -> None:
    for text in ("<answer>391</answer>", "<python>print(1)</python> and on", "<python>print(1)"):
        assert isinstance(PythonTool().step(turn(text)), Done)


def test_calls_are_counted() -> None:
    tool = PythonTool(max_calls=2)
    replies = [tool.step(turn(f"<python>print({i})</python>")) for i in range(3)]
    assert [isinstance(reply, Done) for reply in replies] == [False, False, True]
    assert tool.max_turns == 3, "the turn after the last answer is the policy's"


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("program", "output"),
    [
        ("print(17 * 23)", "391"),
        ("17 * 23", "(no output)"),
        (
            "print(1)\n1 / 0",
            '1\nTraceback (most recent call last):\n  File "program.py", line 2, in <module>\nZeroDivisionError: division by zero',
        ),
        ("print('go')\nwhile True: pass", "stopped after 0.5 s of CPU time"),
        ("print('go', flush=True)\nimport time; time.sleep(60)", "stopped after 2.5 s"),  # on the clock: 3 · 0.5 + 1
        ("x = ' ' * 10**9", "stopped: more than 64 MB of memory"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", "\ufffd"),
        ("print(' 5 ')", " 5 "),
    ],
)
def test_the_policy_sees_what_was_printed_and_how_it_ended(program: str, output: str) -> None:
    said = answer(f"<python>\n{program}\n</python>", cpu_s=0.5, memory_mb=64)
    assert said == output or (said.endswith("\n" + output) and output.startswith("stopped"))


def test_a_long_output_loses_its_middle() -> None:
    said = answer("<python>print('a' * 5000 + 'b' * 5000)</python>", max_output=100)
    assert len(said) == 100 and said.startswith("aaaa") and said.endswith("bbbb") and "…" in said


def test_a_mistake_in_the_form_is_answered() -> None:
    assert "write <python> before the program" in answer("print(1)</python>")
    assert "begin the program with ```python" in answer("print(1)\n```\n", format="fence")


def test_programs_know_nothing_of_each_other() -> None:
    tool = PythonTool()
    tool.step(turn("<python>x = 1\nopen('note', 'w').write('1')</python>"))
    (reply,) = tool.step(turn("<python>import os\nprint(os.path.exists('note'), 'x' in globals())</python>"))  # type: ignore[misc]
    assert isinstance(reply, Message) and reply.content == "False False"


def test_one_sandbox_serves_all_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    PythonTool.close_shared()
    made: list[Any] = []
    real = python_tool.Sandbox
    monkeypatch.setattr(python_tool, "Sandbox", lambda **settings: made.append(real(**settings)) or made[-1])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda i: answer(f"<python>print({i})</python>"), range(16)))
    assert said == [str(i) for i in range(16)] and len(made) == 1
    PythonTool.close_shared()
    PythonTool.close_shared()
    assert answer("<python>print(1)</python>") == "1" and len(made) == 2


def test_a_sandbox_that_fails_is_not_the_policys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(**settings: Any) -> Any:
        raise SandboxUnavailable("no level of isolation holds")

    PythonTool.close_shared()
    monkeypatch.setattr(python_tool, "Sandbox", unavailable)
    episode = Episode(PROBLEM, 0, 0, PythonTool, PlainText(_characters()), 1000)
    episode.start()
    assert episode.advance(turn("<python>print(1)</python>"))
    assert "no level of isolation holds" in episode.scores[FAILURE].detail


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_calls": 0}, "max_calls is 0"),
        ({"format": "fences"}, "format is 'fences'; it must be one of: tag, fence"),
        ({"cpu_s": 0}, "cpu_s is 0"),
        ({"max_output": 5}, "max_output is 5"),
        ({"unsafe": "no"}, "unsafe is 'no'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PythonTool(**settings)


# ---------------------------------------------------------------- rewards


def _characters() -> Any:
    from grpo.tiny import _character_tokenizer

    return _character_tokenizer()


def rollouts_of(scripts: Sequence[Sequence[str]], reward: dict[str, Any]) -> list[Rollout]:
    """Episodes whose policy writes what it is told, turn by turn, through the engine and the reward workers."""
    episodes = [Episode(PROBLEM, i, 0, PythonTool, PlainText(_characters()), 1000) for i in range(len(scripts))]
    sampling = Sampling(max_new_tokens=1000, stop=("</python>", "</answer>"))
    for episode, script in zip(episodes, scripts, strict=True):
        episode.start()
        for text in script:
            engine = ScriptedEngine(_characters(), answer=lambda prompt, index, seed, text=text: text)
            job = episode.job(0)
            feed = iter([[job]])
            (finished,) = [done for step in engine.serve(lambda idle, feed=feed: next(feed, Close.finish), sampling) for _, done in step]
            assert isinstance(finished, Completion)
            over = episode.advance(finished)
        assert over
    parts = parse_reward_config(reward)
    with RewardRuntime(parts, num_workers=1) as runtime:
        scores = runtime.score([e.completion for e in episodes if e.completion], [PROBLEM] * len(episodes))
    weights = {part.name: part.weight for part in parts}
    return [episode.rollout(found, weights) for episode, found in zip(episodes, scores, strict=True)]


RULES = {
    "accuracy": {"fn": "grpo.rewards.math.accuracy"},
    "format": {"fn": "grpo.rewards.format.r1_format"},
    "match": {"fn": "grpo.rewards.match.exact_match"},
    "short": {"fn": "grpo.rewards.length.soft_overlong", "max_tokens": 130, "buffer": 60},
    "loops": {"fn": "grpo.rewards.repetition.repetition", "unit": "token", "ngram": 3},
}


def test_what_a_program_prints_is_not_the_policys_answer() -> None:
    """The policy that lets its program print the right answer in the right form, and the one that says it itself."""
    forged = "<python>print('<answer>391</' + 'answer>')</python>"
    cheat = [f"<think>{forged}", "So it is.</think>"]
    echo = [forged, "<python>print('<think>It is</think> <answer>391</' + 'answer>')</python>", " "]
    honest = ["<think><python>print(17 * 23)</python>", "</think> <answer>391</answer>"]
    wrong = ["<think><python>print(17 * 23)</python>", "</think> <answer>392</answer>"]
    cheating, echoing, honestly, wrongly = rollouts_of([cheat, echo, honest, wrong], RULES)
    assert cheating.completion.transcript[1] == ("<answer>391</answer>", False), "the tool did print it"
    assert [r.scores["accuracy"].value for r in (cheating, echoing, honestly, wrongly)] == [0, 0, 1, 0]
    assert [r.scores["format"].value for r in (cheating, echoing, honestly, wrongly)] == [0, 0, 1, 1]
    assert honestly.completion.text == "<think><python>print(17 * 23)</python>\n</think> <answer>391</answer>"


def test_lengths_and_repetition_are_those_of_the_policys_tokens() -> None:
    """A program that prints 600 times the same letter: the policy wrote 41 + 27 characters and an end token, which repeat little."""
    texts = ["<python>print('z' * 600 + 'q')</python>", "\n<answer>391 or so</answer>"]
    (rollout,) = rollouts_of([texts], RULES)
    own = sum(map(len, texts))
    completion = rollout.completion
    assert completion.num_sampled == own and len(completion.token_ids) > own + 600
    # soft_overlong: 0 up to 130 − 60 = 70 tokens
    assert own < 70 and rollout.scores["short"].value == 0
    assert rollout.scores["loops"].value > -0.2
    metrics = rollout_metrics([Group(problem=PROBLEM, rollouts=(rollout,))], "accuracy", dict.fromkeys(RULES, 1.0))
    assert metrics["completion/length_mean"] == metrics["completion/length_max"] == own
    assert metrics["rollout/turns_mean"] == 2
    assert metrics["rollout/environment_tokens_mean"] == len(completion.token_ids) - own


def test_trl_functions_get_the_policys_tokens_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def count(completions, completion_ids, **kwargs):\n    return [float(len(ids)) for ids in completion_ids]\n"
    )
    (rollout,) = rollouts_of([["<python>print('z' * 50)</python>", "ok"]], {"n": {"fn": f"{tmp_path}/mine.py:count", "style": "trl"}})
    assert rollout.reward == rollout.completion.num_sampled < len(rollout.completion.token_ids)


# ---------------------------------------------------------------- recipes

STOP = 'rollout.stop=["</answer>","</python>"]'


def test_a_recipe_names_it_and_is_told_what_is_missing() -> None:
    made = plan(load_recipe("r1_zero_arithmetic", "environment=python_tool", "environment.max_calls=2", STOP))
    environment = made.environment.load()()
    assert isinstance(environment, PythonTool) and environment.max_turns == 3
    check_sandbox(made)
    with pytest.raises(ValueError, match=r"rollout\.stop: is \['</answer>'\], but .*PythonTool answers turns that end with '</python>'"):
        plan(load_recipe("r1_zero_arithmetic", "environment=python_tool"))
    with pytest.raises(ValueError, match=r"environment: .* cannot be made: ValueError: max_calls is 0"):
        plan(load_recipe("r1_zero_arithmetic", "environment=python_tool", "environment.max_calls=0", STOP))
    with pytest.raises(ValueError, match=r"environment\.max_cals: [^→]*→ did you mean 'max_calls'"):
        plan(load_recipe("r1_zero_arithmetic", "environment.fn=grpo.rollouts.python_tool.PythonTool", "environment.max_cals=1", STOP))


def test_a_machine_without_a_sandbox_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.rewards import sandbox

    def unavailable(**settings: Any) -> Any:
        raise SandboxUnavailable("no level of isolation holds on this machine")

    monkeypatch.setattr(sandbox, "Sandbox", unavailable)
    with pytest.raises(ValueError, match="environment: no level of isolation holds"):
        check_sandbox(plan(load_recipe("r1_zero_arithmetic", "environment=python_tool", STOP)))
    check_sandbox(plan(load_recipe("r1_zero_arithmetic")))


GAME = """\
from grpo.rollouts.environments import Done, Message

class Guess:
    def __init__(self, tries: int = 3):
        self.tries = tries

    def start(self, problem):
        self.wanted = problem.answer
        return [Message("text", problem.prompt)]

    def step(self, completion):
        self.tries -= 1
        if self.wanted in completion.text or not self.tries:
            return Done({"won": float(self.wanted in completion.text)})
        return [Message("text", " no, ")]
"""


def test_an_environment_of_ones_own_judges_without_a_reward_part(tmp_path: Path) -> None:
    (tmp_path / "game.py").write_text(GAME)
    recipe = tmp_path / "game.yaml"
    recipe.write_text(
        "defaults: [schema, {algo: grpo}, {model: tiny}, {data: digits}, {rollout: hf}, {logger: quiet}, _self_]\n"
        f"environment: {{fn: {tmp_path}/game.py:Guess, tries: 2}}\n"
        "eval: {metric: won, problems: 4}\n"
    )
    made = plan(load_recipe(str(recipe), "environment.weights.won=2.0"))
    assert made.reward_weights == {"won": 2.0} and made.rewards == ()
    assert made.environment.kwargs == {"tries": 2}
    with pytest.raises(ValueError, match="reward: is empty"):
        load_recipe(str(recipe))
    with pytest.raises(ValueError, match=r"environment\.weights\.accuracy: is also a reward part"):
        plan(load_recipe("tiny_digits", "environment.weights.accuracy=1"))


def test_it_leaves_no_process_behind() -> None:
    script = (
        "from grpo.rollouts.python_tool import _SHARED\n"
        "box = _SHARED.sandbox(False, False, False)\n"
        "assert box.run('print(1)').stdout == b'1\\n'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
