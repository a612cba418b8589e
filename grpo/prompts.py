"""Rows as the model reads them: its tokenizer, its chat template, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from grpo.config import Config, ConfigError
from grpo.data import check_prompts
from grpo.plan import Plan
from grpo.rollouts.dialogue import TEXT, ChatTemplate, PlainText
from grpo.rollouts.environments import Message, SingleTurn
from grpo.rollouts.episode import Dialogue
from grpo.types import Problem


def make_tokenizer(folder: str, config: Config) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)


def chat_format(tokenizer: Any) -> Callable[[str], str]:
    if not tokenizer.chat_template:
        raise ConfigError(
            "data.chat", "is true, but the model's tokenizer has no chat template", "set data.chat=false, or choose an instruct model"
        )
    return partial(_as_chat, tokenizer)


def in_chat(problems: Sequence[Problem], tokenizer: Any) -> list[Problem]:
    chat = chat_format(tokenizer)
    return [replace(problem, prompt=chat(problem.prompt)) for problem in problems]


def _as_chat(tokenizer: Any, prompt: str) -> str:
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return text


def make_dialogue(tokenizer: Any, chat: bool) -> Dialogue:
    if not chat:
        return PlainText(tokenizer)
    try:
        return ChatTemplate(tokenizer)
    except ValueError as error:
        raise ConfigError("data.chat", f"is true, but {error}") from error


def check_rows(splits: Mapping[str, Sequence[Problem]], checked: Plan, tokenizer: Any, room: int) -> None:
    """``check_prompts`` of every split. What an environment of the user's asks first is known when it asks."""
    if checked.environment.target != f"{SingleTurn.__module__}.{SingleTurn.__name__}":
        return
    dialogue, config = make_dialogue(tokenizer, checked.config.data.chat), checked.config
    for split, problems in splits.items():
        check_prompts(problems, split, lambda prompt: len(dialogue.opening((Message(TEXT, prompt),))), room, config.rollout.max_new_tokens)
