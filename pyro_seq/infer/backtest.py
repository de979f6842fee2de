"""Forecasts from many origins, each from the past alone, scored by what came."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro.ops.stats import crps_empirical
from torch import Tensor
from tqdm.auto import tqdm

from pyro_seq.engine.loop import forward
from pyro_seq.engine.padded import pad_rows
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.compare import require_methods
from pyro_seq.infer.naive import observations, seasonal_errors
from pyro_seq.infer.posterior import EXACT, Draws, Posterior
from pyro_seq.infer.run import GapRead
from pyro_seq.module import own_parameters, require_count
from pyro_seq.sequences import Sequences

__all__ = ["Backtest", "backtest"]


class Backtest(pd.DataFrame):
    """A row a method, origin (frames known), sequence, horizon (steps ahead), site and entry that was observed.

    Columns: the ``actual`` value; ``mean`` and ``median`` of the forecast; ``crps``, the continuous ranked probability score,
    lower is better; ``scaled_error``, of the median, in units of the mean absolute (seasonal) difference of the past;
    ``coverage_50`` and so on, whether the central interval of that probability holds the actual value; ``log_score``, the log
    predictive density of the whole frame, higher is better; ``joint_log_score``, that of all frames up to this one. The log
    scores belong to the frame and are repeated over its entries.
    """

    @property
    def _constructor(self) -> Any:
        return Backtest

    def summary(self, by: Sequence[str] = ("horizon",), baseline: str | None = None) -> pd.DataFrame:
        """Averages by method and, within it, by ``by``: ``horizon``, ``site``, ``entry``, ``origin``, ``sequence``, or nothing.

        Columns: ``count``; mean ``crps``; ``mae`` of the median, ``rmse`` of the mean; ``mase``, the mean scaled error; the
        share that each central interval covers; mean ``log_score``, each frame counting once, and ``joint_log_score``
        (of the longest horizon, unless ``by`` tells horizons apart).

        :param baseline: a method; adds ``crps_skill``, one minus the ratio of the CRPS to its own, positive if better.
        :raises ValueError: if there is no such column or method.

        Source: Hyndman and Koehler, *Another look at measures of forecast accuracy*, 2006, for the MASE.
        """
        keys = ["method", *([by] if isinstance(by, str) else by)]
        if unknown := sorted(set(keys) - {"method", "origin", "sequence", "horizon", "site", "entry"}):
            raise ValueError(f"by names {unknown}: averages are by 'origin', 'sequence', 'horizon', 'site' and 'entry'")
        if baseline is not None and baseline not in set(self["method"]):
            raise ValueError(f"baseline={baseline!r} is not among the methods {list(self['method'].unique())}")
        table = pd.DataFrame(self).assign(mae=(self["actual"] - self["median"]).abs(), mse=(self["actual"] - self["mean"])**2)
        groups = table.groupby(keys, sort=False)
        found = groups[["crps", "mae", "mse", "scaled_error"]].mean()
        found["mse"] = found["mse"].pow(0.5)
        found = found.rename(columns={"mse": "rmse", "scaled_error": "mase"})
        found.insert(0, "count", groups.size())
        found = found.join(groups[[column for column in table if column.startswith("coverage_")]].mean())
        frames = table.drop_duplicates(["origin", "sequence", "horizon", *keys])
        found["log_score"] = frames.groupby(keys, sort=False)["log_score"].mean()
        if "horizon" not in keys:
            frames = frames[frames["horizon"] == frames["horizon"].max()]
        found["joint_log_score"] = frames.groupby(keys, sort=False)["joint_log_score"].mean()
        if baseline is not None:
            theirs = found.loc[[baseline], "crps"].droplevel("method") if len(keys) > 1 else found.loc[baseline, "crps"]
            ratio = found["crps"].div(theirs) if len(keys) == 1 else found["crps"] / theirs.reindex(
                found.index.droplevel("method")).to_numpy()
            found.insert(2, "crps_skill", 1 - ratio)
        return found

    def plot_backtest(self, axes: Any = None) -> Any:
        """Mean CRPS by horizon and calibration of the intervals, see :func:`pyro_seq.plot.plot_backtest`."""
        from pyro_seq.plot import plot_backtest

        return plot_backtest(self, axes=axes)


def backtest(methods: Mapping[str, Any], x: Any, lengths: Any = None, *, horizon: int, first: int | None = None, step: int = 1,
             refit_every: int = 1, season: int = 1, num_samples: int = 1000,
             levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95), mask: Any = None, progress: bool = False, **covariates: Any
             ) -> Backtest:
    r"""Forecast ``horizon`` steps from each of a row of origins, from the frames up to it alone, and score by those after it.

    Every horizon is scored from the same origins: a sequence takes part while it has ``horizon`` more frames. Missing actual
    values are not scored. The scores of :mod:`pyro.contrib.forecast` are the averages of these: its ``eval_crps``,
    ``eval_mae`` (of the median) and ``eval_rmse`` (of the mean).

    A frame's log score is exact: the log evidence of the frames known and that one, those between taken as missing, minus
    the log evidence of the frames known,

    .. math:: \log p(x_{t+h} \mid x_{1:t}), \qquad \log p(x_{t+1:t+h} \mid x_{1:t})

    the latter being the joint one. Where a method's evidence is a bound or an estimate, or it has none, log scores are NaN;
    a density is not guessed from samples.

    :param methods: by name, objects with ``run`` at fixed parameters, as :func:`~pyro_seq.compare` takes; or functions that
        estimate the parameters: given the :class:`~pyro_seq.Sequences` up to an origin, they return such an object.
        :class:`~pyro_seq.Naive` is the usual yardstick.
    :param x: data, as accepted by :meth:`pyro_seq.Sequences.of`; so are ``lengths``, ``mask`` and the covariates. Those of
        the future are given to ``predict`` as known.
    :param int horizon: steps ahead.
    :param int first: frames known at the first origin; half of the longest sequence by default.
    :param int step: frames from an origin to the next.
    :param int refit_every: origins from an estimate of the parameters to the next.
    :param int season: of the differences that ``scaled_error`` is in units of.
    :param int num_samples: futures drawn; the CRPS is computed from them, and is too large by about one in ``num_samples``.
    :param levels: probabilities of the central intervals.
    :param bool progress: show a progress bar.
    :raises ValueError: if no sequence is long enough.

    Source: Gneiting and Raftery, *Strictly Proper Scoring Rules, Prediction, and Estimation*, 2007; Tashman, *Out-of-sample
    tests of forecasting accuracy*, 2000.

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
        >>> table = seq.backtest({"kalman": seq.KalmanFilter(model), "naive": seq.Naive()}, model.simulate([60])["x"],
        ...                      horizon=3, first=30, step=5)
        >>> table.summary(baseline="naive")["count"].unstack()
        horizon  1  2  3
        method
        kalman   6  6  6
        naive    6  6  6
    """
    require_methods(methods)
    counts = {"horizon": horizon, "step": step, "refit_every": refit_every, "season": season}
    for name, value in {**counts, "num_samples": num_samples, **({} if first is None else {"first": first})}.items():
        require_count(name, value, 1)
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels={tuple(levels)}: probabilities of central intervals are between 0 and 1")
    for name, method in methods.items():
        if not hasattr(method, "run") and (not callable(method) or isinstance(method, torch.nn.Module)):
            raise TypeError(f"method {name!r} is a {type(method).__name__}: pass an object with run(x), or a function that "
                            "estimates one's parameters from the frames up to an origin and returns it")
    sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
    first = max(1, sequences.num_steps // 2) if first is None else first
    origins = range(first, sequences.num_steps - horizon + 1, step)
    if not origins:
        raise ValueError(f"no origin: the longest sequence has {sequences.num_steps} frames, and first={first} and "
                         f"horizon={horizon} need {first + horizon}")
    parts: list[pd.DataFrame] = []
    with tqdm(total=len(methods) * len(origins), disable=not progress, desc="backtest") as bar:
        for name, given in methods.items():
            bar.set_postfix_str(name)
            method, actual = given, None
            for i, origin in enumerate(origins):
                if not hasattr(given, "run") and i % refit_every == 0:
                    method = _fitted(name, given, sequences.until(origin))
                index = (sequences.lengths >= origin + horizon).nonzero()[:, 0]
                some = sequences.select(index).until(origin + horizon)
                posterior = _known(name, method, some.until(origin), origin)
                draws = posterior.predict(horizon, num_samples, **{k: v[:, origin:] for k, v in some.covariates.items()})
                if actual is None:
                    actual = _actual(posterior, sequences, draws)
                values = {site: value[index, :origin + horizon] for site, value in actual.items()}
                scores = _log_scores(method, some, origin, horizon) if posterior.kind == EXACT else (math.nan, math.nan)
                parts += _scored(draws, values, origin, season, levels, {
                    "method": name, "origin": origin, "sequence": index.cpu().numpy()}, scores)
                bar.update()
    return Backtest(pd.concat(parts, ignore_index=True))


def _known(name: str, method: Any, sequences: Sequences, origin: int) -> Posterior:
    try:
        return method.run(sequences)
    except ValueError as error:
        raise ValueError(f"method {name!r} at origin {origin}, of the {len(sequences.lengths)} sequences that have that many "
                         f"frames and the horizon: {error}. If it needs more of them, begin later, first=...") from error


def _fitted(name: str, fit: Any, known: Sequences) -> Any:
    method = fit(known)
    if not hasattr(method, "run") or isinstance(method, type):
        raise TypeError(f"the function given as method {name!r} returned {type(method).__name__}: it returns an object with "
                        "run(x), such as KalmanFilter(model), its parameters estimated")
    return method


def _actual(posterior: Posterior, sequences: Sequences, draws: Draws) -> dict[str, Tensor]:
    """What each observed site took, ``(B, T, ...)``, NaN where missing: the data itself if sites and data share names."""
    found = observations(sequences)
    if all(name in draws.samples and draws.samples[name].shape[3:] == value.shape[2:] for name, value in found.items()):
        return found
    parts: dict[str, list[Tensor]] = {}

    def read() -> None:
        for step in forward(posterior.model, PriorGuide(posterior.model), sequences):
            for name, site in step.sites.items():
                if site.observed and name in draws.samples and site.p.event_shape != (0,):  # not a pyro.factor
                    value = site.value if site.value.is_floating_point() else site.value.to(torch.get_default_dtype())
                    value = value if site.present is None else value.masked_fill(~site.present, torch.nan)
                    parts.setdefault(name, []).append(value)

    with torch.no_grad(), own_parameters(posterior.model):
        posterior.model.within(read, globals=posterior.parameters)
    return {name: pad_rows(values, sequences.packed.counts, sequences.packed) for name, values in parts.items()}


def _log_scores(method: Any, sequences: Sequences, origin: int, horizon: int) -> tuple[Any, Any]:
    """``(B, H)`` each: log scores of the frames after the origin, alone and joint with those between. The first frame has none
    between; for the others, where the method takes no gaps, those alone are NaN."""
    evidence = _evidence(method, sequences, [(origin + h, 0) for h in range(horizon + 1)])
    joint, alone = evidence[:, 1:] - evidence[:, :1], evidence.new_full((len(evidence), horizon - 1), math.nan)
    if horizon > 1:
        try:
            alone = _evidence(method, sequences, [(origin + h, h - 1) for h in range(2, horizon + 1)]) - evidence[:, :1]
        except GapRead:
            pass
    return torch.cat([joint[:, :1], alone], 1), joint


def _evidence(method: Any, sequences: Sequences, copies: list[tuple[int, int]]) -> Tensor:
    """``(B, n)`` by one run of ``n`` copies, each of so many frames, of which so many are missing before the last."""
    batch, times = sequences.num_sequences, torch.arange(max(end for end, _ in copies), device=sequences.device)
    ends, gaps = (torch.tensor(part, device=sequences.device).repeat_interleave(batch) for part in zip(*copies, strict=True))
    last = ends[:, None] - 1
    known = ~((times < last) & (times >= last - gaps[:, None]))
    many = sequences.repeat(len(copies))
    mask = {name: known.reshape(known.shape + (1,) * (v.dim() - 2)) & many.observed.get(name, torch.ones_like(
        v, dtype=torch.bool)) for name, v in many.x.items()}
    copies_of = Sequences.of(many.x, ends, mask=mask, covariates=many.covariates)
    with torch.no_grad():
        found = method.log_evidence(copies_of) if hasattr(method, "log_evidence") else method.run(copies_of).log_evidence
    return found.reshape(len(copies), batch).T


def _scored(draws: Draws, values: Mapping[str, Tensor], origin: int, season: int, levels: Sequence[float],
            head: dict[str, Any], log_scores: tuple[Any, Any]) -> Iterator[pd.DataFrame]:
    for site, value in values.items():
        samples, known, actual = draws.samples[site].to(value.dtype), value[:, :origin], value[:, origin:]
        batch, steps = actual.shape[:2]
        columns = {"actual": actual, "mean": draws.mean(site), "median": samples.median(0).values,
                   "crps": crps_empirical(samples, actual)}
        scale = seasonal_errors(known, season).abs().nanmean(1, keepdim=True)
        columns["scaled_error"] = (actual - columns["median"]).abs() / torch.where(scale > 0, scale, torch.nan)
        lows, highs = (draws.quantile(site, [(1 + sign * level) / 2 for level in levels]) for sign in (-1, 1))
        for level, low, high in zip(levels, lows, highs, strict=True):
            columns[f"coverage_{100 * level:g}"] = ((actual >= low) & (actual <= high)).to(value.dtype)
        shape = (batch, steps, -1)
        flat = {name: column.reshape(shape).double().cpu().numpy() for name, column in columns.items()}
        for name, score in zip(("log_score", "joint_log_score"), log_scores, strict=True):
            score = score.double().cpu().numpy()[..., None] if isinstance(score, Tensor) else np.full((1, 1, 1), score)
            flat[name] = np.broadcast_to(score, flat["actual"].shape)
        sequence, ahead, entry = np.indices(flat["actual"].shape).reshape(3, -1)
        table = pd.DataFrame({
            "method": head["method"], "origin": head["origin"], "sequence": head["sequence"][sequence], "horizon": ahead + 1,
            "site": site, "entry": entry, **{name: column.reshape(-1) for name, column in flat.items()}})
        yield table[table["actual"].notna()]
