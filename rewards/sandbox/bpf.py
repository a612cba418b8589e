"""Classic BPF as seccomp runs it: instructions, and the few shapes of program that a policy is made of.

A fragment is a tuple of instructions that ends in a return on every path. All jumps are relative and stay inside, so fragments can
be put together freely. An instruction is ``(code, jump if true, jump if false, k)``, jumps counted from the instruction behind it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

Instruction = tuple[int, int, int, int]
Fragment = tuple[Instruction, ...]

LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS: A = the word at offset k of struct seccomp_data
AND = 0x54  # BPF_ALU | BPF_AND | BPF_K: A &= k
JUMP = 0x05  # BPF_JMP | BPF_JA
IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K

NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_MAX_JUMP = 255
MAX_INSTRUCTIONS = 4096


def argument(index: int, half: str = "low") -> int:
    """The offset of a half of a system call's argument (both machines are little-endian)."""
    return 16 + 8 * index + (4 if half == "high" else 0)


def give(action: int) -> Fragment:
    return ((RETURN, 0, 0, action),)


def load(offset: int) -> Instruction:
    return (LOAD, 0, 0, offset)


def branch(code: int, k: int, yes: Fragment, no: Fragment) -> Fragment:
    """If the test holds, ``yes``, else ``no``. Conditional jumps reach 255 instructions; longer ones go through a plain jump."""
    if len(no) <= _MAX_JUMP:
        return ((code, len(no), 0, k), *no, *yes)
    return ((code, 0, 1, k), (JUMP, 0, 0, len(no)), *no, *yes)


def if_one_of(offset: int, values: Iterable[int], yes: Fragment, no: Fragment, mask: int | None = None) -> Fragment:
    """If the (masked) word is one of the values, ``yes``, else ``no``."""
    values = list(values)
    tests = tuple((IF_EQUAL, len(values) - 1 - index + len(no), 0, value) for index, value in enumerate(values))
    masked: Fragment = () if mask is None else ((AND, 0, 0, mask),)
    return (load(offset), *masked, *tests, *no, *yes)


def if_zero(index: int, yes: Fragment, no: Fragment) -> Fragment:
    """If all 64 bits of an argument are zero, ``yes``, else ``no``."""
    return if_one_of(argument(index, "high"), [0], if_one_of(argument(index), [0], yes, no), no)


def dispatch(actions: Mapping[int, Fragment], default: Fragment) -> Fragment:
    """By the number that is in A: the number's fragment, or the default. A binary search, since every system call comes through.

    >>> len(dispatch({}, give(0)))
    1
    """
    return _search(_intervals(actions, default))


def _intervals(actions: Mapping[int, Fragment], default: Fragment) -> list[tuple[int, Fragment]]:
    """``(start, fragment)``: each holds from its start up to the next one's; neighbours differ."""
    starts = sorted({0, *actions, *(number + 1 for number in actions)})
    intervals: list[tuple[int, Fragment]] = []
    for start in starts:
        fragment = actions.get(start, default)
        if not intervals or intervals[-1][1] != fragment:
            intervals.append((start, fragment))
    return intervals


def _search(intervals: Sequence[tuple[int, Fragment]]) -> Fragment:
    if len(intervals) == 1:
        return intervals[0][1]
    middle = len(intervals) // 2
    return branch(IF_AT_LEAST, intervals[middle][0], _search(intervals[middle:]), _search(intervals[:middle]))


def assemble(program: Fragment) -> bytearray:
    if len(program) > MAX_INSTRUCTIONS:
        raise ValueError(f"the program has {len(program)} instructions; the kernel takes {MAX_INSTRUCTIONS}")
    return bytearray(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))


def evaluate(program: Fragment, data: bytes) -> int:
    """What the kernel would make of ``data`` (a ``struct seccomp_data``): for tests of a policy."""
    accumulator = position = 0
    while True:
        code, yes, no, k = program[position]
        position += 1
        match code:
            case 0x20:
                accumulator = int.from_bytes(data[k : k + 4], "little")
            case 0x54:
                accumulator &= k
            case 0x05:
                position += k
            case 0x15:
                position += yes if accumulator == k else no
            case 0x35:
                position += yes if accumulator >= k else no
            case 0x06:
                return k
            case _:
                raise ValueError(f"unknown instruction {code:#x}")
