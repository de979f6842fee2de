"""Models without latents: the likelihood in one call is that of the steps, and both are those of the formulas."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LocalLevel, ragged
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import nn

import pyro_seq as seq
from pyro_seq.engine.loop import Window
from pyro_seq.models import (
    BernoulliOutput,
    CategoricalOutput,
    CausalConvolution,
    CausalTransformer,
    DiscretisedLogisticMixture,
    LogisticMixtureOutput,
    NormalOutput,
    Output,
    RecurrentNetwork,
)

NETWORKS = {
    "gru": lambda output, **k: RecurrentNetwork(output, 6, layers=2, **k),
    "lstm": lambda output, **k: RecurrentNetwork(output, 6, cell="lstm", **k),
    "convolution": lambda output, **k: CausalConvolution(output, 6, kernel=2, dilations=(1, 2, 1), **k),
    "wide convolution": lambda output, **k: CausalConvolution(output, 6, kernel=3, dilations=(1, 3), **k),
    "transformer": lambda output, **k: CausalTransformer(output, 6, heads=3, context=20, **k),
    "short transformer": lambda output, **k: CausalTransformer(output, 6, heads=1, context=3, **k),
}
OUTPUTS = {
    "binary": lambda: BernoulliOutput(3),
    "one bit": lambda: BernoulliOutput(),
    "normal": lambda: NormalOutput(3),
    "scalar normal": lambda: NormalOutput(like=torch.randn(4, 9) * 5 + 100),
    "correlated": lambda: NormalOutput(3, correlated=True, like=torch.randn(4, 9, 3) * torch.tensor([1.0, 10.0, 0.1]) - 7),
    "categories": lambda: CategoricalOutput(2, classes=4),
    "letters": lambda: CategoricalOutput(None, classes=5),
    "levels": lambda: LogisticMixtureOutput(2, 3, levels=16),
    "audio": lambda: LogisticMixtureOutput(None, 3, levels=256),
    "mixture": lambda: LogisticMixtureOutput(2, 3),
}
LENGTHS = [7, 3, 9, 9, 1]
every_network = pytest.mark.parametrize("network", NETWORKS)
every_output = pytest.mark.parametrize("output", OUTPUTS)


def declared(network, output="normal", **options):
    model = NETWORKS[network](OUTPUTS[output](), **options)
    with torch.no_grad():  # away from the zeros some parameters start from
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def data(model, lengths=LENGTHS, **covariates):
    return ragged(model.simulate(lengths, **covariates)["x"], lengths)


def log_evidence(model, x, lengths=LENGTHS, **options):
    return seq.ExactLikelihood(model).log_evidence(x, lengths, **options)


def by_steps(model, x, lengths=LENGTHS, **covariates):
    """The log density of the declared program, one Pyro site after the other, ``(B,)``."""
    trace = poutine.trace(model).get_trace(x, lengths, **covariates)
    trace.compute_log_prob()
    return sum(trace.nodes[f"x_{t}"]["log_prob"] for t in range(1, max(lengths) + 1))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected, tolerance=1e-10):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


# One call is what the steps say.


def check_against_steps(model, **covariates):
    x = data(model, **covariates)
    here, steps = log_evidence(model, x, **covariates), by_steps(model, x, **covariates)
    torch.testing.assert_close(here, steps, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(1, 2, len(x))
    assert_same(gradients(model, (weights * here).sum()), gradients(model, (weights * steps).sum()))


@every_output
@pytest.mark.parametrize("network", ["gru", "convolution", "short transformer"])
def test_one_call_equals_the_steps(network, output):
    check_against_steps(declared(network, output))


@every_network
def test_one_call_equals_the_steps_with_covariates(network):
    u, v = torch.randn(5, 9, 2), torch.randn(5, 9)
    check_against_steps(declared(network, num_covariates=3), u=u, v=v)


@every_network
def test_covariates_of_a_step_move_its_frame(network):
    model, u = declared(network, num_covariates=2), torch.randn(1, 6, 2, requires_grad=True)
    x, moved = torch.randn(1, 6, 3), 0
    for t in range(6):
        found = torch.autograd.grad(log_evidence(model, x[:, :t + 1], [t + 1], u=u[:, :t + 1]).sum(), u)[0]
        assert (found[:, t + 1:] == 0).all()
        moved += int((found[0, t] != 0).all())
    assert moved  # not at every step: a rectified feature may be off


@every_network
def test_nothing_of_the_future_is_read(network):
    """The log densities of frames 1..s have no gradient in the frames after s; that of frame s + 1 has."""
    model, length = declared(network), 6
    x = torch.randn(2, length, 3, requires_grad=True)
    batch = seq.Sequences.of(x)

    def densities():
        return model.within(lambda: seq.ExactLikelihood(model)._by_step(batch)[0])

    for s in range(1, length):
        past = torch.autograd.grad(densities()[:, :s].sum(), x)[0]
        assert (past[:, s:] == 0).all() and (past[:, :s] != 0).any()
        following = torch.autograd.grad(densities()[:, s].sum(), x)[0]
        assert (following[:, s - 1] != 0).any() and (following[:, s + 1:] == 0).all()


def test_the_receptive_field_is_what_it_says():
    model = declared("wide convolution")
    x = torch.randn(1, 20, 3, requires_grad=True)
    densities = model.within(lambda: seq.ExactLikelihood(model)._by_step(seq.Sequences.of(x))[0])
    reach = (torch.autograd.grad(densities[0, -1], x)[0][0].abs().sum(-1) > 0).nonzero().flatten()
    assert model.network.receptive_field == 9
    assert reach[0] == 20 - 1 - model.network.receptive_field and len(reach) == 1 + model.network.receptive_field


# Batches.


@every_network
def test_batches_padding_and_order(network):
    model = declared(network)
    x = data(model)
    posterior = seq.ExactLikelihood(model).run(x, LENGTHS)
    alone = torch.cat([log_evidence(model, x[b:b + 1, :n], [n]) for b, n in enumerate(LENGTHS)])
    torch.testing.assert_close(posterior.log_evidence, alone, rtol=1e-12, atol=1e-12)
    order = [3, 0, 4, 2, 1]
    shuffled = log_evidence(model, x[order], [LENGTHS[i] for i in order])
    torch.testing.assert_close(shuffled, alone[order], rtol=1e-12, atol=1e-12)
    longer = torch.cat([x, torch.full((5, 4, 3), 1e6)], 1)
    torch.testing.assert_close(log_evidence(model, longer), alone, rtol=1e-12, atol=1e-12)
    active = posterior.sequences.active
    assert (posterior.log_evidence_by_step[~active] == 0).all()
    torch.testing.assert_close(posterior.log_evidence_by_step.sum(1), posterior.log_evidence)


@every_network
def test_padding_has_no_gradient(network):
    model = declared(network)
    x = data(model).requires_grad_()
    found = torch.autograd.grad(log_evidence(model, x).sum(), x)[0]
    past_end = ~seq.Sequences.of(x, LENGTHS).active
    assert (found[past_end] == 0).all() and (found[~past_end] != 0).any()


@every_network
@pytest.mark.parametrize("borders", [(4,), (1, 2), (3, 6, 8)])
def test_windows_add_up(network, borders):
    """Scored in pieces, each from the state that the last one left."""
    model = declared(network)
    guide, x = seq.PriorGuide(model), data(model)
    batch = seq.Sequences.of(x, LENGTHS)
    total, state, start = 0.0, None, 1
    for stop in (*borders, 9):
        loss, state = seq.SequentialELBO().window_loss(model, guide, batch, Window(start, stop, state))
        total, start = total - loss, stop + 1
    torch.testing.assert_close(total, log_evidence(model, x).sum(), rtol=1e-12, atol=1e-12)


# Learning.


@every_network
@pytest.mark.parametrize("missing", [False, True])
def test_the_elbo_with_no_latents_is_the_likelihood(network, missing):
    model = declared(network)
    guide, x = seq.PriorGuide(model), data(model)
    if missing:
        x[0, 5:] = torch.nan  # at the end, so that the imputed values are read by nothing that is observed
    exact = log_evidence(model, x).detach()
    for particles in (1, 3):
        loss = seq.SequentialELBO(particles).differentiable_loss(model, guide, x, LENGTHS)
        torch.testing.assert_close(-loss, exact.sum(), rtol=1e-10, atol=1e-10)
    assert_same(gradients(model, loss), gradients(model, -log_evidence(model, x).sum()))
    scaled = seq.SequentialELBO().loss(model, guide, x, LENGTHS, plate_size=50)
    assert abs(scaled + 10 * float(exact.sum())) < 1e-8
    if not missing:
        assert abs(Trace_ELBO().loss(model, guide, x, LENGTHS) + float(exact.sum())) < 1e-8


@every_network
def test_the_loop_is_not_run(network, monkeypatch):
    model = declared(network)
    x = data(model)

    def run(*_):
        raise AssertionError("a step was run")

    monkeypatch.setattr(type(model), "step", lambda self, past, x=None, **covariates: run())
    seq.SequentialELBO().differentiable_loss(model, seq.PriorGuide(model), x, LENGTHS).backward()
    seq.ExactLikelihood(model).run(x, LENGTHS)


@pytest.mark.parametrize("network", ["gru", "convolution", "transformer"])
def test_a_network_learns_what_repeats(network):
    """A sequence of three letters over and over costs nothing once the first is known."""
    model = NETWORKS[network](CategoricalOutput(None, classes=3))
    x = (torch.arange(12) + torch.arange(3)[:, None]) % 3
    svi = SVI(model, seq.PriorGuide(model), Adam({"lr": 0.02}), seq.SequentialELBO())
    for _ in range(150):
        svi.step(x)
    posterior = seq.ExactLikelihood(model).run(x)
    assert (posterior.log_evidence > -math.log(3) - 0.2).all()
    future = posterior.predict(4, num_samples=20).samples["x"]
    expected = (x[:, -1:] + 1 + torch.arange(4)) % 3
    assert (future == expected).double().mean() > 0.95


def test_fit_trains_whole_and_in_windows():
    x = 3 + torch.cumsum(torch.randn(24, 15, 1), 1)
    for window in (None, 6):
        model = RecurrentNetwork(NormalOutput(1, like=x), 8, name=f"window {window}")
        result = seq.fit(model, seq.PriorGuide(model), x[:16], valid=x[16:], epochs=4, batch_size=8, warmup=0,
                         learning_rate=0.02, window=window, progress=False)
        assert result.history["valid"].iloc[-1] < result.history["valid"].iloc[0] - 0.02
        exact = -seq.ExactLikelihood(model).run(x[16:]).total_log_evidence / (8 * 15)
        assert abs(exact - result.best) < 1e-9


# Oracles.


def test_a_network_of_zeros_predicts_the_same_at_every_step():
    model = RecurrentNetwork(BernoulliOutput(2), 4)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.head.bias.data = torch.tensor([0.3, -1.2])
    x = model.simulate([6] * 3)["x"]
    expected = dist.Bernoulli(logits=torch.tensor([0.3, -1.2])).log_prob(x).sum((1, 2))
    torch.testing.assert_close(log_evidence(model, x, None), expected)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def test_a_gaussian_gru_by_hand():
    """The GRU's equations (Cho et al., 2014, in torch's form) and the normal density in numpy."""
    model = RecurrentNetwork(NormalOutput(2), 3, num_covariates=1)
    x, u = torch.randn(1, 4, 2), torch.randn(1, 4, 1)
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    hidden, read, total = np.zeros(3), p["first"], 0.0
    w, r = p["network.rnn.weight_ih_l0"], p["network.rnn.weight_hh_l0"]
    b, c = p["network.rnn.bias_ih_l0"], p["network.rnn.bias_hh_l0"]
    for t in range(4):
        inputs = read + p["driven.weight"] @ u[0, t].numpy()
        i, h = (w @ inputs + b).reshape(3, 3), (r @ hidden + c).reshape(3, 3)
        reset, update = sigmoid(i[0] + h[0]), sigmoid(i[1] + h[1])
        hidden = (1 - update) * np.tanh(i[2] + reset * h[2]) + update * hidden
        loc, spread = (p["head.weight"] @ hidden + p["head.bias"]).reshape(2, 2).T
        scale = np.log1p(np.exp(spread)) + 1e-4
        frame = x[0, t].numpy()
        total += (-0.5 * ((frame - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)).sum()
        read = p["reader.weight"] @ frame + p["reader.bias"]
    assert abs(log_evidence(model, x, None, u=u).item() - total) < 1e-12


def test_a_convolution_by_hand():
    """Two gated blocks (van den Oord et al., 2016) in numpy, one frame after the other."""
    model = CausalConvolution(NormalOutput(), 2, dilations=(1, 2))
    x = torch.randn(1, 7)
    p = {name: value.detach().numpy() for name, value in model.named_parameters()}
    frames = x[0].numpy()
    inputs = [p["first"]] + [p["reader.weight"] @ [v] + p["reader.bias"] for v in frames[:-1]]
    skips = [0.0] * 7
    for block, dilation in enumerate((1, 2)):
        before = inputs
        inputs = []
        for t in range(7):
            taps = np.concatenate([before[t - dilation] if t >= dilation else np.zeros(2), before[t]])
            signal, gate = (p[f"network.convolutions.{block}.weight"] @ taps
                            + p[f"network.convolutions.{block}.bias"]).reshape(2, 2)
            unit = np.tanh(signal) * sigmoid(gate)
            skips[t] = skips[t] + p[f"network.skips.{block}.weight"] @ unit + p[f"network.skips.{block}.bias"]
            if block == 0:
                inputs.append(before[t] + p["network.residuals.0.weight"] @ unit + p["network.residuals.0.bias"])
    total = 0.0
    for t in range(7):
        features = np.maximum(p["network.out.1.weight"] @ np.maximum(skips[t], 0) + p["network.out.1.bias"], 0)
        loc, spread = p["head.weight"] @ features + p["head.bias"]
        scale = np.log1p(np.exp(spread)) + 1e-4
        total += -0.5 * ((frames[t] - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
    assert abs(log_evidence(model, x, None).item() - total) < 1e-12


def test_one_layer_of_attention_by_hand():
    """Softmax of scaled products over the last inputs (Vaswani et al., 2017), one head, in numpy."""
    context, width = 3, 4
    model = CausalTransformer(NormalOutput(), width, layers=1, heads=1, context=context)
    x = torch.randn(1, 6)
    p = {name.removeprefix("network.layers.0."): value.detach().numpy() for name, value in model.named_parameters()}

    def normed(v, name):
        return (v - v.mean()) / np.sqrt(v.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    rates = 10_000.0 ** (-np.arange(0, width, 2) / width)
    read = [p["first"]] + [p["reader.weight"] @ [v] + p["reader.bias"] for v in x[0, :-1].numpy()]
    inputs = [v + np.concatenate([np.sin(t * rates), np.cos(t * rates)]) for t, v in enumerate(read)]
    parts = [(p["queries_keys_values.weight"] @ normed(v, "before_attention") + p["queries_keys_values.bias"]).reshape(3, width)
             for v in inputs]
    total = 0.0
    for t, v in enumerate(inputs):
        seen = range(max(0, t - context + 1), t + 1)
        scores = np.array([parts[t][0] @ parts[s][1] for s in seen]) / np.sqrt(width)
        weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        hidden = v + p["attended.weight"] @ sum(w * parts[s][2] for w, s in zip(weights, seen)) + p["attended.bias"]
        between = p["network.0.weight"] @ normed(hidden, "before_network") + p["network.0.bias"]
        gelu = between * 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in between]))
        hidden = hidden + p["network.2.weight"] @ gelu + p["network.2.bias"]
        loc, spread = p["head.weight"] @ normed(hidden, "network.norm") + p["head.bias"]
        scale = np.log1p(np.exp(spread)) + 1e-4
        total += -0.5 * ((float(x[0, t]) - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
    assert abs(log_evidence(model, x, None).item() - total) < 1e-10


class Autoregression(seq.SequentialModel):
    """An AR(1) from its stationary distribution, with a coefficient to be learned. Without contexts, it is run by the loop."""

    def __init__(self, phi=0.8, name=""):
        super().__init__(name)
        self.phi = nn.Parameter(torch.tensor(phi))

    def start(self, rows):
        return {"last": torch.zeros(rows), "first": torch.ones(rows)}

    def step(self, state, x=None):
        scale = torch.where(state["first"] > 0, (1 - self.phi**2).rsqrt(), 1.0)
        x = pyro.sample("x", dist.Normal(self.phi * state["last"], scale), obs=x)
        return {"last": x, "first": torch.zeros_like(state["first"])}


class InParallel(Autoregression, seq.AutoregressiveModel):
    """The same in one call."""

    def contexts(self, state, x, lengths):
        last = torch.cat([state["last"][:, None], x[:, :-1]], 1)
        first = torch.cat([state["first"][:, None], torch.zeros_like(x[:, :-1])], 1)
        ends = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
        return {"last": last, "first": first}, {"last": x[torch.arange(len(x)), ends - 1],
                                                "first": torch.zeros(len(x))}

    def emission(self, state, x=None):
        super().step(state, x)


@pytest.mark.parametrize("kind", [Autoregression, InParallel])
def test_an_autoregression_is_one_gaussian(kind):
    """Evidence and gradient against the stationary AR(1)'s Toeplitz covariance; with a gap at the end against its marginal."""
    model, phi = kind(), torch.tensor(0.8, requires_grad=True)
    x = torch.randn(3, 8)
    x[1, 6:] = torch.nan
    lag = (torch.arange(8)[:, None] - torch.arange(8)).abs()

    def exact(row, n):
        covariance = phi**lag[:n, :n] / (1 - phi**2)
        return dist.MultivariateNormal(torch.zeros(n), covariance).log_prob(row[:n])

    expected = torch.stack([exact(x[0], 8), exact(x[1], 6), exact(x[2], 4)])
    found = log_evidence(model, x, [8, 8, 4])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), at)[0] for v, at in ((found, model.phi), (expected, phi))))


@pytest.mark.parametrize("kind", [Autoregression, InParallel])
def test_prediction_has_the_moments_of_an_autoregression(kind):
    """At 4.5 standard errors, 18 numbers: a correct one fails once in 8 000 runs. One series ends in a gap of two."""
    model, count = kind(), 4000
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, -5.0, torch.nan, torch.nan], [3.0, -1.0, 0.0, 0.0]])
    future = seq.ExactLikelihood(model).run(x, [4, 4, 2]).predict(3, num_samples=count).samples["x"]
    ahead = torch.arange(1, 4) + torch.tensor([[0], [2], [0]])
    mean = 0.8**ahead * torch.tensor([[4.0], [-5.0], [-1.0]])
    variance = (1 - 0.64**ahead) / (1 - 0.64)
    assert ((future.mean(0) - mean).abs() < 4.5 * (variance / count).sqrt()).all()
    assert ((future.var(0) - variance).abs() < 4.5 * variance * math.sqrt(2 / count)).all()


class Timed(seq.AutoregressiveModel):
    """Two kinds of data, of which one has a gap that is not read, a covariate and the time."""

    missing_feeds_state = False

    def start(self, rows):
        return torch.zeros(rows)

    def step(self, last, t, u, count=None, level=None):
        count, _ = self.emission((last + u, 1.0 + t), count, level)
        return count

    def contexts(self, last, x, lengths, t, u):
        before = torch.cat([last[:, None], x["count"][:, :-1]], 1)
        ends = torch.full((len(t),), t.shape[1]) if lengths is None else lengths
        return (before + u, 1.0 + t), x["count"][torch.arange(len(t)), ends - 1]

    def emission(self, context, count=None, level=None):
        loc, scale = context
        return (pyro.sample("count", dist.Poisson(2 + torch.sin(loc)), obs=count),
                pyro.sample("level", dist.Normal(loc, scale), obs=level))


def test_contexts_know_the_time_the_covariates_and_all_data():
    model, lengths = Timed(), [6, 2, 4]
    u = torch.randn(3, 6)
    drawn = model.simulate(lengths, u=u)
    x = {name: drawn[name] for name in ("count", "level")}
    x["level"][0, 3] = torch.nan
    trace = poutine.trace(model).get_trace(x, lengths, u=u)
    found = log_evidence(model, x, lengths, u=u)
    torch.testing.assert_close(found.sum(), trace.log_prob_sum())
    guide, batch, total, state = seq.PriorGuide(model), seq.Sequences.of(x, lengths, covariates={"u": u}), 0.0, None
    for start, stop in ((1, 2), (3, 5), (6, 6)):
        loss, state = seq.SequentialELBO().window_loss(model, guide, batch, Window(start, stop, state))
        total = total - loss
    torch.testing.assert_close(total, found.sum())


class Trend(seq.SequentialModel):
    """Reads no data: its gaps are exact."""

    missing_feeds_state = False

    def start(self, rows):
        return torch.zeros(rows)

    def step(self, level, x=None):
        pyro.sample("x", dist.Normal(level[:, None].expand(-1, 2), 1.0).to_event(1), obs=x)
        return level + 1


def test_gaps_are_exact_where_data_is_not_read():
    x = torch.randn(1, 4, 2)
    x[0, 1, 0] = x[0, 2] = torch.nan
    expected = torch.where(x.isnan(), 0.0, dist.Normal(torch.arange(4.0)[:, None], 1.0).log_prob(x.nan_to_num()))
    posterior = seq.ExactLikelihood(Trend()).run(x)
    torch.testing.assert_close(posterior.log_evidence_by_step, expected.sum(-1))


# Drawing.


@every_network
@pytest.mark.parametrize("output", ["binary", "categories", "normal", "audio", "mixture"])
def test_drawing_with_a_kept_state_is_drawing_anew(network, output):
    """The same noise gives the same frames when every frame's distribution is made from the whole past."""
    model, steps = declared(network, output), 8
    pyro.set_rng_seed(3)
    kept = model.simulate([steps] * 4)["x"]
    pyro.set_rng_seed(3)
    anew = torch.zeros_like(kept)
    for t in range(steps):
        with torch.no_grad():
            features, _ = model.contexts(model.start(4), anew[:, :t + 1], None)
            fn = model.output.distribution(model.head(features[:, -1]))
        anew[:, t] = seq.engine.families.sample(fn)
    torch.testing.assert_close(kept.double(), anew.double(), rtol=1e-9, atol=1e-9)


@every_network
def test_the_future_begins_at_each_sequence_s_end(network):
    """The first frame ahead has the distribution that the model gives after the sequence alone."""
    model = declared(network)
    x = data(model)
    posterior = seq.ExactLikelihood(model).run(x, LENGTHS)
    state = model.within(lambda: posterior.final_state(2))
    for b, n in enumerate(LENGTHS):
        with torch.no_grad():
            expected = model.contexts(model.start(1), torch.cat([x[b:b + 1, :n], x[:1, :1]], 1), None)[0][0, -1]
            row = type(state)(*(torch.utils._pytree.tree_map(lambda v, b=b: v[2 * b:2 * b + 1], part) for part in state))
            torch.testing.assert_close(model.contexts(row, x[:1, :1], None)[0][0, 0], expected, rtol=1e-10, atol=1e-10)
    assert posterior.kind == "exact" and posterior.predict(2, num_samples=3).samples["x"].shape == (3, 5, 2, 3)


@every_network
def test_prediction_reads_future_covariates(network):
    model = declared(network, num_covariates=1)
    u = torch.randn(2, 5, 1)
    x = model.simulate([5, 3], u=u)["x"]
    posterior = seq.ExactLikelihood(model).run(x, [5, 3], u=u)
    assert posterior.predict(3, num_samples=2, u=torch.ones(2, 3, 1)).samples["x"].shape == (2, 2, 3, 3)


# The other methods.


@pytest.mark.parametrize("network", ["gru", "convolution", "transformer"])
def test_the_particle_filter_agrees_and_imputes(network):
    model = declared(network)
    x = data(model)
    found = seq.ParticleFilter(model, 2).run(x, LENGTHS)
    torch.testing.assert_close(found.log_evidence, log_evidence(model, x), rtol=1e-9, atol=1e-9)
    x[2, 4, 1] = torch.nan
    assert seq.ParticleFilter(model, 50).run(x, LENGTHS).log_evidence.isfinite().all()


class Bayesian(InParallel):
    def __init__(self):
        seq.AutoregressiveModel.__init__(self)
        self.phi = pyro.nn.PyroSample(dist.Uniform(-0.99, 0.99))


def test_priors_on_parameters():
    """Conditioned outside, and as the likelihood of a program that draws the parameter itself."""
    model, x = Bayesian(), torch.randn(2, 6)
    with poutine.condition(data={"phi": torch.tensor(0.5)}):
        posterior = seq.ExactLikelihood(model).run(x)
    torch.testing.assert_close(posterior.log_evidence, log_evidence(InParallel(0.5), x, None))

    def program():
        return model.within(lambda: seq.ExactLikelihood(model).log_evidence(x).sum())

    phi = torch.tensor(0.3, requires_grad=True)
    with poutine.condition(data={"phi": phi}):
        value = program()
    other = InParallel(0.3)
    torch.testing.assert_close(torch.autograd.grad(value, phi)[0],
                               torch.autograd.grad(log_evidence(other, x, None).sum(), other.phi)[0])


def test_the_elbo_of_a_parameter_with_a_prior():
    model, x = Bayesian(), torch.randn(4, 6)
    guide = seq.PriorGuide(model, global_guide=AutoNormal(poutine.block(model, expose=model.global_sites())))
    guide(x)  # makes the guide's parameters, from draws of its own
    found = []
    for loss in (seq.SequentialELBO(), Trace_ELBO()):
        pyro.set_rng_seed(0)
        found.append(loss.loss(model, guide, x, plate_size=20))
    assert abs(found[0] - found[1]) < 1e-9


def test_a_plain_pyro_function():
    def walk(x, lengths=None):
        last = torch.zeros(len(x))
        with pyro.plate("series", len(x)):
            for t in range(x.shape[1]):
                last = pyro.sample(f"x_{t}", dist.Normal(0.8 * last, 1.0), obs=x[:, t])

    x = torch.randn(2, 4)
    expected = dist.Normal(0.8 * torch.cat([torch.zeros(2, 1), x[:, :-1]], 1), 1.0).log_prob(x).sum(1)
    torch.testing.assert_close(log_evidence(seq.from_pyro(walk), x, None), expected)


# The mixture of logistics.


def mixture(scale=2.0, levels=12, batch=(4,)):
    return DiscretisedLogisticMixture(torch.randn(*batch, 3), 6 + 4 * torch.randn(*batch, 3),
                                      scale * torch.rand(*batch, 3) + 0.05, levels)


@pytest.mark.parametrize("levels", [2, 3, 12, 256])
@pytest.mark.parametrize("scale", [0.1, 2.0, 1e4])
def test_a_discretised_mixture_is_a_distribution(levels, scale):
    fn = mixture(scale, levels)
    values = fn.enumerate_support()
    assert values.shape == (levels, 4)
    torch.testing.assert_close(fn.log_prob(values).logsumexp(0), torch.zeros(4), rtol=0, atol=1e-12)
    torch.testing.assert_close(fn.mean, (fn.log_prob(values).exp() * values).sum(0))
    assert fn.enumerate_support(expand=False).shape == (levels, 1)


def test_a_discretised_mixture_by_the_formula():
    fn = mixture()
    for value in range(12):
        upper = torch.ones(()) if value == 11 else torch.sigmoid((value + 0.5 - fn.loc) / fn.scale)
        lower = torch.zeros(()) if value == 0 else torch.sigmoid((value - 0.5 - fn.loc) / fn.scale)
        expected = (fn.logits.softmax(-1) * (upper - lower)).sum(-1)
        torch.testing.assert_close(fn.log_prob(torch.tensor(float(value)).expand(4)).exp(), expected, rtol=1e-9, atol=1e-13)


def test_a_discretised_mixture_has_the_gradient_it_should():
    fn = mixture(batch=(2,))
    value = torch.tensor([[0.0, 11.0], [3.0, 6.0]])

    def density(logits, loc, scale):
        return DiscretisedLogisticMixture(logits, loc, scale, 12).log_prob(value)

    assert torch.autograd.gradcheck(density, [v.clone().requires_grad_() for v in (fn.logits, fn.loc, fn.scale)])


@pytest.mark.parametrize("loc", [-1e6, 0.0, 127.4, 255.0, 1e6])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e7])
def test_a_discretised_mixture_is_finite_in_float32(loc, scale):
    arguments = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in ([0.0], [loc], [scale])]
    values = torch.arange(256, dtype=torch.float32)
    found = DiscretisedLogisticMixture(*arguments, 256).log_prob(values)
    assert found.dtype == torch.float32 and found.isfinite().all() and (found <= 1e-6).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), arguments))


def test_draws_of_a_discretised_mixture_have_its_probabilities():
    """A chi-squared statistic of 11 degrees of freedom is above 38.5 once in 15 000."""
    fn = mixture(batch=(1,))
    draws = fn.sample((20_000,))[:, 0]
    assert fn.support.check(draws).all() and draws.dtype == fn.loc.dtype
    expected = 20_000 * fn.log_prob(fn.enumerate_support())[:, 0].exp()
    kept = expected > 5
    counts = torch.bincount(draws.long(), minlength=12)
    statistic = ((counts - expected).square() / expected)[kept].sum()
    assert statistic < 38.5 and counts[~kept].sum() < 5 * 12


def test_a_discretised_mixture_expands_and_refuses():
    fn = mixture(batch=(1,)).expand((5,))
    assert fn.sample().shape == (5,) and fn.log_prob(torch.zeros(5)).shape == (5,)
    with pytest.raises(ValueError, match="within the support"):
        DiscretisedLogisticMixture(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), 4, validate_args=True).log_prob(
            torch.tensor([4.0]))


def test_a_continuous_mixture_by_the_formula():
    output = LogisticMixtureOutput(None, 2, like=torch.randn(5, 7) * 3 + 50)
    numbers, x = torch.randn(4, 6), 50 + torch.randn(4)
    logits, loc, scale = numbers.chunk(3, -1)
    loc = output.center + output.spread * (torch.tensor([-1.0, 1.0]) + loc)
    scale = output.spread * (torch.log1p(scale.exp()) + 1e-4)
    z = (x[:, None] - loc) / scale
    density = (logits.softmax(-1) * torch.exp(-z) / (scale * (1 + torch.exp(-z)) ** 2)).sum(-1)
    torch.testing.assert_close(output.distribution(numbers).log_prob(x).exp(), density)


@every_output
def test_outputs_survive_extreme_numbers_in_float32(output):
    torch.set_default_dtype(torch.float32)
    output = OUTPUTS[output]()
    for size in (-200.0, 0.0, 200.0):
        numbers = torch.full((3, output.size), size, requires_grad=True)
        fn = output.distribution(numbers)
        value = output.distribution(torch.zeros(3, output.size)).sample()
        found = fn.log_prob(value)
        assert found.isfinite().all() and found.dtype == torch.float32
        assert torch.autograd.grad(found.sum(), numbers)[0].isfinite().all()


def test_units_of_the_data_do_not_matter():
    """With like=, the same network on data in other units gives the same likelihood, up to the units."""
    x = torch.randn(3, 6, 2)
    found = []
    for scale, shift in ((1.0, 0.0), (1000.0, -4e4)):
        pyro.set_rng_seed(1)
        moved = x * scale + shift
        model = RecurrentNetwork(NormalOutput(2, like=moved), 4, name=str(scale))
        found.append(log_evidence(model, moved, None) + 12 * math.log(scale))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


# Integer data, saving, types.


def test_integer_data_with_a_gap_at_the_end():
    model = declared("gru", "categories")
    x = model.simulate([6, 6])["x"]
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    garbage = x.clone()
    garbage[1, 4:] = -1
    torch.testing.assert_close(log_evidence(model, garbage, None, mask=mask),
                               torch.cat([log_evidence(model, x[:1], None), log_evidence(model, x[1:, :4], None)]))


@every_network
@pytest.mark.parametrize("output", ["scalar normal", "categories", "audio"])
def test_saved_and_loaded(network, output):
    model, other = declared(network, output, name="one"), declared(network, output, name="two")
    x = data(model)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(log_evidence(other, x), log_evidence(model, x), rtol=0, atol=0)


@every_network
def test_float32(network):
    model = declared(network, "binary")
    x = data(model)
    exact = log_evidence(model, x)
    found = log_evidence(model.float(), x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    model = CausalConvolution(NormalOutput(), 2, dilations=(1, 2))
    x = torch.randn(2, 5)

    def evidence(*values):
        names = [f"model.{name}" for name, _ in model.named_parameters()]
        return torch.func.functional_call(_Evidence(model), dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(evidence, [p.detach().clone().requires_grad_() for p in model.parameters()])


class _Evidence(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return seq.ExactLikelihood(self.model).log_evidence(x, [5, 3])


# What a user can get wrong.

MISTAKES = {
    "a latent": (lambda: seq.ExactLikelihood(LocalLevel()).run(torch.zeros(2, 3)),
                 "site 'z' of LocalLevel is latent.*ParticleFilter.*KalmanFilter"),
    "a gap": (lambda: seq.ExactLikelihood(RecurrentNetwork(NormalOutput(), 4)).run(
        torch.tensor([[0.0, torch.nan, 1.0]])), "missing in sequence 0 at time 2.*RecurrentNetwork reads it.*ParticleFilter"),
    "part of a frame": (lambda: log_evidence(RecurrentNetwork(NormalOutput(2), 4),
                                             torch.tensor([[[0.0, 1.0], [torch.nan, 1.0]]]), None),
                        "missing in sequence 0 at time 2"),
    "not a model": (lambda: seq.ExactLikelihood(nn.Linear(1, 1)), "ExactLikelihood takes a SequentialModel.*Linear"),
    "frames of another width": (lambda: log_evidence(RecurrentNetwork(3, 4), torch.zeros(1, 5, 2), None),
                                r"'x' has shape \(1, 5, 2\).*BernoulliOutput, \(B, T, 3\)"),
    "scalar frames": (lambda: log_evidence(RecurrentNetwork(NormalOutput(), 4), torch.zeros(1, 5, 1), None),
                      r"NormalOutput, \(B, T\)"),
    "no covariates": (lambda: log_evidence(RecurrentNetwork(3, 4, num_covariates=2), torch.zeros(1, 5, 3), None),
                      "covariates have no entries.*num_covariates=2"),
    "other covariates": (lambda: log_evidence(RecurrentNetwork(3, 4), torch.zeros(1, 5, 3), None, u=torch.zeros(1, 5)),
                         r"covariates have \{'u': 1\} entries.*num_covariates=0"),
    "two kinds of data": (lambda: log_evidence(
        RecurrentNetwork(3, 4), {"x": torch.zeros(1, 5, 3), "y": torch.zeros(1, 5)}, None), r"kind of data, 'x', and \['y'\]"),
    "outside the support": (lambda: log_evidence(RecurrentNetwork(CategoricalOutput(None, 3), 4), torch.tensor([[0, 3]]), None),
                            "sequence 0 at time 2 lies outside the support of Categorical"),
    "a cell": (lambda: RecurrentNetwork(3, 4, cell="rnn"), "cell='rnn'; it is 'gru' or 'lstm'"),
    "hidden": (lambda: RecurrentNetwork(3, 0), "hidden=0; it is at least 1"),
    "an output": (lambda: RecurrentNetwork("normal", 4), "output='normal' is not an integer"),
    "no dilations": (lambda: CausalConvolution(3, 4, dilations=()), "dilations is empty"),
    "heads": (lambda: CausalTransformer(3, 6, heads=4), "hidden=6 with heads=4"),
    "one class": (lambda: CategoricalOutput(2, 1), "classes=1; it is at least 2"),
    "correlated scalars": (lambda: NormalOutput(correlated=True), "correlated=True with scalar frames"),
    "units of levels": (lambda: LogisticMixtureOutput(2, levels=4, like=torch.zeros(1, 2, 2)), "like= is for real entries"),
    "like other frames": (lambda: NormalOutput(2, like=torch.zeros(1, 2, 3)), r"like= has data of shapes \[\(1, 2, 3\)\]"),
    "an output without a distribution": (lambda: Output(2, 1).distribution(torch.zeros(1, 2)), "does not define distribution"),
    "no contexts": (lambda: log_evidence(type("Bare", (seq.AutoregressiveModel,), {"start": lambda s, rows: torch.zeros(rows),
                                                                                 "step": lambda s, h, x=None: h})(),
                                         torch.zeros(1, 2), None), "Bare does not define contexts"),
    "a latent beside contexts": (lambda: log_evidence(type("Odd", (InParallel,), {
        "emission": lambda s, h, x=None: pyro.sample("z", dist.Normal(h["last"], 1.0))})(), torch.zeros(1, 2), None),
        "site 'z' of Odd is not observed by its emission"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    run, message = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=message):
        run()


def test_there_are_no_latents_to_look_at():
    posterior = seq.ExactLikelihood(RecurrentNetwork(2, 3)).run(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="no latent sites to make a table of"):
        posterior.to_dataframe()
    with pytest.raises(ValueError, match=r"no latent sites to plot.*predict"):
        posterior.plot()
