"""Declared models that the tests share."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_seq as seq


class LocalLevel(seq.StateSpaceModel):
    """A Gaussian random walk in noise; Nile's variances by default."""

    def __init__(self, mean=1000.0, initial_variance=1e5, level_variance=1469.1, noise_variance=15099.0, name=""):
        super().__init__(name)
        self.mean = mean
        self.scales = [math.sqrt(v) for v in (initial_variance, level_variance, noise_variance)]

    def initial(self):
        return pyro.sample("z", dist.Normal(self.mean, self.scales[0]))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, self.scales[1]))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, self.scales[2]), obs=x)


class StochasticVolatility(seq.StateSpaceModel):
    mu, rho, sigma = -1.02, 0.9702, 0.178

    def initial(self):
        return pyro.sample("z", dist.Normal(self.mu, self.sigma / math.sqrt(1 - self.rho**2)))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.mu + self.rho * (z - self.mu), self.sigma))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(torch.zeros_like(z), torch.exp(z / 2)), obs=x)


class LinearGaussian(seq.StateSpaceModel):
    """A linear dynamical system with full covariances."""

    def __init__(self, a, q, c, r, m0, p0, name=""):
        super().__init__(name)
        for key, value in dict(a=a, q=q, c=c, r=r, m0=m0, p0=p0).items():
            self.register_buffer(key, value)

    def initial(self):
        return pyro.sample("z", dist.MultivariateNormal(self.m0, self.p0))

    def transition(self, z):
        return pyro.sample("z", dist.MultivariateNormal(z @ self.a.T, self.q))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.MultivariateNormal(z @ self.c.T, self.r), obs=x)


def linear_gaussian(latent=2, observed=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(*shape, generator=g)

    def covariance(n):
        m = matrix(n, n)
        return m @ m.T / n + 0.3 * torch.eye(n)

    a = matrix(latent, latent)
    a = 0.9 * a / torch.linalg.eigvals(a).abs().max()
    return LinearGaussian(a, covariance(latent), matrix(observed, latent), covariance(observed), matrix(latent),
                          covariance(latent))


class DeepMarkov(seq.StateSpaceModel):
    """Gaussian latents, Bernoulli or Gaussian frames; every part a random network."""

    def __init__(self, latent=3, observed=4, gaussian=False, name=""):
        super().__init__(name)
        self.gaussian = gaussian
        self.loc = nn.Parameter(torch.randn(latent) * 0.1)
        self.scale = pyro.nn.PyroParam(torch.full((latent,), 0.8), constraint=dist.constraints.positive)
        self.mean = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, latent))
        self.spread = nn.Linear(latent, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, observed))

    def initial(self):
        return pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.mean(z), 0.1 + nn.functional.softplus(self.spread(z))).to_event(1))

    def emission(self, z, x=None):
        out = self.decoder(z)
        fn = dist.Normal(out, 0.7) if self.gaussian else dist.Bernoulli(logits=out)
        return pyro.sample("x", fn.to_event(1), obs=x)


class VRNN(seq.SequentialModel):
    def __init__(self, latent=3, observed=4, hidden=5, gaussian=True, with_advance=True, name=""):
        super().__init__(name)
        self.gaussian = gaussian
        self.h0 = nn.Parameter(torch.randn(hidden) * 0.1)
        self.prior = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Linear(hidden + latent, observed)
        self.gru = nn.GRUCell(latent + observed, hidden)
        self.with_advance = with_advance

    def has_advance(self):
        return self.with_advance

    def start(self, rows):
        return self.h0.expand(rows, -1)

    def step(self, h, x=None):
        loc, spread = self.prior(h).chunk(2, -1)
        z = pyro.sample("z", dist.Normal(loc, 0.1 + nn.functional.softplus(spread)).to_event(1))
        out = self.decoder(torch.cat([h, z], -1))
        fn = dist.Normal(out, 0.7) if self.gaussian else dist.Bernoulli(logits=out)
        x = pyro.sample("x", fn.to_event(1), obs=x)
        return self.advance(h, {"z": z}, x)

    def advance(self, h, z, x):
        return self.gru(torch.cat([z["z"], x], -1), h)


class TwoSites(seq.SequentialModel):
    """Two latents, the second given the first, and two observed sites from one vector of data."""

    def __init__(self, name=""):
        super().__init__(name)
        self.drift = nn.Linear(2, 2)
        self.emit = nn.Linear(3, 3)

    def start(self, rows):
        return {"level": self.drift.weight.new_zeros(rows, 2), "count": torch.zeros(rows, 1, dtype=torch.long)}

    def step(self, state, x=None):
        level = pyro.sample("level", dist.Normal(self.drift(state["level"]), 0.5).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(2.0, torch.exp(-0.3 * level[:, 0])))
        out = self.emit(torch.cat([level, rate[:, None]], -1))
        pyro.sample("a", dist.Normal(out[:, :2], 1.0).to_event(1), obs=None if x is None else x[:, :2])
        pyro.sample("b", dist.Normal(out[:, 2], 0.5), obs=None if x is None else x[:, 2])
        return {"level": level, "count": state["count"] + 1}


class GammaRate(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("rate", dist.Gamma(2.0, 1.0))

    def transition(self, rate):
        return pyro.sample("rate", dist.Gamma(10.0, 10.0 / rate))

    def emission(self, rate, x=None):
        return pyro.sample("x", dist.Poisson(rate), obs=x)


class LogNormalScale(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("s", dist.LogNormal(0.0, 0.5))

    def transition(self, s):
        return pyro.sample("s", dist.LogNormal(0.9 * torch.log(s), 0.3))

    def emission(self, s, x=None):
        return pyro.sample("x", dist.Normal(torch.zeros_like(s), s), obs=x)


class Video(seq.StateSpaceModel):
    """A convolutional emission."""

    def __init__(self, name=""):
        super().__init__(name)
        self.decoder = nn.Sequential(nn.Linear(2, 4 * 2 * 2), nn.Unflatten(1, (4, 2, 2)), nn.ReLU(),
                                     nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1))

    def initial(self):
        return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(0.9 * z, 0.3).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(3), obs=x)


class Driven(seq.StateSpaceModel):
    """A covariate that moves the state, and the time index that widens the noise."""

    def initial(self, u):
        return pyro.sample("z", dist.Normal(u[:, 0], 1.0))

    def transition(self, z, u):
        return pyro.sample("z", dist.Normal(0.8 * z + u[:, 0] - u[:, 1], 0.5))

    def emission(self, z, t, x=None):
        return pyro.sample("x", dist.Normal(z, 0.5 + 0.1 * t.to(z.dtype)), obs=x)


class Bayesian(seq.StateSpaceModel):
    """An AR(1) in noise with a prior on its coefficient."""

    def __init__(self, name=""):
        super().__init__(name)
        self.phi = pyro.nn.PyroSample(dist.Normal(0.5, 0.2))
        self.noise = pyro.nn.PyroSample(lambda self: dist.LogNormal(0.1 * self.phi, 0.2))

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.phi * z, 1.0))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, self.noise), obs=x)


class HiddenMarkov(seq.StateSpaceModel):
    """Discrete states, for enumeration and the score-function gradient."""

    def __init__(self, states=2, name=""):
        super().__init__(name)
        self.start_logits = nn.Parameter(torch.randn(states))
        self.logits = nn.Parameter(torch.randn(states, states))
        self.locs = nn.Parameter(torch.randn(states))
        self.enumerate = None

    def initial(self):
        return pyro.sample("k", dist.Categorical(logits=self.start_logits), infer=self._infer())

    def transition(self, k):
        return pyro.sample("k", dist.Categorical(logits=self.logits[k]), infer=self._infer())

    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(self.locs[k], 0.8), obs=x)

    def _infer(self):
        return {"enumerate": self.enumerate} if self.enumerate else {}


def ragged(x, lengths):
    """The data with garbage past the ends."""
    x = x.clone()
    for b, n in enumerate(lengths):
        x[b, n:] = 7.0 if x.is_floating_point() else 1
    return x
