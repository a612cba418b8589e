"""Asynchronous training by pacing: sampling runs ahead of training, and never further than it may.

At most ``max_staleness`` batches of groups are begun beyond the one that the trainer waits for, and the trainer takes groups in the
order in which they were begun. So a group begun under version v of the weights is trained on by step v + 1 + max_staleness at the
latest, nothing that was sampled is thrown away, and which problems make a batch does not depend on how long their answers are:
discarding what is late, or taking first what is first finished, would starve the long and hard ones.

New weights are loaded in flight: what is being sampled is paused, and goes on with the new weights after the tokens it has. The tokens
carry the version that sampled them, and the corrections of the objective see each token's own log-prob.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from grpo.config import ConfigError
from grpo.rollouts.assembly import GroupInMaking
from grpo.rollouts.base import Close, Job, Progress
from grpo.rollouts.collect import Groups, Source
from grpo.rollouts.saved import put_back, saved
from grpo.types import Group, Problem

_IDLE = 0.02  # seconds an engine that has nothing to sample waits before it looks again


@dataclass(frozen=True, kw_only=True)
class _InHand:
    """What a state is made of; one value, so that an interruption finds all of it old or all of it new."""

    groups: tuple[GroupInMaking, ...] = ()  # begun and not yet trained on, in order: first those that were taken
    position: int  # in the data, behind all that was begun


class PacedCollector:
    """A collector whose engines sample in the background, from the first ``take`` until ``close``.

    ``timings`` holds the seconds that the last ``collect`` waited.

    Args:
        batch: groups of a batch.
        max_staleness: batches that may be begun ahead of the one that is waited for; 1 or more.
        steps: steps that are still to be made, behind a restored state if there is one: what none of them would use is not begun.
            None: there is no end.
    """

    def __init__(
        self,
        *,
        groups: Groups,
        source: Source,
        batch: int,
        max_staleness: int,
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        if max_staleness < 1:
            raise ValueError(f"max_staleness is {max_staleness}; sampling ahead begins at 1, and 0 is what Collector does")
        if batch > len(source.problems):
            there = len(source.problems)
            raise ConfigError("rollout.problems_per_step", f"is {batch}, but the training split has only {there} problems", "lower it")
        self._groups, self._source, self._progress = groups, source, progress
        self._batch, self._max_staleness = batch, max_staleness
        self._steps_left = steps
        self._begun = _InHand(position=source.position)
        self._num_taken = 0
        self._restored: list[GroupInMaking] = []  # of a checkpoint: they wait for the first ``take``, when the weights are there
        self.timings: dict[str, float] = {}
        self._assembly = groups.assembly()
        self._state = threading.Condition()  # guards all below
        self._pause = False
        self._parked = False
        self._closed = False
        self._error: BaseException | None = None
        self._idle = 0.0  # seconds in which engines had nothing to sample, since the last step
        self._idle_share = 0.0  # of the step before
        self._idle_from: float | None = None  # when an idle engine asked last, and got nothing
        self._since = time.monotonic()
        self._server = threading.Thread(target=self._serve, name="rollouts", daemon=True)
        self._server.start()

    # --- what the loop asks for ---

    def take(self, count: int, besides: Collection[str] = ()) -> Sequence[Problem]:
        """The next problems, in the order in which they were begun; as many as may be are begun behind them.

        ``besides`` were taken and not trained on, so they are not begun again anyway.
        """
        first = self._num_taken
        self._begin(first + count + self._batch * self._batches_ahead)
        self._num_taken = min(first + count, len(self._under_way))
        return [group.problem for group in self._under_way[first : self._num_taken]]

    def collect(self, problems: Sequence[Problem], step: int) -> tuple[Group, ...]:
        """The groups of problems that were taken, when all are sampled and scored."""
        wanted = {problem.id for problem in problems}
        mine = [group for group in self._under_way[: self._num_taken] if group.problem.id in wanted]
        total = sum(len(group.episodes) for group in mine)

        def told() -> None:
            self._check()
            if self._progress is not None:
                self._progress(sum(len(group.rollouts) for group in mine), total)

        start = time.monotonic()
        self._assembly.wait(lambda: all(group.done for group in mine), told)
        self.timings = {"wait": time.monotonic() - start}
        return tuple(group.group() for group in mine)

    def used(self) -> None:
        """All that was taken is trained on: from now on ``state`` does not bring it back."""
        self._begun = replace(self._begun, groups=self._under_way[self._num_taken :])
        self._num_taken = 0
        if self._steps_left is not None:
            self._steps_left -= 1
        with self._state:
            now = time.monotonic()
            self._idle_share = self._idle / max(now - self._since, 1e-9)
            self._idle, self._since = 0.0, now

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The engines are free for other work, such as taking new weights: what they were sampling is paused, and goes on after it."""
        with self._paused():
            self._check()
            yield

    @contextmanager
    def _paused(self) -> Iterator[None]:
        with self._state:
            self._pause = True
            self._state.notify_all()
            while not self._parked:
                self._state.wait(timeout=0.2)
        try:
            yield
        finally:
            with self._state:
                self._pause = False
                self._state.notify_all()

    @property
    def _batches_ahead(self) -> int:
        """How many may be begun behind that of the present step: no more than there are steps after it."""
        if self._steps_left is None:
            return self._max_staleness
        return max(0, min(self._max_staleness, self._steps_left - 1))

    @property
    def _under_way(self) -> tuple[GroupInMaking, ...]:
        return self._begun.groups

    def metrics(self) -> dict[str, float]:
        """The share of the last step's time in which the engines had nothing to sample, and how much is under way."""
        return {
            "async/engine_idle_share": self._idle_share,
            "async/groups_ahead": float(len(self._under_way) - self._num_taken),
            "async/rollouts_waiting": float(sum(len(group.rollouts) for group in self._under_way)),
        }

    def close(self) -> None:
        """End sampling; what is under way is given up. Safe to call twice."""
        with self._state:
            self._closed = self._pause = True
            self._state.notify_all()
        self._server.join(timeout=30)
        self._assembly.__exit__(RuntimeError, None, None)

    # --- in the background ---

    def _serve(self) -> None:
        try:
            while True:
                with self._state:
                    self._parked = True
                    self._state.notify_all()
                    self._state.wait_for(lambda: self._closed or not self._pause)
                    if self._closed:
                        return
                    self._parked = False
                with closing(self._groups.engine.serve(self._feed, self._groups.sampling)) as steps:
                    for finished in steps:
                        self._assembly.note(finished)
        except BaseException as error:
            with self._state:
                self._error, self._parked = error, True
                self._state.notify_all()

    def _feed(self, idle: bool) -> Sequence[Job] | Close:
        if self._pause:
            return Close.pause
        start = time.monotonic()
        jobs = self._assembly.feed(idle)
        with self._state:
            if idle:
                if isinstance(jobs, Close):  # all that may be begun is sampled
                    self._state.wait_for(lambda: self._pause, timeout=_IDLE)
                self._idle += time.monotonic() - (self._idle_from or start)
            self._idle_from = time.monotonic() if idle and not (jobs and not isinstance(jobs, Close)) else None
        return () if isinstance(jobs, Close) else jobs

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _begin(self, wanted: int) -> None:
        """Have ``wanted`` groups under way. A problem that is under way already is not begun a second time."""
        self._check()
        fresh, self._restored = self._restored, []
        begun, missing = self._begun, min(wanted, len(self._source.problems)) - len(self._under_way)
        if missing > 0:
            problems = self._source.take(missing, {group.problem.id for group in begun.groups})
            # What is sampled ahead has no step yet. A place in the data comes once in a run, whatever becomes of its pace.
            more = [self._groups.begin(problem, f"place {place}") for place, problem in enumerate(problems, begun.position)]
            self._begun = _InHand(groups=(*begun.groups, *more), position=self._source.position)
            fresh += more
        self._assembly.open(fresh)

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the place in the data, and every group begun and not yet trained on, with what there is of it."""
        with self._paused(), self._assembly.still():  # also when something has failed: what there is can be saved
            groups = [saved(group) for group in self._under_way]
        pace = {"batch": self._batch, "max_staleness": self._max_staleness}
        return {"position": self._begun.position, "groups": groups, "pace": pace, "judge": self._groups.judge}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; before the first ``take``.

        Raises:
            ConfigError: what was begun does not fit the settings of now.
        """
        by_id = {problem.id: problem for problem in self._source.problems}
        groups = []
        for plain in state.get("groups", ()):
            if plain["problem"] not in by_id:
                what = f"no longer have problem {plain['problem']!r}, of which this run has begun a group"
                raise ConfigError("data.problems", what, "leave the data as they were")
            group = self._groups.begin(by_id[plain["problem"]], plain["draw"])
            put_back(group, plain, as_judged=state["judge"] == self._groups.judge)
            groups.append(group)
        if groups:
            self._check_pace(len(groups), state["pace"])
        self._source.position = state["position"]
        self._begun = _InHand(groups=tuple(groups), position=state["position"])
        self._restored = groups

    def _check_pace(self, groups: int, before: Mapping[str, int]) -> None:
        """Groups that were begun under another pace wait no longer than this one allows, if it is not slower.

        Raises:
            ConfigError: it is.
        """
        for key, now, then in (
            ("rollout.max_staleness", self._max_staleness, before["max_staleness"]),
            ("rollout.problems_per_step", self._batch, before["batch"]),
        ):
            if now < then:
                why = f"is {now} and was {then}: some of the {groups} groups that this run has begun ahead would be trained on too late"
                raise ConfigError(key, why, f"leave it at {then}, or raise it")
