"""Fixed-lag smoothing: what a few more frames say of each time, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.loop import Step
from pyro_seq.engine.weights import Weights
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.smc.record import Measured, Record, Told, moments_of, values_of
from pyro_seq.module import require_count
from pyro_seq.sequences import Packed

__all__ = ["FixedLagSmoother"]


class FixedLagSmoother(ParticleFilter):
    r"""A particle filter that says of each time what the next ``lag`` frames tell.

    The smoothed moments are of :math:`p(z_t \mid x_{1:t+L})`, up to the end of each sequence: those of the ancestors at time t
    of the particles at :math:`t+L`, most of which are still distinct if L is not large. What frames later than that say of
    :math:`z_t` is left out: a bias that falls off with L as fast as the model forgets. Memory is ``O(L * N)``; any declared
    model will do.

    :param model: a declared model.
    :param int num_particles: N.
    :param int lag: L; 0 filters.
    :param options: those of :class:`~pyro_seq.ParticleFilter`: ``guide``, ``ess_threshold``, ``progress``.

    Source: Kitagawa and Sato, *Monte Carlo smoothing and self-organising state-space model*, 2001; Olsson, Cappé, Douc and
    Moulines, *Sequential Monte Carlo smoothing with application to parameter estimation in nonlinear state space models*, 2008.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> posterior = seq.FixedLagSmoother(LocalLevel(), 500, lag=10).run(torch.zeros(2, 50), [50, 30])
        >>> posterior.smoothed["z"].mean.shape
        torch.Size([2, 50])
        >>> posterior.notes
        ('smoothed moments are given the next 10 frames',)
    """

    adds = "smooths by what comes after"

    def __init__(self, model: Any, num_particles: int = 1000, *, lag: int, **options: Any):
        super().__init__(model, num_particles, **options)
        require_count("lag", lag, 0)
        if self.num_runs != 1:
            raise ValueError(f"num_runs={self.num_runs}: FixedLagSmoother smooths one run; give it more particles")
        if self.history:
            raise ValueError("history=True keeps all particles, to smooth by their genealogy: that is ParticleFilter's; "
                             "FixedLagSmoother keeps the last few")
        if not self.resampler.ancestral:
            raise ValueError(f"FixedLagSmoother traces ancestors, and {type(self.resampler).__name__} mixes particles: use a "
                             "resampling by ancestors, such as 'systematic'")
        self.lag = lag

    def recorder(self, packed: Packed) -> Record:
        return _Lagged(packed, self.num_particles, self.measured, self.lag)

    def _run(self, *arguments: Any) -> Posterior:
        found = super()._run(*arguments)
        return replace(found, method=f"{found.method}, fixed-lag smoothing",
                       notes=(f"smoothed moments are given the next {self.lag} frames", *found.notes))


class _Recent:
    """The latents of one time, and where the particles of now were then."""

    def __init__(self, step: Step):
        n, particles = step.log_weights.shape
        self.values = {name: value.unflatten(0, (n, particles)) for name, (value, _) in values_of(step).items()}
        self.index = torch.arange(particles, device=step.log_weights.device).expand(n, particles)

    def moments(self, weights: Tensor, rows: slice) -> dict[str, tuple[Tensor, Tensor]]:
        """By site, ``(n, ...)``, by the weights ``(n, N)`` that the particles of those rows have now."""
        index = self.index[rows]
        row = torch.arange(len(index), device=index.device)[:, None]
        return {name: moments_of(weights, value[rows][row, index].flatten(0, 1)) for name, value in self.values.items()}


class _Lagged(Record):
    """A record that keeps the last ``lag`` steps, and the moments of those before given the frames since."""

    def __init__(self, packed: Packed, particles: int, measured: Measured, lag: int):
        super().__init__(packed, particles, measured)
        self.reads_steps = True
        self.lag = lag
        self.recent: list[_Recent] = []
        self.parts: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
        """By time and site: moments of the sequences that have them, the shorter ones first."""

    def add(self, step: Step, weights: Weights, factor: Tensor, chances: Tensor | None = None, told: Told | None = None
            ) -> None:
        super().add(step, weights, factor, chances, told)
        n = len(factor)
        for past in self.recent:
            past.index = past.index[:n]
            if step.ancestors is not None:
                past.index = past.index.gather(1, step.ancestors)
        self.recent.append(_Recent(step))
        self.parts.append({name: [] for name in self.recent[-1].values})
        if len(self.recent) > self.lag:
            self._tell(self.recent.pop(0), len(self.parts) - 1 - self.lag, weights.normalised, slice(None, n))

    def smoothed(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: tuple(self.padded([torch.cat([moments[which] for moments in part[name][::-1]]) for part in self.parts])
                            for which in range(2)) for name in self.parts[0]}

    def set_aside(self, running: int) -> None:
        """Say of the last times of the sequences that end here what there is to say."""
        if self.last is not None and running < len(self.last[1].log):
            rows = slice(running, len(self.last[1].log))
            for past, t in zip(self.recent, range(len(self.parts) - len(self.recent), len(self.parts)), strict=True):
                self._tell(past, t, self.last[1].normalised[rows], rows)
        super().set_aside(running)

    def _tell(self, past: _Recent, t: int, weights: Tensor, rows: slice) -> None:
        for name, moments in past.moments(weights, rows).items():
            self.parts[t][name].append(moments)
