"""The policy: what one update does to the weights, exact resume, and the folder it leaves behind."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from grpo import aggregation, kl, layouts, objectives, tree_attention
from grpo.batch import Batch, collate
from grpo.layouts import LayoutName
from grpo.losses import Loss
from grpo.policy import HFPolicy, OptimSettings, learning_rate, to_device
from grpo.toy import toy_llama, toy_rollout
from grpo.types import Group, Problem

VOCAB = 24
PLAIN = Loss(objective=objectives.policy_gradient, aggregate=aggregation.token_mean)
ADAM = OptimSettings(lr=1e-2, schedule="linear", warmup=2, num_updates=8, weight_decay=0.1)


def toy(seed: int = 0, tied: bool = True) -> Any:
    return toy_llama(seed, tie_word_embeddings=tied)


def make_batch(seed: int = 0, signal: bool = True) -> Batch:
    rng, groups = random.Random(seed), []
    for g in range(2):
        problem, prompt = Problem(id=f"p{g}", prompt="?", answer="1"), tuple(rng.randrange(VOCAB) for _ in range(4 + g))
        rollouts = []
        for i in range(3):
            tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
            rollouts.append(toy_rollout(problem, i, prompt, tokens, logprobs=(-3.0,) * len(tokens)))
        groups.append(Group(problem=problem, rollouts=tuple(rollouts)))
    batch = collate(groups)
    values = torch.tensor([rng.choice([-1.0, 1.0, 0.5]) * signal for _ in batch.rollouts])
    return replace(batch, advantages=values[batch.rollout_index])


def make_policy(model: Any = None, optim: OptimSettings = ADAM, **settings: Any) -> HFPolicy:
    return HFPolicy(toy() if model is None else model, optim, **settings)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def through_disk(state: Mapping[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# ---------------------------------------------------------------- one update


def test_small_updates_are_not_lost_in_bf16() -> None:
    """Forty Adam updates of 10⁻⁴ move a weight of 1 by 0.004. The next bf16 number is 0.0039 away: alone, each is rounded away."""
    optim = OptimSettings(lr=1e-4, max_grad_norm=0.0)
    policy, batch = make_policy(optim=optim, dtype=torch.bfloat16), make_batch()
    for _ in range(40):
        policy.update(batch, PLAIN)
    norm = policy.masters["model.norm.weight"].detach()
    assert 0.002 < float((norm - 1).abs().max()) < 0.006
    assert (policy.weights()["model.norm.weight"] != 1).any(), "what is learnt reaches the weights that compute"
    assert all(torch.equal(weight, policy.masters[name].to(torch.bfloat16)) for name, weight in policy.weights().items())

    plain: Any = toy().to(torch.bfloat16)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    ids = torch.tensor([[1, 5, 9, 2, 3]])
    for _ in range(40):
        plain(input_ids=ids, labels=ids).loss.backward()
        adam.step()
        adam.zero_grad()
    assert (plain.model.norm.weight == 1).all(), "what HFPolicy avoids"


def test_bf16_gradients_of_many_microbatches_are_summed_in_fp32() -> None:
    """A budget of one token makes every rollout a micro-batch: the sum must be that of the single pass, as far as bf16 passes go."""
    optim, batch = OptimSettings(name="sgd", lr=1.0, max_grad_norm=0.0), make_batch()
    moved = []
    for budget in (10_000, 1):
        policy = make_policy(optim=optim, dtype=torch.bfloat16, tokens_per_microbatch=budget)
        before = copied(policy.masters)
        policy.update(batch, PLAIN)
        moved.append(torch.cat([(before[name] - m.detach()).flatten() for name, m in policy.masters.items()]))
        assert all(m.dtype is torch.float32 for m in policy.masters.values())
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 0.02  # a few roundings of 2⁻⁹ each


@pytest.mark.parametrize("bound", [0.0, 0.01, 1e6])
def test_gradient_clipping(bound: float) -> None:
    policy = make_policy(optim=OptimSettings(name="sgd", lr=1.0, max_grad_norm=bound))
    before = copied(policy.weights())
    norm = policy.update(make_batch(), PLAIN)["policy/grad_norm"]
    moved = math.sqrt(sum(float((before[name] - w).double().square().sum()) for name, w in policy.weights().items()))
    assert norm > 0.1, "what is reported is the norm before clipping"
    assert moved == pytest.approx(0.01 if bound == 0.01 else norm, rel=1e-3)


def test_an_update_raises_what_was_good_and_lowers_what_was_bad() -> None:
    policy, batch = make_policy(optim=OptimSettings(name="sgd", lr=0.05, max_grad_norm=0.0)), make_batch()
    assert batch.advantages is not None
    before = policy.score(batch).logprobs
    policy.update(batch, PLAIN)
    assert float((batch.advantages * (policy.score(batch).logprobs - before)).sum()) > 0


def test_learning_rate_golden() -> None:
    s = OptimSettings(lr=1.0, warmup=4, num_updates=12, min_lr_ratio=0.1)

    def rates(schedule: str, *updates: int) -> list[float]:
        return [learning_rate(n, replace(s, schedule=schedule)) for n in updates]

    for schedule in ("constant", "linear", "cosine"):
        assert rates(schedule, 0, 1, 2, 3, 4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    # after the warm-up 8 updates are left; 6 is a quarter of the way, 8 half of it, 12 and beyond the floor
    assert rates("linear", 6, 8, 12, 99) == pytest.approx([0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1, 0.1])
    assert rates("cosine", 6, 8, 12, 99) == pytest.approx([0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.1 + 0.9 * 0.5, 0.1, 0.1])
    assert rates("constant", 6, 8, 12, 99) == [1.0] * 4
    assert learning_rate(5, OptimSettings(lr=3e-6)) == 3e-6


def test_the_schedule_is_the_one_that_is_used() -> None:
    policy = make_policy(optim=OptimSettings(name="sgd", lr=0.1, schedule="linear", warmup=2, num_updates=4, max_grad_norm=0.0))
    for rate in (0.05, 0.1, 0.1, 0.05, 0.0):  # warm-up ½ and 1; then 1, ½, 0 of the way down
        before = copied(policy.weights())
        metrics = policy.update(make_batch(), PLAIN)
        moved = math.sqrt(sum(float((before[name] - w).double().square().sum()) for name, w in policy.weights().items()))
        assert metrics["policy/lr"] == pytest.approx(rate)
        assert moved == pytest.approx(rate * metrics["policy/grad_norm"], rel=1e-3, abs=1e-9)


def test_metrics_of_an_update() -> None:
    policy, batch = make_policy(), make_batch()
    scores = policy.score(batch)
    metrics = policy.update(batch, PLAIN)
    assert metrics["policy/ratio"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/entropy"] == pytest.approx(float(scores.entropy.mean()), rel=1e-5)
    assert metrics["sampler/logprob_diff_max"] == pytest.approx(float((scores.logprobs + 3).abs().max()), rel=1e-4)
    assert metrics["policy/trained_rollouts"] == 6
    assert batch.advantages is not None
    assert metrics["policy/loss"] == pytest.approx(-float(batch.advantages.mean()), abs=1e-6)  # ρ = 1: the mean advantage


def moved_by_sgd(model: Any, loss: Loss = PLAIN, **settings: Any) -> dict[str, Tensor]:
    """What one step of plain SGD at rate 1 takes away: exactly the gradient."""
    policy = make_policy(model, OptimSettings(name="sgd", lr=1.0, max_grad_norm=0.0), **settings)
    before = copied(policy.masters)
    policy.update(make_batch(), loss)
    return {name: before[name] - m.detach() for name, m in policy.masters.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_float64_model_learns_in_float64(tied: bool) -> None:
    """Norms that do not cast make the whole model float64; its update must then be the gradient of a plain forward pass, to 1e-9."""
    model, batch = toy(tied=tied).double(), make_batch()
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, torch.nn.RMSNorm(16, eps=child.variance_epsilon, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    assert batch.advantages is not None
    for i, rollout in enumerate(batch.rollouts):
        prompt, tokens = rollout.completion.prompt_ids, rollout.completion.token_ids
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        total = total - (batch.advantages[batch.rollout_index == i].double() * logprobs).sum() / batch.num_tokens
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(total, list(model.parameters())), strict=True))
    for budget in (10_000, 1):
        moved = moved_by_sgd(copy.deepcopy(model), dtype=torch.float64, tokens_per_microbatch=budget)
        assert all(m.dtype is torch.float64 for m in moved.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(moved[name], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("layout", ["shared_prompt", "padded"])
def test_activation_checkpointing_changes_memory_and_no_gradient(layout: LayoutName) -> None:
    model = toy()
    plain = moved_by_sgd(copy.deepcopy(model), layout=layout)
    with_gradient: list[bool] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    model.gradient_checkpointing_enable()
    again = moved_by_sgd(model, layout=layout)
    assert sum(with_gradient) == 2, "forward, and once more backward"
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_moves_nothing(bad: float) -> None:
    policy, batch = make_policy(), make_batch()
    assert batch.advantages is not None
    policy.update(batch, PLAIN)
    masters, weights = copied(policy.masters), copied(policy.weights())
    optimiser = copy.deepcopy(policy.optimiser.state_dict()["state"])
    spoilt = replace(batch, advantages=torch.where(torch.arange(batch.num_tokens) == 2, bad, batch.advantages))
    metrics = policy.update(spoilt, PLAIN)
    assert metrics["optim/skipped_updates"] == policy.num_skipped == 1
    assert same(copied(policy.masters), masters) and same(policy.weights(), weights)
    for number, values in policy.optimiser.state_dict()["state"].items():
        assert same(values, optimiser[number])
    metrics = policy.update(batch, PLAIN)
    assert math.isfinite(metrics["policy/grad_norm"]), "the spoilt gradient is gone"
    assert metrics["optim/skipped_updates"] == 1 and not same(copied(policy.masters), masters)


# ---------------------------------------------------------------- nothing to learn from


class Calls:
    """How often the model is called."""

    def __init__(self, policy: HFPolicy) -> None:
        self.count = 0
        policy.model.base_model.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


def test_a_batch_without_signal_is_neither_computed_nor_learnt_from() -> None:
    policy = make_policy()
    policy.update(make_batch(), PLAIN)  # from now on AdamW has momentum, and weight decay would move the weights by itself
    calls, before = Calls(policy), copied(policy.masters)
    metrics = policy.update(make_batch(signal=False), PLAIN)
    assert (calls.count, policy.num_updates) == (0, 1)
    assert same(before, copied(policy.masters))
    assert metrics["policy/trained_rollouts"] == metrics["policy/loss"] == 0
    assert "policy/grad_norm" not in metrics and "policy/lr" not in metrics, "there was no step"
    policy.update(collate([]).with_advantages(lambda rewards, groups: rewards.float()), PLAIN)
    assert (calls.count, policy.num_updates) == (0, 1)


def test_only_rollouts_with_signal_are_computed_unless_a_kl_needs_all() -> None:
    batch = make_batch()
    assert batch.advantages is not None
    batch = replace(batch, advantages=batch.advantages * (batch.rollout_index < 2))
    computed = {}
    for name, loss in (("plain", PLAIN), ("kl", replace(PLAIN, kl=kl.k3, kl_coef=0.1))):
        policy = make_policy(layout="padded")
        metrics = policy.update(replace(batch, reference_logprobs=policy.score(batch).logprobs), loss)
        computed[name] = (metrics["policy/trained_rollouts"], metrics["throughput/update_tokens"])
    tokens = [len(r.completion.token_ids) for r in batch.rollouts]
    assert computed == {"plain": (2, sum(tokens[:2])), "kl": (6, sum(tokens))}


# ---------------------------------------------------------------- going on exactly here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_resume_is_exact(dtype: torch.dtype, name: str) -> None:
    optim, batches = replace(ADAM, name=name), [make_batch(seed) for seed in range(5)]
    straight = make_policy(optim=optim, dtype=dtype)
    for batch in batches:
        straight.update(batch, PLAIN)

    first = make_policy(optim=optim, dtype=dtype)
    for batch in batches[:2]:
        first.update(batch, PLAIN)
    state = through_disk(first.state())
    second = make_policy(toy(seed=9), optim=optim, dtype=dtype)  # other weights, so that all of them must come from the state
    second.load_state(state)
    assert same(second.weights(), first.weights())
    rates = [second.update(batch, PLAIN)["policy/lr"] for batch in batches[2:]]
    assert rates == [learning_rate(n, optim) for n in (2, 3, 4)]
    assert same(second.weights(), straight.weights())
    assert same(copied(second.masters), copied(straight.masters))


def test_a_snapshot_stays_while_the_policy_learns() -> None:
    policy, batch = make_policy(), make_batch()
    reference, before = policy.snapshot(), policy.score(batch).logprobs
    policy.update(batch, PLAIN)
    assert torch.equal(reference.score(batch).logprobs, before)
    assert not torch.equal(policy.score(batch).logprobs, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_comes_back_from_its_state_and_leaves_the_policy_alone(dtype: torch.dtype) -> None:
    """It did not: the snapshot shared the policy's masters, so a resumed run had the trained policy as its reference."""
    policy, batch = make_policy(dtype=dtype), make_batch()
    reference, expected = policy.snapshot(), policy.score(batch).logprobs
    for seed in range(3):
        policy.update(make_batch(seed), PLAIN)
    policy_state, reference_state = through_disk(policy.state()), through_disk(reference.state())

    resumed = make_policy(toy(seed=9), dtype=dtype)
    resumed.load_state(policy_state)
    again = resumed.snapshot()
    again.load_state(reference_state)
    assert torch.equal(again.score(batch).logprobs, expected)
    assert torch.equal(resumed.score(batch).logprobs, policy.score(batch).logprobs)
    for side in (policy, resumed):
        side.update(batch, PLAIN)
    assert same(resumed.weights(), policy.weights())


# ---------------------------------------------------------------- what others get


@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_names_of_the_checkpoint(tied: bool, tmp_path: Path) -> None:
    policy = make_policy(toy(tied=tied))
    policy.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert same(policy.weights(), stored)
    assert ("lm_head.weight" in stored) is not tied


@pytest.mark.parametrize("layout", ["shared_prompt", "padded"])
def test_a_saved_policy_loads_in_transformers(layout: LayoutName, tmp_path: Path) -> None:
    policy, batch = make_policy(layout=layout), make_batch()
    for seed in range(3):
        policy.update(make_batch(seed), PLAIN)
    policy.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.config._attn_implementation != tree_attention.NAME
    expected = []
    for rollout in batch.rollouts:
        prompt, tokens = rollout.completion.prompt_ids, rollout.completion.token_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        expected.append(logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)])
    torch.testing.assert_close(policy.score(batch).logprobs, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert model.dtype is torch.float32


def test_temperature_scales_the_scores() -> None:
    model, batch = toy(), make_batch()
    hot, cold = (make_policy(copy.deepcopy(model), temperature=t).score(batch) for t in (1.0, 0.5))
    assert float(cold.entropy.mean()) < float(hot.entropy.mean())
    single = batch.rollouts[0].completion
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([single.prompt_ids])).logits[0, -1]
    assert float(cold.logprobs[0]) == pytest.approx(float((logits / 0.5).log_softmax(-1)[single.token_ids[0]]), abs=1e-5)


def test_a_model_that_scales_its_logits_is_refused() -> None:
    """Granite divides its logits by 8 after the head: log-probs from hidden states and head alone would be another model's."""
    from transformers import GraniteConfig, GraniteForCausalLM

    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    with pytest.raises(ValueError, match="changes its logits after its output head"):
        HFPolicy(GraniteForCausalLM(GraniteConfig(**settings, vocab_size=40, logits_scaling=8.0)), OptimSettings())


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.slow
def test_nothing_waits_for_the_gpu_in_a_micro_batch() -> None:
    model = toy_llama(0, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)  # FlexAttention wants heads of 16 numbers or more
    policy, batch = make_policy(model, device="cuda"), make_batch()
    policy.update(batch, PLAIN)  # the layout is checked, and kernels are compiled
    layout = policy._layout(batch.rollouts)
    assert layout == "shared_prompt"
    (rows,) = layouts.microbatches(batch, layout, 1000)
    part = batch.select([i for row in rows for i in row])
    moved = to_device(part, policy.device)
    assert moved.rewards.is_cuda and moved.rewards.tolist() == part.rewards.tolist()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scores = policy._scores(layouts.lay_out([[batch.rollouts[i] for i in row] for row in rows], layout))
        output = PLAIN(scores, to_device(part, policy.device))
        output.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(float(output.loss))
