"""Tasks that verifiers runs: the policy's turns reach it, what it says reaches the policy, and the task's rewards judge.

The tasksets below are verifiers' own kind, run by verifiers itself; what needs the package is skipped without it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.config import ConfigError
from grpo.data import PromptFormat, load_problems
from grpo.data_verifiers import verifiers_tasks
from grpo.plan import plan_without_model
from grpo.recipe import load_recipe
from grpo.rollouts.collect import Groups, collect
from grpo.rollouts.dialogue import Call, ChatTemplate, PlainText, called
from grpo.rollouts.environments import Done, Message
from grpo.rollouts.episode import FAILURE, Episode
from grpo.rollouts.scripted import ScriptedEngine
from grpo.rollouts.verifiers_episodes import VerifiersTask, server
from grpo.rollouts.verifiers_episodes.conversation import Conversation, End, Reply
from grpo.rollouts.verifiers_episodes.environment import reply_of
from grpo.rollouts.verifiers_episodes.server import SERVER, Loop, completion, events
from grpo.toy import Characters
from grpo.types import Completion, FinishReason, Outcome, Problem, Sampling

needs_verifiers = pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason="needs the package verifiers")

SUMS = """\
import os

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class Adder(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "calc"

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        \"\"\"Add two numbers.\"\"\"
        return str(a + b)

    @vf.tool
    async def process(self) -> str:
        \"\"\"Which process this is.\"\"\"
        return str(os.getpid())


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=2.0)
    async def correct(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.25)
    async def whole(self, trace: vf.Trace) -> float:
        return float(not trace.is_truncated)

    @vf.metric
    async def results(self, trace: vf.Trace) -> float:
        return float(len(trace.tool_messages))

    @vf.metric
    async def thought(self, trace: vf.Trace) -> float:
        return float(len(trace.assistant_messages[-1].reasoning_content or ""))


class SumTaskset:
    def load(self):
        for n in range(60):
            yield self.TASK(SumData(prompt=f"{n} + 1 = ?", system_prompt="Use the tool.", answer=str(n + 1)), self.config.task)


if __name__ == "__main__":  # verifiers runs it so, as the tools' server
    Adder.run()
"""
TASKSETS = {
    "toy_sums": SUMS,
    "toy_shared": """\
import verifiers.v1 as vf
from toy_sums import Adder, SumTask, SumTaskset

__all__ = ["Shared"]


class Shared(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask

    def toolsets(self, config):
        return [Adder(vf.SharedToolsetConfig())]
""",
    "toy_own": """\
import verifiers.v1 as vf
from toy_sums import Adder, SumTask, SumTaskset

__all__ = ["Own"]


class OwnTask(SumTask):
    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]


class Own(SumTaskset, vf.Taskset[OwnTask, vf.TasksetConfig]):
    TASK = OwnTask
""",
    "toy_hooks": """\
import verifiers.v1 as vf
from toy_sums import SumData

__all__ = ["Hooked"]


class HookedConfig(vf.TasksetConfig):
    broken: str = ""


class HookedTask(vf.Task[SumData]):
    async def setup(self, trace, runtime):
        if self.data.name == "setup":
            raise RuntimeError("no disk is left")
        await runtime.write("told.txt", b"before")

    async def finalize(self, trace, runtime):
        trace.info["told"] = (await runtime.read("told.txt")).decode()

    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return trace.num_turns == 1 and "enough" in trace.last_reply

    @vf.reward
    async def told(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        if self.data.name == "reward":
            raise RuntimeError("the judge is ill")
        return float(trace.info["told"] == "before" and trace.stop_condition == "enough")


class Hooked(vf.Taskset[HookedTask, HookedConfig]):
    def load(self):
        for n in range(20):
            yield HookedTask(SumData(prompt=f"{n}?", answer="", name=self.config.broken), self.config.task)
""",
    "toy_guarded": """\
import verifiers.v1 as vf
from toy_sums import Adder, SumTask, SumTaskset

__all__ = ["Guarded"]


class GuardedTask(SumTask):
    @vf.intercept
    async def guard(self, request: vf.Request) -> vf.Request | None:
        last = request.messages[-1]
        if last.role != "tool" or last.name != "calc_process":
            return None
        return request.model_copy(update={"messages": [*request.messages[:-1], last.model_copy(update={"content": "not allowed"})]})


class Guarded(SumTaskset, vf.Taskset[GuardedTask, vf.TasksetConfig]):
    TASK = GuardedTask

    def toolsets(self, config):
        return [Adder(vf.SharedToolsetConfig())]
""",
    "toy_guess": """\
import verifiers.v1 as vf
from toy_sums import SumData

__all__ = ["Guessing", "Guesses"]


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class Guessing(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as game:
            said = await game.turn()
            while not said.terminated and said.last_reply != task.data.answer:
                said = await game.turn("higher" if int(said.last_reply) < int(task.data.answer) else "lower")

    async def finalize(self, task, episode):
        episode.traces[0].record_reward("speed", 1 / episode.traces[0].num_turns)


class GuessTask(vf.Task[SumData]):
    pass


class Guesses(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self):
        for n in range(20):
            yield GuessTask(SumData(prompt=f"Which number? ({n})", answer="7"), self.config.task)
""",
    "toy_two": """\
import verifiers.v1 as vf
from toy_sums import SumTask, SumTaskset

__all__ = ["Debate", "Two"]


class DebateConfig(vf.EnvConfig):
    pro: vf.AgentConfig = vf.AgentConfig()
    contra: vf.AgentConfig = vf.AgentConfig()


class Debate(vf.Env[DebateConfig]):
    async def run(self, task, agents):
        await agents.pro.run(task)


class Two(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask
""",
    "toy_timed": """\
import verifiers.v1 as vf
from toy_sums import SumData

__all__ = ["Timed"]


class TimedTask(vf.Task[SumData]):
    @vf.reward
    async def correct(self, trace: vf.Trace) -> float:
        return float(bool(trace.assistant_messages) and trace.last_reply == self.data.answer)


class Timed(vf.Taskset[TimedTask, vf.TasksetConfig]):
    def load(self):
        for n in range(20):
            yield TimedTask(SumData(prompt=f"{n} + 1 = ?", answer=str(n + 1), timeout={"agent": 3.0}), self.config.task)
""",
    "toy_flaky": """\
import verifiers.v1 as vf
from toy_sums import SumTask, SumTaskset

__all__ = ["Flaky"]
FAILURES = ["the port is taken"]


class Flaky(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask

    def toolsets(self, config):
        if FAILURES:
            raise OSError(FAILURES.pop())
        return []
""",
    "toy_stuck": """\
import asyncio

import verifiers.v1 as vf
from toy_sums import SumTask, SumTaskset

__all__ = ["Stuck", "Stucks"]
STARTED, CANCELLED = [], []


class StuckConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class Stuck(vf.Env[StuckConfig]):
    async def run(self, task, agents):
        await agents.agent.run(task)

    async def start(self):
        STARTED.append(1)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            CANCELLED.append(1)
            raise


class Stucks(SumTaskset, vf.Taskset[SumTask, vf.TasksetConfig]):
    TASK = SumTask
""",
    "toy_forgets": """\
import httpx
import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult

__all__ = ["Forgets"]


class Forgets(vf.Harness[vf.HarnessConfig]):
    \"\"\"After its first turn, it asks again with only the turn's end.\"\"\"

    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = True
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        async with httpx.AsyncClient(timeout=None, headers={"Authorization": f"Bearer {secret}"}) as http:
            for said in ([data.prompt], ["a summary", "go on"]):
                messages = [{"role": "user", "content": text} for text in said]
                answer = await http.post(f"{endpoint}/chat/completions", json={"model": ctx.model, "messages": messages})
                answer.raise_for_status()
        return ProgramResult(exit_code=0, stdout="", stderr="")
""",
}


@pytest.fixture(scope="module")
def tasksets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tasksets above, installed. Starting a tool server takes seconds: the tests share what verifiers has running."""
    folder = tmp_path_factory.mktemp("tasksets")
    for name, source in TASKSETS.items():
        (folder / f"{name}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield folder
        VerifiersTask.close_shared()
    for name in TASKSETS:
        sys.modules.pop(name, None)


class Chatty(Characters):
    """Characters with a chat template: ``<role>text</>``, tools as ``<tools>…</>``."""

    chat_template = "yes"

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], tools: Any = None, tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        shown = f"<tools>{json.dumps(tools)}</>" if tools else ""
        return shown + "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + "<assistant>"


def problems(taskset: str, count: int = 1, **settings: Any) -> list[Problem]:
    rows = verifiers_tasks("train", taskset=taskset, size=count, heldout=1, in_environment=True, **settings)
    return load_problems(rows, "train", PromptFormat())


def turn_of(episode: Episode, text: str, reason: FinishReason = FinishReason.stop) -> Completion:
    """What an engine makes of the episode's next turn."""
    request = episode.job(0).request
    return Completion(
        problem_id=request.problem_id, index=0, prompt_ids=request.prompt_ids, token_ids=tuple(map(ord, text)), text=text,
        logprobs=(-1.0,) * len(text), policy_versions=(0,) * len(text), finish_reason=reason,
    )  # fmt: skip


def play(
    problem: Problem, turns: Sequence[str], *, cut: bool = False, environment: Callable[[], Any] = VerifiersTask, room: int = 10_000
) -> Episode:
    """An episode whose policy writes ``turns``; ``cut``: the last one is cut off in its middle."""
    episode = Episode(problem, 0, 0, environment, ChatTemplate(Chatty()), room)
    episode.start()
    for i, text in enumerate(turns):
        if episode.completion is not None:
            break
        last = i == len(turns) - 1
        episode.advance(turn_of(episode, text, FinishReason.length if cut and last else FinishReason.stop))
    return episode


def of_verifiers() -> Loop:
    assert SERVER._running is not None
    return SERVER._running[1]


def wait_until(there: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def values(episode: Episode) -> dict[str, float]:
    return {name: score.value for name, score in episode.scores.items()}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


# ---------------------------------------------------------------- tools, hooks, several turns


@needs_verifiers
@pytest.mark.parametrize("taskset", ["toy-own", "toy-shared"])
def test_a_task_with_tools(tasksets: Path, taskset: str) -> None:
    """Reward: 2 · correct + 0.25 · whole. The prompt shows the tools, and what a tool says is not the policy's."""
    (problem,) = problems(taskset)
    n = int(problem.answer) - 1
    use = f"<think>Add.</think>I add. {call('calc_add', a=n, b=1)}"
    episode = play(problem, [use, f"<think>Got it.</think> {n + 1}"])
    assert values(episode) == {
        "verifiers": 2.25, "vf_correct": 1, "vf_whole": 1, "vf_results": 1, "vf_thought": 7,
    }  # fmt: skip
    prompt = "".join(map(chr, episode.prompt_ids))
    assert prompt.startswith('<tools>[{"type": "function", "function": {"name": "calc_add"')
    assert prompt.endswith(f"</><system>Use the tool.</><user>{n} + 1 = ?</><assistant>")
    whole = episode.completion
    assert whole is not None and whole.finish_reason is FinishReason.stop
    between, last = f"</><tool>{n + 1}</><assistant>", f"<think>Got it.</think> {n + 1}"
    assert "".join(map(chr, whole.token_ids)) == use + between + last
    assert whole.sampled == (True,) * len(use) + (False,) * len(between) + (True,) * len(last)
    assert whole.text == f"{use}\n{last}"
    rollout = episode.rollout({}, {"verifiers": 0.5})
    assert rollout.reward == 0.5 * 2.25


@needs_verifiers
def test_a_call_that_is_none_is_answered_or_ends_the_rollout(tasksets: Path) -> None:
    """An unknown tool and arguments that are no object get an answer, as in verifiers' own loops; what is no JSON is no call."""
    (problem,) = problems("toy-shared")
    wrong = f'{call("nope")}{call("calc_add", a="x", b=1)}<tool_call>{{"name": "calc_add", "arguments": 7}}</tool_call>'
    episode = play(problem, [wrong, '<tool_call>{"name": "calc_add", </tool_call>'])
    assert episode.completion is not None and episode.num_turns == 2
    assert values(episode)["vf_results"] == 3 and values(episode)["vf_correct"] == 0
    said = episode.completion.transcript[1][0]
    assert "error: unknown tool 'nope'" in said and "valid integer" in said and "must be a JSON object, got int" in said


@needs_verifiers
def test_a_hook_may_forbid_a_call(tasksets: Path) -> None:
    """verifiers is asked before each call: one is forbidden, the other made."""
    (problem,) = problems("toy-guarded")
    episode = play(problem, [call("calc_process") + call("calc_add", a=20, b=3), problem.answer])
    assert episode.completion is not None
    assert episode.completion.transcript[1] == ("not allowed\n23", False) and values(episode)["vf_correct"] == 1


@needs_verifiers
def test_setup_finalize_a_stop_and_the_runtime(tasksets: Path) -> None:
    """The stop is looked at before the second model call; finalize and the reward see what setup wrote."""
    (problem,) = problems("toy-hooks")
    episode = play(problem, [f"enough {call('any')}"])
    assert values(episode) == {"verifiers": 1, "vf_told": 1}
    assert episode.scores["verifiers"].detail == "ended by enough"
    assert episode.completion is not None and episode.completion.finish_reason is FinishReason.stop
    assert values(play(problem, ["done"]))["verifiers"] == 0


@needs_verifiers
def test_several_turns_with_an_env_of_the_tasksets_own(tasksets: Path) -> None:
    """Its one agent is called player, its reward comes from the Env: 1 / turns."""
    (problem,) = problems("toy-guess")
    episode = play(problem, ["3", "<think>More?</think>9", "7"])
    assert values(episode) == {"verifiers": 1 / 3, "vf_speed": 1 / 3}
    assert episode.completion is not None
    assert [text for text, own in episode.completion.transcript if not own] == ["higher", "lower"]


# ---------------------------------------------------------------- limits


@needs_verifiers
@pytest.mark.parametrize("end", ["", call("calc_process")])
def test_a_turn_that_is_cut_off_is_scored_as_a_truncated_one(tasksets: Path, end: str) -> None:
    """verifiers sees the turn, and that it is cut: the answer counts, `whole` does not. A call in it leads to no further turn."""
    (problem,) = problems("toy-shared")
    episode = play(problem, [problem.answer + end], cut=True)
    assert values(episode)["verifiers"] == 2 and values(episode)["vf_whole"] == 0
    assert episode.completion is not None and episode.completion.truncated and episode.num_turns == 1


@needs_verifiers
@pytest.mark.parametrize("limit", ["turns", "tokens"])
def test_so_is_a_limit_between_turns(tasksets: Path, limit: str) -> None:
    (problem,) = problems("toy-shared")
    turn = f"{problem.answer} {call('calc_add', a=1, b=1)}"
    if limit == "turns":
        episode = play(problem, [turn], environment=lambda: VerifiersTask(max_turns=1))
    else:
        episode = play(problem, [turn], room=len(turn) + 3)  # "</><tool>…" has no room
    assert episode.completion is not None and episode.completion.truncated and all(episode.completion.sampled)
    assert values(episode)["verifiers"] == 2 and values(episode)["vf_whole"] == 0


# ---------------------------------------------------------------- failures


@needs_verifiers
@pytest.mark.parametrize(("broken", "said"), [("setup", "no disk is left"), ("reward", "the judge is ill")])
def test_a_hook_that_raises_leaves_the_rollout_unscored(tasksets: Path, broken: str, said: str) -> None:
    (problem,) = problems("toy-hooks", broken=broken)
    episode = play(problem, ["hello"])
    failure = episode.scores[FAILURE]
    assert failure.outcome is Outcome.error and said in failure.detail and "toy_hooks.py" in failure.detail
    assert math.isnan(episode.rollout({}, {"verifiers": 1.0}).reward)


@needs_verifiers
def test_a_turn_that_comes_after_verifiers_gave_up_fails_the_rollout(tasksets: Path) -> None:
    """It is right, and verifiers' limit, which counts the time in the queue of our engines, would have it scored as wrong."""
    (problem,) = problems("toy-timed")
    episode = play(problem, [])
    wait_until(lambda: not of_verifiers().rollouts)
    episode.advance(turn_of(episode, problem.answer))
    detail = episode.scores[FAILURE].detail
    assert "gave up while the policy was sampling (ended by agent_timeout)" in detail and "environment.agent.timeout.rollout" in detail
    assert math.isnan(episode.rollout({}, {"verifiers": 1.0}).reward)
    assert values(play(problem, [problem.answer]))["verifiers"] == 1


REPLY = Reply(content="2", reasoning="", calls=(), truncated=False, prompt_tokens=1, completion_tokens=1)


@pytest.mark.parametrize("judged", [True, False], ids=["judged", "being judged"])
@pytest.mark.parametrize(("ok", "reply"), [(True, REPLY), (True, None), (False, REPLY)])
def test_what_verifiers_says_when_it_ends_while_a_turn_is_sampled(judged: bool, ok: bool, reply: Reply | None) -> None:
    """A turn that comes too late is an error. Without one, by a limit of ours, the end stands; so does an end that is an error anyway."""

    async def converse() -> None:
        conversation = Conversation(asyncio.get_running_loop(), lambda given_up: None)
        conversation.trace = SimpleNamespace(stop_condition=None, stop=lambda condition: None)
        call = asyncio.create_task(conversation.reply({"messages": [{"role": "user", "content": "1 + 1"}]}))
        await asyncio.sleep(0)
        assert conversation.next(1) == [Message("user", "1 + 1")]
        conversation.trace.stop_condition = "agent_timeout"
        end = End(conversation.trace, ok, ())
        if judged:
            conversation.end(end)
            conversation.close()
        conversation.answer(reply, last=reply is None)
        await asyncio.sleep(0)
        if not judged:
            conversation.close()
            conversation.end(end)
        if reply is None or (judged and not ok):
            assert conversation.next(1) is end
        else:
            with pytest.raises(RuntimeError, match=r"while the policy was sampling \(ended by agent_timeout\)"):
                conversation.next(1)
        assert await call is None

    asyncio.run(converse())


@needs_verifiers
def test_a_failure_to_serve_is_that_of_the_rollouts_that_met_it(tasksets: Path) -> None:
    (problem,) = problems("toy-flaky")
    assert "could not serve the taskset 'toy-flaky': the port is taken" in play(problem, [problem.answer]).scores[FAILURE].detail
    assert values(play(problem, [problem.answer]))["verifiers"] == 2.25


@needs_verifiers
def test_a_rewritten_history_ends_the_rollout(tasksets: Path) -> None:
    (problem,) = problems("toy-hooks")
    episode = play(problem, ["hello", "again"], environment=lambda: VerifiersTask(agent={"harness": {"id": "toy-forgets"}}))
    assert episode.num_turns == 1
    detail = episode.scores[FAILURE].detail
    assert "the harness rewrote the conversation: message 1 of 2 is not what it was" in detail and "environment.agent.harness" in detail
    assert math.isnan(episode.rollout({}, {"verifiers": 1.0}).reward)


ASKED, TOOL_F = {"role": "user", "content": "?"}, {"type": "function", "function": {"name": "f"}}
SAID = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a":1,"b":2}'}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "3"}]}


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([ASKED, SAID, RESULT], [TOOL_F], None),
        ([ASKED, {**SAID, "content": None, "reasoning_content": "Hm"}, RESULT], [TOOL_F], None),  # the same turn
        ([ASKED, {**SAID, "content": "So"}, RESULT], [TOOL_F], "message 2 of 2 is not what it was"),
        ([ASKED], [TOOL_F], "message 2 of 2 is not what it was"),
        ([ASKED, SAID], [TOOL_F], "it asks for the same turn again"),
        ([ASKED, SAID, RESULT, {"role": "assistant", "content": "3"}], [TOOL_F], "it speaks for the policy"),
        ([ASKED, SAID, RESULT], [], "it offers other tools than before"),
        ([ASKED, SAID, {**RESULT, "content": [{"type": "image_url"}]}], [TOOL_F], "something of type 'image_url'"),
    ],
)
def test_a_model_call_goes_on_from_the_conversation(messages: list[Any], tools: list[Any], message: str | None) -> None:
    reply = Reply(
        content="", reasoning="Hm", calls=(("1", Call("f", '{"b": 2, "a": 1}')),), truncated=False, prompt_tokens=1, completion_tokens=1
    )

    async def converse() -> None:
        conversation = Conversation(asyncio.get_running_loop(), lambda given_up: None)
        conversation.trace = SimpleNamespace(stop_condition=None)
        first = asyncio.create_task(conversation.reply({"messages": [ASKED], "tools": [TOOL_F]}))
        await asyncio.sleep(0)
        assert conversation.next(1) == [Message("tools", json.dumps([TOOL_F])), Message("user", "?")]
        conversation.answer(reply)
        assert await first is reply
        second = asyncio.create_task(conversation.reply({"messages": messages, "tools": tools}))
        await asyncio.sleep(0)
        if message is None:
            assert conversation.next(1) == [Message("tool", "3")]
            conversation.close()
        else:
            with pytest.raises(ValueError, match=message):
                conversation.next(1)
        assert await second is None

    asyncio.run(converse())


@needs_verifiers
def test_verifiers_that_does_not_come_back_is_given_up(tasksets: Path) -> None:
    (problem,) = problems("toy-own")
    environment = VerifiersTask(timeout_s=0.01)  # its tool server takes longer to start
    with pytest.raises(TimeoutError, match=r"did not end for 0\.01 s \(environment\.timeout_s\)"):
        environment.start(problem)


# ---------------------------------------------------------------- many at once, and the end


@needs_verifiers
def test_many_at_once_and_then_nothing_is_left(tasksets: Path) -> None:
    """8 problems × 4: each rollout adds its own numbers with the shared tool, asks for its process, and answers."""

    def answer(prompt: str, index: int, seed: int) -> str:
        question, *results = prompt.split("<user>")[1].split("<tool>")
        n = int(question.split(" ")[0])
        if not results:
            return call("calc_add", a=n, b=1) + call("calc_process")
        return results[0].split("</>")[0] if index else "no"

    class NoParts:
        def score(self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Any = None) -> list[dict[str, Any]]:
            return [{} for _ in completions]

    tokenizer = Chatty()
    groups = Groups(
        engine=ScriptedEngine(tokenizer, answer), runtime=NoParts(), dialogue=ChatTemplate(tokenizer), environment=VerifiersTask,
        sampling=Sampling(max_new_tokens=2000), completions_per_problem=4, weights={"verifiers": 1.0}, seed=0,
    )  # fmt: skip
    made, _ = collect(groups, problems("toy-shared", 8), 1)
    assert [[r.reward for r in group.rollouts] for group in made] == [[0.25, 2.25, 2.25, 2.25]] * 8
    shown = [piece for group in made for r in group.rollouts for piece, own in r.completion.transcript if not own]
    (process,) = {int(piece.split("\n")[1]) for piece in shown}
    port = int(of_verifiers().url.rsplit(":", 1)[1].split("/")[0])
    VerifiersTask.close_shared()
    VerifiersTask.close_shared()
    assert not [thread for thread in threading.enumerate() if thread.name == "verifiers"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert values(play(problems("toy-guess")[0], ["7"]))["verifiers"] == 1, "the next rollout begins all anew"


@needs_verifiers
def test_a_rollout_that_is_given_up_ends_for_verifiers_too(tasksets: Path) -> None:
    (problem,) = problems("toy-guess")
    play(problem, [])  # the loop is there
    before = set(of_verifiers().rollouts)
    episode = play(problem, [])
    (conversation,) = set(of_verifiers().rollouts) - before
    episode.give_up()
    wait_until(lambda: conversation not in of_verifiers().rollouts)


@needs_verifiers
def test_servers_that_are_still_being_started_do_not_hold_up_the_end(tasksets: Path) -> None:
    (problem,) = problems("toy-stuck")
    stuck = sys.modules["toy_stuck"]
    conversation = SERVER.begin(problem, {})
    wait_until(lambda: stuck.STARTED)
    VerifiersTask.close_shared()
    assert stuck.CANCELLED and not [thread for thread in threading.enumerate() if thread.name == "verifiers"]
    with pytest.raises(RuntimeError, match="given up"):
        conversation.next(60)


@needs_verifiers
def test_a_loop_that_takes_its_time_to_end_is_not_mixed_up_with_the_next(tasksets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = problems("toy-guess")
    play(problem, [])
    thread, old = SERVER._running or pytest.fail("it runs")
    monkeypatch.setattr(server, "_TO_CLOSE_S", 0)
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(60)

    old._loop.call_soon_threadsafe(hold)
    assert held.wait(60)
    VerifiersTask.close_shared()  # does not wait for it
    episode = play(problem, ["3"])
    assert of_verifiers() is not old and thread.is_alive()
    go_on.set()
    thread.join(60)
    assert not thread.is_alive() and old.rollouts == {}, "it has ended its own rollouts"
    episode.advance(turn_of(episode, "7"))
    assert values(episode)["verifiers"] == 1 / 2, "and none of the other's"


# ---------------------------------------------------------------- settings

ANY = ("r1_zero_arithmetic", "environment=verifiers", "data=verifiers", "data.problems.taskset=x")


@needs_verifiers
def test_one_preset_makes_data_and_environment_fit(tasksets: Path) -> None:
    settings = ["data=verifiers", "data.problems.size=20", "data.problems.heldout=5", "reward={}"]
    config = load_recipe("r1_zero_arithmetic", *settings, "data.problems.taskset=toy-own", "environment=verifiers")
    made = plan_without_model(config)
    assert dict(made.reward_weights) == {"verifiers": 1.0} and config.eval.metric == "verifiers"
    assert len(made.problems.load()("train", seed=0)) == 20
    with pytest.raises(ConfigError, match=r"it has tool servers\n  → let verifiers run them: environment=verifiers reward=\{\}"):
        verifiers_tasks("train", taskset="toy-own")
    with pytest.raises(ConfigError, match="by the conversation alone: it has an Env of its own"):
        verifiers_tasks("train", taskset="toy-guess")
    with pytest.raises(ConfigError, match=r"several agents act in a rollout of 'toy-two' \(pro, contra\)"):
        verifiers_tasks("train", taskset="toy-two", in_environment=True)


@needs_verifiers
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_turns=0", "max_turns is 0"),
        ("timeout_s=0", "timeout_s is 0"),
        ("agent.harness.id=nope", "harness 'nope' not found"),
        ("agent.runtme.type=docker", "runtme"),
    ],
)
def test_wrong_settings_are_found_before_the_run(setting: str, message: str) -> None:
    config = load_recipe(*ANY, f"environment.{setting}")
    with pytest.raises(ConfigError, match=message):
        plan_without_model(config)


@needs_verifiers
def test_plain_text_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"data\.chat: is false, and .*VerifiersTask speaks in roles"):
        plan_without_model(load_recipe(*ANY, "data.chat=false"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_recipe(*ANY)
    with pytest.raises(ConfigError, match=r"needs the package verifiers: pip install 'grpo-toolkit\[verifiers\]'"):
        plan_without_model(config)


# ---------------------------------------------------------------- turns as messages, messages as tokens


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("42", "42", []),
        (f"So: {call('f', a=1)}\n{call('g')}", "So: ", [("f", '{"a": 1}'), ("g", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),  # the end token cut its end tag off
        ('<tool_call>{"name": "f", "arguments": {"a": "é\\n"}}</tool_call>', "", [("f", '{"a": "é\\n"}')]),
        ('a <tool_call>{"name": "f"}</tool_call>', None, []),
        ("a <tool_call>f(1)</tool_call>", None, []),
        (f"{call('f')}<tool_call>[]</tool_call>", None, []),  # all or none
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None, []),
        ("<tool_call>" + "[" * 100_000, None, []),
    ],
)
def test_tool_calls_in_a_turn(text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    assert called(text) == (text if content is None else content, tuple(Call(*one) for one in calls))


def test_thought_is_no_content_and_calls_in_it_are_none() -> None:
    turn = Completion(
        problem_id="p", index=0, prompt_ids=(1,) * 9, token_ids=(1, 2), text=f"I could {call('f')}</think> No. {call('g')}",
        logprobs=(0.0,) * 2, policy_versions=(0,) * 2, finish_reason=FinishReason.stop,
    )  # fmt: skip
    reply = reply_of(turn, in_thought=True)
    assert (reply.reasoning, reply.content, reply.finish_reason) == (f"I could {call('f')}", " No. ", "tool_calls")
    assert reply.calls == (("call_9_0", Call("g", "{}")),)


@needs_verifiers
def test_a_stream_says_the_same_as_a_whole_answer() -> None:
    from verifiers.v1.dialects.chat import ChatDialect, ChatStreamParser

    reply = Reply(
        content="So", reasoning="Hm", calls=(("a", Call("f", '{"x": 1}')), ("b", Call("g", "{}"))), truncated=False, prompt_tokens=5,
        completion_tokens=2,
    )  # fmt: skip
    parser, dialect = ChatStreamParser(), ChatDialect()
    for event in events(reply).encode().split(b"\n\n")[:-2]:
        parser.feed(event + b"\n\n")
    streamed, whole = parser.finish(), dialect.parse_response(dialect.validate_response(completion(reply)))
    assert (streamed.message, streamed.finish_reason, streamed.usage) == (whole.message, whole.finish_reason, whole.usage)
    assert whole.message.reasoning_content == "Hm" and [c.name for c in whole.message.tool_calls or ()] == ["f", "g"]


def test_the_first_prompt_shows_the_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    opening = [Message("tools", json.dumps(tools)), Message("user", "?")]
    assert ChatTemplate(Chatty()).opening(opening) == tuple(map(ord, f"<tools>{json.dumps(tools)}</><user>?</><assistant>"))

    class Toolless(Chatty):
        def apply_chat_template(self, messages: Any, tools: Any = None, **how: Any) -> str:
            return super().apply_chat_template(messages, **how)

    with pytest.raises(ConfigError, match=r"model\.path: its chat template does not show tools"):
        ChatTemplate(Toolless()).opening(opening)
    with pytest.raises(ConfigError, match=r"data\.chat: is false, and the environment wrote a message of role 'tools'"):
        PlainText(Characters()).opening(opening)


def test_an_environment_hears_of_a_turn_that_was_cut_short() -> None:
    class Hears:
        def start(self, problem: Problem) -> list[Message]:
            return [Message("text", "?")]

        def step(self, completion: Completion) -> Done:
            return Done({"heard": 0.0})

        def cut_short(self, completion: Completion) -> Done:
            return Done({"heard": float(completion.text == "a")})

    problem = Problem(id="p", prompt="?", answer="")
    assert values(play(problem, ["a"], cut=True, environment=Hears)) == {"heard": 1}
    assert values(play(problem, ["a"], environment=Hears)) == {"heard": 0}
