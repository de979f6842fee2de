"""Compiled recursions of exact methods give what the recursions as written give."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import ragged
from torch import nn

import pyro_seq as seq
from pyro_seq.engine.compiled.small import WrittenOut


class Trend(seq.StateSpaceModel):
    """A local linear trend, seen through ``observed`` instruments."""

    def __init__(self, observed=1):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.1, -1.0, 0.5]))
        self.weights = nn.Parameter(torch.linspace(1.0, 2.0, observed))

    def initial(self):
        return pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))

    def transition(self, z):
        mean = torch.stack([z[:, 0] + z[:, 1], 0.9 * z[:, 1]], -1)
        return pyro.sample("z", dist.Normal(mean, self.log_scale[:2].exp()).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, :1] * self.weights, self.log_scale[2].exp()).to_event(1), obs=x)


class Varying(Trend):
    def transition(self, z, t):
        mean = torch.stack([z[:, 0] + z[:, 1], 0.9 * z[:, 1] + 0.01 * t], -1)
        return pyro.sample("z", dist.Normal(mean, self.log_scale[:2].exp()).to_event(1))


def data(batch, steps, observed, gaps):
    x = torch.randn(batch, steps, observed).cumsum(1)
    lengths = torch.tensor([steps] if batch == 1 else [steps - 3 * i for i in range(batch)])
    if gaps:
        x[torch.rand(x.shape) < 0.2] = torch.nan
    return ragged(x, lengths), lengths


def moments(posterior):
    z = [part for found in (posterior.filtered["z"], posterior.smoothed["z"]) for part in (found.mean, found.variance)]
    return [posterior.log_evidence, posterior.log_evidence_by_step, *z, posterior.filtered_covariance["z"],
            posterior.smoothed_covariance["z"], posterior.lag_one_covariance["z"]]


def compiled_parts(method):
    return sum(entry is not None for entry in method.compiler.known.values())


SLOW = pytest.mark.slow
CASES = {
    # model, batch, steps, observed, gaps
    "ragged, missing": (Trend, 3, 21, 2, True),
    "one series": (Trend, 1, 30, 1, False),
    "several": (Trend, 4, 19, 1, False),
    "varying": (Varying, 2, 20, 1, True),
    "five instruments": (Trend, 2, 17, 5, True),
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize(("name", "dtype"), [
    pytest.param(name, dtype, marks=[] if (name, dtype) == ("ragged, missing", torch.float64) else SLOW)
    for name in CASES for dtype in TOLERANCES])
def test_moments(name, dtype):
    make, batch, steps, observed, gaps = CASES[name]
    model, (x, lengths), tolerance = make(observed), data(batch, steps, observed, gaps), TOLERANCES[dtype]
    written = seq.KalmanFilter(model, dtype=dtype)
    compiled = seq.KalmanFilter(model, dtype=dtype, compile=True)
    for _ in range(2):
        for found, expected in zip(moments(compiled.run(x, lengths)), moments(written.run(x, lengths)), strict=True):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * (1 + expected.abs().max().item()))
    assert compiled_parts(compiled) >= 1


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "one series" else SLOW) for name in CASES])
def test_gradients(name):
    make, batch, steps, observed, gaps = CASES[name]
    model, (x, lengths) = make(observed), data(batch, steps, observed, gaps)
    parameters = list(model.parameters())

    def derivatives(method):
        value = method.log_evidence(x, lengths).sum()
        first = torch.autograd.grad(value, parameters)
        again = torch.autograd.grad(method.log_evidence(x, lengths).sum(), parameters, create_graph=True)
        return [value.detach(), *first, *torch.autograd.grad(sum(g.square().sum() for g in again), parameters)]

    compiled = seq.KalmanFilter(model, compile=True)
    for found, expected in zip(derivatives(compiled), derivatives(seq.KalmanFilter(model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * (1 + expected.abs().max().item()))
    assert compiled_parts(compiled) == 1


def test_large_matrices_and_single_steps_are_left_as_written():
    class Wide(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("z", dist.Normal(torch.zeros(25), 1.0).to_event(1))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(0.9 * z, 1.0).to_event(1))

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)

    method = seq.KalmanFilter(Wide(), compile=True)
    assert method.log_evidence(torch.randn(1, 20)).isfinite().all()
    method.run(torch.randn(1, 20))
    assert not method.compiler.known
    method = seq.KalmanFilter(Trend(), compile=True)
    method.run(torch.randn(1, 1, 1))
    assert not method.compiler.known


def test_errors_are_those_of_the_method_as_written():
    class Known(seq.StateSpaceModel):
        """Its first frame tells the state, so that the second is predicted without noise."""

        def initial(self):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Delta(z))

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z, 1e-200), obs=x)

    for compile in (False, True):
        with pytest.raises(ValueError, match="singular predictive covariance"):
            seq.KalmanFilter(Known(), assume_linear=True, compile=compile).run(torch.ones(1, 9))


def test_it_can_be_copied_and_pickled():
    method = seq.KalmanFilter(Trend(), compile=True)
    for again in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert again.log_evidence(torch.zeros(1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("width", [1, 3, 5])
def test_small_matrices_written_out(width):
    root = torch.randn(2, width, width)
    own, right = root @ root.mT + torch.eye(width), torch.randn(2, width, 3)
    bad = own.clone()
    bad[1] = -bad[1]

    def found(own, right):
        factor, failed = torch.linalg.cholesky_ex(own)
        return factor, torch.cholesky_solve(right, factor), own @ right, right.mT @ own, failed != 0

    with WrittenOut():
        written, failed = found(own, right), found(bad, right)[-1]
        assert torch.autograd.gradcheck(lambda r, b: found(r @ r.mT + torch.eye(width), b)[:-1],
                                        (root.requires_grad_(), right.requires_grad_()))
    for value, expected in zip(written, found(own, right), strict=True):
        torch.testing.assert_close(value, expected)
    assert failed.tolist() == [False, True]
