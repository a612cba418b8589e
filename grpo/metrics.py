"""What a step and an evaluation are measured by: groups of rollouts → a flat dict of floats. Pure functions, stdlib only.

Names follow the field where the field agrees (``reward/mean``, ``completion/length_mean``, ``eval/pass@1``). A mean over nothing
is NaN, which the metrics file stores as null: it is not a zero.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from grpo.types import Group, Outcome, Rollout

# The reflective words the R1 paper counts over training (v2, appendix C, https://arxiv.org/abs/2501.12948).
REFLECTION_WORDS = ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check")
_REFLECTION = re.compile(rf"\b(?:{'|'.join(REFLECTION_WORDS)})\b", re.IGNORECASE)


def rollout_metrics(groups: Sequence[Group], metric: str, weights: Mapping[str, float]) -> dict[str, float]:
    """What one step's rollouts show.

    Args:
        groups: the rollouts of the step.
        metric: the reward part that says whether a completion passes (value ≥ 1).
        weights: weight of each reward part in the sum.

    Returns:
        ``reward/…``, ``outcome/<part>/<outcome>``, ``unscored/<part>/<outcome>`` and ``tag/<part>/<tag>`` (those that occurred),
        ``rollout/…``, ``completion/…``.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [rollout.reward for rollout in rollouts if rollout.scored]
    solved = [[passes(rollout, metric) for rollout in group.rollouts] for group in groups]
    return {
        "reward/mean": mean(rewards),
        "reward/std": standard_deviation(rewards),
        **_part_metrics(rollouts, weights),
        **_outcome_counts(rollouts),
        "rollout/pass_rate": mean(flag for flags in solved for flag in flags),
        "rollout/solve_all": mean(all(flags) for flags in solved),
        "rollout/solve_none": mean(not any(flags) for flags in solved),
        "rollout/groups_without_signal": mean(not has_signal(group) for group in groups),
        "rollout/unscored": float(sum(not rollout.scored for rollout in rollouts)),
        "rollout/turns_mean": mean(rollout.completion.num_turns for rollout in rollouts),
        "rollout/environment_tokens_mean": mean(len(r.completion.token_ids) - r.completion.num_sampled for r in rollouts),
        **_completion_metrics(rollouts),
    }


def eval_metrics(groups: Sequence[Group], metric: str) -> dict[str, float]:
    """What an evaluation shows: ``eval/pass@1`` (mean over problems of the mean over samples) with its interval, and the rest.

    ``eval/pass@1_ci95`` is half the width of a 95 % bootstrap interval over problems: it says how much the choice of problems
    matters, which for one sample a problem is most of the noise.
    """
    solved = [[passes(rollout, metric) for rollout in group.rollouts] for group in groups]
    by_problem = [mean(flags) for flags in solved]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    samples = min((len(flags) for flags in solved), default=0)
    metrics = {
        "eval/pass@1": mean(by_problem),
        "eval/pass@1_ci95": bootstrap_half_width(by_problem),
        "eval/problems": float(len(groups)),
        "eval/samples": float(samples),
        "eval/length_mean": mean(rollout.completion.num_sampled for rollout in rollouts),
        "eval/truncated_share": mean(rollout.completion.truncated for rollout in rollouts),
        "eval/unscored": float(sum(not rollout.scored for rollout in rollouts)),
    }
    if samples > 1:
        metrics[f"eval/pass@{samples}"] = mean(pass_at_k(len(flags), sum(flags), samples) for flags in solved)
    for part in reward_parts(rollouts):
        metrics[f"eval/reward/{part}"] = mean(part_values(rollouts, part))
    return metrics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate, from ``n`` samples of which ``c`` pass, of the chance that one of ``k`` passes.

    ``1 - C(n-c, k) / C(n, k)``, as the product ``1 - Π_{i=n-c+1..n} (1 - k/i)``, which does not overflow.
    Chen et al. 2021, https://arxiv.org/abs/2107.03374
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): needs 0 ≤ c ≤ n and 1 ≤ k ≤ n")
    if n - c < k:
        return 1.0  # fewer than k samples fail
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def bootstrap_half_width(values: Sequence[float], resamples: int = 1000, seed: int = 0) -> float:
    """Half the width of the 95 % percentile bootstrap interval of the mean; NaN without values. Seeded: the same for the same values."""
    if not values:
        return math.nan
    draw = random.Random(seed).choices
    means = sorted(sum(draw(values, k=len(values))) / len(values) for _ in range(resamples))
    return (means[int(0.975 * resamples) - 1] - means[int(0.025 * resamples)]) / 2


def passes(rollout: Rollout, metric: str) -> bool:
    """Whether the reward part ``metric`` is at least 1. An unscored completion does not pass: a broken grader must not flatter.

    Raises:
        ValueError: the rollout was not scored by such a part.
    """
    if metric not in rollout.scores:
        raise ValueError(f"eval.metric: there is no reward part {metric!r}; the parts are: {', '.join(rollout.scores) or 'none'}")
    return rollout.scores[metric].value >= 1  # NaN compares false


def has_signal(group: Group, part: str | None = None) -> bool:
    """Whether the rewards of a group (or one part of them) differ at all; only then does it move the policy. Exact equality, as the
    advantages use, of the rollouts that ``batch.collate`` keeps."""
    scored = [rollout for rollout in group.rollouts if rollout.scored and rollout.completion.num_sampled]
    rewards = [rollout.reward if part is None else rollout.scores[part].value for rollout in scored]
    return bool(rewards) and max(rewards) != min(rewards)


def reward_parts(rollouts: Iterable[Rollout]) -> list[str]:
    """Names of the reward parts, in the order of the configuration."""
    return list(dict.fromkeys(part for rollout in rollouts for part in rollout.scores))


def part_values(rollouts: Iterable[Rollout], part: str) -> list[float]:
    """What a reward part gave, before weighting, to the rollouts it could score."""
    return [r.scores[part].value for r in rollouts if part in r.scores and r.scores[part].scored]


def best_and_worst(rewards: Mapping[str, Sequence[float]]) -> list[tuple[str, int]]:
    """One good and one bad rollout to show, as (group, position in it): from the group whose rewards differ most.

    Two answers to one question say more than two answers to two; where no group has a spread, the best and the worst of all.
    Empty without a scored rollout, one entry if there is but one.
    """
    scored = {g: [(r, i) for i, r in enumerate(values) if not math.isnan(r)] for g, values in rewards.items()}
    ranked = {group: sorted(pairs, key=lambda pair: pair[0]) for group, pairs in scored.items() if pairs}
    if not ranked:
        return []
    widest = max(ranked, key=lambda group: ranked[group][-1][0] - ranked[group][0][0])
    high, low = widest, widest
    if ranked[widest][0][0] == ranked[widest][-1][0]:
        high = max(ranked, key=lambda group: ranked[group][-1][0])
        low = min(ranked, key=lambda group: ranked[group][0][0])
    best, worst = (high, ranked[high][-1][1]), (low, ranked[low][0][1])
    return [best] if best == worst else [best, worst]


def series(rows: Iterable[Mapping[str, float]], key: str) -> list[tuple[float, float]]:
    """(step, value) of one metric over a run, without the steps where it is missing or not finite."""
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def headline(rows: Sequence[Mapping[str, float]]) -> str:
    """A run in one line: ``held-out pass@1 0.12 → 0.87 in 11 min``; by the training reward if it never was evaluated."""
    for key, name in (("eval/pass@1", "held-out pass@1"), ("reward/mean", "training reward")):
        values = [value for _, value in series(rows, key)]
        if values:
            elapsed = [value for _, value in series(rows, "time/elapsed")]
            if len(values) == 1:
                return f"{name} {values[0]:.2f}"
            return f"{name} {values[0]:.2f} → {values[-1]:.2f}" + (f" in {duration(elapsed[-1])}" if elapsed else "")
    return "no step was finished"


def duration(seconds: float) -> str:
    """``45 s``, ``11 min``, ``3 h 05 min``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def standard_deviation(values: Sequence[float]) -> float:
    """Population standard deviation; NaN of nothing."""
    centre = mean(values)
    return math.sqrt(mean((value - centre) ** 2 for value in values)) if values else math.nan


def _part_metrics(rollouts: Sequence[Rollout], weights: Mapping[str, float]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for part in reward_parts(rollouts):
        value = mean(part_values(rollouts, part))
        metrics |= {f"reward/{part}/mean": value, f"reward/{part}/weighted": value * weights.get(part, 0.0)}  # 0: only kept
    return metrics


def _outcome_counts(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the model caused (it has a value) apart from what the grader failed at (it has none)."""
    outcomes = Counter(
        ("outcome" if score.scored else "unscored", part, score.outcome)
        for rollout in rollouts
        for part, score in rollout.scores.items()
        if score.outcome is not Outcome.ok
    )
    tags = Counter(("tag", part, tag) for rollout in rollouts for part, score in rollout.scores.items() for tag in score.tags)
    return {f"{kind}/{part}/{name}": float(count) for (kind, part, name), count in [*outcomes.items(), *tags.items()]}


def _completion_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths are those of what the policy sampled, in all turns together."""
    lengths = [rollout.completion.num_sampled for rollout in rollouts]
    return {
        "completion/length_mean": mean(lengths),
        "completion/length_max": float(max(lengths, default=0)),
        "completion/terminated_length_mean": mean(r.completion.num_sampled for r in rollouts if not r.completion.truncated),
        "completion/truncated_share": mean(rollout.completion.truncated for rollout in rollouts),
        "completion/reflection_words": mean(len(_REFLECTION.findall(rollout.completion.text)) for rollout in rollouts),
    }


def staleness_metrics(rollouts: Iterable[Rollout], version: int) -> dict[str, float]:
    """How many steps old the weights were that sampled the tokens which a policy of ``version`` is about to be trained on."""
    ages = [
        version - sampled_by
        for completion in (rollout.completion for rollout in rollouts)
        for sampled_by, own in zip(completion.policy_versions, completion.sampled or itertools.repeat(True), strict=False)
        if own
    ]
    return {"rollout/staleness_mean": sum(ages) / len(ages), "rollout/staleness_max": float(max(ages))} if ages else {}
