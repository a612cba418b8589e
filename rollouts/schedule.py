"""Who samples what: the two ways a pool hands out jobs. Plain Python, no processes.

``free``: whoever is free gets the next jobs in order, no more than it can sample at once, so that a long answer holds up nobody
but itself, and a group may come from several engines. ``fixed``: jobs that came together are cut into shards of about as many as an
engine samples at once, and a shard is sampled as a whole, by one engine that does nothing else meanwhile. Engines compute a little
differently in other company (the order of floating-point sums), and company is all that decides: not how many engines there are, nor
which of them samples it. So this is the schedule that repeats to the last bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

from grpo.rollouts.base import Job


class Schedule(StrEnum):
    free = "free"
    fixed = "fixed"


class Handout(ABC):
    """The jobs of one call: which wait, which engine holds which, and which are still to come back. Engines go by their numbers."""

    exact: ClassVar[bool]  # an engine is given all its jobs before it begins, and no others until it has finished them

    def __init__(self, num_engines: int) -> None:
        self.open: dict[int, Job] = {}  # number → job that has not come back
        self._num_engines = num_engines
        self._held: dict[int, dict[int, Job]] = {}  # engine → number → job

    def add(self, jobs: Sequence[Job]) -> None:
        """Jobs that came together."""
        self.open |= {job.number: job for job in jobs}
        self._wait(jobs)

    def take(self, engine: int, slots: int, able: int) -> list[Job]:
        """Jobs for an engine that can sample ``slots`` at once; empty: none for it at present.

        Args:
            able: engines that can be given jobs now, this one included.
        """
        held = self._held.setdefault(engine, {})
        jobs = self._choose(engine, len(held), slots, able)
        held |= {job.number: job for job in jobs}
        return jobs

    def finish(self, engine: int, number: int) -> bool:
        """An engine gives a job back. False if it came back before, or was not this engine's: it is to be ignored."""
        held = self._held.get(engine, {}).pop(number, None)
        return held is not None and self.open.pop(number, None) is not None

    def lose(self, engine: int) -> list[Job]:
        """The engine is gone. What it held waits again, and is returned: all that has to be sampled once more."""
        held = list(self._held.pop(engine, {}).values())
        return self._put_back(engine, held) if held else []

    @abstractmethod
    def _wait(self, jobs: Sequence[Job]) -> None: ...

    @abstractmethod
    def _choose(self, engine: int, held: int, slots: int, able: int) -> list[Job]: ...

    @abstractmethod
    def _put_back(self, engine: int, held: list[Job]) -> list[Job]: ...


class FreeHandout(Handout):
    """See the module's text. One engine alone gets everything at once."""

    exact = False

    def __init__(self, num_engines: int) -> None:
        super().__init__(num_engines)
        self._waiting: deque[Job] = deque()

    def _wait(self, jobs: Sequence[Job]) -> None:
        self._waiting.extend(jobs)

    def _choose(self, engine: int, held: int, slots: int, able: int) -> list[Job]:
        outstanding = len(self._waiting) + sum(map(len, self._held.values()))
        room = outstanding if self._num_engines == 1 else min(-(-outstanding // able), slots)
        return [self._waiting.popleft() for _ in range(min(max(room - held, 0), len(self._waiting)))]

    def _put_back(self, engine: int, held: list[Job]) -> list[Job]:
        self._waiting.extendleft(reversed(held))
        return held


class FixedHandout(Handout):
    """See the module's text. The shards depend on the jobs that came together and on ``slots`` alone.

    Args:
        slots: completions that every engine samples at once.
    """

    exact = True

    def __init__(self, num_engines: int, slots: int) -> None:
        super().__init__(num_engines)
        self._slots = slots
        self._waiting: deque[list[Job]] = deque()
        self._given: dict[int, list[Job]] = {}  # engine → the shard it was given last

    def _wait(self, jobs: Sequence[Job]) -> None:
        self._waiting.extend(shards(jobs, -(-len(jobs) // self._slots)))

    def _choose(self, engine: int, held: int, slots: int, able: int) -> list[Job]:
        if held or not self._waiting:
            return []
        self._given[engine] = self._waiting.popleft()
        return self._given[engine]

    def _put_back(self, engine: int, held: list[Job]) -> list[Job]:
        """What was finished of a shard is sampled again too: the rest must have the same company."""
        shard = self._given.pop(engine)
        self._waiting.appendleft(shard)
        return shard


def make_handout(schedule: Schedule, num_engines: int, slots: int) -> Handout:
    return FixedHandout(num_engines, slots) if schedule is Schedule.fixed else FreeHandout(num_engines)


def shards(jobs: Sequence[Job], num_shards: int) -> list[list[Job]]:
    """Consecutive jobs, about as many in each shard; the jobs of a request stay together, as they share a prompt. None is empty."""
    result: list[list[Job]] = [[] for _ in range(num_shards)]
    begins = 0  # place of the request's first job
    for place, job in enumerate(jobs):
        if place == 0 or job.request.problem_id != jobs[place - 1].request.problem_id:
            begins = place
        result[begins * num_shards // len(jobs)].append(job)
    return [shard for shard in result if shard]
