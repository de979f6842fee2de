"""The particle filter with one path given: the conditional run inside particle Gibbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.gaussian import innermost
from pyro_seq.engine.loop import Step, forward
from pyro_seq.engine.sites import GuideSites, Proposal, StepSites, draw
from pyro_seq.engine.state import State, leaves
from pyro_seq.engine.weights import Weights
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.posterior import Moments, Posterior
from pyro_seq.infer.run import Stopwatch, entered, refuse_scaled
from pyro_seq.infer.smc.population import Population
from pyro_seq.infer.smc.record import Record
from pyro_seq.module import require_count, require_guide, require_model
from pyro_seq.resampling import Ancestral, systematic
from pyro_seq.resampling.base import draw_uniform
from pyro_seq.sequences import Frame, Packed, Sequences, repeat_rows

__all__ = ["CONDITIONAL", "ConditionalParticleFilter", "conditional_multinomial", "conditional_systematic"]

CONDITIONAL = "log of a biased estimate, one path being given"


class ConditionalParticleFilter:
    r"""Sequential Monte Carlo conditional on a path: particle 0 of each sequence goes along it, the others as they will.

    A path drawn from the result by ``trajectories(1)`` is a step of a Markov chain that leaves the smoothing distribution
    :math:`p(z_{1:T} \mid x_{1:T})` as it is, for any number of particles from two on: the kernel of particle Gibbs. Particles
    are resampled before every step. The evidence of a conditional run is no unbiased estimate, and its filtered moments
    include the path.

    :param model: a declared model.
    :param int num_particles: N, the path among them.
    :param guide: a sequential guide; the prior when omitted.
    :param bool ancestor_sampling: draw anew, at every step, which particle the rest of the path descends from, so that the
        chain also moves where all particles descend from the path. For models whose state after a step is a function of
        that step's latents alone, as a :class:`~pyro_seq.StateSpaceModel`'s whose state is its latents.
    :param str resampling: ``"systematic"`` (less noise) or ``"multinomial"`` (as published).

    Source: Andrieu, Doucet and Holenstein, *Particle Markov chain Monte Carlo methods*, 2010; Lindsten, Jordan and Schön,
    *Particle Gibbs with ancestor sampling*, 2014; Chopin and Singh, *On particle Gibbs sampling*, 2015 (systematic).

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
        >>> x = model.simulate([50] * 4)["x"]
        >>> path = {"z": torch.full((4, 50), -1.0)}
        >>> kernel = seq.ConditionalParticleFilter(model, num_particles=20, ancestor_sampling=True)
        >>> for _ in range(3):
        ...     drawn = kernel.run(x, path=path).trajectories(1).samples
        ...     path = {name: value[0] for name, value in drawn.items()}
        >>> path["z"].shape
        torch.Size([4, 50])
    """

    def __init__(self, model: Any, num_particles: int = 100, *, guide: Any = None, ancestor_sampling: bool = False,
                 resampling: str = "systematic"):
        require_model(model, "ConditionalParticleFilter")
        require_count("num_particles", num_particles, 2)
        if guide is not None:
            require_guide(guide, model, "ConditionalParticleFilter")
        if model.state_grows:
            raise TypeError("a model from seq.from_pyro replays its own past, which a path given cannot take the place of: "
                            "declare it as a StateSpaceModel")
        if resampling not in _SCHEMES:
            raise ValueError(f"resampling={resampling!r}; of a conditional run it is one of {sorted(_SCHEMES)}")
        self.model, self.num_particles, self.guide = model, num_particles, guide
        self.ancestor_sampling, self.resampling = ancestor_sampling, resampling

    def run(self, x: Any, lengths: Any = None, *, path: Mapping[str, Tensor], mask: Any = None, **covariates: Any) -> Posterior:
        """Filter a batch with a path of each sequence kept.

        :param x: data as accepted by :meth:`pyro_seq.Sequences.of`.
        :param lengths: ``(B,)`` integers.
        :param path: by latent site, ``(B, T, ...)``; what lies past a sequence's end is not read.
        :param mask: True where observed.
        :param covariates: ``(B, T, ...)`` each.
        :returns: a posterior with all its history: ``trajectories(1)`` draws the next path, ``(1, B, T, ...)`` a site.
        :raises ValueError: if the path is not one of the model's latents, or is impossible given the data.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        guide = PriorGuide(self.model) if self.guide is None else self.guide
        return entered(self.model, guide, sequences, lambda values: self._run(guide, sequences, path, values, watch))

    def _run(self, guide: Any, sequences: Sequences, path: Mapping[str, Tensor], parameters: dict[str, Tensor],
             watch: Stopwatch) -> Posterior:
        model, particles = self.model, self.num_particles
        model.check_inputs(sequences)
        if sequences.has_missing and model.missing_feeds_state:
            raise ValueError(f"{type(model).__name__} draws missing data, which its state may read, so that a path of its "
                             "latents does not say what the state was: fill the gaps, or declare a StateSpaceModel; if the "
                             "state reads no data, say so by missing_feeds_state = False in the class")
        packed = sequences.packed
        kept = _Path(path, packed, particles)
        population = _Conditional(model, kept, _SCHEMES[self.resampling], self.ancestor_sampling)
        record = Record(packed, particles, history=True)
        for step in forward(model, _AlongPath(guide, kept), sequences, particles, between=population.between):
            refuse_scaled(model, step)
            kept.check(step)
            factor = population.weigh(step)
            record.add(step, population.weights, factor)
        record.finish()
        by_step = record.evidence()
        return Posterior(
            method="conditional particle filter", kind=CONDITIONAL, log_evidence=by_step.sum(1),
            standard_error=torch.full_like(by_step[:, 0], torch.nan), sequences=sequences, seconds=watch.seconds,
            num_samples=particles, filtered={name: Moments(*moments) for name, moments in record.moments().items()},
            log_evidence_by_step=by_step, ess=record.ess(), parameters=parameters, particles=record,
            final_state=record.final_state(torch.ones_like(by_step[None, :, 0])), paths=record.trajectories,
            cloud=record.quantile, model=model)


class _Path:
    """The values that particle 0 of each sequence takes."""

    def __init__(self, path: Mapping[str, Tensor], packed: Packed, particles: int):
        if not isinstance(path, Mapping):
            raise TypeError(f"path is a {type(path).__name__}; it is a dict of tensors (B, T, ...) by latent site, such as "
                            "{name: value[0] for name, value in posterior.trajectories(1).samples.items()}")
        self.particles = particles
        self.values: dict[str, Tensor] = {}
        self.types: dict[str, torch.dtype] = {}
        expected = (packed.sequences.num_sequences, packed.sequences.num_steps)
        for name, value in path.items():
            value = _as_tensor(name, value)
            shape = tuple(value.shape)
            if len(shape) < 2 or shape[0] != expected[0] or shape[1] < expected[1]:
                raise ValueError(f"path[{name!r}] has shape {shape}; of this data it is (B, T, ...) = "
                                 f"({expected[0]}, {expected[1]}, ...)")
            self.values[name] = packed.sort(value.to(packed.sequences.device))

    def at(self, name: str, frame: Frame) -> Tensor:
        """``(n, ...)``"""
        if name not in self.values:
            raise ValueError(f"path does not hold the latent site {name!r}; it holds {sorted(self.values)}")
        return self.values[name][:frame.rows // self.particles, frame.t - 1]

    def put(self, name: str, fn: Distribution, value: Tensor, frame: Frame) -> Tensor:
        """Rows ``(n * N, ...)`` of a site with those of particle 0 on the path.

        :param fn: what the site is drawn from.
        """
        given = self.at(name, frame)
        if given.shape[1:] != value.shape[1:]:
            raise ValueError(f"path[{name!r}] has shape {tuple(self.values[name].shape)}, but site {name!r} has entries of "
                             f"shape {tuple(value.shape[1:])}: it is (B, T, {', '.join(map(str, value.shape[1:]))})")
        self.types[name] = value.dtype
        value = value.to(torch.promote_types(value.dtype, given.dtype), copy=True)
        value[::self.particles] = given.to(value)
        return self._of_site(name, fn, value, frame)

    def everywhere(self, name: str, fn: Distribution, frame: Frame) -> Tensor:
        """Rows ``(n * N, ...)`` of a site, all on the path."""
        return self._of_site(name, fn, repeat_rows(self.at(name, frame), self.particles), frame)

    def _of_site(self, name: str, fn: Distribution, value: Tensor, frame: Frame) -> Tensor:
        """As the type that the site has, once what particle 0 is given is known to be one of its values."""
        inside = fn.support.check(value).reshape(len(value), -1)[::self.particles].all(-1)
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0]) * self.particles
            found = f"{value[row].item():g}" if value.dim() == 1 else f"of shape {tuple(value.shape[1:])}"
            raise ValueError(f"path[{name!r}] of sequence {int(frame.sequence[row])} at time {frame.t} is {found}, outside the "
                             f"support of {type(innermost(fn)).__name__}: give a path that the model can draw")
        return value.to(self.types[name])

    def check(self, step: Step) -> None:
        """Raise if the path is not one of the model's."""
        latents = {name for name, site in step.sites.items() if not site.observed}
        if unknown := sorted(set(self.values) - latents):
            raise ValueError(f"path holds {unknown}, which is no latent site; there are {sorted(latents)}")
        possible = step.log_weights[:, 0] > -torch.inf
        if not possible.all() and not step.log_weights.isnan().any():
            sequence = int(step.frame.sequence[int((~possible).nonzero()[0]) * self.particles])
            raise ValueError(f"the path of sequence {sequence} has weight zero at time {step.frame.t}: it is impossible given "
                             "the data")


class _AlongPath:
    """A guide that draws as another does, particle 0 excepted."""

    def __init__(self, guide: Any, path: _Path):
        self.guide, self.path = guide, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guide, name)

    def propose(self, state: State, frame: Frame, encoding: Any) -> Proposal:
        inner = self.guide.propose(state, frame, encoding, GuideSites(
            frame, lambda name, fn: (None, self.path.put(name, fn, draw(fn, name, frame), frame))))

        def proposal(name: str, prior: Any) -> tuple[Any, Tensor]:
            q, value = inner(name, prior)
            value = draw(prior if q is None else q, name, frame) if value is None else value
            return q, self.path.put(name, prior, value, frame)

        if hasattr(inner, "check_all_used"):
            proposal.check_all_used = inner.check_all_used
        return proposal


class _Conditional(Population):
    """Resample before every step, given that particle 0 goes on with the path."""

    def __init__(self, model: Any, path: _Path, scheme: Callable[[Tensor, Tensor], Tensor], ancestor_sampling: bool):
        super().__init__(Ancestral(systematic), 1.0)
        self.model, self.path, self.scheme, self.ancestor_sampling = model, path, scheme, ancestor_sampling

    def between(self, frame: Frame, state: State, encoding: Any, log_weights: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.weights.first(len(log_weights))
        kept = torch.zeros(len(log_weights), dtype=torch.long, device=log_weights.device)
        if self.ancestor_sampling:
            kept = self._ancestor(frame, state, weights)
        return self.scheme(weights.normalised, kept), torch.zeros_like(log_weights)

    def _ancestor(self, frame: Frame, state: State, weights: Weights) -> Tensor:
        """``(n,)`` draws of the particle that the path goes on from, with chances as its weight times the density of the path's
        next step from there."""
        n, particles = weights.log.shape
        # Unchecked: from most particles the path may be out of reach.
        with pyro.settings.context(validate_distributions_torch=False):
            with StepSites(frame, lambda name, p: (None, self.path.everywhere(name, p, frame))) as step:
                after = self.model.apply(state, frame)
            log_p = sum(site.log_p() for site in step.sites.values()).reshape(n, particles)
        self._require_forgetful(after, weights, frame)
        log_p = torch.where((weights.normalised > 0) & ~log_p.isnan(), log_p, -torch.inf)
        return torch.multinomial((weights.log + log_p).softmax(-1).double(), 1)[:, 0]

    def _require_forgetful(self, after: State, weights: Weights, frame: Frame) -> None:
        """Raise unless the state after the path's next step is the same from wherever it is taken."""
        n, particles = weights.log.shape
        for leaf in leaves(after):
            rows = leaf.reshape(n, particles, -1)
            if rows.is_floating_point():
                near = 1e3 * torch.finfo(rows.dtype).eps
                same = torch.isclose(rows, rows[:, :1], rtol=near, atol=near).all(-1)
            else:
                same = (rows == rows[:, :1]).all(-1)
            if not bool((same | (weights.normalised == 0)).all()):
                raise ValueError(f"the state of {type(self.model).__name__} after time {frame.t} is no function of that step's "
                                 f"latents {sorted(self.path.values)}: it carries more of the past, and to let the rest of a "
                                 "path descend from another particle would change it. Use ancestor_sampling=False")


def _as_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"path[{name!r}] is a {type(value).__name__} that is no array of numbers: it is a tensor (B, T, ...)"
                        ) from error


def conditional_multinomial(weights: Tensor, kept: Tensor) -> Tensor:
    """Multinomial resampling given the ancestor of particle 0.

    :param weights: ``(n, N)`` of sum one.
    :param kept: ``(n,)`` that ancestor.
    :returns: ``(n, N)`` ancestors.
    """
    others = torch.multinomial(weights.double(), weights.shape[1] - 1, replacement=True)
    return torch.cat([kept[:, None], others], 1)


def conditional_systematic(weights: Tensor, kept: Tensor) -> Tensor:
    """Systematic resampling, its ancestors in random order, given that of particle 0.

    In random order each ancestor is particle i with probability :math:`W^i`. That of particle 0 being i says that the uniform
    number was one that gives i many children: it has a density in proportion to their number, which is m + 1 or m where
    :math:`N W^i = m + r`: on [0, r) and [r, 1) if i is the first to be counted, and any may be, as the uniform number turns the
    circle of the weights.

    :param weights: ``(n, N)`` of sum one.
    :param kept: ``(n,)`` that ancestor, of positive weight.
    :returns: ``(n, N)`` ancestors.

    Source: Chopin and Singh, *On particle Gibbs sampling*, 2015, section 5.
    """
    n, particles = weights.shape
    turned = (kept[:, None] + torch.arange(particles, device=weights.device)) % particles
    chances = weights.double().gather(1, turned)
    expected = particles * chances[:, 0] / chances.sum(1)
    whole = expected.floor()
    rest = expected - whole
    place, side = draw_uniform((2, n), chances)
    uniform = torch.where(side * expected < rest * (whole + 1), place * rest, rest + place * (1 - rest))
    slots = systematic.unchecked(chances, uniform)
    order = draw_uniform((n, particles - 1), chances).argsort(-1)
    slots = torch.cat([torch.zeros_like(slots[:, :1]), slots[:, 1:].gather(1, order)], 1)
    return (slots + kept[:, None]) % particles


_SCHEMES = {"multinomial": conditional_multinomial, "systematic": conditional_systematic}
