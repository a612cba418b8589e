"""A policy trained by N processes: ``Policy`` over N ranks, each a Ray actor with a shard of the model (``grpo.ranks``).

The driver splits a batch over the ranks, a rank splits its part into micro-batches, FSDP2 sums the gradients. The denominators were
counted over the whole step before, so losses, gradients and metrics are sums over ranks, and those of one process.

A rank that dies leaves the others waiting for it. The driver hears of the death from Ray, ends the others and says what happened;
a rank that is alive and does not answer is found by the others' ``timeout``.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo import layouts
from grpo.batch import Batch
from grpo.layouts import LayoutName
from grpo.losses import Loss, TokenScores, merge
from grpo.policy import Metrics
from grpo.ranks import MASTERS, OPTIMISER, WEIGHTS, Answer, Born, MakeModel, RankActor, RankSettings, RankUpdate, token_positions
from grpo.rollouts.actor import engine_environment
from grpo.rollouts.pool import _raise_own
from grpo.rollouts.transfer import handfuls
from grpo.rollouts.weights import PackedWeights, Spec, shown

if TYPE_CHECKING:
    from ray import ObjectRef

_GRACE = 3.0  # seconds in which the other ranks can say why as well, once one call has failed
_PLACING = 60.0  # seconds to wait for CPUs and GPUs that the cluster has, and has given to others
_REMEDY = "often the system was out of memory: lower trainer.tokens_per_microbatch, raise trainer.ranks; then run.resume=true"


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
        self._snapshots = 0

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

    def weights(self) -> Mapping[str, Tensor]:
        return self._gather(WEIGHTS, None)

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
        self._take(state["masters"], MASTERS, None)
        optimiser = state["optimiser"]
        tensors = {f"{i}/{key}": torch.as_tensor(value) for i, entry in optimiser["state"].items() for key, value in entry.items()}
        self._take(tensors, OPTIMISER, None)
        self._ranks.all("restore", optimiser["param_groups"], state["num_updates"], state["num_skipped"])

    def save(self, folder: Path) -> None:
        """Written by rank 0: with several machines, ``folder`` must be the same on all of them."""
        self._save(folder, None)

    def snapshot(self) -> Snapshot:
        self._snapshots += 1
        self._ranks.all("keep", self._snapshots)
        return Snapshot(self, self._snapshots)

    # ---------------------------------------------------------------- of the weights that learn (kept=None) or of a snapshot

    def _score(self, batch: Batch, kept: int | None) -> TokenScores:
        dtype = self.settings.master_dtype
        logprobs, entropy = torch.zeros(batch.num_tokens, dtype=dtype), torch.zeros(batch.num_tokens, dtype=dtype)
        if batch.rollouts:
            self._check_layout(batch)
            where = shares(batch, self._layout, self._ranks.num_ranks)
            found = self._ranks.each("score", [(batch.select(share), kept) for share in where])
            for share, scores in zip(where, found, strict=True):
                tokens = token_positions(batch, share)
                logprobs[tokens], entropy[tokens] = scores.logprobs, scores.entropy
        return TokenScores(logprobs=logprobs, entropy=entropy)

    def _check_layout(self, batch: Batch) -> None:
        if not self._layout_checked:
            self._layout = self._ranks.all("check_layout", batch.rollouts)
            self._layout_checked = True

    def _gather(self, kind: str, kept: int | None) -> dict[str, Tensor]:
        """All tensors of one kind, a handful at a time: no rank holds more of them whole."""
        specs: Mapping[str, Spec] = self._ranks.all("specs", kept)
        empty = {name: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta") for name, s in specs.items()}
        wanted = [(name, tensor) for name, tensor in empty.items() if name.startswith(f"{kind}/")]
        found: dict[str, Tensor] = {}
        for handful in handfuls(wanted):
            parcel: PackedWeights = self._ranks.all("gather", list(handful), kept)
            found |= {name.removeprefix(f"{kind}/"): tensor.clone() for name, tensor in parcel.unpack().items()}
        return found

    def _take(self, tensors: Mapping[str, Tensor], kind: str, kept: int | None) -> None:
        """Give every rank its shards of whole tensors.

        Raises:
            ValueError: they are not those of this model; nothing was taken.
        """
        specs: Mapping[str, Spec] = self._ranks.all("specs", kept)
        expected = {name.removeprefix(f"{MASTERS}/"): spec.shape for name, spec in specs.items() if name.startswith(f"{MASTERS}/")}
        if kind == MASTERS and (wrong := [n for n in expected.keys() | tensors.keys() if not _fits(tensors.get(n), expected.get(n))]):
            raise ValueError(f"this state is of another model: {len(wrong)} tensors differ: {shown(wrong)}\n  → check model.path")
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

    def weights(self) -> Mapping[str, Tensor]:
        return self._policy._gather(WEIGHTS, self._number)

    def state(self) -> dict[str, Any]:
        weights = self.weights()
        optimiser = torch.optim.SGD([torch.empty(0, requires_grad=True) for _ in weights], lr=0.0)  # what HFPolicy's snapshot has
        return {"masters": weights, "optimiser": optimiser.state_dict(), "num_updates": 0, "num_skipped": 0}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._policy._take(state["masters"], MASTERS, self._number)

    def save(self, folder: Path) -> None:
        self._policy._save(folder, self._number)


def _fits(tensor: Tensor | None, shape: tuple[int, ...] | None) -> bool:
    return tensor is not None and shape is not None and tuple(tensor.shape) == shape


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


# ---------------------------------------------------------------- the processes


class Ranks:
    """N processes that make the same calls in the same order. ``ray`` must be running.

    Every call is made by a thread that no signal interrupts: Ctrl-C cannot fall between telling one rank and telling the next, after
    which the two would wait for each other for ever.

    Args:
        num_ranks: processes. On ``device="cuda"`` each has a GPU of its own.
        cpus_per_rank: threads of each, and what it claims of Ray.
        timeout: seconds that a rank waits for the others before it gives up, which ends them all.

    Raises:
        ValueError: the cluster does not have that many CPUs or GPUs.
        RuntimeError: they are taken, or a rank died.
    """

    def __init__(self, num_ranks: int, *, cpus_per_rank: int = 1, device: str = "cpu", timeout: float = 1800.0) -> None:
        import ray

        if not ray.is_initialized():
            raise RuntimeError("ray is not running; call grpo.rollouts.pool.start_ray first")
        self.num_ranks = num_ranks
        self._ended: str | None = None
        self._actors: list[Any] = []
        self._born: list[Born] = []
        self._told: set[str] = set()
        self._teller = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ranks")
        resources = {"CPU": cpus_per_rank, "GPU": int(device == "cuda")}
        _check_resources(ray.cluster_resources(), num_ranks, resources)
        self._place = ray.util.placement_group([{k: v for k, v in resources.items() if v}] * num_ranks, strategy="PACK")
        try:
            if not self._place.wait(_PLACING):
                raise RuntimeError(
                    f"the ray cluster has what {num_ranks} ranks need, but not free: {ray.available_resources()}\n"
                    "  → lower trainer.ranks or rollout.num_engines, or add machines"
                )
            environment = {"env_vars": engine_environment(cpus_per_rank)}
            actor_class = ray.remote(num_cpus=cpus_per_rank, num_gpus=resources["GPU"], runtime_env=environment)(RankActor)
            for number in range(num_ranks):
                where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=number)
                self._actors.append(actor_class.options(scheduling_strategy=where).remote(timeout))
            self._born = self._ask("born", [()] * num_ranks, "start")
            (meeting_point,) = self._ask("meeting_point", [()], "start")
            self._ask("join", [(rank, num_ranks, meeting_point, device) for rank in range(num_ranks)], "start")
        except BaseException:
            self.close()
            raise

    def load(self, make_model: MakeModel, settings: RankSettings) -> LayoutName:
        """Make a policy on the ranks, in place of the one that is there. Returns the layout that its model allows."""
        layout: LayoutName = self._values(self._ask("load", [(make_model, settings)] * self.num_ranks, "load"))[0]
        return layout

    def all(self, method: str, *args: Any) -> Any:
        """A method of the policy on every rank, with the same arguments; rank 0's answer."""
        import ray

        stored = [ray.put(arg) for arg in args]
        return self.each(method, [stored] * self.num_ranks)[0]

    def each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """A method of the policy on every rank, each with its own arguments; all answers.

        Raises:
            RuntimeError: a rank died. All are ended.
            Exception: what a rank raised, as it raised it. All are ended.
        """
        return self._values(self._ask("call", [(method, *args) for args in arguments], doing=method))

    def forget(self, number: int) -> None:
        """Not waited for: the garbage collector may call this from any thread, the telling one included."""
        if self._ended is None:
            self._submit("call", [("forget", number)] * self.num_ranks)

    def processes(self) -> list[int]:
        """Process ids, on whatever machines."""
        return [born.pid for born in self._born]

    def close(self) -> None:
        import ray

        self._end("this policy is closed; make a new one")
        actors, self._actors = self._actors, []
        self._teller.shutdown(wait=True)
        if not ray.is_initialized():
            return
        for actor in actors:
            ray.kill(actor, no_restart=True)
        here = ray.get_runtime_context().get_node_id()
        for born in self._born if actors else ():
            if born.node == here:
                _kill(born.pid)
        ray.util.remove_placement_group(self._place)

    def _end(self, why: str) -> None:
        self._ended = self._ended or why

    def _ask(self, method: str, arguments: Sequence[tuple[Any, ...]], doing: str) -> list[Any]:
        if self._ended is not None:
            raise RuntimeError(self._ended)
        return self._results(self._submit(method, arguments).result(), doing)

    def _submit(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Future[list[ObjectRef[Any]]]:
        actors = self._actors[: len(arguments)]
        return self._teller.submit(lambda: [getattr(actor, method).remote(*args) for actor, args in zip(actors, arguments, strict=True)])

    def _values(self, answers: Sequence[Answer]) -> list[Any]:
        """What the ranks returned. What rank 0 warned of is warned of here, once."""
        for text in answers[0].warnings:
            if text not in self._told:
                self._told.add(text)
                warnings.warn(text, stacklevel=2)
        return [answer.value for answer in answers]

    def _results(self, refs: list[ObjectRef[Any]], doing: str) -> list[Any]:
        import ray

        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            try:
                ray.get(ready)
            except ray.exceptions.RayError:
                self._fail(refs, doing)
        values: list[Any] = ray.get(refs)
        return values

    def _fail(self, refs: list[ObjectRef[Any]], doing: str) -> None:
        """A death explains what the others raised over it; else the first error is as good as any."""
        import ray

        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=_GRACE)
        errors = {refs.index(ref): error for ref in ready if (error := _error(ref)) is not None}
        deaths = {rank: error for rank, error in errors.items() if not isinstance(error, ray.exceptions.RayTaskError)}
        if deaths:
            rank, error = min(deaths.items())
            self._end(f"rank {rank} of {self.num_ranks} died while doing {doing!r}: {str(error).strip()}\n  → {_REMEDY}")
            self.close()
            raise RuntimeError(self._ended)
        error = min(errors.items())[1]
        self._end(f"a rank failed while doing {doing!r}: {str(getattr(error, 'cause', None) or error).strip()}")
        self.close()
        _raise_own(error)


def _error(ref: ObjectRef[Any]) -> Exception | None:
    import ray

    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        found: Exception = error
        return found
    return None


def _kill(pid: int) -> None:
    """A process that is stopped, or stands in a collective, does not hear ray."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it heard


def _check_resources(there: Mapping[str, float], num_ranks: int, each: Mapping[str, int]) -> None:
    """Ray would wait for ever for what the cluster does not have."""
    for name, number in each.items():
        if num_ranks * number > there.get(name, 0):
            raise ValueError(
                f"{num_ranks} ranks with {number} {name} each need {num_ranks * number}, and the ray cluster has {there.get(name, 0):g}\n"
                "  → lower trainer.ranks, or add machines"
            )
