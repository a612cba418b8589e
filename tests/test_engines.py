"""One contract over the engines: vLLM, transformers, scripted. What only some of them promise is tested below it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from grpo.rollouts.base import Asleep, Begun, Close, Engine, Job, end_of_first_stop, jobs_of
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
from grpo.rollouts.scripted import ScriptedEngine
from grpo.types import Completion, FinishReason, Request, Sampling

PROMPTS = ("1+2=", "What is 17 + 4?", "a", "Assistant: (3 * 5) / 2 =")
SHORT = Sampling(max_new_tokens=12)
LONG = Sampling(max_new_tokens=60)
LOGPROB_BOUND = {  # largest |Δ| seen against transformers' own forward pass in fp32, with room
    "hf": 1e-4,  # seen: 4e-6
    "vllm": 1e-4,  # seen: 4e-6
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vllm_engine(tiny_model: str) -> Iterator[Engine]:
    """Started once: it takes ten seconds."""
    from grpo.rollouts.vllm import VLLMEngine

    engine = VLLMEngine(tiny_model, dtype="float32", max_model_len=128, engine_args={"kv_cache_memory_bytes": 64 << 20})
    yield engine
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([], SHORT)


@pytest.fixture(scope="module")
def hf_engine(tiny_model: str) -> Iterator[Engine]:
    engine = HFEngine(tiny_model, dtype="float32")
    yield engine
    engine.close()
    engine.close()


def counting(prompt: str, index: int, seed: int) -> str:
    return f"{prompt[:4]}{seed % 97}+{index}" * (1 + index % 3)


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


def requests_for(tokenizer: Any, num_completions: int = 3, seed: int = 0) -> list[Request]:
    return [
        Request(problem_id=f"p{i}", prompt_ids=tuple(tokenizer.encode(prompt)), num_completions=num_completions, seed=seed + i)
        for i, prompt in enumerate(PROMPTS)
    ]


def weights_of(folder: str, noise: float = 0.0) -> dict[str, torch.Tensor]:
    """The checkpoint's parameters, tied ones once, with Gaussian noise of ``noise`` times their own spread."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    return {
        name: parameter.detach() + noise * parameter.detach().std().nan_to_num(0.0) * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


def reference(folder: str, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if weights is not None:
        model.load_state_dict(dict(weights), strict=False)
    return model


def true_logprobs(model: Any, completion: Completion, sampling: Sampling) -> list[float]:
    """Of the completion's tokens, by one forward pass over prompt and completion, without a cache."""
    prompt, tokens = completion.prompt_ids, completion.token_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
    logits /= sampling.temperature or 1.0
    if sampling.top_k and sampling.temperature:
        logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -math.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1).tolist()


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


# --- pause and go on ---


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    start_ray(num_cpus=2, object_store_memory=100_000_000)
    yield
    stop_ray()


@pytest.fixture(scope="module", params=[(1, "free"), (2, "free"), (1, "fixed"), (2, "fixed")], ids=str)
def hf_pool(request: pytest.FixtureRequest, ray_cluster: None, tiny_model: str) -> Iterator[Engine]:
    num_engines, schedule = request.param
    kwargs = {"model": tiny_model, "dtype": "float32", "batch_size": 8}
    pool = EnginePool(num_engines=num_engines, cpus_per_engine=1, factory=HFEngine, kwargs=kwargs, schedule=schedule)
    yield pool
    pool.close()


class PauseContract:
    """What every engine promises; subclasses say which engine."""

    logprob_bound = 1e-4  # see LOGPROB_BOUND
    has_model = True

    def test_a_pause_gives_every_job_back_once_and_going_on_changes_nothing(self, engine: Engine, tokenizer: Any, tiny_model: str) -> None:
        engine.load_weights(weights_of(tiny_model), 1)
        jobs = jobs_of(requests_for(tokenizer, num_completions=6))
        expected = dict(enumerate(engine.generate(requests_for(tokenizer, num_completions=6), LONG)))
        for finish in (False, True):
            results, pauses = with_pauses(engine, jobs, LONG, finish)
            assert any(begun.token_ids for begun in pauses), "nothing was paused in its middle"
            assert results.keys() == expected.keys()
            for number, completion in results.items():
                assert_same(completion, expected[number], self.logprob_bound)

    def test_stop_strings_and_limits_reach_across_a_pause(self, engine: Engine, tokenizer: Any, tiny_model: str) -> None:
        engine.load_weights(weights_of(tiny_model), 1)
        for job, whole in zip(jobs_of(requests_for(tokenizer)), engine.generate(requests_for(tokenizer), LONG), strict=True):
            if len(whole.token_ids) < 8 or whole.text.find(whole.text[3:7]) != 3:
                continue
            stop = whole.text[3:7]  # a character is a token
            for num_begun in (1, 4, 5, 6):
                begun = replace(job, begun=first(whole, num_begun))
                stopped = serve_all(engine, [begun], replace(LONG, stop=("never", stop)))[job.number]
                assert isinstance(stopped, Completion)
                assert (stopped.text, stopped.token_ids, stopped.finish_reason) == (whole.text[:7], whole.token_ids[:7], FinishReason.stop)
                own_limit = replace(begun, request=replace(job.request, max_new_tokens=7))
                cut = serve_all(engine, [own_limit], LONG)[job.number]
                assert isinstance(cut, Completion)
                assert (cut.text, cut.token_ids, cut.finish_reason) == (whole.text[:7], whole.token_ids[:7], FinishReason.length)
            return
        raise AssertionError("no completion is long enough for this test")

    def test_what_is_complete_is_not_gone_on_with(self, engine: Engine, tokenizer: Any) -> None:
        (job, *_) = jobs_of(requests_for(tokenizer))
        whole = engine.generate([job.request], LONG)[0]
        for begun, sampling, why in (
            (first(whole, 5), replace(LONG, max_new_tokens=5), r"'p0'.*it has 5 tokens, and max_new_tokens=5"),
            (first(whole, 3).extended([tokenizer.eos_token_id], [-1.0], 0), LONG, "it ends with the end token"),
            (first(whole, 5), replace(LONG, stop=(whole.text[1:4],)), "its text holds one of the stop strings"),
        ):
            with pytest.raises(ValueError, match=why):
                serve_all(engine, [replace(job, begun=begun)], sampling)
        assert len(serve_all(engine, [job], LONG)) == 1, "the engine goes on"

    def test_jobs_may_come_one_after_another(self, engine: Engine, tokenizer: Any) -> None:
        jobs = jobs_of(requests_for(tokenizer, num_completions=4))
        expected = engine.generate(requests_for(tokenizer, num_completions=4), SHORT)
        coming, idle_turns, results = list(jobs), 0, dict[int, Completion | Begun]()

        def feed(idle: bool) -> Sequence[Job] | Close:
            nonlocal idle_turns
            idle_turns += idle
            if idle and idle_turns < 4:
                return ()
            if not coming:
                return Close.finish
            given = 3 if len(coming) == len(jobs) else len(results) - (len(jobs) - len(coming) - 3)
            return [coming.pop(0) for _ in range(min(given, len(coming)))]

        for finished in engine.serve(feed, SHORT):
            assert not results.keys() & dict(finished).keys()
            results |= finished
        assert results.keys() == set(range(len(jobs))) and idle_turns >= 4
        for number, result in results.items():
            assert isinstance(result, Completion)
            assert_same(result, expected[number], self.logprob_bound)

    def test_an_idle_engine_pauses_and_an_abandoned_one_goes_on(self, engine: Engine, tokenizer: Any) -> None:
        orders: list[Sequence[Job] | Close] = [(), (), Close.pause]
        assert [entry for step in engine.serve(lambda idle: orders.pop(0), SHORT) for entry in step] == []
        requests = requests_for(tokenizer, num_completions=2)
        expected = engine.generate(requests, SHORT)
        jobs = [jobs_of(requests)]
        steps = engine.serve(lambda idle: jobs.pop() if jobs else (), SHORT)
        next(steps)
        steps.close()
        again = engine.generate(requests, SHORT)
        for completion, before in zip(again, expected, strict=True):
            assert_same(completion, before, self.logprob_bound)

    def test_going_on_with_other_weights(self, engine: Engine, tokenizer: Any, tiny_model: str) -> None:
        """Each token has the version and the log-prob of the weights that sampled it, given all before it."""
        old, new = weights_of(tiny_model), weights_of(tiny_model, noise=0.2)
        jobs = {job.number: job for job in jobs_of(requests_for(tokenizer, num_completions=4))}
        engine.load_weights(old, 4)
        whole = serve_all(engine, [job for job in jobs.values() if job.index < 2], LONG)
        long = {number: result for number, result in whole.items() if isinstance(result, Completion) and len(result.token_ids) > 6}
        begun = {number: first(result, 6) for number, result in long.items()}
        assert len(begun) > 4
        paused = pause_after(engine, [job for job in jobs.values() if job.index >= 2], LONG, steps=4)
        begun |= {number: result for number, result in paused if isinstance(result, Begun)}
        engine.load_weights(new, 5)
        results = serve_all(engine, [replace(jobs[number], begun=so_far) for number, so_far in begun.items()], LONG)
        models = reference(tiny_model, old), reference(tiny_model, new)
        for number, result in results.items():
            assert isinstance(result, Completion)
            count = len(begun[number].token_ids)
            assert result.prompt_ids == jobs[number].request.prompt_ids and first(result, count) == begun[number]
            assert result.policy_versions == (4,) * count + (5,) * (len(result.token_ids) - count)
            assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)
            if self.has_model:
                under_old, under_new = (true_logprobs(model, result, LONG) for model in models)
                assert result.logprobs == pytest.approx(under_old[:count] + under_new[count:], abs=self.logprob_bound)
                assert result.logprobs != pytest.approx(under_old, abs=100 * self.logprob_bound)


class TestPausedScripted(PauseContract):
    has_model = False

    @pytest.fixture
    def engine(self, tokenizer: Any) -> Engine:
        return ScriptedEngine(tokenizer, lambda prompt, index, seed: f"{seed % 97}+{index}*{prompt[:4]}" * (2 + index % 3))


class TestPausedHF(PauseContract):
    @pytest.fixture
    def engine(self, hf_engine: Engine) -> Engine:
        return hf_engine


@pytest.mark.slow
class TestPausedVLLM(PauseContract):
    @pytest.fixture
    def engine(self, vllm_engine: Engine) -> Engine:
        return vllm_engine


@pytest.mark.slow
class TestPausedPool(PauseContract):
    @pytest.fixture
    def engine(self, hf_pool: Engine) -> Engine:
        return hf_pool


# --- sleep ---


class SleepContract:
    """What every engine promises; subclasses say which engine."""

    def test_asleep_it_samples_nothing_and_new_weights_wake_it(self, engine: Engine, tokenizer: Any, tiny_model: str) -> None:
        requests, weights = requests_for(tokenizer), weights_of(tiny_model)
        engine.load_weights(weights, 1)
        expected = engine.generate(requests, SHORT)
        for version in (2, 3):
            engine.sleep()
            engine.sleep()
            for ask in (engine.generate, engine.probe, lambda *_: next(engine.serve(lambda idle: Close.finish, SHORT))):
                with pytest.raises(Asleep, match=r"asleep: it has given its memory back\n  → load_weights wakes it$"):
                    ask(requests, SHORT)
            engine.load_weights(weights, version)
            for again, before in zip(engine.generate(requests, SHORT), expected, strict=True):
                assert_same(again, replace(before, policy_versions=(version,) * len(before.token_ids)), 1e-4)


class TestSleepingScripted(SleepContract):
    @pytest.fixture
    def engine(self, tokenizer: Any) -> Engine:
        return ScriptedEngine(tokenizer, counting)


class TestSleepingHF(SleepContract):
    @pytest.fixture
    def engine(self, hf_engine: Engine) -> Engine:
        return hf_engine

    def test_weights_of_another_model_do_not_wake_it(self, engine: Engine, tokenizer: Any, tiny_model: str) -> None:
        weights = weights_of(tiny_model)
        engine.sleep()
        with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight"):
            engine.load_weights({name: weight for name, weight in weights.items() if name != "model.norm.weight"}, 4)
        with pytest.raises(Asleep):
            engine.generate(requests_for(tokenizer), SHORT)
        engine.load_weights(weights, 5)
        assert len(engine.generate(requests_for(tokenizer), SHORT)) == 12


@pytest.mark.slow
class TestSleepingPool(SleepContract):
    @pytest.fixture
    def engine(self, hf_pool: Engine) -> Engine:
        return hf_pool


@pytest.mark.slow
class TestSleepingVLLM(SleepContract):
    """A CPU's worker hears vLLM's calls for sleep and ignores them. What level 2 would drop is overwritten here in its place."""

    @pytest.fixture
    def calls(self, vllm_engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        llm = vllm_engine._running
        noted: list[str] = []
        sleep, wake_up, load = llm.sleep, llm.wake_up, vllm_engine._updates.load

        def sleeping(level: int) -> None:
            noted.append(f"sleep {level}")
            sleep(level=level)
            llm.collective_rpc(lose_weights)

        def waking(tags: list[str]) -> bool:
            noted.extend(f"wake {tag}" for tag in tags)
            return bool(wake_up(tags=tags))

        def loading(stream: Any) -> Any:
            noted.append("load")
            return load(stream)

        for owner, name, function in ((llm, "sleep", sleeping), (llm, "wake_up", waking), (vllm_engine._updates, "load", loading)):
            monkeypatch.setattr(owner, name, function)
        monkeypatch.setattr(llm.model_config, "enable_sleep_mode", True)
        return noted

    @pytest.fixture
    def engine(self, vllm_engine: Engine, calls: list[str]) -> Engine:
        return vllm_engine

    def test_memory_comes_back_in_the_order_in_which_it_is_needed(self, engine: Engine, calls: list[str], tiny_model: str) -> None:
        engine.load_weights(weights_of(tiny_model), 1)
        assert calls == ["load"]
        engine.sleep()
        engine.load_weights(weights_of(tiny_model), 2)
        assert calls[1:] == ["sleep 2", "wake weights", "load", "wake kv_cache"]

    def test_memory_that_others_have_is_missed_in_words(
        self, engine: Any, tokenizer: Any, tiny_model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(tags: list[str]) -> bool:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:119")

        engine.sleep()
        with monkeypatch.context() as patch:
            patch.setattr(engine._running, "wake_up", full)
            with pytest.raises(RuntimeError, match=r"the memory of its weights back: CUDA Error.*\n  → .*lower gpu_memory_utilization"):
                engine.load_weights(weights_of(tiny_model), 2)
        with pytest.raises(Asleep):
            engine.generate(requests_for(tokenizer), SHORT)
        engine.load_weights(weights_of(tiny_model), 2)
        assert len(engine.generate(requests_for(tokenizer), SHORT)) == 12


def lose_weights(worker: Any) -> None:
    """Runs in vLLM's worker."""
    for parameter in worker.get_model().parameters():
        parameter.data.fill_(math.nan)


@pytest.mark.slow
def test_vllm_on_a_cpu_does_not_seem_to_sleep(vllm_engine: Engine, tokenizer: Any) -> None:
    with pytest.raises(RuntimeError, match=r"started without sleep mode\n  → start it with enable_sleep_mode: true"):
        vllm_engine.sleep()
    assert len(vllm_engine.generate(requests_for(tokenizer), SHORT)) == 12


BYTES = sorted(ByteLevel.alphabet())  # a token for every byte


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE({character: token for token, character in enumerate(BYTES)}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.slow
@given(
    prompt=st.text(min_size=1, max_size=4),
    text=st.text(st.sampled_from("aé€😀"), min_size=1, max_size=8),
    noise=st.binary(max_size=3),
    stop=st.text(st.sampled_from("aé€😀"), min_size=1, max_size=3),
    data=st.data(),
)
def test_vllm_reads_on_across_a_pause(
    byte_tokenizer: PreTrainedTokenizerFast, prompt: str, text: str, noise: bytes, stop: str, data: st.DataObject
) -> None:
    """A character or stop string of several tokens, cut anywhere, or bytes that are no text: as without the pause."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor

    from grpo.rollouts.vllm import _Draft

    cut_at = data.draw(st.integers(0, len(text)))
    prompt_ids = byte_tokenizer.encode(prompt)
    token_ids = byte_tokenizer.encode(text[:cut_at]) + [BYTES.index(encoded(byte)) for byte in noise] + byte_tokenizer.encode(text[cut_at:])
    params = SamplingParams(stop=[stop], include_stop_str_in_output=True)

    def detokenizer(begun: list[int]) -> Any:
        request = EngineCoreRequest("0", prompt_ids + begun, None, params, None, 0.0, None, None, None, external_req_id="0")
        processor = OutputProcessor(byte_tokenizer, log_stats=False)
        processor.add_request(request, None)
        job = Job(
            number=0,
            request=Request(problem_id="p", prompt_ids=tuple(prompt_ids), num_completions=1, seed=0),
            index=0,
            begun=Begun().extended(begun, [0.0] * len(begun), 0),
        )
        draft = _Draft(job, processor.request_states["0"], [])
        if begun:
            draft.go_on(byte_tokenizer, params)
        return draft.state.detokenizer

    def read(detokenizer: Any, tokens: list[int]) -> tuple[int, str | None]:
        for place, token in enumerate(tokens):
            if (found := detokenizer.update([token], stop_terminated=False)) is not None:
                return place, found
        return len(tokens), None

    whole = detokenizer([])
    ended, found = read(whole, token_ids)
    if ended:
        cut = data.draw(st.integers(1, ended))
        gone_on = detokenizer(token_ids[:cut])
        assert read(gone_on, token_ids[cut:]) == (ended - cut, found)
        assert (gone_on.output_text, gone_on.output_token_ids) == (whole.output_text, whole.output_token_ids)


def encoded(byte: int) -> str:
    """The character that stands for a byte in a byte-level vocabulary: itself if it is printable, else the next one after 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sum(other not in printable for other in range(byte)))


def serve_all(engine: Engine, jobs: Sequence[Job], sampling: Sampling) -> dict[int, Completion | Begun]:
    coming = iter([jobs])
    return {number: result for step in engine.serve(lambda idle: next(coming, Close.finish), sampling) for number, result in step}


def pause_after(
    engine: Engine, jobs: Sequence[Job], sampling: Sampling, steps: int, finish: bool = False
) -> list[tuple[int, Completion | Begun]]:
    """What came back of jobs after a pause.

    Args:
        finish: whether the feed has closed already when it pauses.
    """
    orders = itertools.chain([jobs], itertools.repeat(Close.finish if finish else (), steps - 1), itertools.repeat(Close.pause))
    return [entry for step in engine.serve(lambda idle: next(orders), sampling) for entry in step]


def with_pauses(engine: Engine, jobs: list[Job], sampling: Sampling, finish: bool) -> tuple[dict[int, Completion], list[Begun]]:
    """Serve with pauses, ever fewer, until all are finished."""
    done, pauses, steps = dict[int, Completion](), list[Begun](), 3
    while jobs:
        results = pause_after(engine, jobs, sampling, steps, finish)
        assert sorted(number for number, _ in results) == [job.number for job in jobs]
        begun = {number: result for number, result in results if isinstance(result, Begun)}
        done |= {number: result for number, result in results if isinstance(result, Completion)}
        jobs = [replace(job, begun=begun[job.number]) for job in jobs if job.number in begun]
        pauses += begun.values()
        steps *= 2
    return done, pauses


def first(completion: Completion, count: int) -> Begun:
    """What a completion had after ``count`` tokens."""
    return Begun(
        token_ids=completion.token_ids[:count],
        logprobs=completion.logprobs[:count],
        policy_versions=completion.policy_versions[:count],
        kept=completion.kept[:count],
    )


def assert_same(completion: Completion, expected: Completion, bound: float) -> None:
    assert replace(completion, logprobs=expected.logprobs) == expected
    assert completion.logprobs == pytest.approx(expected.logprobs, abs=bound)


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
    same = sum(
        (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason) for a, b in zip(ours, theirs, strict=True)
    )
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
