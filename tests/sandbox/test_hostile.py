"""Every hostile program at every level that this machine offers; and, as a positive control, in a plain process, where it succeeds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import pytest

from grpo.rewards.sandbox import Limits, Sandbox

FLOOD = 40 << 20
LATE_S = 300.0  # a program that is not stopped goes on for a quarter of an hour; the limit is 3 s, and the machine may be busy
LIMITS = Limits(cpu_s=1, wall_s=3, memory_mb=128, output_mb=4, files_mb=16)


def test_a_hostile_program_gets_nowhere(box: Sandbox, scene: Any, hostile: Any) -> None:
    kinds = set(hostile.header[0].split())
    source = scene.source(hostile)
    found = set()
    for _ in range(2 if "again" in kinds else 1):
        started = time.monotonic()
        if "forged" in kinds:
            run = box.call(source, "solve", [[7]], limits=LIMITS)
            found |= {"forged"} if run.values == (scene.answer,) else set()
            output = repr(run.values).encode()
        else:
            run = box.run(source, b"7\n", limits=LIMITS)
            output = run.stdout + run.stderr
        found |= {"late"} if time.monotonic() - started > LATE_S else set()
        found |= {"flood"} if len(run.stdout) + len(run.stderr) > FLOOD else set()
        found |= scene.evidence(output)
    assert not found, f"{hostile.header[1]}: {found}, {run}"
    if "late" in kinds:
        assert run.status == "timeout"
    if "flood" in kinds:
        assert run.status == "output"
    after = box.run("import os; print(6 * 7, os.listdir('.'))")
    assert after.stdout == b"42 []\n", f"after {hostile.name}: {after}"


def test_positive_control(scene: Any, hostile: Any) -> None:
    """Run by a plain interpreter, as a user's program, and judged by its exit code, each program does what it must not do."""
    kinds = hostile.header[0].split()
    if "root" in kinds and os.geteuid() != 0:
        pytest.skip("this one needs root to succeed anywhere")
    expected = {"again": "proof"}.get(kinds[0], kinds[0])
    with tempfile.TemporaryDirectory() as place:
        folder = os.path.join(place, "cwd")
        os.mkdir(folder)
        environment = {**os.environ, "HOME": folder, "TMPDIR": folder}
        for _ in range(2 if "again" in kinds else 1):
            source = scene.source(hostile)
            if kinds[0] == "forged":
                source += f"\nEXPECTED = {scene.answer!r}\nif __name__ == '__main__':\n    assert solve(7) == EXPECTED\n"
            found = _run_plainly(source, folder, environment, scene, patience_s=6 if "late" in kinds else 60)
        subprocess.run(["rm", "-rf", folder], check=True)  # however deep it is
    if kinds[0] != "forged" and "not permitted" in found.error and expected not in found.kinds:
        pytest.skip("this machine does not let anybody do that")
    assert expected in found.kinds, f"{hostile.header[1]}: {found.kinds}, {found.error}"


class Found:
    def __init__(self, kinds: set[str], error: str) -> None:
        self.kinds = kinds
        self.error = error


def _run_plainly(source: str, folder: str, environment: dict[str, str], scene: Any, patience_s: float) -> Found:
    path = os.path.join(os.path.dirname(folder), "program.py")
    with open(path, "w") as file:
        file.write(source)
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, path], stdin=subprocess.PIPE, stdout=output, stderr=errors, cwd=folder, env=environment, start_new_session=True
        )
        kinds = set()
        try:
            process.communicate(b"7\n", timeout=patience_s)
        except subprocess.TimeoutExpired:
            kinds.add("late")
        finally:
            process.kill()
            process.wait()
        texts = []
        for file in (output, errors):
            kinds |= {"flood"} if os.fstat(file.fileno()).st_size > FLOOD else set()
            file.seek(0)
            texts.append(file.read(1 << 20))
        if process.returncode == 0:
            kinds.add("forged")
        found = kinds | scene.evidence(b"".join(texts))
        return Found(found, texts[1].decode("utf-8", "replace")[-500:])
