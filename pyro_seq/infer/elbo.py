"""SequentialELBO: the evidence lower bound as a loss for ``SVI``, scoring whole sequences at once."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_seq.engine.handlers import look_around
from pyro_seq.engine.loop import Window, forward
from pyro_seq.engine.score import Term, score_contexts, scores_in_one_call, stepwise_terms, terms
from pyro_seq.engine.state import State
from pyro_seq.module import own_parameters, require_count, require_guide, require_model
from pyro_seq.sequences import Frame, Packed, Sequences

__all__ = ["SequentialELBO"]


class SequentialELBO(ELBO):
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
                 free_bits: float = 0.0):
        require_count("num_particles", num_particles, 1)
        if free_bits < 0:
            raise ValueError(f"free_bits={free_bits}; it is a number of nats, at least 0")
        if free_bits > 0 and not analytic_kl:
            raise ValueError("free_bits bounds the analytic KL: leave analytic_kl=True")
        super().__init__(num_particles=num_particles)
        self.analytic_kl, self.kl_weight, self.free_bits = analytic_kl, kl_weight, free_bits

    def differentiable_loss(self, model: Any, guide: Any, x: Any = None, lengths: Any = None, *, mask: Any = None,
                            plate_size: int | None = None, **covariates: Any) -> Tensor:
        """Minus the bound of the whole batch, with gradients."""
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return self.window_loss(model, guide, sequences, Window(1, sequences.num_steps), plate_size=plate_size)[0]

    def window_loss(self, model: Any, guide: Any, sequences: Sequences, window: Window, *, plate_size: int | None = None
                    ) -> tuple[Tensor, State]:
        """Minus the bound's terms of one window of the steps, with gradients, and the state to begin the next window from.

        Over windows that follow each other, each begun from the last one's (detached) state, the losses add up to that of
        the whole; the gradient is truncated at their borders (truncated back-propagation through time).

        :param sequences: the whole batch: the guide's encodings read all of it.
        :returns: the loss, and the state after ``window.stop`` for the next :class:`~pyro_seq.engine.loop.Window`.
        """
        require_model(model, "SequentialELBO")
        require_guide(guide, model, "SequentialELBO")
        if not 1 <= window.start <= window.stop <= sequences.num_steps:
            raise ValueError(f"the window {window.start}..{window.stop} does not lie within the steps 1..{sequences.num_steps}")
        if window.start > 1 and window.state is None:
            raise ValueError(f"the window {window.start}..{window.stop} has no state to begin from: give it the one that the "
                             "loss of the window before returned")
        outside = look_around()
        if outside.mask is not None or outside.plates:
            raise ValueError("SequentialELBO is run inside poutine.mask or a plate: mark missing data with mask=, and use "
                             "plate_size= for mini-batches")
        loss, state = guide.within(self._with_guide, model, guide, sequences, plate_size, window)
        return outside.scale * loss, state

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, a number."""
        require_model(model, "SequentialELBO")
        require_guide(guide, model, "SequentialELBO")
        with torch.no_grad(), own_parameters(model, guide):
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; its gradients are added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach().item()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError("SequentialELBO makes no traces; use Trace_ELBO on the same model and guide to see them")

    def _with_guide(self, model: Any, guide: Any, sequences: Sequences, plate_size: int | None, window: Window
                    ) -> tuple[Tensor, State]:
        with poutine.trace() as guide_trace:
            values = guide.draw_globals(sequences)
        with poutine.trace() as model_trace, poutine.condition(data=values):
            return model.within(self._loss, model, guide, sequences, plate_size, window, guide_trace.trace, model_trace.trace)

    def _loss(self, model: Any, guide: Any, sequences: Sequences, plate_size: int | None, window: Window,
              guide_trace: poutine.Trace, model_trace: poutine.Trace) -> tuple[Tensor, State]:
        guide.refuse_unguided([name for name in model.global_sites() if not model_trace.nodes[name]["is_observed"]])
        scale = 1.0 if plate_size is None else plate_size / sequences.num_sequences
        if scale < 1:
            raise ValueError(f"plate_size={plate_size} is smaller than the batch of {sequences.num_sequences} sequences: "
                             "it is the number of sequences in the whole data set")
        one_call = scores_in_one_call(model)
        if guide.greedy and not one_call:
            raise ValueError(f"{type(guide).__name__} is trained greedily, which needs a step that is scored in one call; "
                             f"{type(model).__name__} has dropout or batch normalisation in training mode, or comes from "
                             "from_pyro. Use preset='default'")
        whole = window.stop - window.start + 1 == sequences.num_steps
        particles = self.num_particles
        if model.has_contexts() and not (sequences.has_missing and model.missing_feeds_state):
            particles = 1  # without latents all are the same
            steps, one_call = [score_contexts(model, sequences, window)], False
        else:
            steps = list(forward(model, guide, sequences, particles, score=not one_call, window=None if whole else window))
        found = (terms(model, sequences.packed, steps, particles, self.analytic_kl) if one_call else
                 stepwise_terms(model, steps, self.analytic_kl))
        auxiliary = [step.auxiliary.sum() for step in steps if step.auxiliary is not None]
        bound, surrogate = self._bound(found, sequences.packed, window, particles)
        if not bool(bound.isfinite()):
            frame = sequences.packed.flat(window.start, window.stop, particles)
            raise ValueError(f"the bound is {bound.item()}: {_where_not_finite(found, frame)}")
        objective = scale * surrogate - (scale * torch.stack(auxiliary).sum() if auxiliary else 0.0)
        value = scale * bound
        share = (window.stop - window.start + 1) / sequences.num_steps
        for term in _global_terms(model, guide_trace, model_trace):
            objective, value = objective + share * term, value + share * term
        # The value of the bound with the gradient of the objective.
        return -(value.detach() + objective - objective.detach()), steps[-1].state

    def _bound(self, found: list[Term], packed: Packed, window: Window, particles: int) -> tuple[Tensor, Tensor]:
        """``(bound, surrogate)``: the bound of the batch, and what to differentiate for its gradient."""
        total: Tensor | None = None
        for term in found:
            part = self._contribution(term)
            if part is not None:
                total = part if total is None else total + part
        if total is None:
            total = torch.zeros(sum(packed.counts[window.start - 1:window.stop]) * particles, device=packed.sequences.device)
        bound = surrogate = total.sum() / particles
        scores = [term.score_function for term in found if term.score_function is not None]
        if scores:
            def by_time(rows: Tensor) -> Tensor:
                return packed.by_time(rows, window.start, window.stop, particles)

            to_go = by_time(total.detach()).flip(0).cumsum(0).flip(0)
            surrogate = surrogate + (by_time(sum(scores)) * to_go).sum() / particles
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


def _global_terms(model: Any, guide_trace: poutine.Trace, model_trace: poutine.Trace) -> list[Tensor]:
    """log p of the global parameters that were given or drawn by the guide, and minus log q of the latter."""
    found = []
    for name in model.global_sites():
        site = model_trace.nodes[name]
        if site["is_observed"]:
            found.append(site["fn"].log_prob(site["value"]).sum())
    for name, site in guide_trace.nodes.items():  # an autoguide adds sites of its own to the model's
        if site["type"] == "sample" and not site["is_observed"]:
            if not site["fn"].has_rsample:
                raise ValueError(f"global site {name!r}: the guide's {type(site['fn']).__name__} has no pathwise "
                                 "gradient; use Trace_ELBO, or a reparameterised guide")
            found.append(-site["fn"].log_prob(site["value"]).sum())
    return found


def _where_not_finite(found: list[Term], frame: Frame) -> str:
    for term in found:
        for what, value in (("model's", term.log_p), ("guide's", term.log_q)):
            if value is not None and not value.isfinite().all():
                row = int((~value.isfinite()).nonzero()[0])
                return (f"at site {term.name!r}, time {int(frame.time[row])}, sequence {int(frame.sequence[row])}, the {what} "
                        "log density is not finite. Look for a scale that underflows, data outside the support, or too large a "
                        "step size")
    return "no single site is not finite; the sum overflows"
