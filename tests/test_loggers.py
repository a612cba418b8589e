"""Loggers against the real thing: W&B offline and against a dead server, TensorBoard events, the terminal at three widths."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grpo.best import Best
from grpo.config import ConfigError, WandbConfig, WandbMode
from grpo.console import (
    ConsoleLogger,
    Terminal,
    best_line,
    clip,
    does_limit_hurt,
    evaluation_line,
    printable,
    prompt_tail,
    sample_table,
    step_columns,
    step_line,
    time_line,
    warnings,
)
from grpo.loggers import JsonlLogger, Logger, Loggers, TensorBoardLogger, WandbLogger, has_wandb_key, wandb_mode
from grpo.run import RunFolder
from grpo.toy import toy_group
from grpo.types import Completion, FinishReason, Group, Problem, Rollout, Score

CONFIG = {"run": {"steps": 60}, "eval": {"temperature": 1.0, "metric": "accuracy"}, "optim": {"lr": 1e-5}}
STEP = {
    "reward/mean": 0.5,
    "reward/accuracy/mean": 0.25,
    "reward/format/mean": 1.0,
    "rollout/pass_rate": 0.25,
    "completion/length_mean": 31.0,
    "completion/truncated_share": 0.125,
    "policy/entropy": 1.5,
    "policy/grad_norm": 0.75,
    "sampler/k3": 2e-4,
    "time/generate": 6.5,
    "time/step": 10.0,
    "time/elapsed": 120.0,
}
EVALUATION = {"eval/pass@1": 0.12, "eval/pass@1_ci95": 0.03, "eval/problems": 128.0, "eval/samples": 1.0}


def make_group(texts: Mapping[str, float], name: str = "a") -> Group:
    problem = Problem(id=name, prompt="Solve it.\n\nUser: 3 + 4?\nAssistant:", answer="7")
    rollouts = []
    for index, (text, reward) in enumerate(texts.items()):
        completion = Completion(
            problem_id=name,
            index=index,
            prompt_ids=(1,),
            token_ids=(1, 2),
            text=text,
            logprobs=(-0.1, -0.2),
            policy_versions=(0, 0),
            finish_reason=FinishReason.stop,
        )
        rollouts.append(Rollout(problem=problem, completion=completion, scores={"accuracy": Score(value=reward)}, reward=reward))
    return Group(problem=problem, rollouts=tuple(rollouts))


GROUPS = [make_group({"it is 7<|im_end|>": 1.0, "[bold]no[/bold] \x1b[2J": 0.0})]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "recipe", "name")
    folder.write_config("run: {steps: 60}\n")
    return folder


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a W&B account, whatever the machine holds."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home/.netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def show(width: int, run: RunFolder, is_terminal: bool = False, failed: bool = False) -> str:
    """What a run of 22 steps prints."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=is_terminal, highlight=False, legacy_windows=False)
    logger = ConsoleLogger(sample_every=10, console=console)
    logger.start(CONFIG, run, None)
    logger.log(0, EVALUATION)
    for step in range(1, 23):
        logger.phase("generating", 87, 128)
        logger.log_rollouts(step, GROUPS, {("a", 0): 0.5})
        logger.log(step, STEP)
    logger.log(22, {**EVALUATION, "eval/pass@1": 0.87})
    logger.finish({}, failed=failed)
    return file.getvalue()


# ---------------------------------------------------------------- fan-out, JSONL, TensorBoard


def test_all_loggers_finish_even_if_one_fails(run: RunFolder) -> None:
    finished = []

    class Recorder(Logger):
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def finish(self, summary: Mapping[str, Any], failed: bool = False) -> None:
            finished.append(failed)
            if self.fails:
                raise OSError("disk full")

    loggers = Loggers([Recorder(False), Recorder(True), Recorder(False)])
    loggers.start(CONFIG, run, None)
    loggers.log(1, STEP)
    loggers.phase("generating")
    with pytest.raises(OSError, match="disk full"):
        loggers.finish({}, failed=True)
    assert finished == [True, True, True]


def test_jsonl_adds_a_line_a_step(run: RunFolder) -> None:
    for number in (1, 2):  # the second start goes on behind what is there; ``grpo.checkpoint.rewind`` has cut it to its checkpoint
        logger = JsonlLogger()
        logger.start(CONFIG, run, resumed_from=number - 1)
        logger.log(number, {"reward/mean": float(number)})
    assert run.read_metrics() == [{"step": 1, "reward/mean": 1.0}, {"step": 2, "reward/mean": 2.0}]


def test_tensorboard_holds_the_scalars(run: RunFolder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger()
    logger.start(CONFIG, run, None)
    logger.log(1, {"reward/mean": 0.5})
    logger.log(2, {"reward/mean": 0.75})
    logger.finish({})
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.5), (2, 0.75)]


# ---------------------------------------------------------------- Weights & Biases


@pytest.mark.usefixtures("nobody")
def test_wandb_offline_for_real(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    for resumed_from in (None, 1):  # the same run, gone on with
        logger = WandbLogger(WandbConfig(project="grpo-test", tags=["tiny"]))
        logger.start(CONFIG, run, resumed_from)
        logger.log(1, STEP)
        logger.log_rollouts(1, GROUPS * 40, {("a", 0): 0.5})
        logger.finish({"best": 0.5})
    assert time.monotonic() - started < 30
    assert capfd.readouterr().err == ""
    identifier = (run.path / "wandb_id").read_text()
    folders = sorted(run.path.glob(f"wandb/offline-run-*-{identifier}"))
    assert folders, "no offline run under the run folder"
    recorded = next(folders[0].glob("*.wandb")).read_bytes()  # protocol buffers, uncompressed
    for needle in (b"reward/accuracy/mean", b"sampler/k3", b"grpo-test", b"tiny", b"best", b"rollouts"):
        assert needle in recorded
    tables = list(folders[0].rglob("*.table.json"))
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    assert len(table["data"]) <= WandbLogger.max_rollouts
    assert table["columns"] == ["problem", "prompt", "completion", "answer", "reward", "advantage", "accuracy"]


@pytest.mark.usefixtures("nobody")
def test_wandb_without_its_server_warns_once_and_goes_on_offline(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    logger = WandbLogger(WandbConfig(), init_timeout=2, finish_timeout=2)
    started = time.monotonic()
    logger.start(CONFIG, run, None)
    logger.log(1, STEP)
    logger.finish({})
    assert time.monotonic() - started < 20
    said = capsys.readouterr().err
    assert said.count("Weights & Biases failed, training goes on") == 1
    assert f"it logs offline now; when its server can be reached: wandb sync {run.path}/wandb/offline-run-*" in said
    (offline,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"reward/accuracy/mean" in offline.read_bytes(), "what was logged is in it"


@pytest.mark.usefixtures("nobody")
def test_a_wandb_process_that_dies_is_said_once_and_costs_nothing_but_its_log(run: RunFolder) -> None:
    """In an interpreter of its own, since what wandb does at its end is part of it."""
    script = f"""
import os, signal
from pathlib import Path
from grpo.config import WandbConfig
from grpo.loggers import WandbLogger
from grpo.run import RunFolder

logger = WandbLogger(WandbConfig(), init_timeout=20, finish_timeout=20)
logger.start({{}}, RunFolder(Path({str(run.path)!r})), None)
logger.log(1, {{"x": 1.0}})
children = [c for thread in Path("/proc/self/task").iterdir() for c in (thread / "children").read_text().split()]
service = [int(c) for c in children if "wandb-core" in Path(f"/proc/{{c}}/cmdline").read_text()]
for process in service:
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
for step in range(2, 20):
    logger.log(step, {{"x": 1.0}})
logger.finish({{"best": 1.0}})
print("trained on", len(service))
"""
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not the service of the tests before
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=alone)
    assert (done.returncode, done.stdout) == (0, "trained on 1\n"), done.stderr
    assert done.stderr.count("warning: Weights & Biases failed, training goes on") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("nobody")
def test_wandb_mode_never_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode(WandbMode.auto) is WandbMode.offline
    with pytest.raises(ConfigError, match=r"logger.wandb.mode: is online, but there is no W&B API key\n.*wandb login"):
        wandb_mode(WandbMode.online)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(WandbMode.auto) is WandbMode.disabled
    assert wandb_mode(WandbMode.offline) is WandbMode.offline  # the configuration beats the environment
    monkeypatch.delenv("WANDB_MODE")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    assert wandb_mode(WandbMode.auto) is WandbMode.online
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()


def test_wandb_disabled_touches_nothing(run: RunFolder) -> None:
    logger = WandbLogger(WandbConfig(mode=WandbMode.disabled))
    logger.start(CONFIG, run, None)
    logger.log(1, STEP)
    logger.finish({})
    assert sorted(file.name for file in run.path.iterdir()) == ["config.yaml"]


# ---------------------------------------------------------------- the terminal


@pytest.mark.parametrize("width", [80, 160])
def test_rows_fit_and_align(run: RunFolder, width: int) -> None:
    lines = show(width, run).splitlines()
    headers = [line for line in lines if line.lstrip().startswith("step")]
    rows = [line for line in lines if re.match(r" *\d+/60", line)]
    assert len(headers) == 2  # 22 rows, a header every 20
    assert len(rows) == 22
    assert all(len(line) == len(headers[0]) <= width for line in headers + rows)
    assert {"reward", "pass", "length"} <= set(headers[0].split())
    assert ("gen" in headers[0].split()) == (width == 160)


def test_a_file_gets_plain_text_and_no_phases(run: RunFolder) -> None:
    text = show(160, run)
    assert "\x1b" not in text and "\r" not in text and "generating" not in text
    assert "held-out pass@1 0.12 ± 0.03 (128 problems, T=1.0)" in text
    assert "held-out pass@1 0.12 → 0.87 in 2 min; " in text.splitlines()[-1]
    assert "[bold]no[/bold] \\x1b[2J" in text and "it is 7<|im_end|>" in text and "advantage +0.50" in text


def test_a_terminal_gets_colour_and_phases(run: RunFolder) -> None:
    text = show(80, run, is_terminal=True)
    assert "\x1b[" in text and "\x1b[2J" not in text
    assert "step 1/60 · generating 87/128" in text


def test_a_failed_run_says_where_it_stopped(run: RunFolder) -> None:
    assert "stopped after step 22; held-out" in show(160, run, failed=True).splitlines()[-1]


def test_resumed_run_knows_its_first_evaluation(run: RunFolder) -> None:
    run.append_metrics({"step": 0, **EVALUATION})
    run.append_metrics({"step": 5, **STEP})
    file = io.StringIO()
    logger = ConsoleLogger(console=Console(file=file, width=160))
    logger.start(CONFIG, run, resumed_from=3)
    logger.log(4, {**STEP, "eval/pass@1": 0.5})
    logger.finish({})
    assert "resumed after step 3" in file.getvalue()
    assert "held-out pass@1 0.12 → 0.50 in 2 min" in file.getvalue()


def test_missing_and_infinite_metrics_show_as_such() -> None:
    columns = step_columns(200, ["accuracy"], 60)
    cells = step_line(columns, {"step": 3, "reward/mean": float("nan"), "policy/grad_norm": float("inf")}).split()
    assert cells[:2] == ["3/60", "–"]
    assert cells.count("inf") == 1 and cells.count("–") == len(columns) - 2


@pytest.mark.parametrize("width", [1, 30, 60, 80, 100, 120, 200])
def test_narrow_terminals_lose_columns_but_never_step_and_reward(width: int) -> None:
    titles = [column.title for column in step_columns(width, ["accuracy", "a_rather_long_name"], 1000)]
    assert titles[:2] == ["step", "reward"]


def test_evaluation_line_with_samples() -> None:
    metrics = {"eval/pass@1": 0.5, "eval/pass@4": 0.75, "eval/samples": 4.0, "eval/problems": 10.0}
    assert evaluation_line(metrics, 0.6) == "held-out pass@1 0.50, pass@4 0.75 (10 problems, T=0.6)"


def test_warnings_in_words() -> None:
    assert warnings([]) == [] and warnings([STEP] * 9) == [] and warnings([EVALUATION]) == []
    cut = {**STEP, "completion/truncated_share": 0.98, "completion/length_max": 48.0}
    assert warnings([cut]) == ["98 % of completions were cut off at 48 tokens: raise rollout.max_new_tokens"]
    flat = {**STEP, "rollout/groups_without_signal": 1.0}
    assert warnings([flat] * 4) == []
    assert warnings([flat] * 3 + [EVALUATION] + [flat] * 2)[0].startswith("every group had equal rewards for 5 steps")
    assert "k3 is 0.2, above 0.1" in warnings([{**STEP, "sampler/k3": 0.2}])[0]
    assert "not finite" in warnings([{**STEP, "policy/loss": float("nan")}])[0]
    assert warnings([{**STEP, "rollout/unscored": 3.0}])[0].startswith("3 completions could not be scored")


def test_a_cut_off_completion_may_be_right() -> None:
    """As one token for one digit: rewards are whether it passes, then whether it was cut off."""

    def costs(passed: list[float], cut: list[bool]) -> bool:
        return does_limit_hurt([toy_group("a", passed, [1] * 4, truncated=cut, parts=[{"accuracy": p} for p in passed])], "accuracy")

    assert not costs([1, 0, 0, 0], [True] * 4), "nothing ended, and one passes"
    assert costs([0, 0, 0, 0], [True] * 4), "none passes"
    assert not costs([1, 0, 0, 0], [True, True, True, False]), "1 of 3 against 0 of 1"
    assert costs([1, 0, 1, 1], [True, True, False, False]), "1 of 2 against 2 of 2"
    cut = {**STEP, "completion/truncated_share": 0.98}
    assert warnings([cut], limit_hurts=True) and not warnings([cut], limit_hurts=False)


def test_the_first_step_of_tiny_digits_is_no_reason_to_warn(run: RunFolder) -> None:
    for passed, warned in ((1.0, 0), (0.0, 1)):
        file = io.StringIO()
        logger = ConsoleLogger(sample_every=0, console=Console(file=file, width=160))
        logger.start(CONFIG, run, None)
        logger.log_rollouts(1, [toy_group("a", [passed, 0], [1, 1], truncated=[True, True], parts=[{"accuracy": passed}, {"accuracy": 0}])])
        logger.log(1, {**STEP, "completion/truncated_share": 1.0})
        assert file.getvalue().count("raise rollout.max_new_tokens") == warned


def test_the_end_says_which_model_is_the_best(run: RunFolder) -> None:
    best = Best(step=22, score=0.87)
    recorded = [{"step": 22, **EVALUATION, "eval/pass@1": 0.87}]
    assert best_line(best, [*recorded, {"step": 23, **STEP}]) == "checkpoints/best is the model of step 22 (held-out pass@1 0.87)"
    assert best_line(best, recorded) == "", "it need not be said"
    for other in ([{"step": 22, **STEP}], [{"step": 4, **EVALUATION}], []):
        assert best_line(best, other).endswith("0.87), made before this run went back to an earlier checkpoint")
    run.best_checkpoint.mkdir(parents=True)
    for score, said in ((0.87, 0), (0.9, 1)):
        (run.best_checkpoint / "evaluation.json").write_text(Best(step=22, score=score).to_json())
        assert show(160, run).count("checkpoints/best is") == said


def test_a_reader_that_has_gone_is_told_to_whoever_prints() -> None:
    """rich itself ends the process."""
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), os.fdopen(writing, "w") as file:
        console = Terminal(file=file)
        with pytest.raises(BrokenPipeError):
            console.print("said to nobody")
        console.print("nor this")


def test_a_warning_is_not_repeated_every_step(run: RunFolder) -> None:
    file = io.StringIO()
    logger = ConsoleLogger(sample_every=0, console=Console(file=file, width=160))
    logger.start(CONFIG, run, None)
    for step in range(1, 42):
        logger.log(step, {**STEP, "completion/truncated_share": 0.6 + step / 1000})
    assert file.getvalue().count("warning: ") == 3  # steps 1, 21, 41


def test_model_text_is_data() -> None:
    assert printable("a\n\x1b[31m\tü\u202e") == "a\n\\x1b[31m\\tü\\u202e"
    assert prompt_tail("template\n\nUser: 3 + 4?\nAssistant:") == "User: 3 + 4?\nAssistant:"
    assert clip("x" * 100, 30) == "x" * 20 + " … 70 characters … " + "x" * 10
    console = Console(file=io.StringIO(), width=80)
    console.print(sample_table(1, [make_group({"[/red] [link=x]": 1.0}).rollouts[0]], {}))
    assert "[/red] [link=x]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_narrow_terminal_shows_the_times_in_a_line_of_their_own() -> None:
    row = {**STEP, "time/generate": 6.14, "time/reward": 0.2, "time/update": 14.0, "time/sync": 0.4, "throughput/problems_per_s": 0.81}
    narrow = step_columns(80, ["accuracy", "format"], 30)
    assert time_line(narrow, row) == "    generate 6.1s · reward 0.2s · update 14.0s · sync 0.4s · 0.81 problems/s"
    wide = step_columns(300, ["accuracy", "format"], 30)
    assert time_line(wide, row) == ""
    assert time_line(wide, {**row, "time/eval": 31.0}) == "    eval 31.0s", "there is no column for it"
