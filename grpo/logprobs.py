"""Hidden states → log-probs and entropies, a part of the vocabulary at a time: the full logits are never held.

A vocabulary of 49,152 makes 192 KiB of fp32 logits a token – more than all the activations of a small model. Here the forward
pass goes through the vocabulary in blocks and keeps three numbers a token; the backward pass makes each block once more. A block
of the head's gradient is a product over all tokens at once, so it is written once and never added to.

Where sampling was truncated, each token has a kept set (``grpo.kept``), and its distribution is the softmax over that set. The pass then
goes through those entries alone that any of its tokens kept: a few thousand of 49,152 with top-p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from grpo.kept import RULED_OUT, Columns

TOKENS = 2048  # of one pass through the vocabulary, so that what is summed in fp32 beside a gradient stays small
FLOOR = -80.0  # e^z counts as 0 below: smaller results of exp are no normal numbers, and take ten times as long


def head_logprobs(
    head: nn.Module,
    hidden: Float[Tensor, "tokens width"],
    targets: Int[Tensor, " tokens"],
    temperature: float = 1.0,
    chunk: int = 32,
    kept: Sequence[bytes] = (),
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """``token_logprobs`` with the weights of ``head`` (an ``nn.Linear``), run as a call of that module.

    FSDP2 gathers a module's weights in hooks around its call and shards them again after it: outside of it they are not there.
    """
    own = head.__dict__.get("forward")
    head.forward = lambda x: token_logprobs(x, head.weight, head.bias, targets, temperature, chunk, kept)  # type: ignore[arg-type]
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
    kept: Sequence[bytes] = (),
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log softmax(W h / T)[target] and the entropy of that softmax, both at least fp32 and differentiable in ``hidden``, ``weight``
    and ``bias``.

    With z the logits / T, p = softmax(z), ℓ = z_y − log Σ e^z and H = −Σ p log p:
    ∂ℓ/∂z = 1_y − p and ∂H/∂z = −p (log p + H). All sums go over the token's kept set, the whole vocabulary unless ``kept`` says
    otherwise; p and both gradients are exactly 0 outside of it.

    Args:
        chunk: ``chunk`` · vocab logits are held at a time, as many as ``chunk`` whole tokens have.
        kept: one packed set a token (``grpo.kept``), or none at all.

    Raises:
        ValueError: a target is not in its kept set, so it cannot have been sampled from that.
    """
    if kept and len(kept) != len(targets):
        raise ValueError(f"{len(kept)} kept sets for {len(targets)} tokens; there must be one for each, or none")
    return _BlockedLogprobs.apply(hidden, weight, bias, targets, temperature, chunk, kept)


class _Blocks:
    """The logits of some tokens, a block of the vocabulary at a time, in buffers that all blocks share: fresh ones for each would
    cost more, in page faults, than the arithmetic."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        kept: Sequence[bytes],
    ) -> None:
        self.weight, self.bias, self.targets, self.temperature, self.kept = weight, bias, targets[:, None], temperature, kept
        tokens, vocab = max(1, min(len(hidden), TOKENS)), len(weight)
        width = max(1, chunk * vocab // tokens)
        self.width = min(vocab, width - width % 64 or width)  # rows that start on a cache line: transposed products run twice as fast
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        if kept:
            self.width += -self.width % 8  # bits come in bytes
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

    def of(self, hidden: Tensor, tokens: slice) -> Iterator[tuple[slice | Tensor, Tensor, Tensor, Tensor]]:
        """(entries of the vocabulary in the block, z = (W h + b) / T [tokens, block], place of each target in it, whether it is there)."""
        h, targets = hidden[tokens], self.targets[tokens]
        columns = Columns.of(self.kept[tokens], len(self.weight), hidden.device, self.dtype) if self.kept else None
        if columns is not None:
            targets = columns.places(targets)
        end = len(self.weight) if columns is None else len(columns.ids)
        for start in range(0, end, self.width):
            block = slice(start, min(start + self.width, end))
            entries = block if columns is None else columns.ids[block]
            width = block.stop - start
            made = torch.mm(h, self.weight[entries].t(), out=self.low_precision(len(h), width))
            z = self.buffer(0, len(h), width).copy_(made)
            if self.bias is not None:
                z.add_(self.bias[entries]).clamp_min_(RULED_OUT)  # a token that a bias of −∞ rules out: 0 · −∞ is no number
            if self.temperature != 1.0:
                z.div_(self.temperature)
            if columns is not None:
                columns.rule_out(z, start, self.buffer(1, len(h), self.width).view(-1))
            place = targets - start
            here = (place >= 0) & (place < width)
            yield entries, z, place.clamp(0, width - 1), here

    def exp(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """e^z in ``out``, in place without it; exactly 0 for what is ruled out. ``z`` ≤ 0 is raised to ``FLOOR``."""
        if not self.kept:
            return torch.exp(z, out=z if out is None else out)
        e = torch.exp(z.clamp_min_(FLOOR), out=z if out is None else out)
        return torch.threshold_(e, 1.1 * math.exp(FLOOR), 0.0)


def _passes(tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + TOKENS, tokens)) for start in range(0, tokens, TOKENS))


class _BlockedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        kept: Sequence[bytes],
    ) -> Any:
        blocks = _Blocks(hidden, weight, bias, targets, temperature, chunk, kept)
        logprob = torch.empty(len(hidden), dtype=blocks.dtype, device=hidden.device)
        entropy, log_total = torch.empty_like(logprob), torch.empty_like(logprob)
        for part in _passes(len(hidden)):
            highest = logprob.new_full((part.stop - part.start, 1), torch.finfo(blocks.dtype).min)
            total, weighted = torch.zeros_like(highest), torch.zeros_like(highest)  # Σ e^(z−m), Σ e^(z−m) (z−m)
            target = torch.full_like(highest, RULED_OUT)
            for _, z, place, here in blocks.of(hidden, part):
                torch.where(here, z.gather(-1, place), target, out=target)
                higher = torch.maximum(highest, z.amax(-1, keepdim=True))
                shift = highest - higher
                e = blocks.exp(z.sub_(higher), out=blocks.buffer(1, *z.shape))
                decay = shift.exp()
                weighted = decay * (weighted + shift * total)
                total = decay * total + e.sum(-1, keepdim=True)
                weighted += e.mul_(z).sum(-1, keepdim=True)
                highest = higher
            if kept and bool((target <= RULED_OUT).any()):
                raise ValueError("a sampled token is not among those that truncation kept: the kept sets belong to other tokens")
            log_total[part] = (highest + total.log())[:, 0]
            logprob[part] = target[:, 0] - log_total[part]
            entropy[part] = (total.log() - weighted / total)[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_total)
        ctx.temperature, ctx.chunk, ctx.kept = temperature, chunk, kept
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        into_logprob, into_entropy = grads  # None where the loss does not use it
        hidden, weight, bias, targets, entropy, log_total = ctx.saved_tensors
        wants_weight, wants_bias = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
        blocks = _Blocks(hidden, weight, bias, targets, ctx.temperature, ctx.chunk, ctx.kept)
        if into_logprob is None:
            into_logprob = torch.zeros_like(log_total)
        once = 0 < len(hidden) <= TOKENS  # then every block of the head's gradient is complete when it is made
        grad_hidden = torch.empty_like(hidden)
        whole = once and not ctx.kept  # and every row of it is in a block
        grad_weight = torch.empty_like(weight) if whole else torch.zeros_like(weight, dtype=weight.dtype if once else blocks.dtype)
        grad_bias = torch.zeros(len(weight), dtype=blocks.dtype, device=weight.device)
        for part in _passes(len(hidden)):
            h, up = hidden[part], into_logprob[part, None]
            summed = torch.zeros(h.shape, dtype=blocks.dtype, device=h.device)
            for block, z, place, here in blocks.of(hidden, part):
                log_p = z.sub_(log_total[part, None])
                if into_entropy is None:
                    grad = blocks.exp(log_p).mul_(-up)
                else:
                    p = blocks.exp(log_p, out=blocks.buffer(1, *z.shape))
                    grad = log_p.add_(entropy[part, None]).mul_(-into_entropy[part, None]).sub_(up).mul_(p)
                grad.scatter_add_(-1, place, up * here)
                if ctx.temperature != 1.0:
                    grad.div_(ctx.temperature)
                if wants_bias:
                    grad_bias[block] += grad.sum(0)
                grad = blocks.low_precision(*grad.shape).copy_(grad)
                summed += grad @ weight[block]
                if wants_weight and whole:
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
            None,
        )
