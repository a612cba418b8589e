"""One rank's part of a policy that several processes train: a shard of the model, in FSDP2's hands.

Every rank makes the same calls in the same order, because most of them are collective. A rank holds 1/N of the weights, in fp32 or
wider, and of the optimiser's state; a decoder layer is whole, in the precision of computing, only while it is computed with.

Gradients are summed over ranks, not averaged: a loss is already divided by the totals of the whole optimiser step, so the sum over
micro-batches and ranks is the gradient that one process would have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from ray import cloudpickle
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from grpo import fused, layouts, memory, model_support
from grpo.batch import Batch
from grpo.layouts import LayoutName, ModelInputs
from grpo.logprobs import head_logprobs
from grpo.losses import Loss, Stat, TokenScores, merge
from grpo.policy import OptimSettings, check_head, clip_and_step, learning_rate, make_optimiser, restore_moments, to_device
from grpo.rollouts.weights import PackedWeights, Spec
from grpo.types import Completion, FinishReason, Problem, Rollout

MakeModel = Callable[..., Any]
WEIGHTS, MASTERS, OPTIMISER = "weights", "masters", "optimiser"  # the kinds of tensors that leave a rank, as in ``masters/NAME``


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """What every rank is told. ``dtype_name`` is the precision of computing, ``device`` is ``cpu`` or ``cuda``.

    ``shard_gradients`` adds up gradients over ranks after every micro-batch instead of once a step: N times less memory for them, and
    as many times more traffic as there are micro-batches.
    """

    optim: OptimSettings
    dtype_name: str = "float32"
    device: str = "cpu"
    temperature: float = 1.0
    layout: LayoutName = "shared_prompt"
    tokens_per_microbatch: int = 4096
    shard_gradients: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype_name))

    @property
    def master_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankUpdate:
    """What came of an update: the stats of one rank, which add up over ranks, beside numbers that are those of all of them."""

    stats: Mapping[str, Stat]
    loss: float
    grad_norm: float
    lr: float
    num_skipped: int  # updates so far that moved nothing, because their loss or gradient was not finite


class Scorer(nn.Module):
    """Model and head as one module, FSDP's root: it has the embedding, the last norm and the head, whole from its call to the end of
    the backward pass. They cannot be sharded apart, since the embedding of many models is their head.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of ``inputs.targets``: a plain tuple, the only thing in which FSDP finds tensors that need gradients."""
        hidden = self.model.base_model(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False, **inputs.attention
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        return head_logprobs(head, hidden.flatten(0, 1)[inputs.gather], inputs.targets, self.temperature, kept=inputs.kept)


class ShardedPolicy:
    """One rank's part of a policy. Every method but ``keep``, ``forget`` and ``empty_cache`` is collective.

    Args:
        make_model: called as ``make_model(empty=True)`` on every rank for a model on the meta device, without weights, and on rank 0
            also as ``make_model(empty=False)`` for the same model with them.
    """

    def __init__(self, make_model: MakeModel, settings: RankSettings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.mesh = init_device_mesh(settings.device, (dist.get_world_size(),))
        self.is_first = dist.get_rank() == 0
        self.model = make_model(empty=True).train()
        for parameter in self.model.parameters():  # parameters only: rotary frequencies and other buffers keep their precision
            parameter.data = parameter.data.to(settings.master_dtype)
        model_support.without_noise(self.model)
        fused.fuse(self.model)
        self.scorer = Scorer(self.model, settings.temperature)
        shard(self.scorer, self.mesh, settings)
        source = make_model(empty=False) if self.is_first else None
        fill(self.model, source, self.device)
        self.skeleton = None if source is None else source.to(device="meta", dtype=settings.dtype)  # knows how its folder is written
        if self.device.type == "cpu":
            memory.reuse_freed_pages()
        self.masters = {name: cast(DTensor, parameter) for name, parameter in self.model.named_parameters()}
        self.plan = model_support.plan_layout(self.model, settings.layout)
        self.optimiser = make_optimiser(cast(list[nn.Parameter], list(self.masters.values())), settings.optim, self.device)
        self.num_updates = self.num_skipped = 0
        self.loss: Loss | None = None
        self.kept: dict[int, dict[str, DTensor]] = {}
        self._incoming: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)

    # ---------------------------------------------------------------- score and update

    def check_layout(self, rollouts: Sequence[Rollout]) -> LayoutName:
        """Compare the layout with padded rows on two of these rollouts (the same on every rank). Returns what is used from here on."""
        with torch.no_grad():
            cast(FSDPModule, self.scorer).unshard()  # only now has the model the precision that the comparison is made in
            self.plan = model_support.check_layout(self.model, self.plan, rollouts, lambda inputs: self.scorer(inputs.to(self.device))[0])
            self._reshard()
        return self.plan.layout

    @torch.no_grad()
    def score(self, part: Batch, kept: int | None = None) -> TokenScores:
        """Of this rank's part of a batch, by the weights that learn or by those that ``keep`` put by."""
        dtype = self.settings.master_dtype
        logprobs, entropy = torch.zeros(part.num_tokens, dtype=dtype), torch.zeros(part.num_tokens, dtype=dtype)
        layout, rows = self._rows(part)
        with self._showing(kept):
            for some in rows:
                scores = self.scorer(self._inputs(part, some, layout))
                if some:
                    where = part.token_positions([i for row in some for i in row])
                    logprobs[where], entropy[where] = (values.cpu() for values in scores)
            self._reshard()
        return TokenScores(logprobs=logprobs, entropy=entropy)

    def learn_from(self, loss: bytes) -> None:
        """The pickled loss of the updates to come. Sent once: what a user's function remembers, it remembers on every rank."""
        self.loss = cloudpickle.loads(loss)

    def update(self, part: Batch) -> RankUpdate:
        """One optimiser step, in which this rank computes its part of the minibatch."""
        assert self.loss is not None, "learn_from comes first"
        layout, rows = self._rows(part)
        root, stats = cast(FSDPModule, self.scorer), []
        total = torch.zeros((), dtype=self.settings.master_dtype, device=self.device)
        for number, some in enumerate(rows):
            last = number == len(rows) - 1
            root.set_requires_gradient_sync(last or self.settings.shard_gradients)
            root.set_is_last_backward(last)
            logprobs, entropy = self.scorer(self._inputs(part, some, layout))
            if not some:
                (0 * logprobs.sum()).backward()
                continue
            piece = part.select([i for row in some for i in row])
            output = self.loss(TokenScores(logprobs=logprobs, entropy=entropy), to_device(piece, self.device))
            output.loss.backward()
            total += output.loss.detach()
            stats.append(output.stats)
        dist.all_reduce(total)
        grad_norm, lr = self._step(finite=bool(total.isfinite()))
        return RankUpdate(stats=_on_cpu(merge(stats)), loss=float(total), grad_norm=grad_norm, lr=lr, num_skipped=self.num_skipped)

    def _rows(self, part: Batch) -> tuple[LayoutName, list[list[list[int]]]]:
        """This rank's micro-batches; empty ones follow until there are as many as on the rank that has the most."""
        layout = self.plan.choose(self.model, part.rollouts)
        rows = list(layouts.microbatches(part, layout, self.settings.tokens_per_microbatch))
        most = torch.tensor(len(rows))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return layout, rows + [[]] * (int(most) - len(rows))

    def _inputs(self, part: Batch, some: list[list[int]], layout: LayoutName) -> ModelInputs:
        rows = [[part.rollouts[i] for i in row] for row in some] or [[STAND_IN]]
        return layouts.lay_out(rows, layout).to(self.device)

    def _step(self, finite: bool) -> tuple[float, float]:
        """Clip by the norm over all ranks, and step, as ``HFPolicy`` does: (that norm, the learning rate)."""
        masters, optim = list(self.masters.values()), self.settings.optim
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = torch.nn.utils.get_total_norm([cast(Tensor, m.grad) for m in masters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        rate = learning_rate(self.num_updates, optim)
        if finite and bool(norm.isfinite()):
            clip_and_step(self.optimiser, norm, optim.max_grad_norm, rate)
        else:
            self.num_skipped += 1
        self.optimiser.zero_grad()
        self.num_updates += 1
        return float(norm), rate

    def _reshard(self) -> None:
        """Without a backward pass, FSDP leaves the root whole: the next update would not reach it, and its shards could not be read."""
        cast(FSDPModule, self.scorer).reshard()

    # ---------------------------------------------------------------- snapshots

    @torch.no_grad()
    def keep(self, number: int) -> None:
        """Put the present weights by, under a number."""
        self.kept[number] = {name: cast(DTensor, master.detach().clone()) for name, master in self.masters.items()}

    def forget(self, number: int) -> None:
        self.kept.pop(number, None)

    @contextmanager
    def _showing(self, kept: int | None) -> Iterator[None]:
        """Compute with the weights put by. They change places with the masters, so nothing is held twice."""
        if kept is None:
            yield
            return
        self._exchange(self.kept[kept])
        try:
            yield
        finally:
            self._exchange(self.kept[kept])

    def _exchange(self, others: Mapping[str, DTensor]) -> None:
        self._reshard()
        for name, master in self.masters.items():
            mine, other = master.to_local(), others[name].to_local()
            before = mine.clone()
            mine.copy_(other)
            other.copy_(before)

    # ---------------------------------------------------------------- tensors in and out

    def specs(self, kept: int | None = None) -> dict[str, Spec]:
        """All tensors that ``gather`` can be asked for, under names such as ``masters/model.norm.weight``."""
        found: dict[str, Spec] = {}
        for name, master in self.masters.items():
            found[f"{MASTERS}/{name}"] = Spec.of(master)
            found[f"{WEIGHTS}/{name}"] = Spec(tuple(master.shape), self.settings.dtype_name)
        if kept is None:
            states = self._optimiser_state().items()
            found |= {f"{OPTIMISER}/{i}/{key}": Spec.of(tensor) for i, state in states for key, tensor in state.items()}
        return found

    @torch.no_grad()
    def gather(self, names: Sequence[str], kept: int | None = None) -> PackedWeights | None:
        """Whole tensors, on rank 0."""
        whole = {name: tensor for name in names if (tensor := self._gathered(name, kept)) is not None}
        return PackedWeights.pack(whole) if self.is_first else None

    def progress(self) -> dict[str, Any]:
        """What a state holds beside tensors."""
        groups = self.optimiser.state_dict()["param_groups"]
        return {"param_groups": groups, "num_updates": self.num_updates, "num_skipped": self.num_skipped}

    @torch.no_grad()
    def take(self, parcel: PackedWeights, kept: int | None = None) -> None:
        """Cut this rank's shard out of whole tensors. What belongs to the optimiser waits for ``restore``."""
        masters = self.masters if kept is None else self.kept[kept]
        for name, whole in parcel.unpack().items():
            kind, _, rest = name.partition("/")
            if kind == MASTERS:
                masters[rest].to_local().copy_(_like(masters[rest], whole).to_local())
                continue
            index, _, key = rest.partition("/")
            master = list(self.masters.values())[int(index)]
            self._incoming[int(index)][key] = _like(master, whole).clone() if whole.shape == master.shape else whole.clone()

    def restore(self, num_updates: int, num_skipped: int) -> None:
        restore_moments(self.optimiser, self._incoming)
        self.num_updates, self.num_skipped = num_updates, num_skipped
        self._incoming.clear()

    @torch.no_grad()
    def save(self, folder: Path, kept: int | None = None) -> None:
        """A Hugging Face folder, written by rank 0."""
        weights = {name: whole for name in self.masters if (whole := self._gathered(f"{WEIGHTS}/{name}", kept)) is not None}
        if self.skeleton is not None:
            buffers = {name: value for name, value in self.model.state_dict().items() if not isinstance(value, DTensor)}
            self.skeleton.save_pretrained(folder, state_dict=weights | buffers)

    def empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _gathered(self, name: str, kept: int | None) -> Tensor | None:
        """The whole tensor, on rank 0."""
        tensor = self._tensor(name, kept)
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.cpu() if self.is_first else None

    def _tensor(self, name: str, kept: int | None) -> Tensor:
        kind, _, rest = name.partition("/")
        if kind == OPTIMISER:
            index, _, key = rest.partition("/")
            return self._optimiser_state()[int(index)][key]
        master = (self.masters if kept is None else self.kept[kept])[rest].detach()
        return master.to(self.settings.dtype) if kind == WEIGHTS else master

    def _optimiser_state(self) -> dict[int, dict[str, Tensor]]:
        return cast(dict[int, dict[str, Tensor]], self.optimiser.state_dict()["state"])


def shard(scorer: Scorer, mesh: DeviceMesh, settings: RankSettings) -> None:
    """Hand every decoder layer (what transformers says must not be split), and then all the rest, to FSDP2."""
    computing = settings.dtype if settings.dtype is not settings.master_dtype else None
    # Activations have the precision of the embedding, as in one process. To cast them, FSDP would copy every dataclass that a layer is
    # given, and what is kept for a tree of segments (``tree_attention``) would be made again in each layer.
    precision = MixedPrecisionPolicy(param_dtype=computing, reduce_dtype=settings.master_dtype, cast_forward_inputs=False)
    layers = set(scorer.model._no_split_modules or ())
    for module in reversed(list(scorer.modules())):
        if type(module).__name__ in layers or module is scorer:
            fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum over ranks, which is divided by nothing
            module.set_force_sum_reduction_for_comms(True)
    cast(FSDPModule, scorer).set_reduce_scatter_unused_params(True)  # an expert may have work on one rank alone


@torch.no_grad()
def fill(model: nn.Module, source: Any, device: torch.device) -> None:
    """Give a sharded model without weights those of ``source``, a whole model that rank 0 alone has, a tensor at a time.

    Raises:
        ValueError: the two models are not the same, or the model cannot be trained here (see ``check_head``).
    """
    if source is not None:  # an error of rank 0 ends them all
        model_support.without_noise(source)
        check_head(source, torch.device("cpu"))
        _check_same(_shapes(model), _shapes(source))
    model.to_empty(device=device)
    weights = dict(source.named_parameters()) if source is not None else {}
    for name, parameter in model.named_parameters():
        target = cast(DTensor, parameter)
        whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        if source is not None:
            whole.copy_(weights[name])
        mine = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=0)
        target.to_local().copy_(mine.to_local())
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if source is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for named in (model.named_parameters(), model.named_buffers()) for name, t in named}


def _check_same(empty: Mapping[str, tuple[int, ...]], full: Mapping[str, tuple[int, ...]]) -> None:
    if other := sorted(name for name in empty.keys() | full.keys() if empty.get(name) != full.get(name)):
        shown = ", ".join(f"{name} ({empty.get(name)} by the configuration, {full.get(name)} in the weights)" for name in other[:3])
        raise ValueError(
            f"the model made from its configuration is not the one made from its weights: {len(other)} tensors differ, such as {shown}\n"
            "  → set trainer.ranks=1, or model.args to arguments that are the model's configuration"
        )


def _like(target: DTensor, whole: Tensor) -> DTensor:
    """Every rank has ``whole``: each cuts its own shard, and nothing is sent."""
    return distribute_tensor(whole.to(target.device, target.dtype), target.device_mesh, target.placements, src_data_rank=None)


def _on_cpu(stats: Mapping[str, Stat]) -> dict[str, Stat]:
    return {name: Stat(stat.total.cpu(), stat.count, stat.peak.cpu()) for name, stat in stats.items()}


STAND_IN = Rollout(  # what a rank without work computes, times 0, because the others need its part of the weights
    problem=Problem(id="", prompt="", answer=""),
    completion=Completion(
        problem_id="",
        index=0,
        prompt_ids=(0,),
        token_ids=(0, 0),
        text="",
        logprobs=(0.0, 0.0),
        policy_versions=(0, 0),
        finish_reason=FinishReason.stop,
    ),
    scores={},
    reward=0.0,
)
