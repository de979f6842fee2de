"""Causal networks: features of the inputs so far, for one input more or for many at once, from a state that is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from pyro_seq.module import require_count

__all__ = ["DilatedConvolutions", "Recurrence", "SelfAttention"]

# Each has start(rows) -> state and forward(state, inputs (B, T, features), lengths) -> (features (B, T, features), state):
# the state holds all that is kept of the inputs before, so that many inputs in one call, or in several, are one and the same.
# The state that is returned is the one after each sequence's last input; None for lengths is T for all.


class Recurrence(nn.Module):
    """A GRU or LSTM. The state is its hidden state ``(rows, layers, features)``, of an LSTM with the cells' beside it.

    :param int features: of the inputs, and units of every layer.
    :param str cell: ``"gru"`` or ``"lstm"``.
    :param int layers: one on top of the other.

    Source: Cho et al., *Learning Phrase Representations using RNN Encoder-Decoder*, 2014; Hochreiter and Schmidhuber, *Long
    Short-Term Memory*, 1997.
    """

    def __init__(self, features: int, cell: str = "gru", layers: int = 1):
        super().__init__()
        require_count("layers", layers, 1)
        if cell not in ("gru", "lstm"):
            raise ValueError(f"cell={cell!r}; it is 'gru' or 'lstm'")
        self.rnn = (nn.GRU if cell == "gru" else nn.LSTM)(features, features, layers, batch_first=True)

    def start(self, rows: int) -> tuple[Tensor, ...]:
        like = self.rnn.weight_hh_l0
        zeros = like.new_zeros(rows, self.rnn.num_layers, self.rnn.hidden_size)
        return (zeros,) if isinstance(self.rnn, nn.GRU) else (zeros, zeros)

    def forward(self, state: tuple[Tensor, ...], inputs: Tensor, lengths: Tensor | None = None
                ) -> tuple[Tensor, tuple[Tensor, ...]]:
        before = tuple(leaf.transpose(0, 1).contiguous() for leaf in state)
        if lengths is not None and bool((lengths == inputs.shape[1]).all()):
            lengths = None  # packed sequences are slow: torch's backward pass through them takes time by the square of T
        given = inputs if lengths is None else nn.utils.rnn.pack_padded_sequence(
            inputs, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, after = self.rnn(given, before if len(before) > 1 else before[0])
        if lengths is not None:
            out, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=inputs.shape[1])
        after = after if isinstance(after, tuple) else (after,)
        return out, tuple(leaf.transpose(0, 1) for leaf in after)


class DilatedConvolutions(nn.Module):
    r"""Gated residual blocks of causal convolutions, each over inputs further apart, as in WaveNet.

    .. math:: u = \tanh(W_f * v) \odot \sigma(W_g * v), \qquad v \leftarrow v + W_r u, \qquad
              \text{out} = W_o\, \mathrm{ReLU}\big(\textstyle\sum W_s u\big)

    The state is the inputs that each block still needs, ``(rows, (kernel - 1) * dilation, features)`` each.

    :param int features: of the inputs and of every block.
    :param int kernel: inputs that a block reads, at least 2.
    :param dilations: how far apart they are, a block each.

    Source: van den Oord et al., *WaveNet: A Generative Model for Raw Audio*, 2016.
    """

    def __init__(self, features: int, kernel: int = 2, dilations: Sequence[int] = (1, 2, 4, 8, 16, 32)):
        super().__init__()
        require_count("kernel", kernel, 2)
        if not dilations:
            raise ValueError("dilations is empty; it has a number for each block, such as (1, 2, 4, 8)")
        for dilation in dilations:
            require_count("dilations", dilation, 1)
        self.kernel, self.dilations = kernel, tuple(dilations)
        self.convolutions = nn.ModuleList(nn.Linear(kernel * features, 2 * features) for _ in dilations)
        self.residuals = nn.ModuleList(nn.Linear(features, features) for _ in dilations[:-1])
        self.skips = nn.ModuleList(nn.Linear(features, features) for _ in dilations)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(features, features), nn.ReLU())

    @property
    def receptive_field(self) -> int:
        """Inputs that a feature depends on, its own included."""
        return 1 + (self.kernel - 1) * sum(self.dilations)

    def start(self, rows: int) -> tuple[Tensor, ...]:
        like = self.out[1].weight
        return tuple(like.new_zeros(rows, (self.kernel - 1) * dilation, like.shape[0]) for dilation in self.dilations)

    def forward(self, state: tuple[Tensor, ...], inputs: Tensor, lengths: Tensor | None = None
                ) -> tuple[Tensor, tuple[Tensor, ...]]:
        steps, total, after = inputs.shape[1], 0.0, []
        for index, (before, dilation) in enumerate(zip(state, self.dilations, strict=True)):
            known = torch.cat([before, inputs], 1)
            after.append(_last(known, before.shape[1], lengths))
            taps = [known[:, i * dilation:i * dilation + steps] for i in range(self.kernel)]
            signal, gate = self.convolutions[index](torch.cat(taps, -1)).chunk(2, -1)
            unit = torch.tanh(signal) * torch.sigmoid(gate)
            total = total + self.skips[index](unit)
            if index < len(self.residuals):
                inputs = inputs + self.residuals[index](unit)
        return self.out(total), tuple(after)


class Attended(NamedTuple):
    """What self-attention keeps of the inputs so far."""

    keys: Tensor
    """``(rows, context - 1, layers, features)``, the latest last."""
    values: Tensor
    """``(rows, context - 1, layers, features)``"""
    seen: Tensor
    """``(rows,)`` inputs so far."""


class SelfAttention(nn.Module):
    r"""Layers of causal self-attention, normalised before each part, over the last ``context`` inputs.

    Sines and cosines of the time are added to the inputs. A layer reads the keys of ``context`` inputs, its own included; the
    layers above thus reach back further.

    :param int features: of the inputs and of every layer, a multiple of ``heads`` and even.
    :param int layers: one on top of the other.
    :param int heads: of each layer's attention.
    :param int context: inputs that a layer attends to, at least 2.

    Source: Vaswani et al., *Attention Is All You Need*, 2017; Xiong et al., *On Layer Normalization in the Transformer
    Architecture*, 2020.
    """

    def __init__(self, features: int, layers: int = 2, heads: int = 4, context: int = 256):
        super().__init__()
        for name, value, least in (("layers", layers, 1), ("heads", heads, 1), ("context", context, 2)):
            require_count(name, value, least)
        if features % heads or features % 2:
            raise ValueError(f"hidden={features} with heads={heads}: the units are an even number, divided among the heads")
        self.heads, self.context = heads, context
        self.layers = nn.ModuleList(nn.ModuleDict({
            "before_attention": nn.LayerNorm(features), "queries_keys_values": nn.Linear(features, 3 * features),
            "attended": nn.Linear(features, features), "before_network": nn.LayerNorm(features),
            "network": nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features)),
        }) for _ in range(layers))
        self.norm = nn.LayerNorm(features)
        self.register_buffer("rates", torch.exp(-math.log(10_000.0) * torch.arange(0, features, 2) / features),
                             persistent=False)

    def start(self, rows: int) -> Attended:
        like = self.norm.weight
        cache = like.new_zeros(rows, self.context - 1, len(self.layers), like.shape[0])
        return Attended(cache, cache, torch.zeros(rows, dtype=torch.long, device=like.device))

    def forward(self, state: Attended, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Attended]:
        steps, room = inputs.shape[1], self.context - 1
        kept = min(room, int(state.seen.max()))
        old_keys, old_values = (leaf[:, room - kept:].unbind(2) for leaf in (state.keys, state.values))
        time = torch.arange(steps, device=inputs.device)
        angle = (state.seen[:, None] + time)[..., None].to(inputs.dtype) * self.rates
        hidden = inputs + torch.cat([angle.sin(), angle.cos()], -1)
        mask = self._mask(state.seen, kept, time)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            query, key, value = layer["queries_keys_values"](layer["before_attention"](hidden)).chunk(3, -1)
            keys.append(key)
            values.append(value)
            key, value = torch.cat([old_keys[index], key], 1), torch.cat([old_values[index], value], 1)
            found = scaled_dot_product_attention(*(self._by_head(part) for part in (query, key, value)), attn_mask=mask)
            hidden = hidden + layer["attended"](found.transpose(1, 2).flatten(2))
            hidden = hidden + layer["network"](layer["before_network"](hidden))
        seen = state.seen + (steps if lengths is None else lengths)
        return self.norm(hidden), Attended(*(
            _last(torch.cat([before, torch.stack(new, 2)], 1), room, lengths)
            for before, new in ((state.keys, keys), (state.values, values))), seen)

    def _mask(self, seen: Tensor, kept: int, time: Tensor) -> Tensor:
        """``(rows, 1, T, kept + T)``: the keys that each input attends to."""
        age = time[:, None] + kept - torch.arange(kept + len(time), device=time.device)
        near = (age >= 0) & (age < self.context)
        return near & (age <= seen[:, None, None] + time[:, None])[:, None]

    def _by_head(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _last(known: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last ``count``, up to each sequence's end, of ``(rows, count + T, ...)``: what was kept, and the ``T`` that came."""
    if lengths is None:
        return known[:, known.shape[1] - count:]
    index = lengths[:, None] + torch.arange(count, device=known.device)
    return known[torch.arange(len(known), device=known.device)[:, None], index]
