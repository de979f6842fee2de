"""Filtering and smoothing networks: recurrent encodings of the data, combined with the state at each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.rnn import pack_padded_sequence

from pyro_seq.engine.sites import Proposal
from pyro_seq.engine.state import State, map_state
from pyro_seq.guides.network import CELLS, BySite, Head, NetworkGuide
from pyro_seq.module import require_count
from pyro_seq.sequences import Frame, Sequences

__all__ = ["FilteringGuide", "SmoothingGuide", "backward_rnn", "state_after"]


class FilteringGuide(NetworkGuide):
    r"""A direct filtering network :math:`q(z_t \mid h_{t-1}, x_{\le t})`, in the family of each latent's prior.

    A recurrent network encodes the data up to time t; a network combines the encoding with the model's state. With
    ``residual`` (the default) the network also reads the prior, and the result is gated between the two.

    :param model: the declared model.
    :param like: data whose shapes and units the guide will meet; simulated from the model when omitted.
    :param int hidden: units of the recurrent encoder and of the combining network.
    :param str cell: ``"gru"``, ``"lstm"``, ``"rnn"``, or ``None`` to read the current frame alone.
    :param bool residual: gate between the prior and the network, instead of predicting the parameters outright. A latent that
        its past says most of, as in a random walk, moves away from the prior in units of its scale.
    :param encoder: a module from one frame ``(rows, ...)`` to features ``(rows, width)``.
    :param global_guide: a guide for the model's global parameters.

    Source: Krishnan, Shalit and Sontag, *Structured Inference Networks for Nonlinear State Space Models*, 2017 (ST-L);
    the residual: Fraccaro et al., *Sequential Neural Models with Stochastic Layers*, 2016.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Counts(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     def transition(self, rate):
        ...         return pyro.sample("rate", dist.Gamma(10.0, 10.0 / rate))
        ...     def emission(self, rate, x=None):
        ...         return pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> guide = seq.FilteringGuide(Counts(), hidden=16)
        >>> pyro.poutine.trace(guide).get_trace(torch.ones(4, 3)).nodes["rate_3"]["fn"]
        Gamma(concentration: torch.Size([4]), rate: torch.Size([4]))
    """

    def __init__(self, model: Any, *, like: Any = None, hidden: int = 64, cell: str | None = "gru",
                 residual: bool = True, encoder: nn.Module | None = None, global_guide: Any = None,
                 name: str | None = None):
        super().__init__(model, like=like, encoder=encoder, global_guide=global_guide, name=name, residual=residual)
        require_count("hidden", hidden, 1)
        if cell is not None and cell not in CELLS:
            raise ValueError(f"cell={cell!r}; it is one of {sorted(CELLS)}, or None to read the current frame alone")
        self.residual = self.reads_prior = residual
        # The current frame goes round the recurrence as well, so that a linear filter is exactly in reach.
        encoded = self.frame_width + (0 if cell is None else hidden * (2 if self.reads_future else 1))
        with self.device:
            self.rnn = None if cell is None else CELLS[cell](self.frame_width, hidden, batch_first=True)
            self.rnn_back = CELLS[cell](self.frame_width, hidden, batch_first=True) if cell and self.reads_future else None
            self.heads = BySite({
                site: Head(encoded, {"state": self.state_width} | ({"prior": family.width} if residual else {}), hidden,
                           family.width * (2 if residual else 1))
                for site, family in self.families.items()})
        self.to(self.dtype)

    def prepare_rows(self, sequences: Sequences) -> dict[str, Tensor]:
        """For each latent site, ``(B, T, hidden + outputs)``: what each frame and the encoding up to it add to its head."""
        return self.stream_rows(sequences, None)[0]

    def stream_rows(self, sequences: Sequences, carry: State) -> tuple[dict[str, Tensor], State]:
        return self._rows(sequences, carry, None)

    def _rows(self, sequences: Sequences, carry: State, after: State) -> tuple[dict[str, Tensor], State]:
        """
        :param carry: state of the recurrence before these frames.
        :param after: state of the one that runs backward, after them.
        """
        frames = self.all_frames(sequences)
        parts = [frames]
        if self.rnn is not None:
            encoded, carry = self.rnn(frames, carry)
            parts.append(encoded)
        if self.rnn_back is not None:
            parts.append(backward_rnn(self.rnn_back, frames, sequences.lengths, after))
        frames = torch.cat(parts, -1)
        return {site: self.heads[site].prepare(frames) for site in self.families}, carry

    def propose(self, state: State, frame: Frame, encoding: dict[str, Tensor], emit: Any = None) -> Proposal:
        features = self.state_features(state, frame.rows)

        def proposal(name: str, prior: Distribution | None) -> tuple[Distribution, None]:
            family, units = self.family(name, prior), self.parameter_units[name]
            if not self.residual:
                out = self.heads[name](encoding[name], state=features)
                return family.distribution(units.inverse(out)), None
            start = family.parameters(prior)
            own, gate = self.heads[name](encoding[name], state=features, prior=units(start)).chunk(2, -1)
            return family.distribution(torch.lerp(start, *self.target(name, start, family.unit(prior), own, gate))), None

        return proposal


class SmoothingGuide(FilteringGuide):
    r"""A smoothing network :math:`q(z_t \mid h_{t-1}, x_{1:T})`: the encoder reads both ways.

    Parameters as for :class:`FilteringGuide`. With the future in view the bound can become tight; a smoothing guide is
    no proposal for filtering on line.

    Source: Krishnan, Shalit and Sontag, *Structured Inference Networks for Nonlinear State Space Models*, 2017 (ST-LR).

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
        >>> guide = seq.SmoothingGuide(LocalLevel())
        >>> list(guide(torch.zeros(2, 5)))
        []
    """

    reads_future = True

    def window_rows(self, sequences: Sequences, start: int, stop: int, carry: State) -> tuple[dict[str, Tensor], State]:
        after = None
        if self.rnn_back is not None and stop < sequences.num_steps:
            with torch.no_grad():
                later = self.all_frames(sequences.between(stop + 1, sequences.num_steps))
            after = state_after(self.rnn_back, later, sequences.lengths - stop)
        return self._rows(sequences.between(start, stop), carry, after)


def backward_rnn(rnn: nn.RNNBase, inputs: Tensor, lengths: Tensor, after: State = None) -> Tensor:
    """Run a one-way recurrent network backward in time, from each sequence's own end.

    A packed sequence would do the same, but torch's backward pass through one takes time by the square of T.

    :param inputs: ``(B, T, width)``.
    :param lengths: ``(B,)``.
    :param after: the network's state after the inputs, as :func:`state_after` tells it.
    :returns: ``(B, T, hidden)``; what it holds past a sequence's end is not used.
    """
    index = _reversed(inputs, lengths)
    return rnn(inputs.take_along_dim(index, 1), after)[0].take_along_dim(index, 1)


def state_after(rnn: nn.RNNBase, later: Tensor, left: Tensor) -> State:
    """The state in which a backward recurrence reaches a window from the frames after it, without gradient.

    :param later: ``(B, T, width)`` those frames.
    :param left: ``(B,)`` how many of them each sequence has; below one where it has ended, and the state is zero.
    """
    count = left.clamp(min=1)
    with torch.no_grad():
        packed = pack_padded_sequence(later.take_along_dim(_reversed(later, count), 1), count.cpu(), batch_first=True,
                                      enforce_sorted=False)
        return map_state(lambda leaf: torch.where((left > 0)[:, None], leaf, 0.0), rnn(packed)[1])


def _reversed(inputs: Tensor, lengths: Tensor) -> Tensor:
    """``(B, T, 1)`` where each step's mirror image within its sequence is."""
    steps = torch.arange(inputs.shape[1], device=inputs.device)
    return (lengths[:, None] - 1 - steps).clamp(min=0)[..., None]
