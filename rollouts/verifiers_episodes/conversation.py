"""One rollout of verifiers', seen from the policy: its model calls on their way to the environment, the turns on their way back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.rollouts.dialogue import TOOLS, Call
from grpo.rollouts.environments import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A turn of the policy, for the model call that waits for it."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, Call], ...]  # with their ids
    truncated: bool
    prompt_tokens: int
    completion_tokens: int

    @property
    def message(self) -> dict[str, Any]:
        """As chat completions write it."""
        calls = [{"id": i, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for i, c in self.calls]
        message = {"role": "assistant", "content": self.content, "reasoning_content": self.reasoning, "tool_calls": calls}
        return {name: value for name, value in message.items() if value or name in ("role", "content")}

    @property
    def finish_reason(self) -> str:
        return "length" if self.truncated else "tool_calls" if self.calls else "stop"


@dataclass(frozen=True, slots=True)
class End:
    """verifiers is done with the rollout."""

    trace: Any  # verifiers' record of it; None if it did not come so far
    ok: bool
    errors: tuple[str, ...]


class Conversation:
    """``next`` and ``answer`` are for the environment, in its thread; everything else happens on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, give_up: Callable[[Conversation], None]) -> None:
        self.trace: Any = None
        self._loop, self._give_up = loop, give_up
        self._coming: queue.SimpleQueue[Sequence[Message] | End | BaseException] = queue.SimpleQueue()
        self._call: asyncio.Future[Reply | None] | None = None  # the model call, while it waits
        self._said: list[_Gist] = []  # so far
        self._tools: Any = None
        self._over = False  # by a limit of ours
        self._end: End | None = None  # that came while a call waited; told in place of the call's answer

    def next(self, timeout_s: float) -> Sequence[Message] | End:
        """What verifiers says next.

        Raises:
            ValueError: it does not go on from what was said.
            TimeoutError: it says nothing.
        """
        try:
            coming = self._coming.get(timeout=timeout_s)
        except queue.Empty:
            coming = TimeoutError(f"verifiers made no model call and did not end for {timeout_s:g} s (environment.timeout_s)")
        if isinstance(coming, BaseException):
            with contextlib.suppress(RuntimeError):  # the loop is over already
                self._loop.call_soon_threadsafe(self._give_up, self)
            raise coming
        return coming

    def answer(self, reply: Reply | None, *, last: bool = False) -> None:
        """Let the call that waits return; None refuses it. After the ``last`` answer, all calls are refused."""
        self._loop.call_soon_threadsafe(self._answer, reply, last)

    def end(self, end: End) -> None:
        """Verifiers is done. What was asked is answered first: a turn that comes too late must not be judged as if it had been seen."""
        if self._waiting is not None:
            self._end = end
        else:
            self.put(end)

    def put(self, what: Sequence[Message] | End | BaseException) -> None:
        self._coming.put(what)

    async def reply(self, body: Mapping[str, Any]) -> Reply | None:
        """What the policy says to a model call; None: it says no more."""
        if self._over:
            self._cut_off()
            return None
        try:
            messages = self._new(body)
        except ValueError as error:
            self.put(error)
            return None
        self._call = self._loop.create_future()
        self.put(messages)
        return await self._call

    def close(self) -> None:
        """Nobody will answer the call that still waits, if there is one."""
        if (call := self._waiting) is not None:
            call.set_result(None)

    @property
    def _waiting(self) -> asyncio.Future[Reply | None] | None:
        return None if self._call is None or self._call.done() else self._call

    def _answer(self, reply: Reply | None, last: bool) -> None:
        self._over = last
        call, end = self._waiting, self._end
        if end is not None and (reply is None or not end.ok):
            self.put(end)
        elif reply is not None and (end is not None or (call is not None and self.trace.stop_condition is not None)):
            self.put(_too_late(self.trace.stop_condition))
            self.close()
        elif call is not None:  # else verifiers has failed meanwhile, and says so
            if reply is None:
                self._cut_off()
            else:
                self._said.append(_Gist.of(reply.message))
            call.set_result(reply)

    def _cut_off(self) -> None:
        self.trace.stop("max_total_tokens")  # one of verifiers' limits: the rollout counts as truncated, not as failed

    def _new(self, body: Mapping[str, Any]) -> list[Message]:
        """What a model call says beyond the conversation so far.

        Raises:
            ValueError: it does not go on from there.
        """
        if self._waiting is not None:
            raise _rewritten("it makes several model calls at once")
        said, tools = [_Gist.of(message) for message in body["messages"]], body.get("tools") or []
        before, new = said[: len(self._said)], said[len(self._said) :]
        if self._said:
            if changed := [i for i, gist in enumerate(self._said) if before[i : i + 1] != [gist]]:
                raise _rewritten(f"message {changed[0] + 1} of {len(self._said)} is not what it was")
            if tools != self._tools:
                raise _rewritten("it offers other tools than before")
            if not new or any(gist.role == "assistant" for gist in new):
                raise _rewritten("it speaks for the policy" if new else "it asks for the same turn again")
        elif any(gist.calls for gist in new):
            raise ValueError("the task's prompt holds tool calls, which have no form in a first prompt")
        opening = [] if self._said or not tools else [Message(TOOLS, json.dumps(tools))]
        self._said, self._tools = said, tools
        return opening + [Message(gist.role, gist.text) for gist in new]


def _too_late(condition: str | None) -> RuntimeError:
    return RuntimeError(
        f"verifiers gave up while the policy was sampling (ended by {condition}): the rewards do not see this turn\n"
        "  → a longer timeout, or none: it counts sampling too (environment.agent.timeout.rollout, else the task's timeout.agent)"
    )


def _rewritten(how: str) -> ValueError:
    return ValueError(
        f"the harness rewrote the conversation: {how}. What the policy sampled would not be what is trained\n"
        "  → a harness that keeps one conversation, such as the default one (environment.agent.harness)"
    )


@dataclass(frozen=True, slots=True)
class _Gist:
    """What of a message must stay as it was. Not a turn's reasoning: harnesses may leave it out, the rollout keeps it as sampled."""

    role: str
    text: str
    calls: tuple[tuple[str, str, str], ...]
    answers: str  # the id of a call

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> _Gist:
        calls = tuple(
            (call["id"], call["function"]["name"], _normal(call["function"]["arguments"])) for call in message.get("tool_calls") or ()
        )
        return cls(message["role"], _text(message.get("content")), calls, message.get("tool_call_id") or "")


def _text(content: Any) -> str:
    if isinstance(content, list):
        if other := [part.get("type") for part in content if part.get("type") != "text"]:
            raise ValueError(f"the task shows the policy something of type {other[0]!r}, and it reads text alone")
        return "".join(part["text"] for part in content)
    return content or ""


def _normal(arguments: str) -> str:
    """However a harness lays JSON out."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except ValueError:
        return arguments
