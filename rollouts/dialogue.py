"""Messages → tokens: as plain text, or in the model's chat template.

A rollout is never rendered and encoded as a whole: what the policy sampled stays as it is, and only what comes behind it is encoded.
In a template that is found by rendering a conversation with a placeholder for the policy's turn, and taking what follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config import ConfigError
from grpo.rollouts.environments import Message
from grpo.types import Completion

TEXT, TOOL, TOOLS = "text", "tool", "tools"  # roles that mean something here; all others are the template's affair

_TURN = "⟨the policy's turn⟩"
_QUESTION = {"role": "user", "content": "?"}  # some templates refuse a conversation that begins with an answer


class PlainText:
    """For models that go on writing: messages of role ``text`` as they are, and a tool's output between ``<output>`` and ``</output>``.

    Args:
        special_tokens: begin the prompt with what the tokenizer begins a text with. Off where the prompt is a rendered chat template,
            which writes its own.
    """

    def __init__(self, tokenizer: Any, *, special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens

    def opening(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(self._tokenizer(self._text(messages), add_special_tokens=self._special_tokens).input_ids)

    def reply(self, messages: Sequence[Message], turn: Completion) -> tuple[int, ...]:
        return tuple(self._tokenizer(self._text(messages), add_special_tokens=False).input_ids)

    def _text(self, messages: Sequence[Message]) -> str:
        return "".join(self._shown(message) for message in messages)

    def _shown(self, message: Message) -> str:
        if message.role == TEXT:
            return message.content
        if message.role == TOOL:
            return f"\n<output>\n{harmless(message.content, self._tokenizer)}\n</output>\n"
        raise ConfigError(
            "data.chat",
            f"is false, and the environment wrote a message of role {message.role!r}, which plain text has no form for",
            "data.chat=true uses the model's chat template; in plain text, a message has the role text or tool",
        )


class ChatTemplate:
    """For models that converse: messages in the tokenizer's chat template, each reply with the opening of the policy's next turn.

    Messages of role ``text`` stand as they are, outside the template; in one answer, all messages have that role or none.

    Where a template shows earlier turns otherwise than they were sampled (without their thoughts, say), the rollout keeps them as sampled.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not show a turn as it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template\n  → set data.chat=false, or choose an instruct model")
        self._tokenizer = tokenizer
        self._raw = PlainText(tokenizer, special_tokens=False)
        self._special = frozenset(_special_tokens(tokenizer))
        self._behind_turn([_QUESTION])

    def opening(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if _all_text(messages):
            return self._raw.opening(messages)
        tools = [tool for message in messages if message.role == TOOLS for tool in json.loads(message.content)]
        said = [{"role": message.role, "content": message.content} for message in messages if message.role != TOOLS]
        text = self._render(said, tools)
        if tools and text == self._render(said):
            what = "its chat template does not show tools, and the environment has some"
            raise ConfigError("model.path", what, "choose a model that was taught to use tools")
        return self._encode(text)

    def reply(self, messages: Sequence[Message], turn: Completion) -> tuple[int, ...]:
        if _all_text(messages):
            return self._raw.reply(messages, turn)
        tokens = self._encode(
            self._behind_turn([{"role": message.role, "content": harmless(message.content, self._tokenizer)} for message in messages])
        )
        if tokens[0] in self._special and turn.token_ids[-1:] == tokens[:1]:  # the policy ended its turn itself
            return tokens[1:]
        return tokens

    def _behind_turn(self, messages: list[dict[str, str]]) -> str:
        """What the template writes behind a turn that these messages follow: the turn's end, the messages, the next turn's beginning."""
        _, found, behind = self._render([_QUESTION, {"role": "assistant", "content": _TURN}, *messages]).partition(_TURN)
        if not found or not behind:
            raise ValueError(
                "the model's chat template does not write the assistant's turns as they are, so nothing can be put behind a sampled one"
                "\n  → data.chat=false, with a template of your own in data.template"
            )
        return behind

    def _render(self, messages: list[dict[str, str]], tools: Sequence[Any] = ()) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=True)
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)


def _all_text(messages: Sequence[Message]) -> bool:
    texts = [message.role == TEXT for message in messages]
    if any(texts) and not all(texts):
        raise ValueError("the environment mixed messages of role text with others in one answer; text stands outside a chat template")
    return all(texts)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call of the policy's: ``Call(name="add", arguments='{"a": 3, "b": 4}')``."""

    name: str
    arguments: str  # JSON


_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def called(text: str) -> tuple[str, tuple[Call, ...]]:
    """What a turn says before its tool calls, and these, written as ``<tool_call>{"name": …, "arguments": …}</tool_call>`` (Hermes, Qwen).

    As vLLM's parser of that name has it: if one of them cannot be read, there is none, and the turn is its text.
    """
    try:
        found = tuple(_call(json.loads(written)) for written in _CALL.findall(text))
    except (ValueError, LookupError, TypeError, RecursionError):
        return text, ()
    return (text.partition("<tool_call>")[0] if found else text), found


def _call(written: Any) -> Call:
    name, arguments = written["name"], json.dumps(written["arguments"], ensure_ascii=False)
    (name + arguments).encode()  # half a surrogate pair is JSON, and no text
    return Call(name, arguments)


def harmless(content: str, tokenizer: Any) -> str:
    """Text from outside in which no special token is left, so that a tool's output cannot end its message and open another's.

    The first character of a special token's text is set off by a space: ``<|im_end|>`` becomes ``< |im_end|>``.
    """
    names = sorted(filter(None, _special_tokens(tokenizer).values()), key=len, reverse=True)
    pattern = "|".join(map(re.escape, names))
    return re.sub(pattern, lambda match: f"{match[0][0]} {match[0][1:]}", content) if names else content


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id → text of the tokens that steer a model, not those that a vocabulary was merely enlarged by."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
