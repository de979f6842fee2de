"""Forecasts: fan charts, and how forecasts scored."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_seq.infer.posterior import Draws
from pyro_seq.plot.axes import finish, new_axes, numbers, one_entry, require_axes, time_axis

__all__ = ["plot_backtest", "plot_forecast"]


def plot_forecast(draws: Draws, site: str | None = None, sequence: int = 0, *, entry: int = 0,
                  levels: tuple[float, ...] = (0.5, 0.8, 0.95), actual: Any = None, last: int | None = None, ax: Any = None
                  ) -> Any:
    """A fan chart: the data so far, the median of what is to come, and central intervals, darker where more likely.

    Times are those of the data's pandas index where it had one.

    :param draws: what :meth:`Posterior.predict` returned (or trajectories, drawn over the data).
    :param site: the data, by default, or the first latent site.
    :param int sequence: index in the batch.
    :param int entry: of a site with several, counted from 0 in the flattened frame.
    :param levels: probabilities of the central intervals.
    :param actual: what came, ``(H,)`` of this sequence or ``(B, H, ...)``, drawn as circles.
    :param int last: frames of the data to show; all by default.
    :returns: the matplotlib axes.
    :raises ValueError: if there is no such site, sequence or entry, or a level is not between 0 and 1.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> future = seq.KalmanFilter(LocalLevel()).run(torch.zeros(10)).predict(5)
        >>> ax = future.plot(levels=(0.5, 0.9), actual=torch.zeros(5))
        >>> ax.get_legend_handles_labels()[1]
        ['data', 'median', '90 %', '50 %', 'actual']
    """
    import matplotlib

    data = {} if draws.sequences is None else draws.sequences.x
    if site is None:
        site = next((name for name in data if name in draws.samples), next(iter(draws.samples)))
    if not 0 <= sequence < len(draws.times):
        raise ValueError(f"sequence={sequence}: there are {len(draws.times)}, counted from 0")
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels={levels}: probabilities of central intervals are between 0 and 1")
    levels = sorted(levels)
    tails = [q for level in levels for q in ((1 - level) / 2, (1 + level) / 2)]
    times = draws.times[sequence].cpu().numpy()
    kept = times > 0
    quantiles = [one_entry(value[sequence], entry, site)[kept] for value in draws.quantile(site, [0.5, *tails])]
    shown = site in data and data[site].shape[2:] == draws.samples[site].shape[3:]
    length = int(draws.sequences.lengths[sequence]) if shown else 0
    past = np.arange(1 if last is None else max(1, length - last + 1), length + 1)
    axis = time_axis(draws.sequences, sequence, np.concatenate([past, times[kept]]))
    past, before, ahead = past - 1, axis[:len(past)], axis[len(past):]
    ax = new_axes(ax)
    if shown:
        ax.plot(before, one_entry(data[site][sequence], entry, site)[past], color="0.25", linewidth=1, label="data")
    ax.plot(ahead, quantiles[0], color="C0", linewidth=1.5, label="median")
    shades = matplotlib.colormaps["Blues"](np.linspace(0.5, 0.15, len(levels)))
    for i, level in reversed(list(enumerate(levels))):
        ax.fill_between(ahead, quantiles[1 + 2 * i], quantiles[2 + 2 * i], color=shades[i], linewidth=0, zorder=1,
                        label=f"{100 * level:g} %")
    if actual is not None:
        value = numbers(actual)
        value = one_entry(value if value.ndim == 1 else value[sequence], entry, "actual")[:kept.sum()]
        ax.plot(ahead[:len(value)], value, "o", color="C3", markersize=3.5, markerfacecolor="white", label="actual")
    several = int(np.prod(draws.samples[site].shape[3:])) > 1
    ax.set(xlabel="time", ylabel=f"{site}[{entry}]" if several else site)
    finish(ax, ["with names"])
    return ax


def plot_backtest(table: Any, axes: Any = None) -> Any:
    """Two panels: the mean CRPS of each method by steps ahead, and the share of actual values inside its central intervals
    against their nominal probability, over all steps ahead; on the diagonal a method is calibrated.

    :param table: what :func:`~pyro_seq.backtest` returned.
    :param axes: two matplotlib axes; new ones by default.
    :returns: the two matplotlib axes.
    """
    axes = require_axes(new_axes(axes, 1, 2, figsize=(9, 3.8)), 2)
    by_horizon, overall = table.summary(), table.summary(by=())
    levels = [column for column in overall if column.startswith("coverage_")]
    nominal = [float(column.removeprefix("coverage_")) / 100 for column in levels]
    axes[1].plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for i, method in enumerate(overall.index):
        crps = by_horizon.loc[method, "crps"]
        axes[0].plot(crps.index, crps, "o-", color=f"C{i}", markersize=3.5, label=str(method))
        axes[1].plot(nominal, overall.loc[method, levels].astype(float), "o-", color=f"C{i}", markersize=3.5)
    axes[0].set(xlabel="steps ahead", ylabel="mean CRPS", ylim=(0, None))
    axes[1].set(xlabel="nominal probability", ylabel="share inside", xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
    finish(axes[0], ["with names"])
    axes[1].spines[["top", "right"]].set_visible(False)
    return axes
