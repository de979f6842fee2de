"""What the passes over a linear-Gaussian model carry, and their one recursion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_seq.infer.linear import LinearStep

__all__ = ["Carry", "Means", "StepJoint", "Stretch", "recursion", "rows", "shifted"]


class StepJoint(NamedTuple):
    """(state after, data) given the state before: leading dimensions ``(T or 1, B or 1)``, ``S' + X`` rows."""

    matrix: Tensor
    offset: Tensor
    noise: Tensor
    flat: Tensor
    """``(S' + X, d)``"""

    @classmethod
    def of(cls, step: LinearStep, dtype: torch.dtype) -> StepJoint:
        pick = torch.eye(step.carry.shape[-2], dtype=step.carry.dtype, device=step.carry.device)[step.observed]
        rows = torch.cat([step.next_matrix, pick.expand(*step.next_matrix.shape[:-2], *pick.shape)], -2)
        offset = (rows @ step.drift[..., None])[..., 0]
        after = step.next_matrix.shape[-2]
        offset = torch.cat([offset[..., :after] + step.next_offset, offset[..., after:]], -1)
        parts = (rows @ step.carry, offset, rows @ step.noise @ rows.mT, rows[0, 0] @ step.diffuse)
        return cls(*(part.to(dtype) for part in parts))


class Carry(NamedTuple):
    """What one frame hands to the next: the state after it, given the data so far."""

    mean: Tensor
    """``(B, S)``, for diffuse coefficients of zero."""
    columns: Tensor
    """``(B or 1, S, d)``: what each diffuse coefficient adds to the mean."""
    covariance: Tensor
    """``(B or 1, S, S)``; its square root in single precision."""
    precision: Tensor
    """``(B or 1, d, d)`` of the diffuse coefficients, given the data so far."""
    score: Tensor
    """``(B, d)``: that precision times their mean."""
    evidence: Tensor
    """``(B,)`` log density of the data so far, for diffuse coefficients of zero."""
    proper: bool
    """Whether all coefficients have a prior."""

    @classmethod
    def start(cls, mean: Tensor, prior: Tensor) -> Carry:
        """A known state, to which the first step adds coefficients of precisions ``prior``, ``(d,)``."""
        size, diffuse = mean.shape[-1], len(prior)
        return cls(mean, mean.new_zeros(1, size, diffuse), mean.new_zeros(1, size, size),
                   torch.diag(prior).to(mean)[None], mean.new_zeros(len(mean), diffuse), mean.new_zeros(len(mean)),
                   bool((prior > 0).all()))


class Stretch(NamedTuple):
    """The frames of one part (the first of a sequence, or all later ones), ready for the recursions."""

    step: LinearStep
    joint: StepJoint
    where: slice
    """Its frames."""
    closed: Tensor
    """``(T, G, S', S)``: state after on state before, the data given."""
    seen: Tensor
    """``(T, G or 1, X, S)``: data on state before."""


class Means(NamedTuple):
    """What depends on the data's values, for ``n`` data sets at once (and, for columns, for each diffuse coefficient)."""

    start: Tensor
    """``(B, n, S)`` of the state before the first frame."""
    after: list[Tensor]
    """A stretch each: ``(T, B, n, S')`` of the state after each frame given the data so far."""
    residuals: Tensor
    """``(T, B, n, X)``: the data less its prediction, zero where missing."""

    @property
    def last(self) -> Tensor:
        """``(B, n, S')`` of the state after the last frame given all data."""
        return self.after[-1][-1]

    def before(self, stretch: int) -> Tensor:
        """``(T, B, n, S)`` of the state before each frame given the data before it."""
        return shifted(self._start(stretch), self.after[stretch])

    def at(self, frame: Tensor, sequence: Tensor) -> Tensor:
        """``(m, n, S)`` of the state before some frames of the last stretch, ``(m,)``."""
        if self._start(-1).shape[-1] != self.after[-1].shape[-1]:  # a stretch of one frame
            return self._start(-1)[sequence]
        later = self.after[-1][(frame - 1).clamp(min=0), sequence]
        return torch.where((frame == 0)[:, None, None], self._start(-1)[sequence], later)

    def _start(self, stretch: int) -> Tensor:
        return [self.start, *(part[-1] for part in self.after[:-1])][stretch]


def shifted(start: Tensor, after: Tensor) -> Tensor:
    """``(T, ...)``: from the values after each step, those before it."""
    return torch.cat([start[None], after[:-1]]) if len(after) > 1 else start[None]


def rows(values: Tensor, matrix: Tensor) -> Tensor:
    """``(T, B, n, I)`` times the transpose of ``(T or 1, B or 1, O, I)``: ``(T, B, n, O)``."""
    if matrix.shape[1] > 1:
        return values @ matrix.mT
    columns, matrix = values.flatten(1, 2).mT, matrix[:, 0]
    found = matrix * columns if matrix.shape[-1] == 1 else matrix @ columns  # matmul is slow with numbers
    return found.mT.unflatten(1, values.shape[1:3])


def recursion(matrices: Tensor, start: Tensor, pushes: Tensor) -> Tensor:
    """m_t = push_t + matrix_t m_{t-1}, on rows: ``(T, B or 1, O, I)``, ``(B, n, I)`` and ``(T, B, n, O)``, which may be
    overwritten. Returns ``(T, B, n, O)``."""
    if matrices.shape[1] > 1:
        found = [start]
        for matrix, push in zip(matrices.mT.unbind(0), pushes.unbind(0), strict=True):
            found.append(torch.baddbmm(push, found[-1], matrix))
        return torch.stack(found[1:])
    # With the vectors as columns side by side, where products with a small matrix are fast.
    matrices, value, columns = matrices[:, 0], start.flatten(0, 1).mT, pushes.flatten(1, 2).mT
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in (matrices, value, columns))
    found = [value]
    for matrix, push in zip(matrices.unbind(0), columns.unbind(0), strict=True):
        found.append(torch.addmm(push, matrix, found[-1]) if keep else push.addmm_(matrix, found[-1]))
    return (torch.stack(found[1:]) if keep else columns).mT.unflatten(1, start.shape[:2])
