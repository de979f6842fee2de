"""Gaussian algebra for filters and proposals: roots, conditioning with gaps, covariances that may be singular."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.distributions import Delta, ImproperUniform
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.distributions.lowrank_multivariate_normal import LowRankMultivariateNormal

__all__ = ["Conditioned", "condition", "covariance", "innermost", "is_gaussian", "moments", "root", "semidefinite_inverse",
           "semidefinite_root", "symmetric"]

_FLAT = 1e-11
"""Share of a coordinate's variance below which what others leave of it counts as none."""


class Conditioned(NamedTuple):
    """A Gaussian given data, for each row."""

    mean: Tensor
    """``(n, W)``"""
    covariance: Tensor
    """``(n, W, W)``"""
    log_density: Tensor
    """``(n,)`` of the data."""
    gain: Tensor
    """``(n, W, D)`` zero for entries that do not count."""
    failed: Tensor
    """``(n,)`` booleans: rows whose data has no positive definite covariance."""


def condition(mean: Tensor, covariance: Tensor, noise: Tensor, value: Tensor, present: Tensor) -> Conditioned:
    """Condition a joint Gaussian of (w, m) on ``value = m + noise``, in Joseph's form, which keeps covariances positive.

    :param mean: ``(n, W + D)``; the last ``D`` entries are m.
    :param covariance: ``(n, W + D, W + D)``
    :param noise: ``(n, D, D)`` covariance of what is added to m.
    :param value: ``(n, D)``
    :param present: ``(n, D)`` booleans: the entries of the data that count.
    """
    width = mean.shape[-1] - value.shape[-1]
    both = present[:, :, None] & present[:, None, :]
    innovation = torch.where(both, covariance[:, width:, width:] + noise, 0.0) + torch.diag_embed((~present).to(mean.dtype))
    cross = torch.where(present[:, None], covariance[:, :width, width:], 0.0)
    residual = torch.where(present, value - mean[:, width:], 0.0)
    factor, info = torch.linalg.cholesky_ex(innovation)
    gain = torch.cholesky_solve(cross.mT, factor).mT
    whitened = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
    log_density = (-0.5 * (whitened.square().sum(-1) + math.log(2 * math.pi) * present.sum(-1))
                   - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))
    identity = torch.eye(width, dtype=mean.dtype, device=mean.device).expand(len(mean), -1, -1)
    keep = torch.cat([identity, -gain], -1)
    after = keep @ covariance @ keep.mT + gain @ torch.where(both, noise, 0.0) @ gain.mT
    return Conditioned(mean[:, :width] + (gain @ residual[..., None])[..., 0], symmetric(after), log_density, gain, info != 0)


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part, rid of rounding."""
    return 0.5 * (matrix + matrix.mT)


def semidefinite_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular ``L`` with ``L L' = matrix``, which may be singular: ``L`` then has columns of zeros.

    Differentiable wherever the rank does not change.

    :param matrix: ``(n, W, W)``
    :returns: ``L`` and, ``(n,)``, whether the matrix is not positive semidefinite.
    """
    variance = matrix.diagonal(dim1=-2, dim2=-1)
    live = variance > 0
    scale = torch.where(live, variance, 1.0).sqrt()
    correlation = matrix / (scale[..., None] * scale[..., None, :])
    padded = torch.where(live[..., None] & live[..., None, :], correlation, 0.0) + torch.diag_embed((~live).to(matrix.dtype))
    factor, info = torch.linalg.cholesky_ex(padded)
    bad = (variance < 0).any(-1)
    if bool((info != 0).any()) or bool((factor.diagonal(dim1=-2, dim2=-1).square() < _FLAT).any()):
        factor, negative = _by_columns(padded)
        bad = bad | negative
    return torch.where(live[..., None], factor, 0.0) * scale[..., None], bad


def _by_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky's factor of correlation matrices, leaving out what the coordinates before determine."""
    rest, columns = matrix, []
    bad = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    order = torch.arange(matrix.shape[-1], device=matrix.device)
    for j in range(matrix.shape[-1]):
        pivot = rest[..., j, j]
        live = pivot > _FLAT
        bad = bad | (pivot < -1e-6)
        column = rest[..., j] / torch.where(live, pivot, 1.0).sqrt()[..., None]
        columns.append(torch.where(live[..., None] & (order >= j), column, 0.0))
        rest = rest - columns[-1][..., :, None] * columns[-1][..., None, :]
    return torch.stack(columns, -1), bad


def semidefinite_inverse(matrix: Tensor) -> Tensor:
    """The pseudo-inverse, of a rank that does not depend on the coordinates' units."""
    variance = matrix.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(variance > 0, variance, 1.0).sqrt()
    scale = scale[..., None] * scale[..., None, :]
    return torch.linalg.pinv(matrix / scale, hermitian=True, rtol=_FLAT) / scale


def innermost(fn: Distribution) -> Distribution:
    """The distribution inside any ``Independent``."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def is_gaussian(fn: Distribution) -> bool:
    return isinstance(innermost(fn), (Normal, MultivariateNormal, LowRankMultivariateNormal))


def covariance(fn: Distribution) -> Tensor:
    """``(rows, width, width)`` of a Gaussian of batch shape ``(rows,)``, its entries flattened."""
    base = innermost(fn)
    if isinstance(base, Normal):
        return torch.diag_embed(fn.variance.reshape(fn.batch_shape[0], -1))
    return _blocks(base.covariance_matrix, fn)


def moments(fn: Distribution, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean ``(rows, ...)`` and covariance ``(rows, width, width)`` of a Gaussian, of a ``Delta``, which has none, and of an
    ``ImproperUniform``, for which both are put at zero."""
    base = innermost(fn)
    if isinstance(base, (Delta, ImproperUniform)):
        mean = torch.zeros(fn.shape(), device=device) if isinstance(base, ImproperUniform) else base.v
        width = mean[0].numel()
        return mean, mean.new_zeros(fn.batch_shape[0], width, width)
    return fn.mean, covariance(fn)


def root(fn: Distribution) -> Tensor:
    """``(rows, width, width)`` lower triangular, its square the covariance of a Gaussian."""
    base = innermost(fn)
    if isinstance(base, Normal):
        return torch.diag_embed(base.scale.expand(base.batch_shape).reshape(fn.batch_shape[0], -1))
    return _blocks(base.scale_tril, fn)


def _blocks(matrices: Tensor, fn: Distribution) -> Tensor:
    """Block diagonal, ``(rows, K n, K n)``, of the ``(rows, ..., n, n)`` matrices of one distribution."""
    rows, n = fn.batch_shape[0], matrices.shape[-1]
    matrices = matrices.reshape(rows, -1, n, n)
    blocks = matrices.shape[1]
    if blocks == 1:
        return matrices[:, 0]
    apart = torch.eye(blocks, dtype=matrices.dtype, device=matrices.device)
    return torch.einsum("rkij,kl->rkilj", matrices, apart).reshape(rows, blocks * n, blocks * n)
