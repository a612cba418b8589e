"""Episodes whose turns the test writes, under the tasksets of tests/tasksets or an environment of its own."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from grpo.data import PromptFormat, load_problems
from grpo.data_verifiers import verifiers_tasks
from grpo.rollouts.dialogue import ChatTemplate
from grpo.rollouts.episode import Episode
from grpo.rollouts.verifiers_episodes import VerifiersTask
from grpo.rollouts.verifiers_episodes.server import SERVER, Loop
from grpo.toy import Characters
from grpo.types import Completion, FinishReason, Problem

needs_verifiers = pytest.mark.skipif(importlib.util.find_spec("verifiers") is None, reason="needs the package verifiers")


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
