"""A configuration, checked: every function found and bound, every problem loaded, the loss tried – before any model is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from grpo.batch import Batch, collate
from grpo.config import Anchor, CombineRewards, Config, ConfigError, EngineName, KLPlace
from grpo.config_checks import validate
from grpo.corrections import Correction, Mismatch
from grpo.credit import Credit
from grpo.data import ProblemSource, PromptFormat, check_disjoint, load_problems
from grpo.idle import DEFAULTS
from grpo.imports import FunctionRef, resolve
from grpo.losses import Loss, TokenScores
from grpo.models import check_model
from grpo.objectives import Objective
from grpo.plan_environment import check_environment
from grpo.rewards.base import RewardPart, parse_reward_config
from grpo.toy import toy_group
from grpo.types import Problem

WITHIN_GROUP = {f"grpo.advantages.{name}" for name in ("group_norm", "center", "leave_one_out", "max_rl")}  # 0 without others to compare
OF_SINGLE_TOKENS = {"grpo.objectives.dppo_tv", "grpo.objectives.dppo_kl"}
OF_THE_SAMPLER = {f"grpo.corrections.{name}" for name in (
    "truncated_importance", "truncated_sequence_importance", "token_mask", "sequence_mask", "geometric_mask"
)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration comes to: its functions by name, bound to their arguments."""

    config: Config
    advantage: FunctionRef
    normalise: FunctionRef | None
    ratio: FunctionRef
    objective: FunctionRef
    corrections: Mapping[str, FunctionRef]
    kl: FunctionRef | None
    kl_coef: float
    aggregation: FunctionRef
    rewards: tuple[RewardPart, ...]
    problems: FunctionRef
    environment: FunctionRef
    environment_weights: Mapping[str, float]  # of the scores that the environment gives

    def loss(self) -> Loss:
        in_loss = self.config.algo.kl_in is KLPlace.loss
        return Loss(
            objective=self.objective.load(),
            aggregate=self.aggregation.load(),
            ratio=self.ratio.load(),
            corrections={name: ref.load() for name, ref in self.corrections.items()},
            kl=self.kl.load() if self.kl and in_loss else None,
            kl_coef=self.kl_coef if in_loss else 0.0,
            entropy_coef=self.config.algo.entropy_coef,
            anchor_is_behavior=self.config.algo.anchor is Anchor.behavior,
        )

    def credit(self) -> Credit:
        algo = self.config.algo
        in_reward = algo.kl_in is KLPlace.reward
        return Credit(
            advantage=self.advantage.load(),
            part_weights=self.counted_weights if algo.combine_rewards is CombineRewards.after else {},
            kl=self.kl.load() if self.kl and in_reward else None,
            kl_coef=self.kl_coef if in_reward else 0.0,
            normalise=self.normalise.load() if self.normalise else None,
        )

    @property
    def reward_weights(self) -> dict[str, float]:
        """Of the reward parts and of the environment's own scores."""
        return {part.name: part.weight for part in self.rewards} | dict(self.environment_weights)

    @property
    def counted_weights(self) -> dict[str, float]:
        """Of the parts that are trained on; a weight of 0 only logs."""
        return {name: weight for name, weight in self.reward_weights.items() if weight != 0}


def plan(config: Config) -> Plan:
    """Check everything that can be checked without loading a model.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    made = plan_without_model(config)
    check_model(config.model.path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code)
    return made


def plan_without_model(config: Config) -> Plan:
    """The same for what uses no model: its files may be gone."""
    validate(config)
    algo = config.algo
    kl = dict(algo.kl)
    if kl and "coef" not in kl:
        raise ConfigError("algo.kl.coef", "is missing", "give the weight of the KL term, e.g. algo.kl.coef=0.001; 0 leaves it out")
    kl_coef = kl.pop("coef", 0.0)
    if not (isinstance(kl_coef, (int, float)) and 0 <= kl_coef < math.inf):
        raise ConfigError("algo.kl.coef", f"is {kl_coef!r}, but it must be a finite number of 0 or more", "0.001 is R1's")
    environment, environment_weights = _environment_node(config)
    made = Plan(
        config=config,
        advantage=resolve(algo.advantage, "algo.advantage", positional=2),
        normalise=resolve(algo.normalise, "algo.normalise", positional=1) if algo.normalise else None,
        ratio=resolve(algo.ratio, "algo.ratio", positional=2),
        objective=resolve(algo.objective, "algo.objective", positional=3),
        corrections={
            name: resolve(node, f"algo.correction.{name}", positional=1) for name, node in algo.correction.items() if node is not None
        },
        kl=resolve(kl, "algo.kl", positional=2) if kl else None,
        kl_coef=float(kl_coef),
        aggregation=resolve(algo.aggregation, "algo.aggregation", positional=2),
        rewards=parse_reward_config(config.reward) if config.reward else (),
        problems=resolve(config.data.problems, "data.problems", positional=1, provided=("seed",)),
        environment=resolve(environment, "environment", positional=0),
        environment_weights=environment_weights,
    )
    check_combination(made)
    check_engine(config)
    check_environment(made)
    try_loss(made)
    check_advantage(made)
    return made


def check_combination(made: Plan) -> None:
    """Settings that are fine alone and do nothing together.

    Raises:
        ConfigError: naming one of them.
    """
    config, algo = made.config, made.config.algo
    for key in ("cpu_s", "memory_mb"):
        value, own = getattr(config.scoring, key), [key in part.limits for part in made.rewards]
        if own and all(own) and value != DEFAULTS[f"scoring.{key}"]:
            raise ConfigError(f"scoring.{key}", f"is {value}, which does nothing: every reward part has a limit of its own", "leave it out")
    if made.objective.target in OF_SINGLE_TOKENS and made.ratio.target != "grpo.ratios.token":
        what = f"is {made.ratio.target}, but {made.objective.target} bounds how far the probability of each token moves"
        raise ConfigError("algo.ratio", what, "algo.ratio.fn=grpo.ratios.token")
    for name, ref in made.corrections.items():
        if algo.anchor is Anchor.behavior and ref.target in OF_THE_SAMPLER:
            raise ConfigError(
                f"algo.correction.{name}",
                f"{ref.target} weighs π_prox/π_behav, which is always 1 with algo.anchor=behavior",
                "leave it out: algo.correction={}",
            )


def check_advantage(made: Plan) -> None:
    """What is asked of the step's shape of an advantage that compares within the group, and of one that does not: tried, not known by name.

    Raises:
        ConfigError: nothing would be learned, or groups would be dropped that the policy could learn from.
    """
    config, algo = made.config, made.config.algo
    if config.rollout.completions_per_problem == 1 and not (_credits(made, [1.0]) or made.kl_coef or algo.entropy_coef):
        raise ConfigError(
            "rollout.completions_per_problem",
            f"is 1, but {made.advantage.target} compares the completions of a problem: nothing would be learned",
            "raise it, or compare across the batch: algo=reinforce_pp",
        )
    if config.rollout.sampling_rounds > 1 and _credits(made, [0.3] * 4):
        raise ConfigError(
            "rollout.sampling_rounds",
            f"is {config.rollout.sampling_rounds}, but with {made.advantage.target} a group whose rewards are equal moves the policy too",
            "set it to 1, or choose an advantage that compares within the group",
        )


def _credits(made: Plan, rewards: list[float]) -> bool:
    """Whether a group with these rewards has any advantage."""
    import torch

    try:
        advantages = made.advantage.load()(torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.long))
    except Exception as error:  # the user's code: anything
        what = f"{made.advantage.target} fails for a group with the rewards {rewards}: {type(error).__name__}: {error}"
        raise ConfigError("algo.advantage", what, "such groups come up in every run") from error
    if not torch.as_tensor(advantages).isfinite().all():
        what = f"{made.advantage.target} gives {advantages.tolist()} for a group with the rewards {rewards}"
        raise ConfigError("algo.advantage", what, "return 0 where the rewards of a group are equal: such groups come up in every run")
    return bool((advantages != 0).any())


def _environment_node(config: Config) -> tuple[dict[str, Any], dict[str, float]]:
    """``environment`` without its weights, and those."""
    node = dict(config.environment)
    weights = node.pop("weights", None) or {}
    if not isinstance(weights, Mapping):
        raise ConfigError("environment.weights", f"is {weights!r}; it must be a mapping", "write it as {score: weight}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"environment.weights.{name}", f"{weight!r} is not a finite number", "give a number such as 0.5")
        if name in config.reward:
            raise ConfigError(f"environment.weights.{name}", "is also a reward part", "give one of them another name")
    return node, {str(name): float(weight) for name, weight in weights.items()}


def try_loss(made: Plan) -> None:
    """The objective on three toy completions: a function that returns the wrong thing shows now, not after the first rollouts.

    Raises:
        ConfigError: naming the component.
    """
    import torch

    def says(key: str, problem: str) -> ConfigError:
        return ConfigError(key, problem, "docs/extending.md says what each component is called with and returns")

    batch = _toy_batch(made)
    index, tokens = batch.rollout_index, batch.num_tokens
    one = torch.ones(tokens)
    per_token = {"ratio": (0 * one, index), "kl": (0 * one, 0 * one), "normalise": (one,)}
    try:
        component = "advantage"
        advantages = made.advantage.load()(batch.rewards, batch.group_index)
        if getattr(advantages, "shape", None) != (3,):
            raise says("algo.advantage", f"{made.advantage.target} must return a tensor [rollouts], one advantage a rollout")
        for component, arguments in per_token.items():
            ref = getattr(made, component)
            if ref is not None and getattr(ref.load()(*arguments), "shape", None) != (tokens,):
                raise says(f"algo.{component}", f"{ref.target} must return a tensor [tokens]")
        component = "objective"
        if not isinstance(made.objective.load()(0 * one, one, -one), Objective):
            raise says("algo.objective", f"{made.objective.target} must return grpo.objectives.Objective(values=…, clipped=…)")
        component = "correction"
        mismatch = Mismatch(policy=-one, proximal=-one, behavior=-one, advantages=one, rollout_index=index)
        for name, ref in made.corrections.items():
            if not isinstance(ref.load()(mismatch), Correction):
                raise says(f"algo.correction.{name}", f"{ref.target} must return grpo.corrections.Correction(weights=…, active=…)")
        component = "aggregation"
        aggregate = made.aggregation.load()
        parts = sum(float(aggregate(one[index == i], batch.select([i]))) for i in range(3))
        if abs(float(aggregate(one, batch)) - parts) > 1e-5:
            what = f"{made.aggregation.target}: the parts of a batch do not add up to the whole; divide by batch.totals"
            raise says("algo.aggregation", what)
        component = "the loss"
        batch = replace(batch, advantages=made.credit()(batch))
        scores = TokenScores(logprobs=(-one).requires_grad_(), entropy=one)
        loss = made.loss()(scores, batch).loss
        if not math.isfinite(float(loss.detach())):
            raise says("algo", f"its loss on a toy batch is {float(loss.detach())}")
    except ConfigError:
        raise
    except Exception as error:
        where = f"algo.{component}" if component != "the loss" else "algo"
        raise says(where, f"it cannot be computed: {type(error).__name__}: {error}") from error


def _toy_batch(made: Plan) -> Batch:
    """Two groups: completions of one and two tokens with rewards 0 and 1, and one of three tokens."""
    parts = [dict.fromkeys(made.reward_weights, value) for value in (0.0, 1.0)]
    groups = [toy_group("a", [0, 1], [1, 2], parts=parts), toy_group("b", [0], [3], parts=parts[:1])]
    batch = collate(groups, tuple(made.counted_weights))
    return replace(batch, reference_logprobs=batch.behavior_logprobs)


def scripted_answer(config: Config) -> FunctionRef | None:
    """The user's rule for the scripted engine, ``rollout.engine_args.answer=file.py:function``, called as fn(prompt, index, seed)."""
    arguments = dict(config.rollout.engine_args)
    answer = arguments.pop("answer", None)
    if arguments:
        raise ConfigError(f"rollout.engine_args.{next(iter(arguments))}", "means nothing to the scripted engine", "it takes answer alone")
    return resolve({"fn": answer}, "rollout.engine_args.answer", positional=3) if answer else None


def check_engine(config: Config) -> None:
    """Arguments of the engines that can be asked without loading anything; vLLM checks its own when it starts."""
    if config.rollout.engine is EngineName.scripted:
        scripted_answer(config)
    elif config.rollout.engine is EngineName.hf:
        resolve({"fn": "grpo.rollouts.hf.HFEngine", **config.rollout.engine_args}, "rollout.engine_args", positional=None)
    else:
        from grpo.rollouts.vllm_update import ENGINE_ARGS

        for name in sorted(ENGINE_ARGS.keys() & config.rollout.engine_args.keys()):
            raise ConfigError(f"rollout.engine_args.{name}", "is how new weights get into vLLM: the engine sets it itself", "leave it out")


def load_split(plan: Plan, split: str, chat: Callable[[str], str] | None = None) -> list[Problem]:
    """The problems of ``"train"`` or ``"heldout"``, prompts made, gold answers checked.

    Raises:
        ConfigError: the source fails, a row lacks a column, a gold answer cannot be graded.
    """
    data = plan.config.data
    try:
        rows = plan.problems.load()(split, seed=plan.config.run.seed)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            "data.problems", f"{plan.problems.target} failed: {type(error).__name__}: {error}", "check its arguments"
        ) from error
    prompt_format = PromptFormat(template=data.template, prompt_key=data.prompt_key, answer_key=data.answer_key, chat=chat)
    found = load_problems(rows, split, prompt_format)
    check_gold(found, plan.rewards)
    return found


def load_both_splits(checked: Plan, chat: Callable[[str], str] | None = None) -> tuple[list[Problem], list[Problem]]:
    train = load_split(checked, "train", chat)
    if checked.config.rollout.problems_per_step > len(train):
        ProblemSource(train, 0).take(checked.config.rollout.problems_per_step)
    heldout = load_split(checked, "heldout", chat) if checked.config.eval.problems else []
    check_disjoint(train, heldout)
    return train, heldout


def check_gold(found: list[Problem], rewards: tuple[RewardPart, ...]) -> None:
    """Gold answers that the math grader cannot read, tests that the code reward cannot run: an error now, not a silent 0 at step 3,000."""
    from grpo.rewards.code import check_tests
    from grpo.rewards.math import check_gold as check_answer

    checks: dict[str, tuple[str, Callable[[Problem], str | None]]] = {
        "grpo.rewards.math.accuracy": ("data.answer_key", lambda problem: check_answer(problem.answer)),
        "grpo.rewards.code.code_reward": ("data.problems", check_tests),
    }
    for target in {part.ref.target for part in rewards} & checks.keys():
        key, check = checks[target]
        unreadable = [(p.id, message) for p in found if (message := check(p))]
        if unreadable:
            shown = "; ".join(f"{name}: {message}" for name, message in unreadable[:5])
            what = f"{len(unreadable)} of {len(found)} problems cannot be graded by {target}: {shown}"
            raise ConfigError(key, what, "correct these rows, or use another reward")


def check_sandbox(checked: Plan) -> None:
    """What runs the policy's programs needs a sandbox that holds on this machine: one is started, and its self-test run.

    Raises:
        ConfigError: what the machine lacks and how to get it.
    """
    from grpo.rewards.sandbox import Sandbox, SandboxUnavailable

    for key, ref in _sandboxed(checked):
        allow_weak, unsafe = (bool(ref.kwargs.get(name, False)) for name in ("allow_weak", "unsafe"))
        try:
            Sandbox(workers=1, allow_weak=allow_weak, unsafe=unsafe).close()
        except SandboxUnavailable as error:
            raise ConfigError(key, str(error), "docs/sandbox.md says what each level needs") from error


def _sandboxed(checked: Plan) -> Iterator[tuple[str, FunctionRef]]:
    for part in checked.rewards:
        if part.ref.target == "grpo.rewards.code.code_reward":
            yield f"reward.{part.name}", part.ref
    if checked.environment.target == "grpo.rollouts.python_tool.PythonTool":
        yield "environment", checked.environment
