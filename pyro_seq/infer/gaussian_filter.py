"""Filtering and smoothing of a declared step with a Gaussian for the state: one recursion, any Gaussian transform.

With v = (state, noise), w = (state, latents) and m the mean of the data given them, each step

    transforms    v -> (v, w, m)        into a joint Gaussian: by linearisation, by sigma points
    conditions    w on the frame        m has the noise of the emission on top
    transforms    w -> next state       unless the next state is made of latents

and the Rauch-Tung-Striebel smoother goes back through the covariance of w and the next state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.gaussian import condition, semidefinite_inverse, symmetric
from pyro_seq.engine.noise import Layout, NoisyStep, unflatten_state
from pyro_seq.engine.state import State
from pyro_seq.infer.declared_filter import DeclaredFilter, at_the_ends, refuse, told
from pyro_seq.sequences import Packed

__all__ = ["GaussianFilter", "Joint", "Outputs"]

Outputs = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From points ``(n, k, V)`` to outputs ``(n, k, O)`` and the covariance ``(n, k, D, D)`` of further noise."""


class Joint(NamedTuple):
    """A joint Gaussian of inputs and outputs."""

    mean: Tensor
    """``(n, V + O)``"""
    covariance: Tensor
    """``(n, V + O, V + O)``"""
    noise: Tensor | None
    """``(n, D, D)`` covariance of further noise."""


class GaussianFilter(DeclaredFilter):
    """The recursion; subclasses have a :meth:`transform`."""

    iterations = 1

    def transform(self, step: NoisyStep, fn: Outputs, mean: Tensor, covariance: Tensor, about: Tensor) -> Joint:
        """Approximate the joint distribution of a Gaussian and a function of it.

        :param about: ``(n, V)`` the point to linearise about, for those that do.
        """
        raise TypeError(f"{type(self).__name__} does not define transform")

    def _begin(self, state: Tensor, packed: Packed, layout: Layout) -> _Moments:
        return _Moments(packed, layout, state)

    def _step(self, step: NoisyStep, passes: _Moments) -> State:
        n, s, z = step.frame.rows, step.state_width, step.layout.latent_width
        mean, covariance = passes.state_mean[:n], passes.state_covariance[:n]
        v, spread = self._with_noise(step, mean, covariance)
        ran = None

        def run(points: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal ran
            ran = step(points)
            return torch.cat([ran.latents, ran.filled, ran.mean], -1), ran.covariance

        about = v
        for _ in range(self.iterations):
            joint = self.transform(step, run, v, spread, about)
            found = condition(joint.mean, joint.covariance, joint.noise, ran.value, ran.present)
            about = found.mean[:, :v.shape[-1]]
        sites = ", ".join(repr(name) for name in step.layout.observed)
        refuse(found.failed | ~found.log_density.isfinite(), step, f"the predictive covariance of site {sites}",
               "give the emission a positive scale, and look for a state that has diverged")
        width, variance = v.shape[-1], joint.covariance.diagonal(dim1=-2, dim2=-1)
        data = variance[:, -ran.mean.shape[-1]:] + (0.0 if joint.noise is None else joint.noise.diagonal(dim1=-2, dim2=-1))
        passes.told = told(passes.told, found.gain[:, width:width + z], variance[:, width:width + z], data, ran.present)
        keep = torch.cat([torch.arange(s), v.shape[-1] + torch.arange(z + step.filled_width)]).to(v.device)
        w, w_covariance = found.mean[:, keep], found.covariance[:, keep[:, None], keep]
        if self.model.markov_history == 1 and s:
            w, w_covariance = _through_latents(joint.mean[:, keep], joint.covariance[:, keep[:, None], keep], w, w_covariance,
                                               slice(s, s + z))
        where = step.selected(ran)
        if where is not None:
            moments = w[:, where], w_covariance[:, where[:, None], where], w_covariance[:, :, where]
        else:
            joint = self.transform(step, lambda points: (step.next_state(points), None), w, w_covariance, w)
            width = w.shape[-1]
            moments = (joint.mean[:, width:], symmetric(joint.covariance[:, width:, width:]),
                       joint.covariance[:, :width, width:])
        passes.evidences.append(found.log_density)
        passes.steps.append(_Step(w, w_covariance, *moments, s))
        return ran.after

    def _with_noise(self, step: NoisyStep, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of (state, noise); entries that are there, and so need no noise, have none."""
        n, extra = len(mean), step.noise_width
        variance = mean.new_ones(n, extra)
        if step.gaps:
            at = torch.cat([mean, mean.new_zeros(n, extra)], -1)
            variance[:, step.layout.latent_width:] = (~step(at[:, None]).present).to(variance.dtype)
        spread = mean.new_zeros(n, mean.shape[-1] + extra, mean.shape[-1] + extra)
        spread[:, mean.shape[-1]:, mean.shape[-1]:] = torch.diag_embed(variance)
        spread = spread + torch.nn.functional.pad(covariance, (0, extra, 0, extra))
        return torch.cat([mean, mean.new_zeros(n, extra)], -1), spread


def _through_latents(mean: Tensor, covariance: Tensor, after: Tensor, covariance_after: Tensor, latents: slice
                     ) -> tuple[Tensor, Tensor]:
    """What a frame says of w = (state, latents, ...) where it tells of the state by the latents alone: a state-space model.

    A transform that is not linear does not know of this independence. With it the backward pass is that of Särkkä (2008).
    """
    s = latents.start
    gain = covariance[:, :s, latents] @ semidefinite_inverse(covariance[:, latents, latents])
    change = covariance_after[:, latents, latents] - covariance[:, latents, latents]
    state = mean[:, :s] + (gain @ (after - mean)[:, latents, None])[..., 0]
    cross = gain @ covariance_after[:, latents, s:]
    spread = covariance[:, :s, :s] + gain @ change @ gain.mT
    rows = torch.cat([torch.cat([symmetric(spread), cross], -1), torch.cat([cross.mT, covariance_after[:, s:, s:]], -1)], 1)
    return torch.cat([state, after[:, s:]], -1), rows


class _Step(NamedTuple):
    """Moments after one step."""

    mean: Tensor
    """``(n, W)`` of w = (state before, latents, gaps that the state reads) given the data so far."""
    covariance: Tensor
    next_mean: Tensor
    """``(n, S)`` of the next state given the same data."""
    next_covariance: Tensor
    cross: Tensor
    """``(n, W, S)`` covariance of w and the next state."""
    state_width: int

    def given_next(self, n: int) -> Tensor:
        """``(n, W, S)``: the smoother's gain, of the first ``n`` rows."""
        return self.cross[:n] @ semidefinite_inverse(self.next_covariance[:n])


class _Moments:
    """The steps of a Gaussian filter, and the backward passes through them."""

    def __init__(self, packed: Packed, layout: Layout, state: Tensor):
        self.packed, self.layout, self.state = packed, layout, state
        self.evidences: list[Tensor] = []
        self.steps: list[_Step] = []
        self.like: State = None
        self.told: Tensor | None = None

    @property
    def state_mean(self) -> Tensor:
        return self.steps[-1].next_mean if self.steps else self.state

    @property
    def state_covariance(self) -> Tensor:
        width = self.state.shape[-1]
        return self.steps[-1].next_covariance if self.steps else self.state.new_zeros(len(self.state), width, width)

    def filtered(self) -> list[tuple[Tensor, Tensor]]:
        return [self._latents(step, step.mean, step.covariance) for step in self.steps]

    def smoothed(self) -> list[tuple[Tensor, Tensor]]:
        found, after = [], None
        for step in reversed(self.steps):
            mean, covariance = step.mean, step.covariance
            if after is not None:
                later_mean, later_covariance = after
                n = len(later_mean)
                gain = step.given_next(n)
                moved = mean[:n] + (gain @ (later_mean - step.next_mean[:n])[..., None])[..., 0]
                changed = covariance[:n] + gain @ (later_covariance - step.next_covariance[:n]) @ gain.mT
                mean, covariance = torch.cat([moved, mean[n:]]), torch.cat([symmetric(changed), covariance[n:]])
            found.append(self._latents(step, mean, covariance))
            s = step.state_width
            after = mean[:, :s], covariance[:, :s, :s]
        return found[::-1]

    def paths(self, num_samples: int) -> list[Tensor]:
        found: list[Tensor] = []
        after: Tensor | None = None
        for step in reversed(self.steps):
            mean, covariance = step.mean[:, None].expand(-1, num_samples, -1), step.covariance
            if after is not None:
                n = len(after)
                gain = step.given_next(n)
                moved = mean[:n] + (after - step.next_mean[:n, None]) @ gain.mT
                left = symmetric(covariance[:n] - gain @ step.cross[:n].mT)
                mean, covariance = torch.cat([moved, mean[n:]]), torch.cat([left, covariance[n:]])
            drawn = _draw(mean, covariance)
            after = drawn[..., :step.state_width]
            found.append(drawn[..., step.state_width:step.state_width + self.layout.latent_width])
        return found[::-1]

    def final_state(self, num_samples: int) -> State:
        mean = at_the_ends([step.next_mean for step in self.steps], self.packed)
        covariance = at_the_ends([step.next_covariance for step in self.steps], self.packed)
        return unflatten_state(_draw(mean[:, None].expand(-1, num_samples, -1), covariance).flatten(0, 1), self.like)

    def _latents(self, step: _Step, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        where = slice(step.state_width, step.state_width + self.layout.latent_width)
        return mean[:, where], covariance.diagonal(dim1=-2, dim2=-1)[:, where]


def _draw(mean: Tensor, covariance: Tensor) -> Tensor:
    """Draws with the ``(n, k, W)`` means and the ``(n, W, W)`` covariances."""
    values, vectors = torch.linalg.eigh(covariance)
    spread = vectors * values.clamp(min=0).sqrt()[:, None]
    return mean + torch.randn(mean.shape, dtype=mean.dtype, device=mean.device) @ spread.mT
