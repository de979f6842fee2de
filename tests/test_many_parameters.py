"""Filters of many parameter values at once: those of each value alone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Bayesian, DeepMarkov
from pyro import poutine

import pyro_seq as seq
from pyro_seq.engine.families import sample
from pyro_seq.infer.smc import mapped
from pyro_seq.infer.smc.many import ManyParticles
from pyro_seq.sequences import Sequences

M = 3


class Volatility(seq.StateSpaceModel):
    """Stochastic volatility with priors on its parameters."""

    def __init__(self):
        super().__init__()
        self.mu = pyro.nn.PyroSample(dist.Normal(-1.0, 0.5))
        self.rho = pyro.nn.PyroSample(dist.Beta(9.0, 1.0))

    def initial(self):
        return pyro.sample("z", dist.Normal(self.mu, 0.3 / torch.sqrt(1 - self.rho**2)))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.mu + self.rho * (z - self.mu), 0.3))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(torch.zeros_like(z), torch.exp(z / 2)), obs=x)


class Chain(seq.StateSpaceModel):
    """A hidden Markov model with Dirichlet rows and means."""

    def __init__(self):
        super().__init__()
        self.rows = pyro.nn.PyroSample(dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        self.means = pyro.nn.PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def initial(self):
        return pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))

    def transition(self, k):
        return pyro.sample("k", dist.Categorical(self.rows[k]))

    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(self.means[k], 1.0), obs=x)


class Carried(seq.SequentialModel):
    """A general state that reads the data, with gaps drawn, a latent on the half line, and one whole number carried."""

    def __init__(self):
        super().__init__()
        self.weight = pyro.nn.PyroParam(torch.tensor(0.5), dist.constraints.positive)
        self.cell = torch.nn.GRUCell(3, 4)

    def start(self, rows):
        return {"h": torch.zeros(rows, 4), "count": torch.zeros(rows, dtype=torch.long)}

    def step(self, state, x=None):
        r = pyro.sample("r", dist.Gamma(2.0, torch.exp(0.3 * state["h"][:, 0])))
        z = pyro.sample("z", dist.Normal(state["h"][:, :2] * self.weight, 1.0).to_event(1))
        x = pyro.sample("x", dist.Normal(z[:, 0] + self.weight * r, 1.0), obs=x)
        return {"h": self.cell(torch.cat([z, x[:, None]], -1), state["h"]), "count": state["count"] + 1}


class Halfway(seq.SequentialGuide):
    def step(self, state, x):
        before = torch.zeros_like(x) if state is None else state
        pyro.sample("z", dist.Normal((before + x) / 2, 0.9))


def bayesian_values():
    return {"phi": torch.linspace(0.2, 0.9, M), "noise": torch.linspace(0.5, 1.5, M)}


CASES = {
    "AR(1)": lambda: (Bayesian(), bayesian_values(), torch.randn(4, 6)),
    "volatility": lambda: (Volatility(), {"mu": torch.linspace(-2, 0, M), "rho": torch.linspace(0.5, 0.95, M)},
                           0.5 * torch.randn(4, 6)),
    "hidden Markov": lambda: (Chain(), {"rows": torch.rand(M, 2, 2).softmax(-1), "means": torch.randn(M, 2)},
                              torch.randn(4, 6)),
    "own parameters": lambda: (DeepMarkov(gaussian=True), {"loc": torch.randn(M, 3), "scale": 0.3 + torch.rand(M, 3)},
                               torch.randn(4, 6, 4)),
    "carried": lambda: (Carried(), {"weight": torch.linspace(0.1, 1.0, M)}, torch.randn(4, 6)),
}


def guides(name, model, x):
    yield None
    if name in ("AR(1)", "volatility"):
        yield Halfway(model)
    if name == "own parameters":
        yield seq.FilteringGuide(model, like=x, hidden=5)
        yield seq.FilteringGuide(model, like=x, hidden=5, residual=False)


def same_numbers(monkeypatch):
    """Every draw is the one that a generator newly seeded gives a single value, so that all values draw alike."""
    def seeded(fn):
        torch.manual_seed(7)
        return sample(fn)

    def over_values(info, in_dims, make, marker, *tensors):
        moved = [v.expand(info.batch_size, *v.shape) if d is None else v.movedim(d, 0)
                 for v, d in zip(tensors, in_dims[2:], strict=True)]
        return torch.stack([seeded(make(*(v[m] for v in moved))) for m in range(info.batch_size)]), 0

    monkeypatch.setattr(mapped._Draw, "vmap", staticmethod(over_values))
    monkeypatch.setattr("pyro_seq.engine.sites.sample", seeded)
    monkeypatch.setattr("pyro_seq.resampling.inversion.draw_uniform", lambda n, like: torch.full((n,), 0.4).to(like))


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_with_the_same_numbers_each_value_is_as_it_is_alone(monkeypatch, name, gaps):
    model, values, x = CASES[name]()
    if gaps:
        x[0, 1], x[2, 3:5] = torch.nan, torch.nan
    lengths = [6, 3, 6, 5]
    same_numbers(monkeypatch)
    for guide in guides(name, model, x):
        method = seq.ParticleFilter(model, 12, guide=guide)
        together = method.log_evidence_at(values, x, lengths)
        one_by_one = method.log_evidence_at(values, x, lengths, chunk_size=1)
        torch.testing.assert_close(together, one_by_one)
        torch.testing.assert_close(method.log_evidence_at(values, x, lengths, chunk_size=2), one_by_one)
        assert together.shape == (M, 4)
        if model.global_sites():
            for m in range(M):
                held = poutine.condition(method.run, data={k: v[m] for k, v in values.items()})(x, lengths)
                torch.testing.assert_close(together[m], held.log_evidence)


def test_each_value_is_unbiased_on_a_linear_gaussian_model():
    """500 filters of 30 particles a value against the Kalman filter: |z| < 4.5 (7e-6 two-sided), 3 values."""
    model, values, x = Bayesian(), bayesian_values(), torch.randn(1, 5)
    found = seq.ParticleFilter(model, 30).log_evidence_at(values, x.expand(500, -1))
    for m in range(M):
        exact = poutine.condition(seq.KalmanFilter(model).run, data={k: v[m] for k, v in values.items()})(x).log_evidence
        ratio = (found[m] - exact).exp()
        assert abs((ratio.mean() - 1) / (ratio.std() / 500**0.5)) < 4.5
        assert ratio.std() > 0.05


def test_each_value_is_unbiased_on_a_hidden_markov_model():
    """As above, against enumeration."""
    model, values, x = CASES["hidden Markov"]()
    found = seq.ParticleFilter(model, 20).log_evidence_at(values, x[:1].expand(500, -1))
    for m in range(M):
        exact = poutine.condition(seq.ForwardBackward(model).run, data={k: v[m] for k, v in values.items()})(x[:1]).log_evidence
        ratio = (found[m] - exact).exp()
        assert abs((ratio.mean() - 1) / (ratio.std() / 500**0.5)) < 4.5


def test_volatility_agrees_with_separate_runs():
    """Means of 400 log evidences a value, by both routes: |z| < 4.5, 3 values."""
    model, values, x = CASES["volatility"]()
    method = seq.ParticleFilter(model, 30)
    together, alone = (method.log_evidence_at(values, x[:1].expand(400, -1), chunk_size=c) for c in (None, 1))
    z = (together.mean(1) - alone.mean(1)) / ((together.var(1) + alone.var(1)) / 400).sqrt()
    assert z.abs().max() < 4.5


def test_values_draw_numbers_of_their_own():
    """Equal values have independent estimates: their correlation over 1000 sequences is below 4.5 / sqrt(1000)."""
    values = {"phi": torch.full((2,), 0.5), "noise": torch.full((2,), 1.0)}
    found = seq.ParticleFilter(Bayesian(), 10).log_evidence_at(values, torch.ones(1, 4).expand(1000, -1))
    assert torch.corrcoef(found)[0, 1].abs() < 4.5 / 1000**0.5


@pytest.mark.parametrize("make", [
    lambda a: dist.Normal(a, 1.0), lambda a: dist.StudentT(5.0, a, 1.0), lambda a: dist.Gamma(1 + a, 1.0),
    lambda a: dist.Beta(1 + a, 2.0), lambda a: dist.LogNormal(a, 0.2), lambda a: dist.Exponential(1 + a),
    lambda a: dist.Poisson(1 + a), lambda a: dist.Binomial(5, 0.5 * a), lambda a: dist.Bernoulli(0.5 * a),
    lambda a: dist.Uniform(a, 3.0), lambda a: dist.Laplace(a, 1.0), lambda a: dist.Geometric(0.3 + 0.5 * a),
    lambda a: dist.Categorical(torch.stack([a, 2 - a], -1)), lambda a: dist.Categorical(logits=torch.stack([a, 2 - a], -1)),
    lambda a: dist.Dirichlet(torch.stack([1 + a, 2 - a], -1)),
    lambda a: dist.MultivariateNormal(torch.stack([a, 2 - a], -1), torch.eye(2)),
    lambda a: dist.Normal(torch.stack([a, 2 - a], -1), 1.0).to_event(1),
    lambda a: dist.OneHotCategorical(torch.stack([a, 2 - a], -1)),
    lambda a: dist.Multinomial(7, torch.stack([a, 2 - a], -1)), lambda a: dist.BetaBinomial(1 + a, 2 - a, 6),
    lambda a: dist.DirichletMultinomial(torch.stack([a, 2 - a], -1), 5),
])
def test_families_are_drawn_for_many_values(make):
    """Means of 4000 draws a value, each value within 4.5 standard errors of its own mean."""
    class Latent(seq.StateSpaceModel):
        def __init__(self):
            super().__init__()
            self.a = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

        def initial(self):
            return pyro.sample("z", make(self.a.expand(rows)))

        def transition(self, z):
            return pyro.sample("z", make(self.a.expand(rows)))

        def emission(self, z, x=None):
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    rows, values = 4000, torch.tensor([0.1, 0.9])
    particles = ManyParticles(seq.ParticleFilter(Latent(), 4000), {"a": values}, Sequences.of(torch.zeros(1, 1)))
    with particles.entered():
        list(particles.run())
    for m, a in enumerate(values):
        fn = make(a.expand(1))
        drawn = particles.state[m].double()
        if isinstance(fn, dist.Categorical):
            drawn, mean = torch.nn.functional.one_hot(particles.state[m], 2).double(), fn.probs
        else:
            mean = fn.mean
        assert ((drawn.mean(0) - mean[0]) / (drawn.std(0) / 4000**0.5)).abs().max() < 4.5


@pytest.mark.parametrize("latent", [
    lambda a, n: dist.Normal(torch.zeros(n), a), lambda a, n: dist.Gamma(a.expand(n), 1.0),
    lambda a, n: dist.Bernoulli(a.expand(n)), lambda a, n: dist.Exponential(a.expand(n)),
    lambda a, n: dist.Poisson(a.expand(n)),
    lambda a, n: dist.Beta(a.expand(n), 1.0), lambda a, n: dist.LogNormal(torch.zeros(n), a),
    lambda a, n: dist.Uniform(torch.zeros(n), a), lambda a, n: dist.StudentT(a.expand(n))],
    ids=["Normal", "Gamma", "Bernoulli", "Exponential", "Poisson", "Beta", "LogNormal", "Uniform", "StudentT"])
def test_a_value_out_of_range_is_an_error_wherever_it_stands(latent):
    class Latent(seq.StateSpaceModel):
        def __init__(self):
            super().__init__()
            self.a = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

        def initial(self):
            return pyro.sample("z", latent(self.a, 1))

        def transition(self, z):
            return pyro.sample("z", latent(self.a, len(z)))

        def emission(self, z, x=None):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    method = seq.ParticleFilter(Latent(), 10)
    assert method.log_evidence_at({"a": torch.tensor([0.5, 0.7])}, torch.ones(1, 3)).isfinite().all()
    with pytest.raises(ValueError, match="parameter value 1"):
        method.log_evidence_at({"a": torch.tensor([0.5, -0.5])}, torch.ones(1, 3))


class Strict(seq.StateSpaceModel):
    """Uniform noise of a width: too narrow, and the data is impossible."""

    def __init__(self):
        super().__init__()
        self.width = pyro.nn.PyroSample(dist.Uniform(0.0, 9.0))

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 0.1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, 0.1))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Uniform(z - self.width, z + self.width), obs=x)


def test_an_impossible_value_has_no_evidence_and_hurts_no_other():
    values = {"width": torch.tensor([8.0, 0.5, 3.0])}
    x = torch.tensor([[0.0, 2.0, 0.1], [0.1, 0.0, 0.0]])
    for chunk in (None, 1):
        found = seq.ParticleFilter(Strict(), 50).log_evidence_at(values, x, chunk_size=chunk)
        assert found[1, 0] == -torch.inf and found[[0, 2]].isfinite().all() and found[1, 1].isfinite()
        torch.testing.assert_close(found[[0, 2], 1], -3 * torch.log(2 * values["width"][[0, 2]]))


def test_values_can_be_resampled_between_the_steps():
    """The filters of chosen values go on as the chosen: evidence factors after selection are those of a fresh run at them."""
    model, values, x = Bayesian(), bayesian_values(), torch.randn(300, 5)[:1].expand(300, -1)
    method = seq.ParticleFilter(model, 100)
    particles = ManyParticles(method, values, Sequences.of(x))
    packed = particles.sequences.packed
    with particles.entered():
        for frame in packed.frames(100):
            factor = particles.advance(frame, None)
            if frame.t == 3:
                particles = particles.select(torch.tensor([2, 2, 0, 1]))
    assert factor.shape == (4, 300) and len(particles) == 4
    assert torch.equal(particles.globals["phi"], values["phi"][[2, 2, 0, 1]])
    fresh = ManyParticles(method, particles.globals, Sequences.of(x))
    with fresh.entered():
        last = list(fresh.run())[-1]
    z = (factor.mean(1) - last.mean(1)) / ((factor.var(1) + last.var(1)) / 300).sqrt()
    assert z.abs().max() < 4.5


def test_the_parameter_store_and_the_model_stay_as_they_were():
    model, values, x = CASES["own parameters"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seq.ParticleFilter(model, 5).log_evidence_at(values, x)
    assert not list(pyro.get_param_store()) and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


class Branching(Bayesian):
    def transition(self, z):
        if self.phi > 0.5:
            z = 0.9 * z
        return pyro.sample("z", dist.Normal(self.phi * z, 1.0))


def fit_at(model, values, x=None, chunk_size=None, **options):
    return lambda: seq.ParticleFilter(model(), 5, **options).log_evidence_at(
        values, torch.zeros(2, 3) if x is None else x, chunk_size=chunk_size)


TWO = {"phi": torch.tensor([0.1, 0.9]), "noise": torch.ones(2)}


@pytest.mark.parametrize("call, error, message", [
    (fit_at(Branching, TWO), ValueError,
     "the step of Branching at time 2, before its first site, cannot be run for many.*chunk_size=1"),
    (fit_at(Bayesian, {}), ValueError, r"parameters is empty: give tensors .* of \['phi', 'noise'\]"),
    (fit_at(Bayesian, {"phi": torch.ones(2)}), ValueError, r"lacks the global parameters \['noise'\] of Bayesian"),
    (fit_at(Bayesian, {**TWO, "psi": torch.ones(2)}), ValueError,
     r"no global site or parameter 'psi'; there are \['phi', 'noise'\]"),
    (fit_at(Bayesian, {"phi": torch.ones(2), "noise": torch.ones(3)}), ValueError, "as many of each"),
    (fit_at(Bayesian, {"phi": torch.ones(2, 2), "noise": torch.ones(2)}), ValueError,
     r"parameters\['phi'\] has shape \(2, 2\); one value of it is of shape \(\), so that M of them are \(2,\)"),
    (fit_at(Bayesian, {"phi": 0.5, "noise": torch.ones(2)}), ValueError, r"parameters\['phi'\] is not a tensor"),
    (fit_at(DeepMarkov, {"loc": torch.ones(2, 4)}), ValueError, r"one value of it is of shape \(3,\)"),
    (fit_at(DeepMarkov, {"decoder.0.weight": torch.ones(2, 8, 3)}), ValueError, "make it a PyroSample"),
    (fit_at(Bayesian, TWO, num_runs=2), ValueError, "num_runs=1"),
    (fit_at(Bayesian, TWO, chunk_size=0), ValueError, "chunk_size=0; it is at least 1"),
    (fit_at(Bayesian, {**TWO, "noise": torch.tensor([1.0, -1.0])}), ValueError,
     "argument 'scale' of the model's distribution of site .* is out of its range at time 1 under parameter value 1"),
])
def test_mistakes(call, error, message):
    torch.set_default_dtype(torch.float32)  # that of the values above
    with pytest.raises(error, match=message):
        call()


def test_a_step_that_cannot_be_mapped_runs_value_by_value():
    found = seq.ParticleFilter(Branching(), 2000).log_evidence_at(bayesian_values(), torch.zeros(1, 3), chunk_size=1)
    assert found.isfinite().all()
