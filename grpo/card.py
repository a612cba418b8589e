"""The objective card: what a run trains, in the words of the functions themselves, and the arithmetic of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo.config import Config
from grpo.imports import FunctionRef
from grpo.rewards.base import RewardPart


def objective_card(config: Config, parts: Mapping[str, FunctionRef | None], rewards: Sequence[RewardPart], kl_coef: float) -> str:
    """What is trained, in the words of the functions themselves, and the arithmetic of a batch."""
    r, updates = config.rollout, config.optim.updates_per_step
    lines = [
        "# The objective of this run",
        "",
        "L = −Agg( w · J(ρ, A) )" + (f" + {kl_coef:g} · Agg( KL )" if kl_coef else ""),
        "",
    ]
    if config.algo.entropy_coef:
        lines[2] += f" − {config.algo.entropy_coef:g} · Agg( H )"
    for name, ref in parts.items():
        if ref is None:
            lines.append(f"- **{name}**: none")
            continue
        settings = ", ".join(f"{key} = {value}" for key, value in ref.kwargs.items())
        text = " ".join((ref.function().__doc__ or "(no docstring)").strip().split("\n\n")[0].split())
        lines.append(f"- **{name}** `{ref.target}`" + (f" ({settings})" if settings else "") + f": {text}")
    lines += ["- **Reward**: " + " + ".join(f"{p.weight:g} · {p.name}" for p in rewards), ""]
    total = r.problems_per_step * r.completions_per_problem
    lines.append(
        f"{total} completions a step = {r.problems_per_step} problems × {r.completions_per_problem}; {updates} optimiser update(s) a step."
    )
    if updates == 1:
        lines.append("With one update a step policy / proximal is exactly 1: nothing is clipped, and a loss near 0 is normal.")
    return "\n".join(lines) + "\n"
