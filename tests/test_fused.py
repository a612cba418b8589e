"""The fused norm and feed-forward network against the modules they stand for: outputs, gradients, what is kept, what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN

from grpo.fused import fuse, rms_norm, swiglu

COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
PLAIN_HEADS = {name: value for name, value in COMMON.items() if name != "head_dim"}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
}
LLAMA = LlamaConfig(**COMMON)
FAMILIES: dict[str, tuple[Any, int]] = {  # two layers: how many modules are replaced
    "Llama": (LLAMA, 2 * (2 + 1) + 1),  # in a layer two norms and a network, and the last norm
    "Mistral": (MistralConfig(**COMMON), 2 * (2 + 1) + 1),
    "Qwen2": (Qwen2Config(**COMMON), 2 * (2 + 1) + 1),
    "Qwen3": (Qwen3Config(**COMMON), 2 * (4 + 1) + 1),  # queries and keys have norms too
    "Qwen3Moe": (Qwen3MoeConfig(**COMMON, **EXPERTS), 2 * 4 + 1),  # experts are no network of three linear layers
    "DeepseekV3": (DeepseekV3Config(**PLAIN_HEADS, **LATENT), 2 * (4 + 1) + 1),  # two norms of latents; in one layer, the shared expert
    "Phi3": (Phi3Config(**COMMON), 2 * 2 + 1),  # gate and up are one linear layer
    "Gemma2": (Gemma2Config(**COMMON), 0),  # 1 + weight in fp32; gelu
    "Gemma3": (Gemma3TextConfig(**COMMON), 0),
    "GPTNeoX": (GPTNeoXConfig(**PLAIN_HEADS), 0),
}


def toy(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Auto.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa").eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)  # norms' weights are 1 otherwise
    return model


def outcome(model: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model).to(dtype)
    logits = model(input_ids=torch.arange(12).view(2, 6), use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_computed(family: str) -> None:
    config, expected = FAMILIES[family]
    own = toy(config)
    fused = copy.deepcopy(own)
    state = torch.random.get_rng_state()
    assert fuse(fused) == expected
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fuse(fused) == 0, "once is enough"
    assert [*dict(fused.named_parameters())] == [*dict(own.named_parameters())]
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        (logits, grads), (own_logits, own_grads) = outcome(fused, dtype), outcome(own, dtype)
        assert torch.equal(logits, own_logits), "bit for bit"
        assert grads.keys() == own_grads.keys() and len(grads) > 8
        assert max(relative(grads[name], own_grads[name]) for name in grads) < bound


def test_bf16_gradients_are_as_near_to_the_truth_as_the_models_own() -> None:
    own = toy(LLAMA)
    fused = copy.deepcopy(own)
    fuse(fused)
    truth = outcome(own, torch.float64)[1]
    errors = [sum(relative(grad, truth[name]) for name, grad in outcome(m, torch.bfloat16)[1].items()) for m in (own, fused)]
    assert errors[1] < 1.1 * errors[0]


def test_models_without_weights_are_recognised() -> None:
    """On the meta device, as ranks build them before they are sent their shards."""
    with torch.device("meta"):
        model = Auto.from_config(copy.deepcopy(LLAMA))
    assert fuse(model) == FAMILIES["Llama"][1]
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_copy_computes_with_its_own_weights() -> None:
    model = toy(LLAMA)
    fuse(model)
    clone = copy.deepcopy(model)
    before = outcome(clone, torch.float32)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(outcome(clone, torch.float32)[0], before)
    assert not outcome(model, torch.float32)[0].any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_through_checkpointing_are_the_same(reentrant: bool) -> None:
    model = toy(LLAMA)
    fuse(model)
    plain = outcome(model.train(), torch.float64)[1]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = outcome(model, torch.float64)[1]
    assert again.keys() == plain.keys() and max(relative(again[name], plain[name]) for name in plain) < 1e-12


# ---------------------------------------------------------------- the functions


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_network(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, 1e-6)


def case(function: str, shape: tuple[int, ...]) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes: list[tuple[int, ...]] = [(6,)] if function == "norm" else [(10, 6), (10, 6), (6, 10)]
    inputs = [torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_() for size in ((*shape, 6), *sizes)]
    return (norm, plain_norm, inputs) if function == "norm" else (swiglu, plain_network, inputs)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 0), (2, 3, 2)])
@pytest.mark.parametrize("function", ["norm", "network"])
def test_float64_is_float64_throughout(function: str, shape: tuple[int, ...]) -> None:
    fused, plain, inputs = case(function, shape)
    mine, truth = fused(*inputs), plain(*inputs)
    assert mine.shape == truth.shape and torch.allclose(mine, truth, rtol=1e-12, atol=1e-12)
    up = torch.linspace(-1, 2, mine.numel(), dtype=torch.float64).view_as(mine)
    for a, b in zip(torch.autograd.grad(mine, inputs, up), torch.autograd.grad(truth, inputs, up), strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("function", ["norm", "network"])
def test_gradients_are_those_of_finite_differences(function: str) -> None:
    fused, _, inputs = case(function, (2, 2))
    assert torch.autograd.gradcheck(fused, inputs)


def test_gradients_of_views_that_are_not_contiguous() -> None:
    """The norms of queries and keys see [1, heads, tokens, size], transposed."""
    fused, plain, (x, weight) = case("norm", (3, 4))
    up = torch.randn(4, 3, 6, dtype=torch.float64).transpose(0, 1)
    mine, truth = (torch.autograd.grad(f(x.transpose(0, 1).transpose(0, 1), weight), (x, weight), up) for f in (fused, plain))
    assert all(torch.allclose(a, b, rtol=1e-11) for a, b in zip(mine, truth, strict=True))
    turned = x.detach().transpose(0, 1).requires_grad_()
    up = torch.randn(4, 3, 6, dtype=torch.float64)
    mine, truth = (torch.autograd.grad(f(turned, weight), (turned, weight), up) for f in (fused, plain))
    assert all(torch.allclose(a, b, rtol=1e-11) for a, b in zip(mine, truth, strict=True))


def kept(f: nn.Module, *inputs: Tensor) -> int:
    """Bytes that autograd keeps of a call to a module, its parameters apart, which it keeps as they are or transposed."""
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in f.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = f(*inputs)  # alive, so that nothing it keeps is freed and its place used again
        assert result.requires_grad
    return sum(storages.values())


def test_what_is_kept_for_the_backward_pass() -> None:
    """7 rows of 64 numbers, in bf16 of 2 bytes, and an inner width of 192. The modules themselves keep about twice that."""
    x = torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)
    config = LlamaConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    own = Auto.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").model.layers[0]
    layer = copy.deepcopy(own)
    assert fuse(layer) == 3
    inputs, scales, gate_and_up = 7 * 64 * 2, 7 * 4, 2 * 7 * 192 * 2
    assert kept(layer.input_layernorm, x) == inputs + scales
    assert kept(layer.mlp, x) == inputs + gate_and_up
    assert kept(own.input_layernorm, x) > 2.5 * (inputs + scales)  # once in fp32, once before the weight: (4 + 2) · 64 against 2 · 64
    assert kept(own.mlp, x) > 1.8 * (inputs + gate_and_up)  # silu(gate) and the product too: 64 + 4 · 192 against 64 + 2 · 192


# ---------------------------------------------------------------- what is left alone


class Norm(nn.Module):
    """Llama's, to be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(x.dtype)


class WeightFirst(Norm):
    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        return (self.weight.float() * exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class NoEpsilon(Norm):
    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()
        return self.weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class Scaled(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


class Network(nn.Module):
    """Llama's, to be changed."""

    def __init__(self, act: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(12, 8, bias=bias)
        self.act_fn = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Residual(Network):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Adapter(nn.Linear):
    """As LoRA's: a linear layer that does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def with_adapter() -> Network:
    network = Network()
    network.up_proj = Adapter(8, 12, bias=False)
    return network


def with_hook() -> Network:
    network = Network()
    network.gate_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    return network


def wrapped() -> Norm:
    """As accelerate wraps modules."""
    module = Norm()
    own = module.forward
    module.forward = lambda x: own(x) + 1  # type: ignore[method-assign]
    return module


def test_what_is_recognised_here() -> None:
    assert fuse(Norm()) == fuse(Network()) == 1


@pytest.mark.parametrize(
    "make",
    [
        *(WeightFirst, NoEpsilon, Scaled, wrapped, Residual, with_adapter, with_hook),
        *(lambda: nn.LayerNorm(8, bias=False), lambda: Network(act="gelu"), lambda: Network(bias=True)),
    ],
)
def test_anything_else_is_left_alone(make: Callable[[], nn.Module]) -> None:
    module = make()
    forward = vars(module).get("forward")
    assert fuse(module) == 0 and vars(module).get("forward") is forward
