"""The way of the weights and its proof: each of the known failures is planted, and must be caught."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from grpo.rollouts.base import SyncReport
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.proof import (
    Arrivals,
    WeightProofError,
    changed,
    check_sent,
    digest,
    digest_of_values,
    mean_difference,
    one_of_each_kind,
    probe_difference,
    self_test,
)
from grpo.rollouts.scripted import ScriptedEngine
from grpo.rollouts.transfer import Disk, handfuls
from grpo.rollouts.weights import PackedWeights, Spec, WeightStream, check_weights, checkpoint_shapes
from grpo.types import Completion, Request, Sampling

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64, torch.int64]
TENSOR = "model.layers.2.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
FEW = Sampling(max_new_tokens=6)


pytestmark = pytest.mark.usefixtures("one_thread")


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def weights(tiny_model: str) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in load(tiny_model).named_parameters()}


@pytest.fixture
def engine(tiny_model: str, tokenizer: Any) -> HFEngine:
    return HFEngine(load(tiny_model), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def probe(tokenizer: Any) -> list[Request]:
    prompt = "What is 17 + 4 + 12? Think about it, and then give the answer =>"  # 64 characters are 64 tokens: two blocks of vLLM's cache
    assert len(prompt) == 64
    return [
        Request(problem_id=str(i), prompt_ids=tuple(tokenizer.encode(prompt[i:] + prompt[:i])), num_completions=2, seed=i) for i in range(2)
    ]


@pytest.fixture(scope="module")
def score(tiny_model: str) -> Callable[[Mapping[str, torch.Tensor], Sequence[Completion]], list[list[float]]]:
    """The trainer's log-probs, by one forward pass a completion."""
    model = load(tiny_model)

    def logprobs(weights: Mapping[str, torch.Tensor], completions: Sequence[Completion]) -> list[list[float]]:
        model.load_state_dict(dict(weights), strict=False)
        scores = []
        for completion in completions:
            ids = torch.tensor([[*completion.prompt_ids, *completion.token_ids]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(completion.prompt_ids) - 1 : -1].double()
            scores.append(logits.log_softmax(-1).gather(1, ids[0, len(completion.prompt_ids) :, None])[:, 0].tolist())
        return scores

    return logprobs


def nudged(weights: Mapping[str, torch.Tensor], size: float = 1e-6) -> dict[str, torch.Tensor]:
    """As after an optimiser step at a small learning rate."""
    return {name: changed(name, tensor, size) for name, tensor in weights.items()}


# --- shapes and forms ---


def test_checkpoint_shapes_are_the_parameters(tiny_model: str) -> None:
    expected = {name: tuple(p.shape) for name, p in load(tiny_model).named_parameters()}
    assert checkpoint_shapes(tiny_model) == expected
    assert "lm_head.weight" not in expected, "the tiny model ties its head, and tied parameters come once"


def test_a_tied_head_may_come_or_not() -> None:
    expected = {"embed.weight": (4, 2)}
    weights = {"embed.weight": torch.zeros(4, 2), "lm_head.weight": torch.zeros(4, 2)}
    check_weights(weights, expected, optional={"lm_head.weight"})
    check_weights(weights, {name: (4, 2) for name in weights}, optional={"lm_head.weight"})
    with pytest.raises(ValueError, match=r"1 unexpected: lm_head\.weight"):
        check_weights(weights, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights_arrive_bit_for_bit(dtype: torch.dtype) -> None:
    weights = {"a": torch.randn(3, 5).to(dtype), "transposed": torch.randn(4, 2).to(dtype).T, "scalar": torch.ones(()).to(dtype)}
    packed = PackedWeights.pack(weights)
    for array in packed.arrays.values():
        array.flags.writeable = False  # as they are when they come from another process
    for name, tensor in packed.unpack().items():
        assert tensor.dtype == dtype and tensor.shape == weights[name].shape
        assert torch.equal(tensor.double(), weights[name].double())


def test_a_file_holds_the_tensors_until_it_is_discarded(tmp_path: Path) -> None:
    transfer = Disk(tmp_path / "sync")
    weights = {"a": torch.randn(3, 5).bfloat16(), "transposed": torch.randn(4, 2).T, "scalar": torch.ones(())}
    parcel = transfer.send(weights)
    weights["a"].zero_()  # the optimiser goes on
    opened = parcel.open()
    assert opened["a"].abs().sum() > 0 and torch.equal(opened["transposed"], weights["transposed"]) and opened["scalar"].shape == ()
    assert len(list((tmp_path / "sync").iterdir())) == 1
    transfer.discard([parcel])
    transfer.discard([parcel])
    assert not list((tmp_path / "sync").iterdir())


@given(sizes=st.lists(st.integers(0, 40), max_size=20), room=st.integers(1, 64))
def test_handfuls_keep_the_order_and_lose_nothing(sizes: list[int], room: int) -> None:
    tensors = [(str(i), torch.full((size,), i, dtype=torch.uint8)) for i, size in enumerate(sizes)]
    packed = list(handfuls(iter(tensors), num_bytes=room))
    assert [name for handful in packed for name in handful] == [name for name, _ in tensors]
    assert all(len(handful) == 1 or sum(t.numel() for t in handful.values()) <= room for handful in packed)
    assert all(packed)


def test_a_stream_yields_what_was_announced_or_says_what_is_wrong() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(3)}
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    assert [name for name, _ in WeightStream(specs, tensors.items())] == ["a", "b"]
    wrong: list[tuple[Iterator[tuple[str, torch.Tensor]], str]] = [
        (iter([("a", tensors["a"])]), "1 tensors were announced and did not come: b"),
        (iter([("a", tensors["a"]), ("a", tensors["a"])]), "'a' came twice"),
        (iter([("c", tensors["a"])]), "'c' was not announced"),
        (iter([("a", torch.zeros(3))]), r"'a' was announced as Spec\(shape=\(2,\), dtype='float32'\) and came as"),
        (iter([("a", torch.zeros(2, dtype=torch.int64))]), "came as .*int64"),
    ]
    for stream, message in wrong:
        with pytest.raises(ValueError, match=message):
            list(WeightStream(specs, stream))


# --- hashes ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_digest_depends_on_type_shape_and_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    others = [tensor.reshape(4, 3), tensor.flatten(), tensor[:2], tensor.to(torch.uint8)]
    for place in range(12):
        other = tensor.clone().flatten()
        raw = other.view(torch.uint8)
        raw[place * tensor.element_size()] ^= 1
        others.append(other.reshape(3, 4))
    digests = {digest(other) for other in others}
    assert len(digests) == len(others) and digest(tensor) not in digests
    assert digest(tensor.T.contiguous().T) == digest(tensor), "strides are no part of the value"
    assert digest(torch.zeros(0)) != digest(torch.zeros(0, 2))


def test_the_digest_is_xxh3_over_header_and_bytes() -> None:
    import xxhash

    assert digest(torch.tensor([1.5, -2.0])) == xxhash.xxh3_128(b"float32[2]" + struct.pack("<2f", 1.5, -2.0)).hexdigest()


def test_a_digest_of_values_does_not_see_the_sign_of_zero() -> None:
    plus, minus = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    assert digest(plus) != digest(minus)
    assert digest_of_values(plus) == digest_of_values(minus) == digest(plus)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_digest_of_values_does_not_see_what_a_product_takes_for_zero(dtype: torch.dtype) -> None:
    """2⁻¹²⁷ is below the least normal number of both, 2⁻¹²⁶ is that."""
    below, zero, least = (torch.tensor([value, 1.0], dtype=dtype) for value in (-(2.0**-127), 0.0, 2.0**-126))
    assert digest(below) != digest(zero) and digest_of_values(below) == digest_of_values(zero) == digest(zero)
    assert digest_of_values(least) == digest(least) != digest(zero)


def test_a_digest_of_values_sees_the_small_numbers_of_float16() -> None:
    small, minus, zero = (torch.tensor([value, 1.0], dtype=torch.float16) for value in (2.0**-24, -0.0, 0.0))
    assert digest_of_values(small) == digest(small) and digest_of_values(minus) == digest(zero)


def test_a_report_has_one_digest_whatever_the_order() -> None:
    a, b = ({"version": 1, "num_bytes": 8, "seconds": 0.5, "read_back": 2} for _ in range(2))
    first = SyncReport(digests={"x": "1", "y": "2"}, **a)
    assert first.digest == SyncReport(digests={"y": "2", "x": "1"}, **b).digest
    assert first.digest != SyncReport(digests={"x": "2", "y": "1"}, **b).digest
    measured = first.metrics()
    assert measured["sync/megabytes"] == 8e-6
    assert (measured["sync/tensors"], measured["sync/tensors_read_back"], measured["sync/engines"]) == (2, 2, 1)


# --- planted failures, caught at any learning rate ---


def report_of(weights: Mapping[str, torch.Tensor], version: int) -> SyncReport:
    arrivals = Arrivals()
    list(arrivals.passing(weights.items()))
    return SyncReport(version=version, digests=arrivals.digests, num_bytes=arrivals.num_bytes, seconds=0.0, read_back=0)


def test_what_was_sent_is_what_arrived(weights: dict[str, torch.Tensor]) -> None:
    now = nudged(weights)
    sent = report_of(now, 7).digests
    check_sent(sent, 7, report_of(now, 7), "engine 0")
    planted: list[tuple[SyncReport, str]] = [
        (report_of(weights, 7), f"{len(weights)} arrived with other values"),
        (report_of({**now, TENSOR: weights[TENSOR]}, 7), f"1 arrived with other values: {TENSOR}"),
        (report_of({name: now[name] for name in now if name != TENSOR}, 7), f"1 did not arrive: {TENSOR}"),
        (report_of({**now, "extra": now[TENSOR]}, 7), "1 were never sent: extra"),
        (report_of({**now, TENSOR: now[TENSOR.replace("2", "1")]}, 7), f"1 arrived with other values: {TENSOR}"),
        (report_of(now, 6), "engine 0 says it holds version 6 of the weights, and version 7 was sent"),
    ]
    for report, message in planted:
        with pytest.raises(WeightProofError, match=message):
            check_sent(sent, 7, report, "engine 0")


def test_an_engine_reads_back_what_it_was_sent(engine: HFEngine, weights: dict[str, torch.Tensor]) -> None:
    now = nudged(weights)
    report = engine.load_weights(now, 3)
    assert report.version == 3 and report.read_back == len(weights) == len(report.digests)
    assert report.num_bytes == sum(4 * tensor.numel() for tensor in weights.values())
    assert report.digests[TENSOR] == digest(now[TENSOR])


@pytest.mark.parametrize("kept", [0, 1, None], ids=["all stale", "one stale", "one skipped"])
def test_tensors_that_arrive_and_are_not_applied_are_caught(
    engine: HFEngine, weights: dict[str, torch.Tensor], kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = engine._running
    apply = model.load_state_dict

    def faulty(state: dict[str, torch.Tensor], strict: bool) -> Any:
        if kept == 0:
            state = {}
        elif kept == 1:
            state = {**state, TENSOR: weights[TENSOR]}
        else:
            state = {name: tensor for name, tensor in state.items() if name != TENSOR}
        return apply(state, strict=strict)

    monkeypatch.setattr(model, "load_state_dict", faulty)
    stale = rf"{len(weights)} of {len(weights)} tensors" if kept == 0 else rf"1 of {len(weights)} tensors arrived and .*: {TENSOR}"
    with pytest.raises(WeightProofError, match=stale):
        engine.load_weights(nudged(weights), 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_what_is_no_real_number_is_refused(engine: HFEngine, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Copied into a model, the weights would become zeros, or ones, or lose a half, and be read back as just that."""
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"1 tensors are {name}, and the model computes with floating-point numbers: {TENSOR}"):
        engine.load_weights({**weights, TENSOR: weights[TENSOR].to(dtype)}, 1)
    assert engine.load_weights(weights, 1).read_back == len(weights)


def test_weights_of_another_type_are_held_against_what_the_model_makes_of_them(
    tiny_model: str, tokenizer: Any, weights: dict[str, torch.Tensor]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    report = HFEngine(model, tokenizer=tokenizer).load_weights(nudged(weights, 0.1), 1)
    assert report.read_back == len(weights)


# --- the self-test and the gauge ---


def test_one_tensor_of_each_kind_from_changing_layers() -> None:
    names = [f"layers.{layer}.{part}" for layer in range(3) for part in ("q", "k", "up")] + ["norm"]
    assert one_of_each_kind(names) == ["layers.0.q", "layers.1.k", "layers.2.up", "norm"]


def test_a_changed_tensor_is_the_same_everywhere_and_far_away() -> None:
    tensor = torch.tensor([3.0, -4.0, 0.0, 5.0])  # root mean square √12.5
    once = changed("a", tensor)
    assert torch.equal(once, changed("a", tensor)) and not torch.equal(once, changed("b", tensor))
    assert (once - tensor).abs().tolist() == pytest.approx([2 * math.sqrt(12.5)] * 4)
    assert changed("bias", torch.zeros(3)).abs().tolist() == pytest.approx([2 * 0.02] * 3), "zeros change too"


def test_the_mean_difference_counts_tokens_and_does_not_hide_nan() -> None:
    assert mean_difference([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]]) == pytest.approx(0.5)  # (0.5 + 0 + 1) / 3
    assert mean_difference([[math.nan, 0.0]], [[0.0, 0.0]]) == math.inf


def test_a_sound_engine_passes_the_self_test_and_is_left_with_the_weights(
    engine: HFEngine, weights: dict[str, torch.Tensor], score: Any, probe: list[Request]
) -> None:
    result = self_test(engine, weights, score, probe, FEW)
    kinds = {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "input_layernorm", "norm"}
    assert {name.split(".")[-2] for name in result.seen} >= kinds and result.unseen == ()
    assert result.noise < 1e-5 and min(result.seen.values()) > 1e-4  # float32; the random model's q and k move the least
    (completions,) = engine.probe(probe, FEW)
    assert {c.policy_versions for c in completions} == {(0,) * len(c.token_ids) for c in completions}
    assert probe_difference(engine, partial(score, weights), probe, FEW) < 1e-5
    other = {**weights, TENSOR: changed(TENSOR, weights[TENSOR])}
    assert probe_difference(engine, partial(score, other), probe, FEW) > 1e-3


@pytest.mark.parametrize("kind", ["embed_tokens", "k_proj", "down_proj", "post_attention_layernorm", "model.norm"])
def test_an_engine_that_never_takes_one_kind_of_tensor_fails_the_self_test(
    engine: HFEngine, weights: dict[str, torch.Tensor], score: Any, probe: list[Request], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof of layers 1 and 2 is switched off: the log-probs alone must tell."""
    deaf(engine, monkeypatch, lambda name: kind not in name)
    with pytest.raises(WeightProofError, match=rf"after \S*{kind}\S* was changed, the log-probs of engine 0 differ"):
        self_test(engine, weights, score, probe, FEW)


def test_an_engine_that_takes_nothing_fails_the_self_test(
    engine: HFEngine, weights: dict[str, torch.Tensor], score: Any, probe: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf(engine, monkeypatch, lambda name: False)
    with pytest.raises(WeightProofError, match="was changed"):
        self_test(engine, weights, score, probe, FEW)


def test_an_engine_that_computes_another_model_fails_at_once(
    engine: HFEngine, weights: dict[str, torch.Tensor], score: Any, probe: list[Request]
) -> None:
    with pytest.raises(WeightProofError, match="with the same weights, engine and trainer differ by"):
        self_test(engine, weights, lambda held, completions: [[p - 0.5 for p in row] for row in score(held, completions)], probe, FEW)


def deaf(engine: HFEngine, monkeypatch: pytest.MonkeyPatch, hears: Callable[[str], bool]) -> None:
    """An engine that reports everything as it should be and applies what it ``hears``."""
    model = engine._running
    apply = model.load_state_dict
    monkeypatch.setattr(Arrivals, "check_held", lambda arrivals, held: 0)
    monkeypatch.setattr(
        model, "load_state_dict", lambda state, strict: apply({name: t for name, t in state.items() if hears(name)}, strict=False)
    )


def test_the_scripted_engine_hashes_what_it_is_given(tokenizer: Any) -> None:
    report = ScriptedEngine(tokenizer).load_weights({"a": torch.ones(2)}, 5)
    assert (report.version, report.num_bytes, report.digests) == (5, 8, {"a": digest(torch.ones(2))})


# --- the same with vLLM: started once for all of it ---


@pytest.fixture(scope="module")
def vllm_engine(tiny_model: str) -> Iterator[Any]:
    from grpo.rollouts.vllm import VLLMEngine

    engine = VLLMEngine(tiny_model, dtype="bfloat16", max_model_len=128, engine_args={"kv_cache_memory_bytes": 64 << 20})
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def halves(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


@pytest.mark.slow
def test_vllm_reads_back_every_tensor(vllm_engine: Any, halves: dict[str, torch.Tensor]) -> None:
    report = vllm_engine.load_weights(halves, 1)
    assert report.read_back == len(halves) == len(report.digests)
    assert vllm_engine.load_weights(nudged(halves, 0.01), 2).digest != report.digest


@pytest.mark.slow
def test_vllm_passes_the_self_test(vllm_engine: Any, halves: dict[str, torch.Tensor], score: Any, probe: list[Request]) -> None:
    result = self_test(vllm_engine, halves, score, probe, FEW)
    assert result.noise < 0.05 and len(result.seen) >= 9 and len(result.seen) + len(result.unseen) == 11


@pytest.mark.slow
def test_vllm_takes_weights_after_an_interruption_of_reading_back(
    vllm_engine: Any, halves: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> dict[str, list[str]]:
        raise KeyboardInterrupt

    with monkeypatch.context() as pressed:
        pressed.setattr("grpo.rollouts.vllm_weights.read_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vllm_engine.load_weights(halves, 1)
    assert vllm_engine.load_weights(halves, 2).read_back == len(halves)


@pytest.mark.slow
def test_vllms_tied_head_is_caught_when_it_stays_behind(
    vllm_engine: Any, halves: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that this proof is for: the CPU build keeps a packed copy of a tied head, and reloading does not renew it."""
    from grpo.rollouts.readback import TURNS

    vllm_engine.load_weights(halves, 1)
    with monkeypatch.context() as planted:
        planted.setattr("grpo.rollouts.vllm_weights._repack_heads", lambda model: None)
        row, entry = ({**halves, EMBEDDING: halves[EMBEDDING].clone()} for _ in range(2))
        row[EMBEDDING][5] *= 1.01
        entry[EMBEDDING][5, 7] *= 1.01
        what = f"1 of {len(halves)} tensors .* not what the engine computes with: {EMBEDDING}"
        with pytest.raises(WeightProofError, match=what):  # one token's row: at once
            vllm_engine.load_weights(row, 2)
        with pytest.raises(WeightProofError, match=what):  # one number: by the time that all columns were read
            for version in range(TURNS):
                vllm_engine.load_weights(entry, 3 + version)
    assert vllm_engine.load_weights(entry, 9).read_back == len(halves)


@pytest.mark.slow
@pytest.mark.parametrize("name", [TENSOR, "model.layers.1.self_attn.k_proj.weight", "model.layers.3.input_layernorm.weight"])
def test_vllm_is_caught_skipping_a_tensor(
    vllm_engine: Any, halves: dict[str, torch.Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_engine.load_weights(halves, 1)
    (model,) = vllm_engine._running.collective_rpc(lambda worker: worker.get_model())
    load = model.load_weights
    monkeypatch.setattr(model, "load_weights", lambda coming: load((n, halves[n] if n == name else tensor) for n, tensor in coming))
    with pytest.raises(WeightProofError, match=rf"1 of {len(halves)} tensors arrived and are not what the engine computes with: {name}"):
        vllm_engine.load_weights(nudged(halves, 0.01), 2)


@pytest.mark.slow
def test_vllms_prefix_cache_is_caught_when_it_stays(
    vllm_engine: Any, halves: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in it: here the full blocks, of 32 tokens, of two prompts of 100."""
    vllm_engine.load_weights(halves, 1)
    monkeypatch.setattr(vllm_engine._running, "reset_prefix_cache", lambda: True)
    vllm_engine.load_weights(halves, 2)  # nothing has been sampled: nothing is stale
    requests = [
        Request(problem_id=str(i), prompt_ids=tuple(5 + (i + j) % 50 for j in range(100)), num_completions=1, seed=i) for i in range(2)
    ]
    vllm_engine.generate(requests, Sampling(max_new_tokens=2))
    with pytest.raises(WeightProofError, match="prefix cache still holds 6 blocks computed with the weights of before"):  # ⌊100 / 32⌋ each
        vllm_engine.load_weights(halves, 3)
