"""What steps leave, one after the other, as tensors over time."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

__all__ = ["pad_rows", "put_rows"]


def pad_rows(values: list[Tensor], counts: list[int], packed: Any, num_particles: int = 1) -> Tensor:
    """Per-step rows ``(n_t * N, ...)`` as ``(B, T, ...)``, or ``(B, T, N, ...)``, in the user's order."""
    out = values[0].new_zeros(counts[0], len(values), num_particles, *values[0].shape[1:])
    put_rows(out, values, counts)
    out = packed.unsort(out)
    return out[:, :, 0] if num_particles == 1 else out


def put_rows(out: Tensor, values: list[Tensor], counts: list[int]) -> None:
    """Write per-step rows ``(n_t * N, ...)`` into ``(B, T, N, ...)``, in packed order, and nothing past a sequence's end."""
    stop = 0
    for count, alike in groupby(counts):  # between the ends of sequences all steps have as many rows
        start, stop = stop, stop + sum(1 for _ in alike)
        out[:count, start:stop] = torch.stack(values[start:stop], 1).unflatten(0, (count, out.shape[2])).transpose(1, 2)
