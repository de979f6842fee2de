"""What every method returns: the evidence with its kind, moments, and a way to look ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_seq.engine.loop import propagate
from pyro_seq.engine.state import State
from pyro_seq.module import own_parameters, require_count
from pyro_seq.sequences import Frame, Sequences

__all__ = ["EXACT", "LOWER_BOUND", "UNBIASED", "Draws", "Moments", "Posterior"]

EXACT = "exact"
UNBIASED = "log of an unbiased estimate"
"""Itself biased low, by about half its variance."""
LOWER_BOUND = "lower bound"


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a site at each time, ``(B, T, ...)`` each."""

    mean: Tensor
    variance: Tensor

    @property
    def std(self) -> Tensor:
        return self.variance.clamp(min=0).sqrt()


@dataclass(frozen=True)
class Draws:
    """Samples of trajectories: ``samples[site]`` is ``(S, B, H, ...)``."""

    samples: Mapping[str, Tensor]
    times: Tensor
    """``(B, H)`` 1-based times."""

    def mean(self, site: str) -> Tensor:
        """``(B, H, ...)``"""
        return self._floating(site).mean(0)

    def std(self, site: str) -> Tensor:
        """``(B, H, ...)``"""
        return self._floating(site).std(0)

    def quantile(self, site: str, q: float | list[float]) -> Tensor:
        """``(B, H, ...)``, with a leading dimension if ``q`` is a list."""
        value = self._of(site)
        _check_levels(q)
        return torch.as_tensor(np.quantile(value.cpu().numpy(), q, axis=0), dtype=value.dtype, device=value.device)

    def to_dataframe(self, quantiles: tuple[float, ...] = (0.05, 0.5, 0.95)) -> pd.DataFrame:
        """One row per sequence, time, site and entry: mean, std and quantiles."""
        frames = []
        for site in self.samples:
            columns = {"mean": self.mean(site), "std": self.std(site)}
            columns |= {f"q{q:g}": self.quantile(site, q) for q in quantiles}
            frames.append(_table(site, columns, self.times))
        return pd.concat(frames, ignore_index=True)

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
    """What ``log_evidence`` is: exact, the log of an unbiased estimate, or a lower bound."""
    log_evidence: Tensor
    """``(B,)`` nats."""
    standard_error: Tensor
    """``(B,)`` Monte Carlo standard error of ``log_evidence``; zero if exact, NaN if one run cannot tell."""
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
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    """The global parameters all this is conditional on."""
    notes: tuple[str, ...] = ()
    final_state: Callable[[int], State] | None = field(default=None, repr=False)
    """Given S, draws of the state after each sequence's last frame, ``(B * S, ...)`` rows."""
    paths: Callable[[int], dict[str, Tensor]] | None = field(default=None, repr=False)
    """Given S, draws of the latent trajectories, ``(S, B, T, ...)``."""
    cloud: Callable[[str, Any], Tensor] | None = field(default=None, repr=False)
    """Weighted quantiles of a site, ``(B, T, ...)``."""
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
        if self.paths is None:
            raise ValueError(f"{self.method} has no trajectories to draw: use ParticleFilter(history=True) with num_runs=1, or "
                             "Variational")
        steps = self.sequences.num_steps
        times = torch.arange(1, steps + 1, device="cpu").expand(self.sequences.num_sequences, steps)
        return Draws(self.paths(num_samples), times)

    def predict(self, horizon: int, num_samples: int = 1000, **covariates: Any) -> Draws:
        """Draw the future of every sequence: latents and observations ``horizon`` steps past its end.

        :param covariates: future inputs, ``(B, horizon, ...)`` each.
        :returns: samples ``(S, B, horizon, ...)`` of every site.
        """
        require_count("horizon", horizon, 1)
        require_count("num_samples", num_samples, 1)
        if self.final_state is None or self.model is None:
            raise ValueError(f"{self.method} cannot predict: its model runs on the data it was given")
        batch, lengths, device = self.sequences.num_sequences, self.sequences.lengths, self.sequences.device
        future = Sequences.of(None, [horizon] * batch, covariates=covariates)
        self.model.check_inputs(future)
        sequence = torch.arange(batch, device=device).repeat_interleave(num_samples)
        frames = (Frame(lengths[sequence] + h, batch * num_samples, {},
                        {k: v[:, h - 1].to(device)[sequence] for k, v in future.covariates.items()}, False, sequence,
                        False, {}, device) for h in range(1, horizon + 1))
        with torch.no_grad(), own_parameters(self.model):
            drawn: dict[str, list[Tensor]] = {}
            for sites, _ in self.model.within(lambda: list(propagate(self.model, self.final_state(num_samples), frames)),
                                              globals=self.parameters):
                for name, site in sites.items():
                    drawn.setdefault(name, []).append(
                        site.value.reshape(batch, num_samples, *site.value.shape[1:]).transpose(0, 1))
        return Draws({name: torch.stack(parts, 2) for name, parts in drawn.items()},
                     lengths.cpu()[:, None] + torch.arange(1, horizon + 1, device="cpu"))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sequence, time, latent site and entry: filtered (and smoothed) mean and standard deviation."""
        frames = []
        times = torch.arange(1, self.sequences.num_steps + 1, device="cpu").expand(self.sequences.num_sequences, -1)
        for site in {**self.filtered, **self.smoothed}:
            columns = {}
            for what, found in (("filtered", self.filtered), ("smoothed", self.smoothed)):
                if site in found:
                    columns |= {f"{what}_mean": found[site].mean, f"{what}_std": found[site].std}
            frames.append(_table(site, columns, times, self.sequences.active))
        return pd.concat(frames, ignore_index=True)

    def to_arviz(self, num_samples: int = 500) -> Any:
        """The latent trajectories as an arviz ``InferenceData`` (one chain), with the data."""
        import arviz

        draws = self.trajectories(num_samples)
        return arviz.from_dict(
            posterior={name: value.cpu().numpy()[None] for name, value in draws.samples.items()},
            observed_data={name: value.cpu().numpy() for name, value in self.sequences.x.items()})

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


def _check_levels(q: float | list[float]) -> None:
    if not all(0 <= level <= 1 for level in np.atleast_1d(np.asarray(q, dtype=float))):
        raise ValueError(f"q={q}: quantiles are between 0 and 1")


def _table(site: str, columns: Mapping[str, Tensor], times: Tensor, active: Tensor | None = None) -> pd.DataFrame:
    head = next(iter(columns.values()))
    batch, steps = head.shape[:2]
    width = int(np.prod(head.shape[2:], dtype=int))
    index = np.indices((batch, steps, width)).reshape(3, -1)
    frame = pd.DataFrame({"sequence": index[0], "time": times.cpu().numpy()[index[0], index[1]], "site": site,
                          "entry": index[2],
                          **{name: value.detach().cpu().numpy().reshape(-1) for name, value in columns.items()}})
    return frame if active is None else frame[active.cpu().numpy()[index[0], index[1]]].reset_index(drop=True)
