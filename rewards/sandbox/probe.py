"""The self-test: a program that tries to get out, run inside the confinement before any other.

It is our own program, so its word counts. Each attempt returns what it could do; a level holds when that is nothing.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from grpo.rewards.sandbox.interpreter import ENVIRONMENT
from grpo.rewards.sandbox.types import Call

FUNCTION = "what_is_open"
SOURCE = '''
import ctypes, os, socket

def succeeds(action, *arguments):
    try:
        result = action(*arguments)
    except (OSError, ValueError):
        return False
    return result is None or result is not False

def write_file(path):
    with open(path, "a") as file:
        file.write("x")

def read_file(path):
    with open(path, "rb") as file:
        file.read(1)

def fork():
    if os.fork() == 0:
        os._exit(0)

def works_with_files():
    """Not an attack: what programs must be able to do."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "a"), "w") as file:
            file.write("x")
        os.rename(os.path.join(folder, "a"), os.path.join(folder, "b"))
    with open("/dev/urandom", "rb") as file:
        file.read(1)

def what_is_open(secret, folder, owner, old_environment):
    libc = ctypes.CDLL(None, use_errno=True)
    attempts = {
        "read a file of the owner": (read_file, secret),
        "write beside a file of the owner": (write_file, os.path.join(folder, "planted")),
        "change a file of the owner": (write_file, secret),
        "list a directory of the owner": (os.listdir, folder),
        "read /etc/passwd": (read_file, "/etc/passwd"),
        "read /proc": (os.listdir, "/proc"),
        "read its own memory file": (read_file, "/proc/self/mem"),
        "list /root": (os.listdir, "/root"),
        "change the standard library": (write_file, os.__file__),
        "open an IPv4 socket": (socket.socket, socket.AF_INET, socket.SOCK_STREAM),
        "open an IPv4 datagram socket": (socket.socket, socket.AF_INET, socket.SOCK_DGRAM),
        "open a Unix socket": (socket.socket, socket.AF_UNIX, socket.SOCK_STREAM),
        "start a process": (fork,),
        "run another program": (os.execv, "/bin/true", ["true"]),
        "signal the owner": (os.kill, owner, 0),
        "signal all processes": (os.kill, -1, 0),
        "make a file in memory": (os.memfd_create, "x"),
        "raise its priority": (os.setpriority, os.PRIO_PROCESS, 0, -1),
        "become root": (os.setuid, 0),
        "raise its limit of memory": (raise_limit,),
        "trace a process": (lambda: libc.ptrace(0, 0, 0, 0) == 0,),
        "make a namespace": (lambda: libc.unshare(0x10000000) == 0,),
    }
    found = [what for what, (action, *arguments) in attempts.items() if succeeds(action, *arguments)]
    if sorted(os.listdir(".")) != []:
        found.append("find files of earlier programs")
    if any(name in os.environ for name in old_environment):
        found.append("see the owner's environment")
    if any(succeeds(os.fstat, fd) for fd in range(4, 1024)):
        found.append("use an open file that is not its own")
    try:
        works_with_files()
    except OSError as error:
        found.append(f"not use its own files ({error})")
    return found

def raise_limit():
    import resource
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard + 4096, hard + 4096))
'''


@contextmanager
def bait() -> Iterator[list[object]]:
    """The probe's arguments, and for as long as it runs, something to find."""
    with tempfile.TemporaryDirectory(prefix="grpo-sandbox-bait-") as folder:
        os.chmod(folder, 0o777)
        secret = os.path.join(folder, "secret")
        with open(secret, "w") as file:
            file.write(secrets.token_hex())
        os.chmod(secret, 0o666)
        yield [secret, folder, os.getpid(), sorted(set(os.environ) - {*ENVIRONMENT, "HOME", "TMPDIR"})]


def found_open(call: Call) -> list[str]:
    """What the probe could do and should not, in words that follow "a program can"."""
    (found,) = call.values
    if not isinstance(found, list):
        last_line = call.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return [f"end the self-test ({call.status}, {found!r}, {last_line})"]
    return [str(each) for each in found]
