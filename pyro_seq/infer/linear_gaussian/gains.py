"""Covariances and gains, which do not depend on the data but only on which of it is missing."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.infer.linear_gaussian.steps import StepJoint

__all__ = ["Gains", "roots"]

_NOT_FINITE = "a predictive covariance is NaN or infinite: the model's state grows beyond all bounds"


class Gains:
    """What does not depend on the data's values: covariances and gains of ``n <= T`` frames, the last one standing for the
    rest. ``G`` is 1, or ``B``.

    :param present: ``(G, T, X)`` booleans.
    :param covariance: of the state before the first of the frames.
    :param rooted: carry a square root (covariance = root @ root.mT), which stays positive in single precision.
    """

    def __init__(self, joints: list[tuple[StepJoint, int]], present: Tensor, covariance: Tensor, rooted: bool):
        self.covariances: list[Tensor] = []
        self.gains: list[Tensor] = []
        self.factors: list[Tensor] = []
        self.rooted = rooted
        whole, t, last = bool(present.all()), 0, covariance
        # Matrices alone are twice as fast as a batch of one.
        self.single = single = whole and not rooted and len(covariance) == len(present) == 1 and all(
            part.shape[1] == 1 for joint, _ in joints for part in (joint.matrix, joint.noise))
        last = last[0] if single else last
        for joint, count in joints:
            fixed = joint.matrix.shape[0] == 1
            noise, condition = (roots(joint.noise), _condition_root) if rooted else (joint.noise, _condition)
            matrices, noises = ([*(part[:, 0] if single else part).unbind(0)] for part in (joint.matrix, noise))
            for i in range(count):
                at = 0 if fixed else i
                last, gain, factor = condition(matrices[at], noises[at], last, present[:, t], whole)
                self.covariances.append(last @ last.mT if rooted else last)
                self.gains.append(gain)
                self.factors.append(factor)
                t += 1
                if fixed and whole and i % 8 == 7 and _still(*self.covariances[-2:]):
                    t += count - i - 1
                    break
        if not last.isfinite().all():
            raise ValueError(_NOT_FINITE)
        self.last = last[None] if single else last
        """The covariance after the last frame; its square root if ``rooted``."""
        self.n = len(self.gains)
        self.index = torch.arange(t, device=present.device).clamp(max=self.n - 1)

    def stacked(self, values: list[Tensor]) -> Tensor:
        """``(T, G, ...)``"""
        if values[0].shape != values[-1].shape:  # groups that differ from the second frame on
            values = [value.expand(values[-1].shape) for value in values]
        found = torch.stack(values)[:, None] if self.single else torch.stack(values)
        return found if len(self.index) == self.n else found[self.index]


def _still(last: Tensor, now: Tensor) -> bool:
    """Whether a covariance has stopped moving, but for rounding."""
    if last.shape != now.shape:
        return False
    size = now.detach().diagonal(dim1=-2, dim2=-1).abs().clamp(min=torch.finfo(now.dtype).tiny).sqrt()
    return bool(((now - last).detach().abs() <= 4 * torch.finfo(now.dtype).eps * size[..., :, None] * size[..., None, :]).all())


def _condition(matrix: Tensor, noise: Tensor, covariance: Tensor, present: Tensor, whole: bool
               ) -> tuple[Tensor, Tensor, Tensor]:
    """One frame: covariance of the state after given the data, gain ``(G, S', X)``, Cholesky factor of the data's covariance.

    Joseph's form: [I, -K] J [I, -K]' of the joint covariance J is positive whatever the rounding of K.
    """
    after = matrix.shape[-2] - present.shape[-1]
    joint = matrix @ covariance @ matrix.mT + noise
    cross, own = joint[..., :after, after:], joint[..., after:, after:]
    if not whole:
        cross = torch.where(present[:, None, :], cross, 0.0)
        own = torch.where(present[:, :, None] & present[:, None, :], own, torch.diag_embed((~present).to(own)))
    factor = _factor(own)
    gain = cross / own if own.shape[-1] == 1 else torch.cholesky_solve(cross.mT, factor).mT
    half = joint[..., :after, :] - gain @ joint[..., after:, :]
    found = half[..., :after] - half[..., after:] @ gain.mT
    return 0.5 * (found + found.mT), gain, factor


def _factor(own: Tensor) -> Tensor:
    factor, failed = (own.sqrt(), ~(own > 0)) if own.shape[-1] == 1 else torch.linalg.cholesky_ex(own)
    if failed.any():
        raise ValueError("the data has a singular predictive covariance: some combination of its entries is predicted "
                         "without noise; give the emission a positive scale" if own.isfinite().all() else
                         _NOT_FINITE)
    return factor


def roots(noise: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(noise.double())
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]).to(noise.dtype)


def _condition_root(matrix: Tensor, noise: Tensor, root: Tensor, present: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same by an orthogonal transformation of square roots: the array algorithm of Kailath, Sayed and Hassibi, *Linear
    Estimation*, 2000, chapter 12."""
    after = matrix.shape[-2] - present.shape[-1]
    groups = max(len(root), len(matrix), len(present))
    array = torch.cat([(matrix @ root).expand(groups, -1, -1), noise.expand(groups, -1, -1)], -1)
    data = array[:, after:]
    if not whole:
        data = torch.where(present[..., None], data, 0.0)
        unit = torch.diag_embed((~present).to(data)).expand(groups, -1, -1)
        data = torch.cat([data, unit], -1)
        array = torch.cat([array, array.new_zeros(groups, array.shape[1], unit.shape[-1])], -1)
    lower = torch.linalg.qr(torch.cat([data, array[:, :after]], -2).mT, mode="r").R.mT
    width = present.shape[-1]
    factor = lower[:, :width, :width]
    sign = torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(factor)[:, None]
    factor, cross = factor * sign, lower[:, width:, :width] * sign
    if not (factor.diagonal(dim1=-2, dim2=-1) > 0).all():
        _factor(torch.full_like(factor, torch.nan) if not factor.isfinite().all() else torch.zeros_like(factor))
    gain = torch.linalg.solve_triangular(factor, cross, upper=False, left=False)
    return lower[:, width:, width:width + after], gain, factor
