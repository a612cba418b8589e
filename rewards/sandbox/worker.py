"""The owner's end of one fork-server: start it, give it jobs, and tell what came of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from grpo.rewards.sandbox import interpreter, memfiles, scratch
from grpo.rewards.sandbox.outcome import Outcome
from grpo.rewards.sandbox.types import Limits, SandboxError
from grpo.rewards.sandbox.wire import MAX_MESSAGE, RESULT, STDERR, STDOUT, Failure, Job, Ready, Report, Setup, unpack_answer

_MB = 1 << 20
_START_S = 120.0  # generous: the machine may be busy, and this bounds a hang only
_ANSWER_S = 600.0  # beyond the wall limit, which the fork-server keeps, and stretches when the machine is busy
_END_S = 5.0

# A large stack for programs that recurse deeply: the kernel leaves room for it when a program is executed, and only then.
_RAISE_STACK = """
import os, resource, sys
hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
wanted = 512 << 20
resource.setrlimit(resource.RLIMIT_STACK, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
os.execv(sys.executable, [sys.executable, *{flags!r}, "-c", *sys.argv[1:]])
"""
# This package's modules under their own names, without the packages around it, which import other things.
_SERVE = """
import sys, types
for name, path in (("grpo", []), ("grpo.rewards", []), ("grpo.rewards.sandbox", [sys.argv[1]])):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = path
from grpo.rewards.sandbox.zygote import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""
_FLAGS = ("-I", "-S", "-B", "-X", "utf8")


class WorkerLost(SandboxError):
    """The fork-server failed. Another one may do."""


class Worker:
    """Not safe for threads: one job at a time.

    Raises:
        WorkerLost: it does not start; the message says why.
    """

    def __init__(self, level: str, imports: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        owner_fd = os.pidfd_open(os.getpid())
        self._control = ours
        self._scratch = scratch.new_home(tempfile.gettempdir())
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 – closed in close()
        arguments = [_SERVE, str(Path(__file__).parent), str(theirs.fileno()), str(owner_fd)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_FLAGS, "-c", _RAISE_STACK.format(flags=_FLAGS), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=interpreter.ENVIRONMENT,
                cwd="/",
                pass_fds=(theirs.fileno(), owner_fd),
                start_new_session=True,  # Ctrl-C is the owner's to handle
            )
        except BaseException:
            ours.close()
            self._errors.close()
            raise
        finally:
            theirs.close()
            os.close(owner_fd)
        try:
            setup = Setup(
                level=level,
                readable=interpreter.readable(),
                site_packages=interpreter.site_packages(),
                imports=tuple(imports),
                scratch=self._scratch,
            )
            answer = self._ask(setup.pack(), (), _START_S)
            if not isinstance(answer, Ready):
                raise WorkerLost(f"the fork-server did not start: {answer}")
            self.resident_mb = answer.resident_mb
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, job: bytes, stdin: bytes, limits: Limits) -> Outcome:
        """
        Raises:
            WorkerLost: nothing is known of the program, and the worker is closed.
        """
        fds: list[int] = []
        try:
            for content in (job, stdin):
                fds.append(memfiles.sealed_input(content))
            for _ in (STDOUT, STDERR, RESULT):
                fds.append(memfiles.sealed_output(limits.output_mb * _MB))
            message = Job(cpu_s=limits.cpu_s, wall_s=limits.wall_s, memory=limits.memory_mb * _MB, files=limits.files_mb * _MB).pack()
            answer = self._ask(message, fds, limits.wall_s + _ANSWER_S)
            if not isinstance(answer, Report):
                raise WorkerLost(f"the sandbox failed: {answer}")
            stdout, stderr, result = (memfiles.written(fds[which], limits.output_mb * _MB) for which in (STDOUT, STDERR, RESULT))
            return Outcome(report=answer, stdout=stdout, stderr=stderr, result=result, resident_mb=self.resident_mb)
        except BaseException as error:
            self.close()  # whatever state it is in
            if isinstance(error, OSError):
                raise WorkerLost(f"the sandbox failed: {error}") from error
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def _ask(self, message: bytes, fds: Sequence[int], timeout_s: float) -> Ready | Report | str:
        self._control.settimeout(timeout_s)
        try:
            socket.send_fds(self._control, [message], fds)
            received = self._control.recv(MAX_MESSAGE)
        except TimeoutError:
            raise WorkerLost(f"the fork-server did not answer within {timeout_s:.0f} s") from None
        except OSError as error:
            raise WorkerLost(f"the fork-server is gone ({error}){self._last_words()}") from error
        if not received:
            raise WorkerLost(f"the fork-server is gone{self._last_words()}")
        answer = unpack_answer(received)
        return answer.why if isinstance(answer, Failure) else answer

    def _last_words(self) -> str:
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        text = self._errors.read(1 << 16).decode("utf-8", "replace").strip()
        return f": {text}" if text else ""

    def abort(self) -> None:
        """End the job that another thread waits for: it gets ``WorkerLost``."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the fork-server and what runs in it."""
        self.abort()  # closing is not enough if this process was forked meanwhile: the copy keeps the connection open
        self._control.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with contextlib.suppress(OSError):  # it is there only if the fork-server was killed; what stays now goes at the next start
            scratch.remove_home(self._scratch)
        self._errors.close()
