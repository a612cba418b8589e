"""The seccomp program, run by an interpreter of its own instructions and by the kernel's headers' numbers."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.sandbox import bpf, seccomp
from grpo.rewards.sandbox.syscall_numbers import MACHINES, NUMBERS, number

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h: EM_X86_64 (62), EM_AARCH64 (183) | 64-bit | little-endian
KILL, ALLOW = 0x80000000, 0x7FFF0000


def data(nr: int, arch: int, *arguments: int) -> bytes:
    """struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]."""
    padded = [value & (2**64 - 1) for value in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    return struct.pack("<iIQ6Q", nr, arch, 0, *padded)


def verdict(machine: str, name: str | int, *arguments: int, own_files: bool = True) -> str:
    nr = number(name, machine) if isinstance(name, str) else name
    assert nr is not None
    action = bpf.evaluate(seccomp.policy(machine, own_files), data(nr, ARCH[machine], *arguments))
    if action in (KILL, ALLOW):
        return {KILL: "kill", ALLOW: "allow"}[action]
    assert action & 0xFFFF0000 == 0x00050000
    return errno.errorcode.get(action & 0xFFFF, "pretend")


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return request.param


@given(
    st.dictionaries(st.integers(0, 600), st.sampled_from([1, 2, 3]), max_size=200),
    st.lists(st.integers(0, 700), min_size=1, max_size=50),
)
def test_dispatch_is_a_dictionary(table: dict[int, int], asked: list[int]) -> None:
    program = (bpf.load(bpf.NUMBER), *bpf.dispatch({n: bpf.give(action) for n, action in table.items()}, bpf.give(9)))
    assert all(bpf.evaluate(program, data(n, 0)) == table.get(n, 9) for n in asked)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.integers(0, 2**32 - 1))
def test_one_of_is_membership(values: list[int], asked: int) -> None:
    program = bpf.if_one_of(bpf.argument(2), values, bpf.give(1), bpf.give(2))
    for value in (asked, *values):
        assert bpf.evaluate(program, data(0, 0, 0, 0, value)) == (1 if value in values else 2)


@given(st.integers(0, 2**64 - 1))
def test_zero_means_all_64_bits(value: int) -> None:
    program = bpf.if_zero(1, bpf.give(1), bpf.give(2))
    assert bpf.evaluate(program, data(0, 0, 0, value)) == (1 if value == 0 else 2)


def test_long_branches_go_through_a_plain_jump() -> None:
    long = tuple((bpf.LOAD, 0, 0, 0) for _ in range(400)) + bpf.give(1)
    program = (bpf.load(0), *bpf.branch(bpf.IF_AT_LEAST, 10, bpf.give(2), long))
    assert bpf.evaluate(program, data(9, 0)) == 1 and bpf.evaluate(program, data(10, 0)) == 2
    assert max(max(yes, no) for _, yes, no, _ in program) <= 255


def test_instructions_have_the_kernels_layout() -> None:
    """struct sock_filter: u16 code; u8 jt; u8 jf; u32 k. BPF_RET | BPF_K is 0x06."""
    assert assemble_one(bpf.give(0x7FFF0000)) == b"\x06\x00" + b"\x00" + b"\x00" + b"\x00\x00\xff\x7f"
    with pytest.raises(ValueError, match="4096"):
        bpf.assemble(bpf.give(0) * 4097)


def assemble_one(fragment: bpf.Fragment) -> bytes:
    return bytes(bpf.assemble(fragment))


@pytest.mark.parametrize("name", ["read", "write", "openat", "mmap", "futex", "exit_group", "clock_gettime", "getrandom", "lseek"])
def test_ordinary_calls_are_allowed(machine: str, name: str) -> None:
    assert verdict(machine, name) == "allow"


# socket, connect, bind, sendmsg, execve, execveat, ptrace, mount, setuid, unshare, bpf, keyctl, memfd_create, chroot, setns
FORBIDDEN = {
    "x86_64": (41, 42, 49, 46, 59, 322, 101, 165, 105, 272, 321, 250, 319, 161, 308, 57, 58, 272, 310),
    "aarch64": (198, 203, 200, 211, 221, 281, 117, 40, 146, 97, 280, 219, 279, 51, 268, 270),
}


def test_dangerous_calls_are_forbidden(machine: str) -> None:
    assert {verdict(machine, nr) for nr in FORBIDDEN[machine]} == {"EPERM"}


def test_other_interfaces_end_the_process(machine: str) -> None:
    program = seccomp.policy(machine, own_files=True)
    for arch in (0x40000003, 0xC000003E, 0xC00000B7, 0x40000028):  # i386, x86-64, aarch64, arm
        if arch != ARCH[machine]:
            assert bpf.evaluate(program, data(0, arch)) == KILL
    if machine == "x86_64":
        assert bpf.evaluate(program, data(0x40000000, ARCH[machine])) == KILL  # x32


def test_threads_but_no_processes(machine: str) -> None:
    glibc_thread = 0x3D0F00  # CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM | SETTLS | PARENT_SETTID | CHILD_CLEARTID
    assert verdict(machine, "clone", glibc_thread) == "allow"
    assert verdict(machine, "clone", 17) == "EPERM"  # SIGCHLD: fork
    assert verdict(machine, "clone", 0x4111) == "EPERM"  # vfork
    for new in (0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert verdict(machine, "clone", glibc_thread | new) == "EPERM"
    assert verdict(machine, "clone3") == "ENOSYS"


def test_signals_to_itself_only(machine: str) -> None:
    own = 0x50494421
    for name in ("kill", "tgkill"):
        assert verdict(machine, name, own) == "allow"
        assert {verdict(machine, name, pid) for pid in (0, 1, -1, own + 1)} == {"EPERM"}
    assert verdict(machine, "prlimit64", 0) == "allow" and verdict(machine, "prlimit64", 1) == "EPERM"


def test_sockets_in_pairs_of_streams_only(machine: str) -> None:
    assert verdict(machine, "socketpair", 1, 1 | 0o2000000) == "allow"  # AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC
    assert verdict(machine, "socketpair", 1, 2) == "EPERM"  # SOCK_DGRAM
    assert verdict(machine, "socketpair", 2, 1) == "EPERM"  # AF_INET
    assert verdict(machine, "sendto", 3, 0, 1, 0, 0) == "allow"
    assert verdict(machine, "sendto", 3, 0, 1, 0, 1 << 40) == "EPERM"


def test_modes_and_times_where_files_are_not_its_own(machine: str) -> None:
    assert verdict(machine, "fchmod", 3, 0o644) == "allow"
    assert verdict(machine, "fchmod", 3, 0o644, own_files=False) == "pretend"
    assert {verdict(machine, "fchmod", 3, 0o4755, own_files=own) for own in (True, False)} == {"EPERM"}
    assert verdict(machine, "utimensat", own_files=False) == "pretend"
    assert verdict(machine, "truncate", own_files=False) == "EPERM"
    assert verdict(machine, "openat", -100, 0, 0o1000) == "EPERM"  # O_RDONLY | O_TRUNC
    assert verdict(machine, "openat", -100, 0, 0o1001) == "allow"  # O_WRONLY | O_TRUNC: Landlock decides


def test_no_ioctl_that_types_into_a_terminal(machine: str) -> None:
    assert verdict(machine, "ioctl", 0, 0x5412) == "EPERM"  # TIOCSTI
    assert verdict(machine, "ioctl", 0, 0x5421) == "allow"  # FIONBIO
    assert verdict(machine, "fcntl", 0, 8) == "EPERM"  # F_SETOWN
    assert verdict(machine, "prctl", 1) == "EPERM"  # PR_SET_PDEATHSIG


def test_calls_of_the_future_look_absent(machine: str) -> None:
    assert {verdict(machine, nr) for nr in (450, 467, 10_000)} == {"ENOSYS"}


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),  # aarch64 uses the generic table
}


def test_numbers_are_the_kernels(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed (linux-libc-dev)")
    text = HEADERS[machine].read_text()
    header = {name: int(nr) for name, nr in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.MULTILINE)}
    aliases = {"newfstatat": "fstatat"}  # the generic header defines it through another macro
    for name in NUMBERS:
        ours = number(name, machine)
        theirs = header.get(name, header.get(aliases.get(name, name)))
        assert ours == theirs, name
