"""Weights in vLLM's workers, through vLLM's weight-transfer API. vLLM imports this module in every worker, to mix ``ParcelWorker`` into it.

A worker lives in the engine's process, or, where there are several (tensor parallel), in one of its own. Each opens the parcels
itself, checks and hashes what was in them, loads it, and reads back what it then holds: see ``grpo.rollouts.vllm_update`` for the
engine's side of the conversation.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from grpo.rollouts.proof import Arrivals, WeightProofError
from grpo.rollouts.readback import read_back, readable
from grpo.rollouts.transfer import Parcel
from grpo.rollouts.vllm_update import BACKEND, Received
from grpo.rollouts.weights import Announced, Spec

_PLAIN = (ValueError, RuntimeError, AssertionError, WeightProofError)  # exceptions that survive being pickled


@dataclass
class Announcement:
    """What every update will bring, from now on."""

    specs: Mapping[str, Spec]


@dataclass
class Delivery:
    """A parcel of the update under way."""

    parcel: Parcel


@dataclass(eq=False, kw_only=True)
class _Update:
    """The one under way, or the last one."""

    announced: Announced
    arrivals: Arrivals
    read_back: int = 0
    error: Exception | None = None


class ParcelEngine(WeightTransferEngine):
    """vLLM's receiving end of ``Parcel``s, one in each worker.

    An error does not show before the update's end (``received``): where there are several workers, vLLM takes the first answer that
    is an error and leaves the others' in their queues, where the next call finds them; and only a model whose update was finished is
    whole again.
    """

    init_info_cls = Announcement
    update_info_cls = Delivery
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._specs: Mapping[str, Spec] = {}
        self._update: _Update
        self._open = False  # between start and finish
        self._turn = 0  # the number of the update

    def init_transfer_engine(self, init_info: Announcement) -> None:
        self._specs = init_info.specs

    def start_weight_update(self) -> None:
        if self._open:  # the last one was interrupted; what it had loaded of a layer must not count for this one
            finalize_layerwise_reload(self.model, self.model_config)
        self._turn += 1
        held = readable(self.model, self._turn)
        dtypes = {tensor.name: tensor.dtype for tensor in held}
        parts = {tensor.name: tensor.parts for tensor in held}
        self._update = _Update(announced=Announced(self._specs), arrivals=Arrivals(dtypes=dtypes, parts=parts))
        initialize_layerwise_reload(self.model)
        self._open = True

    def receive_weights(self, update_info: Delivery) -> None:
        update = self._update
        if update.error is not None:
            return
        try:
            tensors = update_info.parcel.open()
            for name, tensor in tensors.items():
                update.announced.check(name, tensor)
            with disable_mtp_completeness_check():  # heads for several tokens may come in another parcel
                self.model.load_weights(update.arrivals.passing(tensors.items()))
        except Exception as error:
            update.error = _to_send(error)

    def finish_weight_update(self) -> None:
        if not self._open:  # the first time was interrupted behind the loading; the next weights are packed and read back again
            return
        update = self._update
        finalize_layerwise_reload(self.model, self.model_config)
        self._open = False
        if current_platform.is_cpu():
            _repack_experts(self.model)
            if self.model_config.hf_config.tie_word_embeddings:
                _repack_heads(self.model)
        if update.error is not None:
            return
        try:
            update.announced.check_all_came()
            update.read_back = update.arrivals.check_held(read_back(self.model, self._turn, update.arrivals.to_hold))
        except Exception as error:
            update.error = _to_send(error)

    def received(self) -> Received:
        """What came of the last update."""
        update = self._update
        return Received(
            digests=update.arrivals.digests, num_bytes=update.arrivals.num_bytes, read_back=update.read_back, error=update.error
        )

    def shutdown(self) -> None:
        """Nothing is held but what the parcels hold."""


class ParcelWorker:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    weight_transfer_engine: ParcelEngine

    def weights_received(self) -> Received:
        return self.weight_transfer_engine.received()


WeightTransferEngineFactory.register_engine(BACKEND, ParcelEngine)  # vLLM imports the extension before it makes this


def _repack_heads(model: torch.nn.Module) -> None:
    """Bring a tied head up to date.

    The CPU build computes with packed copies of the weights. Reloading packs again what it has loaded, and a tied head is never
    loaded: it shares the embedding's new values, and would go on computing with a packed copy of the old ones.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _repack_experts(model: torch.nn.Module) -> None:
    """Bring experts into the order that the CPU's kernel reads: vLLM does that when it starts, and forgets it at an update."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel is not None:
            method.moe_kernel.fused_experts.process_weights_after_loading(module)


def _to_send(error: Exception) -> Exception:
    """As it is if another process can read it. Where it was raised becomes text: that is lost on the way, and keeps parcels open."""
    sent = error if type(error) in _PLAIN else RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, WeightProofError):
        sent.add_note("".join(traceback.format_exception(error)).rstrip())
    return sent.with_traceback(None)
