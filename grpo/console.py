"""The terminal: one aligned row a step, a status line while a step is under way, sample rollouts, warnings in words.

A terminal gets colour and the live status line; anything else (a file, a pipe, CI) gets the same rows as plain text, without
control codes. Text from the model is data: control characters are shown, never obeyed, and rich markup in it is not parsed.
"""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from grpo.best import Best
from grpo.loggers import Advantages, Logger
from grpo.metrics import best_and_worst, duration, headline, mean, passes, series
from grpo.rewards.health import failures
from grpo.rollout_table import rollout_key
from grpo.run import RunFolder
from grpo.types import Group, Outcome, Rollout, Score

HEADER_EVERY = 20  # rows between two headers, and steps before a warning is repeated
MISSING = "–"
Row = Mapping[str, float]


class Terminal(Console):
    """rich's, but for a reader that has gone, such as ``head``: rich ends the process there, with status 1 and nothing saved."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # what the way out would still print
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One number of the step row. ``rank`` says how soon a narrow terminal gives it up: the highest goes first, 0 never."""

    title: str
    key: str
    width: int
    rank: int
    format: Callable[[float], str]


class ConsoleLogger(Logger):
    """Shows a run to the person who started it.

    Args:
        sample_every: steps between two tables of sample rollouts; 0: never.
        console: where to print; the default is stdout, 160 columns wide if that is no terminal.
    """

    def __init__(self, sample_every: int = 5, console: Console | None = None) -> None:
        self._console = console or Terminal(width=None if sys.stdout.isatty() else 160, highlight=False)
        self._sample_every = sample_every
        self._history: list[Row] = []  # every row of the run, those before a resume included
        self._header = ""
        self._rows_since_header = 0
        self._limit_hurts = True  # whether completions of the last step were worse for being cut off
        self._said: dict[str, int] = {}  # warning without its numbers → the step it was last printed at
        self._status: Status | None = None
        self._step = 0

    def start(self, config: Mapping[str, Any], run: RunFolder, resumed_from: int | None) -> None:
        self._run = run
        self._total_steps = int(config["run"]["steps"])
        self._eval_temperature, self._eval_metric = config["eval"]["temperature"], config["eval"]["metric"]
        self._print(Text(f"run folder {shown_path(run.path)}", style="dim"))
        if resumed_from is not None:
            self._history = [row for row in run.read_metrics() if row["step"] <= resumed_from]
            self._step = resumed_from
            self._print(Text(f"resumed after step {resumed_from}", style="bold"))
        if self._console.is_terminal:
            self._status = self._console.status("starting")
            self._status.start()

    def log(self, step: int, metrics: Row) -> None:
        self._history.append({"step": step, **metrics})
        self._step = step
        if "reward/mean" in metrics:  # a training step; an evaluation alone has no row
            self._print_row()
            self._print_warnings()
        if "eval/pass@1" in metrics:
            self._print(Text(evaluation_line(metrics, self._eval_temperature), style="bold cyan"))

    def log_rollouts(self, step: int, groups: Sequence[Group], advantages: Advantages | None = None) -> None:
        self._limit_hurts = does_limit_hurt(groups, self._eval_metric)
        for failure in failures(groups):
            self._print(Text(f"warning: {failure}", style="yellow"))
        if self._sample_every and step % self._sample_every == 0:
            samples = sample_rollouts(groups)
            if samples:
                self._console.print(sample_table(step, samples, advantages or {}))

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        if self._status is not None:
            progress = "" if done is None else f" {done}" if total is None else f" {done}/{total}"
            step = min(self._step + 1, self._total_steps)
            self._status.update(Text(f"step {step}/{self._total_steps} · {name}{progress}"))

    def note(self, text: str) -> None:
        self._print(Text(text, style="dim"))

    def finish(self, summary: Mapping[str, Any], failed: bool = False) -> None:
        if self._status is not None:
            self._status.stop()
        if (best := self._run.read_best()) and (line := best_line(best, self._history)):
            self._print(Text(line, style="dim"))
        place = self._run.report_file if self._run.report_file.is_file() else self._run.path
        stopped = f"stopped after step {self._step}; " if failed else ""
        self._print(Text(f"{stopped}{headline(self._history)}; {shown_path(place)}", style="bold red" if failed else "bold green"))

    def _print(self, text: Text) -> None:
        """A line of its own: longer than the terminal it wraps there, it is never cut or broken by us."""
        self._console.print(text, soft_wrap=True)

    def _print_row(self) -> None:
        row = self._history[-1]
        columns = step_columns(self._console.width, parts_of(row), self._total_steps)
        header = header_line(columns)
        if header != self._header or self._rows_since_header == HEADER_EVERY:
            self._print(Text(header, style="bold"))
            self._header, self._rows_since_header = header, 0
        self._rows_since_header += 1
        self._print(Text(step_line(columns, {**row, "progress/eta": self._eta()})))
        if line := time_line(columns, row):
            self._print(Text(line, style="dim"))

    def _print_warnings(self) -> None:
        for sentence in warnings(self._history, self._limit_hurts):
            kind = re.sub(r"[\d.,]+", "#", sentence)
            if self._step - self._said.get(kind, -HEADER_EVERY) >= HEADER_EVERY:
                self._said[kind] = self._step
                self._print(Text(f"warning: {sentence}", style="yellow"))

    def _eta(self) -> float:
        seconds = [value for _, value in series(self._history[-20:], "time/step")]
        return mean(seconds[-10:]) * (self._total_steps - self._step)


def step_columns(width: int, parts: Sequence[str], total_steps: int) -> list[Column]:
    """The columns of the step row that fit into ``width``, in the order they are shown."""
    columns = [
        Column(title="step", key="step", width=2 * len(str(total_steps)) + 1, rank=0, format=lambda v: f"{v:.0f}/{total_steps}"),
        Column(title="reward", key="reward/mean", width=6, rank=0, format=_decimals),
        *(Column(title=p[:10], key=f"reward/{p}/mean", width=max(5, len(p[:10])), rank=3, format=_decimals) for p in parts),
        Column(title="pass", key="rollout/pass_rate", width=5, rank=1, format=_percent),
        Column(title="length", key="completion/length_mean", width=6, rank=2, format=lambda v: f"{v:.0f}"),
        Column(title="cut", key="completion/truncated_share", width=4, rank=5, format=_percent),
        Column(title="equal", key="rollout/groups_without_signal", width=5, rank=11, format=_percent),
        Column(title="entropy", key="policy/entropy", width=7, rank=6, format=_decimals),
        Column(title="clip", key="policy/clip_share", width=5, rank=9, format=_percent),
        Column(title="k3", key="sampler/k3", width=7, rank=8, format=_scientific),
        Column(title="grad", key="policy/grad_norm", width=6, rank=7, format=_significant),
        Column(title="lr", key="policy/lr", width=7, rank=10, format=_scientific),
        Column(title="prob/s", key="throughput/problems_per_s", width=6, rank=12, format=_significant),
        Column(title="gen", key="time/generate", width=5, rank=13, format=_seconds),
        Column(title="rew", key="time/reward", width=5, rank=16, format=_seconds),
        Column(title="upd", key="time/update", width=5, rank=14, format=_seconds),
        Column(title="sync", key="time/sync", width=5, rank=15, format=_seconds),
        Column(title="ETA", key="progress/eta", width=10, rank=4, format=duration),
    ]
    while _line_width(columns) > width and any(column.rank for column in columns):
        last = max(range(len(columns)), key=lambda i: (columns[i].rank, i))
        del columns[last]
    return columns


def header_line(columns: Sequence[Column]) -> str:
    return "  ".join(column.title.rjust(column.width) for column in columns)


def step_line(columns: Sequence[Column], row: Row) -> str:
    """One step, aligned under ``header_line``; a metric that is missing or not a number shows as a dash."""
    return "  ".join(_cell(column, row.get(column.key, math.nan)).rjust(column.width) for column in columns)


def time_line(columns: Sequence[Column], row: Row) -> str:
    """Where the step's time went, for a terminal too narrow for those columns; empty if they are shown, or unknown."""
    shown = {column.key for column in columns}
    phases = [(name, f"time/{name}") for name in ("generate", "wait", "reward", "sleep", "update", "sync", "eval", "checkpoint")]
    parts = [f"{name} {_seconds(row[key])}" for name, key in phases if key in row and key not in shown]
    if not parts:
        return ""
    if "throughput/problems_per_s" in row and "throughput/problems_per_s" not in shown:
        parts.append(f"{_significant(row['throughput/problems_per_s'])} problems/s")
    return "    " + " · ".join(parts)


def evaluation_line(metrics: Row, temperature: float) -> str:
    """``held-out pass@1 0.12 ± 0.03 (128 problems, T=1.0)``, and pass@k if there were k samples."""
    line = f"held-out pass@1 {metrics['eval/pass@1']:.2f}"
    if math.isfinite(metrics.get("eval/pass@1_ci95", math.nan)):
        line += f" ± {metrics['eval/pass@1_ci95']:.2f}"
    samples = int(metrics.get("eval/samples", 1))
    if f"eval/pass@{samples}" in metrics and samples > 1:
        line += f", pass@{samples} {metrics[f'eval/pass@{samples}']:.2f}"
    problems = f"{metrics['eval/problems']:.0f} problems, " if "eval/problems" in metrics else ""
    return f"{line} ({problems}T={float(temperature)})"


def best_line(best: Best, history: Sequence[Row]) -> str:
    """Which model ``checkpoints/best`` is, for the end of a run; "" if that of the last row. It may be of steps that were discarded.

    The row of its step may have another score: killed between the two, a run evaluates again, and not every engine to the same bits.
    """
    scores = {row["step"]: row["eval/pass@1"] for row in history if "eval/pass@1" in row}
    if scores.get(best.step) == best.score and history[-1]["step"] == best.step:
        return ""
    return f"checkpoints/best is {best}" + ("" if best.step in scores else ", made before this run went back to an earlier checkpoint")


def does_limit_hurt(groups: Sequence[Group], metric: str) -> bool:
    """Whether the token limit is in the way: what it cuts off never passes, or less often than what ended.

    Where the limit is the length of an answer, as one token for one digit, nearly all is cut off, and as it should be.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    cut_off, ended = ([passes(r, metric) for r in rollouts if r.completion.truncated is cut] for cut in (True, False))
    return not any(cut_off) or mean(cut_off) < mean(ended)  # false of NaN: nothing ended


def warnings(history: Sequence[Row], limit_hurts: bool = True) -> list[str]:
    """What the last training steps say is wrong, in words, with the remedy.

    Args:
        history: rows of metrics.
        limit_hurts: whether completions of the last step are worse for being cut off.
    """
    steps = [row for row in history[-20:] if "reward/mean" in row]
    if not steps:
        return []
    last = steps[-1]
    found = []
    if limit_hurts and last.get("completion/truncated_share", 0) > 0.5:
        at = f" at {last['completion/length_max']:.0f} tokens" if "completion/length_max" in last else ""
        found.append(f"{_percent(last['completion/truncated_share'])} of completions were cut off{at}: raise rollout.max_new_tokens")
    if len(steps) >= 5 and all(row.get("rollout/groups_without_signal") == 1 for row in steps[-5:]):
        found.append(
            "every group had equal rewards for 5 steps, so nothing is learned: use problems the model solves sometimes, "
            "more rollout.completions_per_problem, or a reward that tells its answers apart"
        )
    if last.get("sampler/k3", 0) > 0.1:
        found.append(
            f"mismatch k3 is {last['sampler/k3']:.2g}, above 0.1: sampler and trainer disagree about the log-probs; check precision and "
            "weight sync, or set algo.correction"
        )
    if last.get("rollout/unscored", 0) > 0:
        found.append(f"{last['rollout/unscored']:.0f} completions could not be scored: see the detail columns in the run's rollouts folder")
    if any(not math.isfinite(last[key]) for key in ("policy/loss", "policy/grad_norm") if key in last):
        found.append("the loss or its gradient is not finite: lower optim.lr, or train in fp32 (model.precision=fp32)")
    return found


def sample_rollouts(groups: Sequence[Group]) -> list[Rollout]:
    """One good and one bad rollout of a step."""
    rollouts = {group.problem.id: group.rollouts for group in groups}
    chosen = best_and_worst({problem: [r.reward for r in members] for problem, members in rollouts.items()})
    return [rollouts[problem][position] for problem, position in chosen]


def sample_table(step: int, rollouts: Sequence[Rollout], advantages: Advantages) -> Table:
    """The rollouts beside their scores, for reading."""
    table = Table(title=f"samples of step {step}", title_justify="left", show_header=False, show_lines=True, expand=True)
    table.add_column(width=20, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    for rollout in rollouts:
        advantage = advantages.get(rollout_key(rollout))
        lines = [f"reward {rollout.reward:g}", *(_shown_score(part, score) for part, score in rollout.scores.items())]
        lines += [f"answer {clip(rollout.problem.answer, 40)}"]
        lines += [] if advantage is None else [f"advantage {advantage:+.2f}"]
        lines += [f"{rollout.completion.num_sampled} tokens" + (", cut off" if rollout.completion.truncated else "")]
        text = Text(prompt_tail(rollout.problem.prompt) + "\n", style="dim")
        for piece, own in rollout.completion.transcript or ((rollout.completion.text, True),):
            said = clip(printable(piece), 700)
            text.append(said if own else f"\n{set_off(said)}\n", style="not dim" if own else "magenta")
        table.add_row(Text(printable("\n".join(lines))), text)
    return table


def set_off(text: str) -> str:
    """What an environment said, with a bar before each line."""
    return "\n".join(f"│ {line}" for line in text.strip("\n").split("\n"))


def printable(text: str) -> str:
    """Text with control and other invisible characters as escapes, line breaks kept: ``\\x1b[2J`` must not clear a screen."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def prompt_tail(prompt: str, lines: int = 2, characters: int = 300) -> str:
    """The end of a prompt, where the question stands; templates open with the same words every time."""
    tail = "\n".join([line for line in prompt.splitlines() if line.strip()][-lines:])
    return printable(tail if len(tail) <= characters else "… " + tail[-characters:])


def clip(text: str, characters: int) -> str:
    """The first two thirds and the last third of a text that is too long; the answer stands at the end."""
    if len(text) <= characters:
        return text
    head, tail = characters * 2 // 3, characters // 3
    return f"{text[:head]} … {len(text) - head - tail:,} characters … {text[-tail:]}"


def parts_of(row: Row) -> list[str]:
    """Names of the reward parts in a row of metrics."""
    return [key.split("/")[1] for key in row if key.startswith("reward/") and key.endswith("/mean") and key.count("/") == 2]


def shown_path(path: Path) -> str:
    """Relative to the working directory where it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _cell(column: Column, value: float) -> str:
    if math.isnan(value):
        return MISSING
    return column.format(value) if math.isfinite(value) else "inf"


def _shown_score(part: str, score: Score) -> str:
    return f"{part} {score.value:g}" + ("" if score.outcome is Outcome.ok else f" ({score.outcome})")


def _line_width(columns: Sequence[Column]) -> int:
    return sum(column.width for column in columns) + 2 * (len(columns) - 1)


def _decimals(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value == 0 or value >= 0.01 else f"{100 * value:.1f} %"


def _significant(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _scientific(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _seconds(value: float) -> str:
    return f"{value:.1f}s" if value < 99.95 else f"{value:.0f}s"
