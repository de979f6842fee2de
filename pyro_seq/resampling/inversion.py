"""Resampling by inversion of the cumulative weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.resampling.base import draw_uniform

__all__ = ["multinomial", "systematic"]


def multinomial(weights: Tensor) -> Tensor:
    """Multinomial resampling: ancestors drawn independently.

    :param weights: ``(n, N)`` non-negative, of any positive sum.
    :returns: ``(n, N)`` ancestors.

    Source: Gordon, Salmond and Smith, *Novel approach to nonlinear/non-Gaussian Bayesian state estimation*, 1993.
    """
    return torch.multinomial(weights, weights.shape[-1], replacement=True)


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
    # In double precision: a float32 sum of a million weights misplaces whole particles.
    edges = weights.cumsum(-1, dtype=torch.float64)
    edges = edges.mul_(particles / edges[:, -1:]).sub_(uniform.to(edges)[:, None]).ceil_()
    edges[:, -1] = particles
    # Particle i takes the slots from its left edge to its right one: slot j goes to as many particles as end before it.
    ends = torch.zeros(n, particles + 1, dtype=torch.long, device=weights.device)
    ends.scatter_add_(1, edges.long(), ends.new_ones(()).expand(n, particles))
    return ends.cumsum(-1)[:, :-1]
