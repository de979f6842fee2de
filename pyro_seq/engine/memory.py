"""What becomes of memory that is freed."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["MMAP_THRESHOLD", "TRIM_THRESHOLD", "keep_freed_memory"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""What mallopt sets, as malloc.h numbers it."""


def keep_freed_memory() -> None:
    """Let the C library keep up to 512 MB of what this process frees, for what it asks for next.

    A step of many particles makes some tensors of megabytes and drops them. By default the C library of Linux gives such blocks
    back to the system at once, and the system zeroes them page by page when they are asked for again, at the next step, which
    takes a good part of the time of such a step. Who sets ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` in the
    environment has decided it; elsewhere than on Linux nothing is done.

    Source: mallopt(3).
    """
    if not sys.platform.startswith("linux") or {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**25)  # the largest that it takes
        mallopt(TRIM_THRESHOLD, 2**29)
