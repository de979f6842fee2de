"""The local Kalman proposal: each particle's prior conditioned on the frame, by linearisation or sigma points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.gaussian import Conditioned, condition, semidefinite_root
from pyro_seq.engine.jacobian import jacobian
from pyro_seq.engine.noise import Data, NoisySites, repeat_frame
from pyro_seq.engine.sigma_points import SigmaPoints
from pyro_seq.engine.state import State, map_state
from pyro_seq.guides.noise import NoiseGuide
from pyro_seq.module import require_model
from pyro_seq.sequences import Frame, repeat_rows

__all__ = ["KalmanGuide"]


class KalmanGuide(NoiseGuide):
    r"""The approximation of the locally optimal proposal :math:`p(z_t \mid z_{t-1}, x_t)` by a Gaussian, without training.

    For each particle the emission is linearised about the mean of the step's prior (``"extended"``) or put through sigma points
    of it (``"unscented"``), and the prior is conditioned on the frame. Where the latents are Gaussian given the state and the
    emission is linear in them with a covariance that does not depend on them, this is the locally optimal proposal itself. A
    frame without data, or in the directions that it says nothing about, gets the prior. So does an emission whose mean does not
    depend on the latents, as that of a stochastic volatility model: transform the data (to log squares) to gain there. As in
    :class:`~pyro_seq.ExtendedKalmanFilter`, of emissions that are not Gaussian mean and variance are matched. The weights of
    the particle filter repair what the approximation gets wrong, as long as it is wide enough: ``"extended"`` linearises once,
    at the prior's mean, and where the emission is much curved over the prior, as of counts of an exponential rate, it
    overshoots and is narrow, which loses more than it gains. ``"unscented"`` does not, there.

    :param model: a declared model whose latents are Normal or MultivariateNormal given the state, any number of them.
    :param str kind: ``"extended"`` or ``"unscented"`` (cubature points, or ``3 - n`` where that is not negative: see
        :class:`~pyro_seq.UnscentedKalmanFilter`).
    :param global_guide: a guide for the model's global parameters.

    Source: Doucet, Godsill and Andrieu, *On sequential Monte Carlo sampling methods for Bayesian filtering*, 2000; van der
    Merwe, Doucet, de Freitas and Wan, *The unscented particle filter*, 2000.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 1.0))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 0.1), obs=x)
        >>> _ = pyro.set_rng_seed(0)
        >>> model = LocalLevel()
        >>> x = model.simulate([50])["x"]
        >>> bootstrap = seq.ParticleFilter(model, num_particles=100).run(x)
        >>> guided = seq.ParticleFilter(model, num_particles=100, guide=seq.KalmanGuide(model)).run(x)
        >>> bool(bootstrap.ess.mean() < 20), bool(guided.ess.mean() > 60)
        (True, True)
    """

    def __init__(self, model: Any, kind: str = "extended", *, global_guide: Any = None, name: str | None = None):
        require_model(model, "KalmanGuide")
        if kind not in ("extended", "unscented"):
            raise ValueError(f"kind={kind!r}; it is 'extended' or 'unscented'")
        super().__init__(model, global_guide=global_guide, name=name)
        self.kind = kind
        self.points = SigmaPoints()

    def look_ahead(self, state: State, frame: Frame, encoding: Any) -> Tensor:
        """``(rows,)`` log density of the frame under its Gaussian approximation given each particle's state."""
        return self._given_frame(state, frame)[0].log_density

    def noise(self, state: State, frame: Frame, encoding: Any) -> tuple[Tensor, Tensor, Distribution]:
        found, prior = self._given_frame(state, frame)
        factor, failed = semidefinite_root(found.covariance)
        if bool(failed.any()):
            raise self._not_positive(frame)
        return found.mean, factor, prior

    def _given_frame(self, state: State, frame: Frame) -> tuple[Conditioned, Distribution]:
        """The latents' noise given the frame, and the prior of the first latent."""
        rows, width = frame.rows, self.layout.latent_width
        zero = torch.zeros(rows, width, dtype=torch.float64, device=frame.device)
        identity = torch.eye(width, dtype=zero.dtype, device=frame.device).expand(rows, -1, -1)
        sites: NoisySites | None = None
        data: Data | None = None

        def run(noise: Tensor) -> Data:
            nonlocal sites, data
            k = len(noise) // rows
            sites = self.sites(repeat_frame(frame, k), noise)
            with sites:
                self.model.apply(map_state(lambda leaf: repeat_rows(leaf, k), state), sites.frame)
            data = Data.of([site for site in sites.sites.values() if site.observed], rows * k, frame.device)
            return data

        if self.kind == "extended":
            mean, slope = jacobian(lambda noise: run(noise).mean, zero, f"the step of {type(self.model).__name__}")
            both = torch.cat([identity, slope], 1)
            joint, covariance, spread = torch.cat([zero, mean], -1), both @ both.mT, data.covariance
            value, present = data.value, data.present
            prior = next(iter(sites.latents.values())).p
        else:
            points, weights, _ = self.points.of(zero, identity)
            n, k, _ = points.shape
            run(points.flatten(0, 1))
            both = torch.cat([points, data.mean.reshape(n, k, -1)], -1)
            joint, covariance = weights.mean(both), weights.covariance(both)
            spread = weights.mean(data.covariance.reshape(n, k, *data.covariance.shape[1:]))
            value, present = (v.reshape(n, k, -1)[:, 0] for v in (data.value, data.present))
            prior = self.prior(state, frame, next(iter(self.layout.latents)), {})
        if not torch.is_grad_enabled():
            spread = spread.detach()
        found = condition(joint, covariance, spread, value, present)
        if bool((found.failed | ~found.log_density.isfinite()).any()):
            raise self._not_positive(frame)
        return found, prior

    def _not_positive(self, frame: Frame) -> ValueError:
        return ValueError(f"the predictive covariance of the data at time {frame.t}, given a particle of "
                          f"{type(self.model).__name__}, is not positive definite: give the emission a positive scale, and "
                          "look for a state that has diverged")
