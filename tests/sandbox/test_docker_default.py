"""The levels that are left in a container with Docker's default settings, which ``docker_default.py`` imitates; and as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.rewards.sandbox.kept import reachable

HERE = Path(__file__).parent
NOBODY = 65534
SHOW = "from grpo.rewards.sandbox import Sandbox\nwith Sandbox(workers=1) as box: print(box.level, box.run('print(6 * 7)').stdout)"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up what root has")
needs_readable = pytest.mark.skipif(
    not (reachable(os.path.realpath(sys.executable)) and reachable(__file__)), reason="other users cannot reach this interpreter"
)


def in_docker(*command: str, user: int | None = None, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    as_user = [] if user is None else ["--user", str(user)]
    launcher = [sys.executable, str(HERE / "docker_default.py"), *as_user]
    return subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=timeout_s, cwd=HERE.parent.parent)


def test_the_imitation_takes_away_what_docker_does() -> None:
    done = in_docker("grep", "-E", "^(CapEff|Seccomp):", "/proc/self/status")
    assert done.stdout.split() == ["CapEff:", "00000000a80425fb", "Seccomp:", "2"], done  # Docker's 14 capabilities
    assert in_docker("unshare", "--user", "true").returncode != 0
    assert in_docker("unshare", "--mount", "true").returncode != 0
    assert in_docker("sh", "-c", "echo 1 > /proc/sys/vm/drop_caches").returncode != 0


def test_root_in_a_container() -> None:
    done = in_docker(sys.executable, "-c", SHOW)
    assert done.stdout == "landlock+uid b'42\\n'\n", done


@needs_readable
def test_a_user_in_a_container() -> None:
    done = in_docker(sys.executable, "-c", SHOW, user=NOBODY)
    assert done.stdout == "landlock b'42\\n'\n", done


PROGRAMS = ["tests/sandbox/test_hostile.py", "tests/sandbox/test_honest.py", "-k", "not control"]
SUITE = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PROGRAMS]


@pytest.mark.full
@pytest.mark.parametrize("user", [None, pytest.param(NOBODY, marks=needs_readable)])
def test_programs_in_a_container(user: int | None) -> None:
    done = in_docker(*SUITE, user=user, timeout_s=3600)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.full
@needs_readable
def test_programs_as_a_user() -> None:
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    done = subprocess.run([*drop, *SUITE], capture_output=True, text=True, timeout=3600, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:]
