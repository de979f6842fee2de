"""What a declared model is found to be, on models of every kind and on some built to mislead."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Bayesian, DeepMarkov, Driven, GammaRate, HiddenMarkov, LocalLevel, StochasticVolatility, linear_gaussian
from torch.distributions import constraints

import pyro_seq as seq
from pyro_seq.models import MarkovSwitchingAutoregression

CONDITIONALLY = "conditionally linear-Gaussian"


class Step(seq.SequentialModel):
    """A model made of functions: ``fn(state, x, **inputs)`` from a state of ``start``."""

    def __init__(self, fn, start=torch.zeros):
        super().__init__()
        self.__dict__["fn"], self.__dict__["first"] = fn, start

    def start(self, rows):
        return self.first(rows)

    def step(self, state, x=None):
        return self.fn(state, x)


class Emits(LocalLevel):
    """A Gaussian walk seen through ``fn(z)``, a distribution."""

    def __init__(self, fn):
        super().__init__(0.0, 1.0, 0.5, 0.3)
        self.__dict__["fn"] = fn

    def emission(self, z, x=None):
        return pyro.sample("x", self.fn(z), obs=x)


class ZeroWeights(Emits):
    """A network whose last layer starts at zero: it is constant now, and will not be once trained."""

    def __init__(self):
        super().__init__(None)
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        torch.nn.init.zeros_(self.net[2].weight)

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(self.net(z[:, None])[:, 0], 1.0), obs=x)


class Moves(LocalLevel):
    """A walk of ``fn(z)``, a distribution, seen with Gaussian noise."""

    def __init__(self, fn, first=None):
        super().__init__(0.0, 1.0, 0.5, 0.3)
        self.__dict__["fn"], self.__dict__["first"] = fn, first or dist.Normal(0.0, 1.0)

    def initial(self):
        return pyro.sample("z", self.first)

    def transition(self, z):
        return pyro.sample("z", self.fn(z))


def coin_feeds_level(h, x):
    b = pyro.sample("b", dist.Bernoulli(0.4))
    z = pyro.sample("z", dist.Normal(0.9 * h + 2.0 * b, 0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    return z


def log_normal(h, x):
    s = pyro.sample("s", dist.LogNormal(h, 0.3))
    pyro.sample("x", dist.Normal(s.log(), 1.0), obs=x)
    return s.log()


def unused_regime(h, x):
    pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    z = pyro.sample("z", dist.Normal(h, 0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    return z


def remembering_regime(h, x):
    """The mean is a sum over all regimes so far: no chain of two states."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
    h = 0.5 * h + k
    pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    return h


def left_to_right(h, x):
    """A chain of two states that never goes back."""
    k = pyro.sample("k", dist.Categorical(torch.tensor([[0.9, 0.1], [0.0, 1.0]])[h.long()]))
    pyro.sample("x", dist.Normal(k.to(h), 1.0), obs=x)
    return k.to(h)


def two_lags(h, x):
    """A second-order chain carried as (last, before last), which its own latents do not determine."""
    k = pyro.sample("k", dist.Bernoulli(0.2 + 0.3 * h[:, 0] + 0.2 * h[:, 1]))
    pyro.sample("x", dist.Normal(k, 1.0), obs=x)
    return torch.stack([k, h[:, 0]], -1)


def deterministic(h, x):
    z = pyro.sample("z", dist.Normal(0.8 * h[:, 0], 0.5))
    d = pyro.sample("d", dist.Delta(h[:, 1] + z))
    pyro.sample("x", dist.Normal(d, 1.0), obs=x)
    return torch.stack([z, d], -1)


def two_sites(h, x):
    a = pyro.sample("a", dist.Normal(0.5 * h[:, 0], 1.0))
    b = pyro.sample("b", dist.MultivariateNormal(torch.stack([a, h[:, 1]], -1), torch.tensor([[1.0, 0.4], [0.4, 0.5]])))
    pyro.sample("x", dist.Normal(b, 0.5).to_event(1), obs=x)
    return torch.stack([a, b[:, 0]], -1)


def data_in_the_recurrence(h, x):
    z = pyro.sample("z", dist.Normal(0.5 * h[:, 0] - 0.2 * h[:, 1], 1.0))
    x = pyro.sample("x", dist.Normal(z + 0.3 * h[:, 1], 0.5), obs=x)
    return torch.stack([z, x], -1)


def gru_of_data(h, x):
    x = pyro.sample("x", dist.Normal(h.tanh(), 1.0), obs=x)
    return 0.5 * h.sin() + x


def two_coins(h, x):
    a = pyro.sample("a", dist.Bernoulli(0.3 + 0.4 * h[:, 0]))
    b = pyro.sample("b", dist.Bernoulli(torch.stack([0.2 + 0.5 * a, 0.5 + 0.1 * h[:, 1]], -1)).to_event(1))
    pyro.sample("x", dist.Poisson(1 + a + 2 * b[:, 0] + b[:, 1]), obs=x)
    return torch.stack([a, b[:, 0]], -1)


def too_many_coins(h, x):
    b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(len(h), 13)).to_event(1))
    pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=x)
    return h


def switching(emission):
    def step(state, x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([[0.9, 0.1], [0.3, 0.7]])[state["k"]]))
        z = pyro.sample("z", dist.Normal(torch.tensor([0.9, -0.5])[k] * state["z"], torch.tensor([0.3, 1.0])[k]))
        pyro.sample("x", emission(k, z), obs=x)
        return {"k": k, "z": z}

    return Step(step, lambda rows: {"k": torch.zeros(rows, dtype=torch.long), "z": torch.zeros(rows)})


def regime_that_reads_the_level(h, x):
    k = pyro.sample("k", dist.Bernoulli(logits=3 * h))
    z = pyro.sample("z", dist.Normal(0.5 * h + k, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    return z


def level_in_a_random_scale(h, x):
    """A level moved by noise of a random log scale, all Gaussian, stacked in one tensor."""
    s = pyro.sample("s", dist.Normal(0.9 * h[:, 1], 0.4))
    z = pyro.sample("z", dist.Normal(h[:, 0], (0.5 * s).exp()))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x)
    return torch.stack([z, s], -1)


def product(h, x):
    """Linear in either latent given the other, in both not."""
    a = pyro.sample("a", dist.Normal(h[:, 0], 1.0))
    b = pyro.sample("b", dist.Normal(h[:, 1], 1.0))
    pyro.sample("x", dist.Normal(a * b, 1.0), obs=x)
    return torch.stack([a, b], -1)


def beside_a_count(h, x):
    """Nothing of the count can be read by the level: linear and Gaussian beside it."""
    z = pyro.sample("z", dist.Normal(0.9 * h, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=None if x is None else x[:, 0])
    pyro.sample("n", dist.Poisson(3.0), obs=None if x is None else x[:, 1])
    return z


def mixture(z):
    means = torch.stack([z - 1, z + 2], -1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7]).expand(len(z), 2)), dist.Normal(means, 1.0))


def poisson_latent(h, x):
    n = pyro.sample("n", dist.Poisson(1 + h))
    pyro.sample("x", dist.Normal(n, 1.0), obs=x)
    return 0.3 * n


class Widening(LocalLevel):
    """Time-varying noise."""

    def __init__(self):
        super().__init__(0.0, 1.0, 0.5, 0.3)

    def emission(self, z, t, x=None):
        return pyro.sample("x", dist.Normal(z, 0.5 + 0.1 * t), obs=x)


class BendsLater(LocalLevel):
    """Linear at the first three steps."""

    def __init__(self):
        super().__init__(0.0, 1.0, 0.5, 0.3)

    def emission(self, z, t, x=None):
        return pyro.sample("x", dist.Normal(torch.where(t < 4, z, z**2), 1.0), obs=x)


def emits(fn):
    return lambda: Emits(fn)


def step(fn, start=torch.zeros):
    return lambda: Step(fn, start)


def pairs(rows):
    return torch.zeros(rows, 2)


def rotated():
    return linear_gaussian(2, 2)


U = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TABLE = {
    # name: (model, arguments, kind, [(method, applies, what is said)])
    "local level": (lambda: LocalLevel(), {}, "linear-Gaussian",
                    [("KalmanFilter", True, ""), ("ForwardBackward", False, "finite")]),
    "rotated covariance": (rotated, {}, "linear-Gaussian", [("ExtendedKalmanFilter", True, "")]),
    "zero weights": (ZeroWeights, {}, "linear-Gaussian", [("KalmanFilter", True, "")]),
    "relu of z + 20": (emits(lambda z: dist.Normal((z + 20).relu(), 1.0)), {}, "nonlinear Gaussian",
                       [("KalmanFilter", False, "site 'x': its mean.*not linear")]),
    "clamp": (emits(lambda z: dist.Normal(z.clamp(-1e5, 1e5), 1.0)), {}, "nonlinear Gaussian",
              [("KalmanFilter", False, "not linear")]),
    "slow sine": (emits(lambda z: dist.Normal(1e3 * (1e-3 * z).sin(), 1.0)), {}, "nonlinear Gaussian",
                  [("KalmanFilter", False, "not linear"), ("UnscentedKalmanFilter", True, "")]),
    "quadratic emission": (emits(lambda z: dist.Normal(z**2, 1.0)), {}, "nonlinear Gaussian",
                           [("RaoBlackwellisedFilter", False, "no latent of Emits can be marginalised.*'x'")]),
    "covariance of the state": (emits(lambda z: dist.Normal(z, 1 + z.abs())), {}, "nonlinear Gaussian",
                                [("KalmanFilter", False, "covariance depends")]),
    "Student's t emission": (emits(lambda z: dist.StudentT(5.0, z, 1.0)), {}, "nonlinear Gaussian",
                             [("KalmanFilter", False, "'x' of Emits is StudentT"), ("ExtendedKalmanFilter", True, "")]),
    "Cauchy emission": (emits(lambda z: dist.Cauchy(z, 1.0)), {}, "nonlinear Gaussian",
                        [("ExtendedKalmanFilter", False, "without a finite mean")]),
    "mixture emission": (emits(mixture), {}, "nonlinear Gaussian", [("KalmanFilter", False, "MixtureSameFamily")]),
    "counts of a Gaussian": (emits(lambda z: dist.Poisson(z.exp())), {}, "nonlinear Gaussian",
                             [("ForwardBackward", False, "'z' of Emits is Normal"), ("AmortizedVariationalFilter", True, "")]),
    "classes of a Gaussian": (emits(lambda z: dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1))), {},
                              "nonlinear Gaussian", [("KalmanFilter", False, "integer type")]),
    "stochastic volatility": (StochasticVolatility, {}, "nonlinear Gaussian", [("KalmanFilter", False, "'x'")]),
    "deep Markov": (DeepMarkov, {}, "nonlinear Gaussian",
                    [("SequentialELBO", True, "with FilteringGuide, SmoothingGuide or AmortizedVariationalFilter, or")]),
    "deterministic transition": (step(deterministic, pairs), {}, "linear-Gaussian",
                                 [("KalmanFilter", True, ""), ("FilteringGuide", False, "Delta, which has no density"),
                                  ("SequentialELBO", True, r"only with a hand-written SequentialGuide for \['z'")]),
    "diffuse start": (lambda: Moves(lambda z: dist.Normal(z, 1.0), dist.ImproperUniform(constraints.real, (), ())), {},
                      "linear-Gaussian", [("KalmanFilter", True, ""), ("ParticleFilter", False, "ImproperUniform"),
                                          ("RaoBlackwellisedFilter", False, "ImproperUniform"),
                                          ("SequentialELBO", True, r"only with a hand-written SequentialGuide for \['z'\]")]),
    "data without noise": (emits(lambda z: dist.Delta(z)), {}, "linear-Gaussian",
                           [(method, False, "Delta of the state") for method in (
                               "ParticleFilter", "RaoBlackwellisedFilter", "FilteringGuide", "SequentialELBO")]),
    "two sites": (step(two_sites, pairs), {}, "linear-Gaussian", []),
    "data in the recurrence": (step(data_in_the_recurrence, pairs), {}, "linear-Gaussian", []),
    "driven by a covariate and time": (Driven, {"u": U}, "linear-Gaussian", []),
    "time-varying": (Widening, {}, "linear-Gaussian", []),
    "nonlinear later": (BendsLater, {}, "nonlinear Gaussian", [("KalmanFilter", False, "not linear")]),
    "with global parameters": (Bayesian, {}, "linear-Gaussian", []),
    "coin that feeds a level": (step(coin_feeds_level), {}, CONDITIONALLY,
                                [("RaoBlackwellisedFilter", True, r"marginalises \['z'\], draws \['b'\]")]),
    "regime that is not used": (step(unused_regime), {}, CONDITIONALLY,
                                [("KalmanFilter", False, "'k' of Step is Categorical")]),
    "switching system": (lambda: switching(lambda k, z: dist.Normal(z, 1.0 + k)), {}, CONDITIONALLY,
                         [("AmortizedVariationalFilter", False, "no pathwise gradient"), ("FilteringGuide", True, "")]),
    "switching system, counts": (lambda: switching(lambda k, z: dist.Poisson((z + k).exp())), {}, "none",
                                 [("RaoBlackwellisedFilter", False, "site 'x' of Step is observed and not Gaussian"),
                                  ("ExtendedKalmanFilter", False, "'k' of Step is Categorical"), ("ParticleFilter", True, "")]),
    "regime that reads the level": (step(regime_that_reads_the_level), {}, "none",
                                    [("RaoBlackwellisedFilter", False, "site 'k' of Step is to be drawn, and depends on")]),
    "level in a random scale": (step(level_in_a_random_scale, pairs), {}, CONDITIONALLY,
                                [("RaoBlackwellisedFilter", True, r"marginalises \['z'\], draws \['s'\]")]),
    "product of two": (step(product, pairs), {}, CONDITIONALLY, [("ExtendedKalmanFilter", True, "")]),
    "beside a count": (step(beside_a_count), {"x": torch.ones(2, 4, 2, dtype=torch.float64)}, CONDITIONALLY,
                       [("RaoBlackwellisedFilter", True, "one particle will do")]),
    "log-normal": (step(log_normal), {}, "none", [("KalmanFilter", False, "'s' of Step is LogNormal")]),
    "gamma rate": (GammaRate, {}, "none", [("FilteringGuide", True, "")]),
    "Poisson latent": (step(poisson_latent), {}, "none", [("ForwardBackward", False, "Poisson, which has no finite support")]),
    "hidden Markov": (HiddenMarkov, {}, "discrete",
                      [("ForwardBackward", True, ""),
                       ("KalmanFilter", False, "'k' of HiddenMarkov is Categorical.*ForwardBackward is exact"),
                       ("SequentialELBO", True, r"with FilteringGuide or SmoothingGuide, .*\['k'\] by the score function")]),
    "from left to right": (step(left_to_right), {}, "discrete",
                           [("FilteringGuide", False, "'k' of Step gives some of its values probability zero"),
                            ("SequentialELBO", True, "only with a hand-written")]),
    "switching autoregression": (lambda: MarkovSwitchingAutoregression(2, order=1), {}, "discrete",
                                 [("KalmanFilter", False, "'regime_1'.*Categorical.*ForwardBackward is exact")]),
    "several coins": (step(two_coins, pairs), {}, "discrete", [("ForwardBackward", True, "")]),
    "too many coins": (step(too_many_coins), {}, "none", [("ForwardBackward", False, "8192 joint values")]),
    "regimes with a memory": (step(remembering_regime), {}, "none", [("ForwardBackward", False, "latents of earlier steps")]),
    "two lags of a regime": (step(two_lags, pairs), {}, "none", [("ForwardBackward", False, "latents of earlier steps")]),
    "no latents": (step(gru_of_data), {}, "no latents",
                   [("ExactLikelihood", True, ""), ("KalmanFilter", False, "no latent"),
                    ("SequentialELBO", False, "likelihood")]),
}


@pytest.mark.parametrize("name", TABLE)
def test_kinds(name):
    build, arguments, kind, said = TABLE[name]
    found = seq.inspect(build(), **arguments)
    assert found.kind == kind, found
    for method, applies, why in said:
        assert found.applies(method) == applies, found
        assert re.search(why, found.why(method)), found.why(method)
    assert repr(found).startswith(type(found.model).__name__) and "<table>" in found._repr_html_()


RUN = {**dict.fromkeys(["KalmanFilter", "ForwardBackward", "ExactLikelihood", "ExtendedKalmanFilter", "UnscentedKalmanFilter",
                        "EnsembleKalmanFilter"], {}),
       **dict.fromkeys(["RaoBlackwellisedFilter", "ParticleFilter", "BackwardSampler"], {"num_particles": 3}),
       "TwistedParticleFilter": {"num_particles": 40}}


@pytest.mark.filterwarnings("ignore:global parameters")
@pytest.mark.parametrize("name", TABLE)
def test_what_is_said_to_apply_does(name):
    """Every method runs on the models to which it is said to apply, and refuses the others."""
    build, arguments, _, _ = TABLE[name]
    model = build()
    found = seq.inspect(model, **arguments)
    covariates = {k: v for k, v in arguments.items() if k != "x"}
    x = arguments["x"] if "x" in arguments else torch.randn(2, 5) if name == "diffuse start" else (
        model.simulate([5, 5], **covariates)["x"])
    for method, options in RUN.items():
        if not hasattr(seq, method) or found.kind == "no latents" and method not in ("ExactLikelihood", "ParticleFilter"):
            continue  # a filter may run without anything to filter
        if found.applies(method):
            assert getattr(seq, method)(model, **options).run(x, **covariates).log_evidence.isfinite().all(), method
        else:
            with pytest.raises((ValueError, TypeError)):
                getattr(seq, method)(model, **options).run(x, **covariates)
    if model.global_sites():
        assert "global_guide" in found.why("FilteringGuide")
        return
    pyro.set_rng_seed(0)  # a guide that proposes what cannot be may miss it, one seed in 30
    for guide in (seq.FilteringGuide, seq.AmortizedVariationalFilter):
        like = seq.Sequences.of(x, covariates=covariates)
        if found.applies(guide.__name__):
            assert math.isfinite(seq.SequentialELBO().loss(model, guide(model, like=like), x, **covariates))
        else:
            with pytest.raises((ValueError, TypeError)):  # many draws, so that some meet what has probability zero
                seq.SequentialELBO(50).loss(model, guide(model, like=like), x, **covariates)


def test_what_is_said():
    """Linear at the points tested, one line per site, one per method; the randomness of the caller is left alone."""
    model, before = ZeroWeights(), torch.get_rng_state()
    found = seq.inspect(model)
    assert torch.equal(before, torch.get_rng_state())
    lines = repr(found).splitlines()
    assert lines[0] == "ZeroWeights: linear-Gaussian at the points tested"
    assert lines[1:3] == ["  z  latent    Normal ()", "  x  observed  Normal ()"]
    assert len(found.methods) == 13 and all(len(line) <= 120 for line in lines)
    assert found.sites[0] == ("z", "Normal", (), False, None)
    coins = seq.inspect(Step(two_coins, pairs))
    assert coins.headline == "discrete, with 8 joint states a step"
    assert [site.size for site in coins.sites] == [2, 4, None]
    assert seq.inspect(Bayesian()).notes == ("given one value of the global parameters ['phi', 'noise']",)
    diffuse = TABLE["diffuse start"][0]()
    assert seq.inspect(diffuse).sites[0].family == "ImproperUniform, then Normal"


def test_from_pyro():
    def walk(x, lengths=None):
        z = 0.0
        with pyro.plate("series", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    with pytest.raises(ValueError, match="runs on its data: pass x"):
        seq.inspect(seq.from_pyro(walk))
    found = seq.inspect(seq.from_pyro(walk), torch.randn(2, 4))
    assert found.kind == "none" and found.applies("ParticleFilter") and found.applies("FilteringGuide")
    assert "no Markov state" in found.why("KalmanFilter")


def test_data_is_used_where_given():
    """Ragged, with gaps, longer than what is tested, and with data whose shape the sites do not tell."""
    x = torch.randn(6, 70)
    x[0, 3] = math.nan
    assert seq.inspect(LocalLevel(), x, [70, 3, 5, 6, 7, 8]).kind == "linear-Gaussian"
    assert seq.inspect(HiddenMarkov(), x).kind == "discrete"
    assert seq.inspect(TABLE["beside a count"][0](), torch.ones(1, 1, 2)).kind == CONDITIONALLY


@pytest.mark.parametrize("name, method", [("local level", "KalmanFilter"), ("hidden Markov", "ForwardBackward"),
                                          ("no latents", "ExactLikelihood")])
def test_the_exact_method(name, method):
    if not hasattr(seq, method):
        pytest.skip(f"{method} is not there")
    model = TABLE[name][0]()
    found = seq.exact(model)
    assert type(found).__name__ == method and found.model is model
    assert found.run(torch.randn(2, 4)).kind == "exact"


def test_linearity_can_be_assumed():
    model = TABLE["clamp"][0]()
    found = seq.inspect(model, assume="linear-Gaussian")
    assert found.headline == "linear-Gaussian, as the user says"
    x = torch.randn(1, 5)
    torch.testing.assert_close(found.method().run(x).log_evidence,
                               seq.KalmanFilter(model, assume_linear=True).run(x).log_evidence)
    # What is not Gaussian cannot be assumed to be.
    assert seq.inspect(GammaRate(), assume="linear-Gaussian").kind == "none"


MISTAKES = [
    (lambda: seq.exact(StochasticVolatility()), ValueError,
     "(?s)no exact method, being nonlinear Gaussian.*KalmanFilter: .*'x'"),
    (lambda: seq.exact(TABLE["switching system"][0]()), ValueError, r"being linear-Gaussian in \['z'\] given \['k'\]"),
    (lambda: seq.inspect(LocalLevel), TypeError, "not the class LocalLevel"),
    (lambda: seq.inspect(Driven()), ValueError, r"requires \['u'\]"),
    (lambda: seq.inspect(TABLE["beside a count"][0]()), ValueError, r"cannot tell the shape of the data \['x'\]"),
    (lambda: seq.inspect(LocalLevel(), assume="discrete"), ValueError, "what can be assumed is 'linear-Gaussian'"),
    (lambda: seq.inspect(LocalLevel()).applies("Kalman"), ValueError, "no method 'Kalman'; there are"),
]


@pytest.mark.parametrize("call, error, message", MISTAKES)
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_data_that_is_the_state_itself():
    """Particles never meet it; a Kalman filter conditions on it."""
    found = seq.inspect(seq.models.ARIMA((1, 0, 1)))
    assert found.applies("KalmanFilter") and not found.applies("ParticleFilter")
    assert not found.applies("RaoBlackwellisedFilter")
    assert "no drawn state meets" in found.why("ParticleFilter")
