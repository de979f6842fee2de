"""Stochastic volatility: the logarithm of the variance is an autoregression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_seq.model import StateSpaceModel
from pyro_seq.models.classical import Classical

__all__ = ["StochasticVolatility"]


class StochasticVolatility(Classical, StateSpaceModel):
    r"""Returns whose log variance is a stationary autoregression of order one.

    .. math:: z_1 \sim N(\mu, \sigma^2 / (1 - \rho^2)), \qquad z_t \sim N(\mu + \rho (z_{t-1} - \mu), \sigma^2), \qquad
              x_t \sim N(0, e^{z_t})

    The frames are scalars, ``x`` ``(B, T)``; the latent site is ``z``. Parameters: ``mu``, ``rho`` in (-1, 1), and ``sigma``.
    Each may be replaced by a prior, as in ``model.rho = PyroSample(dist.Uniform(-1.0, 1.0))``.

    :param coefficients: parameters by name, to start from.

    Source: Taylor, *Modelling Financial Time Series*, 1986; Kim, Shephard and Chib, *Stochastic Volatility: Likelihood
    Inference and Comparison with ARCH Models*, 1998.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import StochasticVolatility
        >>> model = StochasticVolatility({"mu": -1.02, "rho": 0.9702, "sigma": 0.178})
        >>> x = model.simulate([100])["x"]
        >>> seq.ParticleFilter(model, num_particles=100).run(x).filtered["z"].mean.shape
        torch.Size([1, 100])
    """

    def __init__(self, coefficients: Mapping[str, Any] | None = None, name: str = ""):
        super().__init__(name)
        self.declare(coefficients, {"mu": (0.0, constraints.real), "rho": (0.9, constraints.interval(-1.0, 1.0)),
                                    "sigma": (0.3, constraints.positive)})

    def initial(self) -> Tensor:
        return pyro.sample("z", dist.Normal(self.mu, self.sigma / (1 - self.rho.square()).sqrt()))

    def transition(self, z: Tensor) -> Tensor:
        return pyro.sample("z", dist.Normal(self.mu + self.rho * (z - self.mu), self.sigma))

    def emission(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        return pyro.sample("x", dist.Normal(torch.zeros_like(z), (z / 2).exp()), obs=x)
