"""Found by users: each was a wrong number or a crash once."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import HiddenMarkov, LocalLevel
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_seq as seq


class TwoKeys(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, 0.3))

    def emission(self, z, a=None, b=None):
        pyro.sample("a", dist.Normal(z, 1.0), obs=a)
        pyro.sample("b", dist.Normal(3 * z + 1, 0.5), obs=b)


def test_kalman_does_not_depend_on_the_order_of_the_data():
    a, b = torch.randn(2, 6), torch.randn(2, 6)
    first = seq.KalmanFilter(TwoKeys()).run({"a": a, "b": b}).log_evidence
    torch.testing.assert_close(seq.KalmanFilter(TwoKeys()).run({"b": b, "a": a}).log_evidence, first)
    particles = seq.ParticleFilter(TwoKeys(), 4000, num_runs=10).run({"b": b, "a": a})
    assert ((particles.log_evidence - first).abs() < 5 * particles.standard_error).all()


class Swapped(LocalLevel):
    def emission(self, z, x=None):
        pyro.sample("second", dist.Normal(z, 1.0), obs=None if x is None else x[..., 1])
        pyro.sample("first", dist.Normal(2 * z, 0.5), obs=None if x is None else x[..., 0])


def test_kalman_with_the_data_observed_in_parts():
    model, x = Swapped(0.0, 1.0, 0.5), torch.randn(1, 5, 2)
    x[0, 2, 1] = torch.nan
    exact = seq.KalmanFilter(model).run(x).total_log_evidence
    found = seq.ParticleFilter(model, 4000, num_runs=10).run(x)
    assert abs(found.total_log_evidence - exact) < 5 * found.total_standard_error


@pytest.mark.parametrize("change", [lambda x: x - 5.0, lambda x: x.exp(), lambda x: 2 * x], ids=["shift", "exp", "scale"])
def test_kalman_refuses_functions_of_the_data(change):
    class Changed(LocalLevel):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z, 1.0), obs=change(x))

    with pytest.raises(ValueError, match="site 'x'.*function of the data"):
        seq.KalmanFilter(Changed(0.0, 1.0, 0.5)).run(torch.randn(1, 5))


def test_kalman_refuses_scale_in_the_step():
    class Tempered(LocalLevel):
        def emission(self, z, x=None):
            with poutine.scale(scale=0.5):
                return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'x'.*poutine.scale"):
        seq.KalmanFilter(Tempered(0.0, 1.0, 0.5)).run(torch.randn(1, 5))


def test_joint_emissions_in_a_recurrence_must_be_missing_whole():
    class Joint(seq.SequentialModel):
        def start(self, rows):
            return torch.zeros(rows, 2)

        def step(self, h, x=None):
            z = pyro.sample("z", dist.Normal(h[:, 1], 0.5))
            loc = torch.stack([z, z], -1)
            x = pyro.sample("x", dist.MultivariateNormal(loc, torch.tensor([[1.0, 0.95], [0.95, 1.0]])), obs=x)
            return 0.9 * x

    x = torch.randn(1, 4, 2)
    x[0, 1] = torch.nan
    exact = seq.KalmanFilter(Joint()).run(x).total_log_evidence
    found = seq.ParticleFilter(Joint(), 4000, num_runs=10).run(x)
    assert abs(found.total_log_evidence - exact) < 5 * found.total_standard_error
    x[0, 2, 1] = torch.nan
    for run in (lambda: seq.ParticleFilter(Joint(), 10).run(x), lambda: poutine.trace(Joint()).get_trace(x)):
        with pytest.raises(ValueError, match="site 'x'.*partly missing"):
            run()


def test_pooled_runs_filter_and_do_not_smooth():
    """Averaged over very many tiny filters, the filtered mean is the filter's: runs are weighed by what they know at t."""
    model, x = LocalLevel(0.0, 1.0, 0.09, 1.0), torch.tensor([[0.0, 1.0, 3.0, 4.0]])
    exact = seq.KalmanFilter(model).run(x)
    pooled = torch.stack([seq.ParticleFilter(model, 2, num_runs=20_000).run(x).filtered["z"].mean[0] for _ in range(16)])
    error = pooled.std(0) / 4
    assert ((pooled.mean(0) - exact.filtered["z"].mean[0]).abs() < 5 * error).all()  # t, 15 degrees: fails once in 1500
    assert (exact.smoothed["z"].mean - exact.filtered["z"].mean)[0, 0] > 0.5


def test_handlers_around_a_call():
    model, x = LocalLevel(0.0, 1.0, 0.5, 1.0), torch.randn(1, 4)
    guide = seq.FilteringGuide(model, hidden=4)
    with poutine.scale(scale=0.5):
        pyro.set_rng_seed(0)
        halved = seq.SequentialELBO(2000).loss(model, guide, x)
    pyro.set_rng_seed(0)
    assert abs(seq.SequentialELBO(2000).loss(model, guide, x) - 2 * halved) < 1e-9
    for handler in (poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor(False))):
        with handler, pytest.raises(ValueError, match="inside poutine.scale"):
            seq.KalmanFilter(model).run(x)
    with poutine.mask(mask=torch.tensor(False)), pytest.raises(ValueError, match="inside poutine.mask"):
        seq.SequentialELBO().loss(model, guide, x)


@pytest.mark.parametrize("where", [0, 2])
def test_enumeration_with_missing_frames(where):
    model = HiddenMarkov(states=2)
    model.enumerate = "parallel"
    x = torch.randn(2, 4)
    x[0, where] = torch.nan
    total = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda *a, **k: None, x)
    expected = 0.0
    for b in range(2):
        alpha = model.start_logits.log_softmax(-1)
        for t in range(4):
            if t:
                alpha = (alpha[:, None] + model.logits.log_softmax(-1)).logsumexp(0)
            if not x[b, t].isnan():
                alpha = alpha + dist.Normal(model.locs, 0.8).log_prob(x[b, t])
        expected += alpha.logsumexp(0).item()
    assert abs(total - expected) < 1e-9


def test_gaps_in_one_of_two_integer_series():
    class Counts(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(z, 0.1))

        def emission(self, z, a=None, b=None):
            pyro.sample("a", dist.Poisson(z.exp()), obs=a)
            pyro.sample("b", dist.Bernoulli(logits=z), obs=b)

    a, b = torch.tensor([[1, 2, 0]]), torch.tensor([[1, 0, 1]])
    mask = {"a": torch.tensor([[True, False, True]])}
    assert seq.ParticleFilter(Counts(), 50).run({"a": a, "b": b}, mask=mask).log_evidence.isfinite().all()


def test_an_emission_whose_support_moves():
    """Particles that the data rules out get weight zero, at the first step as later."""
    class Band(LocalLevel):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Uniform(z - 2, z + 2), obs=x)

    model = Band(0.0, 1.0, 0.25)
    x = model.simulate([3])["x"]
    found = seq.ParticleFilter(model, 200_000, num_runs=5).run(x)
    grid = torch.linspace(-8, 8, 1601)
    weight = dist.Normal(0.0, 1.0).log_prob(grid).exp() * 0.01
    for t in range(3):
        if t:
            weight = (dist.Normal(grid, 0.5).log_prob(grid[:, None]).exp() * 0.01) @ weight
        weight = weight * ((x[0, t] - grid).abs() < 2) * 0.25
    assert abs(found.total_log_evidence - weight.sum().log().item()) < 0.01 + 5 * found.total_standard_error


def test_draws_keep_their_type():
    torch.set_default_dtype(torch.float32)
    x = torch.randn(1, 4, dtype=torch.float64)

    class Double(LocalLevel):
        def initial(self):
            return pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    future = seq.KalmanFilter(Double(0.0, 1.0, 0.5, 1.0)).run(x).predict(2, num_samples=5)
    assert future.mean("x").dtype == torch.float64
    assert math.isfinite(future.std("x").sum().item())


def test_trace_elbo_of_a_series_with_gaps_is_finite_and_the_return_value_is_the_data():
    model, x = LocalLevel(0.0, 1.0, 0.5, 1.0), torch.randn(2, 4)
    x[0, 1] = torch.nan
    guide = seq.FilteringGuide(model, hidden=4)
    assert math.isfinite(Trace_ELBO().loss(model, guide, x))
    with poutine.trace():
        assert torch.equal(model(x).nan_to_num(), x.nan_to_num())


def test_a_guide_that_reads_the_whole_series_is_said_to_smooth():
    model, x = LocalLevel(0.0, 1.0, 0.5, 1.0), torch.randn(1, 4)

    class Averaging(seq.SequentialGuide):
        def prepare(self, x, lengths):
            return x.mean(1, keepdim=True).expand_as(x)

        def step(self, state, encoding):
            pyro.sample("z", dist.Normal(encoding, 1.0))

    class Causal(Averaging):
        reads_future = False

    assert list(seq.Variational(model, Averaging(model), num_samples=5).run(x).smoothed) == ["z"]
    assert list(seq.Variational(model, Causal(model), num_samples=5).run(x).filtered) == ["z"]


def test_evaluating_a_loss_leaves_the_parameter_store_alone():
    model, x = LocalLevel(0.0, 1.0, 0.5, 1.0), torch.randn(1, 4)
    for _ in range(2):  # as when the cell of a notebook is run again
        seq.SequentialELBO().loss(model, seq.FilteringGuide(model, hidden=4), x)
    assert not list(pyro.get_param_store().keys())


def test_single_precision_kalman_filter_far_from_zero():
    """Means of 1e4 beside noise of one: found linear, and right to the rounding of the data (slope at most 3 a step)."""
    class Far(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("z", dist.Normal(1e4, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(1e4 + 0.9 * (z - 1e4), 0.5))

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

    x = (2e4 + torch.randn(1, 20)).float()
    exact = seq.KalmanFilter(Far()).run(x.double()).total_log_evidence
    torch.set_default_dtype(torch.float32)
    rounding = torch.finfo(torch.float32).eps * 2e4
    assert abs(seq.KalmanFilter(Far()).run(x).total_log_evidence - exact) < 20 * 3 * rounding
