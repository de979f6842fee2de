"""Particles over time: how many count, and where they come from."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_seq.plot.axes import finish, new_axes, numbers, require_axes, time_axis

__all__ = ["plot_diagnostics", "plot_genealogy"]

_CROWD = 500


def _require_particles(posterior: Any, sequence: int, history: bool = False) -> Any:
    record = getattr(posterior, "particles", None)
    if record is None:
        method = getattr(posterior, "method", type(posterior).__name__)
        raise ValueError(f"{method} has no particles to draw: give the posterior of a ParticleFilter")
    if history and not record.lineage:
        raise ValueError(f"{posterior.method} kept no ancestors to draw: use ParticleFilter(history=True) with num_runs=1 and "
                         "a resampling by ancestors")
    if not 0 <= sequence < posterior.sequences.num_sequences:
        raise ValueError(f"sequence={sequence}: there are {posterior.sequences.num_sequences}, counted from 0")
    return record


def plot_diagnostics(posterior: Any, sequence: int = 0, axes: Any = None) -> Any:
    """Two panels over time: the effective sample size and, with ``history``, how many distinct particles the last ones descend
    from; and the largest weight of one particle. What falls into the grey is not to be trusted.

    :param posterior: of a :class:`~pyro_seq.ParticleFilter`, or of another method with particles.
    :param int sequence: index in the batch.
    :param axes: two matplotlib axes; new ones by default.
    :returns: the two axes.

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
        >>> posterior = seq.ParticleFilter(LocalLevel(), 200, history=True).run(torch.zeros(50))
        >>> [ax.get_ylabel() for ax in seq.plot.plot_diagnostics(posterior)]
        ['particles', 'largest weight']
    """
    from pyro_seq.infer.smc.diagnostics import low_ess

    record = _require_particles(posterior, sequence)
    axes = new_axes(axes, 2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1))
    count, largest = require_axes(axes, 2)
    table = posterior.diagnostics()
    table = table[table["sequence"] == sequence]
    time, particles = time_axis(posterior.sequences, sequence, table["time"].to_numpy()), record.particles
    count.axhspan(0.5, low_ess(particles), color="0.92", linewidth=0, zorder=0)
    count.axhline(particles, color="0.3", linewidth=0.8)
    count.plot(time, table["ess"], color="C0", label="effective sample size")
    names = [""]
    if "distinct_ancestors" in table:
        count.plot(time, table["distinct_ancestors"], color="C1", label="distinct ancestors of the last particles")
        names = ["both"]
    count.set(yscale="log", ylim=(0.8, 1.6 * particles), ylabel="particles", title=f"{posterior.method}, {particles} particles")
    largest.axhspan(0.99, 1.05, color="0.92", linewidth=0, zorder=0)
    largest.fill_between(time, table["largest_weight"], color="C0", alpha=0.6, linewidth=0)
    largest.set(xlabel="time", ylabel="largest weight", ylim=(0, 1.05))
    finish(count, names)
    finish(largest, [""])
    return axes


def plot_genealogy(posterior: Any, site: str | None = None, sequence: int = 0, ax: Any = None) -> Any:
    """Every particle with a line to the one it came from: those whose descendants reach the end in colour, the others, which
    resampling has ended, in grey. Dots at the end are as large as their weights. Legible for some hundred particles at most.

    :param posterior: of ``ParticleFilter(history=True)``.
    :param site: a scalar latent, or the first entry of a vector; the first site by default.
    :param int sequence: index in the batch.
    :returns: the matplotlib axes.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.3))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> posterior = seq.ParticleFilter(LocalLevel(), 30, history=True).run(torch.zeros(40))
        >>> seq.plot.plot_genealogy(posterior).get_ylabel()
        'z'
    """
    from matplotlib.collections import LineCollection
    from matplotlib.dates import date2num

    record = _require_particles(posterior, sequence, history=True)
    if record.particles > _CROWD:
        raise ValueError(f"{record.particles} particles cannot be told apart: use at most {_CROWD}, or plot_diagnostics")
    sites = [name for name, found in record.steps[0].sites.items() if not found.observed]
    site = sites[0] if site is None else site
    if site not in sites:
        raise ValueError(f"no latent site {site!r} that the particles hold; there are {sites}")
    ax = new_axes(ax)
    row = int((record.packed.order == sequence).nonzero()[0])
    length = int(posterior.sequences.lengths[sequence])
    own = slice(row * record.particles, (row + 1) * record.particles)
    values = np.stack([numbers(step.sites[site].value[own]).reshape(record.particles, -1)[:, 0]
                       for step in record.steps[:length]])
    alive = np.stack([numbers(weights[row]) > 0 for weights in record.lineage[:length]])
    time = time_axis(posterior.sequences, sequence, np.arange(1, length + 1))
    at = date2num(time) if np.issubdtype(np.asarray(time).dtype, np.datetime64) else np.asarray(time, dtype=float)
    ax.plot(time, values.mean(1), alpha=0)  # lets the axis know its units
    for living, style in ((False, {"color": "0.82", "linewidth": 0.6}), (True, {"color": "C0", "linewidth": 0.9})):
        lines = []
        for t in range(1, length):
            ancestors = record.steps[t].ancestors
            source = np.arange(record.particles) if ancestors is None else ancestors[row].cpu().numpy()
            for i in np.flatnonzero(alive[t] == living):
                lines.append([(at[t - 1], values[t - 1, source[i]]), (at[t], values[t, i])])
        ax.add_collection(LineCollection(lines, **style))
    weights = numbers(record.lineage[length - 1][row])
    ax.scatter(time[-1:].repeat(record.particles), values[-1], s=400 * weights, color="C0", alpha=0.7, linewidth=0)
    ax.autoscale()
    ax.set(xlabel="time", ylabel=site, title=f"Genealogy of {record.particles} particles")
    finish(ax, [""])
    return ax
