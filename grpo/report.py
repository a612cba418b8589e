"""``report.html``: a run on one page, self-contained – no network, no script, curves as inline SVG with hover values.

Written from what stands in the run folder alone, so a run that crashed, or one from another machine, has its report too.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from grpo import config_file
from grpo.console import set_off
from grpo.metrics import best_and_worst, duration, headline, series
from grpo.run import RunFolder
from grpo.storage import write_text

T = TypeVar("T")
Points = Sequence[tuple[float, float]]
Row = Mapping[str, float]

WIDTH, HEIGHT = 360, 180  # of a chart, in SVG units: about its size on a screen, so that its text has the page's size
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
NUM_COLORS = 6
MAX_HOVER_STEPS = 150
PHASES = ("generate", "wait", "reward", "sleep", "update", "sync", "eval", "checkpoint")
SMOOTH_FROM = 30  # points; below, a curve is drawn as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve: its name, its points, and half the width of an interval around each, if it has one."""

    name: str
    points: Points
    interval: Points = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What one figure shows. ``stacked`` adds the lines up as areas; ``low`` and ``high`` are values the axis must include."""

    title: str
    note: str
    lines: Sequence[Line]
    low: float = math.inf
    high: float = -math.inf
    log: bool = False
    stacked: bool = False


def write_report(run: RunFolder) -> Path:
    """Write ``report.html`` into the run folder and return its path. Files that are damaged are left out, and named on the page.

    Raises:
        StorageError: the page cannot be written.
    """
    damaged: list[str] = []
    rows = _read(damaged, run.metrics_file, run.read_metrics) or []
    config = _read(damaged, run.config_file, lambda: config_file.read(run.config_file)) or {}
    environment = _read(damaged, run.environment_file, lambda: dict(json.loads(run.environment_file.read_bytes()))) or {}
    steps = run.rollout_steps()
    first_and_last = dict.fromkeys(steps[:1] + steps[-1:])
    samples = [_read(damaged, run.rollout_file(step), partial(_sample, run, step)) or "" for step in first_and_last]
    sections = [
        _header(run, rows, config, environment),
        '<div class="charts">' + "".join(_figure(chart) for chart in charts(rows)) + "</div>",
        f'<section><h2>What the model wrote</h2><div class="samples">{"".join(samples)}</div></section>' if any(samples) else "",
        _details("Objective", run.objective_file, is_open=True),
        _details("Configuration", run.config_file),
        _details("Environment", run.environment_file),
    ]
    if damaged:
        sections.insert(1, f"<section><h2>Left out</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in damaged)}</ul></section>")
    title = html.escape(f"{run.recipe} / {run.name}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )
    write_text(run.report_file, page)
    return run.report_file


def _read(damaged: list[str], file: Path, read: Callable[[], T]) -> T | None:
    """What ``read`` makes of a file, if it is there; of one that it cannot read, nothing but a line in ``damaged``."""
    try:
        return read() if file.exists() else None
    except Exception as error:  # a file can be damaged in any way, and the rest of the run is worth reading
        damaged.append(f"{file.name}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
        return None


def charts(rows: Sequence[Row]) -> list[Chart]:
    """The curves of a run, in reading order. A metric that was never logged gives an empty chart, so its absence shows."""

    def lines(**keys: str) -> list[Line]:
        return [Line(name=name.replace("_", " "), points=series(rows, key)) for name, key in keys.items()]

    evaluation = Line(name="pass@1", points=series(rows, "eval/pass@1"), interval=series(rows, "eval/pass@1_ci95"))
    parts = [Line(name=part, points=series(rows, f"reward/{part}/mean")) for part in _parts(rows)]
    phases = [Line(name=phase, points=series(rows, f"time/{phase}")) for phase in PHASES]
    groups = lines(all_solved="rollout/solve_all", none_solved="rollout/solve_none", equal_rewards="rollout/groups_without_signal")
    lengths = lines(mean="completion/length_mean", mean_of_those_that_ended="completion/terminated_length_mean")
    pass_rate = lines(pass_rate="rollout/pass_rate")
    truncated = lines(truncated="completion/truncated_share")
    return [
        Chart(title="Held-out pass@1", note="with its 95 % bootstrap interval", lines=[evaluation], low=0, high=1),
        Chart(title="Training pass rate", note="share of sampled completions that pass", lines=pass_rate, low=0, high=1),
        Chart(title="Reward", note="mean over the step's completions", lines=lines(total="reward/mean"), low=0),
        Chart(title="Reward by part", note="before weighting", lines=parts, low=0),
        Chart(title="Groups", note="only groups whose rewards differ move the policy", lines=groups, low=0, high=1),
        Chart(title="Completion length", note="tokens", lines=lengths, low=0),
        Chart(title="Truncated share", note="cut off at the token limit", lines=truncated, low=0, high=1),
        Chart(title="Entropy", note="nats a token; a fall to zero ends exploration", lines=lines(entropy="policy/entropy"), low=0),
        Chart(title="Sampler mismatch", note="k3, log scale; above 0.1 is trouble", lines=lines(k3="sampler/k3"), log=True),
        Chart(title="Gradient norm", note="before clipping", lines=lines(gradient_norm="policy/grad_norm"), low=0),
        Chart(title="Clip share", note="tokens whose clipped branch is active", lines=lines(clip_share="policy/clip_share"), low=0),
        Chart(title="Time by phase", note="seconds a step", lines=[line for line in phases if line.points], low=0, stacked=True),
    ]


def svg(chart: Chart) -> str:
    """A chart as inline SVG. Colours come from the page's style, so it follows light and dark."""
    lines = [line for line in chart.lines if line.points]
    if chart.log:
        lines = [Line(name=line.name, points=[(x, y) for x, y in line.points if y > 0]) for line in lines]
    if not any(line.points for line in lines):
        return _picture(chart, f'<text class="empty" x="{WIDTH / 2}" y="{HEIGHT / 2}">not recorded</text>')
    drawn = _stack(lines) if chart.stacked else lines
    reach = 0.5 * chart.stacked  # an area is as wide as its step
    to_x, x_ticks = _x_axis([x + sign * reach for line in drawn for x, _ in line.points for sign in (-1, 1)])
    to_y, y_ticks = _y_axis(chart, drawn)
    body = [_grid(to_x, x_ticks, to_y, y_ticks)]
    for color, line in reversed(list(enumerate(drawn))) if chart.stacked else enumerate(drawn):
        body.append(_area(line, color, to_x, to_y) if chart.stacked else _curve(line, color, to_x, to_y))
    body.append(_hover(lines, to_x))
    return _picture(chart, "".join(body))


def _picture(chart: Chart, body: str) -> str:
    label = html.escape(f"{chart.title} by training step")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'


def _x_axis(steps: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    low, high = min(steps), max(steps)
    span = high - low or 1.0
    inner = WIDTH - LEFT - RIGHT
    ticks = [tick for tick in _ticks(low, high, 6) if tick == int(tick)]
    return lambda step: LEFT + inner * ((step - low) / span if high > low else 0.5), ticks


def _y_axis(chart: Chart, lines: Sequence[Line]) -> tuple[Callable[[float], float], list[float]]:
    values = [y for line in lines for _, y in line.points]
    for line in lines:
        interval = dict(line.interval)
        values += [y + sign * interval.get(x, 0.0) for x, y in line.points for sign in (-1, 1)]
    low, high = min(*values, chart.low), max(*values, chart.high)
    inner = HEIGHT - TOP - BOTTOM
    if chart.log:
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        top += top == bottom
        every = max(1, (top - bottom) // 5)
        return lambda v: TOP + inner * (1 - (math.log10(v) - bottom) / (top - bottom)), [10.0**e for e in range(bottom, top + 1, every)]
    if high == low:
        low, high = low - 0.5 * (low != chart.low), high + 0.5
    elif high != chart.high:
        high += 0.05 * (high - low)
    return lambda v: TOP + inner * (1 - (v - low) / (high - low)), _ticks(low, high, 5)


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers between ``low`` and ``high``: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _grid(to_x: Callable[[float], float], x_ticks: Sequence[float], to_y: Callable[[float], float], y_ticks: Sequence[float]) -> str:
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{to_y(v):.1f}" y2="{to_y(v):.1f}"/>'
        f'<text class="tick y" x="{LEFT - 7}" y="{to_y(v) + 4:.1f}">{_number(v)}</text>'
        for v in y_ticks
    ]
    parts += [f'<text class="tick x" x="{to_x(v):.1f}" y="{HEIGHT - BOTTOM + 17}">{v:g}</text>' for v in x_ticks]
    return "".join(parts)


def _curve(line: Line, color: int, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    """A line with its interval; a long noisy one as its moving mean over the faint raw values; a few points also as dots."""
    parts = []
    interval = dict(line.interval)
    if interval:
        upper = [(x, y + interval.get(x, 0.0)) for x, y in line.points]
        lower = [(x, y - interval.get(x, 0.0)) for x, y in line.points]
        parts.append(f'<polygon class="band c{color % NUM_COLORS}" points="{_coordinates(upper + lower[::-1], to_x, to_y)}"/>')
    smooth = len(line.points) >= SMOOTH_FROM
    parts.append(f'<polyline class="line c{color % NUM_COLORS}{" raw" * smooth}" points="{_coordinates(line.points, to_x, to_y)}"/>')
    if smooth:
        parts.append(f'<polyline class="line c{color % NUM_COLORS}" points="{_coordinates(_moving_mean(line.points), to_x, to_y)}"/>')
    else:
        parts += [f'<circle class="dot c{color % NUM_COLORS}" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="2.5"/>' for x, y in line.points]
    return "".join(parts)


def _area(line: Line, color: int, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    """Stairs down to zero; the stack is drawn from its top layer, so each covers the lower part of the one before."""
    stairs = [(x + side, y) for x, y in line.points for side in (-0.5, 0.5)]
    outline = [(stairs[0][0], 0.0), *stairs, (stairs[-1][0], 0.0)]
    return f'<polygon class="area c{color % NUM_COLORS}" points="{_coordinates(outline, to_x, to_y)}"/>'


def _hover(lines: Sequence[Line], to_x: Callable[[float], float]) -> str:
    """Invisible strips over the chart, one a step, each with the values of all curves as its native tooltip."""
    values = [(line.name, dict(line.points), dict(line.interval)) for line in lines]
    steps = sorted({x for line in lines for x, _ in line.points})
    steps = steps[:: -(-len(steps) // MAX_HOVER_STEPS)]
    edges = [to_x(step) for step in steps]
    middles = [LEFT, *((a + b) / 2 for a, b in pairwise(edges)), WIDTH - RIGHT]
    strips = []
    for step, (left, right) in zip(steps, pairwise(middles), strict=True):
        lines_of_text = [f"step {step:g}"]
        for name, points, interval in values:
            if step in points:
                lines_of_text.append(f"{name}: {_number(points[step])}" + (f" ± {_number(interval[step])}" if step in interval else ""))
        strips.append(
            f'<rect class="hover" x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{html.escape(chr(10).join(lines_of_text))}</title></rect>"
        )
    return "".join(strips)


def _coordinates(points: Points, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    return " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)


def _moving_mean(points: Points) -> Points:
    """Centred, over a tenth of the run; the window shrinks towards both ends, so the curve keeps its first and last step."""
    reach = max(1, len(points) // 20)
    out = []
    for i, (x, _) in enumerate(points):
        half = min(reach, max(i, 1), max(len(points) - 1 - i, 1))
        window = [y for _, y in points[max(0, i - half) : i + half + 1]]
        out.append((x, sum(window) / len(window)))
    return out


def _stack(lines: Sequence[Line]) -> list[Line]:
    """Each line on top of the sum of those before it, at every step any of them has; what is missing counts as zero."""
    steps = sorted({x for line in lines for x, _ in line.points})
    total = dict.fromkeys(steps, 0.0)
    stacked = []
    for line in lines:
        values = dict(line.points)
        total = {step: below + values.get(step, 0.0) for step, below in total.items()}
        stacked.append(Line(name=line.name, points=list(total.items())))
    return stacked


def _figure(chart: Chart) -> str:
    legend = ""
    if len(chart.lines) > 1:
        names = (f'<span class="key c{i % NUM_COLORS}"></span>{html.escape(line.name)}' for i, line in enumerate(chart.lines))
        legend = f'<div class="legend">{" ".join(f"<span>{name}</span>" for name in names)}</div>'
    caption = f"<b>{html.escape(chart.title)}</b> <small>{html.escape(chart.note)}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{svg(chart)}{legend}</figure>"


def _header(run: RunFolder, rows: Sequence[Row], config: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    elapsed = series(rows, "time/elapsed")
    steps = series(rows, "reward/mean")
    facts = {
        "Recipe": run.recipe,
        "Run": run.name,
        "Model": config.get("model", {}).get("path"),
        "Seed": config.get("run", {}).get("seed"),
        "Steps": f"{steps[-1][0]:g} of {config.get('run', {}).get('steps', '?')}" if steps else None,
        "Duration": duration(elapsed[-1][1]) if elapsed else None,
        "Machine": _machine(environment),
        "Started": environment.get("time"),
    }
    known = {name: html.escape(str(value)) for name, value in facts.items() if value not in (None, "")}
    terms = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in known.items())
    return f"<header><h1>{html.escape(headline(rows))}</h1><dl>{terms}</dl></header>"


def _machine(environment: Mapping[str, Any]) -> str:
    """``NVIDIA H200, 16 cores, 128 GiB``: what computed, as far as it was recorded."""
    processors = environment.get("gpus") or [environment.get("cpu", "")]
    sizes = [f"{environment[key]} {unit}" for key, unit in (("cores", "cores"), ("memory_gib", "GiB")) if environment.get(key)]
    return ", ".join(filter(None, [*processors, *sizes]))


def _sample(run: RunFolder, step: int) -> str:
    """A good and a bad rollout of a step, one above the other."""
    cards = "".join(_card(rollout) for rollout in _chosen(run.read_rollouts(step).to_pylist()))
    return f"<div><h3>Step {step}</h3>{cards or '<p>no scored rollout</p>'}</div>"


def _chosen(rollouts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout["group"], []).append(rollout)
    return [groups[g][i] for g, i in best_and_worst({g: [r["reward"] for r in members] for g, members in groups.items()})]


def _card(rollout: Mapping[str, Any]) -> str:
    scores = [f"{key.removeprefix('score/')} {value:g}" for key, value in rollout.items() if key.startswith("score/") and value is not None]
    facts = [f"<b>reward {rollout['reward']:g}</b>", *map(html.escape, scores)]
    if rollout["advantage"] is not None:
        facts.append(f"advantage {rollout['advantage']:+.2f}")
    own = sum(rollout.get("sampled") or ()) or len(rollout["token_ids"])
    facts.append(f"{own} tokens" + (", cut off" if rollout["finish_reason"] == "length" else ""))
    return (
        f'<article><p class="facts">{" · ".join(facts)}</p><pre class="prompt">{_shown(rollout["prompt"])}</pre>'
        f'<pre>{_written(rollout)}</pre><p class="facts">answer: {_shown(rollout["answer"])}</p></article>'
    )


def _written(rollout: Mapping[str, Any]) -> str:
    """What the policy wrote; what its environment said between, set off."""
    pieces = [(piece["text"], piece["own"]) for piece in rollout.get("transcript") or ()] or [(rollout["completion"], True)]
    return "".join(_shown(text) if own else f'\n<span class="environment">{_shown(set_off(text))}</span>\n' for text, own in pieces)


def _details(title: str, file: Path, is_open: bool = False) -> str:
    if not file.is_file():
        return ""
    text = html.escape(file.read_text(encoding="utf-8", errors="replace"))
    return f"<details{' open' if is_open else ''}><summary>{title}</summary><pre>{text}</pre></details>"


def _shown(text: str) -> str:
    """Escaped for HTML; control characters, which HTML forbids, as escapes."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda match: json.dumps(match[0])[1:-1], text))


def _parts(rows: Sequence[Row]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [match[1] for key in keys if (match := re.fullmatch(r"reward/([^/]+)/mean", key))]


def _number(value: float) -> str:
    """Four significant digits at most."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1a1f29; --soft: #667085; --rule: #e4e7ec;
  --c0: #2563eb; --c1: #d97706; --c2: #059669; --c3: #c026d3; --c4: #dc2626; --c5: #0891b2; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1319; --card: #181e27; --ink: #e6e9ef; --soft: #98a2b3; --rule: #2b3340;
  --c0: #60a5fa; --c1: #fbbf24; --c2: #34d399; --c3: #e879f9; --c4: #f87171; --c5: #22d3ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 18px; letter-spacing: -.01em; }
h1::first-letter { text-transform: uppercase; }
h2 { font-size: 20px; margin: 36px 0 6px; } h3 { font-size: 15px; margin: 10px 0; color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: 10px 30px; margin: 0 0 26px; }
dt { font-size: 12px; color: var(--soft); } dd { margin: 0; font-weight: 500; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 16px; }
figure, article, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 0; padding: 14px 16px; }
figcaption { display: flex; flex-direction: column; margin-bottom: 8px; } small { color: var(--soft); font-size: 12.5px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.grid { stroke: var(--rule); } .tick, .empty { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.tick.y { text-anchor: end; } .tick.x, .empty { text-anchor: middle; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; } .raw { opacity: .3; stroke-width: 1; }
.band { fill: var(--c); opacity: .18; } .dot { fill: var(--c); } .area { fill: var(--c); }
.hover { fill: transparent; } .hover:hover { fill: var(--ink); opacity: .09; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; background: var(--c); margin-right: 6px; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px; align-items: start; }
article { margin-bottom: 14px; } .facts { margin: 0 0 8px; font-size: 13px; color: var(--soft); } .facts:last-child { margin: 8px 0 0; }
.facts b { color: var(--ink); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
article pre { max-height: 26em; overflow: auto; }
article .environment { color: var(--soft); }
article pre.prompt { color: var(--soft); max-height: 9.5em; padding-bottom: 8px; margin-bottom: 8px; border-bottom: 1px solid var(--rule); }
details { margin-top: 16px; } summary { cursor: pointer; font-weight: 600; } details pre { margin-top: 10px; }
"""
