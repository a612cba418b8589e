"""verifiers' loop and servers, which all rollouts share: many at once, and nothing of them is left at the end."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo.rollouts.collect import Groups, collect
from grpo.rollouts.dialogue import ChatTemplate
from grpo.rollouts.scripted import ScriptedEngine
from grpo.rollouts.verifiers_episodes import VerifiersTask, server
from grpo.rollouts.verifiers_episodes.server import SERVER
from grpo.types import Completion, Problem, Sampling

from .played_episodes import Chatty, call, needs_verifiers, of_verifiers, play, problems, turn_of, values, wait_until


@needs_verifiers
def test_many_at_once_and_then_nothing_is_left(toy_tasksets: Path) -> None:
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
def test_a_rollout_that_is_given_up_ends_for_verifiers_too(toy_tasksets: Path) -> None:
    (problem,) = problems("toy-guess")
    play(problem, [])  # the loop is there
    before = set(of_verifiers().rollouts)
    episode = play(problem, [])
    (conversation,) = set(of_verifiers().rollouts) - before
    episode.give_up()
    wait_until(lambda: conversation not in of_verifiers().rollouts)


@needs_verifiers
def test_servers_that_are_still_being_started_do_not_hold_up_the_end(toy_tasksets: Path) -> None:
    (problem,) = problems("toy-stuck")
    stuck = sys.modules["toy_stuck"]
    conversation = SERVER.begin(problem, {})
    wait_until(lambda: stuck.STARTED)
    VerifiersTask.close_shared()
    assert stuck.CANCELLED and not [thread for thread in threading.enumerate() if thread.name == "verifiers"]
    with pytest.raises(RuntimeError, match="given up"):
        conversation.next(60)


@needs_verifiers
def test_a_loop_that_takes_its_time_to_end_is_not_mixed_up_with_the_next(toy_tasksets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
