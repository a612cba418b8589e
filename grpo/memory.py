"""What glibc does with freed memory, which decides how fast an update is on a CPU.

By default it gives every block of some MiB back to the system when it is freed, and the next one of that size is mapped and cleared
page by page again. A forward and backward pass does that thousands of times: measured, half of its time.
"""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER = 2**31 - 1  # bytes at the end of the heap that must be free before they go back
MIB = 2**20


def reuse_freed_pages() -> None:
    """Keep freed memory in this process for its next allocations: it grows to the most it ever needed, and stays there.

    What is free at this moment goes back first: called when a model is ready, these are the holes that loading it has left, which hold
    its weights in another precision and are of no size that an update asks for.

    Elsewhere than on glibc this does nothing; allocators such as jemalloc and tcmalloc keep freed memory by themselves.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap as well
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
        libc.mallopt(M_TOP_PAD, 64 * MIB)
