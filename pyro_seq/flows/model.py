"""Any declared model in the noise space of a flow."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution, TransformedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import AffineTransform, Distribution, Independent, MultivariateNormal, constraints

from pyro_seq.engine.sites import Proposal, PyroSites, Site
from pyro_seq.engine.state import State
from pyro_seq.flows.affine import AffineTemporalAutoregressive
from pyro_seq.guide import SequentialGuide
from pyro_seq.model import SequentialModel
from pyro_seq.module import require_guide, require_model
from pyro_seq.sequences import Frame, Sequences

__all__ = ["FlowedGuide", "FlowedModel"]


class FlowedState(NamedTuple):
    """What a flowed model carries."""

    past: State
    """The flow's."""
    base: State
    """The base model's."""


class FlowedModel(SequentialModel):
    r"""A declared model of the noise that a flow leaves of the data: :math:`y_t = (x_t - \mu(x_{<t})) / \sigma(x_{<t})`.

    The base model sees and models :math:`y`, in its recurrence too; the flowed model is one of :math:`x`, its log density
    that of the base at :math:`y_{1:T}` plus the flow's log determinant, exactly. It is a
    :class:`~pyro_seq.SequentialModel` like any other: every loss, guide and filter takes it, it simulates and forecasts,
    and ``SVI`` trains flow and base together. Missing values are drawn from the model, since the flow reads the past.
    Several flows are had by nesting.

    :param base: the declared model of the noise. Its emission is continuous, on all real numbers.
    :param flow: an :class:`AffineTemporalAutoregressive`, for frames of the base's shape.
    :param str site: the observed site of the base that stands for the data; its data argument has the same name. Other
        observed sites are left as they are.
    :param name: prefix of the parameters in Pyro's store.

    Source: Marino, Chen, He and Mandt, *Improving Sequential Latent Variable Models with Autoregressive Flows*, 2020.

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
        >>> flow = seq.flows.affine_temporal_autoregressive(None, hidden=8)
        >>> model = seq.flows.FlowedModel(LocalLevel(), flow)
        >>> x = model.simulate([20] * 4)["x"]
        >>> guide = seq.FilteringGuide(model)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), seq.SequentialELBO())
        >>> loss = svi.step(x)
        >>> seq.ParticleFilter(model, 100, guide=guide).run(x).log_evidence.shape
        torch.Size([4])
    """

    def __init__(self, base: Any, flow: AffineTemporalAutoregressive, site: str = "x", *, name: str = ""):
        require_model(base, "FlowedModel")
        if base.state_grows:
            raise TypeError("a model from seq.from_pyro replays its past at every step and cannot be run in a flow's noise "
                            "space: declare it as a StateSpaceModel or SequentialModel")
        if not isinstance(flow, AffineTemporalAutoregressive):
            raise TypeError(f"FlowedModel takes an AffineTemporalAutoregressive, not {type(flow).__name__}: make one with "
                            "affine_temporal_autoregressive(D)")
        if site not in base.data_names():
            raise ValueError(f"site={site!r} is not a data argument of {type(base).__name__}, which has "
                             f"{sorted(base.data_names())}: the site and the argument it observes have one name, "
                             f"pyro.sample({site!r}, ..., obs={site})")
        super().__init__(name)
        # Pyro refuses a module whose parts have run, since their parameters had other names in its store: they are the same
        # tensors under the new ones.
        base._pyro_context.used = False
        self.base, self.flow, self.site = base, flow, site
        self.markov_history = base.markov_history  # the flow's past is data, which no latent dimension runs through

    def within(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # Entered around the base, so that its parameters too are read once.
        return super().within(self.base.within, fn, *args, **kwargs)

    def begin(self, frame: Frame) -> State:
        base = self.base.begin(frame)
        return None if base is None else FlowedState(self.flow.start(frame.rows), base)

    def apply(self, state: State, frame: Frame) -> FlowedState:
        past, before = self._parts(state, frame)
        x, y, shift, log_scale = self._noise(past, frame)
        with _OnData(self, x, y, shift, log_scale) as data:
            after = self.base.apply(before, self.noise_frame(frame, y))
        return FlowedState(self.flow.advance(past, data.found()), after)

    def has_advance(self) -> bool:
        return self.base.has_advance()

    def advance_from(self, state: State, z: dict[str, Tensor], frame: Frame) -> FlowedState:
        past, before = self._parts(state, frame)
        x, y, _, _ = self._noise(past, frame)
        return FlowedState(self.flow.advance(past, x), self.base.advance_from(before, z, self.noise_frame(frame, y)))

    def can_draw_latents(self) -> bool:
        return self.base.can_draw_latents()

    def draw_latents(self, state: State, frame: Frame, proposal: Proposal, count: int, detach: bool
                     ) -> tuple[dict[str, Site], FlowedState]:
        past, before = self._parts(state, frame)
        x, y, _, _ = self._noise(past, frame)
        sites, after = self.base.draw_latents(before, self.noise_frame(frame, y), proposal, count, detach)
        return sites, FlowedState(self.flow.advance(past, x), after)

    def read_state(self, state: State) -> State:
        """What the flow makes of the past, in its own units, and what guides of the base read."""
        return None if state is None else FlowedState(self.flow.unit_affine_at(state.past), self.base.read_state(state.base))

    def site_name(self, name: str, t: int) -> str:
        return self.base.site_name(name, t)

    def methods(self) -> Any:
        return self.base.methods()

    def check_inputs(self, sequences: Sequences) -> None:
        if self.site in sequences.x:
            self.flow.check_frames(sequences.x[self.site], self.site)
        super().check_inputs(sequences)

    def whiten(self, sequences: Sequences) -> Sequences:
        """The batch as the base model sees it, all frames at once; a missing entry stays so, at noise zero for what follows.

        :param sequences: the data, as :meth:`pyro_seq.Sequences.of` makes it.
        """
        x = sequences.x[self.site]
        y = self.flow.whiten(self.flow.fill(x, sequences.lengths), sequences.lengths)[0].masked_fill(x.isnan(), torch.nan)
        return Sequences.of({**sequences.x, self.site: y}, sequences.lengths, mask=dict(sequences.observed),
                            covariates=sequences.covariates)

    def noise_frame(self, frame: Frame, y: Tensor | None) -> Frame:
        """The frame with noise in the place of data."""
        # The engine checks what it is given against the whole batch, which here is on another scale.
        return frame._replace(x=frame.x if y is None else {**frame.x, self.site: y}, whole=None)

    def noise_of(self, state: State, frame: Frame) -> tuple[State, Frame]:
        """The base's part of the state, and the frame as the base sees it."""
        past, before = self._parts(state, frame)
        return before, self.noise_frame(frame, self._noise(past, frame)[1])

    def _parts(self, state: State, frame: Frame) -> FlowedState:
        return FlowedState(self.flow.start(frame.rows), None) if state is None else state

    def _noise(self, past: State, frame: Frame) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        shift, log_scale = self.flow.affine_at(past)
        x = frame.x.get(self.site)
        return x, None if x is None else (x - shift) * torch.exp(-log_scale), shift, log_scale


class FlowedGuide(SequentialGuide):
    """A guide of the base model on the flowed one: it reads the noise :math:`y` where it would read the data.

    :param model: the flowed model.
    :param guide: a guide made for ``model.base``: learned or written by hand.
    :param global_guide: a guide for the model's global parameters, under their names in the flowed model.
    :param name: prefix of the parameters in Pyro's store.

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
        >>> base = LocalLevel()
        >>> model = seq.flows.FlowedModel(base, seq.flows.affine_temporal_autoregressive(None))
        >>> guide = seq.flows.FlowedGuide(model, seq.SmoothingGuide(base))
        >>> loss = seq.SequentialELBO().loss(model, guide, model.simulate([20] * 4)["x"])
    """

    def __init__(self, model: FlowedModel, guide: Any, *, global_guide: Any = None, name: str | None = None):
        if not isinstance(model, FlowedModel):
            raise TypeError(f"FlowedGuide takes a FlowedModel, not {type(model).__name__}: a guide is used on the model it was "
                            "made for as it is")
        require_guide(guide, model.base, "FlowedGuide")
        if guide.global_guide is not None:
            raise ValueError("the guide's global_guide knows the parameters by their names in the base model: make the guide "
                             "without, and give FlowedGuide one made for the flowed model, global_guide=...")
        super().__init__(model, global_guide=global_guide, name=name)
        self.guide = guide
        self.reads_prior, self.greedy = guide.reads_prior, guide.greedy

    @property
    def reads_future(self) -> bool:
        return self.guide.reads_future

    def within(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return super().within(self.guide.within, fn, *args, **kwargs)

    def prepare_rows(self, sequences: Sequences) -> Any:
        return self.guide.prepare_rows(self.model.whiten(sequences))

    def propose(self, state: State, frame: Frame, encoding: Any, emit: PyroSites | None = None) -> Proposal:
        return self.guide.propose(*self.model.noise_of(state, frame), encoding, emit)


class _OnData(Messenger):
    """Around the base's step: its site for the noise becomes the site for the data, and its step gets noise back.

    It stands inside all other handlers, which thus see the data and its density.
    """

    def __init__(self, model: FlowedModel, x: Tensor | None, y: Tensor | None, shift: Tensor, log_scale: Tensor):
        super().__init__()
        self.model, self.x, self.y, self.shift, self.log_scale = model, x, y, shift, log_scale
        self.message: dict[str, Any] | None = None
        self.value: Tensor | None = None

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] != self.model.site or msg["infer"].get("_deterministic"):
            return
        base = type(self.model.base).__name__
        if msg["is_observed"] and msg["value"] is not self.y:
            raise ValueError(f"site {msg['name']!r} of {base} observes a function of the data, such as x - 5, or part of it: "
                             f"under a flow it observes the data itself, obs={msg['name']}")
        msg["fn"] = _affine(msg["fn"], self.shift, self.log_scale, msg["name"], base)
        if msg["is_observed"]:
            msg["value"] = self.x
        self.message = msg

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg is self.message:
            self.value = msg["value"]
            msg["value"] = self.y if self.value is self.x else (self.value - self.shift) * torch.exp(-self.log_scale)

    def found(self) -> Tensor:
        """The data of this step, given or drawn."""
        if self.value is None:
            raise ValueError(f"the step of {type(self.model.base).__name__} does not sample the site {self.model.site!r}, "
                             "which FlowedModel is to put on the data's scale: name it as its argument is, and with site=")
        return self.value


_LOCATION_SCALE = {"Normal", "Laplace", "Cauchy", "StudentT", "Gumbel", "Logistic"}


def _affine(fn: Distribution, shift: Tensor, log_scale: Tensor, name: str, model: str) -> Distribution:
    """The distribution of ``shift + exp(log_scale) * y`` for ``y ~ fn``, of the same family where it has a location and
    scale, so that single entries can be missing and a Kalman filter knows it."""
    frame = tuple(shift.shape[1:])
    if not isinstance(fn, Distribution):
        raise TypeError(f"site {name!r}: {type(fn).__name__} is not a distribution")
    if tuple(fn.event_shape) != frame:
        hint = " (it lacks .to_event(1))" if frame and tuple(fn.shape())[-1:] == frame else ""
        raise ValueError(f"site {name!r} of {model} has frames of shape {tuple(fn.event_shape)}{hint} and the flow frames of "
                         f"shape {frame}: make the flow by affine_temporal_autoregressive(D), or (None) for scalar frames")
    inner, events = fn, 0
    while isinstance(inner, Independent):
        inner, events = inner.base_dist, events + inner.reinterpreted_batch_ndims
    family = type(inner).__name__
    if isinstance(inner, MaskedDistribution):
        raise ValueError(f"site {name!r} of {model} is masked in the step, which leaves out part of a density and not of the "
                         "flow's: mark missing data with NaN or mask=")
    support = inner.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is not constraints.real:
        kind = "discrete" if support.is_discrete else f"on {support} only"
        raise ValueError(f"site {name!r} of {model} is {family}, {kind}: the noise of a flow is any real number. Use an "
                         "emission such as Normal or StudentT; transform bounded data to the real line beforehand")
    scale = torch.exp(log_scale)
    if isinstance(inner, MultivariateNormal):
        moved = type(inner)(shift + scale * inner.loc, scale_tril=scale[..., None] * inner.scale_tril)
    elif family in _LOCATION_SCALE:
        others = {k: getattr(inner, k) for k in inner.arg_constraints if k not in ("loc", "scale")}
        moved = type(inner)(**others, loc=shift + scale * inner.loc, scale=scale * inner.scale)
    else:
        moved = TransformedDistribution(inner, [AffineTransform(shift, scale, event_dim=len(inner.event_shape))])
    return type(fn)(moved, events) if events else moved
