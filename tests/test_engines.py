"""One contract over the engines: vLLM, transformers, scripted. What only some of them promise is tested below it; that they pause and
sleep, and pools of them, in ``test_engines_pause_and_sleep.py``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from grpo.rollouts.base import Engine, end_of_first_stop
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.scripted import ScriptedEngine
from grpo.types import Completion, FinishReason, Request, Sampling

from .engine_checks import LOGPROB_BOUND, SHORT, counting, reference, requests_for, true_logprobs, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["scripted", "hf", pytest.param("vllm", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(kind: str, request: pytest.FixtureRequest, tokenizer: Any) -> Engine:
    if kind == "scripted":
        return ScriptedEngine(tokenizer, counting)
    engine: Engine = request.getfixturevalue(f"{kind}_engine")
    return engine


@pytest.fixture
def modelled(kind: str, engine: Engine) -> Engine:
    """An engine whose tokens come from a model."""
    if kind == "scripted":
        pytest.skip("has no model")
    return engine


def worst_difference(model: Any, completions: list[Completion], sampling: Sampling) -> float:
    return max(
        abs(ours - true)
        for completion in completions
        for ours, true in zip(completion.logprobs, true_logprobs(model, completion, sampling), strict=True)
    )


# --- the contract ---


def test_order_shapes_and_progress(engine: Engine, tokenizer: Any) -> None:
    requests = requests_for(tokenizer)
    calls: list[tuple[int, int]] = []
    completions = engine.generate(requests, SHORT, lambda done, total: calls.append((done, total)))
    assert [(c.problem_id, c.index) for c in completions] == [(r.problem_id, i) for r in requests for i in range(3)]
    assert [c.prompt_ids for c in completions[::3]] == [r.prompt_ids for r in requests]
    assert all(0 < len(c.token_ids) <= 12 for c in completions)
    assert all(-math.inf < logprob <= 0 for c in completions for logprob in c.logprobs)
    assert calls[-1] == (12, 12) and calls == sorted(calls)


def test_text_is_the_tokens_without_the_end_token(engine: Engine, tokenizer: Any) -> None:
    for completion in engine.generate(requests_for(tokenizer, num_completions=6), Sampling(max_new_tokens=40)):
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        ended = completion.token_ids[-1] == tokenizer.eos_token_id
        assert completion.finish_reason is (FinishReason.stop if ended else FinishReason.length)
        assert ended or len(completion.token_ids) == 40
        assert tokenizer.eos_token_id not in completion.token_ids[:-1]


def test_stop_string_ends_the_text_and_stays_in_it(engine: Engine, tokenizer: Any) -> None:
    stop = ("+", "7", "=", "zz")
    completions = engine.generate(requests_for(tokenizer, num_completions=6), Sampling(max_new_tokens=60, stop=stop))
    stopped = [c for c in completions if c.text.endswith(stop)]
    assert len(stopped) > 10
    for completion in stopped:
        assert completion.finish_reason is FinishReason.stop
        assert end_of_first_stop(completion.text, stop) == len(completion.text)
        assert tokenizer.decode(completion.token_ids, skip_special_tokens=True) == completion.text


def test_an_empty_prompt_is_refused_in_words(engine: Engine, tokenizer: Any) -> None:
    empty = Request(problem_id="row/7", prompt_ids=(), num_completions=1, seed=0)
    with pytest.raises(ValueError, match="problem 'row/7': its prompt is empty"):
        engine.generate([*requests_for(tokenizer), empty], SHORT)
    assert len(engine.generate(requests_for(tokenizer), SHORT)) == 12, "and it goes on"


def test_what_fits_is_sampled_and_one_token_more_is_refused(modelled: Engine, tokenizer: Any) -> None:
    room = modelled.context_length
    assert room < 10_000, "a tiny model's"
    for more, sampling in ((0, Sampling(max_new_tokens=4)), (1, Sampling(max_new_tokens=5))):
        request = Request(problem_id="long", prompt_ids=(5,) * (room - 4), num_completions=1, seed=0)
        if more:
            with pytest.raises(ValueError, match=rf"'long': a prompt of {room - 4} tokens and max_new_tokens=5 do not fit in the {room} "):
                modelled.generate([request], sampling)
        else:
            assert 1 <= len(modelled.generate([request], sampling)[0].token_ids) <= 4


def test_every_token_carries_the_version_of_its_weights(engine: Engine, tokenizer: Any, tiny_model: str) -> None:
    requests, weights = requests_for(tokenizer), weights_of(tiny_model)
    for version in (3, 8):
        engine.load_weights(weights, version)
        assert {v for c in engine.generate(requests, SHORT) for v in c.policy_versions} == {version}


def test_same_seed_same_completions(engine: Engine, tokenizer: Any) -> None:
    first, again, other = (engine.generate(requests_for(tokenizer, seed=seed), SHORT) for seed in (0, 0, 100))
    assert first == again
    assert [c.token_ids for c in first] != [c.token_ids for c in other]
    assert len({c.token_ids for c in first[:3]}) == 3, "the completions of a request must differ"


def test_an_interrupted_engine_goes_on(engine: Engine, tokenizer: Any) -> None:
    class Enough(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        raise Enough

    expected = engine.generate(requests_for(tokenizer), SHORT)
    with pytest.raises(Enough):
        engine.generate(requests_for(tokenizer, seed=50), SHORT, interrupt)
    assert engine.generate(requests_for(tokenizer), SHORT) == expected


# --- engines with a model ---


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SHORT, id="plain"),
        pytest.param(Sampling(temperature=0.6, max_new_tokens=12), id="cold"),
        pytest.param(Sampling(temperature=0.0, max_new_tokens=12), id="greedy"),
        pytest.param(Sampling(top_k=5, max_new_tokens=12), id="top_k"),
    ],
)
def test_logprobs_are_those_of_the_sampled_distribution(
    kind: str, modelled: Engine, tokenizer: Any, tiny_model: str, sampling: Sampling
) -> None:
    weights = weights_of(tiny_model)
    modelled.load_weights(weights, 1)
    completions = modelled.generate(requests_for(tokenizer), sampling)
    assert worst_difference(reference(tiny_model), completions, sampling) < LOGPROB_BOUND[kind]


def test_loaded_weights_are_the_ones_used(kind: str, modelled: Engine, tokenizer: Any, tiny_model: str) -> None:
    """Every tensor changes by as much as it is large: a skipped one, or a stale cache, would show in every log-prob.

    It did: vLLM's CPU build kept a packed copy of the tied head when it reloaded, which at a learning rate of 1e-6 nobody sees.
    """
    requests, greedy = requests_for(tokenizer, num_completions=1), Sampling(temperature=0.0, max_new_tokens=12)
    modelled.load_weights(weights_of(tiny_model), 1)
    before = modelled.generate(requests, greedy)
    changed = weights_of(tiny_model, noise=1.0)
    modelled.load_weights(changed, 2)
    after = modelled.generate(requests, greedy)
    assert worst_difference(reference(tiny_model, changed), after, greedy) < LOGPROB_BOUND[kind]
    assert worst_difference(reference(tiny_model), after, greedy) > 100 * LOGPROB_BOUND[kind]
    modelled.load_weights(weights_of(tiny_model), 3)
    assert [c.token_ids for c in modelled.generate(requests, greedy)] == [c.token_ids for c in before]


def test_other_weights_are_refused_and_nothing_is_loaded(modelled: Engine, tokenizer: Any, tiny_model: str) -> None:
    weights = weights_of(tiny_model)
    modelled.load_weights(weights, 1)
    expected = modelled.generate(requests_for(tokenizer), SHORT)
    wrong = weights_of(tiny_model, noise=1.0)
    wrong["model.layers.1.mlp.up_proj.weight"] = wrong["model.layers.1.mlp.up_proj.weight"][1:]
    with pytest.raises(ValueError, match=r"of another shape: model.layers.1.mlp.up_proj.weight \[511, 128\] instead of \[512, 128\]"):
        modelled.load_weights(wrong, 2)
    del wrong["model.layers.1.mlp.up_proj.weight"]
    wrong["model.layers.9.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"(?s)1 missing: model.layers.1.mlp.up_proj.weight.*1 unexpected: model.layers.9.extra"):
        modelled.load_weights(wrong, 2)
    assert modelled.generate(requests_for(tokenizer), SHORT) == expected


def test_a_completion_does_not_depend_on_its_company(modelled: Engine, tokenizer: Any) -> None:
    """Alone or in a batch: the same tokens, log-probs equal up to float noise."""
    requests = requests_for(tokenizer)
    together = modelled.generate(requests, SHORT)
    alone = [completion for request in requests[::-1] for completion in modelled.generate([request], SHORT)[::-1]][::-1]
    assert [c.token_ids for c in alone] == [c.token_ids for c in together]
    for one, other in zip(alone, together, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_does_not_fit_is_refused(modelled: Engine, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)'p0'.*max_new_tokens=5000.*shorten the prompt"):
        modelled.generate(requests_for(tokenizer), Sampling(max_new_tokens=5000))


@pytest.mark.slow
def test_vllm_and_transformers_draw_the_same_tokens(vllm_engine: Engine, hf_engine: Engine, tokenizer: Any, tiny_model: str) -> None:
    """One rule of randomness: the engines differ by float noise alone, which seldom decides a token."""
    for engine in (vllm_engine, hf_engine):
        engine.load_weights(weights_of(tiny_model), 1)
    sampling = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=20, stop=("+",))
    ours, theirs = (engine.generate(requests_for(tokenizer, num_completions=16), sampling) for engine in (hf_engine, vllm_engine))
    same = sum((a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason) for a, b in zip(ours, theirs, strict=True))
    assert same >= 62, f"{same} of 64"


def test_hf_engine_takes_a_loaded_model_and_small_batches(hf_engine: Engine, tokenizer: Any, tiny_model: str) -> None:
    small = HFEngine(reference(tiny_model), tokenizer=tokenizer, batch_size=5)
    hf_engine.load_weights(weights_of(tiny_model), 0)
    expected = hf_engine.generate(requests_for(tokenizer), SHORT)
    assert [c.token_ids for c in small.generate(requests_for(tokenizer), SHORT)] == [c.token_ids for c in expected]
    with pytest.raises(ValueError, match="pass tokenizer="):
        HFEngine(reference(tiny_model))


# --- the scripted engine ---


def test_scripted_engine_says_what_it_is_told(tokenizer: Any) -> None:
    engine = ScriptedEngine(tokenizer, lambda prompt, index, seed: f"{prompt}{index}+{seed}")
    request = Request(problem_id="a", prompt_ids=tuple(tokenizer.encode("1+2=")), num_completions=2, seed=7)
    first, second = engine.generate([request], SHORT)
    assert (first.text, second.text) == ("1+2=0+7", "1+2=1+7")
    assert first.logprobs == (-math.log(len(tokenizer)),) * 8  # seven characters and the end token
    engine.load_weights({}, 4)
    engine.load_weights({}, 5)
    assert engine.loaded_versions == [4, 5]


def test_scripted_engine_cuts_long_answers(tokenizer: Any) -> None:
    engine = ScriptedEngine(tokenizer, lambda prompt, index, seed: "123456")
    (cut,) = engine.generate([Request(problem_id="a", prompt_ids=(5,), num_completions=1, seed=0)], Sampling(max_new_tokens=4))
    assert (cut.text, cut.finish_reason) == ("1234", FinishReason.length)
