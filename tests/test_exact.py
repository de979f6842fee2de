"""Exact oracles: numbers of the literature, dense Gaussians, unbiasedness."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Driven, LocalLevel, StochasticVolatility, TwoSites, linear_gaussian

import pyro_seq as seq

NILE = -639.3007238  # prior N(1000, 1e5) on the first level
VOLATILITY = -158.34280921  # by quadrature on a grid


def nile():
    import statsmodels.datasets

    return torch.tensor(statsmodels.datasets.nile.load_pandas().data["volume"].to_numpy())


def assert_unbiased(log_evidence, exact, level=4.0):
    """exp(log evidence - exact) has mean 1: a z-test. At 4 standard errors a correct filter fails once in 16 000."""
    ratio = (log_evidence - exact).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) < level * error, f"{ratio.mean():.4f} +- {error:.4f}"
    assert error < 0.2  # a test that could not fail would pass with an error of any size


def test_nile_kalman():
    posterior = seq.KalmanFilter(LocalLevel()).run(nile())
    assert abs(posterior.total_log_evidence - NILE) < 1e-6
    assert posterior.kind == "exact" and posterior.total_standard_error == 0


def test_nile_bootstrap_filter_is_unbiased():
    found = seq.ParticleFilter(LocalLevel(), 500).run(nile().expand(200, -1))
    assert_unbiased(found.log_evidence, NILE)
    kalman = seq.KalmanFilter(LocalLevel()).run(nile())
    many = seq.ParticleFilter(LocalLevel(), 2000).run(nile().expand(50, -1)).filtered["z"].mean
    error = many.std(0) / math.sqrt(50)
    assert ((many.mean(0) - kalman.filtered["z"].mean[0]).abs() < 5 * error + 0.5).all()


@pytest.mark.parametrize("guide", ["filtering", "avf", "smoothing"])
def test_guided_filters_are_unbiased(guide):
    """Untrained guides, moved off the prior at random: the weights must repair whatever they propose."""
    model = LocalLevel(0.0, 1.0, 0.5, 1.0)
    x = model.simulate([8])["x"]
    exact = seq.KalmanFilter(model).run(x).total_log_evidence
    make = {"filtering": seq.FilteringGuide, "avf": seq.AmortizedVariationalFilter, "smoothing": seq.SmoothingGuide}
    guide = make[guide](model, hidden=6)
    for parameter in guide.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    many = x.expand(400, -1)
    assert_unbiased(seq.ParticleFilter(model, 200, guide=guide).run(many).log_evidence, exact)
    assert_unbiased(seq.ParticleFilter(model, 2000, guide=guide, ess_threshold=0.0).run(many).log_evidence, exact)
    elbo = seq.Variational(model, guide, num_samples=2).run(many).log_evidence
    iwae = seq.Variational(model, guide, num_samples=50, bound="iwae").run(many).log_evidence
    margin = 4 * math.hypot(elbo.std() / 20, iwae.std() / 20)
    assert elbo.mean() < iwae.mean() + margin and iwae.mean() < exact + margin


def volatility_returns(data_dir, count=200):
    rates = np.loadtxt(data_dir / "timeseries" / "GBP_vs_USD_9798.txt", skiprows=2, usecols=(3,), comments="(")
    return torch.tensor(100 * np.diff(np.log(rates))[:count])


def test_volatility_filter_is_unbiased(data_dir):
    found = seq.ParticleFilter(StochasticVolatility(), 1000).run(volatility_returns(data_dir).expand(200, -1))
    assert_unbiased(found.log_evidence, VOLATILITY)


def test_volatility_filter_equals_particles_on_the_whole_series(data_dir):
    """``particles`` with 4000 particles has mean -492.41 and deviation 0.14; the same filter's mean of 20 lies within 4
    standard errors of it, and its deviation within a factor of 2 (a chi-square of 19 degrees of freedom: once in 5000)."""
    returns = volatility_returns(data_dir, 750)
    found = seq.ParticleFilter(StochasticVolatility(), 4000).run(returns.expand(20, -1)).log_evidence
    assert abs(found.mean() + 492.41) < 4 * 0.14 / math.sqrt(20) + 0.005
    assert 0.07 < found.std() < 0.28


def test_volatility_filter_is_right_in_float32(data_dir):
    returns = volatility_returns(data_dir).float()
    torch.set_default_dtype(torch.float32)
    found = seq.ParticleFilter(StochasticVolatility(), 20_000, num_runs=20).run(returns)
    assert found.log_evidence.dtype == torch.float32
    assert abs(found.total_log_evidence - VOLATILITY) < 1e-3 + 4 * found.total_standard_error


def dense_joint(model, steps, matrices):
    """Mean and covariance of (z_1..z_T, x_1..x_T) of a linear Gaussian model, built term by term."""
    a, q, c, r, m0, p0 = matrices
    n = a.shape[0]
    mean, blocks = [m0], [p0]
    for _ in range(steps - 1):
        mean.append(a @ mean[-1])
        blocks.append(a @ blocks[-1] @ a.T + q)
    z = torch.zeros(steps * n, steps * n)
    for s in range(steps):
        power = torch.eye(n)
        for t in range(s, steps):
            z[t * n:(t + 1) * n, s * n:(s + 1) * n] = power @ blocks[s]
            z[s * n:(s + 1) * n, t * n:(t + 1) * n] = (power @ blocks[s]).T
            power = a @ power
    emit = torch.block_diag(*[c] * steps)
    joint = torch.cat([torch.cat([z, z @ emit.T], 1),
                       torch.cat([emit @ z, emit @ z @ emit.T + torch.block_diag(*[r] * steps)], 1)])
    return torch.cat([torch.cat(mean), emit @ torch.cat(mean)]), joint


@pytest.mark.parametrize("seed", range(3))
def test_kalman_equals_a_dense_gaussian(seed):
    """Evidence, smoothed and filtered moments, with gaps, against one large Gaussian."""
    model, steps = linear_gaussian(seed=seed), 5
    x = model.simulate([steps])["x"]
    x[0, 1, 0] = torch.nan
    x[0, 3] = torch.nan
    posterior = seq.KalmanFilter(model).run(x)
    mean, covariance = dense_joint(model, steps, (model.a, model.q, model.c, model.r, model.m0, model.p0))
    flat = x.reshape(-1)

    def conditional(upto):
        seen = ~flat.isnan()
        seen[upto * 3:] = False
        index = torch.cat([torch.zeros(steps * 2, dtype=torch.bool), seen])
        cross, within = covariance[:, index], covariance[index][:, index]
        residual = flat[seen] - mean[index]
        gain = torch.linalg.solve(within, cross.T).T
        log_p = torch.distributions.MultivariateNormal(mean[index], within).log_prob(flat[seen])
        return mean + gain @ residual, covariance - gain @ cross.T, log_p

    smooth, spread, log_p = conditional(steps)
    torch.testing.assert_close(posterior.log_evidence[0], log_p)
    torch.testing.assert_close(posterior.smoothed["z"].mean[0].reshape(-1), smooth[:steps * 2])
    torch.testing.assert_close(posterior.smoothed["z"].variance[0].reshape(-1), spread.diagonal()[:steps * 2])
    for t in range(steps):
        filtered, spread, _ = conditional(t + 1)
        where = slice(2 * t, 2 * t + 2)
        torch.testing.assert_close(posterior.filtered["z"].mean[0, t], filtered[where])
        torch.testing.assert_close(posterior.filtered["z"].variance[0, t], spread.diagonal()[where])


def test_kalman_with_covariates_and_time():
    """A time-varying model against its own joint Gaussian, found by regression on simulated noise-free runs."""
    model = Driven()
    u = torch.randn(2, 4, 2)
    x = torch.randn(2, 4)
    posterior = seq.KalmanFilter(model).run(x, [4, 3], u=u)
    for b, n in ((0, 4), (1, 3)):
        mean, var = torch.zeros(n), torch.zeros(n, n)
        level, spread = u[b, 0, 0], torch.tensor(1.0)
        for t in range(n):
            if t:
                level, spread = 0.8 * level + u[b, t, 0] - u[b, t, 1], 0.64 * spread + 0.25
            mean[t] = level
            var[t, t] = spread
            for s in range(t):
                var[s, t] = var[t, s] = var[s, s] * 0.8 ** (t - s)
        noise = (0.5 + 0.1 * torch.arange(1, n + 1)).square()
        expected = torch.distributions.MultivariateNormal(mean, var + noise.diag()).log_prob(x[b, :n])
        torch.testing.assert_close(posterior.log_evidence[b], expected)


class Autoregressive(seq.SequentialModel):
    """x_t given x_{t-1} and a latent, several state tensors: linear-Gaussian with the data in the recurrence."""

    def start(self, rows):
        return {"x": torch.zeros(rows, 1), "z": torch.zeros(rows, 2)}

    def step(self, state, x=None):
        z = pyro.sample("z", dist.Normal(0.5 * state["z"] + 0.1 * state["x"], 1.0).to_event(1))
        loc = 0.7 * state["x"] + z.sum(-1, keepdim=True)
        x = pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)
        return {"x": x, "z": z}


def test_kalman_with_the_data_in_the_recurrence():
    model = Autoregressive()
    x = model.simulate([6])["x"]
    x[0, 2] = torch.nan
    exact = seq.KalmanFilter(model).run(x).total_log_evidence
    assert_unbiased(seq.ParticleFilter(model, 300).run(x.expand(400, -1, -1)).log_evidence, exact)


class Shifted(seq.StateSpaceModel):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.shape(z), 1.0))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("shape", [
    lambda z: torch.relu(z + 20), lambda z: torch.relu(z + 1e4), lambda z: 1e3 * torch.tanh(z / 1e3), lambda z: z + 1e-3 * z**2,
    torch.sin, lambda z: torch.where(z > 900, 2 * z, z), lambda z: z.abs(), lambda z: z + 1e-4 * torch.sin(1e3 * z),
], ids=["relu+20", "relu+1e4", "wide tanh", "small square", "sin", "kink at 900", "abs", "ripple"])
def test_kalman_is_not_fooled(shape):
    with pytest.raises(ValueError, match="site 'z'.*not linear"):
        seq.KalmanFilter(Shifted(shape)).run(torch.randn(1, 5))


def test_a_linear_model_in_disguise_is_found_linear():
    model = Shifted(lambda z: torch.fft.irfft(torch.fft.rfft(z[:, None] * torch.ones(4), dim=-1), n=4, dim=-1).mean(-1))
    assert seq.KalmanFilter(model).run(torch.randn(1, 5)).notes == ("found linear-Gaussian at the points tested",)


def test_linearity_can_be_asserted():
    model = Shifted(lambda z: torch.relu(z + 1e4) - 1e4)
    posterior = seq.KalmanFilter(model, assume_linear=True).run(torch.ones(1, 5))
    expected = seq.KalmanFilter(Shifted(lambda z: z)).run(torch.ones(1, 5))
    torch.testing.assert_close(posterior.log_evidence, expected.log_evidence)
    assert posterior.notes == ("assumed linear by the user",)


def test_two_site_evidence_by_importance_sampling():
    """A model of several sites has no closed form: two independent estimates of its evidence agree."""
    model = TwoSites()
    x = model.simulate([4])
    x = torch.cat([x["a"], x["b"][..., None]], -1)
    prior = seq.ParticleFilter(model, 1000, num_runs=40, ess_threshold=0.0).run(x)
    guided = seq.ParticleFilter(model, 1000, num_runs=40, guide=seq.FilteringGuide(model, like=x)).run(x)
    error = math.hypot(prior.total_standard_error, guided.total_standard_error)
    assert abs(prior.total_log_evidence - guided.total_log_evidence) < 4 * error
    assert error < 0.1
