"""How many rows there are of what is compiled, and what stands in those that are too many."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filled", "rounded"]


def rounded(rows: int) -> int:
    """The next eighth of a power of two."""
    step = max(1, 2 ** (rows.bit_length() - 4))
    return -(-rows // step) * step


def filled(value: Tensor, rows: int) -> Tensor:
    """``(rows, ...)``: the first ones, or further ones that are like the first."""
    more = rows - len(value)
    return value[:rows] if more <= 0 else torch.cat([value, value[:1].expand(more, *value.shape[1:])])
