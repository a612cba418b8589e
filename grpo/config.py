"""The configuration schema: every key, its default and its meaning. Stdlib only; Hydra composes it, ``validate`` checks it.

Nodes that are dicts are open, that is, they take names the schema does not know: ``reward`` and ``algo.correction`` (one entry a part),
``data.problems``, ``environment``, ``rollout.engine_args``, ``model.args`` and the components under ``algo``. A component is a ``fn`` – an import
path or ``file.py:function`` – and its keyword arguments; they are bound against the function's signature at build time, before a
model is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any


class EngineName(StrEnum):
    vllm = "vllm"
    hf = "hf"
    scripted = "scripted"


class Precision(StrEnum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


class Optimiser(StrEnum):
    adamw = "adamw"
    sgd = "sgd"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Layout(StrEnum):
    shared_prompt = "shared_prompt"
    packed = "packed"
    padded = "padded"


class ScheduleName(StrEnum):
    free = "free"
    fixed = "fixed"


class TransferName(StrEnum):
    shared_memory = "shared_memory"
    disk = "disk"
    gloo = "gloo"
    nccl = "nccl"


class Anchor(StrEnum):
    proximal = "proximal"
    behavior = "behavior"


class KLPlace(StrEnum):
    loss = "loss"
    reward = "reward"


class CombineRewards(StrEnum):
    before = "before"
    after = "after"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


def doc(text: str, default: Any = None, factory: Any = None) -> Any:
    """A field with its meaning attached, for ``grpo recipes show``."""
    if factory is not None:
        return field(default_factory=factory, metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


@dataclass
class RunConfig:
    recipe: str = doc("name of the recipe; the run folder is <dir>/<recipe>/<name>", "")
    name: str = doc("name of this run; empty: the time it started", "")
    dir: str = doc("where run folders are made", "runs")
    seed: int = doc("seeds problems, sampling and anything else random", 0)
    steps: int = doc("training steps; one step = rollouts, rewards, update", 100)
    checkpoint_every: int = doc("steps between checkpoints; the last step always has one", 10)
    keep_checkpoints: int = doc("checkpoints kept with their optimiser state; the best by evaluation is kept beside them", 2)
    resume: bool = doc("go on from the last checkpoint of this run folder", False)
    exact: bool = doc("a run is not gone on with where its bits would change: other threads, engines or CPU; false: it is, with a warning", True)


@dataclass
class ModelConfig:
    path: str = doc(
        "a Hugging Face folder or hub id; `package:NAME/FILE.gguf` (converted once into the cache); "
        "`make:IMPORT.PATH` (a function that builds the model in a folder)",
        "???",
    )
    revision: str | None = doc("hub revision", None)
    trust_remote_code: bool = doc("run the model's own code from the hub", False)
    precision: Precision = doc(
        "compute precision of the trainer; weights and optimiser stay fp32; auto: bf16 where the hardware has it", Precision.auto
    )
    gradient_checkpointing: bool = doc("recompute activations in the backward pass: less memory, a third more time", False)
    cache_dir: str = doc("where converted models are kept; empty: $GRPO_CACHE, else ~/.cache/grpo-toolkit", "")
    args: dict[str, Any] = doc("keyword arguments for AutoModelForCausalLM.from_pretrained", factory=dict)


@dataclass
class DataConfig:
    problems: dict[str, Any] = doc(
        "fn: where rows come from, called as fn(split, seed=…, …) for 'train' and 'heldout'; the other keys are its arguments", factory=dict
    )
    template: str = doc("the prompt: the row's columns in braces, e.g. 'Question: {question}'; empty: the prompt column as it is", "")
    prompt_key: str = doc("the column that holds the question", "question")
    answer_key: str = doc("the column that holds the gold answer", "answer")
    chat: bool = doc("wrap the prompt as one user message in the model's chat template", False)


@dataclass
class ScoringConfig:
    workers: int = doc("reward processes on each machine; 0: one a core, 16 at most", 0)
    cpu_s: float = doc("CPU time of one reward part on one completion; the wall limit is 3 × this + 1 s", 5.0)
    memory_mb: int = doc("memory a reward process may allocate beyond its imports", 2048)
    unscored_share: float = doc("the run stops when more than this share of three steps' completions could not be scored; 1: never", 0.2)


@dataclass
class RolloutConfig:
    engine: EngineName = doc("vllm, hf (transformers) or scripted", EngineName.vllm)
    problems_per_step: int = doc("problems drawn each step", 16)
    completions_per_problem: int = doc("completions sampled for each problem: the group", 8)
    sampling_rounds: int = doc("dynamic sampling: groups without signal are replaced by further problems in up to so many rounds; 1: off", 1)
    max_new_tokens: int = doc("token limit of a completion", 256)
    temperature: float = doc("sampling temperature of training rollouts", 1.0)
    top_p: float = doc("nucleus sampling; training takes its log-probs over what is kept; 1 is off", 1.0)
    top_k: int = doc("top-k sampling; training takes its log-probs over what is kept; 0 is off", 0)
    min_p: float = doc("tokens below this share of the likeliest one's probability are not sampled; 0 is off", 0.0)
    stop: list[str] = doc("strings that end a completion; they stay in its text", factory=list)
    num_engines: int = doc("vllm: engine actors; requests are spread over them", 1)
    cpus_per_engine: int = doc("vllm: threads of one engine; 0: all cores of the machine, divided among the engines", 0)
    gpus_per_engine: int = doc("GPUs of one engine (tensor parallel); 0: CPU", 0)
    schedule: ScheduleName = doc("free: engines get work as they finish; fixed: equal shares, exact to the bit on equal machines", ScheduleName.free)
    max_staleness: int = doc("updates by which sampling may run ahead: 0 is strictly on-policy; ahead, weights change in flight", 0)
    transfer: TransferName = doc(
        "how weights reach vLLM engines: shared_memory (Ray's store), disk (files in the run folder), gloo, or nccl (between GPUs)",
        TransferName.shared_memory,
    )
    hang_timeout_s: float = doc("vllm: an engine that makes no step for so long is killed and replaced", 300.0)
    engine_args: dict[str, Any] = doc("passed to the engine as they are, e.g. any argument of vllm.LLM", factory=dict)


@dataclass
class AlgoConfig:
    advantage: dict[str, Any] = doc("fn: rewards of a group → advantages", factory=dict)
    combine_rewards: CombineRewards = doc("several reward parts are weighted and summed before or after the advantage is taken", CombineRewards.before)
    normalise: dict[str, Any] = doc("fn: advantages of all tokens of the batch → normalised; empty: none", factory=dict)
    ratio: dict[str, Any] = doc("fn: level at which policy and anchor are compared: token, sequence", factory=lambda: {"fn": "grpo.ratios.token"})
    anchor: Anchor = doc("what the ratio compares with: the policy before this step's updates, or the engine that sampled", Anchor.proximal)
    objective: dict[str, Any] = doc("fn: per-token policy objective, with its clip bounds", factory=dict)
    correction: dict[str, Any] = doc("one entry a correction for sampler ≠ trainer: fn and its arguments; they multiply", factory=dict)
    kl: dict[str, Any] = doc("fn: KL estimator towards the reference, with its coef; empty: none", factory=dict)
    kl_in: KLPlace = doc("the KL term stands in the loss, or in the reward", KLPlace.loss)
    aggregation: dict[str, Any] = doc("fn: per-token values → one number", factory=dict)
    entropy_coef: float = doc("weight of the entropy bonus", 0.0)
    mask_truncated: bool = doc("completions cut off by the token limit take no part in the loss", False)
    reference_refresh: int = doc("optimiser updates after which the reference becomes the policy; 0: never", 0)


@dataclass
class OptimConfig:
    name: Optimiser = doc("adamw or sgd", Optimiser.adamw)
    lr: float = doc("peak learning rate", 1e-6)
    schedule: Schedule = doc("constant, linear or cosine decay after the warm-up", Schedule.constant)
    warmup_steps: int = doc("optimiser updates over which the learning rate rises from 0", 0)
    min_lr_ratio: float = doc("floor of the decay as a share of lr", 0.0)
    weight_decay: float = doc("decoupled weight decay", 0.0)
    betas: list[float] = doc("AdamW's moment decay rates", factory=lambda: [0.9, 0.999])
    eps: float = doc("AdamW's ε", 1e-8)
    max_grad_norm: float = doc("gradients are scaled down to this norm; 0: off", 1.0)
    updates_per_step: int = doc("optimiser updates made from the rollouts of one step", 1)


@dataclass
class TrainerConfig:
    layout: Layout = doc("how rollouts are laid out for the model: shared_prompt computes a prompt once a group; packed, padded", Layout.shared_prompt)
    tokens_per_microbatch: int = doc("token budget of one forward and backward pass", 4096)
    device: str = doc("cpu, cuda, or auto", "auto")
    ranks: int = doc("processes that train, each with a shard of the model (FSDP2) and, on cuda, a GPU; 1: this process", 1)
    shard_gradients: bool = doc("with several ranks: add gradients up after every micro-batch; less memory, more traffic", False)


@dataclass
class EvalConfig:
    every: int = doc("steps between evaluations on held-out problems; 0: only at the start and the end", 10)
    problems: int = doc("held-out problems", 128)
    samples: int = doc("completions for each of them; pass@1 is their mean", 1)
    temperature: float = doc("sampling temperature of evaluations", 1.0)
    top_p: float = doc("nucleus sampling of evaluations", 1.0)
    min_p: float = doc("min-p sampling of evaluations", 0.0)
    metric: str = doc("the reward part that says whether a completion passes (value ≥ 1)", "accuracy")


@dataclass
class WandbConfig:
    mode: WandbMode = doc("auto: online when logged in, else offline; never asks", WandbMode.auto)
    project: str = doc("W&B project", "grpo")
    entity: str | None = doc("W&B team or user", None)
    tags: list[str] = doc("W&B tags", factory=list)


@dataclass
class LoggerConfig:
    console: bool = doc("live table, sample rollouts and progress in the terminal", True)
    sample_every: int = doc("steps between two sample tables (one good, one bad rollout); 0: never", 5)
    tensorboard: bool = doc("also write TensorBoard events", False)
    wandb: WandbConfig = doc("Weights & Biases", factory=WandbConfig)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    environment: dict[str, Any] = doc(
        "fn: what the policy talks to, made anew for each rollout; weights: of the scores that it gives; the other keys are its arguments",
        factory=lambda: {"fn": "grpo.rollouts.environments.SingleTurn"},
    )
    reward: dict[str, dict[str, Any]] = doc("one entry a part: fn, weight, and the function's arguments", factory=dict)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


class ConfigError(ValueError):
    """A setting that cannot work: names the key, the value, what is allowed and what to do."""

    def __init__(self, key: str, problem: str, remedy: str = "") -> None:
        self.key = key
        super().__init__(f"{key}: {problem}" + (f"\n  → {remedy}" if remedy else ""))


def keys(node: Any = Config, prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Every leaf key of the schema → (default, meaning)."""
    out: dict[str, tuple[Any, str]] = {}
    for f in fields(node):
        value = getattr(node() if isinstance(node, type) else node, f.name)
        name = prefix + f.name
        if is_dataclass(value):
            out |= keys(value, name + ".")
        else:
            out[name] = (value, f.metadata.get("doc", ""))
    return out


def validate(config: Config) -> None:
    """Range checks that need nothing but the numbers.

    Raises:
        ConfigError: for the first setting that cannot work.
    """

    def check(ok: bool, key: str, problem: str, remedy: str) -> None:
        if not ok:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            shown = str(value) if isinstance(value, StrEnum) else repr(value)
            raise ConfigError(key, f"is {shown}, but {problem}", remedy)

    c = config
    for key in ("optim.lr", "optim.weight_decay", "optim.max_grad_norm", "rollout.temperature", "eval.temperature", "algo.entropy_coef"):
        section, _, name = key.partition(".")
        check(math.isfinite(getattr(getattr(c, section), name)), key, "it must be a finite number", "write a number such as 1.0")
    device_ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.trainer.device) is not None
    check(device_ok, "trainer.device", "it is not a device", "choose auto, cpu, cuda or cuda:N")
    check(c.run.steps >= 0, "run.steps", "a number of steps is not negative", "set it to 0 or more")
    check(c.run.checkpoint_every >= 0, "run.checkpoint_every", "it counts steps", "set it to 1 or more; 0 keeps only the last step")
    check(c.run.keep_checkpoints >= 1, "run.keep_checkpoints", "the last one is always kept", "set it to 1 or more")
    check(bool(c.model.path), "model.path", "a model is needed", "give a folder, a hub id, package:… or make:…")
    check(c.scoring.workers >= 0, "scoring.workers", "it counts processes", "0 is one a core")
    check(math.isfinite(c.scoring.cpu_s) and c.scoring.cpu_s > 0, "scoring.cpu_s", "it must be a positive number of seconds", "5 is usual")
    check(c.scoring.memory_mb >= 1, "scoring.memory_mb", "it counts MiB", "2048 is usual")
    check(0 <= c.scoring.unscored_share <= 1, "scoring.unscored_share", "it is a share", "set it between 0 and 1; 1 never stops")
    for key in ("problems_per_step", "completions_per_problem", "sampling_rounds", "max_new_tokens", "num_engines"):
        check(getattr(c.rollout, key) >= 1, f"rollout.{key}", "it must be at least 1", "raise it")
    for section in ("rollout", "eval"):
        node = getattr(c, section)
        check(
            node.temperature >= 0,
            f"{section}.temperature",
            "a temperature is not negative",
            "0 is greedy, 1 is the model's own distribution",
        )
        check(0 < node.top_p <= 1, f"{section}.top_p", "it must be in (0, 1]", "1 is off")
        check(0 <= node.min_p < 1, f"{section}.min_p", "it must be in [0, 1)", "0 is off")
    check(
        c.rollout.temperature > 0,
        "rollout.temperature",
        "greedy rollouts of a group are all the same: nothing to compare",
        "set it above 0; 1 is usual",
    )
    check(c.rollout.top_k >= 0, "rollout.top_k", "it counts tokens", "0 is off")
    check(c.rollout.top_k != 1, "rollout.top_k", "rollouts of a group are then all the same: nothing to compare", "set it to 2 or more; 0 is off")
    unknown = _why_kept_sets_are_unknown(c.rollout)
    for key, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        check(
            getattr(c.rollout, key) == off or not unknown,
            f"rollout.{key}",
            f"training must take its log-probs over the tokens that truncation kept, and {unknown}",
            f"set it to {off} (evaluations are free), or sample with rollout.engine=hf, or vllm on CPU",
        )
    check(c.rollout.max_staleness >= 0, "rollout.max_staleness", "it counts updates", "0 is strictly on-policy, 1 overlaps sampling and training")
    check(
        c.rollout.max_staleness == 0 or c.rollout.schedule is ScheduleName.free,
        "rollout.max_staleness",
        "the fixed schedule repeats to the bit, and what is sampled ahead depends on how long an update takes",
        "set it to 0, or rollout.schedule=free",
    )
    transfer = c.rollout.transfer
    check(
        transfer is TransferName.shared_memory or c.rollout.engine is EngineName.vllm,
        "rollout.transfer",
        f"the {c.rollout.engine} engine is in the trainer's process, and nothing is transferred",
        "leave it at shared_memory",
    )
    check(
        transfer is not TransferName.nccl or (c.rollout.gpus_per_engine == 1 and c.trainer.ranks == 1),
        "rollout.transfer",
        f"it goes from one GPU to engines of one GPU each: not with trainer.ranks={c.trainer.ranks}, "
        f"rollout.gpus_per_engine={c.rollout.gpus_per_engine}",
        "set it to shared_memory",
    )
    check(c.rollout.hang_timeout_s > 0, "rollout.hang_timeout_s", "it must be a positive number of seconds", "300 is usual")
    check(c.rollout.cpus_per_engine >= 0, "rollout.cpus_per_engine", "it counts cores", "0 divides all cores among the engines")
    check(c.rollout.gpus_per_engine >= 0, "rollout.gpus_per_engine", "it counts GPUs", "0 is CPU")
    check(c.optim.lr >= 0, "optim.lr", "a learning rate is not negative", "1e-6 is usual for large models, 1e-5 for small ones")
    check(0 <= c.optim.min_lr_ratio <= 1, "optim.min_lr_ratio", "it is a share of optim.lr", "set it between 0 and 1")
    check(c.optim.warmup_steps >= 0, "optim.warmup_steps", "it counts optimiser updates", "0 is no warm-up")
    check(c.optim.weight_decay >= 0, "optim.weight_decay", "a decay is not negative", "0 is off")
    check(
        len(c.optim.betas) == 2 and all(0 <= b < 1 for b in c.optim.betas),
        "optim.betas",
        "AdamW takes two numbers in [0, 1)",
        "e.g. [0.9, 0.999]",
    )
    check(c.optim.eps > 0, "optim.eps", "it must be positive", "1e-8 is usual")
    check(c.optim.max_grad_norm >= 0, "optim.max_grad_norm", "a norm is not negative", "0 is off")
    check(
        1 <= c.optim.updates_per_step <= c.rollout.problems_per_step,
        "optim.updates_per_step",
        f"the {c.rollout.problems_per_step} groups of a step are divided among its updates",
        "set it between 1 and rollout.problems_per_step",
    )
    check(c.algo.entropy_coef >= 0, "algo.entropy_coef", "a bonus is not negative", "0 is off")
    check(c.algo.reference_refresh >= 0, "algo.reference_refresh", "it counts optimiser updates", "0 is never")
    check(c.trainer.ranks >= 1, "trainer.ranks", "it counts processes", "1 trains in this process")
    check(
        c.trainer.ranks > 1 or not c.trainer.shard_gradients,
        "trainer.shard_gradients",
        "one rank has all of every gradient",
        "set it to false, or raise trainer.ranks",
    )
    check(c.trainer.tokens_per_microbatch >= 1, "trainer.tokens_per_microbatch", "it counts tokens", "4096 is usual")
    check(c.eval.every >= 0, "eval.every", "it counts steps", "0 evaluates only at the start and the end")
    check(c.eval.problems >= 0, "eval.problems", "it counts problems", "0 is no evaluation")
    check(c.eval.samples >= 1, "eval.samples", "it counts completions a problem", "set it to 1 or more")
    check(c.logger.sample_every >= 0, "logger.sample_every", "it counts steps", "0 is never")
    check(
        bool(c.algo.kl) or not c.algo.reference_refresh,
        "algo.reference_refresh",
        "without a KL term there is no reference",
        "set algo.kl.fn and algo.kl.coef",
    )
    check("fn" in c.algo.kl or not c.algo.kl, "algo.kl", "it has no fn", "name an estimator, e.g. algo.kl.fn=grpo.kl.k3")
    check(
        bool(c.algo.kl) or c.algo.kl_in is KLPlace.loss, "algo.kl_in", "there is no KL term to put there", "set algo.kl.fn and algo.kl.coef"
    )
    for name, node in c.algo.correction.items():
        if node is not None and not (isinstance(node, dict) and "fn" in node):
            raise ConfigError(
                f"algo.correction.{name}", f"is {node!r}", "each correction has a name and a fn, e.g. {tis: {fn: grpo.corrections.truncated_importance}}"
            )
    for name in ("advantage", "ratio", "objective", "aggregation"):
        check(bool(getattr(c.algo, name)), f"algo.{name}", "every objective needs one", "choose a preset, e.g. algo=grpo")
    scores = [*c.reward, *(c.environment.get("weights") or {})]
    if not scores:
        raise ConfigError(
            "reward", "is empty", "choose a preset, e.g. reward=r1_rules, or add reward.NAME.fn=…, or weights for the environment's scores"
        )
    if c.eval.problems and c.eval.metric not in scores:
        raise ConfigError("eval.metric", f"is {c.eval.metric!r}, but the reward parts are {', '.join(scores)}", "name one of them")


def _why_kept_sets_are_unknown(rollout: RolloutConfig) -> str:
    """Empty for engines that report what truncation left to choose from."""
    if rollout.engine is EngineName.scripted:
        return "the scripted engine's completions come from no distribution that could be truncated"
    if rollout.engine is EngineName.vllm and rollout.gpus_per_engine:
        return "vLLM's own sampler, which a GPU needs, reports them only if every request sets top_k and none is greedy"
    return ""
