"""The twisted particle filter: a look-ahead to the end of the data, learned from runs of the filter itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_seq.engine.loop import Step, forward
from pyro_seq.engine.noise import Layout
from pyro_seq.engine.padded import pad_rows
from pyro_seq.engine.state import State, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.guides.twisted import Joint, Twist, TwistedGuide
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.run import Stopwatch, refuse_scaled
from pyro_seq.infer.smc.population import LookAhead, Population
from pyro_seq.infer.smc.twisting import fit_twist, num_coefficients
from pyro_seq.module import require_count, require_model
from pyro_seq.resampling import Resampler, Scheme
from pyro_seq.sequences import Frame, Sequences, first_rows, repeat_rows

__all__ = ["TwistedParticleFilter"]

_SETTLED = 0.01
"""Nats of spread below which there is nothing left to learn."""


class TwistedParticleFilter(ParticleFilter):
    r"""A particle filter that looks ahead to the end of the data, by functions :math:`\psi_t` that it learns: the iterated
    auxiliary particle filter.

    Particles are proposed from :math:`f(z_t \mid h_{t-1}) \psi_t(z_t) / \int f \psi_t` and resampled by weight times
    :math:`\int f(z_{t+1} \mid h_t) \psi_{t+1}(z_{t+1}) \, dz_{t+1}`. With :math:`\psi_t(z_t) = p(x_{t:T} \mid z_t)` every run
    would give the evidence exactly. Here :math:`\log \psi_t` is a quadratic, learned backwards in time from the particles of
    the last run, by least squares on

    .. math:: \log p(x_t \mid z_t) + \log \int f(z_{t+1} \mid h_t) \, \psi_{t+1}(z_{t+1}) \, dz_{t+1}

    of which the particles weigh by what is known of the smoothing distribution. Each sequence has its own. The last run uses
    the best of the functions tried, those of the largest evidence less five times its spread, as effective sample sizes say;
    its particles are fresh, so the estimate is unbiased. On a linear-Gaussian state-space model the quadratic is exact and the
    variance zero; it is small where :math:`p(x_{t:T} \mid z_t)` has one mode in z. Another mode, which a quadratic cannot have,
    is hardly ever visited: estimates are then mostly too low, and rarely far too high, so that their spread says less than it
    should. Hold such a model against :class:`~pyro_seq.ParticleFilter`.

    The filtered moments are of the filtering distributions, of which particles that know the future are a poor sample: these
    are better had from :class:`~pyro_seq.ParticleFilter`. :meth:`~pyro_seq.Posterior.trajectories`, with ``history=True``, are
    what it is good at.

    :param model: a declared model whose latents are Normal or MultivariateNormal given the state. The functions are of the
        latents of a step alone: of a model that remembers more than these they tell a part.
    :param int num_particles: N, in each run.
    :param int iterations: times that the functions are learned, from one run each; fewer once that spread is below
        0.01 nats for all sequences.
    :param str quadratic: ``"full"``, or ``"diagonal"`` for many latents. N is at least twice the number of coefficients, and
        better many times that where the quadratic is not exact.
    :param float ess_threshold: resample when the effective sample size of weight times look-ahead is below this share of N.
    :param resampling: by ancestors, as for :class:`~pyro_seq.ParticleFilter`.
    :param int num_runs: independent last runs; their average is returned, and their spread is its standard error.
    :param bool history: as for :class:`~pyro_seq.ParticleFilter`.
    :param bool progress: show progress bars.

    Source: Guarniero, Johansen and Lee, *The iterated auxiliary particle filter*, 2017; Heng, Bishop, Deligiannidis and Doucet,
    *Controlled sequential Monte Carlo*, 2020.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import StochasticVolatility
        >>> model = StochasticVolatility({"mu": -1.0, "rho": 0.95, "sigma": 0.3})
        >>> x = model.simulate([50])["x"]
        >>> twisted = seq.TwistedParticleFilter(model, num_particles=50, num_runs=10).run(x)
        >>> bootstrap = seq.ParticleFilter(model, num_particles=50, num_runs=10).run(x)
        >>> bool(twisted.standard_error < bootstrap.standard_error)
        True
    """

    adds = "learns from all of the data where it leads"

    def __init__(self, model: Any, num_particles: int = 100, iterations: int = 4, *, quadratic: str = "full",
                 ess_threshold: float = 0.5, resampling: str | Scheme | Resampler = "systematic", num_runs: int = 1,
                 history: bool = False, progress: bool = False):
        require_model(model, "TwistedParticleFilter")
        require_count("iterations", iterations, 1)
        if quadratic not in ("full", "diagonal"):
            raise ValueError(f"quadratic={quadratic!r}; it is 'full' or 'diagonal'")
        super().__init__(model, num_particles, ess_threshold=ess_threshold, resampling=resampling, num_runs=num_runs,
                         history=history, progress=progress)
        self.iterations, self.quadratic = iterations, quadratic

    def favours(self, guide: TwistedGuide) -> LookAhead:
        return lambda frame, state, twist: guide.look_ahead(state, frame, twist)

    def described(self, population: Population) -> str:
        return "twisted particle filter"

    def _run(self, guide: Any, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        self.model.check_inputs(sequences)
        twists = best = self._flat(sequences)
        highest = torch.full_like(twists.center[:, 0, 0], -torch.inf)
        for iteration in tqdm(range(self.iterations + 1), disable=not self.progress, desc="twists"):
            seen = self._seen(twists, sequences)
            bound = seen.evidence - 5 * seen.spread
            better = bound > highest
            best = Twist(*(torch.where(better.reshape(-1, *(1,) * (new.dim() - 1)), new, old)
                           for new, old in zip(twists, best)))
            highest = torch.maximum(highest, bound)
            if iteration == self.iterations or bool((seen.spread < _SETTLED).all()):
                break
            twists = self._learned(seen, sequences)
        return super()._run(TwistedGuide(self.model, best), sequences, parameters, watch)

    def _flat(self, sequences: Sequences) -> Twist:
        """Functions that are one everywhere: those of the bootstrap filter."""
        frame = sequences.frame(1)
        width = Layout.of(self.model, self.model.begin(frame), frame).latent_width
        if not width:
            raise ValueError(f"{type(self.model).__name__} samples no latent site: there is nothing to filter")
        needed = 2 * num_coefficients(width, self.quadratic)
        if self.num_particles < needed:
            raise ValueError(f"num_particles={self.num_particles} are too few to learn a {self.quadratic} quadratic in {width} "
                             f"latents: use {needed} or more" + ("" if self.quadratic == "diagonal" else
                                                                 ", or quadratic='diagonal'"))
        zero = torch.zeros(sequences.num_sequences, sequences.num_steps, width, dtype=torch.float64, device=sequences.device)
        return Twist(zero, torch.diag_embed(zero), zero)

    def _seen(self, twists: Twist, sequences: Sequences) -> _Seen:
        """Run the filter with given functions."""
        guide = TwistedGuide(self.model, twists)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        ahead: list[tuple[Joint, Tensor]] = []
        # The relative variance of the evidence estimate, times N: what was lost where particles were resampled, and at the end.
        lost = torch.zeros(sequences.num_sequences, dtype=torch.float64, device=sequences.device)
        final, evidence = lost.clone(), lost.clone()

        def look_ahead(frame: Frame, state: State, twist: Twist) -> Tensor:
            joint = guide.joint(state, frame)
            found = twist.tilt(*joint.moments())[-1].reshape(-1, self.num_particles)
            ahead.append((joint, found))
            share = Weights.of(population.weights.log[:len(found)] + found).ess / self.num_particles
            lost[:len(found)] += torch.where((share < self.ess_threshold) | (self.ess_threshold == 1.0), 1 / share - 1, 0.0)
            return found

        population = Population(self.resampler, self.ess_threshold, look_ahead)
        for step in forward(self.model, guide, sequences, self.num_particles, between=population.between):
            refuse_scaled(self.model, step)
            factor = population.weigh(step)
            evidence[:len(factor)] += factor
            final[:len(factor)] = self.num_particles / population.weights.ess - 1
            steps.append(_latents_and_densities(step))
        spread = ((lost + final) / self.num_particles).clamp(min=0).sqrt()  # rounding may leave less than none
        return _Seen(steps, ahead, *(sequences.packed.unsort(value) for value in (evidence, spread)))

    def _learned(self, seen: _Seen, sequences: Sequences) -> Twist:
        """The functions that the particles of a run say, from the last step to the first."""
        found: list[Twist] = []
        for t in reversed(range(len(seen.steps))):
            latents, log_density, log_weights = seen.steps[t]
            if found:
                joint, looked = seen.ahead[t]
                after = map_state(lambda leaf: repeat_rows(leaf, self.num_particles), found[-1])
                running = len(found[-1].center)
                ahead = after.tilt(*joint.moments())[-1].reshape(running, -1)
                log_density = torch.cat([first_rows(log_density, running) + ahead, log_density[running:]])
                log_weights = torch.cat([first_rows(log_weights, running) + looked, log_weights[running:]])
            found.append(fit_twist(latents, log_density, log_weights, self.quadratic))
        counts = sequences.packed.counts
        return Twist(*(pad_rows(list(parts), counts, sequences.packed) for parts in zip(*reversed(found))))


class _Seen(NamedTuple):
    """What one run has shown, in packed order."""

    steps: list[tuple[Tensor, Tensor, Tensor]]
    """Of each step: latents ``(n, N, Z)``, log density of the data given them ``(n, N)``, log weights ``(n, N)``."""
    ahead: list[tuple[Joint, Tensor]]
    """Of each step but the last: the next step's latents given its state, and the look-ahead of all particles, before they were
    resampled."""
    evidence: Tensor
    """``(B,)`` its log estimate."""
    spread: Tensor
    """``(B,)`` standard deviation of that, as the effective sample sizes say."""


def _latents_and_densities(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    shape = step.log_weights.shape
    latents = [site.value.double().reshape(*shape, -1) for site in step.sites.values() if not site.observed]
    densities = [site.log_p().double().reshape(shape) for site in step.sites.values() if site.observed]
    return torch.cat(latents, -1), sum(densities), step.log_weights.double()
