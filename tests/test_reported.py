"""Found by users: each was a wrong number or a crash once."""

import math
import warnings

import pandas as pd
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


class ReadsTheOther(TwoKeys):
    """The second site of the emission reads the first."""

    def emission(self, z, x=None, y=None):
        x = pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z + 2 * x, 1.0), obs=y)


def test_a_gap_that_another_site_reads_is_drawn():
    model, nan = ReadsTheOther(), torch.nan
    data = {"x": torch.tensor([[1.0, nan, 2.0]]), "y": torch.tensor([[3.0, 6.0, nan]])}
    exact = seq.KalmanFilter(model).run(data)
    found = seq.ParticleFilter(model, 4000, num_runs=20).run(data)
    assert abs(found.total_log_evidence - exact.total_log_evidence) < 4 * found.total_standard_error  # one in 16 000
    guide = seq.PriorGuide(model)
    bound = seq.Variational(model, guide, num_samples=4000).run(data)
    assert bound.total_log_evidence < exact.total_log_evidence + 4 * bound.total_standard_error
    names = poutine.trace(model).get_trace(data).nodes
    assert "x_2_missing" in names and "y_3_missing" in names


def test_a_gap_that_nothing_reads_is_not_drawn():
    names = poutine.trace(TwoKeys()).get_trace({"a": torch.tensor([[torch.nan, 1.0]]), "b": torch.zeros(1, 2)}).nodes
    assert not [name for name in names if name.endswith("_missing")]


class ReadsCounts(TwoKeys):
    """Of an integer type, with gaps marked by a mask."""

    def emission(self, z, x=None, y=None):
        x = pyro.sample("x", dist.Bernoulli(logits=z), obs=x)
        pyro.sample("y", dist.Normal(z + 2 * x, 1.0), obs=y)


def test_a_gap_in_integers_that_another_site_reads_is_drawn():
    """Against a grid over the latent, the missing bit summed out."""
    data = {"x": torch.tensor([[0, 1]]), "y": torch.tensor([[2.5, 0.3]])}
    mask = {"x": torch.tensor([[False, True]])}
    found = seq.ParticleFilter(ReadsCounts(), 4000, num_runs=20).run(data, mask=mask)
    z = torch.linspace(-8, 8, 4001)
    width, p = z[1] - z[0], torch.sigmoid(z)
    first = dist.Normal(0.0, 1.0).log_prob(z).exp() * (
        p * dist.Normal(z + 2, 1.0).log_prob(torch.tensor(2.5)).exp() +
        (1 - p) * dist.Normal(z, 1.0).log_prob(torch.tensor(2.5)).exp())
    moved = dist.Normal(z[:, None], 0.3).log_prob(z).exp().T @ first * width
    exact = (moved * p * dist.Normal(z + 2, 1.0).log_prob(torch.tensor(0.3)).exp()).sum() * width
    assert abs(found.total_log_evidence - float(exact.log())) < 4 * found.total_standard_error


class ReadsItsFrame(seq.SequentialModel):
    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None):
        z = pyro.sample("z", dist.Normal(0.5 * h + 0.1 * x, 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return z


def test_kalman_refuses_a_latent_that_reads_its_own_frame():
    with pytest.raises(ValueError, match="site 'z' of ReadsItsFrame reads data of its own frame.*covariate"):
        seq.KalmanFilter(ReadsItsFrame()).run(torch.randn(1, 5))


class Drifts(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Bernoulli(probs=z), obs=x)


def test_arguments_are_checked_after_the_first_step():
    class Negative(LocalLevel):
        def transition(self, z):
            return pyro.sample("z", dist.Normal(z, -0.3))

    for model, x in ((Negative(0.0, 1.0, 0.5), torch.randn(1, 5)), (Drifts(0.5, 1e-4, 0.1), torch.ones(1, 40))):
        for run in (lambda m, x: seq.ParticleFilter(m, 100).run(x),
                    lambda m, x: seq.SequentialELBO().loss(m, seq.PriorGuide(m), x)):
            with pytest.raises(ValueError, match="scale|probs"):
                run(model, x)


def test_hand_written_guides_see_the_gaps_of_integer_data():
    seen = []

    class Looks(seq.SequentialGuide):
        def prepare(self, x, lengths):
            seen.append(x.tolist())

        def step(self, state, x, observed):
            seen.append((x.tolist(), observed.tolist()))
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    class Counts(LocalLevel):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    model = Counts(0.0, 1.0, 0.5)
    seq.SequentialELBO().loss(model, Looks(model), torch.tensor([[3, -999]]), mask=torch.tensor([[True, False]]))
    assert seen == [[[3, 0]], ([3], [True]), ([0], [False])]


def test_a_guide_that_observes_is_refused():
    class Observes(seq.SequentialGuide):
        def step(self, state, x):
            pyro.sample("z", dist.Normal(0.0, 1.0), obs=x)

    model = LocalLevel(0.0, 1.0, 0.5)
    for run in (lambda: seq.SequentialELBO().loss(model, Observes(model), torch.zeros(1, 3)),
                lambda: seq.ParticleFilter(model, 10, guide=Observes(model)).run(torch.zeros(1, 3)),
                lambda: Observes(model)(torch.zeros(1, 3))):
        with pytest.raises(ValueError, match=r"Observes.step observes \['z'\]"):
            run()


class Emits(LocalLevel):
    def __init__(self, family):
        super().__init__(0.0, 1.0, 0.5)
        self.family = family

    def emission(self, z, x=None):
        return pyro.sample("x", self.family(z), obs=x)


def three(z):
    return dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1))


@pytest.mark.parametrize("x", [[0.0, 1.0, 0.5], [0, 1, 7], [0, -1, 1]])
def test_categories_outside_are_refused(x):
    with pytest.raises(ValueError, match="site 'x': the data of sequence 0 at time .* outside the support of Categorical"):
        seq.ParticleFilter(Emits(three), 10).run(torch.tensor([x]))


def test_what_stands_under_a_mask_may_lie_outside():
    for family in (three, lambda z: dist.Poisson(z.exp())):
        pyro.set_rng_seed(0)
        masked = seq.ParticleFilter(Emits(family), 10).run(torch.tensor([[1, -1]]), mask=torch.tensor([[True, False]]))
        pyro.set_rng_seed(0)
        inside = seq.ParticleFilter(Emits(family), 10).run(torch.tensor([[1, 0]]), mask=torch.tensor([[True, False]]))
        assert masked.total_log_evidence == inside.total_log_evidence


def test_supports_that_move():
    """Data below some particles' lower bound have density zero under those alone."""
    model = Emits(lambda z: dist.Pareto(z.exp(), 2.0))
    x = torch.full((1, 4), 1.5)
    found = seq.ParticleFilter(model, 4000, num_runs=10).run(x)
    z = torch.linspace(-8, 8, 2001)
    width = z[1] - z[0]

    def density(z):
        return torch.where(z.exp() <= 1.5, 2 * (2 * z).exp() / 1.5**3, 0.0)

    p = dist.Normal(0.0, 1.0).log_prob(z).exp()
    for t in range(4):
        p = p if t == 0 else dist.Normal(z[:, None], math.sqrt(0.5)).log_prob(z).exp().T @ p * width
        p = p * density(z)
    # The grid's own error at the jump is about half a cell a step: below 1 %.
    assert abs(found.total_log_evidence - math.log(p.sum() * width)) < 4 * found.total_standard_error + 0.01


def test_latents_are_counted_where_the_step_ends():
    class ObservesFirst(seq.SequentialModel):
        def start(self, rows):
            return torch.zeros(rows)

        def step(self, h, y=None, x=None):
            y = pyro.sample("y", dist.Normal(h, 1.0), obs=y)
            z = pyro.sample("z", dist.Normal(0.3 * h + 0.2 * y, 1.0))
            x = pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)
            return self.advance(h, {"z": z}, {"y": y, "x": x})

        def advance(self, h, z, x):
            return 0.5 * h + 0.3 * z["z"] + 0.1 * x["x"]

    class RunsWhole(ObservesFirst):
        def has_advance(self):
            return False

    model = ObservesFirst()
    drawn = model.simulate([6] * 3)
    data = {"y": drawn["y"], "x": drawn["x"]}
    losses = []
    for declared in (model, RunsWhole()):
        guide = seq.FilteringGuide(declared, like=data)
        pyro.set_rng_seed(0)
        losses.append(seq.SequentialELBO().loss(declared, guide, data))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_kalman_quantiles_and_steps():
    x = torch.randn(2, 5)
    posterior = seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(x, [5, 3])
    torch.testing.assert_close(posterior.log_evidence_by_step.sum(-1), posterior.log_evidence)
    found = posterior.quantile("z", [0.025, 0.5])
    moments = posterior.filtered["z"]
    torch.testing.assert_close(found[1], moments.mean)
    torch.testing.assert_close(found[0], moments.mean - 1.959963984540054 * moments.std)
    assert posterior.trajectories(3).samples["z"].shape == (3, 2, 5)
    with pytest.raises(ValueError, match="no latent site 'w'"):
        posterior.quantile("w", 0.5)


class Weir(seq.StateSpaceModel):
    """Linear everywhere but within a few units of where the state is."""

    def __init__(self, where="emission", level=1000.0):
        super().__init__()
        self.where, self.level = where, level

    def bump(self, z, where):
        return 5 * torch.exp(-0.5 * ((z - self.level) / 3) ** 2) if where == self.where else 0.0

    def initial(self):
        return pyro.sample("z", dist.Normal(self.level, 6.0))

    def transition(self, z):
        scale = 3.0 + torch.sigmoid(-(z - self.level).abs()) * (self.where == "scale")
        return pyro.sample("z", dist.Normal(self.level + 0.9 * (z - self.level) + self.bump(z, "transition"), scale))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z + self.bump(z, "emission"), 0.5), obs=x)


@pytest.mark.parametrize("where", ["emission", "transition", "scale"])
def test_what_is_not_linear_only_where_the_state_is(where):
    model = Weir(where)
    x = model.simulate([40])["x"]
    for run in (seq.KalmanFilter(model).run, seq.KalmanFilter(model).log_evidence, lambda x: seq.exact(model)):
        with pytest.raises(ValueError, match="not linear in the state|covariance depends on the state"):
            run(x)
    assert seq.KalmanFilter(model, assume_linear=True).run(x).log_evidence.isfinite().all()


def test_what_is_not_linear_only_where_the_data_is():
    """A first state at zero, and data that goes where a bump of width 30 is, between the scales that are tested."""
    class Rises(LocalLevel):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z + 20 * torch.exp(-0.5 * ((z - 3e4) / 300) ** 2), 1.0), obs=x)

    model, x = Rises(0.0, 1.0, 300.0), torch.linspace(0, 6e4, 200)
    with pytest.raises(ValueError, match="not linear in the state"):
        seq.KalmanFilter(model).log_evidence(x)
    seq.KalmanFilter(model).log_evidence(x[:50])


def test_what_is_not_linear_beside_large_numbers_in_single_precision():
    class Off(LocalLevel):
        def initial(self):
            return pyro.sample("z", dist.Normal(1e5, 3.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(z - 3 * torch.tanh(z - 1e5), 0.5))

    torch.set_default_dtype(torch.float32)
    model = Off(0.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="site 'z': its mean.*not linear in the state"):
        seq.KalmanFilter(model).run(1e5 + torch.randn(1, 20))


def test_data_of_another_type_than_the_model():
    with pytest.raises(TypeError, match="site 'x': the data is torch.float32 and the model torch.float64"):
        seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(torch.randn(1, 5).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_data_of_half_precision(dtype):
    torch.set_default_dtype(dtype)
    with pytest.raises(ValueError, match="the data is torch.b?float16.*x.float"):
        seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(torch.zeros(1, 5, dtype=dtype))


class MixesRows(LocalLevel):
    def transition(self, z):
        return pyro.sample("z", dist.Normal(z - 0.5 * z.mean(), 0.5))


class MixesRegimes(HiddenMarkov):
    def transition(self, k):
        return pyro.sample("k", dist.Categorical(logits=self.logits[k] * (1 + k.double().mean())))


class MixesFrames(seq.SequentialModel):
    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None):
        return pyro.sample("x", dist.Normal(0.5 * h + 0.3 * h.mean(), 1.0), obs=x)


@pytest.mark.parametrize("run", [
    lambda x: seq.KalmanFilter(MixesRows(0.0, 1.0, 0.5)).run(x),
    lambda x: seq.ParticleFilter(MixesRows(0.0, 1.0, 0.5), 20).run(x),
    lambda x: seq.ExtendedKalmanFilter(MixesRows(0.0, 1.0, 0.5)).run(x),
    lambda x: seq.SequentialELBO().loss(m := MixesRows(0.0, 1.0, 0.5), seq.FilteringGuide(m, hidden=4), x),
    lambda x: seq.ForwardBackward(MixesRegimes(3)).run(x),
    lambda x: seq.ExactLikelihood(MixesFrames()).run(x)], ids=["kalman", "particle", "extended", "elbo", "forward", "exact"])
def test_a_step_that_mixes_its_rows(run):
    with pytest.raises(ValueError, match="is not the same for a row alone as among others: the step mixes its rows"):
        run(torch.randn(2, 6))


class DrawsItsOwn(LocalLevel):
    def transition(self, z):
        return pyro.sample("z", dist.Normal(z + torch.randn(()), 0.5))


class DropsOut(seq.SequentialModel):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.5)

    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None):
        return pyro.sample("x", dist.Normal(self.drop(h), 1.0), obs=x)


def test_randomness_of_the_steps_own_is_not_exact():
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="draws random numbers of its own"):
        seq.KalmanFilter(DrawsItsOwn(0.0, 1.0, 0.5)).run(x)
    seq.ParticleFilter(DrawsItsOwn(0.0, 1.0, 0.5), 20).run(x)
    model = DropsOut()
    with pytest.raises(ValueError, match="in training mode with .'Dropout'.*model.eval"):
        seq.ExactLikelihood(model).run(x)
    seq.ExactLikelihood(model).log_evidence(x)  # of training
    seq.ExactLikelihood(model.eval()).run(x)


class Driven(LocalLevel):
    def transition(self, z, u):
        return pyro.sample("z", dist.Normal(z + u, 0.5))


def test_covariates_of_a_forecast_are_those_of_its_frames():
    x, u = torch.randn(1, 10), torch.arange(14.0)[None]
    posterior = seq.KalmanFilter(Driven(0.0, 1.0, 0.5)).run(x, u=u[:, :10])
    for given in (u, u[:, 10:13]):
        with pytest.raises(ValueError, match=r"covariate .u. of shape .* has \d+ frames and horizon=4: .*u\[:, T:T \+ 4\]"):
            posterior.predict(4, u=given)
    assert posterior.predict(4, u=u[:, 10:]).mean("z")[0, -1] > 30


def test_a_step_is_checked_again_at_later_calls_of_a_marginal():
    """At a coefficient of zero, as of the first call, it is linear."""
    class Bends(LocalLevel):
        def __init__(self):
            super().__init__(0.0, 1.0, 0.5)
            self.bend = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(0.9 * z + self.bend * z.sin(), 0.5))

    marginal, x = seq.Marginal(seq.KalmanFilter(Bends())), torch.randn(1, 8)
    with poutine.condition(data={"bend": torch.tensor(0.0)}):
        marginal(x)
    with poutine.condition(data={"bend": torch.tensor(0.5)}), pytest.raises(ValueError, match="not linear in the state"):
        marginal(x)
    with pytest.raises(ValueError, match="not linear in the state"):
        seq.Marginal(seq.KalmanFilter(Bends())).states({"bend": torch.tensor([0.0, 0.5])}, x)


class Autoregression(seq.SequentialModel):
    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None):
        return pyro.sample("x", dist.Normal(0.5 * h, 1.0), obs=x)


def test_log_scores_of_a_model_that_reads_its_data():
    """Those that need no gap are there; the joint one is the sum of one-step densities."""
    x = torch.randn(2, 8)
    table = seq.backtest({"a": seq.ExactLikelihood(Autoregression())}, x, horizon=2, first=6, num_samples=10)
    one = dist.Normal(0.5 * x[:, 5:7], 1.0).log_prob(x[:, 6:])
    torch.testing.assert_close(torch.tensor(table["joint_log_score"].to_numpy()), one.cumsum(1).reshape(-1))
    torch.testing.assert_close(torch.tensor(table["log_score"].to_numpy()[::2]), one[:, 0])
    assert table["log_score"][1::2].isna().all()

    class Breaks(seq.ExactLikelihood):
        def log_evidence(self, *args, **options):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        seq.backtest({"a": Breaks(Autoregression())}, x, horizon=2, first=6, num_samples=10)


def test_an_if_on_the_time():
    class Early(LocalLevel):
        def transition(self, z, t):
            return pyro.sample("z", dist.Normal(z if t < 5 else -z, 0.5))

    model, x = Early(0.0, 1.0, 0.5), torch.randn(2, 6)
    for run in (seq.KalmanFilter(model).run, seq.ParticleFilter(model, 10).run, model):
        with pytest.raises(ValueError, match="the step has an if.*The time t.*torch.where"):
            run(x)


@pytest.mark.parametrize("x, mask, error, message", [
    (torch.zeros(2, 5), torch.ones(5).bool(), ValueError, r"mask has shape \(5,\); for 'x' of shape \(2, 5\) it is \(2, 5\)"),
    ([1.0, None, 2.0], None, TypeError, "'x' holds None .*NaN"),
    ([[1.0, None, 2.0]], None, TypeError, "'x' of type list is not numeric.*NaN")])
def test_gaps_that_are_marked_in_other_ways(x, mask, error, message):
    with pytest.raises(error, match=message):
        seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(x, mask=mask)


def test_a_forecast_of_a_recurrence_that_reads_the_data_as_given():
    class Reads(Autoregression):
        def step(self, h, x=None):
            z = pyro.sample("z", dist.Normal(h, 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return 0.5 * x

    x = torch.randn(1, 5)
    for method in (seq.KalmanFilter(Reads()), seq.ParticleFilter(Reads(), 10)):
        with pytest.raises(ValueError, match="reads data where none is given.*value that pyro.sample returns"):
            method.run(x).predict(2)


class Volatility(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(0.3, (z / 2).exp()), obs=x)


class LevelAndVolatility(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("level", dist.Normal(0.0, 1.0)), pyro.sample("h", dist.Normal(0.0, 1.0))

    def transition(self, state):
        return pyro.sample("level", dist.Normal(state[0], 0.5)), pyro.sample("h", dist.Normal(state[1], 0.5))

    def emission(self, state, x=None):
        return pyro.sample("x", dist.Normal(state[0], (state[1] / 2).exp()), obs=x)


def test_what_a_kalman_filter_does_not_see_is_said():
    x = torch.randn(2, 6)
    for model, blind in ((Volatility(0.0, 1.0, 0.5), "z"), (LevelAndVolatility(), "h")):
        found = seq.inspect(model, x)
        for make in (seq.ExtendedKalmanFilter, seq.UnscentedKalmanFilter, seq.EnsembleKalmanFilter):
            note = f"the data does not move ['{blind}']"
            if blind == "z" or make is not seq.EnsembleKalmanFilter:  # an ensemble of 100 shows chance correlations
                assert note in " ".join(make(model).run(x).notes)
            assert note in found.why(make.__name__)
    x[:] = torch.nan
    assert len(seq.ExtendedKalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(x).notes) == 1


def test_diagnostics_of_a_short_sequence_beside_long_ones():
    x = torch.randn(2, 40)
    table = seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(x, [40, 1]).residuals().diagnostics()
    assert table.loc[0].notna().all(axis=None) and table.loc[1, "count"].item() == 1
    assert table.loc[1, ["variance", "ljung_box_p", "jarque_bera_p", "ks_p"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="the longest series has 1 residuals"):
        seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(x[:, :1]).residuals().diagnostics()


def test_maximum_likelihood_without_a_hessian(monkeypatch):
    class Two(LocalLevel):
        def __init__(self):
            super().__init__(0.0, 1.0, 0.5)
            self.level = torch.nn.Parameter(torch.zeros(2))

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z + self.level.sum(), 1.0), obs=x)

    x = torch.randn(1, 20)
    full = seq.maximum_likelihood(seq.KalmanFilter(Two()), x)
    monkeypatch.setattr("pyro_seq.infer.estimates._MOST", 1)
    for options, note in (({"standard_errors": False}, "none were asked for"), ({}, "with 2 parameters")):
        found = seq.maximum_likelihood(seq.KalmanFilter(Two()), x, **options)
        assert found.log_likelihood == pytest.approx(full.log_likelihood) and found.num_parameters == full.num_parameters
        assert list(found.table.index) == list(full.table.index) and found.table["std_error"].isna().all()
        assert note in " ".join(found.notes) and "level[1]" in repr(found)
    assert not any("Hessian" in note for note in seq.maximum_likelihood(
        seq.KalmanFilter(Two()), x, standard_errors=True).notes)


def test_a_marginalised_site_that_is_not_linear_only_where_the_state_is():
    x = torch.full((1, 6), 1001.0)
    with pytest.raises(ValueError, match="marginalise|not linear"):
        seq.RaoBlackwellisedFilter(Weir(), 2, marginal=["z"]).run(x)


def test_inspect_looks_at_the_first_step_too():
    class Starts(LocalLevel):
        def initial(self):
            return pyro.sample("z", dist.Beta(2.0, 2.0))

        def transition(self, z):
            return pyro.sample("z", dist.Bernoulli(0.2 + 0.6 * z))

    found = seq.inspect(Starts(0.0, 1.0, 0.5), torch.randn(1, 4))
    assert found.kind != "discrete" and "Beta, then Bernoulli" in found.why("ForwardBackward")


def test_dates_that_run_backwards_are_refused():
    series = pd.Series(range(5), index=pd.date_range("2020-01-01", periods=5), dtype=float)
    with pytest.raises(ValueError, match=r"dates of a Series are not in order.*sort_index"):
        seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(series[::-1])
    seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(series)


def test_a_mistyped_option_is_not_taken_for_a_covariate_in_silence():
    with pytest.raises(ValueError, match="'max_iters' is a single number.*this function has none of that name"):
        seq.maximum_likelihood(seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)), torch.randn(1, 4), max_iters=3)


class Urn(seq.StateSpaceModel):
    """Four balls anew each time, of which some are red."""

    def draw(self, rows):
        return pyro.sample("z", dist.Multinomial(4, probs=torch.tensor([0.2, 0.8]).expand(rows, 2)))

    def initial(self):
        return self.draw(1)

    def transition(self, z):
        return self.draw(len(z))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, 0], 2.0), obs=x)


def test_a_learned_guide_of_a_multinomial_keeps_its_number_of_trials():
    """Unbiased over 2000 filters: |z| < 4.5, 7e-6 for a normal error. With one trial it was 0.34 nats too high."""
    x, red, model = torch.tensor([0.0, 1.0, 3.0]), torch.arange(5.0), Urn()
    exact = sum((dist.Binomial(4, 0.2).log_prob(red) + dist.Normal(red, 2.0).log_prob(v)).logsumexp(0) for v in x)
    for guide in (seq.FilteringGuide(model), seq.SmoothingGuide(model)):
        found = seq.ParticleFilter(model, 30, guide=guide).run(x.expand(2000, -1))
        ratio = (found.log_evidence - exact).double().exp()
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(2000)


@pytest.mark.parametrize("latent, message", [
    (lambda n: dist.AffineBeta(torch.full((n,), 2.0), torch.full((n,), 3.0), torch.tensor(1.0), torch.tensor(4.0)),
     r"a AffineBeta cannot be made anew from its parameters"),
    (lambda n: dist.ZeroInflatedPoisson(torch.ones(n), gate=torch.full((n,), 0.3)),
     "a ZeroInflatedPoisson cannot be made anew from its parameters"),
])
def test_a_latent_that_is_more_than_its_parameters_is_refused(latent, message):
    class Latent(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("z", latent(1))

        def transition(self, z):
            return pyro.sample("z", latent(len(z)))

        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=message):
        model = Latent()
        seq.ParticleFilter(model, 10, guide=seq.FilteringGuide(model)).run(torch.full((1, 3), 2.0))


def test_arviz_has_no_numbers_past_the_end_of_a_sequence():
    pytest.importorskip("arviz")
    posterior = seq.ParticleFilter(LocalLevel(0.0, 1.0, 0.5), 50, history=True).run(torch.randn(2, 6), [6, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = posterior.to_arviz(20)
    for values in (found.posterior["z"].values[0, :, 1], found.observed_data["x"].values[1]):
        assert (pd.isna(values[..., 4:])).all() and (~pd.isna(values[..., :4])).all()


def test_residuals_have_the_dates_of_their_data():
    dates = pd.date_range("2020-01-01", periods=8)
    series = pd.Series(range(8), index=dates, dtype=float)
    series.iloc[3] = math.nan
    for method in (seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)), seq.ParticleFilter(LocalLevel(0.0, 1.0, 0.5), 20)):
        table = method.run(series).residuals()
        assert list(table["index"]) == list(dates.delete(3)) and "index" in table
    assert "index" not in seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5)).run(torch.zeros(1, 4)).residuals()


def test_a_backtest_says_at_which_origin_it_cannot_begin():
    model = seq.models.LocalLinearTrend()
    with pytest.raises(ValueError, match=r"method 'trend' at origin 1, .*does not identify the diffuse.*begin later, first="):
        seq.backtest({"trend": seq.KalmanFilter(model)}, torch.randn(1, 12), horizon=2, first=1)
    assert len(seq.backtest({"trend": seq.KalmanFilter(model)}, torch.randn(1, 12), horizon=2, first=4))


def test_a_stream_is_tested_where_it_is():
    class Rises(LocalLevel):
        def emission(self, z, x=None):
            return pyro.sample("x", dist.Normal(z + 5 * torch.exp(-0.5 * ((z - 150) / 3) ** 2), 0.5), obs=x)

    stream = seq.KalmanFilter(Rises(0.0, 1.0, 3.0)).stream()
    stream.update(torch.zeros(1, 10))
    with pytest.raises(ValueError, match="not linear"):
        stream.update(torch.linspace(20.0, 150.0, 30)[None])
    assert stream.num_steps == 10  # what was refused has left no trace
    linear = seq.KalmanFilter(LocalLevel(0.0, 1.0, 0.5))
    x, stream = torch.randn(2, 6), linear.stream(2)
    found = torch.cat([stream.update(x[:, t:t + 1]).log_evidence for t in range(6)], 1)
    torch.testing.assert_close(found, linear.run(x).log_evidence_by_step)
