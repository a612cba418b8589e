"""What a run in the sandbox costs, beside a cold interpreter: CPU time, runs per second, latency, memory.

    python benchmarks/sandbox.py [--runs 300] [--level namespaces] [--numpy] [--markdown]

The two are interleaved, in blocks, so that both see the same machine. CPU time is that of everybody involved: this process, the
fork-server and the programs. Load on the machine slows both; run it on a quiet one.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from grpo.rewards.sandbox import Sandbox

TRIVIAL = "print(int(input()) ** 2)"
WITH_NUMPY = "import numpy as np\nprint(int(np.array([int(input())]).prod()) ** 2)"
BLOCK = 25


@dataclass
class Measured:
    """One way to run a program: CPU seconds a run by block, and the wall seconds of every run."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def block(self, run: Callable[[], bytes], used: Callable[[], float]) -> None:
        before = used()
        for _ in range(BLOCK):
            started = time.perf_counter()
            output = run()
            self.wall_s.append(time.perf_counter() - started)
            if output != b"49\n":
                raise SystemExit(f"wrong output: {output!r}")
        self.cpu_s.append((used() - before) / BLOCK)

    @property
    def cpu_ms(self) -> float:
        return 1000 * statistics.median(self.cpu_s)

    def wall_ms(self, percentile: int) -> float:
        return 1000 * statistics.quantiles(self.wall_s, n=100, method="inclusive")[percentile - 1]


def own_cpu_s() -> float:
    """This process and its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def servers() -> list[int]:
    """The fork-servers of this process, the ones in process namespaces too."""
    stats = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/stat")}
    parents = {}
    for pid, path in stats.items():
        try:
            parents[pid] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            pass
    children = [pid for pid, parent in parents.items() if parent == os.getpid()]
    return children + [pid for pid, parent in parents.items() if parent in children]


def family_cpu_s() -> float:
    """This process, its fork-servers, and all programs that those have waited for."""
    ticks = 0
    for pid in servers():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(each) for each in fields[11:15])  # utime, stime and those of children
    return own_cpu_s() + ticks / os.sysconf("SC_CLK_TCK")


def memory_mb() -> float:
    """Proportional set size of the largest fork-server."""

    def pss(pid: int) -> float:
        line = next(line for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        return int(line.split()[1]) / 1024

    return max(pss(pid) for pid in servers())


def cold(path: str) -> bytes:
    return subprocess.run([sys.executable, "-I", path], input=b"7\n", stdout=subprocess.PIPE, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help=f"in the sandbox; a tenth as many cold, in blocks of {BLOCK}")
    parser.add_argument("--level", help="instead of the strongest one that holds")
    parser.add_argument("--numpy", action="store_true", help="with NumPy imported in advance, and programs that use it")
    parser.add_argument("--markdown", action="store_true", help="one row of a table")
    arguments = parser.parse_args()
    source = WITH_NUMPY if arguments.numpy else TRIVIAL
    blocks = max(arguments.runs // BLOCK, 2)
    sandboxed, plain, program_cpu_s = Measured(), Measured(), list[float]()
    with Sandbox(workers=1, level=arguments.level, numpy=arguments.numpy) as box, tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(source)
        file.flush()

        def run() -> bytes:
            done = box.run(source, b"7\n")
            program_cpu_s.append(done.cpu_s)
            return done.stdout

        for _ in range(BLOCK):
            box.run(source, b"7\n")
        for index in range(blocks):
            sandboxed.block(run, family_cpu_s)
            if index % (blocks // 2) == 0:
                plain.block(lambda: cold(file.name), own_cpu_s)
        level, memory = box.level, memory_mb()
        rate = runs_a_second(box, source, 1, 8 * BLOCK)
    cpus = os.cpu_count() or 1
    with Sandbox(workers=cpus, level=level, numpy=arguments.numpy) as box:
        all_rate = runs_a_second(box, source, cpus, 8 * BLOCK * cpus)
    ratio = plain.cpu_ms / sandboxed.cpu_ms
    if arguments.markdown:
        latency = f"{sandboxed.wall_ms(50):.1f} / {sandboxed.wall_ms(99):.1f}"
        kind = "numpy" if arguments.numpy else "trivial"
        rates = f"{rate:.0f} / {all_rate:.0f}"
        print(f"| {level} | {kind} | {sandboxed.cpu_ms:.2f} | {plain.cpu_ms:.1f} | {ratio:.1f} | {latency} | {rates} | {memory:.0f} |")
        return
    print(f"level {level}, {'NumPy' if arguments.numpy else 'no NumPy'}, {blocks * BLOCK} runs, {len(plain.wall_s)} cold")
    print(f"CPU time a program  {1000 * statistics.median(program_cpu_s):7.2f} ms, of its own process")
    print(f"CPU time a run      {sandboxed.cpu_ms:7.2f} ms; cold interpreter {plain.cpu_ms:.1f} ms, {ratio:.1f} times as much")
    print(f"latency             {sandboxed.wall_ms(50):7.2f} ms median, {sandboxed.wall_ms(99):.2f} ms 99th percentile")
    print(f"runs a second       {rate:7.0f} with one worker, {all_rate:.0f} with {cpus}")
    print(f"memory              {memory:7.1f} MB, the fork-server's proportional set size")


def runs_a_second(box: Sandbox, source: str, threads: int, runs: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: box.run(source, b"7\n"), range(2 * threads)))  # all workers have started
        started = time.perf_counter()
        list(pool.map(lambda _: box.run(source, b"7\n"), range(runs)))
        return runs / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
