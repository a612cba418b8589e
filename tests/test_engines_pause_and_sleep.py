"""Engines that rest: paused, they go on where they were, under other weights too; asleep, they have no memory until weights come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from grpo.rollouts.base import Asleep, Begun, Close, Engine, Job, jobs_of
from grpo.rollouts.hf import HFEngine
from grpo.rollouts.pool import EnginePool, start_ray, stop_ray
from grpo.rollouts.scripted import ScriptedEngine
from grpo.types import Completion, FinishReason, Sampling

from .engine_checks import LONG, SHORT, assert_same, counting, reference, requests_for, true_logprobs, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


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


# --- pause and go on ---


class PauseContract:
    """What every engine promises; subclasses say which engine."""

    logprob_bound = 1e-4  # see LOGPROB_BOUND in engine_checks.py
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
