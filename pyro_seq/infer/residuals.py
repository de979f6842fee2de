"""One-step-ahead prediction errors: is the model right about the next frame, given all before it?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from statsmodels.stats.diagnostic import acorr_ljungbox
from torch import Tensor

from pyro_seq.engine.loop import forward
from pyro_seq.engine.sites import StepSites
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.smc.population import Population
from pyro_seq.module import own_parameters, require_count
from pyro_seq.resampling import resolve
from pyro_seq.sequences import Sequences

__all__ = ["Residuals", "one_step_ahead"]


class Residuals(pd.DataFrame):
    """A row a sequence, time, site and entry that was observed.

    Columns: the ``index`` of data that had one; the ``actual`` value; ``mean`` and ``std`` of its predictive distribution given
    the frames before; ``residual``, (actual - mean) / std; ``pit``, the probability integral transform of the actual value,
    uniform on (0, 1) if the model is right (and independent over time); ``normal``, the same on the scale of a standard normal,
    which is the residual if the predictive distribution is Gaussian.
    """

    @property
    def _constructor(self) -> Any:
        return Residuals

    def diagnostics(self, lags: int | None = None) -> pd.DataFrame:
        """A row a sequence, site and entry, on the ``normal`` scale, where a right model gives independent standard normals.

        Columns: ``count``; ``mean`` and ``variance``; the Ljung-Box statistic of no autocorrelation up to ``lags``, the
        Jarque-Bera statistic of normality, and the Kolmogorov-Smirnov distance of ``pit`` from uniform, each with its
        p-value. These take the parameters as known: estimated on the same data, they make the p-values too large. Gaps are
        closed up.

        :param int lags: of Ljung-Box; 10, or a fifth of the series if that is less, by default. A series too short for them has
            NaN in these columns.
        :raises ValueError: if every series is.

        Source: Ljung and Box, *On a measure of lack of fit in time series models*, 1978; Jarque and Bera, *Efficient tests
        for normality, homoscedasticity and serial independence of regression residuals*, 1980.
        """
        rows = {}
        for key, series in self.groupby(["sequence", "site", "entry"], sort=False):
            rows[key] = _tests(series["normal"].to_numpy(), series["pit"].to_numpy(), lags)
        if all(row["short"] for row in rows.values()):
            longest = max(row["count"] for row in rows.values())
            raise ValueError(f"lags={lags}, and the longest series has {longest} residuals: it is from 1 to less than that")
        table = pd.DataFrame.from_dict(rows, orient="index").drop(columns="short").astype({"count": int})
        table.index = pd.MultiIndex.from_tuples(rows, names=["sequence", "site", "entry"])
        return table

    def plot_residuals(self, site: str | None = None, sequence: int = 0, entry: int = 0, axes: Any = None) -> Any:
        """Four panels, see :func:`pyro_seq.plot.plot_residuals`."""
        from pyro_seq.plot import plot_residuals

        return plot_residuals(self, site=site, sequence=sequence, entry=entry, axes=axes)


def one_step_ahead(posterior: Posterior, num_particles: int = 2000) -> Residuals:
    r"""Each frame against its distribution given the frames before it, :math:`p(x_t \mid x_{<t})`, entry by entry.

    Where the method gives that distribution (``posterior.predictive``, Gaussian), errors and transforms are exact. Otherwise a
    bootstrap filter of the posterior's model, at the posterior's parameters, draws :math:`x_t^i` from it, whatever method or
    guide made the posterior, and the transform is the rank of the actual value among the draws, ties broken at random:

    .. math:: u_t = \frac{\#\{x_t^i < x_t\} + V (\#\{x_t^i = x_t\} + 1)}{N + 1}, \qquad V \sim U(0, 1)

    which is uniform for discrete data as for continuous.

    :param int num_particles: draws of each frame, where they are needed.
    :returns: a data frame, a row an observed entry; missing ones have none.
    :raises ValueError: for a model from :func:`~pyro_seq.from_pyro`, which runs on the data it was given.

    Source: Czado, Gneiting and Held, *Predictive model assessment for count data*, 2009; Dunn and Smyth, *Randomized quantile
    residuals*, 1996; Kim, Shephard and Chib, *Stochastic volatility: likelihood inference and comparison with ARCH models*,
    1998, for the particles.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Counts(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(0.9 * z, 0.3))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Poisson(torch.exp(z)), obs=x)
        >>> model = Counts()
        >>> residuals = seq.ParticleFilter(model, 100).run(model.simulate([60])["x"]).residuals()
        >>> list(residuals.columns)
        ['sequence', 'time', 'site', 'entry', 'actual', 'mean', 'std', 'residual', 'pit', 'normal']
        >>> bool(residuals["pit"].between(0, 1).all())
        True
        >>> residuals.diagnostics().shape
        (1, 9)
    """
    require_count("num_particles", num_particles, 2)
    if posterior.predictive:
        parts = list(_exact(posterior))
    elif posterior.model is None or posterior.model.state_grows:
        raise ValueError(f"{posterior.method} cannot tell what it expects of the next frame: it gives no predictive moments, "
                         "and no model that can be run without data")
    else:
        model, sequences = posterior.model, posterior.sequences
        with torch.no_grad(), own_parameters(model):
            parts = model.within(lambda: list(_simulated(model, sequences, num_particles)), globals=posterior.parameters)
    table = pd.concat(parts, ignore_index=True).sort_values(["sequence", "site", "entry", "time"], ignore_index=True)
    table["residual"] = (table["actual"] - table["mean"]) / table["std"]
    table["normal"] = stats.norm.ppf(table["pit"])
    exact = table["pit"].isna()
    table.loc[exact, "normal"] = table.loc[exact, "residual"]
    table.loc[exact, "pit"] = stats.norm.cdf(table.loc[exact, "residual"])
    table = table[["sequence", "time", "site", "entry", "actual", "mean", "std", "residual", "pit", "normal"]]
    if posterior.sequences.index:
        labels = [posterior.sequences.labels(b, rows) for b, rows in table.groupby("sequence")["time"]]
        table.insert(2, "index", np.concatenate(labels))
    return Residuals(table)


def _exact(posterior: Posterior) -> Iterator[pd.DataFrame]:
    sequences = posterior.sequences
    for name, moments in posterior.predictive.items():
        value = sequences.x[name]
        present = sequences.observed.get(name, torch.ones_like(value, dtype=torch.bool)).clone()
        present &= ~value.isnan() & moments.mean.isfinite() & moments.variance.isfinite()  # a diffuse start expects nothing
        present[~sequences.active] = False
        times = torch.arange(1, sequences.num_steps + 1, device=sequences.device).expand_as(sequences.active)
        rows = torch.arange(sequences.num_sequences, device=sequences.device)[:, None].expand_as(times)
        yield _rows(name, rows, times, value, present, moments.mean, moments.std, None)


def _simulated(model: Any, sequences: Sequences, particles: int) -> Iterator[pd.DataFrame]:
    """Draws of each frame from the particles before it have seen it. Resampled at every step, they weigh the same."""
    population = Population(resolve("systematic"), ess_threshold=1.0)
    for step in forward(model, PriorGuide(model), sequences, particles, between=population.between):
        population.weigh(step)
        blind = step.frame._replace(x={}, observed={}, missing=False)
        with StepSites(blind) as drawn:
            model.apply(model.begin(blind) if blind.first else step.before, blind)
        times = torch.full((blind.rows // particles,), blind.t, device=blind.device)
        for name, site in step.sites.items():
            if site.observed and site.p.event_shape != (0,):  # not a pyro.factor
                value = site.value.unflatten(0, (-1, particles))[:, 0]
                present = torch.ones_like(value, dtype=torch.bool) if site.present is None else (
                    site.present.unflatten(0, (-1, particles))[:, 0])
                draws = drawn.sites[name].value.unflatten(0, (-1, particles)).to(torch.float64)
                noise = torch.rand(value.shape, dtype=torch.float64, device=value.device)
                against = value.unsqueeze(1)
                rank = (draws < against).sum(1) + noise * ((draws == against).sum(1) + 1)
                yield _rows(name, blind.sequence[::particles], times, value, present, draws.mean(1), draws.std(1),
                            rank / (particles + 1))


def _rows(name: str, sequence: Tensor, times: Tensor, value: Tensor, present: Tensor, mean: Tensor, std: Tensor,
          pit: Tensor | None) -> pd.DataFrame:
    """What is ``present`` of ``value`` as rows; ``sequence`` and ``times`` have its leading dimensions."""
    lead = (*times.shape, -1)
    kept = present.reshape(lead)

    def column(tensor: Tensor) -> np.ndarray:
        return tensor.reshape(lead).expand(kept.shape)[kept].double().cpu().numpy()

    entries = torch.arange(kept.shape[-1], device=kept.device).expand(kept.shape)
    return pd.DataFrame({
        "sequence": column(sequence[..., None]).astype(int), "time": column(times[..., None]).astype(int), "site": name,
        "entry": entries[kept].cpu().numpy(), "actual": column(value), "mean": column(mean), "std": column(std),
        "pit": np.nan if pit is None else column(pit)})


def _tests(normal: np.ndarray, pit: np.ndarray, lags: int | None) -> dict[str, float]:
    count = len(normal)
    lags = max(1, min(10, count // 5)) if lags is None else lags
    if lags < 1 or count <= lags:
        return {"count": count, "mean": normal.mean() if count else np.nan, "variance": np.nan, "short": True,
                **dict.fromkeys(("ljung_box", "ljung_box_p", "jarque_bera", "jarque_bera_p", "ks", "ks_p"), np.nan)}
    serial = acorr_ljungbox(normal, lags=[lags])
    shape = stats.jarque_bera(normal)
    uniform = stats.kstest(pit, "uniform")
    return {"count": count, "mean": normal.mean(), "variance": normal.var(ddof=1), "short": False,
            "ljung_box": serial["lb_stat"].iloc[0],
            "ljung_box_p": serial["lb_pvalue"].iloc[0], "jarque_bera": shape.statistic, "jarque_bera_p": shape.pvalue,
            "ks": uniform.statistic, "ks_p": uniform.pvalue}
