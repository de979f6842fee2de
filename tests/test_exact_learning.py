"""Learning with exactly marginalised states: NUTS and SVI on the evidence, maximum likelihood, EM, Gibbs."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import VRNN, Bayesian, HiddenMarkov, LocalLevel
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from pyro.nn import PyroParam, PyroSample
from pyro.optim import Adam
from scipy import stats
from torch.distributions import constraints

import pyro_seq as seq
from pyro_seq.infer.complete import CompleteData
from pyro_seq.infer.em import _expect_discrete, _expect_gaussian
from pyro_seq.infer.estimates import Parameters, estimates_at
from pyro_seq.infer.quasi_newton import maximise
from pyro_seq.sequences import Sequences


def positive(value):
    return PyroParam(torch.tensor(value), constraint=constraints.positive)


class Level(seq.StateSpaceModel):
    """A local level with variances to estimate; diffuse at the start if it has no initial variance."""

    def __init__(self, level=1000.0, noise=10000.0, initial=None, name=""):
        super().__init__(name)
        self.level, self.noise = positive(level), positive(noise)
        self.first = initial

    def initial(self):
        if self.first is None:
            return pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        return pyro.sample("z", dist.Normal(0.0, math.sqrt(self.first)))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, self.level.sqrt()))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, self.noise.sqrt()), obs=x)


class BayesianLevel(Level):
    """The same with priors."""

    def __init__(self, name=""):
        seq.StateSpaceModel.__init__(self, name)
        self.first = 1.0
        self.level = PyroSample(dist.InverseGamma(3.0, 1.0))
        self.noise = PyroSample(dist.InverseGamma(3.0, 2.0))


class StationaryAR2(seq.SequentialModel):
    """x_t = c + phi_1 x_{t-1} + phi_2 x_{t-2} + noise, the first two frames from the stationary distribution."""

    def __init__(self):
        super().__init__()
        self.c = torch.nn.Parameter(torch.tensor(10.0))
        self.phi = torch.nn.Parameter(torch.tensor([0.8, -0.2]))
        self.variance = positive(400.0)

    def start(self, rows):
        return torch.zeros(rows, 2)

    def step(self, h, t, x=None):
        one, two = self.phi
        mean, rho = self.c / (1 - one - two), one / (1 - two)
        spread = self.variance * (1 - two) / ((1 + two) * ((1 - two) ** 2 - one**2))
        loc = torch.where(t == 1, mean, torch.where(t == 2, mean + rho * (h[:, 0] - mean), self.c + h @ self.phi))
        variance = torch.where(t == 1, spread, torch.where(t == 2, spread * (1 - rho**2), self.variance))
        x = pyro.sample("x", dist.Normal(loc, variance.sqrt()), obs=x)
        return torch.stack([x, h[:, 0]], -1)


class RandomLinear(seq.StateSpaceModel):
    """A linear dynamical system whose every matrix is to be learnt; one latent may be diffuse, one input may drive it."""

    def __init__(self, generator, diffuse=False):
        super().__init__()
        latent, observed = (int(torch.randint(1, 3, (), generator=generator)) for _ in range(2))

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        self.a = torch.nn.Parameter(0.5 * draw(latent, latent))
        self.b = torch.nn.Parameter(draw(latent))
        self.c = torch.nn.Parameter(draw(observed, latent))
        self.q = PyroParam(draw(latent).exp(), constraint=constraints.positive)
        self.r = PyroParam(torch.linalg.cholesky(torch.eye(observed) + torch.ones(observed, observed)),
                           constraint=constraints.lower_cholesky)
        self.m = torch.nn.Parameter(draw(latent))
        self.diffuse = diffuse

    def initial(self, u):
        if self.diffuse:
            z = pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()))
            return z[:, None] + 0.0 * pyro.sample("z", dist.Normal(self.m + z[:, None] * self.b, 1.0).to_event(1))
        return pyro.sample("z", dist.Normal(self.m + self.b * u, 1.0).to_event(1))

    def transition(self, z, u):
        return pyro.sample("z", dist.Normal(z @ self.a.T + self.b * u, self.q.sqrt()).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.MultivariateNormal(z @ self.c.T, scale_tril=self.r), obs=x)


class FlatLevel(seq.StateSpaceModel):
    """A diffuse level, another latent of the first step that reads it, and an emission that reads both."""

    def __init__(self):
        super().__init__()
        self.a, self.q, self.r = torch.nn.Parameter(torch.tensor(0.7)), positive(0.5), positive(0.8)

    def initial(self):
        y = pyro.sample("y", dist.ImproperUniform(constraints.real, (), ()))
        return y, pyro.sample("z", dist.Normal(self.a * y + 0.3, self.q))

    def transition(self, state):
        y = pyro.sample("y", dist.Normal(state[0], 0.6 * self.q))
        return y, pyro.sample("z", dist.Normal(self.a * y + 0.2 * state[1], self.q))

    def emission(self, state, x=None):
        return pyro.sample("x", dist.Normal(state[0] - self.a * state[1], self.r), obs=x)


def random_batch(generator, width=None):
    """Three ragged sequences with gaps."""
    shape = (3, 8) if width is None else (3, 8, width)
    x = torch.randn(*shape, generator=generator)
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.2, torch.nan), [8, 5, 6]


def random_linear(seed):
    generator = torch.Generator().manual_seed(seed)
    model = RandomLinear(generator)
    x, lengths = random_batch(generator, len(model.r))
    return seq.KalmanFilter(model), (x, lengths), {"u": torch.randn(3, 8, 1, generator=generator)}


def random_hmm(seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, lengths = random_batch(generator)
    return seq.ForwardBackward(HiddenMarkov(2 + seed % 2)), (x, lengths), {}


def nile():
    from statsmodels.datasets import nile

    return torch.tensor(nile.load_pandas().data.volume.to_numpy())


# The optimiser


def test_maximise_where_the_function_ends():
    """log x - x over x > 0, from far away; and Rosenbrock's valley."""
    def fn(v):
        x = v.item()
        return (math.log(x) - x, torch.tensor([1 / x - 1])) if x > 0 else (-math.inf, torch.tensor([math.nan]))

    found = maximise(fn, torch.tensor([80.0]), 100, 1e-10)
    assert found.converged and abs(found.point.item() - 1) < 1e-9

    def valley(v):
        v = v.detach().requires_grad_()
        value = -((1 - v[0]) ** 2 + 100 * (v[1] - v[0] ** 2) ** 2)
        return value.item(), torch.autograd.grad(value, v)[0]

    found = maximise(valley, torch.tensor([-1.2, 1.0]), 200, 1e-9)
    assert found.converged and torch.allclose(found.point, torch.ones(2), atol=1e-8)
    assert not maximise(valley, torch.tensor([-1.2, 1.0]), 3, 1e-9).converged


# Maximum likelihood


def test_nile_as_statsmodels():
    import statsmodels.api as sm

    model = Level(3000.0, 3000.0)
    found = seq.maximum_likelihood(seq.KalmanFilter(model), nile())
    assert found.converged and found.num_observations == 100 and found.num_parameters == 2
    theirs = sm.tsa.UnobservedComponents(nile().numpy(), "llevel", use_exact_diffuse=True)
    ours = found.table.loc[["noise", "level"]]
    assert found.log_likelihood == pytest.approx(theirs.loglike(ours.estimate.to_numpy()), abs=1e-7)
    assert np.abs(theirs.score(ours.estimate.to_numpy())).max() < 1e-6
    result = theirs.smooth(ours.estimate.to_numpy(), cov_type="approx", cov_kwds={"approx_complex_step": True})
    assert np.allclose(ours.std_error, result.bse, rtol=1e-4)
    # Durbin and Koopman (2012, table 2.1): 15099 and 1469.1
    assert np.allclose(ours.estimate, [15099, 1469.1], rtol=1e-4)
    assert found.aic == pytest.approx(4 - 2 * found.log_likelihood)
    assert found.bic == pytest.approx(2 * math.log(100) - 2 * found.log_likelihood)
    assert "log likelihood -633.4646" in repr(found) and "std_error" in repr(found)
    at_optimum = seq.expectation_maximization(seq.KalmanFilter(model), nile(), tol=1e-9)
    assert at_optimum.converged and at_optimum.num_iterations <= 2
    assert np.allclose(at_optimum.table, found.table, rtol=1e-3)


def test_sunspots_as_statsmodels():
    import statsmodels.api as sm
    from statsmodels.datasets import sunspots

    x = sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()[-80:]
    found = seq.maximum_likelihood(seq.KalmanFilter(StationaryAR2()), torch.tensor(x))
    assert list(found.table.index) == ["c", "phi[0]", "phi[1]", "variance"] and found.converged
    theirs = sm.tsa.SARIMAX(x, order=(2, 0, 0), trend="c")
    result = theirs.smooth(found.table.estimate.to_numpy(), cov_type="approx", cov_kwds={"approx_complex_step": True})
    assert found.log_likelihood == pytest.approx(result.llf, abs=1e-5)
    assert np.abs(theirs.score(found.table.estimate.to_numpy())).max() < 1e-3
    assert np.allclose(found.table.std_error, result.bse, rtol=1e-3)
    model = StationaryAR2()
    em = seq.expectation_maximization(seq.KalmanFilter(model), torch.tensor(x))
    assert em.log_likelihood == pytest.approx(result.llf, abs=1e-5)  # there are no latents: one M-step is all
    assert np.allclose(em.table, found.table, rtol=1e-3)


def test_regression_in_closed_form():
    """An AR(1) with a known first value is a regression: estimates, and their covariance."""
    class AR1(seq.SequentialModel):
        def __init__(self):
            super().__init__()
            self.phi, self.variance = torch.nn.Parameter(torch.tensor(0.0)), positive(2.0)
            self.frozen = torch.nn.Parameter(torch.tensor(1.5), requires_grad=False)
            self.held = positive(0.7)
            self.held_unconstrained.requires_grad_(False)

        def start(self, rows):
            return torch.full((rows,), 0.4)

        def step(self, h, x=None):
            return pyro.sample("x", dist.Normal(self.phi * h + 0 * self.frozen * self.held, self.variance.sqrt()), obs=x)

    x = torch.randn(2, 40).cumsum(1)
    before = torch.cat([torch.full((2, 1), 0.4), x[:, :-1]], 1)
    model = AR1()
    found = seq.maximum_likelihood(seq.KalmanFilter(model), x)
    phi = (x * before).sum() / before.square().sum()
    variance = (x - phi * before).square().mean()
    assert np.allclose(found.table.estimate, [phi, variance], rtol=1e-6)
    expected = torch.diag(torch.stack([variance / before.square().sum(), 2 * variance**2 / 80]))
    assert np.allclose(found.covariance, expected, rtol=1e-5, atol=1e-9)
    assert model.frozen == 1.5 and abs(model.held - 0.7) < 1e-12 and abs(model.phi - phi) < 1e-6
    assert np.allclose(found.table.lower, found.table.estimate - 1.959964 * found.table.std_error, rtol=1e-6)


def test_hmm_maximum_likelihood_and_em_agree():
    torch.manual_seed(3)
    truth = HiddenMarkov()
    with torch.no_grad():
        truth.locs.copy_(torch.tensor([-2.0, 2.0]))
    x = truth.simulate([60, 50])["x"]
    start = {k: v + 0.3 for k, v in truth.state_dict().items()}
    found = []
    for learn in (seq.maximum_likelihood, seq.expectation_maximization):
        model = HiddenMarkov()
        model.load_state_dict(start)
        found.append(learn(seq.ForwardBackward(model), x, [60, 50]))
        assert found[-1].converged
    ml, em = found
    assert em.log_likelihood == pytest.approx(ml.log_likelihood, abs=1e-4)
    assert np.allclose(em.table.estimate["locs[0]"], ml.table.estimate["locs[0]"], atol=1e-3)
    assert np.allclose(em.table.std_error["locs[0]"], ml.table.std_error["locs[0]"], rtol=1e-2)
    # logits are determined up to a constant: that direction of each has no standard error, and a note says so
    assert math.isnan(ml.table.std_error["logits[0,0]"]) and "not identified" in ml.notes[0]


def test_an_estimate_at_the_edge():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = seq.maximum_likelihood(seq.KalmanFilter(Level(0.5, 1.0, 1.0)), torch.randn(1, 60))
    assert found.table.estimate["level"] < 1e-3 and math.isnan(found.table.std_error["level"])
    assert 0.1 < found.table.std_error["noise"] < 0.4 and "'level'" in found.notes[-1]


def test_standard_errors_beside_an_edge():
    """Those of the other parameters are the ones of the model in which what went to the edge is fixed, a curvature of the other
    sign among them, as a search that ends early finds it."""
    torch.manual_seed(0)
    t = torch.arange(60, dtype=torch.float64)
    x = (0.1 * t + (t % 4 == 0) + 0.5 * torch.randn(60).cumsum(0) + torch.randn(60))[None].double()
    for small in (1e-6, 1e-3):
        at = {"scale": 1.0, "level_scale": 0.5, "trend_scale": small, "seasonal_scale": small}
        model = seq.models.BasicStructural(4, coefficients=at).double()
        found = estimates_at(seq.KalmanFilter(model), Sequences.of(x), Parameters(model), method="", converged=True,
                             num_iterations=0)
        for name in ("trend_scale_unconstrained", "seasonal_scale_unconstrained"):
            getattr(model, name).requires_grad_(False)
        fixed = estimates_at(seq.KalmanFilter(model), Sequences.of(x), Parameters(model), method="", converged=True,
                             num_iterations=0)
        assert found.table.std_error[["trend_scale", "seasonal_scale"]].isna().all()
        assert np.allclose(found.table.std_error[["scale", "level_scale"]], fixed.table.std_error, rtol=1e-6)
        note, = found.notes
        assert "['seasonal_scale', 'trend_scale']" in note and "edge" in note and not fixed.notes


def test_a_search_cut_short():
    with pytest.warns(UserWarning, match="has not converged: max_iter=2"):
        found = seq.maximum_likelihood(seq.KalmanFilter(Level()), nile(), max_iter=2)
    assert not found.converged and "NOT converged" in repr(found) and found.trace[-1] >= found.trace[0]
    with pytest.warns(UserWarning, match="raise max_iter"):
        found = seq.expectation_maximization(seq.KalmanFilter(Level()), nile(), max_iter=2)
    assert not found.converged and len(found.trace) == 3


# Expectation maximisation


def flat_level(seed):
    x, lengths = random_batch(torch.Generator().manual_seed(seed))
    return seq.KalmanFilter(FlatLevel()), (x, lengths), {}


def test_m_steps_go_no_further_than_they_need(monkeypatch):
    """What is below the tolerance of the whole is not searched for: a few evaluations where the last iteration was near."""
    counts = []

    def counted(fn, *args, **kwargs):
        counts.append(0)

        def each(vector):
            counts[-1] += 1
            return fn(vector)

        return maximise(each, *args, **kwargs)

    monkeypatch.setattr("pyro_seq.infer.em.maximise", counted)
    torch.manual_seed(0)
    at = {"mean": [-1.0, 1.0], "ar": [0.5], "scale": 0.7}
    model = seq.models.MarkovSwitchingAutoregression(2, order=1, coefficients=at).double()
    with pytest.warns(UserWarning, match="raise max_iter"):
        seq.expectation_maximization(seq.ForwardBackward(model), torch.randn(1, 12, dtype=torch.float64), max_iter=3)
    assert max(counts[1:]) < 20


@pytest.mark.parametrize("make", [random_linear, flat_level, random_hmm])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fisher_identity(make, seed):
    """At the parameters of the E-step, the gradient of Q is that of the log evidence."""
    method, data, inputs = make(seed)
    sequences = seq.Sequences.of(*data, covariates=inputs)
    parameters = Parameters(method.model)
    expect = _expect_gaussian if isinstance(method, seq.KalmanFilter) else _expect_discrete
    ours = parameters.gradient(expect(method, sequences)())
    assert torch.allclose(ours, parameters.gradient(method.log_evidence(sequences).sum()), atol=1e-9, rtol=1e-8)


def never_falls(make, seeds):
    """expectation_maximization raises if the likelihood does fall; the trace is looked at here again."""
    for seed in seeds:
        method, data, inputs = make(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trace = seq.expectation_maximization(method, *data, max_iter=3, **inputs).trace
        assert all(b >= a - 1e-10 * max(1, abs(a)) for a, b in zip(trace, trace[1:])), seed
        assert trace[-1] > trace[0]


@pytest.mark.parametrize("make", [random_linear, random_hmm])
def test_em_never_falls(make):
    never_falls(make, range(3))


@pytest.mark.slow
@pytest.mark.parametrize("make", [random_linear, random_hmm])
def test_em_never_falls_over_fifty_models(make):
    never_falls(make, range(50))


def test_a_fall_is_an_error(monkeypatch):
    """Here by an M-step that goes astray."""
    monkeypatch.setattr("pyro_seq.infer.em.maximise", lambda fn, start, *_, **__: maximise(fn, start - 3, 0, 1.0))
    with pytest.raises(RuntimeError, match="the log likelihood fell .* look for dropout"):
        seq.expectation_maximization(seq.KalmanFilter(Level()), nile())


# Mistakes


class Pinned(Level):
    def transition(self, z):
        return pyro.sample("z", dist.Delta(z * self.level))


class Computed(Level):
    def transition(self, z):
        return self.level * pyro.sample("z", dist.Normal(z, 1.0))


class Stray(Level):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, pyro.param("s", torch.tensor(1.0))), obs=x)


def level_at_nan():
    model = Level()
    model.level_unconstrained.data.fill_(math.nan)
    return model


def kf(model):
    return seq.KalmanFilter(model, assume_linear=True)


ML, EM = seq.maximum_likelihood, seq.expectation_maximization
MISTAKES = {
    "nothing to learn": (ML, lambda: kf(LocalLevel()), ValueError, "LocalLevel has no trainable parameter"),
    "priors": (ML, lambda: kf(Bayesian()), ValueError, r"\['phi', 'noise'\] of Bayesian are random"),
    "a model": (ML, Level, TypeError, "takes a method that computes the evidence, not a model"),
    "a class": (ML, lambda: seq.KalmanFilter, TypeError, "not the class KalmanFilter"),
    "no evidence": (ML, lambda: 3, TypeError, "with an exact log_evidence"),
    "statements": (ML, lambda: kf(Stray()), ValueError, r"pyro.param statements \['s'\] in its step"),
    "a bad start": (ML, lambda: kf(level_at_nan()), ValueError, "NaN"),
    "a Delta": (EM, lambda: kf(Pinned(initial=1.0)), ValueError, "site 'z' of Pinned has no density"),
    "a computed state": (EM, lambda: kf(Computed(initial=1.0)), ValueError, "Computed carries is computed with its parameters"),
    "no states": (EM, lambda: seq.ParticleFilter(Level()), TypeError, "takes a KalmanFilter or a ForwardBackward"),
}


@pytest.mark.parametrize("learn, make, kind, message", MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes(learn, make, kind, message):
    with pytest.raises(kind, match=message):
        learn(make(), torch.tensor([[1.0, 2.0, 3.0]]))


# The marginal model


def test_marginal_is_prior_times_evidence():
    model = Bayesian()
    x = torch.randn(3, 6)
    x[0, 2] = torch.nan
    marginal = seq.Marginal(seq.KalmanFilter(model))
    values = {"phi": torch.tensor(0.3), "noise": torch.tensor(0.9)}
    tr = poutine.trace(poutine.condition(marginal, data=values)).get_trace(x, [6, 4, 5])
    assert {name for name in tr.nodes if tr.nodes[name]["type"] == "sample"} == {"phi", "noise", "log_evidence"}
    with poutine.condition(data=values):
        evidence = seq.KalmanFilter(model).log_evidence(x, [6, 4, 5])
    prior = dist.Normal(0.5, 0.2).log_prob(torch.tensor(0.3)) + dist.LogNormal(0.03, 0.2).log_prob(torch.tensor(0.9))
    assert torch.allclose(tr.log_prob_sum(), prior + evidence.sum())
    assert torch.allclose(tr.nodes["_RETURN"]["value"], evidence)
    with torch.no_grad():  # at the values of this call, too
        tr = poutine.trace(poutine.condition(marginal, data=values)).get_trace(x, [6, 4, 5], plate_size=30)
    assert torch.allclose(tr.log_prob_sum(), prior + 10 * evidence.sum()) and not tr.log_prob_sum().requires_grad


def test_svi_finds_the_maximum():
    model = Level(1.0, 1.0, 1.0)
    x = torch.randn(2, 30).cumsum(1) + torch.randn(2, 30)
    svi = SVI(seq.Marginal(seq.KalmanFilter(model)), lambda *_: None, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(100):
        svi.step(x)
    assert pyro.param("level").item() == pytest.approx(model.level.item())
    trained = model.level.item(), model.noise.item()
    found = seq.maximum_likelihood(seq.KalmanFilter(model), x)
    assert np.allclose(found.table.estimate, trained, rtol=0.02)


def grid_posterior(x):
    """Mean and variance of the two log variances of BayesianLevel, by summation over a fine grid."""
    model = Level(initial=1.0)
    method = seq.KalmanFilter(model, assume_linear=True)
    axis = torch.linspace(-3.4, 2.9, 15)
    logs = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    density = []
    with torch.no_grad():
        for point in logs:
            model.level, model.noise = point.exp()
            density.append(method.log_evidence(x).sum())
    prior = dist.InverseGamma(3.0, torch.tensor([1.0, 2.0])).log_prob(logs.exp()).sum(-1) + logs.sum(-1)
    weights = (torch.stack(density) + prior).softmax(0)
    mean = weights @ logs
    return mean, (weights @ (logs - mean).square()).sqrt()


@pytest.fixture(scope="module")
def small():
    torch.set_default_dtype(torch.float64)
    x = torch.tensor([[0.3, -0.4, 0.9, 1.8, 0.7, 1.5, 2.2, 1.1]])
    return x, grid_posterior(x)


def test_laplace_and_normal_guides_run(small):
    x, (mean, std) = small
    marginal = seq.Marginal(seq.KalmanFilter(BayesianLevel()))
    for kind, steps in ((AutoNormal, 150), (AutoLaplaceApproximation, 60)):
        pyro.clear_param_store()
        guide = kind(marginal)
        svi = SVI(marginal, guide, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(steps):
            svi.step(x)
        found = guide if kind is AutoNormal else guide.laplace_approximation(x)
        median = torch.stack([found.median()[name].log() for name in ("level", "noise")])
        assert ((median - mean).abs() < std).all()
    draws = Predictive(marginal, guide=guide, num_samples=3)(x)
    assert draws["level"].shape[0] == 3


def test_nuts_and_gibbs_agree_with_a_grid(small):
    """Two ways to the same posterior, against summation. Each of the means is off by more than 4.5 of its Monte Carlo
    standard errors with probability below 1e-5; the grid's own error is below 0.01."""
    x, (mean, std) = small
    for kernel, count, warmup in ((NUTS(seq.Marginal(seq.KalmanFilter(BayesianLevel())), max_tree_depth=3), 60, 60),
                                  (seq.Gibbs(seq.KalmanFilter(BayesianLevel())), 200, 5)):
        mcmc = MCMC(kernel, num_samples=count, warmup_steps=warmup, disable_progbar=True)
        mcmc.run(x)
        draws = torch.stack([mcmc.get_samples()[name].log() for name in ("level", "noise")], -1)
        size = pyro.ops.stats.effective_sample_size(draws[None])
        assert (size > 12).all()
        assert ((draws.mean(0) - mean).abs() < 4.5 * std / size.sqrt() + 0.01).all()
    assert kernel.updates == {"level": "inverse gamma", "noise": "inverse gamma"}
    assert mcmc.diagnostics()["update"]["chain 0"] == kernel.updates
    states = seq.Marginal(seq.KalmanFilter(BayesianLevel())).states({k: v[:4] for k, v in mcmc.get_samples().items()}, x)
    assert states.samples["z"].shape == (4, 1, 8) and states.samples["z"].std(0).min() > 0


# Gibbs


class Everything(seq.StateSpaceModel):
    """A switching level: a parameter of every family, and two of none."""

    def __init__(self):
        super().__init__()
        self.first = PyroSample(dist.Beta(2.0, 3.0))
        self.rows = PyroSample(dist.Dirichlet(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).to_event(1))
        self.locs = PyroSample(dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
        self.precision = PyroSample(dist.Gamma(3.0, 2.0))
        self.shift = PyroSample(dist.Laplace(0.0, 1.0))

    def initial(self):
        return pyro.sample("k", dist.Categorical(torch.stack([1 - self.first, self.first])))

    def transition(self, k):
        return pyro.sample("k", dist.Categorical(self.rows[k]))

    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(self.locs[k] + self.shift, self.precision.rsqrt()), obs=x)


def test_families_are_found():
    x = Everything().simulate([30, 20])["x"]
    kernel = seq.Gibbs(seq.ForwardBackward(Everything()))
    first = MCMC(kernel, num_samples=4, warmup_steps=2, disable_progbar=True)
    pyro.set_rng_seed(1)
    first.run(x, [30, 20])
    assert kernel.updates == {"first": "beta", "rows": "Dirichlet", "locs": "normal", "precision": "gamma", "shift": "slice"}
    again = MCMC(seq.Gibbs(seq.ForwardBackward(Everything())), num_samples=4, warmup_steps=2, disable_progbar=True)
    pyro.set_rng_seed(1)
    again.run(x, [30, 20])
    for name, value in first.get_samples().items():
        assert torch.equal(value, again.get_samples()[name])
    assert first.get_samples()["rows"].shape == (4, 2, 2)


def test_conjugate_updates_are_the_closed_form(monkeypatch):
    """Given the states, the posterior of a variance is known."""
    seen = {}

    true = dist.InverseGamma

    def recorded(shape, scale):
        seen["inverse gamma"] = shape, scale
        return true(shape, scale)

    z = torch.randn(2, 9).cumsum(1)
    x = z + torch.randn(2, 9)
    x[1, 3] = torch.nan
    model = BayesianLevel()
    kernel = seq.Gibbs(seq.KalmanFilter(model))
    kernel.setup(0, x, [9, 7])
    complete = CompleteData(model, kernel._sequences, {"z": z})
    values = {"level": torch.tensor(0.7), "noise": torch.tensor(1.3)}
    moves = torch.cat([z[0].diff(), z[1, :7].diff()])
    residuals = torch.cat([(x - z)[0], (x - z)[1, :7]])
    residuals = residuals[~residuals.isnan()]
    monkeypatch.setattr(dist, "InverseGamma", recorded)
    for name, terms, rate in (("level", moves, 1.0), ("noise", residuals, 2.0)):
        kernel._update(name, dict(values), complete)
        shape, scale = seen.pop("inverse gamma")
        assert shape.item() == pytest.approx(3 + len(terms) / 2, rel=1e-8)
        assert scale.item() == pytest.approx(rate + terms.square().sum().item() / 2, rel=1e-8)


def test_complete_data_is_the_declared_joint():
    """Also where the state is a recurrence over all latents so far."""
    for model, x in ((VRNN(), torch.randn(3, 5, 4)), (BayesianLevel(), torch.randn(3, 5))):
        lengths = [5, 3, 4]
        simulated = model.simulate(lengths)
        z = simulated["z"]
        tr = poutine.trace(poutine.condition(model, data={f"z_{t + 1}": z[:, t] for t in range(5)})).get_trace(x, lengths)
        parameters = {name: tr.nodes[name]["value"] for name in model.global_sites()}
        found = CompleteData(model, seq.Sequences.of(x, lengths), {"z": z}).log_joint(parameters)
        assert found == pytest.approx(tr.log_prob_sum().item(), rel=1e-9)


def prior_again(kernel_of, sweeps, replications, seed):
    """Parameters from the prior, data given them, then a few steps of a sampler on that data: since the sampler leaves the
    posterior as it is, the parameters are distributed as the prior again (Geweke, *Getting it right*, 2004). Returns their
    prior probabilities ``(replications, 2)``, independent and uniform."""
    pyro.set_rng_seed(seed)
    model = BayesianLevel()
    priors = {"level": stats.invgamma(3, scale=1.0), "noise": stats.invgamma(3, scale=2.0)}
    kernel = kernel_of(model)
    found = []
    for _ in range(replications):
        values = {name: dist.InverseGamma(3.0, scale).sample() for name, scale in (("level", 1.0), ("noise", 2.0))}
        with poutine.condition(data=values):
            x = model.simulate([6])["x"]
        start = {name: v.log() for name, v in values.items()} if isinstance(kernel, NUTS) else values
        mcmc = MCMC(kernel, num_samples=sweeps, warmup_steps=0, initial_params=start, disable_progbar=True)
        mcmc.run(x)
        found.append([priors[name].cdf(mcmc.get_samples()[name][-1].item()) for name in priors])
    return np.array(found)


def gibbs(model):
    return seq.Gibbs(seq.KalmanFilter(model))


def nuts(model):
    return NUTS(seq.Marginal(seq.KalmanFilter(model)), step_size=0.8, adapt_step_size=False, adapt_mass_matrix=False,
                max_tree_depth=3)


@pytest.mark.parametrize("kernel", [gibbs, nuts])
def test_the_prior_comes_back(kernel):
    """Kolmogorov-Smirnov on two parameters: false alarms in 1 of 1000 runs each."""
    levels = prior_again(kernel, 2, 25, seed=0)
    for column in levels.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [gibbs, nuts])
def test_the_prior_comes_back_sharply(kernel):
    levels = prior_again(kernel, 4, 200, seed=1)
    for column in levels.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3


@pytest.mark.slow
def test_nuts_is_calibrated():
    """Simulation-based calibration (Talts and others, 2018): ranks among 9 thinned draws, 60 replications, chi-square on 5
    bins; false alarms in 1 of 1000 runs a parameter."""
    ranks = []
    for _ in range(60):
        model = BayesianLevel()
        values = {name: dist.InverseGamma(3.0, scale).sample() for name, scale in (("level", 1.0), ("noise", 2.0))}
        with poutine.condition(data=values):
            x = model.simulate([10])["x"]
        mcmc = MCMC(NUTS(seq.Marginal(seq.KalmanFilter(model)), max_tree_depth=3), num_samples=45, warmup_steps=40,
                    disable_progbar=True)
        mcmc.run(x)
        ranks.append([int((mcmc.get_samples()[name][::5] < value).sum()) for name, value in values.items()])
    for column in np.array(ranks).T:
        assert stats.chisquare(np.bincount(column // 2, minlength=5)).pvalue > 1e-3


GIBBS_MISTAKES = {
    "no prior": (lambda: seq.KalmanFilter(Level(initial=1.0)), "Level has no global parameter to draw"),
    "a Delta": (lambda: seq.KalmanFilter(PinnedPrior()), "a latent is a Delta"),
}


class PinnedPrior(BayesianLevel):
    def transition(self, z):
        return pyro.sample("z", dist.Delta(0.9 * z))


@pytest.mark.parametrize("make, message", GIBBS_MISTAKES.values(), ids=list(GIBBS_MISTAKES))
def test_gibbs_mistakes(make, message):
    with pytest.raises(ValueError, match=message):
        MCMC(seq.Gibbs(make()), num_samples=2, warmup_steps=0, disable_progbar=True).run(torch.randn(1, 4))


def test_probabilities_count_one_less_than_their_entries():
    """A chain seen without noise: counts over totals, binomial standard errors, and three free numbers."""
    class Chain(seq.StateSpaceModel):
        def __init__(self):
            super().__init__()
            self.opening = pyro.nn.PyroParam(torch.tensor([0.5, 0.5]), dist.constraints.simplex)
            self.move = pyro.nn.PyroParam(torch.full((2, 2), 0.5), dist.constraints.simplex)

        def initial(self):
            return pyro.sample("k", dist.Categorical(self.opening))

        def transition(self, k):
            return pyro.sample("k", dist.Categorical(self.move[k]))

        def emission(self, k, x=None):
            return pyro.sample("x", dist.Normal(10.0 * k, 0.1), obs=x)

    pyro.set_rng_seed(1)
    states = torch.randint(2, (4, 30))
    found = seq.maximum_likelihood(seq.ForwardBackward(Chain()), 10.0 * states)
    assert found.num_parameters == 3
    for i in range(2):
        left = states[:, :-1] == i
        share = (states[:, 1:][left] == 1).double().mean().item()
        row = found.table.loc[f"move[{i},1]"]
        assert row["estimate"] == pytest.approx(share, abs=1e-4)
        assert row["std_error"] == pytest.approx(math.sqrt(share * (1 - share) / left.sum().item()), rel=1e-3)
