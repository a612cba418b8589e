"""RMSNorm and the gated feed-forward network as one autograd function each, which keep less for the backward pass.

Autograd keeps every intermediate result of an expression: of a norm its input in fp32 and its output before the weight, of
down(silu(gate) · up) all four of gate, silu(gate), up and their product. Here the norm keeps its input and a number a token, the
network gate and up, and the backward pass makes the rest again, which costs far less than the matrix products beside it.

``fuse`` replaces only what it has tried: a module keeps its own code unless that gives, bit for bit, what is computed here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LINEARS = ("gate_proj", "up_proj", "down_proj")
EPS = ("variance_epsilon", "eps")
SIZE = 16  # numbers a row of a trial


def fuse(model: nn.Module) -> int:
    """Let every RMSNorm and SwiGLU network of the model that is recognised compute by the functions below, in place.

    Parameters stay where they are, so it does not matter whether the weights are there yet, or are sharded later.

    Returns:
        The number of modules replaced.
    """
    replaced = 0
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(0)
        for module in model.modules():
            for holds, forward, twin in ((_holds_norm, _norm, _small_norm), (_holds_network, _network, _small_network)):
                if holds(module) and _agree(forward, twin(module)):
                    module.forward = MethodType(forward, module)  # deep copies of the module get their own
                    replaced += 1
    return replaced


# ---------------------------------------------------------------- the functions


def rms_norm(x: Float[Tensor, "*rows width"], weight: Float[Tensor, " width"], eps: float) -> Float[Tensor, "*rows width"]:
    """weight · x / √(mean(x²) + eps), in fp32 at least, rounded to the dtype of ``x`` before the weight, as Llama does
    (https://arxiv.org/abs/1910.07467)."""
    return _RMSNorm.apply(x, weight, eps)


def swiglu(
    x: Float[Tensor, "*rows width"],
    gate: Float[Tensor, "inner width"],
    up: Float[Tensor, "inner width"],
    down: Float[Tensor, "width inner"],
) -> Float[Tensor, "*rows width"]:
    """(silu(x gateᵀ) · x upᵀ) downᵀ (https://arxiv.org/abs/2002.05202)."""
    return _SwiGLU.apply(x, gate, up, down)


class _RMSNorm(torch.autograd.Function):
    """With r = 1/√(mean(x²) + eps), n numbers a row and g the gradient of the output:
    ∂weight = Σ g x r over the rows, ∂x = r (g · weight) − x r³/n Σ (g · weight · x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * exact.mul_(scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        n, dtype = x.shape[-1], scale.dtype
        rows, r, w = x.reshape(-1, n).to(dtype), scale.view(-1, 1), weight.to(dtype)
        g = grad.reshape(-1, n).to(dtype, copy=True)
        product = g * rows
        grad_weight = product.t() @ r
        shrink = (product @ w[:, None]).mul_(r**3).div_(-n)
        grad_x = g.mul_(w).mul_(r).addcmul_(rows, shrink)
        return grad_x.to(x.dtype).view_as(x), grad_weight[:, 0].to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    """With a = x gateᵀ, b = x upᵀ, h = silu(a) · b and g the gradient of the output: ∂h = g down, ∂a = ∂h · b · silu′(a),
    ∂b = ∂h · silu(a); of each product y = x Wᵀ, ∂W = ∂yᵀ x and ∂x = ∂y W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        a, b = F.linear(x, gate), F.linear(x, up)
        ctx.save_for_backward(x, a, b, gate, up, down)
        return F.linear(F.silu(a).mul_(b), down)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, a, b, gate, up, down = ctx.saved_tensors
        rows, a, b, g = (t.reshape(-1, t.shape[-1]) for t in (x, a, b, grad))
        silu = F.silu(a)
        grad_down = g.t() @ (silu * b)
        grad_h = g @ down
        grad_b = silu.mul_(grad_h)
        grad_a = torch.ops.aten.silu_backward(grad_h.mul_(b), a)
        grad_x = torch.addmm(grad_a @ gate, grad_b, up)
        return grad_x.view_as(x), grad_a.t() @ rows, grad_b.t() @ rows, grad_down


# ---------------------------------------------------------------- what they stand for


def _norm(module: Any, x: Tensor) -> Tensor:
    eps = _eps(module)
    assert eps is not None, "as when it was recognised"
    return rms_norm(x, module.weight, eps)


def _network(module: Any, x: Tensor) -> Tensor:
    return swiglu(x, *(getattr(module, name).weight for name in LINEARS))


def _eps(module: nn.Module) -> float | None:
    return next((value for name in EPS if isinstance(value := getattr(module, name, None), float)), None)


def _holds_norm(module: nn.Module) -> bool:
    """A vector called ``weight`` and an ε, and nothing else that could matter."""
    parameters = dict(module.named_parameters())
    return _eps(module) is not None and [*parameters] == ["weight"] and parameters["weight"].dim() == 1 and _plain(module)


def _holds_network(module: nn.Module) -> bool:
    """Three linear layers without biases, and nothing else that could matter."""
    linears = [getattr(module, name, None) for name in LINEARS]
    plain = all(type(linear) is nn.Linear and linear.bias is None and _plain(linear) for linear in linears)
    return plain and len([*module.parameters()]) == len(LINEARS) and _plain(module)


def _plain(module: nn.Module) -> bool:
    """Calling it is calling the forward method of its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module) and not [*module.buffers()]


def _small_norm(module: nn.Module) -> nn.Module:
    return _twin(module, _parameters={"weight": nn.Parameter(torch.rand(SIZE) + 0.5)})


def _small_network(module: nn.Module) -> nn.Module:
    shapes = dict(zip(LINEARS, ((SIZE, 2 * SIZE), (SIZE, 2 * SIZE), (2 * SIZE, SIZE)), strict=True))
    small = {name: nn.Linear(*shape, bias=False, device="cpu") for name, shape in shapes.items()}
    return _twin(module, _modules={**module._modules, **small})


def _twin(module: nn.Module, **attributes: Any) -> nn.Module:
    """The same module but for these attributes: small, on the CPU, whatever the original is like."""
    twin = copy.copy(module)
    vars(twin).update(attributes)
    return twin


@torch.no_grad()
def _agree(forward: Callable[[Any, Tensor], Tensor], twin: nn.Module) -> bool:
    """Whether the module computes, bit for bit, what ``forward`` does, on rows from tiny (where ε counts) to large."""
    x = torch.randn(8, SIZE) * torch.logspace(-4, 2, 8)[:, None]
    try:
        return all(torch.equal(twin.to(dtype)(x.to(dtype)), forward(twin, x.to(dtype))) for dtype in (torch.float32, torch.bfloat16))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False  # it wants other arguments, or has more in it than meets the eye
