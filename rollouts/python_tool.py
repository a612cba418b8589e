"""An environment in which the policy may run Python programs and sees what they print."""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Sequence
from enum import StrEnum

from grpo.environment import usable_cores
from grpo.rewards.arguments import flag, number, one_of, whole
from grpo.rewards.base import shorten
from grpo.rewards.code.extract import PYTHON_NAMES, fenced_blocks
from grpo.rewards.sandbox import Execution, Limits, Sandbox, Status
from grpo.rollouts.environments import Done, Message
from grpo.types import Completion, Problem


class Format(StrEnum):
    """How a program is written: ``<python> … </python>``, or in a block fenced with ```` ```python ````."""

    tag = "tag"
    fence = "fence"


STOP = {Format.tag: "</python>", Format.fence: "\n```\n"}

_NO_PROGRAM = {
    Format.tag: "nothing was run: write <python> before the program and </python> behind it",
    Format.fence: "nothing was run: begin the program with ```python",
}


def _check(max_calls: int, format: str, cpu_s: float, memory_mb: int, max_output: int, numpy: bool, allow_weak: bool, unsafe: bool) -> None:
    whole("max_calls", max_calls, least=1)
    one_of("format", format, list(Format))
    number("cpu_s", cpu_s, above=0)
    whole("memory_mb", memory_mb, least=16)
    whole("max_output", max_output, least=20)
    for name, value in (("numpy", numpy), ("allow_weak", allow_weak), ("unsafe", unsafe)):
        flag(name, value)


class PythonTool:
    """A turn that ends with a program gets its output as a message of role ``tool``; a turn that ends otherwise is the last.

    ``<python> print(17 * 23) </python>`` is answered by ``391``. What a program prints is the environment's: it is not trained on, and
    no reward part takes it for the policy's words.

    Each program is run by itself, in the sandbox of the code rewards (``docs/sandbox.md``): nothing is left of the one before, neither
    names nor files. The processes that run them are shared by all rollouts, as many as there are cores.

    Args:
        max_calls: programs of one rollout; the turn that ends with one more is the last.
        format: ``tag`` or ``fence``. ``rollout.stop`` must hold the string that ends a program: ``</python>``, or ``"\\n```\\n"``.
        cpu_s: CPU time of one program; it is stopped after it, or after 3 · cpu_s + 1 s on the clock, and the policy is told.
        memory_mb: memory of one program.
        max_output: characters of output that the policy sees; beyond it the middle is left out.
        numpy: import numpy before programs are run, so that it costs them nothing.
        allow_weak, unsafe: accept a machine that offers little or no isolation; see ``docs/sandbox.md``.

    Raises:
        ValueError: an argument that cannot work.
    """

    score_names = ()
    at_once = usable_cores()  # as many as there are processes that run programs
    timeout_s = 600.0  # programs have a limit of their own; this leaves time to wait for a free process

    def __init__(
        self,
        max_calls: int = 4,
        format: str = "tag",
        cpu_s: float = 2.0,
        memory_mb: int = 512,
        max_output: int = 1000,
        numpy: bool = False,
        allow_weak: bool = False,
        unsafe: bool = False,
    ) -> None:
        _check(max_calls, format, cpu_s, memory_mb, max_output, numpy, allow_weak, unsafe)
        self.max_turns = max_calls + 1
        self.stop = (STOP[Format(format)],)
        self._format = Format(format)
        self._limits = Limits(cpu_s=cpu_s, wall_s=3 * cpu_s + 1, memory_mb=memory_mb)
        self._max_output = max_output
        self._calls_left = max_calls
        self._sandbox = lambda: _SHARED.sandbox(numpy, allow_weak, unsafe)

    def start(self, problem: Problem) -> Sequence[Message]:
        return (Message("text", problem.prompt),)

    def step(self, completion: Completion) -> Sequence[Message] | Done:
        """
        Raises:
            SandboxError: the sandbox failed, repeatedly; that is not the program's doing.
        """
        if not completion.text.endswith(self.stop) or not self._calls_left:
            return Done()
        self._calls_left -= 1
        program = program_of(completion.text, self._format)
        if program is None:
            return (Message("tool", _NO_PROGRAM[self._format]),)
        return (Message("tool", shown(self._sandbox().run(program, limits=self._limits), self._limits, self._max_output)),)

    @staticmethod
    def close_shared() -> None:
        """End the processes that all instances share; the next program starts new ones."""
        _SHARED.close()


def program_of(turn: str, format: Format) -> str | None:
    """The program that a turn ends with; None if it has no beginning, or nothing stands in it."""
    if format is Format.tag:
        _, opened, program = turn.removesuffix(STOP[format]).rpartition("<python>")
        first, _, rest = program.partition("\n")  # <python> print(1) </python>: the space is not the program's
        return (textwrap.dedent(rest) if not first.strip() else program.lstrip()) if opened and program.strip() else None
    block = list(fenced_blocks(turn))[-1:]
    return block[0].text if block and block[0].language in PYTHON_NAMES and block[0].text.strip() else None


_ENDED: dict[Status, Callable[[Execution, Limits], str]] = {
    Status.timeout: lambda run, limits: (
        f"stopped after {limits.cpu_s:g} s of CPU time" if run.wall_s < limits.wall_s else f"stopped after {limits.wall_s:g} s"
    ),
    Status.memory: lambda run, limits: f"stopped: more than {limits.memory_mb} MB of memory",
    Status.output: lambda run, limits: f"stopped: more than {limits.output_mb} MB of output",
    Status.killed: lambda run, limits: "killed",
}


def shown(run: Execution, limits: Limits, max_output: int) -> str:
    """What the policy sees of a run: what was printed, a traceback included, and how it ended if not by itself."""
    printed = [stream.decode("utf-8", "replace").strip("\n") for stream in (run.stdout, run.stderr)]
    said = shorten("\n".join(filter(None, printed)), max_output)
    ended = _ENDED[run.status](run, limits) if run.status in _ENDED else ""
    return "\n".join(filter(None, (said, ended))) or "(no output)"


class _Shared:
    """One sandbox for each way of making one, made when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sandboxes: dict[tuple[bool, bool, bool], Sandbox] = {}

    def sandbox(self, numpy: bool, allow_weak: bool, unsafe: bool) -> Sandbox:
        key = (numpy, allow_weak, unsafe)
        with self._lock:
            if key not in self._sandboxes:
                self._sandboxes[key] = Sandbox(workers=usable_cores(), numpy=numpy, allow_weak=allow_weak, unsafe=unsafe)
            return self._sandboxes[key]

    def close(self) -> None:
        with self._lock:
            sandboxes, self._sandboxes = list(self._sandboxes.values()), {}
        for sandbox in sandboxes:
            sandbox.close()


_SHARED = _Shared()
