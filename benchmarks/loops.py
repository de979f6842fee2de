"""Training steps of the VRNN and the SRNN as torch loops written by hand, with the densities spelled out.

As :func:`benchmarks.elbo.spelled_out`: what the data adds is computed for all times before the loop, which scores as it goes.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_seq as seq
from benchmarks.elbo import encode
from pyro_seq.models import SRNN, VRNN

__all__ = ["srnn", "vrnn"]


def vrnn(model: VRNN, guide: seq.FilteringGuide, x: torch.Tensor) -> float:
    """The loss; its gradients are added to the parameters'."""
    encoded = guide.heads["z"].prepare(encode(guide, x)).unbind(1)
    embedded_x = model.embed_x(x).unbind(1)
    loss, h = x.new_zeros(()), model.start(len(x))
    for t, (prepared, features) in enumerate(zip(encoded, embedded_x, strict=True)):
        z, log_q = _draw(guide, prepared, h)
        embedded_z = model.embed_z(z)
        loss = loss + log_q - _log_normal(z, *model.prior(h)) + _cross_entropy(model, embedded_z, h, x[:, t])
        h = model.gru(torch.cat([features, embedded_z], -1), h)
    loss.backward()
    return loss.item()


def srnn(model: SRNN, guide: seq.FilteringGuide, x: torch.Tensor) -> float:
    """The loss; its gradients are added to the parameters'."""
    encoded = guide.heads["z"].prepare(encode(guide, x)).unbind(1)
    loss, z = x.new_zeros(()), x.new_zeros(len(x), model.sizes[1])
    for t, (prepared, d) in enumerate(zip(encoded, model.recurrence(x).unbind(1), strict=True)):
        prior = model.prior(torch.cat([z, d], -1))
        z, log_q = _draw(guide, prepared, torch.cat([d, z], -1))
        loss = loss + log_q - _log_normal(z, *prior) + _cross_entropy(model, z, d, x[:, t])
    loss.backward()
    return loss.item()


def _draw(guide: seq.FilteringGuide, prepared: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A latent, and its log density without the constant, which the prior's cancels."""
    out = guide.parameter_units["z"].inverse(guide.heads["z"](prepared, state=guide.state_units(state)))
    loc, log_scale = out.chunk(2, -1)
    noise = torch.randn_like(loc)
    return loc + log_scale.exp() * noise, (-0.5 * noise.square() - log_scale).sum()


def _log_normal(z: torch.Tensor, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (-0.5 * ((z - loc) / scale).square() - scale.log()).sum()


def _cross_entropy(model: VRNN | SRNN, z: torch.Tensor, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return binary_cross_entropy_with_logits(model.emit.network(torch.cat([z, h], -1)), x, reduction="sum")
