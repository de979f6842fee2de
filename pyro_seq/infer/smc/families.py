"""How sure one run of a particle filter is of its evidence: by the families that its first particles found."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Families"]


class Families:
    r"""The first ancestor (Eve) of each particle, and the variance of the evidence estimate that they tell.

    With :math:`S_e` the weight of the family of first particle e, the relative variance of the evidence estimate after ``k``
    resamplings is estimated by

    .. math:: 1 - \frac{N}{N-1} \prod_{r=1}^{k} c_r \Big(1 - \sum_e S_e^2\Big), \qquad
              c_r = \Big(1 - \frac{\sum_i (O_i - N C_i)^2}{N^2 (1 - \sum_i C_i^2)}\Big)^{-1},

    where :math:`O_i` of the resampled particles are copies of particle i, which had the chance :math:`C_i` (its weight, times
    what looks ahead where something does). Multinomial resampling has
    :math:`E c_r \approx N/(N-1)`, with which the estimate is that of Lee and Whiteley, unbiased for the variance over the
    squared evidence. Schemes of less scatter merge fewer families, and :math:`c_r` is nearer to one. That correction is a
    heuristic of this library, not theirs; for such schemes, and for resampling at times that depend on the weights, the
    estimate is an approximation, which was too small by up to a half where tested. What it costs is ``O(N)``, whatever the
    number of steps.

    The particles of a long series have few first ancestors left, and then nothing can be said.

    Source: Lee and Whiteley, *Variance estimation in the particle filter*, 2018; Chan and Lai, *A general theory of
    particle filters in hidden Markov models and some applications*, 2013.
    """

    def __init__(self, eve: Tensor | None, log_correction: Tensor):
        self.eve, self.log_correction = eve, log_correction
        """``(n, N)``, ``None`` once a transport has mixed the families; and ``(n,)``, the logarithm of the product."""

    @staticmethod
    def first(running: int, particles: int, device: torch.device) -> Families:
        """Each particle for itself."""
        return Families(torch.arange(particles, device=device).expand(running, particles),
                        torch.zeros(running, dtype=torch.float64, device=device))

    def resampled(self, ancestors: Tensor | None, chances: Tensor) -> Families:
        """
        :param ancestors: ``(n, N)``, or a transport ``(n, N, N)``, of the sequences that run on; ``None``: each from itself.
        :param chances: ``(n, N)`` by which they were drawn.
        """
        if self.eve is None or ancestors is None and chances.shape[0] == self.eve.shape[0]:
            return self
        running, particles = chances.shape
        eve, log_correction = self.eve[:running], self.log_correction[:running]
        if ancestors is None:
            return Families(eve, log_correction)
        if ancestors.is_floating_point():
            return Families(None, log_correction)
        moved = (ancestors != torch.arange(particles, device=ancestors.device)).any(-1)
        copies = torch.zeros_like(chances).scatter_add_(1, ancestors, torch.ones_like(chances))
        apart = 1 - chances.square().sum(-1).double()
        scatter = copies.sub_(chances, alpha=particles).square_().sum(-1).double()
        correction = torch.where(moved, torch.log1p(-scatter / (particles**2 * apart)), 0.0)
        return Families(eve.gather(1, ancestors), log_correction - correction)

    def standard_error(self, weights: Tensor, rows: slice = slice(None)) -> Tensor:
        """``(n,)`` of the log evidence at the weights ``(n, N)`` of sum one; NaN where the families cannot tell: fewer than two
        of them in effect, or an estimate below zero."""
        if self.eve is None or weights.shape[-1] == 1:
            return weights.new_full((len(weights),), torch.nan, dtype=torch.float64)
        variance, effective = self.variance(weights, rows)
        return torch.where((variance >= 0) & (effective > 2), variance, torch.nan).sqrt()

    def variance(self, weights: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """``(n,)`` the estimate itself, of either sign; and the effective number of families, one over the sum of the squares
        of their weights."""
        weights, particles = weights.double(), weights.shape[-1]
        together = torch.zeros_like(weights).scatter_add_(1, self.eve[rows], weights).square().sum(-1)
        variance = 1 - particles / (particles - 1) * self.log_correction[rows].exp() * (1 - together)
        return torch.where(variance.abs() < 1e-12, 0.0, variance), 1 / together
