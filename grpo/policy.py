"""The policy being trained: ``Policy`` is the seam, ``HFPolicy`` a transformers model in this process.

The trainer never sees a parameter or a gradient, only ``score`` and ``update`` – autograd does not cross processes.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from grpo import layouts, tree_attention
from grpo.batch import Batch
from grpo.logprobs import token_logprobs
from grpo.losses import Loss, Stat, TokenScores, merge

Metrics = dict[str, float]


class Policy(Protocol):
    def score(self, batch: Batch) -> TokenScores:
        """Log-probs and entropies of the batch's tokens under the present weights, without gradient."""
        ...

    def update(self, minibatch: Batch, loss: Loss) -> Metrics:
        """One optimiser step on one minibatch; split, forward, backward, clipping and step all inside."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The compute weights under their Hugging Face names, tied ones once."""
        ...

    def state(self) -> dict[str, Any]:
        """All that ``load_state`` needs to go on exactly here."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """A Hugging Face folder that transformers and vLLM load as it is."""
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
    """A transformers causal language model: weights in ``dtype`` for computing, fp32 masters for learning.

    AdamW on bf16 weights loses updates of this size to rounding, and autocast over fp32 weights casts all of them at every
    pass; so the model holds the compute copy, gradients are added up in fp32 as they appear, and the copy is renewed after
    each step – what FSDP2's mixed precision does, on one process.
    """

    def __init__(
        self,
        model: Any,
        optim: OptimSettings,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        temperature: float = 1.0,
        shared_prompt: bool = True,
        tokens_per_microbatch: int = 4096,
        logprob_chunk: int = 256,
        tokenizer: Any = None,
    ) -> None:
        if shared_prompt and (why := layouts.unsupported(model.config)):
            warnings.warn(f"trainer.layout=shared_prompt is not possible for this model: {why}; using padded", stacklevel=2)
            shared_prompt = False
        self.device, self.dtype, self.temperature, self.optim = torch.device(device), dtype, temperature, optim
        self.shared_prompt, self.tokens_per_microbatch, self.logprob_chunk = shared_prompt, tokens_per_microbatch, logprob_chunk
        self.tokenizer = tokenizer
        self.model = model.to(self.device).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # a ratio of log-probs under two dropout masks means nothing
        _check_head(self.model, self.device)
        if self.shared_prompt:
            tree_attention.register()
            self.model.set_attn_implementation(tree_attention.NAME)
        self.num_updates = 0
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():  # parameters only: rotary frequencies and other buffers stay fp32
            parameter.data = parameter.data.to(dtype)
            self.masters[name].grad = torch.zeros_like(self.masters[name])
            parameter.register_post_accumulate_grad_hook(self._accumulate(self.masters[name]))
        self.optimiser = _optimiser(list(self.masters.values()), optim, self.device)

    @staticmethod
    def _accumulate(master: nn.Parameter) -> Any:
        def hook(parameter: Tensor) -> None:
            assert master.grad is not None and parameter.grad is not None
            master.grad.add_(parameter.grad)
            parameter.grad = None

        return hook

    def score(self, batch: Batch) -> TokenScores:
        dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        logprobs, entropy = torch.zeros(batch.num_tokens, dtype=dtype), torch.zeros(batch.num_tokens, dtype=dtype)
        starts = torch.searchsorted(batch.rollout_index, torch.arange(len(batch.rollouts) + 1))
        with torch.no_grad():
            for part_rows in layouts.microbatches(batch, self.shared_prompt, self.tokens_per_microbatch):
                scores = self._forward(batch, part_rows)
                where = torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for row in part_rows for i in row])
                logprobs[where], entropy[where] = scores.logprobs.cpu(), scores.entropy.cpu()
        return TokenScores(logprobs=logprobs, entropy=entropy)

    def update(self, minibatch: Batch, loss: Loss) -> Metrics:
        start = time.perf_counter()
        trained = minibatch.with_signal() if loss.signal_only else minibatch
        parts: list[Mapping[str, Stat]] = []
        total_loss, computed = 0.0, 0
        for part_rows in layouts.microbatches(trained, self.shared_prompt, self.tokens_per_microbatch):
            part = trained.select([i for row in part_rows for i in row])
            output = loss(self._forward(trained, part_rows), _to(part, self.device))
            output.loss.backward()
            total_loss += float(output.loss.detach())
            computed += sum(len(r.completion.token_ids) for r in part.rollouts)
            parts.append(output.stats)
        metrics = {"policy/loss": total_loss, "policy/trained_rollouts": float(len(trained.rollouts))}
        if trained.rollouts:
            metrics |= self._step()
        for name, stat in merge(parts).items():
            metrics[name] = stat.mean
            if name in ("sampler/logprob_diff", "policy/ratio"):
                metrics[name + "_max"] = stat.maximum
        if self.device.type == "cpu":
            release_freed_memory()
        seconds = time.perf_counter() - start
        return metrics | {"throughput/update_tokens": float(computed), "throughput/tokens_per_s_update": computed / seconds}

    def weights(self) -> Mapping[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        return {
            "masters": {n: p.detach() for n, p in self.masters.items()},
            "optimiser": self.optimiser.state_dict(),
            "num_updates": self.num_updates,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.num_updates = state["num_updates"]
        self._renew()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def snapshot(self) -> HFPolicy:
        """A frozen copy to score with: the reference policy. It learns nothing, so its compute weights are its whole state."""
        clone = copy.copy(self)
        clone.model = copy.deepcopy(self.model).eval().requires_grad_(False)
        clone.masters = dict(clone.model.named_parameters())
        clone.optimiser = torch.optim.SGD(clone.masters.values(), lr=0.0)
        return clone

    def _forward(self, batch: Batch, part_rows: list[list[int]]) -> TokenScores:
        inputs = layouts.lay_out([[batch.rollouts[i] for i in row] for row in part_rows], self.shared_prompt).to(self.device)
        hidden = self.model.base_model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            use_cache=False,
            **({"tree": inputs.tree} if inputs.tree else {"attention_mask": inputs.attention_mask}),
        ).last_hidden_state
        head = self.model.get_output_embeddings()
        logprobs, entropy = token_logprobs(
            hidden.flatten(0, 1)[inputs.gather], head.weight, head.bias, inputs.targets, self.temperature, self.logprob_chunk
        )
        return TokenScores(logprobs=logprobs, entropy=entropy)

    def _step(self) -> Metrics:
        """Clip, step, renew the compute copy."""
        masters = list(self.masters.values())
        norm = torch.nn.utils.get_total_norm([cast(Tensor, m.grad) for m in masters])
        if self.optim.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, self.optim.max_grad_norm, norm)
        rate = learning_rate(self.num_updates, self.optim)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        for master in masters:
            cast(Tensor, master.grad).zero_()
        self.num_updates += 1
        self._renew()
        return {"policy/grad_norm": float(norm), "policy/lr": rate}

    @torch.no_grad()
    def _renew(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.masters[name])


@torch.no_grad()
def _check_head(model: Any, device: torch.device) -> None:
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


def release_freed_memory() -> None:
    """Give the activations' memory back to the system, for the engine's turn: glibc keeps it, in pieces that grow with every step."""
    with contextlib.suppress(OSError, AttributeError):  # elsewhere than on glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _optimiser(parameters: list[nn.Parameter], s: OptimSettings, device: torch.device) -> torch.optim.Optimizer:
    if s.name == "sgd":
        return torch.optim.SGD(parameters, lr=s.lr, weight_decay=s.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=s.lr, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=device.type in ("cpu", "cuda")
    )


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return replace(batch, **{f.name: v.to(device) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)})  # type: ignore[arg-type]
