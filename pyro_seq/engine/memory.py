"""What becomes of memory that is freed."""

from __future__ import annotations

import torch

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of what this process frees, for what it asks for next.

    A step of many particles makes some tensors of megabytes and drops them. By default the C library of Linux gives such blocks
    back to the system at once, and the system zeroes them page by page when they are asked for again, at the next step, which
    takes a good part of the time of such a step. The largest block that has been freed so far is what it takes for usual, up
    to 32 MB, so that one of that size, which nobody ever writes to, is enough.

    Source: mallopt(3), on ``M_MMAP_THRESHOLD``.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
