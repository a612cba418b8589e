"""``grpo score``: rows in, the same rows out; bad rows, gold answers, and two graders side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo import cli, score
from grpo.completion_file import Columns, chunks, read_rows
from grpo.config import ConfigError
from grpo.rewards.named import BUILT_IN, parse_reward
from grpo.score import Task, score_file

MINE = """
import time

def length(completion, problem, scale=1.0):
    return scale * len(completion.text)

def tokens(completion, problem):
    return len(completion.token_ids) + 10 * completion.truncated

def moody(completion, problem):
    if completion.text == "loop":
        while True:
            pass
    if completion.text == "raise":
        raise ValueError("no")
    return float(completion.text == problem.answer)

def ranks(completions, problems):
    return [len(completions)] * len(completions)

def column(completion, problem):
    return problem.columns["level"]

def contains(gold, completion):
    return gold in completion

def theirs(completions, solution, **kwargs):
    return [float(c == s) for c, s in zip(completions, solution)]
"""
ROWS = [
    {"id": 7, "gold": "12", "completion": "so \\boxed{12}", "note": "é"},
    {"id": 8, "gold": "12", "completion": "\\boxed{13}"},
    {"id": 9, "gold": 0.5, "completion": "\\boxed{\\frac{1}{2}}"},
    {"id": 10, "gold": "12", "completion": ""},
]


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def to_file(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
        return path

    return to_file


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(**task: Any) -> tuple[int, str, str]:
    """Exit status, and what it printed on both streams."""
    out: list[str] = []
    errors: list[str] = []
    status = score_file(Task(workers=1, **task), out.append, errors.append, lambda done: None)
    return status, "\n".join(out), "\n".join(errors)


# ---- rows in, rows out


def test_the_same_rows_come_out_with_their_scores(write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(*ROWS), tmp_path / "new" / "out.jsonl"
    assert cli.main(["score", "--reward", "math", str(file), "--out", str(out), "--workers", "1"]) == 0
    scored = read(out)
    assert [{name: row[name] for name in before} for row, before in zip(scored, ROWS, strict=True)] == ROWS
    assert [list(row)[-4:] for row in scored] == [["score", "outcome", "extracted", "seconds"]] * 4
    assert [(row["score"], row["outcome"]) for row in scored] == [(1.0, "ok"), (0.0, "ok"), (1.0, "ok"), (0.0, "wrong_format")]
    assert [row["extracted"] for row in scored[:3]] == ["12", "13", "\\frac{1}{2}"]
    assert all(0 < row["seconds"] < 5 for row in scored)
    printed = capsys.readouterr()
    assert printed.out.startswith("4 rows in ")
    assert "math: mean 0.5000 · ok 3, wrong_format 1" in printed.out
    assert printed.err == ""


def test_bad_rows_are_named_and_the_others_scored(write: Callable[..., Path], tmp_path: Path) -> None:
    bad = [
        "{not json",
        "[1, 2]",
        "",
        {"gold": "1"},
        {"gold": ["1"], "completion": "x"},
        {"gold": "1", "completion": None},
        {"completion": "x"},
        {"gold": "1", "completion": "x", "token_ids": "no"},
        {"gold": "1", "completion": "x", "finish_reason": "tired"},
    ]
    file, out = write(ROWS[0], *bad, ROWS[1]), tmp_path / "out.jsonl"
    status, printed, errors = run(file=file, reward="math", out=out)
    assert status == 1
    said = errors.splitlines()
    for line, expected in zip(
        said,
        [
            r"line 2 is not JSON: Expecting property name",
            r'line 3 is a list, not an object \{"key": value, …\}',
            r"line 5 has no key 'completion'; it has: 'gold'",  # line 4 is blank
            r"""line 6 'gold' is \["1"\]; it must be a text or a number""",
            r"line 7 'completion' is null",
            r"line 8 has no key 'gold'",
            r"line 9 'token_ids' is not a list of whole numbers",
            r"line 10 'finish_reason' is 'tired'; it must be one of: stop, length",
        ],
        strict=True,
    ):
        assert re.search(expected, line), line
    assert "2 rows in" in printed and "8 bad rows left unscored" in printed
    rows = read(out)
    assert [row["score"] for row in rows] == [1.0, *[None] * 6, 0.0]  # what is no object has no place in the output
    assert [row["outcome"] for row in rows] == ["ok", *["invalid"] * 6, "ok"]
    assert [row.get("gold") for row in rows[1:3]] == ["1", ["1"]]


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes('{"gold": "é", "completion": "é"}\n'.encode("latin-1") + b'{"gold": "1", "completion": "\\\\boxed{1}"}\n')
    status, printed, errors = run(file=file, reward="math")
    assert status == 1 and "1 rows in" in printed and "line 1 is not JSON: 'utf-8' codec can't decode" in errors


def test_failures_of_a_grader_are_no_zeros(write: Callable[..., Path], tmp_path: Path, mine: str) -> None:
    texts = ["x", "loop", "raise", "y"]
    file, out = write(*({"gold": "x", "completion": text} for text in texts)), tmp_path / "out.jsonl"
    status, printed, _ = run(file=file, reward=f"{mine}:moody limits.cpu_s=0.2", out=out)
    rows = read(out)
    assert status == 0
    assert [(row["score"], row["outcome"]) for row in rows] == [(1.0, "ok"), (None, "timeout"), (None, "error"), (0.0, "ok")]
    assert "ValueError: no" in rows[2]["detail"] and rows[2]["extracted"] is None
    assert rows[1]["seconds"] >= 0.2
    assert "moody: mean 0.5000 · ok 2, unscored (timeout) 1, unscored (error) 1" in printed


def test_keys_tokens_and_columns(write: Callable[..., Path], tmp_path: Path, mine: str) -> None:
    rows = [{"text": "abc", "level": 5, "token_ids": [4, 5, 6], "finish_reason": "length"}, {"text": "", "level": 2}]
    out = tmp_path / "out.jsonl"
    for reward, expected in (("tokens", [13.0, 0.0]), ("column", [5.0, 2.0]), ("length scale=2", [6.0, 0.0]), ("ranks", [2.0, 2.0])):
        status, _, _ = run(file=write(*rows), reward=f"{mine}:{reward}", out=out, completion_key="text", gold_key="")
        assert (status, [row["score"] for row in read(out)]) == (0, expected)
    golds = [{"target": "a", "completion": "a"}, {"target": "a", "completion": "b"}]
    status, _, _ = run(file=write(*golds), reward=f"{mine}:theirs style=trl columns.solution=target", out=out, gold_key="target")
    assert [row["score"] for row in read(out)] == [1.0, 0.0]


def test_more_rows_than_a_chunk_stay_in_order(
    write: Callable[..., Path], tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "CHUNK_ROWS", 8)
    file, out = write(*({"n": n, "completion": "x" * n} for n in range(50))), tmp_path / "out.jsonl"
    bar: list[int] = []
    assert score_file(Task(file=file, reward=f"{mine}:length", out=out, gold_key=""), lambda text: None, pytest.fail, bar.append) == 0
    assert [(row["n"], row["score"]) for row in read(out)] == [(n, float(n)) for n in range(50)]
    assert bar == sorted(bar) and bar[-1] == file.stat().st_size


def test_a_chunk_takes_no_more_rows_than_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"completion": "a", "gold": "a"}\n' * 10)
    rows = read_rows(file, Columns())
    first = next(chunks(rows, 3))
    assert [row.number for row in first] == [1, 2, 3]
    assert next(rows).number == 4


def test_the_output_is_replaced_whole_or_not_at_all(
    write: Callable[..., Path], tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "CHUNK_ROWS", 2)
    file, out = write(*ROWS), tmp_path / "out.jsonl"
    out.write_text("what was there before")

    def stop(done: int) -> None:
        if done > file.stat().st_size // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_file(Task(file=file, reward="math", out=out), lambda text: None, pytest.fail, stop)
    assert out.read_text() == "what was there before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "out.jsonl", "rows.jsonl"]
    assert run(file=file, reward="math", out=file)[0] == 0  # in place
    assert [row["score"] for row in read(file)] == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(ConfigError, match=r"line 1 already has 'score', 'outcome', 'extracted', 'seconds'\n  → .*--prefix"):
        run(file=file, reward="math", out=out)
    assert out.read_text() == "what was there before"
    assert run(file=file, reward="math", out=file, prefix="again_")[0] == 0
    assert [row["again_score"] for row in read(file)] == [row["score"] for row in read(file)]


# ---- gold answers


def test_gold_answers_are_scored_against_themselves(write: Callable[..., Path], tmp_path: Path) -> None:
    golds = [{"gold": "12"}, {"gold": "\\frac{1}{2}"}, {"gold": 3}]
    status, printed, _ = run(file=write(*golds), reward="math", gold=True)
    assert (status, printed.splitlines()[-1]) == (0, "all 3 gold answers score 1")
    out = tmp_path / "out.jsonl"
    status, printed, _ = run(file=write(*golds, {"gold": "no } answer"}, {"gold": ""}), reward="math", gold=True, out=out)
    assert status == 1
    lines = printed.splitlines()
    assert lines[-1] == "2 of 5 gold answers do not score 1"
    assert lines[0].startswith("  line 4: gold 'no } answer' scores ") and lines[1].startswith("  line 5: gold '' scores ")
    assert [row["score"] == 1 for row in read(out)] == [True, True, True, False, False]


def test_a_template_says_how_a_model_writes_the_gold_answer(write: Callable[..., Path], mine: str) -> None:
    file = write({"gold": "12"})
    assert run(file=file, reward="math", gold=True, gold_template="<answer>{}</answer>")[0] == 0
    assert run(file=file, reward="math", gold=True, gold_template="the {}")[0] == 1
    assert run(file=file, reward=f"{mine}:moody", gold=True)[0] == 0  # as it is
    assert run(file=write(), reward="math", gold=True)[0] == 1  # nothing was shown


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"reward": "format", "gold": True}, "--gold: this reward compares with no gold answer"),
        ({"reward": "math", "gold": True, "gold_template": "x"}, "--gold-template: 'x' does not say where"),
        ({"reward": "math", "gold_template": "{}"}, "--gold-template: means nothing without --gold"),
    ],
)
def test_gold_options_that_cannot_work(write: Callable[..., Path], task: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(file=write(*ROWS), **task)


# ---- two graders


def test_two_graders_side_by_side(write: Callable[..., Path], tmp_path: Path, mine: str) -> None:
    file, out = write(*ROWS), tmp_path / "out.jsonl"
    status, printed, _ = run(file=file, reward="math", compare=f"{mine}:contains style=grader", out=out)
    rows = read(out)
    assert status == 0
    assert [(row["score"], row["compare_score"]) for row in rows] == [(1, 1), (0, 0), (1, 0), (0, 0)]
    assert list(rows[0])[-4:] == ["compare_score", "compare_outcome", "compare_extracted", "compare_seconds"]
    lines = printed.splitlines()
    assert lines[0] == "  line 3: gold '0.5': math 1 '\\\\frac{1}{2}', contains 0"
    assert lines[-1] == "they differ on 1 of 4 rows (25.00%)"
    table = [line.split() for line in lines[-5:-1]]
    assert table == [["math", "contains", "rows"], ["0", "0", "2"], ["1", "1", "1"], ["1", "0", "1"]]
    assert sum("rows/s a worker, median" in line for line in lines) == 2


def test_a_reward_beside_itself_and_one_that_fails(write: Callable[..., Path], mine: str) -> None:
    rows = [{"gold": "x", "completion": text} for text in ("x", "raise")]
    _, printed, _ = run(file=write(*rows), reward=f"{mine}:moody", compare=f"{mine}:moody")
    assert "compare: mean 1.0000" in printed and "they differ on 0 of 2 rows (0.00%)" in printed
    _, printed, _ = run(file=write(*rows), reward=f"{mine}:moody", compare=f"{mine}:length")
    assert "  line 2: gold 'x': moody unscored (error)" in printed
    assert "they differ on 1 of 2 rows (50.00%)" in printed


def test_math_verify_to_compare_with(write: Callable[..., Path]) -> None:
    pytest.importorskip("math_verify")
    _, printed, _ = run(file=write(*ROWS), reward="math", compare="math-verify")
    assert "they differ on 0 of 4 rows" in printed


# ---- naming a reward


def test_how_a_reward_is_named(mine: str) -> None:
    for name, built_in in BUILT_IN.items():
        assert parse_reward(name, "--reward")[0].ref.target == built_in.target
    part, _ = parse_reward("grpo.rewards.length.soft_overlong max_tokens=100 buffer=20 limits.cpu_s=2", "--reward")
    assert (part.name, dict(part.ref.kwargs), dict(part.limits)) == ("soft_overlong", {"max_tokens": 100, "buffer": 20}, {"cpu_s": 2})
    part, _ = parse_reward("operator:contains", "--compare")
    assert (part.name, part.ref.target, part.style) == ("contains", "operator.contains", "grader")
    part, _ = parse_reward(f"'{mine}:length'", "--reward")
    assert part.ref.target == f"{mine}:length"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("maths", "--reward: 'maths' is no built-in reward"),
        ("", "--reward: is empty"),
        ("grpo.rewards.math.accurate", "--reward: fn: cannot load"),
        ("nowhere.py:f", "--reward: fn: the file 'nowhere.py' does not exist"),
        ("math tolerance", "--reward: 'tolerance' is not of the form key=value"),
        ("math tolerance=1", "--reward: tolerance: .* takes no argument 'tolerance'"),
        ("math style=verl", "--reward: fn: style verl passes"),
        ("math limits.cpu_s=0", "--reward: limits: cpu_s is 0"),
    ],
)
def test_a_reward_that_cannot_be_used_is_explained(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_reward(spec, "--reward")


def test_the_command_explains_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "--reward", "math", "nowhere.jsonl"]) == 1
    assert "grpo: FILE: 'nowhere.jsonl' does not exist" in capsys.readouterr().err
    assert cli.main(["score", "--reward", "math", __file__, "--workers", "-1"]) == 1
    assert "--workers: is -1" in capsys.readouterr().err


def test_the_numbers_of_the_summary() -> None:
    tally = score.Tally()
    for index in range(100):
        one = score.Judgement(score.Score(value=index % 2), seconds=(index + 1) / 1000)
        tally.add(one)
    tally.add(score.Judgement(score.Score(value=math.nan, outcome=score.Outcome.crash), seconds=2.0))
    # Σ 1…100 ms = 5.05 s, and 2 s: 101 / 7.05 = 14.3 a second; 101 values: the 51st is the median, ⌈0.99 · 101⌉ = the 100th is p99
    assert str(tally).splitlines() == [
        "mean 0.5000 · ok 100, unscored (crash) 1",
        "  14 rows/s a worker, median 51 ms, p99 100 ms, longest 2 s",
    ]
