"""The local Kalman proposals: optimal where that is known, unbiased everywhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import VRNN, StochasticVolatility, linear_gaussian
from test_exact import VOLATILITY, volatility_returns
from test_nonlinear import Chain, Counts, Curved, Pendulum

import pyro_seq as seq
from pyro_seq.engine.loop import forward

both_kinds = pytest.mark.parametrize("kind", ["extended", "unscented"])


def local_optimum(model, z, x):
    """p(z_t | z_{t-1}, x_t) of a linear Gaussian model: mean, covariance, and log p(x_t | z_{t-1})."""
    prior = z @ model.a.T
    innovation = model.c @ model.q @ model.c.T + model.r
    gain = model.q @ model.c.T @ torch.linalg.inv(innovation)
    mean = prior + (x - prior @ model.c.T) @ gain.T
    return mean, model.q - gain @ model.c @ model.q, dist.MultivariateNormal(prior @ model.c.T, innovation).log_prob(x)


def second_step(model, guide, x, particles=50):
    def run():
        steps = list(forward(model, guide, seq.Sequences.of(x), particles))
        return steps[1].before, steps[1].sites, (steps[1].log_weights - steps[0].log_weights)[0]

    with torch.no_grad():
        return model.within(run)


@both_kinds
def test_the_proposal_of_a_linear_model_is_locally_optimal(kind):
    model = linear_gaussian()
    x = model.simulate([2])["x"]
    before, sites, weights = second_step(model, seq.KalmanGuide(model, kind), x)
    mean, covariance, log_p = local_optimum(model, before, x[0, 1])
    torch.testing.assert_close(sites["z"].q.mean, mean)
    torch.testing.assert_close(sites["z"].q.covariance_matrix, covariance.expand(50, -1, -1))
    torch.testing.assert_close(weights, log_p)  # whatever was drawn


@both_kinds
def test_the_weights_of_a_chain_of_sites_do_not_depend_on_the_draw(kind):
    """All particles start from one state: with the optimal proposal all weigh p(x_1), and so the evidence of one frame is
    exact."""
    model = Chain()
    u = torch.randn(1, 1, 1)
    sites = model.simulate([1], u=u)
    x = torch.cat([sites["first"], sites["second"][..., None]], -1)
    x[0, 0, 2] = torch.nan
    exact = seq.KalmanFilter(model).run(x, u=u)
    found = seq.ParticleFilter(model, 20, guide=seq.KalmanGuide(model, kind)).run(x, u=u)
    torch.testing.assert_close(found.log_evidence, exact.log_evidence)
    torch.testing.assert_close(found.ess, torch.full((1, 1), 20.0))


@both_kinds
def test_missing_entries_get_the_prior(kind):
    model = linear_gaussian(2, 2)
    x = model.simulate([2])["x"]
    x[0, 1] = torch.nan
    before, sites, weights = second_step(model, seq.KalmanGuide(model, kind), x)
    torch.testing.assert_close(sites["z"].q.mean, before @ model.a.T)
    torch.testing.assert_close(sites["z"].q.covariance_matrix, model.q.expand(50, -1, -1))
    torch.testing.assert_close(weights, torch.zeros(50))


def assert_unbiased(log_evidence, exact, level=4.5):
    """exp(log evidence - exact) has mean 1: at 4.5 standard errors a correct filter fails once in 100 000."""
    ratio = (log_evidence - exact).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) < level * error, f"{ratio.mean():.4f} +- {error:.4f}"
    assert error < 0.2


@both_kinds
def test_the_guided_filter_is_unbiased(kind):
    """Against quadrature, on a nonlinear model; and fewer particles do as well as more of the prior's."""
    model = Curved(0.15)
    x = model.simulate([10])["x"]
    x[0, 4] = torch.nan
    exact = model.quadrature(x, 801)
    found = seq.ParticleFilter(model, 50, guide=seq.KalmanGuide(model, kind)).run(x.expand(500, -1))
    assert_unbiased(found.log_evidence, exact)
    prior = seq.ParticleFilter(model, 50).run(x.expand(500, -1))
    assert found.ess[:, [0, 1, 2, 3, 5]].mean() > 1.5 * prior.ess[:, [0, 1, 2, 3, 5]].mean()
    assert found.log_evidence.std() < 0.6 * prior.log_evidence.std()


class Growth(seq.StateSpaceModel):
    """The growth model of Gordon, Salmond and Smith (1993): its emission forgets the sign of the state."""

    def initial(self):
        return pyro.sample("z", dist.Normal(1.0, 1.0))

    def transition(self, z, t):
        drive = 8 * torch.cos(1.2 * t.to(z.dtype))
        return pyro.sample("z", dist.Normal(z / 2 + 25 * z / (1 + z.square()) + drive, math.sqrt(10)))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z.square() / 20, 1.0), obs=x)

    def quadrature(self, x):
        grid = torch.linspace(-40, 40, 1601)
        step = math.log(grid[1] - grid[0])
        log_p = dist.Normal(1.0, 1.0).log_prob(grid)
        for t, value in enumerate(x, 1):
            if t > 1:
                loc = grid / 2 + 25 * grid / (1 + grid.square()) + 8 * math.cos(1.2 * t)
                log_p = (log_p[:, None] + dist.Normal(loc[:, None], math.sqrt(10)).log_prob(grid)).logsumexp(0) + step
            log_p = log_p + dist.Normal(grid.square() / 20, 1.0).log_prob(value)
        return log_p.logsumexp(0) + step


class Bearings(seq.StateSpaceModel):
    """A ship at a steady speed, its bearing from a lighthouse known to half a degree."""

    def initial(self):
        mean, scale = torch.tensor([1.0, 0.05, 1.0, -0.05]), torch.tensor([0.2, 0.02, 0.2, 0.02])
        return pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    def transition(self, z):
        move = torch.eye(4) + torch.diag_embed(torch.tensor([1.0, 0.0, 1.0]), 1)
        return pyro.sample("z", dist.Normal(z @ move.T, torch.tensor([0.05, 0.01, 0.05, 0.01])).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(torch.atan2(z[:, 2], z[:, 0]), 0.01), obs=x)


@both_kinds
def test_the_growth_model(kind):
    model = Growth()
    x = model.simulate([8])["x"]
    found = seq.ParticleFilter(model, 300, guide=seq.KalmanGuide(model, kind)).run(x.expand(200, -1))
    assert_unbiased(found.log_evidence, model.quadrature(x[0]))


@both_kinds
def test_bearings(kind):
    """Both filters estimate one evidence; of the guided one more than twice the share of particles counts."""
    model = Bearings()
    x = model.simulate([10])["x"]
    prior = seq.ParticleFilter(model, 2000).run(x.expand(200, -1))
    found = seq.ParticleFilter(model, 200, guide=seq.KalmanGuide(model, kind)).run(x.expand(200, -1))
    top = prior.log_evidence.max()
    means = [((v := (run.log_evidence - top).exp()).mean(), v.std() / math.sqrt(len(v))) for run in (prior, found)]
    assert abs(means[0][0] - means[1][0]) < 4.5 * math.hypot(means[0][1], means[1][1])
    assert found.ess.mean() / 200 > 2 * prior.ess.mean() / 2000


def test_a_volatility_gets_its_prior(data_dir):
    """The mean of a return says nothing of its volatility, so the proposal is the prior: no worse, and no better."""
    x = volatility_returns(data_dir)
    model = StochasticVolatility()
    _, sites, _ = second_step(model, seq.KalmanGuide(model), x[None, :2])
    torch.testing.assert_close(sites["z"].q.mean, sites["z"].p.mean)
    torch.testing.assert_close(sites["z"].q.stddev, sites["z"].p.stddev.expand(50))
    found = seq.ParticleFilter(model, 400, guide=seq.KalmanGuide(model)).run(x.expand(40, -1))
    ratio = (found.log_evidence - VOLATILITY).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(40)


@both_kinds
def test_counts_are_guided(kind):
    model = Counts()
    x = model.simulate([15, 10])["x"]
    prior = seq.ParticleFilter(model, 500, num_runs=20).run(x, [15, 10])
    found = seq.ParticleFilter(model, 500, num_runs=20, guide=seq.KalmanGuide(model, kind)).run(x, [15, 10])
    error = math.hypot(prior.total_standard_error, found.total_standard_error)
    assert abs(prior.total_log_evidence - found.total_log_evidence) < 4.5 * error
    assert found.ess.mean() > prior.ess.mean()


@pytest.mark.parametrize("make", [lambda: VRNN(2, 3, 4), Chain, Pendulum], ids=["vrnn", "chain", "pendulum"])
def test_the_guide_in_pyro(make):
    """As an ordinary Pyro guide, in the sequential bound and in Variational, it means the same."""
    model = make()
    inputs = {"u": torch.randn(2, 5, 1)} if isinstance(model, Chain) else {}
    sites = model.simulate([5, 4], **inputs)
    x = sites["x"] if "x" in sites else torch.cat([sites["first"], sites["second"][..., None]], -1)
    guide = seq.KalmanGuide(model)
    trace = pyro.poutine.trace(guide).get_trace(x, [5, 4], **inputs)
    latents = {f"{name}_{t}" for name in ("a", "b", "z") if name in sites for t in range(1, 6)}
    assert {name for name in trace.nodes if trace.nodes[name]["type"] == "sample" and name != "sequences"} == latents
    runs = 30
    theirs = torch.tensor([pyro.infer.Trace_ELBO().loss(model, guide, x, [5, 4], **inputs) for _ in range(runs)])
    ours = torch.tensor([seq.SequentialELBO().loss(model, guide, x, [5, 4], **inputs) for _ in range(runs)])
    error = math.hypot(theirs.std(), ours.std()) / math.sqrt(runs)
    assert abs(theirs.mean() - ours.mean()) < 4.5 * error + 1e-9
    bound = seq.Variational(model, guide, num_samples=400).run(x, [5, 4], **inputs)
    error = math.hypot(bound.total_standard_error, ours.std() / math.sqrt(runs))
    assert abs(bound.total_log_evidence + ours.mean()) < 4.5 * error + 1e-9
    parameters = list(model.parameters())
    if parameters:
        seq.SequentialELBO().differentiable_loss(model, guide, x, [5, 4], **inputs).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
