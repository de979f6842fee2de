"""The unscented Kalman filter and smoother: the declared step at sigma points; cubature as a special case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.noise import NoisyStep
from pyro_seq.engine.sigma_points import SigmaPoints
from pyro_seq.infer.declared_filter import refuse
from pyro_seq.infer.gaussian_filter import GaussianFilter, Joint, Outputs

__all__ = ["UnscentedKalmanFilter"]


class UnscentedKalmanFilter(GaussianFilter):
    r"""Approximate evidence, filtered and smoothed moments of a model whose latents are Gaussian given the state.

    Each step is run at sigma points of the state and of the latents' noise together, and once more, at points of the state and
    latents given the frame, where the next state is more than the latents. The covariance of a latent is taken at the points,
    that of the data is averaged over them. No derivative is needed. Of observed sites that are not Gaussian (Poisson,
    Bernoulli, Student's t, ...) the conditional mean and variance are matched; the notes of the posterior say so. Where the
    step is linear and Gaussian this is the Kalman filter; elsewhere its evidence is neither exact nor a bound. Everything but
    the step itself is computed in float64.

    Of :math:`n` coordinates that vary, the points lie :math:`\alpha \sqrt{n + \kappa}` standard deviations from the mean.
    ``alpha=1, beta=0, kappa=0`` is the cubature Kalman filter (Arasaratnam and Haykin, *Cubature Kalman filters*, 2009).

    :param model: a declared model; its carried state is made of real numbers.
    :param float alpha: spread of the points.
    :param float beta: weight of the central point in covariances; 2 is right to higher order with small ``alpha``.
    :param float kappa: ``3 - n``, which matches fourth moments, where that is not negative, and 0 otherwise, when omitted.
        Below 0 covariances may lose positivity, which is an error.

    Source: Julier and Uhlmann, *A new extension of the Kalman filter to nonlinear systems*, 1997; Wan and van der Merwe, *The
    unscented Kalman filter for nonlinear estimation*, 2000; Särkkä, *Unscented Rauch-Tung-Striebel smoother*, 2008.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Counts(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(1.0, 0.5))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(1 + 0.9 * (z - 1), 0.2))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Poisson(z.exp()), obs=x)
        >>> posterior = seq.UnscentedKalmanFilter(Counts()).run(Counts().simulate([30])["x"])
        >>> posterior.notes[1]
        "the sites ['x'] are not Gaussian: their conditional mean and variance are matched, ..."
    """

    method = "unscented"

    def __init__(self, model: Any, alpha: float = 1.0, beta: float = 0.0, kappa: float | None = None):
        super().__init__(model)
        self.points = SigmaPoints(alpha, beta, kappa)

    def transform(self, step: NoisyStep, fn: Outputs, mean: Tensor, covariance: Tensor, about: Tensor) -> Joint:
        points, weights, failed = self.points.of(mean, covariance)
        refuse(failed, step, "the covariance of the state and the noise of the latents",
               "with kappa < 0, or beta < 0, the weight of the central point may be negative; choose kappa=0")
        values, noise = fn(points)
        both = torch.cat([points, values], -1)
        return Joint(weights.mean(both), weights.covariance(both), None if noise is None else weights.mean(noise))
