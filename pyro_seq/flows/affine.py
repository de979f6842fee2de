"""The affine autoregressive flow over time."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from pyro.distributions import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_seq.engine.state import State
from pyro_seq.flows.conditioners import RecurrentPast, WindowPast
from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["AffineTemporalAutoregressive", "affine_temporal_autoregressive"]


class AffineTemporalAutoregressive(TransformModule):
    r"""A sequence as noise that is shifted and scaled by the past,

    .. math:: x_t = \mu(x_{<t}) + \sigma(x_{<t}) \odot y_t, \qquad
              \log \left| \frac{dx}{dy} \right| = \sum_t \sum_d \log \sigma_d(x_{<t}).

    As a Pyro transform it maps noise to data: ``dist.TransformedDistribution(noise, [flow])`` is a distribution of whole
    sequences, ``(T, D)`` or for scalar frames ``(T,)``. Noise to data takes a step a frame; data to noise is one pass over
    all frames, and takes any value. For :class:`~pyro_seq.flows.FlowedModel` and for streaming the same map is had one
    frame at a time, by :meth:`start`, :meth:`affine_at` and :meth:`advance`, with a state that the caller keeps.

    It starts at the identity or, given ``like``, at the map that gives each entry its mean and spread there; shifts and
    scales are then learned in those units. The log scale is kept within ``bound`` of where it starts, by
    ``bound * tanh(. / bound)``. Scales can thus not run away; a shift linear in the past can, as any autoregression.

    Data must be complete: the past of a frame after a gap is unknown. :meth:`fill` puts in a value;
    :class:`~pyro_seq.flows.FlowedModel` draws the gaps from the model.

    :param past: a causal network, :class:`RecurrentPast` or :class:`WindowPast`, or a module with their methods
        ``start``, ``at``, ``advance`` and ``everywhere``.
    :param bool scalar: frames are scalars, a sequence is ``(T,)``.
    :param like: data ``(B, T, D)``, ragged or with gaps too, whose units the flow will meet.
    :param float bound: of the log scale.

    Source: Marino, Chen, He and Mandt, *Improving Sequential Latent Variable Models with Autoregressive Flows*, 2020.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> from pyro_seq.flows import AffineTemporalAutoregressive, RecurrentPast
        >>> flow = AffineTemporalAutoregressive(RecurrentPast(3, hidden=16))
        >>> noise = dist.Normal(torch.zeros(20, 3), 1.0).to_event(2)
        >>> sequences = dist.TransformedDistribution(noise, [flow])
        >>> x = sequences.sample((5,))
        >>> sequences.log_prob(x).shape
        torch.Size([5])
        >>> y, log_det = flow.whiten(x, lengths=[20, 12, 7, 20, 1])
        >>> y.shape, log_det.shape
        (torch.Size([5, 20, 3]), torch.Size([5]))
    """

    bijective = True

    def __init__(self, past: nn.Module, *, scalar: bool = False, like: Any = None, bound: float = 5.0):
        super().__init__(cache_size=0)  # both ways are exact: a cache would only outlive the parameters it was made with
        if not isinstance(past, nn.Module) or not all(hasattr(past, m) for m in ("start", "at", "advance", "everywhere")):
            raise TypeError(f"past is {past!r}; it is a causal network such as RecurrentPast(3) or WindowPast(3, lags=2): "
                            "affine_temporal_autoregressive(3) makes both in one")
        if scalar and past.width != 1:
            raise ValueError(f"scalar=True with a past of width {past.width}: scalar frames have width 1")
        if not isinstance(bound, Real) or not bound > 0:
            raise ValueError(f"bound={bound!r}; it is how far the log scale may go, a positive number")
        self.past, self.scalar, self.bound = past, scalar, float(bound)
        self.frame_shape = torch.Size(() if scalar else (past.width,))
        center, spread = (torch.zeros(past.width), torch.ones(past.width)) if like is None else self._units(like)
        parameter = next(past.parameters(), center)
        self.register_buffer("center", center.to(parameter))
        self.register_buffer("spread", spread.to(parameter))

    # The flow one frame at a time.

    def start(self, rows: int) -> State:
        """The past of the first frame of ``rows`` sequences; its tensors are ``(rows, ...)``."""
        return self.past.start(rows)

    def affine_at(self, state: State) -> tuple[Tensor, Tensor]:
        """Shift and log scale of the next frame, ``(rows, D)`` each, ``(rows,)`` for scalar frames."""
        return self._in_units(*self.unit_affine_at(state))

    def unit_affine_at(self, state: State) -> tuple[Tensor, Tensor]:
        """:meth:`affine_at` in units of the flow's ``spread``, ``(rows, D)`` each, for networks to read."""
        shift, log_scale = self.past.at(state)
        return shift, self._bounded(log_scale)

    def advance(self, state: State, x: Tensor) -> State:
        """The past once the frame ``x``, ``(rows, D)`` or ``(rows,)``, belongs to it."""
        return self.past.advance(state, self._unit_frames(x))

    # The flow all at once.

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log scale of every frame given those before it, each of the shape of ``x``, ``(..., T, D)``."""
        flat = self._unit_frames(x).reshape(-1, x.shape[-1 - len(self.frame_shape)], self.past.width)
        shift, log_scale = self.past.everywhere(flat)
        shift, log_scale = self._in_units(shift, self._bounded(log_scale))
        return shift.reshape(x.shape), log_scale.reshape(x.shape)

    def whiten(self, x: Any, lengths: Any = None) -> tuple[Tensor, Tensor]:
        """The noise of a batch of sequences, and the log determinant that belongs to it.

        ``log p(x) = log p(y) + log_det``.

        :param x: data as accepted by :meth:`pyro_seq.Sequences.of`, complete.
        :param lengths: ``(B,)`` integers.
        :returns: ``(y, log_det)``: ``(B, T, D)``, zero past a sequence's end; and ``(B,)``, ``log |dy/dx|``, to which padding
            contributes nothing.
        :raises ValueError: on missing values or frames of another shape.
        """
        sequences = self._sequences(x, lengths)
        if sequences.has_missing:
            b, t = sequences.x["x"].isnan().flatten(2).any(-1).nonzero()[0].tolist() if not self.scalar else (
                sequences.x["x"].isnan().nonzero()[0].tolist())
            raise ValueError(f"x is missing in sequence {b} at time {t + 1}, and later frames are whitened by what was there: "
                             "flow.fill(x) puts in a value; FlowedModel draws it from a model")
        inside = sequences.active.reshape(sequences.active.shape + (1,) * len(self.frame_shape))
        x = sequences.x["x"]
        shift, log_scale = self.affine(x)
        y = torch.where(inside, (x - shift) * torch.exp(-log_scale), 0.0)
        return y, -torch.where(inside, log_scale, 0.0).flatten(1).sum(1)

    def fill(self, x: Any, lengths: Any = None) -> Tensor:
        """The data with its missing entries at noise zero: each is the flow's shift given the frames before it.

        A plausible value and no more: a density of the filled data is not that of the data.

        :param x: data as accepted by :meth:`pyro_seq.Sequences.of`.
        :param lengths: ``(B,)`` integers.
        :returns: ``(B, T, D)``.
        """
        sequences = self._sequences(x, lengths)
        if not sequences.has_missing:
            return sequences.x["x"]
        state, frames = self.start(sequences.num_sequences), []
        for frame in sequences.x["x"].unbind(1):
            frames.append(torch.where(frame.isnan(), self.affine_at(state)[0], frame))
            state = self.advance(state, frames[-1])
        return torch.stack(frames, 1)

    # The flow as a transform.

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 1 + len(self.frame_shape))

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return self.domain

    def _call(self, y: Tensor) -> Tensor:
        """Noise to data."""
        self._check_shape(y, "noise")
        time = y.dim() - 1 - len(self.frame_shape)
        state, frames = self.start(y.shape[:time].numel()), []
        for noise in y.reshape(-1, *y.shape[time:]).unbind(1):
            shift, log_scale = self.affine_at(state)
            frames.append(torch.addcmul(shift, noise, torch.exp(log_scale)))
            state = self.advance(state, frames[-1])
        return torch.stack(frames, 1).reshape(y.shape)

    def _inverse(self, x: Tensor) -> Tensor:
        """Data to noise."""
        self._check_shape(x, "data")
        shift, log_scale = self.affine(x)
        return (x - shift) * torch.exp(-log_scale)

    def log_abs_det_jacobian(self, y: Tensor, x: Tensor) -> Tensor:
        """log |dx/dy|, summed over frames and entries: it depends on the data alone."""
        self._check_shape(x, "data")
        return self.affine(x)[1].flatten(x.dim() - 1 - len(self.frame_shape)).sum(-1)

    def _bounded(self, log_scale: Tensor) -> Tensor:
        return self.bound * torch.tanh(log_scale / self.bound)

    def _in_units(self, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """From units of ``spread`` to those of the data, and from ``(..., 1)`` to scalar frames."""
        shift, log_scale = torch.addcmul(self.center, self.spread, shift), self.spread.log() + log_scale
        return (shift[..., 0], log_scale[..., 0]) if self.scalar else (shift, log_scale)

    def _unit_frames(self, x: Tensor) -> Tensor:
        return ((x[..., None] if self.scalar else x) - self.center) / self.spread

    def _sequences(self, x: Any, lengths: Any) -> Sequences:
        sequences = Sequences.of(x, lengths)
        if list(sequences.x) != ["x"]:
            raise ValueError(f"the data is named {sorted(sequences.x)}; a flow takes one tensor (B, T, ...)")
        self.check_frames(sequences.x["x"], "x")
        return sequences

    def check_frames(self, x: Tensor, name: str) -> None:
        """Raise unless ``x`` is ``(B, T)`` frames of this flow's shape and type."""
        if tuple(x.shape[2:]) != tuple(self.frame_shape):
            raise ValueError(
                f"{name!r} of shape {tuple(x.shape)} has frames of shape {tuple(x.shape[2:])} and the flow has frames of shape "
                f"{tuple(self.frame_shape)}: for vectors of D entries, (B, T, D), make the flow by "
                "affine_temporal_autoregressive(D); for scalars, (B, T), by affine_temporal_autoregressive(None)")
        if x.dtype != self.center.dtype:
            raise TypeError(f"{name!r} is {x.dtype} and the flow is {self.center.dtype}: convert the data with "
                            f"{name}.to({self.center.dtype})"
                            + (f", or the flow with flow.to({x.dtype})" if x.is_floating_point() else ""))

    def _check_shape(self, value: Tensor, what: str) -> None:
        frame = tuple(self.frame_shape)
        least = 1 + len(frame)
        if value.dim() < least or tuple(value.shape[value.dim() - len(frame):]) != frame:
            expected = ", ".join(("...", "T", *map(str, frame)))
            raise ValueError(f"the {what} has shape {tuple(value.shape)}; this flow's sequences are ({expected})")
        if value.shape[-least] == 0:
            raise ValueError(f"the {what} has shape {tuple(value.shape)}: the time dimension is empty")

    def _units(self, like: Any) -> tuple[Tensor, Tensor]:
        """Mean and spread of each entry, ``(width,)`` each; a constant entry keeps unit spread."""
        sequences = Sequences.of(like)
        if list(sequences.x) != ["x"] or tuple(sequences.x["x"].shape[2:]) != tuple(self.frame_shape):
            raise ValueError(f"like= has data of shapes {[tuple(v.shape) for v in sequences.x.values()]}; it is one tensor of "
                             f"frames of shape {tuple(self.frame_shape)}, like the flow's")
        frames = sequences.x["x"][sequences.active].reshape(-1, self.past.width).double()
        center = frames.nanmean(0)
        spread = (frames - center).square().nanmean(0).sqrt()
        if not center.isfinite().all():
            raise ValueError(f"like= has no value of entry {int((~center.isfinite()).nonzero()[0])} of the frames")
        return center, torch.where(spread > 1e-6 * (1 + center.abs()), spread, 1.0)


def affine_temporal_autoregressive(input_dim: int | None, *, lags: int | None = None, hidden: int | None = None,
                                   own_past: bool = False, like: Any = None, bound: float = 5.0
                                   ) -> AffineTemporalAutoregressive:
    """A helper that makes an :class:`AffineTemporalAutoregressive` and the causal network inside it.

    :param input_dim: entries D of a frame, for sequences ``(T, D)``; ``None`` for scalar frames, ``(T,)``.
    :param lags: read this many frames of the past; all of them, through a GRU, when omitted.
    :param hidden: units of the network: 64 for a GRU; 0 for a window, which is then linear.
    :param own_past: with ``lags``: each entry's shift is linear in its own past alone.
    :param like: data whose units the flow will meet.
    :param bound: how far the log scale may go from where it starts.

    Example, a vector autoregression of order two with independent noise::

        >>> import torch
        >>> from pyro_seq.flows import affine_temporal_autoregressive
        >>> flow = affine_temporal_autoregressive(3, lags=2)
        >>> flow(torch.zeros(5, 10, 3)).shape
        torch.Size([5, 10, 3])
    """
    width = 1 if input_dim is None else input_dim
    require_count("input_dim", width, 1)
    if own_past and lags is None:
        raise ValueError("own_past=True is of a window: give the number of frames it reads, lags=...")
    past = (RecurrentPast(width, 64 if hidden is None else hidden) if lags is None else
            WindowPast(width, lags, 0 if hidden is None else hidden, own_past))
    return AffineTemporalAutoregressive(past, scalar=input_dim is None, like=like, bound=bound)
