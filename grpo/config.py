"""The configuration schema: every key, its default and its meaning. Stdlib only; Hydra composes it, ``validate`` checks it.

Four nodes are open, that is, they take names the schema does not know: ``reward`` (one entry a reward part),
``data.problems``, ``rollout.engine_args`` and ``model.args``. The components under ``algo`` and each reward are a ``fn`` – an
import path or ``file.py:function`` – and its keyword arguments; they are bound against the function's signature at build
time, before a model is loaded.
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
    padded = "padded"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


def doc(text: str, default: Any = None, factory: Any = None) -> Any:
    """A field with its meaning attached, for ``grpo recipes show`` and ``docs/configuration.md``."""
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
    keep_checkpoints: int = doc("checkpoints kept with their optimiser state; the best by evaluation is kept beside them", 1)
    resume: bool = doc("go on from the last checkpoint of this run folder", False)


@dataclass
class ModelConfig:
    path: str = doc(
        "a Hugging Face folder or hub id; `package:NAME/FILE.gguf` (converted once into the cache); "
        "`make:IMPORT.PATH` (a function that builds the model in a folder)",
        "???",
    )
    revision: str | None = doc("hub revision", None)
    trust_remote_code: bool = doc("run the model's own code from the hub", False)
    precision: Precision = doc("compute precision of the trainer; weights and optimiser stay fp32; auto: bf16 where the hardware has it", Precision.auto)
    gradient_checkpointing: bool = doc("recompute activations in the backward pass: less memory, a third more time", False)
    cache_dir: str = doc("where converted models are kept; empty: $GRPO_CACHE, else ~/.cache/grpo-toolkit", "")
    args: dict[str, Any] = doc("keyword arguments for AutoModelForCausalLM.from_pretrained", factory=dict)


@dataclass
class DataConfig:
    problems: dict[str, Any] = doc("fn: where rows come from, called as fn(split, seed=…, …) for 'train' and 'heldout'; the other keys are its arguments", factory=dict)
    template: str = doc("the prompt: the row's columns in braces, e.g. 'Question: {question}'; empty: the prompt column as it is", "")
    prompt_key: str = doc("the column that holds the question", "question")
    answer_key: str = doc("the column that holds the gold answer", "answer")
    chat: bool = doc("wrap the prompt as one user message in the model's chat template", False)


@dataclass
class RolloutConfig:
    engine: EngineName = doc("vllm, hf (transformers) or scripted", EngineName.vllm)
    problems_per_step: int = doc("problems drawn each step", 16)
    completions_per_problem: int = doc("completions sampled for each problem: the group", 8)
    max_new_tokens: int = doc("token limit of a completion", 256)
    temperature: float = doc("sampling temperature of training rollouts", 1.0)
    top_p: float = doc("nucleus sampling; 1 is off", 1.0)
    top_k: int = doc("top-k sampling; 0 is off", 0)
    stop: list[str] = doc("strings that end a completion; they stay in its text", factory=list)
    num_engines: int = doc("engine actors; requests are spread over them", 1)
    cpus_per_engine: int = doc("threads of one engine; 0: all cores of the machine, divided among the engines", 0)
    gpus_per_engine: int = doc("GPUs of one engine (tensor parallel); 0: CPU", 0)
    engine_args: dict[str, Any] = doc("passed to the engine as they are, e.g. any argument of vllm.LLM", factory=dict)


@dataclass
class AlgoConfig:
    advantage: dict[str, Any] = doc("fn: rewards of a group → advantages", factory=dict)
    objective: dict[str, Any] = doc("fn: per-token policy objective", factory=dict)
    correction: dict[str, Any] = doc("fn: weights for sampler ≠ trainer; empty: none", factory=dict)
    kl: dict[str, Any] = doc("fn: KL estimator towards the reference, with its coef; empty: none", factory=dict)
    aggregation: dict[str, Any] = doc("fn: per-token values → one number", factory=dict)
    entropy_coef: float = doc("weight of the entropy bonus", 0.0)
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
    layout: Layout = doc("how rollouts are laid out for the model: shared_prompt computes a prompt once a group", Layout.shared_prompt)
    tokens_per_microbatch: int = doc("token budget of one forward and backward pass", 4096)
    logprob_chunk: int = doc("tokens whose logits exist at the same time", 256)
    device: str = doc("cpu, cuda, or auto", "auto")


@dataclass
class EvalConfig:
    every: int = doc("steps between evaluations on held-out problems; 0: only at the start and the end", 10)
    problems: int = doc("held-out problems", 128)
    samples: int = doc("completions for each of them; pass@1 is their mean", 1)
    temperature: float = doc("sampling temperature of evaluations", 1.0)
    top_p: float = doc("nucleus sampling of evaluations", 1.0)
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
    reward: dict[str, dict[str, Any]] = doc("one entry a part: fn, weight, and the function's arguments", factory=dict)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)


OPEN_NODES = ("reward", "data.problems", "rollout.engine_args", "model.args")


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
