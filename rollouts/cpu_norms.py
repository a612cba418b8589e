"""vLLM's own RMSNorm kernels on a CPU. Imports vLLM: it is loaded by the engine process alone.

The CPU build holds them and its dispatch keeps them for GPUs: it would compute each norm by eight tensor operations, which take a
fifth of the time in which SmolLM2 samples 128 completions. They are registered here by vLLM's way of adding an implementation.
"""

from __future__ import annotations

import torch
import vllm.kernels  # noqa: F401 – the operations and vLLM's own implementations of them
from torch import Tensor
from vllm import ir

_NAME = "cpu_kernel"  # in the engine's ``ir_op_priority``
_WIDTH = 32  # the kernels take rows of whole vectors


def _rows(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    whole = x.dim() == 2 and x.is_contiguous() and x.shape[1] % _WIDTH == 0
    return whole and variance_size is None and weight is not None and weight.dtype == x.dtype


def _norm_takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _rows(x, weight, variance_size)


def _sum_takes(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _rows(x, weight, variance_size) and x_residual.is_contiguous() and x_residual.dtype == x.dtype


@ir.ops.rms_norm.register_impl(_NAME, supports_args=_norm_takes)
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """x · weight / √(mean(x²) + epsilon)."""
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


@ir.ops.fused_add_rms_norm.register_impl(_NAME, supports_args=_sum_takes, inplace=True)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same of the sum of both, and the sum, in place."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
