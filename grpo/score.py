"""The work of ``grpo score``: a file of completions in, the same rows with their scores out; or two graders side by side.

The file is read, scored and written in chunks, so that its size does not matter. Rewards run as they do in training: in worker
processes, with the same limits.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from grpo.completion_file import Columns, Row, chunks, read_rows, written
from grpo.config import ConfigError
from grpo.rewards.base import RewardPart
from grpo.rewards.named import parse_reward
from grpo.rewards.runtime import Judgement, RewardRuntime
from grpo.types import Outcome, Score

CHUNK_ROWS = 2_048  # scored at a time: what a batch function sees at most
_ADDED = ("score", "outcome", "extracted", "seconds")
_LISTED = 20  # bad rows, wrong golds and disagreements that are printed; all are counted


def added_columns(judgement: Judgement | None, prefix: str) -> dict[str, Any]:
    """What a row gains. A row that could not be judged is ``invalid``; a failure's message is its ``detail``."""
    if judgement is None:
        return dict(zip((prefix + name for name in _ADDED), (None, str(Outcome.invalid), None, None), strict=True))
    score = judgement.score
    added = {
        f"{prefix}score": score.value if score.scored else None,
        f"{prefix}outcome": str(score.outcome),
        f"{prefix}extracted": (score.detail or None) if score.scored else None,
        f"{prefix}seconds": round(judgement.seconds, 6),
    }
    return added if score.scored else added | {f"{prefix}detail": score.detail}


# ---- what is reported ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Tally:
    """What one reward gave to all rows."""

    scored: int = 0
    total: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)  # "unscored …" for failures of the grader
    seconds: array[float] = field(default_factory=lambda: array("d"))

    def add(self, judgement: Judgement) -> None:
        score = judgement.score
        self.outcomes[str(score.outcome) if score.scored else f"unscored ({score.outcome})"] += 1
        self.seconds.append(judgement.seconds)
        if score.scored:
            self.scored += 1
            self.total += score.value

    def __str__(self) -> str:
        if not self.seconds:
            return "nothing was scored"
        mean = f"mean {self.total / self.scored:.4f}" if self.scored else "no score"
        counts = ", ".join(f"{name} {count:,}" for name, count in self.outcomes.most_common())
        ordered = sorted(self.seconds)
        p99 = ordered[min(math.ceil(0.99 * len(ordered)), len(ordered)) - 1]
        busy = sum(ordered)
        speed = f"{len(ordered) / busy:,.0f} rows/s a worker, " if busy > 0 else ""
        return (
            f"{mean} · {counts}\n  {speed}median {_milliseconds(statistics.median(ordered))}, p99 {_milliseconds(p99)}, "
            f"longest {_milliseconds(ordered[-1])}"
        )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


@dataclass(kw_only=True)
class Listed:
    """Messages of which the first are printed, and the rest counted."""

    show: Callable[[str], None]
    count: int = 0

    def add(self, message: str) -> None:
        self.count += 1
        if self.count <= _LISTED:
            self.show(message)

    def end(self, what: str) -> None:
        if self.count > _LISTED:
            self.show(f"  … and {self.count - _LISTED:,} more {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of ``grpo score``."""

    file: Path
    reward: str
    out: Path | None = None
    completion_key: str = "completion"
    gold_key: str | None = None  # None: "gold", or none for a reward that compares with nothing
    prompt_key: str = "prompt"
    gold: bool = False
    gold_template: str | None = None
    compare: str | None = None
    workers: int = 0
    prefix: str = ""


class Report:
    """What the rows of a file came to.

    Args:
        task: what was asked for.
        parts: the reward, and what it is compared with, if anything.
        print_out: takes what was found out.
        print_error: takes the messages about bad rows, as they are met.
    """

    def __init__(
        self, task: Task, parts: Sequence[RewardPart], print_out: Callable[[str], None], print_error: Callable[[str], None]
    ) -> None:
        self._task = task
        self._names = [part.name for part in parts]
        self._print = print_out
        self._tallies = {name: Tally() for name in self._names}
        self._pairs: Counter[tuple[str, ...]] = Counter()
        self._bad = Listed(show=print_error)
        self._wrong_golds = Listed(show=print_out)
        self._disagreements = Listed(show=print_out)

    def add(self, row: Row) -> None:
        if row.fault:
            self._bad.add(f"{self._task.file}, line {row.number} {row.fault}")
            return
        scores = [row.judged[name].score for name in self._names]
        for name, judgement in row.judged.items():
            self._tallies[name].add(judgement)
        gold = f"  line {row.number}: gold {_short(row.problem.answer if row.problem else '')}"
        if self._task.gold and scores[0].value != 1:
            self._wrong_golds.add(f"{gold} scores {_said(scores[0])}")
        values = tuple(map(_value, scores))
        self._pairs[values] += 1
        if len(set(values)) > 1:
            self._disagreements.add(f"{gold}: " + ", ".join(f"{n} {_said(s)}" for n, s in zip(self._names, scores, strict=True)))

    def end(self, seconds: float) -> int:
        """Print the rest; the exit status."""
        num_rows = sum(self._pairs.values())
        self._bad.end("bad rows")
        self._wrong_golds.end("gold answers")
        self._disagreements.end("disagreements")
        self._print(f"{num_rows:,} rows in {seconds:.1f} s" + (f", {self._bad.count:,} bad rows left unscored" if self._bad.count else ""))
        for name, tally in self._tallies.items():
            self._print(f"{name}: {tally}")
        if len(self._names) > 1:
            self._print(self._crosstab())
        wrong = self._wrong_golds.count
        if self._task.gold:
            self._print(
                f"{wrong:,} of {num_rows:,} gold answers do not score 1"
                if wrong or not num_rows
                else f"all {num_rows:,} gold answers score 1"
            )
        return int(self._bad.count > 0 or wrong > 0 or (self._task.gold and not num_rows))

    def _crosstab(self) -> str:
        """How often the two gave what, the most frequent first; and the share of rows in which they differ."""
        total = sum(self._pairs.values())
        widths = [max(len(name), 8) for name in self._names]

        def line(cells: Sequence[str], count: str) -> str:
            return "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) + f"  {count:>8}"

        lines = [line(self._names, "rows"), *(line(values, f"{count:,}") for values, count in self._pairs.most_common(_LISTED))]
        if len(self._pairs) > _LISTED:
            lines.append(f"  … and {len(self._pairs) - _LISTED:,} more pairs of values")
        differ = self._disagreements.count
        lines.append(f"they differ on {differ:,} of {total:,} rows ({differ / total:.2%})" if total else "no row was scored")
        return "\n".join(lines)


def _value(score: Score) -> str:
    return f"{score.value:g}" if score.scored else "unscored"


def _said(score: Score) -> str:
    """``0 (wrong_format) '12 cm'``: the value, why if it is not plain, and what was extracted or went wrong."""
    outcome = "" if score.outcome is Outcome.ok else f" ({score.outcome})"
    return _value(score) + outcome + (f" {_short(score.detail)}" if score.detail else "")


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 60 else f"…{flat[-59:]}")


# ---- the command ---------------------------------------------------------------------------------------------------------------


def score_file(task: Task, print_out: Callable[[str], None], print_error: Callable[[str], None], bar: Callable[[int], None]) -> int:
    """Score a file; 0 if every row was sound and, with ``gold``, every gold answer scored 1, else 1.

    Args:
        task: what to do.
        print_out: takes what was found out, line by line.
        print_error: takes the messages about bad rows.
        bar: is told how many bytes of the file are done.

    Raises:
        ConfigError: an option cannot work.
        OSError: the file cannot be read, or the output not be written.
    """
    parts, columns = _prepare(task)
    report = Report(task, parts, print_out, print_error)
    started, position = time.monotonic(), 0
    with RewardRuntime(parts, num_workers=task.workers) as runtime, written(task.out) as out:
        for chunk in chunks(read_rows(task.file, columns), CHUNK_ROWS):
            end = position + sum(row.size for row in chunk)
            _judge(runtime, chunk, position, end, bar)
            position = end
            for row in chunk:
                report.add(row)
                if out is not None and row.data is not None:
                    _write(out, row, [part.name for part in parts], task)
    return report.end(time.monotonic() - started)


def _prepare(task: Task) -> tuple[list[RewardPart], Columns]:
    if not task.file.is_file():
        raise ConfigError(
            "FILE", f"{str(task.file)!r} does not exist (looked in {Path.cwd()})", "give a JSON-lines file: one object a line"
        )
    if task.workers < 0:
        raise ConfigError("--workers", f"is {task.workers}", "give 1 or more, or 0 for one a core")
    first, built_in = parse_reward(task.reward, "--reward")
    parts = [first]
    if task.compare is not None:
        second, _ = parse_reward(task.compare, "--compare")
        parts.append(replace(second, name="compare" if second.name == first.name else second.name))
    gold_key = task.gold_key if task.gold_key is not None else ("gold" if built_in.gold is not None else "")
    template = None
    if task.gold:
        template = task.gold_template if task.gold_template is not None else built_in.gold
        if template is None or not gold_key:
            raise ConfigError("--gold", "this reward compares with no gold answer", "leave the option out")
        if "{}" not in template:
            raise ConfigError("--gold-template", f"{template!r} does not say where the gold answer stands", r"write {} there: '\boxed{{}}'")
    elif task.gold_template is not None:
        raise ConfigError("--gold-template", "means nothing without --gold", "add --gold, or leave it out")
    return parts, Columns(completion=task.completion_key, gold=gold_key, prompt=task.prompt_key, template=template)


def _judge(runtime: RewardRuntime, chunk: Sequence[Row], start: int, end: int, bar: Callable[[int], None]) -> None:
    """Score the sound rows of a chunk that begins and ends at these bytes of the file."""
    sound = [row for row in chunk if not row.fault]
    completions = [row.completion for row in sound if row.completion is not None]
    problems = [row.problem for row in sound if row.problem is not None]
    judged = runtime.judge(completions, problems, lambda done, total: bar(start + (end - start) * done // total))
    for row, by_name in zip(sound, judged, strict=True):
        row.judged = by_name
    bar(end)


def _write(out: TextIO, row: Row, names: Sequence[str], task: Task) -> None:
    assert row.data is not None
    added = added_columns(row.judged.get(names[0]), task.prefix)
    if len(names) > 1:
        added |= added_columns(row.judged.get(names[1]), f"{task.prefix}compare_")
    taken = [name for name in added if name in row.data]
    if taken:
        raise ConfigError(
            "--out",
            f"{task.file}, line {row.number} already has {', '.join(map(repr, taken))}",
            "name the added columns apart with --prefix, e.g. --prefix again_",
        )
    out.write(json.dumps(row.data | added, ensure_ascii=False) + "\n")


def run(task: Task) -> int:
    """``score_file`` with standard output, standard error, and a progress bar on it where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    size = task.file.stat().st_size if task.file.is_file() else 0
    words = TextColumn("[progress.description]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")
    with Progress(*words, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = progress.add_task("scoring", total=size or None)
        lines: list[str] = []
        status = score_file(
            task,
            print_out=lines.append,  # after the bar is gone
            print_error=lambda text: console.print(f"grpo: {text}", markup=False, highlight=False, soft_wrap=True),
            bar=lambda done: progress.update(shown, completed=done),
        )
    print("\n".join(lines))
    return status
