"""Whether a configuration can work, as far as its numbers tell: no function is looked up and no file opened."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Protocol

from grpo.config import BETWEEN_GPUS, Config, ConfigError, EngineName, RolloutConfig, ScheduleName, TransferName, shown, value_of
from grpo.idle import refuse_idle


def validate(config: Config) -> None:
    """Ranges, settings that exclude each other, settings without effect.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    check = partial(_check, config)
    for check_section in (_check_run, _check_rollout, _check_algo, _check_optim, _check_trainer, _check_eval):
        check_section(config, check)
    refuse_idle(config)


class Check(Protocol):
    """``check(c.run.steps >= 0, "run.steps", "a number of steps is not negative", "set it to 0 or more")``"""

    def __call__(self, ok: bool, key: str, problem: str, remedy: str) -> None: ...


def _check(config: Config, ok: bool, key: str, problem: str, remedy: str) -> None:
    if not ok:
        raise ConfigError(key, f"is {shown(value_of(config, key))}, but {problem}", remedy)


def _check_run(c: Config, check: Check) -> None:
    check(c.run.steps >= 0, "run.steps", "a number of steps is not negative", "set it to 0 or more")
    check(c.run.checkpoint_every >= 0, "run.checkpoint_every", "it counts steps", "set it to 1 or more; 0 keeps only the last step")
    check(c.run.keep_checkpoints >= 1, "run.keep_checkpoints", "the last one is always kept", "set it to 1 or more")
    check(bool(c.model.path), "model.path", "a model is needed", "give a folder, a hub id, package:… or make:…")
    check(c.scoring.workers >= 0, "scoring.workers", "it counts processes", "0 is one a core")
    check(math.isfinite(c.scoring.cpu_s) and c.scoring.cpu_s > 0, "scoring.cpu_s", "it must be a positive number of seconds", "5 is usual")
    check(c.scoring.memory_mb >= 1, "scoring.memory_mb", "it counts MiB", "2048 is usual")
    check(0 <= c.scoring.unscored_share <= 1, "scoring.unscored_share", "it is a share", "set it between 0 and 1; 1 never stops")
    check(c.logger.sample_every >= 0, "logger.sample_every", "it counts steps", "0 is never")


def _check_rollout(c: Config, check: Check) -> None:
    r = c.rollout
    for key in ("problems_per_step", "completions_per_problem", "sampling_rounds", "max_new_tokens", "num_engines"):
        check(getattr(r, key) >= 1, f"rollout.{key}", "it must be at least 1", "raise it")
    _check_sampling(c, check, "rollout")
    alike = "rollouts of a group are then all the same: nothing to compare"
    check(r.temperature > 0, "rollout.temperature", f"at 0 all is greedy; {alike}", "set it above 0; 1 is usual")
    check(r.top_k >= 0, "rollout.top_k", "it counts tokens", "0 is off")
    check(r.top_k != 1, "rollout.top_k", alike, "set it to 2 or more; 0 is off")
    unknown = _why_kept_sets_are_unknown(r)
    for key, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        check(
            getattr(r, key) == off or not unknown,
            f"rollout.{key}",
            f"training must take its log-probs over the tokens that truncation kept, and {unknown}",
            f"set it to {off} (evaluations are free), or sample with rollout.engine=hf, or vllm on CPU",
        )
    check(r.max_staleness >= 0, "rollout.max_staleness", "it counts steps", "0 is strictly on-policy, 1 overlaps sampling and training")
    check(
        r.max_staleness == 0 or r.schedule is ScheduleName.free,
        "rollout.max_staleness",
        "the fixed schedule repeats to the bit, and what is sampled ahead depends on how long an update takes",
        "set it to 0, or rollout.schedule=free",
    )
    check(
        r.transfer not in BETWEEN_GPUS or r.engine is not EngineName.vllm or (r.gpus_per_engine > 0 and c.trainer.ranks == 1),
        "rollout.transfer",
        f"it goes from the one GPU of the trainer to engines on GPUs: not with trainer.ranks={c.trainer.ranks}, "
        f"rollout.gpus_per_engine={r.gpus_per_engine}",
        "set it to shared_memory",
    )
    check(r.hang_timeout_s >= 2, "rollout.hang_timeout_s", "it must be at least 2 s: engines are looked at twice a second", "300 is usual")
    check(r.start_timeout_s > 0, "rollout.start_timeout_s", "it must be a positive number of seconds", "1800 is usual")
    check(r.cpus_per_engine >= 0, "rollout.cpus_per_engine", "it counts cores", "0 divides all cores among the engines")
    check(r.gpus_per_engine >= 0, "rollout.gpus_per_engine", "it counts GPUs", "0 is CPU")
    _check_colocation(c, check)


def _check_sampling(c: Config, check: Check, section: str) -> None:
    node = getattr(c, section)
    _check_finite(c, check, f"{section}.temperature")
    warm = node.temperature >= 0
    check(warm, f"{section}.temperature", "a temperature is not negative", "0 is greedy, 1 is the model's own distribution")
    check(0 < node.top_p <= 1, f"{section}.top_p", "it must be in (0, 1]", "1 is off")
    check(0 <= node.min_p < 1, f"{section}.min_p", "it must be in [0, 1)", "0 is off")


def _why_kept_sets_are_unknown(rollout: RolloutConfig) -> str:
    """Empty for engines that report what truncation left to choose from."""
    if rollout.engine is EngineName.scripted:
        return "the scripted engine's completions come from no distribution that could be truncated"
    if rollout.engine is EngineName.vllm and rollout.gpus_per_engine:
        return "vLLM's own sampler, which a GPU needs, reports them only if every request sets top_k and none is greedy"
    return ""


def _check_colocation(c: Config, check: Check) -> None:
    """Whether engines can take turns with the trainer on its GPUs."""
    r, key = c.rollout, "rollout.colocate"
    if not r.colocate or r.engine is not EngineName.vllm:
        return
    on_gpu = r.gpus_per_engine > 0 and c.trainer.device != "cpu"
    why = "engines on a CPU share the machine's memory with the trainer anyway, and only GPU memory can be given back"
    check(on_gpu, key, why, "set it to false, or rollout.gpus_per_engine=1 and trainer.device=cuda")
    check(
        r.num_engines * r.gpus_per_engine == c.trainer.ranks,
        key,
        f"the engines have rollout.num_engines={r.num_engines} × rollout.gpus_per_engine={r.gpus_per_engine} GPUs, "
        f"and the trainer trainer.ranks={c.trainer.ranks}",
        "make them equal: every GPU samples, and then trains",
    )
    ahead = f"with rollout.max_staleness={r.max_staleness} engines sample during updates, when these sleep"
    check(r.max_staleness == 0, key, ahead, "set it to false, or rollout.max_staleness=0")
    nccl = "NCCL (rollout.transfer=nccl) does not connect two processes on one GPU"
    check(r.transfer is not TransferName.nccl, key, nccl, "set rollout.transfer=cuda_ipc, or shared_memory")
    awake = "rollout.engine_args.enable_sleep_mode is off, and without it vLLM keeps its memory"
    check(bool(r.engine_args.get("enable_sleep_mode", True)), key, awake, "leave enable_sleep_mode out")


def _check_algo(c: Config, check: Check) -> None:
    algo = c.algo
    _check_finite(c, check, "algo.entropy_coef")
    check(algo.entropy_coef >= 0, "algo.entropy_coef", "a bonus is not negative", "0 is off")
    check(algo.reference_refresh >= 0, "algo.reference_refresh", "it counts optimiser updates", "0 is never")
    check("fn" in algo.kl or not algo.kl, "algo.kl", "it has no fn", "name an estimator, e.g. algo.kl.fn=grpo.kl.k3")
    for name, node in algo.correction.items():
        if node is not None and not (isinstance(node, dict) and "fn" in node):
            example = "each correction has a name and a fn, e.g. {tis: {fn: grpo.corrections.truncated_importance}}"
            raise ConfigError(f"algo.correction.{name}", f"is {node!r}", example)
    for name in ("advantage", "ratio", "objective", "aggregation"):
        check(bool(getattr(algo, name)), f"algo.{name}", "every objective needs one", "choose a preset, e.g. algo=grpo")


def _check_optim(c: Config, check: Check) -> None:
    o = c.optim
    for key in ("lr", "weight_decay", "max_grad_norm"):
        _check_finite(c, check, f"optim.{key}")
    check(o.lr >= 0, "optim.lr", "a learning rate is not negative", "1e-6 is usual for large models, 1e-5 for small ones")
    check(0 <= o.min_lr_ratio <= 1, "optim.min_lr_ratio", "it is a share of optim.lr", "set it between 0 and 1")
    check(o.warmup_steps >= 0, "optim.warmup_steps", "it counts optimiser updates", "0 is no warm-up")
    check(o.weight_decay >= 0, "optim.weight_decay", "a decay is not negative", "0 is off")
    two = len(o.betas) == 2 and all(0 <= beta < 1 for beta in o.betas)
    check(two, "optim.betas", "AdamW takes two numbers in [0, 1)", "e.g. [0.9, 0.999]")
    check(o.eps > 0, "optim.eps", "it must be positive", "1e-8 is usual")
    check(o.max_grad_norm >= 0, "optim.max_grad_norm", "a norm is not negative", "0 is off")
    check(
        1 <= o.updates_per_step <= c.rollout.problems_per_step,
        "optim.updates_per_step",
        f"the {c.rollout.problems_per_step} groups of a step are divided among its updates",
        "set it between 1 and rollout.problems_per_step",
    )


def _check_trainer(c: Config, check: Check) -> None:
    device_ok = re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.trainer.device) is not None
    check(device_ok, "trainer.device", "it is not a device", "choose auto, cpu, cuda or cuda:N")
    check(c.trainer.ranks >= 1, "trainer.ranks", "it counts processes", "1 trains in this process")
    check(c.trainer.tokens_per_microbatch >= 1, "trainer.tokens_per_microbatch", "it counts tokens", "4096 is usual")


def _check_eval(c: Config, check: Check) -> None:
    check(c.eval.every >= 0, "eval.every", "it counts steps", "0 evaluates only at the start and the end")
    check(c.eval.problems >= 0, "eval.problems", "it counts problems", "0 is no evaluation")
    check(c.eval.samples >= 1, "eval.samples", "it counts completions a problem", "set it to 1 or more")
    _check_sampling(c, check, "eval")
    scores = [*c.reward, *(c.environment.get("weights") or {})]
    if not scores:
        raise ConfigError(
            "reward", "is empty", "choose a preset, e.g. reward=r1_rules, or add reward.NAME.fn=…, or weights for the environment's scores"
        )
    if c.eval.problems and c.eval.metric not in scores:
        raise ConfigError("eval.metric", f"is {c.eval.metric!r}, but the reward parts are {', '.join(scores)}", "name one of them")


def _check_finite(c: Config, check: Check, key: str) -> None:
    check(math.isfinite(value_of(c, key)), key, "it must be a finite number", "write a number such as 1.0")
