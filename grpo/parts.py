"""A checked configuration → the objects of a run, one function each. ``grpo.build`` puts them together."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.conditions import Conditions, conditions
from grpo.config import Config, EngineName, RolloutConfig, ScheduleName, TransferName, WandbMode
from grpo.console import ConsoleLogger
from grpo.data import ProblemSource
from grpo.inputs import inputs
from grpo.interrupt import StopSignal
from grpo.learner import Learner
from grpo.loggers import JsonlLogger, Logger, Loggers, TensorBoardLogger, WandbLogger
from grpo.machine import Machine, cpus_of_trainer, cpus_per_engine, cpus_per_rank, gpus_of_trainer, need_ray
from grpo.plan import Plan, scripted_answer
from grpo.policy import HFPolicy, OptimSettings
from grpo.prompts import make_dialogue
from grpo.rollouts.assembly import Scorer, ScoreWhen
from grpo.rollouts.base import Engine, Progress
from grpo.rollouts.collect import Collector, Groups
from grpo.rollouts.paced import PacedCollector
from grpo.rollouts.proof import SelfTest
from grpo.rollouts.scoring import scoring_runtime
from grpo.rollouts.transfer import Disk, SharedMemory, Transfer
from grpo.run import RunFolder
from grpo.types import Completion, Problem, Sampling, Score
from grpo.weight_sync import Probe, WeightSync

if TYPE_CHECKING:
    from grpo.distributed import DistributedPolicy
    from grpo.ranks import Ranks

EVAL_SEED = 20_250_122  # evaluations draw the same randomness in every run, so that two runs differ by their models alone


def make_engine(
    config: Config,
    folder: str,
    tokenizer: Any,
    where: Machine,
    stack: ExitStack,
    stop: StopSignal,
    exchange: Path | None = None,
    ranks: Ranks | None = None,
) -> Any:
    """The engine that ``rollout.engine`` names; ``stack`` closes it. On GPUs that it shares with the trainer, it is asleep.

    Args:
        exchange: a folder for weights; None: none will be sent.
        ranks: the processes that train; None: this one does.
    """
    rollout, model = config.rollout, config.model
    if rollout.engine is EngineName.scripted:
        from grpo.rollouts.scripted import ScriptedEngine, plausible_answer

        answer = scripted_answer(config)
        return stack.enter_context(_closing(ScriptedEngine(tokenizer, answer.load() if answer else plausible_answer)))
    if rollout.engine is EngineName.hf:
        from grpo.rollouts.hf import HFEngine

        hf_args = {"dtype": where.dtype_name, "device": where.device, "trust_remote_code": model.trust_remote_code, **rollout.engine_args}
        return stack.enter_context(_closing(HFEngine(folder, tokenizer=tokenizer, revision=model.revision, **hf_args)))
    from grpo.rollouts.placement import places
    from grpo.rollouts.pool import EnginePool
    from grpo.rollouts.vllm import VLLMEngine

    cpus = cpus_per_engine(config, where)
    need_ray(config, where, stack, stop, folder)
    pool = EnginePool(
        num_engines=rollout.num_engines,
        cpus_per_engine=cpus,
        gpus_per_engine=0 if rollout.colocate else rollout.gpus_per_engine,
        places=places(gpus_of_trainer(where, ranks), rollout.gpus_per_engine) if rollout.colocate else None,
        schedule=rollout.schedule.value,
        transfer=None if exchange is None else make_transfer(rollout, exchange, stack),
        hang_timeout=rollout.hang_timeout_s,
        start_timeout=rollout.start_timeout_s,
        factory=VLLMEngine,
        kwargs={
            "model_path": folder,
            "dtype": where.dtype_name,
            "seed": config.run.seed,
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "num_gpus": rollout.gpus_per_engine,
            "engine_args": vllm_arguments(config, where),
        },
    )
    stack.enter_context(_closing(pool))
    if rollout.schedule is ScheduleName.fixed:
        warn_of_idle_engines(rollout, pool.slots)
    if rollout.colocate:
        pool.sleep()  # the policy is loaded next
    return pool


def warn_of_idle_engines(rollout: RolloutConfig, slots: int) -> None:
    """Under the fixed schedule a step may be too small for all engines to have a shard of it."""
    completions = rollout.problems_per_step * rollout.completions_per_problem
    engines = min(rollout.num_engines, rollout.problems_per_step)  # a group is sampled by one
    if -(-completions // slots) < engines:
        warnings.warn(
            f"under rollout.schedule=fixed, an engine samples up to {slots} completions by itself, and a step has {completions}: some of "
            f"the {rollout.num_engines} engines have nothing to do\n  → rollout.engine_args.max_num_seqs={completions // engines}",
            stacklevel=2,
        )


def vllm_arguments(config: Config, where: Machine) -> dict[str, Any]:
    """What a recipe means for ``vllm.LLM``; its own ``rollout.engine_args`` win. vLLM's 0.9 of a GPU leaves a trainer no room."""
    rollout, shared = config.rollout, dict[str, Any]()
    parallel = {"tensor_parallel_size": rollout.gpus_per_engine} if rollout.gpus_per_engine > 1 else {}
    if rollout.colocate:
        shared = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}
    elif where.device == "cuda" and rollout.gpus_per_engine and config.trainer.ranks == 1:  # the first GPU, which is engine 0's too
        shared = {"gpu_memory_utilization": 0.35}
    return {**parallel, **shared, **rollout.engine_args}


def make_transfer(rollout: RolloutConfig, folder: Path, stack: ExitStack) -> Transfer:
    """``ray`` must be running."""
    from grpo.rollouts.cuda_ipc import CudaIPC
    from grpo.rollouts.peer import PeerToPeer

    name = rollout.transfer
    if name is TransferName.disk:
        return Disk(folder)
    if name is TransferName.shared_memory:
        return SharedMemory()
    if name is TransferName.cuda_ipc:
        mapped: CudaIPC = stack.enter_context(_closing(CudaIPC()))
        return mapped
    # An engine that died holds up the others' parcels for that long: they must not seem to hang meanwhile.
    timeout = min(60.0, rollout.hang_timeout_s / 4)
    peers: PeerToPeer = stack.enter_context(_closing(PeerToPeer(name.value, timeout)))
    return peers


@contextmanager
def _closing(thing: Any) -> Iterator[Any]:
    try:
        yield thing
    finally:
        thing.close()


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


def inputs_of(checked: Plan, problems: tuple[Sequence[Problem], Sequence[Problem]]) -> dict[str, Any]:
    """The problems are looked at as they are: the function they come from, and what it reads, may change and give the same."""
    loss = (checked.ratio, checked.objective, checked.corrections, checked.kl, checked.aggregation)
    functions = [checked.advantage, checked.normalise, *loss, checked.environment, *(part.ref for part in checked.rewards)]
    functions += [scripted_answer(checked.config)] if checked.config.rollout.engine is EngineName.scripted else []
    return inputs(checked.config, functions, {"train": problems[0], "heldout": problems[1]})


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


def make_ranks(config: Config, folder: str, where: Machine, stack: ExitStack, stop: StopSignal) -> Ranks | None:
    """The processes that train, which ``stack`` ends; None: this one does."""
    if config.trainer.ranks == 1:
        return None
    from grpo.ranks import Ranks

    need_ray(config, where, stack, stop, folder)
    made: Ranks = stack.enter_context(
        _closing(Ranks(config.trainer.ranks, cpus_per_rank=cpus_per_rank(config, where), device=where.device))
    )
    return made


def make_policy(config: Config, folder: str, tokenizer: Any, where: Machine, ranks: Ranks | None) -> HFPolicy | DistributedPolicy:
    """In this process or, where there are such, in ``ranks``."""
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
    if ranks is None:
        if (threads := cpus_of_trainer(config, where)) < min(where.cores, torch.get_num_threads()):
            torch.set_num_threads(threads)
        if where.device.startswith("cuda"):  # what asks for "cuda" without a number then means this one too
            torch.cuda.set_device(int(where.device.partition(":")[2] or 0))
        dtype = getattr(torch, where.dtype_name)
        return HFPolicy(load_model(folder, config), optim, dtype=dtype, device=where.device, tokenizer=tokenizer, **common)
    from grpo.distributed import DistributedPolicy
    from grpo.sharded import RankSettings

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

    def score(
        self, completions: Sequence[Completion], problems: Sequence[Problem], progress: Progress | None = None
    ) -> list[dict[str, Score]]:
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
            judge=_judge(self.checked),
            score_when=whole if any(part.style.whole_batch for part in self.checked.rewards) else ScoreWhen.each,
            lockstep=_in_lockstep(self.checked.config),
        )


def _judge(checked: Plan) -> str:
    """A digest of the reward parts, the text of their functions' files and arguments included, and of all weights."""
    return hashlib.blake2b(repr((checked.rewards, checked.reward_weights)).encode(), digest_size=16).hexdigest()


def _in_lockstep(config: Config) -> bool:
    """Whether turns are sampled only when no other is under way. An engine in this process has nothing to lose by it, and stays exact."""
    rollout = config.rollout
    return rollout.schedule is ScheduleName.fixed or (rollout.engine is not EngineName.vllm and not rollout.max_staleness)


def make_collector(
    config: Config, groups: Groups, source: ProblemSource, progress: Progress, stack: ExitStack, steps_left: int
) -> Collector | PacedCollector:
    """On-policy, or sampling ahead by ``rollout.max_staleness`` steps; ``stack`` ends what goes on in the background.

    Args:
        steps_left: steps that are to be made from where the run starts or goes on.
    """
    rollout = config.rollout
    if not rollout.max_staleness:
        return Collector(groups=groups, source=source, progress=progress)
    if (there := len(source.problems)) < (wanted := rollout.problems_per_step * min(1 + rollout.max_staleness, steps_left)):
        warnings.warn(
            f"rollout.max_staleness={rollout.max_staleness} needs {wanted} problems to run ahead with, and the training split has {there}: "
            "a problem that is under way is not begun a second time, so sampling runs ahead by less, or not at all",
            stacklevel=2,
        )
    paced = PacedCollector(
        groups=groups,
        source=source,
        batch=rollout.problems_per_step,
        max_staleness=rollout.max_staleness,
        steps=steps_left,
        progress=progress,
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
