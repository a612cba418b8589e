"""A checked configuration → the objects of a run, one function each. ``grpo.build`` puts them together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.conditions import Conditions, conditions
from grpo.config import Config, ConfigError, EngineName, Precision, ScheduleName, TransferName, WandbMode
from grpo.console import ConsoleLogger
from grpo.data import ProblemSource
from grpo.environment import usable_cores
from grpo.interrupt import StopSignal
from grpo.learner import Learner
from grpo.loggers import JsonlLogger, Logger, Loggers, TensorBoardLogger, WandbLogger
from grpo.plan import Plan, scripted_answer
from grpo.policy import HFPolicy, OptimSettings
from grpo.rollouts.assembly import Scorer, ScoreWhen
from grpo.rollouts.base import Engine, Progress
from grpo.rollouts.collect import Collector, Groups
from grpo.rollouts.dialogue import ChatTemplate, PlainText
from grpo.rollouts.episode import Dialogue
from grpo.rollouts.paced import PacedCollector
from grpo.rollouts.proof import SelfTest
from grpo.rollouts.scoring import scoring_runtime
from grpo.rollouts.transfer import Disk, SharedMemory, Transfer
from grpo.run import RunFolder
from grpo.types import Completion, Problem, Sampling, Score
from grpo.weight_sync import Probe, WeightSync

if TYPE_CHECKING:
    from grpo.distributed import DistributedPolicy

EVAL_SEED = 20_250_122  # evaluations draw the same randomness in every run, so that two runs differ by their models alone


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where things run. Resolved once from ``trainer.device``, ``model.precision`` and the hardware."""

    device: str
    dtype_name: str  # "bfloat16" or "float32"
    cores: int


def machine(config: Config) -> Machine:
    import torch

    device = config.trainer.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.device", f"is {device!r}, but torch sees no GPU here", "set it to auto or cpu")
    gpus = config.rollout.num_engines * config.rollout.gpus_per_engine
    if gpus > torch.cuda.device_count() and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError("rollout.gpus_per_engine", f"asks for {gpus} GPUs, but torch sees {torch.cuda.device_count()}", "lower it")
    ranks = config.trainer.ranks
    if config.rollout.transfer is TransferName.nccl and not device.startswith("cuda"):
        raise ConfigError("rollout.transfer", f"is nccl, between GPUs, but the trainer is on {device}", "set it to shared_memory or gloo")
    if ranks > 1 and device.startswith("cuda"):
        if ":" in device:
            raise ConfigError("trainer.device", f"is {device!r}, but trainer.ranks={ranks} takes {ranks} GPUs", "set it to cuda")
        if gpus + ranks > torch.cuda.device_count() and not os.environ.get("RAY_ADDRESS"):
            there = torch.cuda.device_count()
            asked = f"is {ranks}: with the engines' {gpus} that is {gpus + ranks} GPUs, and torch sees {there}"
            raise ConfigError("trainer.ranks", asked, "lower it")
    wanted = config.model.precision
    fast_bf16 = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    bf16 = wanted is Precision.bf16 or (wanted is Precision.auto and fast_bf16)
    return Machine(device=device, dtype_name="bfloat16" if bf16 else "float32", cores=usable_cores())


def make_tokenizer(folder: str, config: Config) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)


def chat_format(tokenizer: Any) -> Callable[[str], str]:
    if not tokenizer.chat_template:
        raise ConfigError(
            "data.chat", "is true, but the model's tokenizer has no chat template", "set data.chat=false, or choose an instruct model"
        )
    return partial(_as_chat, tokenizer)


def _as_chat(tokenizer: Any, prompt: str) -> str:
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return text


def make_dialogue(tokenizer: Any, chat: bool) -> Dialogue:
    if not chat:
        return PlainText(tokenizer)
    try:
        return ChatTemplate(tokenizer)
    except ValueError as error:
        raise ConfigError("data.chat", f"is true, but {error}") from error


def make_engine(
    config: Config, folder: str, tokenizer: Any, where: Machine, stack: ExitStack, stop: StopSignal, exchange: Path | None = None
) -> Any:
    """The engine that ``rollout.engine`` names; ``stack`` closes it. ``exchange``: a folder for weights; None: none will be sent."""
    rollout, model = config.rollout, config.model
    if rollout.engine is EngineName.scripted:
        from grpo.rollouts.scripted import ScriptedEngine

        answer = scripted_answer(config)
        return stack.enter_context(_closing(ScriptedEngine(tokenizer, **({"answer": answer.load()} if answer else {}))))
    if rollout.engine is EngineName.hf:
        from grpo.rollouts.hf import HFEngine

        hf_args = {"dtype": where.dtype_name, "device": where.device, "trust_remote_code": model.trust_remote_code, **rollout.engine_args}
        return stack.enter_context(_closing(HFEngine(folder, tokenizer=tokenizer, revision=model.revision, **hf_args)))
    from grpo.rollouts.pool import EnginePool
    from grpo.rollouts.vllm import VLLMEngine

    cpus = cpus_per_engine(config, where)
    need_ray(config, where, stack, stop)
    pool = EnginePool(
        num_engines=rollout.num_engines,
        cpus_per_engine=cpus,
        gpus_per_engine=rollout.gpus_per_engine,
        schedule=rollout.schedule.value,
        transfer=None if exchange is None else make_transfer(rollout.transfer, exchange, stack),
        hang_timeout=rollout.hang_timeout_s,
        factory=VLLMEngine,
        kwargs={
            "model_path": folder,
            "dtype": where.dtype_name,
            "seed": config.run.seed,
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "engine_args": ({"tensor_parallel_size": rollout.gpus_per_engine} if rollout.gpus_per_engine > 1 else {}) | rollout.engine_args,
        },
    )
    return stack.enter_context(_closing(pool))


def make_transfer(name: TransferName, folder: Path, stack: ExitStack) -> Transfer:
    """``ray`` must be running."""
    from grpo.rollouts.peer import PeerToPeer

    if name is TransferName.disk:
        return Disk(folder)
    if name is TransferName.shared_memory:
        return SharedMemory()
    peers: PeerToPeer = stack.enter_context(_closing(PeerToPeer(name.value)))
    return peers


@contextmanager
def _closing(thing: Any) -> Iterator[Any]:
    try:
        yield thing
    finally:
        thing.close()


def cpus_per_engine(config: Config, where: Machine) -> int:
    return config.rollout.cpus_per_engine or max(1, where.cores // config.rollout.num_engines)


def conditions_of(config: Config, where: Machine) -> Conditions:
    import torch

    return conditions(
        config,
        cpus_per_engine=cpus_per_engine(config, where),
        trainer_threads=torch.get_num_threads(),
        device=where.device,
        precision=where.dtype_name,
        cpu_instructions=torch.backends.cpu.get_cpu_capability(),
    )


def cpus_per_rank(config: Config, where: Machine) -> int:
    return max(1, where.cores // config.trainer.ranks)


def need_ray(config: Config, where: Machine, stack: ExitStack, stop: StopSignal) -> None:
    """Start Ray, unless it is running, with room for engines and ranks; ``stack`` stops it. They take turns, so both may have all cores."""
    import ray

    from grpo.rollouts.pool import start_ray, stop_ray

    if ray.is_initialized():
        return
    rollout, ranks = config.rollout, config.trainer.ranks
    cpus = rollout.num_engines * cpus_per_engine(config, where) + (ranks * cpus_per_rank(config, where) if ranks > 1 else 0)
    gpus = rollout.num_engines * rollout.gpus_per_engine + (ranks if ranks > 1 and where.device == "cuda" else 0)
    start_ray(num_cpus=max(where.cores, cpus), num_gpus=gpus)
    stack.callback(stop_ray)
    stop.take()


def load_model(folder: str, config: Config, *, empty: bool = False) -> Any:
    """The policy's model in fp32. ``empty``: on the meta device, for the ranks that are sent its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    if empty:
        architecture = AutoConfig.from_pretrained(folder, **common, **config.model.args)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **common, **config.model.args)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def make_policy(
    config: Config, folder: str, tokenizer: Any, where: Machine, stack: ExitStack, stop: StopSignal
) -> HFPolicy | DistributedPolicy:
    """One process or ``trainer.ranks`` of them; ``stack`` ends those."""
    import torch

    o = config.optim
    optim = OptimSettings(
        name=o.name,
        lr=o.lr,
        schedule=o.schedule,
        warmup=o.warmup_steps,
        num_updates=config.run.steps * o.updates_per_step,
        min_lr_ratio=o.min_lr_ratio,
        weight_decay=o.weight_decay,
        betas=(o.betas[0], o.betas[1]),
        eps=o.eps,
        max_grad_norm=o.max_grad_norm,
    )
    common: dict[str, Any] = {
        "temperature": config.rollout.temperature,
        "layout": config.trainer.layout.value,
        "tokens_per_microbatch": config.trainer.tokens_per_microbatch,
    }
    if config.trainer.ranks == 1:
        dtype = getattr(torch, where.dtype_name)
        return HFPolicy(load_model(folder, config), optim, dtype=dtype, device=where.device, tokenizer=tokenizer, **common)
    from grpo.distributed import DistributedPolicy
    from grpo.ranks import Ranks
    from grpo.sharded import RankSettings

    need_ray(config, where, stack, stop)
    ranks = stack.enter_context(_closing(Ranks(config.trainer.ranks, cpus_per_rank=cpus_per_rank(config, where), device=where.device)))
    settings = RankSettings(
        optim=optim,
        dtype_name=where.dtype_name,
        device=where.device,
        shard_gradients=config.trainer.shard_gradients,
        **common,
    )
    return DistributedPolicy(ranks, partial(load_model, folder, config), settings, tokenizer=tokenizer)


@contextmanager
def shared_by_environments(checked: Plan) -> Iterator[None]:
    """What all environments of this process share, such as a sandbox, is closed at the end."""
    try:
        yield
    finally:
        getattr(checked.environment.function(), "close_shared", lambda: None)()


class NoParts:
    """The reward parts of a recipe whose environment judges everything itself."""

    def score(self, completions: Sequence[Completion], problems: Sequence[Problem]) -> list[dict[str, Score]]:
        return [{} for _ in completions]


def make_weight_sync(
    config: Config,
    policy: HFPolicy | DistributedPolicy,
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[Problem],
    run: RunFolder,
    logger: Logger,
) -> WeightSync:
    """The scripted engine has no model whose log-probs could be compared."""
    probe = None
    if config.rollout.engine is not EngineName.scripted:
        prompts = [tokenizer(problem.prompt).input_ids for problem in problems[:8]]
        room = max(map(len, prompts)) + config.rollout.max_new_tokens  # what the run itself needs of an engine
        probe = Probe.of(prompts, room, config.rollout.temperature)

    def tell(found: SelfTest) -> None:
        logger.note(found.summary())
        run.write_environment(run.read_environment() | {"weight_self_test": found.figures()})

    return WeightSync(policy, policy.snapshot, engine, probe, tell)


def make_runtime(checked: Plan) -> AbstractContextManager[Scorer]:
    """Where Ray runs on several nodes, one runtime on each: call it after the engine."""
    if not checked.rewards:
        return nullcontext(NoParts())
    s = checked.config.scoring
    return scoring_runtime(checked.rewards, num_workers=s.workers, cpu_s=s.cpu_s, memory_mb=s.memory_mb)


def make_learner(checked: Plan, policy: HFPolicy | DistributedPolicy) -> Learner:
    config = checked.config
    return Learner(
        policy=policy,
        credit=checked.credit(),
        loss=checked.loss(),
        make_reference=policy.snapshot,
        updates_per_step=config.optim.updates_per_step,
        reference_refresh=config.algo.reference_refresh,
        mask_truncated=config.algo.mask_truncated,
    )


def train_sampling(config: Config) -> Sampling:
    r = config.rollout
    return Sampling(
        temperature=r.temperature, top_p=r.top_p, top_k=r.top_k, min_p=r.min_p, max_new_tokens=r.max_new_tokens, stop=tuple(r.stop)
    )


def eval_sampling(config: Config) -> Sampling:
    r, e = config.rollout, config.eval
    return Sampling(temperature=e.temperature, top_p=e.top_p, min_p=e.min_p, max_new_tokens=r.max_new_tokens, stop=tuple(r.stop))


@dataclass(frozen=True, kw_only=True)
class GroupMakers:
    """How the groups of training and of evaluations are made, from the same engine and the same rewards."""

    checked: Plan
    engine: Engine
    runtime: Scorer
    tokenizer: Any

    def training(self) -> Groups:
        rollout = self.checked.config.rollout
        whole = ScoreWhen.group if rollout.max_staleness else ScoreWhen.all
        return self._groups(train_sampling(self.checked.config), rollout.completions_per_problem, self.checked.config.run.seed, whole)

    def evaluation(self, samples: int | None = None) -> Groups:
        config = self.checked.config
        return self._groups(eval_sampling(config), samples or config.eval.samples, EVAL_SEED, ScoreWhen.all)

    def _groups(self, sampling: Sampling, samples: int, seed: int, whole: ScoreWhen) -> Groups:
        return Groups(
            engine=self.engine,
            runtime=self.runtime,
            dialogue=make_dialogue(self.tokenizer, self.checked.config.data.chat),
            environment=self.checked.environment.load(),
            sampling=sampling,
            completions_per_problem=samples,
            weights=self.checked.reward_weights,
            seed=seed,
            score_when=whole if any(part.style.whole_batch for part in self.checked.rewards) else ScoreWhen.each,
            lockstep=_in_lockstep(self.checked.config),
        )


def _in_lockstep(config: Config) -> bool:
    """Whether turns are sampled only when no other is under way. An engine in this process has nothing to lose by it, and stays exact."""
    rollout = config.rollout
    return rollout.schedule is ScheduleName.fixed or (rollout.engine is not EngineName.vllm and not rollout.max_staleness)


def make_collector(
    config: Config, groups: Groups, source: ProblemSource, progress: Progress, stack: ExitStack
) -> Collector | PacedCollector:
    """On-policy, or sampling ahead by ``rollout.max_staleness`` updates; ``stack`` ends what goes on in the background."""
    rollout = config.rollout
    if not rollout.max_staleness:
        return Collector(groups=groups, source=source, progress=progress)
    paced = PacedCollector(
        groups=groups, source=source, batch=rollout.problems_per_step, max_staleness=rollout.max_staleness, progress=progress
    )
    return stack.enter_context(_closing(paced))


def make_logger(config: Config) -> Logger:
    wanted = config.logger
    loggers: list[Logger] = [JsonlLogger()]
    if wanted.console:
        loggers.append(ConsoleLogger(wanted.sample_every))
    if wanted.tensorboard:
        loggers.append(TensorBoardLogger())
    if wanted.wandb.mode is not WandbMode.disabled:
        loggers.append(WandbLogger(wanted.wandb))
    return Loggers(loggers)
