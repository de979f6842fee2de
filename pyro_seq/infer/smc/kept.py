"""What is told of each step, put together as it comes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Kept"]

_FEW = 16


class Kept:
    """Small tensors of one step after the other, which lie in one block but for the last few.

    Left where they are made, among large ones that come and go, they would each leave a hole in memory that is a little too
    small for the next large one: 7 MB for each step of a million particles.
    """

    def __init__(self, steps: int):
        self.steps, self.done = steps, 0
        self.recent: list[Tensor] = []
        self.block: Tensor | None = None
        """``(T, n, ...)``"""

    def append(self, value: Tensor) -> None:
        """:param value: ``(n, ...)`` of the sequences that run, the first of those of the step before."""
        self.recent.append(value)
        if len(self.recent) == _FEW:
            self._gather()

    def by_time(self) -> Tensor:
        """``(n, T, ...)``, zero where a sequence has ended."""
        if self.recent:
            self._gather()
        return self.block[:self.done].transpose(0, 1).contiguous()

    def _gather(self) -> None:
        if self.block is None:
            self.block = self.recent[0].new_zeros((self.steps, *self.recent[0].shape))
        place = self.block[self.done:self.done + len(self.recent)]
        if self.recent[-1].shape == place.shape[1:]:
            torch.stack(self.recent, out=place)
        else:
            for where, value in zip(place, self.recent, strict=True):
                where[:len(value)] = value
        self.done += len(self.recent)
        self.recent = []
