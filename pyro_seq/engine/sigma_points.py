"""Sigma points: a few weighted points with the moments of a Gaussian."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.gaussian import semidefinite_root

__all__ = ["SigmaPoints", "Weights"]


class Weights(NamedTuple):
    """Weights of a centre and of its ``2 V`` points."""

    point: Tensor
    """``(n, 2 V)``; those of the centre are what is missing to one, and ``beta`` more for covariances."""
    centre: Tensor
    """``(n,)`` the centre's, for covariances."""

    def mean(self, values: Tensor) -> Tensor:
        """``(n, ...)`` of ``(n, 1 + 2 V, ...)``; differences are taken first, since the weights may be large."""
        centre = values[:, 0]
        weights = self.point.reshape(*self.point.shape, *(1,) * (values.dim() - 2))
        return centre + (weights * (values[:, 1:] - centre[:, None])).sum(1)

    def covariance(self, values: Tensor) -> Tensor:
        """``(n, W, W)`` of ``(n, 1 + 2 V, W)``"""
        apart = values - self.mean(values)[:, None]
        weights = torch.cat([self.centre[:, None], self.point], -1)
        return apart.mT @ (weights[..., None] * apart)


class SigmaPoints:
    """The scaled unscented transform of Gaussians whose covariances may be singular.

    Source: Julier, *The scaled unscented transformation*, 2002.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 0.0, kappa: float | None = None):
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}; the spread of the sigma points is positive")
        self.alpha, self.beta, self.kappa = alpha, beta, kappa

    def of(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Weights, Tensor]:
        """Points ``(n, 1 + 2 V, V)``, their weights, and which rows have no positive semidefinite covariance."""
        factor, failed = semidefinite_root(covariance)
        varies = covariance.diagonal(dim1=-2, dim2=-1) > 0
        # Each row counts its own coordinates, so that what it is batched with makes no difference.
        count = varies.sum(-1).to(mean.dtype)
        kappa = (3 - count).clamp(min=0) if self.kappa is None else torch.full_like(count, self.kappa)
        spread = self.alpha**2 * (count + kappa)
        if bool(((spread <= 0) & (count > 0)).any()):
            raise ValueError(f"kappa={self.kappa} with n={int(count.max())} coordinates of state and noise: n + kappa must be "
                             "positive")
        spread = torch.where(count > 0, spread, 1.0)
        away = factor.mT * spread.sqrt()[:, None, None]
        points = mean[:, None] + torch.cat([torch.zeros_like(away[:, :1]), away, -away], 1)
        point = torch.where(varies, 0.5 / spread[:, None], 0.0).repeat(1, 2)
        return points, Weights(point, 2 - self.alpha**2 + self.beta - count / spread), failed
