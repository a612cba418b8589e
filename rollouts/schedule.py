"""Who samples what: the two ways a pool hands out jobs. Plain Python, no processes.

``free``: whoever is free gets the next jobs in order, no more than it can sample at once, so that a long answer holds up nobody
but itself, and a group may come from several engines. ``fixed``: the requests are cut into as many shards as the pool has
engines, and a shard is sampled as a whole, by one engine that does nothing else meanwhile. Engines compute a little differently
in other company (the order of floating-point sums), so this is the schedule that repeats to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Protocol

from grpo.rollouts.base import Job


class Schedule(StrEnum):
    free = "free"
    fixed = "fixed"


class Handout(Protocol):
    """The jobs of one call that nobody holds."""

    exact: bool  # an engine is given all its jobs before it begins, and no others until it has finished them

    def take(self, held: int, slots: int) -> list[Job]:
        """Jobs for an engine that holds ``held`` and can sample ``slots`` at once; empty: none for it at present."""
        ...

    def put_back(self, jobs: Iterable[Job]) -> list[Job]:
        """The engine that held these is gone; returns all that have to be sampled again."""
        ...


class FreeHandout:
    """See the module's text. One engine alone gets everything at once."""

    exact = False

    def __init__(self, jobs: Sequence[Job], num_engines: int) -> None:
        self._waiting = deque(jobs)
        self._share = -(-len(jobs) // num_engines)
        self._alone = num_engines == 1

    def take(self, held: int, slots: int) -> list[Job]:
        room = self._share if self._alone else min(self._share, slots)
        return [self._waiting.popleft() for _ in range(min(max(room - held, 0), len(self._waiting)))]

    def put_back(self, jobs: Iterable[Job]) -> list[Job]:
        again = sorted(jobs, key=lambda job: job.number)
        self._waiting.extendleft(reversed(again))
        return again


class FixedHandout:
    """See the module's text. The shards depend on the jobs and the number of engines alone."""

    exact = True

    def __init__(self, jobs: Sequence[Job], num_engines: int) -> None:
        self._shards = shards(jobs, num_engines)
        self._waiting = deque(range(len(self._shards)))
        self._shard_of = {job.number: place for place, shard in enumerate(self._shards) for job in shard}

    def take(self, held: int, slots: int) -> list[Job]:
        return list(self._shards[self._waiting.popleft()]) if not held and self._waiting else []

    def put_back(self, jobs: Iterable[Job]) -> list[Job]:
        """What was finished of a shard is sampled again too: the rest must have the same company."""
        places = sorted({self._shard_of[job.number] for job in jobs})
        self._waiting.extendleft(reversed(places))
        return [job for place in places for job in self._shards[place]]


def make_handout(schedule: Schedule, jobs: Sequence[Job], num_engines: int) -> Handout:
    return (FixedHandout if schedule is Schedule.fixed else FreeHandout)(jobs, num_engines)


def shards(jobs: Sequence[Job], num_shards: int) -> list[list[Job]]:
    """Consecutive jobs, about as many in each shard; the jobs of a request stay together, as they share a prompt. None is empty."""
    result: list[list[Job]] = [[] for _ in range(num_shards)]
    begins = 0  # place of the request's first job
    for place, job in enumerate(jobs):
        if job.index == 0:
            begins = place
        result[begins * num_shards // len(jobs)].append(job)
    return [shard for shard in result if shard]
