"""The policy being trained: ``Policy`` is the seam, ``HFPolicy`` a transformers model in this process.

The trainer never sees a parameter or a gradient, only ``score`` and ``update`` – autograd does not cross processes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from grpo import fused, layouts, memory
from grpo.batch import Batch, on_device
from grpo.config import ConfigError
from grpo.layouts import LayoutName, ModelInputs
from grpo.logprobs import head_logprobs
from grpo.losses import Loss, Stat, TokenScores, merge
from grpo.model_support import check_layout, plan_layout, without_noise
from grpo.types import Rollout

if TYPE_CHECKING:
    from grpo.rollouts.base import Weights
    from grpo.rollouts.weights import Spec

Metrics = dict[str, float]

PIECE = 2**20  # numbers of a gradient that are added at a time: their fp32 copy stays in the processor's cache


class Policy(Protocol):
    def score(self, batch: Batch) -> TokenScores:
        """Log-probs and entropies of the batch's tokens under the present weights, without gradient."""
        ...

    def update(self, minibatch: Batch, loss: Loss) -> Metrics:
        """One optimiser step on one minibatch; split, forward, backward, clipping and step all inside."""
        ...

    def weights(self) -> Weights:
        """The compute weights under their Hugging Face names, tied ones once; read them before the next update."""
        ...

    def state(self) -> dict[str, Any]:
        """All that ``load_state`` needs to go on exactly here."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """A Hugging Face folder that transformers and vLLM load as it is."""
        ...

    def empty_cache(self) -> None:
        """Give back the GPU memory that torch keeps for later and no tensor is in: other processes may need it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimSettings:
    """What one optimiser step needs. ``schedule`` ∈ constant, linear, cosine, over ``num_updates`` in all."""

    name: str = "adamw"
    lr: float = 1e-6
    schedule: str = "constant"
    warmup: int = 0
    num_updates: int = 0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0


def learning_rate(update: int, s: OptimSettings) -> float:
    """The rate of optimiser update number ``update`` (from 0): a linear warm-up from lr/warmup, then the schedule down to its floor."""
    if update < s.warmup:
        return s.lr * (update + 1) / s.warmup
    progress = min((update - s.warmup) / max(s.num_updates - s.warmup, 1), 1.0)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[s.schedule]
    return s.lr * (s.min_lr_ratio + (1 - s.min_lr_ratio) * decay)


class HFPolicy:
    """A transformers causal language model: weights in ``dtype`` for computing, masters in at least fp32 for learning.

    AdamW on bf16 weights loses updates of this size to rounding, and autocast over fp32 weights casts all of them at every
    pass; so the model holds the compute copy, gradients are added up in fp32 as they appear, and the copy is renewed after
    each step – what FSDP2's mixed precision does, on one process. A float64 model is float64 throughout.
    """

    def __init__(
        self,
        model: Any,
        optim: OptimSettings,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        temperature: float = 1.0,
        layout: LayoutName = "shared_prompt",
        tokens_per_microbatch: int = 4096,
        logprob_chunk: int = 32,
        tokenizer: Any = None,
    ) -> None:
        self.device, self.dtype, self.temperature, self.optim = torch.device(device), dtype, temperature, optim
        self.tokens_per_microbatch, self.logprob_chunk, self.tokenizer = tokens_per_microbatch, logprob_chunk, tokenizer
        self.model = model.to(self.device).train()
        without_noise(model)
        check_head(self.model, self.device)
        fused.fuse(self.model)
        self.plan = plan_layout(self.model, layout)
        self._plan_checked = False
        if self.device.type == "cpu" and type(embedding := self.model.get_input_embeddings()) is nn.Embedding:
            embedding.sparse = True  # a gradient of the rows that were looked up, not of the whole vocabulary
        self.num_updates = self.num_skipped = 0
        exact = torch.promote_types(dtype, torch.float32)
        self.masters = {name: nn.Parameter(p.detach().to(exact, copy=True).contiguous()) for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():  # parameters only: rotary frequencies and other buffers stay fp32
            parameter.data = parameter.data.to(dtype)
            self.masters[name].grad = torch.zeros_like(self.masters[name])
            parameter.register_post_accumulate_grad_hook(self._accumulate(self.masters[name]))
        self.optimiser = make_optimiser(list(self.masters.values()), optim, self.device)
        _make_state(self.optimiser)
        if self.device.type == "cpu":
            memory.reuse_freed_pages()

    @staticmethod
    def _accumulate(master: nn.Parameter) -> Any:
        def hook(parameter: Tensor) -> None:
            assert master.grad is not None and parameter.grad is not None
            _add(master.grad, parameter.grad)
            parameter.grad = None

        return hook

    def score(self, batch: Batch) -> TokenScores:
        exact = torch.promote_types(self.dtype, torch.float32)
        logprobs, entropy = torch.zeros(batch.num_tokens, dtype=exact), torch.zeros(batch.num_tokens, dtype=exact)
        layout = self._layout(batch.rollouts)
        with torch.no_grad():
            for part_rows in layouts.microbatches(batch, layout, self.tokens_per_microbatch):
                scores = self._scores(layouts.lay_out(_of(batch, part_rows), layout))
                where = batch.token_positions([i for row in part_rows for i in row])
                logprobs[where], entropy[where] = scores.logprobs.cpu(), scores.entropy.cpu()
        return TokenScores(logprobs=logprobs, entropy=entropy)

    def update(self, minibatch: Batch, loss: Loss) -> Metrics:
        start = time.perf_counter()
        trained = minibatch.with_signal() if loss.signal_only else minibatch
        layout = self._layout(trained.rollouts)
        losses: list[Tensor] = []
        stats: list[Mapping[str, Stat]] = []
        for part_rows in layouts.microbatches(trained, layout, self.tokens_per_microbatch):
            part = trained.select([i for row in part_rows for i in row])
            output = loss(self._scores(layouts.lay_out(_of(trained, part_rows), layout)), to_device(part, self.device))
            output.loss.backward()
            losses.append(output.loss.detach())  # a tensor, as the stats are: to read it here would make a GPU wait
            stats.append(output.stats)
        total = float(torch.stack(losses).sum()) if losses else 0.0
        metrics = {"policy/loss": total, "policy/trained_rollouts": float(len(trained.rollouts))}
        if trained.rollouts:
            metrics |= self._step(finite=math.isfinite(total))
        for name, stat in merge(stats).items():
            metrics[name] = stat.mean
            if name in ("sampler/logprob_diff", "policy/ratio"):
                metrics[name + "_max"] = stat.maximum
        seconds = time.perf_counter() - start
        return metrics | {
            "throughput/update_tokens": float(trained.num_tokens),
            "throughput/tokens_per_s_update": trained.num_tokens / seconds,
        }

    def weights(self) -> Mapping[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        return {
            "masters": {n: p.detach() for n, p in self.masters.items()},
            "optimiser": self.optimiser.state_dict(),
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        check_masters(state["masters"], self.masters)
        check_optimiser(state["optimiser"], optimiser_of(self.optimiser.param_groups))  # a snapshot's is not that of its settings
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        restore_moments(self.optimiser, state["optimiser"]["state"])
        self.num_updates, self.num_skipped = state["num_updates"], state["num_skipped"]
        self._renew()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def snapshot(self) -> HFPolicy:
        """A frozen copy to score with: the reference policy. It learns nothing, so its compute weights are its whole state."""
        clone = copy.copy(self)
        clone.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        clone.masters = dict(clone.model.named_parameters())
        clone.optimiser = torch.optim.SGD(clone.masters.values(), lr=0.0)
        return clone

    def _layout(self, rollouts: Sequence[Rollout]) -> LayoutName:
        """The layout for these rollouts. The first ones are laid out in two ways, to see that the model gives the same."""
        if rollouts and not self._plan_checked:
            with torch.no_grad():
                self.plan = check_layout(self.model, self.plan, rollouts, lambda inputs: self._scores(inputs).logprobs)
            self._plan_checked = True
        return self.plan.choose(self.model, rollouts)

    def _scores(self, inputs: ModelInputs) -> TokenScores:
        inputs = inputs.to(self.device)
        hidden = self.model.base_model(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False, **inputs.attention
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        predictors = hidden.flatten(0, 1)[inputs.gather]
        logprobs, entropy = head_logprobs(head, predictors, inputs.targets, self.temperature, self.logprob_chunk, inputs.kept)
        return TokenScores(logprobs=logprobs, entropy=entropy)

    def _step(self, finite: bool) -> Metrics:
        """Clip, step, renew the compute copy. A loss or a gradient that is not finite moves nothing, the optimiser's state included.

        Args:
            finite: whether the loss is.
        """
        masters = list(self.masters.values())
        norm = torch.nn.utils.get_total_norm([cast(Tensor, m.grad) for m in masters])
        rate = learning_rate(self.num_updates, self.optim)
        if finite and bool(norm.isfinite()):
            clip_and_step(self.optimiser, norm, self.optim.max_grad_norm, rate)
            self._renew()
        else:
            self.num_skipped += 1
        for master in masters:
            cast(Tensor, master.grad).zero_()
        self.num_updates += 1
        return {"policy/grad_norm": float(norm), "policy/lr": rate, "optim/skipped_updates": float(self.num_skipped)}

    @torch.no_grad()
    def _renew(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.masters[name])


@torch.no_grad()
def check_head(model: Any, device: torch.device) -> None:
    """Log-probs are made from the last hidden states and the head alone, which is not what every model does.

    Raises:
        ValueError: the model rescales or caps its logits after its head, as Granite, Cohere and Gemma 2 do.
    """
    ids = torch.arange(4, device=device)[None]
    own = model(input_ids=ids, use_cache=False).logits
    ours = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own.float(), ours.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{type(model).__name__} changes its logits after its output head (a scale or a soft cap), which is not supported: "
            "its log-probs would be wrong\n  → use another model"
        )


NUM_MOMENTS = {"adamw": 2, "sgd": 0}  # fp32 numbers that an optimiser keeps for each weight


def make_optimiser(parameters: list[nn.Parameter], s: OptimSettings, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser that the settings name, without a state yet."""
    if s.name == "sgd":
        return torch.optim.SGD(parameters, lr=s.lr, weight_decay=s.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=device.type in ("cpu", "cuda")
    )


def _make_state(optimiser: torch.optim.Optimizer) -> None:
    """Make what the first step would make, as zeros: made between activations, it would split the memory that these reuse."""
    rates = [group["lr"] for group in optimiser.param_groups]
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    optimiser.step()  # of gradients that are zero
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimiser.state.values():
        if "step" in state:
            state["step"].zero_()


def clip_and_step(optimiser: torch.optim.Optimizer, norm: Tensor, max_norm: float, rate: float) -> None:
    """One step at this learning rate, of gradients whose norm is ``norm``, brought down to ``max_norm``; 0: as they are."""
    for group in optimiser.param_groups:
        group["lr"] = rate
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(group["params"], max_norm, norm)
    optimiser.step()


def restore_moments(optimiser: torch.optim.Optimizer, moments: Mapping[int, Any]) -> None:
    """What an optimiser has gathered. Its settings stay those that it was made with: a run may be gone on with under others."""
    optimiser.load_state_dict({"state": dict(moments), "param_groups": optimiser.state_dict()["param_groups"]})


def check_masters(held: Mapping[str, Tensor], masters: Mapping[str, Tensor | Spec]) -> None:
    """Raises:
    ConfigError: a checkpoint ``held`` the weights of another model.
    """
    then: dict[str, list[int]] = {name: list(tensor.shape) for name, tensor in held.items()}
    now = {name: list(tensor.shape) for name, tensor in masters.items()}
    for name in [*now, *then]:
        if then.get(name) != now.get(name):
            what = f"names another model than this run has trained: {name} is {then.get(name, 'missing')} in its checkpoint"
            remedy = "leave it as it was; or start another run from that model"
            raise ConfigError("model.path", f"{what}, and {now.get(name, 'missing')} in the model", remedy)


def check_optimiser(state: Mapping[str, Any], name: str) -> None:
    """Raises:
    ConfigError: ``state`` is of another optimiser than ``name``.
    """
    before = optimiser_of(state["param_groups"])
    if before != name:
        what = f"is {name}, and this run has begun with {before}: its state is of no use to {name}"
        raise ConfigError("optim.name", what, f"leave it at {before}; or start another run from the weights of a checkpoint: model.path=…")


def optimiser_of(param_groups: Sequence[Mapping[str, Any]]) -> str:
    return "adamw" if "betas" in param_groups[0] else "sgd"


def _add(into: Tensor, grad: Tensor) -> None:
    """``into += grad``, whatever the dtype of ``grad``."""
    if grad.is_sparse:
        into.index_add_(0, grad._indices()[0], grad._values().to(into.dtype))  # a row that was looked up twice is there twice
        return
    size = PIECE if into.device.type == "cpu" else into.numel()
    for some, more in zip(into.view(-1).split(size), grad.reshape(-1).split(size), strict=True):
        some.add_(more)


def _of(batch: Batch, rows: Sequence[Sequence[int]]) -> list[list[Rollout]]:
    return [[batch.rollouts[i] for i in row] for row in rows]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; its rollouts stay as they are."""
    if device.type == "cpu":
        return batch
    tensors = {f.name: on_device(v, device) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors)  # type: ignore[arg-type]
