"""Causal networks: what a flow makes of the past, one frame at a time or all frames at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_seq.module import require_count

__all__ = ["RecurrentPast", "WindowPast"]


class Recurrence(NamedTuple):
    """The past as a GRU holds it."""

    hidden: Tensor
    """``(rows, hidden)``"""
    last: Tensor
    """``(rows, width)``: the last frame, zero before the first."""


class RecurrentPast(nn.Module):
    r"""A GRU over all past frames.

    The shift is linear in the GRU's units and in the last frame, which a small GRU could not repeat; the log scale is
    linear in the units alone, which are bounded.

    :param int width: entries of a frame.
    :param int hidden: units of the GRU.

    Source: Cho et al., *Learning Phrase Representations using RNN Encoder-Decoder*, 2014 (the GRU).

    Example::

        >>> import torch
        >>> past = RecurrentPast(3, hidden=8)
        >>> shift, log_scale = past.everywhere(torch.randn(5, 20, 3))
        >>> shift.shape, log_scale.shape
        (torch.Size([5, 20, 3]), torch.Size([5, 20, 3]))
    """

    def __init__(self, width: int, hidden: int = 64):
        super().__init__()
        require_count("width", width, 1)
        require_count("hidden", hidden, 1)
        self.width = width
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.first = nn.Parameter(torch.zeros(hidden))
        self.direct = _zero(nn.Linear(width, width, bias=False))
        self.head = _zero(nn.Linear(hidden, 2 * width))

    def start(self, rows: int) -> Recurrence:
        """The past of the first frame, learned."""
        return Recurrence(self.first.expand(rows, -1), self.first.new_zeros(rows, self.width))

    def at(self, state: Recurrence) -> tuple[Tensor, Tensor]:
        """Shift and log scale of the next frame, ``(rows, width)`` each."""
        return self._read(state.hidden, state.last)

    def advance(self, state: Recurrence, frame: Tensor) -> Recurrence:
        """The past once ``frame`` ``(rows, width)`` belongs to it."""
        gru = self.gru
        hidden = torch.gru_cell(frame, state.hidden, gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
        return Recurrence(hidden, frame)

    def everywhere(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log scale of every frame of ``(B, T, width)`` given those before it."""
        first, zero = self.start(frames.shape[0])
        hidden = self.gru(frames, first[None].contiguous())[0]
        return self._read(_later(first[:, None], hidden), _later(zero[:, None], frames))

    def _read(self, hidden: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.head(hidden).chunk(2, -1)
        return shift + self.direct(last), log_scale


class Window(NamedTuple):
    """The past as a window holds it, oldest frame first."""

    frames: Tensor
    """``(rows, lags, width)``, zero before the first frame."""
    absent: Tensor
    """``(rows, lags)``: one where there is no frame yet, zero elsewhere."""


class WindowPast(nn.Module):
    r"""A network of the last ``lags`` frames.

    Without hidden units the shift is linear in the window and the scale constant: the flow is then a vector
    autoregression with independent noise. With hidden units a tanh layer adds to both. With ``own_past`` each entry of the
    shift is linear in that entry's past alone: wide frames and little data leave no more to be learned. The first ``lags``
    frames, whose past is short, have shifts and scales of their own added.

    :param int width: entries of a frame.
    :param int lags: frames of the past that are read.
    :param int hidden: units of the hidden layer, 0 for none.
    :param bool own_past: leave the other entries' past out of the linear part.

    Source: Lütkepohl, *New Introduction to Multiple Time Series Analysis*, 2005 (the vector autoregression).

    Example::

        >>> import torch
        >>> past = WindowPast(3, lags=2)
        >>> past.start(5).frames.shape
        torch.Size([5, 2, 3])
    """

    def __init__(self, width: int, lags: int = 1, hidden: int = 0, own_past: bool = False):
        super().__init__()
        require_count("width", width, 1)
        require_count("lags", lags, 1)
        require_count("hidden", hidden, 0)
        self.width, self.lags = width, lags
        self.first = nn.Parameter(torch.zeros(lags, 2 * width))
        self.direct = _OwnPast(width, lags) if own_past else nn.Sequential(
            nn.Flatten(-2), _zero(nn.Linear(lags * width, width)))
        self.log_scale = nn.Parameter(torch.zeros(width))
        self.network = None if hidden == 0 else nn.Sequential(
            nn.Flatten(-2), nn.Linear(lags * width, hidden), nn.Tanh(), _zero(nn.Linear(hidden, 2 * width)))

    def start(self, rows: int) -> Window:
        """The window before the first frame."""
        return Window(self.first.new_zeros(rows, self.lags, self.width), self.first.new_ones(rows, self.lags))

    def at(self, state: Window) -> tuple[Tensor, Tensor]:
        """Shift and log scale of the next frame, ``(rows, width)`` each."""
        return self._read(state.frames, state.absent)

    def advance(self, state: Window, frame: Tensor) -> Window:
        """The window moved on by one ``frame`` ``(rows, width)``."""
        return Window(torch.cat([state.frames[:, 1:], frame[:, None]], 1),
                      torch.cat([state.absent[:, 1:], torch.zeros_like(state.absent[:, :1])], 1))

    def everywhere(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log scale of every frame of ``(B, T, width)`` given those before it."""
        padded = torch.cat([frames.new_zeros(len(frames), self.lags, self.width), frames[:, :-1]], 1)
        age = torch.arange(self.lags, 0, -1, device=frames.device)
        absent = (torch.arange(frames.shape[1], device=frames.device)[:, None] < age).to(frames)
        return self._read(padded.unfold(1, self.lags, 1).transpose(-1, -2), absent)

    def _read(self, frames: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = (absent @ self.first).chunk(2, -1)
        shift, log_scale = shift + self.direct(frames), log_scale + self.log_scale
        if self.network is not None:
            further, wider = self.network(frames).chunk(2, -1)
            shift, log_scale = shift + further, log_scale + wider
        return shift, log_scale.expand(shift.shape)


class _OwnPast(nn.Module):
    """A linear map of each entry's own window, ``(..., lags, width)`` to ``(..., width)``, from zero."""

    def __init__(self, width: int, lags: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(lags, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, window: Tensor) -> Tensor:
        return (window * self.weight).sum(-2) + self.bias


def _later(first: Tensor, values: Tensor) -> Tensor:
    """``values`` one step later, ``first`` in front."""
    return torch.cat([first, values[:, :-1]], 1)


def _zero(linear: nn.Linear) -> nn.Linear:
    """A linear layer that is zero: a flow starts at the identity."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear
