"""Reweighted wake-sleep: learning a guide without differentiating through its draws."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_seq.engine.loop import Window, forward, simulate
from pyro_seq.engine.score import Term
from pyro_seq.engine.sites import Proposal, StepSites, draw
from pyro_seq.engine.state import State, map_state
from pyro_seq.infer.fivo import resampled
from pyro_seq.infer.iwae import refuse_greedy, whole_trajectories
from pyro_seq.infer.loss import Bound, SequenceLoss
from pyro_seq.infer.smc.population import require_threshold
from pyro_seq.resampling import Resampler, Scheme, named, resolve
from pyro_seq.sequences import Frame, Sequences

__all__ = ["ReweightedWakeSleep"]


class ReweightedWakeSleep(SequenceLoss):
    r"""Reweighted wake-sleep: the model follows a bound's gradient, and the guide the posterior that its own samples show.

    The value is the bound of :class:`~pyro_seq.IWAE` or, with resampling, of :class:`~pyro_seq.FIVO`. No gradient goes through
    a draw, so that discrete latents are learned like any other, without the variance of score functions. With W the normalised
    weights,

    .. math:: \nabla_\theta: \; \sum_i W^i \nabla_\theta \log p(x, z^i) \qquad
              \nabla_\phi: \; (1 - s) \sum_i W^i \nabla_\phi \log q(z^i \mid x) \; (\text{wake})
              \; + \; s \, \nabla_\phi \log q(\tilde z \mid \tilde x), \; (\tilde z, \tilde x) \sim p \; (\text{sleep}),

    both to be ascended: the guide lowers :math:`\mathrm{KL}(p \,\|\, q)`, which covers the posterior, where a bound lowers
    :math:`\mathrm{KL}(q \,\|\, p)`. With resampling at every step (``ess_threshold=1``) this is neural adaptive sequential
    Monte Carlo (NASMC), the weights of each step being those of the filter. A parameter that model and guide share gets both
    gradients; otherwise the guide's reaches neither the model's parameters nor, through the model's state, the past.

    :param int num_particles: N; the gradients' bias falls with it.
    :param float ess_threshold: as of :class:`~pyro_seq.FIVO`; 0 weighs whole trajectories.
    :param resampling: as there.
    :param float sleep: s, the part of the sleep phase: 0 for none, 1 for the guide's update of the wake-sleep algorithm. Each
        sequence has one dreamt by the model, of its length and covariates, without gaps.

    Source: Bornschein and Bengio, *Reweighted Wake-Sleep*, 2015; Gu, Ghahramani and Turner, *Neural Adaptive Sequential Monte
    Carlo*, 2015.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> class Regimes(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("k", dist.Bernoulli(0.5))
        ...     def transition(self, k):
        ...         return pyro.sample("k", dist.Bernoulli(0.1 + 0.8 * k))
        ...     def emission(self, k, x=None):
        ...         return pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)
        >>> class Filter(seq.SequentialGuide):
        ...     def __init__(self, model):
        ...         super().__init__(model)
        ...         self.net = torch.nn.Linear(2, 1)
        ...     def step(self, k, x):
        ...         k = torch.full_like(x, 0.5) if k is None else k
        ...         pyro.sample("k", dist.Bernoulli(logits=self.net(torch.stack([k, x], -1))[:, 0]))
        >>> model = Regimes()
        >>> svi = SVI(model, Filter(model), Adam({"lr": 1e-3}), loss=seq.ReweightedWakeSleep(num_particles=8))
        >>> loss = svi.step(model.simulate([20] * 8)["x"])
    """

    def __init__(self, num_particles: int, *, ess_threshold: float = 0.0, resampling: str | Scheme | Resampler = "systematic",
                 sleep: float = 0.0):
        super().__init__(num_particles)
        require_threshold(ess_threshold)
        if not isinstance(sleep, (int, float)) or not 0 <= sleep <= 1:
            raise ValueError(f"sleep={sleep!r}; it is the sleep phase's part of the guide's gradient, from 0 to 1")
        self.resampler = resolve(resampling)
        self.ess_threshold, self.resampling, self.sleep = ess_threshold, named(resampling), sleep

    def options(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles, "ess_threshold": float(self.ess_threshold), "resampling": self.resampling,
                "sleep": float(self.sleep)}

    def _bound(self, model: Any, guide: Any, sequences: Sequences, window: Window) -> Bound:
        refuse_greedy(self, guide)
        by = whole_trajectories if self.ess_threshold == 0 else resampled
        found = by(self, model, _Apart(guide), sequences, window, self._contribution, scores=False)
        if self.sleep > 0 and torch.is_grad_enabled():
            if window.stop - window.start + 1 < sequences.num_steps:
                raise ValueError("the sleep phase dreams whole sequences: train without window=, or with sleep=0")
            found = found._replace(objective=found.objective + self.sleep * _dreamt(model, guide, sequences))
        return found

    def _contribution(self, term: Term) -> Tensor | None:
        """``(rows,)`` log p - log q of one site, with the gradient of log p + (1 - s) log q."""
        log_p = term.log_p
        if term.observed:
            score = term.score_function  # gaps that the model has filled, and whose chances are the model's to learn
            return log_p if score is None else log_p + score - score.detach()
        log_q = term.log_q
        return log_p - log_q.detach() + (1 - self.sleep) * (log_q - log_q.detach())


class _Apart:
    """A guide as the wake phase sees it: what it draws has no gradient, and what it reads of the model has none either."""

    def __init__(self, guide: Any):
        self.guide, self.greedy, self.reads_prior = guide, guide.greedy, guide.reads_prior
        self.prepare_rows = guide.prepare_rows

    def propose(self, state: State, frame: Frame, encoding: Any) -> Proposal:
        inner = self.guide.propose(map_state(lambda leaf: leaf.detach(), state), frame, encoding)

        def proposal(name: str, prior: Distribution | None) -> tuple[Distribution, Tensor]:
            prior = None if prior is None else _detached(prior)
            q, value = inner(name, prior)
            q = prior if q is None else q
            return q, (draw(q, name, frame) if value is None else value).detach()

        if hasattr(inner, "check_all_used"):
            proposal.check_all_used = inner.check_all_used
        proposal.auxiliary = getattr(inner, "auxiliary", None)
        return proposal


def _detached(fn: Any) -> Any:
    """A copy of a distribution, of a transform in it or of their parameters, without gradient."""
    if isinstance(fn, Tensor):
        return fn.detach()
    if isinstance(fn, list):
        return [_detached(part) for part in fn]
    if not isinstance(fn, (Distribution, Transform)) or isinstance(fn, nn.Module):
        return fn
    twin = copy.copy(fn)
    twin.__dict__.update({name: _detached(value) for name, value in vars(fn).items()})
    return twin


# The sleep phase.


def _dreamt(model: Any, guide: Any, sequences: Sequences) -> Tensor:
    """Log density, under the guide, of latents that the model dreams, one sequence for each of the batch."""
    with torch.no_grad():
        sites = simulate(model, sequences.simulated())
    if lacking := sorted(set(sequences.x) - set(sites)):
        raise ValueError(f"the data {lacking} of {type(model).__name__} are not sites of that name (it has {sorted(sites)}), "
                         "so that its simulations cannot be handed to it as data: rename them, or use sleep=0")
    x = {name: sites.pop(name).to(value.dtype) for name, value in sequences.x.items()}
    dream = Sequences.of(x, sequences.lengths, covariates=dict(sequences.covariates))
    total = torch.zeros((), device=sequences.device)
    for step in forward(model, _Given(guide, sites, dream), dream, score=False):
        for site in step.sites.values():
            if not site.observed:
                total = total + site.log_q().sum()
    return total


class _Given:
    """A guide at values that are given."""

    def __init__(self, guide: Any, values: dict[str, Tensor], sequences: Sequences):
        self.guide, self.greedy, self.reads_prior = guide, guide.greedy, guide.reads_prior
        self.prepare_rows = guide.prepare_rows
        self.values = {name: sequences.packed.sort(value) for name, value in values.items()}

    def propose(self, state: State, frame: Frame, encoding: Any) -> Proposal:
        given = {name: value[:frame.rows, frame.t - 1] for name, value in self.values.items()}
        inner = self.guide.propose(map_state(lambda leaf: leaf.detach(), state), frame, encoding, _GivenSites(frame, given))

        def proposal(name: str, prior: Distribution | None) -> tuple[Distribution, Tensor]:
            prior = None if prior is None else _detached(prior)
            q = inner(name, prior)[0]
            return prior if q is None else q, given[name]

        return proposal


class _GivenSites(StepSites):
    """Runs a guide's step at values that are given, in the place of the messenger that lets its sites out."""

    def __init__(self, frame: Frame, values: dict[str, Tensor]):
        super().__init__(frame, values=values)

    @property
    def observed(self) -> dict[str, Tensor]:
        return {name: site.value for name, site in self.sites.items() if site.observed}

    @property
    def drawn(self) -> dict[str, tuple[Distribution, Tensor]]:
        return {name: (site.p, site.value) for name, site in self.sites.items()}
