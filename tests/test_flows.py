"""The affine autoregressive flow over time, and models in its noise space."""

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import guides
from models import VRNN, Bayesian, DeepMarkov, Driven, HiddenMarkov, LocalLevel, linear_gaussian, ragged
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from scipy import stats
from test_agreement import Replayed, assert_same, gradients, with_gaps
from torch.autograd.functional import jacobian

import pyro_seq as seq
from pyro_seq.flows import (
    AffineTemporalAutoregressive,
    FlowedGuide,
    FlowedModel,
    RecurrentPast,
    WindowPast,
    affine_temporal_autoregressive,
)

LENGTHS = torch.tensor([4, 6, 1, 5])

FLOWS = {
    "recurrent": lambda: affine_temporal_autoregressive(3, hidden=5),
    "linear window": lambda: affine_temporal_autoregressive(3, lags=2),
    "window": lambda: affine_temporal_autoregressive(3, lags=2, hidden=5),
    "own past": lambda: affine_temporal_autoregressive(3, lags=2, own_past=True),
    "scalar recurrent": lambda: affine_temporal_autoregressive(None, hidden=5),
    "scalar window": lambda: affine_temporal_autoregressive(None, lags=3, hidden=4),
    "in units": lambda: affine_temporal_autoregressive(3, hidden=5, like=50 + 7 * torch.randn(2, 9, 3)),
}


def moved(flow, by=0.3):
    """Away from the identity that flows start at."""
    for parameter in flow.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return flow


@pytest.fixture(params=FLOWS)
def flow(request):
    return moved(FLOWS[request.param]())


def sequences_for(flow, batch=4, steps=6):
    return torch.randn(batch, steps, *flow.frame_shape)


# The flow as a transform.


def test_starts_at_the_identity_or_at_the_units_of_the_data():
    for name, make in FLOWS.items():
        flow = make()
        y = sequences_for(flow)
        if name != "in units":
            assert torch.equal(flow(y), y) and torch.equal(flow.log_abs_det_jacobian(y, y), torch.zeros(4))
    like = 50 + 7 * torch.randn(2, 9, 3)
    y, _ = affine_temporal_autoregressive(3, like=like).whiten(like)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(3), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.square().mean((0, 1)), torch.ones(3), atol=1e-12, rtol=0)


def test_inverse_both_ways_on_fresh_values(flow):
    for shape in ((4,), (), (2, 3)):
        value = torch.randn(*shape, 6, *flow.frame_shape)
        torch.testing.assert_close(flow.inv(flow(value)), value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(flow(flow.inv(value)), value, rtol=1e-10, atol=1e-10)
        # A copy is a value that the flow has not just produced.
        torch.testing.assert_close(copy.deepcopy(flow).inv(flow(value).clone()), value, rtol=1e-10, atol=1e-10)


def test_log_determinant_is_that_of_the_jacobian(flow):
    y = sequences_for(flow, batch=2, steps=4)
    for value in y:
        n = value.numel()
        full = jacobian(flow, value).reshape(n, n)
        expected = torch.linalg.slogdet(full).logabsdet
        torch.testing.assert_close(flow.log_abs_det_jacobian(value, flow(value)), expected, rtol=1e-10, atol=1e-10)
    x = flow(y)
    whitened, log_det = flow.whiten(x)
    torch.testing.assert_close(whitened, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_det, -flow.log_abs_det_jacobian(y, x), rtol=1e-10, atol=1e-10)


def test_reads_the_past_only(flow):
    x = sequences_for(flow, batch=1, steps=5)[0]
    for i in (0, 1):
        full = jacobian(lambda v, i=i: flow.affine(v)[i], x)
        full = full.reshape(5, x[0].numel(), 5, x[0].numel()).abs().amax((1, 3))
        assert torch.equal(full.triu(), torch.zeros(5, 5))


def test_one_frame_at_a_time_is_the_same_flow(flow):
    x = sequences_for(flow)
    shift, log_scale = flow.affine(x)
    state = flow.start(4)
    for t in range(6):
        torch.testing.assert_close(flow.affine_at(state), (shift[:, t], log_scale[:, t]), rtol=1e-12, atol=1e-12)
        state = flow.advance(state, x[:, t])


def test_whitening_of_ragged_batches(flow):
    x = ragged(sequences_for(flow), LENGTHS)
    y, log_det = flow.whiten(x, LENGTHS)
    for b, n in enumerate(LENGTHS):
        alone, alone_det = flow.whiten(x[b:b + 1, :n])
        torch.testing.assert_close(y[b, :n], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_det[b], alone_det[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(y[b, n:], torch.zeros_like(y[b, n:]))
    other = x.clone()
    for b, n in enumerate(LENGTHS):
        other[b, n:] = torch.nan if b else 1e300
    for value, like in zip(flow.whiten(other, LENGTHS), (y, log_det)):
        assert torch.equal(value, like)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = flow.whiten(x[order], LENGTHS[order])
    torch.testing.assert_close(shuffled, (y[order], log_det[order]), rtol=1e-12, atol=1e-12)


def test_padding_has_exactly_no_gradient(flow):
    x = sequences_for(flow).requires_grad_()
    y, log_det = flow.whiten(x, LENGTHS)
    grad, = torch.autograd.grad(y.square().sum() + log_det.sum(), x)
    for b, n in enumerate(LENGTHS):
        assert grad[b, :n].abs().min() > 0 or n == 1
        assert torch.equal(grad[b, n:], torch.zeros_like(grad[b, n:]))


def test_fill_puts_gaps_at_noise_zero(flow):
    x = with_gaps(sequences_for(flow)) if flow.frame_shape else sequences_for(flow).index_put(
        (torch.tensor([0, 1]), torch.tensor([1, 3])), torch.tensor(torch.nan))
    filled = flow.fill(x, LENGTHS)
    y, _ = flow.whiten(filled, LENGTHS)
    absent = x.isnan() & (torch.arange(6) < LENGTHS[:, None]).reshape(4, 6, *(1,) * len(flow.frame_shape))
    assert torch.equal(filled[~x.isnan()][:3], x[~x.isnan()][:3])
    torch.testing.assert_close(y[absent], torch.zeros_like(y[absent]), rtol=0, atol=1e-12)


def test_gradients(flow):
    y = torch.randn(2, 3, *flow.frame_shape, requires_grad=True)
    parameters = tuple(flow.parameters())

    def density(y, *_):
        x = flow(y)
        return x, flow.inv(x.square()), flow.log_abs_det_jacobian(y, x)

    assert torch.autograd.gradcheck(density, (y, *parameters))


@pytest.mark.parametrize("name", ["recurrent", "window"])
def test_a_thousand_steps_in_single_precision(name):
    pyro.set_rng_seed(1)
    flow = moved(FLOWS[name](), by=0.1).float()
    with torch.no_grad():
        y = torch.randn(3, 1000, 3, dtype=torch.float32)
        x = flow(y)
        back, log_det = flow.whiten(x)
        assert x.isfinite().all() and log_det.isfinite().all()
        # Rounding of x is seen through 1 / scale.
        scale = flow.affine(x)[1].exp()
        allowed = 50 * torch.finfo(torch.float32).eps * (1 + (x.abs().amax() + 1) / scale)
        assert ((back - y).abs() <= allowed).all()
        # The bound of the log scale holds at any parameters and data, also far out.
        far = moved(FLOWS[name](), by=100.0).float()
        y, log_det = far.whiten(1e3 * torch.randn(3, 1000, 3, dtype=torch.float32))
        assert y.isfinite().all() and log_det.isfinite().all()
        assert log_det.abs().max() <= 3 * 1000 * far.bound * (1 + 1e-5)


def test_as_a_distribution_of_sequences(flow):
    shape = (6, *flow.frame_shape)
    fn = dist.TransformedDistribution(dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)), [flow])
    assert tuple(fn.event_shape) == shape and fn.batch_shape == ()
    x = fn.rsample((5,))
    y, log_det = flow.whiten(x)
    expected = dist.Normal(0.0, 1.0).log_prob(y).flatten(1).sum(1) + log_det
    torch.testing.assert_close(fn.log_prob(x.clone()), expected, rtol=1e-12, atol=1e-12)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("sequences", len(x)):
            pyro.sample("x", fn, obs=x)

    before = [p.clone() for p in flow.parameters()]
    SVI(model, lambda x: None, Adam({"lr": 0.1}), Trace_ELBO()).step(x.detach())
    assert all(not torch.equal(a, b) for a, b in zip(before, flow.parameters()))
    assert abs(fn.log_prob(x).sum() - expected.sum()) > 1e-3  # no stale cache


def test_save_and_load(flow, tmp_path):
    x = sequences_for(flow)
    expected = flow.whiten(x)
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    pasts = RecurrentPast(flow.past.width, 5) if isinstance(flow.past, RecurrentPast) else WindowPast(
        flow.past.width, flow.past.lags, 0 if flow.past.network is None else flow.past.network[1].out_features,
        own_past=hasattr(flow.past.direct, "weight"))
    other = AffineTemporalAutoregressive(pasts, scalar=flow.scalar)
    other.load_state_dict(torch.load(tmp_path / "flow.pt", weights_only=True))
    for restored in (other, pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow)):
        for a, b in zip(restored.whiten(x), expected):
            assert torch.equal(a, b)


# Models in the flow's noise space.


def flowed_models():
    """Base model, flow and data; each base with the flow that fits its frames."""
    def vector(recurrent):
        return moved(affine_temporal_autoregressive(4, hidden=3) if recurrent else
                     affine_temporal_autoregressive(4, lags=2, hidden=3))

    return {
        "local level": lambda: (LocalLevel(0.0, 1.0, 0.1, 1.0), moved(FLOWS["scalar recurrent"]()), torch.randn(4, 6), {}),
        "deep Markov": lambda: (DeepMarkov(gaussian=True), vector(False), torch.randn(4, 6, 4), {}),
        "VRNN": lambda: (VRNN(), vector(True), torch.randn(4, 6, 4), {}),
        "VRNN without advance": lambda: (VRNN(with_advance=False), vector(False), torch.randn(4, 6, 4), {}),
        "covariates": lambda: (Driven(), moved(FLOWS["scalar window"]()), torch.randn(4, 6), {"u": torch.randn(4, 6, 2)}),
    }


@pytest.fixture(params=flowed_models())
def flowed(request):
    base, flow, x, covariates = flowed_models()[request.param]()
    return FlowedModel(base, flow), x, covariates


def latents_of(model, batch):
    with poutine.trace() as tr:
        model(batch)
    return {name: site["value"] for name, site in tr.trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and name != "sequences"}


def test_density_is_the_bases_plus_the_log_determinant(flowed):
    model, x, covariates = flowed
    x = ragged(x, LENGTHS)
    batch = seq.Sequences.of(x, LENGTHS, covariates=covariates)
    z = latents_of(model, batch)
    y, log_det = model.flow.whiten(x, LENGTHS)
    ours = poutine.trace(poutine.condition(model, data=z)).get_trace(batch).log_prob_sum()
    base = poutine.trace(poutine.condition(model.base, data=z)).get_trace(y, LENGTHS, **covariates).log_prob_sum()
    torch.testing.assert_close(ours, base + log_det.sum(), rtol=1e-10, atol=1e-10)
    assert log_det.abs().min() > 1e-3


@pytest.mark.parametrize("guide", ["filtering", "direct", "smoothing", "avf"])
def test_bound_is_the_bases_plus_the_log_determinant(flowed, guide, row_noise):
    """The base's guide on the flowed model gives, with the same draws, the base's bound on the whitened data."""
    model, x, covariates = flowed
    x = ragged(x, LENGTHS)
    batch = seq.Sequences.of(x, LENGTHS, covariates=covariates)
    y, log_det = model.flow.whiten(x, LENGTHS)
    noise = seq.Sequences.of(y, LENGTHS, covariates=covariates)
    inner = moved(guides(model.base, noise)[guide](), 0.1)
    ours = seq.SequentialELBO().loss(model, FlowedGuide(model, inner), batch)
    base = seq.SequentialELBO().loss(model.base, inner, noise)
    assert abs(ours - base + log_det.sum().item()) < 1e-9


def guides_of(model, batch, name):
    """A guide made for the flowed model, or one of its base in a wrapper."""
    kind, _, wrapped = name.partition(" of the base")
    if not _:
        return guides(model, batch)[kind]()
    return FlowedGuide(model, guides(model.base, model.whiten(batch))[kind]())


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "missing"])
@pytest.mark.parametrize("guide", ["filtering", "smoothing", "avf", "filtering of the base", "direct of the base",
                                   "smoothing of the base"])
@pytest.mark.parametrize("name", ["local level", "deep Markov", "VRNN", "VRNN without advance"])
def test_sequential_elbo_equals_pyro(name, guide, missing, monkeypatch, row_noise):
    base, flow, x, _ = flowed_models()[name]()
    model = FlowedModel(base, flow)
    x = ragged(x, LENGTHS)
    if missing and x.dim() == 2:
        x[0, 1] = x[1, 3] = x[3, 4] = torch.nan
    batch = seq.Sequences.of(with_gaps(x) if missing and x.dim() == 3 else x, LENGTHS)
    guide = moved(guides_of(model, batch, guide), 0.1)
    replayed = Replayed(guide, batch, monkeypatch, row_noise)
    expected = Trace_ELBO().differentiable_loss(model, replayed, batch)
    actual = seq.SequentialELBO(analytic_kl=False).differentiable_loss(model, guide, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    first, second = gradients(actual, model, guide), gradients(expected, model, guide)
    assert_same(first, second)
    assert any(g is not None and g.abs().max() > 1e-6 for g in gradients(actual, model.flow))


@pytest.mark.parametrize("guide", ["filtering", "smoothing of the base"])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_padding_order_and_splitting(flowed, guide, num_particles, row_noise):
    model, x, covariates = flowed
    guide = moved(guides_of(model, seq.Sequences.of(x, covariates=covariates), guide), 0.05)
    x = ragged(x, LENGTHS)

    def loss(rows, padding=0):
        row_noise.ids = rows
        batch = seq.Sequences.of(torch.cat([x, torch.ones_like(x[:, :padding])], 1)[rows], LENGTHS[rows], covariates={
            k: torch.cat([v, 9 * torch.ones_like(v[:, :padding])], 1)[rows] for k, v in covariates.items()})
        found = seq.SequentialELBO(num_particles).differentiable_loss(model, guide, batch)
        return found, gradients(found, model, guide)

    whole = loss([0, 1, 2, 3])
    for other in (loss([0, 1, 2, 3], padding=3), loss([2, 0, 3, 1])):
        torch.testing.assert_close(other[0], whole[0], rtol=1e-9, atol=1e-9)
        assert_same(other[1], whole[1], 1e-8)
    torch.testing.assert_close(loss([0, 1])[0] + loss([2, 3])[0], whole[0], rtol=1e-9, atol=1e-9)


def test_particle_filter_agrees_with_the_exact_evidence():
    base = LocalLevel(0.0, 1.0, 0.3, 0.5)
    flow = moved(FLOWS["scalar recurrent"]())
    model = FlowedModel(base, flow)
    x = torch.randn(3, 12)
    lengths = [12, 7, 1]
    y, log_det = flow.whiten(x, lengths)
    exact = seq.KalmanFilter(base).run(y, lengths).log_evidence + log_det
    for guide in (None, FlowedGuide(model, seq.FilteringGuide(base, hidden=4, name="of the base"))):
        found = seq.ParticleFilter(model, 500, num_runs=40, guide=guide).run(x, lengths)
        # The average of the estimates exp(log Z) is unbiased; 4 standard errors, on six numbers: an error rate of 4e-4.
        ratio = (found.log_evidence - exact).exp()
        assert ((ratio - 1).abs() < 4 * found.standard_error.clamp(min=1e-12) * ratio.clamp(min=1)).all()


def test_kalman_filter_knows_a_linear_window():
    """A vector autoregression around a linear-Gaussian model is one; a network is not, and the error names the site."""
    base = linear_gaussian()
    flow = moved(affine_temporal_autoregressive(3, lags=2), by=0.2)
    flow.past.first.data[:, 3:] = 0.0  # the first frames at the scale of the others, or the covariance varies with the state
    x, lengths = torch.randn(3, 8, 3), [8, 5, 1]
    y, log_det = flow.whiten(x, lengths)
    exact = seq.KalmanFilter(base).run(y, lengths)
    found = seq.KalmanFilter(FlowedModel(base, flow)).run(x, lengths)
    torch.testing.assert_close(found.log_evidence, exact.log_evidence + log_det, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.smoothed["z"].mean, exact.smoothed["z"].mean, rtol=1e-6, atol=1e-6)
    for name, says in (("window", "site 'x'"), ("recurrent", "next state in FlowedModel is not linear")):
        with pytest.raises(ValueError, match=says):
            seq.KalmanFilter(FlowedModel(base, moved(FLOWS[name]()))).run(x, lengths)


def test_enumeration_of_discrete_latents():
    """A hidden Markov base keeps its exact evidence under Pyro's enumeration."""
    base = HiddenMarkov()
    base.enumerate = "parallel"
    flow = moved(FLOWS["scalar recurrent"]())
    x, lengths = torch.randn(3, 5), [5, 3, 1]
    y, log_det = flow.whiten(x, lengths)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    expected = elbo.loss(base, lambda *a: None, y, lengths) - log_det.sum().item()
    assert abs(elbo.loss(FlowedModel(base, flow), lambda *a: None, x, lengths) - expected) < 1e-9


def test_nested_flows():
    base, inner, outer = DeepMarkov(gaussian=True, observed=3), moved(FLOWS["window"]()), moved(FLOWS["recurrent"]())
    model = FlowedModel(FlowedModel(base, inner), outer)
    x = ragged(torch.randn(4, 6, 3), LENGTHS)
    z = latents_of(model, seq.Sequences.of(x, LENGTHS))
    between, first = outer.whiten(x, LENGTHS)
    y, second = inner.whiten(between, LENGTHS)
    ours = poutine.trace(poutine.condition(model, data=z)).get_trace(x, LENGTHS).log_prob_sum()
    expected = poutine.trace(poutine.condition(base, data=z)).get_trace(y, LENGTHS).log_prob_sum() + (first + second).sum()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_simulation_is_the_flow_of_a_simulation_of_the_base(flowed, row_noise):
    """With the same random numbers for each row the flowed model simulates the flow of what the base simulates."""
    model, _, covariates = flowed
    lengths = [6, 4, 1, 6]
    drawn = model.simulate(lengths, **covariates)
    base = model.base.simulate(lengths, **covariates)
    y, _ = model.flow.whiten(drawn["x"], lengths)
    torch.testing.assert_close(y, base["x"], rtol=1e-9, atol=1e-9)
    for name in base:
        if name != "x":
            torch.testing.assert_close(drawn[name], base[name], rtol=1e-9, atol=1e-9)
    unrolled = model(lengths=lengths, **covariates)
    assert unrolled.shape == drawn["x"].shape and unrolled.isfinite().all()


def test_forecast():
    model = FlowedModel(LocalLevel(0.0, 1.0, 0.3, 0.5), moved(FLOWS["scalar recurrent"]()))
    posterior = seq.ParticleFilter(model, 50).run(torch.randn(3, 6), [6, 2, 4])
    forecast = posterior.predict(3)
    assert set(forecast.to_dataframe()["site"]) >= {"x"}


def test_evidence_with_gaps_is_the_marginal():
    """A missing value is integrated out: the evidence of the filter against the exact evidence on a grid of its values."""
    base, flow = LocalLevel(0.0, 1.0, 0.3, 0.5), moved(FLOWS["scalar recurrent"]())
    model = FlowedModel(base, flow)
    x = torch.randn(1, 4)
    x[0, 1] = torch.nan
    grid = torch.linspace(-15, 15, 2000)
    filled = x.repeat(2000, 1)
    filled[:, 1] = grid
    y, log_det = flow.whiten(filled)
    exact = (seq.KalmanFilter(base).run(y).log_evidence + log_det).logsumexp(0) + (grid[1] - grid[0]).log()
    found = seq.ParticleFilter(model, 2000, num_runs=30).run(x)
    assert ((found.log_evidence - exact).exp() - 1).abs() < 4 * found.standard_error


def test_a_partly_missing_frame_scores_its_other_entries():
    model = FlowedModel(VRNN(), moved(affine_temporal_autoregressive(4, lags=1)))
    x = torch.randn(2, 1, 4)
    x[0, 0, 1] = torch.nan
    nodes = poutine.trace(model).get_trace(x).nodes
    z, at = nodes["z_1"]["value"], model.flow.affine_at(model.flow.start(2))
    loc = model.base.decoder(torch.cat([model.base.h0.expand(2, -1), z], -1))
    entries = dist.Normal(at[0] + at[1].exp() * loc, at[1].exp() * 0.7).log_prob(x[:, 0].nan_to_num())
    expected = torch.where(x[:, 0].isnan(), 0.0, entries).sum(-1)
    torch.testing.assert_close(nodes["x_1"]["fn"].log_prob(nodes["x_1"]["value"]), expected, rtol=1e-12, atol=1e-12)


def test_families_of_emissions():
    """Every continuous family on the real line has the flowed density exactly, location-scale ones in their own family."""
    from pyro_seq.flows.model import _affine

    shift, log_scale = torch.randn(5, 3), torch.randn(5, 3)
    loc, scale = torch.randn(5, 3), torch.rand(5, 3) + 0.5
    root = torch.randn(3, 3).tril(-1) + torch.eye(3)
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=torch.randn(5, 2)), dist.Normal(
        torch.randn(5, 2, 3), 1.0).to_event(1))
    same = [dist.Normal(loc, scale), dist.Laplace(loc, scale), dist.Cauchy(loc, scale), dist.StudentT(3.0, loc, scale),
            dist.Gumbel(loc, scale), dist.Logistic(loc, scale)]
    for fn in (*(f.to_event(1) for f in same), dist.MultivariateNormal(loc, scale_tril=root), mixture,
               dist.SoftLaplace(loc, scale).to_event(1)):
        y = fn.sample()
        moved_fn = _affine(fn, shift, log_scale, "x", "Model")
        torch.testing.assert_close(moved_fn.log_prob(shift + log_scale.exp() * y), fn.log_prob(y) - log_scale.sum(-1),
                                   rtol=1e-9, atol=1e-9)
    for fn in same:
        assert type(_affine(fn.to_event(1), shift, log_scale, "x", "Model").base_dist) is type(fn)


def test_flow_and_base_are_trained_saved_and_restored_together(tmp_path):
    def make():
        base = VRNN()
        return FlowedModel(base, affine_temporal_autoregressive(4, hidden=3))

    model = make()
    guide = FlowedGuide(model, seq.FilteringGuide(model.base, hidden=4))
    x = torch.randn(8, 6, 4).cumsum(1)
    before = {k: v.clone() for k, v in (*model.named_parameters(), *guide.named_parameters())}
    svi = SVI(model, guide, Adam({"lr": 0.01}), seq.SequentialELBO())
    losses = [svi.step(x) for _ in range(30)]
    after = dict((*model.named_parameters(), *guide.named_parameters()))
    assert all(not torch.equal(before[k], after[k]) for k in before)
    assert losses[-1] < losses[0]
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make()
    with pytest.raises(ValueError, match="already in Pyro's parameter store"):
        seq.SequentialELBO().differentiable_loss(other, seq.PriorGuide(other), x)
    pyro.clear_param_store()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    z = latents_of(model, seq.Sequences.of(x))
    scores = [poutine.trace(poutine.condition(m, data=z)).get_trace(x).log_prob_sum() for m in (model,)]
    pyro.clear_param_store()
    scores.append(poutine.trace(poutine.condition(other, data=z)).get_trace(x).log_prob_sum())
    assert torch.equal(*scores)


def test_bayesian_parameters_of_the_base():
    model = FlowedModel(Bayesian(), moved(FLOWS["scalar recurrent"]()))
    assert model.global_sites() == ["base.phi", "base.noise"]
    x = torch.randn(3, 5)
    nodes = poutine.trace(model).get_trace(x).nodes
    assert [n for n in nodes if n.startswith("base.")] == ["base.phi", "base.noise"]
    with poutine.block():
        globals_ = AutoNormal(poutine.block(model, expose=model.global_sites()))
        guide = FlowedGuide(model, seq.FilteringGuide(model.base, hidden=4), global_guide=globals_)
        pyro.set_rng_seed(0)
    for loss in (seq.SequentialELBO(), Trace_ELBO()):
        svi = SVI(model, guide, Adam({"lr": 1e-3}), loss)
        assert math.isfinite(svi.step(x))
    with pytest.warns(UserWarning, match="drawn from their prior"):
        seq.ParticleFilter(model, 10).run(x)


def test_a_guide_written_by_hand_for_the_base():
    class Reads(seq.SequentialGuide):
        seen = ()

        def prepare(self, x, lengths):
            self.__dict__["seen"] = x
            return x.cumsum(1)

        def step(self, state, x, encoding, observed):
            self.__dict__.setdefault("frames", []).append(x)
            pyro.sample("z", dist.Normal(x + 0.1 * encoding, 0.5))

    base, flow = LocalLevel(0.0, 1.0, 0.3, 0.5), moved(FLOWS["scalar recurrent"]())
    model = FlowedModel(base, flow)
    x, hand = torch.randn(4, 6), Reads(base)
    guide = FlowedGuide(model, hand)
    seq.SequentialELBO().loss(model, guide, x)
    y, _ = flow.whiten(x)
    torch.testing.assert_close(hand.seen, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.stack(hand.frames, 1), y, rtol=1e-12, atol=1e-12)
    assert guide.reads_future and seq.Variational(model, guide).run(x).log_evidence.isfinite().all()


# Lag correlation: what is left of time in the noise.


def fit(flow, x, lengths=None, iterations=500):
    """Maximum likelihood under standard normal noise."""
    batch = seq.Sequences.of(x, lengths)
    optimiser = torch.optim.LBFGS(flow.parameters(), max_iter=iterations, history_size=50, tolerance_grad=1e-9,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        y, log_det = flow.whiten(batch.x["x"], batch.lengths)
        loss = (0.5 * y.square().sum() - log_det.sum()) / batch.lengths.sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return flow


def lag_correlations(series, lags):
    """``(lags, D, D)`` correlations of each entry with each earlier one, and the number of frames ``n``.

    Of white noise each is normal with variance 1 / n, whatever the correlation of the entries of one frame.
    """
    both = torch.cat(series)
    unit = [(y - both.mean(0)) / both.std(0, correction=0) for y in series]
    return torch.stack([sum(y[h:].T @ y[:-h] for y in unit) / len(both) for h in range(1, lags + 1)]), len(both)


def portmanteau(series, lags):
    """Hosking's p-value of whiteness (*The multivariate portmanteau statistic*, 1980)."""
    correlations, n = lag_correlations(series, lags)
    both = torch.cat(series)
    inverse = torch.linalg.inv(torch.corrcoef(both.T))
    q = sum(n**2 / (n - h) * torch.trace(c.T @ inverse @ c @ inverse) for h, c in enumerate(correlations, start=1))
    return stats.chi2.sf(q.item(), lags * both.shape[1] ** 2)


def test_a_linear_window_whitens_a_vector_autoregression():
    """The lag correlation of held-out data is within its confidence band after the flow, and far outside before.

    Two tests at 1% in all: each of 5 * 9 correlations at a level of 1% / 45 (Bonferroni), and Hosking's statistic. The data
    that trains the flow is ten times what tests it, so that its own error adds little.
    """
    a = torch.tensor([[0.8, 0.2, 0.0], [-0.3, 0.7, 0.1], [0.0, 0.1, 0.5]])
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [0.2, -0.3, 2.0]])

    def simulate(batch, steps, warm=100):
        x, frames = torch.zeros(batch, 3), []
        for _ in range(steps + warm):
            x = x @ a.T + torch.randn(batch, 3) @ root.T
            frames.append(x)
        return torch.stack(frames[warm:], 1)

    flow = fit(affine_temporal_autoregressive(3, lags=1), simulate(100, 100))
    torch.testing.assert_close(flow.past.direct[1].weight, a, atol=0.05, rtol=0)
    x = simulate(10, 100)
    y, _ = flow.whiten(x)
    band = stats.norm.ppf(1 - 0.01 / (2 * 45)) / math.sqrt(1000)
    after, before = (lag_correlations(list(v.detach()[:, 1:]), 5)[0].abs().max() for v in (y, x))
    assert after < band < 0.5 < before
    assert portmanteau(list(y.detach()[:, 1:]), 5) > 0.01
    assert portmanteau(list(x), 5) < 1e-100


def test_a_window_whitens_walking(data_dir):
    """The lag correlation of a walk that the flow has not seen, averaged over channels as in the paper, falls from 0.84 to
    within its confidence band at each of ten lags; and 97% or more of the 560 of single channels do.

    The band is of 1% in all (Bonferroni). The average of channels that are correlated with one another, as C, has standard
    error sqrt(mean(C**2) / n). Each channel's own past: 22 walks of a hundred frames do not determine a map of all 56
    channels, whose error from one walk to another is itself correlated in time. Twelve lags are, of 2, 3, 5, 8 and 12, best by
    likelihood on six walks left out. The seven single correlations beyond the band
    are of neck, head and one knee at lag one, and of the body's forward position.
    """
    file = np.load(data_dir / "cmu_mocap35" / "cmu_mocap35.npz")
    ends = np.cumsum(file["lengths"])[:-1]
    angles = file["angles"].astype(np.float64)
    trials = np.split(angles[:, angles.std(0) > 1e-9], ends)
    walks = {str(name): torch.from_numpy(trial).to(torch.get_default_device()) for name, trial in zip(file["trial"], trials)
             if len(trial) > 80}
    unseen = walks.pop("29")
    assert len(walks) == 22 and unseen.shape == (125, 56)

    flow = fit(affine_temporal_autoregressive(56, lags=12, own_past=True, like=list(walks.values())), list(walks.values()),
               iterations=600)
    y = flow.whiten(unseen[None])[0][0, 12:].detach()
    level = 0.01

    def averages(series):
        correlations, n = lag_correlations([series], 10)
        alone = correlations.diagonal(dim1=1, dim2=2)
        error = math.sqrt(torch.corrcoef(series.T).square().mean().item() / n)
        return alone, alone.mean(1) / error, math.sqrt(n)

    alone, average, root = averages(y)
    raw, raw_average, _ = averages(unseen)
    assert average.abs().max() < stats.norm.ppf(1 - level / 20)
    assert raw_average[:5].min() > 10 and raw[0].mean() > 0.8
    inside = alone.abs() * root < stats.norm.ppf(1 - level / (2 * 560))
    assert inside.double().mean() > 0.97


# Mistakes.


def small(event=1, width=3):
    return affine_temporal_autoregressive(width if event else None, hidden=4)


class Misnamed(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("data", dist.Normal(z, 1.0), obs=x)


class Shifted(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 1.0), obs=None if x is None else x - 5)


class Positive(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.LogNormal(z, 1.0), obs=x)


class InParts(LocalLevel):
    """Pyro refuses such a module inside another once it has run."""

    def __init__(self):
        super().__init__(0.0, 1.0, 0.1, 1.0)
        self.part = PyroModule()
        self.part.shift = torch.nn.Parameter(torch.tensor(0.3))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z + self.part.shift, 1.0), obs=x)


@pytest.mark.parametrize("how", ["simulated", "guided", "under another flow"])
def test_a_base_that_has_run_already(how):
    base, x = InParts(), torch.randn(3, 5)
    if how == "simulated":
        base.simulate([3])
    elif how == "guided":
        seq.SmoothingGuide(base)
    else:
        FlowedModel(base, small(0))(x)
    values = []
    for model in (FlowedModel(base, small(0)), FlowedModel(InParts(), small(0))):  # flows begin as the identity
        torch.manual_seed(1)
        values.append(seq.SequentialELBO().loss(model, seq.PriorGuide(model), x))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    if how == "under another flow":  # whose parameters have the names of this one's
        pyro.clear_param_store()
    model = FlowedModel(base, small(0))
    SVI(model, seq.PriorGuide(model), Adam({"lr": 0.1}), seq.SequentialELBO()).step(x)
    assert base.part.shift.item() != pytest.approx(0.3)
    assert "base.part.shift" in pyro.get_param_store()


class Masked(LocalLevel):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 1.0).mask(z > 0), obs=x)


class NoEvent(DeepMarkov):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(self.decoder(z), 1.0), obs=x)


MISTAKES = {
    "width is no integer": (lambda: affine_temporal_autoregressive(3.0), TypeError, "input_dim=3.0 is not an integer"),
    "width zero": (lambda: affine_temporal_autoregressive(0), ValueError, "input_dim=0; it is at least 1"),
    "lags zero": (lambda: affine_temporal_autoregressive(3, lags=0), ValueError, "lags=0; it is at least 1"),
    "own past without lags": (lambda: affine_temporal_autoregressive(3, own_past=True), ValueError, "lags="),
    "bound": (lambda: affine_temporal_autoregressive(3, bound=0), ValueError, "bound=0.*positive"),
    "bound that is a word": (lambda: affine_temporal_autoregressive(3, bound="a"), ValueError, "bound='a'.*positive"),
    "past is a number": (lambda: AffineTemporalAutoregressive(3), TypeError, "past is 3.*affine_temporal_autoregressive"),
    "past is a plain network": (lambda: AffineTemporalAutoregressive(torch.nn.Linear(3, 3)), TypeError, "RecurrentPast"),
    "scalar of width 3": (lambda: AffineTemporalAutoregressive(RecurrentPast(3), scalar=True), ValueError, "width 3"),
    "like of another width": (lambda: affine_temporal_autoregressive(3, like=torch.zeros(2, 5, 4)), ValueError,
                              r"like= has data of shapes \[\(2, 5, 4\)\].*\(3,\)"),
    "like never observed": (lambda: affine_temporal_autoregressive(None, like=torch.full((2, 5), torch.nan)), ValueError,
                            "no value of entry 0"),
    "noise of another width": (lambda: small()(torch.zeros(2, 5, 4)), ValueError,
                               r"noise has shape \(2, 5, 4\); this flow's sequences are \(\.\.\., T, 3\)"),
    "data of another width": (lambda: small().inv(torch.zeros(2, 5, 4)), ValueError, r"data has shape \(2, 5, 4\)"),
    "one frame": (lambda: small()(torch.zeros(3)), ValueError, r"noise has shape \(3,\)"),
    "no frame": (lambda: small()(torch.zeros(2, 0, 3)), ValueError, "time dimension is empty"),
    "scalars for vectors": (lambda: small().whiten(torch.zeros(2, 5)), ValueError,
                            r"\(2, 5\) has frames of shape \(\) and the flow has frames of shape \(3,\)"),
    "vectors for scalars": (lambda: small(0).whiten(torch.zeros(2, 5, 1)), ValueError,
                            r"frames of shape \(1,\) and the flow has frames of shape \(\).*autoregressive\(None\)"),
    "images for vectors": (lambda: small().whiten(torch.zeros(2, 5, 3, 3)), ValueError, r"frames of shape \(3, 3\)"),
    "gap": (lambda: small().whiten(torch.zeros(2, 5, 3).index_fill(1, torch.tensor([3]), torch.nan)), ValueError,
            "missing in sequence 0 at time 4.*flow.fill"),
    "gap in scalars": (lambda: small(0).whiten(torch.tensor([[0.0, torch.nan]])), ValueError, "sequence 0 at time 2"),
    "infinite": (lambda: small().whiten(torch.full((2, 5, 3), torch.inf)), ValueError, "infinite in sequence 0 at time 1"),
    "lengths too long": (lambda: small().whiten(torch.zeros(2, 5, 3), [5, 6]), ValueError, "between 1 and T = 5"),
    "lengths of another batch": (lambda: small().whiten(torch.zeros(2, 5, 3), [5]), ValueError, "lengths has 1 entries"),
    "another type": (lambda: small().whiten(torch.zeros(2, 5, 3, dtype=torch.float32)), TypeError,
                     r"x\.to\(torch\.float64\).*flow\.to\(torch\.float32\)"),
    "integers": (lambda: small(0).whiten(torch.zeros(2, 5, dtype=torch.long)), TypeError, "is torch.int64"),
    "two tensors": (lambda: small().whiten({"a": torch.zeros(2, 5, 3), "b": torch.zeros(2, 5, 3)}), ValueError, "one tensor"),
    "base is a class": (lambda: FlowedModel(VRNN, small()), TypeError, "not the class VRNN"),
    "base is a function": (lambda: FlowedModel(lambda: 0, small()), TypeError, "SequentialModel or StateSpaceModel"),
    "base from a plain function": (lambda: FlowedModel(seq.from_pyro(lambda x: None), small()), TypeError, "replays its past"),
    "the flow comes first": (lambda: FlowedModel(small(), VRNN()), TypeError, "not AffineTemporalAutoregressive"),
    "flow is a plain transform": (lambda: FlowedModel(VRNN(), dist.transforms.affine_autoregressive(4)), TypeError,
                                  "not AffineAutoregressive.*affine_temporal_autoregressive"),
    "no such site": (lambda: FlowedModel(VRNN(), small(), "y"), ValueError,
                     r"site='y' is not a data argument of VRNN.*\['x'\]"),
    "site of another name": (lambda: FlowedModel(Misnamed(), small(0)).simulate([3]), ValueError,
                             "Misnamed does not sample the site 'x'"),
    "site of another name, with data": (lambda: FlowedModel(Misnamed(), small(0))(torch.zeros(2, 5)), ValueError,
                                        "Misnamed does not sample the site 'x'"),
    "function of the data": (lambda: FlowedModel(Shifted(), small(0))(torch.zeros(2, 5)), ValueError,
                             "'x' of Shifted observes a function of the data"),
    "discrete emission": (lambda: FlowedModel(DeepMarkov(), small(1, 4))(torch.zeros(2, 5, 4)), ValueError,
                          "site 'x' of DeepMarkov is Bernoulli, discrete"),
    "positive emission": (lambda: FlowedModel(Positive(), small(0))(torch.ones(2, 5)), ValueError,
                          "site 'x' of Positive is LogNormal, on GreaterThan.*only"),
    "masked emission": (lambda: FlowedModel(Masked(), small(0))(torch.ones(2, 5)), ValueError, "'x' of Masked is masked"),
    "flow of another width": (lambda: FlowedModel(VRNN(), small()).simulate([3]), ValueError,
                              r"'x' of VRNN has frames of shape \(4,\) and the flow frames of shape \(3,\)"),
    "flow of another width, with data": (lambda: FlowedModel(VRNN(), small())(torch.zeros(2, 5, 4)), ValueError,
                                         r"frames of shape \(4,\) and the flow has frames of shape \(3,\)"),
    "emission without to_event": (lambda: FlowedModel(NoEvent(), small(1, 4))(torch.zeros(2, 5, 4)), ValueError,
                                  r"lacks \.to_event\(1\)"),
    "data of another width, filtered": (lambda: seq.ParticleFilter(FlowedModel(VRNN(), small(1, 4))).run(
        torch.zeros(2, 5, 3)), ValueError, r"frames of shape \(3,\)"),
    "data of a dimension too few": (lambda: seq.KalmanFilter(FlowedModel(VRNN(), small(1, 4))).run(torch.zeros(2, 5)),
                                    ValueError, r"frames of shape \(\)"),
    "integer data": (lambda: FlowedModel(LocalLevel(), small(0))(torch.zeros(2, 5, dtype=torch.long)), TypeError, "int64"),
    "guide of the base, bare": (lambda: (lambda m: seq.SequentialELBO().loss(m, seq.PriorGuide(m.base), torch.zeros(2, 5, 4)))(
        FlowedModel(VRNN(), small(1, 4))), ValueError, "made for another VRNN"),
    "guide of the flowed model, wrapped": (lambda: (lambda m: FlowedGuide(m, seq.PriorGuide(m)))(
        FlowedModel(VRNN(), small(1, 4))), ValueError, "made for another FlowedModel"),
    "wrapper without a flow": (lambda: (lambda m: FlowedGuide(m, seq.PriorGuide(m)))(VRNN()), TypeError,
                               "takes a FlowedModel, not VRNN"),
    "global guide of the base": (lambda: (lambda m: FlowedGuide(m, seq.FilteringGuide(m.base, global_guide=lambda *a: None)))(
        FlowedModel(Bayesian(), small(0))), ValueError, "give FlowedGuide one"),
    "global parameters without a guide": (lambda: (lambda m: seq.SequentialELBO().loss(m, FlowedGuide(m, seq.PriorGuide(
        m.base)), torch.zeros(2, 5)))(FlowedModel(Bayesian(), small(0))), ValueError, r"base\.phi.*global_guide="),
}


@pytest.mark.filterwarnings("ignore:a model from from_pyro replays its past")
@pytest.mark.parametrize("program", MISTAKES)
def test_mistake(program):
    run, kind, says = MISTAKES[program]
    with pytest.raises((ValueError, TypeError), match=says) as caught:
        run()
    assert type(caught.value) is kind
