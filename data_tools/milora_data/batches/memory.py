"""Keep freed memory in a loader process (malloc settings), so that batches do not fetch it again from the system."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

# Parameters of mallopt in malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 1 << 30  # bytes


@cache
def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors, and return whether it does (Linux with glibc).

    By default, glibc takes the memory of each large tensor from the system and returns it at once. The page faults take
    longer than the arithmetic on the pixels of a batch. At most 1 GiB of freed memory is kept. The environment
    variables MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of glibc have precedence.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return False
    libc = ctypes.CDLL(None)
    # Older versions of glibc accept at most 32 MiB as the size of one block.
    keeps_blocks = any(libc.mallopt(_MMAP_THRESHOLD, size) == 1 for size in (_KEPT, 32 << 20))
    return keeps_blocks and libc.mallopt(_TRIM_THRESHOLD, _KEPT) == 1
