"""A first state of which the data says more than the prior does, as coefficients that are estimated.

Where nothing is known of it, it has no other form. Where its prior is vague, this is the form that loses no digits: the
difference of two covariances of 1e10 says nothing of one of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.infer.linear import LinearStep

__all__ = ["add_diffuse", "identified", "take_out_vague"]

_VAGUE = {torch.float64: 1e3, torch.float32: 1.0}
"""Variance of a first latent over that of the later noise from which it counts as vague."""


def take_out_vague(first: LinearStep, later: LinearStep | None, dtype: torch.dtype) -> tuple[LinearStep, Tensor]:
    """The first step with its latents as coefficients where their prior is vague, and the coefficients' prior precisions
    ``(d,)``: zero for those without a distribution, one for the others."""
    flat = first.diffuse.new_zeros(first.diffuse.shape[-1])
    if later is None or first.own.shape[1] > 1:
        return first, flat
    own, data = first.own[0, 0], first.observed
    latent = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    for where, _ in first.latents.values():
        latent[where] = own.diagonal()[where] > 0
    rest = torch.where(latent[:, None] | latent, 0.0, own)
    noise = first.solve @ rest @ first.solve.mT
    seen = torch.linalg.cholesky_ex(noise[0, 0, data, data].detach())
    variances = own.detach().diagonal()
    reference = max(float(later.noise.detach().diagonal(dim1=-2, dim2=-1).max()), float(variances[data].max()))
    largest = float(torch.where(latent, variances, 0.0).max())
    if seen.info or not bool((seen.L.diagonal() > 0).all()) or largest <= _VAGUE[dtype] * reference:
        return first, flat
    root = torch.linalg.cholesky(own[latent][:, latent])
    columns = torch.cat([first.diffuse, first.solve[0, 0][:, latent] @ root], -1)
    return first._replace(noise=noise, diffuse=columns), torch.cat([flat, torch.ones_like(columns[0, len(flat):])])


def identified(precision: Tensor, proper: bool) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a precision, where it is not singular (the identity otherwise), and where that is.

    :param proper: whether all coefficients have a distribution, so that it cannot be singular.
    """
    factor, failed = torch.linalg.cholesky_ex(precision)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square() / precision.detach().diagonal(dim1=-2, dim2=-1).clamp(
        min=torch.finfo(precision.dtype).tiny)
    known = (failed == 0) & (proper | (pivots > 1e3 * torch.finfo(precision.dtype).eps).all(-1))
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    if not known.all():  # the factor of a singular matrix has no gradient
        factor = torch.linalg.cholesky(torch.where(known[..., None, None], precision, eye))
    return factor, known


def add_diffuse(precision: Tensor, score: Tensor, effect: Tensor, mean: Tensor, covariance: Tensor, proper: bool
                ) -> tuple[Tensor, Tensor]:
    """Moments where a diffuse state is what the data so far says it is.

    :param precision: ``(..., d, d)`` of the coefficients; singular where the data does not say, and then variances are
        infinite.
    :param score: ``(..., d)``
    :param effect: ``(..., d, D)`` of the coefficients on the mean.
    """
    scale = precision.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(precision.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(precision * scale[..., :, None] * scale[..., None, :])
    known = values > (0.0 if proper else 1e3 * torch.finfo(precision.dtype).eps)
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    effect = scale[..., None] * effect
    half = vectors.mT @ effect
    estimate = inverse[..., None] * (vectors.mT @ (scale * score)[..., None])
    size = effect.abs().sum(-2, keepdim=True)
    infinite = (torch.where(known[..., None], 0.0, half).abs() > 1e-6 * size).any(-2)
    covariance = covariance + half.mT @ (inverse[..., None] * half)
    return mean + (half.mT @ estimate)[..., 0], covariance + torch.diag_embed(torch.where(infinite, torch.inf, 0.0))
