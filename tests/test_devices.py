"""Every public path takes its device and dtype from the data and the model.

Without a GPU: torch's default device is set to ``meta``, on which nothing can be computed, while model and data stay
where they are. Anything made on the default device instead of the data's fails. ``PYRO_SEQ_DEVICE=cuda`` runs all
tests on a GPU; with one at hand, the last test compares its numbers with the CPU's.
"""

import contextlib

import pyro
import pytest
import torch
from models import VRNN, DeepMarkov, HiddenMarkov, linear_gaussian
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_seq as seq

HERE = torch.zeros(()).device


@contextlib.contextmanager
def elsewhere():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def cases():
    return {
        "linear": (linear_gaussian(), torch.randn(3, 5, 3)),
        "deep": (DeepMarkov(gaussian=True), torch.randn(3, 5, 4)),
        "recurrent": (VRNN(), torch.randn(3, 5, 4)),
        "discrete": (HiddenMarkov(), torch.randn(3, 5)),
    }


@pytest.mark.skipif(HERE.type != "cpu", reason="the default device is under test already")
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", ["linear", "deep", "recurrent", "discrete"])
def test_nothing_is_made_on_the_default_device(name, missing):
    model, x = cases()[name]
    if missing:
        x[0, 2] = torch.nan
    lengths = torch.tensor([5, 3, 4])
    with elsewhere():
        batch = seq.Sequences.of(x, lengths)
        makers = [seq.FilteringGuide, seq.SmoothingGuide]
        if name != "discrete":
            makers.append(seq.AmortizedVariationalFilter)
        for make in makers:
            guide = make(model, like=batch, hidden=4)
            for loss in (Trace_ELBO(), seq.SequentialELBO(2)):
                SVI(model, guide, Adam({"lr": 1e-3}), loss).step(batch)
            assert seq.Variational(model, guide, num_samples=5).run(batch).log_evidence.device == x.device
            guided = seq.ParticleFilter(model, 6, guide=guide, history=True).run(batch)
            assert guided.predict(2, num_samples=3).samples["x"].device == x.device
            assert guided.trajectories(3).samples is not None
        answer = seq.ParticleFilter(model, 6, num_runs=2).run(batch)
        assert answer.log_evidence.device == x.device
        if name == "linear":
            exact = seq.KalmanFilter(model).run(batch)
            assert exact.smoothed["z"].mean.device == x.device
            assert exact.predict(2, num_samples=3).samples["x"].device == x.device
            exact.to_dataframe()


@pytest.mark.parametrize("name", ["linear", "deep", "recurrent"])
def test_dtype_follows_the_model(name):
    torch.set_default_dtype(torch.float32)
    model, x = cases()[name]
    torch.set_default_dtype(torch.float64)  # not the model's
    assert x.dtype == torch.float32
    guide = seq.AmortizedVariationalFilter(model, hidden=4, like=x)
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    posterior = seq.ParticleFilter(model, 6, guide=guide).run(x)
    assert posterior.log_evidence.dtype == posterior.filtered["z"].mean.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_the_same_numbers():
    for model, x in cases().values():
        pyro.clear_param_store()
        model.cpu()
        here = seq.ParticleFilter(model, 4000, num_runs=20).run(x.cpu())
        there = seq.ParticleFilter(model.cuda(), 4000, num_runs=20).run(x.cuda())
        error = (here.standard_error.square() + there.standard_error.cpu().square()).sqrt()
        assert ((here.log_evidence - there.log_evidence.cpu()).abs() < 5 * error).all()
    model, x = cases()["linear"]
    exact = seq.KalmanFilter(model.cpu()).run(x.cpu()).log_evidence
    torch.testing.assert_close(seq.KalmanFilter(model.cuda()).run(x.cuda()).log_evidence.cpu(), exact)
