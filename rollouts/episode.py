"""One rollout in the making: its turns so far, and the next one to be sampled.

Token in, token out: what was sampled is never decoded and encoded again. The rollout is one sequence, the prompt first, in which
the tokens of the environment stand between those of the policy, marked as not sampled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from grpo.config import ConfigError
from grpo.rewards.base import combine
from grpo.rollouts.base import Begun, Job
from grpo.rollouts.environments import Environment, Message
from grpo.rollouts.guard import EnvironmentFailed, Guarded, Verdict, at_once
from grpo.types import FAILURE, Completion, FinishReason, Outcome, Problem, Request, Rollout, Score


class Dialogue(Protocol):
    """Messages → tokens. A ``ConfigError`` ends the run: the recipe is wrong. Whatever else it raises is put down to the messages."""

    def opening(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt of the first turn."""
        ...

    def reply(self, messages: Sequence[Message], turn: Completion) -> tuple[int, ...]:
        """What stands between a turn, as sampled, and the next: the turn's end if the policy left it out, and the messages."""
        ...


class Episode:
    """A rollout from its first prompt to its last token.

    ``start``, and ``advance`` with the finished turn, may take as long as the environment does; they are not called on the thread that
    keeps the engines busy. An environment that fails (``grpo.rollouts.guard``) ends its rollout, which stays unscored and has the
    traceback: that is not the policy's fault, and no reason to end a run.

    Args:
        index: which rollout of its problem's group.
        seed: of the first turn's request; later turns draw from seeds made of it.
        max_new_tokens: tokens after the first prompt, those of the environment included.
        max_prompt: tokens of the first prompt that the engine has room for beside them.
    """

    def __init__(
        self,
        problem: Problem,
        index: int,
        seed: int,
        environment: Callable[[], Environment],
        dialogue: Dialogue,
        max_new_tokens: int,
        max_prompt: float = math.inf,
    ) -> None:
        self.problem = problem
        self.index = index
        self.begun = Begun()  # of the turn that is being sampled
        self.scores: dict[str, Score] = {}  # the environment's own, when it is over
        self.completion: Completion | None = None  # the whole, when it is over
        self._seed = seed
        self._make_environment = environment
        self._environment: Guarded | None = None
        self._dialogue = dialogue
        self._max_new_tokens, self._max_prompt = max_new_tokens, max_prompt
        self._prompt_ids: tuple[int, ...] = ()
        self._begun_behind: tuple[int, ...] | None = None
        self._pieces: list[_Piece] = []

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Of the first turn; empty before ``start``."""
        return self._prompt_ids

    def go_on_behind(self, prompt_ids: Sequence[int], begun: Begun) -> None:
        """Before ``start``: the first turn has these tokens already, if its prompt is that one."""
        self._begun_behind, self.begun = tuple(prompt_ids), begun

    @property
    def num_turns(self) -> int:
        """Turns that are finished."""
        return sum(piece.sampled for piece in self._pieces)

    @property
    def at_once(self) -> int:
        """How many of such rollouts may be with their environments at the same time."""
        return at_once(self._make_environment)

    def start(self) -> None:
        """Ask the environment for the first prompt. Then there is a turn to be sampled, unless it failed and ``completion`` is there."""
        try:
            self._environment = Guarded(self._make_environment)
            self._prompt_ids = self._opening(self._environment.start(self.problem))
        except EnvironmentFailed as failure:
            self._prompt_ids = self._dialogue.opening((_stand_in(self.problem),))
            self._end(FinishReason.stop, {FAILURE: failure.score})
        else:
            if self._begun_behind not in (None, self._prompt_ids):  # the environment asks something else this time
                self.begun = Begun()

    def job(self, number: int) -> Job:
        """The turn to be sampled next, or to go on with."""
        request = Request(
            problem_id=self.problem.id,
            prompt_ids=(*self._prompt_ids, *chain.from_iterable(piece.token_ids for piece in self._pieces)),
            num_completions=1,
            seed=turn_seed(self._seed, self.num_turns),
            max_new_tokens=self._num_left,
        )
        return Job(number, request, self.index, self.begun)

    def advance(self, turn: Completion) -> bool:
        """Take a finished turn; True if that was the last.

        The rollout ends when the environment is done; or, cut off (``FinishReason.length``), when the turn was, at the environment's bound
        on turns, or when its answer leaves no room for another token. An answer that nothing is sampled after is left out altogether:
        nothing could be trained on it.
        """
        assert self._environment is not None, "started"
        self.begun = Begun()
        self._pieces.append(_Piece.of_turn(turn))
        try:
            if not turn.truncated:
                answer = self._environment.step(turn)
                if isinstance(answer, Verdict):
                    return self._end(FinishReason.stop, answer.scores)
                tokens = self._formed(answer, lambda: self._dialogue.reply(answer, turn))
                if len(tokens) < self._num_left and self.num_turns < self._environment.max_turns:
                    self._pieces.append(_Piece.of_environment(tokens, answer, after=turn))
                    return False
            return self._end(FinishReason.length, self._environment.cut_off(turn).scores)
        except EnvironmentFailed as failure:
            return self._end(turn.finish_reason, {FAILURE: failure.score})

    def give_up(self) -> None:
        """Nobody will go on with it: its environment is closed, if that is not done yet, whatever comes of it."""
        if self.completion is None and self._environment is not None:
            with suppress(EnvironmentFailed):
                self._environment.close()

    def rollout(self, parts: Mapping[str, Score], weights: Mapping[str, float]) -> Rollout:
        """The episode when it is over, with what the reward parts say of it: see ``judged``."""
        assert self.completion is not None, "a rollout is judged when it is over"
        return judged(self.problem, self.completion, parts, self.scores, weights)

    @property
    def _num_left(self) -> int:
        """Tokens that the rollout may still have."""
        return self._max_new_tokens - sum(len(piece.token_ids) for piece in self._pieces)

    def _opening(self, messages: Sequence[Message]) -> tuple[int, ...]:
        tokens = self._formed(messages, lambda: self._dialogue.opening(messages))
        if not tokens:
            raise EnvironmentFailed("what the environment asks first is empty, and a policy needs something to go on from")
        if len(tokens) > self._max_prompt:
            raise EnvironmentFailed(
                f"what the environment asks first is {len(tokens)} tokens long, and beside rollout.max_new_tokens={self._max_new_tokens} "
                f"the engine has room for {self._max_prompt}: ask less, lower that, or raise max_model_len in rollout.engine_args"
            )
        return tokens

    def _formed(self, messages: Sequence[Message], form: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """``form()``; what it cannot form are the environment's messages."""
        _check_templated_once(messages, self.problem)
        try:
            return form()
        except ConfigError:
            raise
        except Exception as error:
            raise EnvironmentFailed.because_of(error) from error

    def _end(self, reason: FinishReason, scores: Mapping[str, Score]) -> bool:
        try:
            if self._environment is not None:
                self._environment.close()
        except EnvironmentFailed as failure:
            scores = {FAILURE: failure.score, **scores}  # an earlier failure stays
        self.scores = dict(scores)
        self.completion = _joined(self.problem.id, self.index, self._prompt_ids, self._pieces, reason)
        return True


def judged(
    problem: Problem, completion: Completion, parts: Mapping[str, Score], own: Mapping[str, Score], weights: Mapping[str, float]
) -> Rollout:
    """A rollout with all its scores, and its reward: their weighted sum.

    Unscored if its environment failed, gave a score the name of a reward part, or was done without giving a score that has a weight.
    Where a limit cut the rollout off before the environment was done, such a score is 0.

    Args:
        parts: what the reward parts say.
        own: what the environment says.
        weights: of the reward parts and of the environment's scores; a score without a weight is only kept.
    """
    if twice := sorted(parts.keys() & own.keys() - {FAILURE}):
        own = {name: score for name, score in own.items() if name not in twice} | {FAILURE: _named_twice(twice)}
    failed = FAILURE in own and not own[FAILURE].scored
    missing = Score(value=math.nan, outcome=Outcome.error, detail=f"the environment {'failed' if failed else 'did not give it'}")
    if completion.truncated and not failed:
        missing = Score(value=0.0, detail="cut off before the environment gave it")
    scores = {**parts, **own}
    scores |= {name: missing for name in weights if name not in scores}
    return Rollout(problem=problem, completion=completion, scores=scores, reward=math.nan if failed else combine(scores, weights))


def _named_twice(names: Sequence[str]) -> Score:
    detail = f"the environment gave a score of the name {', '.join(names)}, which a reward part has already: give one of them another name"
    return Score(value=math.nan, outcome=Outcome.invalid, detail=detail)


def _check_templated_once(messages: Sequence[Message], problem: Problem) -> None:
    """A prompt that the chat template has made is no message: the template would be around it twice.

    Raises:
        ConfigError: an environment takes it for one.
    """
    twice = [message.role for message in messages if message.role != "text" and problem.prompt in message.content]
    if twice and problem.prompt != problem.question:
        raise ConfigError(
            "environment",
            f"puts problem.prompt into a message of role {twice[0]!r}, and with data.chat=true it stands in the chat template already",
            f"Message({twice[0]!r}, problem.question), which is the same without the template; or Message('text', problem.prompt)",
        )


def _stand_in(problem: Problem) -> Message:
    """The prompt of a rollout whose environment asked nothing: a completion has one."""
    return Message("text", problem.prompt or "?")


def turn_seed(seed: int, turn: int) -> int:
    """63 bits that depend on the rollout's seed and the turn's number, from 0, alone; the first turn's is the rollout's own."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/turn {turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A stretch of the rollout: a turn of the policy, or what the environment put behind one."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_versions: tuple[int, ...]
    text: str
    sampled: bool
    kept: tuple[bytes, ...] = ()

    @classmethod
    def of_turn(cls, turn: Completion) -> _Piece:
        return cls(
            token_ids=turn.token_ids,
            logprobs=turn.logprobs,
            policy_versions=turn.policy_versions,
            text=turn.text,
            sampled=True,
            kept=turn.kept,
        )

    @classmethod
    def of_environment(cls, token_ids: tuple[int, ...], messages: Sequence[Message], after: Completion) -> _Piece:
        """No policy sampled them: the version is that of the token before, so that a rollout's versions are those of its own tokens."""
        return cls(
            token_ids=token_ids,
            logprobs=(0.0,) * len(token_ids),
            policy_versions=after.policy_versions[-1:] * len(token_ids),
            text="\n".join(message.content for message in messages),
            sampled=False,
        )


def _joined(problem_id: str, index: int, prompt_ids: tuple[int, ...], pieces: Sequence[_Piece], reason: FinishReason) -> Completion:
    several = len(pieces) > 1
    return Completion(
        problem_id=problem_id,
        index=index,
        prompt_ids=prompt_ids,
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        text=_lines(piece.text for piece in pieces if piece.sampled),
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        policy_versions=tuple(chain.from_iterable(piece.policy_versions for piece in pieces)),
        finish_reason=reason,
        kept=tuple(chain.from_iterable(piece.kept for piece in pieces)),
        sampled=tuple(piece.sampled for piece in pieces for _ in piece.token_ids) if several else (),
        transcript=tuple((piece.text, piece.sampled) for piece in pieces) if several else (),
    )


def _lines(turns: Any) -> str:
    """The turns one after the other, each beginning a line: a word at the end of one and a word at the start of the next are two."""
    text = ""
    for turn in turns:
        text += ("\n" if text and not text.endswith("\n") else "") + turn
    return text
