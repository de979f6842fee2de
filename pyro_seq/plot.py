"""Figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_seq.infer.posterior import Posterior

__all__ = ["plot_comparison", "plot_posterior"]

_BAND = 1.6449  # standard deviations of a 90 % interval


def _axes(ax: Any, *shape: int, **options: Any) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, layout="constrained", **options)[1] if ax is None else ax


def _line(posterior: Posterior, site: str | None, sequence: int) -> tuple[str, str, np.ndarray, np.ndarray, np.ndarray]:
    found = posterior.filtered or posterior.smoothed
    site = next(iter(found)) if site is None else site
    moments = posterior._moments(site)
    steps = int(posterior.sequences.lengths[sequence])
    mean = moments.mean[sequence, :steps].reshape(steps, -1)[:, 0].cpu().numpy()
    std = moments.std[sequence, :steps].reshape(steps, -1)[:, 0].cpu().numpy()
    return site, "filtered" if site in posterior.filtered else "smoothed", np.arange(1, steps + 1), mean, std


def _data(ax: Any, posterior: Posterior, sequence: int, like: np.ndarray) -> None:
    for name, value in posterior.sequences.x.items():
        series = value[sequence, :len(like)].reshape(len(like), -1).cpu().numpy()
        if series.shape[1] == 1:
            ax.plot(np.arange(1, len(like) + 1), series[:, 0], ".", color="0.5", markersize=4, label=f"data {name}")


def plot_posterior(posterior: Posterior, site: str | None = None, sequence: int = 0, ax: Any = None) -> Any:
    """The mean of the first entry of a latent site over time, with a 90 % band, and the data if it is scalar.

    :param site: the latent site; the first by default.
    :param sequence: index in the batch.
    :returns: the matplotlib axes.
    """
    ax = _axes(ax)
    site, what, times, mean, std = _line(posterior, site, sequence)
    _data(ax, posterior, sequence, mean)
    ax.plot(times, mean, color="C0", label=f"{what} mean of {site}")
    ax.fill_between(times, mean - _BAND * std, mean + _BAND * std, color="C0", alpha=0.2, linewidth=0, label="90 %")
    ax.set(xlabel="time", ylabel=site, title=f"{posterior.method}")
    ax.legend(frameon=False)
    return ax


def plot_comparison(posteriors: Mapping[str, Posterior], site: str | None = None, sequence: int = 0, axes: Any = None
                    ) -> Any:
    """Two panels: each method's estimate of one latent site over the data; and the log evidences with two standard
    errors, hollow where a number is a bound.

    :returns: the two matplotlib axes.
    """
    axes = _axes(axes, 1, 2, figsize=(11, 4), width_ratios=(2, 1))
    left, right = axes
    for i, (name, posterior) in enumerate(posteriors.items()):
        site_here, what, times, mean, std = _line(posterior, site, sequence)
        if i == 0:
            _data(left, posterior, sequence, mean)
            left.fill_between(times, mean - _BAND * std, mean + _BAND * std, color="C0", alpha=0.15, linewidth=0)
            left.set(xlabel="time", ylabel=site_here, title=f"Estimates of {site_here} (90 % band of {name})")
        left.plot(times, mean, color=f"C{i}", linewidth=1.2, label=f"{name}, {what}")
        bound = "bound" in posterior.kind
        error = np.nan_to_num(posterior.total_standard_error)
        right.errorbar(posterior.total_log_evidence, len(posteriors) - i, xerr=2 * error, fmt="o", color=f"C{i}",
                       markerfacecolor="white" if bound else f"C{i}", capsize=3)
    left.legend(frameon=False, fontsize="small")
    right.set_yticks(range(len(posteriors), 0, -1), list(posteriors))
    right.set(xlabel="log evidence, nats", title="Hollow: lower bound", ylim=(0.5, len(posteriors) + 0.5))
    right.grid(axis="x", alpha=0.3)
    return axes
