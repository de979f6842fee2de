"""Resampling without sums over the particles."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.module import require_count
from pyro_seq.resampling.base import draw_uniform
from pyro_seq.resampling.checks import require_weights

__all__ = ["Metropolis"]


class Metropolis:
    """Metropolis resampling: each particle looks for its ancestor by a chain of its own.

    The chain starts at the particle itself. At each step another is drawn uniformly, and taken with probability the ratio of
    its weight to that of the one at hand. No sum over the particles is formed and none waits for another, which suits a GPU;
    a CPU is quicker with :func:`~pyro_seq.resampling.systematic`. A finite chain is **biased** towards its start, however many
    the particles: the distribution of an ancestor is within ``(1 - 1 / (N * max W)) ** steps`` of the weights W in total
    variation, and a particle of weight zero stays if none of positive weight was drawn.

    :param int steps: the length of the chains.

    Source: Murray, Lee and Jacob, *Parallel resampling in the particle filter*, 2016.

    Example::

        >>> import torch
        >>> Metropolis(steps=50)(torch.tensor([[0.0, 1.0, 0.0]]))
        tensor([[1, 1, 1]])
    """

    unbiased = False

    def __init__(self, steps: int = 64):
        require_count("steps", steps, 1)
        self.steps = steps

    def __call__(self, weights: Tensor) -> Tensor:
        """
        :param weights: ``(n, N)`` non-negative, of any positive sum.
        :returns: ``(n, N)`` ancestors.
        """
        require_weights("Metropolis", weights)
        return self.unchecked(weights)

    def unchecked(self, weights: Tensor) -> Tensor:
        """The same of weights that are known to be sound."""
        n, particles = weights.shape
        chosen = torch.arange(particles, device=weights.device).expand(n, particles)
        weight = weights
        for _ in range(self.steps):
            # In double precision: 24 bits make a million particles unequally likely.
            other = (draw_uniform((n, particles), weights.double()) * particles).long()
            its = weights.gather(-1, other)
            accepted = draw_uniform((n, particles), weights) * weight < its
            chosen, weight = torch.where(accepted, other, chosen), torch.where(accepted, its, weight)
        return chosen
