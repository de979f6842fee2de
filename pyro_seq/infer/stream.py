"""Filter a model with discrete latents as its frames come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_seq.engine.state import State
from pyro_seq.engine.support import Support, read_support
from pyro_seq.infer.enumerate import first_step, later_step
from pyro_seq.infer.run import entered
from pyro_seq.module import own_parameters
from pyro_seq.sequences import Frame, Sequences

__all__ = ["Filtered", "Stream", "floating_type", "one_frame"]


class Filtered(NamedTuple):
    """What one frame has told a :class:`Stream`."""

    probabilities: Mapping[str, Tensor]
    """By site, ``(B, K_site)``: p(z_t | x_1..x_t)."""
    log_predictive: Tensor
    """``(B,)`` log p(x_t | x_1..x_t-1), in nats."""


class Stream:
    """A filter that is handed one frame at a time; made by :meth:`ForwardBackward.stream`.

    It holds the probabilities of the joint states ``(B, K)`` and the model's state for each, and nothing of the past.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Coin(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        ...     def transition(self, k):
        ...         return pyro.sample("k", dist.Categorical(torch.tensor([[0.9, 0.1], [0.1, 0.9]])[k]))
        ...     def emission(self, k, x=None):
        ...         return pyro.sample("x", dist.Normal(k.float(), 1.0), obs=x)
        >>> stream = seq.ForwardBackward(Coin()).stream()
        >>> for x_t in torch.tensor([0.0, 2.0]):
        ...     filtered = stream.update(x_t[None])
        >>> filtered.probabilities["k"].shape, filtered.log_predictive.shape
        (torch.Size([1, 2]), torch.Size([1]))
    """

    def __init__(self, model: Any):
        self.model = model
        self.time = 0
        """Frames seen."""
        self.parameters: Mapping[str, Tensor] = {}
        self._support: Support | None = None
        self._log_probabilities: Tensor | None = None
        self._state: State = None

    def update(self, x: Any, *, mask: Any = None, **covariates: Any) -> Filtered:
        """Take in the next frame of every sequence.

        :param x: one frame, ``(B, ...)`` for B sequences side by side (``(1, ...)`` for a single one), or a dict of them; NaN
            where missing.
        :param mask: True where observed, ``(B,)`` or of the shape of ``x``.
        :param covariates: of this frame, ``(B, ...)`` each.
        :raises ValueError: if the frame is impossible; the stream is then as it was before.
        """
        sequences = one_frame(x, mask, covariates, self.time + 1)
        if self._log_probabilities is not None and sequences.num_sequences != len(self._log_probabilities):
            raise ValueError(f"the frame at time {self.time + 1} holds {sequences.num_sequences} sequences and the ones before "
                             f"{len(self._log_probabilities)}: a stream is fed one frame (B, ...) of the same sequences")
        if self.time == 0:
            return entered(self.model, None, sequences, lambda values: self._update(sequences, values))
        with torch.no_grad(), own_parameters(self.model):
            return self.model.within(lambda: self._update(sequences, self.parameters), globals=self.parameters)

    def _update(self, sequences: Sequences, parameters: Mapping[str, Tensor]) -> Filtered:
        model, t = self.model, self.time + 1
        model.check_inputs(sequences)
        support = self._support or read_support(model, sequences)[0]
        k = support.num_states

        def rows(times: int) -> Frame:
            frame = next(sequences.packed.frames(times))
            return frame._replace(t=t)

        if t == 1:
            predicted, observed, state = first_step(model, support, rows(k))
        else:
            transition, observed, state = later_step(model, support, self._state, rows(k * k))
            predicted = (self._log_probabilities[..., None] + transition.double()).logsumexp(-2)
        joint = predicted.double() + observed.double()
        log_predictive = joint.logsumexp(-1)
        if not (log_predictive > -torch.inf).all():
            sequence = int((log_predictive == -torch.inf).nonzero()[0])
            raise ValueError(f"the frame of sequence {sequence} at time {t} is impossible: every state that "
                             f"{type(model).__name__} can be in gives it density zero")
        self.time, self.parameters, self._support, self._state = t, parameters, support, state
        self._log_probabilities = joint - log_predictive[:, None]
        probabilities = self._log_probabilities.exp().to(floating_type(model, sequences))
        return Filtered({name: support.marginal(probabilities, name) for name in support.values}, log_predictive)


def one_frame(x: Any, mask: Any, covariates: Mapping[str, Any], time: int) -> Sequences:
    """One frame ``(B, ...)`` of every sequence, as sequences of length one.

    :param time: of the frame, for errors.
    """
    if x is None or isinstance(x, Mapping) and not x:
        raise ValueError(f"the frame at time {time} holds no data: pass x, NaN or mask= where it is missing")
    frames = {k: _one_step(v) for k, v in (x if isinstance(x, Mapping) else {"x": x}).items()}
    for name, value in frames.items():  # Sequences, which looks too, counts from this frame
        if isinstance(value, Tensor) and value.is_floating_point() and value.isinf().any():
            sequence = int(value.isinf().nonzero()[0, 0])
            raise ValueError(f"{name!r} is infinite in sequence {sequence} at time {time}: data must be finite; mark missing "
                             "values with NaN or mask=")
    if isinstance(mask, Mapping):
        mask = {k: _one_step(v) for k, v in mask.items()}
    elif mask is not None:
        mask = _one_step(mask)
    return Sequences.of(frames, mask=mask, covariates={k: _one_step(v) for k, v in covariates.items()})


def _one_step(value: Any) -> Tensor | np.ndarray:
    value = value if isinstance(value, Tensor) else np.asarray(value)
    if value.ndim == 0:
        raise ValueError("a frame is a single number, and a stream is fed (B, ...), one entry a sequence: use x[None]")
    return value[:, None]


def floating_type(model: Any, sequences: Sequences) -> torch.dtype:
    """That of the data if it is floating, else of the parameters."""
    floating = [v.dtype for v in (*sequences.x.values(), *model.parameters()) if v.is_floating_point()]
    return floating[0] if floating else torch.get_default_dtype()
