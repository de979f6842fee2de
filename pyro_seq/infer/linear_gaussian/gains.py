"""Covariances and gains, which do not depend on the data but only on which of it is missing."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.engine.compiled.compiler import Run
from pyro_seq.engine.compiled.scan import scan
from pyro_seq.infer.linear_gaussian.steps import StepJoint

__all__ = ["Gains", "roots"]

_STEPS = 8
"""Between looks at whether a covariance stands still; and of one compiled call."""
_MOST_NUMBERS = 8000
"""Products of numbers in a step up to which several in one compiled call take less time than as many calls of a library."""
_NOT_FINITE = "a predictive covariance is NaN or infinite: the model's state grows beyond all bounds"


class Gains:
    """What does not depend on the data's values: covariances and gains of ``n <= T`` frames, the last one standing for the
    rest. ``G`` is 1, or ``B``.

    :param present: ``(G, T, X)`` booleans.
    :param covariance: of the state before the first of the frames.
    :param rooted: carry a square root (covariance = root @ root.mT), which stays positive in single precision.
    :param run: what compiles the recursion.
    """

    def __init__(self, joints: list[tuple[StepJoint, int]], present: Tensor, covariance: Tensor, rooted: bool,
                 run: Run | None = None):
        whole, width, t, last = bool(present.all()), present.shape[-1], 0, covariance
        # Matrices alone are twice as fast as a batch of one.
        self.rooted, self.single = rooted, whole and not rooted and len(covariance) == len(present) == 1 and all(
            part.shape[1] == 1 for joint, _ in joints for part in (joint.matrix, joint.noise))
        last = last[0] if self.single else last
        found: list[tuple[Tensor, ...]] = []
        for joint, count in joints:
            fixed = joint.matrix.shape[0] == 1
            matrix, noise = (part[:, 0] if self.single else part for part in (
                joint.matrix, roots(joint.noise) if rooted else joint.noise))
            if not self.single:  # as many before each step as after it
                groups = max(len(last), len(present), matrix.shape[1], noise.shape[1])
                last = last.expand(groups, *last.shape[1:])
            small = not rooted and 0 < last.numel() * matrix.shape[-2] <= _MOST_NUMBERS
            stride = _STEPS if fixed and whole else count
            for start in range(0, count, stride):
                steps = min(stride, count - start)
                now = None if whole else present[:, t:t + steps].transpose(0, 1)
                before = last
                covariances, gains, factors, failed = scan(
                    run if small else None, "covariances", _STEPS, _condition_root if rooted else _condition, last, steps,
                    matrix, noise, now, width)
                if failed.any():
                    first = int(failed.flatten(1).any(1).nonzero()[0])
                    _refuse(matrix[0 if fixed else start + first], covariances[first - 1] if first else before)
                found.append((covariances, gains, factors))
                last = covariances[-1]
                t += steps
                if fixed and whole and steps == _STEPS and _still(
                        *(covariances[-2:] @ covariances[-2:].mT if rooted else covariances[-2:])):
                    t += count - start - steps
                    break
        if not last.isfinite().all():
            raise ValueError(_NOT_FINITE)
        self.last = last[None] if self.single else last
        """The covariance after the last frame; its square root if ``rooted``."""
        self.n = sum(len(part[0]) for part in found)
        self.index = torch.arange(t, device=present.device).clamp(max=self.n - 1)
        self.roots, self.gain, self.factor = (self._joined(list(parts)) for parts in zip(*found, strict=True))

    def _joined(self, parts: list[Tensor]) -> Tensor:
        if not self.single:  # groups may differ from the second frame on
            parts = [part.expand(-1, *parts[-1].shape[1:]) for part in parts]
        found = torch.cat(parts) if len(parts) > 1 else parts[0]
        return found[:, None] if self.single else found

    @property
    def covariances(self) -> Tensor:
        """``(n, G, S', S')``"""
        return self.roots @ self.roots.mT if self.rooted else self.roots

    def stacked(self, values: Tensor) -> Tensor:
        """``(T, G, ...)``"""
        return values if len(self.index) == self.n else values[self.index]


def _still(last: Tensor, now: Tensor) -> bool:
    """Whether a covariance has stopped moving, but for rounding."""
    if last.shape != now.shape:
        return False
    size = now.detach().diagonal(dim1=-2, dim2=-1).abs().clamp(min=torch.finfo(now.dtype).tiny).sqrt()
    return bool(((now - last).detach().abs() <= 4 * torch.finfo(now.dtype).eps * size[..., :, None] * size[..., None, :]).all())


def _condition(covariance: Tensor, matrix: Tensor, noise: Tensor, present: Tensor | None, width: int
               ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One frame: covariance of the state after given the data, gain ``(G, S', X)``, Cholesky factor of the data's covariance,
    and whether there is none.

    Joseph's form: [I, -K] J [I, -K]' of the joint covariance J is positive whatever the rounding of K.
    """
    after = matrix.shape[-2] - width
    joint = matrix @ covariance @ matrix.mT + noise
    cross, own = joint[..., :after, after:], joint[..., after:, after:]
    if present is not None:
        cross = torch.where(present[:, None, :], cross, 0.0)
        own = torch.where(present[:, :, None] & present[:, None, :], own, torch.diag_embed((~present).to(own)))
    factor, failed = (own.sqrt(), ~(own > 0)) if width == 1 else torch.linalg.cholesky_ex(own)
    gain = cross / own if width == 1 else torch.cholesky_solve(cross.mT, factor).mT
    half = joint[..., :after, :] - gain @ joint[..., after:, :]
    found = half[..., :after] - half[..., after:] @ gain.mT
    return 0.5 * (found + found.mT), gain, factor, failed


def _refuse(matrix: Tensor, covariance: Tensor) -> None:
    finite = (matrix @ covariance @ matrix.mT).isfinite().all()
    raise ValueError("the data has a singular predictive covariance: some combination of its entries is predicted without "
                     "noise; give the emission a positive scale" if finite else _NOT_FINITE)


def roots(noise: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(noise.double())
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]).to(noise.dtype)


def _condition_root(root: Tensor, matrix: Tensor, noise: Tensor, present: Tensor | None, width: int
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by an orthogonal transformation of square roots: the array algorithm of Kailath, Sayed and Hassibi, *Linear
    Estimation*, 2000, chapter 12."""
    after, groups = matrix.shape[-2] - width, len(root)
    array = torch.cat([matrix @ root, noise.expand(groups, -1, -1)], -1)
    data = array[:, after:]
    if present is not None:
        data = torch.where(present[..., None], data, 0.0)
        unit = torch.diag_embed((~present).to(data)).expand(groups, -1, -1)
        data = torch.cat([data, unit], -1)
        array = torch.cat([array, array.new_zeros(groups, array.shape[1], unit.shape[-1])], -1)
    lower = torch.linalg.qr(torch.cat([data, array[:, :after]], -2).mT, mode="r").R.mT
    factor = lower[:, :width, :width]
    sign = torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(factor)[:, None]
    factor, cross = factor * sign, lower[:, width:, :width] * sign
    failed = ~(factor.diagonal(dim1=-2, dim2=-1) > 0)
    gain = torch.linalg.solve_triangular(factor, cross, upper=False, left=False)
    return lower[:, width:, width:width + after], gain, factor, failed
