"""The particle filter: the weighted loop with resampling between the steps."""

from __future__ import annotations

import math
from typing import Any

import pyro
import torch
from pyro.ops.stats import weighed_quantile
from torch import Tensor
from tqdm import tqdm

from pyro_seq.engine.loop import Step, forward, pad_rows
from pyro_seq.engine.state import State, map_state
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.posterior import UNBIASED, Moments, Posterior
from pyro_seq.infer.resampling import systematic
from pyro_seq.infer.run import Stopwatch, entered, refuse_scaled
from pyro_seq.module import require_count, require_guide, require_model
from pyro_seq.sequences import Sequences

__all__ = ["ParticleFilter"]


class ParticleFilter:
    r"""Sequential importance sampling with resampling, for any declared model.

    Every sequence of the batch has its own particles, weights and ancestors. Particles are proposed from ``guide``, or
    from the model's prior (the bootstrap filter), and resampled systematically *before* a step, whenever the effective
    sample size has fallen below ``ess_threshold * num_particles``. The evidence estimate

    .. math:: \hat p(x_{1:T}) = \prod_t \sum_i W_{t-1}^i \, w_t^i

    is unbiased; its logarithm is biased low.

    :param model: a declared model.
    :param int num_particles: N.
    :param guide: a sequential guide; any guide of the library, AVF included.
    :param float ess_threshold: 0 never resamples, 1 always does.
    :param int num_runs: independent filters; their average is returned, and their spread is its standard error.
    :param bool history: keep all particles and ancestors, ``T`` times the memory, for quantiles and trajectories.
    :param bool progress: show a progress bar.

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

    def __init__(self, model: Any, num_particles: int = 1000, *, guide: Any = None, ess_threshold: float = 0.5,
                 num_runs: int = 1, history: bool = False, progress: bool = False):
        require_model(model, "ParticleFilter")
        require_count("num_particles", num_particles, 1)
        require_count("num_runs", num_runs, 1)
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold={ess_threshold}; it is a share of the particles, from 0 (never resample) to 1")
        if guide is not None:
            require_guide(guide, model, "ParticleFilter")
        self.model, self.guide, self.num_particles = model, guide, num_particles
        self.ess_threshold, self.num_runs, self.history, self.progress = ess_threshold, num_runs, history, progress

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

    def measured(self, step: Step) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By latent site, what each particle says of it, ``(rows, ...)``: a value, and a variance about it if it has one."""
        return {name: (site.value, None) for name, site in step.sites.items() if not site.observed}

    def _run(self, guide: Any, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        runs, batch, particles = self.num_runs, sequences.num_sequences, self.num_particles
        repeated = sequences.repeat(runs)
        cloud = _Cloud(self, repeated)
        steps = forward(self.model, guide, repeated, particles, between=cloud.resample)
        for step in tqdm(steps, total=sequences.num_steps, disable=not self.progress, desc="particle filter"):
            refuse_scaled(self.model, step)
            cloud.weigh(step)
        so_far = cloud.finish().cumsum(1).reshape(runs, batch, -1)
        evidence = so_far[..., -1]
        pooled = so_far.logsumexp(0) - math.log(runs)
        mean = pooled[..., -1]
        if runs == 1:
            error = torch.full_like(mean, torch.nan)
        else:
            # The delta method: the relative standard error of the average of the estimates.
            error = (evidence - mean).exp().std(0) / math.sqrt(runs)
        # What is said of time t weighs the runs by what they know at t.
        share = so_far.softmax(0)

        def pool(value: Tensor) -> Tensor:
            value = value.reshape(runs, batch, *value.shape[1:])
            return (share.reshape(share.shape + (1,) * (value.dim() - 3)) * value).sum(0)

        filtered = {}
        for name, (means, variances) in cloud.moments().items():
            center = pool(means)
            filtered[name] = Moments(center, pool(variances) + pool((means - center.repeat(
                runs, *(1,) * (center.dim() - 1))).square()))
        kept = self.history and runs == 1
        return Posterior(
            method="bootstrap particle filter" if self.guide is None else "guided particle filter", kind=UNBIASED,
            log_evidence=mean, standard_error=error, sequences=sequences, seconds=watch.seconds,
            num_samples=particles * runs, filtered=filtered,
            log_evidence_by_step=pooled.diff(dim=-1, prepend=torch.zeros_like(pooled[:, :1])), ess=pool(cloud.ess()),
            parameters=parameters,
            final_state=None if self.model.state_grows else cloud.final_state(share[..., -1]),
            paths=cloud.trajectories if kept else None, cloud=cloud.quantile if kept else None, model=self.model)


def uniform(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(n,)`` numbers in [0, 1): all the randomness of resampling."""
    return torch.rand(n, dtype=dtype, device=device)


class _Cloud:
    """The weighted particles of a run, and what is measured on the way. Everything is in packed order inside."""

    def __init__(self, method: ParticleFilter, sequences: Sequences):
        self.method, self.packed = method, sequences.packed
        self.particles = method.num_particles
        self.weights: Tensor | None = None
        self.log_mean: Tensor | None = None
        self.base: Tensor | float = 0.0
        self.effective: Tensor | None = None
        self.evidence: list[Tensor] = []
        self.effectives: list[Tensor] = []
        self.means: dict[str, list[Tensor]] = {}
        self.variances: dict[str, list[Tensor]] = {}
        self.steps: list[Step] = []
        self.ended: list[tuple[State, Tensor]] = []
        self.last: State = None

    def resample(self, t: int, log_weights: Tensor) -> tuple[Tensor | None, Tensor]:
        running = log_weights.shape[0]
        self._set_aside(running)
        effective, self.base = self.effective[:running], self.log_mean[:running]
        chosen = effective < self.method.ess_threshold * self.particles
        if self.method.ess_threshold == 1.0:
            chosen = torch.ones_like(chosen)
        if not chosen.any():
            return None, log_weights
        ancestors = systematic(self.weights[:running], uniform(running, log_weights.dtype, log_weights.device))
        if chosen.all():
            self.base = torch.zeros_like(self.base)
            return ancestors, torch.zeros_like(log_weights)
        self.base = torch.where(chosen, 0.0, self.base)
        own = torch.arange(self.particles, device=ancestors.device)
        return torch.where(chosen[:, None], ancestors, own), torch.where(chosen[:, None], 0.0, log_weights)

    def weigh(self, step: Step) -> None:
        log_weights = step.log_weights
        highest = log_weights.amax(-1, keepdim=True)
        if not highest.isfinite().all():
            raise ValueError(_not_finite(len(self.packed.order) // self.method.num_runs, step, highest[:, 0], log_weights))
        self.weights = log_weights.softmax(-1)
        self.effective = 1 / torch.linalg.vector_norm(self.weights, dim=-1).square()
        # The largest normalised weight is that of the largest log weight, which gives the normalising constant.
        self.log_mean = highest[:, 0] - self.weights.amax(-1).log() - math.log(self.particles)
        self.evidence.append(self.log_mean - self.base)
        self.effectives.append(self.effective)
        for name, (value, spread) in self.method.measured(step).items():
            shape = (log_weights.shape[0], *value.shape[1:])
            value = value.reshape(*log_weights.shape, -1)
            value = value if value.is_floating_point() else value.to(log_weights.dtype)
            weights = self.weights[:, None].to(value.dtype)
            mean = torch.bmm(weights, value)
            variance = torch.bmm(weights, (value - mean).square_())
            if spread is not None:
                variance = variance + torch.bmm(weights, spread.reshape(value.shape))
            self.means.setdefault(name, []).append(mean.reshape(shape).to(log_weights.dtype))
            self.variances.setdefault(name, []).append(variance.reshape(shape).to(log_weights.dtype))
        self.last = step.state
        if self.method.history:
            self.steps.append(step)

    def finish(self) -> Tensor:
        """``(R * B, T)`` log of each step's factor of the evidence; zero past a sequence's end."""
        self._set_aside(0)
        return pad_rows(self.evidence, self.packed.counts, self.packed)

    def ess(self) -> Tensor:
        return pad_rows(self.effectives, self.packed.counts, self.packed)

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        counts = self.packed.counts
        return {name: (pad_rows(self.means[name], counts, self.packed), pad_rows(self.variances[name], counts, self.packed))
                for name in self.means}

    def _set_aside(self, running: int) -> None:
        """Keep the particles of the sequences that end here."""
        count = self.weights.shape[0]
        if running < count:
            rows = slice(running * self.particles, None)
            self.ended.insert(0, (map_state(lambda leaf: leaf[rows], self.last), self.weights[running:]))

    def final_state(self, share: Tensor) -> Any:
        """A sampler of the final state of each sequence, over all runs. ``share`` is each run's part, ``(R, B)``."""
        states = map_state(lambda *parts: torch.cat(parts), *(state for state, _ in self.ended))
        weights = self.packed.unsort(torch.cat([w for _, w in self.ended]))
        states = map_state(lambda leaf: self.packed.unsort(leaf.reshape(*weights.shape, *leaf.shape[1:])), states)
        runs, batch = share.shape
        pooled = (weights.reshape(runs, batch, -1) * share[..., None]).transpose(0, 1).reshape(batch, -1)

        def sample(num_samples: int) -> State:
            index = torch.multinomial(pooled.double(), num_samples, replacement=True)
            run, particle = index // self.particles, index % self.particles
            row = run * batch + torch.arange(batch, device=index.device)[:, None]
            return map_state(lambda leaf: leaf[row, particle].reshape(batch * num_samples, *leaf.shape[2:]), states)

        return sample

    def trajectories(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of latent paths by tracing the ancestors back."""
        counts, out = self.packed.counts, {}
        index: Tensor | None = None
        paths: dict[str, list[Tensor]] = {}
        weights = self._final_weights()
        for t in reversed(range(len(self.steps))):
            step, count = self.steps[t], counts[t]
            done = 0 if index is None else index.shape[0]
            fresh = torch.multinomial(weights[done:count].double(), num_samples, replacement=True) if count > done else None
            index = fresh if index is None else index if fresh is None else torch.cat([index, fresh])
            row = torch.arange(count, device=index.device)[:, None]
            for name, site in step.sites.items():
                if not site.observed:
                    value = site.value.reshape(count, self.particles, *site.value.shape[1:])
                    paths.setdefault(name, []).append(value[row, index].flatten(0, 1))
            if step.ancestors is not None:
                index = step.ancestors[row, index]
        for name, values in paths.items():
            value = pad_rows(values[::-1], counts, self.packed, num_samples)
            out[name] = value[None] if num_samples == 1 else value.movedim(2, 0)
        return out

    def _final_weights(self) -> Tensor:
        return torch.cat([w for _, w in self.ended])

    def quantile(self, site: str, q: float | list[float]) -> Tensor:
        levels = torch.as_tensor(q, dtype=self.weights.dtype, device=self.weights.device)
        found = []
        for step in self.steps:
            count = step.log_weights.shape[0]
            value, spread = self.method.measured(step)[site]
            value = value.reshape(count, self.particles, *value.shape[1:])
            if spread is None:
                per = [torch.stack([weighed_quantile(v.to(levels), level.reshape(1), w, dim=0)[0]
                                    for level in levels.reshape(-1)]) for v, w in zip(value, step.log_weights, strict=True)]
            else:
                weights, scale = step.log_weights.softmax(-1), spread.reshape(value.shape).sqrt()
                per = [_mixture_quantile(w, m, s, levels) for w, m, s in zip(weights, value, scale, strict=True)]
            found.append(torch.stack(per))
        out = pad_rows(found, self.packed.counts, self.packed).movedim(2, 0)
        return out[0] if levels.dim() == 0 else out


def _mixture_quantile(weights: Tensor, means: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """``(Q, ...)`` quantiles of a mixture of ``N`` Gaussians ``(N, ...)``, by bisection."""
    levels = levels.reshape(-1, *(1,) * (means.dim() - 1))
    low, high = (means - 40 * scales).amin(0), (means + 40 * scales).amax(0)
    low, high = low.expand(levels.shape[0], *low.shape), high.expand(levels.shape[0], *high.shape)
    for _ in range(64):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - means) / scales.clamp(min=torch.finfo(scales.dtype).tiny))
        share = torch.einsum("n,qn...->q...", weights.to(below), below)
        low, high = torch.where(share < levels, middle, low), torch.where(share < levels, high, middle)
    return ((low + high) / 2).to(levels)


def _not_finite(batch: int, step: Step, highest: Tensor, log_weights: Tensor) -> str:
    bad = int((~highest.isfinite()).nonzero()[0])
    sequence = int(step.frame.sequence[bad * log_weights.shape[1]]) % batch
    where = f"at time {step.frame.t} in sequence {sequence}"
    if highest[bad] == -torch.inf:
        sites = ", ".join(repr(name) for name, site in step.sites.items() if site.observed)
        return (f"all {log_weights.shape[1]} particles have weight zero {where}: the data there (site {sites}) is impossible "
                "under every particle. Use more particles, a guide that reads the data, or an emission with heavier tails")
    for name, site in step.sites.items():
        with pyro.settings.context(validate_distributions_torch=False):
            densities = (("model's", site.log_p()), ("guide's", None if site.q is None else site.log_q()))
        for whose, value in densities:
            if value is not None and (value.isnan().any() or (value == torch.inf).any()):
                return (f"the {whose} log density of site {name!r} is NaN or infinite {where}: look for a scale that is zero "
                        "or negative, an overflow in the step, or a state that has diverged")
    return f"a log weight is NaN or infinite {where}"
