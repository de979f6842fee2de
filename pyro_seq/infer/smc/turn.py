"""One turn of the particle filter as a function of tensors: resample, propose, weigh, and tell what the particles say."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.loop import advance, refuse_scaled
from pyro_seq.engine.state import State, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.infer.smc.families import Families
from pyro_seq.infer.smc.population import Resampled, as_foreseen, resample
from pyro_seq.infer.smc.record import Measured, tell
from pyro_seq.resampling import Resampler
from pyro_seq.sequences import Frame, repeat_rows

__all__ = ["Carried", "Given", "Kind", "Turn", "turn"]


class Kind(NamedTuple):
    """What one graph differs by from another."""

    how: str
    """How many sequences are resampled: ``'none'``, ``'some'``, ``'all'``."""
    missing: bool
    """Whether data may be missing."""
    whole: bool
    """Whether what the step started from, and its ancestors, are wanted."""


class Carried(NamedTuple):
    """What goes from one turn to the next."""

    state: State
    log: Tensor
    """``(n, N)``, as the next ones those of :class:`~pyro_seq.engine.weights.Weights`."""
    normalised: Tensor
    log_mean: Tensor
    eve: Tensor | None
    """The families."""
    log_correction: Tensor


class Given(NamedTuple):
    """What a turn is given from outside."""

    x: Mapping[str, Tensor]
    """``(n, ...)``, as covariates and booleans of what is observed of whole numbers."""
    covariates: Mapping[str, Tensor]
    observed: Mapping[str, Tensor]
    encoding: State
    sequence: Tensor
    """``(n,)``"""
    t: Tensor
    """``()``"""
    running: Tensor | None
    """``(n,)`` booleans, where some may have ended: their rows run on, and mean nothing."""
    chosen: Tensor | None
    """``(n,)`` booleans: which to resample, where that is some of them."""
    looked: Tensor | None
    """``(n, N)`` log factors by which particles are favoured."""
    resampled: Resampled | None
    """What has been resampled outside."""


class Turn(NamedTuple):
    """What a turn leaves."""

    carried: Carried
    factor: Tensor
    """``(n,)`` log of the factor of the evidence."""
    ess: Tensor
    largest: Tensor
    moments: dict[str, tuple[Tensor, Tensor]]
    adapted: Tensor | None
    """``(n,)`` booleans: whether the weights are as was foreseen."""
    latents: dict[str, Tensor] | None
    before: State
    ancestors: Tensor | None


def turn(model: Any, guide: Any, measured: Measured, resampler: Resampler, kind: Kind, carried: Carried, given: Given) -> Turn:
    """:param carried: of the turn before."""
    n, particles = carried.log.shape

    def rows(value: Tensor) -> Tensor:
        return repeat_rows(value, particles)

    def named(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: rows(value) for name, value in values.items()}

    frame = Frame(given.t.expand(n * particles), n * particles, named(given.x), named(given.covariates), kind.missing,
                  rows(given.sequence), False, named(given.observed), carried.log.device)
    weights = Weights(carried.log, carried.normalised, carried.log_mean, carried.log_mean, carried.log_mean)
    found = given.resampled or resample(resampler, weights, given.looked, carried.state, given.chosen, kind.how)
    step = advance(model, guide, frame, carried.state, map_state(rows, given.encoding), carried.log, particles,
                   lambda *_: (found.plan, found.log_weights), nullcontext())
    refuse_scaled(model, step)
    if given.running is not None:  # of what has ended nothing may reach an index
        step = step._replace(log_weights=torch.where(given.running[:, None], step.log_weights, 0.0))
    after = Weights.of(step.log_weights)
    told = tell(Families(carried.eve, carried.log_correction), weights, step, after, found.chances, measured)
    return Turn(
        Carried(map_state(_plain, step.state), step.log_weights, after.normalised, after.log_mean,
                None if told.families.eve is None else _plain(told.families.eve), told.families.log_correction),
        after.log_mean - found.base, after.ess, after.largest, told.moments,
        None if given.looked is None else as_foreseen(step.log_weights, found.foreseen(given.looked)),
        {name: site.value for name, site in step.sites.items() if not site.observed} if kind.whole else None,
        step.before if kind.whole else None, step.ancestors if kind.whole else None)


def _plain(leaf: Tensor) -> Tensor:
    return leaf.contiguous()
