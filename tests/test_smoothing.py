"""Particle smoothers against exact ones, over many independent runs: a batch of copies of one series.

Averages over runs weigh each run by its evidence estimate, which makes them consistent in the number of runs whatever the
number of particles. A comparison fails when it is more than 5 standard errors off, 6e-7 each for a normal error.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import VRNN, Driven, HiddenMarkov, LocalLevel, TwoSites, linear_gaussian

import pyro_seq as seq
from pyro_seq.engine.loop import forward
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.run import entered
from pyro_seq.infer.smc.population import Population
from pyro_seq.infer.smoothing.kernel import BackwardKernel
from pyro_seq.resampling import Ancestral, systematic

LEVEL = 5.0
NAN = math.nan


class Halfway(seq.SequentialGuide):
    def step(self, state, x):
        before = torch.zeros_like(x) if state is None else state
        pyro.sample("z", dist.Normal((before + x) / 2, 0.6))


class Echo(seq.SequentialModel):
    """The frame also reads the state before, and the state reads the frame: none of the densities of a step cancels."""

    def start(self, rows):
        return {"z": torch.zeros(rows), "x": torch.zeros(rows)}

    def step(self, state, x=None):
        z = pyro.sample("z", dist.Normal(0.7 * state["z"] + 0.3 * state["x"], 0.6))
        x = pyro.sample("x", dist.Normal(z + 0.5 * state["z"], 0.5), obs=x)
        return {"z": z, "x": x}


def copies(x, lengths, runs):
    """``runs`` of each of the sequences, one sequence after the other."""
    return x.repeat_interleave(runs, 0), [n for n in lengths for _ in range(runs)]


def weighed(log_evidence, value, count):
    """Mean ``(count, ...)`` over the runs of each sequence, and its standard error."""
    share = log_evidence.reshape(count, -1).softmax(-1)
    value = value.reshape(count, share.shape[1], *value.shape[1:])
    share = share.reshape(*share.shape, *(1,) * (value.dim() - 2))
    mean = (share * value).sum(1)
    return mean, (share.square() * (value - mean[:, None]).square()).sum(1).sqrt()


def agree(found, error, exact, inside):
    z = (found - exact).abs() / error.clamp(min=1e-12)
    assert (z[inside] < LEVEL).all(), z


SMOOTHERS = {
    "genealogy": lambda model, **kw: seq.ParticleFilter(model, 60, history=True, **kw),
    "long lag": lambda model, **kw: seq.FixedLagSmoother(model, 60, lag=9, **kw),
    "exact": lambda model, **kw: seq.BackwardSampler(model, 60, num_trajectories=5, **kw),
    "rejection": lambda model, **kw: seq.BackwardSampler(model, 60, num_trajectories=5, method="rejection", **kw),
}


@pytest.mark.parametrize("ess_threshold", [1.0, 0.5])
@pytest.mark.parametrize("guided", [False, True], ids=["bootstrap", "guided"])
@pytest.mark.parametrize("name", SMOOTHERS)
def test_moments_are_those_of_the_kalman_smoother(name, guided, ess_threshold):
    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    x = torch.tensor([[0.3, -0.8, NAN, 1.2, 0.4, 0.1, -1.0], [1.0, 0.5, 0.2, NAN, NAN, NAN, NAN]])
    x[1, 3] = -0.4
    lengths = [7, 4]
    exact = seq.KalmanFilter(model).run(x, lengths)
    guide = Halfway(model) if guided else None
    found = SMOOTHERS[name](model, guide=guide, ess_threshold=ess_threshold).run(*copies(x, lengths, 400))
    inside = exact.sequences.active
    mean, error = weighed(found.log_evidence, found.smoothed["z"].mean, 2)
    agree(mean, error, exact.smoothed["z"].mean, inside)
    second = found.smoothed["z"].variance + found.smoothed["z"].mean.square()
    mean, error = weighed(found.log_evidence, second, 2)
    agree(mean, error, exact.smoothed["z"].variance + exact.smoothed["z"].mean.square(), inside)
    assert (found.smoothed["z"].mean[400:, 4:] == 0).all()


@pytest.mark.parametrize("name", SMOOTHERS)
def test_moments_are_those_of_forward_backward(name):
    model = HiddenMarkov()
    x = model.simulate([6])["x"]
    x[0, 2] = NAN
    exact = seq.ForwardBackward(model).run(x)
    found = SMOOTHERS[name](model).run(*copies(x, [6], 500))
    for site in exact.smoothed:
        mean, error = weighed(found.log_evidence, found.smoothed[site].mean, 1)
        agree(mean, error, exact.smoothed[site].mean, exact.sequences.active)


@pytest.mark.parametrize("name", ["genealogy", "exact"])
def test_every_density_of_the_step_counts(name):
    model = Echo()
    x = torch.tensor([[0.3, -0.8, NAN, 1.2, 0.4, -1.0]])
    exact = seq.KalmanFilter(model).run(x)
    found = SMOOTHERS[name](model).run(*copies(x, [6], 500))
    mean, error = weighed(found.log_evidence, found.smoothed["z"].mean, 1)
    agree(mean, error, exact.smoothed["z"].mean, exact.sequences.active)


@pytest.mark.parametrize("name", SMOOTHERS)
def test_covariates_go_with_their_rows(name):
    model = Driven()
    x, u = torch.randn(2, 5), torch.randn(2, 5, 2)
    exact = seq.KalmanFilter(model).run(x, [5, 3], u=u)
    found = SMOOTHERS[name](model).run(*copies(x, [5, 3], 300), u=u.repeat_interleave(300, 0))
    mean, error = weighed(found.log_evidence, found.smoothed["z"].mean, 2)
    agree(mean, error, exact.smoothed["z"].mean, exact.sequences.active)


@pytest.mark.parametrize("method", ["exact", "rejection"])
def test_pairs_along_the_trajectories(method):
    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    x = torch.tensor([[0.3, -0.8, 0.5, 1.2, 0.4]])
    posterior = seq.BackwardSampler(model, 60, num_trajectories=4, method=method).run(*copies(x, [5], 600))
    paths = posterior.trajectories(4).samples["z"]
    found, error = weighed(posterior.log_evidence, (paths[..., 1:] * paths[..., :-1]).mean(0), 1)
    mean, covariance = dense(x[0])
    exact = covariance.diagonal(1) + mean[1:] * mean[:-1]
    agree(found[0], error[0], exact, slice(None))


def dense(x, level=0.5, noise=0.5):
    """Mean and covariance of all of a local level given its data, from the joint normal distribution."""
    steps = len(x)
    prior = 1 + level * torch.minimum(torch.arange(steps)[:, None], torch.arange(steps)).double()
    gain = prior @ torch.linalg.inv(prior + noise * torch.eye(steps))
    return gain @ x, prior - gain @ prior


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_fixed_lag_is_exact_on_truncated_data(lag):
    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    x = torch.tensor([[0.3, -0.8, 0.7, 1.2, 0.4, 0.1, -1.0], [1.0, 0.5, 0.2, -0.4, 0.0, 0.0, 0.0]])
    lengths = [7, 4]
    found = seq.FixedLagSmoother(model, 60, lag=lag).run(*copies(x, lengths, 500))
    assert found.notes[0] == f"smoothed moments are given the next {lag} frames"
    sequences = seq.Sequences.of(x, lengths)
    exact = torch.stack([seq.KalmanFilter(model).run(sequences.until(min(t + 1 + lag, 7))).smoothed["z"].mean[:, t]
                         for t in range(7)], 1)
    # The evidence that weighs a run is of all frames, and what is said of t is of t + lag: weigh by that.
    so_far = found.log_evidence_by_step.cumsum(1)
    for b in range(2):
        rows = slice(500 * b, 500 * (b + 1))
        for t in range(lengths[b]):
            mean, error = weighed(so_far[rows, min(t + lag, lengths[b] - 1)], found.smoothed["z"].mean[rows, t], 1)
            agree(mean, error, exact[b, t], slice(None))


def test_fixed_lag_zero_filters():
    model = linear_gaussian()
    found = seq.FixedLagSmoother(model, 50, lag=0).run(torch.randn(3, 5, 3), [5, 2, 4])
    torch.testing.assert_close(found.smoothed["z"].mean, found.filtered["z"].mean)
    torch.testing.assert_close(found.smoothed["z"].variance, found.filtered["z"].variance)


@pytest.mark.parametrize("make, width", [(VRNN, 4), (TwoSites, 3)], ids=["VRNN", "two sites"])
def test_a_long_lag_is_the_genealogy(make, width):
    """In any model: the same particles, whose ancestors are told at the end or carried along."""
    model, x = make(), torch.randn(3, 6, width)
    pyro.set_rng_seed(5)
    carried = seq.FixedLagSmoother(model, 50, lag=10).run(x, [6, 2, 4])
    pyro.set_rng_seed(5)
    traced = seq.ParticleFilter(model, 50, history=True).run(x, [6, 2, 4])
    for site in traced.smoothed:
        torch.testing.assert_close(carried.smoothed[site].mean, traced.smoothed[site].mean)
        torch.testing.assert_close(carried.smoothed[site].variance, traced.smoothed[site].variance)


def steps_of(model, x, particles):
    """The steps of a filter, and within the model what ``fn`` makes of them."""
    def inside(fn):
        sequences = seq.Sequences.of(x)

        def run(_):
            population = Population(Ancestral(systematic), 1.0)
            found = []
            for step in forward(model, PriorGuide(model), sequences, particles, between=population.between):
                population.weigh(step)
                found.append(step)
            return fn(found)

        return entered(model, PriorGuide(model), sequences, run)

    return inside


class Family(seq.StateSpaceModel):
    """One latent of some family whose place or spread moves with the last."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def initial(self):
        return pyro.sample("z", self.of(torch.tensor([0.5])))

    def transition(self, z):
        return pyro.sample("z", self.of(z))

    def emission(self, z, x=None):
        loc = z if z.dim() == 1 else z.sum(-1)
        return pyro.sample("x", dist.Normal(loc.to(torch.get_default_dtype()), 1.0), obs=x)


FAMILIES = {
    "Normal of unequal scales": lambda z: dist.Normal(0.5 * z, 0.2 + z.abs()),
    "Normal vector": lambda z: dist.Normal(0.5 * z.reshape(len(z), -1)[:, :1].expand(-1, 2), 0.7).to_event(1),
    "MultivariateNormal": lambda z: dist.MultivariateNormal(0.5 * z.reshape(len(z), -1)[:, :1].expand(-1, 2), torch.eye(2)),
    "StudentT": lambda z: dist.StudentT(3.0, 0.5 * z, 1.0),
    "LogNormal": lambda z: dist.LogNormal(0.3 * z, 0.8),
    "Gamma": lambda z: dist.Gamma(2.0 + z.abs(), 2.0),
    "Categorical": lambda z: dist.Categorical(torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])[z.long()]),
    "Bernoulli": lambda z: dist.Bernoulli(0.5 + 0.3 * (z - 0.5)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_rejection_draws_as_exact_does(name):
    """Counts of 20000 draws a method against the exact chances; the chi-squared tests fail at 1e-6."""
    from scipy import stats

    particles, draws = 8, 20000
    model = Family(FAMILIES[name])
    x = torch.tensor([[0.3, 0.9], [0.0, 1.5]])
    inside = steps_of(model, x, particles)

    def compare(steps):
        before, after = steps
        chosen = torch.arange(draws).remainder(2)[None].expand(2, -1) + torch.tensor([[0], [3]])
        exact = BackwardKernel(model, "exact")
        for method in ("exact", "rejection"):
            kernel = BackwardKernel(model, method)
            kernel.check(after)
            index, _ = kernel.draw(before, after, chosen)
            for b in range(2):
                for which in range(2):
                    chances = exact.draw(before, after, chosen[:, which:which + 1])[1][b]
                    found = torch.bincount(index[b, which::2, 0], minlength=particles).double()
                    expected = chances * found.sum()
                    kept = expected > 5
                    rest = torch.stack([found[~kept].sum(), expected[~kept].sum()])
                    statistic = ((found - expected)[kept].square() / expected[kept]).sum()
                    if rest[1] > 5:
                        statistic = statistic + (rest[0] - rest[1]).square() / rest[1]
                    assert stats.chi2.sf(float(statistic), particles - 1) > 1e-6, (method, found, expected)

    inside(compare)


@pytest.mark.parametrize("method", ["exact", "rejection"])
def test_paris_sums_are_exact(method):
    """Squares, products of neighbours and the score in the level's variance, at every time of ragged sequences."""
    level, noise = 0.5, 0.5
    x = torch.tensor([[0.3, -0.8, 0.7, 1.2, 0.4], [1.0, 0.5, 0.2, 0.0, 0.0]])
    lengths, runs = [5, 3], 300

    def sums(before, after, x, t):
        move = torch.zeros_like(after) if before is None else after - before
        score = torch.where(t == 1, 0.0, 0.5 * (move.square() / level - 1) / level)
        product = torch.zeros_like(after) if before is None else before * after
        return torch.stack([after.square(), product, score], -1)

    model = LocalLevel(0.0, 1.0, level, noise)
    found = seq.Paris(model, sums, 40, method=method).run(*copies(x, lengths, runs))
    assert found.expectation.shape == (2 * runs, 5, 3)
    so_far = found.log_evidence_by_step.cumsum(1)

    def evidence(variance, t):
        return seq.KalmanFilter(LocalLevel(0.0, 1.0, variance, noise)).run(x[b:b + 1, :t + 1]).total_log_evidence

    for b in range(2):
        rows = slice(runs * b, runs * (b + 1))
        assert (found.expectation[rows, lengths[b]:] == 0).all()
        for t in range(lengths[b]):
            mean, covariance = dense(x[b, :t + 1], level, noise)
            moments = covariance + torch.outer(mean, mean)
            score = (evidence(level + 1e-4, t) - evidence(level - 1e-4, t)) / 2e-4
            exact = torch.stack([moments.trace(), moments.diagonal(1).sum(), torch.tensor(score)])
            got, error = weighed(so_far[rows, t], found.expectation[rows, t], 1)
            agree(got[0], error[0], exact, error[0] > 0)


def test_paris_of_several_sites():
    def both(before, after, x, t):
        assert set(after) == {"level", "rate"} and (before is None or set(before) == set(after))
        return after["rate"]

    posterior = seq.Paris(TwoSites(), both, 30).run(torch.randn(2, 4, 3), [4, 2])
    assert posterior.expectation.shape == (2, 4) and (posterior.expectation[:, 0] > 0).all()


def test_backward_sampling_is_better_than_the_genealogy():
    """Far from the end: the genealogy has one ancestor left, the backward sampler all particles."""
    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    x = model.simulate([60])["x"]
    exact = seq.KalmanFilter(model).run(x).smoothed["z"].mean[0, :20]
    traced = seq.ParticleFilter(model, 50, history=True).run(x.expand(40, -1))
    drawn = seq.BackwardSampler(model, 50, num_trajectories=50).run(x.expand(40, -1))
    errors = [(found.smoothed["z"].mean[:, :20] - exact).square().mean() for found in (traced, drawn)]
    assert errors[1] < errors[0] / 4
    assert any("BackwardSampler" in note for note in traced.notes) and not any("smoothed" in note for note in drawn.notes)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trajectories_are_exported():
    posterior = seq.BackwardSampler(linear_gaussian(), 50, num_trajectories=30).run(torch.randn(2, 5, 3), [5, 3])
    assert posterior.to_arviz(30).posterior["z"].shape == (1, 30, 2, 5, 2)
    table = posterior.to_dataframe()
    assert {"filtered_mean", "smoothed_mean", "smoothed_std"} <= set(table)
    assert posterior.method == "bootstrap particle filter, backward sampling"
    one = seq.BackwardSampler(LocalLevel(), 50, num_trajectories=1).run(torch.zeros(3))
    assert one.trajectories(1).samples["z"].shape == (1, 1, 3)


class Carries(LocalLevel):
    """A state-space model whose state also holds the latent before."""

    def initial(self):
        z = super().initial()
        return z, torch.zeros_like(z)

    def transition(self, state):
        return pyro.sample("z", dist.Normal(1.5 * state[0] - 0.6 * state[1], 1.0)), state[0]

    def emission(self, state, x=None):
        return super().emission(state[0], x)


def run(smoother, *width):
    return lambda: smoother().run(torch.zeros(1, 4, *width))


LEVELS = LocalLevel(0.0, 1.0, 0.5, 0.5)
MISTAKES = {
    "recurrent state": (ValueError, "VRNN after a step is not determined.*carries more of the past.*FixedLagSmoother",
                        run(lambda: seq.BackwardSampler(VRNN(), 20), 4)),
    "state with a lag": (ValueError, "Carries after a step is not determined", run(lambda: seq.BackwardSampler(Carries(), 20))),
    "recurrent state in PaRIS": (ValueError, "VRNN after a step is not determined",
                                 run(lambda: seq.Paris(VRNN(), lambda b, a, x, t: t, 20), 4)),
    "rejection of a step": (ValueError, "Echo is none: use method='exact'",
                            run(lambda: seq.BackwardSampler(Echo(), 20, method="rejection"))),
    "rejection without a mode": (ValueError, "site 'z': the largest density of Uniform is not known",
                                 run(lambda: seq.BackwardSampler(Family(lambda z: dist.Uniform(z - 1, z + 1)), 20,
                                                                 method="rejection"))),
    "rejection without a bound": (ValueError, "site 'z': the density of Gamma at time 4 has no upper bound",
                                  run(lambda: seq.BackwardSampler(Family(lambda z: dist.Gamma(0.5, 1 + z)), 20,
                                                                  method="rejection"))),
    "method": (ValueError, "method='fast'; it is one of", lambda: seq.BackwardSampler(LEVELS, method="fast")),
    "method of PaRIS": (ValueError, "method='fast'; it is", lambda: seq.Paris(LEVELS, lambda b, a, x, t: a, method="fast")),
    "more trajectories than drawn": (ValueError, "num_samples=30, and BackwardSampler drew 20",
                                     lambda: seq.BackwardSampler(LEVELS, 20, num_trajectories=20).run(
                                         torch.zeros(1, 4)).trajectories(30)),
    "several runs": (ValueError, "num_runs=2", lambda: seq.BackwardSampler(LEVELS, num_runs=2)),
    "several runs, lag": (ValueError, "num_runs=2", lambda: seq.FixedLagSmoother(LEVELS, lag=2, num_runs=2)),
    "lag and history": (ValueError, "history=True", lambda: seq.FixedLagSmoother(LEVELS, lag=2, history=True)),
    "negative lag": (ValueError, "lag=-1", lambda: seq.FixedLagSmoother(LEVELS, lag=-1)),
    "lag in words": (TypeError, "lag=2.5", lambda: seq.FixedLagSmoother(LEVELS, lag=2.5)),
    "one particle": (ValueError, "num_particles=1", lambda: seq.BackwardSampler(LEVELS, 1)),
    "no functional": (TypeError, "functional is a int", lambda: seq.Paris(LEVELS, 5)),
    "functional's shape": (ValueError, r"functional returned \(\) at time 1; it is a tensor",
                           run(lambda: seq.Paris(LEVELS, lambda b, a, x, t: a.sum(), 20))),
    "functional without a value": (ValueError, "functional returned NoneType at time 1",
                                   run(lambda: seq.Paris(LEVELS, lambda b, a, x, t: None, 20))),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    kind, message, call = MISTAKES[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_model_that_grows_is_refused():
    def walk(x=None):
        z = torch.zeros(())
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t + 1}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t + 1}", dist.Normal(z, 1.0), obs=None if x is None else x[:, t])

    with pytest.raises(TypeError, match="from_pyro has no Markov state"):
        seq.BackwardSampler(seq.from_pyro(walk), 20)
