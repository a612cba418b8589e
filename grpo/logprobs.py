"""Hidden states → log-probs and entropies, a part of the vocabulary at a time: the full logits are never held.

A vocabulary of 49,152 makes 192 KiB of fp32 logits a token – more than all the activations of a small model. Here the forward
pass goes through the vocabulary in blocks and keeps three numbers a token; the backward pass makes each block once more. A block
of the head's gradient is a product over all tokens at once, so it is written once and never added to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

TOKENS = 2048  # of one pass through the vocabulary, so that what is summed in fp32 beside a gradient stays small


def head_logprobs(
    head: nn.Module,
    hidden: Float[Tensor, "tokens width"],
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
    chunk: int = 32,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """``token_logprobs`` with the weights of ``head`` (an ``nn.Linear``), run as a call of that module.

    FSDP2 gathers a module's weights in hooks around its call and shards them again after it: outside of it they are not there.
    """
    own = head.__dict__.get("forward")
    head.forward = lambda x: token_logprobs(x, head.weight, head.bias, targets, temperature, chunk)  # type: ignore[arg-type]
    try:
        scores: tuple[Tensor, Tensor] = head(hidden)
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    return scores


def token_logprobs(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
    chunk: int = 32,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log softmax(W h / T)[target] and the entropy of that softmax, both at least fp32 and differentiable in ``hidden``, ``weight``
    and ``bias``.

    With z the logits / T, p = softmax(z), ℓ = z_y − log Σ e^z and H = −Σ p log p:
    ∂ℓ/∂z = 1_y − p and ∂H/∂z = −p (log p + H).

    Args:
        chunk: ``chunk`` · vocab logits are held at a time, as many as ``chunk`` whole tokens have.
    """
    return _BlockedLogprobs.apply(hidden, weight, bias, targets, temperature, chunk)


class _Blocks:
    """The logits of some tokens, a block of the vocabulary at a time, in buffers that all blocks share: fresh ones for each would
    cost more, in page faults, than the arithmetic."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int) -> None:
        self.weight, self.bias, self.targets, self.temperature = weight, bias, targets[:, None], temperature
        tokens, vocab = max(1, min(len(hidden), TOKENS)), len(weight)
        width = max(1, chunk * vocab // tokens)
        self.width = min(vocab, width - width % 64 or width)  # rows that start on a cache line: transposed products run twice as fast
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.raw = hidden.new_empty(tokens * self.width)
        self.buffers: list[Tensor] = []

    def buffer(self, number: int, tokens: int, width: int) -> Tensor:
        """[tokens, width] in the dtype of sums; ``number`` tells those apart that are needed at the same time."""
        while len(self.buffers) <= number:
            self.buffers.append(torch.empty(self.raw.numel(), dtype=self.dtype, device=self.raw.device))
        return self.buffers[number][: tokens * width].view(tokens, width)

    def low_precision(self, tokens: int, width: int) -> Tensor:
        """[tokens, width] in the dtype of the weights: the logits as they are made, and later their gradient."""
        return self.raw[: tokens * width].view(tokens, width)

    def of(self, hidden: Tensor, tokens: slice) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(block of the vocabulary, z = (W h + b) / T [tokens, block], place of each target in the block, whether it is there)."""
        h, targets = hidden[tokens], self.targets[tokens]
        for start in range(0, len(self.weight), self.width):
            block = slice(start, min(start + self.width, len(self.weight)))
            width = block.stop - start
            made = torch.mm(h, self.weight[block].t(), out=self.low_precision(len(h), width))
            z = self.buffer(0, len(h), width).copy_(made)
            if self.bias is not None:
                z.add_(self.bias[block]).clamp_min_(torch.finfo(z.dtype).min)  # a token that a bias of −∞ rules out: 0 · −∞ is 0
            if self.temperature != 1.0:
                z.div_(self.temperature)
            place = targets - start
            here = (place >= 0) & (place < width)
            yield block, z, place.clamp(0, width - 1), here


def _passes(tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + TOKENS, tokens)) for start in range(0, tokens, TOKENS))


class _BlockedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int) -> Any:
        blocks = _Blocks(hidden, weight, bias, targets, temperature, chunk)
        logprob = torch.empty(len(hidden), dtype=blocks.dtype, device=hidden.device)
        entropy, log_total = torch.empty_like(logprob), torch.empty_like(logprob)
        for part in _passes(len(hidden)):
            highest = logprob.new_full((part.stop - part.start, 1), torch.finfo(blocks.dtype).min)
            total, weighted, target = (torch.zeros_like(highest) for _ in range(3))  # Σ e^(z−m), Σ e^(z−m) (z−m), z of the target
            for _, z, place, here in blocks.of(hidden, part):
                torch.where(here, z.gather(-1, place), target, out=target)
                higher = torch.maximum(highest, z.amax(-1, keepdim=True))
                shift = highest - higher
                e = torch.exp(z.sub_(higher), out=blocks.buffer(1, *z.shape))
                decay = shift.exp()
                weighted = decay * (weighted + shift * total)
                total = decay * total + e.sum(-1, keepdim=True)
                weighted += e.mul_(z).sum(-1, keepdim=True)
                highest = higher
            log_total[part] = (highest + total.log())[:, 0]
            logprob[part] = target[:, 0] - log_total[part]
            entropy[part] = (total.log() - weighted / total)[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_total)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        into_logprob, into_entropy = grads  # None where the loss does not use it
        hidden, weight, bias, targets, entropy, log_total = ctx.saved_tensors
        wants_weight, wants_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        blocks = _Blocks(hidden, weight, bias, targets, ctx.temperature, ctx.chunk)
        if into_logprob is None:
            into_logprob = torch.zeros_like(log_total)
        once = 0 < len(hidden) <= TOKENS  # then every block of the head's gradient is complete when it is made
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight) if once else torch.zeros_like(weight, dtype=blocks.dtype)
        grad_bias = torch.zeros(len(weight), dtype=blocks.dtype, device=weight.device)
        for part in _passes(len(hidden)):
            h, up = hidden[part], into_logprob[part, None]
            summed = torch.zeros(h.shape, dtype=blocks.dtype, device=h.device)
            for block, z, place, here in blocks.of(hidden, part):
                log_p = z.sub_(log_total[part, None])
                if into_entropy is None:
                    grad = log_p.exp_().mul_(-up)
                else:
                    p = torch.exp(log_p, out=blocks.buffer(1, *z.shape))
                    grad = log_p.add_(entropy[part, None]).mul_(-into_entropy[part, None]).sub_(up).mul_(p)
                grad.scatter_add_(-1, place, up * here)
                if ctx.temperature != 1.0:
                    grad.div_(ctx.temperature)
                if wants_bias:
                    grad_bias[block] += grad.sum(0)
                grad = blocks.low_precision(*grad.shape).copy_(grad)
                summed += grad @ weight[block]
                if wants_weight and once:
                    torch.mm(grad.t(), h, out=grad_weight[block])
                elif wants_weight:
                    grad_weight[block] += grad.t() @ h
            grad_hidden[part] = summed
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if wants_weight else None,
            grad_bias.to(bias.dtype) if wants_bias else None,
            None,
            None,
            None,
        )
