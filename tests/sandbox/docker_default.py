"""Run a command as a container with Docker's default settings would: ``python docker_default.py [--user UID] COMMAND…`` (as root).

Docker's capabilities, the system calls that its seccomp profile refuses without CAP_SYS_ADMIN and the like, and its masked and
read-only paths under /proc and /sys. From https://github.com/moby/profiles/blob/main/seccomp/default.json and
https://docs.docker.com/engine/security/seccomp/. Not Docker itself: files, network and processes are the host's.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
from collections.abc import Sequence
from typing import NoReturn

from grpo.rewards.sandbox import syscalls
from grpo.rewards.sandbox.bpf import NUMBER, Fragment, argument, assemble, dispatch, give, if_one_of, load

# chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot mknod audit_write setfcap
CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/sys/firmware")
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/sys")

# Names and numbers on x86-64 and aarch64.
REFUSED = {
    "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "pivot_root": (155, 41),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "quotactl": (179, 60), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "kexec_load": (246, 104), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "kcmp": (312, 272),
    "open_by_handle_at": (304, 265), "lookup_dcookie": (212, 18), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "fanotify_init": (300, 262), "vhangup": (153, 58), "mbind": (237, 235), "set_mempolicy": (238, 237),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
_NEW_NAMESPACES = 0x7E020000


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--user", type=int, help="run as this uid and gid, without capabilities")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    mask_paths()
    install_profile()
    if arguments.user is not None:
        os.setgroups([])
        os.setresgid(*[arguments.user] * 3)
        os.setresuid(*[arguments.user] * 3)
    else:
        keep_capabilities(CAPABILITIES)
    os.execvp(arguments.command[0], arguments.command)


def mask_paths() -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    for path in filter(os.path.exists, READ_ONLY):
        tree = syscalls.clone_mount(path)
        syscalls.restrict_mount(tree, syscalls.MOUNT_ATTR_RDONLY)
        syscalls.attach_mount(tree, path)
        os.close(tree)
    for path in filter(os.path.exists, MASKED):
        if os.path.isdir(path):
            syscalls.mount("tmpfs", path, "tmpfs", 1, "size=0")  # MS_RDONLY
        else:
            null = syscalls.clone_mount("/dev/null")
            syscalls.attach_mount(null, path)
            os.close(null)


def install_profile() -> None:
    which = ("x86_64", "aarch64").index(platform.machine())
    allow, refuse = give(0x7FFF0000), give(0x00050000 | errno.EPERM)
    actions: dict[int, Fragment] = {numbers[which]: refuse for numbers in REFUSED.values()}
    actions[CLONE[which]] = if_one_of(argument(0), [0], allow, refuse, mask=_NEW_NAMESPACES)
    actions[CLONE3[which]] = give(0x00050000 | errno.ENOSYS)
    code = assemble((load(NUMBER), *dispatch(actions, allow)))
    buffer = (ctypes.c_char * len(code)).from_buffer(code)
    syscalls.install_filter(syscalls.FilterProgram(len(code) // 8, ctypes.addressof(buffer)))


def keep_capabilities(kept: Sequence[int]) -> None:
    """Programs executed by root get what the bounding set has."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in set(range(64)) - set(kept):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; behind the last capability it fails


if __name__ == "__main__":
    main()
