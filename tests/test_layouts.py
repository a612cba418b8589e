"""Layouts: padded and shared-prompt rows against a plain transformers forward pass, one sequence at a time."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo import aggregation, layouts, objectives, tree_attention
from grpo.batch import Batch, collate
from grpo.losses import Loss
from grpo.policy import HFPolicy, OptimSettings
from grpo.types import Completion, FinishReason, Group, Problem, Rollout

VOCAB, TEMPERATURE, ENTROPY_COEF = 50, 0.8, 0.1
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
# prompts of different lengths; completions of length 1 first, between, last and alone
SHAPES = ((9, (1, 4, 7)), (3, (2, 1)), (1, (1,)), (5, (6, 6, 1, 3, 5)), (4, (1, 1)))
PROMPTS = {  # what comes before the prompts of SHAPES
    "strangers": lambda g: (),
    "worked examples": lambda g: (7, 8, 9, 7, 8, 9),
    "nested": lambda g: (7,) * (30 - 3 * g),  # each the beginning of those before it, up to its own tokens
}


def toy(kind: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SHAPE | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # ones and zeros as they are made: a wrong one would not show
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def make_batch(shapes: Sequence[tuple[int, Sequence[int]]] = SHAPES, seed: int = 0, prompts: str = "strangers") -> Batch:
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(count))

    groups = []
    for g, (prompt_length, lengths) in enumerate(shapes):
        problem, prompt = Problem(id=f"p{g}", prompt="?", answer="1"), (*PROMPTS[prompts](g), *tokens(prompt_length))
        rollouts = []
        for i, length in enumerate(lengths):
            completion = Completion(
                problem_id=problem.id,
                index=i,
                prompt_ids=prompt,
                token_ids=tokens(length),
                text="",
                logprobs=(-1.0,) * length,
                policy_versions=(0,) * length,
                finish_reason=FinishReason.stop,
            )
            rollouts.append(Rollout(problem=problem, completion=completion, scores={}, reward=0.0))
        groups.append(Group(problem=problem, rollouts=tuple(rollouts)))
    batch = collate(groups)
    advantages = torch.tensor([rng.uniform(-2, 2) for _ in batch.rollouts])
    return replace(batch, advantages=advantages[batch.rollout_index])


def oracle(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs, entropies and parameter gradients of the loss by a forward pass over each whole sequence alone."""
    logprobs, entropies = [], []
    for rollout in batch.rollouts:
        prompt, tokens = rollout.completion.prompt_ids, rollout.completion.token_ids
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p = (logits.float() / TEMPERATURE).log_softmax(-1)
        logprobs.append(log_p[torch.arange(len(tokens)), torch.tensor(tokens)])
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    logprob, entropy = torch.cat(logprobs), torch.cat(entropies)
    assert batch.advantages is not None
    loss = -(batch.advantages * logprob + ENTROPY_COEF * entropy).sum() / batch.num_tokens
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return logprob.detach(), entropy.detach(), dict(zip(dict(model.named_parameters()), grads, strict=True))


def ours(
    model: Any, batch: Batch, shared: bool, budget: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same by the policy. One step of plain SGD at rate 1 takes away exactly the gradient."""
    optim = OptimSettings(name="sgd", lr=1.0, max_grad_norm=0.0)
    policy = HFPolicy(
        copy.deepcopy(model),
        optim,
        dtype=dtype,
        temperature=TEMPERATURE,
        shared_prompt=shared,
        tokens_per_microbatch=budget,
        logprob_chunk=5,
    )
    scores = policy.score(batch)
    before = {name: weight.clone() for name, weight in policy.weights().items()}
    policy.update(batch, Loss(objective=objectives.policy_gradient, aggregate=aggregation.token_mean, entropy_coef=ENTROPY_COEF))
    return scores.logprobs, scores.entropy, {name: before[name] - weight for name, weight in policy.weights().items()}


def worst(mine: tuple[Tensor, Tensor, dict[str, Tensor]], true: tuple[Tensor, Tensor, dict[str, Tensor]]) -> float:
    """The largest difference, relative to the tensor's largest number where that is above 1."""
    assert mine[2].keys() == true[2].keys()
    pairs = [(mine[0], true[0]), (mine[1], true[1]), *((mine[2][name], grad) for name, grad in true[2].items())]
    return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)


@pytest.mark.parametrize("shared", [False, True], ids=["padded", "shared_prompt"])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_every_layout_equals_one_sequence_at_a_time(kind: str, prompts: str, shared: bool) -> None:
    model, batch = toy(kind), make_batch(prompts=prompts)
    truth = oracle(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback to padded here
        for budget in (10_000, 150, 60, 14, 1):
            assert worst(ours(model, batch, shared, budget), truth) < 1e-5, budget


some_shapes = st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 8), min_size=1, max_size=5)), min_size=1, max_size=5)


@settings(max_examples=25)
@given(some_shapes, st.sampled_from(sorted(PROMPTS)), st.integers(1, 120), st.integers(0, 10**6))
def test_shared_prompt_equals_padded_on_any_batch(shapes: list[tuple[int, list[int]]], prompts: str, budget: int, seed: int) -> None:
    """In float64: an unlucky batch of one short completion has gradients whose fp32 rounding alone is 1e-5."""
    model, batch = toy("Llama"), make_batch(shapes, seed, prompts)
    mine, true = (ours(model, batch, shared, tokens, torch.float64) for shared, tokens in ((True, budget), (False, 10_000)))
    assert worst(mine, true) < 5e-6  # the norms and the masters are fp32 whatever the rest is


def test_the_comparison_would_see_a_completion_that_sees_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the blocks apart wrongly – all completions of a row one causal sequence – and the bound breaks."""
    build = layouts.build_tree
    monkeypatch.setattr(layouts, "build_tree", lambda prefix, prompts, lengths: build(prefix, prompts, [[sum(row)] for row in lengths]))
    model, batch = toy("Llama"), make_batch()
    assert worst(ours(model, batch, True, 10_000), oracle(model, batch)) > 1e-2


# ---------------------------------------------------------------- the golden layout


def test_shared_prompt_golden() -> None:
    """Prompt (p₀ p₁), completions of 3 and 1: the row is p₀ p₁ a b; the second completion's only token is no input."""
    batch = make_batch([(2, (3, 1))])
    first, second = (r.completion for r in batch.rollouts)
    inputs = layouts.lay_out([batch.rollouts], shared=True)
    assert inputs.input_ids.tolist() == [[*first.prompt_ids, *first.token_ids[:2]]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3]]
    assert inputs.gather.tolist() == [1, 2, 3, 1]  # the last prompt token predicts the first token of both
    assert inputs.targets.tolist() == [*first.token_ids, *second.token_ids]
    assert inputs.attention_mask is None and inputs.tree is not None


def test_padded_golden() -> None:
    batch = make_batch([(2, (3, 1))])
    first = batch.rollouts[0].completion
    inputs = layouts.lay_out([[r] for r in batch.rollouts], shared=False)
    assert inputs.input_ids.tolist() == [[*first.prompt_ids, *first.token_ids[:2]], [*first.prompt_ids, 0, 0]]
    assert inputs.attention_mask is not None
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert inputs.gather.tolist() == [1, 2, 3, 4 + 1]


def tokens_computed(batch: Batch, shared: bool, budget: int) -> list[int]:
    """Of each micro-batch, padding included."""
    parts = layouts.microbatches(batch, shared, budget)
    return [layouts.lay_out([[batch.rollouts[i] for i in row] for row in part], shared).input_ids.numel() for part in parts]


def test_a_prompt_is_computed_once_a_group_and_a_common_beginning_once() -> None:
    batch = make_batch([(30, (4, 4, 4, 4)), (30, (4, 4, 4, 4))])
    assert tokens_computed(batch, False, 10_000) == [8 * (30 + 3)]
    assert tokens_computed(batch, True, 10_000) == [2 * (30 + 4 * 3)]
    assert tokens_computed(batch, True, 36) == [30 + 2 * 3] * 4  # groups are cut to the budget
    few_shot = make_batch([(30, (4, 4, 4, 4)), (30, (4, 4, 4, 4))], prompts="worked examples")
    assert tokens_computed(few_shot, True, 10_000) == [6 + 2 * (30 + 4 * 3)]


@given(some_shapes, st.sampled_from(sorted(PROMPTS)), st.booleans(), st.integers(1, 150))
def test_microbatches_hold_every_rollout_once_within_the_budget(
    shapes: list[tuple[int, list[int]]], prompts: str, shared: bool, budget: int
) -> None:
    batch = make_batch(shapes, prompts=prompts)
    parts = list(layouts.microbatches(batch, shared, budget))
    assert sorted(i for part in parts for row in part for i in row) == list(range(len(batch.rollouts)))
    for part, size in zip(parts, tokens_computed(batch, shared, budget), strict=True):
        assert all(len({batch.rollouts[i].problem.id for i in row}) == 1 for row in part), "a row shares one prompt"
        assert shared or all(len(row) == 1 for row in part)
        alone = [len(row) for row in part] == [1]  # a rollout longer than the budget has to go somewhere
        inputs = sum(len(batch.rollouts[i].completion.token_ids) - 1 for row in part for i in row)
        no_region = 0 if inputs else len(part)  # a completion region is one token wide at least
        assert alone or size - no_region <= budget


# ---------------------------------------------------------------- models that cannot share a prompt


def test_unsupported_models_are_named_with_the_reason() -> None:
    t: Any = transformers
    assert layouts.unsupported(t.MistralConfig()) == "it has sliding-window attention"
    assert layouts.unsupported(t.Gemma3TextConfig()) == "it has sliding_attention layers"
    assert layouts.unsupported(t.Gemma3Config()) == "it has sliding_attention layers"  # said by its text_config
    assert layouts.unsupported(t.Qwen3NextConfig()) == "it has linear_attention layers"
    assert layouts.unsupported(t.LlamaConfig(attention_dropout=0.1)) == "it has attention dropout"
    swa = t.Qwen2Config(use_sliding_window=True, sliding_window=8, num_hidden_layers=2, max_window_layers=0)
    assert layouts.unsupported(swa) == "it has sliding_attention layers"


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_full_attention_is_supported(kind: str) -> None:
    assert layouts.unsupported(getattr(transformers, f"{kind}Config")()) is None


def test_a_sliding_window_falls_back_to_padded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy("Mistral", sliding_window=4), make_batch()
    truth = oracle(model, batch)
    with pytest.warns(UserWarning, match=r"shared_prompt is not possible for this model: it has sliding-window attention; using padded"):
        mine = ours(model, batch, True, 60)
    assert worst(mine, truth) < 1e-5
    monkeypatch.setattr(layouts, "unsupported", lambda config: None)
    with pytest.raises(ValueError, match=r"sliding_window: set trainer\.layout=padded"):  # the second net
        ours(model, batch, True, 60)


def test_the_composition_root_falls_back_too(tmp_path: Path) -> None:
    from grpo.build import Machine, make_policy
    from grpo.config import Config

    toy("Mistral", sliding_window=4).save_pretrained(tmp_path)
    config = Config()
    config.rollout.temperature = TEMPERATURE
    with pytest.warns(UserWarning, match="using padded"):
        policy = make_policy(config, str(tmp_path), None, Machine(device="cpu", dtype_name="float32", cores=1))
    batch = make_batch()
    torch.testing.assert_close(policy.score(batch).logprobs, oracle(toy("Mistral", sliding_window=4), batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_attention_it_does_not_know_is_refused(setting: dict[str, Any]) -> None:
    x = torch.randn(1, 2, 3, 4)
    tree = tree_attention.build_tree(1, [1], [[1]])
    tree_attention.attention_forward(None, x, x, x, None, tree=tree)
    with pytest.raises(ValueError, match=r"trainer\.layout=padded|attention_dropout to 0"):
        tree_attention.attention_forward(None, x, x, x, None, tree=tree, **setting)
