"""The Kalman filter and smoother: exact where the declared step is linear and Gaussian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.compiled.compiler import Compiler, Run
from pyro_seq.engine.loop import is_due
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.infer.linear import LinearStep, linearise, linearise_later, require_linear_at
from pyro_seq.infer.linear_gaussian import Backward, Carry, Forward, Joint, take_out_vague
from pyro_seq.infer.posterior import EXACT, Moments, Posterior
from pyro_seq.infer.run import Stopwatch, entered
from pyro_seq.infer.scan import scan_evidence
from pyro_seq.module import require_model
from pyro_seq.sequences import Sequences

__all__ = ["GaussianPosterior", "KalmanFilter", "KalmanStream"]

_STATES = 64


@dataclass(frozen=True, repr=False)
class GaussianPosterior(Posterior):
    """A posterior with whole covariances; each site's entries are flattened to ``W``."""

    filtered_covariance: Mapping[str, Tensor] = field(default_factory=dict)
    """``(B, T, W, W)`` of z_t given x_1..x_t."""
    smoothed_covariance: Mapping[str, Tensor] = field(default_factory=dict)
    """``(B, T, W, W)`` of z_t given all of x."""
    lag_one_covariance: Mapping[str, Tensor] = field(default_factory=dict)
    """``(B, T - 1, W, W)`` of z_t with z_{t+1} given all of x."""
    joints: tuple[tuple[LinearStep, Joint], ...] = field(default=(), repr=False)
    """The steps of the first frame and of the later ones, with the moments of (state before, latents, data) at each."""


class KalmanFilter:
    r"""Exact evidence, filtered and smoothed moments of a linear-Gaussian model.

    The declared step is inspected: if it is found linear-Gaussian at the points tested (the posterior's ``notes`` say
    so) its matrices are read off; if not, the error names the site. Covariates, time-varying matrices, several sites,
    states made of several tensors, autoregression, ragged batches, missing entries and singular noise (``Delta``) are all
    within reach.

    A latent of the first step that is ``dist.ImproperUniform(constraints.real, (), shape)`` is *exactly diffuse*: the
    evidence is the limit for a prior variance :math:`\kappa \to \infty` of the evidence times :math:`(\sqrt\kappa)^d`, the
    diffuse likelihood of Durbin and Koopman (2012, section 7.2.2) and of statsmodels.

    :param model: a declared model.
    :param bool assume_linear: take the user's word that the step is linear, and use its matrices at zero.
    :param dtype: of the recursions. In ``torch.float32`` covariances are carried as square roots, which stay positive over
        any number of steps.
    :param bool parallel: compute :meth:`log_evidence` by a parallel scan over time, through ``pyro.ops.gaussian``: fast for
        long series on a GPU. It needs noise of full rank, a proper first state and variances of similar size; :meth:`run` does
        not use it.
    :param bool compile: run the recursions of the covariances, with their gradients, and of the smoother's information in
        compiled calls of 8 and 16 steps, see :doc:`compile`. They are compiled when first called with data of a new batch size
        or pattern of gaps, in some 5 to 25 seconds. Evidence with its gradient takes about half the time where covariances
        change throughout (time-varying matrices, gaps), and two thirds where they come to stand still. What tests linearity,
        the means, single steps, matrices of more than 8000 products a step (about 16 states of one sequence, 4 of 100) and
        square roots in single precision run as written, and so does all on a GPU.

    Source: Kalman, *A New Approach to Linear Filtering and Prediction Problems*, 1960; Rauch, Tung and Striebel,
    *Maximum likelihood estimates of linear dynamic systems*, 1965; Durbin and Koopman, *Time Series Analysis by State Space
    Methods*, 2012.

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
        >>> posterior.lag_one_covariance["z"].shape
        torch.Size([1, 2, 1, 1])
    """

    def __init__(self, model: Any, *, assume_linear: bool = False, dtype: torch.dtype = torch.float64, parallel: bool = False,
                 compile: bool = False):
        require_model(model, "KalmanFilter")
        if model.state_grows:
            raise TypeError("a model from seq.from_pyro has no Markov state to filter: declare it as a StateSpaceModel")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}; a Kalman filter runs in torch.float64 or torch.float32")
        self.model, self.assume_linear, self.dtype, self.parallel = model, assume_linear, dtype, parallel
        self.compiler = Compiler("KalmanFilter") if compile else None

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> GaussianPosterior:
        """Filter and smooth a batch; the arguments are those of :class:`~pyro_seq.ParticleFilter`.

        :raises ValueError: if the step is not linear-Gaussian, naming the site.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        self.model.check_inputs(sequences)
        return entered(self.model, None, sequences, lambda values: self._run(sequences, values, watch))

    def log_evidence(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Tensor:
        """``(B,)`` log evidence, with its gradient in the model's parameters: for learning.

        Example::

            >>> import torch, pyro, pyro.distributions as dist
            >>> import pyro_seq as seq
            >>> class Level(seq.StateSpaceModel):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.log_scale = torch.nn.Parameter(torch.tensor(0.0))
            ...     def initial(self):
            ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     def transition(self, z):
            ...         return pyro.sample("z", dist.Normal(z, self.log_scale.exp()))
            ...     def emission(self, z, x=None):
            ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> model = Level()
            >>> seq.KalmanFilter(model).log_evidence(torch.zeros(1, 50)).sum().backward()
            >>> model.log_scale.grad < 0
            tensor(True)
        """
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        self.model.check_inputs(sequences)
        return entered(self.model, None, sequences, lambda _: self._evidence(sequences), learning=True)

    def stream(self, num_sequences: int = 1) -> KalmanStream:
        """A filter for data as it comes, in constant memory."""
        return KalmanStream(self, num_sequences)

    def _evidence(self, sequences: Sequences) -> Tensor:
        if self.parallel:
            first, later = linearise(self.model, sequences, check=not self.assume_linear)
            found = scan_evidence(first, later, _observations(sequences, self.dtype),
                                  _initial_state(self.model, sequences).to(self.dtype))
        else:
            found = self._forward(sequences, alone=False)[2].evidence()
        return found.to(next(iter(sequences.x.values())).dtype)

    def _run_compiled(self) -> Run | None:
        return None if self.compiler is None else self.compiler.run()

    def _forward(self, sequences: Sequences, alone: bool) -> tuple[LinearStep, LinearStep | None, Forward]:
        first, later = linearise(self.model, sequences, check=not self.assume_linear)
        start = _initial_state(self.model, sequences).to(self.dtype)
        opening, prior = take_out_vague(first, later, self.dtype)
        data = _observations(sequences, self.dtype)
        forward = Forward(opening, later, data, sequences.active, Carry.start(start, prior), alone, self._run_compiled())
        if not self.assume_linear:
            _require_linear_where_it_is(forward)
        return first, later, forward

    def _forecast(self, sequences: Sequences, forward: Forward, future: Sequences) -> dict[str, Moments]:
        """Exact moments ``(B, H, ...)`` of latents and data; sequences of one length have their future times in common."""
        last, horizon = forward.stretches[-1].step, future.num_steps
        mean, covariance = forward.last_state()
        found: dict[str, Moments] = {}
        for length in sequences.lengths.unique().tolist():
            rows = (sequences.lengths == length).nonzero()[:, 0]
            unknown = {k: v.new_full((len(rows), horizon, *v.shape[2:]), torch.nan) for k, v in sequences.x.items()}
            part = Sequences(unknown, future.lengths[rows], {k: v[rows] for k, v in future.covariates.items()}, {}, True)
            step = linearise_later(self.model, part, last, range(length + 1, length + horizon + 1), not self.assume_linear)
            carry = Carry.start(mean[rows], mean.new_zeros(0))._replace(covariance=covariance[rows])
            ahead = Forward(None, step, _observations(part, self.dtype), part.active, carry, True, self._run_compiled())
            moments = Backward(ahead).moments()[0]
            parts = _by_name(part, *(v.transpose(0, 1).expand(len(rows), -1, -1) for v in ahead.predicted()))
            for name, (where, shape) in step.latents.items():
                parts[name] = Moments(*(v[..., where].transpose(0, 1).reshape(len(rows), horizon, *shape) for v in (
                    moments.filtered_mean, moments.filtered_covariance.diagonal(dim1=-2, dim2=-1).expand_as(
                        moments.filtered_mean))))
            for name, own in parts.items():
                if name not in found:
                    blank = own.mean.new_zeros(sequences.num_sequences, *own.mean.shape[1:])
                    found[name] = Moments(blank, blank.clone())
                found[name].mean[rows], found[name].variance[rows] = own.mean, own.variance
        like = next(iter(sequences.x.values()))
        return {name: Moments(own.mean.to(like.dtype), own.variance.to(like.dtype)) for name, own in found.items()}

    def _run(self, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> GaussianPosterior:
        first, later, forward = self._forward(sequences, alone=True)
        backward = Backward(forward)
        joints = backward.moments()
        steps = [first] if later is None else [first, later]
        like = next(iter(sequences.x.values()))
        active, batch = sequences.active, sequences.num_sequences
        where = {name: [step.latents[name][0] for step in steps] for name in first.latents}

        def inside(value: Tensor, shape: tuple[int, ...]) -> Tensor:
            """``(T, B or 1, ...)`` to ``(B, T, *shape)``, zero past the ends."""
            value = value.transpose(0, 1).expand(batch, -1, *value.shape[2:]).reshape(batch, -1, *shape)
            return torch.where(active[:, :value.shape[1]].reshape(batch, -1, *(1,) * len(shape)), value, 0.0).to(like.dtype)

        filtered, smoothed, filtered_covariance, smoothed_covariance, lag_one = {}, {}, {}, {}, {}
        for name, (_, shape) in first.latents.items():
            at, width = where[name], shape.numel()
            for kind, found, whole in (("filtered", filtered, filtered_covariance),
                                       ("smoothed", smoothed, smoothed_covariance)):
                means = torch.cat([getattr(j, f"{kind}_mean")[..., w] for j, w in zip(joints, at, strict=True)])
                covariances = torch.cat([getattr(j, f"{kind}_covariance")[..., w[:, None], w]
                                         for j, w in zip(joints, at, strict=True)])
                found[name] = Moments(inside(means, shape),
                                      inside(covariances.diagonal(dim1=-2, dim2=-1), shape))
                whole[name] = inside(covariances, (width, width))
            following = backward.lag_one(at)
            lag_one[name] = inside(torch.cat([following, following.new_zeros(1, *following.shape[1:])]),
                                   (width, width))[:, :sequences.num_steps - 1]
            ends = active[:, 1:, None, None]
            lag_one[name] = torch.where(ends, lag_one[name], 0.0)
        evidence = forward.evidence_by_step()
        total = forward.evidence().to(like.dtype)

        def quantile(site: str, q: float | list[float]) -> Tensor:
            levels = torch.as_tensor(q, dtype=torch.double, device=sequences.device)
            found = filtered[site]
            units = math.sqrt(2) * torch.erfinv(2 * levels - 1).to(found.mean)
            return found.mean + found.std * units.reshape(levels.shape + (1,) * found.mean.dim())

        def paths(num_samples: int) -> dict[str, Tensor]:
            drawn = backward.draw(num_samples)
            return {name: torch.stack([inside(values, shape) for values in torch.cat(
                [d[..., w] for d, w in zip(drawn, where[name], strict=True)]).unbind(2)])
                for name, (_, shape) in first.latents.items()}

        predicted = _by_name(sequences, *(inside(v, v.shape[2:]) for v in forward.predicted()))
        note = "assumed linear by the user" if self.assume_linear else "found linear-Gaussian at the points tested"
        return GaussianPosterior(
            method="Kalman filter", kind=EXACT, log_evidence=total, standard_error=torch.zeros_like(total),
            sequences=sequences, seconds=watch.seconds, filtered=filtered, smoothed=smoothed, parameters=parameters,
            log_evidence_by_step=evidence.to(like.dtype), predictive=predicted, cloud=quantile,
            forecast_moments=lambda future: self._forecast(sequences, forward, future), paths=paths, notes=(note,),
            final_state=_final_state(forward, first.template), model=self.model,
            filtered_covariance=filtered_covariance, smoothed_covariance=smoothed_covariance, lag_one_covariance=lag_one,
            joints=tuple(zip(steps, joints, strict=True)))


class Update(NamedTuple):
    """What a stretch of new frames has told."""

    log_evidence: Tensor
    """``(B, n)`` log predictive density of each new frame given all before it."""
    mean: Tensor
    """``(B, S)`` of the carried state, its entries flattened, given all data so far."""
    covariance: Tensor
    """``(B, S, S)``"""


class KalmanStream:
    """A Kalman filter that is given its data piece by piece, and keeps nothing but the state.

    Made by :meth:`KalmanFilter.stream`.

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
        >>> stream = seq.KalmanFilter(Level()).stream()
        >>> for _ in range(3):
        ...     update = stream.update(torch.ones(1, 100))
        >>> stream.num_steps, update.mean.shape
        (300, torch.Size([1, 1]))
    """

    def __init__(self, method: KalmanFilter, num_sequences: int):
        self.method, self.num_sequences = method, num_sequences
        self.num_steps = 0
        self.log_evidence: Tensor | None = None
        """``(B,)`` of all data so far."""
        self._carry: Carry | None = None
        self._step: LinearStep | None = None
        self._updates = 0

    def update(self, x: Any, *, mask: Any = None, **covariates: Any) -> Update:
        """Take ``n >= 1`` new frames of every sequence.

        :param x: ``(B, n, ...)``, NaN where missing, as accepted by :meth:`pyro_seq.Sequences.of`.
        """
        sequences = Sequences.of(x, mask=mask, covariates=covariates)
        if sequences.num_sequences != self.num_sequences or not bool(sequences.active.all()):
            raise ValueError(f"the stream has {self.num_sequences} sequences and was given {sequences}: each takes the same "
                             "number of new frames, NaN where one has none")
        model = self.method.model
        model.check_inputs(sequences)
        return entered(model, None, sequences, lambda _: self._update(sequences))

    def _update(self, sequences: Sequences) -> Update:
        method, check, first = self.method, not self.method.assume_linear, None
        count, updates = sequences.num_steps, self._updates + 1
        if self._carry is None:
            first, later = linearise(method.model, sequences, check)
            first, prior = take_out_vague(first, later, method.dtype)
            carry = Carry.start(_initial_state(method.model, sequences).to(method.dtype), prior)
            step = later or first
        else:
            times = range(self.num_steps + 1, self.num_steps + count + 1)
            carry, step = self._carry, self._step
            later = linearise_later(method.model, sequences, step, times, check)
        forward = Forward(first, later, _observations(sequences, method.dtype), sequences.active, carry, True,
                          method._run_compiled())
        if check and is_due(updates):
            _require_linear_where_it_is(forward, self.num_steps + (2 if first is not None else 1))
        self._carry, self._step, self._updates = forward.carried(), step, updates
        self.num_steps += count
        found = forward.evidence_by_step()
        self.log_evidence = found.sum(1) if self.log_evidence is None else self.log_evidence + found.sum(1)
        return Update(found, *forward.last_state())


def _require_linear_where_it_is(forward: Forward, start: int = 2) -> None:
    """Test the step of the later frames again, about filtered states that they begin from, spread over time and sequences.

    :param start: the time of the first of them.
    """
    stretch = forward.stretches[-1]
    if stretch.step.probe.first:
        return  # tested at draws of its own
    found = forward.some_states(_STATES)
    if found is not None:
        frame, sequence, state = found
        require_linear_at(stretch.step, frame + start, sequence, state)


def _initial_state(model: Any, sequences: Sequences) -> Tensor:
    """``(B, S)``: the state before the first step, which is known."""
    found = [leaf.double().reshape(sequences.num_sequences, -1) for leaf in leaves(model.begin(sequences.frame(1)))]
    return torch.cat(found, -1) if found else torch.zeros(
        sequences.num_sequences, 0, dtype=torch.float64, device=sequences.device)


def _observations(sequences: Sequences, dtype: torch.dtype) -> Tensor:
    """``(B, T, X)``, NaN where missing or past the end."""
    parts = [v[:, :sequences.num_steps].to(dtype).reshape(*sequences.active.shape, -1) for v in sequences.x.values()]
    flat = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    ragged = bool((sequences.lengths < sequences.num_steps).any())
    return flat.masked_fill(~sequences.active[..., None], torch.nan) if ragged else flat


def _by_name(sequences: Sequences, mean: Tensor, variance: Tensor) -> dict[str, Moments]:
    """``(B, T, X)`` moments of all data, by the name and in the shape of each."""
    sizes = [v[0, 0].numel() for v in sequences.x.values()]
    parts = zip(sequences.x.items(), mean.split(sizes, -1), variance.split(sizes, -1), strict=True)
    return {name: Moments(*(v.reshape(*v.shape[:2], *x.shape[2:]) for v in own)) for (name, x), *own in parts}


def _final_state(forward: Forward, template: State) -> Any:
    """A sampler of the state after each sequence's last frame."""
    mean, covariance = forward.last_state()

    def sample(num_samples: int) -> State:
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()[:, None]
        noise = torch.randn(len(mean), num_samples, mean.shape[-1], dtype=mean.dtype, device=mean.device)
        flat = (mean[:, None] + noise @ root.mT).flatten(0, 1)
        at = 0

        def take(leaf: Tensor) -> Tensor:
            nonlocal at
            at += leaf.numel()
            return flat[:, at - leaf.numel():at].to(leaf).reshape(len(flat), *leaf.shape[1:])

        return map_state(take, template)

    return sample
