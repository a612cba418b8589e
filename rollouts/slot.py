"""One engine of a pool, through all the processes it has had, and the calls it is given."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from grpo.rollouts.actor import Born
from grpo.rollouts.base import SyncReport
from grpo.rollouts.faults import Pulse, Restarts
from grpo.rollouts.proof import Passing
from grpo.rollouts.transfer import Parcel
from grpo.rollouts.weights import Spec
from grpo.types import Completion

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle


class State(Enum):
    starting = auto()
    idle = auto()
    loading = auto()
    serving = auto()
    probing = auto()
    falling_asleep = auto()
    gone = auto()

    @property
    def at_work(self) -> bool:
        return self in (State.loading, State.serving, State.probing, State.falling_asleep)


@dataclass(eq=False, kw_only=True)
class Sent:
    """The weights of one sync, kept for engines that start later."""

    version: int
    specs: Mapping[str, Spec]
    passed: Passing = field(default_factory=Passing)
    parcels: list[Parcel] = field(default_factory=list)


@dataclass(eq=False, kw_only=True)
class Slot:
    """See the module's text. ``ref`` and ``look`` are the two answers it can owe: that of its call, and what came of it so far."""

    number: int
    restarts: Restarts
    state: State = State.gone
    actor: ActorHandle[Any] | None = None
    born: Born | None = None  # once it has started
    holds: Sent | None = None  # the weights it was last given
    asleep: bool = False  # it gave its memory back, and holds none
    report: SyncReport | None = None
    answer: list[Completion] | None = None
    call: int = 0  # number of the call it works on
    ref: ObjectRef[Any] | None = None
    look: ObjectRef[Any] | None = None
    pulse: Pulse | None = None

    def launch(self, actor: ActorHandle[Any], timeout: float, *args: Any) -> None:
        """Take a new process, and have it start its engine."""
        self.actor, self.state = actor, State.starting
        self.ref = self._call("work", "start", *args)
        self.pulse = Pulse(timeout, time.monotonic())

    def begin(self, call: int, state: State, timeout: float, method: str, *args: Any) -> None:
        """Give it a call to work on."""
        self.call, self.state = call, state
        self.ref = self._call("work", method, call, *args)
        self.pulse = Pulse(timeout, time.monotonic())

    def load(self, call: int, timeout: float, sent: Sent) -> None:
        """Have it load weights; their parcels are brought to it."""
        self.begin(call, State.loading, timeout, "load", sent.version, sent.specs)
        self.holds, self.asleep = sent, False  # it wakes, whether or not all of them arrive

    def sleep(self, call: int, timeout: float) -> None:
        """Have it give its memory back."""
        self.begin(call, State.falling_asleep, timeout, "sleep")
        self.holds = None

    def bring(self, parcel: Any) -> None:
        """More for the call it works on."""
        self._call("control", "bring", self.call, parcel)

    def cancel(self, call: int) -> None:
        """Whether busy or not: an interruption can fall between handing work out and noting it."""
        if self.actor is not None:
            self._call("control", "cancel", call)

    def close(self) -> ObjectRef[Any]:
        return self._call("work", "close")

    def watch(self) -> None:
        if self.ref is not None and self.look is None and self.state.at_work:
            self.look = self._call("watch", "look", self.call)

    def owes(self, ref: ObjectRef[Any]) -> bool:
        return ref in (self.ref, self.look)

    def answered(self, ref: ObjectRef[Any]) -> None:
        """One of the two answers is here; with both, the engine is free."""
        if ref == self.look:
            self.look = None
        else:
            self.ref = None
        if self.ref is None and self.look is None:
            self.asleep = self.asleep or self.state is State.falling_asleep
            self.state = State.idle

    def abandon(self) -> None:
        """Take no more interest in the call under way; the next one waits behind it."""
        if self.state is State.loading:
            self.holds = None
        if self.state.at_work:
            self.ref = self.look = None
            self.state = State.idle

    def hangs(self) -> bool:
        owing = self.ref is not None or self.look is not None
        return self.pulse is not None and owing and self.pulse.hangs(time.monotonic())

    def reset(self) -> None:
        """Its process is gone."""
        self.actor = self.born = self.holds = self.report = self.answer = self.ref = self.look = self.pulse = None
        self.asleep = False

    def _call(self, group: str, method: str, *args: Any) -> ObjectRef[Any]:
        ref: ObjectRef[Any] = getattr(self.actor, method).options(concurrency_group=group).remote(*args)
        return ref
