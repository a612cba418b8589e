"""The objective card: the formula that a run trains, with the numbers in it, where each term is from, and the batch in words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from grpo.config import Anchor, CombineRewards, KLPlace
from grpo.imports import FunctionRef
from grpo.notation import formula, number, source
from grpo.plan import WITHIN_GROUP, Plan

BOUNDED = {f"grpo.objectives.{name}" for name in ("clipped_surrogate", "cispo", "dppo_tv", "dppo_kl")}
A_WHERE_RHO_IS_1 = {f"grpo.objectives.{name}" for name in ("clipped_surrogate", "policy_gradient", "dppo_tv", "dppo_kl")}
EVERY_TOKEN_ALIKE = {f"grpo.aggregation.{name}" for name in ("token_mean", "sequence_sum", "constant_length")}
LONGER_COUNTS_MORE = EVERY_TOKEN_ALIKE | {"grpo.aggregation.group_mean"}


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
    in_loss = _kl_is_in(plan, KLPlace.loss)
    if in_loss:
        loss += f" + {number(plan.kl_coef)} · {aggregate} [ KL ]"
    if algo.entropy_coef:
        loss += f" − {number(algo.entropy_coef)} · {aggregate} [ H ]"
    yield "L(θ)", loss
    yield "ρ", _formula(plan.ratio, anchor)
    for name, ref in plan.corrections.items():
        yield f"w_{name}", _formula(ref, anchor) + "   (not differentiated)"
    if plan.kl is not None and plan.kl_coef:
        yield "KL", _formula(plan.kl, anchor) if in_loss else _formula(plan.kl, "π_behav").replace("π_θ", "π_behav")
    if algo.entropy_coef:
        yield "H", "entropy of π_θ(· | q, o_<t), in nats"
    yield from _credit(plan)
    weights = plan.counted_weights.items()
    if algo.combine_rewards is CombineRewards.after:
        yield "r_k, w_k", ", ".join(f"{name} with w = {number(w)}" for name, w in weights) or "none: no score has a weight"
    else:
        yield "r", " + ".join(f"{number(w)} · {name}" for name, w in weights) or "0: no score has a weight"


def _credit(plan: Plan) -> Iterator[tuple[str, str]]:
    algo = plan.config.algo
    advantage = _formula(plan.advantage)
    if algo.combine_rewards is CombineRewards.after:
        of_a_part = advantage.replace("rᵢ", "rᵢₖ").replace("(r)", "(r_k)").replace("(r of", "(r_k of")
        advantage = f"Σ_k w_k · [ {of_a_part} ] over the reward parts k"
    kl_in_reward = _kl_is_in(plan, KLPlace.reward)
    name = "Aᵢ" if kl_in_reward or plan.normalise else "A"
    yield name, advantage
    if kl_in_reward:
        yield "Aₜ" if plan.normalise else "A", f"Aᵢ − {number(plan.kl_coef)} · Σ_{{s ≥ t}} KL_s"
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
            f"more than it trains on; all are stored, and the reward metrics are of all."
        )
    yield from _ratio_in_words(plan)
    yield from _corrections_in_words(plan)
    if config.rollout.max_staleness:
        yield _staleness_in_words(plan)
    if config.rollout.temperature != 1:
        yield f"π_θ, π_ref and all other log-probs are those at temperature {number(config.rollout.temperature)}."
    yield from _truncation_in_words(plan)
    yield _loss_value_in_words(plan)
    if algo.mask_truncated:
        compared = plan.advantage.target in WITHIN_GROUP or _whitens(plan)
        but = "are compared with, but " if compared else ""
        yield f"Completions cut off by the token limit {but}take no part in the loss nor in its denominators."
    if plan.kl is not None and plan.kl_coef:
        yield _reference_in_words(algo.reference_refresh, updates)
    elif plan.kl is not None:
        yield "The KL coefficient is 0: no reference model is loaded."


def _updates(plan: Plan) -> str:
    config, samples = plan.config, plan.config.rollout.completions_per_problem
    problems, updates = config.rollout.problems_per_step, config.optim.updates_per_step
    masked, may_be_fewer = config.algo.mask_truncated, config.rollout.sampling_rounds > 1
    if updates == 1:
        which = "that were not cut off" if masked else "of them" if may_be_fewer else f"{problems * samples}"
        return f"one optimiser update of all {which}"
    low, extra = divmod(problems, updates)
    most = (low + bool(extra)) * samples
    sizes = f"up to {most}" if masked or may_be_fewer else f"{low * samples} or {most}" if extra else f"{most}"
    return f"{updates} optimiser updates of {sizes} (whole groups{', less what was cut off' if masked else ''})"


def _ratio_in_words(plan: Plan) -> Iterator[str]:
    updates, bounded = plan.config.optim.updates_per_step, plan.objective.target in BOUNDED
    if plan.config.algo.anchor is Anchor.behavior:
        acts = ": its bounds act on the sampler's mismatch too, from the first update on" if bounded else ""
        yield f"ρ compares with the engine's own log-probs{acts}."
    elif not _known_ratio(plan):
        yield "One update a step: π_prox is π_θ itself." if updates == 1 else "π_prox is the policy at the start of the step."
    elif updates == 1:
        binds = ", and no bound on it can bind" if bounded else ""
        yield f"One update a step: π_prox is π_θ itself, so ρ is exactly 1{binds}."
    else:
        acts = "; its bounds act from the second on" if bounded else ""
        yield f"π_prox is the policy at the start of the step: ρ is 1 in the first of {updates} updates{acts}."


def _corrections_in_words(plan: Plan) -> Iterator[str]:
    if not plan.corrections and plan.config.algo.anchor is Anchor.proximal:
        yield "Nothing corrects for the difference between the engine's log-probs and the trainer's; `sampler/k3` shows how large it is."
    for name, ref in plan.corrections.items():
        ours = ref.target.startswith("grpo.corrections.")  # what cap means in another's function is not known
        cap = _arguments(ref).get("cap") if ours else None
        does = "weighs the objective" if cap is None else f"is truncated at {number(cap)}"
        yield f"w_{name}, for the difference between the engine's log-probs and the trainer's, {does}."


def _truncation_in_words(plan: Plan) -> Iterator[str]:
    rollout = plan.config.rollout
    settings = (("min-p", rollout.min_p, 0), ("top-k", rollout.top_k, 0), ("top-p", rollout.top_p, 1))  # as they are applied
    if cuts := " and ".join(f"{name} {number(value)}" for name, value, off in settings if value != off):
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
    becomes = f"π_ref becomes the policy every {_many(refresh, 'optimiser update')}"
    if refresh % updates:
        return f"{becomes}; its log-probs are taken once a step, so a refresh within a step acts from the next step on."
    return f"{becomes}, that is, every {_many(refresh // updates, 'step')}."


def _many(count: int, what: str) -> str:
    return what if count == 1 else f"{count} {what}s"


def _loss_value_in_words(plan: Plan) -> str:
    if why := _why_advantages_cancel(plan):
        terms = [*(["KL"] if _kl_is_in(plan, KLPlace.loss) else []), *(["entropy"] if plan.config.algo.entropy_coef else [])]
        rest = f"the loss value is about that of its {' and '.join(terms)} term{'s' * (len(terms) - 1)} alone"
        return f"{why}: {rest if terms else 'a loss value near 0 is normal'}."
    if _loss_depends_on_lengths(plan):
        return "The loss value depends on how long completions are: watch the reward and the gradient norm instead."
    return "Watch the reward and the gradient norm, not the loss value."


def _why_advantages_cancel(plan: Plan) -> str:
    """Why −Agg[ w · J ] is 0 but for the sampler's mismatch: J is A, and the A that are added up sum to 0. Empty where it is not."""
    config, algo = plan.config, plan.config.algo
    rho_is_1 = _known_ratio(plan) and algo.anchor is Anchor.proximal and config.optim.updates_per_step == 1
    weights_near_1 = not config.rollout.max_staleness and all(
        ref.target == "grpo.corrections.truncated_importance" for ref in plan.corrections.values()
    )
    if not (rho_is_1 and weights_near_1 and plan.objective.target in A_WHERE_RHO_IS_1) or algo.mask_truncated:
        return ""
    if _whitens(plan) and plan.aggregation.target in EVERY_TOKEN_ALIKE:
        return "The whitened advantages of all tokens sum to 0 and every token counts the same"
    by_rollout = plan.normalise is None and not _kl_is_in(plan, KLPlace.reward)
    if by_rollout and plan.advantage.target in WITHIN_GROUP and plan.aggregation.target == "grpo.aggregation.sequence_mean":
        return "The advantages of a group sum to 0 and every completion counts the same"
    return ""


def _loss_depends_on_lengths(plan: Plan) -> bool:
    """Whether it surely does: what a function of the user's own does with lengths is not known."""
    return (
        plan.aggregation.target in LONGER_COUNTS_MORE
        and plan.normalise is None
        and plan.config.rollout.completions_per_problem > 1  # a group's mean over one completion is that completion's
        and all(ref.target.startswith("grpo.") for _, ref in _components(plan))
    )


def _known_ratio(plan: Plan) -> bool:
    """Whether ρ is 1 where the policy is the anchor, as for all of ours."""
    return plan.ratio.target.startswith("grpo.ratios.")


def _whitens(plan: Plan) -> bool:
    return plan.normalise is not None and plan.normalise.target == "grpo.advantages.whiten"


def _kl_is_in(plan: Plan, place: KLPlace) -> bool:
    return plan.kl is not None and plan.kl_coef != 0 and plan.config.algo.kl_in is place


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
