"""The extended Kalman filter and smoother: the declared step, linearised by automatic differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.gaussian import symmetric
from pyro_seq.engine.jacobian import jacobian, require_differentiable
from pyro_seq.engine.noise import NoisyStep
from pyro_seq.infer.gaussian_filter import GaussianFilter, Joint, Outputs
from pyro_seq.module import require_count

__all__ = ["ExtendedKalmanFilter"]


class ExtendedKalmanFilter(GaussianFilter):
    r"""Approximate evidence, filtered and smoothed moments of a model whose latents are Gaussian given the state.

    Each step is linearised to first order by automatic differentiation: the latents and the emission about the state's
    filtered mean, and what the step makes of them, where it returns more than latents, about their mean given the frame.
    Covariances may depend on the state; they are taken at the point of linearisation. Of observed sites that are not Gaussian
    (Poisson, Bernoulli, Student's t, ...) the conditional mean and variance are matched; the notes of the posterior say so.
    Where the step is linear and Gaussian this is the Kalman filter; elsewhere its evidence is neither exact nor a bound, and
    it follows one mode only. Everything but the step itself is computed in float64.

    :param model: a declared model; its carried state is made of real numbers.
    :param int iterations: linearisations of each step (the iterated filter): after the first, about the mean of state and
        latents given the frame, as Gauss and Newton would (Bell and Cathey, *The iterated Kalman filter update as a
        Gauss-Newton method*, 1993).

    Source: Jazwinski, *Stochastic Processes and Filtering Theory*, 1970; Rauch, Tung and Striebel, *Maximum likelihood
    estimates of linear dynamic systems*, 1965; Särkkä, *Bayesian Filtering and Smoothing*, 2013, chapters 5 and 9.

    Example, a pendulum seen from the side::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Pendulum(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(torch.tensor([1.5, 0.0]), 0.1).to_event(1))
        ...     def transition(self, z):
        ...         angle, speed = z.unbind(-1)
        ...         moved = torch.stack([angle + 0.1 * speed, speed - 0.98 * angle.sin()], -1)
        ...         return pyro.sample("z", dist.Normal(moved, 0.05).to_event(1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z[:, 0].sin(), 0.3), obs=x)
        >>> model = Pendulum()
        >>> x = model.simulate([50, 40])["x"]
        >>> posterior = seq.ExtendedKalmanFilter(model).run(x, [50, 40])
        >>> posterior.kind, posterior.smoothed["z"].mean.shape
        ('approximation (extended Kalman)', torch.Size([2, 50, 2]))
    """

    method = "extended"

    def __init__(self, model: Any, iterations: int = 1):
        super().__init__(model)
        require_count("iterations", iterations, 1)
        self.iterations = iterations

    def transform(self, step: NoisyStep, fn: Outputs, mean: Tensor, covariance: Tensor, about: Tensor) -> Joint:
        noise = None

        def outputs(points: Tensor) -> Tensor:
            nonlocal noise
            found, extra = fn(points[:, None])
            noise = None if extra is None else extra[:, 0]
            return found[:, 0]

        what = f"the step of {type(self.model).__name__} at time {step.frame.t}"
        if step.frame.t <= 2:
            require_differentiable(outputs, about, (slice(step.state_width), slice(step.state_width, None)), what)
        value, slope = jacobian(outputs, about, what)
        predicted = value + (slope @ (mean - about)[..., None])[..., 0]
        identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device).expand(len(mean), -1, -1)
        both = torch.cat([identity, slope], 1)
        return Joint(torch.cat([mean, predicted], -1), symmetric(both @ covariance @ both.mT), noise)
