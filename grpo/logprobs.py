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


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype is torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int) -> Any:
        logprobs, entropies = [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            log_p = _scaled_logits(h, weight, bias, temperature).log_softmax(-1)
            logprobs.append(log_p.gather(-1, y[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
        logprob = torch.cat(logprobs) if logprobs else hidden.new_zeros(0, dtype=torch.float32)
        entropy = torch.cat(entropies) if entropies else torch.zeros_like(logprob)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_logprob, grad_entropy = grads
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        wants_weight, wants_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        entropy_used = bool((grad_entropy != 0).any())
        accumulate = torch.float64 if weight.dtype is torch.float64 else torch.float32  # bf16 sums would lose small chunks
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if wants_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h = hidden[part]
            log_p = _scaled_logits(h, weight, bias, ctx.temperature).log_softmax(-1)
            p = log_p.exp()
            grad = p * -grad_logprob[part, None]
            if entropy_used:
                grad -= p * (log_p + entropy[part, None]) * grad_entropy[part, None]
            grad.scatter_add_(-1, targets[part, None], grad_logprob[part, None].to(grad))
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
