"""Twisted transitions: the prior of Gaussian latents, tilted towards what the data to come makes likely."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.gaussian import root
from pyro_seq.engine.sites import LatentsDrawn
from pyro_seq.engine.state import State, map_state
from pyro_seq.guides.noise import NoiseGuide
from pyro_seq.sequences import Frame, Sequences

__all__ = ["Twist", "TwistedGuide", "prior_moments"]


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
        priors = self.priors(state, frame)
        mean, factor, _ = encoding.tilt(*prior_moments(priors))
        return mean, factor, priors[0]

    def look_ahead(self, state: State, frame: Frame, encoding: Twist) -> Tensor:
        return encoding.tilt(*prior_moments(self.priors(state, frame)))[-1]

    def priors(self, state: State, frame: Frame) -> list[Distribution]:
        """The model's distributions of the latents, those that read others given these at their means."""
        width = self.layout.latent_width + self.layout.data_width
        zero = torch.zeros(frame.rows, width, device=frame.device)
        with suppress(LatentsDrawn), self.sites(frame, zero, stop_after=len(self.layout.latents)) as sites:
            self.model.apply(state, frame)
        return [site.p for site in sites.latents.values()]


def prior_moments(priors: list[Distribution]) -> tuple[Tensor, Tensor]:
    """Of all latents of a step: the mean ``(rows, Z)`` and the root ``(rows, Z, Z)`` of the covariance, in float64."""
    rows = priors[0].batch_shape[0]
    means = torch.cat([prior.mean.double().reshape(rows, -1) for prior in priors], -1)
    roots = [root(prior).double() for prior in priors]
    if len(roots) == 1:
        return means, roots[0]
    spread, at = means.new_zeros(rows, means.shape[-1], means.shape[-1]), 0
    for part in roots:
        spread[:, at:at + part.shape[-1], at:at + part.shape[-1]] = part
        at += part.shape[-1]
    return means, spread
