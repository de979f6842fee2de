"""Posteriors over time, and the log evidences of several methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_seq.infer.posterior import EXACT, Posterior
from pyro_seq.plot.axes import new_axes, time_axis, time_ticks

__all__ = ["plot_comparison", "plot_posterior"]

_BAND = 1.6449  # standard deviations of a 90 % interval
_STYLES = ("--", "-", "-.")


def _require_posterior(what: str, posterior: Any) -> None:
    if not isinstance(posterior, Posterior):
        raise TypeError(f"{what} is a {type(posterior).__name__}; it is a posterior, as KalmanFilter(model).run(x) returns")


def _line(posterior: Posterior, site: str | None, sequence: int) -> tuple[str, str, np.ndarray, np.ndarray, np.ndarray]:
    found = posterior.filtered or posterior.smoothed
    if not found:
        raise ValueError(f"{posterior.method} has no latent sites to plot: plot a forecast, posterior.predict(10).plot()")
    site = next(iter(found)) if site is None else site
    moments = posterior._moments(site)
    if not 0 <= sequence < posterior.sequences.num_sequences:
        raise ValueError(f"sequence={sequence}: there are {posterior.sequences.num_sequences}, counted from 0")
    steps = int(posterior.sequences.lengths[sequence])
    mean = moments.mean[sequence, :steps].reshape(steps, -1)[:, 0].cpu().numpy()
    std = moments.std[sequence, :steps].reshape(steps, -1)[:, 0].cpu().numpy()
    return site, "filtered" if site in posterior.filtered else "smoothed", _axis(posterior, sequence, steps), mean, std


def _axis(posterior: Posterior, sequence: int, steps: int) -> Any:
    return time_axis(posterior.sequences, sequence, np.arange(1, steps + 1))


def _data(ax: Any, posterior: Posterior, sequence: int, like: np.ndarray) -> None:
    for name, value in posterior.sequences.x.items():
        series = value[sequence, :len(like)].reshape(len(like), -1).cpu().numpy()
        if series.shape[1] == 1:
            ax.plot(_axis(posterior, sequence, len(like)), series[:, 0], ".", color="0.5", markersize=4, label=f"data {name}")


def plot_posterior(posterior: Posterior, site: str | None = None, sequence: int = 0, ax: Any = None) -> Any:
    """The mean of the first entry of a latent site over time, with a 90 % band, and the data if it is scalar.

    :param site: the latent site; the first by default.
    :param sequence: index in the batch.
    :returns: the matplotlib axes.
    """
    _require_posterior("posterior", posterior)
    ax = new_axes(ax)
    site, what, times, mean, std = _line(posterior, site, sequence)
    _data(ax, posterior, sequence, mean)
    ax.plot(times, mean, color="C0", label=f"{what} mean of {site}")
    ax.fill_between(times, mean - _BAND * std, mean + _BAND * std, color="C0", alpha=0.2, linewidth=0, label="90 %")
    ax.set(xlabel="time", ylabel=site, title=f"{posterior.method}")
    time_ticks(ax)
    ax.legend(frameon=False)
    return ax


def plot_comparison(posteriors: Mapping[str, Posterior], site: str | None = None, sequence: int = 0, axes: Any = None
                    ) -> Any:
    """Two panels: each method's estimate of one latent site over the data, with the first method's 90 % band; and the
    log evidences with two standard errors, hollow where a number is a bound, with a line through those that are exact.

    :param posteriors: by name, as the ``posteriors`` of :func:`~pyro_seq.compare`.
    :param site: the latent site; the first by default.
    :param sequence: index in the batch, for the left panel; the evidences are sums over the batch.
    :param axes: two matplotlib axes; new ones by default.
    :returns: the two matplotlib axes.
    """
    if not isinstance(posteriors, Mapping) or not posteriors:
        raise ValueError("posteriors is not a dict of posteriors by name, or is empty: there is nothing to compare")
    for name, posterior in posteriors.items():
        _require_posterior(f"posteriors {name!r}", posterior)
    axes = new_axes(axes, 1, 2, figsize=(11, 4.5), width_ratios=(5, 2))
    _estimates(axes[0], posteriors, site, sequence)
    _evidences(axes[1], posteriors)
    return axes


def _estimates(ax: Any, posteriors: Mapping[str, Posterior], site: str | None, sequence: int) -> None:
    """The first method as a broad line in its band, the others thin on top of it, so that equal ones all show."""
    for i, (name, posterior) in enumerate(posteriors.items()):
        site_here, what, times, mean, std = _line(posterior, site, sequence)
        style = {"linewidth": 3.5, "alpha": 0.55} if i == 0 else {"linewidth": 1.3, "linestyle": _STYLES[(i - 1) % 3]}
        if i == 0:
            _data(ax, posterior, sequence, mean)
            ax.fill_between(times, mean - _BAND * std, mean + _BAND * std, color="C0", alpha=0.15, linewidth=0,
                            label=f"{name}, 90 %")
            ax.set(xlabel="time", title=f"Estimates of {site_here}")
        ax.plot(times, mean, color=f"C{i}", label=f"{name}, {what}", **style)
    ax.margins(x=0.01)
    time_ticks(ax)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _evidences(ax: Any, posteriors: Mapping[str, Posterior]) -> None:
    bounds = ["bound" in posterior.kind for posterior in posteriors.values()]
    for i, (posterior, bound) in enumerate(zip(posteriors.values(), bounds, strict=True)):
        value, error, row = posterior.total_log_evidence, np.nan_to_num(posterior.total_standard_error), len(posteriors) - i
        if posterior.kind == EXACT:
            ax.axvline(value, color=f"C{i}", alpha=0.35, linewidth=1)
        ax.errorbar(value, row, xerr=2 * error, fmt="o", color=f"C{i}", markerfacecolor="white" if bound else f"C{i}",
                    capsize=3)
        ax.annotate(f"{value:.2f}".replace("-", "\N{MINUS SIGN}"), (value, row), xytext=(0, 8), ha="center",
                    textcoords="offset points", fontsize="small")
    ax.set_yticks(range(len(posteriors), 0, -1), list(posteriors))
    ax.set(xlabel="log evidence, nats", ylim=(0.5, len(posteriors) + 0.6), title="Log evidence")
    if any(bounds):
        ax.set_xlabel("log evidence, nats\n(hollow: lower bound)")
    ax.margins(x=0.25)
    ax.locator_params(axis="x", nbins=4, min_n_ticks=3)
    ax.spines[["top", "right"]].set_visible(False)
