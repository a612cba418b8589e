"""A policy trained by N processes: ``Policy`` over N ranks (``grpo.ranks``), each with a shard of the model.

The driver splits a batch over the ranks, a rank splits its part into micro-batches, FSDP2 sums the gradients. The denominators were
counted over the whole step before, so losses, gradients and metrics are sums over ranks, and those of one process.
"""

from __future__ import annotations

import functools
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo import layouts
from grpo.batch import Batch
from grpo.layouts import LayoutName
from grpo.losses import Loss, TokenScores, merge
from grpo.policy import Metrics, check_masters, check_optimiser
from grpo.ranks import Ranks
from grpo.rollouts.transfer import handfuls
from grpo.rollouts.weights import PackedWeights, Spec, WeightStream
from grpo.sharded import MASTERS, OPTIMISER, WEIGHTS, MakeModel, RankSettings, RankUpdate


class DistributedPolicy:
    """``Policy`` over the processes of ``ranks``, which hold one policy at a time.

    Args:
        ranks: the processes; whoever made them closes them.
        make_model: see ``ShardedPolicy``; a function that other processes can import, or a partial of one.
        settings: what every rank is told.
        tokenizer: saved beside the model.

    Raises:
        Exception: what a rank raised, such as a ValueError for a model that cannot be trained.
        RuntimeError: a rank died, here or in any call.
    """

    def __init__(self, ranks: Ranks, make_model: MakeModel, settings: RankSettings, *, tokenizer: Any = None) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self._ranks = ranks
        self._layout: LayoutName = ranks.load(make_model, settings)
        self._layout_checked = False
        self._loss: Loss | None = None

    def score(self, batch: Batch) -> TokenScores:
        return self._score(batch, None)

    def update(self, minibatch: Batch, loss: Loss) -> Metrics:
        start = time.perf_counter()
        trained = minibatch.with_signal() if loss.signal_only else minibatch
        done: list[RankUpdate] = []
        if trained.rollouts:
            self._check_layout(trained)
            if loss is not self._loss:
                self._ranks.all("learn_from", portable(loss))
                self._loss = loss
            parts = [trained.select(share) for share in shares(trained, self._layout, self._ranks.num_ranks)]
            done = self._ranks.each("update", [(part,) for part in parts])
        metrics = {"policy/loss": 0.0, "policy/trained_rollouts": float(len(trained.rollouts))}
        if done:
            metrics |= {"policy/loss": done[0].loss, "policy/grad_norm": done[0].grad_norm, "policy/lr": done[0].lr}
            metrics["optim/skipped_updates"] = float(done[0].num_skipped)
        for name, stat in merge([d.stats for d in done]).items():
            metrics[name] = stat.mean
            if name in ("sampler/logprob_diff", "policy/ratio"):
                metrics[name + "_max"] = stat.maximum
        tokens, seconds = float(trained.num_tokens), time.perf_counter() - start
        return metrics | {"throughput/update_tokens": tokens, "throughput/tokens_per_s_update": tokens / seconds}

    def weights(self) -> WeightStream:
        """Gathered while they are read, which must be before the next update: nobody has to hold them all."""
        specs = self._specs(WEIGHTS, None)
        return WeightStream(specs, self._gathered(WEIGHTS, specs, None))

    def state(self) -> dict[str, Any]:
        """Whole tensors, in the form that ``HFPolicy`` has: a run can go on with any number of ranks."""
        progress = self._ranks.all("progress")
        optimiser: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self._gather(OPTIMISER, None).items():
            index, _, key = name.partition("/")
            optimiser.setdefault(int(index), {})[key] = tensor
        return {
            "masters": self._gather(MASTERS, None),
            "optimiser": {"state": optimiser, "param_groups": progress["param_groups"]},
            "num_updates": progress["num_updates"],
            "num_skipped": progress["num_skipped"],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        optimiser = state["optimiser"]
        check_masters(state["masters"], self._specs(MASTERS, None))
        check_optimiser(optimiser, self.settings.optim.name)
        self._take(state["masters"], MASTERS, None)
        tensors = {f"{i}/{key}": torch.as_tensor(value) for i, entry in optimiser["state"].items() for key, value in entry.items()}
        self._take(tensors, OPTIMISER, None)
        self._ranks.all("restore", state["num_updates"], state["num_skipped"])

    def save(self, folder: Path) -> None:
        """Written by rank 0: with several machines, ``folder`` must be the same on all of them."""
        self._save(folder, None)

    def empty_cache(self) -> None:
        self._ranks.all("empty_cache")

    def snapshot(self) -> Snapshot:
        number = next(self._ranks.numbers)
        self._ranks.all("keep", number)
        return Snapshot(self, number)

    # ---------------------------------------------------------------- of the weights that learn (kept=None) or of a snapshot

    def _score(self, batch: Batch, kept: int | None) -> TokenScores:
        dtype = self.settings.master_dtype
        logprobs, entropy = torch.zeros(batch.num_tokens, dtype=dtype), torch.zeros(batch.num_tokens, dtype=dtype)
        if batch.rollouts:
            self._check_layout(batch)
            where = shares(batch, self._layout, self._ranks.num_ranks)
            found = self._ranks.each("score", [(batch.select(share), kept) for share in where])
            for share, scores in zip(where, found, strict=True):
                tokens = batch.token_positions(share)
                logprobs[tokens], entropy[tokens] = scores.logprobs, scores.entropy
        return TokenScores(logprobs=logprobs, entropy=entropy)

    def _check_layout(self, batch: Batch) -> None:
        if not self._layout_checked:
            self._layout = self._ranks.all("check_layout", batch.rollouts)
            self._layout_checked = True

    def _gather(self, kind: str, kept: int | None) -> dict[str, Tensor]:
        """All tensors of one kind."""
        return dict(self._gathered(kind, self._specs(kind, kept), kept))

    def _gathered(self, kind: str, specs: Mapping[str, Spec], kept: int | None) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors of one kind, a handful at a time: no more of them is whole on a rank, or on its way."""
        empty = ((f"{kind}/{name}", torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta")) for name, s in specs.items())
        for handful in handfuls(empty):
            parcel: PackedWeights = self._ranks.all("gather", list(handful), kept)
            for name, tensor in parcel.unpack().items():
                yield name.removeprefix(f"{kind}/"), tensor.clone()

    def _specs(self, kind: str, kept: int | None) -> dict[str, Spec]:
        """Of all tensors of one kind, by their names in the model."""
        specs: Mapping[str, Spec] = self._ranks.all("specs", kept)
        return {name.removeprefix(f"{kind}/"): spec for name, spec in specs.items() if name.startswith(f"{kind}/")}

    def _take(self, tensors: Mapping[str, Tensor], kind: str, kept: int | None) -> None:
        """Give every rank its shards of whole tensors."""
        for handful in handfuls((f"{kind}/{name}", tensor) for name, tensor in tensors.items()):
            self._ranks.all("take", PackedWeights.pack(handful), kept)

    def _save(self, folder: Path, kept: int | None) -> None:
        self._ranks.all("save", folder.absolute(), kept)
        if not any(folder.glob("*.safetensors")):
            raise RuntimeError(
                f"rank 0 has written a model to {folder}, but on another machine\n  → set run.dir to a folder that all share"
            )
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


class Snapshot:
    """The weights of a ``DistributedPolicy`` as they were, shard by shard on its ranks: the reference policy. It does not learn.

    It computes with the policy's model, for which the two exchange their weights. The ranks drop it with this object.
    """

    def __init__(self, policy: DistributedPolicy, number: int) -> None:
        self._policy, self._number = policy, number
        weakref.finalize(self, policy._ranks.forget, number).atexit = False

    def score(self, batch: Batch) -> TokenScores:
        return self._policy._score(batch, self._number)

    def update(self, minibatch: Batch, loss: Loss) -> Metrics:
        raise TypeError("a snapshot does not learn; update the policy that it was taken of")

    def weights(self) -> WeightStream:
        """See ``DistributedPolicy.weights``."""
        specs = self._policy._specs(WEIGHTS, self._number)
        return WeightStream(specs, self._gathered(specs))

    def _gathered(self, specs: Mapping[str, Spec]) -> Iterator[tuple[str, Tensor]]:
        yield from self._policy._gathered(WEIGHTS, specs, self._number)  # of this object: the ranks keep the weights while it is read

    def state(self) -> dict[str, Any]:
        weights = dict(self.weights())
        optimiser = torch.optim.SGD([torch.empty(0, requires_grad=True) for _ in weights], lr=0.0)  # what HFPolicy's snapshot has
        return {"masters": weights, "optimiser": optimiser.state_dict(), "num_updates": 0, "num_skipped": 0}

    def load_state(self, state: Mapping[str, Any]) -> None:
        check_masters(state["masters"], self._policy._specs(MASTERS, self._number))
        self._policy._take(state["masters"], MASTERS, self._number)

    def save(self, folder: Path) -> None:
        self._policy._save(folder, self._number)

    def empty_cache(self) -> None:
        self._policy.empty_cache()


# ---------------------------------------------------------------- who computes what


def shares(batch: Batch, layout: LayoutName, num: int) -> list[list[int]]:
    """The rollouts (positions in the batch) of each of ``num`` ranks, about equally many input tokens each; some may get none.

    Rollouts that share a prompt stay together. They are parted, at the price of the prompt once more, only where that takes a tenth
    off the work of the busiest rank.
    """
    whole, load = _deal(batch, layouts.rows(batch, layout, sys.maxsize), num)
    parted, parted_load = _deal(batch, layouts.rows(batch, layout, math.ceil(sum(load) / num)), num)
    return parted if max(parted_load) < 0.9 * max(load) else whole


def _deal(batch: Batch, rows: Sequence[Sequence[int]], num: int) -> tuple[list[list[int]], list[int]]:
    """Rows, the longest first, each to whoever has least: (rollouts, tokens) of each."""
    hands: list[list[int]] = [[] for _ in range(num)]
    load = [0] * num
    for row in rows:
        least = load.index(min(load))
        hands[least] += row
        load[least] += layouts.row_length(batch, row)
    return [sorted(hand) for hand in hands], load


def portable(loss: Loss) -> bytes:
    """A loss that other processes can load. Functions of a user's file travel by value: their module exists in this process alone."""
    from ray import cloudpickle

    functions = [loss.objective, loss.aggregate, loss.ratio, loss.kl, *loss.corrections.values()]
    names = {_function(f).__module__ for f in functions if f is not None}
    made_here = [module for name in names if name != "__main__" and (module := sys.modules[name]).__spec__ is None]
    for module in made_here:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickled: bytes = cloudpickle.dumps(loss)
    finally:
        for module in made_here:
            cloudpickle.unregister_pickle_by_value(module)
    return pickled


def _function(function: Callable[..., Any]) -> Any:
    """A function, or the class of a callable object, without the arguments that were fixed."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)
