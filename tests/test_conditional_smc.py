"""Conditional runs: the path is kept, and the kernel leaves the exact smoothing distribution as it is.

A batch of copies of one short series is as many independent chains, each begun at an exact draw of the posterior. Moments and
frequencies after some sweeps are compared with the exact ones; every comparison is at |z| < 4.5 (7e-6 two-sided), with at most
60 of them a test.
"""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import VRNN, HiddenMarkov, LocalLevel, TwoSites, linear_gaussian

import pyro_seq as seq
from pyro_seq.engine.loop import forward
from pyro_seq.infer.smc import conditional_path
from pyro_seq.infer.smc.conditional_path import conditional_multinomial, conditional_systematic
from pyro_seq.resampling import systematic

SCHEMES = {"multinomial": conditional_multinomial, "systematic": conditional_systematic}
CHAINS = 2000


def level():
    return LocalLevel(0.0, 1.0, 0.5, 1.0)


class Halfway(seq.SequentialGuide):
    def step(self, state, x):
        before = torch.zeros_like(x) if state is None else state
        pyro.sample("z", dist.Normal((before + x) / 2, 0.9))


def z_scores(values, mean):
    """Of independent rows ``(n, ...)`` against what they should be on average."""
    return (values.mean(0) - mean) / (values.std(0) / len(values) ** 0.5)


X = torch.tensor([[0.5, 2.5, -1.0, 1.5]], dtype=torch.float64)


def smoothed():
    """Mean and covariance of ``level()``'s path given ``X``, by conditioning the joint Gaussian."""
    times = torch.arange(4)
    prior = 1.0 + 0.5 * torch.minimum(times[:, None], times).double()
    gain = prior @ torch.linalg.inv(prior + torch.eye(4))
    mean, covariance = gain @ X[0], prior - gain @ prior
    exact = seq.KalmanFilter(level()).run(X).smoothed["z"]
    torch.testing.assert_close(mean, exact.mean[0])
    torch.testing.assert_close(covariance.diagonal(), exact.variance[0])
    return mean, covariance


def drawn(posterior):
    return {name: value[0] for name, value in posterior.trajectories(1).samples.items()}


@pytest.mark.parametrize("resampling", SCHEMES)
@pytest.mark.parametrize("ancestor_sampling", [False, True])
@pytest.mark.parametrize("guide", [None, "hand-written", "kalman", "avf"])
def test_the_kernel_leaves_the_linear_gaussian_posterior_as_it_is(resampling, ancestor_sampling, guide):
    model, mean, covariance = level(), *smoothed()
    guide = {None: None, "hand-written": Halfway, "kalman": seq.KalmanGuide,
             "avf": lambda m: seq.AmortizedVariationalFilter(m, like=X, hidden=4)}[guide]
    kernel = seq.ConditionalParticleFilter(model, 4, guide=guide and guide(model), ancestor_sampling=ancestor_sampling,
                                           resampling=resampling)
    begun = path = dist.MultivariateNormal(mean, covariance).sample((CHAINS,))
    for _ in range(2):
        path = drawn(kernel.run(X.expand(CHAINS, -1), path={"z": path}))["z"]
    apart = path - mean
    assert z_scores(path, mean).abs().max() < 4.5
    assert z_scores(apart[:, :, None] * apart[:, None], covariance).abs().max() < 4.5
    assert (path != begun).any(1).double().mean() > 0.5


def test_the_comparison_would_notice_a_wrong_kernel():
    """Paths of as few particles without the conditioning are biased, by many standard errors."""
    path = drawn(seq.ParticleFilter(level(), 3, history=True, ess_threshold=1.0).run(X.expand(CHAINS, -1)))["z"]
    assert z_scores(path, smoothed()[0]).abs().max() > 6


@pytest.mark.parametrize("ancestor_sampling", [False, True])
def test_vectors_gaps_and_several_lengths(ancestor_sampling):
    model = linear_gaussian()
    x = torch.randn(2, 5, 3)
    x[0, 1], x[1, 2, 1] = torch.nan, torch.nan
    lengths = torch.tensor([5, 3])
    exact = seq.KalmanFilter(model).run(x, lengths)
    begun = exact.trajectories(1000).samples["z"].transpose(0, 1).reshape(2000, 5, 2)
    kernel = seq.ConditionalParticleFilter(model, 5, ancestor_sampling=ancestor_sampling)
    batch, every = x.repeat_interleave(1000, 0), lengths.repeat_interleave(1000)
    posterior = kernel.run(batch, every, path={"z": begun})
    path = drawn(posterior)["z"].reshape(2, 1000, 5, 2)
    assert (path[1, :, 3:] == 0).all()
    for b, length in enumerate((5, 3)):
        moments, z = exact.smoothed["z"], path[b, :, :length]
        mean = moments.mean[b, :length]
        assert z_scores(z, mean).abs().max() < 4.5
        variance = moments.variance[b, :length]
        variance = variance if variance.shape == mean.shape else variance.diagonal(dim1=-2, dim2=-1)
        assert z_scores((z - mean).square(), variance).abs().max() < 4.5


@pytest.mark.parametrize("resampling", SCHEMES)
@pytest.mark.parametrize("ancestor_sampling", [False, True])
@pytest.mark.parametrize("particles", [2, 5])
def test_a_hidden_markov_model_by_enumeration(resampling, ancestor_sampling, particles):
    model, x = HiddenMarkov(), torch.tensor([[0.3, -0.8, 1.0]])
    paths = torch.tensor(list(itertools.product(range(2), repeat=3)))
    with torch.no_grad():
        start, move = model.start_logits.log_softmax(-1), model.logits.log_softmax(-1)
        log_p = start[paths[:, 0]] + move[paths[:, 0], paths[:, 1]] + move[paths[:, 1], paths[:, 2]]
        log_p = log_p + dist.Normal(model.locs[paths], 0.8).log_prob(x).sum(-1)
    chances = log_p.softmax(-1)
    begun = paths[torch.multinomial(chances, 4000, replacement=True)]
    kernel = seq.ConditionalParticleFilter(model, particles, ancestor_sampling=ancestor_sampling, resampling=resampling)
    path = drawn(kernel.run(x.expand(4000, -1), path={"k": begun}))["k"]
    index = (path * torch.tensor([4, 2, 1])).sum(-1)
    found = torch.nn.functional.one_hot(index.long(), 8).double()
    z = (found.mean(0) - chances) / (chances * (1 - chances) / 4000).sqrt()
    assert z.abs().max() < 4.5
    assert (path != begun).any(1).double().mean() > 0.2


@pytest.mark.parametrize("ancestor_sampling", [False, True])
def test_from_anywhere_the_chain_goes_to_the_posterior(ancestor_sampling):
    """Begun far off, 20 sweeps of 10 particles reach the exact means; |z| < 4.5."""
    mean, covariance = smoothed()
    kernel = seq.ConditionalParticleFilter(level(), 10, ancestor_sampling=ancestor_sampling)
    path = torch.full((1000, 4), 4.0)
    for _ in range(20):
        path = drawn(kernel.run(X.expand(1000, -1), path={"z": path}))["z"]
    assert z_scores(path, mean).abs().max() < 4.5
    assert z_scores((path - mean).square(), covariance.diagonal()).abs().max() < 4.5


@pytest.fixture
def steps_of(monkeypatch):
    """The steps of the loop that a run makes."""
    def of(run):
        steps = []
        monkeypatch.setattr(conditional_path, "forward", lambda *a, **k: (steps.append(s) or s for s in forward(*a, **k)))
        run()
        return steps
    return of


class TwoStage(seq.SequentialGuide):
    """The second latent is drawn given the first: particle 0's must be given the path's."""

    def step(self, state, x):
        level = pyro.sample("level", dist.Normal(0.5 * state["level"], 1.0).to_event(1))
        pyro.sample("rate", dist.Gamma(2.0, torch.exp(-0.2 * level[:, 0])))


@pytest.mark.parametrize("make", [lambda m: None, TwoStage, lambda m: seq.FilteringGuide(m, like=torch.randn(3, 6, 3)),
                                  lambda m: seq.AmortizedVariationalFilter(m, like=torch.randn(3, 6, 3))])
@pytest.mark.parametrize("resampling", SCHEMES)
def test_the_path_is_kept_at_every_step_and_weighed_as_itself(steps_of, make, resampling):
    model, lengths = TwoSites(), torch.tensor([4, 6, 2])
    data = model.simulate(lengths)
    x = torch.cat([data["a"], data["b"][..., None]], -1)
    path = {"level": data["level"], "rate": data["rate"] + (data["rate"] == 0)}
    guide = make(model)
    kernel = seq.ConditionalParticleFilter(model, 6, guide=guide, resampling=resampling)
    steps = steps_of(lambda: kernel.run(x, lengths, path=path))
    assert len(steps) == 6
    order = torch.argsort(lengths, descending=True, stable=True)
    for step in steps:
        n = len(step.log_weights)
        for name, value in path.items():
            site = step.sites[name]
            rows = site.value.unflatten(0, (n, 6))
            assert torch.equal(rows[:, 0], value[order][:n, step.frame.t - 1]) and not torch.equal(rows[:, 1], rows[:, 0])
        if step.frame.t > 1:
            assert (step.ancestors[:, 0] == 0).all()
        if isinstance(guide, TwoStage):
            q = dist.Gamma(2.0, torch.exp(-0.2 * step.sites["level"].value[:, 0]))
            torch.testing.assert_close(step.sites["rate"].log_q(), q.log_prob(step.sites["rate"].value))


def test_a_carried_state_follows_the_path(steps_of):
    """Particle 0 of a recurrent model has the state that the path and the data lead to."""
    model = VRNN()
    x, z = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    kernel = seq.ConditionalParticleFilter(model, 4, guide=seq.FilteringGuide(model, like=x))
    steps = steps_of(lambda: kernel.run(x, path={"z": z}))
    h = model.start(2)
    for t, step in enumerate(steps):
        h = model.advance(h, {"z": z[:, t]}, x[:, t])
        torch.testing.assert_close(step.state[::4], h.detach())


def test_the_answer_says_what_it_is():
    posterior = seq.ConditionalParticleFilter(level(), 4).run(**RUN)
    assert posterior.kind == "log of a biased estimate, one path being given" and posterior.standard_error.isnan().all()
    assert posterior.predict(2, 10).samples["x"].shape == (10, 2, 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_conditional_resampling_completes_to_the_scheme_itself(scheme):
    """If particle 0's ancestor is drawn by weight, every ancestor is distributed by weight; |z| < 4.5, 36 comparisons."""
    weights = torch.tensor([0.37, 0.05, 0.02, 0.29, 0.11, 0.16])
    n = 40_000
    kept = torch.multinomial(weights, n, replacement=True)
    ancestors = SCHEMES[scheme](weights.expand(n, -1), kept)
    assert torch.equal(ancestors[:, 0], kept)
    found = torch.nn.functional.one_hot(ancestors, 6).double()
    z = (found.mean(0) - weights) / (weights * (1 - weights) / n).sqrt()
    assert z.abs().max() < 4.5
    if scheme == "systematic":
        counts = found.sum(1)
        assert ((counts == (6 * weights).floor()) | (counts == (6 * weights).ceil())).all()


def test_conditional_systematic_is_the_scheme_given_an_ancestor():
    """All of the joint law: how often each vector of counts comes with each ancestor, against systematic resampling in random
    order itself; |z| < 4.5 over fewer than 60 cells."""
    weights, n = torch.tensor([0.45, 0.2, 0.35]).expand(200_000, -1), 200_000
    kept = torch.multinomial(weights[0], n, replacement=True)
    ours = conditional_systematic(weights, kept)
    other = systematic(weights)
    other = other.gather(1, torch.rand(n, 3).argsort(-1))
    first, second = ((a * torch.tensor([9, 3, 1])).sum(-1).bincount(minlength=27) / n for a in (ours, other))
    error = ((first + second) / n).sqrt().clamp(min=1e-9)
    assert ((first - second) / error).abs().max() < 4.5 and ((first > 0) == (second > 0)).all()


class Lagged(seq.StateSpaceModel):
    """Its state holds the last latent too."""

    def initial(self):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        return torch.stack([z, torch.zeros_like(z)], -1)

    def transition(self, state):
        z = pyro.sample("z", dist.Normal(0.5 * state[:, 0] + 0.3 * state[:, 1], 1.0))
        return torch.stack([z, state[:, 0]], -1)

    def emission(self, state, x=None):
        pyro.sample("x", dist.Normal(state[:, 0], 1.0), obs=x)


class Bounded(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("z", dist.Uniform(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Uniform(z - 0.5, z + 0.5))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class BoundedNoise(LocalLevel):
    def __init__(self):
        super().__init__(0.0, 1.0, 0.5, 1.0)

    def emission(self, z, x=None):
        pyro.sample("x", dist.Uniform(z - 4, z + 4), obs=x)


def test_ancestors_of_density_zero_are_not_drawn():
    """Uniform steps: most ancestors cannot lead to the path."""
    kernel = seq.ConditionalParticleFilter(Bounded(), 20, ancestor_sampling=True)
    path = torch.full((50, 6), 0.5).cumsum(1) * 0.8
    for _ in range(3):
        path = drawn(kernel.run(torch.zeros(50, 6), path={"z": path}))["z"]
        assert (path.diff(dim=1).abs() <= 0.5).all() and (path[:, 0] <= 1).all()


class Chain(seq.SequentialGuide):
    """Reads what it draws."""

    def step(self, state, x):
        k = pyro.sample("k", dist.Categorical(torch.ones(len(x), 3)))
        torch.eye(3)[k]


@pytest.mark.parametrize("ancestor_sampling", [False, True])
@pytest.mark.parametrize("of", [torch.Tensor.double, torch.Tensor.float, torch.Tensor.int, torch.Tensor.numpy,
                                lambda k: k.double().numpy(), torch.Tensor.tolist])
def test_a_path_of_another_type_is_the_same_path(of, ancestor_sampling):
    model, x = HiddenMarkov(3), torch.randn(2, 5)
    kernel = seq.ConditionalParticleFilter(model, 6, ancestor_sampling=ancestor_sampling)
    k = torch.randint(3, (2, 5))
    found = []
    for path in (k, of(k)):
        pyro.set_rng_seed(1)
        found.append(kernel.run(x, path={"k": path}).trajectories(3).samples["k"])
    assert torch.equal(*found) and found[1].dtype == torch.long


def test_what_lies_past_the_end_of_a_path_is_not_read():
    path = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, torch.nan]])
    found = seq.ConditionalParticleFilter(HiddenMarkov(3), 5).run(torch.zeros(2, 3), [3, 2], path={"k": path})
    assert found.filtered["k"].mean.isfinite().all()


def test_diagnostics_are_of_all_its_particles():
    posterior = seq.ConditionalParticleFilter(level(), 50).run(torch.randn(2, 6), [6, 4], path={"z": torch.zeros(2, 6)})
    table = posterior.diagnostics()
    assert len(table) == 10
    np.testing.assert_allclose(table["ess"], posterior.ess[posterior.sequences.active])
    assert set(table) >= {"distinct_ancestors", "pareto_k"} and (table["distinct_ancestors"] >= 1).all()


class Alone(seq.SequentialModel):
    """A state that reads no data, said or not."""

    def start(self, rows):
        return torch.zeros(rows)

    def step(self, z, x=None):
        z = pyro.sample("z", dist.Normal(0.5 * z, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return z


class SaidSo(Alone):
    missing_feeds_state = False


def test_gaps_that_no_state_reads_once_the_model_says_so():
    """2000 chains of 15 sweeps against the exact smoothed means with a gap; |z| < 4.5."""
    x = X.clone()
    x[0, 1] = torch.nan
    with pytest.raises(ValueError, match="missing_feeds_state = False"):
        seq.ConditionalParticleFilter(Alone(), 5).run(x, path={"z": torch.zeros(1, 4)})
    kernel, path = seq.ConditionalParticleFilter(SaidSo(), 10, ancestor_sampling=True), torch.zeros(CHAINS, 4)
    for _ in range(15):
        path = drawn(kernel.run(x.expand(CHAINS, -1), path={"z": path}))["z"]
    exact = seq.KalmanFilter(SaidSo()).run(x).smoothed["z"].mean[0]
    assert z_scores(path, exact).abs().max() < 4.5


RUN = dict(x=torch.zeros(2, 3, dtype=torch.float64), path={"z": torch.zeros(2, 3, dtype=torch.float64)})


@pytest.mark.parametrize("make, arguments, error, message", [
    (lambda: seq.ConditionalParticleFilter(level(), 1), {}, ValueError, "num_particles=1; it is at least 2"),
    (lambda: seq.ConditionalParticleFilter(level(), 5, resampling="stratified"), {}, ValueError, "one of \\['multinomial', 's"),
    (lambda: seq.ConditionalParticleFilter(seq.from_pyro(lambda x: None), 5), {}, TypeError, "replays its own past"),
    (lambda: seq.ConditionalParticleFilter(level(), 5, guide=Halfway(level())), {}, ValueError, "made for another"),
    (lambda: seq.ConditionalParticleFilter(level(), 5), {"path": torch.zeros(2, 3)}, TypeError, "path is a Tensor"),
    (lambda: seq.ConditionalParticleFilter(level(), 5), {"path": {}}, ValueError, "path does not hold the latent site 'z'"),
    (lambda: seq.ConditionalParticleFilter(level(), 5), {"path": {"z": torch.zeros(3, 3)}}, ValueError,
     r"path\['z'\] has shape \(3, 3\); of this data it is \(B, T, ...\) = \(2, 3, ...\)"),
    (lambda: seq.ConditionalParticleFilter(level(), 5), {"path": {"z": torch.zeros(2, 3, 1)}}, ValueError,
     "site 'z' has entries of shape"),
    (lambda: seq.ConditionalParticleFilter(level(), 5), {"path": {**RUN["path"], "w": torch.zeros(2, 3)}}, ValueError,
     r"path holds \['w'\], which is no latent site"),
    (lambda: seq.ConditionalParticleFilter(BoundedNoise(), 5),
     {"path": {"z": torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 5.0]])}}, ValueError,
     "the path of sequence 1 has weight zero at time 3"),
    (lambda: seq.ConditionalParticleFilter(Lagged(), 5, ancestor_sampling=True), {}, ValueError,
     "the state of Lagged after time 2 is no function of that step's latents"),
    (lambda: seq.ConditionalParticleFilter(VRNN(), 5), {"x": torch.full((2, 3, 4), torch.nan, dtype=torch.float64)}, ValueError,
     "draws missing data, which its state may read.*missing_feeds_state = False in the class"),
    (lambda: seq.ConditionalParticleFilter(level(), 5), {"path": {"z": "flat"}}, TypeError, r"path\['z'\] is a str"),
    (lambda: seq.ConditionalParticleFilter(level(), 5),
     {"path": {"z": torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.nan, 0.0]])}}, ValueError,
     r"path\['z'\] of sequence 1 at time 2 is nan, outside the support of Normal"),
    (lambda: seq.ConditionalParticleFilter(Bounded(), 5), {"path": {"z": torch.tensor([[0.5, 0.2, 0.1], [0.9, 0.3, 0.1]])}},
     ValueError, r"path\['z'\] of sequence 1 at time 2 is 0.3, outside the support of Uniform"),
    (lambda: seq.ConditionalParticleFilter(TwoSites(), 5),
     {"x": torch.zeros(2, 3, 3).double(), "path": {"level": torch.zeros(2, 3, 2), "rate": -torch.ones(2, 3)}}, ValueError,
     r"path\['rate'\] of sequence 0 at time 1 is -1, outside the support of Gamma"),
    *((lambda make=make, ancestor_sampling=ancestor_sampling: make(ancestor_sampling), {"path": {"k": path}}, ValueError,
       rf"path\['k'\] of sequence 1 at time 2 is {found}, outside the support of Categorical")
      for make in (lambda sampled: seq.ConditionalParticleFilter(HiddenMarkov(3), 5, ancestor_sampling=sampled),
                   lambda sampled: (lambda m: seq.ConditionalParticleFilter(m, 5, guide=Chain(m), ancestor_sampling=sampled))(
                       HiddenMarkov(3)))
      for ancestor_sampling in (False, True)
      for path, found in ((torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.7, 2.0]]), "1.7"),
                          (torch.tensor([[0, 1, 2], [0, 7, 2]]), "7"), (torch.tensor([[0, 1, 2], [0, -1, 2]]), "-1"))),
])
def test_mistakes(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make().run(**{**RUN, **arguments})
