"""Between verifiers' model calls and the policy's turns: what goes on the conversation, what ends it, and how a turn is answered."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.rollouts.dialogue import Call
from grpo.rollouts.environments import Message
from grpo.rollouts.verifiers_episodes.conversation import Conversation, End, Reply
from grpo.rollouts.verifiers_episodes.environment import reply_of
from grpo.rollouts.verifiers_episodes.server import completion, events
from grpo.types import Completion, FinishReason

from .played_episodes import call, needs_verifiers

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
