"""Hidden states → log-probs and entropies, a chunk of tokens at a time: the full logits are never held.

A vocabulary of 49,152 makes 192 KiB of fp32 logits a token – more than all the activations of a small model. Here the forward
pass keeps two numbers a token; the backward pass makes the logits of each chunk once more.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_logprobs(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log softmax(W h / T)[target] and the entropy of that softmax, both fp32 and differentiable in ``hidden``, ``weight`` and ``bias``.

    With z the logits / T, p = softmax(z), ℓ = z_y − log Σ e^z and H = −Σ p log p:
    ∂ℓ/∂z = 1_y − p and ∂H/∂z = −p (log p + H).
    """
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, temperature, chunk)


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, out: Tensor) -> Tensor:
    """z = (W h + b) / T of one chunk, written into ``out``."""
    logits = out[: len(hidden)].copy_(torch.nn.functional.linear(hidden, weight, bias))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _workspace(hidden: Tensor, weight: Tensor, chunk: int, number: int) -> list[Tensor]:
    """Buffers [chunk, vocab] for a whole pass: fresh ones for every chunk cost more, in page faults, than the arithmetic."""
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    return [torch.empty(min(chunk, len(hidden)), len(weight), dtype=dtype, device=hidden.device) for _ in range(number)]


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int) -> Any:
        z_space, p_space = _workspace(hidden, weight, chunk, 2)
        logprob, entropy = z_space.new_empty(len(hidden)), z_space.new_empty(len(hidden))
        log_total = torch.empty_like(logprob)  # log Σ e^z, so that the backward pass need not sum again
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            z = _scaled_logits(hidden[part], weight, bias, temperature, z_space)
            highest = z.amax(-1)
            e = torch.exp(z.sub_(highest[:, None]), out=p_space[: len(z)])
            total = e.sum(-1)
            logprob[part] = z.gather(-1, targets[part, None])[:, 0] - total.log()
            log_total[part] = highest + total.log()
            entropy[part] = total.log() - e.mul_(z.clamp_min_(torch.finfo(z.dtype).min)).sum(-1) / total  # −Σ p log p; 0 · −∞ is 0
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_total)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_logprob, grad_entropy = grads
        hidden, weight, bias, targets, entropy, log_total = ctx.saved_tensors
        wants_weight, wants_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        entropy_used = bool((grad_entropy != 0).any())
        z_space, *spare = _workspace(hidden, weight, ctx.chunk, 2 if entropy_used else 1)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=z_space.dtype) if wants_weight else None  # bf16 sums would lose small chunks
        grad_bias = torch.zeros_like(bias, dtype=z_space.dtype) if wants_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h, into_logprob, into_entropy = hidden[part], grad_logprob[part, None], grad_entropy[part, None]
            log_p = _scaled_logits(h, weight, bias, ctx.temperature, z_space).sub_(log_total[part, None])
            if entropy_used:
                p = torch.exp(log_p, out=spare[0][: len(log_p)])
                log_p.clamp_min_(torch.finfo(log_p.dtype).min).add_(entropy[part, None]).mul_(-into_entropy).sub_(into_logprob)
                grad = p.mul_(log_p)
            else:
                grad = log_p.exp_().mul_(-into_logprob)
            grad.scatter_add_(-1, targets[part, None], into_logprob.to(grad))
            if ctx.temperature != 1.0:
                grad /= ctx.temperature
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ h
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )
