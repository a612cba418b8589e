"""Tasks that verifiers runs: the policy's turns reach it, what it says reaches the policy, and the task's rewards judge.

The tasksets (tests/tasksets) are verifiers' own kind, run by verifiers itself; what needs the package is skipped without it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.rollouts.environments import Done, Message
from grpo.rollouts.verifiers_episodes import VerifiersTask
from grpo.types import Completion, FinishReason, Problem

from .played_episodes import call, needs_verifiers, play, problems, values

# ---------------------------------------------------------------- tools, hooks, several turns


@needs_verifiers
@pytest.mark.parametrize("taskset", ["toy-own", "toy-shared"])
def test_a_task_with_tools(toy_tasksets: Path, taskset: str) -> None:
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
def test_a_call_that_is_none_is_answered_or_ends_the_rollout(toy_tasksets: Path) -> None:
    """An unknown tool and arguments that are no object get an answer, as in verifiers' own loops; what is no JSON is no call."""
    (problem,) = problems("toy-shared")
    wrong = f'{call("nope")}{call("calc_add", a="x", b=1)}<tool_call>{{"name": "calc_add", "arguments": 7}}</tool_call>'
    episode = play(problem, [wrong, '<tool_call>{"name": "calc_add", </tool_call>'])
    assert episode.completion is not None and episode.num_turns == 2
    assert values(episode)["vf_results"] == 3 and values(episode)["vf_correct"] == 0
    said = episode.completion.transcript[1][0]
    assert "error: unknown tool 'nope'" in said and "valid integer" in said and "must be a JSON object, got int" in said


@needs_verifiers
def test_a_hook_may_forbid_a_call(toy_tasksets: Path) -> None:
    """verifiers is asked before each call: one is forbidden, the other made."""
    (problem,) = problems("toy-guarded")
    episode = play(problem, [call("calc_process") + call("calc_add", a=20, b=3), problem.answer])
    assert episode.completion is not None
    assert episode.completion.transcript[1] == ("not allowed\n23", False) and values(episode)["vf_correct"] == 1


@needs_verifiers
def test_setup_finalize_a_stop_and_the_runtime(toy_tasksets: Path) -> None:
    """The stop is looked at before the second model call; finalize and the reward see what setup wrote."""
    (problem,) = problems("toy-hooks")
    episode = play(problem, [f"enough {call('any')}"])
    assert values(episode) == {"verifiers": 1, "vf_told": 1}
    assert episode.scores["verifiers"].detail == "ended by enough"
    assert episode.completion is not None and episode.completion.finish_reason is FinishReason.stop
    assert values(play(problem, ["done"]))["verifiers"] == 0


@needs_verifiers
def test_several_turns_with_an_env_of_the_tasksets_own(toy_tasksets: Path) -> None:
    """Its one agent is called player, its reward comes from the Env: 1 / turns."""
    (problem,) = problems("toy-guess")
    episode = play(problem, ["3", "<think>More?</think>9", "7"])
    assert values(episode) == {"verifiers": 1 / 3, "vf_speed": 1 / 3}
    assert episode.completion is not None
    assert [text for text, own in episode.completion.transcript if not own] == ["higher", "lower"]


# ---------------------------------------------------------------- limits


@needs_verifiers
@pytest.mark.parametrize("end", ["", call("calc_process")])
def test_a_turn_that_is_cut_off_is_scored_as_a_truncated_one(toy_tasksets: Path, end: str) -> None:
    """verifiers sees the turn, and that it is cut: the answer counts, `whole` does not. A call in it leads to no further turn."""
    (problem,) = problems("toy-shared")
    episode = play(problem, [problem.answer + end], cut=True)
    assert values(episode)["verifiers"] == 2 and values(episode)["vf_whole"] == 0
    assert episode.completion is not None and episode.completion.truncated and episode.num_turns == 1


@needs_verifiers
@pytest.mark.parametrize("limit", ["turns", "tokens"])
def test_so_is_a_limit_between_turns(toy_tasksets: Path, limit: str) -> None:
    (problem,) = problems("toy-shared")
    turn = f"{problem.answer} {call('calc_add', a=1, b=1)}"
    if limit == "turns":
        episode = play(problem, [turn], environment=lambda: VerifiersTask(max_turns=1))
    else:
        episode = play(problem, [turn], room=len(turn) + 3)  # "</><tool>…" has no room
    assert episode.completion is not None and episode.completion.truncated and all(episode.completion.sampled)
    assert values(episode)["verifiers"] == 2 and values(episode)["vf_whole"] == 0


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
