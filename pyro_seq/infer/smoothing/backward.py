"""Forward filtering, backward sampling: whole trajectories given all of the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.loop import Step
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.smc.record import Record, moments_of, take_down, values_of
from pyro_seq.infer.smoothing.kernel import BackwardKernel, require_backward
from pyro_seq.module import require_count
from pyro_seq.sequences import Packed

__all__ = ["BackwardSampler"]


class BackwardSampler(ParticleFilter):
    r"""A particle filter, and trajectories drawn backwards through its particles.

    Each of ``num_trajectories`` paths starts at a particle of the last time, drawn by its weight, and goes back by
    :math:`p(j \mid z_t) \propto W_{t-1}^j f(z_t \mid z_{t-1}^j)`: any particle may have been the one before, not the ancestor
    alone, so that paths differ at all times, where those of ``ParticleFilter(history=True)`` have coalesced. The smoothed
    moments are of all particles by the average chances of these draws with ``'exact'``, of the trajectories with
    ``'rejection'``.

    It works for models whose state after a step is determined by that step's latents and data, as a
    :class:`~pyro_seq.StateSpaceModel`'s that returns them; this is tested at every step. A state that carries more of the past,
    such as that of a recurrent network, has no :math:`f(z_t \mid z_{t-1})`, and is refused.

    :param model: a declared model.
    :param int num_particles: N.
    :param int num_trajectories: M, drawn of each sequence.
    :param str method: ``'exact'`` costs ``T * N * M``. ``'rejection'`` draws from the same distribution at a cost that hardly
        depends on N, for a StateSpaceModel with one latent site of bounded density: a particle proposed by its weight times the
        largest density that it can have, the mode's, is accepted with its density over that one; draws refused N times over are
        made exactly.
    :param options: those of :class:`~pyro_seq.ParticleFilter`: ``guide``, ``ess_threshold``, ``progress``.

    Source: Godsill, Doucet and West, *Monte Carlo smoothing for nonlinear time series*, 2004; Douc, Garivier, Moulines and
    Olsson, *Sequential Monte Carlo smoothing for general state space hidden Markov models*, 2011 (rejection); Dau and Chopin,
    *On backward smoothing algorithms*, 2023 (stopping it).

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class StochasticVolatility(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(-1.0, 0.7))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(-1.0 + 0.97 * (z + 1.0), 0.18))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(0.0, torch.exp(z / 2)), obs=x)
        >>> model = StochasticVolatility()
        >>> posterior = seq.BackwardSampler(model, 200, num_trajectories=100).run(model.simulate([50, 30])["x"], [50, 30])
        >>> posterior.smoothed["z"].mean.shape, posterior.trajectories(100).samples["z"].shape
        (torch.Size([2, 50]), torch.Size([100, 2, 50]))
    """

    adds = "goes back from the end"

    def __init__(self, model: Any, num_particles: int = 1000, *, num_trajectories: int = 500, method: str = "exact",
                 **options: Any):
        if options.get("num_runs", 1) != 1:
            raise ValueError(f"num_runs={options['num_runs']}: BackwardSampler draws backwards through one run; give it more "
                             "particles")
        super().__init__(model, num_particles, history=True, **options)
        require_backward(model, method, "BackwardSampler")
        require_count("num_particles", num_particles, 2)
        require_count("num_trajectories", num_trajectories, 1)
        self.num_trajectories, self.method = num_trajectories, method

    def recorder(self, packed: Packed) -> Record:
        return _Backward(packed, self)

    def _run(self, *arguments: Any) -> Posterior:
        found = super()._run(*arguments)
        return replace(found, method=f"{found.method}, backward sampling")


class _Backward(Record):
    """The steps of a filter, and the trajectories back through them."""

    def __init__(self, packed: Packed, sampler: BackwardSampler):
        super().__init__(packed, sampler.num_particles, sampler.measured, history=True)
        self.sampler = sampler
        self.smooths_by_ancestors = False
        self.paths: dict[str, Tensor] = {}

    def smoothed(self) -> dict[str, tuple[Tensor, Tensor]]:
        count = self.sampler.num_trajectories
        kernel = BackwardKernel(self.sampler.model, self.sampler.method)
        last = self.final_weights()
        weights = last[:0]
        moments: dict[str, list[tuple[Tensor, Tensor]]] = {}
        paths: dict[str, list[Tensor]] = {}

        def origins(before: Step, after: Step, index: Tensor) -> Tensor:
            nonlocal weights
            kernel.check(after)
            index, weights = kernel.draw(before, after, index)
            return index[..., 0]

        for step, index in self.backwards(count, origins):
            weights = torch.cat([weights, last[len(weights):len(index)]])
            take_down(paths, step, index)
            for name, (value, _) in values_of(step).items():
                moments.setdefault(name, []).append(moments_of(weights, value))
        self.paths = self.as_samples(paths, count)
        return {name: tuple(self.padded(list(part)[::-1]) for part in zip(*found, strict=True))
                for name, found in moments.items()}

    def trajectories(self, num_samples: int) -> dict[str, Tensor]:
        """Some of those that were drawn."""
        count = self.sampler.num_trajectories
        if num_samples > count:
            raise ValueError(f"num_samples={num_samples}, and BackwardSampler drew {count}: give it "
                             f"num_trajectories={num_samples}")
        chosen = torch.randperm(count)[:num_samples]
        return {name: value[chosen.to(value.device)] for name, value in self.paths.items()}
