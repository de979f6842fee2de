"""What the losses of declared models share: entering, windows, global parameters, mini-batches, errors."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_seq.engine.compiled import whole as compiled
from pyro_seq.engine.compiled.compiler import Compiler
from pyro_seq.engine.handlers import look_around
from pyro_seq.engine.loop import Step, Window, forward
from pyro_seq.engine.score import Term, score_contexts, scores_in_one_call, stepwise_terms, terms
from pyro_seq.engine.state import State
from pyro_seq.module import own_parameters, require_count, require_guide, require_model
from pyro_seq.sequences import Packed, Sequences

__all__ = ["Bound", "Carried", "Drawn", "SequenceLoss", "auxiliary", "draw_and_score"]


class Bound(NamedTuple):
    """What a loss found of the local terms of one window of a batch."""

    value: Tensor
    """The bound, without gradient."""
    objective: Tensor
    """Whose gradient is the bound's; its value is of no meaning."""
    state: State
    """What the next window begins from."""


class Carried(NamedTuple):
    """What one window leaves to the next."""

    state: State
    encoder: State
    """What the guide's encodings are run on from."""


class Drawn(NamedTuple):
    """Trajectories drawn from the guide, scored."""

    terms: list[Term]
    num_particles: int
    """1 for a model without latents, whose particles would be all the same."""
    steps: list[Step]
    """Those that were run as written."""
    state: State
    """After the last step."""
    auxiliary: Tensor | None
    """The sum of the further objective that the guide had in these steps, to be minimised."""

    def further(self) -> Tensor | float:
        """That objective, or zero."""
        return 0.0 if self.auxiliary is None else self.auxiliary

    def scores(self) -> Tensor | None:
        """``(rows,)`` log density of all draws without a pathwise gradient, if there are any."""
        found = [term.score_function for term in self.terms if term.score_function is not None]
        return sum(found) if found else None

    def where_not_finite(self, packed: Packed, window: Window) -> str:
        """For messages: the first log density that is not finite."""
        frame = packed.flat(window.start, window.stop, self.num_particles)
        for term in self.terms:
            for what, value in (("model's", term.log_p), ("guide's", term.log_q)):
                if value is not None and not value.isfinite().all():
                    row = int((~value.isfinite()).nonzero()[0])
                    return (f"at site {term.name!r}, time {int(frame.time[row])}, sequence {int(frame.sequence[row])}, the "
                            f"{what} log density is not finite. Look for a scale that underflows, data outside the support, or "
                            "too large a step size")
        return "no single site is not finite; the sum overflows"


def draw_and_score(model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int, analytic_kl: bool,
                   compiler: Compiler | None = None) -> Drawn:
    """Draw the latents of a window from the guide, without resampling, and score all its times in one call if that can be."""
    one_call = scores_in_one_call(model)
    if guide.greedy and not one_call:
        raise ValueError(f"{type(guide).__name__} is trained greedily, which needs a step that is scored in one call; "
                         f"{type(model).__name__} has dropout or batch normalisation in training mode, or comes from "
                         "from_pyro. Use preset='default'")
    steps: list[Step]
    plan = None
    if compiler is not None and one_call and not model.has_contexts():
        whole = compiled.draw_and_score(compiler, model, guide, sequences, window, num_particles, analytic_kl)
        if whole is not None:
            return Drawn(whole.terms, num_particles, [], whole.state, whole.auxiliary)
        known = compiler.plans[model, guide]
        plan = known if known.seen == 0 else None  # the first run shows what later ones need not look for
    if model.has_contexts() and not (sequences.has_missing and model.missing_feeds_state):
        num_particles = 1  # without latents all are the same
        steps, one_call = [score_contexts(model, sequences, window)], False
    else:
        steps = list(forward(model, guide, sequences, num_particles, score=not one_call, window=window,
                             plan=plan))
    found = (terms(model, sequences.packed, steps, num_particles, analytic_kl) if one_call else
             stepwise_terms(model, steps, analytic_kl))
    auxiliary = [step.auxiliary.sum() for step in steps if step.auxiliary is not None]
    return Drawn(found, num_particles, steps, steps[-1].state, torch.stack(auxiliary).sum() if auxiliary else None)


def auxiliary(steps: list[Step]) -> Tensor | float:
    """The sum of the further objective that the guide had in these steps, to be minimised; zero where it has none."""
    found = [step.auxiliary.sum() for step in steps if step.auxiliary is not None]
    return torch.stack(found).sum() if found else 0.0


class SequenceLoss(ELBO):
    """A bound of the evidence as a loss for ``SVI``; what a kind of bound adds is :meth:`_bound`.

    Each sequence has a bound of its own, and the loss is minus their sum: of several particles, those of one sequence.
    """

    kl_weight = 1.0
    """Weight of the latent terms, which only :class:`~pyro_seq.SequentialELBO` anneals."""

    def __init__(self, num_particles: int, compile: bool = False):
        require_count("num_particles", num_particles, 1)
        super().__init__(num_particles=num_particles)
        self.compiler = Compiler(type(self).__name__) if compile else None

    @property
    def kind(self) -> str:
        """The kind of the bound and the number of particles, for messages."""
        return f"{type(self).__name__} of {self.num_particles} particle{'s' * (self.num_particles > 1)}"

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """What tells this loss from others of its class: numbers and words."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.options().items())})"

    def differentiable_loss(self, model: Any, guide: Any, x: Any = None, lengths: Any = None, *, mask: Any = None,
                            plate_size: int | None = None, **covariates: Any) -> Tensor:
        """Minus the bound of the whole batch, with gradients."""
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return self.window_loss(model, guide, sequences, Window(1, sequences.num_steps), plate_size=plate_size)[0]

    def window_loss(self, model: Any, guide: Any, sequences: Sequences, window: Window, *, plate_size: int | None = None
                    ) -> tuple[Tensor, State]:
        """Minus the bound's terms of one window of the steps, with gradients, and the state to begin the next window from.

        Over windows that follow each other, each begun from the last one's (detached) state, the losses add up to that of
        the whole; the gradient is truncated at their borders (truncated back-propagation through time), in the model's state
        and in a guide's recurrent encoder, on both sides. A guide without ``window_rows``, such as a hand-written one with
        ``prepare``, encodes the whole batch each time.

        :param sequences: the whole batch.
        :returns: the loss, and what the next :class:`~pyro_seq.engine.loop.Window` begins from, as its ``state``: a nest of
            tensors.
        """
        name = type(self).__name__
        require_model(model, name)
        require_guide(guide, model, name)
        if not 1 <= window.start <= window.stop <= sequences.num_steps:
            raise ValueError(f"the window {window.start}..{window.stop} does not lie within the steps 1..{sequences.num_steps}")
        if window.start > 1 and window.state is None:
            raise ValueError(f"the window {window.start}..{window.stop} has no state to begin from: give it the one that the "
                             "loss of the window before returned")
        outside = look_around()
        if outside.mask is not None or outside.plates:
            raise ValueError(f"{name} is run inside poutine.mask or a plate: mark missing data with mask=, and use "
                             "plate_size= for mini-batches")
        loss, state = guide.within(self._with_guide, model, guide, sequences, plate_size, window)
        return outside.scale * loss, state

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound, a number."""
        require_model(model, type(self).__name__)
        require_guide(guide, model, type(self).__name__)
        with torch.no_grad(), own_parameters(model, guide):
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the bound; its gradients are added to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.detach().item()

    @abstractmethod
    def _bound(self, model: Any, guide: Any, sequences: Sequences, window: Window) -> Bound:
        """The bound of the batch given the global parameters; model and guide are entered."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} makes no traces; use Trace_ELBO on the same model and guide to see them")

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
        encoder, begun = None, window.start == 1
        if isinstance(window.state, Carried):
            begun, (state, encoder) = True, window.state
            window = window._replace(state=state)
        if begun and window.stop - window.start + 1 < sequences.num_steps:
            found = compiled.window_rows(self.compiler, model, guide, sequences, window, encoder)
            if found is not None:
                encodings, encoder = found
                window = window._replace(encodings=encodings)
        found = self._bound(model, guide, sequences, window)
        objective, value = scale * found.objective, scale * found.value
        share = (window.stop - window.start + 1) / sequences.num_steps
        for term in _global_terms(model, guide_trace, model_trace):
            objective, value = objective + share * term, value + share * term
        # The value of the bound with the gradient of the objective.
        return -(value.detach() + objective - objective.detach()), Carried(found.state, encoder)

    def refuse_not_finite(self, bound: Tensor, drawn: Drawn, packed: Packed, window: Window) -> None:
        """Raise where a log density is NaN or infinite, or their sum is."""
        if not bool(bound.isfinite()):
            raise ValueError(f"the bound is {bound.item()} ({self.kind}): {drawn.where_not_finite(packed, window)}")


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
