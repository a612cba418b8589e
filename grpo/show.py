"""``grpo show``: the rollouts of a run, chosen and printed for reading."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape

from grpo.config import ConfigError
from grpo.console import printable, prompt_tail, set_off
from grpo.rollout_table import parts_of
from grpo.run import RolloutFolder, RunFolder
from grpo.types import FinishReason, Outcome

Row = Mapping[str, Any]  # of a parquet file: see grpo.rollout_table


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which rollouts to print; with nothing set, in the order they were sampled."""

    step: int | None = None  # None: the last one
    folder: RolloutFolder = "rollouts"
    worst: bool = False
    best: bool = False
    problem: str = ""
    outcome: str = ""
    limit: int = 5
    whole: bool = False  # the whole prompt, not only its end


def show(run: RunFolder, choice: Choice, console: Console) -> None:
    """Print the chosen rollouts of one step, after a summary of all of them.

    Raises:
        ConfigError: no such step, problem or outcome; the message names those there are. Or there is nothing to print.
    """
    if choice.limit < 0:
        raise ConfigError("--limit", f"is {choice.limit}", "give how many rollouts to print; 0: the summary alone")
    steps = steps_of(run, choice.step, choice.folder)
    step = steps[-1]
    rows = run.read_rollouts(step, choice.folder).to_pylist()
    chosen = choose(rows, choice)
    console.print(summary(step, rows), markup=False, highlight=False)
    if choice.folder == "eval" and (best := run.read_best()):
        console.print(f"  checkpoints/best is {best}", markup=False, highlight=False)
    if not chosen:
        console.print(f"\n{nothing_found(rows, choice)}", markup=False, highlight=False)
    for row in chosen[: choice.limit]:
        _print_rollout(row, choice, console)
    if len(chosen) > choice.limit:
        console.print(f"\n… and {len(chosen) - choice.limit} more (--limit)", style="dim")


def steps_of(run: RunFolder, wanted: int | None, folder: RolloutFolder = "rollouts") -> list[int]:
    """The steps whose rollouts are stored: all, or the one wanted.

    Raises:
        ConfigError: there is none, or not this one.
    """
    steps = run.rollout_steps(folder)
    if not steps:
        raise ConfigError("run", f"{str(run.path)!r} has no {folder} yet", "let it finish a step")
    if wanted is not None and wanted not in steps:
        raise ConfigError("--step", f"there is no step {wanted} in {folder}", f"there are {_ranges(steps)}")
    return steps if wanted is None else [wanted]


def choose(rows: Sequence[Row], choice: Choice) -> list[Row]:
    """The rows asked for, in the order asked for. Unscored ones come last by --best and --worst."""
    chosen = list(rows)
    if choice.problem:
        chosen = [row for row in chosen if row["problem_id"] == choice.problem]
        if not chosen:
            known = list(dict.fromkeys(row["problem_id"] for row in rows))
            raise ConfigError("--problem", f"there is no problem {choice.problem!r} in this step", f"there are: {_some(known)}")
    if choice.outcome:
        if choice.outcome not in list(Outcome):
            raise ConfigError("--outcome", f"there is no outcome {choice.outcome!r}", f"there are: {', '.join(Outcome)}")
        chosen = [row for row in chosen if choice.outcome in {str(score.outcome) for score in parts_of(row).values()}]
    if choice.best or choice.worst:
        chosen.sort(key=_by_reward(1 if choice.worst else -1))
    return chosen


def nothing_found(rows: Sequence[Row], choice: Choice) -> str:
    """What to say where ``choose`` finds no row: the outcomes that there are."""
    where = "of this problem" if choice.problem else "in this step"
    own = choose(rows, replace(choice, outcome=""))
    found = Counter(str(score.outcome) for row in own for score in parts_of(row).values())
    there = "there are: " + ", ".join(f"{outcome} {n}" for outcome, n in found.most_common()) if found else "nothing was scored"
    return f"no completion {where} has the outcome {choice.outcome}; {there}"


def summary(step: int, rows: Sequence[Row]) -> str:
    rewards = [row["reward"] for row in rows if row["reward"] is not None and not math.isnan(row["reward"])]
    problems = len({row["problem_id"] for row in rows})
    mean = f"mean reward {math.fsum(rewards) / len(rewards):.3g}" if rewards else "none scored"
    lines = [f"step {step}: {len(rows)} completions of {problems} problems, {mean}"]
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        for part, score in parts_of(row).items():
            counts.setdefault(part, Counter())[str(score.outcome)] += 1
    lines += [f"  {part}: " + ", ".join(f"{outcome} {n}" for outcome, n in found.most_common()) for part, found in counts.items()]
    lines.append(f"  cut off by the token limit: {sum(row['finish_reason'] == FinishReason.length for row in rows)}")
    if dropped := {row["problem_id"] for row in rows if row.get("dropped")}:
        lines.append(f"  dropped by dynamic sampling, their rewards being equal: {len(dropped)} of the problems")
    return "\n".join(lines)


def _print_rollout(row: Row, choice: Choice, console: Console) -> None:
    console.rule(f"[bold]{escape(row['problem_id'])}[/bold] · completion {row['index']}", align="left")
    facts = [f"reward {number(row['reward'])}"]
    facts += [f"{part} {number(score.value)}" + _odd(str(score.outcome)) for part, score in parts_of(row).items()]
    if row.get("dropped"):
        facts.append("not trained on: group dropped, without signal")
    if row["advantage"] is not None:
        facts.append(f"advantage {row['advantage']:+.3g}")
    versions = sorted(set(row["policy_versions"]))
    facts.append(f"{_tokens(row)}, finish reason {row['finish_reason']}")
    facts += [f"weights of step {_ranges(versions)}" if versions else "no tokens", f"answer {printable(row['answer'])[:80]}"]
    console.print(" · ".join(facts), style="cyan", markup=False, highlight=False)
    prompt = printable(row["prompt"]) if choice.whole else prompt_tail(row["prompt"])
    console.print(prompt, style="dim", end="", markup=False, highlight=False)
    for text, own in pieces(row):
        console.print(printable(text) if own else set_off(printable(text)), style="" if own else "magenta", markup=False, highlight=False)
    for part, score in parts_of(row).items():
        if score.detail:
            console.print(f"{part}: {printable(score.detail)}", style="yellow" if score.outcome is not Outcome.ok else "dim", markup=False)


def pieces(row: Row) -> list[tuple[str, bool]]:
    """The completion's text in order, and whether the policy wrote each piece."""
    return [(piece["text"], piece["own"]) for piece in row.get("transcript") or ()] or [(row["completion"], True)]


def _tokens(row: Row) -> str:
    own = row.get("sampled") or ()
    others = len(own) - sum(own)
    return f"{len(row['token_ids']) - others} tokens" + (f" and {others} of the environment" if others else "")


def _by_reward(sign: int) -> Callable[[Row], tuple[bool, float]]:
    def key(row: Row) -> tuple[bool, float]:
        unscored = row["reward"] is None or math.isnan(row["reward"])
        return unscored, 0.0 if unscored else sign * row["reward"]

    return key


def _odd(outcome: str) -> str:
    return "" if outcome == Outcome.ok else f" ({outcome})"


def number(value: float | None) -> str:
    return "unscored" if value is None or math.isnan(value) else f"{value:g}"


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 → "1–3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}–{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
