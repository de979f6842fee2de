"""Resampling by inversion of the cumulative weights.

``N`` points in (0, 1) are drawn, and a particle is chosen once for each point between its left and its right edge in the
cumulative weights. The schemes differ in their points:

    multinomial   independent
    stratified    one in each of N equal intervals
    systematic    N equally spaced ones, shifted together
    residual      floor(N W) copies of each particle outright, multinomial points for the rest

Edges are summed in double precision: a float32 sum of a million weights misplaces whole particles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.resampling.base import draw_uniform
from pyro_seq.resampling.checks import of_weights

__all__ = ["multinomial", "residual", "stratified", "systematic"]


@of_weights
def multinomial(weights: Tensor) -> Tensor:
    """Multinomial resampling: ``N`` independent choices.

    :param weights: ``(n, N)`` non-negative, of any positive sum.
    :returns: ``(n, N)`` ancestors in increasing order; particle ``i`` appears ``N * weight_i / sum`` times on average, with the
        variance of a binomial count.

    Source: Gordon, Salmond and Smith, *Novel approach to nonlinear/non-Gaussian Bayesian state estimation*, 1993.

    Example::

        >>> import torch
        >>> multinomial(torch.tensor([[0.0, 1.0, 0.0]]))
        tensor([[1, 1, 1]])
    """
    count = torch.full((len(weights), 1), weights.shape[-1], dtype=torch.long, device=weights.device)
    return _ancestors(_below(weights.cumsum(-1, dtype=torch.float64), count, weights))


@of_weights
def stratified(weights: Tensor) -> Tensor:
    """Stratified resampling: one choice in each of ``N`` equal parts of the cumulative weights.

    :param weights: ``(n, N)`` non-negative, of any positive sum.
    :returns: ``(n, N)`` ancestors in increasing order; particle ``i`` appears ``N * weight_i / sum`` times on average, and less
        than 2 times more or fewer than that.

    Source: Kitagawa, *Monte Carlo filter and smoother for non-Gaussian nonlinear state space models*, 1996.

    Example::

        >>> import torch
        >>> stratified(torch.tensor([[0.5, 0.0, 0.25, 0.25]]))
        tensor([[0, 0, 2, 3]])
    """
    particles = weights.shape[-1]
    edges = weights.cumsum(-1, dtype=torch.float64)
    edges = edges.div_(edges[:, -1:].clone()).mul_(particles)
    # Of the points below an edge only the one in its own stratum is in question.
    stratum = edges.long().clamp_(max=particles - 1)
    within = draw_uniform(tuple(weights.shape), weights).gather(-1, stratum)
    return _ancestors(stratum + (within < edges - stratum))


@of_weights
def systematic(weights: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Systematic resampling, one uniform number a sequence.

    :param weights: ``(n, N)`` non-negative, of any positive sum.
    :param uniform: ``(n,)`` in [0, 1); drawn when omitted.
    :returns: ``(n, N)`` ancestors in increasing order; particle ``i`` appears ``floor`` or ``ceil`` of
        ``N * weight_i / sum`` times, and that many times on average.

    Source: Carpenter, Clifford and Fearnhead, *Improved particle filter for nonlinear problems*, 1999.

    Example::

        >>> import torch
        >>> systematic(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([0.1]))
        tensor([[0, 0, 2, 3]])
    """
    n, particles = weights.shape
    if uniform is None:
        uniform = draw_uniform(n, weights)
    # Within rounding of 0 and 1 an edge at 1 would not be seen to be there, and a last particle of weight zero be chosen.
    margin = particles * 2.0**-51
    uniform = uniform.double().clamp(margin, 1 - margin)
    edges = weights.cumsum(-1, dtype=torch.float64)
    edges = edges.mul_(particles / edges[:, -1:]).sub_(uniform[:, None]).ceil_()
    edges[:, -1] = particles
    return _ancestors(edges.long())


@of_weights
def residual(weights: Tensor) -> Tensor:
    """Residual resampling: ``floor(N * weight / sum)`` copies of each particle, the remaining choices independent.

    :param weights: ``(n, N)`` non-negative, of any positive sum.
    :returns: ``(n, N)`` ancestors in increasing order; particle ``i`` appears at least ``floor(N * weight_i / sum)`` times, and
        ``N * weight_i / sum`` times on average.

    Source: Liu and Chen, *Sequential Monte Carlo methods for dynamic systems*, 1998.

    Example::

        >>> import torch
        >>> residual(torch.tensor([[0.5, 0.0, 0.25, 0.25]]))
        tensor([[0, 0, 2, 3]])
    """
    particles = weights.shape[-1]
    expected = weights.double()
    expected = expected * (particles / expected.sum(-1, keepdim=True))
    # Equal weights are to give whole numbers also where N * (1 / N) rounds to less than 1.
    whole = (expected * (1 + 2.0**-40)).floor_()
    rest = (expected - whole).clamp_(min=0)
    copies = whole.cumsum(-1).long()
    return _ancestors(copies + _below(rest.cumsum(-1), particles - copies[:, -1:], weights))


def _below(edges: Tensor, count: Tensor, like: Tensor) -> Tensor:
    """How many of ``count`` ``(n, 1)`` independent points lie below each of the edges, the last of which is above all."""
    n, particles = edges.shape
    total = edges[:, -1:].clone()
    # Sums of exponential numbers are, up to their scale, uniform points in order: far quicker to search than disorder.
    spacings = draw_uniform((n, particles + 1), like).clamp_(min=torch.finfo(like.dtype).tiny).neg_().log1p_().neg_()
    points = spacings.cumsum(-1, dtype=torch.float64)
    points = points.mul_(total / points.gather(-1, count))
    return torch.where(edges >= total, count, torch.searchsorted(points, edges).minimum(count))


def _ancestors(ends: Tensor) -> Tensor:
    """Particle ``i`` takes the slots from its left end to its right one, ``ends[:, i]``, the last of which is ``N``."""
    n, particles = ends.shape
    # Slot j goes to as many particles as end before it.
    ended = torch.zeros(n, particles + 1, dtype=torch.long, device=ends.device)
    ended.scatter_add_(1, ends, ended.new_ones(()).expand(n, particles))
    return ended.cumsum(-1)[:, :-1]
