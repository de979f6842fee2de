"""The exact linear-Gaussian machinery: diffuse starts, gradients, single precision, streams, drawn paths, scans."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LocalLevel, linear_gaussian
from test_exact import dense_joint, nile
from torch.distributions import constraints

import pyro_seq as seq

NILE_DIFFUSE = -633.4645635


class DiffuseLevel(seq.StateSpaceModel):
    def __init__(self, level=1469.1, noise=15099.0):
        super().__init__()
        self.log_variances = torch.nn.Parameter(torch.tensor([level, noise]).log())

    def initial(self):
        return pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, (0.5 * self.log_variances[0]).exp()))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, (0.5 * self.log_variances[1]).exp()), obs=x)


class Trend(seq.StateSpaceModel):
    """A local linear trend; its slope has no noise where ``slope`` is zero, which is a Delta."""

    def __init__(self, slope=0.3):
        super().__init__()
        self.slope = slope

    def initial(self):
        return pyro.sample("z", dist.ImproperUniform(constraints.real, (), (2,)))

    def transition(self, z):
        level = pyro.sample("level", dist.Normal(z[:, 0] + z[:, 1], 0.5))
        slope = pyro.sample("slope", dist.Normal(z[:, 1], self.slope) if self.slope else dist.Delta(z[:, 1]))
        return torch.stack([level, slope], -1)

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, 0], 1.5), obs=x)


class NamedTrend(Trend):
    def initial(self):
        level = pyro.sample("level", dist.ImproperUniform(constraints.real, (), ()))
        return torch.stack([level, pyro.sample("slope", dist.ImproperUniform(constraints.real, (), ()))], -1)


class Mixed(seq.StateSpaceModel):
    """A diffuse level under a stationary autoregression that is seen with it, three observed entries."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.load = torch.randn(3, 2, generator=generator)

    def initial(self):
        level = pyro.sample("level", dist.ImproperUniform(constraints.real, (), ()))
        return level, pyro.sample("cycle", dist.Normal(0.0, 1.0))

    def transition(self, state):
        level = pyro.sample("level", dist.Normal(state[0], 0.4))
        return level, pyro.sample("cycle", dist.Normal(0.6 * state[1], 0.8))

    def emission(self, state, x=None):
        return pyro.sample("x", dist.Normal(torch.stack(state, -1) @ self.load.T, 0.7).to_event(1), obs=x)


def gappy(batch, steps, *event, share=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, steps, *event, generator=generator).cumsum(1)
    return x.masked_fill(torch.rand(x.shape, generator=generator) < share, torch.nan)


# A diffuse first state


def test_nile_diffuse():
    posterior = seq.KalmanFilter(DiffuseLevel()).run(nile())
    assert abs(posterior.total_log_evidence - NILE_DIFFUSE) < 1e-6
    assert posterior.log_evidence_by_step[0, 0] == pytest.approx(-0.5 * math.log(2 * math.pi))


def test_nile_approximately_diffuse():
    """First level N(0, 1e6), its term dropped: a convention of some books."""
    posterior = seq.KalmanFilter(LocalLevel(0.0, 1e6)).run(nile())
    assert abs(posterior.log_evidence_by_step[0, 1:].sum() - -632.5376950) < 1e-6


def dense_diffuse(model, x):
    """Evidence and smoothed moments of (level, cycle) of Mixed, by generalised least squares on one large Gaussian."""
    steps = x.shape[0]
    own = torch.zeros(2 * steps, 2 * steps)
    for t in range(steps):
        for s in range(steps):
            own[2 * t, 2 * s] = 0.4**2 * min(t, s)
            variances = [1.0]
            for _ in range(max(t, s)):
                variances.append(0.36 * variances[-1] + 0.64)
            own[2 * t + 1, 2 * s + 1] = 0.6 ** abs(t - s) * variances[min(t, s)]
    flat = torch.zeros(2 * steps, 1)
    flat[::2] = 1.0
    emit = torch.block_diag(*[model.load] * steps)
    seen = ~x.reshape(-1).isnan()
    emit, y = emit[seen], x.reshape(-1)[seen]
    within = emit @ own @ emit.T + 0.49 * torch.eye(len(y))
    design = emit @ flat
    solved = torch.linalg.solve(within, torch.cat([design, y[:, None]], 1))
    precision = design.T @ solved[:, :1]
    estimate = torch.linalg.solve(precision, design.T @ solved[:, 1:])
    rest = y[:, None] - design @ estimate
    log_p = -0.5 * (len(y) * math.log(2 * math.pi) + torch.logdet(within) + torch.logdet(precision)
                    + (rest.T @ torch.linalg.solve(within, rest)).squeeze())
    gain = torch.linalg.solve(within, emit @ own).T
    effect = flat - gain @ design
    mean = flat @ estimate + gain @ rest
    return log_p, mean.reshape(steps, 2), own - gain @ emit @ own + effect @ torch.linalg.solve(precision, effect.T)


@pytest.mark.parametrize("shared", [True, False])
def test_a_diffuse_start_equals_generalised_least_squares(shared):
    model, lengths = Mixed(), [7, 4, 5]
    x = gappy(3, 7, 3, share=0.0 if shared else 0.3)
    posterior = seq.KalmanFilter(model).run(x, lengths)
    for b, length in enumerate(lengths):
        log_p, mean, covariance = dense_diffuse(model, x[b, :length])
        torch.testing.assert_close(posterior.log_evidence[b], log_p)
        for i, name in enumerate(("level", "cycle")):
            torch.testing.assert_close(posterior.smoothed[name].mean[b, :length], mean[:, i])
            own = covariance[i::2, i::2]
            torch.testing.assert_close(posterior.smoothed[name].variance[b, :length], own.diagonal())
            torch.testing.assert_close(posterior.lag_one_covariance[name][b, :length - 1, 0, 0], own.diagonal(1))
        for t in range(1, length + 1):
            if (~x[b, :t].isnan()).sum() > 1:
                _, mean, covariance = dense_diffuse(model, x[b, :t])
                torch.testing.assert_close(posterior.filtered["level"].mean[b, t - 1], mean[-1, 0])
                torch.testing.assert_close(posterior.filtered["cycle"].variance[b, t - 1], covariance[-1, -1])
    torch.testing.assert_close(posterior.log_evidence_by_step.sum(1), posterior.log_evidence)
    torch.testing.assert_close(seq.KalmanFilter(model).log_evidence(x, lengths), posterior.log_evidence)


@pytest.mark.parametrize("make, kind", [(lambda: DiffuseLevel(2.0, 3.0), "llevel"), (lambda: NamedTrend(0.3), "lltrend"),
                                        (lambda: NamedTrend(0.0), "lldtrend")])
@pytest.mark.parametrize("gaps", [False, True])
def test_diffuse_starts_equal_statsmodels(make, kind, gaps):
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    x = gappy(1, 40, share=0.3 if gaps else 0.0)[0]
    theirs = UnobservedComponents(x.cpu().numpy(), kind, use_exact_diffuse=True)
    parameters = {"llevel": [3.0, 2.0], "lltrend": [2.25, 0.25, 0.09], "lldtrend": [2.25, 0.25]}[kind]
    found = theirs.smooth(parameters)
    ours = seq.KalmanFilter(make()).run(x)
    assert ours.total_log_evidence == pytest.approx(found.llf, rel=1e-9)
    names = ["z"] if kind == "llevel" else ["level", "slope"]
    late = int((~x.isnan()).nonzero()[len(names)])  # statsmodels gives no variances where they are infinite
    for i, name in enumerate(names):
        np.testing.assert_allclose(ours.smoothed[name].mean[0].cpu(), found.smoothed_state[i], rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(ours.smoothed[name].variance[0].cpu(), found.smoothed_state_cov[i, i], rtol=1e-6)
        np.testing.assert_allclose(ours.filtered[name].mean[0, late:].cpu(), found.filtered_state[i, late:], rtol=1e-7,
                                   atol=1e-9)
        np.testing.assert_allclose(ours.filtered[name].variance[0, late:].cpu(), found.filtered_state_cov[i, i, late:],
                                   rtol=1e-6)


def test_variances_are_infinite_until_identified():
    posterior = seq.KalmanFilter(NamedTrend()).run(torch.tensor([torch.nan, 1.0, 2.0, 4.0]))
    assert posterior.filtered["level"].variance[0].isinf().tolist() == [True, False, False, False]
    assert posterior.filtered["slope"].variance[0].isinf().tolist() == [True, True, False, False]
    assert posterior.smoothed["level"].variance.isfinite().all()


def test_a_diffuse_evidence_loses_no_digits_to_the_level_of_the_data():
    """Shifting the data changes nothing: once, squares of the level were added and taken away again, and 1e-6 was lost."""
    torch.manual_seed(0)
    x = 0.3 * torch.randn(2, 80, dtype=torch.float64).cumsum(1)
    x[0, 10:13], x[1, 70:] = torch.nan, torch.nan
    method = seq.KalmanFilter(seq.models.LocalLinearTrend(coefficients={"scale": 0.2, "trend_scale": 1e-3}).double())
    found = method.log_evidence(x, [80, 65])
    torch.testing.assert_close(method.log_evidence(x + 1000.0, [80, 65]), found, rtol=0, atol=2e-10)
    torch.testing.assert_close(method.run(x, [80, 65]).log_evidence_by_step.sum(1), found, rtol=0, atol=1e-9)


def test_a_diffuse_state_that_is_not_identified():
    with pytest.raises(ValueError, match=r"sequence 1 does not identify the diffuse .*too few observed frames"):
        seq.KalmanFilter(NamedTrend()).run(torch.zeros(2, 5), [5, 1])


def test_diffuse_models_cannot_be_simulated():
    with pytest.raises(ValueError, match=r"site 'z'.*ImproperUniform.*cannot be drawn"):
        DiffuseLevel().simulate([5])
    with pytest.raises(ValueError, match=r"site 'z'.*ImproperUniform.*cannot be drawn"):
        seq.ParticleFilter(DiffuseLevel()).run(torch.zeros(1, 5))


def test_only_the_first_step_may_be_diffuse():
    class Always(DiffuseLevel):
        def transition(self, z):
            return self.initial()

    with pytest.raises(ValueError, match="ImproperUniform: only latents of the first step"):
        seq.KalmanFilter(Always()).run(torch.zeros(1, 5))


# Covariances


def test_lag_one_covariances_and_whole_covariances():
    model, steps = linear_gaussian(seed=1), 6
    x = model.simulate([steps])["x"]
    x[0, 2] = torch.nan
    posterior = seq.KalmanFilter(model).run(x)
    _, joint = dense_joint(model, steps, (model.a, model.q, model.c, model.r, model.m0, model.p0))
    index = torch.cat([torch.zeros(2 * steps, dtype=torch.bool), ~x.reshape(-1).isnan()])
    gain = torch.linalg.solve(joint[index][:, index], joint[index]).T
    dense = (joint - gain @ joint[index])[:2 * steps, :2 * steps].reshape(steps, 2, steps, 2)
    for t in range(steps):
        torch.testing.assert_close(posterior.smoothed_covariance["z"][0, t], dense[t, :, t])
    for t in range(steps - 1):
        torch.testing.assert_close(posterior.lag_one_covariance["z"][0, t], dense[t, :, t + 1])


@pytest.mark.parametrize("make, shape", [(lambda: NamedTrend(0.0), ()), (Mixed, (3,)), (lambda: LocalLevel(0.0, 1.0, 0.5), ())])
def test_drawn_paths_have_the_smoothed_moments(make, shape):
    """5000 paths: means within 4.5 standard errors (one test of about 30 numbers fails once in 5000), second moments too."""
    posterior = seq.KalmanFilter(make()).run(gappy(1, 10, *shape))
    count = 5000
    draws = posterior.trajectories(count)
    for name, moments in posterior.smoothed.items():
        path = draws.samples[name]
        assert path.shape == (count, *moments.mean.shape)
        spread = moments.std.clamp(min=1e-9)
        assert ((path.mean(0) - moments.mean).abs() < 4.5 * spread / math.sqrt(count)).all()
        second = ((path - moments.mean) / spread)
        assert ((second.square().mean(0) - 1).abs() < 4.5 * math.sqrt(2 / count)).all()
        lag = (second[:, 0, 1:] * second[:, 0, :-1]).mean(0)
        exact = posterior.lag_one_covariance[name][0, :, 0, 0] / (spread[0, 1:] * spread[0, :-1])
        assert ((lag - exact).abs() < 4.5 * math.sqrt(2 / count)).all()


# Gradients


@pytest.mark.parametrize("make", [lambda: DiffuseLevel(2.0, 3.0), lambda: Noisy(), lambda: Driving()])
def test_gradients(make):
    model = make()
    x = gappy(3, 7)
    inputs = {"u": torch.randn(3, 7)} if isinstance(model, Driving) else {}
    names, values = zip(*((n, v.detach().clone()) for n, v in model.named_parameters()), strict=True)

    def evidence(*parameters):
        with torch.nn.utils.stateless._reparametrize_module(model, dict(zip(names, parameters, strict=True))):
            return seq.KalmanFilter(model).log_evidence(x, [7, 3, 5], **inputs)

    assert torch.autograd.gradcheck(evidence, tuple(v.requires_grad_() for v in values))


class Noisy(seq.StateSpaceModel):
    """Two entries, a state of two, a learned first state."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in (("a", (2, 2)), ("c", (2,)), ("loc", (2,)), ("log_scale", (2,))):
            setattr(self, name, torch.nn.Parameter(0.5 * torch.randn(shape, generator=generator)))

    def initial(self):
        return pyro.sample("z", dist.Normal(self.loc, 1.0).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z @ self.a.T, self.log_scale.exp()).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z @ self.c, 0.8), obs=x)


class Driving(seq.SequentialModel):
    """Autoregressive, with a covariate, a learned initial state and time-varying noise."""

    def __init__(self):
        super().__init__()
        self.start_value = torch.nn.Parameter(torch.tensor(0.3))
        self.weight = torch.nn.Parameter(torch.tensor([0.4, -0.3, 0.2]))

    def start(self, rows):
        return self.start_value.expand(rows), self.start_value.expand(rows)

    def step(self, state, u, t, x=None):
        z = pyro.sample("z", dist.Normal(self.weight[0] * state[0] + u, (self.weight[1] * t / 5).exp()))
        x = pyro.sample("x", dist.Normal(z + self.weight[2] * state[1], 0.5), obs=x)
        return z, x


def test_learning_by_gradient_finds_the_maximum_on_nile():
    """The maximum of the diffuse likelihood: Durbin and Koopman (2012, section 2.10.3) give 15099 and 1469.1."""
    model = DiffuseLevel(1000.0, 10000.0)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = -seq.KalmanFilter(model).log_evidence(nile()).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    level, noise = model.log_variances.detach().exp().tolist()
    assert noise == pytest.approx(15099, abs=1.0) and level == pytest.approx(1469.1, abs=0.5)


def test_evidence_inside_a_program_uses_that_call():
    """The global parameter that the program draws is the one the evidence is of, and the gradient reaches it."""
    class Scaled(seq.StateSpaceModel):
        def __init__(self):
            super().__init__()
            self.scale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))

        def initial(self):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(z, self.scale))

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model, x = Scaled(), gappy(2, 9)
    value = torch.tensor(0.7, requires_grad=True)
    with pyro.condition(data={"scale": value}):
        inside = model.within(lambda: seq.KalmanFilter(model).log_evidence(x))
    torch.testing.assert_close(inside, seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.49, 1.0)).log_evidence(x))
    assert torch.autograd.grad(inside.sum(), value)[0] != 0


# Single precision, long series, streams


@pytest.mark.parametrize("gaps", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_single_precision_over_100_000_steps(gaps):
    """A trend whose slope hardly moves, seen through small noise: variances from 1e-3 to 1e2. The single-precision
    recursion stays positive, and agrees with the one in double precision as far as its digits go."""
    x = torch.randn(1, 100_000)
    if gaps:
        x[torch.rand(x.shape) < 0.3] = torch.nan
    model = ProperTrend()
    double = seq.KalmanFilter(model).run(x)
    single = seq.KalmanFilter(model, dtype=torch.float32).run(x)
    torch.testing.assert_close(single.filtered_covariance["z"], double.filtered_covariance["z"], rtol=1e-3, atol=1e-6)
    assert torch.linalg.eigvalsh(single.filtered_covariance["z"]).min() > 0
    assert single.smoothed["z"].variance.min() > 0
    assert single.log_evidence_by_step.isfinite().all()
    torch.testing.assert_close(single.log_evidence, double.log_evidence, rtol=1e-5, atol=0)


class ProperTrend(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("z", dist.Normal(torch.zeros(2), 10.0).to_event(1))

    def transition(self, z):
        mean = torch.stack([z[:, 0] + z[:, 1], z[:, 1]], -1)
        return pyro.sample("z", dist.Normal(mean, torch.tensor([0.5, 0.01])).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, 0], 0.1), obs=x)


@pytest.mark.parametrize("make, shape", [(NamedTrend, ()), (Mixed, (3,)), (lambda: LocalLevel(0.0, 1.0, 0.5), ())])
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 4, 3], [12]])
def test_a_stream_equals_the_whole(make, shape, pieces):
    model = make()
    x = gappy(2, 12, *shape)
    whole = seq.KalmanFilter(model).run(x)
    stream = seq.KalmanFilter(model).stream(2)
    by_step = torch.cat([stream.update(part).log_evidence for part in x.split(pieces, 1)], 1)
    torch.testing.assert_close(by_step, whole.log_evidence_by_step)
    torch.testing.assert_close(stream.log_evidence, whole.log_evidence)
    name = "z" if "z" in whole.filtered else "level"
    update = seq.KalmanFilter(model).stream(2).update(x)
    torch.testing.assert_close(update.mean[:, 0], whole.filtered[name].mean[:, -1])
    torch.testing.assert_close(update.covariance[:, 0, 0], whole.filtered[name].variance[:, -1])


def test_a_stream_with_covariates_and_time():
    model, x, u = Driving(), gappy(2, 10, share=0.0), torch.randn(2, 10)
    whole = seq.KalmanFilter(model).run(x, u=u)
    stream = seq.KalmanFilter(model).stream(2)
    parts = [stream.update(x[:, i:j], u=u[:, i:j]).log_evidence for i, j in ((0, 1), (1, 5), (5, 10))]
    torch.testing.assert_close(torch.cat(parts, 1), whole.log_evidence_by_step)


def test_a_stream_of_another_batch():
    stream = seq.KalmanFilter(LocalLevel()).stream(2)
    with pytest.raises(ValueError, match="the stream has 2 sequences and was given"):
        stream.update(torch.zeros(3, 4))


@pytest.mark.slow
def test_a_million_streamed_steps_run_in_constant_memory():
    import gc
    import tracemalloc

    stream = seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).stream()
    x = torch.randn(1, 1000)
    held = []
    tracemalloc.start()
    for i in range(1000):
        update = stream.update(x)
        if i in (10, 999):
            gc.collect()  # which comes seldom by itself in a process that holds much
            held.append(tracemalloc.get_traced_memory()[0])
    assert stream.num_steps == 1_000_000
    assert stream.log_evidence.isfinite().all() and update.covariance[0, 0, 0] > 0
    assert held[1] < held[0] + 100_000  # bytes


# The parallel form


@pytest.mark.parametrize("gaps", [0.0, 0.3])
def test_a_parallel_scan_gives_the_same_evidence(gaps):
    for model, shape, inputs in ((LocalLevel(0.0, 1.0, 0.5), (), {}), (TwoEntries(), (2,), {}),
                                 (linear_gaussian(seed=2), (3,), {})):
        x = gappy(3, 11, *shape, share=gaps)
        sequential = seq.KalmanFilter(model).log_evidence(x, [11, 1, 6], **inputs)
        torch.testing.assert_close(seq.KalmanFilter(model, parallel=True).log_evidence(x, [11, 1, 6], **inputs), sequential)
    model, x = LocalLevel(0.0, 1.0, 0.5), torch.randn(2, 1)
    torch.testing.assert_close(seq.KalmanFilter(model, parallel=True).log_evidence(x), seq.KalmanFilter(model).log_evidence(x))


class TwoEntries(seq.StateSpaceModel):
    """Time-varying, with a common factor."""

    def initial(self):
        return pyro.sample("z", dist.Normal(0.5, 1.0))

    def transition(self, z, t):
        return pyro.sample("z", dist.Normal(0.9 * z + 0.1 * t, 1.0 + 0.1 * t))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(torch.stack([z, 2 - z], -1), 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("make, message", [(DiffuseLevel, "needs a proper first state"),
                                           (lambda: Still(), "needs noise of full rank")])
def test_what_the_parallel_scan_cannot(make, message):
    with pytest.raises(ValueError, match=message):
        seq.KalmanFilter(make(), parallel=True).log_evidence(torch.zeros(1, 5))


class Still(LocalLevel):
    def transition(self, z):
        return pyro.sample("z", dist.Delta(z))


def test_sequences_with_the_same_gaps_share_covariances():
    """Computed once for the batch, and the same as one by one."""
    x = torch.randn(6, 15)
    x[3:, 4:7] = torch.nan
    x[5, 9] = torch.nan
    together = seq.KalmanFilter(NamedTrend()).run(x, [15, 15, 10, 15, 8, 15])
    for b, length in enumerate([15, 15, 10, 15, 8, 15]):
        alone = seq.KalmanFilter(NamedTrend()).run(x[b, :length])
        torch.testing.assert_close(together.log_evidence[b], alone.log_evidence[0])
        torch.testing.assert_close(together.smoothed["slope"].variance[b, :length], alone.smoothed["slope"].variance[0])
        torch.testing.assert_close(together.filtered["level"].mean[b, :length], alone.filtered["level"].mean[0])


def test_covariances_stand_still_only_where_they_do():
    """5000 frames with a gap near the end: beside the same without the shortcut, which a gap in the first frame forbids."""
    model = LocalLevel(0.0, 1.0, 0.5)
    x = torch.randn(1, 3000)
    x[0, 2500] = torch.nan
    whole = seq.KalmanFilter(model).run(x)
    varying = seq.KalmanFilter(TimeLevel()).run(x)
    torch.testing.assert_close(whole.log_evidence, varying.log_evidence)
    torch.testing.assert_close(whole.filtered["z"].variance, varying.filtered["z"].variance)
    torch.testing.assert_close(seq.KalmanFilter(model).run(x[:, :2000]).log_evidence_by_step,
                               seq.KalmanFilter(TimeLevel()).run(x[:, :2000]).log_evidence_by_step)


class TimeLevel(LocalLevel):
    """The same level, said to vary with time."""

    def __init__(self):
        super().__init__(0.0, 1.0, 0.5)

    def transition(self, z, t):
        return super().transition(z + 0.0 * t)


# What comes next


@pytest.mark.parametrize("make, shape", [(NamedTrend, ()), (Mixed, (3,)), (lambda: Driving(), ())])
def test_predicted_moments_of_the_data(make, shape):
    """Each frame's predictive density, where it is seen whole, is that frame's evidence; gaps have one too."""
    model, x = make(), gappy(2, 9, *shape)
    x[0] = torch.randn(9, *shape)
    inputs = {"u": torch.randn(2, 9)} if isinstance(model, Driving) else {}
    posterior = seq.KalmanFilter(model).run(x, [9, 7], **inputs)
    found = posterior.predictive["x"]
    assert found.mean.shape == x.shape
    if not shape:
        seen = ~x[:, 3:].isnan() & posterior.sequences.active[:, 3:]
        log_p = dist.Normal(found.mean[:, 3:][seen], found.std[:, 3:][seen]).log_prob(x[:, 3:][seen])
        torch.testing.assert_close(log_p, posterior.log_evidence_by_step[:, 3:][seen])
    shorter = seq.KalmanFilter(model).run(x[:1, :5], **{k: v[:1, :5] for k, v in inputs.items()})
    ahead = shorter.predict(4, num_samples=2, **{k: v[:1, 5:] for k, v in inputs.items()})
    torch.testing.assert_close(ahead.moments["x"].mean[0, 0], found.mean[0, 5])
    torch.testing.assert_close(ahead.moments["x"].variance[0, 0], found.variance[0, 5])


def test_forecast_moments_are_those_of_missing_frames():
    """The future is a gap at the end, sequence by sequence, time-varying matrices included."""
    model, x, u = Driving(), torch.randn(2, 9), torch.randn(2, 9)
    lengths = [6, 4]
    posterior = seq.KalmanFilter(model).run(x, lengths, u=u)
    ahead = posterior.predict(3, num_samples=4000, u=torch.stack([u[0, 6:9], u[1, 4:7]]))
    for b, length in enumerate(lengths):
        padded = x[b:b + 1, :length + 3].clone()
        padded[:, length:] = torch.nan
        whole = seq.KalmanFilter(model).run(padded, u=u[b:b + 1, :length + 3])
        torch.testing.assert_close(ahead.moments["z"].mean[b], whole.filtered["z"].mean[0, length:])
        torch.testing.assert_close(ahead.moments["z"].variance[b], whole.filtered["z"].variance[0, length:])
        torch.testing.assert_close(ahead.moments["x"].mean[b], whole.predictive["x"].mean[0, length:])
        torch.testing.assert_close(ahead.moments["x"].variance[b], whole.predictive["x"].variance[0, length:])
    for site in ("z", "x"):  # 12 means within 4.5 standard errors: a correct one fails once in 10 000
        error = ahead.moments[site].std / math.sqrt(4000)
        assert ((ahead.samples[site].mean(0) - ahead.moments[site].mean).abs() < 4.5 * error).all()


def test_states_in_dictionaries_of_any_order():
    class Swapped(seq.StateSpaceModel):
        def initial(self):
            return {"a": pyro.sample("a", dist.Normal(0.0, 1.0)), "b": pyro.sample("b", dist.Normal(0.0, 2.0))}

        def transition(self, z):
            b = pyro.sample("b", dist.Normal(0.5 * z["b"], 2.0))
            return {"b": b, "a": pyro.sample("a", dist.Normal(z["a"], 1.0))}

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z["a"] + z["b"], 1.0), obs=x)

    class Straight(Swapped):
        def transition(self, z):
            found = super().transition(z)
            return {"a": found["a"], "b": found["b"]}

    x = torch.randn(1, 6)
    expected = seq.KalmanFilter(Straight()).run(x).log_evidence
    torch.testing.assert_close(seq.KalmanFilter(Swapped()).run(x).log_evidence, expected)


# A vague prior of the first state


class VagueTrend(Trend):
    def __init__(self, scale):
        super().__init__(0.1)
        self.scale = scale

    def initial(self):
        level = pyro.sample("level", dist.Normal(0.0, self.scale))
        return torch.stack([level, pyro.sample("slope", dist.Normal(0.0, self.scale))], -1)


@pytest.mark.parametrize("start", [[1.0, math.nan, math.nan, 2.0, 3.0, 4.0],
                                   [math.nan, 1.0, math.nan, 2.5, 2.0, math.nan, 4.0]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_a_vague_prior_loses_no_digits(start, dtype, tolerance):
    """Smoothed moments under priors of deviations 1e4 to 1e6 are those of a diffuse start, to the order of its inverse square
    and of rounding; the evidence differs by the logarithms of the deviations."""
    x = torch.tensor([start])
    diffuse = seq.KalmanFilter(NamedTrend(0.1)).run(x)
    for scale in (1e4, 1e6):
        vague = seq.KalmanFilter(VagueTrend(scale), dtype=dtype).run(x)
        for name in ("level", "slope"):
            torch.testing.assert_close(vague.smoothed[name].mean, diffuse.smoothed[name].mean, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(vague.smoothed[name].std, diffuse.smoothed[name].std, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(vague.lag_one_covariance[name], diffuse.lag_one_covariance[name], rtol=tolerance,
                                       atol=tolerance)
        assert vague.total_log_evidence + 2 * math.log(scale) == pytest.approx(diffuse.total_log_evidence, rel=tolerance)
        torch.testing.assert_close(vague.log_evidence_by_step.sum(1), vague.log_evidence, rtol=1e-5, atol=0)


def test_vague_and_plain_forms_agree(monkeypatch):
    """The same model by both forms: moments, steps, paths (5000, within 4.5 standard errors), gradients, streams."""
    x, model = gappy(2, 8), VagueTrend(100.0)
    taken = seq.KalmanFilter(model).run(x, [8, 6])
    draws, level = taken.trajectories(5000).samples["level"], taken.smoothed["level"]
    assert ((draws.mean(0) - level.mean).abs() < 4.5 * level.std / math.sqrt(5000) + 1e-12).all()
    spread = (draws - level.mean) / level.std.clamp(min=1e-9)
    assert ((spread.square().mean(0) - 1).abs()[taken.sequences.active] < 4.5 * math.sqrt(2 / 5000)).all()
    stream = seq.KalmanFilter(model).stream(2)
    by_step = torch.cat([stream.update(part).log_evidence for part in x.split(3, 1)], 1)
    monkeypatch.setattr("pyro_seq.infer.linear_gaussian.diffuse._VAGUE", {torch.float64: math.inf})
    plain = seq.KalmanFilter(model).run(x, [8, 6])
    for name in ("level", "slope"):
        for what in ("filtered", "smoothed"):
            ours, theirs = (getattr(p, what)[name] for p in (taken, plain))
            torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(taken.log_evidence_by_step, plain.log_evidence_by_step)
    torch.testing.assert_close(by_step, seq.KalmanFilter(model).run(x).log_evidence_by_step)
    torch.testing.assert_close(taken.predictive["x"].variance, plain.predictive["x"].variance)


def test_precision_is_not_lost_in_silence():
    x = torch.randn(1, 12) * 1e4 + 1e6
    model = LocalLevel(0.0, 1e8, 1e-8, 1e8)
    assert seq.KalmanFilter(model).log_evidence(x).isfinite()
    with pytest.raises(ValueError, match="would lose most digits.*parallel=False"):
        seq.KalmanFilter(model, parallel=True).log_evidence(x)


@pytest.mark.parametrize("make", [lambda: DiffuseLevel(2.0, 3.0), lambda: seq.models.ARIMA((0, 1, 1))])
def test_diffuse_starts_in_another_type_than_the_default(make):
    torch.set_default_dtype(torch.float32)
    model = make().double()
    x = torch.randn(1, 8, dtype=torch.float64)
    assert seq.KalmanFilter(model).run(x).log_evidence.dtype == torch.float64
    assert seq.inspect(model, x).applies("KalmanFilter")


def test_evidence_inside_a_program_without_gradients():
    class Scaled(DiffuseLevel):
        def __init__(self):
            super().__init__()
            self.scale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(z, self.scale))

    model = Scaled()
    with torch.no_grad():
        assert model.within(lambda: seq.KalmanFilter(model).log_evidence(torch.randn(1, 5))).isfinite()
