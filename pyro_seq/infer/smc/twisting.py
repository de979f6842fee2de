"""Quadratic regression of log densities on weighted particles: how twists are learned."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.guides.twisted import Twist

__all__ = ["fit_twist", "num_coefficients", "tempered"]

_RIDGE = 1e-9
_FARTHEST = 1000.0
"""Standard deviations of the particles from their mean within which a twist has its maximum: farther off nothing was seen."""
_SHARPEST = 1e8
"""Largest curvature in units of the particles' spread, for the sake of rounding."""


def num_coefficients(width: int, quadratic: str) -> int:
    """Of a quadratic in ``width`` variables."""
    return 1 + 2 * width if quadratic == "diagonal" else 1 + width + width * (width + 1) // 2


def fit_twist(latents: Tensor, log_density: Tensor, log_weights: Tensor, quadratic: str) -> Twist:
    r"""The quadratic :math:`\log \psi` that is nearest to given values, by least squares.

    Along each axis, a curvature of the wrong sign, or so small that the maximum is far from all particles, is raised, and the
    slope fitted again: a Gaussian times the result is one, wherever it was.

    :param latents: ``(n, N, Z)``
    :param log_density: ``(n, N)`` values to be met; minus infinity does not count.
    :param log_weights: ``(n, N)``, tempered until half of the particles count.
    :param quadratic: ``"full"`` or ``"diagonal"``.
    """
    finite = log_density.isfinite() & (log_weights > -torch.inf)
    weights = tempered(torch.where(finite, log_weights, -torch.inf))
    target = torch.where(finite, log_density, 0.0)
    center = (weights[..., None] * latents).sum(1)
    scale = (weights[..., None] * (latents - center[:, None]).square()).sum(1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    unit = (latents - center[:, None]) / scale[:, None]
    width = latents.shape[-1]
    i, j = (torch.triu_indices(width, width, device=latents.device) if quadratic == "full"
            else torch.arange(width, device=latents.device).expand(2, -1))
    linear = torch.cat([torch.ones_like(unit[..., :1]), unit], -1)
    found = _least_squares(torch.cat([linear, unit[..., i] * unit[..., j]], -1), target, weights)
    half = unit.new_zeros(len(unit), width, width)
    half[:, i, j] = -found[:, 1 + width:]
    values, axes = torch.linalg.eigh(half + half.mT)
    along = unit @ axes
    linear = torch.cat([linear[..., :1], along], -1)
    values = values.clamp(0, _SHARPEST)
    for _ in range(2):
        slope = _least_squares(linear, target + 0.5 * (along.square() @ values[..., None])[..., 0], weights)[:, 1:]
        values = torch.maximum(values, slope.abs() / _FARTHEST)
    curvature = axes @ (values[..., None] * axes.mT)
    slope = (axes @ slope[..., None])[..., 0]
    return Twist(center, curvature / (scale[..., None] * scale[:, None]), slope / scale)


def tempered(log_weights: Tensor, share: float = 0.5) -> Tensor:
    """``(n, N)`` normalised weights to the highest power, at most one, at which an effective ``share`` of the particles of
    weight above zero counts."""
    live = log_weights > -torch.inf
    log_weights = torch.where(live, log_weights - log_weights.amax(-1, keepdim=True), 0.0)

    def powered(power: Tensor) -> Tensor:
        return (power * log_weights).masked_fill(~live, -torch.inf).softmax(-1)

    enough = share * live.sum(-1, keepdim=True)
    low, high = torch.zeros_like(log_weights[:, :1]), torch.ones_like(log_weights[:, :1])
    middle = high
    for _ in range(12):
        counts = 1 / powered(middle).square().sum(-1, keepdim=True) >= enough
        low, high = torch.where(counts, middle, low), torch.where(counts, high, middle)
        middle = (low + high) / 2
    return powered(low)


def _least_squares(features: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """``(n, P)`` coefficients; a trace of ridge decides what the particles leave open."""
    weighted = (features * weights[..., None]).mT
    gram = weighted @ features
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    gram = gram + torch.diag_embed(ridge[:, None].expand(gram.shape[:-1]))
    return torch.linalg.solve(gram, weighted @ target[..., None])[..., 0]
