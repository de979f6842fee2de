"""The Rao-Blackwellised particle filter: particles for some latents, a Kalman filter for each of them for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_seq.engine.loop import Step
from pyro_seq.engine.state import State
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.conditional import Marginalised, marginalise
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.run import Stopwatch, entered
from pyro_seq.module import require_guide
from pyro_seq.resampling import Resampler, Scheme
from pyro_seq.sequences import Frame, Sequences

__all__ = ["RaoBlackwellisedFilter"]


class RaoBlackwellisedFilter:
    r"""A particle filter of some latents, for models that are linear and Gaussian in the others given these.

    Of a switching linear system the particles hold the regimes; of a level with stochastic volatility, the log volatility.
    Each carries the exact mean and covariance of the marginalised latents z given its path c and the data so far, and is
    weighed by the density of the frame with z integrated out, :math:`p(x_t \mid c_{1:t}, x_{1:t-1})`. The evidence estimate is
    unbiased, as :class:`~pyro_seq.ParticleFilter`'s, and its variance is smaller at equal ``num_particles`` (Rao and
    Blackwell); the filtered moments of z are those of the mixture of Gaussians. The declared step is run at zero and along
    each coordinate of the linear part, at each particle's own c, and tested for linearity at times 1, 2, 8, 32, ...,
    or at all of them where it reads the time or covariates.

    Missing frames and entries are integrated out exactly, also where the state reads them.

    :param model: a declared model.
    :param int num_particles: N.
    :param marginal: names of the latent sites to integrate out; the largest set that is found to be conditionally linear and
        Gaussian when omitted.
    :param guide: a sequential guide of ``model`` that samples the other latents; the state it is shown has the marginalised
        entries at their filtered means. Their prior when omitted.
    :param float ess_threshold: as for :class:`~pyro_seq.ParticleFilter`.
    :param resampling: likewise, by ancestors.
    :param int num_runs: likewise.
    :param bool history: keep all particles, for quantiles of all latents and trajectories of those that the particles hold.
    :param bool progress: show a progress bar.

    Source: Chen and Liu, *Mixture Kalman filters*, 2000; Doucet, de Freitas, Murphy and Russell, *Rao-Blackwellised particle
    filtering for dynamic Bayesian networks*, 2000; Schön, Gustafsson and Nordlund, *Marginalized particle filters for mixed
    linear/nonlinear state-space models*, 2005.

    Example, a level whose noise switches between two scales::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Switching(seq.SequentialModel):
        ...     def start(self, rows):
        ...         return {"k": torch.zeros(rows, dtype=torch.long), "z": torch.zeros(rows)}
        ...     def step(self, state, x=None):
        ...         stay = torch.tensor([[0.9, 0.1], [0.3, 0.7]])[state["k"]]
        ...         k = pyro.sample("k", dist.Categorical(stay))
        ...         z = pyro.sample("z", dist.Normal(state["z"], torch.tensor([0.1, 2.0])[k]))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        ...         return {"k": k, "z": z}
        >>> posterior = seq.RaoBlackwellisedFilter(Switching(), num_particles=50).run(Switching().simulate([30])["x"])
        >>> posterior.filtered["z"].mean.shape, posterior.filtered["k"].mean.shape
        (torch.Size([1, 30]), torch.Size([1, 30]))
        >>> posterior.notes
        ("found linear-Gaussian in ['z'] given ['k'] at the points tested",)
    """

    def __init__(self, model: Any, num_particles: int = 100, *, marginal: str | Iterable[str] | None = None, guide: Any = None,
                 ess_threshold: float = 0.5, resampling: str | Scheme | Resampler = "systematic", num_runs: int = 1,
                 history: bool = False, progress: bool = False):
        self._filter = _Filter(model, num_particles, ess_threshold=ess_threshold, resampling=resampling, num_runs=num_runs,
                               history=history, progress=progress)
        if not self._filter.resampler.ancestral:
            raise ValueError(f"{type(self._filter.resampler).__name__} mixes particles, and those of a RaoBlackwellisedFilter "
                             "are whole distributions: use a resampling by ancestors, such as 'systematic'")
        if model.state_grows:
            raise TypeError("a model from seq.from_pyro has no Markov state to filter: declare it as a StateSpaceModel")
        if guide is not None:
            require_guide(guide, model, "RaoBlackwellisedFilter")
        self.model, self.marginal, self.guide = model, marginal, guide

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Posterior:
        """Filter a batch; the arguments are those of :class:`~pyro_seq.ParticleFilter`.

        :raises ValueError: if the model is not conditionally linear and Gaussian, naming the site.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return entered(self.model, self.guide, sequences, lambda values: self._run(sequences, values, watch))

    def _run(self, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        self.model.check_inputs(sequences)
        model = marginalise(self.model, sequences, self.marginal)
        guide = PriorGuide(self.model) if self.guide is None else self.guide
        found = self._filter.of(model)._run(_OfDeclared(guide, model), sequences, parameters, watch)
        draw = found.final_state

        def final_state(num_samples: int) -> State:
            return model.declared_state(draw(num_samples), draw=True)

        split = model.split
        given = f" given {list(split.conditioning)}" if split.conditioning else ""
        return replace(found, method="Rao-Blackwellised particle filter", model=self.model, final_state=final_state,
                       notes=(f"found linear-Gaussian in {list(split.marginal)}{given} at the points tested", *found.notes))


class _Filter(ParticleFilter):
    """The particle filter of a marginalised model."""

    def of(self, model: Marginalised) -> _Filter:
        found = _Filter.__new__(_Filter)
        found.__dict__.update(self.__dict__, model=model)
        return found

    def measured(self, step: Step) -> dict[str, tuple[Tensor, Tensor | None]]:
        exact = {name: (moments["mean"], moments["variance"]) for name, moments in step.state["filtered"].items()}
        return {**super().measured(step), **exact}


class _OfDeclared:
    """A guide of the declared model, for the marginalised one."""

    def __init__(self, guide: Any, model: Marginalised):
        self.guide, self.marginalised = guide, model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guide, name)

    def propose(self, state: Any, frame: Frame, encoding: Any) -> Any:
        declared = self.marginalised.declared.begin(frame) if state is None else self.marginalised.declared_state(state)
        return self.guide.propose(declared, frame, encoding)
