"""A task that verifiers runs, as an environment."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.rewards.arguments import number, whole
from grpo.rewards.text import begins_in_thought
from grpo.rewards.verifiers import NEEDED, parts_of
from grpo.rollouts.dialogue import called
from grpo.rollouts.environments import Done, Message
from grpo.rollouts.verifiers_episodes.conversation import Conversation, End, Reply
from grpo.rollouts.verifiers_episodes.server import SERVER
from grpo.types import Completion, Problem, Score

SCORE = "verifiers"  # the weighted sum of the task's rewards; each reward and each metric is a score besides, vf_NAME


class VerifiersTask:
    """What verifiers asks in a rollout of the problem's task, and what the task's rewards say in the end.

    Turns reach verifiers as a server with a reasoning parser and a parser of Hermes' tool calls hands them over: the thought apart, and
    ``<tool_call>{"name": …, "arguments": …}</tool_call>`` as tool calls. If one of a turn's calls cannot be read, the turn makes none: to
    most harnesses it is the answer then, and the last. Needs ``data=verifiers`` and ``data.chat=true``.

    A rollout that one of our limits ends is scored as verifiers scores one that ran out of tokens. One whose harness rewrites what was said
    before (compaction, sub-agents, a second conversation) fails: what was sampled would not be what is trained.

    Args:
        max_turns: of the policy.
        timeout_s: for verifiers to come back with the next model call, or the end.
        agent: settings of verifiers' ``AgentConfig``, such as ``{harness: {id: bash}, runtime: {type: docker}}``. Without them, a plain
            loop of turns and tool calls in this process, and the runtime ``subprocess``: what tools and hooks do is done on this machine.
            verifiers' ``timeout.rollout`` (else the task's ``timeout.agent``) also counts the time in which the policy samples, and waits
            to; a rollout whose turn comes after it fails.

    Raises:
        ImportError: verifiers is not installed.
        ValueError: an argument that cannot work.
    """

    at_once = 512  # they wait for verifiers, most of the time
    needs_chat = True

    def __init__(self, max_turns: int = 16, timeout_s: float = 600.0, agent: Mapping[str, Any] | None = None) -> None:
        whole("max_turns", max_turns, least=1)
        number("timeout_s", timeout_s, above=0)
        if importlib.util.find_spec("verifiers") is None:
            raise ImportError(f"this environment needs the package verifiers: {NEEDED}")
        self.max_turns = max_turns
        self.timeout_s = timeout_s + 5  # a step gives up by itself before
        self._patience = timeout_s
        self._agent = _checked(agent or {})
        self._in_thought = False  # the prompt ends inside a thought
        self._conversation: Conversation

    def start(self, problem: Problem) -> Sequence[Message]:
        self._in_thought = begins_in_thought(problem)
        self._conversation = SERVER.begin(problem, self._agent)
        first = self._conversation.next(self._patience)
        if isinstance(first, End):
            verdict(first)  # raises what went wrong
            raise RuntimeError("verifiers ended the rollout before it asked the policy anything")
        return first

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        self._conversation.answer(reply_of(completion, self._in_thought))
        following = self._conversation.next(self._patience)
        return verdict(following) if isinstance(following, End) else following

    def cut_short(self, completion: Completion) -> Done:
        """A limit ended this turn in its middle: verifiers gets it, marked as such, and may make no further call."""
        return self._end(reply_of(completion, self._in_thought))

    def cut_off(self) -> Done:
        """A limit came between two turns: the model call that waits is refused."""
        return self._end(None)

    def close(self) -> None:
        """A rollout that is not played to its end, because it failed or is given up, ends for verifiers too: further calls are refused."""
        if hasattr(self, "_conversation"):  # it was started
            with contextlib.suppress(RuntimeError):  # verifiers' loop is over already
                self._conversation.answer(None, last=True)

    @staticmethod
    def close_shared() -> None:
        """End what verifiers has running, its servers and its loop; the next rollout begins all anew."""
        SERVER.close()

    def _end(self, reply: Reply | None) -> Done:
        self._conversation.answer(reply, last=True)
        end = self._conversation.next(self._patience)
        assert isinstance(end, End), "after the last answer no call is passed on"
        return verdict(end)


def _checked(agent: Mapping[str, Any]) -> dict[str, Any]:
    from verifiers.v1 import AgentConfig

    AgentConfig.model_validate(dict(agent))
    return dict(agent)


def reply_of(turn: Completion, in_thought: bool) -> Reply:
    """A turn as verifiers' model server would give it."""
    thought, said = parts_of(turn.text, in_thought)
    content, calls = called(said)
    so_far = len(turn.prompt_ids)  # grows from turn to turn, so that all calls of a rollout have different ids
    return Reply(
        content=content,
        reasoning=thought,
        calls=tuple((f"call_{so_far}_{i}", call) for i, call in enumerate(calls)),
        truncated=turn.truncated,
        prompt_tokens=so_far,
        completion_tokens=len(turn.token_ids),
    )


def verdict(end: End) -> Done:
    """The task's scores.

    Raises:
        RuntimeError: verifiers counts the rollout as failed, or left a reward out.
    """
    trace = end.trace
    if not end.ok or trace is None:
        raise RuntimeError("verifiers' rollout failed: " + ("\n".join(end.errors) or "it does not say why"))
    if missing := [name for name, reward in trace.rewards.items() if reward is None]:
        raise RuntimeError(f"verifiers did not score the rollout: there is no {', '.join(missing)} (ended by {trace.stop_condition})")
    single = {name: reward.score for name, reward in trace.rewards.items()}
    single |= {name: metric for name, metric in trace.metrics.items() if metric is not None}
    truncated = ", truncated" if trace.is_truncated else ""
    in_all = Score(value=float(trace.reward), detail=f"ended by {trace.stop_condition}{truncated}")
    return Done({SCORE: in_all, **{f"vf_{name}": value for name, value in single.items()}})
