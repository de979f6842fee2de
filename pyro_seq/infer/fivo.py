"""FIVO: the bound that a particle filter estimates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.loop import Plan, Step, Window, forward
from pyro_seq.engine.score import Term, step_terms
from pyro_seq.engine.sites import Site
from pyro_seq.engine.state import State
from pyro_seq.engine.weights import Weights
from pyro_seq.infer.iwae import Particles, contribution, held_out, refuse_greedy
from pyro_seq.infer.loss import Bound, SequenceLoss, auxiliary
from pyro_seq.infer.run import refuse_scaled
from pyro_seq.infer.smc.population import Population, require_threshold
from pyro_seq.infer.smc.segments import compiled_bound
from pyro_seq.resampling import Ancestral, Resampler, Scheme, multinomial, named, resolve
from pyro_seq.sequences import Frame, Packed, Sequences

__all__ = ["FIVO", "resampled"]


class FIVO(SequenceLoss):
    r"""The bound that a particle filter with the guide as its proposal estimates (filtering variational objective).

    .. math:: \log p(x_{1:T}) \ge E \sum_t \log \sum_{i=1}^N W_{t-1}^i
        \frac{p(x_t, z_t^i \mid h_{t-1}^i)}{q(z_t^i \mid h_{t-1}^i, x)}

    Particles are resampled before a step, as in :class:`~pyro_seq.ParticleFilter`, where the effective sample size of the
    weights :math:`W` has fallen below ``ess_threshold * num_particles``. With ``ess_threshold=1``, resampling at every step,
    this is the objective of auto-encoding and of variational sequential Monte Carlo (AESMC, VSMC); with 0 it is
    :class:`~pyro_seq.IWAE`. Each sequence of the batch has its own weights and ancestors.

    Gradients take the ancestors as given, as the three papers do to lower their variance: this is biased.
    ``resampling_gradient=True`` adds what is missing, the score function of the ancestors, with the bound from their step on as
    its reward; unbiased where sequences are resampled at every step or never, since between these the times of resampling are
    taken as given. Draws without a pathwise gradient, such as discrete latents, get the same. The control variates: in a
    particle's own step, the factor of the evidence in which its weight is the geometric mean of the others'; after it, the nats
    a frame of the batch's other sequences.

    :param int num_particles: N.
    :param float ess_threshold: 0 never resamples, 1 always does.
    :param resampling: by name, such as ``"systematic"``, or a ``pyro_seq.resampling.Resampler``. One whose weights or transport
        carry gradients is differentiated through; under one that is not ``unbiased`` the value is no bound.
    :param bool resampling_gradient: add the score function of the ancestors; needs ``"multinomial"`` resampling, which draws
        them independently.
    :param bool compile: run compiled steps, see :doc:`compile`; resampling whose weights have gradients, and latents without a
        pathwise gradient, stay as written.

    Source: Maddison et al., *Filtering Variational Objectives*, 2017; Le et al., *Auto-Encoding Sequential Monte Carlo*, 2018;
    Naesseth et al., *Variational Sequential Monte Carlo*, 2018.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> model = LocalLevel()
        >>> svi = SVI(model, seq.FilteringGuide(model), Adam({"lr": 1e-3}), loss=seq.FIVO(num_particles=8))
        >>> loss = svi.step(model.simulate([20] * 8)["x"])
        >>> seq.FIVO(num_particles=8)
        FIVO(num_particles=8, ess_threshold=0.5, resampling='systematic', resampling_gradient=False)
    """

    def __init__(self, num_particles: int, ess_threshold: float = 0.5, resampling: str | Scheme | Resampler = "systematic",
                 resampling_gradient: bool = False, compile: bool = False):
        super().__init__(num_particles, compile)
        require_threshold(ess_threshold)
        self.resampler = resolve(resampling)
        if resampling_gradient and not _independent(self.resampler):
            raise ValueError("resampling_gradient=True needs ancestors that are drawn independently by the weights, and "
                             f"resampling={named(resampling)!r} does not draw them so: use resampling='multinomial', or "
                             "resampling_gradient=False")
        self.ess_threshold, self.resampling, self.resampling_gradient = ess_threshold, named(resampling), resampling_gradient

    def options(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles, "ess_threshold": float(self.ess_threshold), "resampling": self.resampling,
                "resampling_gradient": self.resampling_gradient}

    def _bound(self, model: Any, guide: Any, sequences: Sequences, window: Window) -> Bound:
        refuse_greedy(self, guide)
        return resampled(self, model, guide, sequences, window, contribution, self.resampling_gradient)


def resampled(loss: Any, model: Any, guide: Any, sequences: Sequences, window: Window,
              weight_of: Callable[[Term], Tensor | None], resampling_gradient: bool = False, scores: bool = True) -> Bound:
    """The bound by the weighted loop.

    :param loss: has ``num_particles``, ``resampler`` and ``ess_threshold``.
    :param weight_of: ``(rows,)`` what one site adds to the log weights.
    :param scores: whether draws without a pathwise gradient get that of their score function.
    """
    particles, carried = loss.num_particles, window.state
    if loss.compiler is not None and not resampling_gradient:
        plain, weights = window, None
        if isinstance(carried, Particles):
            plain, weights = window._replace(state=carried.state), carried.log_weights
        if (found := compiled_bound(loss, model, guide, sequences, plain, weights, weight_of)) is not None:
            return found
    learned = _Learned(particles, resampling_gradient, scores)
    population = Population(loss.resampler, loss.ess_threshold)
    if isinstance(carried, Particles):
        window = window._replace(state=carried.state, log_weights=carried.log_weights)
        population.weights = Weights.of(carried.log_weights)

    def between(frame: Frame, state: State, encoding: Any, log_weights: Tensor) -> tuple[Tensor | None, Tensor]:
        plan, fresh = population.between(frame, state, encoding, log_weights)
        learned.resampled(population, plan, fresh)
        return plan, fresh

    def weigh(sites: dict[str, Site], frame: Frame) -> Tensor:
        found = step_terms(model, sites)
        learned.drawn(found, frame)
        parts = [part for term in found if (part := weight_of(term)) is not None]
        return sum(parts) if parts else torch.zeros(frame.rows, device=frame.device)

    steps: list[Step] = []
    for step in forward(model, guide, sequences, particles, between=between, window=window, weigh=weigh):
        refuse_scaled(model, step)
        learned.weighed(step, population.weigh(step))
        steps.append(step)
        if loss.compiler is not None and len(steps) <= 2:
            loss.compiler.plans.setdefault((model, guide), Plan()).see(step.sites, step.state)
    bound = torch.cat(learned.factors).sum()
    surrogate = learned.surrogate(sequences.packed, window)
    return Bound(bound.detach(), bound + surrogate - auxiliary(steps),
                 Particles(steps[-1].state, steps[-1].log_weights.detach()))


class _Learned:
    """The draws without a pathwise gradient, ancestors among them, and the factors of the evidence that reward them."""

    def __init__(self, particles: int, ancestors: bool, sites: bool):
        self.particles, self.ancestors, self.sites = particles, ancestors, sites
        self.factors: list[Tensor] = []
        """``(n,)`` a step."""
        self.scores: list[Tensor] = []
        """``(n, N)`` a step: log density of what particle i has drawn."""
        self.baselines: list[Tensor] = []
        """``(n, N)`` a step: its factor, without what particle i has drawn."""
        self.any = False
        self.before: Tensor | None = None
        self.score: Tensor | None = None

    def resampled(self, population: Population, plan: Tensor | None, fresh: Tensor) -> None:
        """Particles have been resampled, or may have been."""
        self.before = fresh.detach()
        if self.ancestors and plan is not None:
            chances = population.weights.log[:len(plan)].log_softmax(-1).gather(-1, plan)
            self.score = torch.where(population.chosen[:, None], chances, 0.0)

    def drawn(self, terms: list[Term], frame: Frame) -> None:
        """A step has drawn its sites."""
        if not self.sites:
            return
        for term in terms:
            if term.score_function is not None:
                score = term.score_function.reshape(-1, self.particles)
                self.score = score if self.score is None else self.score + score

    def weighed(self, step: Step, factor: Tensor) -> None:
        """A step is over."""
        after = step.log_weights.detach()
        before = torch.zeros_like(after) if self.before is None else self.before
        self.factors.append(factor)
        if self.score is None:
            self.scores.append(torch.zeros_like(after))
            self.baselines.append(self.scores[-1])
        else:
            self.any = True
            self.scores.append(self.score)
            base = after.logsumexp(-1) - math.log(self.particles) - factor.detach()  # log mean weight before the step
            self.baselines.append(held_out(before, after) - math.log(self.particles) - base[:, None])
        self.before = self.score = None

    def surrogate(self, packed: Packed, window: Window) -> Tensor | float:
        """What to differentiate for the gradient by score functions."""
        if not self.any or not torch.is_grad_enabled():
            return 0.0

        def by_time(parts: list[Tensor], particles: int) -> Tensor:
            return packed.by_time(torch.cat([part.reshape(-1) for part in parts]), window.start, window.stop, particles)

        factors = by_time(self.factors, 1).detach()
        running = by_time([torch.ones_like(factor) for factor in self.factors], 1)
        after = factors.flip(0).cumsum(0).flip(0) - factors
        left = running.flip(0).cumsum(0).flip(0) - running
        # What the other sequences, independent of this one, have a frame.
        others, frames = factors.sum() - factors.sum(0), running.sum() - running.sum(0)
        rate = torch.where(frames > 0, others / frames.clamp(min=1), 0.0)
        reward = factors - by_time(self.baselines, self.particles) + after - rate * left
        return (by_time(self.scores, self.particles) * reward).sum()


def _independent(resampler: Resampler) -> bool:
    """Whether ancestors are independent draws by the weights."""
    return type(resampler) is Ancestral and resampler.scheme is multinomial
