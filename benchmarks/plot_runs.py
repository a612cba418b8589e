"""Held-out pass@1 over the minutes of training, one curve a run, and a Markdown table of the same evaluations.

    python benchmarks/plot_runs.py runs/r1_zero_arithmetic/seed{0,1,2} --out docs/results/r1_zero_arithmetic.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grpo.run import RunFolder


def evaluations(run: RunFolder) -> list[tuple[int, float, float, float]]:
    """(step, minutes, pass@1, half width of its 95 % interval) of every evaluation."""
    return [
        (int(row["step"]), row.get("time/elapsed", 0.0) / 60, row["eval/pass@1"], row["eval/pass@1_ci95"])
        for row in run.read_metrics()
        if "eval/pass@1" in row
    ]


def draw(runs: list[RunFolder], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "grpo"  # the same runs give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for run in runs:
        _, minutes, passed, width = zip(*evaluations(run), strict=True)
        axes.errorbar(minutes, passed, yerr=width, marker="o", markersize=4, capsize=2, label=run.name)
    axes.axhline(0.85, color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="minutes of training", ylabel="held-out pass@1", ylim=(0, 1.02), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, metadata={"Date": None})


def table(runs: list[RunFolder]) -> str:
    steps = sorted({step for run in runs for step, *_ in evaluations(run)})
    lines = ["| run | " + " | ".join(f"step {s}" for s in steps) + " | minutes |", "|---" * (len(steps) + 2) + "|"]
    for run in runs:
        found = {step: passed for step, _, passed, _ in evaluations(run)}
        cells = [f"{found[s]:.3f}" if s in found else "–" for s in steps]
        lines.append(f"| {run.name} | " + " | ".join(cells) + f" | {run.read_metrics()[-1]['time/elapsed'] / 60:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [RunFolder.open(path) for path in options.runs]
    draw(runs, options.out)
    print(table(runs))


if __name__ == "__main__":
    main()
