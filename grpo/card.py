"""The objective card: the formula that a run trains, with the numbers in it, where each term is from, and the batch in words."""

from __future__ import annotations

from collections.abc import Iterator

from grpo.config import Anchor, CombineRewards, KLPlace
from grpo.imports import FunctionRef
from grpo.notation import formula, source
from grpo.plan import Plan


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
    yield "r", " + ".join(f"{part.weight:g} · {part.name}" for part in plan.rewards if part.weight) or "0"


def _credit(plan: Plan) -> Iterator[tuple[str, str]]:
    algo = plan.config.algo
    advantage = _formula(plan.advantage)
    if algo.combine_rewards is CombineRewards.after:
        advantage = "Σ_k w_k · [ " + advantage.replace("rᵢ", "rᵢₖ").replace("(r)", "(r_k)") + " ] over the reward parts k"
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
    yield f"{total} completions a step = {problems} problems × {samples}; {_updates(problems, samples, updates)}."
    behavior = algo.anchor is Anchor.behavior
    if updates == 1 and not behavior:
        yield "One update a step: π_prox is π_θ itself, so ρ is exactly 1; no clip bound and no mask on ρ can bind."
    elif updates > 1 and not behavior:
        yield f"π_prox is the policy at the start of the step: ρ is 1 in the first of {updates} updates, clipping acts from the second on."
    elif behavior:
        yield "ρ compares with the engine's own log-probs: its bounds act on the sampler's mismatch too, from the first update on."
    if plan.corrections and not behavior:
        yield "The engine's log-probs differ a little from the trainer's (another numeric path): the corrections above weigh that."
    elif not plan.corrections and not behavior:
        yield "Nothing corrects for the difference between the engine's log-probs and the trainer's; `sampler/k3` shows how large it is."
    if config.rollout.sampling_rounds > 1:
        yield (
            f"Groups without signal are replaced by further problems in up to {config.rollout.sampling_rounds} rounds: a step may sample "
            f"more than {total} completions; all are stored, and the reward metrics are of all."
        )
    if samples == 1:
        yield "Groups of one: an advantage that compares within the group is always 0."
    if _centred(plan):
        yield "The advantages of a group sum to 0, so a loss value near 0 is normal: watch the reward and the gradient norm."
    if algo.mask_truncated:
        yield "Completions cut off by the token limit are compared with, but take no part in the loss nor in its denominators."
    if plan.kl is not None and plan.kl_coef:
        if algo.reference_refresh:
            every = algo.reference_refresh / updates
            yield f"π_ref becomes the policy every {algo.reference_refresh} optimiser updates, that is, every {every:g} steps."
        else:
            yield "π_ref is the model the run started from."
    elif plan.kl is not None:
        yield "The KL coefficient is 0: no reference model is loaded."


def _updates(problems: int, samples: int, updates: int) -> str:
    if updates == 1:
        return f"one optimiser update of all {problems * samples}"
    low, extra = divmod(problems, updates)
    sizes = f"{low * samples}" if not extra else f"{low * samples} or {(low + 1) * samples}"
    return f"{updates} optimiser updates of {sizes} (whole groups)"


def _centred(plan: Plan) -> bool:
    """Whether the advantages of every group sum to 0 by construction, in an objective that is about A where ρ is about 1."""
    if plan.objective.target == "grpo.objectives.cispo":  # A · log π
        return False
    names = {f"grpo.advantages.{name}" for name in ("group_norm", "center", "leave_one_out", "max_rl")}
    kl_in_reward = plan.kl is not None and plan.kl_coef and plan.config.algo.kl_in is KLPlace.reward
    return plan.advantage.target in names and not plan.normalise and not kl_in_reward


def _formula(ref: FunctionRef, anchor: str = "π_prox") -> str:
    text = formula(ref.function(), ref.kwargs)
    if text is None:
        arguments = ", ".join(f"{key} = {value}" for key, value in ref.kwargs.items())
        text = f"{ref.target.rpartition('.')[2].rpartition(':')[2]}({arguments or '·'})"
    return text.replace("π_{anchor}", anchor).replace("π_prox", anchor if anchor == "π_behav" else "π_prox")


def _origin(ref: FunctionRef) -> str:
    function = ref.function()
    if found := source(function):
        return found
    return " ".join((function.__doc__ or "a function of yours, without a docstring").strip().split("\n\n")[0].split())


def _aligned(equations: Iterator[tuple[str, str]]) -> list[str]:
    rows = list(equations)
    width = max(len(left) for left, _ in rows)
    return [f"{left.ljust(width)} = {right}" for left, right in rows]
