"""Where a particle may have come from: the backward kernel that backward sampling and PaRIS share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.gaussian import innermost
from pyro_seq.engine.loop import Checked, Step
from pyro_seq.engine.missing import score_entries
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.model import StateSpaceModel
from pyro_seq.sequences import Frame

__all__ = ["BackwardKernel", "require_backward"]

_ROWS = 2**18
"""Pairs of particles that are scored at once."""
_MODES = {"Normal", "MultivariateNormal", "StudentT", "Laplace", "Cauchy", "LogNormal", "HalfNormal", "HalfCauchy", "Gamma",
          "Exponential", "Categorical", "OneHotCategorical", "Bernoulli", "VonMises"}
"""Distributions whose density is largest at what torch calls their mode."""
_METHODS = ("exact", "rejection")
_ELSE = "use FixedLagSmoother, or ParticleFilter(history=True), which smooth any model"


class BackwardKernel:
    r"""Draws of ancestors from :math:`p(j \mid z_t, x_{1:t-1}) \propto W_{t-1}^j \, p(z_t \mid h_{t-1}^j)`.

    The density is that of the declared step, run from the state of particle j with the latents given. For a state-space model
    whose emission reads the state alone that of the data cancels, and the emission is not run.

    :param model: a declared model, entered.
    :param str method: ``'exact'`` scores all ``N`` particles for each draw; ``'rejection'`` proposes a particle by its weight
        times the largest density it can have and accepts it with its density over that, and turns to the exact draw after ``N``
        proposals.
    """

    def __init__(self, model: Any, method: str):
        self.model, self.method = model, method
        self.checks = Checked(later=False)
        self.emission_cancels = isinstance(model, StateSpaceModel) and type(model).apply is StateSpaceModel.apply

    def check(self, after: Step) -> None:
        """Raise unless the state that a step leaves is the same whatever state it came from, its latents and data given."""
        n, particles = after.log_weights.shape
        shift = max(1, particles // 2)
        moved = map_state(lambda leaf: leaf.unflatten(0, (n, particles)).roll(shift, 1).flatten(0, 1), after.before)
        found, state = self._run(moved, after.frame, _given(self.model, after))
        for ours, theirs in zip(leaves(state), leaves(after.state), strict=True):
            if not torch.allclose(ours.to(torch.float64), theirs.to(torch.float64), equal_nan=True):
                raise ValueError(
                    f"the state of {type(self.model).__name__} after a step is not determined by the step's latents and data "
                    f"(at time {after.frame.t} another state before gives another state after): it carries more of the past, "
                    f"and there is no p(z_t | z_t-1) to draw backwards by; {_ELSE}")
        if self.method == "rejection":
            if not self.emission_cancels:
                raise ValueError("method='rejection' needs the largest density of a step, which is known for a "
                                 f"StateSpaceModel; {type(self.model).__name__} is none: use method='exact'")
            if len(found) > 1:
                raise ValueError(f"method='rejection' takes one latent site a step; {type(self.model).__name__} has "
                                 f"{list(found)}: use method='exact'")

    def draw(self, before: Step, after: Step, chosen: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
        """Draw where particles came from.

        :param chosen: ``(n, M)`` particles of ``after``.
        :param count: draws for each, independent given the particles.
        :returns: ``(n, M, count)`` particles of ``before``; and ``(n, N)``, the average chance of each (its share of the draws,
            where the chances are not known).
        """
        n, particles = after.log_weights.shape
        sequence = torch.arange(n, device=chosen.device).repeat_interleave(chosen.shape[1])
        particle = chosen.reshape(-1)
        if self.method == "exact":
            found, weights = self._draw_exactly(before, after, sequence, particle, count)
            return found.reshape(*chosen.shape, count), weights / chosen.shape[1]
        sequence, particle = sequence.repeat_interleave(count), particle.repeat_interleave(count)
        found = torch.full_like(particle, -1)
        left = self._reject(before, after, sequence, particle, found)
        if len(left):
            found[left] = self._draw_exactly(before, after, sequence[left], particle[left], 1)[0][:, 0]
        found = found.reshape(n, -1)
        ones = torch.ones_like(found, dtype=after.log_weights.dtype)
        shares = torch.zeros_like(after.log_weights).scatter_add_(1, found, ones)
        return found.reshape(*chosen.shape, count), shares / found.shape[1]

    def _draw_exactly(self, before: Step, after: Step, sequence: Tensor, particle: Tensor, count: int
                      ) -> tuple[Tensor, Tensor]:
        """``(P, count)`` draws for ``P`` particles of ``after``; and ``(n, N)``, the sum of their chances."""
        particles = after.log_weights.shape[1]
        total, found = torch.zeros_like(after.log_weights), []
        for row, to in zip(*(value.split(max(1, _ROWS // particles)) for value in (sequence, particle)), strict=True):
            every = torch.arange(particles, device=row.device).repeat(len(row))
            density = self._score(before, after, row.repeat_interleave(particles), to.repeat_interleave(particles), every)
            chances = (before.log_weights[row] + density.reshape(len(row), particles)).softmax(-1)
            found.append(torch.multinomial(chances, count, replacement=True))
            total.index_add_(0, row, chances)
        return torch.cat(found), total

    def _reject(self, before: Step, after: Step, sequence: Tensor, particle: Tensor, found: Tensor) -> Tensor:
        """Fill in ``found`` what is accepted; returns where nothing was."""
        n, particles = after.log_weights.shape
        highest = self._highest(before, after).reshape(n, particles)
        edges = (before.log_weights[:n] + highest).double().softmax(-1).cumsum(-1)
        edges = (edges / edges[:, -1:] + torch.arange(n, device=edges.device)[:, None]).reshape(-1)
        left, tried = torch.arange(len(particle), device=particle.device), 0
        while len(left) and tried < particles:
            count = max(1, min(particles - tried, len(particle) // len(left)))
            tried += count
            row = sequence[left].repeat_interleave(count)
            uniform = torch.rand(len(row), dtype=edges.dtype, device=edges.device)
            at = torch.searchsorted(edges, row + uniform).clamp(min=row * particles, max=row * particles + particles - 1)
            ratio = torch.cat([
                self._score(before, after, r, p, a - r * particles) for r, p, a in
                zip(row.split(_ROWS), particle[left].repeat_interleave(count).split(_ROWS), at.split(_ROWS), strict=True)])
            ratio = ratio - highest.reshape(-1)[at]
            taken = (torch.rand_like(ratio).log() < ratio).reshape(len(left), count)
            first = taken.to(torch.uint8).argmax(-1, keepdim=True)
            some = taken.any(-1)
            found[left[some]] = (at - row * particles).reshape(len(left), count).gather(1, first)[some, 0]
            left = left[~some]
        return left

    def _score(self, before: Step, after: Step, sequence: Tensor, to: Tensor, come: Tensor) -> Tensor:
        """``(P,)`` log density of the step from particle ``come`` to particle ``to``, of each ``sequence``, ``(P,)`` each."""
        particles = after.log_weights.shape[1]
        source, target = sequence * particles + come, sequence * particles + to
        state = map_state(lambda leaf: leaf[source], before.state)
        values = {name: value[target] for name, value in _given(self.model, after).items()}
        frame = after.frame._replace(x={}, observed={}) if self.emission_cancels else after.frame
        sites, _ = self._run(state, _rows(frame, target), values)
        return sum(site.log_p() + _log_gaps(site, self.model) for site in sites.values())

    def _highest(self, before: Step, after: Step) -> Tensor:
        """``(n * N,)`` the largest log density of the step from each particle."""
        rows = after.frame.rows
        state = map_state(lambda leaf: leaf[:rows], before.state)
        sites, _ = self._run(state, after.frame, _given(self.model, after))
        site, = sites.values()
        base = innermost(site.p)
        if type(base).__name__ not in _MODES:
            raise ValueError(f"site {site.name!r}: the largest density of {type(base).__name__} is not known, which rejection "
                             "needs: use method='exact'")
        highest = site._replace(value=base.mode.nan_to_num()).log_p()  # of a fair coin torch gives none: take one
        if not highest.isfinite().all():
            raise ValueError(f"site {site.name!r}: the density of {type(base).__name__} at time {after.frame.t} has no upper "
                             "bound, which rejection needs: use method='exact'")
        return highest

    def _run(self, state: State, frame: Frame, values: dict[str, Tensor]) -> tuple[dict[str, Site], State]:
        with self.checks:
            if self.emission_cancels:
                return self.model.draw_latents(state, frame, lambda name, prior: (None, values[name]), 0, False)
            with StepSites(frame, values=values, impute=self.model.missing_feeds_state) as step:
                after = self.model.apply(state, frame)
            return step.sites, after


def _given(model: Any, step: Step) -> dict[str, Tensor]:
    """What a step has drawn: its latents, and the gaps in the data that its state reads."""
    return {name: site.value for name, site in step.sites.items()
            if not site.observed or model.missing_feeds_state and site.present is not None}


def _log_gaps(site: Site, model: Any) -> Tensor | float:
    if site.present is None or not model.missing_feeds_state:
        return 0.0
    return score_entries(site.p, site.value, ~site.present, site.name)


def _rows(frame: Frame, index: Tensor) -> Frame:
    """A frame of some rows of another."""
    def some(values: Any) -> dict[str, Tensor]:
        return {name: value[index] for name, value in values.items()}

    return frame._replace(rows=len(index), x=some(frame.x), covariates=some(frame.covariates), observed=some(frame.observed),
                          sequence=frame.sequence[index])


def require_backward(model: Any, method: str, who: str) -> None:
    """Raise for a model whose state grows, and for a method that there is not."""
    if method not in _METHODS:
        raise ValueError(f"method={method!r}; it is one of {_METHODS}")
    if model.state_grows:
        raise TypeError(f"a model from seq.from_pyro has no Markov state, which {who} draws backwards by: declare it as a "
                        f"StateSpaceModel, or {_ELSE}")
