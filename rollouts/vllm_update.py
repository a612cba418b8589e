"""The engine's side of vLLM's weight-transfer API: hands parcels to all workers, and puts together what each says of them.

An update is ``start_weight_update``, ``update_weights`` for each parcel, ``finish_weight_update``. Before the first one, and when it
changes, what is going to come is announced (``init_weight_transfer_engine``). The workers' side is ``grpo.rollouts.vllm_weights``.

A parcel is opened in the workers. Those that are processes of their own are not Ray's, and cannot open what is in Ray's store: it
is opened here, and passed on in a file of the machine's temporary folder, a parcel at a time. Such a file is read within
milliseconds and gone before it is written out to a disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from grpo.rollouts.proof import WeightProofError
from grpo.rollouts.transfer import Disk, Parcel, parcels_of
from grpo.rollouts.weights import Spec, WeightStream, shown

BACKEND = "parcels"
ENGINE_ARGS: Mapping[str, Any] = {
    "worker_extension_cls": "grpo.rollouts.vllm_weights.ParcelWorker",
    "weight_transfer_config": {"backend": BACKEND},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What a worker has of an update: hashes as it came, and how many of them it read back out of its model as they should be."""

    digests: Mapping[str, str]
    num_bytes: int
    read_back: int
    error: Exception | None = None


class WeightUpdates:
    """See the module's text.

    Args:
        rpc: ``LLM.collective_rpc``: calls a method of every worker.
        apart: the workers are processes of their own.
    """

    def __init__(self, rpc: Callable[..., list[Any]], apart: bool) -> None:
        self._rpc, self._apart = rpc, apart
        self._announced: dict[str, Spec] | None = None

    def load(self, stream: WeightStream) -> Received:
        """Load a stream's tensors, each parcel as it comes.

        Raises:
            ValueError: a tensor came that was not announced, or did not come, or not as announced.
            WeightProofError: a worker got, or holds, something else.
        """
        if stream.specs != self._announced:
            self._rpc("init_weight_transfer_engine", kwargs={"init_info": {"specs": stream.specs}})
            self._announced = stream.specs
        try:
            self._rpc("start_weight_update")
            for parcel in parcels_of(stream):
                self._hand_over(parcel)
            self._rpc("finish_weight_update")
        except BaseException:
            self._give_up()
            raise
        return _together(self._rpc("weights_received"))

    def _give_up(self) -> None:
        """Leave a model with old weights and new ones, but one that can be given others."""
        try:
            self._rpc("finish_weight_update")
        except RuntimeError:
            pass  # the interruption fell into a worker, which then leaves the update by itself

    def _hand_over(self, parcel: Parcel) -> None:
        with ExitStack() as stack:
            if self._apart and not parcel.opens_anywhere:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-weights-"))
                parcel = Disk(folder).send(parcel.open())
            self._rpc("update_weights", kwargs={"update_info": {"parcel": parcel}})


def _together(workers: Sequence[Received]) -> Received:
    """All workers' as one: each must have got the same, and the one counts that read back least."""
    for number, worker in enumerate(workers):
        if worker.error is not None:
            if len(workers) > 1:
                worker.error.add_note(f"in worker {number} of {len(workers)} of this engine")
            raise worker.error
    first = workers[0]
    for number, worker in enumerate(workers):
        other = {name for name in first.digests.keys() | worker.digests.keys() if first.digests.get(name) != worker.digests.get(name)}
        if other:
            raise WeightProofError(
                f"worker {number} of {len(workers)} of this engine got {len(other)} tensors otherwise than worker 0: {shown(other)}\n"
                "  → the transfer changed them on the way; see docs/fault-tolerance.md"
            )
    return Received(digests=first.digests, num_bytes=first.num_bytes, read_back=min(worker.read_back for worker in workers))
