"""``math_equal``: in a worker that can be killed, from anywhere; the same with and without gmpy2."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo.rewards.math import isolated, math_equal
from grpo.types import Outcome, Score


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    isolated._equal.cache_clear()
    yield
    isolated._equal.cache_clear()


def test_math_equal_extracts_and_compares() -> None:
    assert math_equal("\\frac{1}{2}", "So it is \\boxed{0.5}.")
    assert math_equal("x^2-1", "\\boxed{(x-1)(x+1)}")
    assert not math_equal("x^2-1", "\\boxed{(x-1)(x-1)}")
    assert not math_equal("5", "I do not know.")
    assert not math_equal("", "")


def test_numbers_and_equal_texts_never_leave_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_runtime", lambda: pytest.fail("a worker was asked"))
    assert math_equal("\\frac{1}{2}", "\\boxed{0.5}")
    assert not math_equal("1,000", "\\boxed{1001}")
    assert math_equal("\\sqrt{2}x", "\\boxed{ \\sqrt{2} x}") is True
    assert not math_equal("5", "\\boxed{" + "1" * 100_000 + "}")
    assert math_equal("9" * 100_000, "\\boxed{" + "9" * 100_000 + "}")


def test_threads_share_the_worker() -> None:
    verdicts: list[bool] = []

    def ask(number: int) -> None:
        verdicts.append(math_equal(f"x+{number}", f"\\boxed{{{number}+x}}") and not math_equal(f"x+{number}", f"\\boxed{{{number}-x}}"))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 8


def test_a_comparison_without_a_verdict_is_false_and_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overstaying:
        def score(self, completions: object, problems: object) -> list[dict[str, Score]]:
            return [{"equal": Score(value=0.0, outcome=Outcome.timeout)}]

    with monkeypatch.context() as patched:
        patched.setattr(isolated, "_runtime", Overstaying)
        assert not math_equal("y+1", "\\boxed{1+y}")
    assert math_equal("y+1", "\\boxed{1+y}")


def test_hostile_answers_are_false_and_the_next_ordinary_one_is_quick() -> None:
    math_equal("x+1", "\\boxed{1+x}")  # the worker is up
    hostile = [
        "9^{9^{9^{9}}}",
        "99999999!",
        "\\binom{10^9}{5\\cdot 10^8}",
        "\\sum_{a=1}^{2000}\\sum_{b=1}^{2000} \\sin(ab)",
        "(" * 900 + "x",
    ]
    for index, text in enumerate(hostile):
        started = time.monotonic()
        assert not math_equal("2", f"\\boxed{{{text}}}")
        assert math_equal(f"z+{index}", f"\\boxed{{{index}+z}}")
        assert time.monotonic() - started < 10.0  # generous: the machine may be busy


PROGRAM = """
    import os, sys
    from grpo.rewards.math import math_equal
    assert math_equal("x+1", r"\\boxed{1+x}")
    runtime, = __import__("grpo.rewards.math.isolated", fromlist=["x"])._runtimes.values()
    print(*[worker._process.pid for worker in runtime._workers], flush=True)
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=180, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "zombie" not in status.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["", "    os.kill(os.getpid(), 9)"], ids=["exit", "SIGKILL"])
def test_workers_end_with_their_process(ending: str) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM + ending)], capture_output=True, text=True, timeout=180)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 30
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, pids))


@pytest.mark.slow
def test_a_forked_child_has_workers_of_its_own() -> None:
    output = run("""
        import os
        from grpo.rewards.math import math_equal
        assert math_equal("x+1", r"\\boxed{1+x}")
        child = os.fork()
        if child == 0:
            try:
                ok = math_equal("x+2", r"\\boxed{2+x}") and not math_equal("x+2", r"\\boxed{3+x}")
            finally:
                os._exit(0 if ok else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), math_equal("x+3", r"\\boxed{3+x}"))
    """)
    assert output.split() == ["0", "True"]


ARITHMETIC = r"""
    import time
    from grpo.rewards.math import NotUnderstood, TooLarge, equal
    from grpo.rewards.math.symbolic import proves_equal
    from grpo.rewards.math.parse import parse
    import mpmath, sympy
    print(mpmath.libmp.BACKEND, sympy.external.gmpy.GROUND_TYPES)
    EQUAL = [
        ("2004!", "2004\\cdot 2003!"),
        ("\\binom{2000}{1000}", "\\frac{2000!}{(1000!)^2}"),
        ("\\sqrt{5+2\\sqrt6}", "\\sqrt2+\\sqrt3"),
        ("e^{i\\pi/3}", "\\frac{1+i\\sqrt3}{2}"),
        ("\\sum_{k=1}^{n} k", "\\frac{n(n+1)}{2}"),
        ("3^{100}", "9^{50}"),
    ]
    DIFFERENT = [
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("2^{-99}", "2^{-98}"),
        ("\\pi", "3.14159265358979323846264338327950288"),
        ("x^{99}", "x^{98}"),
    ]
    HUGE = [
        "9^{9^{9^{9}}}", "99999999!", "(10^{10})!", "\\binom{10^9}{5\\cdot 10^8}", "\\prod_{k=1}^{10^9} k", "e^{e^{e^{9}}}",
        "\\sin(10^{10^{10}})",
    ]
    assert all(equal(a, b) and equal(b, a) for a, b in EQUAL)
    assert not any(equal(a, b) or equal(b, a) for a, b in DIFFERENT)
    assert proves_equal(parse("(x+1)^2"), parse("x^2+2x+1")) and not proves_equal(parse("x^2"), parse("x^3"))
    started = time.process_time()
    for text in HUGE:
        for left, right in (("2", text), (text, text + "+1")):
            try:
                assert not equal(left, right)
            except (NotUnderstood, TooLarge):
                pass
    assert time.process_time() - started < 2.0
"""


@pytest.mark.slow
def test_without_gmpy2() -> None:
    assert run(ARITHMETIC, SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1").split() == ["python", "python"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gmpy2") is None, reason="needs gmpy2")
def test_with_gmpy2() -> None:
    assert run(ARITHMETIC, SYMPY_GROUND_TYPES="gmpy").split() == ["gmpy", "gmpy"]
