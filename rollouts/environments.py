"""Where the prompts of a rollout come from, and what answers a completion: a question alone, or a conversation with a tool.

An environment belongs to one rollout and is made anew for each, by ``environment:`` of the recipe. Its messages become tokens of the
rollout that are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo.types import Completion, Problem, Score

ONLY_SCORE = "score"  # what a score without a name is called


@dataclass(frozen=True, slots=True)
class Message:
    """``Message("user", "What is 3 + 4?")``. The role ``text`` stands for text that goes to the model as it is, without a chat template:
    what spells a special token is one, so never put a tool's output there.

    A message of role ``tools`` may stand among the first messages: a JSON list of what the policy may call, as chat completions have it
    (``[{"type": "function", "function": {"name": …, "description": …, "parameters": …}}]``). The chat template says how it looks.
    ``grpo.rollouts.dialogue.called`` finds the calls in a turn.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Done:
    """The rollout is over. ``scores``: the environment's own verdict by name, beside those of the recipe's reward parts.

    ``Done(0.5)`` is ``Done({"score": 0.5})``. What a score is worth is said by ``environment.weights`` of the recipe
    (``environment.weights.score=1``); one without a weight is only logged.
    """

    scores: Mapping[str, Score | float] | Score | float | None = None


class Environment(Protocol):
    """One rollout's other side. A further instance is made, and closed, when a run begins, to see whether it can be made.

    It may also carry, as attributes:

    ``timeout_s``  seconds that one call of it may take (default ``grpo.rollouts.guard.TIMEOUT_S``); None: it answers at once.
    ``max_turns``  turns of the policy, after which the rollout counts as cut off (default ``grpo.rollouts.guard.MAX_TURNS``).
    ``at_once``    of the class: calls of all instances that may go on at the same time (default ``grpo.rollouts.guard.AT_ONCE``).
    ``score_names``  what its scores are called, all of them; ``environment.weights`` may then name no other.
    ``stop``       strings that ``rollout.stop`` must hold, so that the policy stops where it wants an answer.
    ``needs_chat``  True: its messages have roles for which only a chat template has a form (``data.chat=true``).
    ``cut_off()``  called, and returning ``Done``, when a limit ends the rollout before the environment did.
    ``cut_short(completion)``  the same, where the limit came in the middle of a turn: that turn, which ``step`` never sees.
    ``close()``    called once, when its rollout is over: done, cut off, failed (a call that was given up for its time may still be going
                   on), or left unfinished at the end of a run, which waits a few seconds for it.
    ``close_shared()``  of the class, without arguments: called when the run ends, for what all its instances share.
    """

    def start(self, problem: Problem) -> Sequence[Message]:
        """What the policy is asked first."""
        ...

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        """What follows on what the policy has just sampled; ``completion`` is this turn alone."""
        ...


class SingleTurn:
    """One prompt, one completion; the reward parts judge it."""

    timeout_s = None
    score_names = ()

    def start(self, problem: Problem) -> Sequence[Message]:
        return (Message("text", problem.prompt),)

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        return Done()
