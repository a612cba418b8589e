"""What the sandbox's tests share: the levels that this machine offers, a sandbox for each, programs, and something to steal and break."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from grpo.rewards.sandbox import Limits, Sandbox, SandboxUnavailable
from grpo.rewards.sandbox.levels import STRONG

HERE = Path(__file__).parent
LIMITS = Limits(cpu_s=2, wall_s=7, memory_mb=512, output_mb=16, files_mb=64)


@dataclass(frozen=True)
class Program:
    name: str
    header: tuple[str, ...]
    source: str


def read_programs(path: Path) -> list[Program]:
    programs = []
    for part in path.read_text(encoding="utf-8").split("=== ")[1:]:
        first, _, source = part.partition("\n")
        name, *header = (each.strip() for each in first.split("|"))
        programs.append(Program(name, tuple(header), source))
    return programs


def available_levels() -> tuple[str, ...]:
    levels = []
    for level in STRONG:
        with contextlib.suppress(SandboxUnavailable), Sandbox(workers=1, level=level):
            levels.append(level)
    return tuple(levels)


LEVELS = available_levels()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", LEVELS or [pytest.param("", marks=pytest.mark.skip(reason="no level holds here"))], scope="session")
    if "hostile" in metafunc.fixturenames:
        hostile = read_programs(HERE / "hostile.txt")
        metafunc.parametrize("hostile", hostile, ids=[program.name for program in hostile])


@pytest.fixture(scope="session")
def honest() -> list[Program]:
    return read_programs(HERE / "honest.txt")


@pytest.fixture(scope="session")
def box(level: str) -> Iterator[Sandbox]:
    with Sandbox(workers=1, level=level, limits=LIMITS) as box:
        yield box


@dataclass
class Scene:
    """A place with a secret, an answer, files, listeners and a victim; and what has become of them."""

    folder: Path
    secret: str
    answer: str
    tag: str
    victim: subprocess.Popen[bytes]
    fill: dict[str, object]
    touched: list[str] = field(default_factory=list)

    def source(self, program: Program) -> str:
        source = program.source
        for name, value in self.fill.items():
            source = source.replace(f"@@{name}@@", str(value))
        return source

    def reset(self) -> None:
        self.touched.clear()
        for name in ("canary", "drop"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        canary = self.folder / "canary"
        (canary / "tree").mkdir(parents=True)
        (canary / "names").mkdir()
        (self.folder / "drop").mkdir()
        files = {
            "secret": self.secret, "answers.json": f'{{"answer": "{self.answer}"}}', "notes.txt": "notes", "tree/a.txt": "a",
            f"names/{self.secret}": "",
        }  # fmt: skip
        for name, content in files.items():
            (canary / name).write_text(content)
        for path in (canary, self.folder / "drop", *canary.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)  # whoever gets there can do everything
        self._before = self._state()

    def _state(self) -> list[tuple[object, ...]]:
        paths = sorted([*(self.folder / "canary").rglob("*"), *(self.folder / "drop").rglob("*")])
        stats = [(path, path.lstat()) for path in paths]
        return [(path, s.st_mode, s.st_uid, s.st_size, 0 if path.is_dir() else s.st_mtime_ns) for path, s in stats]

    def evidence(self, output: bytes) -> set[str]:
        """The kinds of breach that can be seen."""
        found = set()
        if self.secret.encode() in output or self.answer.encode() in output:
            found.add("secret")
        if b"PROOF" in output:
            found.add("proof")
        if self._state() != self._before:
            found.add("files")
        if self.touched:
            found.add("net")
        if self.victim.poll() is not None:
            found.add("victim")
        if self._named_processes():
            found.add("leftover")
        return found

    def _named_processes(self) -> list[int]:
        def name(pid: str) -> str:
            with contextlib.suppress(OSError):
                return Path(f"/proc/{pid}/comm").read_text().strip()
            return ""

        return [int(pid) for pid in os.listdir("/proc") if pid.isdecimal() and name(pid) == self.tag]

    def clean(self) -> None:
        for pid in self._named_processes():
            os.kill(pid, 9)
        if self.victim.poll() is not None:
            self.start_victim()

    def start_victim(self) -> None:
        code = "import time; time.sleep(3600)"
        self.victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, self.secret], env={"SECRET": self.secret})
        self.fill["VICTIM"] = self.victim.pid


@pytest.fixture(scope="session")
def whole_scene() -> Iterator[Scene]:
    folder = Path(tempfile.mkdtemp(prefix="sandbox-scene-"))
    folder.chmod(0o755)
    scene = Scene(folder, f"SECRET-{secrets.token_hex(8)}", f"ANSWER-{secrets.token_hex(8)}", f"t{secrets.token_hex(6)}", None, {})  # type: ignore[arg-type]
    abstract = secrets.token_hex(8)
    listeners = {
        "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        "UNIX": (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "stream")),
        "UNIXDGRAM": (socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "datagram")),
        "ABSTRACT": (socket.AF_UNIX, socket.SOCK_STREAM, "\0" + abstract),
    }
    with contextlib.ExitStack() as stack:
        for name, (family, kind, address) in listeners.items():
            listener = stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            threading.Thread(target=_notice, args=(listener, scene.touched, name), daemon=True).start()
            scene.fill[name] = listener.getsockname()[1] if family == socket.AF_INET else address
        scene.fill.update(ABSTRACT=abstract, CANARY=folder / "canary", DROP=folder / "drop", TAG=scene.tag)
        for name in ("stream", "datagram"):
            (folder / name).chmod(0o777)
        os.environ["SANDBOX_TEST_SECRET"] = scene.secret
        scene.start_victim()
        yield scene
        scene.victim.kill()
        scene.victim.wait()
        del os.environ["SANDBOX_TEST_SECRET"]
    shutil.rmtree(folder)


def _notice(listener: socket.socket, touched: list[str], name: str) -> None:
    with contextlib.suppress(OSError):
        while True:
            if listener.type == socket.SOCK_STREAM:
                listener.accept()[0].close()
            else:
                listener.recv(100)
            touched.append(name)


@pytest.fixture
def scene(whole_scene: Scene) -> Iterator[Scene]:
    whole_scene.reset()
    yield whole_scene
    whole_scene.clean()
