"""Extended, unscented and ensemble Kalman filters, and the proposals made of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import (
    VRNN,
    Bayesian,
    Driven,
    GammaRate,
    HiddenMarkov,
    LocalLevel,
    linear_gaussian,
)
from torch import nn

import pyro_seq as seq

GAUSSIAN = {
    "extended": seq.ExtendedKalmanFilter,
    "iterated": lambda model: seq.ExtendedKalmanFilter(model, iterations=3),
    "unscented": seq.UnscentedKalmanFilter,
    "cubature": lambda model: seq.UnscentedKalmanFilter(model, kappa=0.0),
    "scaled": lambda model: seq.UnscentedKalmanFilter(model, alpha=0.5, beta=2.0, kappa=0.0),
}
every_gaussian = pytest.mark.parametrize("method", GAUSSIAN.values(), ids=GAUSSIAN)


class Chain(seq.SequentialModel):
    """Linear: two latents, the second given the first; two observed sites, the second given the first and both read by the
    state, which has a part that no noise reaches at first."""

    def start(self, rows):
        return {"h": torch.full((rows, 2), 0.3), "z": torch.zeros(rows, 1)}

    def step(self, state, u, x=None):
        h, before = state["h"], state["z"]
        a = pyro.sample("a", dist.Normal(0.8 * before[:, 0] + h[:, 0], 0.7))
        noise = torch.tensor([[0.5, 0.2], [0.2, 0.4]])
        b = pyro.sample("b", dist.MultivariateNormal(torch.stack([a, h[:, 1] - a], -1) + u, noise))
        spread = torch.tensor([[0.3, 0.1], [0.1, 0.2]])
        first = pyro.sample("first", dist.MultivariateNormal(b + h, spread), obs=None if x is None else x[:, :2])
        second = pyro.sample("second", dist.Normal(first[:, 0] - a, 0.4), obs=None if x is None else x[:, 2])
        return {"h": 0.5 * h + 0.3 * first - second[:, None] + 0.1 * b.flip(-1), "z": a[:, None]}


class Autoregressive(seq.SequentialModel):
    """The data in the recurrence; the state holds the data itself."""

    def start(self, rows):
        return {"x": torch.zeros(rows, 2), "z": torch.zeros(rows, 2)}

    def step(self, state, x=None):
        z = pyro.sample("z", dist.Normal(0.5 * state["z"] + 0.1 * state["x"], 1.0).to_event(1))
        x = pyro.sample("x", dist.Normal(0.7 * state["x"] + z, 0.5).to_event(1), obs=x)
        return {"x": x, "z": z}


class TwoLatents(seq.StateSpaceModel):
    """A state made of two latents together; of two observed sites the second reads the first, gaps and all."""

    def initial(self):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        return torch.stack([level, pyro.sample("slope", dist.Normal(0.5 * level, 0.3))], -1)

    def transition(self, z):
        level = pyro.sample("level", dist.Normal(z.sum(-1), 0.5))
        return torch.stack([level, pyro.sample("slope", dist.Normal(0.9 * z[:, 1] + 0.1 * level, 0.1))], -1)

    def emission(self, z, x=None):
        first = pyro.sample("first", dist.Normal(z, 0.4).to_event(1), obs=None if x is None else x[:, :2])
        pyro.sample("second", dist.Normal(first.sum(-1) - z[:, 0], 0.3), obs=None if x is None else x[:, 2])


def linear_cases():
    model = linear_gaussian()
    x = model.simulate([9, 9, 9])["x"]
    x[0, 1, 0] = x[0, 3] = x[1, 0] = x[2, 4:6] = x[2, 7, 1:] = torch.nan
    yield "several dimensions", model, x, [9, 5, 8], {}
    x = LocalLevel().simulate([12, 12])["x"]
    x[1, 3] = torch.nan
    yield "scalars", LocalLevel(), x, [12, 7], {}
    u = torch.randn(2, 6, 2)
    yield "covariates", Driven(), torch.randn(2, 6), [6, 4], {"u": u}
    x = Autoregressive().simulate([8, 8])["x"]
    x[0, 2] = x[1, 4, 0] = x[1, 5] = torch.nan
    yield "data in the state", Autoregressive(), x, [6, 8], {}
    x = torch.randn(3, 8, 3)
    x[0, 2, 0] = x[1, 3, :2] = x[1, 4] = x[2, 5, 2] = torch.nan
    yield "two latents", TwoLatents(), x, [6, 8, 7], {}


@every_gaussian
@pytest.mark.parametrize("case", ["several dimensions", "scalars", "covariates", "data in the state", "two latents"])
def test_linear_gaussian_models_are_filtered_exactly(method, case):
    model, x, lengths, covariates = {name: rest for name, *rest in linear_cases()}[case]
    exact = seq.KalmanFilter(model).run(x, lengths, **covariates)
    found = method(model).run(x, lengths, **covariates)
    torch.testing.assert_close(found.log_evidence, exact.log_evidence, rtol=0, atol=1e-8)
    for name, moments in exact.filtered.items():
        torch.testing.assert_close(found.filtered[name].mean, moments.mean, rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(found.filtered[name].variance, moments.variance, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.smoothed[name].mean, exact.smoothed[name].mean, rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(found.smoothed[name].variance, exact.smoothed[name].variance, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.log_evidence_by_step, exact.log_evidence_by_step, rtol=0, atol=1e-8)


@every_gaussian
def test_a_chain_of_sites_with_gaps_that_the_state_reads(method):
    model = Chain()
    u = torch.randn(2, 7, 1)
    sites = model.simulate([7, 7], u=u)
    x = torch.cat([sites["first"], sites["second"][..., None]], -1)
    x[0, 2] = x[0, 4, 0] = x[1, 1, 2] = x[1, 5, 1:] = torch.nan
    exact = seq.KalmanFilter(model).run(x, [7, 6], u=u)
    found = method(model).run(x, [7, 6], u=u)
    torch.testing.assert_close(found.log_evidence, exact.log_evidence, rtol=0, atol=1e-8)
    for name in ("a", "b"):
        torch.testing.assert_close(found.filtered[name].mean, exact.filtered[name].mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.smoothed[name].mean, exact.smoothed[name].mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.smoothed[name].variance, exact.smoothed[name].variance, rtol=0, atol=1e-8)


def test_nile():
    import statsmodels.datasets

    x = torch.tensor(statsmodels.datasets.nile.load_pandas().data["volume"].to_numpy())
    for method in (seq.ExtendedKalmanFilter, seq.UnscentedKalmanFilter):
        assert abs(method(LocalLevel()).run(x).total_log_evidence - -639.3007238) < 1e-6


# Nonlinear models.


class Pendulum(seq.StateSpaceModel):
    """A swinging pendulum seen from the side, with the noise of its speed given by its angle."""

    def __init__(self, scale=0.3, gravity=9.8, uneven=0.1, angle=1.5, name=""):
        super().__init__(name)
        self.uneven, self.origin = uneven, torch.tensor([angle, 0.0])
        self.scale = nn.Parameter(torch.tensor(scale))
        self.gravity = nn.Parameter(torch.tensor(gravity))

    def initial(self):
        return pyro.sample("z", dist.Normal(self.origin, 0.3).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.moved(z), self.spread(z)).to_event(1))

    def moved(self, z):
        angle, speed = z.unbind(-1)
        return torch.stack([angle + 0.1 * speed, speed - 0.1 * self.gravity * angle.sin()], -1)

    def spread(self, z):
        return torch.stack([torch.full_like(z[..., 0], 0.02), 0.1 + 0.05 * z[..., 0].cos()], -1)

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, 0].sin(), self.scale * (1 + self.uneven * z[:, 1].square())), obs=x)

    def seen(self, z):
        return z[..., 0].sin(), (self.scale * (1 + self.uneven * z[..., 1].square())).square()


def textbook_extended(model, x):
    """Equations 5.26 and 9.11 of Särkkä (2013), one sequence: evidence, filtered and smoothed moments."""
    mean, covariance = torch.tensor([1.5, 0.0]), 0.09 * torch.eye(2)
    predicted, filtered, slopes, total = [], [], [], torch.zeros(())
    for t, value in enumerate(x):
        if t:
            slope = torch.func.jacrev(model.moved)(mean)
            slopes.append(slope)
            covariance = slope @ covariance @ slope.T + model.spread(mean).square().diag()
            mean = model.moved(mean)
        predicted.append((mean, covariance))
        if not value.isnan():
            h = torch.func.jacrev(lambda z: model.seen(z)[0])(mean)
            loc, noise = model.seen(mean)
            s = h @ covariance @ h + noise
            total = total + dist.Normal(loc, s.sqrt()).log_prob(value)
            gain = covariance @ h / s
            mean, covariance = mean + gain * (value - loc), covariance - torch.outer(gain, gain) * s
        filtered.append((mean, covariance))
    smoothed = [filtered[-1]]
    for t in reversed(range(len(x) - 1)):
        (m, p), (m_next, p_next) = filtered[t], predicted[t + 1]
        gain = p @ slopes[t].T @ torch.linalg.inv(p_next)
        smoothed.insert(0, (m + gain @ (smoothed[0][0] - m_next), p + gain @ (smoothed[0][1] - p_next) @ gain.T))
    return total, filtered, smoothed


def sigma_points(mean, covariance, spread):
    root = torch.linalg.cholesky(covariance).T * math.sqrt(spread)
    return torch.cat([mean[None], mean + root, mean - root])


def textbook_unscented(model, x):
    """The augmented filter and smoother of Särkkä (2013), algorithms 5.15 and 10.4, with kappa = max(3 - n, 0)."""
    total, filtered, gains, predicted = torch.zeros(()), [], [], []
    mean, covariance = torch.tensor([1.5, 0.0]), 0.09 * torch.eye(2)
    for t, value in enumerate(x):
        n = 4 if t else 2
        spread = max(n, 3)
        weights = torch.tensor([1 - n / spread] + [0.5 / spread] * (2 * n))
        centre = torch.tensor([2 - 1 - n / spread] + [0.5 / spread] * (2 * n))
        if t:
            v = sigma_points(torch.cat([mean, torch.zeros(2)]), torch.block_diag(covariance, torch.eye(2)), spread)
            z = model.moved(v[:, :2]) + model.spread(v[:, :2]) * v[:, 2:]
        else:
            v = sigma_points(mean, covariance, spread)
            z = v
        loc, noise = model.seen(z)
        m, y = weights @ z, weights @ loc
        away = z - m
        p = away.T @ (centre[:, None] * away)
        if t:
            cross = (v[:, :2] - mean).T @ (centre[:, None] * away)
            gains.append(cross @ torch.linalg.inv(p))
        predicted.append((m, p))
        s = (centre * (loc - y).square()).sum() + weights @ noise
        gain = away.T @ (centre * (loc - y)) / s
        total = total + dist.Normal(y, s.sqrt()).log_prob(value)
        mean, covariance = m + gain * (value - y), p - torch.outer(gain, gain) * s
        filtered.append((mean, covariance))
    smoothed = [filtered[-1]]
    for t in reversed(range(len(x) - 1)):
        (m, p), (m_next, p_next), gain = filtered[t], predicted[t + 1], gains[t]
        smoothed.insert(0, (m + gain @ (smoothed[0][0] - m_next), p + gain @ (smoothed[0][1] - p_next) @ gain.T))
    return total, filtered, smoothed


@pytest.mark.parametrize("method, textbook", [(seq.ExtendedKalmanFilter, textbook_extended),
                                              (seq.UnscentedKalmanFilter, textbook_unscented)], ids=["extended", "unscented"])
def test_the_textbook_recursions(method, textbook):
    model = Pendulum()
    x = model.simulate([25])["x"]
    found = method(model).run(x)
    with torch.no_grad():
        total, filtered, smoothed = textbook(model, x[0])
    torch.testing.assert_close(found.log_evidence[0], total)
    for ours, theirs in ((found.filtered["z"], filtered), (found.smoothed["z"], smoothed)):
        torch.testing.assert_close(ours.mean[0], torch.stack([m for m, _ in theirs]))
        torch.testing.assert_close(ours.variance[0], torch.stack([p.diagonal() for _, p in theirs]))


class Curved(seq.StateSpaceModel):
    """One dimension, its nonlinearity of size epsilon."""

    def __init__(self, epsilon):
        super().__init__()
        self.epsilon = epsilon

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(0.8 * z + self.epsilon * z.sin(), 0.6))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z + self.epsilon * z.square(), 0.5), obs=x)

    def quadrature(self, x, points=1501):
        """``(B,)`` log evidence on a grid from -8 to 8, ``x`` being ``(B, T)``."""
        grid = torch.linspace(-8, 8, points)
        step = math.log(grid[1] - grid[0])
        log_p = dist.Normal(0.0, 1.0).log_prob(grid).expand(len(x), -1)
        move = dist.Normal(0.8 * grid + self.epsilon * grid.sin(), 0.6).log_prob(grid[:, None])
        for t in range(x.shape[1]):
            if t:
                log_p = torch.stack([(row + move).logsumexp(-1) + step for row in log_p])
            seen = dist.Normal(grid + self.epsilon * grid.square(), 0.5).log_prob(x[:, t, None].nan_to_num())
            log_p = log_p + torch.where(x[:, t, None].isnan(), 0.0, seen)
        return log_p.logsumexp(-1) + step


@pytest.mark.parametrize("method", [GAUSSIAN[k] for k in ("extended", "iterated", "unscented", "cubature")],
                         ids=["extended", "iterated", "unscented", "cubature"])
def test_the_error_of_one_frame_is_of_second_order(method):
    """KL(p(x), q(x)) of the predictive densities, by quadrature over x: each density is wrong by O(epsilon), the divergence
    by its square."""
    x = torch.linspace(-9, 14, 400)
    found = []
    for epsilon in (0.1, 0.05, 0.025):
        model = Curved(epsilon)
        exact, ours = model.quadrature(x[:, None]), method(model).run(x[:, None]).log_evidence
        found.append(((exact.exp() * (exact - ours)).sum() * (x[1] - x[0])).item())
    assert all(v > 0 for v in found)
    assert 3 < found[0] / found[1] < 5.5 and 3.4 < found[1] / found[2] < 4.6, found
    assert found[0] < 0.05


@pytest.mark.parametrize("name", ["extended", "iterated", "unscented"])
def test_the_error_of_a_sequence_vanishes_with_the_nonlinearity(name):
    """Log evidence of 20 frames against quadrature: wrong by O(epsilon), hence not zero."""
    errors = []
    for epsilon in (0.08, 0.04, 0.02):
        model = Curved(epsilon)
        pyro.set_rng_seed(1)
        x = model.simulate([20] * 20)["x"]
        errors.append((GAUSSIAN[name](model).run(x).log_evidence - model.quadrature(x, 401)).square().mean().sqrt().item())
    assert 0.35 < errors[1] / errors[0] < 0.65 and 0.35 < errors[2] / errors[1] < 0.65, errors
    assert 1e-4 < errors[2] < 0.2


@pytest.mark.parametrize("name", ["extended", "unscented"])
def test_moments_agree_with_many_particles(name):
    """On a pendulum that does not swing too far the Gaussian filters are within a fraction of a posterior standard deviation,
    and within a few hundredths of a nat a frame; the particles' own errors are ten times smaller."""
    model = Pendulum(0.1, uneven=0.0, angle=1.0)
    x = model.simulate([40])["x"]
    many = seq.ParticleFilter(model, 50_000).run(x)
    found = GAUSSIAN[name](model).run(x)
    apart = (found.filtered["z"].mean - many.filtered["z"].mean) / many.filtered["z"].std
    assert apart.square().mean().sqrt() < 0.3
    assert 0.02 < abs(found.total_log_evidence - many.total_log_evidence) < 2.0


# The ensemble.


def test_the_ensemble_tends_to_the_kalman_filter():
    """100 independent ensembles: a z-test at 4.5 standard errors of each of about 80 numbers, plus the known bias of order one
    over the members. A correct filter fails less than once in a thousand."""
    model = linear_gaussian(2, 2)
    x = model.simulate([8])["x"]
    x[0, 3, 0] = x[0, 5] = torch.nan
    exact = seq.KalmanFilter(model).run(x)
    spread = {}
    for members in (50, 800):
        found = seq.EnsembleKalmanFilter(model, members).run(x.expand(100, -1, -1))
        spread[members] = found.log_evidence.std()
        for ours, theirs in ((found.log_evidence, exact.log_evidence[0]),
                             *((getattr(a["z"], k), getattr(b["z"], k)[0]) for k in ("mean", "variance") for a, b in (
                                 (found.filtered, exact.filtered), (found.smoothed, exact.smoothed)))):
            error = ours.std(0) / 10
            bias = 40 / members * (1 + theirs.abs())
            assert ((ours.mean(0) - theirs).abs() < 4.5 * error + bias * 0.2).all()
    assert 2.5 < spread[50] / spread[800] < 6.5  # 4 expected


def test_the_ensemble_of_a_chain_of_sites():
    model = Chain()
    u = torch.randn(1, 6, 1)
    sites = model.simulate([6], u=u)
    x = torch.cat([sites["first"], sites["second"][..., None]], -1)
    x[0, 2] = x[0, 4, 0] = torch.nan
    exact = seq.KalmanFilter(model).run(x, u=u)
    found = seq.EnsembleKalmanFilter(model, 1000).run(x.expand(60, -1, -1), u=u)
    error = found.log_evidence.std() / math.sqrt(60)
    assert abs(found.log_evidence.mean() - exact.total_log_evidence) < 4.5 * error + 0.03
    for name in ("a", "b"):
        ours = found.smoothed[name].mean
        assert ((ours.mean(0) - exact.smoothed[name].mean[0]).abs() < 4.5 * ours.std(0) / math.sqrt(60) + 0.01).all()


# Learning.


@pytest.mark.parametrize("method", [*GAUSSIAN.values(), lambda model: seq.EnsembleKalmanFilter(model, 6)],
                         ids=[*GAUSSIAN, "ensemble"])
@pytest.mark.parametrize("make", [Pendulum, lambda: VRNN(1, 1, 1)], ids=["pendulum", "vrnn"])
def test_gradients_of_the_evidence(make, method):
    model = make()
    x = model.simulate([3, 2])["x"]
    x[0, 1] = torch.nan
    run = method(model)

    def evidence(*_):
        pyro.set_rng_seed(3)
        return run.log_evidence(x, [3, 2])

    torch.testing.assert_close(evidence().detach(), (pyro.set_rng_seed(3), run.run(x, [3, 2]).log_evidence)[1])
    assert torch.autograd.gradcheck(evidence, tuple(model.parameters()), eps=1e-6, atol=2e-5)


class Shifted(LocalLevel):
    """Observes a function of the data that has a parameter in it."""

    def __init__(self):
        super().__init__(0.0, 1.0, 0.5, 1.0)
        self.shift = nn.Parameter(torch.tensor(0.4))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 1.0), obs=None if x is None else x - self.shift)


def test_a_parameter_in_the_data():
    model, x = Shifted(), torch.randn(2, 4)
    x[0, 2] = torch.nan
    exact = seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5, 1.0)).run(x - 0.4).log_evidence
    for method in (seq.ExtendedKalmanFilter(model), seq.UnscentedKalmanFilter(model)):
        torch.testing.assert_close(method.run(x).log_evidence, exact)
        assert torch.autograd.gradcheck(lambda _: method.log_evidence(x), (model.shift,))  # noqa: B023


def test_tables_and_figures_of_several_methods():
    x = Counts().simulate([10])["x"]
    table = seq.compare({"extended": seq.ExtendedKalmanFilter(Counts()), "ensemble": seq.EnsembleKalmanFilter(Counts()),
                         "particles": seq.ParticleFilter(Counts())}, x)
    assert list(table.kind[:2]) == ["approximation (extended Kalman)", "approximation (ensemble Kalman)"]
    assert table.plot_comparison() is not None


def test_evidence_inside_a_pyro_program():
    """Inside the model's own call the evidence has that call's globals."""
    model = Bayesian()
    x = model.simulate([6])["x"]
    phi = torch.tensor(0.3, requires_grad=True)
    values = {name: phi if name.endswith("phi") else torch.tensor(0.7) for name in model.global_sites()}
    found = model.within(lambda: seq.ExtendedKalmanFilter(model).log_evidence(x), globals=values)
    (gradient,) = torch.autograd.grad(found.sum(), phi)
    assert gradient.abs() > 1e-3
    with pyro.poutine.condition(data={k: v.detach() for k, v in values.items()}):
        exact = seq.KalmanFilter(model).run(x)
    torch.testing.assert_close(found.detach(), exact.log_evidence)


# Invariances.


@every_gaussian
def test_what_a_sequence_is_batched_with_makes_no_difference(method):
    model = VRNN(2, 3, 4)
    lengths = [4, 7, 6]
    x = model.simulate([7] * 3)["x"]
    x[0, 2, 1] = x[2, 1] = x[2, 3, :2] = torch.nan
    together = method(model).run(x, lengths)
    x[0, 4:] = 1e6
    for b, n in enumerate(lengths):
        alone = method(model).run(x[b:b + 1, :n])
        torch.testing.assert_close(together.log_evidence[b], alone.log_evidence[0])
        for ours, theirs in ((together.filtered["z"], alone.filtered["z"]), (together.smoothed["z"], alone.smoothed["z"])):
            torch.testing.assert_close(ours.mean[b, :n], theirs.mean[0])
            torch.testing.assert_close(ours.variance[b, :n], theirs.variance[0])
            assert (ours.mean[b, n:] == 0).all() and (ours.variance[b, n:] == 0).all()
    turned = method(model).run(x.flip(0), lengths[::-1])
    torch.testing.assert_close(turned.log_evidence.flip(0), together.log_evidence)


@pytest.mark.parametrize("method", [seq.ExtendedKalmanFilter, seq.UnscentedKalmanFilter, seq.EnsembleKalmanFilter])
def test_float32_models(method):
    model = Pendulum()
    x = model.simulate([20])["x"]
    double = method(model).run(x)
    torch.set_default_dtype(torch.float32)
    single = method(Pendulum()).run(x.float())
    assert single.log_evidence.dtype == single.filtered["z"].mean.dtype == torch.float32
    tolerance = 5.0 if method is seq.EnsembleKalmanFilter else 1e-3
    assert abs(single.total_log_evidence - double.total_log_evidence) < tolerance


def test_everything_missing_has_no_evidence():
    for method in (*GAUSSIAN.values(), seq.EnsembleKalmanFilter):
        found = method(VRNN()).run(torch.full((2, 3, 4), torch.nan))
        assert (found.log_evidence == 0).all() and found.filtered["z"].variance.isfinite().all()


# The answer.


class Counts(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("z", dist.Normal(1.0, 0.5))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(1 + 0.9 * (z - 1), 0.2))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def test_the_answer_says_what_it_is():
    x = Counts().simulate([20])["x"]
    for method, name in ((seq.ExtendedKalmanFilter, "extended"), (seq.UnscentedKalmanFilter, "unscented"),
                         (seq.EnsembleKalmanFilter, "ensemble")):
        found = method(Counts()).run(x)
        assert found.kind == f"approximation ({name} Kalman)" and found.method == f"{name} Kalman filter"
        assert "neither exact nor a bound" in found.notes[0] and "['x'] are not Gaussian" in found.notes[1]
        assert found.predict(3, 50).samples["x"].shape == (50, 1, 3)
        assert found.trajectories(7).samples["z"].shape == (7, 1, 20)
        assert (found.quantile("z", [0.1, 0.9]).diff(dim=0) > 0).all()
    assert len(seq.ExtendedKalmanFilter(LocalLevel()).run(torch.zeros(1, 3)).notes) == 1
    assert seq.ExtendedKalmanFilter(Counts()).run(x).total_standard_error == 0
    assert math.isnan(seq.EnsembleKalmanFilter(Counts()).run(x).total_standard_error)


def test_counts_of_an_integer_type_with_a_mask():
    x = Counts().simulate([12, 9])["x"]
    mask = torch.rand(x.shape) < 0.7
    floating = seq.ExtendedKalmanFilter(Counts()).run(x, [12, 9], mask=mask)
    whole = seq.ExtendedKalmanFilter(Counts()).run(x.long(), [12, 9], mask=mask)
    torch.testing.assert_close(whole.log_evidence, floating.log_evidence)


@pytest.mark.parametrize("method", [seq.ExtendedKalmanFilter, seq.UnscentedKalmanFilter])
def test_trajectories_have_the_smoothed_moments(method):
    """4000 draws, 36 means and 36 variances: at 4.5 standard errors a correct sampler fails once in 2000."""
    model = linear_gaussian()
    x = model.simulate([5, 4])["x"]
    found = method(model).run(x, [5, 4])
    draws = found.trajectories(4000).samples["z"]
    inside = torch.arange(5) < torch.tensor([[5], [4]])
    apart = (draws.mean(0) - found.smoothed["z"].mean) / (found.smoothed["z"].std / math.sqrt(4000))
    ratio = (draws.var(0) / found.smoothed["z"].variance - 1) / math.sqrt(2 / 4000)
    assert (apart[inside].abs() < 4.5).all() and (ratio[inside].abs() < 4.5).all()


def test_predictions_follow_the_kalman_filter():
    model = linear_gaussian()
    x = model.simulate([5, 4])["x"]
    exact = seq.KalmanFilter(model).run(x, [5, 4]).predict(2, 4000)
    for method in (seq.ExtendedKalmanFilter, seq.UnscentedKalmanFilter):
        found = method(model).run(x, [5, 4]).predict(2, 4000)
        apart = (found.mean("x") - exact.mean("x")) / (exact.std("x") * math.sqrt(2 / 4000))
        assert (apart.abs() < 4.5).all()


# Mistakes.


class Detached(LocalLevel):
    def transition(self, z):
        return pyro.sample("z", dist.Normal(z.detach().sin(), 1.0))


class Rounded(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z.round(), 1.0), obs=x)


class Heavy(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.StudentT(2.0, z, 1.0), obs=x)


class Directions(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Dirichlet(z.square()[:, None].expand(-1, 2) + 1), obs=x)


class Counted(seq.SequentialModel):
    def start(self, rows):
        return torch.zeros(rows), torch.zeros(rows, dtype=torch.long)

    def step(self, state, x=None):
        z = pyro.sample("z", dist.Normal(state[0], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return z, state[1] + 1


class Scaled(LocalLevel):
    def emission(self, z, x=None):
        with pyro.poutine.scale(scale=0.5):
            return super().emission(z, x)


class Singular(LocalLevel):
    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, 1.0 - 1.0 * (z > -1e9)))


class Indefinite(LocalLevel):
    def initial(self):
        return pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))

    def transition(self, z):
        return pyro.sample("z", dist.MultivariateNormal(z, torch.tensor([[1.0, 2.0], [2.0, 1.0]])))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)


class Noiseless(LocalLevel):
    """Two equal entries without noise of their own."""

    def emission(self, z, x=None):
        both = torch.stack([z, z], -1)
        return pyro.sample("x", dist.Normal(both, 1e-200).to_event(1), obs=x)


EVERY = (seq.ExtendedKalmanFilter, seq.UnscentedKalmanFilter, seq.EnsembleKalmanFilter)


def run_guide(model):
    class Run:
        def run(self, x):
            return seq.ParticleFilter(model, 10, guide=seq.KalmanGuide(model)).run(x)

    return Run()


MISTAKES = [
    ("discrete latents", HiddenMarkov, (*EVERY, run_guide), ((1, 3), 0.0), r"latent site 'k' is Categorical, not Gaussian"),
    ("other latents", GammaRate, (*EVERY, run_guide), ((1, 3), 1.0), r"latent site 'rate' is Gamma.*declare"),
    ("integer state", Counted, EVERY, ((1, 3), 0.0), r"Counted carries a state of type torch.int64.*name the time t"),
    ("a state that is cut off", Detached, EVERY[:1], ((1, 3), 0.0), r"Detached at time 2 moves.*derivative is zero"),
    ("an emission that is rounded", Rounded, EVERY[:1], ((1, 3), 0.0), r"Rounded at time 1 moves.*rounding"),
    ("no variance", Heavy, (*EVERY, run_guide), ((1, 3), 0.0), r"site 'x' is StudentT without a finite mean and variance"),
    ("dependent entries", Directions, (*EVERY, run_guide), ((1, 3, 2), 0.5), r"site 'x' is Dirichlet, whose entries"),
    ("scaled", Scaled, EVERY, ((1, 3), 0.0), r"site 'x' of Scaled at time 1 stands under poutine.scale"),
    ("a scale of zero", Singular, EVERY, ((1, 3), 0.0), r"step at time 2.*scale that is zero or negative"),
    ("an indefinite covariance", Indefinite, EVERY, ((1, 3), 0.0), r"step at time 2, before its first site"),
    ("no noise", Noiseless, (*EVERY, run_guide), ((1, 3, 2), 1.0), r"at time 1.*positive definite: give the emission"),
    ("a class", lambda: LocalLevel, (*EVERY, seq.KalmanGuide), ((1, 3), 0.0), r"not the class LocalLevel"),
]


@pytest.mark.parametrize("program, method, x, says", [
    pytest.param(make, method, x, says, id=f"{what}-{method.__name__}") for what, make, methods, x, says in MISTAKES
    for method in methods])
def test_mistakes(program, method, x, says):
    with pytest.raises((ValueError, TypeError), match=says):
        method(program()).run(torch.full(*x))


@pytest.mark.parametrize("make, says", [
    (lambda m: seq.ExtendedKalmanFilter(m, 0), "iterations=0"),
    (lambda m: seq.ExtendedKalmanFilter(m, 1.5), "iterations=1.5 is not an integer"),
    (lambda m: seq.UnscentedKalmanFilter(m, alpha=0.0), "alpha=0.0; the spread"),
    (lambda m: seq.UnscentedKalmanFilter(m, kappa=-2.0).run(torch.zeros(1, 3)), "kappa=-2.0 with n=1.*must be positive"),
    (lambda m: seq.EnsembleKalmanFilter(m, 1), "num_members=1; it is at least 2"),
    (lambda m: seq.KalmanGuide(m, "ensemble"), "kind='ensemble'; it is 'extended' or 'unscented'"),
], ids=range(6))
def test_mistaken_options(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make(LocalLevel())
