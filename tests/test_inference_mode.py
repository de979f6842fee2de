"""``torch.inference_mode`` changes nothing, also where a method takes gradients inside."""

import pyro
import pytest
import torch
from models import HiddenMarkov, LocalLevel

import pyro_seq as seq


def level():
    return LocalLevel(0.0, 1.0, 0.5, 1.0)


def avf(model, x):
    return seq.AmortizedVariationalFilter(model, like=x, hidden=4)


def evidence(method):
    return lambda x: method.run(x).log_evidence


def two_updates(method):
    def run(x):
        stream = method.stream()
        for t in (0, 1):
            stream.update(x[:, t])
        return stream.log_evidence
    return run


CASES = {
    "bootstrap": lambda m, x: evidence(seq.ParticleFilter(m, 20)),
    "guided by AVF": lambda m, x: evidence(seq.ParticleFilter(m, 20, guide=avf(m, x))),
    "auxiliary": lambda m, x: evidence(seq.AuxiliaryParticleFilter(m, 20)),
    "twisted": lambda m, x: evidence(seq.TwistedParticleFilter(m, 20)),
    "PaRIS": lambda m, x: evidence(seq.Paris(m, lambda before, after, x, t: after, 20)),
    "Kalman": lambda m, x: evidence(seq.KalmanFilter(m)),
    "extended": lambda m, x: evidence(seq.ExtendedKalmanFilter(m)),
    "unscented": lambda m, x: evidence(seq.UnscentedKalmanFilter(m)),
    "ensemble": lambda m, x: evidence(seq.EnsembleKalmanFilter(m, 20)),
    "variational": lambda m, x: evidence(seq.Variational(m, avf(m, x), num_samples=5)),
    "ELBO": lambda m, x: (lambda guide: lambda x: seq.SequentialELBO(2).loss(m, guide, x))(avf(m, x)),
    "FIVO": lambda m, x: (lambda guide: lambda x: seq.FIVO(4).loss(m, guide, x))(avf(m, x)),
    "stream": lambda m, x: two_updates(seq.ParticleFilter(m, 20, guide=avf(m, x))),
    "Kalman stream": lambda m, x: two_updates(seq.KalmanFilter(m)),
    "futures": lambda m, x: lambda x: seq.KalmanFilter(m).run(x).predict(3, 50).samples["x"],
    "simulated": lambda m, x: lambda x: m.simulate([6, 4])["x"],
}


@pytest.mark.parametrize("name", CASES)
def test_inference_mode_changes_nothing(name):
    x = torch.randn(3, 6)
    x[1, 2] = torch.nan
    run = CASES[name](level(), x)
    pyro.set_rng_seed(1)
    usual = run(x)
    with torch.inference_mode():
        pyro.set_rng_seed(1)
        found = run(x.clone())  # a tensor of that mode
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(usual), rtol=0, atol=0)


def test_hidden_markov_in_inference_mode():
    model = HiddenMarkov()
    x = model.simulate([5])["x"]
    usual = seq.ForwardBackward(model).run(x)
    with torch.inference_mode():
        found = seq.ForwardBackward(model).run(x)
    torch.testing.assert_close(found.log_evidence, usual.log_evidence, rtol=0, atol=0)


def test_data_of_inference_mode_can_be_learned_from():
    with torch.inference_mode():
        x = torch.randn(2, 5)
    model = level()
    guide = seq.FilteringGuide(model, like=x, hidden=4)
    seq.SequentialELBO().differentiable_loss(model, guide, x).backward()
    assert all(p.grad is not None for p in guide.parameters())


def test_a_model_made_in_inference_mode():
    model = level()
    with torch.inference_mode():
        made = level()
        made.weight = torch.nn.Parameter(torch.ones(()))
        x = made.simulate([5])["x"]
        found = seq.KalmanFilter(made).run(x).log_evidence
        assert seq.ParticleFilter(made, 20).run(x).log_evidence.isfinite().all()
    torch.testing.assert_close(found, seq.KalmanFilter(model).run(x).log_evidence)
