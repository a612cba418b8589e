"""What ``VLLMEngine`` does where vLLM is built for GPUs: with a stand-in for vLLM that says so and, marked ``gpu``, with vLLM."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.kept import UNKNOWN, Columns, pack, unpack
from grpo.logprobs import token_logprobs
from grpo.rollouts.base import Asleep
from grpo.rollouts.vllm import VLLMEngine
from grpo.rollouts.vllm_update import Received
from grpo.types import Request, Sampling

WEIGHTS = {"a": torch.ones(3), "b": torch.ones(2, 2)}
REQUESTS = [Request(problem_id="p", prompt_ids=(5, 6), num_completions=2, seed=0)]


class StandIn:
    """``vllm.LLM`` as far as the engine asks. Every completion is the tokens 7 8; its memory comes and goes as vLLM's executor has it."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.mapped = {"weights", "kv_cache"}
        self.faulty = False
        self.waiting: list[str] = []
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace(tie_word_embeddings=True), enable_sleep_mode=True, max_model_len=64)
        self.llm_engine = self
        blocks = SimpleNamespace(block_pool=SimpleNamespace(cached_block_hash_to_block={}))
        scheduler = SimpleNamespace(kv_cache_manager=blocks, running=[])
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler, model_executor=None))
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1))
        token = {7: SimpleNamespace(logprob=-0.5), 8: SimpleNamespace(logprob=-0.25)}
        state = SimpleNamespace(
            detokenizer=SimpleNamespace(output_token_ids=[7, 8]),
            logprobs_processor=SimpleNamespace(logprobs=[token, token]),
        )
        self.output_processor = SimpleNamespace(request_states={"0": state, "1": state})

    def collective_rpc(self, method: str, kwargs: Any = None) -> list[Any]:
        if method == "update_weights" and self.faulty:
            raise RuntimeError("CUDA error: unknown error")
        return [Received(digests={}, num_bytes=0, read_back=0)]

    def sleep(self, level: int) -> None:
        if "weights" in self.mapped:  # else: "Executor is already sleeping"
            self.mapped.clear()

    def wake_up(self, tags: list[str]) -> None:
        assert not self.mapped & set(tags), "it is awake"
        self.mapped |= set(tags)

    def reset_prefix_cache(self) -> bool:
        return True

    def add_request(self, name: str, prompt: Any, params: Any) -> str:
        self.waiting.append(name)
        return name

    def step(self) -> list[Any]:
        done, self.waiting = self.waiting, []
        return [SimpleNamespace(request_id=name, outputs=[SimpleNamespace(text="", finish_reason="stop")]) for name in done]

    def abort_request(self, names: list[str]) -> None:
        pass


@pytest.fixture
def vllm_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": StandIn, "SamplingParams": SimpleNamespace},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: False)},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=2)},
        "grpo.rollouts.counter_sampler": {"counter_arguments": None},  # of the CPU's
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)


def test_an_engine_that_was_given_no_gpu_takes_none(vllm_for_gpus: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"built for GPUs, and this engine was given none: .*\n  → set rollout\.gpus_per_engine=1"):
        VLLMEngine(str(tmp_path), num_gpus=0)
    for given in (None, 1):
        VLLMEngine(str(tmp_path), num_gpus=given)


def test_a_load_that_fails_behind_waking_leaves_an_engine_that_can_sleep_again(vllm_for_gpus: None, tmp_path: Path) -> None:
    """The weights' memory is then taken already, and the update needs it."""
    engine = VLLMEngine(str(tmp_path))
    memory = engine._running.mapped
    engine.load_weights(WEIGHTS, 1)
    for then in ("sleep", "load"):
        engine.sleep()
        assert memory == set()
        engine._running.faulty = True
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.load_weights(WEIGHTS, 2)
        assert memory == {"weights"}
        with pytest.raises(Asleep):
            engine.generate(REQUESTS, Sampling(max_new_tokens=4))
        engine._running.faulty = False
        if then == "sleep":
            engine.sleep()
            assert memory == set()
            engine.sleep()
        engine.load_weights(WEIGHTS, 3)
        assert memory == {"weights", "kv_cache"}
        assert engine.generate(REQUESTS, Sampling(max_new_tokens=4))[0].policy_versions == (3, 3)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_who_cannot_say_what_truncation_kept_says_that(vllm_for_gpus: None, tmp_path: Path, cut: dict[str, Any]) -> None:
    """An evaluation may truncate: its completions are whole, but for training."""
    engine = VLLMEngine(str(tmp_path))
    for completion in engine.generate(REQUESTS, Sampling(max_new_tokens=4, **cut)):
        assert completion.token_ids == (7, 8) and completion.kept == (UNKNOWN, UNKNOWN)
    for sampling in (Sampling(max_new_tokens=4), Sampling(temperature=0.0, max_new_tokens=4, **cut)):
        assert all(completion.kept == () for completion in engine.generate(REQUESTS, sampling))


def test_log_probs_over_kept_sets_that_nobody_knows_are_refused() -> None:
    known = pack(torch.tensor([1, 2]).numpy(), 24)
    refused = pytest.raises(ValueError, match=r"truncates and does not say what it kept .*\n  → train on completions sampled without top_p")
    with refused:
        unpack(UNKNOWN, 24)
    with refused:
        Columns.of([known, UNKNOWN], 24, torch.device("cpu"), torch.float32)
    with refused:
        token_logprobs(torch.ones(2, 4), torch.ones(24, 4), None, torch.tensor([1, 2]), kept=[known, UNKNOWN])


@pytest.mark.gpu
def test_vllm_on_a_gpu_truncates_and_says_that_it_does_not_know(tiny_model: str) -> None:
    engine = VLLMEngine(tiny_model, max_model_len=128, num_gpus=1, engine_args={"gpu_memory_utilization": 0.3})
    try:
        completions = engine.generate(REQUESTS, Sampling(max_new_tokens=8, top_p=0.9))
        assert all(set(completion.kept) == {UNKNOWN} and len(completion.kept) == len(completion.token_ids) for completion in completions)
    finally:
        engine.close()
