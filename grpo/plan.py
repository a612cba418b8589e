"""A configuration, checked: every function found and bound, every problem loaded, the loss tried – before any model is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from grpo.batch import Batch, Totals
from grpo.config import Anchor, CombineRewards, Config, ConfigError, EngineName, KLPlace, validate
from grpo.credit import Credit
from grpo.data import ProblemSource, PromptFormat, check_disjoint, load_problems
from grpo.imports import FunctionRef, resolve
from grpo.losses import Loss, TokenScores
from grpo.models import check_model
from grpo.rewards.base import RewardPart, parse_reward_config
from grpo.types import Problem


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
        return {part.name: part.weight for part in self.rewards}

    @property
    def counted_weights(self) -> dict[str, float]:
        """Of the parts that are trained on; a weight of 0 only logs."""
        return {name: weight for name, weight in self.reward_weights.items() if weight != 0}


def plan(config: Config) -> Plan:
    """Check everything that needs no model.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    validate(config)
    algo = config.algo
    kl = dict(algo.kl)
    kl_coef = kl.pop("coef", 0.0)
    if kl and not (isinstance(kl_coef, (int, float)) and kl_coef >= 0):
        raise ConfigError("algo.kl.coef", f"is {kl_coef!r}", "give a number of 0 or more")
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
        rewards=parse_reward_config(config.reward),
        problems=resolve(config.data.problems, "data.problems", positional=1, provided=("seed",)),
    )
    check_engine(config)
    try_loss(made)
    check_model(config.model.path, revision=config.model.revision)
    return made


def try_loss(made: Plan) -> None:
    """The objective on two toy completions: an argument of the wrong type shows now, not after the first rollouts."""
    import torch

    one = torch.ones(2)
    batch = Batch(
        rollouts=(),
        behavior_logprobs=-one,
        rollout_index=torch.tensor([0, 1]),
        group_index=torch.tensor([0, 0]),
        group_num_tokens=torch.tensor([2]),
        rewards=torch.tensor([0.0, 1.0]),
        part_rewards=torch.tensor([[0.0], [1.0]]).expand(2, len(made.counted_weights)),
        totals=Totals(tokens=2, rollouts=2, groups=1),
        reference_logprobs=-one,
    )
    try:
        batch = replace(batch, advantages=made.credit()(batch))
        made.loss()(TokenScores(logprobs=-one, entropy=one), batch)
    except Exception as error:
        raise ConfigError(
            "algo", f"its loss cannot be computed: {type(error).__name__}: {error}", "check the arguments under algo"
        ) from error


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


def anchor_paths(checked: Plan) -> None:
    """Write absolute paths of the user's files into the configuration, so that a run can be gone on with from anywhere."""
    algo = checked.config.algo
    for name in ("advantage", "normalise", "ratio", "objective", "kl", "aggregation"):
        if ref := getattr(checked, name):
            getattr(algo, name)["fn"] = ref.target
    for name, ref in checked.corrections.items():
        algo.correction[name]["fn"] = ref.target
    checked.config.data.problems["fn"] = checked.problems.target
    for part in checked.rewards:
        checked.config.reward[part.name]["fn"] = part.ref.target
