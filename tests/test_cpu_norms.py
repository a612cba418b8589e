"""vLLM's norm kernels on a CPU: right, blind to the rows beside a row, and what the engine computes with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow

EPSILON = 1e-5
# The largest relative error: 2⁻⁸ or 2⁻²⁴ for every rounding. In bfloat16 x/√… may be rounded before the weight comes in, and the product
# is; what is computed in float32 counts for little beside that. In float32 the mean, its root and the reciprocal are rounded too.
BOUND = {torch.bfloat16: 2.5 * 2.0**-8, torch.float32: 6 * 2.0**-24}


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("on a GPU vLLM uses its kernels by itself")


@pytest.fixture
def operations() -> Iterator[tuple[object, object]]:
    from vllm import ir

    from grpo.rollouts import cpu_norms  # noqa: F401 – it registers itself

    priority = ["cpu_kernel", "native"]
    with ir.ops.rms_norm.set_priority(priority), ir.ops.fused_add_rms_norm.set_priority(priority):
        yield ir.ops.rms_norm, ir.ops.fused_add_rms_norm


def rows(count: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))).to(dtype)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() / (x.double().square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 576, 33])  # 33 is not whole vectors: the native implementation takes it
def test_the_norm(operations: tuple[object, object], dtype: torch.dtype, width: int) -> None:
    norm, _ = operations
    x, weight = rows(7, width, dtype, 0), rows(1, width, dtype, 1)[0]
    taken = norm.dispatch(x, weight, EPSILON).provider  # type: ignore[attr-defined]
    assert taken == ("cpu_kernel" if width % 32 == 0 else "native")
    out = norm(x, weight, EPSILON)  # type: ignore[operator]
    torch.testing.assert_close(out.double(), exact(x, weight), rtol=BOUND[dtype], atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_of_a_sum(operations: tuple[object, object], dtype: torch.dtype) -> None:
    _, norm = operations
    x, residual, weight = rows(7, 576, dtype, 0), rows(7, 576, dtype, 1), rows(1, 576, dtype, 2)[0]
    total = x + residual
    alone = norm.maybe_inplace(x[3:4].clone(), residual[3:4].clone(), weight, EPSILON)  # type: ignore[attr-defined]
    out, added = norm.maybe_inplace(x.clone(), residual.clone(), weight, EPSILON)  # type: ignore[attr-defined]
    assert torch.equal(added, total)
    torch.testing.assert_close(out.double(), exact(total, weight), rtol=BOUND[dtype], atol=1e-9)
    assert torch.equal(out[3:4], alone[0])  # of a batch, a row is what it is alone
