"""A plain Pyro function behind the same engine."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LocalLevel
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_seq as seq

pytestmark = pytest.mark.filterwarnings("ignore:a model from from_pyro replays")


def walk(x, lengths=None):
    """LocalLevel(0, 1, 0.5, 0.3) with a loop of its own, names from zero, and masks."""
    lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    z = torch.zeros(())
    with pyro.plate("series", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"level_{t}", dist.Normal(z, 1.0 if t == 0 else math.sqrt(0.5)))
                pyro.sample(f"obs_{t}", dist.Normal(z, math.sqrt(0.3)), obs=x[:, t])


def declared():
    return LocalLevel(0.0, 1.0, 0.5, 0.3)


def test_the_cost_is_said_once():
    model = seq.from_pyro(walk)
    with pytest.warns(UserWarning, match=r"T\*\*2"):
        seq.ParticleFilter(model, 5).run(torch.zeros(1, 3))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seq.ParticleFilter(model, 5).run(torch.zeros(1, 3))


def test_particle_filter_equals_that_of_the_declared_model():
    """The same seed: the same draws in the same order, so the same numbers, ragged included."""
    x = torch.randn(3, 5)
    lengths = [5, 2, 4]
    found = []
    for model in (seq.from_pyro(walk), declared()):
        pyro.set_rng_seed(1)
        found.append(seq.ParticleFilter(model, 50).run(x, lengths))
    torch.testing.assert_close(found[0].log_evidence, found[1].log_evidence)
    torch.testing.assert_close(found[0].filtered["level"].mean, found[1].filtered["z"].mean)


def test_evidence_is_unbiased():
    x = torch.randn(1, 5)
    exact = seq.KalmanFilter(declared()).run(x).total_log_evidence
    ratio = (seq.ParticleFilter(seq.from_pyro(walk), 50).run(x.expand(500, -1)).log_evidence - exact).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(500)


@pytest.mark.parametrize("make", [seq.AmortizedVariationalFilter, seq.FilteringGuide, seq.SmoothingGuide])
def test_guides_train_the_function_itself(make):
    """SVI takes the function; the loss is that of the engine, and of the declared model with the same networks."""
    x, lengths = torch.randn(3, 5), torch.tensor([5, 2, 4])
    model = seq.from_pyro(walk)
    guide = make(model, like=seq.Sequences.of(x, lengths), hidden=5)
    nodes = poutine.trace(guide).get_trace(x, lengths).nodes
    assert [n for n, v in nodes.items() if v["type"] == "sample"] == [f"level_{t}" for t in range(5)]
    svi = SVI(walk, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    assert math.isfinite(svi.step(x, lengths))
    many = seq.SequentialELBO(3000, analytic_kl=False).loss(model, guide, x, lengths)
    pyros = [svi.evaluate_loss(x, lengths) for _ in range(300)]
    mean, error = sum(pyros) / 300, torch.tensor(pyros).std().item() / math.sqrt(300)
    assert abs(many - mean) < 5 * error


def test_a_hidden_markov_function():
    """Discrete sites in a function, filtered: the evidence against the forward recursion."""
    start, move = torch.tensor([0.5, 0.5]), torch.tensor([[0.7, 0.3], [0.3, 0.7]])
    wet = torch.tensor([0.9, 0.2])

    def umbrella(x):
        rain = None
        with pyro.plate("days", len(x)):
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                rain = pyro.sample(f"rain{t}", dist.Categorical(start if t == 1 else move[rain]))
                pyro.sample(f"umbrella{t}", dist.Bernoulli(wet[rain]), obs=x[:, t - 1])

    x = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]])
    log_evidence = seq.ParticleFilter(seq.from_pyro(umbrella), 100).run(x.expand(400, -1)).log_evidence
    ratio = (log_evidence - (-3.3725)).exp()
    # The reference number is rounded to its last digit.
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20 + 1e-4


def test_parameters_of_the_function_are_those_of_the_store():
    """A trained ``pyro.param`` is what the filter and the guide's posterior see; ragged batches too."""
    def shifted(x, lengths=None):
        z = pyro.param("start", torch.tensor(0.0)).expand(len(x))
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x = torch.full((2, 5), 3.0)
    model = seq.from_pyro(shifted)
    guide = seq.PriorGuide(model)
    shifted(x)
    found = {}
    for start in (0.0, 3.0):
        pyro.get_param_store()["start"] = torch.tensor(start)
        found[start] = (seq.ParticleFilter(model, 4000).run(x).total_log_evidence,
                        seq.Variational(model, guide, num_samples=500).run(x, [5, 3]).total_log_evidence)
    # Both series are 3 throughout: starting at 3 is better by many nats.
    assert found[3.0][0] > found[0.0][0] + 5 and found[3.0][1] > found[0.0][1] + 5


def test_two_models_of_one_name_can_be_filtered_and_compared():
    """Inference reads the parameters that a model holds, whatever another of its name has put into the store."""
    from models import DeepMarkov

    x = torch.bernoulli(torch.full((1, 4, 4), 0.5))
    first, second = DeepMarkov(), DeepMarkov()
    guide = seq.FilteringGuide(first, hidden=4)
    SVI(first, guide, Adam({"lr": 0.01}), seq.SequentialELBO()).step(x)
    before = {k: v.clone() for k, v in second.state_dict().items()}
    pyro.set_rng_seed(0)
    here = seq.ParticleFilter(second, 200).run(x).log_evidence
    assert all(torch.equal(v, before[k]) for k, v in second.state_dict().items())
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    assert torch.equal(seq.ParticleFilter(second, 200).run(x).log_evidence, here)
