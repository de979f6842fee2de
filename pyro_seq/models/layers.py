"""What the models of the literature are made of: networks, and the distributions they end in."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["Emission", "Framed", "GatedResidual", "NormalHead", "match_marginals", "mlp",
           "require_sizes"]


def mlp(inputs: int, hidden: int, outputs: int, layers: int = 1) -> nn.Sequential:
    """A network of ``layers`` hidden layers of rectified units, ending in a linear one."""
    parts: list[nn.Module] = []
    for width in [hidden] * layers:
        parts += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))


def require_sizes(**sizes: int) -> None:
    """Raise unless each is an integer of at least 1."""
    for name, value in sizes.items():
        require_count(name, value, 1)


class NormalHead(nn.Module):
    """Features ``(rows, inputs)`` to the location and scale, ``(rows, outputs)`` each, of a normal distribution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, spread = self.linear(features).chunk(2, -1)
        return loc, softplus(spread)


class GatedResidual(nn.Module):
    r"""The moments of a normal proposal, gated between the prior's and a network's own.

    .. math:: \mu_q = (1 - g) \mu_p + g \mu, \qquad \log \sigma_q = (1 - g') \log \sigma_p + g' \log \sigma

    :math:`\mu, \sigma` are those of a :class:`NormalHead` of the features, and :math:`g, g'` linear in them before a sigmoid.
    The gates begin at the network's own moments, since a proposal that follows the prior follows one that runs away.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.own = NormalHead(inputs, outputs)
        self.gate = nn.Linear(inputs, 2 * outputs)
        with torch.no_grad():
            self.gate.bias.fill_(4.0)

    def forward(self, features: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        own_loc, own_scale = self.own(features)
        gate, scale_gate = torch.sigmoid(self.gate(features)).chunk(2, -1)
        return torch.lerp(loc, own_loc, gate), torch.lerp(scale.log(), own_scale.log(), scale_gate).exp()


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


class Framed:
    """Of a model whose ``sizes`` begin with the entries of a frame: it refuses other frames, on which its networks or those of
    its guides would end without a word about the data."""

    def check_inputs(self, sequences: Sequences) -> None:
        super().check_inputs(sequences)
        for name, value in sequences.x.items():
            if value.shape[2:] != self.sizes[:1]:
                raise ValueError(f"{name!r} has shape {tuple(value.shape)}; {type(self).__name__} has frames of "
                                 f"{self.sizes[0]} entries, (B, T, {self.sizes[0]})")


def match_marginals(model: Any, data: Any) -> None:
    """Let an untrained model's emission begin at the marginals of the data, by the biases of its last layer.

    Training then begins with what depends on time. Without it the first updates go into the mean frame, by way of latents that
    grow, and may run away.

    :param model: one with an :class:`Emission` ``emit``, such as a :class:`DeepMarkovModel`.
    :param data: as accepted by :meth:`pyro_seq.Sequences.of`; ``x`` is ``(B, T, observed)``.

    Example::

        >>> from pyro_seq.models import VRNN, match_marginals
        >>> model = VRNN(observed=2, latent=2, hidden=4)
        >>> match_marginals(model, torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]]))
        >>> torch.sigmoid(model.emit.network[-1].bias)
        tensor([0.3000, 0.7000], grad_fn=<SigmoidBackward0>)
    """
    if not isinstance(getattr(model, "emit", None), Emission):
        raise TypeError(f"match_marginals knows the models whose emission is `emit`, not {type(model).__name__}")
    data = Sequences.of(data)
    observed, bias = model.sizes[0], model.emit.network[-1].bias
    x = data.x.get("x")
    if x is None or x.shape[2:] != (observed,):
        found = f"{sorted(data.x)}" if x is None else f"of shape {tuple(x.shape)}"
        raise ValueError(f"the data is {found}; {type(model).__name__} has frames of {observed} entries, x (B, T, {observed})")
    frames = x[:, :data.num_steps][data.active]
    present = ~frames.isnan()
    count = present.sum(0)
    frames = frames.nan_to_num()
    with torch.no_grad():
        if model.emit.kind == "bernoulli":
            bias.copy_(torch.logit((frames.sum(0) + 0.5) / (count + 1)))  # half a count each, for notes that never sound
            return
        mean = frames.sum(0) / count.clamp(min=1)
        square = torch.where(present, frames - mean, 0.0).square().sum(0) / count.clamp(min=1)
        scale = square.sqrt().clamp(min=1e-3)
        bias.copy_(torch.cat([mean, scale + (-(-scale).expm1()).log()]))  # the inverse of softplus
