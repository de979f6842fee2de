"""One-step-ahead prediction errors: four looks at whether a model is right."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from statsmodels.tsa.stattools import acf

from pyro_seq.plot.axes import new_axes, require_axes

__all__ = ["plot_residuals"]

_BAND = 1.96  # standard deviations of a 95 % interval


def plot_residuals(residuals: Any, site: str | None = None, sequence: int = 0, entry: int = 0, axes: Any = None) -> Any:
    """Four panels: the errors over time, on the scale of a standard normal; the histogram of their probability integral
    transforms, flat if the model is right; their autocorrelation; and their quantiles against the normal ones. A right model
    stays in the grey with 95 % probability at each point.

    :param residuals: what :meth:`Posterior.residuals` returned.
    :param site: the first by default.
    :param int sequence: index in the batch.
    :param int entry: of a site with several.
    :param axes: four matplotlib axes; new ones by default.
    :returns: the four axes.
    :raises ValueError: if fewer than three values of that sequence, site and entry were observed.

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
        >>> model = LocalLevel()
        >>> axes = seq.KalmanFilter(model).run(model.simulate([50])["x"]).residuals(200).plot_residuals()
        >>> [ax.get_title() for ax in axes.flat]
        ['Errors', 'Probability integral transform', 'Autocorrelation', 'Quantiles']
    """
    site = residuals["site"].iloc[0] if site is None else site
    rows = residuals[(residuals["site"] == site) & (residuals["sequence"] == sequence) & (residuals["entry"] == entry)]
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} residuals of site {site!r}, sequence {sequence}, entry {entry}: at least 3 are drawn. "
                         f"The sites are {sorted(residuals['site'].unique())}, the sequences "
                         f"{sorted(residuals['sequence'].unique())}")
    axes = new_axes(axes, 2, 2, figsize=(9, 6))
    over_time, transform, serial, quantiles = require_axes(axes, 4)
    time, normal, count = rows["time"].to_numpy(), rows["normal"].to_numpy(), len(rows)
    over_time.axhspan(-_BAND, _BAND, color="0.92", zorder=0)
    over_time.plot(time, normal, "o-", markersize=2.5, linewidth=0.7)
    over_time.set(title="Errors", xlabel="time", ylabel="standard deviations")
    bins = int(np.clip(count // 10, 5, 20))
    low, high = stats.binom(count, 1 / bins).ppf([0.025, 0.975]) * bins / count
    transform.hist(rows["pit"], bins=bins, range=(0, 1), density=True, color="C0", alpha=0.6, edgecolor="white")
    transform.axhspan(low, high, color="0.92", linewidth=0, zorder=0)
    transform.axhline(1, color="0.3", linewidth=1)
    transform.set(title="Probability integral transform", xlabel="u", ylabel="density")
    correlation = acf(normal, nlags=max(1, min(20, count // 3)), fft=False)[1:]
    lags = np.arange(1, len(correlation) + 1)
    serial.axhspan(-_BAND / np.sqrt(count), _BAND / np.sqrt(count), color="0.92", zorder=0)
    serial.vlines(lags, 0, correlation)
    serial.plot(lags, correlation, "o", markersize=3.5)
    serial.axhline(0, color="0.3", linewidth=0.8)
    serial.set(title="Autocorrelation", xlabel="lag", ylim=1.1 * np.array([correlation.min(initial=-0.4), correlation.max(
        initial=0.4)]))
    serial.xaxis.get_major_locator().set_params(integer=True)
    rank = np.arange(1, count + 1)
    theory = stats.norm.ppf((rank - 0.5) / count)
    band = stats.norm.ppf(stats.beta(rank, count + 1 - rank).ppf([[0.025], [0.975]]))  # of each order statistic by itself
    quantiles.fill_between(theory, *band, color="0.92", linewidth=0)
    quantiles.plot(theory, theory, color="0.3", linewidth=0.8)
    quantiles.plot(theory, np.sort(normal), "o", markersize=2.5)
    quantiles.set(title="Quantiles", xlabel="standard normal", ylabel="errors")
    for ax in (over_time, transform, serial, quantiles):
        ax.spines[["top", "right"]].set_visible(False)
    return axes
