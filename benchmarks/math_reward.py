"""Errors and speed of the math grader on labelled pairs, with math-verify beside it in the same run.

    python benchmarks/math_reward.py [FILE.jsonl] [--alone]

A row of the file: ``gold``, ``completion`` (or ``answer``, which is put in a box), ``equal``, ``category``. Without a file, the pairs of
``tests/data/math_pairs.jsonl``. Rows of the category ``real_completion`` are timed as real completions, the others of the track
``equivalence`` (or of no track) as hard pairs. Both graders run in this process, one core each, one row at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo.rewards.math import compare, reward, text
from grpo.rewards.math.extract import extract_answer

PAIRS = Path(__file__).parents[1] / "tests" / "data" / "math_pairs.jsonl"
CACHED_CALLS = 20_000

Grader = Callable[[str, str], bool]


@dataclass(frozen=True, kw_only=True)
class Row:
    gold: str
    completion: str
    equal: bool
    category: str
    hard: bool  # timed as a hard pair


@dataclass(frozen=True, kw_only=True)
class Measured:
    name: str
    verdicts: tuple[bool, ...]
    seconds: tuple[float, ...]


def read_rows(path: Path) -> list[Row]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("track") == "adversarial":  # may hang a grader that runs in this process
            continue
        completion = row["completion"] if "completion" in row else f"So the answer is $\\boxed{{{row['answer']}}}$."
        hard = row.get("track", "equivalence") == "equivalence" and row["category"] != "real_completion"
        rows.append(Row(gold=row["gold"], completion=completion, equal=row["equal"], category=row["category"], hard=hard))
    return rows


def ours(gold: str, completion: str) -> bool:
    answer = extract_answer(completion)
    return answer is not None and reward.compare_answer(answer, gold).value == 1.0


def forget() -> None:
    """Empty the caches: every comparison is made anew."""
    reward._verdict.cache_clear()
    compare.read.cache_clear()
    text.canonical.cache_clear()


def math_verify_best() -> Grader:
    """math-verify in its best configuration: the gold answer between dollar signs, LaTeX and plain expressions."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    kinds = [LatexExtractionConfig(), ExprExtractionConfig()]

    def grader(gold: str, completion: str) -> bool:
        marked = gold if "$" in gold else f"${gold}$"
        return bool(verify(parse(marked, extraction_config=kinds) or parse(gold), parse(completion, extraction_config=kinds)))

    return grader


def measure(name: str, grader: Grader, rows: Sequence[Row]) -> Measured:
    for row in rows[:20]:  # imports and first calls
        grader(row.gold, row.completion)
    forget()
    verdicts, seconds = [], []
    for row in rows:
        started = time.perf_counter()
        verdicts.append(grader(row.gold, row.completion))
        seconds.append(time.perf_counter() - started)
    return Measured(name=name, verdicts=tuple(verdicts), seconds=tuple(seconds))


def errors_by_category(measured: Measured, rows: Sequence[Row]) -> Counter[str]:
    return Counter(row.category for row, verdict in zip(rows, measured.verdicts, strict=True) if verdict != row.equal)


def cached_calls_per_s(rows: Sequence[Row]) -> float:
    calls = [rows[index % len(rows)] for index in range(CACHED_CALLS)]
    for row in rows:
        ours(row.gold, row.completion)
    started = time.perf_counter()
    for row in calls:
        ours(row.gold, row.completion)
    return len(calls) / (time.perf_counter() - started)


def report(measured: Measured, rows: Sequence[Row]) -> None:
    wrong = [(row, verdict) for row, verdict in zip(rows, measured.verdicts, strict=True) if verdict != row.equal]
    positives = sum(verdict for _, verdict in wrong)
    negatives = sum(not row.equal for row in rows)
    print(f"{measured.name}: {len(wrong)} errors of {len(rows)} ({100 * len(wrong) / len(rows):.2f} %), "
          f"{positives} false positives ({100 * positives / max(negatives, 1):.2f} %)")  # fmt: skip
    for title, chosen in (
        ("hard pairs", [row.hard for row in rows]),
        ("real completions", [row.category == "real_completion" for row in rows]),
    ):
        seconds = sorted(s for s, keep in zip(measured.seconds, chosen, strict=True) if keep)
        if seconds:
            print(f"  {title:17} {len(seconds) / sum(seconds):8,.0f} calls/s   median {statistics.median(seconds) * 1e3:7.3f} ms   "
                  f"p99 {seconds[int(len(seconds) * 0.99)] * 1e3:7.2f} ms   longest {seconds[-1] * 1e3:7.1f} ms")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=PAIRS)
    parser.add_argument("--alone", action="store_true", help="without math-verify")
    arguments = parser.parse_args()
    rows = read_rows(arguments.file)
    mine = measure("grpo.rewards.math", ours, rows)
    report(mine, rows)
    repeated = [row for row in rows if row.category == "real_completion"] or rows
    print(f"  {'from the cache':17} {cached_calls_per_s(repeated):8,.0f} calls/s")
    if arguments.alone:
        return
    theirs = measure("math-verify", math_verify_best(), rows)
    report(theirs, rows)
    print(f"speed on hard pairs: {_hard_seconds(theirs, rows) / _hard_seconds(mine, rows):.1f} x math-verify")
    here, there = errors_by_category(mine, rows), errors_by_category(theirs, rows)
    for category in sorted(here.keys() | there.keys()):
        worse = "   worse" if here[category] > there[category] else ""
        print(f"  {category:20} {here[category]:3} errors, math-verify {there[category]:3}{worse}")


def _hard_seconds(measured: Measured, rows: Sequence[Row]) -> float:
    return sum(seconds for seconds, row in zip(measured.seconds, rows, strict=True) if row.hard)


if __name__ == "__main__":
    main()
