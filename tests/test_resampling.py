"""Resampling: what each scheme does to counts, evidence and gradients.

Stochastic tests compare an average over independent copies with its exact value, in units of its Monte Carlo standard error.
The bound of 4.5 is passed with probability 7e-6 by one number that is right, 1e-3 by all of this file's together.
"""

import contextlib
import math
import pickle
import warnings
from functools import partial, wraps
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import HiddenMarkov, LocalLevel, linear_gaussian, ragged

import pyro_seq as seq
from pyro_seq.engine import loop
from pyro_seq.engine.loop import forward
from pyro_seq.engine.weights import Weights
from pyro_seq.infer.posterior import BIASED, UNBIASED
from pyro_seq.infer.run import entered
from pyro_seq.infer.smc.population import Population
from pyro_seq.resampling import (
    NAMES,
    Ancestral,
    Metropolis,
    OptimalTransport,
    Soft,
    StopGradient,
    multinomial,
    named,
    residual,
    resolve,
    stratified,
    systematic,
)

BOUND = 4.5
EXACT_SCHEMES = {"multinomial": multinomial, "stratified": stratified, "systematic": systematic, "residual": residual}
UNBIASED_NAMES = [name for name in NAMES if resolve(name).unbiased]
ANCESTRAL_NAMES = [name for name in NAMES if resolve(name).ancestral]
WEIGHTS = torch.tensor([0.0, 0.31, 0.05, 0.0, 0.24, 0.4, 0.0], dtype=torch.float64)


def counts_of(ancestors, particles):
    return torch.zeros(len(ancestors), particles).scatter_add_(1, ancestors, torch.ones(ancestors.shape))


def z_score(samples, expected):
    """Of the mean over the first dimension; zero where there is no spread and the value is right."""
    error = samples.std(0) / math.sqrt(len(samples))
    off = (samples.mean(0) - expected).abs()
    return torch.where(off < 1e-9, 0.0, off / error)


def variance_of_counts(name, w):
    """``(N,)`` variance of the number of copies of each particle, in closed form."""
    n = len(w)
    expected = n * w
    part = expected - expected.floor()
    if name == "multinomial":
        return expected * (1 - w)
    if name == "systematic":
        return part * (1 - part)
    if name == "residual":
        return part * (1 - part / part.sum())
    right = expected.cumsum(0)
    stratum = torch.arange(n + 1.0)
    inside = right[:, None].clamp(stratum[:-1], stratum[1:]) - (right - expected)[:, None].clamp(stratum[:-1], stratum[1:])
    return (inside * (1 - inside)).sum(1)


@pytest.mark.parametrize("name", EXACT_SCHEMES)
def test_counts_have_the_mean_and_variance_of_their_scheme(name):
    counts = counts_of(EXACT_SCHEMES[name](WEIGHTS.expand(20000, -1)), len(WEIGHTS))
    expected = len(WEIGHTS) * WEIGHTS
    assert (counts[:, WEIGHTS == 0] == 0).all()
    assert z_score(counts, expected).max() < BOUND
    assert z_score((counts - expected).square(), variance_of_counts(name, WEIGHTS)).max() < BOUND


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_metropolis_is_the_chain_it_says(steps):
    """Its counts are those of the chain's matrix, whose distance from the weights is below the documented bound."""
    w, n = WEIGHTS, len(WEIGHTS)
    matrix = torch.where(w[:, None] == 0, (w > 0).double()[None, :], (w / w[:, None]).clamp(max=1)) / n
    matrix = matrix - matrix.diagonal().diag()
    matrix = (matrix + (1 - matrix.sum(1)).diag()).matrix_power(steps)
    counts = counts_of(Metropolis(steps)(w.expand(20000, -1)), n)
    assert z_score(counts, matrix.sum(0)).max() < BOUND
    assert ((matrix - w).abs().sum(1) / 2).max() <= (1 - 1 / (n * w.max())) ** steps + 1e-12


def test_ordering_of_variances():
    """Stratified and residual resampling never add more variance than multinomial (Douc and Cappé, 2005)."""
    for _ in range(4):
        w, f = torch.randn(20).mul(1.5).softmax(-1), torch.randn(20)
        spread = {name: f[scheme(w.expand(4000, -1))].mean(-1).var() for name, scheme in EXACT_SCHEMES.items()}
        # The standard error of a ratio of variances is 3 %.
        assert spread["stratified"] < 1.15 * spread["multinomial"]
        assert spread["residual"] < 1.15 * spread["multinomial"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT_SCHEMES)
def test_a_million_particles(name, dtype):
    """No particle of weight zero is chosen, and no other is misplaced, also at single precision."""
    n = 1_000_000
    log = torch.randn(1, n, dtype=dtype) * 2
    log[torch.rand(1, n) < 0.1] = -torch.inf
    log[:, :3] = log[:, -3:] = -torch.inf
    w = log.softmax(-1)
    ancestors = EXACT_SCHEMES[name](w)
    assert ancestors.shape == w.shape and ancestors.dtype == torch.long
    counts = counts_of(ancestors, n)
    assert counts.sum() == n and not counts[w == 0].any()
    expected = n * w.double() / w.double().sum()
    off, slack = counts - expected, 1e-6
    if name == "systematic":
        assert (off > -1 - slack).all() and (off < 1 + slack).all()
    if name == "stratified":
        assert (off > -2 - slack).all() and (off < 2 + slack).all()
    if name == "residual":
        assert (counts >= (expected - slack).floor()).all()
    if name == "multinomial":
        assert ((off / expected.sqrt())[expected > 50].abs() < 6).all()


@pytest.mark.parametrize("value", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("name", EXACT_SCHEMES)
def test_the_ends_of_the_random_numbers(name, value, monkeypatch):
    monkeypatch.setattr("pyro_seq.resampling.inversion.draw_uniform",
                        lambda shape, like: torch.full((shape,) if isinstance(shape, int) else shape, value))
    for n in (1, 2, 7, 999):
        w = torch.rand(3, n)
        w[1, :n // 3] = w[1, n - n // 3:] = 0
        w[2] = 1 / n
        counts = counts_of(EXACT_SCHEMES[name](w), n)
        assert (counts.sum(1) == n).all() and not counts[w == 0].any()


@pytest.mark.parametrize("name", ["stratified", "systematic", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_change_nothing(name, dtype):
    for n in (3, 49, 1000):
        w = torch.zeros(2, n, dtype=dtype).softmax(-1)
        assert (EXACT_SCHEMES[name](w) == torch.arange(n)).all()


def same_for_all(shape, like):
    """Random numbers that are the same for each sequence, whatever the batch."""
    shape = (shape,) if isinstance(shape, int) else shape
    generator = torch.Generator(like.device).manual_seed(5)
    return torch.rand(shape[1:], generator=generator, dtype=like.dtype, device=like.device).expand(shape).clone()


@pytest.fixture
def shared_uniforms(monkeypatch):
    for module in ("inversion", "metropolis"):
        monkeypatch.setattr(f"pyro_seq.resampling.{module}.draw_uniform", same_for_all)


@pytest.mark.parametrize("name", NAMES)
def test_sequences_do_not_see_each_other(name, shared_uniforms, row_noise):
    lengths = torch.tensor([4, 6, 2, 5])
    x = torch.randn(4, 6)
    method = seq.ParticleFilter(LocalLevel(0.0, 1.0, 1.0, 0.5), 8, ess_threshold=0.7, resampling=name)
    both = method.run(ragged(x, lengths), lengths)
    for b in range(4):
        row_noise.ids = [b]
        alone = method.run(x[b:b + 1, :lengths[b]])
        torch.testing.assert_close(alone.log_evidence[0], both.log_evidence[b], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.filtered["z"].mean[0], both.filtered["z"].mean[b, :lengths[b]], rtol=1e-8, atol=1e-8)


def test_transport_of_one_sequence_does_not_see_the_others():
    z, log = torch.randn(5, 12, 2), torch.randn(5, 12) * torch.arange(5.0)[:, None]
    all_of_them, _ = OptimalTransport(0.1)(Weights.of(log), z.flatten(0, 1))
    for b in range(5):
        alone, _ = OptimalTransport(0.1)(Weights.of(log[b:b + 1]), z[b])
        torch.testing.assert_close(alone[0], all_of_them[b], rtol=1e-10, atol=1e-12)


# Evidence.

SERIES = torch.tensor([[0.5, 1.5, 0.2, -0.8, 0.4]], dtype=torch.float64)


def cases(name):
    if name == "linear":
        model = LocalLevel(0.0, 1.0, 1.0, 0.5)
        return model, seq.KalmanFilter(model).run(SERIES).log_evidence
    model = HiddenMarkov(3)
    return model, seq.ForwardBackward(model).run(SERIES).log_evidence


def evidence_z(name, resampling, ess_threshold, copies=4000, particles=5):
    model, exact = cases(name)
    found = seq.ParticleFilter(model, particles, resampling=resampling, ess_threshold=ess_threshold).run(
        SERIES.expand(copies, -1))
    assert found.kind == UNBIASED
    return z_score((found.log_evidence - exact).exp(), 1.0)


@pytest.mark.parametrize("ess_threshold", [0.5, 1.0])
@pytest.mark.parametrize("resampling", UNBIASED_NAMES)
@pytest.mark.parametrize("name", ["linear", "discrete"])
def test_evidence_is_unbiased(name, resampling, ess_threshold):
    assert evidence_z(name, resampling, ess_threshold) < BOUND


@pytest.mark.filterwarnings("ignore:one of 5 particles has all the weight")
@pytest.mark.parametrize("resampling", ["systematic", "soft", "stop_gradient"])
def test_the_wrong_order_is_found_out(resampling, monkeypatch):
    """Particles that are resampled only after they were moved and weighed keep the weights of others (Pyro issue 2138)."""
    step, select, pending = loop.weighted_step, loop.select, []

    def too_late(*args):
        sites, after, *rest = step(*args)
        return sites, select(after, pending.pop()) if pending else after, *rest

    monkeypatch.setattr(loop, "select", lambda state, plan: pending.append(plan) or state)
    monkeypatch.setattr(loop, "weighted_step", too_late)
    assert evidence_z("linear", resampling, 1.0) > 2 * BOUND


class Seeing:
    """Favours the particles under which the frame to come is likely."""

    def __call__(self, frame, state, encoding):
        return dist.Normal(state, 1.2).log_prob(frame.x["x"])


def log_evidence(model, guide, sequences, particles, population):
    """``(B,)``, with gradients, of sequences of equal lengths."""
    def run(_):
        return sum(population.weigh(step) for step in forward(model, guide, sequences, particles, between=population.between))

    return entered(model, guide, sequences, run, learning=True)


@pytest.mark.parametrize("ess_threshold", [0.5, 1.0])
@pytest.mark.parametrize("resampling", [*UNBIASED_NAMES, Soft(0.2, "residual"), StopGradient("stratified")])
def test_look_ahead_is_unbiased(resampling, ess_threshold):
    model, exact = cases("linear")
    batch = seq.Sequences.of(SERIES.expand(4000, -1))
    with torch.no_grad():
        found = log_evidence(model, seq.PriorGuide(model), batch, 5, Population(resolve(resampling), ess_threshold, Seeing()))
    assert z_score((found - exact).exp(), 1.0) < BOUND


def test_kinds():
    model = LocalLevel(0.0, 1.0, 1.0, 0.5)
    for name in NAMES:
        kind = seq.ParticleFilter(model, 5, resampling=name).run(SERIES).kind
        assert kind == (UNBIASED if name in UNBIASED_NAMES else BIASED)
    assert set(NAMES) - set(UNBIASED_NAMES) == {"metropolis", "optimal_transport"}
    for resampling in (Metropolis(5), Ancestral(Metropolis(5)), Soft(0.5, "metropolis"), StopGradient("metropolis")):
        assert seq.ParticleFilter(model, 5, resampling=resampling).run(SERIES).kind == BIASED


def of_ones_own(weights):
    return systematic(weights)


class Claimed:
    def __init__(self, unbiased):
        self.unbiased = unbiased

    def __call__(self, weights):
        return systematic(weights)


def test_nobody_claims_for_a_function_of_the_users_that_it_is_unbiased():
    model = LocalLevel(0.0, 1.0, 1.0, 0.5)
    for resampling, kind in ((of_ones_own, "log of an estimate, unbiased if of_ones_own is"),
                             (Soft(0.5, of_ones_own), "log of an estimate, unbiased if of_ones_own is"),
                             (partial(systematic), "log of an estimate, unbiased if partial is"),
                             (Claimed(True), UNBIASED), (Claimed(False), BIASED), (systematic, UNBIASED)):
        assert seq.ParticleFilter(model, 5, resampling=resampling).run(SERIES).kind == kind
    assert not StopGradient(of_ones_own).unbiased_gradient and StopGradient(Claimed(True)).unbiased_gradient


@wraps(systematic)
def all_from_the_second(weights):
    return torch.ones_like(weights, dtype=torch.long)


def test_a_wrapped_function_is_called_itself():
    ancestors, _ = Ancestral(all_from_the_second)(Weights.of(torch.zeros(2, 3)), None)
    assert (ancestors == 1).all()


def test_filters_call_the_schemes_without_their_checks(monkeypatch):
    monkeypatch.setattr("pyro_seq.resampling.checks.require_weights", lambda *_: 1 / 0)
    monkeypatch.setattr("pyro_seq.resampling.metropolis.require_weights", lambda *_: 1 / 0)
    for scheme in (*EXACT_SCHEMES.values(), Metropolis(5)):
        Ancestral(scheme)(Weights.of(torch.zeros(2, 3)), None)
        with pytest.raises(ZeroDivisionError):
            scheme(torch.ones(2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_resamplers_can_be_stored(name):
    assert named(pickle.loads(pickle.dumps(resolve(name)))) == named(resolve(name))


def added_bias(resampler, particles, copies):
    """What resampling adds to the evidence of two frames, relative: its mean and standard error.

    Of particles from the prior, weighted by the first frame, the second frame's likelihood h is taken before and after; what
    is taken before is unbiased, and the difference has little variance.
    """
    z = torch.randn(copies, particles)
    weights = Weights.of(-0.5 * (1.0 - z).square() / 0.5)
    plan, _ = resampler(weights, z.reshape(-1, 1))

    def h(z):
        return torch.exp(-0.5 * (0.3 - z).square() / 0.6)

    moved = torch.einsum("nij,nj->ni", plan, z) if plan.is_floating_point() else z.gather(1, plan)
    first, before = weights.log_mean.exp(), (weights.normalised * h(z)).sum(-1)
    added = first * (h(moved).mean(-1) - before) / (first * before).mean()
    return added.mean().item(), added.std().item() / math.sqrt(copies)


def slope(x, means, errors):
    """Of log |mean| in x, weighted by precision, and its standard error."""
    x, means = torch.tensor(x), torch.tensor(means)
    sd = torch.tensor(errors) / means.abs()
    w = sd.pow(-2)
    centered = x - (w * x).sum() / w.sum()
    spread = (w * centered.square()).sum()
    return ((w * centered * means.abs().log()).sum() / spread).item(), spread.rsqrt().item()


def test_transport_converges_as_epsilon_falls():
    """With epsilon = 1 / sqrt(N) the bias falls as fast, N ** -0.5; with a fixed one it stays."""
    sizes = [8, 16, 32, 64]
    found = [added_bias(OptimalTransport(n**-0.5), n, 4000 // n) for n in sizes]
    rate, error = slope([math.log(n) for n in sizes], *zip(*found))
    assert abs(rate + 0.5) < 0.1 and error < 0.03
    for n in (8, 64):
        mean, error = added_bias(OptimalTransport(0.5), n, 4000 // n)
        assert 0.045 < mean < 0.07 and error < 0.004


def test_metropolis_converges_as_the_chain_grows():
    """The bias falls geometrically in the steps, whatever N."""
    steps = [1, 2, 3]
    for n in (16, 128):
        found = [added_bias(resolve(Metropolis(s)), n, 400_000 // n) for s in steps]
        rate, error = slope([float(s) for s in steps], *zip(*found))
        assert -1.6 < rate < -0.9 and error < 0.1


# Gradients.


class Switching(seq.StateSpaceModel):
    """A chain of two states whose every probability hangs on ``theta``, given with each frame: gradients by sequence."""

    def initial(self, theta):
        return pyro.sample("k", dist.Bernoulli(logits=theta[:, 0]))

    def transition(self, k, theta):
        return pyro.sample("k", dist.Bernoulli(logits=theta[:, 0] + theta[:, 1] * (2 * k - 1)))

    def emission(self, k, theta, x=None):
        return pyro.sample("x", dist.Normal(theta[:, 2] * (2 * k - 1), 0.8), obs=x)


class Fair(seq.SequentialGuide):
    def step(self, state, x):
        pyro.sample("k", dist.Bernoulli(torch.full_like(x, 0.5)))


THETA = torch.tensor([0.3, 0.8, 0.7], dtype=torch.float64)


def exact_evidence(theta):
    """``p(x)`` of one series by the forward algorithm."""
    k = torch.tensor([-1.0, 1.0])
    emission = dist.Normal(theta[2] * k, 0.8).log_prob(SERIES[0, :, None]).exp()
    up = torch.sigmoid(theta[0] + theta[1] * k)
    matrix, alpha = torch.stack([1 - up, up], -1), torch.stack([1 - torch.sigmoid(theta[0]), torch.sigmoid(theta[0])])
    total = alpha * emission[0]
    for row in emission[1:]:
        total = (total @ matrix) * row
    return total.sum()


def gradients(resampling, ess_threshold=1.0, copies=4000, particles=4, look_ahead=None):
    """``(copies, 3)`` of independent estimates of the evidence, and ``(copies,)`` these."""
    model = Switching()
    theta = THETA.expand(copies, SERIES.shape[1], 3).clone().requires_grad_()
    batch = seq.Sequences.of(SERIES.expand(copies, -1), covariates={"theta": theta})
    population = Population(resolve(resampling), ess_threshold, look_ahead)
    estimate = log_evidence(model, Fair(model), batch, particles, population).exp()
    return torch.autograd.grad(estimate.sum(), theta)[0].sum(1), estimate.detach()


@pytest.mark.parametrize("look_ahead", [None, Seeing()])
@pytest.mark.parametrize("ess_threshold", [0.7, 1.0])
@pytest.mark.parametrize("scheme", EXACT_SCHEMES)
def test_stop_gradient_estimates_the_gradient_of_the_evidence(scheme, ess_threshold, look_ahead):
    theta = THETA.clone().requires_grad_()
    exact = exact_evidence(theta)
    expected, = torch.autograd.grad(exact, theta)
    found, estimate = gradients(StopGradient(scheme), ess_threshold, look_ahead=look_ahead)
    assert z_score(estimate, exact.detach()) < BOUND
    assert z_score(found, expected).max() < BOUND


@pytest.mark.parametrize("resampling", ["systematic", Soft(0.5)])
def test_without_it_the_gradient_is_biased(resampling):
    theta = THETA.clone().requires_grad_()
    expected, = torch.autograd.grad(exact_evidence(theta), theta)
    found, _ = gradients(resampling, copies=20000)
    assert found.isfinite().all()
    assert z_score(found, expected).max() > 1.5 * BOUND


@pytest.mark.parametrize("look_ahead", [None, Seeing()])
def test_stop_gradient_leaves_the_forward_pass_alone(look_ahead):
    pyro.set_rng_seed(1)
    plain = gradients("systematic", copies=50, look_ahead=look_ahead)[1]
    pyro.set_rng_seed(1)
    torch.testing.assert_close(gradients("stop_gradient", copies=50, look_ahead=look_ahead)[1], plain, rtol=1e-12, atol=0)


class Decay(seq.StateSpaceModel):
    """A reparameterised walk whose decay and scale are given with each frame."""

    def initial(self, theta):
        return pyro.sample("z", dist.Normal(0.0, theta[:, 1]))

    def transition(self, z, theta):
        return pyro.sample("z", dist.Normal(theta[:, 0] * z, theta[:, 1]))

    def emission(self, z, theta, x=None):
        return pyro.sample("x", dist.Normal(z, 0.8), obs=x)


@pytest.mark.parametrize("resampling", [OptimalTransport(0.2, 1e-12, 10000), Soft(0.5), StopGradient()])
def test_gradients_of_reparameterised_particles(resampling):
    """Finite; and of a filter by transport, which is a smooth function, those of finite differences."""
    model = Decay()

    def estimate(theta):
        pyro.set_rng_seed(3)
        batch = seq.Sequences.of(SERIES, covariates={"theta": theta.expand(1, SERIES.shape[1], 2)})
        population = Population(resampling, 1.0)
        return log_evidence(model, seq.PriorGuide(model), batch, 6, population).sum()

    theta = torch.tensor([0.8, 0.7], requires_grad=True)
    found, = torch.autograd.grad(estimate(theta), theta)
    assert found.isfinite().all() and (found != 0).all()
    if isinstance(resampling, OptimalTransport):
        for i, step in enumerate(torch.eye(2) * 1e-5):
            with torch.no_grad():
                difference = (estimate(theta + step) - estimate(theta - step)) / 2e-5
            torch.testing.assert_close(found[i], difference, rtol=1e-6, atol=1e-8)


def test_gradients_of_the_transport():
    z, log = torch.randn(10, 2, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    transport = OptimalTransport(0.3, 1e-13, 100_000)
    assert torch.autograd.gradcheck(
        lambda z, log: transport(Weights.of(log), {"a": z[:, :1], "b": z[:, 1], "k": torch.zeros(10, dtype=torch.long)})[0],
        (z, log))


def test_gradients_where_particles_have_no_weight_or_are_all_alike():
    log = torch.randn(2, 6)
    log[0, 2] = -torch.inf
    for z in (torch.randn(12, 2), torch.ones(12, 2)):
        for resampler in (OptimalTransport(), Soft(0.3), StopGradient(), StopGradient("metropolis")):
            z, leaf = z.clone().requires_grad_(), log.clone().requires_grad_()
            weights = Weights.of(leaf)
            plan, fresh = resampler(weights, z)
            after = loop.select(z, plan).reshape(2, 6, 2)
            loss = (after.square().sum(-1) * fresh.softmax(-1)).sum() + Weights.of(fresh).log_mean.sum()
            for gradient in torch.autograd.grad(loss, (z, leaf), allow_unused=True):
                assert gradient is None or gradient.isfinite().all()


# The transport.


@pytest.mark.parametrize("epsilon", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_transport_has_its_marginals(epsilon, dtype, tolerance):
    z, weights = torch.randn(3 * 40, 2, dtype=dtype), Weights.of(torch.randn(3, 40, dtype=dtype) * 1.5)
    plan, fresh = OptimalTransport(epsilon, tolerance, 100_000)(weights, z)
    assert plan.dtype == dtype and (plan >= 0).all() and (fresh == 0).all()
    assert (plan.sum(-1) - 1).abs().max() < 1e-5
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert (plan.mean(1) - weights.normalised).abs().sum(-1).max() < tolerance + rounding
    # The scale and the place of the states do not matter, nor does how they are held.
    moved, _ = OptimalTransport(epsilon, tolerance, 100_000)(weights, (7.0 * z[:, 1:] - 3, 7.0 * z[:, 0]))
    torch.testing.assert_close(moved, plan, rtol=1e-2 if dtype == torch.float32 else 1e-7, atol=1e-4)


def test_transport_at_small_epsilon_is_the_sorted_one():
    """In one dimension optimal transport keeps the order: a new particle is the mean of a stretch of the weighted old ones."""
    z, log = torch.tensor([0.0, 1.0, 2.5, 4.0]), torch.tensor([[0.3, 0.4, 0.2, 0.1]]).log()
    plan, _ = OptimalTransport(0.03, 1e-4, 10_000)(Weights.of(log), z)
    torch.testing.assert_close(plan[0] @ z, torch.tensor([0.0, 0.8, 1.3, 3.1]), rtol=0, atol=1e-3)


def test_transport_warns_where_it_has_not_converged():
    with pytest.warns(UserWarning, match="stopped after 2 iterations with column sums that are off by .*larger epsilon"):
        OptimalTransport(0.01, max_iterations=2)(Weights.of(torch.randn(1, 20)), torch.randn(20))


# What users meet.


@pytest.mark.parametrize("name", NAMES)
def test_every_resampling_on_every_kind_of_run(name):
    model, x, lengths = linear_gaussian(), torch.randn(3, 5, 3), torch.tensor([5, 3, 4])
    x[0, 2] = torch.nan
    with meta_default():
        posterior = seq.ParticleFilter(model, 7, resampling=name, history=True).run(x, lengths)
    assert posterior.log_evidence.isfinite().all() and posterior.quantile("z", 0.5).shape == (3, 5, 2)
    assert posterior.predict(2, 4).samples["x"].shape == (4, 3, 2, 3)
    if name in ANCESTRAL_NAMES:
        assert posterior.trajectories(3).samples["z"].shape == (3, 3, 5, 2)
    averaged = seq.ParticleFilter(model, 7, resampling=name, num_runs=3, ess_threshold=0.9).run(x, lengths)
    assert averaged.standard_error.isfinite().all()


@contextlib.contextmanager
def meta_default():
    """Nothing is made on the default device, on CPU runs of the tests: as in test_devices."""
    if torch.zeros(()).device.type != "cpu":
        yield
        return
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_rao_blackwellised():
    class TwoNoises(seq.SequentialModel):
        def start(self, rows):
            return {"k": torch.zeros(rows, dtype=torch.long), "z": torch.zeros(rows)}

        def step(self, state, x=None):
            k = pyro.sample("k", dist.Categorical(torch.tensor([[0.9, 0.1], [0.3, 0.7]])[state["k"]]))
            z = pyro.sample("z", dist.Normal(state["z"], torch.tensor([0.1, 2.0])[k]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return {"k": k, "z": z}

    for name in ANCESTRAL_NAMES:
        posterior = seq.RaoBlackwellisedFilter(TwoNoises(), 5, resampling=name, ess_threshold=1.0).run(SERIES)
        assert posterior.kind == (UNBIASED if name in UNBIASED_NAMES else BIASED)
    with pytest.raises(ValueError, match="OptimalTransport mixes particles, and those of a RaoBlackwellisedFilter are whole"):
        seq.RaoBlackwellisedFilter(TwoNoises(), 5, resampling="optimal_transport")


def plain_function(x):
    with pyro.plate("data", len(x)):
        z = 0.0
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t + 1}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t + 1}", dist.Normal(z, 1.0), obs=x[:, t])


def filtered(resampling, model=None, **options):
    return seq.ParticleFilter(model or LocalLevel(0.0, 1.0, 1.0, 0.5), 6, ess_threshold=1.0, resampling=resampling,
                              **options).run(SERIES)


MISTAKES = {
    "name": (lambda: filtered("systemic"), ValueError,
             r"no resampling 'systemic'; there are \['multinomial', 'stratified', 'systematic', 'residual', 'metropolis', "
             r"'soft', 'stop_gradient', 'optimal_transport'\]"),
    "class": (lambda: filtered(Soft), TypeError, r"resampling=Soft is a class: make one, resampling=Soft\(...\)"),
    "number": (lambda: filtered(0.5), TypeError, r"resampling=0.5; it is one of \[.*a function from probabilities"),
    "scheme": (lambda: Soft(0.5, "soft"), ValueError, r"no scheme 'soft'; there are \['metropolis', 'multinomial'"),
    "resampler as scheme": (lambda: StopGradient(Soft()), TypeError, "it is one of .*or a function from probabilities"),
    "alpha": (lambda: Soft(1.0), ValueError, r"alpha=1.0; it is the share of the weights.*use Ancestral"),
    "alpha's type": (lambda: Soft("systematic"), ValueError, "alpha='systematic'; it is the share of the weights"),
    "steps": (lambda: Metropolis(0), ValueError, "steps=0; it is at least 1"),
    "epsilon": (lambda: OptimalTransport(0), ValueError, "epsilon=0; it is a positive number"),
    "tolerance": (lambda: OptimalTransport(tolerance=-1), ValueError, "tolerance=-1; it is a positive number"),
    "iterations": (lambda: OptimalTransport(max_iterations=2.5), TypeError, "max_iterations=2.5 is not an integer"),
    "discrete": (lambda: filtered("optimal_transport", HiddenMarkov()), ValueError, "holds no floating numbers for Optimal"),
    "trajectories": (lambda: filtered("optimal_transport", history=True).trajectories(2), ValueError,
                     "have no ancestors to trace: use a resampling by ancestors"),
    "path": (lambda: filtered("optimal_transport", seq.from_pyro(plain_function)), ValueError,
             "mixes the particles' states, and the state of a from_pyro model is its path"),
    "look-ahead": (lambda: OptimalTransport()(Weights.of(torch.zeros(1, 3)), torch.zeros(3), torch.zeros(1, 3)), ValueError,
                   "no weights make up for a look-ahead: use a resampling by ancestors"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    wrong, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        wrong()


def test_the_table_of_the_docs():
    """Name, unbiased, gradients, trajectories: as the resamplers say of themselves."""
    page = (Path(__file__).parents[1] / "docs" / "resampling.rst").read_text()
    rows = [[line.strip(" *-") for line in row.splitlines()] for row in page.split("    * - ")[2:]]
    for name, row in zip(NAMES, rows, strict=True):
        resampler = resolve(name)
        gradient = "none" if not resampler.differentiable else "unbiased" if resampler.unbiased_gradient else "biased"
        assert row[:4] == [f"``{name}``", "yes" if resampler.unbiased else "no", gradient,
                           "yes" if resampler.ancestral else "no"]


def test_no_warnings_in_the_usual_case():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filtered(OptimalTransport(0.1))
