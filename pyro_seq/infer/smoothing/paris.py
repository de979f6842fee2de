"""Smoothed sums over time, on line: the particle-based, rapid incremental smoother."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.loop import Step
from pyro_seq.engine.sites import Site
from pyro_seq.engine.weights import Weights
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.posterior import Posterior
from pyro_seq.infer.smc.record import Record, Told
from pyro_seq.infer.smc.snapshot import Snapshot
from pyro_seq.infer.smc.stream import ParticleStream
from pyro_seq.infer.smoothing.kernel import BackwardKernel, require_backward
from pyro_seq.module import require_count
from pyro_seq.sequences import Packed

__all__ = ["AdditivePosterior", "Functional", "Paris", "ParisStream"]

Functional = Callable[[Any, Any, Any, Tensor], Tensor]
"""``h(before, after, x, t)``: the latents of the step before (``None`` at the first) and of this one, the frame and the 1-based
time ``(rows,)``, each ``(rows, ...)`` or a dict of these by site or name where there are several; returns ``(rows, ...)``."""


@dataclass(frozen=True, repr=False)
class AdditivePosterior(Posterior):
    """A particle filter's posterior, with a smoothed sum."""

    expectation: Tensor | None = None
    """``(B, T, ...)``: at t, the sum over s up to t of the functional, expected given :math:`x_{1:t}`; zero past a sequence's
    end."""


class Paris(ParticleFilter):
    r"""The running smoothed expectation of a sum over time, :math:`E[\sum_{s \le t} h(z_{s-1}, z_s, x_s, s) \mid x_{1:t}]`.

    Each particle carries an estimate of the sum given that the path ends in it, and averages at each step over ``num_backward``
    particles that it may have come from, drawn by :math:`W_{t-1}^j f(z_t \mid z_{t-1}^j)`. With two or more draws the variance
    stays of the order of ``T / N``, where the genealogy's (one draw, its ancestor) is of the order of :math:`T^2 / N`; nothing
    of the past is kept. Sufficient statistics, scores (by Fisher's identity) and smoothed moments are such sums.
    :meth:`stream` gives them for data as it comes.

    It works for the models of :class:`~pyro_seq.BackwardSampler`, and refuses the others.

    :param model: a declared model.
    :param functional: ``h(before, after, x, t)``, of the latents of the step before (``None`` at the first step) and of this
        one, the frame and the 1-based time; ``(rows, ...)`` each, dicts by site where there are several. Returns
        ``(rows, ...)``. A frame's missing entries are NaN.
    :param int num_particles: N.
    :param int num_backward: draws for each particle and step.
    :param str method: as for :class:`~pyro_seq.BackwardSampler`; with ``'rejection'`` a step costs about ``N * num_backward``
        instead of ``N * N``.
    :param options: those of :class:`~pyro_seq.ParticleFilter`: ``guide``, ``ess_threshold``, ``progress``.

    Source: Olsson and Westerborn, *Efficient particle-based online smoothing in general hidden Markov models: the PaRIS
    algorithm*, 2017.

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
        >>> def squared_moves(before, after, x, t):
        ...     return torch.zeros_like(after) if before is None else (after - before).square()
        >>> posterior = seq.Paris(LocalLevel(), squared_moves, 200, method="rejection").run(torch.zeros(2, 30), [30, 20])
        >>> posterior.expectation.shape
        torch.Size([2, 30])
        >>> stream = seq.Paris(LocalLevel(), squared_moves, 200).stream()
        >>> for x_t in torch.zeros(3, 2):
        ...     expectation = stream.update(x_t).expectation
        >>> expectation.shape
        torch.Size([2])
    """

    adds = "sums over the particles as it goes"

    def __init__(self, model: Any, functional: Functional, num_particles: int = 1000, *, num_backward: int = 2,
                 method: str = "exact", **options: Any):
        super().__init__(model, num_particles, **options)
        require_backward(model, method, "Paris")
        if not callable(functional):
            raise TypeError(f"functional is a {type(functional).__name__}; it is a function h(before, after, x, t)")
        require_count("num_particles", num_particles, 2)
        require_count("num_backward", num_backward, 1)
        if self.num_runs != 1 or self.history:
            raise ValueError("Paris makes one run and keeps nothing of the past: leave num_runs and history out")
        self.functional, self.num_backward, self.method = functional, num_backward, method

    def stream(self) -> ParisStream:
        """A filter for data as it comes, in constant memory; each update has the ``expectation`` so far, ``(B, ...)``."""
        return ParisStream(self)

    def recorder(self, packed: Packed) -> Record:
        return _Sums(packed, self)

    def _run(self, *arguments: Any) -> AdditivePosterior:
        found = super()._run(*arguments)
        sums = found.particles
        fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
        return AdditivePosterior(**fields | {"method": f"{found.method}, PaRIS"}, expectation=sums.padded(sums.expected))


class _Last(NamedTuple):
    """What the next step's sums need of a step."""

    step: Step
    sums: Tensor
    """``(n, N, ...)`` of each particle."""


class _Adder:
    """Carries each particle's sum on."""

    def __init__(self, smoother: Paris):
        self.smoother = smoother
        self.kernel = BackwardKernel(smoother.model, smoother.method)

    def add(self, last: _Last | None, step: Step, weights: Weights) -> tuple[_Last, Tensor]:
        """:returns: what to hand over with the next step; and the expected sum ``(n, ...)``."""
        n, particles = weights.log.shape
        if last is None:
            sums = self._terms(step, None, None, step.frame.rows).unflatten(0, (n, particles))
        else:
            self.kernel.check(step)
            every = torch.arange(particles, device=weights.log.device).expand(n, particles)
            count = self.smoother.num_backward
            index, _ = self.kernel.draw(last.step, step, every, count)
            row = torch.arange(n, device=index.device)[:, None, None]
            source = (row * particles + index).reshape(-1)
            terms = self._terms(step, last.step, source, n * particles * count)
            before = last.sums.flatten(0, 1)[source]
            if terms.shape != before.shape:
                raise ValueError(f"functional returned {('rows', *terms.shape[1:])} at time {step.frame.t} and "
                                 f"{('rows', *before.shape[1:])} before: terms of a sum have one shape".replace("'", ""))
            sums = (before + terms).unflatten(0, (n, particles, count)).mean(2)
        chances = weights.normalised.reshape(n, particles, *(1,) * (sums.dim() - 2))
        # No graph, no particles but the last: of the step before, its state, weights and latents are needed.
        return _Last(step._replace(before=None), sums), (chances * sums).sum(1)

    def _terms(self, step: Step, before: Step | None, source: Tensor | None, rows: int) -> Tensor:
        """``(rows, ...)`` the functional's values, each particle of ``step`` with its ``source`` among those of the step
        before."""
        target = torch.arange(step.frame.rows, device=step.log_weights.device).repeat_interleave(rows // step.frame.rows)
        earlier = None if before is None else _alone({name: value[source] for name, value in _latents(before).items()})
        after = _alone({name: value[target] for name, value in _latents(step).items()})
        frame = _alone({name: value[target] for name, value in step.frame.x.items()})
        found = self.smoother.functional(earlier, after, frame, step.frame.time[target])
        if not isinstance(found, Tensor) or found.shape[:1] != (rows,):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"functional returned {shape} at time {step.frame.t}; it is a tensor (rows, ...) = ({rows}, ...)")
        return found if found.is_floating_point() else found.to(step.log_weights.dtype)


class _Sums(Record):
    """A record with the expected sum of each step."""

    def __init__(self, packed: Packed, smoother: Paris):
        super().__init__(packed, smoother.num_particles, smoother.measured)
        self.reads_steps = True
        self.adder, self.before = _Adder(smoother), None
        self.expected: list[Tensor] = []

    def add(self, step: Step, weights: Weights, factor: Tensor, chances: Tensor | None = None, told: Told | None = None
            ) -> None:
        super().add(step, weights, factor, chances, told)
        self.before, expected = self.adder.add(self.before, step, weights)
        self.expected.append(expected)


class ParisStream(ParticleStream):
    """A :class:`~pyro_seq.infer.smc.stream.ParticleStream` whose updates have the smoothed sum too; made by
    :meth:`Paris.stream`."""

    method: Paris

    def __init__(self, method: Paris):
        super().__init__(method)
        self._adder, self._last = _Adder(method), None

    def _smooth(self, step: Step, weights: Weights) -> tuple[_Last, Tensor]:
        return self._adder.add(self._last, step, weights)

    def _keep(self, found: _Last) -> None:
        self._last = found

    def _held(self) -> dict[str, Any]:
        if self._last is None:
            return {"sums": None, "values": {}}
        return {"sums": self._last.sums.detach().clone(),
                "values": {name: value.detach().clone() for name, value in _latents(self._last.step).items()}}

    def _read_held(self, found: Mapping[str, Any], snapshot: Snapshot) -> _Last | None:
        sums, values = found["sums"], dict(found["values"])
        if snapshot.time == 0:
            if sums is not None or values:
                raise ValueError("time=0, before the first frame, and yet it holds sums")
            return None
        shape = snapshot.log_weights.shape
        if not isinstance(sums, Tensor) or not sums.is_floating_point() or sums.shape[:2] != shape:
            raise ValueError(f"sums are {_what(sums)}; they are a floating tensor {(*shape, '...')}")
        if set(values) != snapshot.latents:
            raise ValueError(f"values are of {sorted(values)}, and the latents are {sorted(snapshot.latents)}")
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (shape.numel(),):
                raise ValueError(f"values[{name!r}] is {_what(value)}; it has {shape[0]} * {shape[1]} rows")
            if not bool(value.isfinite().all()):
                raise ValueError(f"values[{name!r}] are NaN or infinite")
        sites = {name: Site(name, value.clone(), None, None, False, None, 1.0, None) for name, value in values.items()}
        return _Last(Step(None, sites, None, snapshot.state, snapshot.log_weights, None, None), sums.clone())

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "num_backward": self.method.num_backward, "backward": self.method.method}


def _latents(step: Step) -> dict[str, Tensor]:
    return {name: site.value for name, site in step.sites.items() if not site.observed}


def _alone(values: dict[str, Tensor]) -> Any:
    return next(iter(values.values())) if len(values) == 1 else values


def _what(value: Any) -> Any:
    return f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
