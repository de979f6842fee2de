"""Declare: a sequence model as one step of plain Pyro."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.reads import reads_observed
from pyro_seq.engine.sites import LatentsDrawn, Proposal, Site, StepSites
from pyro_seq.engine.state import State, check_state
from pyro_seq.engine.unroll import unroll
from pyro_seq.module import SequentialModule, accepted, own_parameters
from pyro_seq.sequences import Frame, Sequences

__all__ = ["SequentialModel", "StateSpaceModel"]


class SequentialModel(SequentialModule):
    r"""A model :math:`p(x_{1:T}, z_{1:T}) = \prod_t p(x_t, z_t \mid h_{t-1})` with a carried state :math:`h_t`.

    Subclasses write :meth:`start` and :meth:`step` in plain Pyro, without a time loop, a plate over sequences or names
    with a time in them. Rows are sequences, or particles of sequences, or both times steps: user code never needs to
    know which.

    Called as ``model(x, lengths)`` it is an ordinary Pyro model: a plate over sequences, ``pyro.markov`` over time, and
    sites ``z_1, x_1, z_2, ...``. Without data, ``model(lengths=[100] * 8)`` simulates.

    :param name: prefix of the parameters in Pyro's store; needed only when two models of one process share names.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro import poutine
        >>> import pyro_seq as seq
        >>> class Recurrent(seq.SequentialModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.cell = torch.nn.GRUCell(3, 4)
        ...         self.emit = torch.nn.Linear(6, 1)
        ...     def start(self, rows):
        ...         return torch.zeros(rows, 4)
        ...     def step(self, h, x=None):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         loc = self.emit(torch.cat([h, z], -1))
        ...         x = pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)
        ...         return self.cell(torch.cat([z, x], -1), h)
        >>> model = Recurrent()
        >>> trace = poutine.trace(model).get_trace(torch.zeros(5, 2, 1))
        >>> [site for site in trace.nodes if site[-2:] in ("_1", "_2")]
        ['z_1', 'x_1', 'z_2', 'x_2']
        >>> trace.nodes["z_2"]["value"].shape
        torch.Size([5, 2])
    """

    state_grows = False
    """Whether the state gets longer from step to step (a wrapped Pyro function)."""
    markov_history: int | None = None
    """Steps of the past that a step may read directly, for ``pyro.markov``; ``None`` for all of them."""
    missing_feeds_state = True
    """Whether missing values are drawn from the model, because the state may read them."""
    def start(self, rows: int) -> State:
        """The state before the first step: a tensor, tuple or dict of tensors, each ``(rows, ...)``."""
        raise TypeError(f"{type(self).__name__} does not define start(self, rows), the state before the first step")

    def step(self, state: State, **inputs: Tensor) -> State:
        """One step: sample the latents, observe the data, return the next state.

        :param state: what :meth:`start` or the last step returned, ``(rows, ...)``.
        :param inputs: the data (``x``, or the keys of the dict that was passed), ``None`` when simulating; those
            covariates, and the 1-based time ``t`` ``(rows,)``, that the signature names.
        """
        raise TypeError(f"{type(self).__name__} does not define step(self, state, x=None), one step of the model")

    def advance(self, state: State, z: dict[str, Tensor], x: Tensor | dict[str, Tensor]) -> State:
        """Optional: the next state from the latents and the data, without scoring.

        Where defined, methods that score a whole sequence at once need not run the emission inside the loop.
        """
        raise TypeError(f"{type(self).__name__} does not define advance")

    def forward(self, x: Any = None, lengths: Any = None, *, mask: Any = None, plate_size: int | None = None,
                **covariates: Any) -> Tensor | dict[str, Tensor]:
        """The whole model as a Pyro program.

        :param x: data as accepted by :meth:`pyro_seq.Sequences.of`; ``None`` simulates ``len(lengths)`` sequences.
        :param lengths: ``(B,)`` integers.
        :param mask: True where observed.
        :param plate_size: sequences in the whole data set when ``x`` is a mini-batch; local terms are scaled by
            ``plate_size / B``.
        :param covariates: ``(B, T, ...)`` each.
        :returns: the observed (or simulated) data ``(B, T, ...)``, a dict by site if there are several.
        """
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return self.within(unroll, self, sequences, plate_size=plate_size)

    def simulate(self, lengths: Any, **covariates: Any) -> dict[str, Tensor]:
        """Draw sequences from the model.

        :param lengths: ``(B,)`` integers.
        :param covariates: ``(B, T, ...)`` each.
        :returns: every site, latent and observed, as ``(B, T, ...)``; past a sequence's end the values are zero.
        """
        from pyro_seq.engine.loop import simulate

        sequences = Sequences.of(None, lengths, covariates=covariates)
        with torch.no_grad(), own_parameters(self):
            return self.within(simulate, self, sequences)

    # The engine's side of the declaration.

    def begin(self, frame: Frame) -> State:
        """The state before the first step of ``frame.rows`` rows."""
        state = self.start(frame.rows)
        check_state(state, frame.rows, f"{type(self).__name__}.start")
        return state

    def apply(self, state: State, frame: Frame) -> State:
        """Run one step on flat rows, under whatever messenger is active."""
        return self._returned(self.step(state, **self._inputs(self.step, frame, 1)), "step")

    def _returned(self, state: State, method: str) -> State:
        if state is None:
            raise ValueError(f"{type(self).__name__}.{method} returned None: return the state that the next step reads")
        return state

    def has_advance(self) -> bool:
        """Whether the state can be advanced from the latents alone."""
        return type(self).advance is not SequentialModel.advance

    def advance_from(self, state: State, z: dict[str, Tensor], frame: Frame) -> State:
        """The next state by :meth:`advance`."""
        x = frame.x["x"] if list(frame.x) == ["x"] else dict(frame.x)
        return self.advance(state, z, x, **self._inputs(self.advance, frame, 3))

    def can_draw_latents(self) -> bool:
        """Whether :meth:`draw_latents` costs less than a whole step."""
        return self.has_advance()

    def draw_latents(self, state: State, frame: Frame, proposal: Proposal, count: int, detach: bool
                     ) -> tuple[dict[str, Site], State]:
        """Draw the ``count`` latents of a step and advance the state, without running the emission."""
        with suppress(LatentsDrawn), StepSites(frame, proposal, stop_after=count) as step:
            self.apply(state, frame)
        z = {name: site.value.detach() if detach else site.value for name, site in step.sites.items()}
        return step.sites, self.advance_from(state, z, frame)

    def read_state(self, state: State) -> State:
        """The part of the state that a learned guide reads, of the same width at every step."""
        return state

    def site_name(self, name: str, t: int) -> str:
        """The name in a Pyro trace of site ``name`` at time ``t``."""
        return f"{name}_{t}"

    def methods(self) -> tuple[tuple[Callable[..., Any], int], ...]:
        """The user's methods that take inputs, each with its number of positional arguments."""
        return ((self.step, 1),)

    def _inputs(self, method: Callable[..., Any], frame: Frame, positional: int) -> dict[str, Tensor]:
        names, _, anything = accepted(method, positional)
        given = {**frame.x, **frame.covariates}
        if not anything:
            given = {k: v for k, v in given.items() if k in names}
        if "t" in names:
            given["t"] = frame.time
        return given

    def data_names(self) -> set[str]:
        """The arguments that may be left out, to simulate: the data."""
        names: set[str] = set()
        for method, positional in self.methods():
            known, required, _ = accepted(method, positional)
            names |= known - required
        return names - {"t"}

    def check_inputs(self, sequences: Sequences) -> None:
        """Raise unless the user's methods and the data and covariates name the same things, in the model's type."""
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)
        for name, value in {**sequences.x, **sequences.covariates}.items():
            if dtype is not None and value.is_floating_point() and value.dtype != dtype:
                raise TypeError(f"{name!r} is {value.dtype} and the parameters of {type(self).__name__} are {dtype}; convert "
                                f"it with {name}.to({dtype}), or the model with model.to({value.dtype})")
        given = {**sequences.x, **sequences.covariates}
        known: set[str] = {"t"}
        anything = False
        for method, positional in self.methods():
            names, required, any_here = accepted(method, positional)
            known |= names
            anything |= any_here
            lacking = sorted(required - set(given) - {"t"})
            if lacking:
                raise ValueError(
                    f"{type(self).__name__}.{method.__name__} requires {lacking}, which was not given: pass covariates "
                    f"by name, e.g. {lacking[0]}=tensor (B, T, ...); data arguments default to None, "
                    f"{lacking[0]}=None, so that the model can simulate")
        unknown = sorted(set(given) - known)
        if unknown and not anything:
            what = "data" if unknown[0] in sequences.x else "covariate"
            raise ValueError(
                f"{what} {unknown[0]!r} is not an argument of any method of {type(self).__name__}: its methods take "
                f"{sorted(known - {'t'})}")


class StateSpaceModel(SequentialModel):
    r"""A hidden Markov process :math:`z_1 \sim \pi,\; z_t \sim f(z_{t-1}),\; x_t \sim g(z_t)`.

    Subclasses write :meth:`initial`, :meth:`transition` and :meth:`emission`. What ``initial`` and ``transition``
    return is the state the next ``transition`` and the ``emission`` read.

    Source: Durbin and Koopman, *Time Series Analysis by State Space Methods*, 2012.

    Example, a local level::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = LocalLevel().simulate([50, 40])["x"]
        >>> x.shape
        torch.Size([2, 50])
        >>> seq.KalmanFilter(LocalLevel()).run(x, [50, 40]).log_evidence.shape
        torch.Size([2])
    """

    markov_history = 1

    def initial(self, **inputs: Tensor) -> State:
        """Sample the first latents; returns the state ``(rows, ...)``."""
        raise TypeError(f"{type(self).__name__} does not define initial(self), the distribution of the first state")

    def transition(self, state: State, **inputs: Tensor) -> State:
        """Sample the next latents given the last state; returns the state ``(rows, ...)``."""
        raise TypeError(f"{type(self).__name__} does not define transition(self, z), the step from one state to the "
                        "next")

    def emission(self, state: State, **inputs: Tensor) -> Any:
        """Observe the data given the state."""
        raise TypeError(f"{type(self).__name__} does not define emission(self, z, x=None), which observes the data")

    def begin(self, frame: Frame) -> State:
        return None

    def apply(self, state: State, frame: Frame) -> State:
        state = self._latent_step(state, frame)
        self.apply_emission(state, frame)
        return state

    def apply_emission(self, state: State, frame: Frame) -> None:
        """Run the emission alone, given the state of each row."""
        self.emission(state, **self._inputs(self.emission, frame, 1))

    def can_draw_latents(self) -> bool:
        return True

    def draw_latents(self, state: State, frame: Frame, proposal: Proposal, count: int, detach: bool
                     ) -> tuple[dict[str, Site], State]:
        with StepSites(frame, proposal, detach=detach) as step:
            after = self._latent_step(state, frame)
        return step.sites, after

    def methods(self) -> tuple[tuple[Callable[..., Any], int], ...]:
        return ((self.initial, 0), (self.transition, 1), (self.emission, 1))

    @property
    def missing_feeds_state(self) -> bool:
        """Whether a gap of one site is read by another of the same emission, so that it must be drawn."""
        return self.__dict__.get("_reads_gaps", False)

    def check_inputs(self, sequences: Sequences) -> None:
        super().check_inputs(sequences)
        for method, positional in ((self.initial, 0), (self.transition, 1)):
            if ahead := sorted(accepted(method, positional)[0] & set(sequences.x)):
                raise ValueError(
                    f"{type(self).__name__}.{method.__name__} takes {ahead}, which is data: a latent that reads its own frame "
                    "is no generative model. If it is an input, pass it as a covariate, by another name; if the last frame is "
                    "meant, declare a SequentialModel that carries it in its state")
        if sequences.has_missing and "_reads_gaps" not in self.__dict__ and self.__dict__["_values"] is not None:
            self.__dict__["_reads_gaps"] = reads_observed(self, sequences)

    def _latent_step(self, state: State, frame: Frame) -> State:
        if state is None:
            return self._returned(self.initial(**self._inputs(self.initial, frame, 0)), "initial")
        return self._returned(self.transition(state, **self._inputs(self.transition, frame, 1)), "transition")
