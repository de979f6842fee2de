"""What a particle filter keeps of its steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from pyro.ops.stats import weighed_quantile
from torch import Tensor

from pyro_seq.engine.loop import Step
from pyro_seq.engine.padded import pad_rows
from pyro_seq.engine.state import State, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.infer.smc.families import Families
from pyro_seq.infer.smc.kept import Kept
from pyro_seq.sequences import Packed

__all__ = ["Measured", "Origins", "Record", "Told", "moments_of", "take_down", "tell", "values_of"]

Measured = Callable[[Step], dict[str, tuple[Tensor, Tensor | None]]]
"""By latent site, what each particle says of it, ``(rows, ...)``: a value, and a variance about it if it has one."""

Origins = Callable[[Step, Step, Tensor], Tensor]
"""From a step, the one after it and particles ``(n, M)`` of that one to the particles of the step that they come from."""


def values_of(step: Step) -> dict[str, tuple[Tensor, None]]:
    """What each particle says of the latents: their values."""
    return {name: (site.value, None) for name, site in step.sites.items() if not site.observed}


class Told(NamedTuple):
    """What the weighted particles of one step tell."""

    families: Families
    moments: dict[str, tuple[Tensor, Tensor]]
    """By site, mean and variance ``(n, ...)``."""


def tell(families: Families | None, before: Weights | None, step: Step, weights: Weights, chances: Tensor | None,
         measured: Measured) -> Told:
    """
    :param families: before the step; ``None`` at the first.
    :param before: the weights before the step, of the sequences that run on.
    :param chances: ``(n, N)`` by which the step's ancestors were drawn; those weights when omitted.
    """
    if families is None:
        families = Families.first(*weights.log.shape, weights.log.device)
    else:
        families = families.resampled(step.ancestors, before.normalised if chances is None else chances)
    return Told(families, {name: moments_of(weights.normalised, value, spread)
                           for name, (value, spread) in measured(step).items()})


class Record:
    """Evidence, effective sample sizes, families, moments and final states of a run; with ``history``, every step.

    Steps are handed over in packed order, and asked for in the user's.
    """

    def __init__(self, packed: Packed, particles: int, measured: Measured = values_of, history: bool = False):
        self.packed, self.particles, self.measured, self.history = packed, particles, measured, history
        self.smooths_by_ancestors = self.reads_steps = history
        self.factors, self.ess_found, self.largest_found = Kept(packed), Kept(packed), Kept(packed)
        self.families: Families | None = None
        self.errors: list[Tensor] = []
        self.means: dict[str, Kept] = defaultdict(partial(Kept, packed))
        self.variances: dict[str, Kept] = defaultdict(partial(Kept, packed))
        self.steps: list[Step] = []
        self.ended: list[tuple[State, Tensor]] = []
        self.last: tuple[State, Weights] | None = None

    def add(self, step: Step, weights: Weights, factor: Tensor, chances: Tensor | None = None, told: Told | None = None
            ) -> None:
        """
        :param factor: ``(n,)`` log of the step's factor of the evidence.
        :param chances: ``(n, N)`` by which the step's ancestors were drawn; by the weights when omitted.
        :param told: what is told of the step, where that has been computed.
        """
        n = factor.shape[0]
        self.set_aside(n)
        if told is None:
            before = None if self.last is None else self.last[1].first(n)
            told = tell(self.families, before, step, weights, chances, self.measured)
        self.families, self.last = told.families, (step.state, weights)
        self.keep(factor, weights.ess, weights.largest, told.moments)
        if self.history:
            self.steps.append(step)

    def keep(self, factor: Tensor, ess: Tensor, largest: Tensor, moments: dict[str, tuple[Tensor, Tensor]]) -> None:
        """What is said of each step, ``(n, ...)``."""
        self.factors.append(factor)
        self.ess_found.append(ess)
        self.largest_found.append(largest)
        for name, (mean, variance) in moments.items():
            self.means[name].append(mean)
            self.variances[name].append(variance)

    def finish(self) -> None:
        self.set_aside(0)

    def evidence(self) -> Tensor:
        """``(B, T)`` log of each step's factor of the evidence; zero past a sequence's end."""
        return self.factors.padded()

    def standard_error(self) -> Tensor:
        """``(B,)`` of the log evidence, NaN where one run cannot tell."""
        return self.packed.unsort(torch.cat(self.errors[::-1]))

    def ess(self) -> Tensor:
        """``(B, T)``"""
        return self.ess_found.padded()

    def largest(self) -> Tensor:
        """``(B, T)`` the largest share of the weight that one particle has."""
        return self.largest_found.padded()

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By site, the mean and variance ``(B, T, ...)`` of what each time's weighted particles say of it."""
        return {name: (mean.padded(), self.variances[name].padded()) for name, mean in self.means.items()}

    def smoothed(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By site, the mean and variance ``(B, T, ...)`` given all of the data: here over the ancestors of the last particles,
        with ``history``."""
        if not self.lineage:
            return {}
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for step, weights in zip(self.steps, self.lineage, strict=True):
            for name, (value, _) in values_of(step).items():
                found.setdefault(name, []).append(moments_of(weights, value))
        return {name: tuple(self.padded(list(part)) for part in zip(*moments, strict=True)) for name, moments in found.items()}

    @cached_property
    def lineage(self) -> list[Tensor]:
        """With ``history``, ``(n, N)`` of each step: the weight of the last particles that descend from each particle. Empty
        without, and where a transport has mixed the particles."""
        if any(step.ancestors is not None and step.ancestors.is_floating_point() for step in self.steps):
            return []
        found: list[Tensor] = []
        last = self.final_weights() if self.steps else None
        for t in reversed(range(len(self.steps))):
            later = found[-1] if found else last[:0]
            if found and (ancestors := self.steps[t + 1].ancestors) is not None:
                later = torch.zeros_like(later).scatter_add_(1, ancestors, later)
            found.append(torch.cat([later, last[len(later):self.packed.counts[t]]]))
        return found[::-1]

    def distinct(self) -> Tensor:
        """``(B, T)`` of each time's particles, how many have descendants among the last; needs ``history``."""
        return self.padded([(weights > 0).sum(-1) for weights in self.lineage])

    def padded(self, found: list[Tensor]) -> Tensor:
        """``(B, T, ...)`` in the user's order of each step's ``(n, ...)``."""
        return pad_rows(found, self.packed.counts, self.packed)

    def set_aside(self, running: int) -> None:
        """Keep the particles of the sequences that end here."""
        if self.last is not None and running < self.last[1].log.shape[0]:
            state, weights = self.last[0], self.last[1].normalised[running:]
            rows = slice(running * self.particles, None)
            self.ended.insert(0, (map_state(lambda leaf: leaf[rows], state), weights))
            self.errors.append(self.families.standard_error(weights, slice(running, None)))

    def final_weights(self) -> Tensor:
        """``(B, N)`` in packed order."""
        return torch.cat([weights for _, weights in self.ended])

    def final_state(self, share: Tensor) -> Any:
        """A sampler of the final state of each sequence, over all runs. ``share`` is each run's part, ``(R, B)``."""
        states = map_state(lambda *parts: torch.cat(parts), *(state for state, _ in self.ended))
        weights = self.packed.unsort(self.final_weights())
        states = map_state(lambda leaf: self.packed.unsort(leaf.reshape(*weights.shape, *leaf.shape[1:])), states)
        runs, batch = share.shape
        pooled = (weights.reshape(runs, batch, -1) * share[..., None]).transpose(0, 1).reshape(batch, -1)

        def sample(num_samples: int) -> State:
            index = torch.multinomial(pooled.double(), num_samples, replacement=True)
            run, particle = index // self.particles, index % self.particles
            row = run * batch + torch.arange(batch, device=index.device)[:, None]
            return map_state(lambda leaf: leaf[row, particle].reshape(batch * num_samples, *leaf.shape[2:]), states)

        return sample

    def trajectories(self, num_samples: int) -> dict[str, Tensor]:
        """By site, draws of latent paths ``(S, B, T, ...)``: here by tracing the ancestors back, with ``history``."""
        if not self.lineage:
            raise ValueError("the particles were mixed by a transport, and have no ancestors to trace: use a resampling by "
                             "ancestors, such as 'systematic'")
        paths: dict[str, list[Tensor]] = {}
        for step, index in self.backwards(num_samples, _ancestors):
            take_down(paths, step, index)
        return self.as_samples(paths, num_samples)

    def backwards(self, num_paths: int, origins: Origins) -> Iterator[tuple[Step, Tensor]]:
        """From the last step to the first, with the particles ``(n, num_paths)`` that paths go through: they begin at the end
        of each sequence, at a particle drawn by its weight, and come from where ``origins`` says."""
        last = self.final_weights()
        index = torch.empty(0, num_paths, dtype=torch.long, device=last.device)
        for t in reversed(range(len(self.steps))):
            if len(index):
                index = origins(self.steps[t], self.steps[t + 1], index)
            if len(fresh := last[len(index):self.packed.counts[t]]):
                index = torch.cat([index, torch.multinomial(fresh.double(), num_paths, replacement=True)])
            yield self.steps[t], index

    def as_samples(self, paths: dict[str, list[Tensor]], num_paths: int) -> dict[str, Tensor]:
        """``(S, B, T, ...)`` in the user's order, of what was taken down on the way back."""
        padded = {name: pad_rows(values[::-1], self.packed.counts, self.packed, num_paths) for name, values in paths.items()}
        return {name: value[None] if num_paths == 1 else value.movedim(2, 0) for name, value in padded.items()}

    def quantile(self, site: str, q: float | list[float]) -> Tensor:
        like = self.last[1].log
        levels = torch.as_tensor(q, dtype=like.dtype, device=like.device)
        found = []
        for step in self.steps:
            count = step.log_weights.shape[0]
            value, spread = self.measured(step)[site]
            value = value.reshape(count, self.particles, *value.shape[1:])
            if spread is None:
                per = [torch.stack([weighed_quantile(v.to(levels), level.reshape(1), w, dim=0)[0]
                                    for level in levels.reshape(-1)]) for v, w in zip(value, step.log_weights, strict=True)]
            else:
                weights, scale = step.log_weights.softmax(-1), spread.reshape(value.shape).sqrt()
                per = [_mixture_quantile(w, m, s, levels) for w, m, s in zip(weights, value, scale, strict=True)]
            found.append(torch.stack(per))
        out = pad_rows(found, self.packed.counts, self.packed).movedim(2, 0)
        return out[0] if levels.dim() == 0 else out


def _ancestors(before: Step, after: Step, index: Tensor) -> Tensor:
    return index if after.ancestors is None else after.ancestors.gather(1, index)


def take_down(paths: dict[str, list[Tensor]], step: Step, index: Tensor) -> None:
    """Add to ``paths`` the latents of a step's particles ``(n, M)``, as rows."""
    row = torch.arange(len(index), device=index.device)[:, None]
    for name, (value, _) in values_of(step).items():
        value = value.unflatten(0, step.log_weights.shape)
        paths.setdefault(name, []).append(value[row, index].flatten(0, 1))


def moments_of(weights: Tensor, value: Tensor, spread: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(n, ...)`` mean and variance of values ``(n * N, ...)`` under ``(n, N)`` weights."""
    shape = (weights.shape[0], *value.shape[1:])
    value = value.reshape(*weights.shape, -1)
    value = value if value.is_floating_point() else value.to(weights.dtype)
    chances = weights[:, None].to(value.dtype)
    mean = torch.bmm(chances, value)
    variance = torch.bmm(chances, (value - mean).square_())
    if spread is not None:
        variance = variance + torch.bmm(chances, spread.reshape(value.shape))
    return mean.reshape(shape).to(weights.dtype), variance.reshape(shape).to(weights.dtype)


def _mixture_quantile(weights: Tensor, means: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """``(Q, ...)`` quantiles of a mixture of ``N`` Gaussians ``(N, ...)``, by bisection."""
    levels = levels.reshape(-1, *(1,) * (means.dim() - 1))
    low, high = (means - 40 * scales).amin(0), (means + 40 * scales).amax(0)
    low, high = low.expand(levels.shape[0], *low.shape), high.expand(levels.shape[0], *high.shape)
    for _ in range(64):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - means) / scales.clamp(min=torch.finfo(scales.dtype).tiny))
        share = torch.einsum("n,qn...->q...", weights.to(below), below)
        low, high = torch.where(share < levels, middle, low), torch.where(share < levels, high, middle)
    return ((low + high) / 2).to(levels)
