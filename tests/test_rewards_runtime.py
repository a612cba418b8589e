"""The runtime: every outcome, deadlines, isolation of one completion from the next, and no process left behind."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo.rewards.base import parse_reward_config
from grpo.rewards.runtime import RewardRuntime
from grpo.types import Completion, FinishReason, Outcome, Problem, Score

PROBLEM = Problem(id="p", prompt="7 + 5 =", answer="12", columns={"level": 3})
USER_FILE = '''
import asyncio, ctypes, itertools, os, pathlib, subprocess, sys, time

def behave(completion, problem, bonus=0.0):
    """Does what the completion says."""
    match completion.text:
        case "loop":
            while True:
                pass
        case "loop in C":
            sum(itertools.repeat(0))
        case "sleep":
            time.sleep(1000)
        case "nap":
            time.sleep(0.3)
        case "exit":
            os._exit(3)
        case "sys.exit":
            sys.exit("done")
        case "crash":
            ctypes.string_at(0)
        case "memory":
            return len(bytearray(8 << 30))
        case "raise":
            raise ValueError("what is this?")
        case "none":
            return None
        case "string":
            return "good"
        case "print":
            print("x" * 100_000, flush=True)
            os.write(1, b"y" * 100_000)
        case "orphan":
            child = subprocess.Popen(["sleep", "1000"])
            return child.pid
        case "mutate":
            problem.columns.clear()
    return 0.5 + bonus

def level(completion, problem):
    return problem.columns["level"]

def wrong_when_slow(completion, problem):
    return behave(completion, problem)

wrong_when_slow.timeout_value = 0.0

async def later(completion, problem):
    await asyncio.sleep(0.001)
    return len(completion.text)
'''
Part = dict[str, Any]


def completion(text: str, index: int = 0, problem_id: str = "p") -> Completion:
    return Completion(
        problem_id=problem_id, index=index, prompt_ids=(1,), token_ids=(2, 3), text=text, logprobs=(-0.1, -0.2), policy_versions=(0, 0),
        finish_reason=FinishReason.stop,
    )  # fmt: skip


def score(runtime: RewardRuntime, *texts: str) -> list[dict[str, Score]]:
    return runtime.score([completion(text, index) for index, text in enumerate(texts)], [PROBLEM] * len(texts))


def workers(parent: int) -> set[int]:
    """The living reward workers whose parent is this process."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if int(ppid) == parent and state != "Z" and (b"grpo.rewards.worker" in command):
            found.add(int(folder.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 40.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(USER_FILE)
    return path


@pytest.fixture
def make(user_file: Path) -> Iterator[Callable[..., RewardRuntime]]:
    """Makes runtimes from {part: function of the user's file, or settings}; closes them, and sees that nothing is left."""
    made: list[RewardRuntime] = []

    def build(parts: dict[str, str | Part], **limits: Any) -> RewardRuntime:
        node = {name: {"fn": f"{user_file}:{part}"} if isinstance(part, str) else part for name, part in parts.items()}
        made.append(RewardRuntime(parse_reward_config(node), **{"cpu_s": 0.3, "wall_s": 30.0, **limits}))
        return made[-1]

    yield build
    for runtime in made:
        runtime.close()
    assert not workers(os.getpid())


# ---- outcomes


def test_every_outcome_and_the_neighbours_unchanged(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"first": "level", "behave": "behave", "last": "level"})
    texts = [
        "fine", "loop", "fine", "loop in C", "exit", "fine", "crash", "memory",
        "raise", "sys.exit", "none", "string", "print", "mutate", "fine",
    ]  # fmt: skip
    scores = dict(zip(enumerate(texts), score(runtime, *texts), strict=True))
    expected = {
        "loop": Outcome.timeout,
        "loop in C": Outcome.timeout,
        "exit": Outcome.crash,
        "crash": Outcome.crash,
        "memory": Outcome.memory,
        "raise": Outcome.error,
        "sys.exit": Outcome.error,
        "none": Outcome.invalid,
        "string": Outcome.invalid,
    }
    for (_, text), parts in scores.items():
        assert list(parts) == ["first", "behave", "last"]
        assert parts["first"] == parts["last"] == Score(value=3.0), text  # the other parts of the same completion
        assert parts["behave"].outcome is expected.get(text, Outcome.ok)
        assert parts["behave"].scored == (text not in expected)
        if text not in expected:
            assert parts["behave"] == Score(value=0.5)
    details = {text: parts["behave"].detail for (_, text), parts in scores.items()}
    assert details["loop"] == "took more than 0.3 s of CPU time"
    assert details["exit"] == "the worker exited with code 3"
    assert details["crash"] == "the worker was ended by SIGSEGV"
    assert details["string"] == "returned 'good' (str); a reward returns a number, a Score or None"


def test_waiting_is_limited_by_the_wall_clock_and_never_judged(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"behave": "wrong_when_slow"}, wall_s=1.0)
    slept, fine = score(runtime, "sleep", "fine")
    assert slept["behave"].outcome is Outcome.timeout
    assert math.isnan(slept["behave"].value)  # the model's text cost no CPU time
    assert slept["behave"].detail == "took more than 1 s"
    assert fine["behave"] == Score(value=0.5)


def test_time_in_which_the_parent_did_not_run_does_not_count(make: Callable[..., RewardRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("grpo.rewards.runtime.time", SimpleNamespace(monotonic=lambda: 1e4 * next(ticks)))  # the machine slept for hours
    assert score(make({"behave": "behave"}), "nap", "fine") == [{"behave": Score(value=0.5)}] * 2


def test_a_function_can_say_what_its_timeout_is_worth(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"behave": "wrong_when_slow"})
    looped, fine = score(runtime, "loop", "fine")
    assert (looped["behave"].value, looped["behave"].outcome) == (0.0, Outcome.timeout)
    assert fine["behave"] == Score(value=0.5)


def test_async_functions_and_arguments(make: Callable[..., RewardRuntime], user_file: Path) -> None:
    runtime = make({"later": "later", "behave": {"fn": f"{user_file}:behave", "bonus": 0.25, "weight": 2.0}})
    assert score(runtime, "four") == [{"later": Score(value=4.0), "behave": Score(value=0.75)}]


# ---- one bad completion among many


def check_batch(runtime: RewardRuntime) -> None:
    texts = [f"\\boxed{{{12 if index % 2 else 13}}}" for index in range(64)]
    texts[10], texts[20] = "\\boxed{9^{9^{9^{9}}}}", "loop"
    for _ in range(2):  # the second batch meets workers that were replaced
        for index, parts in enumerate(score(runtime, *texts)):
            right = Score(value=1.0, detail="12") if index % 2 else Score(value=0.0, detail="13")
            special = {10: Score(value=0.0, detail="9^{9^{9^{9}}}"), 20: Score(value=0.0, outcome=Outcome.wrong_format)}
            assert parts["accuracy"] == special.get(index, right)
            assert parts["behave"].outcome is (Outcome.timeout if index == 20 else Outcome.ok)
    assert len(workers(os.getpid())) == 3  # two, and the spare one


def test_from_the_main_thread_a_thread_and_asyncio(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"accuracy": {"fn": "grpo.rewards.math.accuracy"}, "behave": "behave"})
    check_batch(runtime)

    failures: list[BaseException] = []

    def in_thread() -> None:
        try:
            check_batch(runtime)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=in_thread) for _ in range(2)]  # at the same time: they take turns
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []

    async def in_asyncio() -> tuple[list[dict[str, Score]], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.02)
                ticks += 1

        ticker = asyncio.create_task(tick())
        scores = await runtime.score_async([completion("loop"), completion("\\boxed{12}", 1)], [PROBLEM] * 2)
        ticker.cancel()
        return scores, ticks

    scores, ticks = asyncio.run(in_asyncio())
    assert scores[1]["accuracy"].value == 1.0
    assert scores[0]["behave"].outcome is Outcome.timeout
    assert ticks > 5  # the event loop went on
    runtime.close()
    assert not workers(os.getpid())


# ---- where functions come from


def test_the_source_travels(make: Callable[..., RewardRuntime], user_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").write_text("raise ImportError('this file stands in the working directory; it is not the standard library')")
    parts = parse_reward_config({"behave": {"fn": "./my_rewards.py:behave"}})
    user_file.unlink()
    with RewardRuntime(parts, cpu_s=2.0) as runtime:
        fine, failed = score(runtime, "fine", "raise")
    assert fine["behave"] == Score(value=0.5)
    lines = failed["behave"].detail.splitlines()
    raised = 'raise ValueError("what is this?")'
    number = [line.strip() for line in USER_FILE.splitlines()].index(raised) + 1
    assert lines[1].strip() == f'File "{user_file}", line {number}, in behave'
    assert lines[2].strip() == raised  # shown although the file is gone
    assert lines[-1] == "ValueError: what is this?"


def test_a_function_that_does_not_load_in_the_worker_says_so(tmp_path: Path) -> None:
    path = tmp_path / "moody.py"
    path.write_text("import sys\nif 'pytest' not in sys.modules:\n    raise OSError('no licence here')\ndef f(completion, problem): ...\n")
    parts = parse_reward_config({"f": {"fn": f"{path}:f"}, "ok": {"fn": "grpo.rewards.math.accuracy"}})
    with RewardRuntime(parts) as runtime:
        (scores,) = score(runtime, "\\boxed{12}")
    assert scores["f"].outcome is Outcome.error
    assert "OSError: no licence here" in scores["f"].detail
    assert scores["ok"].value == 1.0


def test_what_a_reward_prints_does_not_disturb(make: Callable[..., RewardRuntime], capfd: pytest.CaptureFixture[str]) -> None:
    assert score(make({"behave": "behave"}), "print") == [{"behave": Score(value=0.5)}]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "xxx" in captured.err


# ---- the interface


def test_order_progress_and_large_batches(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"later": "later", "level": "level"})
    texts = ["x" * (index % 7) for index in range(500)]
    seen: list[tuple[int, int]] = []
    scores = runtime.score([completion(text) for text in texts], [PROBLEM] * 500, progress=lambda done, total: seen.append((done, total)))
    assert [parts["later"].value for parts in scores] == [float(len(text)) for text in texts]
    assert seen == [(done, 500) for done in range(1, 501)]
    large = Problem(id="p", prompt="", answer="12", columns={"level": 5, "tests": "x" * 5_000_000})  # more than a socket holds
    scores = runtime.score([completion("y" * 2_000_000)] * 4, [large] * 4)
    assert scores == [{"later": Score(value=2e6), "level": Score(value=5.0)}] * 4
    assert runtime.score([], []) == []


def test_what_cannot_be_scored_is_refused(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"level": "level"})
    with pytest.raises(ValueError, match="1 completions but 2 problems"):
        runtime.score([completion("a")], [PROBLEM] * 2)
    with pytest.raises(ValueError, match="completion 0 of problem 'q' was given problem 'p'"):
        runtime.score([completion("a", problem_id="q")], [PROBLEM])
    unsendable = Problem(id="p", prompt="", answer="", columns={"f": lambda: None})
    with pytest.raises(ValueError, match="its columns must be picklable"):
        runtime.score([completion("a")], [unsendable])
    assert score(runtime, "a") == [{"level": Score(value=3.0)}]
    runtime.close()
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        score(runtime, "a")


@pytest.mark.parametrize("limits", [{"num_workers": 0}, {"cpu_s": 0.0}, {"cpu_s": math.nan}, {"wall_s": -1.0}, {"memory_mb": 0}])
def test_limits_are_checked(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        RewardRuntime(parse_reward_config({"a": {"fn": "grpo.rewards.math.accuracy"}}), **limits)


def test_an_interrupted_call_leaves_nothing_for_the_next(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"later": "later"})

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.score([completion("x" * 9)] * 200, [PROBLEM] * 200, progress=interrupt)
    assert [parts["later"].value for parts in score(runtime, "a", "bb", "ccc")] == [1.0, 2.0, 3.0]


# ---- processes


def test_a_worker_that_dies_while_idle_costs_nothing(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"level": "level"})
    score(runtime, "a")
    for pid in workers(os.getpid()):
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not workers(os.getpid()))
    assert score(runtime, *"abc") == [{"level": Score(value=3.0)}] * 3


def test_workers_that_cannot_start_end_the_call(make: Callable[..., RewardRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    runtime = make({"level": "level"})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="reward workers do not start: the worker exited with code 1"):
            score(runtime, "a")


def test_close_ends_what_a_reward_started(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"behave": "behave"})
    pid = int(score(runtime, "orphan")[0]["behave"].value)
    assert alive(pid)
    runtime.close()
    assert wait_until(lambda: not alive(pid))


@pytest.mark.parametrize("text", ["loop", "loop in C", "sleep", "fine"])
def test_workers_end_when_the_trainer_is_killed(text: str, user_file: Path) -> None:
    script = f"""
        import os, threading, time
        from grpo.rewards.base import parse_reward_config
        from grpo.rewards.runtime import RewardRuntime
        from grpo.types import Completion, FinishReason, Problem

        parts = parse_reward_config({{"behave": {{"fn": {f"{user_file}:behave"!r}}}}})
        runtime = RewardRuntime(parts, num_workers=1, cpu_s=0.2, wall_s=60.0)
        one = lambda text: [Completion(problem_id="p", index=0, prompt_ids=(1,), token_ids=(), text=text, logprobs=(), policy_versions=(),
                                       finish_reason=FinishReason.stop)]
        problem = [Problem(id="p", prompt="", answer="")]
        runtime.score(one("fine"), problem)
        threading.Thread(target=runtime.score, args=(one({text!r}), problem), daemon=True).start()
        time.sleep(0.2)
        print("ready", flush=True)
        time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True, env=environment) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "ready\n"
        pids = workers(trainer.pid)
        assert len(pids) == 2
        trainer.kill()
    assert wait_until(lambda: not any(map(alive, pids)))
