"""A diffuse first state: coefficients of which the data alone speaks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["add_diffuse", "identified"]


def identified(precision: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a precision, where it is not singular (the identity otherwise), and where that is."""
    factor, failed = torch.linalg.cholesky_ex(precision)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square() / precision.detach().diagonal(dim1=-2, dim2=-1).clamp(
        min=torch.finfo(precision.dtype).tiny)
    known = (failed == 0) & (pivots > 1e3 * torch.finfo(precision.dtype).eps).all(-1)
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    if not known.all():  # the factor of a singular matrix has no gradient
        factor = torch.linalg.cholesky(torch.where(known[..., None, None], precision, eye))
    return factor, known


def add_diffuse(precision: Tensor, score: Tensor, effect: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Moments where a diffuse state is what the data so far says it is.

    :param precision: ``(..., d, d)`` of the coefficients; singular where the data does not say, and then variances are
        infinite.
    :param score: ``(..., d)``
    :param effect: ``(..., d, D)`` of the coefficients on the mean.
    """
    scale = precision.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(precision.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(precision * scale[..., :, None] * scale[..., None, :])
    known = values > 1e3 * torch.finfo(precision.dtype).eps
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    effect = scale[..., None] * effect
    half = vectors.mT @ effect
    estimate = inverse[..., None] * (vectors.mT @ (scale * score)[..., None])
    size = effect.abs().sum(-2, keepdim=True)
    infinite = (torch.where(known[..., None], 0.0, half).abs() > 1e-6 * size).any(-2)
    covariance = covariance + half.mT @ (inverse[..., None] * half)
    return mean + (half.mT @ estimate)[..., 0], covariance + torch.diag_embed(torch.where(infinite, torch.inf, 0.0))
