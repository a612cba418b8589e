"""The sandbox as its users see it: results and limits, threads, asyncio, Ray, failures of its own, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from grpo.rewards.sandbox import CallError, Limits, Sandbox, SandboxError, SandboxUnavailable

SQUARE = "print(int(input()) ** 2)"
DEADLINE_S = 120.0  # for what should take a second: the machine may be busy


# Results and limits


def test_a_script(box: Sandbox) -> None:
    run = box.run(SQUARE, b"7\n")
    assert (run.status, run.stdout, run.stderr, run.exit_code, run.error) == ("ok", b"49\n", b"", 0, None)
    assert 0 < run.cpu_s < 1 and run.wall_s > 0 and run.max_rss_mb > 1
    assert box.run(SQUARE, "7\n").stdout == b"49\n"


def test_calls(box: Sandbox) -> None:
    call = box.call("def solve(x):\n    return x * x", "solve", [[7], [8], [None]])
    assert call.values[:2] == (49, 64) and call.values[2].type == "TypeError"
    assert call.status == "ok"  # all calls were made
    assert box.call("x = 1", "solve", []).values == ()


def test_a_missing_function(box: Sandbox) -> None:
    call = box.call("x = 1", "solve", [[7]])
    assert call.values == (CallError("NameError", "the program defines no function 'solve'"),)


def test_an_exception(box: Sandbox) -> None:
    run = box.run("def f():\n    raise ValueError('bad')\nf()")
    assert (run.status, run.exit_code, run.error) == ("error", 1, CallError("ValueError", "bad"))
    assert run.stderr.decode().splitlines() == [
        "Traceback (most recent call last):", '  File "program.py", line 3, in <module>', '  File "program.py", line 2, in f',
        "ValueError: bad",
    ]  # fmt: skip
    call = box.call("raise ValueError('bad')\ndef solve(x): return x", "solve", [[1], [2]])
    assert call.status == "error" and call.values == (CallError("ValueError", "bad"),) * 2


@pytest.mark.parametrize("source", ["def (", "x = '", "\0", b"\xff\xfe", "  x = 1\n y = 2", "return 5"])
def test_a_syntax_error(box: Sandbox, source: str | bytes) -> None:
    run = box.run(source)
    assert run.status == "error" and run.error is not None and run.error.type in ("SyntaxError", "IndentationError", "ValueError")


@pytest.mark.parametrize(
    ("code", "status", "exit_code"), [("0", "ok", 0), ("", "ok", 0), ("3", "error", 3), ("'sorry'", "error", 1), ("256", "ok", 0)]
)
def test_exit_codes(box: Sandbox, code: str, status: str, exit_code: int) -> None:
    run = box.run(f"import sys\nprint('x')\nsys.exit({code})")
    assert (run.status, run.exit_code, run.stdout) == (status, exit_code, b"x\n")
    assert run.stderr == (b"sorry\n" if "sorry" in code else b"")


def test_the_end_of_the_process_is_not_the_end_of_the_calls(box: Sandbox) -> None:
    call = box.call("import os\ndef solve(x):\n    if x == 8: os._exit(0)\n    return x", "solve", [[7], [8], [9]])
    assert call.values[0] == 7 and [value.type for value in call.values[1:]] == ["NotRun", "NotRun"]
    assert (call.status, call.exit_code) == ("error", 0)


def test_results_that_are_not_plain_or_too_large(box: Sandbox) -> None:
    source = "def solve(n):\n    return object() if n == 0 else 'x' * n"
    call = box.call(source, "solve", [[0], [3 << 20], [3]], limits=Limits(output_mb=2))
    assert [getattr(value, "type", value) for value in call.values] == ["ResultNotPlain", "ResultTooLarge", "xxx"]


def test_arguments_must_be_plain(box: Sandbox) -> None:
    with pytest.raises(TypeError, match="object"):
        box.call("def solve(x): return x", "solve", [[object()]])


def test_cpu_time(box: Sandbox) -> None:
    run = box.run("while True: pass", limits=Limits(cpu_s=0.3, wall_s=60))
    assert run.status == "timeout" and 0.3 <= run.cpu_s < 0.6 and run.exit_code is None


def test_cpu_time_of_all_threads(box: Sandbox) -> None:
    source = "import hashlib, threading\ndef work():\n    while True: hashlib.sha256(bytes(1 << 20))\n"
    run = box.run(source + "for _ in range(4): threading.Thread(target=work).start()", limits=Limits(cpu_s=0.5, wall_s=60))
    assert run.status == "timeout" and 0.5 <= run.cpu_s < 1.0


def test_wall_time(box: Sandbox) -> None:
    run = box.run("import time\ntime.sleep(600)", limits=Limits(cpu_s=0.2, wall_s=0.5))
    assert run.status == "timeout" and run.wall_s >= 0.5 and run.cpu_s < 0.2


def test_waiting_for_a_core_does_not_count(box: Sandbox) -> None:
    """With three competitors a core, a program that needs 0.8 s of CPU time gets it in 2.4 s or more; its wall limit is 1 s."""
    burn = [sys.executable, "-I", "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(3 * (os.cpu_count() or 1))]
    try:
        run = box.run("import time\nwhile time.process_time() < 0.8: pass\nprint('done')", limits=Limits(cpu_s=1, wall_s=1))
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert run.status == "ok" and run.stdout == b"done\n"


def test_time_in_which_everything_stands_still_does_not_count(level: str) -> None:
    with Sandbox(workers=1, level=level) as box, ThreadPoolExecutor(1) as threads:
        servers = descendants(os.getpid())
        run = threads.submit(box.run, "import time\ntime.sleep(1)\nprint('awake')", limits=Limits(cpu_s=1, wall_s=3))
        time.sleep(0.3)
        family = servers | descendants(os.getpid())
        for pid in family:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in family:
            os.kill(pid, signal.SIGCONT)
        assert run.result(DEADLINE_S).stdout == b"awake\n"


def test_memory(box: Sandbox) -> None:
    run = box.run("x = bytearray(3 << 30)")
    assert (run.status, run.error) == ("memory", CallError("MemoryError", ""))
    # Less than the address space allows, but more than may be resident.
    run = box.run("x = b'x' * (200 << 20)", limits=Limits(memory_mb=100))
    assert run.status == "memory" and run.error is None
    call = box.call("def solve(n): return len(bytearray(n << 30))", "solve", [[0], [3]])
    assert call.status == "memory" and call.values == (0, CallError("MemoryError", ""))


def test_output(box: Sandbox) -> None:
    limits = Limits(output_mb=1)
    run = box.run("print('x' * (2 << 20))", limits=limits)
    assert run.status == "output" and len(run.stdout) == 1 << 20
    assert box.run("import sys\nsys.stderr.write('x' * (2 << 20))", limits=limits).status == "output"
    run = box.run("print('x' * ((1 << 20) - 2))", limits=limits)
    assert run.status == "ok" and len(run.stdout) == (1 << 20) - 1


def test_files(box: Sandbox) -> None:
    write = "import time\nfor i in range(12):\n    open(str(i), 'wb').write(bytes(1 << 20))\ntime.sleep(1.5)\nprint('wrote')"
    assert box.run(write, limits=Limits(files_mb=20)).stdout == b"wrote\n"
    assert box.run(write, limits=Limits(files_mb=5)).stdout == b""
    assert box.run(write, limits=Limits(files_mb=20)).stdout == b"wrote\n"


def test_too_many_files_by_a_program_that_is_over_before_anybody_looks(box: Sandbox) -> None:
    write = "for i in range(12):\n    open(str(i), 'wb').write(bytes(1 << 20))"
    in_time = {"namespaces": "error"}  # there the kernel refuses to write
    assert box.run(write, limits=Limits(files_mb=5)).status == in_time.get(box.level, "output")
    assert box.run(write, limits=Limits(files_mb=20)).status == "ok"


@pytest.mark.parametrize("source", ["import ctypes; ctypes.string_at(0)", "import os; os.kill(os.getpid(), 9); import time; time.sleep(9)"])
def test_killed(box: Sandbox, source: str) -> None:
    run = box.run(source)
    expected = "timeout" if "kill" in source and box.level == "namespaces" else "killed"  # the first process of a namespace survives itself
    assert run.status == expected and run.exit_code is None


@pytest.mark.parametrize(
    "wrong", [{"cpu_s": 0}, {"wall_s": -1}, {"memory_mb": 1.5}, {"cpu_s": float("nan")}, {"cpu_s": 5, "wall_s": 1}, {"output_mb": True}]
)
def test_limits_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


def test_numpy_in_advance(level: str) -> None:
    with Sandbox(workers=1, level=level, numpy=True) as box:
        half = "print(np.linalg.inv(np.eye(2) * 2)[0, 0], np.random.random())"
        run = box.run(f"import sys\nprint('numpy' in sys.modules)\nimport numpy as np\n{half}")
        again = box.run("import numpy as np\nprint(np.random.random())")
        assert run.stdout.split()[:2] == [b"True", b"0.5"] and run.stdout.split()[2] != again.stdout.strip()  # not one seed for all


def test_programs_do_not_share_their_chance(box: Sandbox) -> None:
    assert len({box.run("import random\nprint(random.random())").stdout for _ in range(5)}) == 5


# Levels


def test_the_levels_name(level: str) -> None:
    with Sandbox(workers=1, level=level) as box:
        assert box.level == level and box.weakness == ""


def test_the_strongest_level_is_chosen(level: str) -> None:
    from grpo.rewards.sandbox.levels import STRONG

    with Sandbox(workers=1) as box:
        assert STRONG.index(box.level) <= STRONG.index(level)


def test_what_is_not_a_level() -> None:
    with pytest.raises(ValueError, match="namespaces, landlock"):
        Sandbox(level="docker")
    with pytest.raises(ValueError, match="allow_weak"):
        Sandbox(level="seccomp")
    with pytest.raises(ValueError, match="unsafe"):
        Sandbox(level="none", allow_weak=True)
    with pytest.raises(ValueError, match="workers"):
        Sandbox(workers=0)


BARE = """
import ctypes, errno, logging, os, sys
from grpo.rewards.sandbox import Sandbox, SandboxUnavailable, syscalls
from grpo.rewards.sandbox.bpf import *
from grpo.rewards.sandbox.syscalls import FilterProgram
unshare = {"x86_64": 272, "aarch64": 97}[syscalls.MACHINE]
no = give(0x00050000 | errno.EPERM)
code = assemble((load(NUMBER), *dispatch({unshare: no, 444: no, 445: no, 446: no}, give(0x7FFF0000))))
buffer = (ctypes.c_char * len(code)).from_buffer(code)
syscalls.no_new_privileges()
syscalls.install_filter(FilterProgram(len(code) // 8, ctypes.addressof(buffer)))
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
"""


def on_a_bare_kernel(source: str) -> subprocess.CompletedProcess[str]:
    """Where there is neither Landlock nor a namespace to be had."""
    return subprocess.run([sys.executable, "-c", BARE + textwrap.dedent(source)], capture_output=True, text=True, timeout=DEADLINE_S)


def test_refusal() -> None:
    done = on_a_bare_kernel("""
        try:
            Sandbox()
        except SandboxUnavailable as error:
            print(error)
    """)
    for word in ("namespaces: ", "unshare", "landlock: ", "Linux 5.13", "user.max_user_namespaces", "allow_weak=True", "docs/sandbox.md"):
        assert word in done.stdout, done


def test_a_weak_level_says_so() -> None:
    done = on_a_bare_kernel("""
        with Sandbox(workers=1, allow_weak=True) as box:
            print(box.level, box.weakness, box.run("print(6 * 7)").stdout, box.run("import os; os.fork()").status)
    """)
    assert done.stdout.startswith("seccomp programs can read and change every file") and "b'42\\n' error" in done.stdout, done
    assert "WARNING sandbox at level 'seccomp': NOT SAFE, programs can read" in done.stderr


def test_an_unsafe_level_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Sandbox(workers=1, level="none", unsafe=True) as box:
        assert box.level == "none" and box.weakness
        assert box.run("import os\nif os.fork() == 0: os._exit(0)\nprint('forked')").stdout == b"forked\n"
        assert box.run("while True: pass", limits=Limits(cpu_s=0.2, wall_s=60)).status == "timeout"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "NOT SAFE" in record.message


# Users


def test_threads(level: str) -> None:
    with Sandbox(workers=2, level=level) as box, ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(lambda n: box.run(SQUARE, f"{n}\n").stdout, range(60)))
    assert outputs == [f"{n * n}\n".encode() for n in range(60)]


def test_asyncio(level: str) -> None:
    async def main() -> list[Any]:
        runs = [asyncio.to_thread(box.call, "def f(x): return x + 1", "f", [[n]]) for n in range(20)]
        return [call.values for call in await asyncio.gather(*runs)]

    with Sandbox(workers=2, level=level) as box:
        assert asyncio.run(main()) == [(n + 1,) for n in range(20)]


def test_several_sandboxes_at_once(level: str) -> None:
    with Sandbox(workers=1, level=level) as one, Sandbox(workers=1, level=level) as other:
        source = "import os\nopen('x', 'w').close()\nprint(os.listdir('.'))"
        assert one.run(source).stdout == other.run(source).stdout == b"['x']\n"


@pytest.mark.slow
def test_ray_actors() -> None:
    ray = pytest.importorskip("ray")

    class Judge:
        def __init__(self) -> None:
            from grpo.rewards.sandbox import Sandbox

            self.box = Sandbox(workers=1)

        def square(self, n: int) -> tuple[str, bytes]:
            return self.box.level, self.box.run("print(int(input()) ** 2)", f"{n}\n").stdout

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        judges = [ray.remote(max_concurrency=4)(Judge).remote() for _ in range(2)]
        results = ray.get([judges[n % 2].square.remote(n) for n in range(20)], timeout=DEADLINE_S)
        assert [output for _, output in results] == [f"{n * n}\n".encode() for n in range(20)]
    finally:
        ray.shutdown()


def test_it_cannot_be_pickled_or_used_after_a_fork(level: str) -> None:
    with Sandbox(workers=1, level=level) as box:
        with pytest.raises(TypeError, match="Ray actor"):
            pickle.dumps(box)
        if (pid := os.fork()) == 0:
            try:
                box.run("print(1)")
            except SandboxError as error:
                os._exit(0 if "forked" in str(error) else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert box.run("print(1)").stdout == b"1\n"


# Failures of its own


def test_a_lost_fork_server_is_replaced(level: str, caplog: pytest.LogCaptureFixture) -> None:
    with Sandbox(workers=1, level=level) as box:
        before = descendants(os.getpid())
        box.run("print(1)")
        for pid in descendants(os.getpid()):
            kill(pid)
        assert box.run(SQUARE, b"7\n").stdout == b"49\n"
        assert "trying again" in caplog.text
        assert wait_for(lambda: not alive(before - descendants(os.getpid())))


def test_a_fork_server_lost_in_a_run_is_no_verdict(level: str, caplog: pytest.LogCaptureFixture) -> None:
    with Sandbox(workers=1, level=level) as box, ThreadPoolExecutor(1) as threads:
        run = threads.submit(box.run, "import time\ntime.sleep(0.5)\nprint('done')", limits=Limits(cpu_s=2, wall_s=60))
        time.sleep(0.2)
        for pid in descendants(os.getpid()):
            kill(pid)
        assert run.result(DEADLINE_S).stdout == b"done\n"


def test_failing_again_and_again_is_an_error(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.rewards.sandbox import memfiles

    with Sandbox(workers=1, level=level) as box:
        monkeypatch.setattr(memfiles, "sealed_output", lambda size: os.open("/nowhere", os.O_RDONLY))
        with pytest.raises(SandboxError, match="nowhere"):
            box.run("print(1)")
        monkeypatch.undo()
        assert box.run("print(1)").stdout == b"1\n"


def test_closing_ends_what_runs(level: str) -> None:
    box = Sandbox(workers=1, level=level)
    before = descendants(os.getpid())
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(box.run, "import time\ntime.sleep(600)", limits=Limits(cpu_s=1, wall_s=900)) for _ in range(2)]
        time.sleep(0.3)
        box.close()
        for run in runs:
            with pytest.raises(SandboxError):
                run.result(DEADLINE_S)
    assert wait_for(lambda: not alive(before))
    with pytest.raises(SandboxError, match="closed"):
        box.run("print(1)")
    box.close()


def test_an_abandoned_sandbox_closes_itself(level: str) -> None:
    box = Sandbox(workers=1, level=level)
    mine = descendants(os.getpid())
    del box
    gc.collect()
    assert wait_for(lambda: not alive(mine))


def test_interrupting_a_run_leaves_a_working_sandbox(level: str) -> None:
    with Sandbox(workers=1, level=level) as box:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            box.run("import time\ntime.sleep(60)", limits=Limits(cpu_s=1, wall_s=90))
        assert box.run("print(1)").stdout == b"1\n"


# Nothing left behind


def descendants(pid: int) -> set[int]:
    """Processes below this one, as /proc shows them. A fork-server in a process namespace is among them."""
    parents = {}
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                parents[int(each.name)] = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                pass
    found, grew = {pid}, True
    while grew:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grew = bool(more)
    return {child for child in found - {pid} if b"grpo.rewards.sandbox" in _command(child)}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it went with another one
        os.kill(pid, signal.SIGKILL)


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _command(pid)}


def wait_for(condition: Callable[[], bool], seconds: float = DEADLINE_S) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go meanwhile: searchable for everybody, as /tmp is."""
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="sandbox-tmp-"))
    path.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    path.rmdir()  # it must be empty


def state() -> dict[str, Any]:
    gc.collect()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "mounts": Path("/proc/self/mounts").read_text(),
        "shared memory": sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else [],
    }


LEAKY = [
    "open('left', 'w').write('x' * 100000)",
    "import os\nos.makedirs('a/b/c')\nos.chmod('a', 0)",
    "import threading, time\n[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(20)]",
    "import socket, os\nkept = [socket.socketpair() for _ in range(50)]\nos._exit(0)",
    "import os\nos.abort()",
    "import mmap\nm = mmap.mmap(-1, 50 << 20)\nm.write(b'x' * (50 << 20))",
    "import os\nprint(os.listdir('.'))",
    SQUARE,
]


def run_many(level: str, folder: Path, count: int) -> None:
    with Sandbox(workers=1, level=level) as box:  # what a first use imports and opens is no leak
        box.run("print(1)")
    before, others = state(), descendants(os.getpid())  # of other tests: math_equal keeps workers, say
    with Sandbox(workers=2, level=level) as box, ThreadPoolExecutor(2) as threads:
        mine = descendants(os.getpid()) - others
        for source, run in zip(LEAKY * count, threads.map(lambda source: box.run(source, b"7\n"), LEAKY * count), strict=True):
            if source is LEAKY[-2]:
                assert run.stdout == b"[]\n"
            if source is SQUARE:
                assert run.stdout == b"49\n"
        mine |= descendants(os.getpid()) - others
    assert wait_for(lambda: not alive(mine))
    assert list(folder.iterdir()) == []
    assert state() == before


@pytest.mark.slow
def test_nothing_is_left_after_hundreds_of_runs(level: str, folder: Path) -> None:
    run_many(level, folder, 40)


@pytest.mark.full
def test_nothing_is_left_after_ten_thousand_runs(level: str, folder: Path) -> None:
    run_many(level, folder, 1250)


OWNER = """
import sys, tempfile, threading, time
from grpo.rewards.sandbox import Limits, Sandbox
box = Sandbox(workers=2, level=sys.argv[1])
source = "open('file', 'w').write('x')\\nimport time\\ntime.sleep(600)"
for _ in range(2):
    threading.Thread(target=box.run, args=(source,), kwargs={"limits": Limits(cpu_s=5, wall_s=900)}, daemon=True).start()
while len(box._workers._all) < 2:  # what a kill in the self-test of a worker leaves, the next sandbox removes
    time.sleep(0.01)
print("running", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_after_the_owner_is_killed(level: str, folder: Path, end: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(folder)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, level], stdout=subprocess.PIPE, env=environment)
    assert owner.stdout is not None and owner.stdout.readline() == b"running\n"
    assert wait_for(lambda: len(descendants(owner.pid)) >= 4)  # two fork-servers, two programs
    family = descendants(owner.pid)
    owner.send_signal(end)
    owner.wait()
    owner.stdout.close()
    assert wait_for(lambda: not alive(family))
    assert wait_for(lambda: not list(folder.iterdir()))


def test_nothing_is_left_after_all_are_killed(level: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could clean up: the next one does."""
    from grpo.rewards.sandbox import scratch

    owner = subprocess.Popen([sys.executable, "-c", OWNER, level], stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(folder)})
    assert owner.stdout is not None and owner.stdout.readline() == b"running\n"
    assert wait_for(lambda: len(descendants(owner.pid)) >= 4)
    family = descendants(owner.pid) | {owner.pid}
    for pid in family:
        kill(pid)
    owner.wait()
    owner.stdout.close()
    assert wait_for(lambda: not alive(family))
    monkeypatch.setattr(scratch, "_YOUNG_S", -1.0)
    with Sandbox(workers=1, level=level) as box:
        scratch.remove_abandoned(str(folder))
        assert box.run("open('x', 'w').write('x')").status == "ok"  # its own is still there
    assert list(folder.iterdir()) == []


def test_refusal_is_a_sandbox_error() -> None:
    assert issubclass(SandboxUnavailable, SandboxError)
