"""The weights of a set of particles, and what is read off them."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, linalg

from pyro_seq.engine import native

__all__ = ["Weights"]


class Weights(NamedTuple):
    """Of ``n`` sequences, ``N`` particles each."""

    log: Tensor
    """``(n, N)`` as they were accumulated."""
    normalised: Tensor
    """``(n, N)`` of sum one."""
    log_mean: Tensor
    """``(n,)`` log of the mean weight, as accumulated."""
    ess: Tensor
    """``(n,)`` effective sample size, :math:`1 / \\sum_i W_i^2`."""
    largest: Tensor
    """``(n,)`` the largest of ``normalised``."""

    @staticmethod
    def of(log: Tensor) -> Weights:
        """:param log: ``(n, N)``, finite or minus infinity, not all of a row minus infinity."""
        if (found := native.normalised(log)) is not None:
            return Weights(log, *found)
        normalised = log.softmax(-1)
        largest = normalised.amax(-1)
        # It is that of the largest log weight, which gives the normalising constant.
        log_mean = log.amax(-1) - largest.log() - math.log(log.shape[-1])
        return Weights(log, normalised, log_mean, 1 / linalg.vector_norm(normalised, dim=-1).square(), largest)

    def first(self, n: int) -> Weights:
        """Those of the first ``n`` sequences."""
        return self if n == self.log.shape[0] else Weights(*(part[:n] for part in self))
