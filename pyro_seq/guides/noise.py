"""Guides that propose the standard normal noise of Gaussian latents."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal, TransformedDistribution
from torch import Tensor
from torch.distributions import Distribution, ReshapeTransform

from pyro_seq.engine.gaussian import root
from pyro_seq.engine.noise import Layout, NoisySites
from pyro_seq.engine.sites import LatentsDrawn, Proposal, PyroSites, StepSites
from pyro_seq.engine.state import State
from pyro_seq.guide import DrawnSites, SequentialGuide
from pyro_seq.sequences import Frame, Sequences

__all__ = ["NoiseGuide"]


class NoiseGuide(SequentialGuide):
    """A guide of latents that are Gaussian given the state, ``mean + root @ noise``: a Gaussian of that noise is proposed."""

    def prepare_rows(self, sequences: Sequences) -> Any:
        frame = sequences.frame(1)
        self.__dict__["_layout"] = Layout.of(self.model, self.model.begin(frame), frame)

    def stream_rows(self, sequences: Sequences, carry: State) -> tuple[None, None]:
        if "_layout" not in self.__dict__:
            self.prepare_rows(sequences)
        return None, None

    @abstractmethod
    def noise(self, state: State, frame: Frame, encoding: Any) -> tuple[Tensor, Tensor, Distribution]:
        """What is proposed, in float64: the mean ``(rows, Z)`` and a triangular root ``(rows, Z, Z)`` of the covariance of all
        latents' noise; and the prior of the first latent."""

    @property
    def layout(self) -> Layout:
        """The sites of the model's step, looked up as each run begins."""
        return self.__dict__["_layout"]

    def propose(self, state: State, frame: Frame, encoding: Any, emit: PyroSites | None = None) -> Proposal:
        noise, factor, prior = self.noise(state, frame, encoding)
        drawn: dict[str, tuple[Distribution, Tensor]] = {}
        before = noise.new_zeros(frame.rows, 0)
        for name, where in self.layout.columns().items():
            if name in self.layout.observed:
                break
            if drawn:
                prior = self.prior(state, frame, name, {k: value for k, (_, value) in drawn.items()})
            # Given what has been drawn of the noise already.
            mean = noise[:, where] + (factor[:, where, :where.start] @ before[..., None])[..., 0]
            spread, dtype = root(prior), prior.mean.dtype
            loc = prior.mean.reshape(frame.rows, -1) + (spread @ mean.to(dtype)[..., None])[..., 0]
            tril = spread @ factor[:, where, where].to(dtype)
            with StepSites(frame) if emit is None else emit as sites:
                value = pyro.sample(name, _gaussian(loc, tril, prior.event_shape))
            drawn[name] = (sites.sites[name].p, value) if emit is None else sites.drawn[name]
            if len(self.layout.latents) > 1:
                apart = (value.reshape(frame.rows, -1) - loc)[..., None]
                before = torch.cat([before, torch.linalg.solve_triangular(tril, apart, upper=False)[..., 0].double()], -1)
        return DrawnSites(type(self).__name__, drawn)

    def prior(self, state: State, frame: Frame, name: str, values: dict[str, Tensor]) -> Distribution:
        """The model's distribution of a latent, given the ones before it."""
        zero = torch.zeros(frame.rows, self.layout.latent_width + self.layout.data_width, device=frame.device)
        with suppress(LatentsDrawn), self.sites(frame, zero, values, len(values) + 1) as sites:
            self.model.apply(state, frame)
        return sites.sites[name].p

    def sites(self, frame: Frame, noise: Tensor, values: dict[str, Tensor] | None = None, stop_after: int | None = None
               ) -> NoisySites:
        where = f"{type(self.model).__name__} at time {frame.t}"
        return NoisySites(frame, self.layout.noise(noise, where), False, values, stop_after)


def _gaussian(loc: Tensor, tril: Tensor, shape: torch.Size) -> Distribution:
    """A Gaussian over the entries of an event of any shape."""
    if not shape:
        return Normal(loc[:, 0], tril[:, 0, 0])
    joint = MultivariateNormal(loc, scale_tril=tril)
    return joint if len(shape) == 1 else TransformedDistribution(joint, [ReshapeTransform(loc.shape[-1:], shape)])
