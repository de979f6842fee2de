"""The twisted particle filter: exact where its functions can be, unbiased everywhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import VRNN, DeepMarkov, HiddenMarkov, LocalLevel, StochasticVolatility, linear_gaussian
from test_exact import volatility_returns

import pyro_seq as seq
from pyro_seq.guides.twisted import Twist
from pyro_seq.infer.smc.twisting import fit_twist, num_coefficients, tempered

LENGTHS = [9, 12, 10]


def assert_unbiased(log_evidence, exact, level=4.4):
    """exp(log evidence - exact) has mean 1: a right filter fails once in 100 000."""
    ratio = (log_evidence - exact).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) < level * error + 1e-7, f"{ratio.mean():.4f} +- {error:.4f}"
    assert error < 0.1


def with_gaps(x):
    x = x.clone()
    x[0, 3], x[1, 0], x[2, 8:10] = torch.nan, torch.nan, torch.nan
    if x.dim() == 3:
        x[1, 5, 0] = torch.nan
    return x


class Apart(seq.StateSpaceModel):
    """Level and slope as two sites of their own, of which the data shows the sum."""

    def initial(self):
        return self.sites(torch.zeros(1), torch.zeros(1))

    def transition(self, state):
        return self.sites(state["level"] + state["slope"], 0.8 * state["slope"])

    def sites(self, level, slope):
        slope = pyro.sample("slope", dist.Normal(slope, 0.3))
        return {"level": pyro.sample("level", dist.Normal(level, 0.5)), "slope": slope}

    def emission(self, state, x=None):
        pyro.sample("x", dist.Normal(state["level"] + state["slope"], 1.0), obs=x)


LINEAR = {"full covariances": lambda: linear_gaussian(2, 3), "local level": LocalLevel, "two sites": Apart,
          "sharp": lambda: linear_gaussian(3, 2, seed=5)}


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_gaussian_evidence_is_exact(name, gaps):
    """Few particles, ragged and with gaps: all runs give the Kalman filter's evidence, to rounding and a trace of ridge."""
    model = LINEAR[name]()
    x = model.simulate([12] * 3)["x"]
    x = with_gaps(x) if gaps else x
    exact = seq.KalmanFilter(model).run(x, LENGTHS).log_evidence
    found = seq.TwistedParticleFilter(model, 24, num_runs=3).run(x, LENGTHS)
    torch.testing.assert_close(found.log_evidence, exact, rtol=0, atol=1e-6)
    assert (found.standard_error < 1e-6).all()
    assert found.method == "twisted particle filter" and found.kind == "log of an unbiased estimate"
    for b, n in enumerate(LENGTHS):  # and so does each sequence alone
        alone = seq.TwistedParticleFilter(model, 24).run(x[b:b + 1, :n])
        torch.testing.assert_close(alone.log_evidence[0], exact[b], rtol=0, atol=1e-6)


def test_trajectories_are_of_the_smoothing_distribution():
    """With exact functions the paths are independent draws from it: 5 standard errors of 2000 of them."""
    model = LocalLevel(0.0, 1.0, 0.5, 1.0)
    x = model.simulate([15])["x"]
    exact = seq.KalmanFilter(model).run(x).smoothed["z"]
    paths = seq.TwistedParticleFilter(model, 2000, history=True).run(x).trajectories(2000).samples["z"][:, 0]
    # Drawn with replacement from 2000 paths: twice the variance of as many independent ones.
    assert ((paths.mean(0) - exact.mean[0]).abs() < 5 * exact.std[0] * math.sqrt(2 / 2000)).all()
    assert ((paths.var(0) / exact.variance[0]).log().abs() < 5 * math.sqrt(4 / 2000)).all()


def test_filtered_moments_are_of_the_filtering_distribution():
    """Over 40 filters: 5 standard errors, and a bias of order 1 / N."""
    model = LocalLevel(0.0, 1.0, 0.5, 1.0)
    x = model.simulate([6])["x"]
    exact = seq.KalmanFilter(model).run(x)
    found = seq.TwistedParticleFilter(model, 500).run(x.expand(40, -1))
    for part in ("mean", "variance"):
        here, there = getattr(found.filtered["z"], part), getattr(exact.filtered["z"], part)
        assert ((here.mean(0) - there[0]).abs() < 5 * here.std(0) / math.sqrt(40) + 0.02).all()
    by_step = found.log_evidence_by_step
    assert ((by_step.mean(0) - exact.log_evidence_by_step[0]).abs() < 5 * by_step.std(0) / math.sqrt(40) + 0.02).all()


class Counts(seq.StateSpaceModel):
    """Poisson counts whose log rate is an autoregression: log-concave, and no Gaussian."""

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(0.8 * z, 0.6))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Poisson(torch.exp(z)), obs=x)

    def quadrature(self, x):
        grid = torch.linspace(-7, 7, 1401)
        step = math.log(grid[1] - grid[0])
        log_p, move = dist.Normal(0.0, 1.0).log_prob(grid), dist.Normal(0.8 * grid[:, None], 0.6).log_prob(grid)
        for t, value in enumerate(x):
            log_p = log_p if t == 0 else (log_p[:, None] + move).logsumexp(0) + step
            log_p = log_p if value.isnan() else log_p + dist.Poisson(grid.exp()).log_prob(value)
        return log_p.logsumexp(0) + step


@pytest.mark.parametrize("quadratic", ["full", "diagonal"])
def test_a_nonlinear_model_is_unbiased(quadratic):
    """Against quadrature, each of 1500 copies with functions learned from its own runs; and far better than the prior."""
    model = Counts()
    x = model.simulate([10])["x"]
    x[0, 4] = torch.nan
    found = seq.TwistedParticleFilter(model, 50, 2, quadratic=quadratic).run(x.expand(1500, -1))
    assert_unbiased(found.log_evidence, model.quadrature(x[0]))
    prior = seq.ParticleFilter(model, 50).run(x.expand(1500, -1))
    assert found.log_evidence.std() < 0.3 * prior.log_evidence.std()


def test_functions_that_are_poor_leave_it_unbiased():
    """A diagonal quadratic for a posterior of strong correlation, resampled at every step: against the Kalman filter."""
    model = linear_gaussian(2, 1)
    x = model.simulate([6])["x"]
    exact = seq.KalmanFilter(model).run(x).log_evidence
    found = seq.TwistedParticleFilter(model, 20, 1, quadratic="diagonal", ess_threshold=1.0).run(x.expand(1200, -1, -1))
    assert found.log_evidence.std() > 1e-3
    assert_unbiased(found.log_evidence, exact)


def test_volatility(data_dir):
    """Returns of a real currency: the spread of the log evidence is below a fifth of the bootstrap filter's at equal N."""
    x = volatility_returns(data_dir)[None, :100]
    model = StochasticVolatility()
    found = seq.TwistedParticleFilter(model, 50, num_runs=20).run(x)
    prior = seq.ParticleFilter(model, 50, num_runs=20).run(x)
    many = seq.ParticleFilter(model, 5000, num_runs=20).run(x)
    assert found.standard_error < 0.2 * prior.standard_error
    error = math.hypot(found.total_standard_error, many.total_standard_error)
    assert abs(found.total_log_evidence - many.total_log_evidence) < 4.5 * error


@pytest.mark.parametrize("make", [lambda: DeepMarkov(2, 3), lambda: VRNN(2, 3, 4)], ids=["deep Markov", "VRNN"])
def test_networks(make):
    """Of the data only the emission and, in a VRNN, the state read it: gaps, ragged ends, and the same evidence as many of the
    prior's particles."""
    model = make()
    x = model.simulate([12] * 3)["x"]
    x = with_gaps(x)
    found = seq.TwistedParticleFilter(model, 40, num_runs=10).run(x, LENGTHS)
    prior = seq.ParticleFilter(model, 1000, num_runs=10).run(x, LENGTHS)
    error = math.hypot(found.total_standard_error, prior.total_standard_error)
    assert abs(found.total_log_evidence - prior.total_log_evidence) < 4.5 * error
    assert found.predict(2, 5).samples["z"].shape == (5, 3, 2, 2)


def test_a_poor_fit_does_no_harm():
    """An emission that forgets the sign: where no quadratic does well, the filter is not left with one that does harm."""
    class Squared(LocalLevel):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z.square() / 5, 0.5), obs=x)

    model = Squared(0.0, 4.0, 4.0, 1.0)
    x = model.simulate([10])["x"].expand(60, -1)
    found = seq.TwistedParticleFilter(model, 60).run(x).log_evidence
    prior = seq.ParticleFilter(model, 60).run(x).log_evidence
    assert found.mean() > prior.mean() - 1.0


# Functions and how they are learned.

def test_tilting_a_gaussian():
    """Against numerical integration over a grid, of a point and of a far one."""
    grid = torch.linspace(-12, 12, 601)
    z = torch.cartesian_prod(grid, grid)
    curvature, slope = torch.tensor([[2.0, 0.7], [0.7, 0.5]]), torch.tensor([0.3, -1.0])
    center, spread = torch.tensor([0.5, -0.2]), torch.tensor([[1.0, 0.0], [0.4, 0.6]])
    for mean in (torch.tensor([0.1, 0.2]), torch.tensor([-3.0, 2.0])):
        prior = dist.MultivariateNormal(mean, scale_tril=spread).log_prob(z)
        apart = z - center
        psi = -0.5 * torch.einsum("ni,ij,nj->n", apart, curvature, apart) + apart @ slope
        weights = (prior + psi).softmax(0)
        expected = (prior + psi).logsumexp(0) + 2 * (grid[1] - grid[0]).log()
        twist = Twist(center[None], curvature[None], slope[None])
        noise, factor, log_mean = twist.tilt(mean[None], spread[None])
        torch.testing.assert_close(log_mean[0], expected)
        location = mean + spread @ noise[0]
        torch.testing.assert_close(location, weights @ z)
        root = spread @ factor[0]
        torch.testing.assert_close(root @ root.T, (weights[:, None] * (z - location)).T @ (z - location))
        assert (factor.triu(1) == 0).all()


def test_a_quadratic_is_found_as_it_is():
    latents = torch.randn(2, 40, 3) * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([5.0, 1000.0, 0.0])
    unit = (latents - latents.mean(1, keepdim=True)) / latents.std(1, keepdim=True)
    curvature, slope = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.4], [0.0, 0.4, 0.8]]), torch.tensor([1.0, -2.0, 0.5])
    target = -0.5 * torch.einsum("nki,ij,nkj->nk", unit, curvature, unit) + unit @ slope + 7.0
    target[0, 3] = -torch.inf
    twist = fit_twist(latents, target, torch.randn(2, 40), "full")
    found = (-0.5 * torch.einsum("nki,nij,nkj->nk", latents - twist.center[:, None], twist.curvature,
                                 latents - twist.center[:, None])
             + torch.einsum("nki,ni->nk", latents - twist.center[:, None], twist.slope))
    apart = (found - target)[:, 4:]
    torch.testing.assert_close(apart, apart[:, :1].expand_as(apart), rtol=0, atol=1e-6)


@pytest.mark.parametrize("quadratic", ["full", "diagonal"])
def test_whatever_is_learned_is_bounded(quadratic):
    """Curvature never negative, and the maximum never far from what was seen."""
    latents = torch.randn(50, 30, 2)
    for target in (latents.square().sum(-1), 100 * latents[..., 0], torch.randn(50, 30) * 1e3, torch.zeros(50, 30)):
        twist = fit_twist(latents, target, torch.zeros(50, 30), quadratic)
        values = torch.linalg.eigvalsh(twist.curvature)
        assert (values > -1e-12 * (1 + values.abs().amax())).all()
        noise, _, log_mean = twist.tilt(torch.zeros(50, 2), 1e3 * torch.eye(2).expand(50, -1, -1))
        assert (1e3 * noise).abs().max() < 5000 and log_mean.isfinite().all()


def test_tempering_keeps_half_of_the_particles():
    weights = tempered(torch.tensor([[0.0, 0.1, 0.2, 0.0], [0.0, -50.0, -20.0, -80.0], [0.0, -torch.inf, -torch.inf, -9.0]]))
    torch.testing.assert_close(weights[0], torch.tensor([0.0, 0.1, 0.2, 0.0]).softmax(0))
    counts = 1 / weights.square().sum(-1)
    assert abs(counts[1] - 2) < 1e-2 and abs(counts[2] - 1) < 1e-2
    assert (weights[2, 1:3] == 0).all()
    assert num_coefficients(3, "full") == 10 and num_coefficients(3, "diagonal") == 7


# What a user can get wrong.

def run(model, x, *arguments, **options):
    return seq.TwistedParticleFilter(model, *arguments, **options).run(x)


def gamma():
    class Rate(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("rate", dist.Gamma(2.0, 1.0))

        def transition(self, rate):
            return pyro.sample("rate", dist.Gamma(10.0, 10.0 / rate))

        def emission(self, rate, x=None):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    return Rate()


class NoLatents(seq.SequentialModel):
    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None):
        return pyro.sample("x", dist.Normal(h, 1.0), obs=x)


MISTAKES = {
    "gamma": (lambda: run(gamma(), torch.ones(1, 3)), ValueError,
              "latent site 'rate' is Gamma, not Gaussian: Kalman filters, their proposals and twisted particle filters"),
    "discrete": (lambda: run(HiddenMarkov(), torch.ones(1, 3)), ValueError, "latent site 'k' is Categorical, not Gaussian"),
    "no latents": (lambda: run(NoLatents(), torch.ones(1, 3)), ValueError, "NoLatents samples no latent site: there is no"),
    "too few particles": (lambda: run(linear_gaussian(3, 1), torch.ones(1, 3, 1), 19), ValueError,
                          "num_particles=19 are too few to learn a full quadratic in 3 latents: use 20 or more, or quadratic="),
    "too few for a diagonal": (lambda: run(LocalLevel(), torch.ones(1, 3), 5, quadratic="diagonal"), ValueError,
                               "too few to learn a diagonal quadratic in 1 latents: use 6 or more$"),
    "quadratic": (lambda: seq.TwistedParticleFilter(LocalLevel(), quadratic="cubic"), ValueError,
                  "quadratic='cubic'; it is 'full' or 'diagonal'"),
    "iterations": (lambda: seq.TwistedParticleFilter(LocalLevel(), 10, 0), ValueError, "iterations=0; it is at least 1"),
    "a class": (lambda: seq.TwistedParticleFilter(LocalLevel), TypeError, "TwistedParticleFilter takes a model, not the class"),
    "no data": (lambda: run(LocalLevel(), None), ValueError, "no data was given"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("make", [
    lambda model: seq.TwistedParticleFilter(model, 50), lambda model: seq.FixedLagSmoother(model, 50, lag=2),
    lambda model: seq.BackwardSampler(model, 50), lambda model: seq.Paris(model, lambda before, after, x, t: after, 50)])
def test_what_needs_more_than_a_filter_is_refused_as_a_stream(make):
    """They would run as plain filters, without a word."""
    method = make(LocalLevel(0.0, 1.0, 0.5, 1.0))
    if not isinstance(method, seq.Paris):  # whose stream adds up too
        with pytest.raises(TypeError, match=r"which stream does not do: use ParticleFilter\(\.\.\.\)\.stream"):
            method.stream()
    with pytest.raises(TypeError, match="which log_evidence_at does not do"):
        method.log_evidence_at({"scale": torch.ones(2)}, torch.zeros(1, 3))


class Chained(seq.StateSpaceModel):
    """Two sites, of which the second reads the first."""

    def initial(self):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        return {"a": a, "b": pyro.sample("b", dist.Normal(2 * a, 0.3))}

    def transition(self, state):
        a = pyro.sample("a", dist.Normal(0.8 * state["a"], 1.0))
        return {"a": a, "b": pyro.sample("b", dist.Normal(0.5 * state["b"] + 2 * a, 0.3))}

    def emission(self, state, x=None):
        return pyro.sample("x", dist.Normal(state["b"], 1.0), obs=x)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_a_site_that_reads_another_of_its_step(dtype, tolerance):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Chained()
        x = model.simulate([15])["x"]
        found, exact = seq.TwistedParticleFilter(model, 100).run(x), seq.KalmanFilter(model).run(x)
    finally:
        torch.set_default_dtype(usual)
    torch.testing.assert_close(found.log_evidence, exact.log_evidence, rtol=0, atol=tolerance)
