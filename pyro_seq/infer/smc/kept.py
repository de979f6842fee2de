"""What is told of each step, put together as it comes."""

from __future__ import annotations

from torch import Tensor

from pyro_seq.engine.padded import put_rows
from pyro_seq.sequences import Packed

__all__ = ["Kept"]

_FEW = 16


class Kept:
    """Small tensors of one step after the other, which lie in one block but for the last few.

    Left where they are made, among large ones that come and go, they would each leave a hole in memory that is a little too
    small for the next large one, so that a filter of many particles took more memory with each step.
    """

    def __init__(self, packed: Packed):
        self.packed, self.done = packed, 0
        self.recent: list[Tensor] = []
        self.block: Tensor | None = None
        """``(B, T, 1, ...)`` in packed order, of which ``done`` steps are there."""

    def append(self, value: Tensor) -> None:
        """:param value: ``(n, ...)`` of the sequences that run."""
        self.recent.append(value)
        if len(self.recent) == _FEW:
            self._gather()

    def padded(self) -> Tensor:
        """``(B, T, ...)`` in the user's order, zero past a sequence's end."""
        self._gather()
        return self.packed.unsort(self.block[:, :self.done, 0])

    def _gather(self) -> None:
        if not self.recent:
            return
        counts, stop = self.packed.counts, self.done + len(self.recent)
        if self.block is None:
            self.block = self.recent[0].new_zeros(counts[0], len(counts), 1, *self.recent[0].shape[1:])
        put_rows(self.block[:, self.done:stop], self.recent, counts[self.done:stop])
        self.done, self.recent = stop, []
