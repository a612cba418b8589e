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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from grpo.rewards.base import parse_reward_config
from grpo.rewards.runtime import RewardRuntime
from grpo.rewards.worker_process import _seconds_in_queue
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

def wrong_when_large(completion, problem):
    return behave(completion, problem)

wrong_when_large.memory_value = 0.0
kept = []

def hoards(completion, problem):
    """Keeps what it allocates: 30 MB a completion."""
    kept.append(bytearray(30 << 20))
    return len(kept)

def whole(completions, problems):
    """Does what its first completion says; else ranks them."""
    if completions[0].text != "rank":
        behave(completions[0], problems[0])
    if completions[0].text == "too few":
        return [1.0]
    if completions[0].text == "holes":
        return [1, None, "x", float("nan")]
    return [float(sorted(c.text for c in completions).index(c.text)) for c in completions]

async def whole_later(completions, problems):
    await asyncio.sleep(0.001)
    return [len(c.text) for c in completions]

def waits_for_a_server(completion, problem):
    time.sleep(0.5)
    return 1.0

waits_for_a_server.limits = {"wall_s": 20.0}
warmed = []

def warm(completion, problem, size=1, depth=1):
    return float(warmed == [{"size": size}])

warm.warm_up = lambda **arguments: warmed.append(arguments)

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
    others = workers(os.getpid())  # of math_equal, say, which another test has called

    def build(parts: dict[str, str | Part], **limits: Any) -> RewardRuntime:
        node = {name: {"fn": f"{user_file}:{part}"} if isinstance(part, str) else part for name, part in parts.items()}
        made.append(RewardRuntime(parse_reward_config(node), **{"num_workers": 2, "cpu_s": 0.3, "wall_s": 30.0, **limits}))
        return made[-1]

    yield build
    for runtime in made:
        runtime.close()
    assert not workers(os.getpid()) - others


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


def test_a_function_can_say_what_running_out_of_memory_is_worth(make: Callable[..., RewardRuntime]) -> None:
    large, fine = score(make({"behave": "wrong_when_large"}), "memory", "fine")
    assert (large["behave"].value, large["behave"].outcome) == (0.0, Outcome.memory)
    assert fine["behave"] == Score(value=0.5)


def test_a_worker_that_keeps_too_much_is_replaced(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"hoards": "hoards"}, num_workers=1, memory_mb=100)
    scores = [parts["hoards"] for parts in score(runtime, *["x"] * 9)]
    # Three fit into 100 MB (the fourth would be the 120th), and after a failure a new worker counts from one again. Either of two
    # workers may be the first that is ready: so nine calls meet at least one failure (9 > 2 · 3) and at most two (9 < 3 · 4).
    assert {s.value for s in scores if s.scored} == {1.0, 2.0, 3.0}
    assert [s.outcome for s in scores if not s.scored] in ([Outcome.memory], [Outcome.memory] * 2)


def test_time_in_the_queue_for_a_core_is_not_the_functions(make: Callable[..., RewardRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is so busy that almost all of the wall time is waiting: no score may change. (Simulated: 0.1 s a look.)"""
    looks = itertools.count()
    monkeypatch.setattr("grpo.rewards.worker_process._seconds_in_queue", lambda pid: 10.0 * next(looks))
    assert score(make({"behave": "behave"}, cpu_s=0.1, wall_s=0.1), "nap", "fine") == [{"behave": Score(value=0.5)}] * 2


def test_the_kernel_counts_the_time_in_the_queue() -> None:
    """Three busy loops on one core wait for each other."""
    core = min(os.sched_getaffinity(0))
    pin = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", pin]) for _ in range(3)]
    try:
        assert wait_until(lambda: all(_seconds_in_queue(process.pid) > 0.2 for process in busy))
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_part_may_have_limits_of_its_own(make: Callable[..., RewardRuntime], user_file: Path) -> None:
    quick = {"fn": f"{user_file}:behave", "limits": {"wall_s": 0.2, "cpu_s": 0.1}}
    runtime = make({"server": "waits_for_a_server", "quick": quick}, wall_s=0.4)
    (scores,) = score(runtime, "nap")
    assert scores["server"] == Score(value=1.0)  # the function says itself how long it may wait
    assert (scores["quick"].outcome, scores["quick"].detail) == (Outcome.timeout, "took more than 0.2 s")
    with pytest.raises(ValueError, match=r"reward\.server\.limits: wall_s is 20 and cpu_s 30; wall_s must be at least cpu_s"):
        make({"server": "waits_for_a_server"}, cpu_s=30.0, wall_s=60.0)


def test_a_function_is_warmed_up_once_with_its_arguments(make: Callable[..., RewardRuntime], user_file: Path) -> None:
    runtime = make({"warm": {"fn": f"{user_file}:warm", "size": 7}})
    assert score(runtime, *"abcd") == [{"warm": Score(value=1.0)}] * 4


# ---- functions that take the whole batch


def test_a_batch_function_sees_all_completions(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"level": "level", "whole": "whole", "later": "whole_later"})
    texts = ["rank", *(f"{i:02d}" for i in range(39, 0, -1))]
    scores = score(runtime, *texts)
    assert [parts["whole"].value for parts in scores] == [float(sorted(texts).index(text)) for text in texts]
    assert [parts["later"].value for parts in scores] == [float(len(text)) for text in texts]
    assert [list(parts) for parts in scores] == [["level", "whole", "later"]] * 40
    assert runtime.score([], []) == []


def test_what_a_batch_function_does_wrong_stays_in_its_part(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"level": "level", "whole": "whole"})
    expected = {
        "loop": (Outcome.timeout, "took more than 0.3 s of CPU time"),
        "exit": (Outcome.crash, "the worker exited with code 3"),
        "too few": (Outcome.invalid, "returned 1 values for 4 completions; a batch function returns one a completion, in order"),
    }
    for text, (outcome, detail) in expected.items():
        scores = score(runtime, text, "b", "c", "d")
        assert [parts["level"] for parts in scores] == [Score(value=3.0)] * 4
        assert [(parts["whole"].outcome, parts["whole"].detail, parts["whole"].scored) for parts in scores] == [
            (outcome, detail, False)
        ] * 4
    holes = [parts["whole"] for parts in score(runtime, "holes", "b", "c", "d")]
    assert holes[0] == Score(value=1.0)
    assert [s.outcome for s in holes[1:]] == [Outcome.invalid] * 3


def test_a_batch_has_a_share_of_time_for_every_sixteen(make: Callable[..., RewardRuntime]) -> None:
    started = time.monotonic()
    (scores, *_) = score(make({"whole": "whole"}, cpu_s=0.2), "loop", *["x"] * 32)
    assert scores["whole"].detail == "took more than 0.6 s of CPU time"  # 33 completions: three shares of 0.2 s
    assert time.monotonic() - started > 0.6


def test_the_time_a_score_took(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"behave": "behave", "whole": "whole"}, cpu_s=0.5)
    nap, loop = runtime.judge([completion("nap"), completion("loop", 1)], [PROBLEM] * 2)
    assert 0.3 <= nap["behave"].seconds < 30
    assert loop["behave"].seconds >= 0.5
    assert nap["whole"].seconds == loop["whole"].seconds >= 0.15  # a nap of 0.3 s, shared by two
    (only,) = runtime.judge([completion("a")], [PROBLEM], parts=["behave"])
    assert list(only) == ["behave"]


# ---- one bad completion among many: the acceptance test of the runtime

TEXTS = [f"\\boxed{{{12 if index % 2 else 13}}}" for index in range(64)]
TEXTS[10], TEXTS[20] = "\\boxed{9^{9^{9^{9}}}}", "loop"
CPU_S = 1.0
WALL_S = 3 * CPU_S + 1


class Stopwatch:
    """Seconds in which the machine could do our work.

    Not counted is when other processes kept tasks from running (the kernel's pressure stall information, where it has that), and of a
    stretch in which the machine stood still or this process was suspended all but one second.
    """

    def __enter__(self) -> Self:
        self._counted = 0.0
        self._stalled = cpu_stalled()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._count)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = self._counted - (cpu_stalled() - self._stalled)

    def _count(self) -> None:
        before = time.monotonic()
        running = True
        while running:
            running = not self._stop.wait(0.02)
            now = time.monotonic()
            self._counted += min(now - before, 1.0)
            before = now


def cpu_stalled() -> float:
    """Seconds since boot in which some task waited for a core."""
    path = Path("/proc/pressure/cpu")
    return int(path.read_text().split("total=")[1].split()[0]) / 1e6 if path.exists() else 0.0


@dataclass
class Round:
    """One batch with two bad completions, and one without any straight after it."""

    scores: list[dict[str, Score]]
    seconds: float
    next_scores: list[dict[str, Score]]
    resident_mb: float  # of the workers and of this process


def play(runtime: RewardRuntime, rounds: int) -> list[Round]:
    played = []
    for _ in range(rounds):
        with Stopwatch() as watch:
            scores = score(runtime, *TEXTS)
        next_scores = score(runtime, *TEXTS[21:])
        pids = [os.getpid(), *workers(os.getpid())]
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        played.append(Round(scores, watch.seconds, next_scores, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
    return played


def check(played: list[Round]) -> None:
    for this in played:
        for index, parts in enumerate(this.scores):
            accuracy, behave = parts["accuracy"], parts["behave"]
            assert accuracy.value == (0.0 if index in (10, 20) else index % 2)  # a tower of powers is the model's doing: wrong
            if index == 20:
                assert behave.outcome is Outcome.timeout and not behave.scored  # the grader's own failure: no score
            else:
                assert behave == Score(value=0.5)
                assert index == 10 or accuracy.outcome is Outcome.ok  # the tower may count as too large, or as too slow
        assert this.seconds < WALL_S + 1
        assert [(parts["accuracy"].value, parts["behave"].value) for parts in this.next_scores] == [(i % 2, 0.5) for i in range(21, 64)]
    assert played[-1].resident_mb < played[0].resident_mb + 30


def acceptance_runtime(parts: Any) -> RewardRuntime:
    return RewardRuntime(parts, num_workers=2, cpu_s=CPU_S)


@pytest.fixture
def acceptance_parts(user_file: Path) -> Any:
    return parse_reward_config({"accuracy": {"fn": "grpo.rewards.math.accuracy"}, "behave": {"fn": f"{user_file}:behave"}})


def rounds_of(context: str) -> list[Any]:
    return [pytest.param(2, id=f"{context}-2"), pytest.param(10, id=f"{context}-10", marks=pytest.mark.full)]


@pytest.mark.parametrize("rounds", rounds_of("main"))
def test_acceptance_in_the_main_thread(acceptance_parts: Any, rounds: int) -> None:
    others = workers(os.getpid())
    with acceptance_runtime(acceptance_parts) as runtime:
        check(play(runtime, rounds))
        assert len(workers(os.getpid()) - others) == 3  # two, and the spare one
    assert not workers(os.getpid()) - others


@pytest.mark.parametrize("rounds", rounds_of("thread"))
def test_acceptance_in_a_thread(acceptance_parts: Any, rounds: int) -> None:
    with acceptance_runtime(acceptance_parts) as runtime, ThreadPoolExecutor() as pool:
        check(pool.submit(play, runtime, rounds).result())


def test_threads_take_turns(acceptance_parts: Any) -> None:
    with acceptance_runtime(acceptance_parts) as runtime, ThreadPoolExecutor() as pool:
        texts = [[f"\\boxed{{{12 + (i == caller)}}}" for i in range(30)] for caller in range(3)]
        futures = [pool.submit(score, runtime, *mine) for mine in texts]
        for caller, future in enumerate(futures):
            assert [parts["accuracy"].value for parts in future.result()] == [float(i != caller) for i in range(30)]


@pytest.mark.parametrize("rounds", rounds_of("asyncio"))
def test_acceptance_under_asyncio(acceptance_parts: Any, rounds: int) -> None:
    async def main(runtime: RewardRuntime) -> tuple[list[Round], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.02)
                ticks += 1

        ticker = asyncio.create_task(tick())
        played = []
        for _ in range(rounds):
            with Stopwatch() as watch:
                scores = await runtime.score_async([completion(text, i) for i, text in enumerate(TEXTS)], [PROBLEM] * len(TEXTS))
            (after,) = await asyncio.to_thread(play, runtime, 1)
            played.append(Round(scores, watch.seconds, after.next_scores, after.resident_mb))
        ticker.cancel()
        return played, ticks

    with acceptance_runtime(acceptance_parts) as runtime:
        played, ticks = asyncio.run(main(runtime))
    check(played)
    assert ticks > 10 * rounds  # the event loop went on meanwhile


@pytest.mark.slow
@pytest.mark.parametrize("rounds", rounds_of("actor"))
def test_acceptance_in_a_ray_actor(acceptance_parts: Any, rounds: int) -> None:
    import ray

    from grpo.rollouts.pool import start_ray, stop_ray

    class Actor:
        def play(self, parts: Any, rounds: int) -> list[Round]:
            with acceptance_runtime(parts) as runtime:
                return play(runtime, rounds)

        def workers(self) -> set[int]:
            return workers(os.getpid())

    start_ray(num_cpus=1, object_store_memory=100_000_000)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actor cannot import this file
    try:
        actor = ray.remote(num_cpus=1)(Actor).remote()
        check(ray.get(actor.play.remote(acceptance_parts, rounds)))
        assert ray.get(actor.workers.remote()) == set()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        stop_ray()


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
    assert sorted(set(seen)) == [(done, 500) for done in range(501)] and seen == sorted(seen)
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


@pytest.mark.parametrize("limits", [{"num_workers": -1}, {"cpu_s": 0.0}, {"cpu_s": math.nan}, {"wall_s": -1.0}, {"memory_mb": 0}])
def test_limits_are_checked(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        RewardRuntime(parse_reward_config({"a": {"fn": "grpo.rewards.math.accuracy"}}), **limits)


def test_an_interrupted_call_leaves_nothing_for_the_next(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"later": "later"})

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.score([completion("x" * 9)] * 200, [PROBLEM] * 200, progress=interrupt)
    assert [parts["later"].value for parts in score(runtime, "a", "bb", "ccc")] == [1.0, 2.0, 3.0]


def test_a_call_can_be_interrupted_while_its_task_takes_long(make: Callable[..., RewardRuntime]) -> None:
    runtime = make({"behave": "behave"}, wall_s=1000.0)
    begun = time.monotonic()

    def interrupt(done: int, total: int) -> None:
        assert done == 0
        if time.monotonic() > begun + 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.score([completion("sleep")], [PROBLEM], progress=interrupt)
    assert score(runtime, "fine")[0]["behave"].value == 0.5


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
        assert wait_until(lambda: len(workers(trainer.pid)) == 2)  # one may just be being replaced: it has used up its time
        pids = workers(trainer.pid)
        trainer.kill()
    assert wait_until(lambda: not any(map(alive, pids)))
