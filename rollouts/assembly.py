"""Problems in, scored groups out: the rollouts in the making, between the engines that sample and the rewards that judge.

Three kinds of work go on at once. Whoever serves the engines asks ``feed`` for turns to sample and hands to ``note`` what they finished;
environments answer in threads of their own, since a tool may take its time; and one thread scores what is over, while the rest is still
being sampled. What goes wrong in a thread is raised where the engines are served and where the groups are waited for.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from types import TracebackType
from typing import Protocol, Self

from grpo.rollouts.base import Begun, Close, Finished, Job, Progress
from grpo.rollouts.episode import Episode
from grpo.rollouts.hands import Hands
from grpo.types import Completion, Group, Problem, Rollout, Score

_IDLE = 0.02  # seconds an idle engine is kept waiting for a turn
_COME_TO_REST = 5.0  # seconds a checkpoint waits for environments and rewards, and the end of a run for environments to be closed


class Scorer(Protocol):
    """``grpo.rewards.runtime.RewardRuntime``: one dict part → ``Score`` a completion, in order."""

    def score(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Score]]:
        """``progress`` is called a few times a second; what it raises ends the work."""
        ...


class ScoreWhen(Enum):
    """When a rollout that is over is scored."""

    each = auto()  # as soon as it is
    group = auto()  # together with its group
    all = auto()  # together with all there are: for rewards that look at whole batches


@dataclass(eq=False, kw_only=True)
class GroupInMaking:
    """The episodes of one problem, and the rollouts that have come of them so far."""

    problem: Problem
    draw: int | str  # whose randomness its completions draw from: see ``request_seed``
    episodes: Sequence[Episode]
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # by index

    @property
    def done(self) -> bool:
        return len(self.rollouts) == len(self.episodes)

    def group(self) -> Group:
        return Group(problem=self.problem, rollouts=tuple(self.rollouts[episode.index] for episode in self.episodes))


class Assembly:
    """See the module's text. Use it as a context manager: leaving it gives up what is not finished.

    Args:
        runtime: scores completions.
        weights: reward part, or score of the environment → its weight in the sum.
        score_when: how much the rewards want to see at once.
        lockstep: sample a turn only when no rollout is under way any more, so that the company of a completion depends on nothing but
            the problems: for engines whose arithmetic depends on it.
    """

    def __init__(
        self, runtime: Scorer, weights: Mapping[str, float], *, score_when: ScoreWhen = ScoreWhen.each, lockstep: bool = False
    ) -> None:
        self._runtime, self._weights = runtime, weights
        self._score_when, self._lockstep = score_when, lockstep
        self._changed = threading.Condition()  # guards all below
        self._starting: list[list[_Place]] = []  # opened together; their environments are asked for the first prompt
        self._ready: deque[_Place] = deque()  # a turn to be sampled
        self._running: dict[int, _Place] = {}  # with the engines, by job number
        self._answering = 0  # environments at work
        self._over: list[_Place] = []  # to be scored
        self._scoring = False
        self._numbers = itertools.count()
        self._serials = itertools.count()
        self._error: BaseException | None = None
        self._left = False
        self._environments = Hands("environment")
        self._scorer = threading.Thread(target=self._score, name="rewards", daemon=True)
        self._scorer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with self._changed:
            left_before, self._left = self._left, True
            waiting = [place for together in self._starting for place in together if place.started]
            given_up = [] if left_before else [*waiting, *self._ready, *self._running.values()]
            self._changed.notify_all()
        dropped = self._environments.close()
        given_up += [args[0] for call, args in dropped if call == self._advance]  # a dropped ``_start`` has made nothing yet
        closing = Hands("closing")
        for place in given_up:
            closing.submit(place.episode.at_once, place.episode.give_up)
        closing.finish(_COME_TO_REST)
        if kind is None:
            self._scorer.join()

    def open(self, groups: Sequence[GroupInMaking]) -> None:
        """Take up groups, and go on with those of their rollouts that are not there yet."""
        places = [
            _Place((serial, episode.index), group, episode)
            for serial, group in zip(self._serials, groups, strict=False)
            for episode in group.episodes
            if episode.index not in group.rollouts
        ]
        with self._changed:
            self._over += [place for place in places if place.episode.completion is not None]
            together = [place for place in places if place.episode.completion is None]
            self._starting += [together] if together else []
            self._changed.notify_all()
        for place in together:
            self._environments.submit(place.episode.at_once, self._start, place)

    # --- between the engines and the environments ---

    def feed(self, idle: bool) -> Sequence[Job] | Close:
        """The turns that can be sampled now; ``Close.finish`` when there are none and will be none. See ``grpo.rollouts.base.Feed``.

        What was opened together is handed out together, in order: engines are at their best with many at once.
        """
        with self._changed:
            if idle:
                self._changed.wait_for(self._something_to_do, timeout=_IDLE)
            self._check()
            if self._lockstep:
                if self._starting or self._running or self._answering:
                    return ()
                self._ready = deque(sorted(self._ready, key=lambda place: place.order))
            jobs = []
            while self._ready:
                number, place = next(self._numbers), self._ready.popleft()
                self._running[number] = place
                jobs.append(place.episode.job(number))
            return jobs if jobs or self._starting or self._running or self._answering else Close.finish

    def _something_to_do(self) -> bool:
        """For an idle engine: a turn to sample, the end, or an error."""
        under_way = bool(self._starting or self._answering)
        return self._error is not None or not under_way or (bool(self._ready) and not self._lockstep)

    def note(self, finished: Finished) -> None:
        """Turns that were sampled, or paused: those come again with the next ``feed``."""
        for number, result in finished:
            with self._changed:
                place = self._running.pop(number)
                if self._left:  # it was given up with the others
                    continue
                if isinstance(result, Begun):
                    place.episode.begun = result
                    self._ready.append(place)
                    continue
                self._answering += 1
            if not self._environments.submit(place.episode.at_once, self._advance, place, result):
                place.episode.give_up()

    def _start(self, place: _Place) -> None:
        try:
            place.episode.start()
        except BaseException as error:
            self._fail(error)
            place.episode.give_up()
            return
        with self._changed:
            place.started = True
            for together in [some for some in self._starting if all(one.started for one in some)]:
                self._starting.remove(together)
                for one in together:
                    (self._ready if one.episode.completion is None else self._over).append(one)
            self._changed.notify_all()
            left = self._left
        if left:
            place.episode.give_up()

    def _advance(self, place: _Place, turn: Completion) -> None:
        try:
            over = place.episode.advance(turn)
        except BaseException as error:
            self._fail(error)
            place.episode.give_up()
            return
        with self._changed:
            self._answering -= 1
            if over:
                self._over.append(place)
            else:
                self._ready.append(place)
            self._changed.notify_all()
            left = self._left
        if left:
            place.episode.give_up()

    # --- scores ---

    def _score(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._left or self._to_score())
                    if self._left:
                        return
                    places = self._to_score()
                    self._over = [place for place in self._over if place not in places]
                    self._scoring = True
                self._judge(places)
                with self._changed:
                    self._scoring = False
                    self._changed.notify_all()
        except _NotWanted:
            return
        except BaseException as error:
            self._fail(error)

    def _to_score(self) -> list[_Place]:
        """Rollouts that are over and whose time has come."""
        if self._score_when is ScoreWhen.all:
            return [] if self._starting or self._ready or self._running or self._answering else list(self._over)
        if self._score_when is ScoreWhen.group:
            over = Counter(place.group for place in self._over)
            return [place for place in self._over if over[place.group] + len(place.group.rollouts) == len(place.group.episodes)]
        return list(self._over)

    def _judge(self, places: Sequence[_Place]) -> None:
        places = sorted(places, key=lambda place: place.order)
        completions = [place.completion for place in places]
        scores = self._runtime.score(completions, [place.group.problem for place in places], self._check_wanted)
        rollouts = [place.episode.rollout(parts, self._weights) for place, parts in zip(places, scores, strict=True)]
        with self._changed:  # ``still`` may hold them as they are
            for place, rollout in zip(places, rollouts, strict=True):
                place.group.rollouts[place.episode.index] = rollout

    def _check_wanted(self, done: int, total: int) -> None:
        if self._left:
            raise _NotWanted

    # --- waiting ---

    def wait(self, done: Callable[[], bool], turn: Callable[[], None], every: float = 0.2) -> None:
        """Wait until ``done()``, calling ``turn`` now and then, which may raise."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: done() or self._error, timeout=every)
                self._check()
                if done():
                    return
            turn()

    @property
    def unfinished(self) -> int:
        """Rollouts that are not over: with an engine, waiting for one, or with their environment."""
        with self._changed:
            return sum(map(len, self._starting)) + len(self._ready) + len(self._running) + self._answering

    @property
    def sampling(self) -> bool:
        """Whether there is a turn for an engine to sample."""
        with self._changed:
            return bool(self._running or self._ready)

    @contextmanager
    def still(self) -> Iterator[None]:
        """No rollout gets ahead meanwhile. Engines must have been paused before.

        Environments and rewards come to rest before it, or fail, or are too slow: what they are at then counts as not yet done.
        """

        def at_rest() -> bool:
            return self._error is not None or not (self._answering or self._scoring or self._to_score())

        with self._changed:
            self._changed.wait_for(at_rest, timeout=_COME_TO_REST)
            yield

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class _NotWanted(Exception):
    """Nobody waits for these scores any more."""


@dataclass(eq=False)
class _Place:
    """An episode and the group it belongs to."""

    order: tuple[int, int]  # group by group, then by index
    group: GroupInMaking
    episode: Episode
    started: bool = False

    @property
    def completion(self) -> Completion:
        assert self.episode.completion is not None
        return self.episode.completion
