"""The objective card: the formula that a run trains, with the numbers in it, where each term is from, and the batch in words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from grpo.config import Anchor, CombineRewards, KLPlace
from grpo.imports import FunctionRef
from grpo.notation import formula, source
from grpo.plan import WITHIN_GROUP, Plan


def objective_card(plan: Plan) -> str:
    """Markdown, for the terminal and for ``objective.md`` in the run folder."""
    lines = ["# The objective of this run", "", "```", *_aligned(_equations(plan)), "```", "", "Where each term is from:", ""]
    lines += [f"- {name}: `{ref.target}` – {_origin(ref)}" for name, ref in _components(plan)]
    lines += ["", "The batch:", "", *(f"- {sentence}" for sentence in _batch(plan))]
    return "\n".join(lines) + "\n"


def _equations(plan: Plan) -> Iterator[tuple[str, str]]:
    """(left side, right side) of the loss and of everything that stands in it."""
    algo = plan.config.algo
    anchor = "π_behav" if algo.anchor is Anchor.behavior else "π_prox"
    aggregate = _formula(plan.aggregation)
    weight = " · ".join(f"w_{name}" for name in plan.corrections)
    objective = _formula(plan.objective, anchor)
    loss = f"− {aggregate} [ " + (f"{weight} · ( {objective} )" if weight else objective) + " ]"
    in_loss = plan.kl is not None and plan.kl_coef != 0 and algo.kl_in is KLPlace.loss
    if in_loss:
        loss += f" + {plan.kl_coef:g} · {aggregate} [ KL ]"
    if algo.entropy_coef:
        loss += f" − {algo.entropy_coef:g} · {aggregate} [ H ]"
    yield "L(θ)", loss
    yield "ρ", _formula(plan.ratio, anchor)
    for name, ref in plan.corrections.items():
        yield f"w_{name}", _formula(ref, anchor) + "   (not differentiated)"
    if plan.kl is not None and plan.kl_coef:
        yield "KL", _formula(plan.kl, anchor) if in_loss else _formula(plan.kl, "π_behav").replace("π_θ", "π_behav")
    if algo.entropy_coef:
        yield "H", "entropy of π_θ(· | q, o_<t), in nats"
    yield from _credit(plan)
    counted = [part for part in plan.rewards if part.weight]
    if algo.combine_rewards is CombineRewards.after:
        yield "r_k, w_k", ", ".join(f"{part.name} with w = {part.weight:g}" for part in counted)
    else:
        yield "r", " + ".join(f"{part.weight:g} · {part.name}" for part in counted) or "0"


def _credit(plan: Plan) -> Iterator[tuple[str, str]]:
    algo = plan.config.algo
    advantage = _formula(plan.advantage)
    if algo.combine_rewards is CombineRewards.after:
        of_a_part = advantage.replace("rᵢ", "rᵢₖ").replace("(r)", "(r_k)").replace("(r of", "(r_k of")
        advantage = f"Σ_k w_k · [ {of_a_part} ] over the reward parts k"
    kl_in_reward = plan.kl is not None and plan.kl_coef and algo.kl_in is KLPlace.reward
    name = "Aᵢ" if kl_in_reward or plan.normalise else "A"
    yield name, advantage
    if kl_in_reward:
        yield "Aₜ" if plan.normalise else "A", f"Aᵢ − {plan.kl_coef:g} · Σ_{{s ≥ t}} KL_s"
    if plan.normalise:
        yield "A", _formula(plan.normalise) if kl_in_reward else _formula(plan.normalise).replace("Aₜ", "Aᵢ")


def _components(plan: Plan) -> Iterator[tuple[str, FunctionRef]]:
    yield "advantage", plan.advantage
    if plan.normalise:
        yield "normalisation", plan.normalise
    yield "ratio", plan.ratio
    yield "objective", plan.objective
    for name, ref in plan.corrections.items():
        yield f"sampler correction {name}", ref
    if plan.kl is not None:
        yield "KL", plan.kl
    yield "aggregation", plan.aggregation


def _batch(plan: Plan) -> Iterator[str]:
    """The arithmetic of a step in words: only what is true of these settings."""
    config, algo = plan.config, plan.config.algo
    problems, samples, updates = config.rollout.problems_per_step, config.rollout.completions_per_problem, config.optim.updates_per_step
    total = problems * samples
    replaced = config.rollout.sampling_rounds > 1
    yield f"{'Up to ' if replaced else ''}{total} completions a step = {problems} problems × {samples}; {_updates(plan)}."
    if replaced:
        yield (
            f"Groups without signal are replaced by further problems in up to {config.rollout.sampling_rounds} rounds: a step may sample "
            f"more than {total} completions; all are stored, and the reward metrics are of all."
        )
    yield from _ratio_in_words(plan)
    yield from _corrections_in_words(plan)
    if config.rollout.max_staleness:
        yield _staleness_in_words(plan)
    if config.rollout.temperature != 1:
        yield f"π_θ, π_ref and all other log-probs are those at temperature {config.rollout.temperature:g}."
    yield from _truncation_in_words(plan)
    if _loss_near_zero(plan):
        yield "The advantages of a group sum to 0 and every completion counts the same: a loss value near 0 is normal."
    else:
        yield "The loss value depends on how long completions are and says nothing of progress: watch the reward and the gradient norm."
    if algo.mask_truncated:
        yield "Completions cut off by the token limit are compared with, but take no part in the loss nor in its denominators."
    if plan.kl is not None and plan.kl_coef:
        yield _reference_in_words(algo.reference_refresh, updates)
    elif plan.kl is not None:
        yield "The KL coefficient is 0: no reference model is loaded."


def _updates(plan: Plan) -> str:
    problems, samples = plan.config.rollout.problems_per_step, plan.config.rollout.completions_per_problem
    updates = plan.config.optim.updates_per_step
    if updates == 1:
        return f"one optimiser update of all {problems * samples}"
    low, extra = divmod(problems, updates)
    sizes = f"{low * samples}" if not extra else f"{low * samples} or {(low + 1) * samples}"
    return f"{updates} optimiser updates of {sizes} (whole groups)"


def _ratio_in_words(plan: Plan) -> Iterator[str]:
    updates = plan.config.optim.updates_per_step
    unbounded = plan.objective.target in ("grpo.objectives.policy_gradient", "grpo.objectives.sapo")
    if plan.config.algo.anchor is Anchor.behavior:
        acts = "" if unbounded else ": its bounds act on the sampler's mismatch too, from the first update on"
        yield f"ρ compares with the engine's own log-probs{acts}."
    elif updates == 1:
        binds = "" if unbounded else ", and no bound on it can bind"
        yield f"One update a step: π_prox is π_θ itself, so ρ is exactly 1{binds}."
    else:
        acts = "" if unbounded else "; its bounds act from the second on"
        yield f"π_prox is the policy at the start of the step: ρ is 1 in the first of {updates} updates{acts}."


def _corrections_in_words(plan: Plan) -> Iterator[str]:
    if not plan.corrections and plan.config.algo.anchor is Anchor.proximal:
        yield "Nothing corrects for the difference between the engine's log-probs and the trainer's; `sampler/k3` shows how large it is."
    for name, ref in plan.corrections.items():
        cap = _arguments(ref).get("cap")
        does = f"is truncated at {cap:g}" if isinstance(cap, int | float) else "weighs the objective"
        yield f"w_{name}, for the difference between the engine's log-probs and the trainer's, {does}."


def _truncation_in_words(plan: Plan) -> Iterator[str]:
    rollout = plan.config.rollout
    settings = (("min-p", rollout.min_p, 0), ("top-k", rollout.top_k, 0), ("top-p", rollout.top_p, 1))  # as they are applied
    if cuts := " and ".join(f"{name} {value:g}" for name, value, off in settings if value != off):
        yield (
            f"π_θ, π_ref and all other log-probs, the entropy and the KL are taken over the tokens that {cuts} left to choose from "
            "when the token was sampled: the engine reports them (keep-sampling-mask, DeepSeek-V3.2)."
        )


def _staleness_in_words(plan: Plan) -> str:
    k = plan.config.rollout.max_staleness
    corrects = plan.corrections or plan.config.algo.anchor is Anchor.behavior
    then = "each token is compared with the log-prob it was sampled with" if corrects else "nothing corrects for that"
    return (
        f"Sampling runs ahead by up to {k} step{'s' if k > 1 else ''}: tokens may be sampled by weights as many steps old, one "
        f"completion by several versions; {then}."
    )


def _reference_in_words(refresh: int, updates: int) -> str:
    if not refresh:
        return "π_ref is the model the run started from."
    steps = f", that is, every {refresh // updates} steps" if refresh % updates == 0 else ""
    return f"π_ref becomes the policy every {refresh} optimiser updates{steps}."


def _loss_near_zero(plan: Plan) -> bool:
    """Whether the loss is Σ of each group's advantages, each counted the same: 0 but for the corrections."""
    config, algo = plan.config, plan.config.algo
    return (
        plan.advantage.target in WITHIN_GROUP
        and plan.normalise is None
        and plan.aggregation.target == "grpo.aggregation.sequence_mean"
        and plan.objective.target in ("grpo.objectives.clipped_surrogate", "grpo.objectives.policy_gradient")
        and all(ref.target == "grpo.corrections.truncated_importance" for ref in plan.corrections.values())
        and config.optim.updates_per_step == 1
        and not config.rollout.max_staleness
        and algo.anchor is Anchor.proximal
        and not (plan.kl is not None and plan.kl_coef)
        and not algo.entropy_coef
        and not algo.mask_truncated
    )


def _formula(ref: FunctionRef, anchor: str = "π_prox") -> str:
    text = formula(ref.function(), ref.kwargs)
    if text is None:
        arguments = ", ".join(f"{key} = {value}" for key, value in _arguments(ref).items())
        text = f"{ref.target.rpartition('.')[2].rpartition(':')[2]}({arguments or '·'})"
    return text.replace("π_{anchor}", anchor).replace("π_prox", anchor)


def _arguments(ref: FunctionRef) -> dict[str, Any]:
    """The arguments a component is called with, its own defaults among them."""
    defaults = {p.name: p.default for p in inspect.signature(ref.function()).parameters.values() if p.default is not p.empty}
    return defaults | dict(ref.kwargs)


def _origin(ref: FunctionRef) -> str:
    function = ref.function()
    if found := source(function):
        return found
    return " ".join((function.__doc__ or "a function of yours, without a docstring").strip().split("\n\n")[0].split())


def _aligned(equations: Iterator[tuple[str, str]]) -> list[str]:
    rows = list(equations)
    width = max(len(left) for left, _ in rows)
    return [f"{left.ljust(width)} = {right}" for left, right in rows]
