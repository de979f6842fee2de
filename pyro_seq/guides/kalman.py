"""The local Kalman proposal: each particle's prior conditioned on the frame, by linearisation or sigma points."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal, TransformedDistribution
from torch import Tensor
from torch.distributions import Distribution, ReshapeTransform

from pyro_seq.engine.gaussian import condition, root, semidefinite_root
from pyro_seq.engine.jacobian import jacobian
from pyro_seq.engine.noise import Data, Layout, NoisySites, repeat_frame
from pyro_seq.engine.sigma_points import SigmaPoints
from pyro_seq.engine.sites import LatentsDrawn, Proposal, PyroSites, StepSites
from pyro_seq.engine.state import State, map_state
from pyro_seq.guide import DrawnSites, SequentialGuide
from pyro_seq.module import require_model
from pyro_seq.sequences import Frame, Sequences, repeat_rows

__all__ = ["KalmanGuide"]


class KalmanGuide(SequentialGuide):
    r"""The approximation of the locally optimal proposal :math:`p(z_t \mid z_{t-1}, x_t)` by a Gaussian, without training.

    For each particle the emission is linearised about the mean of the step's prior (``"extended"``) or put through sigma points
    of it (``"unscented"``), and the prior is conditioned on the frame. Where the latents are Gaussian given the state and the
    emission is linear in them with a covariance that does not depend on them, this is the locally optimal proposal itself. A
    frame without data, or in the directions that it says nothing about, gets the prior. So does an emission whose mean does
    not depend on the latents, as that of a stochastic volatility model: transform the data (to log squares) to gain there. As
    in :class:`~pyro_seq.ExtendedKalmanFilter`, of emissions that are not Gaussian mean and variance are matched. The weights of
    the particle filter repair what the approximation gets wrong.

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

    def prepare_rows(self, sequences: Sequences) -> None:
        frame = sequences.frame(1)
        self.__dict__["_layout"] = Layout.of(self.model, self.model.begin(frame), frame)

    @property
    def layout(self) -> Layout:
        """The sites of the model's step, looked up as each run begins."""
        return self.__dict__["_layout"]

    def propose(self, state: State, frame: Frame, encoding: Any, emit: PyroSites | None = None) -> Proposal:
        noise, factor, prior, _ = self._given_frame(state, frame)
        drawn: dict[str, tuple[Distribution, Tensor]] = {}
        before = noise.new_zeros(frame.rows, 0)
        for name, where in self.layout.columns().items():
            if name in self.layout.observed:
                break
            if drawn:
                prior = self._prior(state, frame, name, {k: value for k, (_, value) in drawn.items()})
            # Given what has been drawn of the noise already.
            mean = noise[:, where] + (factor[:, where, :where.start] @ before[..., None])[..., 0]
            spread, dtype = root(prior), prior.mean.dtype
            loc = prior.mean.reshape(frame.rows, -1) + (spread @ mean.to(dtype)[..., None])[..., 0]
            tril = spread @ factor[:, where, where].to(dtype)
            with StepSites(frame) if emit is None else emit as sites:
                value = pyro.sample(name, _gaussian(loc, tril, prior.event_shape))
            drawn[name] = (sites.sites[name].p, value) if emit is None else sites.drawn[name]
            if len(self.layout.latents) > 1:
                apart = (value.reshape(frame.rows, -1) - loc)[..., None]
                before = torch.cat([before, torch.linalg.solve_triangular(tril, apart, upper=False)[..., 0].double()], -1)
        return DrawnSites(type(self).__name__, drawn)

    def look_ahead(self, state: State, frame: Frame, encoding: Any) -> Tensor:
        """``(rows,)`` log density of the frame under its Gaussian approximation given each particle's state."""
        return self._given_frame(state, frame)[-1]

    def _given_frame(self, state: State, frame: Frame) -> tuple[Tensor, Tensor, Distribution, Tensor]:
        """Of the latents' noise given the frame, in float64: the mean ``(rows, Z)`` and a triangular root ``(rows, Z, Z)`` of
        the covariance; the prior of the first latent; and the log density ``(rows,)`` of the frame."""
        rows, width = frame.rows, self.layout.latent_width
        zero = torch.zeros(rows, width, dtype=torch.float64, device=frame.device)
        identity = torch.eye(width, dtype=zero.dtype, device=frame.device).expand(rows, -1, -1)
        sites: NoisySites | None = None
        data: Data | None = None

        def run(noise: Tensor) -> Data:
            nonlocal sites, data
            k = len(noise) // rows
            sites = self._sites(repeat_frame(frame, k), noise)
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
            prior = self._prior(state, frame, next(iter(self.layout.latents)), {})
        if not torch.is_grad_enabled():
            spread = spread.detach()
        found = condition(joint, covariance, spread, value, present)
        factor, failed = semidefinite_root(found.covariance)
        if bool((found.failed | failed | ~found.log_density.isfinite()).any()):
            raise ValueError(f"the predictive covariance of the data at time {frame.t}, given a particle of "
                             f"{type(self.model).__name__}, is not positive definite: give the emission a positive scale, and "
                             "look for a state that has diverged")
        return found.mean, factor, prior, found.log_density

    def _prior(self, state: State, frame: Frame, name: str, values: dict[str, Tensor]) -> Distribution:
        """The model's distribution of a latent, given the ones before it."""
        zero = torch.zeros(frame.rows, self.layout.latent_width + self.layout.data_width, device=frame.device)
        with suppress(LatentsDrawn), self._sites(frame, zero, values, len(values) + 1) as sites:
            self.model.apply(state, frame)
        return sites.sites[name].p

    def _sites(self, frame: Frame, noise: Tensor, values: dict[str, Tensor] | None = None, stop_after: int | None = None
               ) -> NoisySites:
        where = f"{type(self.model).__name__} at time {frame.t}"
        return NoisySites(frame, self.layout.noise(noise, where), False, values, stop_after)


def _gaussian(loc: Tensor, tril: Tensor, shape: torch.Size) -> Distribution:
    """A Gaussian over the entries of an event of any shape."""
    if not shape:
        return Normal(loc[:, 0], tril[:, 0, 0])
    joint = MultivariateNormal(loc, scale_tril=tril)
    return joint if len(shape) == 1 else TransformedDistribution(joint, [ReshapeTransform(loc.shape[-1:], shape)])
