"""An environment, asked and watched. It is the user's code and may do anything: whatever it does wrong becomes ``EnvironmentFailed``."""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from grpo.rewards.arguments import flag, number, whole
from grpo.rewards.base import attribute, describe, to_score
from grpo.rollouts.environments import ONLY_SCORE, Done, Environment, Message
from grpo.types import FAILURE, Completion, Outcome, Problem, Score

# of an environment that says nothing else
MAX_TURNS = 32
TIMEOUT_S = 60.0  # for one call
AT_ONCE = 8  # calls

_Answer = TypeVar("_Answer")
_Default = TypeVar("_Default", int, None)


class EnvironmentFailed(Exception):
    """The environment did, not the policy and not the toolkit. The text says what; the score's detail has the traceback, if it raised."""

    def __init__(self, text: str, outcome: Outcome = Outcome.error, detail: str = "") -> None:
        super().__init__(text)
        self.score = Score(value=math.nan, outcome=outcome, detail=detail or text)

    @classmethod
    def because_of(cls, error: BaseException) -> EnvironmentFailed:
        detail = describe(error.with_traceback(_from_the_users_line(error)))
        return cls(f"{type(error).__name__}: {_text(error)}", detail=detail)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``Done`` said, read."""

    scores: Mapping[str, Score]

    @classmethod
    def of(cls, done: Any) -> Verdict:
        if not isinstance(done, Done):
            raise EnvironmentFailed(f"the environment returned {done!r:.200}; at a limit it returns Done")
        scores = {} if done.scores is None else done.scores
        if isinstance(scores, Score | numbers.Real):
            scores = {ONLY_SCORE: scores}
        if not isinstance(scores, Mapping):
            raise EnvironmentFailed(f"Done has the scores {scores!r:.200}; they are a number, or a mapping, name: score")
        for name in scores:
            _check_text("the name of a score", name)
            if name == FAILURE:
                raise EnvironmentFailed(
                    f"the environment called a score {name!r}, which is what its failures are called: give it another name"
                )
        return cls({name: to_score(value) for name, value in scores.items()})


class Guarded:
    """An environment, made and asked.

    Raises:
        EnvironmentFailed: here and in every method, if the environment raises, takes longer than its ``timeout_s``, or answers something
            else than it was asked for.
    """

    def __init__(self, make: Callable[[], Environment]) -> None:
        self.itself: Any = in_time(_timeout_of_making(make), make, late=_close)

    def start(self, problem: Problem) -> Sequence[Message]:
        return self._ask(lambda: _messages(self.itself.start(problem)))

    def step(self, turn: Completion) -> Sequence[Message] | Verdict:
        return self._ask(lambda: _answer(self.itself.step(turn)))

    def cut_off(self, turn: Completion) -> Verdict:
        """A limit ended the rollout: in the middle of this turn, or behind it."""
        return self._ask(lambda: _cut_off(self.itself, turn))

    def close(self) -> None:
        """The rollout is over."""
        try:
            seconds = self.timeout_s
        except EnvironmentFailed:  # which was said when it was asked something; it is closed all the same
            seconds = TIMEOUT_S
        in_time(seconds, lambda: _close(self.itself))

    @property
    def max_turns(self) -> int:
        return self._read(lambda: _count(self.itself, "max_turns", MAX_TURNS))

    @property
    def timeout_s(self) -> float | None:
        """Seconds; None for one that answers at once, which needs no thread to be watched from."""
        return self._read(lambda: _timeout(self.itself))

    @property
    def missing(self) -> Sequence[str]:
        """Methods that every environment has, and this one has not."""
        return self._read(lambda: [name for name in ("start", "step") if not callable(getattr(self.itself, name, None))])

    @property
    def score_names(self) -> Sequence[str] | None:
        """What its scores are called; None for one that does not say."""
        return self._read(lambda: _texts(self.itself, "score_names"))

    @property
    def stop(self) -> Sequence[str]:
        """What ``rollout.stop`` must hold."""
        return self._read(lambda: _texts(self.itself, "stop")) or ()

    @property
    def needs_chat(self) -> bool:
        return self._read(lambda: _needs_chat(self.itself))

    @property
    def at_once(self) -> int | None:
        """What the instance says, for comparison: what counts is said by the class, see ``at_once``. None if it says nothing."""
        return self._read(lambda: _count(self.itself, "at_once", None))

    def _ask(self, call: Callable[[], _Answer]) -> _Answer:
        return in_time(self.timeout_s, call)

    @staticmethod
    def _read(get: Callable[[], _Answer]) -> _Answer:
        return in_time(None, get)  # a property may raise


def in_time(seconds: float | None, call: Callable[[], _Answer], late: Callable[[_Answer], None] = lambda answer: None) -> _Answer:
    """``call()``, given up after ``seconds``: a thread cannot be killed, so that one goes on, at its own expense and the machine's.

    Args:
        late: what becomes of an answer that comes after that, in that thread.

    Raises:
        EnvironmentFailed: it raised, or took longer.
    """
    answers: list[_Answer] = []
    errors: list[BaseException] = []
    deciding, given_up = threading.Lock(), threading.Event()  # an answer is in time or late, never both

    def run() -> None:
        try:
            answer = call()
            with deciding:
                if not given_up.is_set():
                    answers.append(answer)
                    return
            late(answer)
        except BaseException as error:  # SystemExit too: it is the user's code, in a thread that nobody else waits for
            errors.append(error)

    if seconds is None:
        run()
    else:
        thread = threading.Thread(target=run, name="environment call", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise EnvironmentFailed(f"there is no thread to call the environment from: {error}") from error
        thread.join(min(seconds, threading.TIMEOUT_MAX))
        with deciding:
            given_up.set()
    if errors:
        if isinstance(errors[0], EnvironmentFailed | KeyboardInterrupt):  # said already; Ctrl-C, where this is the main thread
            raise errors[0]
        raise EnvironmentFailed.because_of(errors[0]) from errors[0]
    if not answers:
        raise EnvironmentFailed(f"the environment did not answer in {seconds:g} s (its timeout_s)", Outcome.timeout)
    return answers[0]


def at_once(make: Callable[[], Environment]) -> int:
    """How many calls of such environments may go on at the same time: the class's, since it bounds the making too.

    Raises:
        ValueError: it says something that is no number of calls.
    """
    count = attribute(make, "at_once", AT_ONCE)
    if isinstance(count, property | cached_property):
        raise ValueError("at_once is a property, but it is read before there is an instance; in the class it must be a whole number")
    whole("at_once", count, least=1)
    return int(count)


def _count(environment: Any, name: str, default: _Default) -> int | _Default:
    count = getattr(environment, name, default)
    if count is default:
        return default
    try:
        whole(name, count, least=1)
    except ValueError as error:
        raise EnvironmentFailed(str(error)) from None
    return int(count)


def _timeout(environment: Any) -> float | None:
    seconds = getattr(environment, "timeout_s", TIMEOUT_S)
    if seconds is None:
        return None
    try:
        number("timeout_s", seconds, above=0)
    except ValueError as error:
        raise EnvironmentFailed(f"{error}, or None") from None
    return float(seconds)


def _texts(environment: Any, name: str) -> Sequence[str] | None:
    texts = getattr(environment, name, _NOT_SAID)
    if texts is _NOT_SAID:
        return None
    if isinstance(texts, str) or not (isinstance(texts, Sequence | Set) and all(isinstance(text, str) for text in texts)):
        raise EnvironmentFailed(f"{name} is {texts!r:.200}; it must be a list or tuple of strings")
    return tuple(texts)


_NOT_SAID = object()


def _needs_chat(environment: Any) -> bool:
    needed = getattr(environment, "needs_chat", False)
    try:
        flag("needs_chat", needed)
    except ValueError as error:
        raise EnvironmentFailed(str(error)) from None
    return bool(needed)


def _close(environment: Any) -> None:
    if (close := getattr(environment, "close", None)) is not None:
        close()


def _timeout_of_making(make: Callable[[], Environment]) -> float | None:
    """The class's, as far as it has one: a property of the instances, or nonsense, is seen when there is one."""
    try:
        return _timeout(getattr(make, "func", make))  # .func: functools.partial
    except EnvironmentFailed:
        return TIMEOUT_S


def _answer(answer: Any) -> Sequence[Message] | Verdict:
    return Verdict.of(answer) if isinstance(answer, Done) else _messages(answer)


def _messages(answer: Any) -> Sequence[Message]:
    if not (isinstance(answer, list | tuple) and answer and all(isinstance(message, Message) for message in answer)):
        raise EnvironmentFailed(f"the environment returned {answer!r:.200}; it returns a list of one or more Message, or, from step, Done")
    for message in answer:
        _check_text("the role of a message", message.role)
        _check_text(f"the content of a message of role {message.role!r}", message.content)
    return tuple(answer)


def _check_text(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise EnvironmentFailed(f"{what} is {text!r:.200} ({type(text).__name__}); it must be a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EnvironmentFailed(
            f"{what} holds half a character, {text[error.start]!r}, which no tokenizer takes; "
            "text.encode('utf-8', 'replace').decode() has a ? in its place"
        ) from None


def _cut_off(environment: Any, turn: Completion) -> Verdict:
    if turn.truncated and (tell := getattr(environment, "cut_short", None)) is not None:
        return Verdict.of(tell(turn))
    ask: Callable[[], Done] | None = getattr(environment, "cut_off", None)
    return Verdict({}) if ask is None else Verdict.of(ask())


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except (Exception, SystemExit) as another:  # __str__ is the user's code too
        return f"(no text: its __str__ raises {type(another).__name__})"


def _from_the_users_line(error: BaseException) -> Any:
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_globals.get("__name__") in _OUR_FRAMES:
        frames = frames.tb_next
    return frames


_OUR_FRAMES = (__name__, "grpo.rollouts.episode")
