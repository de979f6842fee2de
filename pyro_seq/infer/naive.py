"""The forecast that every other one must beat: the last value, or that of a season ago, goes on."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_seq.engine.state import State
from pyro_seq.infer.posterior import Moments, Posterior
from pyro_seq.infer.run import Stopwatch
from pyro_seq.model import SequentialModel
from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["Naive", "seasonal_errors"]


class Naive:
    """The naive forecast: a random walk from the last value or, with a season, from the value a season ago.

    Each sequence and entry walks with its own step, the root mean square of its past (seasonal) differences. Gaps are bridged
    by the value a season before, or by the mean where there is none. It is a yardstick for :func:`~pyro_seq.backtest` and has
    no evidence; covariates are not read.

    :param int season: steps of a season; 1 for the plain random walk.

    Source: Hyndman and Athanasopoulos, *Forecasting: Principles and Practice*, 2021, section 5.2.

    Example::

        >>> import torch
        >>> import pyro_seq as seq
        >>> future = seq.Naive(season=4).run(torch.tensor([1.0, 2.0, 3.0, 4.0, 1.1, 2.1, 3.1, 4.1])).predict(4)
        >>> future.quantile("x", 0.5).round(decimals=1)
        tensor([[1.1000, 2.1000, 3.1000, 4.1000]])
    """

    def __init__(self, season: int = 1):
        require_count("season", season, 1)
        self.season = season

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Posterior:
        """Read the last season and the size of the differences.

        :param x: data as accepted by :meth:`pyro_seq.Sequences.of`; so are ``lengths``, ``mask`` and the covariates.
        :raises ValueError: if an entry of a sequence has no two values a season apart.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        last, scale, predictive = {}, {}, {}
        for name, value in observations(sequences).items():
            errors = seasonal_errors(value, self.season)
            scale[name] = errors.square().nanmean(1).sqrt()
            if scale[name].isnan().any():
                bad = int(scale[name].isnan().nonzero()[0, 0])
                raise ValueError(f"sequence {bad} of {name!r} has no two values {self.season} steps apart, so a naive forecast "
                                 "has no scale: start later, or take a shorter season")
            bridged = _bridged(value, self.season)
            row = torch.arange(len(value), device=value.device)[:, None]
            season = torch.arange(-self.season, 0, device=value.device)
            last[name] = bridged[row, sequences.lengths[:, None] + season]
            last[name] = torch.where(last[name].isnan(), value.nanmean(1, keepdim=True), last[name])
            before = torch.cat([torch.full_like(value[:, :self.season], torch.nan), bridged[:, :-self.season]], 1)
            predictive[name] = Moments(before, scale[name].square()[:, None].expand_as(before))
        state = {"last": last, "scale": scale}

        def final_state(num_samples: int) -> State:
            return {part: {name: value.repeat_interleave(num_samples, 0) for name, value in values.items()}
                    for part, values in state.items()}

        nothing = torch.full((sequences.num_sequences,), torch.nan, dtype=torch.float64, device=sequences.device)
        return Posterior(
            method="naive" if self.season == 1 else f"naive, season {self.season}", kind="none: a yardstick",
            log_evidence=nothing, standard_error=nothing, sequences=sequences, seconds=watch.seconds, predictive=predictive,
            final_state=final_state, model=_Walk())


class _Walk(SequentialModel):
    """Each value is that of a season ago plus noise. The state holds the last season and the noise's scale, by name."""

    def step(self, state: State, **ignored: Tensor) -> State:
        last = {}
        for name, values in state["last"].items():
            loc = values[:, 0]
            drawn = pyro.sample(name, dist.Normal(loc, state["scale"][name], validate_args=False).to_event(loc.dim() - 1))
            last[name] = torch.cat([values[:, 1:], drawn[:, None]], 1)
        return {"last": last, "scale": state["scale"]}


def observations(sequences: Sequences) -> dict[str, Tensor]:
    """The data as floating values, NaN where missing or past a sequence's end."""
    found = {}
    for name, value in sequences.x.items():
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        if name in sequences.observed:
            value = value.masked_fill(~sequences.observed[name], torch.nan)
        active = sequences.active.reshape(sequences.active.shape + (1,) * (value.dim() - 2))
        found[name] = value.masked_fill(~active, torch.nan)
    return found


def seasonal_errors(value: Tensor, season: int) -> Tensor:
    """``(B, T - season, ...)`` differences of values ``(B, T, ...)`` a season apart, NaN where either is missing."""
    if value.shape[1] <= season:
        return value.new_full((value.shape[0], 1, *value.shape[2:]), torch.nan)
    return value[:, season:] - value[:, :-season]


def _bridged(value: Tensor, season: int) -> Tensor:
    """Values ``(B, T, ...)`` with each gap filled by the value a season before, where there is one."""
    filled = value.clone()
    for t in range(season, value.shape[1]):
        filled[:, t] = torch.where(filled[:, t].isnan(), filled[:, t - season], filled[:, t])
    return filled
