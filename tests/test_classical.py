"""Classical models against statsmodels, brute force and their own definitions."""

import itertools
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import statsmodels.api as sm
import statsmodels.tsa.regime_switching
import torch
from models import ragged
from pyro import poutine
from pyro.nn import PyroSample
from statsmodels.tsa.regime_switching.markov_autoregression import MarkovAutoregression
from statsmodels.tsa.statespace.initialization import Initialization
from statsmodels.tsa.statespace.sarimax import SARIMAX
from statsmodels.tsa.statespace.structural import UnobservedComponents
from test_exact import NILE, VOLATILITY, assert_unbiased, nile, volatility_returns
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian

import pyro_seq as seq
from pyro_seq.models import (
    ARIMA,
    BasicStructural,
    LocalLevel,
    LocalLinearTrend,
    MarkovSwitchingAutoregression,
    StochasticVolatility,
    StructuralModel,
)
from pyro_seq.models.stationary import (
    InvertibleTransform,
    StationaryTransform,
    invertible,
    stationary,
    stationary_covariance,
)

NILE_DIFFUSE = -633.4645635  # all 100 terms, exact diffuse level
NILE_SCALES = {"scale": math.sqrt(15099.0), "level_scale": math.sqrt(1469.1)}


def sunspots():
    return np.sqrt(sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()[-120:])


def carbon_dioxide():
    """Monthly means in percent of log; the first years have gaps of their own."""
    weekly = sm.datasets.co2.load_pandas().data["co2"]
    return 100 * np.log(weekly.resample("MS").mean().to_numpy()[:150])


def macro():
    """Log real consumption, and investment as its covariate."""
    data = sm.datasets.macrodata.load_pandas().data
    return 100 * np.log(data["realcons"].to_numpy()), 100 * np.log(data[["realinv"]].to_numpy())


def with_gaps(x):
    x = np.array(x, dtype=float)
    x[[7, 30, 31, 32, 33, 34, 60]] = np.nan
    return x


def close(ours, theirs, tolerance=1e-7, size=None):
    """:param size: beside which an error is small, where ``theirs`` may be zero."""
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * (np.abs(theirs).max() if size is None else size))


def exactly(model):
    """A statsmodels model whose filter does not stop at a steady state that is only near."""
    model.ssm.tolerance = 0
    return model


# Coefficients of stationary autoregressions and invertible moving averages.


@pytest.mark.parametrize("order", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("transform, constraint", [(StationaryTransform(), stationary), (InvertibleTransform(), invertible)])
def test_transform_is_onto_stationary_coefficients(order, transform, constraint):
    u = 2 * torch.randn(50, order)
    coefficients = transform(u)
    assert constraint.check(coefficients).all()
    phi = coefficients if constraint is stationary else -coefficients
    for row in phi.numpy():
        companion = np.vstack([row, np.eye(order)[:-1]])
        assert np.abs(np.linalg.eigvals(companion)).max() < 1
    again = StationaryTransform() if constraint is stationary else InvertibleTransform()
    close(again.inv(coefficients), u.numpy(), 1e-5)
    u = u[:5] / 2
    expected = [torch.linalg.slogdet(jacobian(transform, row)).logabsdet for row in u]
    close(transform.log_abs_det_jacobian(u, transform(u)), np.array(expected), 1e-9)


def test_constraint_tells_roots_outside_the_unit_circle():
    phi = torch.randn(2000, 3)
    radius = [np.abs(np.linalg.eigvals(np.vstack([row, np.eye(3)[:-1]]))).max() for row in phi.numpy()]
    assert (stationary.check(phi).numpy() == (np.array(radius) < 1)).all()
    assert (invertible.check(-phi) == stationary.check(phi)).all()
    assert 0 < stationary.check(phi).sum() < 2000


@pytest.mark.parametrize("radius", [0.0, 0.5, 0.999, 1 - 1e-9])
def test_stationary_covariance(radius):
    m = torch.randn(4, 4)
    m = radius * m / torch.linalg.eigvals(m).abs().max()
    noise = torch.eye(4) + torch.ones(4, 4)
    found = stationary_covariance(m, noise)
    close(m @ found @ m.T + noise, found.numpy(), 1e-10)
    if radius < 0.9999:
        close(found, scipy.linalg.solve_discrete_lyapunov(m.numpy(), noise.numpy()), 1e-9)


def test_every_parameter_learned_stays_stationary():
    model = ARIMA((2, 0, 2))
    for p in model.parameters():
        p.data += 10 * torch.randn_like(p)
    assert stationary.check(model.ar) and invertible.check(model.ma) and model.scale > 0


# ARIMA against SARIMAX.

ARMA = {"ar": [0.5, 0.2], "ma": [-0.4], "scale": 1.3}
CASES = {
    "white noise": (sunspots, (0, 0, 0), (0, 0, 0, 0), "n", {"scale": 6.0}),
    "AR": (sunspots, (2, 0, 0), (0, 0, 0, 0), "n", {"ar": [1.2, -0.5], "scale": 1.3}),
    "MA": (sunspots, (0, 0, 3), (0, 0, 0, 0), "c", {"ma": [-0.4, 0.2, 0.1], "scale": 1.7, "trend": [5.0]}),
    "ARMA": (sunspots, (2, 0, 1), (0, 0, 0, 0), "c", {**ARMA, "trend": [0.7]}),
    "ARMA with drift": (sunspots, (2, 0, 1), (0, 0, 0, 0), "ct", {**ARMA, "trend": [0.7, 0.01]}),
    "seasonal ARMA": (sunspots, (1, 0, 1), (1, 0, 1, 11), "n",
                      {"ar": [0.5], "ma": [-0.4], "seasonal_ar": [0.6], "seasonal_ma": [0.3], "scale": 1.3}),
    "common factors": (sunspots, (1, 0, 1), (0, 0, 0, 0), "n", {"ar": [0.5], "ma": [-0.5], "scale": 6.0}),
    "ARIMA": (nile, (1, 1, 1), (0, 0, 0, 0), "n", {"ar": [0.3], "ma": [-0.8], "scale": 140.0}),
    "ARIMA with drift": (sunspots, (1, 1, 1), (0, 0, 0, 0), "t", {"ar": [0.5], "ma": [-0.4], "scale": 1.3, "trend": [0.01]}),
    "twice integrated": (sunspots, (2, 2, 1), (0, 0, 0, 0), "c", {**ARMA, "trend": [0.01]}),
    "airline": (carbon_dioxide, (0, 1, 1), (0, 1, 1, 12), "n", {"ma": [-0.4], "seasonal_ma": [-0.6], "scale": 0.1}),
    "seasonal ARIMA": (carbon_dioxide, (2, 1, 1), (1, 1, 1, 12), "c",
                       {"ar": [0.3, 0.1], "ma": [-0.4], "seasonal_ar": [0.2], "seasonal_ma": [-0.6], "scale": 0.1,
                        "trend": [0.01]}),
    "twice seasonal": (carbon_dioxide, (1, 0, 0), (0, 2, 0, 4), "n", {"ar": [0.3], "scale": 2.0}),
}


def sarimax(x, order, seasonal_order, trend, coefficients, exog=None):
    model = SARIMAX(np.asarray(x), exog=exog, order=order, seasonal_order=seasonal_order, trend=trend, use_exact_diffuse=True)
    names = ("trend", "regression", "ar", "ma", "seasonal_ar", "seasonal_ma")
    parameters = [*itertools.chain.from_iterable(coefficients.get(name, []) for name in names), coefficients["scale"] ** 2]
    return exactly(model).smooth(parameters)


def compare_levels(posterior, result, scale):
    """Log likelihood, and the level without regression, filtered and smoothed, wherever it is identified."""
    assert abs(posterior.total_log_evidence - result.llf) < 1e-8 * abs(result.llf)
    design = result.model.ssm["design"][0]
    design = design[:, -1] if design.ndim == 2 else design
    known = result.filter_results.nobs_diffuse
    for moments, mean, covariance, start in (
            (posterior.smoothed["level"], result.smoothed_state, result.smoothed_state_cov, 0),
            (posterior.filtered["level"], result.filtered_state, result.filtered_state_cov, known)):
        close(moments.mean[0, start:], (design @ mean)[start:], 1e-6)
        variance = np.einsum("i,ijt,j->t", design, covariance, design)
        close(moments.variance[0, start:], variance[start:], 1e-6, scale**2)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_arima_is_sarimax(case, gaps):
    data, order, seasonal_order, trend, coefficients = CASES[case]
    x = np.asarray(data())
    x = with_gaps(x) if gaps else x
    model = ARIMA(order, seasonal_order, trend, coefficients=coefficients)
    posterior = seq.KalmanFilter(model).run(torch.tensor(x))
    compare_levels(posterior, sarimax(x, order, seasonal_order, trend, coefficients), coefficients["scale"])
    seen = ~np.isnan(x)
    close(posterior.smoothed["level"].mean[0][seen], x[seen], 1e-8)


def test_regression_with_arima_noise_is_sarimax():
    x, u = macro()
    x = with_gaps(x)
    coefficients = {"ar": [0.4], "regression": [0.1], "scale": 0.6}
    model = ARIMA((1, 1, 0), num_covariates=1, coefficients=coefficients)
    posterior = seq.KalmanFilter(model).run(torch.tensor(x), u=torch.tensor(u)[None])
    compare_levels(posterior, sarimax(x, (1, 1, 0), (0, 0, 0, 0), "n", coefficients, u), 0.6)


def test_forecast_is_that_of_sarimax():
    """A mean of 20 000 draws is within 5 of its standard errors: each of the 24 fails once in 1.7 million."""
    _, order, seasonal_order, trend, coefficients = CASES["seasonal ARIMA"]
    x = carbon_dioxide()
    draws = seq.KalmanFilter(ARIMA(order, seasonal_order, trend, coefficients=coefficients)).run(torch.tensor(x)).predict(
        24, num_samples=20_000)
    forecast = sarimax(x, order, seasonal_order, trend, coefficients).get_forecast(24)
    error = np.abs(draws.mean("x")[0].numpy() - forecast.predicted_mean)
    assert (error < 5 * forecast.se_mean / math.sqrt(20_000)).all()
    # The relative standard error of a standard deviation is 1 / sqrt(2 n).
    assert (np.abs(draws.std("x")[0].numpy() / forecast.se_mean - 1) < 5 / math.sqrt(40_000)).all()


# Structural models against UnobservedComponents.

SCALES = {"scale": 0.3, "level_scale": 0.2, "trend_scale": 0.05, "seasonal_scale": 0.1, "cycle_scale": 0.3}
WAVE = {"cycle_frequency": 0.5, "cycle_damping": 0.95}
STRUCTURES = {
    "local level": (LocalLevel, {}, {"level": "llevel"}),
    "local linear trend": (LocalLinearTrend, {}, {"level": "lltrend"}),
    "smooth trend": (LocalLinearTrend, {"fixed": ["level"]}, {"level": "strend"}),
    "straight line": (LocalLinearTrend, {"fixed": ["level", "trend"]}, {"level": "dtrend"}),
    "basic structural": (BasicStructural, {"season": 12}, {"level": "lltrend", "seasonal": 12}),
    "fixed season": (BasicStructural, {"season": 12, "fixed": ["trend", "seasonal"]},
                     {"level": "lldtrend", "seasonal": 12, "stochastic_seasonal": False}),
    "season of two": (StructuralModel, {"seasonal": 2}, {"level": "llevel", "seasonal": 2}),
    "season alone": (StructuralModel, {"level": False, "seasonal": 4}, {"irregular": True, "seasonal": 4}),
    "cycle": (StructuralModel, {"cycle": 12.0}, {"level": "llevel", "cycle": True}),
    "cycle alone": (StructuralModel, {"level": False, "cycle": 12}, {"irregular": True, "cycle": True}),
    "all": (StructuralModel, {"trend": True, "seasonal": 4, "cycle": 12}, {"level": "lltrend", "seasonal": 4, "cycle": True}),
}


def unobserved(x, exog=None, **options):
    """The model of statsmodels, its cycle stationary from the start."""
    if options.get("cycle"):
        options |= {"stochastic_cycle": True, "damped_cycle": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deterministic specifications
        model = UnobservedComponents(np.asarray(x), exog=exog, use_exact_diffuse=True, **options)
    if options.get("cycle"):
        start = Initialization(model.k_states)
        if model.k_states > 2:
            start.set((0, model.k_states - 2), "diffuse")
        start.set((model.k_states - 2, model.k_states), "stationary")
        model.ssm.initialization = start
    return exactly(model)


def parameters_of(theirs, ours):
    names = {"sigma2.irregular": "scale", "frequency.cycle": "cycle_frequency", "damping.cycle": "cycle_damping",
             "sigma2.level": "level_scale", "sigma2.trend": "trend_scale", "sigma2.seasonal": "seasonal_scale",
             "sigma2.cycle": "cycle_scale"}
    given = {**SCALES, **WAVE, **ours}

    def value(name):
        if name.startswith("beta"):
            return given["regression"][0]
        found = given[next(v for k, v in names.items() if name.startswith(k))]
        return found**2 if name.startswith("sigma2") else found

    return [value(name) for name in theirs.param_names]


def compare_components(posterior, result):
    assert abs(posterior.total_log_evidence - result.llf) < 1e-8 * abs(result.llf)
    known = result.filter_results.nobs_diffuse
    at = {"level": 0, "trend": 1, "seasonal": sum(site in posterior.smoothed for site in ("level", "trend")),
          "cycle": len(result.smoothed_state) - 2}
    for site in ("level", "trend", "seasonal", "cycle"):
        if site not in posterior.smoothed:
            continue
        i = at[site]
        for moments, mean, covariance, start in (
                (posterior.smoothed[site], result.smoothed_state, result.smoothed_state_cov, 0),
                (posterior.filtered[site], result.filtered_state, result.filtered_state_cov, known)):
            close(moments.mean[0, start:], mean[i, start:], 1e-6)
            close(moments.variance[0, start:], covariance[i, i, start:], 1e-6)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("case", STRUCTURES)
def test_structural_is_unobserved_components(case, gaps):
    kind, options, theirs = STRUCTURES[case]
    x = with_gaps(carbon_dioxide()) if gaps else carbon_dioxide()
    x = x - np.nanmean(x)
    model = kind(**options)
    names = [name for name in {**SCALES, **WAVE} if name in model._pyro_params]
    assert len(names) == len(list(model.parameters()))
    model = kind(**options, coefficients={name: {**SCALES, **WAVE}[name] for name in names})
    other = unobserved(x, **theirs)
    compare_components(seq.KalmanFilter(model).run(torch.tensor(x)), other.smooth(parameters_of(other, {})))


def test_structural_regression_is_unobserved_components():
    x, u = macro()
    model = LocalLevel(num_covariates=1, coefficients={"scale": 0.3, "level_scale": 0.2, "regression": [0.1]})
    other = unobserved(x, exog=u, level="llevel")
    posterior = seq.KalmanFilter(model).run(torch.tensor(x), u=torch.tensor(u)[None])
    compare_components(posterior, other.smooth(parameters_of(other, {"regression": [0.1]})))


def test_proper_start_is_that_of_unobserved_components():
    x = carbon_dioxide()
    model = LocalLinearTrend(coefficients={"scale": 0.3, "level_scale": 0.2, "trend_scale": 0.05},
                             initial={"level": dist.Normal(575.0, 3.0), "trend": dist.Normal(0.1, 0.5)})
    other = unobserved(x, level="lltrend")
    other.ssm.initialize_known(np.array([575.0, 0.1]), np.diag([9.0, 0.25]))
    compare_components(seq.KalmanFilter(model).run(torch.tensor(x)), other.smooth(parameters_of(other, {})))


@pytest.mark.parametrize("initial, expected", [(None, NILE_DIFFUSE), ({"level": dist.Normal(1000.0, math.sqrt(1e5))}, NILE)])
def test_nile(initial, expected):
    found = seq.KalmanFilter(LocalLevel(coefficients=NILE_SCALES, initial=initial)).run(nile()).total_log_evidence
    assert abs(found - expected) < 1e-6


def test_maximum_likelihood_on_the_nile():
    """Durbin and Koopman, 2012, section 2.10.3: variances 15099 and 1469.1."""
    model = LocalLevel(coefficients={"scale": 100.0, "level_scale": 100.0})
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = -seq.KalmanFilter(model).log_evidence(nile()).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert abs(model.scale.item() ** 2 - 15099) < 5 and abs(model.level_scale.item() ** 2 - 1469.1) < 2


# One declaration, any series of a batch and any parameters.

SMALL = {
    "arma": lambda: ARIMA((1, 0, 1), trend="c", coefficients={"ar": [0.5], "ma": [0.3], "trend": [0.2]}),
    "arima": lambda: ARIMA((1, 1, 1), (0, 1, 0, 2), trend="t", coefficients={"ar": [0.5], "ma": [0.3], "trend": [0.02]}),
    "structural": lambda: StructuralModel(trend=True, seasonal=3, cycle=6, fixed=["trend"]),
}


@pytest.mark.parametrize("make", SMALL.values(), ids=list(SMALL))
def test_a_ragged_batch_is_its_sequences(make):
    lengths = [14, 11, 9]
    x = torch.randn(3, 14).cumsum(1)
    x[0, 4] = torch.nan
    together = seq.KalmanFilter(make()).run(ragged(x, lengths), lengths)
    for b, n in enumerate(lengths):
        alone = seq.KalmanFilter(make()).run(x[b, :n])
        assert abs(together.log_evidence[b] - alone.log_evidence[0]) < 1e-9
        close(together.smoothed["level"].mean[b, :n], alone.smoothed["level"].mean[0].numpy(), 1e-8)


@pytest.mark.parametrize("make", SMALL.values(), ids=list(SMALL))
def test_gradients(make):
    model, x = make(), torch.randn(1, 12).cumsum(1)
    method = seq.KalmanFilter(model)
    parameters = list(model.parameters())

    def evidence(*values):
        for parameter, value in zip(parameters, values):
            parameter.data.copy_(value.detach())
        return method.log_evidence(x).sum()

    assert len(parameters) >= 4
    start = [p.detach().clone() for p in parameters]
    expected = torch.autograd.grad(method.log_evidence(x).sum(), parameters)
    for i, gradient in enumerate(expected):
        for j in range(gradient.numel()):
            step = 1e-5
            ends = []
            for sign in (1, -1):
                moved = [v.clone() for v in start]
                moved[i].view(-1)[j] += sign * step
                ends.append(evidence(*moved).item())
            found = (ends[0] - ends[1]) / (2 * step)
            assert abs(found - gradient.reshape(-1)[j]) < 1e-6 * (1 + abs(found)), (i, j)


def test_gradients_where_factors_cancel():
    """The stationary covariance is singular there, and its gradient is not."""
    x, model = torch.randn(1, 12), ARIMA((1, 0, 1))
    model.ar = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    model.ma = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def evidence(ar, ma):
        return model.within(lambda: seq.KalmanFilter(model).log_evidence(x).sum(), globals={"ar": ar, "ma": ma})

    inputs = (torch.tensor([0.5], requires_grad=True), torch.tensor([-0.5], requires_grad=True))
    assert gradcheck(evidence, inputs, eps=1e-6, atol=1e-5)


PRIORS = {
    "ar": (lambda: ARIMA((1, 0, 1)), dist.Uniform(-1.0, 1.0).expand([1]).to_event(1), [0.3]),
    "scale": (lambda: ARIMA((1, 1, 1)), dist.LogNormal(0.0, 1.0), 0.7),
    "trend": (lambda: ARIMA((0, 1, 1), trend="c"), dist.Normal(0.0, 1.0).expand([1]).to_event(1), [0.4]),
    "level_scale": (lambda: BasicStructural(4), dist.HalfNormal(1.0), 0.4),
    "cycle_damping": (lambda: StructuralModel(cycle=5), dist.Beta(9.0, 1.0), 0.8),
    "rho": (StochasticVolatility, dist.Uniform(-1.0, 1.0), 0.8),
    "regression": (lambda: LocalLevel(num_covariates=2), dist.Normal(torch.zeros(2), 1.0).to_event(1), [0.5, -1.0]),
    "mean": (lambda: MarkovSwitchingAutoregression(2, 1), dist.Normal(torch.zeros(2), 1.0).to_event(1), [-0.5, 0.6]),
    "transition": (lambda: MarkovSwitchingAutoregression(2, 1), dist.Dirichlet(torch.ones(2, 2)).to_event(1),
                   [[0.7, 0.3], [0.4, 0.6]]),
}


@pytest.mark.parametrize("name", PRIORS)
def test_any_parameter_takes_a_prior(name):
    make, prior, value = PRIORS[name]
    x = torch.randn(1, 15)
    inputs = {"u": torch.randn(1, 15, 2)} if name == "regression" else {}
    fixed, bayesian = make(), make()
    setattr(fixed, name, torch.tensor(value))
    setattr(bayesian, name, PyroSample(prior))
    found = []
    for model in (fixed, bayesian):
        pyro.set_rng_seed(1)
        kalman = not isinstance(model, (StochasticVolatility, MarkovSwitchingAutoregression))
        method = seq.KalmanFilter(model) if kalman else seq.ParticleFilter(model, 200)
        with poutine.condition(data={name: torch.tensor(value)}):
            found.append(method.run(x, **inputs).total_log_evidence)
    assert bayesian.global_sites() == [name]
    assert abs(found[0] - found[1]) < 1e-9


@pytest.mark.parametrize("make", [SMALL["arma"], lambda: ARIMA((1, 0, 0), (1, 0, 1, 4))])
def test_simulated_processes_are_stationary_from_the_start(make):
    """Variances of 20 000 draws within 5 standard errors, sqrt(2 / n) of them each, at the first and last step."""
    model = make()
    x = model.simulate([12] * 20_000)["x"]
    with torch.no_grad():
        ar, gain = model._harvey()
        transition = torch.cat([ar[:, None], torch.eye(len(ar))[:, :-1]], 1)
        expected = stationary_covariance(transition, model.scale**2 * torch.outer(gain, gain))[0, 0]
        mean = float(model.trend.sum()) / (1 - ar.sum())
    for t in (0, 11):
        assert abs(x[:, t].var() / expected - 1) < 5 * math.sqrt(2 / 20_000)
        assert abs(x[:, t].mean() - mean) < 5 * expected.sqrt() / math.sqrt(20_000)


def test_particle_filter_of_a_structural_model_is_unbiased():
    model = StructuralModel(cycle=6, initial={"level": dist.Normal(0.0, 1.0)})
    x = model.simulate([8])["x"]
    exact = seq.KalmanFilter(model).run(x).total_log_evidence
    assert_unbiased(seq.ParticleFilter(model, 200).run(x.expand(300, -1)).log_evidence, exact)


# Stochastic volatility by quadrature, on the densities as declared.


def test_volatility_by_quadrature(data_dir):
    model = StochasticVolatility({"mu": -1.02, "rho": 0.9702, "sigma": 0.178})
    grid = torch.linspace(-1.02 - 6, -1.02 + 6, 1201)
    width = grid[1] - grid[0]
    with torch.no_grad():
        first = poutine.trace(model.initial).get_trace().nodes["z"]["fn"].log_prob(grid)
        moved = poutine.trace(model.transition).get_trace(grid).nodes["z"]["fn"]
        kernel = moved.log_prob(grid[:, None]).exp()  # to rows, from columns
        seen = poutine.trace(model.emission).get_trace(grid).nodes["x"]["fn"]
        density, total = first.exp(), 0.0
        for t, x in enumerate(volatility_returns(data_dir)):
            if t:
                density = kernel @ density * width
            density = density * seen.log_prob(x).exp()
            norm = density.sum() * width
            total, density = total + norm.log(), density / norm
    assert abs(total - VOLATILITY) < 1e-7


# Hamilton's model by brute force and against statsmodels.


def enumerated(model, x):
    """Log evidence of one short sequence: the declared density summed over every history of regimes."""
    k, p = model.sizes
    terms = []
    for history in itertools.product(range(k), repeat=p + len(x)):
        data = {f"{name}_{t + 1}": torch.tensor([history[t + p - lag]])
                for t in range(len(x)) for lag in range(p + 1) for name in [f"regime_{lag}" if lag else "regime"]}
        with poutine.condition(data=data):
            terms.append(poutine.trace(model).get_trace(x[None]).log_prob_sum())
    return torch.stack(terms).logsumexp(0).item()


def by_definition(x, mean, ar, scale, transition):
    """Hamilton's equation over every history, given the first p values; ``ar`` is ``(K, p)``, ``scale`` ``(K,)``."""
    k, p = ar.shape
    stationary = np.linalg.matrix_power(transition, 1000)[0]
    total = 0.0
    for s in itertools.product(range(k), repeat=len(x)):
        term = stationary[s[0]] * np.prod([transition[j, i] for j, i in itertools.pairwise(s)])
        for t in range(p, len(x)):
            loc = mean[s[t]] + sum(ar[s[t], i] * (x[t - 1 - i] - mean[s[t - 1 - i]]) for i in range(p))
            term *= math.exp(-0.5 * ((x[t] - loc) / scale[s[t]]) ** 2) / scale[s[t]] / math.sqrt(2 * math.pi)
        total += term
    return math.log(total)


def switching_coefficients(switching_ar, switching_scale, order):
    ar = [[0.4, -0.2][:order], [0.1, 0.3][:order]]
    return {"mean": [-1.0, 1.5], "ar": ar if switching_ar else ar[0], "transition": [[0.9, 0.1], [0.3, 0.7]],
            "scale": [0.5, 1.2] if switching_scale else 0.8}


@pytest.mark.parametrize("switching_ar, switching_scale, order", [(False, False, 1), (True, False, 2), (False, True, 2),
                                                                   (True, True, 1)])
def test_switching_is_hamiltons(switching_ar, switching_scale, order):
    x = torch.randn(6)
    values = switching_coefficients(switching_ar, switching_scale, order)
    model = MarkovSwitchingAutoregression(2, order, switching_ar, switching_scale, past=x[:order].flip(0),
                                          coefficients=values)
    found = enumerated(model, x[order:])
    transition, mean = np.array(values["transition"]), np.array(values["mean"])
    ar = np.broadcast_to(values["ar"], (2, order))
    scale = np.broadcast_to(values["scale"], 2)
    assert abs(found - by_definition(x.numpy(), mean, ar, scale, transition)) < 1e-9
    if switching_scale and order > 1:
        return  # statsmodels 0.15 takes the variance of an earlier regime
    other = MarkovAutoregression(x.numpy(), 2, order, switching_ar=switching_ar, switching_variance=switching_scale)
    named = {"p[0->0]": transition[0, 0], "p[1->0]": transition[1, 0], "sigma2": scale[0] ** 2}
    for k in range(2):
        named |= {f"const[{k}]": mean[k], f"sigma2[{k}]": scale[k] ** 2}
        named |= {f"ar.L{i + 1}{suffix}": ar[k, i] for i in range(order) for suffix in ("", f"[{k}]")}
    assert abs(found - other.loglike(np.array([named[name] for name in other.param_names]))) < 1e-9


def test_business_cycle():
    """Hamilton, 1989, table I: growth of real GNP, 1951 to 1984, order 4. The log likelihood is -181.26339."""
    source = Path(statsmodels.tsa.regime_switching.__file__).parent / "tests" / "test_markov_autoregression.py"
    if not source.exists():
        pytest.skip("statsmodels was installed without its tests, which hold the series")
    growth = np.array(json.loads(re.search(r"^rgnp = (\[.*?\])", source.read_text(), re.S | re.M)[1]))
    stay, leave = 0.754673, 0.0959153
    mean, scale, ar = [-0.3588127, 1.163517], math.exp(-0.262658), [0.013486, -0.0575211, -0.2469833, -0.2129214]
    model = MarkovSwitchingAutoregression(2, 4, past=growth[3::-1].copy(), coefficients={
        "mean": mean, "ar": ar, "scale": scale, "transition": [[stay, 1 - stay], [leave, 1 - leave]]})
    posterior = seq.ForwardBackward(model).run(torch.tensor(growth[4:]))
    assert abs(posterior.total_log_evidence + 181.26339) < 1e-5
    other = MarkovAutoregression(growth, 2, 4, switching_ar=False).smooth(np.array([stay, leave, *mean, scale**2, *ar]))
    close(posterior.smoothed["regime"].mean[0], other.smoothed_marginal_probabilities[:, 1], 1e-9)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_switching_without_a_past(order):
    """The particle filter sums over the regimes at random, the test over all of them."""
    model = MarkovSwitchingAutoregression(2, order, coefficients={**switching_coefficients(False, False, order)})
    x = model.simulate([5])["x"]
    assert_unbiased(seq.ParticleFilter(model, 100).run(x.expand(400, -1)).log_evidence, enumerated(model, x[0]))


def test_regimes_of_the_past_are_those_sampled():
    model = MarkovSwitchingAutoregression(3, 2)
    drawn = model.simulate([2000])
    assert (drawn["regime_1"][0, 1:] == drawn["regime"][0, :-1]).all()
    assert (drawn["regime_2"][0, 1:] == drawn["regime_1"][0, :-1]).all()
    pairs = torch.stack([drawn["regime_1"][0], drawn["regime"][0]], -1)
    for j in range(3):
        counts = torch.bincount(pairs[pairs[:, 0] == j, 1], minlength=3).double()
        assert ((counts / counts.sum() - model.transition[j]).abs() < 5 * 0.5 / counts.sum().sqrt()).all()


# Mistakes.

X = torch.zeros(1, 30, dtype=torch.float64)
MISTAKES = {
    "order": (lambda: ARIMA((1, 0)), r"order=\(1, 0\); it is a tuple \(p, d, q\)"),
    "negative order": (lambda: ARIMA((1, -1, 0)), "order=-1; it is at least 0"),
    "season": (lambda: ARIMA((1, 0, 0), (1, 0, 0, 0)), "a season has at least 2 steps"),
    "trend": (lambda: ARIMA((1, 0, 0), trend="l"), "trend='l'; it is 'n', 'c', 't' or 'ct'"),
    "coefficient": (lambda: ARIMA((1, 0, 0), coefficients={"phi": [0.5]}), r"coefficients has \['phi'\].*'ar'"),
    "shape": (lambda: ARIMA((2, 0, 0), coefficients={"ar": [0.5]}), r"'ar'\] has shape \(1,\).*\(2,\)"),
    "not stationary": (lambda: ARIMA((1, 0, 0), coefficients={"ar": [1.0]}), r"'ar'\] = \[1.0\] is not stationary"),
    "not invertible": (lambda: ARIMA((0, 0, 1), coefficients={"ma": [-2.0]}), "is not invertible"),
    "initial": (lambda: ARIMA((0, 0, 1), initial={"lags": dist.Normal(0.0, 1.0)}), r"initial has \['lags'\]"),
    "initial shape": (lambda: LocalLevel(initial={"level": dist.Normal(torch.zeros(2), 1.0).to_event(1)}),
                      r"initial\['level'\] has .*event_shape \(2,\)"),
    "no covariate": (lambda: seq.KalmanFilter(ARIMA((1, 0, 0), num_covariates=2)).run(X),
                     "num_covariates=2 and was given none"),
    "other covariate": (lambda: seq.KalmanFilter(LocalLevel(num_covariates=2)).run(X, u=X[..., None].expand(-1, -1, 3)),
                        r"'u' has shape \(1, 30, 3\).*num_covariates=2"),
    "unforeseen covariate": (lambda: seq.KalmanFilter(LocalLevel()).run(X, u=X[..., None]), "without covariates"),
    "vectors": (lambda: seq.KalmanFilter(LocalLevel()).run(X[..., None]), "has scalar frames"),
    "diffuse draws": (lambda: LocalLevel().simulate([5]), "site 'level' is ImproperUniform"),
    "diffuse particles": (lambda: seq.ParticleFilter(ARIMA((0, 1, 1)), 10).run(X), "site 'lags' is ImproperUniform"),
    "too short": (lambda: seq.KalmanFilter(BasicStructural(12)).run(X[:, :9]), "does not identify the diffuse"),
    "nothing": (lambda: StructuralModel(level=False), "at least one of level"),
    "trend of nothing": (lambda: StructuralModel(level=False, trend=True), "trend=True with level=False"),
    "cycle": (lambda: StructuralModel(cycle=True), "cycle=True; it is a period"),
    "fixed": (lambda: StructuralModel(fixed=["season"]), r"fixed=\['season'\].*\['level'\]"),
    "fixed string": (lambda: StructuralModel(fixed="level"), "it is a list"),
    "past": (lambda: MarkovSwitchingAutoregression(2, 2, past=[1.0]), r"past has shape \(1,\); with order=2 it is \(2,\)"),
    "regimes": (lambda: MarkovSwitchingAutoregression(1), "num_regimes=1; it is at least 2"),
    "rho": (lambda: StochasticVolatility({"rho": 1.5}), r"'rho'\] = 1.5 is not"),
}


@pytest.mark.parametrize("program, says", MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes(program, says):
    with pytest.raises(ValueError) as error:
        program()
    assert re.search(says, str(error.value), re.DOTALL), str(error.value)


def proper():
    """Made when it is used, in the type that is then the default."""
    return dist.Normal(0.0, 1.0)


TO_LEARN = [lambda: LocalLevel(initial={"level": proper()}), lambda: StructuralModel(level=False, cycle=6.0),
            lambda: LocalLinearTrend(initial={"level": proper(), "trend": proper()}), StochasticVolatility]
LEARNED = [seq.FilteringGuide, seq.SmoothingGuide, seq.AmortizedVariationalFilter]


@pytest.mark.parametrize("guide", LEARNED)
@pytest.mark.parametrize("make", TO_LEARN)
def test_guides_need_not_see_covariates_that_are_not_there(make, guide):
    torch.manual_seed(0)
    model = make()
    assert math.isfinite(seq.SequentialELBO().loss(model, guide(model), torch.randn(2, 5)))


@pytest.mark.parametrize("guide", LEARNED)
@pytest.mark.parametrize("make, says", [
    (LocalLevel, "'level' is ImproperUniform.*proper distribution, or use KalmanFilter"),
    (lambda: BasicStructural(4), "'level' is ImproperUniform.*proper distribution, or use KalmanFilter"),
    (lambda: ARIMA((1, 0, 1)), "'level' is a Delta.*use KalmanFilter"),
    (lambda: LocalLevel(2, initial={"level": proper()}), "num_covariates=2 and was given none.*like=Sequences.of"),
], ids=["diffuse", "diffuse with a season", "without noise", "with covariates"])
def test_guides_say_why_they_cannot_learn(make, says, guide):
    with pytest.raises(ValueError, match=says):
        guide(make())
