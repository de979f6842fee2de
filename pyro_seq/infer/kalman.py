"""The Kalman filter and smoother: exact where the declared step is linear and Gaussian."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.infer.linear import LinearStep, linearise
from pyro_seq.infer.posterior import EXACT, Moments, Posterior
from pyro_seq.infer.run import Stopwatch, entered
from pyro_seq.module import require_model
from pyro_seq.sequences import Sequences

__all__ = ["KalmanFilter"]


class KalmanFilter:
    r"""Exact evidence, filtered and smoothed moments of a linear-Gaussian model.

    The declared step is inspected: if it is found linear-Gaussian at the points tested (the posterior's ``notes`` say
    so) its matrices are read off; if not, the error names the site. Covariates, time-varying matrices, several sites,
    states made of several tensors, autoregression, ragged batches and missing entries are all within reach. Everything
    is computed in float64, whatever the model's dtype.

    :param model: a declared model.
    :param bool assume_linear: take the user's word that the step is linear, and use its matrices at zero.

    Source: Kalman, *A New Approach to Linear Filtering and Prediction Problems*, 1960; Rauch, Tung and Striebel,
    *Maximum likelihood estimates of linear dynamic systems*, 1965.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Level(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 1.0))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> posterior = seq.KalmanFilter(Level()).run(torch.tensor([1.0, 2.0, float("nan")]))
        >>> posterior.filtered["z"].mean
        tensor([[0.5000, 1.4000, 1.4000]])
    """

    def __init__(self, model: Any, *, assume_linear: bool = False):
        require_model(model, "KalmanFilter")
        if model.state_grows:
            raise TypeError("a model from seq.from_pyro has no Markov state to filter: declare it as a StateSpaceModel")
        self.model, self.assume_linear = model, assume_linear

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Posterior:
        """Filter and smooth a batch; the arguments are those of :class:`~pyro_seq.ParticleFilter`.

        :raises ValueError: if the step is not linear-Gaussian, naming the site.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        self.model.check_inputs(sequences)
        return entered(self.model, None, sequences, lambda values: self._run(sequences, values, watch))

    def _run(self, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        first, later = linearise(self.model, sequences, check=not self.assume_linear)
        start = self.model.begin(sequences.frame(1))
        flat = [leaf.double().reshape(sequences.num_sequences, -1) for leaf in leaves(start)]
        initial = torch.cat(flat, -1) if flat else torch.zeros(
            sequences.num_sequences, 0, dtype=torch.float64, device=sequences.device)
        data = _observations(sequences)
        passes = _Passes(first, later, data, initial)
        evidence = passes.filter()
        like = next(v for v in sequences.x.values())
        note = "assumed linear by the user" if self.assume_linear else "found linear-Gaussian at the points tested"
        active = sequences.active

        def moments(mean: list[Tensor], covariance: list[Tensor]) -> dict[str, Moments]:
            out = {}
            for name, (_, shape) in first.latents.items():
                inside = active.reshape(*active.shape, *(1,) * len(shape))
                where = [(first if t == 0 else later).latents[name][0] for t in range(len(mean))]
                found = (torch.stack([m[..., w] for m, w in zip(mean, where, strict=True)], 1), torch.stack(
                    [c.diagonal(dim1=-2, dim2=-1)[..., w] for c, w in zip(covariance, where, strict=True)], 1))
                out[name] = Moments(*(torch.where(inside, v.reshape(*v.shape[:2], *shape), 0.0).to(like.dtype)
                                      for v in found))
            return out

        filtered, smoothed = moments(passes.means, passes.covariances), moments(*passes.smooth())
        by_step = torch.where(active, torch.stack(passes.evidences, 1), 0.0)

        def quantile(site: str, q: float | list[float]) -> Tensor:
            levels = torch.as_tensor(q, dtype=torch.double, device=sequences.device)
            found = filtered[site]
            units = math.sqrt(2) * torch.erfinv(2 * levels - 1).to(found.mean)
            return found.mean + found.std * units.reshape(levels.shape + (1,) * found.mean.dim())

        return Posterior(
            method="Kalman filter", kind=EXACT, log_evidence=evidence, standard_error=torch.zeros_like(evidence),
            sequences=sequences, seconds=watch.seconds,
            filtered=filtered, smoothed=smoothed, parameters=parameters, log_evidence_by_step=by_step, cloud=quantile,
            notes=(note,), final_state=passes.final_state(sequences.lengths, first.template), model=self.model)


def _observations(sequences: Sequences) -> Tensor:
    """``(B, T, D)`` float64, NaN where missing or past the end."""
    flat = torch.cat([v[:, :sequences.num_steps].double().reshape(*sequences.active.shape, -1)
                      for v in sequences.x.values()], -1)
    return flat.masked_fill(~sequences.active[..., None], torch.nan)


class _Passes:
    """Forward and backward recursions over u_t = (state before t, latents at t, data at t)."""

    def __init__(self, first: LinearStep, later: LinearStep | None, data: Tensor, initial: Tensor):
        self.first, self.later, self.data, self.initial = first, later, data, initial
        self.means: list[Tensor] = []
        self.evidences: list[Tensor] = []
        self.covariances: list[Tensor] = []
        self.next_means: list[Tensor] = []
        self.next_covariances: list[Tensor] = []

    def at(self, t: int) -> tuple[Tensor, ...]:
        """Matrices of step ``t`` (from zero), each ``(B or 1, ...)``."""
        step = self.first if t == 0 else self.later
        i = 0 if t == 0 or step.carry.shape[0] == 1 else t - 1
        return step.carry[i], step.drift[i], step.noise[i], step.next_matrix[i], step.next_offset[i]

    def filter(self) -> Tensor:
        """``(B,)`` log evidence; keeps the filtered moments."""
        mean = self.initial
        covariance = mean.new_zeros(*mean.shape, mean.shape[-1])
        total = mean.new_zeros(len(mean))
        for t in range(self.data.shape[1]):
            carry, drift, noise, next_matrix, next_offset = self.at(t)
            u = (carry @ mean[..., None])[..., 0] + drift
            p = carry @ covariance @ carry.transpose(-1, -2) + noise
            u, p, evidence = _condition(u, p, (self.first if t == 0 else self.later).observed, self.data[:, t])
            total = total + evidence
            self.evidences.append(evidence)
            mean = (next_matrix @ u[..., None])[..., 0] + next_offset
            covariance = next_matrix @ p @ next_matrix.transpose(-1, -2)
            self.means.append(u)
            self.covariances.append(p)
            self.next_means.append(mean)
            self.next_covariances.append(covariance)
        return total

    def smooth(self) -> tuple[list[Tensor], list[Tensor]]:
        """Rauch-Tung-Striebel: means and covariances of every u given all data."""
        means, covariances = [self.means[-1]], [self.covariances[-1]]
        for t in reversed(range(self.data.shape[1] - 1)):
            _, _, _, next_matrix, _ = self.at(t)
            cross = self.covariances[t] @ next_matrix.transpose(-1, -2)
            gain = cross @ torch.linalg.pinv(self.next_covariances[t], hermitian=True)
            s = self.later.state_width
            mean = self.means[t] + (gain @ (means[0][:, :s] - self.next_means[t])[..., None])[..., 0]
            change = covariances[0][:, :s, :s] - self.next_covariances[t]
            means.insert(0, mean)
            covariances.insert(0, self.covariances[t] + gain @ change @ gain.transpose(-1, -2))
        return means, covariances

    def final_state(self, lengths: Tensor, template: State) -> Any:
        """A sampler of the state after each sequence's last frame."""
        row = torch.arange(len(lengths), device=lengths.device)
        mean = torch.stack(self.next_means, 1)[row, lengths - 1]
        covariance = torch.stack(self.next_covariances, 1)[row, lengths - 1]

        def sample(num_samples: int) -> State:
            values, vectors = torch.linalg.eigh(covariance)
            root = vectors * values.clamp(min=0).sqrt()[:, None]
            noise = torch.randn(len(mean), num_samples, mean.shape[-1], dtype=mean.dtype, device=mean.device)
            flat = (mean[:, None] + noise @ root.transpose(-1, -2)).flatten(0, 1)
            at = 0

            def take(leaf: Tensor) -> Tensor:
                nonlocal at
                at += leaf.numel()
                return flat[:, at - leaf.numel():at].to(leaf).reshape(len(flat), *leaf.shape[1:])

            return map_state(take, template)

        return sample


def _condition(mean: Tensor, covariance: Tensor, where: slice, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Condition a joint Gaussian on some entries, NaN ones left out: new moments and the log density of the value.

    In Joseph's form, which keeps the covariance positive.
    """
    present = ~value.isnan()
    mean, covariance = mean.expand(len(value), -1), covariance.expand(len(value), -1, -1)
    residual = torch.where(present, value - mean[:, where], 0.0)
    identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    pick = identity[where]
    pick = torch.where(present[..., None], pick, 0.0)
    innovation = pick @ covariance @ pick.transpose(-1, -2) + torch.diag_embed((~present).double())
    factor, failed = torch.linalg.cholesky_ex(innovation)
    if failed.any():
        raise ValueError("the data has a singular predictive covariance: some combination of its entries is predicted "
                         "without noise; give the emission a positive scale")
    gain = torch.cholesky_solve(pick @ covariance, factor).transpose(-1, -2)
    whitened = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
    log_density = -0.5 * (whitened.square().sum(-1) + math.log(2 * math.pi) * present.sum(-1)) - factor.diagonal(
        dim1=-2, dim2=-1).log().sum(-1)
    keep = identity - gain @ pick
    return (mean + (gain @ residual[..., None])[..., 0], keep @ covariance @ keep.transpose(-1, -2), log_density)
