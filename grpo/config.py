"""The configuration schema: every key, its default and its meaning. Stdlib only; Hydra composes it, ``grpo.config_checks`` checks it.

Nodes that are dicts are open, that is, they take names the schema does not know: ``reward`` and ``algo.correction`` (one entry a part),
``data.problems``, ``environment``, ``rollout.engine_args``, ``model.args`` and the components under ``algo``. A component is a ``fn`` – an import
path or ``file.py:function`` – and its keyword arguments; they are bound against the function's signature at build time, before a
model is loaded.
"""

from __future__ import annotations

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
    cuda_ipc = "cuda_ipc"


BETWEEN_GPUS = (TransferName.nccl, TransferName.cuda_ipc)


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
    resume: bool = doc("go on from the last checkpoint of this run folder: what `grpo train <run folder>` sets, and no recipe", False)
    exact: bool = doc("a run is not gone on with where its bits would change: other threads, precision or CPU, edited files, other data; false: it is, with a warning", True)


@dataclass
class ModelConfig:
    path: str = doc(
        "a Hugging Face folder or hub id; `package:NAME/FILE.gguf` (converted once, into $GRPO_CACHE or ~/.cache/grpo-toolkit); "
        "`make:IMPORT.PATH` (a function that builds the model in a folder)",
        "???",
    )
    revision: str | None = doc("hub revision", None)
    trust_remote_code: bool = doc("run the model's own code from the hub", False)
    precision: Precision = doc(
        "compute precision of the trainer; weights and optimiser stay fp32; auto: bf16 where the hardware has it", Precision.auto
    )
    gradient_checkpointing: bool = doc("recompute activations in the backward pass: less memory, a third more time", False)
    args: dict[str, Any] = doc("keyword arguments for AutoModelForCausalLM.from_pretrained", factory=dict)


@dataclass
class DataConfig:
    problems: dict[str, Any] = doc(
        "fn: where rows come from, called as fn(split, seed=…, …) for 'train' and 'heldout'; the other keys are its arguments", factory=dict
    )
    template: str = doc("the prompt: the row's columns in braces, e.g. 'Question: {question}'; empty: the prompt column as it is", "")
    prompt_key: str = doc("without a template: the column that holds the prompt", "question")
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
    gpus_per_engine: int = doc("GPUs of one engine (tensor parallel); 0: an engine on CPUs, or 1 where vLLM is built for GPUs", 0)
    colocate: bool = doc("the engines share the trainer's GPUs: they give their memory back while the policy is updated", False)
    schedule: ScheduleName = doc("free: engines get work as they finish; fixed: whole shards, one after another; exact to the bit on equal machines", ScheduleName.free)
    max_staleness: int = doc("steps by which sampling may run ahead: 0 is strictly on-policy; ahead, weights change in flight", 0)
    transfer: TransferName = doc(
        "how weights reach vLLM engines: shared_memory (Ray's store), disk (files in the run folder), gloo; from GPU to GPU nccl, or cuda_ipc on one machine",
        TransferName.shared_memory,
    )
    hang_timeout_s: float = doc("vllm: an engine that computes no token for so long is killed and replaced", 300.0)
    start_timeout_s: float = doc("vllm: an engine that has not started after so long counts as dead", 1800.0)
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
        self.key, self._said = key, (key, problem, remedy)
        super().__init__(f"{key}: {problem}" + (f"\n  → {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str, str]]:
        return type(self), self._said  # exceptions are pickled by their text alone


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


def value_of(config: Config, key: str) -> Any:
    """``value_of(config, "optim.lr")``"""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, StrEnum) else repr(value)
