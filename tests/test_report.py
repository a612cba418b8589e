"""The report is one well-formed page that needs nothing else, whatever the run recorded."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo.report import Chart, Line, _moving_mean, _ticks, charts, svg, write_report
from grpo.run import RunFolder
from grpo.types import Completion, FinishReason, Group, Problem, Rollout, Score

TITLES = [
    "Held-out pass@1",
    "Training pass rate",
    "Reward",
    "Reward by part",
    "Groups",
    "Completion length",
    "Truncated share",
    "Entropy",
    "Sampler mismatch",
    "Gradient norm",
    "Clip share",
    "Time by phase",
]
VOID = {"meta"}  # without a closing tag; in SVG every tag has one or closes itself


class Checker(HTMLParser):
    """Collects tags and attributes; fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert not {"script", "link", "img", "iframe"} & set(checker.tags)
    assert not [value for name, value in checker.attributes if name in ("src", "href")]
    assert "http" not in page and "url(" not in page
    assert "nan" not in " ".join(value or "" for name, value in checker.attributes if name in ("points", "x", "y", "cx", "cy"))
    return checker


def group(text: str) -> Group:
    problem = Problem(id="a", prompt="<b>What</b> is 3 + 4?", answer="7 & more")
    rollouts = []
    for index, reward in enumerate((0.0, 1.0)):
        completion = Completion(
            problem_id="a",
            index=index,
            prompt_ids=(1,),
            token_ids=(1,),
            text=text,
            logprobs=(-0.1,),
            policy_versions=(0,),
            finish_reason=FinishReason.stop,
        )
        rollouts.append(Rollout(problem=problem, completion=completion, scores={"accuracy": Score(value=reward)}, reward=reward))
    return Group(problem=problem, rollouts=tuple(rollouts))


def step_row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "reward/mean": step / 60,
        "reward/std": 0.1,
        "reward/accuracy/mean": step / 60,
        "reward/accuracy/weighted": step / 60,
        "reward/format/mean": 0.5,
        "rollout/pass_rate": step / 60,
        "rollout/solve_all": 0.0,
        "rollout/solve_none": 0.5,
        "rollout/groups_without_signal": 0.5,
        "completion/length_mean": 30.0,
        "completion/terminated_length_mean": math.nan if step < 5 else 20.0,
        "completion/truncated_share": 0.1,
        "policy/entropy": 1.5,
        "policy/clip_share": 0.0,
        "policy/grad_norm": 1.0,
        "sampler/k3": 0.0 if step == 1 else 1e-4 * step,
        "time/generate": 6.0,
        "time/update": 3.0,
        "time/elapsed": 11.0 * step,
    }


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "r1_zero_arithmetic", "name")
    folder.write_config("run:\n  seed: 7\n  steps: 60\nmodel:\n  path: tiny/model\n")
    return folder


def test_a_whole_run(run: RunFolder) -> None:
    run.write_objective("J(θ) = E[min(r A, clip(r, 1-ε, 1+ε) A)] <objective>\n")
    run.write_environment({"packages": {"torch": "2.13.0"}})
    run.append_metrics({"step": 0, "eval/pass@1": 0.12, "eval/pass@1_ci95": 0.03})
    for step in range(1, 61):
        run.append_metrics(step_row(step))
    run.append_metrics({"step": 60, "eval/pass@1": 0.87, "eval/pass@1_ci95": 0.02, "time/eval": 4.0})
    for step in (1, 60):
        run.write_rollouts(step, [group(f"<script>alert({step})</script> \x1b[2J")], {("a", 1): 0.5})
    page = write_report(run).read_text(encoding="utf-8")
    check(page)
    assert "<h1>held-out pass@1 0.12 → 0.87 in 11 min</h1>" in page
    for fact in ("r1_zero_arithmetic", "tiny/model", "60 of 60", "11 min", "&lt;objective&gt;", "Step 1<", "Step 60<", "advantage +0.50"):
        assert fact in page
    assert "&lt;script&gt;alert(60)&lt;/script&gt; \\u001b[2J" in page
    assert [chart.title for chart in charts(run.read_metrics())] == TITLES
    for title in TITLES:
        assert f"<b>{title}</b>" in page
    assert "not recorded" not in page
    assert "step 60\npass@1: 0.87 ± 0.02" in page  # the hover text
    assert len(page) < 400_000


DAMAGE: dict[str, bytes] = {
    "metrics.jsonl": b'{"step": 1}\n{"st\n{"step": 2}\n',
    "config.yaml": b"run: [",
    "environment.json": b"{",
    "objective.md": b"\xff\xfe",
    "rollouts/step_000001.parquet": b"PAR1",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_left_out_and_named(run: RunFolder, name: str) -> None:
    run.write_objective("J(θ)\n")
    run.write_environment({"cpu": "a processor"})
    for step in (1, 2):
        run.append_metrics(step_row(step))
        run.write_rollouts(step, [group("it is 7")])
    (run.path / name).write_bytes(DAMAGE[name])
    page = write_report(run).read_text(encoding="utf-8")
    check(page)
    shown = {"metrics.jsonl": "2 of 60", "config.yaml": "tiny/model", "environment.json": "a processor", "objective.md": "J(θ)"}
    shown["rollouts/step_000001.parquet"] = "<h3>Step 1</h3>"
    for file, fact in shown.items():
        assert (fact in page) is (file != name and (file, name) != ("metrics.jsonl", "config.yaml")), file  # "2 of ?": of both files
    assert "<h3>Step 2</h3>" in page
    if name != "objective.md":  # shown with replacement characters
        assert re.search(rf"<h2>Left out</h2><ul><li>{re.escape(name.rpartition('/')[2])}: .+</li></ul>", page)


def test_the_configuration_is_read_as_a_run_that_goes_on_reads_it(run: RunFolder) -> None:
    run.write_config("run: {seed: 1e3}\n")  # a number, as in a recipe; by plain YAML it is text
    assert "<dt>Seed</dt><dd>1000.0</dd>" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_a_run_that_hardly_began(run: RunFolder, num_rows: int) -> None:
    for step in range(1, num_rows + 1):
        run.append_metrics(step_row(step))
    page = write_report(run).read_text(encoding="utf-8")
    check(page)
    assert "Left out" not in page, "a file that is not there is not a damaged one"
    assert page.count("not recorded") == (len(TITLES) if num_rows == 0 else 2 if num_rows == 1 else 1)  # no evaluation; k3 was 0


@pytest.mark.parametrize("gone", sorted(step_row(1).keys() - {"step"}))
def test_any_metric_may_be_missing(run: RunFolder, gone: str) -> None:
    for step in range(1, 4):
        run.append_metrics({key: value for key, value in step_row(step).items() if key != gone})
    check(write_report(run).read_text(encoding="utf-8"))


def test_a_long_run_stays_small(run: RunFolder) -> None:
    for step in range(1, 2001):
        run.append_metrics(step_row(step))
    page = write_report(run).read_text(encoding="utf-8")
    check(page)
    assert page.count('class="hover"') <= 12 * 151
    assert len(page) < 2_000_000


def test_points_stand_where_their_values_are() -> None:
    picture = svg(Chart(title="t", note="", lines=[Line(name="a", points=[(0, 0.0), (10, 1.0)])], low=0, high=1))
    # x: LEFT = 46 … WIDTH − RIGHT = 352; y: HEIGHT − BOTTOM = 156 for 0, TOP = 8 for 1
    assert re.search(r'<polyline class="line c0" points="46.0,156.0 352.0,8.0"/>', picture)


def test_ticks_are_round_numbers_inside() -> None:
    assert _ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert _ticks(3, 47, 6) == [10, 20, 30, 40]
    assert _ticks(5, 5, 5) == [5]


def test_the_moving_mean_keeps_a_straight_line() -> None:
    line = [(float(x), 2.0 * x) for x in range(100)]
    assert [y for _, y in _moving_mean(line)][5:-5] == pytest.approx([y for _, y in line][5:-5])
    assert len(_moving_mean(line)) == 100
