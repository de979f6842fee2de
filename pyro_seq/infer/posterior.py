"""What every method returns: the evidence with its kind, moments, and a way to look ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_seq.engine.loop import propagate
from pyro_seq.engine.state import State
from pyro_seq.module import own_parameters, require_count
from pyro_seq.sequences import Frame, Sequences

if TYPE_CHECKING:
    from pyro_seq.infer.residuals import Residuals
    from pyro_seq.infer.smc.record import Record

__all__ = ["BIASED", "EXACT", "LOWER_BOUND", "UNBIASED", "Draws", "Moments", "Posterior", "draw_future"]

EXACT = "exact"
UNBIASED = "log of an unbiased estimate"
"""Itself biased low, by about half its variance."""
BIASED = "log of a biased estimate"
"""Of a resampling that is not unbiased: on either side, and not to be averaged out by more runs."""
LOWER_BOUND = "lower bound"


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a site at each time, ``(B, T, ...)`` each."""

    mean: Tensor
    variance: Tensor

    @property
    def std(self) -> Tensor:
        return self.variance.clamp(min=0).sqrt()


@dataclass(frozen=True, repr=False)
class Draws:
    """Samples of trajectories, past or future: what :meth:`Posterior.predict` and :meth:`Posterior.trajectories` return.

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
        >>> future = seq.KalmanFilter(LocalLevel()).run(torch.zeros(2, 10)).predict(3)
        >>> future
        Draws(x=(1000, 2, 3), z=(1000, 2, 3), exact moments of ['x', 'z'])
        >>> future.times
        tensor([[11, 12, 13],
                [11, 12, 13]])
        >>> future.quantile("x", [0.1, 0.9]).shape
        torch.Size([2, 2, 3])
    """

    samples: Mapping[str, Tensor]
    """By site, ``(S, B, H, ...)``."""
    times: Tensor
    """``(B, H)`` 1-based times, zero past a sequence's end."""
    moments: Mapping[str, Moments] = field(default_factory=dict)
    """By site, exact moments ``(B, H, ...)`` of what is drawn, where the method has them: then ``mean`` and ``std`` give these.
    Quantiles are of the samples."""
    sequences: Sequences | None = None
    """The data that the draws are conditional on."""

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(value.shape)}" for name, value in sorted(self.samples.items()))
        return f"Draws({shapes}{f', exact moments of {sorted(self.moments)}' if self.moments else ''})"

    def mean(self, site: str) -> Tensor:
        """``(B, H, ...)``"""
        value = self._floating(site)
        return self.moments[site].mean if site in self.moments else value.mean(0)

    def std(self, site: str) -> Tensor:
        """``(B, H, ...)``"""
        value = self._floating(site)
        return self.moments[site].std if site in self.moments else value.std(0)

    def quantile(self, site: str, q: float | list[float]) -> Tensor:
        """``(B, H, ...)``, with a leading dimension if ``q`` is a list."""
        value = self._floating(site)
        _check_levels(q)
        return torch.as_tensor(np.quantile(value.cpu().numpy(), q, axis=0), dtype=value.dtype, device=value.device)

    def to_dataframe(self, quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)) -> pd.DataFrame:
        """One row per sequence, time, site and entry: mean, std and quantiles."""
        frames = []
        for site in self.samples:
            columns = {"mean": self.mean(site), "std": self.std(site)}
            columns |= {f"q{q:g}": self.quantile(site, q) for q in quantiles}
            frames.append(_table(site, columns, self.times, self.sequences))
        return pd.concat(frames, ignore_index=True)

    def plot(self, site: str | None = None, sequence: int = 0, **options: Any) -> Any:
        """A fan chart: the data, the median, and central intervals in several shades; the options are those of
        :func:`pyro_seq.plot.plot_forecast`."""
        from pyro_seq.plot import plot_forecast

        return plot_forecast(self, site=site, sequence=sequence, **options)

    def _floating(self, site: str) -> Tensor:
        value = self._of(site)
        return value if value.is_floating_point() else value.to(torch.get_default_dtype())

    def _of(self, site: str) -> Tensor:
        if site not in self.samples:
            raise ValueError(f"no site {site!r}; there are {sorted(self.samples)}")
        return self.samples[site]


@dataclass(frozen=True, repr=False)
class Posterior:
    """The answer of an inference method about a batch of sequences.

    Made by the ``run`` of :class:`~pyro_seq.KalmanFilter`, :class:`~pyro_seq.ParticleFilter` and
    :class:`~pyro_seq.Variational`; moments are of the latent sites, in the user's order of sequences, zero past a
    sequence's end.
    """

    method: str
    kind: str
    """What ``log_evidence`` is: exact, the log of an unbiased or of a biased estimate, or a lower bound."""
    log_evidence: Tensor
    """``(B,)`` nats."""
    standard_error: Tensor
    """``(B,)`` Monte Carlo standard error of ``log_evidence``; zero if exact, NaN if one run cannot tell. That of one run of a
    particle filter is itself an estimate, by :class:`~pyro_seq.infer.smc.families.Families`."""
    sequences: Sequences
    seconds: float
    num_samples: int | None = None
    """Samples (particles times runs) behind each number; ``None`` if exact."""
    filtered: Mapping[str, Moments] = field(default_factory=dict)
    """Of z_t given x_1..x_t."""
    smoothed: Mapping[str, Moments] = field(default_factory=dict)
    """Of z_t given all of x, where the method gives it."""
    log_evidence_by_step: Tensor | None = None
    """``(B, T)`` log predictive density of each frame given the ones before, zero past a sequence's end: its sum is
    ``log_evidence``. Where the method gives it."""
    ess: Tensor | None = None
    """``(B, T)`` effective sample size before resampling."""
    predictive: Mapping[str, Moments] = field(default_factory=dict)
    """Of x_t given x_1..x_{t-1}, by name and in the shape of the data, where it is Gaussian and the method gives it, not
    finite where nothing is expected yet (a diffuse start): :meth:`residuals` reads it."""
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """The global parameters all this is conditional on."""
    notes: tuple[str, ...] = ()
    final_state: Callable[[int], State] | None = field(default=None, repr=False)
    """Given S, draws of the state after each sequence's last frame, ``(B * S, ...)`` rows."""
    paths: Callable[[int], dict[str, Tensor]] | None = field(default=None, repr=False)
    """Given S, draws of the latent trajectories, ``(S, B, T, ...)``."""
    cloud: Callable[[str, Any], Tensor] | None = field(default=None, repr=False)
    """Weighted quantiles of a site, ``(B, T, ...)``."""
    forecast_moments: Callable[[Sequences], Mapping[str, Moments]] | None = field(default=None, repr=False)
    """Given the future (no data; lengths all the horizon H; the future's covariates), exact moments ``(B, H, ...)`` by site,
    where the method has them. Called with the model entered; time ``h`` is ``lengths + h``."""
    particles: Record | None = field(default=None, repr=False)
    """What a particle method kept of its run."""
    model: Any = field(default=None, repr=False)

    def __repr__(self) -> str:
        count = "" if self.num_samples is None else f", {self.num_samples} samples"
        sites = sorted({**self.filtered, **self.smoothed})
        return (f"Posterior({self.method}: log evidence {self.total_log_evidence:.3f} ({self.kind}, standard error "
                f"{self.total_standard_error:.2g}{count}), sites {sites}, {self.sequences})")

    @property
    def total_log_evidence(self) -> float:
        """Sum over the sequences, nats."""
        return self.log_evidence.sum().item()

    @property
    def total_standard_error(self) -> float:
        """Standard error of the sum; the sequences' errors are independent."""
        return self.standard_error.square().sum().sqrt().item()

    def quantile(self, site: str, q: float | list[float]) -> Tensor:
        """Quantiles of the filtered distribution of a site, ``(B, T, ...)`` (with a leading dimension for a list)."""
        self._moments(site)
        _check_levels(q)
        if self.cloud is None:
            raise ValueError(f"{self.method} kept no particles to take quantiles of: use history=True and num_runs=1")
        return self.cloud(site, q)

    def trajectories(self, num_samples: int) -> Draws:
        """Draws of whole latent trajectories, ``(S, B, T, ...)`` each."""
        require_count("num_samples", num_samples, 1)
        if self.paths is None:
            raise ValueError(f"{self.method} has no trajectories to draw: use ParticleFilter(history=True) with num_runs=1, or "
                             "Variational")
        return Draws(self.paths(num_samples), _times(self.sequences), sequences=self.sequences)

    def predict(self, horizon: int, num_samples: int = 1000, **covariates: Any) -> Draws:
        """Draw the future of every sequence: latents and observations ``horizon`` steps past its own end.

        Each draw starts from a draw of the last state, so that what is not known of it widens the forecast; global parameters
        are those of the posterior. ``pyro.set_rng_seed`` makes it reproducible.

        :param int num_samples: futures drawn of each sequence.
        :param covariates: inputs of the steps after each sequence's end, exactly ``(B, horizon, ...)`` each.
        :returns: samples ``(S, B, horizon, ...)`` of every site.
        """
        require_count("horizon", horizon, 1)
        require_count("num_samples", num_samples, 1)
        if self.final_state is None or self.model is None:
            raise ValueError(f"{self.method} cannot predict: its model runs on the data it was given")
        return draw_future(self.model, self.parameters, self.final_state, self.sequences.lengths, horizon, num_samples,
                           covariates, self.forecast_moments, self.sequences)

    def residuals(self, num_particles: int = 2000) -> Residuals:
        """One-step-ahead prediction errors and probability integral transforms of the data: is the model right?

        See :func:`pyro_seq.infer.residuals.one_step_ahead`.
        """
        from pyro_seq.infer.residuals import one_step_ahead

        return one_step_ahead(self, num_particles)

    def diagnostics(self) -> pd.DataFrame:
        """Whether the particles can be trusted: one row per sequence and time (and run, one after the other).

        ``ess``, the effective sample size; ``largest_weight``, the largest share of one particle; with ``history``,
        ``distinct_ancestors``, how many of the particles of that time have descendants at the end, and ``pareto_k``, how heavy
        the tail of the weights is: their variance is finite below 0.5, and their average of use up to about 0.7 (NaN where
        too few of them differ, as with few discrete states); ``advice``, what to change, empty where nothing is wrong.

        Source: Kong, Liu and Wong, *Sequential imputations and Bayesian missing data problems*, 1994; Vehtari, Simpson, Gelman,
        Yao and Gabry, *Pareto smoothed importance sampling*, 2024.

        :raises ValueError: if the method has no particles.

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
            >>> x = torch.zeros(20)
            >>> x[11] = 9.0
            >>> posterior = seq.ParticleFilter(LocalLevel(), 200, history=True).run(x)
            >>> table = posterior.diagnostics()
            >>> list(table)
            ['sequence', 'time', 'ess', 'largest_weight', 'distinct_ancestors', 'pareto_k', 'advice']
            >>> table.loc[table["advice"] != "", "time"].tolist()
            [12]
        """
        from pyro_seq.infer.smc.diagnostics import table

        if self.particles is None:
            raise ValueError(f"{self.method} has no particles to diagnose")
        return table(self.particles)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sequence, time, latent site and entry: filtered (and smoothed) mean and standard deviation."""
        frames = []
        for site in {**self.filtered, **self.smoothed}:
            columns = {}
            for what, found in (("filtered", self.filtered), ("smoothed", self.smoothed)):
                if site in found:
                    columns |= {f"{what}_mean": found[site].mean, f"{what}_std": found[site].std}
            frames.append(_table(site, columns, _times(self.sequences), self.sequences))
        if not frames:
            raise ValueError(f"{self.method} has no latent sites to make a table of; log_evidence_by_step is of the data")
        return pd.concat(frames, ignore_index=True)

    def to_arviz(self, num_samples: int = 500) -> Any:
        """The latent trajectories as an arviz ``InferenceData`` (one chain), with the data; NaN past a sequence's end."""
        import arviz

        active, draws = self.sequences.active, self.trajectories(num_samples)

        def ended(value: Tensor, leading: int) -> Any:
            inside = active.reshape(*active.shape, *(1,) * (value.dim() - leading - 2))
            return (value if active.all() else torch.where(inside, value, torch.nan)).cpu().numpy()

        return arviz.from_dict(
            posterior={name: ended(value, 1)[None] for name, value in draws.samples.items()},
            observed_data={name: ended(value[:, :active.shape[1]], 0) for name, value in self.sequences.x.items()})

    def plot(self, site: str | None = None, sequence: int = 0, ax: Any = None) -> Any:
        """The filtered mean of a site with a 90 % band, over the data where it has the same shape."""
        from pyro_seq.plot import plot_posterior

        return plot_posterior(self, site=site, sequence=sequence, ax=ax)

    def summary(self) -> pd.Series:
        """One line for a table: total log evidence, what it is, and how sure."""
        return pd.Series({
            "log_evidence": self.total_log_evidence, "kind": self.kind, "standard_error": self.total_standard_error,
            "num_samples": self.num_samples, "seconds": self.seconds})

    def _moments(self, site: str) -> Moments:
        found = {**self.smoothed, **self.filtered}
        if site not in found:
            raise ValueError(f"no latent site {site!r}; there are {sorted(found)}")
        return found[site]


def draw_future(model: Any, parameters: Mapping[str, Tensor], final_state: Callable[[int], State], lengths: Tensor,
                horizon: int, num_samples: int, covariates: Mapping[str, Any],
                forecast_moments: Callable[[Sequences], Mapping[str, Moments]] | None = None, sequences: Sequences | None = None
                ) -> Draws:
    """Run the model on from draws of its last state; the arguments are as for :meth:`Posterior.predict` and in its fields.

    :param lengths: ``(B,)`` frames that each sequence has had.
    """
    batch, device = len(lengths), lengths.device
    for name, value in covariates.items():
        if (steps := Sequences.of(None, covariates={name: value}).num_steps) != horizon:
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            raise ValueError(
                f"covariate {name!r}{shape} has {steps} frames and horizon={horizon}: predict takes the {horizon} after each "
                f"sequence's end, ({batch}, {horizon}, ...), such as {name}[:, T:T + {horizon}] of one that covers past and "
                "future")
    future = Sequences.of(None, [horizon] * batch, covariates=covariates)
    model.check_inputs(future)
    sequence = torch.arange(batch, device=device).repeat_interleave(num_samples)
    frames = (Frame(lengths[sequence] + h, batch * num_samples, {},
                    {k: v[:, h - 1].to(device)[sequence] for k, v in future.covariates.items()}, False, sequence,
                    False, {}, device) for h in range(1, horizon + 1))
    drawn: dict[str, list[Tensor]] = {}

    def draw() -> Mapping[str, Moments]:
        for sites, _ in propagate(model, final_state(num_samples), frames):
            for name, site in sites.items():
                drawn.setdefault(name, []).append(site.value.unflatten(0, (batch, num_samples)))
        exact = {} if forecast_moments is None else forecast_moments(future)
        return {name: exact[name] for name in drawn if name in exact}

    with torch.no_grad(), own_parameters(model):
        moments = model.within(draw, globals=parameters)
    return Draws({name: torch.stack(parts, 2).transpose(0, 1) for name, parts in drawn.items()},
                 lengths.cpu()[:, None] + torch.arange(1, horizon + 1, device="cpu"), moments, sequences)


def _check_levels(q: float | list[float]) -> None:
    if not all(0 <= level <= 1 for level in np.atleast_1d(np.asarray(q, dtype=float))):
        raise ValueError(f"q={q}: quantiles are between 0 and 1")


def _times(sequences: Sequences) -> Tensor:
    """``(B, T)`` 1-based times, zero past a sequence's end."""
    return (torch.arange(1, sequences.num_steps + 1, device=sequences.device) * sequences.active).cpu()


def _table(site: str, columns: Mapping[str, Tensor], times: Tensor, sequences: Sequences | None) -> pd.DataFrame:
    head = next(iter(columns.values()))
    batch, steps = head.shape[:2]
    width = int(np.prod(head.shape[2:], dtype=int))
    index = np.indices((batch, steps, width)).reshape(3, -1)
    frame = pd.DataFrame({"sequence": index[0], "time": times.cpu().numpy()[index[0], index[1]], "site": site,
                          "entry": index[2],
                          **{name: value.detach().cpu().numpy().reshape(-1) for name, value in columns.items()}})
    if sequences is not None and sequences.index:
        labels = [sequences.labels(b, row.clamp(min=1)) for b, row in enumerate(times.cpu())]
        if all(found is not None for found in labels):
            frame.insert(2, "index", np.concatenate([np.repeat(found, width) for found in labels]))
    return frame[frame["time"] > 0].reset_index(drop=True)
