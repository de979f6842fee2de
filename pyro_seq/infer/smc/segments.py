"""The bound of resampled particles by compiled steps.

Between two resamplings the weights of a sequence's particles multiply, so that the bound is the sum over these segments of the
log mean of the products. Who is resampled when is found on the way, without gradients; the gradients take it as given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.compiled.whole import draw_and_weigh
from pyro_seq.engine.generators import generator_states, set_generators
from pyro_seq.engine.loop import Step, Window
from pyro_seq.engine.score import Term
from pyro_seq.infer.iwae import Particles
from pyro_seq.infer.loss import Bound
from pyro_seq.infer.smc.population import Population
from pyro_seq.resampling import Ancestral
from pyro_seq.sequences import Packed, Sequences

__all__ = ["compiled_bound"]


def compiled_bound(loss: Any, model: Any, guide: Any, sequences: Sequences, window: Window, weights: Tensor | None,
                   weight_of: Callable[[Term], Tensor | None]) -> Bound | None:
    """The bound, or ``None`` where it is left to the loop as written: with resampling whose weights have gradients, and latents
    without a pathwise gradient.

    :param weights: log weights ``(n, N)`` that the window begins with.
    """
    declined = (model, guide, "bound")
    if type(loss.resampler) is not Ancestral or declined in loss.compiler.declined:
        return None
    walk = _Walk(loss, sequences.packed, window, weights, weight_of)
    generators = generator_states(sequences.device)
    try:
        found = draw_and_weigh(loss.compiler, model, guide, sequences, window, loss.num_particles, walk.between)
    except (ValueError, _NotFinite):  # which the loop as written says in full
        found = None
    if found is None:
        set_generators(generators, sequences.device)
        return None
    if torch.is_grad_enabled() and any(term.score_function is not None for term in found.terms):
        loss.compiler.declined.add(declined)
        set_generators(generators, sequences.device)
        return None
    bound = walk.bound(found.terms)
    if not bool(bound.isfinite()):
        set_generators(generators, sequences.device)
        return None
    last = sequences.packed.counts[window.stop - 1] * loss.num_particles
    walk.add([term._replace(log_p=term.log_p[-last:], log_q=None if term.log_q is None else term.log_q[-last:])
              for term in found.terms], window.stop)
    return Bound(bound.detach(), bound - (0.0 if found.auxiliary is None else found.auxiliary),
                 Particles(found.state, walk.weights))


class _NotFinite(Exception):
    """A weight is no number, or all of a sequence are zero."""


class _Walk:
    """From step to step, without gradients."""

    def __init__(self, loss: Any, packed: Packed, window: Window, weights: Tensor | None,
                 weight_of: Callable[[Term], Tensor | None]):
        self.loss, self.packed, self.window, self.weight_of = loss, packed, window, weight_of
        self.particles, self.running = loss.num_particles, packed.counts[window.start - 1]
        self.population = Population(loss.resampler, loss.ess_threshold)
        self.given = None if weights is None else weights[:self.running]
        if self.given is not None:
            self.population.weigh(Step(None, {}, None, None, self.given, None, None))
        self.weights = self.given
        self.chosen = torch.zeros(window.stop - window.start + 1, self.running, dtype=torch.bool,
                                  device=packed.sequences.device)

    def between(self, t: int, terms: list[Term] | None) -> Tensor | None:
        if terms is not None:
            self.add(terms, t - 1)
        elif self.given is None:
            return None
        count = self.packed.counts[t - 1]
        with torch.no_grad():
            plan, self.weights = self.population.between(None, None, None, self.weights[:count])
        if plan is not None:
            self.chosen[t - self.window.start, :count] = self.population.chosen
        return plan

    def add(self, terms: list[Term], t: int) -> None:
        """The weights after step ``t``."""
        count = self.packed.counts[t - 1]
        with torch.no_grad():
            parts = [part for term in terms if (part := self.weight_of(term)) is not None]
            step = sum(parts)[:count * self.particles].reshape(count, self.particles) if parts else torch.zeros(
                count, self.particles, device=self.chosen.device)
            self.weights = step if self.weights is None else self.weights[:count] + step
            if not bool(self.weights.logsumexp(-1).isfinite().all()):
                raise _NotFinite
            self.population.weigh(Step(None, {}, None, None, self.weights, None, None))

    def bound(self, terms: list[Term]) -> Tensor:
        """The sum of all sequences' bounds, with gradients."""
        parts = [part for term in terms if (part := self.weight_of(term)) is not None]
        segment = self.chosen.long().cumsum(0)
        total = segment.new_zeros(int(segment.max()) + 1, self.running, self.particles, dtype=self.population.weights.log.dtype)
        if self.given is not None:
            total[0] = self.given
        if parts:
            steps = self.packed.by_time(sum(parts), self.window.start, self.window.stop, self.particles)[:, :self.running]
            total = total.scatter_add(0, segment[..., None].expand_as(steps), steps)
        number = torch.arange(len(total), device=segment.device)[:, None]
        inside = (number >= segment[0]) & (number <= segment[-1])
        found = torch.where(inside, total.logsumexp(-1) - math.log(self.particles), 0.0).sum()
        if self.given is not None:
            begun = self.given.logsumexp(-1) - math.log(self.particles)
            found = found - torch.where(segment[0] == 0, begun, 0.0).sum()
        return found
