"""The auxiliary particle filter: particles are resampled by what the next frame says of them, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, TransformedDistribution

from pyro_seq.engine.families import in_support
from pyro_seq.engine.sites import StepSites
from pyro_seq.engine.state import State
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.smc.population import LookAhead, Population
from pyro_seq.module import require_guide, require_model
from pyro_seq.resampling import Resampler
from pyro_seq.resampling.ancestral import Scheme
from pyro_seq.sequences import Frame

__all__ = ["AuxiliaryParticleFilter", "center", "density_at_center"]


class AuxiliaryParticleFilter(ParticleFilter):
    r"""A particle filter whose particles are resampled by weight and by what the next frame says of them.

    Before a step, particle i goes on with a chance proportional to :math:`W^i \exp(\ell^i)`, where the look-ahead
    :math:`\ell^i` approximates :math:`\log p(x_t \mid h_{t-1}^i)`; the weights make up for it, so that the evidence estimate is
    unbiased for any look-ahead that is nowhere minus infinity where the frame is possible. With a ``guide`` that knows the
    locally optimal proposal (:class:`~pyro_seq.KalmanGuide` where latents and data are Gaussian and linear given the state,
    :class:`~pyro_seq.EnumeratedGuide`) all particles come out with one weight; the posterior then calls itself *fully adapted*,
    as found to rounding in its own run.

    Where neither ``look_ahead`` nor the guide gives one, it is the density of the frame at the mean (discrete latents: the
    mode) of each particle's prior of the next latents, mixed in equal parts with its average over the particles. That density
    alone is narrower than the predictive one where the latents move much in one step, and would then do worse than no
    look-ahead; of the mixture, half of the particles go on by weight alone.

    :param model: a declared model.
    :param int num_particles: N.
    :param guide: a sequential guide; the prior when omitted.
    :param look_ahead: from states, frame (``frame.x["x"]`` is ``(rows, ...)``, NaN where missing) and the guide's encoding to
        log factors ``(rows,)``; that of the guide, or else of the prior's mean, when omitted.
    :param float ess_threshold: resample when the effective sample size of weight times look-ahead is below this share of the
        particles; always at 1.
    :param resampling: as for :class:`~pyro_seq.ParticleFilter`.
    :param int num_runs: likewise.
    :param bool history: likewise.
    :param bool progress: show a progress bar.
    :param bool compile: likewise; what looks ahead runs as written.

    Source: Pitt and Shephard, *Filtering via simulation: auxiliary particle filters*, 1999; Johansen and Doucet, *A note on
    auxiliary particle filters*, 2008; on the mixture, Hesterberg, *Weighted average importance sampling and defensive mixture
    distributions*, 1995.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 1.0))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> model = LocalLevel()
        >>> x = model.simulate([50])["x"]
        >>> seq.AuxiliaryParticleFilter(model, num_particles=100).run(x).method
        'auxiliary particle filter'
        >>> posterior = seq.AuxiliaryParticleFilter(model, num_particles=100, guide=seq.KalmanGuide(model)).run(x)
        >>> posterior.method, round(posterior.ess.min().item())
        ('fully adapted particle filter', 100)
    """

    def __init__(self, model: Any, num_particles: int = 1000, *, guide: Any = None,
                 look_ahead: Callable[[State, Frame, Any], Tensor] | None = None, ess_threshold: float = 1.0,
                 resampling: str | Scheme | Resampler = "systematic", num_runs: int = 1, history: bool = False,
                 progress: bool = False, compile: bool = False):
        require_model(model, "AuxiliaryParticleFilter")
        if guide is not None:
            require_guide(guide, model, "AuxiliaryParticleFilter")
        if look_ahead is not None and not callable(look_ahead):
            raise TypeError(f"look_ahead is a {type(look_ahead).__name__}: it is a function look_ahead(state, frame, encoding) "
                            "that returns a log factor for each row")
        super().__init__(model, num_particles, guide=guide, ess_threshold=ess_threshold, resampling=resampling,
                         num_runs=num_runs, history=history, progress=progress, compile=compile)
        self.look_ahead = look_ahead

    def favours(self, guide: Any) -> LookAhead:
        given = self.look_ahead or guide.look_ahead
        if given is None:
            return self._at_center
        return lambda frame, state, encoding: _checked(given(state, frame, encoding), frame)

    def described(self, population: Population) -> str:
        return "fully adapted particle filter" if population.adapted else "auxiliary particle filter"

    def _at_center(self, frame: Frame, state: State, encoding: Any) -> Tensor:
        looked = density_at_center(self.model, state, frame).reshape(-1, self.num_particles)
        average = looked.logsumexp(-1, keepdim=True) - math.log(self.num_particles)
        return torch.logaddexp(looked, average).reshape(-1)


def density_at_center(model: Any, state: State, frame: Frame) -> Tensor:
    """``(rows,)`` log density of the frame at the center of each row's prior of the latents."""
    with StepSites(frame, lambda _, prior: (None, center(prior))) as step:
        model.apply(state, frame)
    return sum((site.log_p() for site in step.sites.values() if site.observed), torch.zeros(frame.rows, device=frame.device))


def center(fn: Distribution) -> Tensor:
    """The mean of a distribution, of a discrete one the mode; where it has none, what its family has in the middle."""
    found = None
    with suppress(NotImplementedError, AttributeError):
        found = fn.mode if getattr(fn.support, "is_discrete", False) else fn.mean
    if found is None and isinstance(fn, TransformedDistribution):
        found = center(fn.base_dist)
        for transform in fn.transforms:
            found = transform(found)
    if found is None:
        return in_support(fn)
    return found if bool(found.isfinite().all()) else torch.where(found.isfinite(), found, in_support(fn).to(found.dtype))


def _checked(looked: Tensor, frame: Frame) -> Tensor:
    if not isinstance(looked, Tensor) or looked.shape != (frame.rows,):
        found = f"shape {tuple(looked.shape)}" if isinstance(looked, Tensor) else type(looked).__name__
        raise ValueError(f"look_ahead returned {found} at time {frame.t}; it is one log factor a row, a tensor ({frame.rows},)")
    if not bool((looked < torch.inf).all()):
        row = int((~(looked < torch.inf)).nonzero()[0])
        raise ValueError(f"look_ahead returned NaN or infinity at time {frame.t} in sequence {int(frame.sequence[row])}: "
                         "return 0 where it has nothing to say, as of a frame that is missing (NaN)")
    return looked
