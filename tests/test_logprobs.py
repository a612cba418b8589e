"""Chunked log-probs and entropies against ``log_softmax``: values, gradients, and that the full logits never exist."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.logprobs import head_logprobs, token_logprobs


def oracle(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.T / temperature + (0 if bias is None else bias / temperature)
    log_p = logits.log_softmax(-1)
    return log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)


def inputs(
    tokens: int = 7, width: int = 5, vocab: int = 11, *, bias: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(vocab, (tokens,), generator=generator)
    return normal(tokens, width), normal(vocab, width), normal(vocab) if bias else None, targets


def close(tolerance: float) -> dict[str, float]:
    return {"rtol": tolerance, "atol": tolerance}


@given(
    tokens=st.integers(0, 9),
    chunk=st.integers(1, 12),
    temperature=st.sampled_from([1.0, 0.6, 2.5]),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients(tokens: int, chunk: int, temperature: float, bias: bool, seed: int) -> None:
    hidden, weight, b, targets = inputs(tokens, bias=bias, seed=seed)
    leaves = [leaf for leaf in (hidden, weight, b) if leaf is not None]
    up = torch.randn(2, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    ours, theirs = token_logprobs(hidden, weight, b, targets, temperature, chunk), oracle(hidden, weight, b, targets, temperature)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, **close(1e-12))
    for row, column in ((0, None), (None, 1), (0, 1)):  # the log-prob alone, the entropy alone, both
        weights = [up[i] if i in (row, column) else torch.zeros(tokens, dtype=torch.float64) for i in range(2)]
        grads = torch.autograd.grad(ours, leaves, weights, retain_graph=True)
        expected = torch.autograd.grad(theirs, leaves, weights, retain_graph=True)
        for mine, true in zip(grads, expected, strict=True):
            torch.testing.assert_close(mine, true, **close(1e-10))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(temperature: float) -> None:
    hidden, weight, bias, targets = inputs(tokens=5, width=3, vocab=4)
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, b, targets, temperature, 2), (hidden, weight, bias))


def test_uniform_logits_golden() -> None:
    logprobs, entropy = token_logprobs(torch.zeros(3, 2), torch.zeros(8, 2), None, torch.tensor([0, 3, 7]))
    assert logprobs.tolist() == pytest.approx([-math.log(8)] * 3)
    assert entropy.tolist() == pytest.approx([math.log(8)] * 3)


def test_temperature_golden() -> None:
    """Logits (ln 9, 0) at temperature 2 are (ln 3, 0): probabilities 3/4 and 1/4."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[math.log(9)], [0.0]])
    logprobs, entropy = token_logprobs(hidden, weight, None, torch.tensor([0, 1]), temperature=2.0)
    assert logprobs.exp().tolist() == pytest.approx([3 / 4, 1 / 4])
    assert entropy.tolist() == pytest.approx([-(3 / 4) * math.log(3 / 4) - (1 / 4) * math.log(1 / 4)] * 2)


def test_a_tied_embedding_gets_both_gradients() -> None:
    _, weight, _, targets = inputs(tokens=6)
    ids = torch.tensor([1, 4, 4, 0, 10, 2])

    def total(function: Any) -> Tensor:
        logprobs, entropy = function(weight[ids].tanh(), weight, None, targets, 0.9)
        result: Tensor = (logprobs + 0.3 * entropy).sum()
        return result

    (ours,) = torch.autograd.grad(total(lambda *a: token_logprobs(*a, 4)), weight)
    (theirs,) = torch.autograd.grad(total(oracle), weight)
    torch.testing.assert_close(ours, theirs, **close(1e-10))


def test_gradients_only_where_they_are_wanted() -> None:
    hidden, weight, bias, targets = inputs()
    assert bias is not None
    logprobs, _ = token_logprobs(hidden, weight.detach(), bias.detach(), targets, 1.0, 3)
    logprobs.sum().backward()
    expected = torch.autograd.grad(oracle(hidden, weight, bias, targets, 1.0)[0].sum(), hidden)[0]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected, **close(1e-10))


def test_large_logits_stay_finite() -> None:
    hidden, weight = torch.tensor([[1e4], [-1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    logprobs, entropy = token_logprobs(hidden, weight, None, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]
    (logprobs + entropy).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_bf16_is_as_close_as_bf16_logits_allow() -> None:
    """Bf16 keeps 8 significant bits, so a logit z is off by at most δ = |z|/2⁸ (half of it, and as much again for the dot product).

    A log-prob moves by at most 2 δ (its own logit and the normaliser); the entropy by δ · Σ p |log p + H| ≤ 2 δ H.
    Softmax weights are off by a factor e^{2δ}, so gradients by about 2 δ, and once more by 2⁻⁸ when they are stored.
    """
    hidden, weight, bias, targets = inputs(tokens=40, width=16, vocab=50, bias=False, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    delta = float((exact[0] @ exact[1].T).detach().abs().max()) / 2**8
    ours, theirs = token_logprobs(hidden, weight, bias, targets, 1.0, 16), oracle(*exact, None, targets, 1.0)
    assert ours[0].dtype is ours[1].dtype is torch.float32
    assert float((ours[0].detach() - theirs[0].detach()).abs().max()) < 2 * delta
    assert float((ours[1].detach() - theirs[1].detach()).abs().max()) < 2 * delta * float(theirs[1].detach().max())
    grads, expected = torch.autograd.grad(ours[0].sum(), (hidden, weight)), torch.autograd.grad(theirs[0].sum(), exact)
    for mine, true in zip(grads, expected, strict=True):
        assert mine.dtype is torch.bfloat16
        assert float((mine.double() - true).norm() / true.norm()) < 2 * delta + 2**-8


def test_bf16_weight_gradient_is_summed_in_fp32() -> None:
    """300 chunks of one token each add the same small number to a large one: 8 bits lose every one of them."""
    tokens, vocab = 301, 4
    hidden, weight = torch.ones(tokens, 1, dtype=torch.bfloat16), torch.zeros(vocab, 1, dtype=torch.bfloat16, requires_grad=True)
    up = torch.tensor([256.0] + [0.5] * (tokens - 1))
    logprobs, _ = token_logprobs(hidden, weight, None, torch.zeros(tokens, dtype=torch.long), 1.0, 1)
    (grad,) = torch.autograd.grad(logprobs, weight, up)
    # ∂ log p₀/∂z₀ = 1 − 1/4; the sum of up is 256 + 300/2 = 406, and 3/4 of it 304.5, stored in bf16 with a step of 2
    assert abs(float(grad[0, 0]) - 304.5) <= 1


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation returned, and how many numbers such tensors held at the same time."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least, self.largest, self.peak = at_least, 0, 0
        self._alive: list[weakref.ref[Tensor]] = []

    def alive(self) -> int:
        self._alive = [ref for ref in self._alive if ref() is not None]
        return sum({t.data_ptr(): t.numel() for ref in self._alive if (t := ref()) is not None}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
                if value.numel() >= self.at_least:
                    self._alive.append(weakref.ref(value))
        self.peak = max(self.peak, self.alive())
        return out


def test_the_full_logits_are_never_held() -> None:
    tokens, width, vocab, chunk = 96, 4, 1000, 8
    hidden, weight, _, targets = inputs(tokens, width, vocab, bias=False, dtype=torch.float32)
    with Allocations(at_least=vocab * width + 1) as seen:  # the weight's gradient is not meant
        logprobs, entropy = token_logprobs(hidden, weight, None, targets, 0.8, chunk)
        assert seen.alive() == 0, "nothing of the size of a chunk's logits waits for the backward pass"
        (logprobs.sum() + entropy.sum()).backward()  # type: ignore[no-untyped-call]
    assert vocab * width < seen.largest <= chunk * vocab
    assert seen.peak <= 6 * chunk * vocab < tokens * vocab
    with Allocations(at_least=1) as control:
        oracle(hidden, weight, None, targets, 0.8)
    assert control.largest == tokens * vocab, "the check would see them"


class Resident(TorchDispatchMode):
    """The most bytes that results of operations held at the same time, views of ``known`` tensors aside."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.peak, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self._alive[storage.data_ptr()] = weakref.ref(storage)
        self._alive = {at: ref for at, ref in self._alive.items() if ref() is not None}
        self.peak = max(self.peak, sum(s.nbytes() for ref in self._alive.values() if (s := ref()) is not None))
        return out


def test_memory_beside_the_heads_gradient_is_at_most_a_twentieth_of_the_logits() -> None:
    """4,096 tokens at a vocabulary of 131,072: fp32 logits would be 2 GiB."""
    tokens, width, vocab = 4096, 8, 131_072
    hidden, weight, _, targets = inputs(tokens, width, vocab, bias=False, dtype=torch.bfloat16)
    with Resident(hidden, weight) as seen:
        logprobs, entropy = token_logprobs(hidden, weight, None, targets)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert seen.peak - (4 + 2) * weight.numel() <= tokens * vocab * 4 / 20  # its fp32 sum, and that in bf16


@pytest.mark.parametrize("bias", [True, False])
def test_the_head_is_run_as_a_module(bias: bool) -> None:
    """FSDP2 fills a module's weights in a hook before its call; here the hook does the same."""
    hidden, weight, b, targets = inputs(bias=bias)
    head = torch.nn.Linear(5, 11, bias=bias, dtype=torch.float64)

    def gather(module: Any, args: Any) -> None:
        with torch.no_grad():
            module.weight.copy_(weight)
            if b is not None:
                module.bias.copy_(b)

    head.register_forward_pre_hook(gather)
    ours, theirs = head_logprobs(head, hidden, targets, 0.7, 3), oracle(hidden, weight, b, targets, 0.7)
    for mine, true in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, true, **close(1e-12))
    ours[0].sum().backward()  # type: ignore[no-untyped-call]
    (expected,) = torch.autograd.grad(theirs[0].sum(), weight)
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad, expected, **close(1e-10))
    torch.testing.assert_close(head(hidden), torch.nn.functional.linear(hidden, weight, b), **close(1e-12))
