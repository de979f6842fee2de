"""What the models of the literature are made of: networks, and the distributions they end in."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["Emission", "GatedResidual", "NormalHead", "backward_rnn", "mlp"]


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 1) -> nn.Sequential:
    """A network of ``layers`` hidden layers of rectified units, ending in a linear one."""
    parts: list[nn.Module] = []
    for width in [hidden] * layers:
        parts += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))


class NormalHead(nn.Module):
    """Features ``(rows, inputs)`` to the location and scale, ``(rows, outputs)`` each, of a normal distribution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, spread = self.linear(features).chunk(2, -1)
        return loc, softplus(spread)


class GatedResidual(nn.Module):
    r"""The moments of a normal proposal as a gated step away from the prior's, in units of its scale.

    .. math:: \mu_q = \mu_p + g \sigma_p \delta, \qquad \log \sigma_q = \log \sigma_p + g' \delta'

    A network of the features and of the prior's own moments. It starts at the prior, and its layer is of bounded units, since
    a step that grew with the last one would run away.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.hidden = nn.Linear(inputs + 2 * outputs, inputs)
        self.linear = nn.Linear(inputs, 4 * outputs)
        with torch.no_grad():
            self.linear.weight[:2 * outputs].zero_()
            self.linear.bias[:2 * outputs].zero_()

    def forward(self, features: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.hidden(torch.cat([features, loc, scale.log()], -1)))
        step, gate = self.linear(hidden).chunk(2, -1)
        shift, log_ratio = (torch.sigmoid(gate) * step).chunk(2, -1)
        return loc + scale * shift, scale * log_ratio.exp()


class Emission(nn.Module):
    """Features ``(rows, inputs)`` to the distribution of a frame of ``outputs`` independent entries.

    :param str kind: ``"bernoulli"`` for binary frames, ``"normal"`` for real ones, with location and scale from the network.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, kind: str, layers: int = 2):
        super().__init__()
        if kind not in ("bernoulli", "normal"):
            raise ValueError(f"emission={kind!r}; it is 'bernoulli' for binary frames or 'normal' for real ones")
        self.kind = kind
        self.network = mlp(inputs, hidden, outputs if kind == "bernoulli" else 2 * outputs, layers)

    def forward(self, *features: Tensor) -> dist.Distribution:
        out = self.network(torch.cat(features, -1) if len(features) > 1 else features[0])
        if self.kind == "bernoulli":
            return dist.Bernoulli(logits=out).to_event(1)
        loc, spread = out.chunk(2, -1)
        return dist.Normal(loc, softplus(spread)).to_event(1)


def backward_rnn(rnn: nn.RNNBase, inputs: Tensor, lengths: Tensor) -> Tensor:
    """Run a one-way recurrent network backward in time, from each sequence's own end.

    :param inputs: ``(B, T, width)``.
    :param lengths: ``(B,)``.
    :returns: ``(B, T, hidden)``; what it holds past a sequence's end is not used.
    """
    steps = torch.arange(inputs.shape[1], device=inputs.device)
    index = (lengths[:, None] - 1 - steps).clamp(min=0)[..., None]
    reverse = rnn(inputs.take_along_dim(index, 1))[0]
    return reverse.take_along_dim(index, 1)
