"""SequentialELBO: the evidence lower bound as a loss for ``SVI``, scoring whole sequences at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.loop import Window
from pyro_seq.engine.score import Term
from pyro_seq.infer.loss import Bound, Drawn, SequenceLoss, draw_and_score
from pyro_seq.sequences import Packed, Sequences

__all__ = ["SequentialELBO"]


class SequentialELBO(SequenceLoss):
    r"""The evidence lower bound of a declared model and a sequential guide.

    .. math:: \log p(x_{1:T}) \ge E_q \sum_t \log p(x_t, z_t \mid h_{t-1}) - \log q(z_t \mid h_{t-1}, x)

    The same objective as Pyro's :class:`~pyro.infer.Trace_ELBO` (with ``analytic_kl``,
    :class:`~pyro.infer.TraceMeanField_ELBO`), several times faster: the loop over time only draws the latents, then the
    model's step is scored once on all times together. A step with dropout or batch normalisation in training mode is
    scored inside the loop instead; other randomness of its own, beside its sites, is drawn once for model and guide, where
    Pyro's losses draw it for each. Latents without a pathwise gradient, such as discrete ones, get the score-function
    gradient with the reward from their own time on.

    :param int num_particles: samples of each sequence; the bound is their average.
    :param bool analytic_kl: use KL(q || p) of each step in closed form where known, at the drawn past.
    :param float kl_weight: weight of the latent terms, for annealing; an attribute that can be set between steps.
    :param float free_bits: nats a step below which a latent site's analytic KL is not penalised.

    :param bool compile: run compiled steps, see :doc:`compile`.

    Source: Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014; Kingma et al., *Improving Variational Inference
    with Inverse Autoregressive Flow*, 2016 (free bits).

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
        >>> guide = seq.FilteringGuide(model)
        >>> svi = SVI(model, guide, Adam({"lr": 1e-3}), loss=seq.SequentialELBO())
        >>> loss = svi.step(model.simulate([20] * 8)["x"])
    """

    def __init__(self, num_particles: int = 1, *, analytic_kl: bool = True, kl_weight: float = 1.0,
                 free_bits: float = 0.0, compile: bool = False):
        super().__init__(num_particles, compile)
        if free_bits < 0:
            raise ValueError(f"free_bits={free_bits}; it is a number of nats, at least 0")
        if free_bits > 0 and not analytic_kl:
            raise ValueError("free_bits bounds the analytic KL: leave analytic_kl=True")
        self.analytic_kl, self.kl_weight, self.free_bits = analytic_kl, kl_weight, free_bits

    @property
    def kind(self) -> str:
        return "ELBO"

    def options(self) -> dict[str, Any]:
        return {"num_particles": self.num_particles, "analytic_kl": self.analytic_kl, "kl_weight": float(self.kl_weight),
                "free_bits": float(self.free_bits)}

    def _bound(self, model: Any, guide: Any, sequences: Sequences, window: Window) -> Bound:
        drawn = draw_and_score(model, guide, sequences, window, self.num_particles, self.analytic_kl, self.compiler)
        bound, surrogate = self._value(drawn, sequences.packed, window)
        self.refuse_not_finite(bound, drawn, sequences.packed, window)
        return Bound(bound, surrogate - drawn.further(), drawn.state)

    def _value(self, drawn: Drawn, packed: Packed, window: Window) -> tuple[Tensor, Tensor]:
        """``(bound, surrogate)``: the bound of the batch, and what to differentiate for its gradient."""
        particles = drawn.num_particles
        total: Tensor | None = None
        for term in drawn.terms:
            part = self._contribution(term)
            if part is not None:
                total = part if total is None else total + part
        if total is None:
            total = torch.zeros(sum(packed.counts[window.start - 1:window.stop]) * particles, device=packed.sequences.device)
        bound = surrogate = total.sum() / particles
        scores = drawn.scores()
        if scores is not None:
            def by_time(rows: Tensor) -> Tensor:
                return packed.by_time(rows, window.start, window.stop, particles)

            to_go = by_time(total.detach()).flip(0).cumsum(0).flip(0)
            surrogate = surrogate + (by_time(scores) * to_go).sum() / particles
        return bound.detach(), surrogate

    def _contribution(self, term: Term) -> Tensor | None:
        """``(rows,)`` what one site adds to the bound."""
        if term.observed:
            return term.log_p
        if term.log_q is None:
            return None
        if term.kl is None:
            return self.kl_weight * (term.log_p - term.log_q)
        kl = term.kl.clamp(min=self.free_bits) if self.free_bits > 0 else term.kl
        return -self.kl_weight * kl
