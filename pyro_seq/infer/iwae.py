"""IWAE: the importance weighted bound, from whole trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.loop import Window
from pyro_seq.engine.score import Term
from pyro_seq.engine.state import State
from pyro_seq.infer.loss import Bound, SequenceLoss, draw_and_score
from pyro_seq.infer.run import refuse_scaled
from pyro_seq.sequences import Sequences

__all__ = ["IWAE", "Particles", "contribution", "held_out", "refuse_greedy", "whole_trajectories"]


class IWAE(SequenceLoss):
    r"""The importance weighted bound: the log of the mean weight of ``N`` whole trajectories.

    .. math:: \log p(x_{1:T}) \ge E_q \log \frac{1}{N} \sum_{i=1}^N \prod_t
        \frac{p(x_t, z_t^i \mid h_{t-1}^i)}{q(z_t^i \mid h_{t-1}^i, x)}

    It rises with ``N``, from :class:`~pyro_seq.SequentialELBO` (``analytic_kl=False``) at ``N = 1``; but the weights of whole
    trajectories degenerate as sequences get longer, which :class:`~pyro_seq.FIVO` mends. All times are scored in one call,
    as there. Latents without a pathwise gradient, such as discrete ones, get the score-function gradient; the control variate
    of a particle's draw at time t is the bound in which its weights from t on are the geometric mean of the others' (VIMCO).

    :param int num_particles: N.
    :param bool compile: run compiled steps, see :doc:`compile`.

    Source: Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, 2016; Mnih and Rezende, *Variational Inference
    for Monte Carlo Objectives*, 2016 (VIMCO).

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> from pyro.infer import SVI
        >>> from pyro.optim import Adam
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> model = LocalLevel()
        >>> svi = SVI(model, seq.FilteringGuide(model), Adam({"lr": 1e-3}), loss=seq.IWAE(num_particles=8))
        >>> loss = svi.step(model.simulate([20] * 8)["x"])
        >>> seq.IWAE(num_particles=8)
        IWAE(num_particles=8)
    """

    def options(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles}

    def _bound(self, model: Any, guide: Any, sequences: Sequences, window: Window) -> Bound:
        refuse_greedy(self, guide)
        return whole_trajectories(self, model, guide, sequences, window, contribution)


class Particles(NamedTuple):
    """What a window of the steps leaves for the next."""

    state: State
    log_weights: Tensor
    """``(n, N)``"""


def whole_trajectories(loss: SequenceLoss, model: Any, guide: Any, sequences: Sequences, window: Window,
                       weight_of: Callable[[Term], Tensor | None], scores: bool = True) -> Bound:
    """The bound without resampling.

    :param weight_of: ``(rows,)`` what one site adds to the log weights.
    :param scores: whether draws without a pathwise gradient get that of their score function.
    """
    packed, carried = sequences.packed, window.state
    if isinstance(carried, Particles):
        window = window._replace(state=carried.state)
    drawn = draw_and_score(model, guide, sequences, window, loss.num_particles, False, loss.compiler)
    for step in drawn.steps[:2]:
        refuse_scaled(model, step)
    running, ended = packed.counts[window.start - 1], packed.counts[window.stop - 1]

    def by_time(rows: Tensor) -> Tensor:
        return packed.by_time(rows, window.start, window.stop, drawn.num_particles)[:, :running]

    parts = [part for term in drawn.terms if (part := weight_of(term)) is not None]
    steps = by_time(sum(parts)) if parts else torch.zeros(1, running, drawn.num_particles, device=sequences.device)
    before = carried.log_weights[:running] if isinstance(carried, Particles) else torch.zeros_like(steps[0])
    log_weights = before + steps.sum(0)
    start = before.logsumexp(-1)
    bounds = log_weights.logsumexp(-1) - start
    loss.refuse_not_finite(bounds.detach().sum(), drawn, packed, window)
    objective, given = bounds.sum(), drawn.scores() if scores and torch.is_grad_enabled() else None
    if given is not None:
        ended_before = before + steps.cumsum(0) - steps
        baseline = held_out(ended_before.detach(), log_weights.detach().expand_as(steps)) - start[:, None]
        objective = objective + (by_time(given) * (bounds.detach()[:, None] - baseline)).sum()
    return Bound(bounds.detach().sum(), objective - drawn.further(),
                 Particles(drawn.state, log_weights[:ended].detach()))


def contribution(term: Term) -> Tensor | None:
    """``(rows,)`` log p - log q of one site; a latent drawn from the model cancels."""
    if term.observed:
        return term.log_p
    return None if term.log_q is None else term.log_p - term.log_q


def held_out(before: Tensor, after: Tensor) -> Tensor:
    r"""A control variate for each particle's draws: the log sum of the weights without what it has drawn.

    .. math:: b_i = \log \Big( \sum_{j \ne i} w'_j + w_i \big( \prod_{j \ne i} w'_j / w_j \big)^{1 / (N - 1)} \Big)

    It depends on the other particles' draws and on the past alone.

    :param before: ``(..., N)`` log weights :math:`w` before the draws.
    :param after: ``(..., N)`` log weights :math:`w'` after them.
    """
    particles = after.shape[-1]
    if particles == 1:
        return before
    own = torch.eye(particles, dtype=torch.bool, device=after.device)
    others = after[..., None, :].masked_fill(own, -math.inf).logsumexp(-1)
    steps = torch.where(before == -math.inf, -math.inf, after - before)  # a particle of weight zero stays one
    mean = steps[..., None, :].masked_fill(own, 0.0).sum(-1) / (particles - 1)
    found = torch.logaddexp(others, before + mean)
    return torch.where(found.isfinite(), found, before.logsumexp(-1, keepdim=True))


def refuse_greedy(loss: SequenceLoss, guide: Any) -> None:
    """Raise for a guide that each step trains on its own free energy: it has no share in weights."""
    if guide.greedy:
        raise ValueError(f"{type(guide).__name__} is trained greedily, each step on its own free energy, which is a part of "
                         f"the ELBO and not of this {loss.kind}: use SequentialELBO, or preset='default'")
