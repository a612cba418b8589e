"""Weights from the trainer's memory straight into an engine's, by torch.distributed: NCCL between GPUs, gloo between CPUs.

An engine asks for a parcel when it opens it, and gets it over a connection that it shares with the trainer alone. So an engine that
dies takes no other with it, as it would in one group of them all, and one that is started later gets what the others were given:
the trainer keeps the parcels of the last sync, where its weights are (on a GPU: once more their size).

Questions and answers go through a TCP store of the trainer's, the bytes through the process group. What an engine that dies with a
parcel under way holds up is a thread of the trainer's, and on a GPU a stream of that thread's own, for ``timeout`` seconds.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from grpo.rollouts import flat
from grpo.rollouts.transfer import Parcel
from grpo.rollouts.weights import Spec

if TYPE_CHECKING:
    from torch import Tensor

_FOR_EVER = timedelta(days=1000)
_REQUESTS = "requests"  # a queue in the store: LINE NUMBER, or nothing at the end
_READY = " is ready"  # behind a line's name, a queue in which its engine says that it receives now
_LOG = logging.getLogger(__name__)


class PeerToPeer:
    """``Transfer`` by torch.distributed. ``ray`` must be running: it knows the address of this machine.

    Args:
        backend: ``nccl`` or ``gloo``.
        timeout: seconds that one side waits for the other with a parcel under way.
    """

    def __init__(self, backend: str, timeout: float = 60.0) -> None:
        import ray
        import torch.distributed as dist

        self._timeout = timedelta(seconds=timeout)
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        self._place = _Place(host, self._store.port, backend, timeout)
        self._numbers = itertools.count()
        self._kept: dict[int, Tensor] = {}
        self._answering = threading.Thread(target=self._answer, name="weights", daemon=True)
        self._answering.start()

    def send(self, tensors: Mapping[str, Tensor]) -> Parcel:
        import torch

        number = next(self._numbers)
        specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
        parcel = flat.joined(tensors, specs)
        if parcel.is_cuda:
            torch.cuda.current_stream(parcel.device).synchronize()  # it is sent from another stream, which would not wait for the copy
        self._kept[number] = parcel
        return _Asked(self._place, number, specs)

    def discard(self, parcels: Sequence[Parcel]) -> None:
        for parcel in parcels:
            assert isinstance(parcel, _Asked)
            self._kept.pop(parcel.number, None)

    def close(self) -> None:
        if self._answering.is_alive():
            self._store.queue_push(_REQUESTS, "")
            self._answering.join(self._timeout.total_seconds())  # no longer: an engine may have died on the way into the connection
        self._kept.clear()

    def _answer(self) -> None:
        """Send what is asked for, one parcel after another: two connections of a GPU used at once can block each other."""
        requests, store, groups = self._place.store(), self._place.store(), dict[str, Any]()
        requests.set_timeout(_FOR_EVER)
        while request := requests.queue_pop(_REQUESTS).decode():
            line, _, number = request.partition(" ")
            try:
                self._serve(store, groups, line, int(number))
            except RuntimeError as error:  # the engine that asked is gone; whoever looks after engines hears of it
                groups.pop(line, None)
                _LOG.warning("a parcel of weights did not reach its engine: %s", " ".join(str(error).split())[:200])

    def _serve(self, store: Any, groups: dict[str, Any], line: str, number: int) -> None:
        """Raises:
        RuntimeError: the engine does not take it.
        """
        parcel = self._kept.get(number)
        store.queue_push(line, "no" if parcel is None else "yes")
        if parcel is None:
            return
        store.queue_pop(line + _READY)  # the request may be old, and NCCL waits for ever for an engine that has died since
        if line not in groups:
            groups[line] = self._place.group(store, line, 0)
        _send(groups[line], parcel)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the trainer's store is, and how to be connected."""

    host: str
    port: int
    backend: str
    timeout: float

    def store(self) -> Any:
        import torch.distributed as dist

        return dist.TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=self.timeout))

    def group(self, store: Any, line: str, rank: int) -> Any:
        """A process group of two. Both sides make it at the same time. Who waits in it too long, or for one who died, gets a RuntimeError.

        With NCCL only where waiting blocks: otherwise PyTorch watches the group in a thread, which ends the process. The mode that should
        spare it (TORCH_NCCL_ASYNC_ERROR_HANDLING=2) asks for a dump of what went on, and behind that the process is ended all the same.
        """
        import torch.distributed as dist

        names, timeout = dist.PrefixStore(line, store), timedelta(seconds=self.timeout)
        if self.backend == "gloo":
            return dist.ProcessGroupGloo(names, rank, 2, timeout)
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # read when a group is made; those of an engine's own were made before
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(names, rank, 2, options)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A parcel that is asked for when it is opened."""

    place: _Place
    number: int
    specs: Mapping[str, Spec]
    opens_anywhere: ClassVar[bool] = True

    def open(self) -> Mapping[str, Tensor]:
        return flat.parted(_line(self.place).receive(self.number, flat.size(self.specs)), self.specs)


class _Line:
    """An engine's side of a connection."""

    def __init__(self, place: _Place) -> None:
        self._place, self._name = place, uuid.uuid4().hex
        self._store, self._answers = place.store(), place.store()
        self._answers.set_timeout(_FOR_EVER)  # others may come first; who waits too long for it all, the pool finds
        self._group: Any = None

    def receive(self, number: int, size: int) -> Tensor:
        import torch

        # Before it is asked for: an engine without room for it must not leave the trainer in the connection.
        parcel = torch.empty(size, dtype=torch.uint8, device="cuda" if self._place.backend == "nccl" else "cpu")
        self._store.queue_push(_REQUESTS, f"{self._name} {number}")
        if self._answers.queue_pop(self._name) != b"yes":
            raise RuntimeError(f"the trainer no longer has the weights that this engine was told to load (parcel {number})")
        self._store.queue_push(self._name + _READY, "")
        try:
            if self._group is None:
                self._group = self._place.group(self._store, self._name, 1)
            self._group.recv([parcel], 0, 0).wait()
        except RuntimeError:
            self._name, self._group = uuid.uuid4().hex, None  # the trainer has given this connection up as well
            raise
        return parcel


@functools.cache
def _line(place: _Place) -> _Line:
    """This process's connection to a trainer."""
    return _Line(place)


def _send(group: Any, parcel: Tensor) -> None:
    """Hold up this thread, and no stream but one of its own: the trainer goes on whatever becomes of the engine."""
    import torch

    with torch.cuda.stream(torch.cuda.Stream(parcel.device)) if parcel.is_cuda else nullcontext():
        group.send([parcel], 1, 0).wait()
