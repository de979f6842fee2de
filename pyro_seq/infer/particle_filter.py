"""The particle filter: the weighted loop with resampling between the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_seq.engine.compiled.compiler import Compiler
from pyro_seq.engine.generators import generator_states, set_generators
from pyro_seq.engine.loop import Step, forward
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.posterior import BIASED, UNBIASED, Moments, Posterior
from pyro_seq.infer.run import Stopwatch, entered, refuse_scaled
from pyro_seq.infer.smc import diagnostics
from pyro_seq.infer.smc.compiled import Failed, filter_compiled
from pyro_seq.infer.smc.many import log_evidence_at
from pyro_seq.infer.smc.population import LookAhead, Population, require_threshold
from pyro_seq.infer.smc.record import Record, values_of
from pyro_seq.infer.smc.stream import ParticleStream
from pyro_seq.module import require_count, require_guide, require_model
from pyro_seq.resampling import Resampler, Scheme, named, resolve
from pyro_seq.sequences import Packed, Sequences

__all__ = ["ParticleFilter"]


class ParticleFilter:
    r"""Sequential importance sampling with resampling, for any declared model.

    Every sequence of the batch has its own particles, weights and ancestors. Particles are proposed from ``guide``, or
    from the model's prior (the bootstrap filter), and resampled *before* a step, whenever the effective sample size has
    fallen below ``ess_threshold * num_particles``. The evidence estimate

    .. math:: \hat p(x_{1:T}) = \prod_t \sum_i W_{t-1}^i \, w_t^i

    is unbiased, unless ``resampling`` is not; its logarithm is biased low. The standard error of one run is that of
    :class:`~pyro_seq.infer.smc.families.Families`, from the variance of Lee and Whiteley: unbiased for multinomial resampling
    at every step, an approximation otherwise (its variance was up to a half too small where tested), and NaN for series so long
    that one run cannot tell; that of several runs is of their spread, which is the one to rely on.
    :meth:`Posterior.diagnostics` says whether the particles can be trusted, and ``notes`` what is wrong where they cannot.

    :param model: a declared model.
    :param int num_particles: N.
    :param guide: a sequential guide; any guide of the library, AVF included.
    :param float ess_threshold: 0 never resamples, 1 always does.
    :param resampling: a name of ``seq.resampling.NAMES``, a scheme, or a :class:`~pyro_seq.resampling.Resampler`.
    :param int num_runs: independent filters; their average is returned, and their spread is its standard error.
    :param bool history: keep all particles and ancestors of one run, ``T`` times the memory, for quantiles, trajectories and
        smoothed moments. The last two trace the ancestors of the last particles, of which few are left far from the end
        (``notes`` says where): :class:`~pyro_seq.BackwardSampler` and :class:`~pyro_seq.FixedLagSmoother` do not have that
        flaw.
    :param bool progress: show a progress bar.
    :param bool compile: run each step as machine code of its own, by Inductor, of the same random draws: the same numbers to
        rounding (with very many particles in float32, a particle here and there may have another ancestor). It is made in the
        first run, in some seconds, for the shapes of the data and what the model's attributes and the variables that it names
        then hold; parameters and buffers may change. A C++ compiler is needed. Steps that decide by the value of a tensor, as
        those of :class:`~pyro_seq.KalmanGuide` and :class:`~pyro_seq.EnumeratedGuide` do, run as written, with a warning; so
        do, without one, the first step, those with missing data that the state reads, and :meth:`stream`.

    Source: Gordon, Salmond and Smith, *Novel approach to nonlinear/non-Gaussian Bayesian state estimation*, 1993;
    Chopin and Papaspiliopoulos, *An Introduction to Sequential Monte Carlo*, 2020, chapter 10.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class StochasticVolatility(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(-1.0, 0.7))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(-1.0 + 0.97 * (z + 1.0), 0.18))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(0.0, torch.exp(z / 2)), obs=x)
        >>> model = StochasticVolatility()
        >>> posterior = seq.ParticleFilter(model, num_particles=500).run(model.simulate([50, 30])["x"], [50, 30])
        >>> posterior.filtered["z"].mean.shape, posterior.ess.shape
        (torch.Size([2, 50]), torch.Size([2, 50]))
    """

    adds: str | None = None
    """What a subclass does beyond filtering, with all of the data at hand."""

    def __init__(self, model: Any, num_particles: int = 1000, *, guide: Any = None, ess_threshold: float = 0.5,
                 resampling: str | Scheme | Resampler = "systematic", num_runs: int = 1, history: bool = False,
                 progress: bool = False, compile: bool = False):
        require_model(model, "ParticleFilter")
        require_count("num_particles", num_particles, 1)
        require_count("num_runs", num_runs, 1)
        require_threshold(ess_threshold)
        if history and num_runs > 1:
            raise ValueError(f"history=True keeps the particles of one run, and num_runs={num_runs}: use num_runs=1 and more "
                             "particles, or leave history out")
        if guide is not None:
            require_guide(guide, model, "ParticleFilter")
        self.resampler = resolve(resampling)
        if model.state_grows and not self.resampler.ancestral:
            raise ValueError(f"{type(self.resampler).__name__} mixes the particles' states, and the state of a from_pyro model "
                             "is its path: use a resampling by ancestors, such as 'systematic'")
        self.model, self.guide, self.num_particles = model, guide, num_particles
        self.ess_threshold, self.num_runs, self.history, self.progress = ess_threshold, num_runs, history, progress
        self.compiler = Compiler(type(self).__name__) if compile else None

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Posterior:
        """Filter a batch of sequences.

        :param x: data as accepted by :meth:`pyro_seq.Sequences.of`.
        :param lengths: ``(B,)`` integers.
        :param mask: True where observed.
        :param covariates: ``(B, T, ...)`` each.
        :raises ValueError: when a weight is not a number, or all particles of a sequence have weight zero.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        guide = PriorGuide(self.model) if self.guide is None else self.guide
        return entered(self.model, guide, sequences, lambda values: self._run(guide, sequences, values, watch))

    def stream(self) -> ParticleStream:
        """A filter for data as it comes, in constant memory."""
        self._refuse_alone("stream")
        return ParticleStream(self)

    def log_evidence_at(self, parameters: Mapping[str, Tensor], x: Any, lengths: Any = None, *, mask: Any = None,
                        chunk_size: int | None = None, **covariates: Any) -> Tensor:
        """Filter a batch once for each of M parameter values, all of them in one pass.

        Each value has its own particles, weights and ancestors, so that the evidences are independent and each is unbiased.
        The step is run over the values by ``torch.func.vmap``; a step that this cannot map is an error that says where.

        :param parameters: values ``(M, ...)`` of all global parameters (``PyroSample``), and of parameters that are attributes
            of the model, by name.
        :param x: data, as ``lengths``, ``mask`` and ``covariates`` as for :meth:`run`.
        :param chunk_size: values in one pass; 1 runs one after the other, for which any step will do.
        :returns: ``(M, B)`` log evidence, minus infinity where all particles have weight zero.

        Example::

            >>> import torch, pyro, pyro.distributions as dist
            >>> import pyro_seq as seq
            >>> class Autoregression(seq.StateSpaceModel):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.phi = pyro.nn.PyroSample(dist.Uniform(-1.0, 1.0))
            ...     def initial(self):
            ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     def transition(self, z):
            ...         return pyro.sample("z", dist.Normal(self.phi * z, 1.0))
            ...     def emission(self, z, x=None):
            ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> method = seq.ParticleFilter(Autoregression(), num_particles=100)
            >>> method.log_evidence_at({"phi": torch.linspace(-0.9, 0.9, 7)}, torch.zeros(2, 10)).shape
            torch.Size([7, 2])
        """
        self._refuse_alone("log_evidence_at")
        if self.num_runs != 1:
            raise ValueError("log_evidence_at runs one filter a value: make the ParticleFilter with num_runs=1, and repeat the "
                             "values")
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return log_evidence_at(self, parameters, sequences, chunk_size)

    def _refuse_alone(self, what: str) -> None:
        """Raise if this method adds something to the filter that ``what`` would leave out."""
        if self.adds is not None:
            raise TypeError(f"{type(self).__name__} {self.adds}, which {what} does not do: use ParticleFilter(...).{what}")

    def population(self, guide: Any) -> Population:
        """What happens to the particles between steps."""
        return Population(self.resampler, self.ess_threshold, self.favours(guide))

    def measured(self, step: Step) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By latent site, what each particle says of it, ``(rows, ...)``: a value, and a variance about it if it has one."""
        return values_of(step)

    def favours(self, guide: Any) -> LookAhead | None:
        """By what particles are favoured, beside their weights, when they are resampled."""
        return None

    def described(self, population: Population) -> str:
        """What to call the method, after its run."""
        return "bootstrap particle filter" if self.guide is None else "guided particle filter"

    def recorder(self, packed: Packed) -> Record:
        """What keeps of the steps what the answer is made of."""
        return Record(packed, self.num_particles, self.measured, self.history)

    def _run(self, guide: Any, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        runs, batch, particles = self.num_runs, sequences.num_sequences, self.num_particles
        repeated = sequences.repeat(runs)
        population, record = self._filtered(guide, repeated, batch)
        so_far = record.evidence().cumsum(1).reshape(runs, batch, -1)
        evidence = so_far[..., -1]
        pooled = so_far.logsumexp(0) - math.log(runs)
        mean = pooled[..., -1]
        if runs == 1:
            error = record.standard_error().to(mean)
        else:
            # The delta method: the relative standard error of the average of the estimates.
            error = (evidence - mean).exp().std(0) / math.sqrt(runs)
        # What is said of time t weighs the runs by what they know at t.
        share = so_far.softmax(0)

        def pool(value: Tensor) -> Tensor:
            value = value.reshape(runs, batch, *value.shape[1:])
            return (share.reshape(share.shape + (1,) * (value.dim() - 3)) * value).sum(0)

        filtered = {}
        for name, (means, variances) in record.moments().items():
            center = pool(means)
            filtered[name] = Moments(center, pool(variances) + pool((means - center.repeat(
                runs, *(1,) * (center.dim() - 1))).square()))
        smoothed = {name: Moments(*moments) for name, moments in record.smoothed().items()} if runs == 1 else {}
        return Posterior(
            method=self.described(population), kind=_kind(self.resampler), log_evidence=mean,
            standard_error=error, sequences=sequences, seconds=watch.seconds,
            num_samples=particles * runs, filtered=filtered, smoothed=smoothed,
            log_evidence_by_step=pooled.diff(dim=-1, prepend=torch.zeros_like(pooled[:, :1])), ess=pool(record.ess()),
            parameters=parameters, notes=diagnostics.notes(record, batch), particles=record,
            final_state=None if self.model.state_grows else record.final_state(share[..., -1]),
            paths=record.trajectories if record.history else None, cloud=record.quantile if record.history else None,
            model=self.model)

    def _filtered(self, guide: Any, sequences: Sequences, batch: int) -> tuple[Population, Record]:
        """Filter a batch in which the sequences, ``batch`` in number, may be repeated."""
        if self.compiler is not None:
            generators = generator_states(sequences.device)
            with suppress(Failed):
                record = self.recorder(sequences.packed)
                return filter_compiled(self, guide, sequences, record, batch), record
            set_generators(generators, sequences.device)  # as written, to say what is wrong
        population, record = self.population(guide), self.recorder(sequences.packed)
        steps = forward(self.model, guide, sequences, self.num_particles, between=population.between)
        for step in tqdm(steps, total=sequences.num_steps, disable=not self.progress, desc="particle filter"):
            refuse_scaled(self.model, step)
            factor = population.weigh(step, batch)
            record.add(step, population.weights, factor, population.chances)
        record.finish()
        return population, record


def _kind(resampler: Resampler) -> str:
    """What the log evidence is, of filters that resample so."""
    if resampler.unbiased is None:
        return f"log of an estimate, unbiased if {named(resampler.scheme)} is"
    return UNBIASED if resampler.unbiased else BIASED
