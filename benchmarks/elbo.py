"""One training step of a deep Markov model (loss and gradients): ours, Pyro's, and torch loops written by hand.

Protocol: batch 20, 100 steps, 88 binary notes, 64 latents, gated transition with 200 hidden units, emission with two
hidden layers of 100; a filtering network of 128 units on (z_{t-1}, x_t), or the same after a GRU of 128 units over the
data; float32; median of interleaved calls; the same networks, the same objective (one sample, no analytic KL). Pyro's
validation is off for all. The loops written by hand score inside the loop, as one does: first with torch's distributions
and the network called on each (z_{t-1}, x_t); then with what the data adds to the network computed for all times at once,
as the library does; then with the densities spelled out as well.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import pyro_seq as seq
from benchmarks.timing import interleaved

__all__ = ["run"]

BATCH, STEPS, NOTES, LATENT, HIDDEN = 20, 100, 88, 64, 128


class GatedTransition(nn.Module):
    """Krishnan, Shalit and Sontag, *Structured Inference Networks for Nonlinear State Space Models*, 2017."""

    def __init__(self, latent: int, hidden: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent), nn.Sigmoid())
        self.proposed = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, latent))
        self.linear, self.spread = nn.Linear(latent, latent), nn.Linear(latent, latent)

    def forward(self, z):
        gate, proposed = self.gate(z), self.proposed(z)
        return (1 - gate) * self.linear(z) + gate * proposed, softplus(self.spread(torch.relu(proposed))) + 1e-3


class DeepMarkov(seq.StateSpaceModel):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(LATENT)), nn.Parameter(torch.zeros(LATENT))
        self.gated = GatedTransition(LATENT, 200)
        self.decoder = nn.Sequential(nn.Linear(LATENT, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(),
                                     nn.Linear(100, NOTES))

    def initial(self):
        return pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(*self.gated(z)).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


def encode(guide: seq.FilteringGuide, x: torch.Tensor) -> torch.Tensor:
    """``(B, T, features)`` of the data."""
    frames = torch.cat([guide.frame_units(x), x.new_ones(BATCH, STEPS, 1)], -1)
    return frames if guide.rnn is None else torch.cat([frames, guide.rnn(frames)[0]], -1)


def by_hand(model: DeepMarkov, guide: seq.FilteringGuide, x: torch.Tensor, ahead: bool = False) -> float:
    """The loop one writes by hand in torch, with torch's distributions.

    :param ahead: compute what the data adds to the network for all times before the loop.
    """
    head, units = guide.heads["z"], guide.parameter_units["z"]
    encoded = encode(guide, x)
    encoded = (head.prepare(encoded) if ahead else encoded).unbind(1)
    loss, z = x.new_zeros(()), None
    for t in range(STEPS):
        state = x.new_zeros(BATCH, LATENT) if z is None else guide.state_units(z)
        out = head(encoded[t] if ahead else head.prepare(encoded[t]), state=state)
        loc, log_scale = units.inverse(out).chunk(2, -1)
        q = Normal(loc, log_scale.exp())
        p = Normal(model.loc, model.log_scale.exp()) if z is None else Normal(*model.gated(z))
        z = q.rsample()
        x_given_z = Bernoulli(logits=model.decoder(z))
        loss = loss - (p.log_prob(z) - q.log_prob(z)).sum() - x_given_z.log_prob(x[:, t]).sum()
    loss.backward()
    return loss.item()


def spelled_out(model: DeepMarkov, guide: seq.FilteringGuide, x: torch.Tensor) -> float:
    """The same loop without distribution objects: the least that a loop which scores as it goes can do."""
    head, units = guide.heads["z"], guide.parameter_units["z"]
    encoded = head.prepare(encode(guide, x)).unbind(1)
    loss, z = x.new_zeros(()), None
    for t in range(STEPS):
        state = x.new_zeros(BATCH, LATENT) if z is None else guide.state_units(z)
        loc, log_scale = units.inverse(head(encoded[t], state=state)).chunk(2, -1)
        scale = log_scale.exp()
        prior_loc, prior_scale = (model.loc, model.log_scale.exp()) if z is None else model.gated(z)
        noise = torch.randn_like(loc)
        z = loc + scale * noise
        log_q = -0.5 * noise.square() - log_scale
        log_p = -0.5 * ((z - prior_loc) / prior_scale).square() - prior_scale.log()
        loss = loss - (log_p - log_q).sum() + binary_cross_entropy_with_logits(model.decoder(z), x[:, t], reduction="sum")
    loss.backward()
    return loss.item()


def flops(cell: str | None) -> float:
    """Matrix-multiply floating point operations of one step: two a weight and row forward, twice that backward."""
    features = NOTES + 1
    weights = (LATENT * 200 * 2 * 2 + LATENT * LATENT * 2) + (LATENT * 100 + 100 * 100 + 100 * NOTES)
    recurrent = 0 if cell is None else HIDDEN
    weights += 3 * recurrent * (features + recurrent)
    weights += (features + recurrent + LATENT) * (HIDDEN + 2 * LATENT) + HIDDEN * 2 * LATENT
    return 3 * 2 * weights * BATCH * STEPS


def floor_seconds(cell: str | None) -> float:
    """The time of so many operations in one large matrix product on this machine."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = interleaved({"matmul": lambda: a @ b}, rounds=10)["matmul"]
    return flops(cell) / (2 * size**3 / seconds)


def run(rounds: int, cell: str | None) -> dict[str, float]:
    """Seconds a training step of each contestant.

    :param cell: the recurrent encoder of the filtering network; ``None`` for a network on (z_{t-1}, x_t).
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    model = DeepMarkov()
    guide = seq.FilteringGuide(model, hidden=HIDDEN, residual=False, cell=cell)
    residual = seq.FilteringGuide(model, hidden=HIDDEN, cell=cell, name="residual")
    x = torch.bernoulli(torch.full((BATCH, STEPS, NOTES), 0.1))
    batch = seq.Sequences.of(x)
    ours = seq.SequentialELBO(analytic_kl=False)
    contestants = {
        "SequentialELBO": lambda: ours.loss_and_grads(model, guide, batch),
        "Pyro Trace_ELBO": lambda: Trace_ELBO().loss_and_grads(model, guide, batch),
        "torch loop by hand": lambda: by_hand(model, guide, x),
        "torch loop by hand, data's part ahead": lambda: by_hand(model, guide, x, ahead=True),
        "torch loop by hand, also densities spelled out": lambda: spelled_out(model, guide, x),
        "SequentialELBO, residual guide": lambda: ours.loss_and_grads(model, residual, batch),
    }
    if cell is None:
        avf = seq.AmortizedVariationalFilter(model)
        contestants["SequentialELBO, AVF K=1"] = lambda: ours.loss_and_grads(model, avf, batch)
    return interleaved(contestants, rounds) | {"matrix-multiply floor": floor_seconds(cell)}
