"""Particles for some latents, a Kalman filter for the rest: against enumeration over all regime paths."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LocalLevel, StochasticVolatility, linear_gaussian

import pyro_seq as seq
from pyro_seq.infer.smc.record import _mixture_quantile

A = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
START = torch.tensor([0.6, 0.4], dtype=torch.float64)
PHI, SCALE, NOISE = [torch.tensor(v, dtype=torch.float64) for v in ([0.9, -0.4], [0.3, 1.5], [0.5, 1.2])]


class Switching(seq.StateSpaceModel):
    """Two regimes, a two-dimensional linear state, and a vector of data with correlated entries."""

    def __init__(self, regimes=2, drive=False):
        super().__init__()
        self.regimes, self.drive = regimes, drive

    def initial(self):
        k = pyro.sample("k", dist.Categorical(START[:self.regimes] / START[:self.regimes].sum()))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return {"k": k, "z": z}

    def transition(self, state, u=None):
        rows = A[:self.regimes, :self.regimes][state["k"]]
        k = pyro.sample("k", dist.Categorical(rows / rows.sum(-1, keepdim=True)))
        moved = PHI[k][:, None] * state["z"] + 0.3 * state["z"].flip(-1)
        moved = moved if u is None else moved + u[:, None]
        return {"k": k, "z": pyro.sample("z", dist.Normal(moved, SCALE[k][:, None]).to_event(1))}

    def emission(self, state, x=None):
        c = NOISE[state["k"]]
        covariance = torch.diag_embed(torch.stack([c, c], -1)) + 0.2
        pyro.sample("x", dist.MultivariateNormal(state["z"] + 0.1, covariance), obs=x)


class GivenPath(seq.StateSpaceModel):
    """The same with the regimes given as a covariate: linear and Gaussian."""

    def initial(self, k):
        return pyro.sample("z", dist.Normal(torch.zeros(len(k), 2), 1.0).to_event(1))

    def transition(self, z, k, u=None):
        moved = PHI[k][:, None] * z + 0.3 * z.flip(-1)
        return pyro.sample("z", dist.Normal(moved if u is None else moved + u[:, None], SCALE[k][:, None]).to_event(1))

    def emission(self, z, k, x=None):
        c = NOISE[k]
        covariance = torch.diag_embed(torch.stack([c, c], -1)) + 0.2
        pyro.sample("x", dist.MultivariateNormal(z + 0.1, covariance), obs=x)


def enumerated(x, **covariates):
    """Evidence and moments at the last frame of one sequence, by a Kalman filter for each regime path."""
    steps = len(x)
    paths = torch.tensor(list(itertools.product([0, 1], repeat=steps)))
    found = seq.KalmanFilter(GivenPath()).run(x.expand(len(paths), *x.shape), k=paths, **covariates)
    prior = START[paths[:, 0]].log() + sum(A[paths[:, t - 1], paths[:, t]].log() for t in range(1, steps))
    joint = prior + found.log_evidence
    weights = joint.softmax(0)
    mean = (weights[:, None] * found.filtered["z"].mean[:, -1]).sum(0)
    second = (weights[:, None] * (found.filtered["z"].variance + found.filtered["z"].mean.square())[:, -1]).sum(0)
    return joint.logsumexp(0), mean, second - mean**2, (weights * paths[:, -1]).sum()


def gaps(x):
    x = x.clone()
    x[1, 0], x[3], x[4, 1] = torch.nan, torch.nan, torch.nan
    return x


@pytest.mark.parametrize("missing", [False, True])
def test_evidence_is_unbiased(missing):
    """E[estimate / evidence] = 1: |z| < 4.4 fails a right filter once in 1e5. Four particles, resampled at every step."""
    x = Switching().simulate([6])["x"][0]
    x = gaps(x) if missing else x
    exact = enumerated(x)[0]
    method = seq.RaoBlackwellisedFilter(Switching(), num_particles=4, ess_threshold=1.0)
    ratio = (method.run(x.expand(3000, 6, 2)).log_evidence - exact).exp()
    z = (ratio.mean() - 1) / (ratio.std() / math.sqrt(len(ratio)))
    assert abs(z) < 4.4, z
    assert ratio.std() > 0.01


@pytest.mark.parametrize("missing", [False, True])
def test_moments_are_those_of_the_mixture(missing):
    """With many particles; the tolerances are 5 standard errors over 30 independent filters."""
    x = Switching().simulate([6])["x"][0]
    x = gaps(x) if missing else x
    _, mean, variance, share = enumerated(x)
    posterior = seq.RaoBlackwellisedFilter(Switching(), num_particles=1000).run(x.expand(30, 6, 2))
    for found, exact in ((posterior.filtered["z"].mean[:, -1], mean), (posterior.filtered["z"].variance[:, -1], variance),
                         (posterior.filtered["k"].mean[:, -1], share)):
        error = found.std(0) / math.sqrt(30)
        assert ((found.mean(0) - exact).abs() < 5 * error + 2e-3).all()


@pytest.mark.parametrize("particles", [1, 7])
def test_one_regime_is_the_kalman_filter(particles):
    model = Switching(regimes=1)
    x = torch.stack([gaps(model.simulate([8])["x"][0]), model.simulate([8])["x"][0]])
    found = seq.RaoBlackwellisedFilter(model, particles).run(x, [8, 5])
    exact = seq.KalmanFilter(GivenPath()).run(x, [8, 5], k=torch.zeros(2, 8, dtype=torch.long))
    torch.testing.assert_close(found.log_evidence, exact.log_evidence, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.log_evidence_by_step, exact.log_evidence_by_step, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.filtered["z"].mean, exact.filtered["z"].mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.filtered["z"].variance, exact.filtered["z"].variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("missing", [False, True])
def test_a_linear_gaussian_model_needs_one_particle(missing):
    model = linear_gaussian(2, 3)
    x = torch.randn(2, 7, 3)
    if missing:
        x[0, 2, 1] = x[1, 3] = torch.nan
    found = seq.RaoBlackwellisedFilter(model, 1).run(x, [7, 4])
    exact = seq.KalmanFilter(model).run(x, [7, 4])
    torch.testing.assert_close(found.log_evidence, exact.log_evidence)
    torch.testing.assert_close(found.filtered["z"].mean, exact.filtered["z"].mean)
    assert found.notes == ("found linear-Gaussian in ['z'] at the points tested",)


class Autoregressive(seq.SequentialModel):
    """Data, a shift register and a level in one state tensor; the second entry of the data reads the first."""

    def start(self, rows):
        return torch.zeros(rows, 3) + torch.tensor([0.5, -0.2, 0.1])

    def step(self, h, x=None):
        z = pyro.sample("z", dist.Normal(0.8 * h[:, 0] + 0.1 * h[:, 2], 0.7))
        a = pyro.sample("a", dist.Normal(z + 0.3 * h[:, 1], 0.5), obs=None if x is None else x[:, 0])
        pyro.sample("b", dist.Normal(0.5 * a - z, 0.9), obs=None if x is None else x[:, 1])
        return torch.stack([z, a, h[:, 0]], -1)


def test_gaps_that_feed_the_state_are_integrated_out():
    """An autoregression with gaps is linear-Gaussian; the dense joint Gaussian of all data says its evidence."""
    steps, x = 6, torch.randn(6, 2)
    model = Autoregressive()
    # x = offset + M noise, noise standard normal, 3 a step: read off by running the recursion on unit noises.
    noise = torch.cat([torch.zeros(1, 3 * steps), torch.eye(3 * steps)]).reshape(-1, steps, 3)
    h, data = model.start(len(noise)), []
    for t in range(steps):
        z = 0.8 * h[:, 0] + 0.1 * h[:, 2] + 0.7 * noise[:, t, 0]
        a = z + 0.3 * h[:, 1] + 0.5 * noise[:, t, 1]
        data += [a, 0.5 * a - z + 0.9 * noise[:, t, 2]]
        h = torch.stack([z, a, h[:, 0]], -1)
    data = torch.stack(data, -1)
    matrix = data[1:] - data[0]
    x[1, 0] = x[2, 1] = x[4] = torch.nan
    kept = ~x.reshape(-1).isnan()
    covariance = (matrix.T @ matrix)[kept][:, kept]
    exact = dist.MultivariateNormal(data[0, kept], covariance).log_prob(x.reshape(-1)[kept])
    found = seq.RaoBlackwellisedFilter(model, 2).run(x[None])
    torch.testing.assert_close(found.log_evidence[0], exact, rtol=1e-10, atol=1e-10)


class Volatility(seq.SequentialModel):
    """A level whose log scale is a random walk, a count that reads the scale alone, both Gaussians in one tensor."""

    reads_count = False

    def start(self, rows):
        return torch.zeros(rows, 2)

    def step(self, h, x=None, n=None):
        s = pyro.sample("s", dist.Normal(0.9 * h[:, 1], 0.4))
        z = pyro.sample("z", dist.Normal(h[:, 0], (0.5 * s).exp()))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        n = pyro.sample("n", dist.Poisson(s.exp()), obs=n)
        return torch.stack([z + n if self.reads_count else z, s], -1)


@pytest.mark.parametrize("count", [2.0, math.nan])
def test_a_conditioning_latent_may_be_continuous_and_data_may_read_it_alone(count):
    """One step against quadrature: z-test as above. A gap in the count, which nothing reads, leaves it out."""
    x, n = torch.tensor([[1.3]]), torch.tensor([[count]])
    grid = torch.linspace(-4, 4, 4001)
    density = dist.Normal(0.0, 0.4).log_prob(grid) + dist.Normal(0.0, (grid.exp() + 0.25).sqrt()).log_prob(x[0, 0])
    if not math.isnan(count):
        density = density + dist.Poisson(grid.exp()).log_prob(n[0, 0])
    exact = torch.trapezoid(density.exp(), grid).log()
    posterior = seq.RaoBlackwellisedFilter(Volatility(), 50).run({"x": x.expand(400, 1), "n": n.expand(400, 1)})
    ratio = (posterior.log_evidence - exact).exp()
    assert abs((ratio.mean() - 1) / (ratio.std() / 20)) < 4.4
    assert posterior.notes == ("found linear-Gaussian in ['z'] given ['s'] at the points tested",)


@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_gap_that_is_read_and_not_gaussian_is_refused(t):
    model = Volatility()
    model.reads_count = True
    data = {"x": torch.randn(1, 6), "n": torch.ones(1, 6)}
    assert seq.RaoBlackwellisedFilter(model, 5).run(data).log_evidence.isfinite().all()
    data["n"][0, t] = math.nan
    with pytest.raises(ValueError, match="(?s)the next state of Volatility is not linear in.* or in data that is missing"):
        seq.RaoBlackwellisedFilter(model, 5).run(data)


class Follows(seq.SequentialModel):
    """A regime that reads the data of its own frame, as a gap does not tell it."""

    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None, y=None):
        z = pyro.sample("z", dist.Normal(h, 1.0))
        x = pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        k = pyro.sample("k", dist.Bernoulli(logits=x))
        pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)
        return z


def test_a_gap_that_a_conditioning_latent_reads_is_refused():
    data = {"x": torch.randn(1, 6), "y": torch.randn(1, 6)}
    assert seq.RaoBlackwellisedFilter(Follows(), 5).run(data).log_evidence.isfinite().all()
    data["y"][0, 3] = math.nan
    assert seq.RaoBlackwellisedFilter(Follows(), 5).run(data).log_evidence.isfinite().all()
    data["x"][0, 4] = math.nan
    with pytest.raises(ValueError, match="site 'k' of Follows is to be drawn, and depends on .* or on data that is missing"):
        seq.RaoBlackwellisedFilter(Follows(), 5).run(data)


def test_less_variance_than_the_bootstrap_filter():
    """At equal numbers of particles: a ratio of variances of some twenty here, so that ten fails rarely."""
    x = Switching().simulate([40])["x"].expand(150, -1, -1)
    exact, crude = (method(Switching(), num_particles=50).run(x).log_evidence.var()
                    for method in (seq.RaoBlackwellisedFilter, seq.ParticleFilter))
    assert crude / exact > 4, (crude / exact).item()


def test_short_sequences_and_frames_alone():
    """Sequences of one frame beside longer ones; a model without a state."""
    model = Switching(regimes=1)
    x = torch.randn(3, 4, 2)
    found = seq.RaoBlackwellisedFilter(model, 2).run(x, [1, 4, 2])
    exact = seq.KalmanFilter(GivenPath()).run(x, [1, 4, 2], k=torch.zeros(3, 4, dtype=torch.long))
    torch.testing.assert_close(found.log_evidence, exact.log_evidence)
    frames = seq.RaoBlackwellisedFilter(Frames(), 2).run(x[..., 0], [1, 4, 2])
    expected = dist.Normal(0.0, math.sqrt(2)).log_prob(x[..., 0]) * frames.sequences.active
    torch.testing.assert_close(frames.log_evidence_by_step, expected)


class Frames(seq.SequentialModel):
    """Independent frames."""

    def start(self, rows):
        return ()

    def step(self, state, x=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return ()


def test_batch_padding_and_covariates():
    """A sequence's exact parts do not depend on the batch it is in: one regime, garbage past the ends, a covariate."""
    model, u = Switching(regimes=1), torch.randn(3, 6)
    x = torch.randn(3, 6, 2)
    lengths = [6, 3, 5]
    whole = seq.RaoBlackwellisedFilter(model, 3).run(x, lengths, u=u)
    for b, n in enumerate(lengths):
        alone = seq.RaoBlackwellisedFilter(model, 3).run(x[b:b + 1, :n], u=u[b:b + 1, :n])
        torch.testing.assert_close(whole.log_evidence[b], alone.log_evidence[0])
        torch.testing.assert_close(whole.filtered["z"].mean[b, :n], alone.filtered["z"].mean[0])


class Nearby(seq.SequentialGuide):
    """Regimes proposed from the distance of the data to the state, which has the filtered mean of z."""

    def step(self, state, x):
        before = torch.zeros_like(x) if state is None else state["z"]
        far = (x - before).square().sum(-1)
        pyro.sample("k", dist.Bernoulli(logits=0.3 * far.clamp(max=8.0) - 1).to_event(0))


class Coin(Switching):
    """Its regimes as Bernoulli numbers."""

    def initial(self):
        k = pyro.sample("k", dist.Bernoulli(START[1])).long()
        return {"k": k, "z": pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))}

    def transition(self, state, u=None):
        k = pyro.sample("k", dist.Bernoulli(A[state["k"], 1])).long()
        moved = PHI[k][:, None] * state["z"] + 0.3 * state["z"].flip(-1)
        return {"k": k, "z": pyro.sample("z", dist.Normal(moved, SCALE[k][:, None]).to_event(1))}


def test_a_guide_proposes_the_conditioning_latents():
    x = Switching().simulate([6])["x"][0]
    model = Coin()
    exact = enumerated(x)[0]
    method = seq.RaoBlackwellisedFilter(model, 5, guide=Nearby(model), marginal="z")
    ratio = (method.run(x.expand(2000, 6, 2)).log_evidence - exact).exp()
    assert abs((ratio.mean() - 1) / (ratio.std() / math.sqrt(2000))) < 4.4


def test_several_runs_history_and_prediction():
    x = Switching().simulate([12, 9])["x"]
    posterior = seq.RaoBlackwellisedFilter(Switching(), 40, num_runs=5).run(x, [12, 9])
    assert (posterior.standard_error > 0).all() and posterior.num_samples == 200
    drawn = posterior.predict(3, num_samples=50)
    assert drawn.samples["x"].shape == (50, 2, 3, 2) and drawn.samples["z"].shape == (50, 2, 3, 2)
    kept = seq.RaoBlackwellisedFilter(Switching(), 40, history=True).run(x, [12, 9])
    assert kept.trajectories(6).samples["k"].shape == (6, 2, 12)
    assert (kept.quantile("k", 0.9)[0] >= kept.quantile("k", 0.1)[0]).all()


def test_quantiles_are_those_of_the_mixture():
    """A single Gaussian has them in closed form; of a mixture, the distribution function there is the level."""
    model, x = LocalLevel(0.0, 1.0, 0.5, 0.3), torch.randn(2, 5)
    torch.testing.assert_close(seq.RaoBlackwellisedFilter(model, 3, history=True).run(x).quantile("z", [0.1, 0.7]),
                               seq.KalmanFilter(model).run(x).quantile("z", [0.1, 0.7]))
    weights, means, scales = torch.tensor([0.3, 0.7]), torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [0.2]])
    found = _mixture_quantile(weights, means, scales, torch.tensor([0.2, 0.5]))
    share = (weights[:, None] * dist.Normal(means, scales).cdf(found[:, None])).sum(1)[:, 0]
    torch.testing.assert_close(share, torch.tensor([0.2, 0.5]))


def test_predictions_start_from_the_mixture():
    """Draws of the state after one frame: mean and variance within 5 standard errors of the Kalman filter's."""
    model = LocalLevel(0.0, 1.0, 1e-12, 0.5)
    posterior = seq.RaoBlackwellisedFilter(model, 3).run(torch.tensor([[1.0]]))
    drawn = posterior.predict(1, num_samples=4000).samples["z"][:, 0, 0]
    assert abs(drawn.mean() - posterior.filtered["z"].mean[0, 0]) < 5 * math.sqrt(1 / 3 / 4000)
    assert abs(drawn.var() / (1 / 3) - 1) < 5 * math.sqrt(2 / 4000)


def test_single_precision():
    torch.set_default_dtype(torch.float32)
    level = LocalLevel(0.0, 1.0, 0.5, 0.3)
    x = torch.randn(2, 30)
    found, exact = seq.RaoBlackwellisedFilter(level, 2).run(x), seq.KalmanFilter(level).run(x)
    assert found.log_evidence.dtype == torch.float32 and found.filtered["z"].mean.dtype == torch.float32
    torch.testing.assert_close(found.log_evidence, exact.log_evidence)


class Gated(seq.SequentialModel):
    """Linear until time 8, as a count in its state knows."""

    def start(self, rows):
        return torch.zeros(rows, 2)

    def step(self, h, x=None):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(h[:, 0], 1.0 + k))
        pyro.sample("x", dist.Normal(torch.where(h[:, 1] < 7, z, z**2), 1.0), obs=x)
        return torch.stack([z, h[:, 1] + 1], -1)


class Recurrent(seq.SequentialModel):
    """A regime that reads the level: it cannot be drawn without it."""

    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None):
        k = pyro.sample("k", dist.Bernoulli(logits=h))
        z = pyro.sample("z", dist.Normal(0.5 * h + k, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return z


MISTAKES = [
    (StochasticVolatility, {}, 4, "no latent of StochasticVolatility can be marginalised.*site 'x'.*covariance depends on"),
    (Recurrent, {}, 4, "site 'k' of Recurrent is to be drawn, and depends on \\['z'\\]"),
    (Recurrent, {"marginal": "k"}, 4, "site 'k' of Recurrent is Bernoulli, not Gaussian.*Leave it out"),
    (Recurrent, {"marginal": "q"}, 4, "marginal names \\['q'\\], but the latent sites of Recurrent are \\['k', 'z'\\]"),
    (Recurrent, {"marginal": []}, 4, "marginal is empty"),
    (Gated, {}, 9, "site 'x' of Gated: its mean is not linear in \\['z'\\] given \\['k'\\]"),
    (lambda: seq.from_pyro(lambda x: None), {}, 4, "no Markov state"),
]


@pytest.mark.parametrize("model, options, steps, message", MISTAKES)
def test_mistakes(model, options, steps, message):
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        seq.RaoBlackwellisedFilter(model(), 5, **options).run(torch.randn(1, steps))
