"""Whole models, at toy size with random weights: every layout against a plain transformers forward pass, one sequence at a time;
and models whose layout has to be padded, which must be said."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo import layouts, tree_attention
from grpo.batch import Batch, collate
from grpo.layouts import LayoutName, ModelInputs
from grpo.logprobs import token_logprobs
from grpo.model_support import LayoutPlan, Support, check_layout, plan_layout, supported, without_noise
from grpo.toy import toy_rollout
from grpo.types import FinishReason, Group, Problem

VOCAB, TEMPERATURE, ENTROPY_COEF = 50, 0.8, 0.1
LAYOUTS: tuple[LayoutName, ...] = ("padded", "packed", "shared_prompt")
LINES: tuple[LayoutName, ...] = ("packed", "shared_prompt")
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query heads
    "head_dim": 8,
    "initializer_range": 0.3,  # so that attention is far from uniform
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MLA: dict[str, Any] = {  # DeepSeek-V3: queries and keys of width 4 + 6, values of width 5; 8 experts in 2 groups
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "head_dim": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {"Llama": {}, "Qwen2": {}, "Qwen3": {}, "DeepseekV3": MLA}
# prompts of different lengths; completions of length 1 first, between, last and alone; one row far longer than the others
SHAPES = ((9, (1, 4, 7)), (3, (2, 1)), (1, (1,)), (5, (6, 6, 1, 3, 5)), (4, (1, 1)), (2, (40, 2)))
Scores = tuple[Tensor, Tensor, dict[str, Tensor]]  # log-probs, entropies, gradients


def toy(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    shape = SHAPE | FAMILIES.get(kind, {}) | settings
    config = getattr(transformers, f"{kind}Config")(**{name: value for name, value in shape.items() if value != "unset"})
    config._experts_implementation = "eager"  # the grouped matrix product knows no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # ones and zeros as they are made: a wrong one would not show
                parameter.data += 0.3 * torch.randn_like(parameter)
            if name.endswith("gate.weight"):
                parameter.data = torch.randn_like(parameter)
    return model.to(dtype)


def make_batch(shapes: Sequence[tuple[int, Sequence[int]]] = SHAPES, seed: int = 0, beginning: Sequence[int] = ()) -> Batch:
    """``shapes``: of each group, the tokens of its prompt (after a common ``beginning``) and of each completion."""
    rng = random.Random(seed)
    groups = []
    for g, (prompt_length, lengths) in enumerate(shapes):
        problem = Problem(id=f"p{g}", prompt="?", answer="1")
        prompt = (*beginning, *rng.choices(range(VOCAB), k=prompt_length))
        rollouts = []
        for i, length in enumerate(lengths):
            reason = FinishReason.length if length > 5 else FinishReason.stop
            rollouts.append(toy_rollout(problem, i, prompt, rng.choices(range(VOCAB), k=length), finish_reason=reason))
        groups.append(Group(problem=problem, rollouts=tuple(rollouts)))
    batch = collate(groups)
    advantages = torch.tensor([rng.uniform(-2, 2) for _ in batch.rollouts], dtype=torch.float64)
    return replace(batch, advantages=advantages[batch.rollout_index])


def loss_of(logprobs: Tensor, entropies: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
    return -(advantages.to(logprobs) * logprobs + ENTROPY_COEF * entropies).sum() / batch.num_tokens


def oracle(model: Any, batch: Batch) -> Scores:
    """By a forward pass over each whole sequence alone, with the model's own attention."""
    logprobs, entropies = [], []
    for rollout in batch.rollouts:
        prompt, tokens = rollout.completion.prompt_ids, rollout.completion.token_ids
        logits = model(input_ids=torch.tensor([[*prompt, *tokens[:-1]]]), use_cache=False).logits[0, len(prompt) - 1 :]
        log_p = (logits / TEMPERATURE).log_softmax(-1)
        logprobs.append(log_p[torch.arange(len(tokens)), torch.tensor(tokens)])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    logprob, entropy = torch.cat(logprobs), torch.cat(entropies)
    assert batch.advantages is not None
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss_of(logprob, entropy, batch.advantages, batch), parameters, materialize_grads=True)
    return logprob.detach(), entropy.detach(), dict(zip(names, grads, strict=True))


def forward(model: Any, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
    body = model.model if model.base_model is model else model.base_model  # Llama 4 names itself as its base
    hidden = body(input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False, **inputs.attention).last_hidden_state
    head = model.get_output_embeddings()
    return token_logprobs(hidden.flatten(0, 1)[inputs.gather], head.weight, head.bias, inputs.targets, TEMPERATURE, 5)


def laid_out(model: Any, batch: Batch, plan: LayoutPlan, budget: int) -> Scores:
    """By micro-batches of at most ``budget`` tokens; gradients add up."""
    layout = plan.choose(model, batch.rollouts)
    starts = torch.searchsorted(batch.rollout_index, torch.arange(len(batch.rollouts) + 1)).tolist()
    logprobs, entropies = (torch.zeros(batch.num_tokens, dtype=model.dtype) for _ in range(2))
    model.zero_grad()
    for part in layouts.microbatches(batch, layout, budget):
        where = torch.cat([torch.arange(starts[i], starts[i + 1]) for row in part for i in row])
        logprob, entropy = forward(model, layouts.lay_out([[batch.rollouts[i] for i in row] for row in part], layout))
        logprobs[where], entropies[where] = logprob.detach(), entropy.detach()
        assert batch.advantages is not None
        loss_of(logprob, entropy, batch.advantages[where], batch).backward()
    zeros = torch.zeros(())
    return logprobs, entropies, {name: zeros.expand_as(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def worst(mine: Scores, true: Scores) -> float:
    """The largest ‖difference‖ / ‖true‖ of log-probs, entropies and each parameter's gradient (or 1 % of the whole gradient, if more)."""
    assert mine[2].keys() == true[2].keys()
    floor = float(torch.stack([grad.norm() for grad in true[2].values()]).norm()) / 100
    pairs = [(mine[0], true[0], 0.0), (mine[1], true[1], 0.0), *((mine[2][name], grad, floor) for name, grad in true[2].items())]
    return max(float((a - b).norm()) / max(least, float(b.norm())) for a, b, least in pairs)


def plan_without_warning(model: Any, layout: LayoutName) -> LayoutPlan:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = plan_layout(model, layout)
    assert plan.layout == layout
    return plan


class _Float64Torch:
    """The torch module, but who says torch.float32 gets torch.float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def exact(kind: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``toy`` in float64, its norms and routers without their casts to float32 (which cost 1e-7 each)."""
    model = toy(kind, torch.float64)
    monkeypatch.setattr(sys.modules[type(model).__module__], "torch", _Float64Torch())
    return model


# ---------------------------------------------------------------- models that allow every layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_layouts_agree_in_float32(kind: str, layout: LayoutName) -> None:
    model = toy(kind)
    for beginning in ((), (7, 8, 9, 7, 8, 9)):
        batch = make_batch(beginning=beginning)
        truth = oracle(toy(kind), batch)
        plan = plan_without_warning(model, layout)
        for budget in (10_000, 60, 1):
            assert worst(laid_out(model, batch, plan, budget), truth) < 1e-5, budget


@pytest.mark.parametrize("kind", FAMILIES)
def test_layouts_agree_in_float64_on_models_that_do_not_cast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = exact(kind, monkeypatch), make_batch(beginning=(7, 8, 9))
    truth = oracle(model, batch)
    for layout in LAYOUTS:
        plan = plan_without_warning(model, layout)
        for budget in (10_000, 60, 1):
            assert worst(laid_out(model, batch, plan, budget), truth) < 1e-9, (layout, budget)
        replace(plan, layout="padded").choose(model, batch.rollouts)  # its own attention again


some_shapes = st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 8), min_size=1, max_size=5)), min_size=1, max_size=5)


@settings(max_examples=20)
@given(some_shapes, st.sampled_from(LAYOUTS), st.integers(1, 120), st.integers(0, 3), st.integers(0, 10**6))
def test_the_gradient_does_not_depend_on_the_budget(
    shapes: list[tuple[int, list[int]]], layout: LayoutName, budget: int, common: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        model, batch = exact("Llama", monkeypatch), make_batch(shapes, seed, (7,) * common)
        truth = oracle(model, batch)
        assert worst(laid_out(model, batch, plan_layout(model, layout), budget), truth) < 1e-9


# what makes these different: experts; positions learned, and none in some layers; a fused qkv; norms and gates elsewhere
OTHERS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "SmolLM3": {"num_hidden_layers": 4},
    "Phi3": {"head_dim": "unset"},
    "Olmo2": {"head_dim": "unset"},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)},
    "OPT": {"ffn_dim": 48, "dropout": 0.0, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_plain_models_agree(kind: str) -> None:
    model, batch = toy(kind, **OTHERS[kind]), make_batch(beginning=(7, 8, 9))
    truth = oracle(toy(kind, **OTHERS[kind]), batch)
    for layout in LINES:
        assert worst(laid_out(model, batch, plan_without_warning(model, layout), 60), truth) < 1e-5, layout


def test_the_comparison_would_see_a_completion_that_sees_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """All completions of a row one causal sequence: the bound breaks."""
    build = layouts.build_tree
    monkeypatch.setattr(layouts, "build_tree", lambda prefix, prompts, lengths: build(prefix, prompts, [[sum(row)] for row in lengths]))
    model, batch = toy("Llama"), make_batch()
    assert worst(laid_out(model, batch, plan_layout(model, "shared_prompt"), 10_000), oracle(toy("Llama"), batch)) > 1e-2


# ---------------------------------------------------------------- windows: every layout while none is outgrown

WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 12},
    "Gemma3Text": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "Llama4Text": {
        "attention_chunk_size": 12,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("layout", LINES)
@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_no_rollout_outgrows_is_harmless_and_one_that_is_outgrown_means_padded(kind: str, layout: LayoutName) -> None:
    model = toy(kind, **WINDOWED[kind])
    plan = plan_without_warning(model, layout)
    assert plan.max_tokens == 12
    fits = make_batch([(6, (7, 3)), (12, (1,)), (2, (4, 4))])  # 6 + 7 − 1 = 12 input tokens at most
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan.choose(model, fits.rollouts) == layout
        assert worst(laid_out(model, fits, plan, 10_000), oracle(toy(kind, **WINDOWED[kind]), fits)) < 1e-5
    outgrown = make_batch([(6, (8, 3)), (12, (1,)), (2, (4, 20))])
    truth = oracle(toy(kind, **WINDOWED[kind]), outgrown)
    with pytest.warns(UserWarning, match=f"more than 12 tokens is laid out as padded, not {layout}: its .* is 12 tokens"):
        mine = laid_out(model, outgrown, plan, 10_000)
    assert worst(mine, truth) < 1e-5
    assert worst(laid_out(model, fits, plan, 10_000), oracle(toy(kind, **WINDOWED[kind]), fits)) < 1e-5, "and back again"


@pytest.mark.parametrize("kind", WINDOWED)
def test_the_limit_is_needed(kind: str) -> None:
    """Without it, attention refuses where it is told of the window, and else the numbers are wrong."""
    model, batch = toy(kind, **WINDOWED[kind]), make_batch([(6, (8, 3)), (2, (4, 20))])
    careless = replace(plan_layout(model, "packed"), max_tokens=None)
    if kind == "Llama4Text":
        assert worst(laid_out(model, batch, careless, 10_000), oracle(toy(kind, **WINDOWED[kind]), batch)) > 1e-3
    else:
        with pytest.raises(ValueError, match=r"exceeds this model's sliding_window of 12: set trainer\.layout=padded"):
            laid_out(model, batch, careless, 10_000)


# ---------------------------------------------------------------- models that have to be padded

QWEN3_NEXT: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


def test_linear_attention_falls_back_to_padded_and_says_so() -> None:
    model, batch = toy("Qwen3Next", **QWEN3_NEXT), make_batch()
    truth = oracle(model, batch)
    with pytest.warns(
        UserWarning, match=r"shared_prompt is not possible for Qwen3NextForCausalLM: it has linear_attention layers; using padded"
    ):
        plan = plan_layout(model, "shared_prompt")
    assert worst(laid_out(model, batch, plan, 60), truth) < 1e-5


t: Any = transformers
ROPE = {"rope_theta": 1e4, "factor": 2.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 40,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (t.Qwen3NextConfig(), "linear_attention layers"),
        (t.Lfm2Config(layer_types=["conv", "full_attention"], num_hidden_layers=2), "conv layers"),
        (t.DeepseekV32Config(), "indexed_attention layers"),
        (t.MambaConfig(), "linear_attention"),
        (t.JambaConfig(), "linear_attention"),
        (t.FalconH1Config(), "hybrid"),
        (t.RecurrentGemmaConfig(), "recurrent or convolutional"),
        (t.NemotronHConfig(), "linear_attention, mlp, moe"),
        (t.RwkvConfig(), "recurrent"),
        (t.BloomConfig(), "ALiBi"),
        (t.FalconConfig(alibi=True), "ALiBi"),
        (t.GptOssConfig(), "sinks"),
        (t.Gemma2Config(), "soft cap"),
        (t.Gemma3TextConfig(use_bidirectional_attention=True), "not causal"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_only_padded_is_right_for(config: Any, reason: str) -> None:
    support = supported(config)
    assert support.layouts == ("padded",)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(support.reason)


@pytest.mark.parametrize(
    ("config", "max_tokens"),
    [
        (t.LlamaConfig(), None),
        (t.Qwen2Config(sliding_window=64), None),  # use_sliding_window is false
        (t.Qwen3Config(), None),
        (t.DeepseekV3Config(), None),
        (t.MixtralConfig(), None),
        (
            t.LlamaConfig(rope_parameters=ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 64}),
            None,
        ),  # the same at any length
        (t.LlamaConfig(rope_parameters=ROPE | {"rope_type": "dynamic"}, max_position_embeddings=512), 512),
        (t.MistralConfig(sliding_window=4096), 4096),
        (t.Gemma3TextConfig(sliding_window=512), 512),
        (t.Gemma3Config(text_config={"sliding_window": 1024}), 1024),  # said by its language model
        (t.Llama4TextConfig(attention_chunk_size=8192), 8192),
    ],
    ids=lambda value: type(value).__name__ if value is not None and not isinstance(value, int) else "",
)
def test_what_every_layout_is_right_for_up_to_a_length(config: Any, max_tokens: int | None) -> None:
    support = supported(config)
    assert (support.layouts, support.max_tokens) == (LAYOUTS, max_tokens)
    assert bool(support.reason) == (max_tokens is not None)


def test_an_encoder_decoder_model_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"t5 is an encoder-decoder model; the policy must be a causal"):
        supported(t.T5Config())


def test_longrope_is_padded_beyond_the_length_where_its_frequencies_change() -> None:
    def phi3() -> Any:
        return toy("Phi3", head_dim="unset", rope_parameters=LONG, max_position_embeddings=80, original_max_position_embeddings=40)

    model = phi3()
    assert supported(model.config) == Support(
        layouts=LAYOUTS,
        max_tokens=40,
        reason="its longrope rotary frequencies, beyond 40 tokens, change with the longest row computed with it",
    )
    plan, batch = plan_without_warning(model, "packed"), make_batch([(10, (31, 3)), (4, (2,))])  # 10 + 31 − 1 = 40
    truth = oracle(phi3(), batch)
    assert worst(laid_out(model, batch, plan, 10_000), truth) < 1e-5
    longer = make_batch([(10, (32, 3)), (4, (2,))])
    truth = oracle(phi3(), longer)
    careless = laid_out(model, longer, replace(plan, max_tokens=None), 10_000)
    assert worst(careless, truth) > 1e-3, "short rollouts are computed with the long one's frequencies"
    with pytest.warns(UserWarning, match="more than 40 tokens is laid out as padded, not packed: its longrope"):
        assert plan.choose(model, longer.rollouts) == "padded"


@pytest.mark.parametrize(("kind", "why"), [("Bloom", "ALiBi"), ("GPTNeo", "it takes no position_ids|can not be replaced")])
def test_models_whose_code_can_not_take_a_line(kind: str, why: str) -> None:
    shape = (
        {"attention_types": [[["global", "local"], 1]], "num_heads": 4, "num_layers": 2}
        if kind == "GPTNeo"
        else {"n_head": 4, "n_layer": 2}
    )
    with pytest.warns(UserWarning, match=f"packed is not possible for {kind}ForCausalLM.*({why})"):
        assert plan_layout(toy(kind, **shape), "packed").layout == "padded"


# ---------------------------------------------------------------- the check at the start


def check(model: Any, plan: LayoutPlan, batch: Batch) -> LayoutPlan:
    with torch.no_grad():
        return check_layout(model, plan, batch.rollouts, lambda inputs: forward(model, inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_check_passes_where_layouts_agree(kind: str, layout: LayoutName, dtype: torch.dtype) -> None:
    model, batch = toy(kind, dtype, initializer_range=0.1), make_batch()
    plan = plan_without_warning(model, layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(model, plan, batch) == plan
        assert check(model, plan, make_batch([(3, (4,)), (2, (1,))])) == plan  # no two of one prompt
        assert check(model, plan, make_batch([(3, (4,))])) == plan
        assert check(model, plan, batch.select([])) == plan
    assert model.config._attn_implementation == (plan.own_attention if layout == "padded" else tree_attention.NAME)


# Convolutions reach back a few tokens only: too little to stand out from the rounding of bf16.
@pytest.mark.parametrize(("kind", "dtype"), [("Llama", torch.float32), ("Llama", torch.bfloat16), ("Lfm2", torch.float32)])
def test_the_check_catches_what_the_configuration_did_not_say(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions that nobody named, and an attention that lets completions see each other."""
    shape = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False} if kind == "Lfm2" else {}
    model, batch = toy(kind, dtype, **shape), make_batch([(9, (6, 7))])
    monkeypatch.setattr("grpo.model_support._obstacle", lambda config: None)
    if kind == "Llama":
        monkeypatch.setattr(layouts, "build_tree", lambda x, p, lengths: tree_attention.build_tree(x, p, [[sum(row)] for row in lengths]))
    plan = plan_layout(model, "shared_prompt")
    with pytest.warns(UserWarning, match=rf"shared_prompt is wrong for {kind}ForCausalLM: .* are \d\S* nats a token off .*; using padded"):
        fallback = check(model, plan, batch)
    assert fallback == replace(plan, layout="padded")
    assert model.config._attn_implementation == plan.own_attention
    if dtype is torch.float32:
        assert worst(laid_out(model, batch, fallback, 60), oracle(model, batch)) < 1e-5


def test_the_check_catches_nan_and_attention_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy("Llama"), make_batch()
    plan = plan_layout(model, "packed")
    with pytest.warns(UserWarning, match="are nan nats a token off"):
        assert check_layout(model, plan, batch.rollouts, lambda inputs: torch.full(inputs.targets.shape, torch.nan)).layout == "padded"
    monkeypatch.setattr("grpo.model_support.BY_TYPE", {})
    settings = {"num_local_experts": 4, "sliding_window": 64, "layer_types": ["full_attention"] * 2}
    sinks = toy("GptOss", **settings)
    with pytest.warns(
        UserWarning, match="packed is wrong for GptOssForCausalLM: attention over a line .* does not know this model's s_aux; using"
    ):
        assert check(sinks, plan_layout(sinks, "packed"), batch).layout == "padded"


# ---------------------------------------------------------------- noise


def test_without_noise_two_passes_in_training_mode_are_equal() -> None:
    model = toy("Mixtral", num_local_experts=4, attention_dropout=0.3, router_jitter_noise=0.2).train()
    run = partial(model, input_ids=torch.arange(12)[None], use_cache=False)
    assert not torch.equal(run().logits, run().logits)
    found = without_noise(model)
    assert {name.rpartition(".")[2] for name in found} == {"attention_dropout", "jitter_noise"}
    assert torch.equal(run().logits, run().logits)
    assert model.config.attention_dropout == 0.3, "the saved configuration is the user's"
    gpt2 = toy("GPT2", n_embd=32, n_head=4, n_layer=2).train()
    run = partial(gpt2, input_ids=torch.arange(12)[None], use_cache=False)
    assert not torch.equal(run().logits, run().logits)
    assert without_noise(gpt2)
    assert torch.equal(run().logits, run().logits)
    assert without_noise(gpt2) == ()


# ---------------------------------------------------------------- through the policy


def test_the_composition_root_falls_back_too(tmp_path: Path) -> None:
    from grpo.config import Config
    from grpo.machine import Machine
    from grpo.parts import make_policy

    shape = {"sliding_window": 4}
    toy("Mistral", **shape).save_pretrained(tmp_path)
    config = Config()
    config.rollout.temperature = TEMPERATURE
    batch = make_batch()
    with pytest.warns(UserWarning, match="padded"):
        policy = make_policy(config, str(tmp_path), None, Machine(device="cpu", dtype_name="float32", cores=1), ranks=None)
        scores = policy.score(batch)
    torch.testing.assert_close(scores.logprobs, oracle(toy("Mistral", **shape), batch)[0], rtol=1e-5, atol=1e-5)
