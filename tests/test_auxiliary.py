"""Look-ahead: the auxiliary particle filter and locally optimal proposals, against exact evidence and moments."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import HiddenMarkov, LocalLevel, StochasticVolatility, linear_gaussian

import pyro_seq as seq
from pyro_seq.engine.loop import forward
from pyro_seq.guides.enumerated import Finite
from pyro_seq.infer.auxiliary_filter import center


class Regimes(seq.StateSpaceModel):
    """Two latent sites, the second given the first; forbidden transitions; two observed sites from one vector of data."""

    def initial(self):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        return {"k": k, "on": pyro.sample("on", dist.Bernoulli(torch.tensor([0.2, 0.5, 1.0])[k]))}

    def transition(self, state):
        table = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.7, 0.3], [0.4, 0.0, 0.6]])
        k = pyro.sample("k", dist.Categorical(table[state["k"]]))
        stay = torch.where(state["on"] == 1, 0.9, 0.3)
        return {"k": k, "on": pyro.sample("on", dist.Bernoulli(stay * torch.tensor([1.0, 0.5, 0.8])[k]))}

    def emission(self, state, x=None):
        loc = state["k"].to(torch.get_default_dtype())
        pyro.sample("a", dist.Normal(loc, 0.5), obs=None if x is None else x[:, 0])
        pyro.sample("b", dist.Normal(state["on"] * 2 - loc, 0.7), obs=None if x is None else x[:, 1])


def regimes_data(steps):
    drawn = Regimes().simulate([steps])
    return torch.stack([drawn["a"], drawn["b"]], -1)


CASES = {
    "linear-Gaussian": (lambda: linear_gaussian(2, 1), lambda m: m.simulate([6])["x"], seq.KalmanFilter),
    "local level": (lambda: LocalLevel(0.0, 1.0, 1.0, 0.5), lambda m: m.simulate([6])["x"], seq.KalmanFilter),
    "hidden Markov": (lambda: HiddenMarkov(3), lambda m: m.simulate([6])["x"], seq.ForwardBackward),
    "two sites": (Regimes, lambda m: regimes_data(6), seq.ForwardBackward),
}
OPTIMAL = {"linear-Gaussian": seq.KalmanGuide, "local level": seq.KalmanGuide, "hidden Markov": seq.EnumeratedGuide,
           "two sites": seq.EnumeratedGuide}


def case(name, gaps=False):
    make, data, exact = CASES[name]
    model = make()
    x = data(model)
    if gaps:
        x[0, 2] = x[0, -1] = torch.nan
        if x.dim() == 3:
            x[0, 3, 0] = torch.nan
    return model, x, exact(model).run(x)


def copies(x, n):
    return x.expand(n, *x.shape[1:])


def assert_unbiased(log_evidence, exact, level=4.4):
    """exp(log evidence - exact) has mean 1: a right filter fails once in 100 000."""
    ratio = (log_evidence - exact).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - 1) < level * error + 1e-9, f"{ratio.mean():.4f} +- {error:.4f}"
    assert error < 0.2


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["optimal", "at the center", "given", "adaptive"])
def test_evidence_is_unbiased(name, how, gaps):
    model, x, exact = case(name, gaps)
    options = {
        "optimal": lambda: {"guide": OPTIMAL[name](model)},
        "at the center": dict,
        "given": lambda: {"look_ahead": lambda state, frame, encoding: torch.sin(10.0 * torch.arange(frame.rows))},
        "adaptive": lambda: {"guide": OPTIMAL[name](model), "ess_threshold": 0.6},
    }[how]()
    found = seq.AuxiliaryParticleFilter(model, 12, **options).run(copies(x, 1500))
    assert_unbiased(found.log_evidence, exact.log_evidence)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gaps", [False, True])
def test_an_optimal_guide_is_fully_adapted(name, gaps):
    """All weights alike at every step, so that the effective sample size is the sample size."""
    model, x, _ = case(name, gaps)
    for runs in (1, 3):
        found = seq.AuxiliaryParticleFilter(model, 9, guide=OPTIMAL[name](model), num_runs=runs).run(copies(x, 4))
        assert found.method == "fully adapted particle filter"
        torch.testing.assert_close(found.ess, torch.full_like(found.ess, 9.0))
    loose = seq.AuxiliaryParticleFilter(model, 9, guide=OPTIMAL[name](model), ess_threshold=0.5).run(x)
    assert loose.method == "fully adapted particle filter"  # the look-ahead is exact, if not always acted on


def test_others_are_not_called_fully_adapted():
    model, x, _ = case("linear-Gaussian")
    assert seq.AuxiliaryParticleFilter(model, 9).run(x).method == "auxiliary particle filter"
    volatility = StochasticVolatility()
    x = volatility.simulate([5])["x"]
    guide = seq.KalmanGuide(volatility)
    assert seq.AuxiliaryParticleFilter(volatility, 9, guide=guide).run(x).method == "auxiliary particle filter"


@pytest.mark.parametrize("name", CASES)
def test_the_better_informed_the_smaller_the_variance(name):
    """Of the log evidence over 1000 filters: fully adapted <= guided <= bootstrap. The standard error of the logarithm of a
    ratio of two variances over 1000 runs is about 0.065 for Gaussian estimates; 0.3 is past four of them."""
    torch.manual_seed(3)
    model, x, _ = case(name)
    many, guide = copies(x, 1000), OPTIMAL[name](model)
    adapted = seq.AuxiliaryParticleFilter(model, 20, guide=guide).run(many).log_evidence.var()
    guided = seq.ParticleFilter(model, 20, guide=guide, ess_threshold=1.0).run(many).log_evidence.var()
    bootstrap = seq.ParticleFilter(model, 20, ess_threshold=1.0).run(many).log_evidence.var()
    assert (adapted / guided).log() < 0.3 and (guided / bootstrap).log() < 0.0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimal", [False, True])
def test_filtered_moments(name, optimal):
    """Of 40 filters of 400 particles each: 5 of their standard errors, and the bias of a ratio, of order 1 / N."""
    model, x, exact = case(name, gaps=True)
    guide = OPTIMAL[name](model) if optimal else None
    found = seq.AuxiliaryParticleFilter(model, 400, guide=guide).run(copies(x, 40))
    for site in found.filtered:
        for part in ("mean", "variance"):
            here, there = getattr(found.filtered[site], part), getattr(exact.filtered[site], part)
            error = here.std(0) / math.sqrt(40)
            assert ((here.mean(0) - there[0]).abs() < 5 * error + 0.01 * (1 + there[0].abs())).all(), (site, part)
    by_step = found.log_evidence_by_step
    error = by_step.std(0) / math.sqrt(40)
    assert ((by_step.mean(0) - exact.log_evidence_by_step[0]).abs() < 5 * error + 0.02).all()


@pytest.mark.parametrize("guide", [None, seq.KalmanGuide])
def test_each_sequence_of_a_ragged_batch_is_filtered_as_if_alone(guide, monkeypatch, row_noise):
    monkeypatch.setattr("pyro_seq.resampling.inversion.draw_uniform", lambda shape, like: like.new_full((shape,), 0.5))
    model = LocalLevel(0.0, 1.0, 1.0, 0.5)
    lengths, x = [4, 7, 5], model.simulate([7] * 3)["x"]
    x[1, 3] = torch.nan
    if guide is not None:  # its draws are its own: compare what is exact of them
        x = x[:, :1].expand(-1, 7)
    make = guide and guide(model)
    row_noise.ids = [0, 1, 2]
    whole = seq.AuxiliaryParticleFilter(model, 6, guide=make).run(x, lengths)
    for b, n in enumerate(lengths):
        row_noise.ids = [b]
        alone = seq.AuxiliaryParticleFilter(model, 6, guide=make).run(x[b:b + 1, :n])
        torch.testing.assert_close(whole.log_evidence[b], alone.log_evidence[0])
        torch.testing.assert_close(whole.filtered["z"].mean[b, :n], alone.filtered["z"].mean[0])
    assert (whole.log_evidence_by_step[0, 4:] == 0).all()


def test_ragged_batches_are_unbiased():
    model, x, _ = case("two sites", gaps=True)
    both = torch.cat([copies(x, 1000), copies(x, 1000)])
    lengths = [6] * 1000 + [4] * 1000
    found = seq.AuxiliaryParticleFilter(model, 10, guide=seq.EnumeratedGuide(model)).run(both, lengths)
    exact = seq.ForwardBackward(model).run(copies(x, 2), [6, 4]).log_evidence
    assert_unbiased(found.log_evidence[:1000], exact[0])
    assert_unbiased(found.log_evidence[1000:], exact[1])


# What guides say of the next frame.

def test_look_ahead_of_a_linear_model_is_exact():
    model = linear_gaussian()
    guide = seq.KalmanGuide(model)
    x = model.simulate([2])["x"]

    def run():
        steps = list(forward(model, guide, seq.Sequences.of(x), 20))
        return steps[1].before, steps[1].frame, guide.look_ahead(steps[1].before, steps[1].frame, None)

    with torch.no_grad():
        before, frame, found = model.within(run)
    covariance = model.c @ model.q @ model.c.T + model.r
    expected = dist.MultivariateNormal(before @ model.a.T @ model.c.T, covariance).log_prob(frame.x["x"])
    torch.testing.assert_close(found, expected)


def test_enumeration_says_the_posterior_of_the_latents():
    """Against all values of both sites written out, one of the two observed sites missing at some rows."""
    model = Regimes()
    guide = seq.EnumeratedGuide(model)
    x = torch.cat([regimes_data(2), regimes_data(2)])
    x[1, 1, 0] = torch.nan

    def run():
        steps = list(forward(model, guide, seq.Sequences.of(x), 4))
        return steps, guide.look_ahead(steps[1].before, steps[1].frame, None)

    with torch.no_grad():
        steps, ahead = model.within(run)
    before, frame, sites = steps[1].before, steps[1].frame, steps[1].sites
    table = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.7, 0.3], [0.4, 0.0, 0.6]])
    for row in range(8):
        joint = torch.zeros(3, 2)
        for k, on in itertools.product(range(3), range(2)):
            chance = (0.9 if before["on"][row] == 1 else 0.3) * [1.0, 0.5, 0.8][k]
            joint[k, on] = table[before["k"][row], k] * (chance if on else 1 - chance)
            for value, loc, scale in zip(frame.x["x"][row], (k, 2 * on - k), (0.5, 0.7)):
                if not value.isnan():
                    joint[k, on] *= dist.Normal(float(loc), scale).log_prob(value).exp()
        torch.testing.assert_close(ahead[row].exp(), joint.sum())
        torch.testing.assert_close(sites["k"].q.logits[row].exp(), joint.sum(1) / joint.sum())
        k = sites["k"].value[row]
        torch.testing.assert_close(sites["on"].q.logits[row].exp(), joint[k] / joint[k].sum())


def test_the_enumerated_guide_in_pyro_and_in_a_bound():
    """An ordinary Pyro guide of the model's sites; and its bound on a single frame is the evidence, whatever is drawn."""
    model = Regimes()
    x = regimes_data(3)
    guide = seq.EnumeratedGuide(model)
    trace = pyro.poutine.trace(guide).get_trace(x)
    assert {"k_1", "on_1", "k_3", "on_3"} <= set(trace.nodes)
    theirs = pyro.infer.Trace_ELBO().loss(model, guide, x[:, :1])
    bound = seq.Variational(model, guide, num_samples=5).run(x[:, :1]).log_evidence
    exact = seq.ForwardBackward(model).run(x[:, :1]).log_evidence
    torch.testing.assert_close(torch.tensor(-theirs), exact[0])
    torch.testing.assert_close(bound, exact)


def test_a_past_that_no_table_holds():
    """Regimes whose emission reads how often they have switched: all 2^6 paths against the filter."""
    class Counted(seq.SequentialModel):
        def start(self, rows):
            return {"k": torch.zeros(rows, dtype=torch.long), "count": torch.zeros(rows)}

        def step(self, state, x=None):
            k = pyro.sample("k", dist.Categorical(torch.tensor([[0.7, 0.3], [0.4, 0.6]])[state["k"]]))
            count = state["count"] + (k != state["k"])
            pyro.sample("x", dist.Normal(1.0 * k, 0.5 + 0.2 * count), obs=x)
            return {"k": k, "count": count}

    model = Counted()
    x, total = model.simulate([6])["x"], []
    for path in itertools.product(range(2), repeat=6):
        log_p, last, count = 0.0, 0, 0
        for k, value in zip(path, x[0]):
            log_p += math.log([[0.7, 0.3], [0.4, 0.6]][last][k])
            count += k != last
            log_p += dist.Normal(float(k), 0.5 + 0.2 * count).log_prob(value).item()
            last = k
        total.append(log_p)
    found = seq.AuxiliaryParticleFilter(model, 5, guide=seq.EnumeratedGuide(model)).run(copies(x, 1500))
    assert found.method == "fully adapted particle filter"
    assert_unbiased(found.log_evidence, torch.tensor(total).logsumexp(0))


def test_history_and_forecasts():
    model, x, exact = case("local level")
    found = seq.AuxiliaryParticleFilter(model, 500, history=True, guide=seq.KalmanGuide(model)).run(x)
    assert found.trajectories(50).samples["z"].shape == (50, 1, 6)
    assert found.quantile("z", 0.5).shape == (1, 6)
    ahead = found.predict(2, 2000)
    assert abs(ahead.mean("x")[0, 0] - exact.predict(2).mean("x")[0, 0]) < 0.3


def test_the_center_of_a_distribution():
    rows = torch.ones(3)
    for fn, expected in (
            (dist.Normal(rows, 2.0), 1.0), (dist.Gamma(2 * rows, 4.0), 0.5), (dist.Cauchy(rows, 1.0), None),
            (dist.StudentT(1.0, 5 * rows, 2.0), None), (dist.Bernoulli(0.5 * rows), None), (dist.Bernoulli(0.7 * rows), 1.0),
            (dist.Poisson(2.5 * rows), 2.0), (dist.Categorical(torch.tensor([[0.2, 0.5, 0.3]] * 3)), 1),
            (dist.Normal(rows[:, None], 1.0).to_event(1), 1.0),
            (dist.TransformedDistribution(dist.Normal(rows, 1.0), [dist.transforms.ExpTransform()]), math.e)):
        found = center(fn)
        assert found.shape == fn.shape() and fn.support.check(found).all()
        assert expected is None or torch.allclose(found.double(), torch.tensor(1.0 * expected))


def test_a_finite_distribution():
    values = torch.tensor([[0.0, 1.0], [2.0, 2.0], [3.0, 0.0]])
    fn = Finite(values, torch.tensor([[0.2, 0.3, 0.5]]).log()).expand((4000,))
    drawn = fn.sample()
    torch.testing.assert_close(fn.log_prob(drawn).exp(), torch.tensor([0.2, 0.3, 0.5])[fn.index(drawn)])
    assert fn.log_prob(torch.full((4000, 2), 9.0)).eq(-torch.inf).all()
    share = fn.index(drawn).bincount(minlength=3) / 4000
    assert (share - torch.tensor([0.2, 0.3, 0.5])).abs().max() < 4.5 * 0.5 / math.sqrt(4000)


# What a user can get wrong.

def level():
    return LocalLevel(0.0, 1.0, 1.0, 0.5)


class ReadsGaps(seq.SequentialModel):
    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None, y=None):
        k = pyro.sample("k", dist.Bernoulli(torch.full_like(h, 0.5)))
        x = pyro.sample("x", dist.Normal(k, 1.0), obs=x)
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return 0.5 * h


def run_auxiliary(model, x, **options):
    return seq.AuxiliaryParticleFilter(model, 5, **options).run(x)


def read_gaps():
    model = ReadsGaps()
    run_auxiliary(model, {"x": torch.tensor([[0.1, torch.nan]]), "y": torch.zeros(1, 2)}, guide=seq.EnumeratedGuide(model))


def impossible():
    class Never(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))

        def transition(self, k):
            return pyro.sample("k", dist.Bernoulli(torch.full_like(k, 0.5)))

        def emission(self, k, x=None):
            pyro.sample("x", dist.Uniform(k, k + 1), obs=x)

    model = Never()
    run_auxiliary(model, torch.tensor([[0.5, 7.0]]), guide=seq.EnumeratedGuide(model))


MISTAKES = {
    "not a function": (lambda: seq.AuxiliaryParticleFilter(level(), look_ahead=3), TypeError, "look_ahead is a int: it is a f"),
    "a guide by position": (lambda: seq.AuxiliaryParticleFilter(level(), seq.KalmanGuide(level())), TypeError,
                            "num_particles is a KalmanGuide: pass it by name"),
    "another model's guide": (lambda: seq.AuxiliaryParticleFilter(level(), guide=seq.KalmanGuide(level())), ValueError,
                              "the guide was made for another LocalLevel.*AuxiliaryParticleFilter"),
    "a class": (lambda: seq.AuxiliaryParticleFilter(LocalLevel), TypeError, "AuxiliaryParticleFilter takes a model, not the"),
    "a wrong shape": (lambda: run_auxiliary(level(), torch.zeros(2, 3), look_ahead=lambda s, f, e: torch.zeros(f.rows, 1)),
                      ValueError, r"look_ahead returned shape \(10, 1\) at time 2; it is one log factor a row, a tensor \(10"),
    "no tensor": (lambda: run_auxiliary(level(), torch.zeros(2, 3), look_ahead=lambda s, f, e: 0.0), ValueError,
                  "look_ahead returned float at time 2"),
    "a gap that is not looked out for": (
        lambda: run_auxiliary(level(), torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), look_ahead=lambda s, f, e: f.x["x"]),
        ValueError, "look_ahead returned NaN or infinity at time 2 in sequence 1: return 0 where it has nothing to say"),
    "threshold": (lambda: seq.AuxiliaryParticleFilter(level(), ess_threshold=2.0), ValueError, "it is a share of the"),
    "enumerating a Normal": (
        lambda: run_auxiliary(m := level(), torch.zeros(1, 3), guide=seq.EnumeratedGuide(m)), ValueError,
        "site 'z' is Normal, which has no finite support to enumerate: EnumeratedGuide takes latents such as"),
    "a gap that the frame reads": (read_gaps, ValueError,
                                   r"the data of site \['x'\] is missing at time 2 and ReadsGaps reads it"),
    "an impossible frame": (impossible, ValueError, "all 5 particles have weight zero at time 2 in sequence 0: the data there"),
    "enumerating a class": (lambda: seq.EnumeratedGuide(Regimes), TypeError, "EnumeratedGuide takes a model, not the class"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    run, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        run()
