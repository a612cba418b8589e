"""The run folder and the metrics of a step: golden values with their arithmetic, and what a crash may leave behind."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.conditions import check_conditions, conditions
from grpo.config import Config, ConfigError, EngineName, RolloutConfig, ScheduleName
from grpo.environment_record import environment
from grpo.metrics import best_and_worst, bootstrap_half_width, duration, eval_metrics, headline, pass_at_k, rollout_metrics
from grpo.rollout_table import groups_of
from grpo.rollouts.transfer import Disk
from grpo.run import RunFolder
from grpo.storage import StorageError, storage
from grpo.types import Completion, FinishReason, Group, Outcome, Problem, Rollout, Score

NAN = math.nan


def rollout(
    problem: Problem, index: int, accuracy: float, form: float = 1.0, length: int = 3, cut: bool = False, text: str = "12"
) -> Rollout:
    completion = Completion(
        problem_id=problem.id,
        index=index,
        prompt_ids=(5, 9),
        token_ids=tuple(range(length)),
        text=text,
        logprobs=(-0.5,) * length,
        policy_versions=(4,) * length,
        finish_reason=FinishReason.length if cut else FinishReason.stop,
    )
    scores = {
        "accuracy": Score(value=accuracy, outcome=Outcome.timeout if math.isnan(accuracy) else Outcome.ok, detail="12"),
        "format": Score(value=form, outcome=Outcome.ok if form else Outcome.wrong_format),
    }
    return Rollout(problem=problem, completion=completion, scores=scores, reward=accuracy + 0.5 * form)


def group(name: str, accuracies: list[float], **options: object) -> Group:
    problem = Problem(id=name, prompt="Add them.\n3 + 4 + 5?", answer="12", columns={"a": 3, "note": "ü"})
    return Group(problem=problem, rollouts=tuple(rollout(problem, i, a, **options) for i, a in enumerate(accuracies)))  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path, "recipe", "name")
    folder.write_config("run: {steps: 3}\n")
    return folder


# ---------------------------------------------------------------- metrics


def test_rollout_metrics_golden() -> None:
    a, b, c = (Problem(id=name, prompt="?", answer="1") for name in "abc")
    groups = [
        Group(problem=a, rollouts=(rollout(a, 0, 1.0, 1.0, 2, text="Wait, but check: 12. Await"), rollout(a, 1, 0.0, 0.0, 6, cut=True))),
        Group(problem=b, rollouts=(rollout(b, 0, 1.0, 1.0, 4), rollout(b, 1, 1.0, 1.0, 4))),
        Group(problem=c, rollouts=(rollout(c, 0, 0.0, 1.0, 3), rollout(c, 1, NAN, 1.0, 5))),
    ]
    metrics = rollout_metrics(groups, "accuracy", {"accuracy": 1.0, "format": 0.5})
    # rewards: 1.5, 0 | 1.5, 1.5 | 0.5, unscored
    assert metrics["reward/mean"] == pytest.approx(1.0)  # 5 / 5
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.4))  # (0.25 + 1 + 0.25 + 0.25 + 0.25) / 5
    assert metrics["reward/accuracy/mean"] == pytest.approx(3 / 5)
    assert metrics["reward/format/mean"] == pytest.approx(5 / 6)
    assert metrics["reward/format/weighted"] == pytest.approx(5 / 12)
    assert metrics["unscored/accuracy/timeout"] == 1
    assert metrics["outcome/format/wrong_format"] == 1
    assert not any(key.endswith("/ok") for key in metrics)
    assert metrics["rollout/pass_rate"] == pytest.approx(3 / 6)  # the unscored one does not pass
    assert metrics["rollout/solve_all"] == pytest.approx(1 / 3)  # b
    assert metrics["rollout/solve_none"] == pytest.approx(1 / 3)  # c
    assert metrics["rollout/groups_without_signal"] == pytest.approx(2 / 3)  # b: 1.5 = 1.5; c: one scored rollout alone
    assert metrics["rollout/unscored"] == 1
    assert metrics["completion/length_mean"] == pytest.approx(4.0)  # (2 + 6 + 4 + 4 + 3 + 5) / 6
    assert metrics["completion/length_max"] == 6
    assert metrics["completion/terminated_length_mean"] == pytest.approx(3.6)  # (2 + 4 + 4 + 3 + 5) / 5
    assert metrics["completion/truncated_share"] == pytest.approx(1 / 6)
    assert metrics["completion/reflection_words"] == pytest.approx(3 / 6)  # wait, but, check; "Await" is another word


def test_signal_is_exact_equality() -> None:
    assert rollout_metrics([group("a", [0.1, 0.1 + 1e-12])], "accuracy", {"accuracy": 1, "format": 1})["rollout/groups_without_signal"] == 0


def test_metrics_of_nothing_are_nan_not_an_error() -> None:
    metrics = rollout_metrics([], "accuracy", {})
    assert math.isnan(metrics["reward/mean"])
    assert metrics["rollout/unscored"] == 0
    assert math.isnan(eval_metrics([], "accuracy")["eval/pass@1"])


def test_unknown_metric_names_the_parts() -> None:
    with pytest.raises(ValueError, match=r"no reward part 'exact'; the parts are: accuracy, format"):
        rollout_metrics([group("a", [1.0])], "exact", {"accuracy": 1, "format": 1})


def test_eval_metrics_golden() -> None:
    metrics = eval_metrics([group("a", [1, 0]), group("b", [0, 0]), group("c", [1, 1]), group("d", [0, 1])], "accuracy")
    assert metrics["eval/pass@1"] == pytest.approx(0.5)  # (1/2 + 0 + 1 + 1/2) / 4
    assert metrics["eval/pass@2"] == pytest.approx(0.75)  # a, c and d have one that passes
    assert metrics["eval/reward/accuracy"] == pytest.approx(0.5)
    assert metrics["eval/reward/format"] == pytest.approx(1.0)
    assert (metrics["eval/problems"], metrics["eval/samples"]) == (4, 2)
    assert "eval/pass@1_ci95" in metrics


def test_bootstrap_matches_the_normal_interval() -> None:
    # 400 draws with mean 0.5: 1.96 · 0.5 / √400 = 0.049
    values = [0.0, 1.0] * 200
    assert bootstrap_half_width(values) == pytest.approx(0.049, abs=0.006)
    assert bootstrap_half_width(values) == bootstrap_half_width(values)
    assert bootstrap_half_width([1.0] * 5) == 0


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(case: tuple[int, int, int]) -> None:
    n, c, k = case
    draws = list(itertools.combinations(range(n), k))  # samples 0 … c-1 pass
    share = sum(min(draw) < c for draw in draws) / len(draws)
    assert pass_at_k(n, c, k) == pytest.approx(share)


@pytest.mark.parametrize("case", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_has_no_meaning(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="needs 0 ≤ c ≤ n"):
        pass_at_k(*case)


def test_best_and_worst() -> None:
    assert best_and_worst({"a": [1.0, 1.0], "b": [0.0, NAN, 2.0]}) == [("b", 2), ("b", 0)]
    assert best_and_worst({"a": [1.0, 1.0], "b": [0.0, 0.0]}) == [("a", 1), ("b", 0)]
    assert best_and_worst({"a": [1.0]}) == [("a", 0)]
    assert best_and_worst({"a": [NAN]}) == []


def test_headline() -> None:
    rows = [{"step": 0, "eval/pass@1": 0.12}, {"step": 9, "reward/mean": 1.0, "time/elapsed": 660.0}, {"step": 9, "eval/pass@1": 0.87}]
    assert headline(rows) == "held-out pass@1 0.12 → 0.87 in 11 min"
    assert headline(rows[1:2]) == "training reward 1.00"
    assert headline([]) == "no step was finished"
    assert [duration(s) for s in (45, 59.9, 11 * 60, 3 * 3600 + 300)] == ["45 s", "1 min", "11 min", "3 h 05 min"]


# ---------------------------------------------------------------- the folder


def test_a_run_without_a_name_gets_the_time_and_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [RunFolder.create(tmp_path, "recipe") for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert all(folder.path.is_dir() and folder.recipe == "recipe" for folder in folders)


def test_a_start_that_failed_does_not_block_its_name(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "recipe", "name")
    run.write_config("a: 1\n")  # then the model could not be loaded, say
    assert RunFolder.create(tmp_path, "recipe", "name") == run


def test_a_run_is_not_overwritten_but_can_be_resumed(tmp_path: Path, run: RunFolder) -> None:
    run.append_metrics({"step": 0})
    with pytest.raises(ConfigError, match=r"run.name: .* holds a run already\n.*grpo train .*"):
        RunFolder.create(tmp_path, "recipe", "name")
    assert RunFolder.create(tmp_path, "recipe", "name", resume=True) == run
    with pytest.raises(ConfigError, match="does not exist"):
        RunFolder.create(tmp_path, "recipe", "other", resume=True)
    with pytest.raises(ConfigError, match=r"run\.name is empty"):
        RunFolder.create(tmp_path, "recipe", resume=True)


@pytest.mark.parametrize("name", ["..", "a/b"])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a folder"):
        RunFolder.create(tmp_path, "recipe", name)


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.dir: cannot make .*Not a directory"):
        RunFolder.create(tmp_path / "file", "recipe", "name")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who runs many a CI, may write anywhere
    with pytest.raises(ConfigError, match=r"Permission denied\n.*you can write to"):
        RunFolder.create(tmp_path, "recipe")


def test_open_refuses_what_is_no_run(tmp_path: Path, run: RunFolder) -> None:
    assert RunFolder.open(run.path) == run
    with pytest.raises(ConfigError, match=r"not a run folder: it has no config\.yaml"):
        RunFolder.open(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"notes\.txt' is a file, not a run folder\n  → give runs/"):
        RunFolder.open(tmp_path / "notes.txt")


def test_environment_is_complete_and_json(run: RunFolder) -> None:
    assert run.read_environment() == {}
    run.write_environment(environment({"trainer_threads": 2}))
    recorded = json.loads(run.environment_file.read_text())
    assert recorded == run.read_environment()
    assert recorded["cores"] >= 1 and recorded["memory_gib"] > 0 and recorded["packages"]["torch"]
    assert recorded["conditions"] == {"trainer_threads": 2}
    for damaged in ("{", "[]"):
        run.environment_file.write_text(damaged)
        assert run.read_environment() == {}


# ---------------------------------------------------------------- what the bits rest on


def held(*, threads: int = 2, precision: str = "bfloat16", **settings: object) -> dict[str, object]:
    """The environment of a run, with other settings of ``rollout`` and ``trainer`` than their defaults."""
    config = Config(rollout=RolloutConfig(engine=EngineName.vllm, schedule=ScheduleName.fixed))
    for name, value in settings.items():
        setattr(config.trainer if name == "ranks" else config.rollout, name, value)
    now = conditions(config, cpus_per_engine=2, trainer_threads=threads, device="cpu", precision=precision, cpu_instructions="AVX512")
    return {"conditions": dict(now), "packages": {"torch": "2.13.0", "vllm": "0.32.0", "transformers": "5.16.1"}, "cpu": "Xeon"}


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({}, True),
        ({"schedule": ScheduleName.free}, False),
        ({"engine": EngineName.hf, "schedule": ScheduleName.free}, True),
        ({"engine": EngineName.scripted, "schedule": ScheduleName.free}, True),
        ({"engine": EngineName.hf, "schedule": ScheduleName.free, "max_staleness": 1}, False),
        ({"ranks": 2}, False),
    ],
)
def test_what_promises_the_same_bits(settings: dict[str, object], exact: bool) -> None:
    recorded = held(**settings)["conditions"]
    assert isinstance(recorded, dict) and recorded["exact"] is exact
    assert ("cpus_per_engine" in recorded) == ("engine" not in settings), "an engine in the trainer's process has the trainer's threads"


def test_a_changed_condition_is_refused_or_said() -> None:
    before = held()
    assert check_conditions(before, held(), exact=True) == []
    with pytest.raises(ConfigError, match=r"run\.exact: .* was 2 and is 4; precision was bfloat16 and is float32\n") as caught:
        check_conditions(before, held(threads=4, precision="float32"), exact=True)
    remedy = str(caught.value).splitlines()[1]
    assert remedy == "  → OMP_NUM_THREADS=2 in front of the command, model.precision=bf16; or go on all the same: run.exact=false"
    assert check_conditions(before, held(num_engines=2), exact=True) == [], "under the fixed schedule it does not matter how many"
    assert check_conditions(before, held(threads=4), exact=False) == ["trainer_threads was 2 and is 4: from here on the bits may be others"]
    free = held(schedule=ScheduleName.free)
    assert check_conditions(free, held(threads=4, schedule=ScheduleName.free), exact=True) == [], "nothing was promised"


def test_what_is_not_known_of_the_start_is_not_compared_and_said() -> None:
    said = ["the record of what this run was started with (environment.json) is gone or damaged: from here on the bits may be others"]
    assert check_conditions({}, held(), exact=True) == said
    assert check_conditions({"weight_self_test": {}}, held(), exact=True) == said
    assert check_conditions({}, held(schedule=ScheduleName.free), exact=True) == [], "nothing is promised"


def test_other_versions_and_cpus_are_a_warning() -> None:
    now = held() | {"packages": {"torch": "2.14.0", "vllm": "0.32.0", "transformers": "5.16.1"}, "cpu": "EPYC"}
    assert check_conditions(held(), now, exact=True) == [
        "torch was 2.13.0 and is 2.14.0: from here on the bits may be others",
        "the CPU was Xeon and is EPYC: from here on the bits may be others",
    ]


# ---------------------------------------------------------------- what a crash, a disk and another process may do


def test_metrics_survive_nan_and_a_torn_last_line(run: RunFolder) -> None:
    assert run.read_metrics() == []
    run.append_metrics({"step": 1, "policy/loss": NAN, "policy/grad_norm": math.inf})
    run.append_metrics({"step": 2, "policy/loss": 0.5})
    assert json.loads(run.metrics_file.read_text().splitlines()[0]) == {"step": 1, "policy/loss": None, "policy/grad_norm": None}
    whole = run.metrics_file.read_bytes()
    torn = b'{"step": 3, "note\xc3'  # cut within a character
    for cut in range(len(torn) + 1):
        run.metrics_file.write_bytes(whole + torn[:cut])
        assert [row["step"] for row in run.read_metrics()] == [1, 2]
    assert math.isnan(run.read_metrics()[0]["policy/loss"])


@pytest.mark.parametrize("line", ['{"st', "2"])
def test_a_damaged_line_in_the_middle_is_an_error(run: RunFolder, line: str) -> None:
    run.metrics_file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ConfigError, match=r"^metrics: '.*metrics\.jsonl', line 2 is not a JSON object: .*\n  → remove the line$"):
        run.read_metrics()


@pytest.mark.parametrize("line", ["{}", '{"reward/mean": 0.5}', '{"step": 2, "reward/mean": "0.5"}'])
def test_a_line_that_is_no_row_is_an_error(run: RunFolder, line: str) -> None:
    run.metrics_file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ConfigError, match=r"^metrics: .*line 2 is no row of a step's numbers: .*\n  → remove the line$"):
        run.read_metrics()


def test_resume_forgets_what_came_after_the_checkpoint(run: RunFolder) -> None:
    for step in (1, 2, 3):
        run.append_metrics({"step": step, "reward/mean": 0.5, "policy/loss": NAN})
        run.write_rollouts(step, [group("a", [1.0])])
        run.write_rollouts(step, [group("a", [1.0])], folder="eval")
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "rew')
    (run.path / "rollouts" / ".step_000003.parquet.77.tmp").write_text("PAR")
    (run.path / ".report.html.77.tmp").write_text("<ht")
    Disk(run.exchange).send({"w": torch.zeros(3)})  # of a process that was killed, for engines that ended with it
    (run.exchange / "half.part").write_text("{")
    run.rewind(2, {})
    run.append_metrics({"step": 3, "reward/mean": 0.7})
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3]
    assert math.isnan(run.read_metrics()[0]["policy/loss"])
    run.drop_metrics(2)
    assert [row["step"] for row in run.read_metrics()] == [1, 3]
    assert run.rollout_steps() == run.rollout_steps("eval") == [1, 2]
    assert not list(run.path.rglob("*.tmp")) and not run.exchange.exists()


def test_rollouts_round_trip(run: RunFolder) -> None:
    groups = [group("train/1", [1.0, NAN], text="a\n\ud800"), group("train/2", [0.0], form=0.0, length=0, cut=True)]
    weights = {("train/1", 0): [0.25, 0.5, 1.0]}
    run.write_rollouts(7, groups, advantages={("train/1", 0): 0.5}, extra={"weights": weights})
    table = run.read_rollouts(7)
    first, second, third = table.to_pylist()
    assert (first["step"], first["problem_id"], first["group"], first["index"]) == (7, "train/1", "train/1", 0)
    assert (first["prompt"], first["answer"], json.loads(first["columns"])) == ("Add them.\n3 + 4 + 5?", "12", {"a": 3, "note": "ü"})
    assert first["completion"] == "a\n\\ud800"  # a lone surrogate has no UTF-8
    assert (first["prompt_ids"], first["token_ids"], first["behavior_logprobs"], first["policy_versions"]) == (
        [5, 9],
        [0, 1, 2],
        [-0.5, -0.5, -0.5],
        [4, 4, 4],
    )
    assert (first["reward"], first["score/accuracy"], first["outcome/accuracy"], first["detail/accuracy"]) == (1.5, 1.0, "ok", "12")
    assert (first["advantage"], first["weights"]) == (0.5, [0.25, 0.5, 1.0])
    assert math.isnan(second["reward"]) and second["outcome/accuracy"] == "timeout" and second["advantage"] is None
    assert (third["token_ids"], third["finish_reason"], third["outcome/format"]) == ([], "length", "wrong_format")
    assert run.rollout_file(7).name == "step_000007.parquet"
    run.write_rollouts(8, groups[1:])  # fewer kinds of values, same schema
    assert run.read_rollouts(8).schema.equals(table.drop_columns(["weights"]).schema)


def test_a_stored_problem_has_its_question(run: RunFolder) -> None:
    """A reward that reads ``problem.question`` is to see in ``grpo replay`` what it saw in training."""
    chat = Problem(id="chat", prompt="<user>3 + 4?<assistant>", question="3 + 4?", answer="7")
    plain = Problem(id="plain", prompt="3 + 4 =", answer="7")
    empty = Problem(id="empty", prompt="<user><assistant>", question="", answer="7")
    problems = [chat, plain, empty]
    run.write_rollouts(1, [Group(problem=p, rollouts=(rollout(p, 0, 1.0), rollout(p, 1, 0.0))) for p in problems])
    table = run.read_rollouts(1)
    assert [group.problem for group in groups_of(table)] == problems
    before = groups_of(table.drop_columns(["question"]))  # of a version that did not store it
    assert [group.problem.question for group in before] == ["<user>3 + 4?<assistant>", "3 + 4 =", "<user><assistant>"]


def test_rollouts_of_another_step_are_named(run: RunFolder) -> None:
    run.write_rollouts(7, [group("a", [1.0])])
    with pytest.raises(FileNotFoundError, match=r"no rollouts of step 8 .* there are 1, from step 7 to 7"):
        run.read_rollouts(8)
    with pytest.raises(ValueError, match="extra column 'reward' is a column already"):
        run.write_rollouts(9, [group("a", [1.0])], extra={"reward": {}})


def test_a_crash_while_writing_leaves_the_old_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_rollouts(1, [group("a", [1.0])])
    before = run.rollout_file(1).read_bytes()

    def crash(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(StorageError, match=r"run\.dir: cannot write '.*step_000001.parquet': No space left on device\n  → .* MiB are free"):
        run.write_rollouts(1, [group("a", [0.0, 0.0])])
    assert run.rollout_file(1).read_bytes() == before
    assert not list(run.path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room, or keep fewer checkpoints (run.keep_checkpoints), and go on"),
        (errno.EROFS, "make the folder writable, or copy it to a place that is and go on with the copy"),
        (errno.EACCES, "make the folder writable, or copy it to a place that is and go on with the copy"),
        (errno.EFBIG, "raise the limit (ulimit -f), and go on"),
        (errno.EIO, "see to the disk, and go on"),
    ],
)
def test_what_a_disk_says_comes_with_a_remedy(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(StorageError) as caught, storage(tmp_path / "a" / "b"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(f"run.dir: cannot write '{tmp_path}/a/b': {os.strerror(number)}\n  → ")
    assert str(caught.value).endswith(f"{remedy}; what was saved is whole")
    assert caught.value.errno == number


def test_a_row_that_does_not_fit_is_a_storage_error(run: RunFolder) -> None:
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"metrics\.jsonl': No space left on device"):
        run.append_metrics({"step": 1})


def test_two_processes_do_not_train_in_one_folder(run: RunFolder) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from grpo.run import RunFolder\n"
        f"with RunFolder(Path({str(run.path)!r})).held(): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=r"run: another process trains in '.*name'\n  → wait for its end, or stop it"), run.held():
        pass
    other.kill()
    other.communicate()
    with run.held():  # whoever dies lets go
        pass
