"""Keep freed memory in the process, so that large buffers are not faulted in again at every step (glibc only).

By default glibc returns each large block to the system when it is freed. A decoder's pass and a training step
free and allocate hundreds of megabytes, and touching fresh pages then costs a good part of the time.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks. True where it took effect; an allocator set by MALLOC_… variables is left alone."""
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
