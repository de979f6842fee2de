"""Twisted transitions: the prior of Gaussian latents, tilted towards what the data to come makes likely."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.gaussian import root
from pyro_seq.engine.jacobian import jacobian
from pyro_seq.engine.sites import LatentsDrawn
from pyro_seq.engine.state import State, map_state
from pyro_seq.guides.noise import NoiseGuide
from pyro_seq.sequences import Frame, Sequences

__all__ = ["Joint", "Twist", "TwistedGuide"]


class Twist(NamedTuple):
    r"""A function of the latents :math:`\psi(z) = \exp(-\tfrac12 (z-c)' A (z-c) + b'(z-c))`, for each row; in float64."""

    center: Tensor
    """``(rows, Z)`` c."""
    curvature: Tensor
    """``(rows, Z, Z)`` A, positive semidefinite."""
    slope: Tensor
    """``(rows, Z)`` b."""

    def tilt(self, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""A Gaussian ``mean + spread @ noise`` times :math:`\psi`.

        :param mean: ``(rows, Z)``
        :param spread: ``(rows, Z, Z)``
        :returns: of the noise under the normalised product, the mean ``(rows, Z)`` and a triangular root ``(rows, Z, Z)`` of
            the covariance; and ``(rows,)`` the log of the normalising constant, the expectation of :math:`\psi`.
        """
        apart = mean - self.center
        curved = (self.curvature @ apart[..., None])[..., 0]
        identity = torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device).expand_as(spread)
        precision = identity + spread.mT @ self.curvature @ spread
        if spread.shape[-1] == 1:
            root = precision.rsqrt()
        else:  # Cholesky's factor of the precision with its axes reversed: the inverse is the factor of the covariance
            factor = torch.linalg.cholesky(precision.flip((-2, -1)))
            root = torch.linalg.solve_triangular(factor, identity, upper=False).mT.flip((-2, -1))
        pull = root.mT @ spread.mT @ (self.slope - curved)[..., None]
        exponent = ((self.slope - 0.5 * curved) * apart).sum(-1) + 0.5 * pull.square().sum((-2, -1))
        return (root @ pull)[..., 0], root, exponent + root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class TwistedGuide(NoiseGuide):
    r"""Proposes from :math:`f(z_t \mid h_{t-1}) \, \psi_t(z_t) / \int f \psi_t`, and looks ahead by :math:`\log \int f \psi_t`.

    Where :math:`\psi_t(z_t) = p(x_{t:T} \mid z_t)` that is the smoothing distribution.

    :param model: a declared model of Gaussian latents.
    :param twists: ``(B, T, ...)``, for each sequence and time.

    Source: Guarniero, Johansen and Lee, *The iterated auxiliary particle filter*, 2017.
    """

    def __init__(self, model: Any, twists: Twist):
        super().__init__(model)
        self.__dict__["_twists"] = twists

    def prepare_rows(self, sequences: Sequences) -> Twist:
        super().prepare_rows(sequences)
        twists: Twist = self.__dict__["_twists"]
        times = sequences.num_sequences // len(twists.center)
        return map_state(lambda leaf: leaf.repeat(times, *(1,) * (leaf.dim() - 1)), twists)

    def noise(self, state: State, frame: Frame, encoding: Twist) -> tuple[Tensor, Tensor, Distribution]:
        joint = self.joint(state, frame)
        mean, factor, _ = encoding.tilt(*joint.moments())
        return mean, factor, joint.first

    def look_ahead(self, state: State, frame: Frame, encoding: Twist) -> Tensor:
        return encoding.tilt(*self.joint(state, frame).moments())[-1]

    def joint(self, state: State, frame: Frame) -> Joint:
        """The model's distribution of the latents; those that read others are taken as linear in their noise."""
        zero = torch.zeros(frame.rows, self.layout.latent_width + self.layout.data_width, device=frame.device)
        width = self.layout.latent_width
        first: Distribution | None = None

        def run(noise: Tensor) -> Tensor:
            nonlocal first
            padded = torch.cat([noise, zero[:, width:].to(noise)], -1)
            with suppress(LatentsDrawn), self.sites(frame, padded, stop_after=len(self.layout.latents)) as sites:
                self.model.apply(state, frame)
            first = next(iter(sites.latents.values())).p
            return torch.cat([site.value.double().reshape(frame.rows, -1) for site in sites.latents.values()], -1)

        if len(self.layout.latents) == 1:
            run(zero[:, :width])
            return Joint(first)
        mean, slope = jacobian(run, zero[:, :width].double(), f"the step of {type(self.model).__name__}")
        return Joint(first, mean, slope)


class Joint(NamedTuple):
    """The latents of a step given the state."""

    first: Distribution
    """Of the first of them."""
    mean: Tensor | None = None
    """``(rows, Z)`` of all, where there are several, in float64."""
    spread: Tensor | None = None
    """``(rows, Z, Z)`` a root of their covariance."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """``(rows, Z)`` the mean and ``(rows, Z, Z)`` a root of the covariance, in float64."""
        if self.mean is not None:
            return self.mean, self.spread
        return self.first.mean.double().reshape(self.first.batch_shape[0], -1), root(self.first).double()
