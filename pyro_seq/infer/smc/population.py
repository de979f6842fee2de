"""The weighted particles of a batch of sequences, from one step to the next."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_seq.engine.loop import Step
from pyro_seq.engine.state import State
from pyro_seq.engine.weights import Weights
from pyro_seq.resampling import Resampler
from pyro_seq.sequences import Frame

__all__ = ["LookAhead", "Population", "Resampled", "as_foreseen", "require_threshold", "resample", "which"]

LookAhead = Callable[[Frame, State, Any], Tensor]
"""Given the frame to come, the states and the guide's encoding: log factors ``(rows,)`` by which to favour particles."""


class Population:
    r"""Weights and evidence of the particles, and what happens to them between steps.

    The factor of the evidence that a step contributes is the mean of the accumulated weights over what it was before:
    one where the particles were resampled, whose new weights have mean one in expectation.

    :param Resampler resampler: how to resample.
    :param float ess_threshold: when: below this share of the particles; 1: always.
    :param look_ahead: what favours particles when they are resampled.
    """

    def __init__(self, resampler: Resampler, ess_threshold: float, look_ahead: LookAhead | None = None):
        self.resampler, self.ess_threshold, self.look_ahead = resampler, ess_threshold, look_ahead
        self.weights: Weights | None = None
        self.base: Tensor | float = 0.0
        """``(n,)`` log mean weight with which the next step begins."""
        self.adapted = True
        """Whether each step's weights were what ``look_ahead`` said, whatever was drawn (to rounding)."""
        self.foreseen: Tensor | float = 0.0
        """``(n, N)`` the weights after the step, if they are what ``look_ahead`` said."""
        self.chosen: Tensor | None = None
        """``(n,)`` which sequences were resampled before the last step."""
        self.chances: Tensor | None = None
        """``(n, N)`` by which their ancestors were drawn; ``None`` where these are the weights."""

    def between(self, frame: Frame, state: State, encoding: Any, log_weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """Resample the sequences that need it: the engine's :data:`~pyro_seq.engine.loop.Between`."""
        weights = self.weights.first(len(log_weights))
        looked = self.looked(frame, state, encoding, weights.log)
        self.chosen = self.choose(weights, looked)
        found = resample(self.resampler, weights, looked, state, self.chosen, which(self.chosen))
        self.base, self.chances = found.base, found.chances
        if looked is not None:
            self.foreseen = found.foreseen(looked)
        return found.plan, found.log_weights

    def looked(self, frame: Frame, state: State, encoding: Any, log_weights: Tensor) -> Tensor | None:
        """``(n, N)`` log factors by which to favour particles, if there are any."""
        return None if self.look_ahead is None else self._favoured(frame, state, encoding, log_weights)

    def choose(self, weights: Weights, looked: Tensor | None = None) -> Tensor:
        """``(n,)`` booleans: which sequences to resample."""
        ess = weights.ess if looked is None else Weights.of(weights.log + looked).ess
        return torch.ones_like(ess, dtype=torch.bool) if self.ess_threshold == 1.0 else (
            ess < self.ess_threshold * weights.log.shape[-1])

    def _favoured(self, frame: Frame, state: State, encoding: Any, log_weights: Tensor) -> Tensor:
        looked = self.look_ahead(frame, state, encoding).reshape(log_weights.shape).to(log_weights.dtype)
        # Where nothing is left to favour, the weights of the step will say so.
        hopeless = (log_weights + looked).amax(-1, keepdim=True) == -torch.inf
        return torch.where(hopeless, 0.0, looked)

    def weigh(self, step: Step, batch: int | None = None) -> Tensor:
        """``(n,)`` log of the step's factor of the evidence.

        :param batch: the number of sequences that an error counts by, where they are repeated.
        :raises ValueError: if a weight is not a number, or all of a sequence are zero.
        """
        self.weights = Weights.of(step.log_weights)
        if not math.isfinite(self.weights.log_mean.detach().sum()):  # a finite sum has finite terms
            raise ValueError(_not_finite(step, step.log_weights.detach().amax(-1), batch))
        if self.look_ahead is not None and self.adapted:
            self.adapted = bool(as_foreseen(step.log_weights.detach(), self.foreseen).all())
        return self.weights.log_mean - self.base


class Resampled(NamedTuple):
    """Where the particles of ``n`` sequences come from, and how they go on."""

    plan: Tensor | None
    """Ancestors ``(n, N)``, a transport ``(n, N, N)``, or ``None``: each from itself."""
    log_weights: Tensor
    """``(n, N)``"""
    base: Tensor | float
    """``(n,)`` log mean weight with which the next step begins."""
    chances: Tensor | None
    """``(n, N)`` by which the ancestors were drawn; ``None`` where these are the weights."""

    def foreseen(self, looked: Tensor) -> Tensor:
        """``(n, N)`` log weights after the step, if it is as ``looked`` says."""
        ancestral = self.plan is not None and not self.plan.is_floating_point()
        return self.log_weights + (looked.gather(-1, self.plan) if ancestral else looked)


def which(chosen: Tensor) -> str:
    """``'none'``, ``'some'`` or ``'all'`` of the sequences."""
    return "none" if not chosen.any() else "all" if chosen.all() else "some"


def resample(resampler: Resampler, weights: Weights, looked: Tensor | None, state: State, chosen: Tensor | None, how: str
             ) -> Resampled:
    """Resample the particles of ``chosen`` sequences, ``(n,)`` booleans, which are ``how`` many."""
    if how == "none":
        return Resampled(None, weights.log, weights.log_mean, None)
    plan, fresh = resampler(weights, state, looked)
    chances = None if (chances := resampler.log_chances(weights, looked)) is None else chances.detach().exp()
    if how == "all":
        return Resampled(plan, fresh, 0.0, chances)
    particles, base = fresh.shape[-1], torch.where(chosen, 0.0, weights.log_mean)
    fresh = torch.where(chosen[:, None], fresh, weights.log)
    if plan.is_floating_point():
        same = torch.eye(particles, dtype=plan.dtype, device=plan.device)
        return Resampled(torch.where(chosen[:, None, None], plan, same), fresh, base, chances)
    return Resampled(torch.where(chosen[:, None], plan, torch.arange(particles, device=plan.device)), fresh, base, chances)


def as_foreseen(log_weights: Tensor, foreseen: Tensor | float) -> Tensor:
    """``(n,)`` booleans: whether the weights are in the proportions foreseen, to rounding."""
    apart = log_weights - foreseen
    rounding = torch.finfo(apart.dtype).eps**0.5 * (1 + log_weights.amax(-1).abs())
    return apart.amax(-1) - apart.amin(-1) <= rounding


def require_threshold(ess_threshold: float) -> None:
    """Raise unless it is a share of the particles."""
    if not isinstance(ess_threshold, (int, float)) or not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold={ess_threshold!r}; it is a share of the particles, from 0 (never resample) to 1")


def _not_finite(step: Step, highest: Tensor, batch: int | None) -> str:
    bad = int((~highest.isfinite()).nonzero()[0])
    particles = step.log_weights.shape[1]
    sequence = int(step.frame.sequence[bad * particles])
    sequence = sequence if batch is None else sequence % batch
    where = f"at time {step.frame.t} in sequence {sequence}"
    if highest[bad] == -torch.inf:
        sites = ", ".join(repr(name) for name, site in step.sites.items() if site.observed)
        return (f"all {particles} particles have weight zero {where}: the data there (site {sites}) is impossible "
                "under every particle. Use more particles, a guide that reads the data, or an emission with heavier tails")
    for name, site in step.sites.items():
        with pyro.settings.context(validate_distributions_torch=False):
            densities = (("model's", site.log_p()), ("guide's", None if site.q is None else site.log_q()))
        for whose, value in densities:
            if value is not None and (value.isnan().any() or (value == torch.inf).any()):
                return (f"the {whose} log density of site {name!r} is NaN or infinite {where}: look for a scale that is zero "
                        "or negative, an overflow in the step, or a state that has diverged")
    return f"a log weight is NaN or infinite {where}"
