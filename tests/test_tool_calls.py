"""Tools in the policy's text: the first prompt shows them, and calls are read out of its turns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from grpo.config import ConfigError
from grpo.rollouts.dialogue import Call, ChatTemplate, PlainText, called
from grpo.rollouts.environments import Message
from grpo.toy import Characters

from .played_episodes import Chatty, call


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
