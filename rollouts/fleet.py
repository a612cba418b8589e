"""The engines of a pool as processes: started, watched, replaced when they die or hang, and given the weights that the others have.

An engine whose process dies, that runs out of memory, or that samples no token for a settable time, is replaced. The new one gets
the weights of the last sync, proven as they were the first time, and what the old one held is sampled again: a completion's
randomness depends on its request's seed and its index alone, so it does not matter which engine samples it, nor how often it was
begun. An engine that dies again and again is given up, and the run goes on with the others; it ends, with a message, when none is left.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from grpo.rollouts.actor import Born, EngineLost, Look
from grpo.rollouts.base import Asleep, Finished, ServedEngine, SyncReport
from grpo.rollouts.faults import Restarts
from grpo.rollouts.proof import check_sent
from grpo.rollouts.schedule import Handout
from grpo.rollouts.slot import Sent, Slot, State

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

_POLL = 0.05  # seconds between two looks at the engines and at the feed: what new jobs, a pause and Ctrl-C wait for
_CLOSING = 5.0  # seconds an engine has to stop its own processes before it is killed
_MEMORY = "often the system was out of memory: lower rollout.num_engines, or kv_cache_memory_bytes in rollout.engine_args"
_LOG = logging.getLogger(__name__)


class Fleet:
    """See the module's text. Its parts take turns in the caller's thread: nothing happens but within ``turn``.

    Args:
        new_actor: makes the process of the engine with this number, the first one and those that replace it.
        factory: makes an engine; called inside the process.
        kwargs: its arguments.
        hang_timeout, start_timeout, max_restarts: see ``EnginePool``.
    """

    def __init__(
        self,
        *,
        num_engines: int,
        new_actor: Callable[[int], ActorHandle[Any]],
        factory: Callable[..., ServedEngine],
        kwargs: Mapping[str, Any],
        hang_timeout: float,
        start_timeout: float,
        max_restarts: int,
    ) -> None:
        self.counts = dict.fromkeys(("replaced", "hung", "given_up", "completions_redone"), 0)
        self.sent: Sent | None = None  # the weights that every engine must hold
        self.handout: Handout | None = None  # the jobs of the call under way
        self.slots = [Slot(number=number, restarts=Restarts(max_restarts)) for number in range(num_engines)]
        self._new_actor, self._factory, self._kwargs = new_actor, factory, kwargs
        self._hang_timeout, self._start_timeout = hang_timeout, start_timeout
        self._max_restarts = max_restarts
        self._calls = 0
        self.asleep = False  # all of them were put to sleep, and no weights have come since: one that started meanwhile has old ones
        self.unproven = False  # the last weights did not get through, and there were none before them
        self._started = False
        try:
            for slot in self.slots:
                self._launch(slot)
            while any(slot.state is State.starting for slot in self.slots):
                self.turn()
        except BaseException:
            self.close()
            raise
        self._started = True  # from here on, the dead are replaced; before, they are an error in the settings

    # --- all engines ---

    def ready(self) -> list[Slot]:
        """Those that have nothing to do and hold the weights."""
        return [slot for slot in self.slots if slot.state is State.idle and slot.holds is self.sent]

    def able(self) -> list[Slot]:
        """Those that hold the weights and are sampling, or could."""
        return [slot for slot in self.slots if slot.state in (State.idle, State.serving) and slot.holds is self.sent]

    def working(self, *states: State) -> bool:
        return any(slot.state in states for slot in self.slots)

    def settled(self) -> bool:
        """Engines are done with what was asked of them before, and one at least can be asked for more."""
        self.check_open()
        return bool(self.ready()) and not any(slot.state.at_work for slot in self.slots)

    def settle(self) -> None:
        while not self.settled():
            self.turn()

    def check_open(self) -> None:
        if not self.slots:
            raise RuntimeError("this engine pool is closed; make a new one")
        if all(slot.state is State.gone for slot in self.slots):
            raise RuntimeError(f"no engine of this pool is left: each died too often\n  → {_MEMORY}")

    def check_able(self) -> None:
        """Raises:
        Asleep: they hold no weights.
        RuntimeError: they hold weights that nobody should sample with.
        """
        if self.asleep:
            raise Asleep
        if self.unproven:
            raise RuntimeError("this engine pool holds weights that were not proven: load_weights failed\n  → load weights again")

    def awake(self) -> list[Slot]:
        """Those that have memory, or will have when they have started."""
        return [slot for slot in self.slots if slot.state is not State.gone and not slot.asleep]

    def turn(self) -> Finished:
        """Wait for something to happen, a moment at the most, and deal with it. Returns what was finished."""
        import ray

        self.check_open()
        for slot in self.slots:
            if slot.state is State.idle and self.sent is not None and slot.holds is not self.sent:
                self._reload(slot, self.sent)
            slot.watch()
        waiting = {ref: slot for slot in self.slots for ref in (slot.ref, slot.look) if ref is not None}
        if not waiting:
            time.sleep(_POLL)
            return []
        ray.wait(list(waiting), num_returns=1, timeout=_POLL)
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        finished = [entry for ref in ready for entry in self._take(waiting[ref], ref)]
        for slot in self.slots:
            if slot.hangs():
                self._kill_hung(slot)
        return finished

    def cancel(self) -> None:
        """Nothing that was asked for so far is wanted any more."""
        for slot in self.slots:
            slot.cancel(self._calls)

    def close(self) -> None:
        import ray

        slots = [slot for slot in self.slots if slot.actor is not None]
        if not ray.is_initialized():
            self.slots = []
            return
        self.cancel()
        self.slots = []
        closing = [slot.close() for slot in slots]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSING)
        for slot in slots:
            if slot.actor is not None:
                ray.kill(slot.actor, no_restart=True)

    # --- one engine ---

    def begin(self, slot: Slot, state: State, method: str, *args: Any) -> None:
        slot.begin(self._number(), state, self._hang_timeout, method, *args)

    def load(self, slot: Slot, sent: Sent) -> None:
        slot.load(self._number(), self._hang_timeout, sent)

    def put_to_sleep(self, slot: Slot) -> None:
        slot.sleep(self._number(), self._hang_timeout)

    def _number(self) -> int:
        self._calls += 1
        return self._calls

    def _launch(self, slot: Slot) -> None:
        slot.launch(self._new_actor(slot.number), self._start_timeout, self._factory, self._kwargs)

    def _reload(self, slot: Slot, sent: Sent) -> None:
        """Give an engine the weights that the others have."""
        self.load(slot, sent)
        for parcel in [*sent.parcels, None]:
            slot.bring(parcel)

    def _take(self, slot: Slot, ref: ObjectRef[Any]) -> Finished:
        """What an engine answered; dead ones answer too."""
        import ray

        if not slot.owes(ref):
            return []  # of a process that has been replaced meanwhile
        try:
            value = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineLost) or (slot.state is State.starting and self._started):
                self._lost(slot, str(error.cause or error).strip())
                return []
            slot.abandon()
            raise_own(error)
        except ray.exceptions.RayError as error:  # the process died, or its node, or was out of memory
            self._lost(slot, str(error).strip())
            return []
        return self._note(slot, ref, value)

    def _note(self, slot: Slot, ref: ObjectRef[Any], value: Any) -> Finished:
        finished: Finished = []
        if isinstance(value, Born):
            slot.born = value
        elif isinstance(value, Look) and value.call == slot.call:
            assert slot.pulse is not None
            slot.pulse.beat(value.beats)
            if self.handout is not None:
                finished = [entry for entry in value.finished if self.handout.finish(slot.number, entry[0])]
            if finished:
                slot.restarts.progress()
        elif isinstance(value, SyncReport):
            assert slot.holds is not None
            slot.report = value
            check_sent(slot.holds.passed.digests, slot.holds.version, value, f"engine {slot.number} of {len(self.slots)}")
        elif isinstance(value, list):
            slot.answer = value
        slot.answered(ref)
        return finished

    def _lost(self, slot: Slot, why: str, remedy: str = _MEMORY) -> None:
        """An engine's process is gone, with what it held: put that back, and start another in its place.

        Raises:
            RuntimeError: no engine is left, or it was a first one.
        """
        import ray

        self.check_open()
        who = f"engine {slot.number} of {len(self.slots)}"
        assert slot.actor is not None
        ray.kill(slot.actor, no_restart=True)
        slot.reset()
        if not self._started:
            raise RuntimeError(f"{who} did not start: {why}\n  → {remedy}")
        self.counts["replaced"] += 1
        again = self.handout.lose(slot.number) if self.handout is not None else []
        self.counts["completions_redone"] += len(again)
        briefly = " ".join(why.split())[:300]
        if slot.restarts.allow():
            _LOG.warning("%s is replaced, and %d completions are sampled again: %s", who, len(again), briefly)
            self._launch(slot)
            return
        slot.state = State.gone
        self.counts["given_up"] += 1
        crashes = f"died {self._max_restarts + 1} times and finished nothing in between"
        if all(other.state is State.gone for other in self.slots):
            held = ", ".join(sorted({job.request.problem_id for job in again})[:3]) or "nothing"
            raise RuntimeError(
                f"no engine is left: {who}, the last one, {crashes}\n  the last time: {why}\n  it was sampling: {held}\n  → {remedy}"
            )
        _LOG.warning("%s %s and is given up; the run goes on without it: %s", who, crashes, briefly)

    def _kill_hung(self, slot: Slot) -> None:
        import ray

        self.counts["hung"] += 1
        why = f"it hung: no token for {self._hang_timeout:g} s (rollout.hang_timeout_s) while {slot.state.name}"
        remedy = "if it was at work all the time, raise rollout.hang_timeout_s"
        if slot.state is State.starting:
            remedy = "if a start takes so long here, raise rollout.start_timeout_s"
            why = f"its start has taken more than {self._start_timeout:g} s (rollout.start_timeout_s)"
        if slot.born is not None and slot.born.node == ray.get_runtime_context().get_node_id():
            with suppress(ProcessLookupError):  # it may have died by itself just now
                os.kill(slot.born.pid, signal.SIGKILL)  # a stopped process does not hear ray
        self._lost(slot, why, remedy)


def raise_own(error: Any) -> NoReturn:
    """Raise what the engine raised, not ray's wrapper with the remote traceback for a message; that follows as the cause."""
    own = error.cause
    if isinstance(own, Exception) and type(own).__module__ != "ray.exceptions":
        raise own from error
    raise RuntimeError(str(error)) from None
