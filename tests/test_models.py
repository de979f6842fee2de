"""The models of the literature and their published inference, against the papers' equations written out again here."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import ragged
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from test_agreement import LENGTHS, Replayed, assert_same, gradients, with_gaps
from test_invariance import assert_close, terms_of

import pyro_seq as seq
from pyro_seq.engine.families import Family
from pyro_seq.engine.loop import forward
from pyro_seq.infer.run import entered
from pyro_seq.models import (
    SRNN,
    VRNN,
    AugmentedDeepMarkovModel,
    DeepMarkovModel,
    SRNNInference,
    StructuredInference,
    VRNNInference,
    match_marginals,
)

# The papers' equations in numpy, one sequence and one frame at a time. Weights go by their names in state_dict.


def relu(v):
    return np.maximum(v, 0)


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def softplus(v):
    return np.log1p(np.exp(v))


def normal(x, loc, scale):
    return float(np.sum(-0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)))


def bernoulli(x, logits):
    return float(np.sum(x * np.log(sigmoid(logits)) + (1 - x) * np.log(1 - sigmoid(logits))))


class Weights(dict):
    def __init__(self, module):
        super().__init__({k: v.detach().cpu().numpy() for k, v in module.state_dict().items()})

    def linear(self, name, v):
        return self[f"{name}.weight"] @ v + self[f"{name}.bias"]

    def mlp(self, name, v, hidden=1):
        for i in range(hidden):
            v = relu(self.linear(f"{name}.{2 * i}", v))
        return self.linear(f"{name}.{2 * hidden}", v)

    def halves(self, name, v):
        loc, spread = np.split(self.linear(name, v), 2)
        return loc, softplus(spread)

    def lstm(self, name, inputs):
        h = c = np.zeros(self[f"{name}.weight_hh_l0"].shape[1])
        out = []
        for x in inputs:
            i, f, g, o = np.split(self[f"{name}.weight_ih_l0"] @ x + self[f"{name}.bias_ih_l0"]
                                  + self[f"{name}.weight_hh_l0"] @ h + self[f"{name}.bias_hh_l0"], 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        return out

    def gru(self, name, x, h, layer="_l0"):
        r, u, n = np.split(self[f"{name}.weight_ih{layer}"] @ x + self[f"{name}.bias_ih{layer}"], 3)
        rh, uh, nh = np.split(self[f"{name}.weight_hh{layer}"] @ h + self[f"{name}.bias_hh{layer}"], 3)
        r, u = sigmoid(r + rh), sigmoid(u + uh)
        return (1 - u) * np.tanh(n + r * nh) + u * h

    def gated_residual(self, features, loc, scale):
        own_loc, own_scale = self.halves("head.own.linear", features)
        gate, gate_scale = np.split(sigmoid(self.linear("head.gate", features)), 2)
        return (1 - gate) * loc + gate * own_loc, scale ** (1 - gate_scale) * own_scale**gate_scale


def dmm_prior(w, z, x):
    """Krishnan et al. 2017, section 5: g_t, h_t, mu, sigma; x is the last frame in the augmented model, empty without."""
    u = np.concatenate([z, x])
    gate, proposed = sigmoid(w.mlp("gated.gate", u)), w.mlp("gated.proposed", u)
    return (1 - gate) * w.linear("gated.linear", z) + gate * proposed, softplus(w.linear("gated.spread", relu(proposed)))


def dmm(augmented, emission):
    def log_p(w, z, x):
        past, last, total = w["z_0"], np.zeros(x.shape[1] if augmented else 0), 0.0
        for zt, xt in zip(z, x):
            total += normal(zt, *dmm_prior(w, past, last))
            out = w.mlp("emit.network", np.concatenate([zt, last]), hidden=2)
            loc, spread = np.split(out, 2) if emission == "normal" else (out, None)
            total += bernoulli(xt, out) if emission == "bernoulli" else normal(xt, loc, softplus(spread))
            past, last = zt, xt if augmented else last
        return total

    def log_q(reads, residual):
        def of(w, g, z, x):
            past, last, total = w["z_0"], np.zeros(x.shape[1] if augmented else 0), 0.0
            left = g.lstm("left", x) if reads != "future" else [0] * len(x)
            right = g.lstm("right", x[::-1])[::-1] if reads != "past" else [0] * len(x)
            for zt, xt, hl, hr in zip(z, x, left, right):
                combined = (np.tanh(g.linear("from_latent", past)) + hl + hr) / (3 if reads == "both" else 2)
                total += normal(zt, *(g.gated_residual(combined, *dmm_prior(w, past, last)) if residual else
                                      g.halves("head.linear", combined)))
                past, last = zt, xt if augmented else last
            return total
        return of

    return log_p, log_q


def vrnn_walk(w, z, x):
    """Chung et al. 2015: (h_{t-1}, the prior's moments) at each step."""
    h = w["h_0"]
    for zt, xt in zip(z, x):
        yield h, *w.halves("prior.2.linear", relu(w.linear("prior.0", h)))
        h = w.gru("gru", np.concatenate([relu(w.linear("embed_x.0", xt)), relu(w.linear("embed_z.0", zt))]), h, "")


def vrnn_log_p(w, z, x):
    return sum(normal(zt, *moments) + bernoulli(xt, w.mlp("emit.network", np.concatenate([relu(w.linear("embed_z.0", zt)), h])))
               for zt, xt, (h, *moments) in zip(z, x, vrnn_walk(w, z, x)))


def vrnn_log_q(residual):
    def of(w, g, z, x):
        total = 0.0
        for zt, xt, (h, *moments) in zip(z, x, vrnn_walk(w, z, x)):
            features = relu(g.linear("features.0", np.concatenate([relu(w.linear("embed_x.0", xt)), h])))
            total += normal(zt, *(g.gated_residual(features, *moments) if residual else g.halves("head.linear", features)))
        return total
    return of


def srnn_recurrence(w, x):
    """Fraccaro et al. 2016: d_t = f(d_{t-1}, u_t), where u_t is the last frame."""
    d, last, out = np.zeros(w["gru.weight_hh_l0"].shape[1]), np.zeros(x.shape[1]), []
    for xt in x:
        d = w.gru("gru", last, d)
        last = xt
        out.append(d)
    return out


def srnn_prior(w, z, d):
    return w.halves("prior.2.linear", relu(w.linear("prior.0", np.concatenate([z, d]))))


def srnn_log_p(w, z, x):
    past, total = np.zeros(z.shape[1]), 0.0
    for zt, xt, d in zip(z, x, srnn_recurrence(w, x)):
        total += normal(zt, *srnn_prior(w, past, d)) + bernoulli(xt, w.mlp("emit.network", np.concatenate([zt, d])))
        past = zt
    return total


def srnn_log_q(smoothing):
    def of(w, g, z, x):
        inputs = [np.concatenate([d, xt]) for d, xt in zip(srnn_recurrence(w, x), x)]
        if smoothing:
            a, encoded = np.zeros(len(g["encode.bias_hh_l0"]) // 3), []
            for value in inputs[::-1]:
                a = g.gru("encode", value, a)
                encoded.insert(0, a)
        else:
            encoded = [g.mlp("encode", value) for value in inputs]
        past, total = np.zeros(z.shape[1]), 0.0
        for zt, d, a in zip(z, srnn_recurrence(w, x), encoded):
            shift, scale = g.halves("head.2.linear", relu(g.linear("head.0", np.concatenate([past, a]))))
            total += normal(zt, srnn_prior(w, past, d)[0] + shift, scale)
            past = zt
        return total
    return of


PAPERS = {
    f"{'DMM-Aug' if augmented else 'DMM'} {reads}{' residual' if residual else ''} {emission}": (
        lambda kind=AugmentedDeepMarkovModel if augmented else DeepMarkovModel, emission=emission: kind(
            3, 2, 4, 5, emission=emission),
        lambda model, reads=reads, residual=residual: StructuredInference(model, reads=reads, hidden=4, residual=residual),
        dmm(augmented, emission)[0], dmm(augmented, emission)[1](reads, residual))
    for augmented in (False, True) for reads in ("past", "future", "both") for residual in (False, True)
    for emission in (("bernoulli", "normal") if reads == "both" else ("bernoulli",))}
PAPERS |= {f"VRNN{' residual' if residual else ''}": (
    lambda: VRNN(3, 2, 4), lambda model, residual=residual: VRNNInference(model, residual=residual),
    vrnn_log_p, vrnn_log_q(residual)) for residual in (False, True)}
PAPERS |= {f"SRNN {'smoothing' if smoothing else 'filtering'}": (
    lambda: SRNN(3, 2, 4), lambda model, smoothing=smoothing: SRNNInference(model, smoothing=smoothing),
    srnn_log_p, srnn_log_q(smoothing)) for smoothing in (False, True)}


def set_by_hand(*modules):
    """No weight as it was initialised: a sine of its place."""
    for m, module in enumerate(modules):
        for k, p in enumerate(module.parameters()):
            p.data = 0.6 * torch.sin(torch.arange(p.numel()) * 0.7 + 1.3 * k + m).reshape(p.shape)


@pytest.mark.parametrize("case", PAPERS)
def test_the_papers_equations(case, monkeypatch):
    make, make_guide, log_p, log_q = PAPERS[case]
    model = make()
    guide = make_guide(model)
    set_by_hand(model, guide)
    lengths = [4, 2, 3]
    x = torch.bernoulli(torch.full((3, 4, 3), 0.5)) if "normal" not in case else torch.rand(3, 4, 3)
    z = torch.randn(3, 4, 2)
    w, g = Weights(model), Weights(guide)
    each = [(z[b, :n].cpu().numpy(), x[b, :n].cpu().numpy()) for b, n in enumerate(lengths)]
    expected = (sum(log_p(w, *one) for one in each), sum(log_q(w, g, *one) for one in each))

    # As Pyro programs.
    given = poutine.trace(guide).get_trace(x, lengths)
    for t in range(4):
        given.nodes[f"z_{t + 1}"]["value"] = z[:, t]
    for program, value in zip((model, guide), expected):
        trace = poutine.trace(poutine.replay(program, trace=given)).get_trace(ragged(x, lengths).clamp(max=1), lengths)
        assert trace.log_prob_sum().item() == pytest.approx(value, abs=1e-10)

    # In the engine.
    def draw(fn, name, frame):
        return z[frame.sequence, frame.t - 1]

    monkeypatch.setattr("pyro_seq.engine.sites.draw", draw)
    monkeypatch.setattr("pyro_seq.engine.loop.draw", draw)
    loss = seq.SequentialELBO(analytic_kl=False).loss(model, guide, ragged(x, lengths).clamp(max=1), lengths)
    assert loss == pytest.approx(expected[1] - expected[0], abs=1e-10)


# Every model with every guide.


MODELS = {
    "DMM": lambda emission="bernoulli": DeepMarkovModel(3, 2, 4, 5, emission=emission),
    "DMM-Aug": lambda emission="bernoulli": AugmentedDeepMarkovModel(3, 2, 4, 5, emission=emission),
    "VRNN": lambda emission="bernoulli": VRNN(3, 2, 4, emission=emission),
    "SRNN": lambda emission="bernoulli": SRNN(3, 2, 4, emission=emission),
}
OWN = {
    "DMM": {f"own {reads}{residual}": lambda m, like, reads=reads, residual=residual: StructuredInference(
        m, reads=reads, hidden=4, residual=bool(residual)) for reads, residual in
        (("past", ""), ("future", ""), ("both", ""), ("past", " residual"))},
    "VRNN": {"own": lambda m, like: VRNNInference(m), "own residual": lambda m, like: VRNNInference(m, residual=True)},
    "SRNN": {"own": lambda m, like: SRNNInference(m), "own filtering": lambda m, like: SRNNInference(m, smoothing=False)},
}
OWN["DMM-Aug"] = OWN["DMM"]
ANY = {
    "filtering": lambda m, like: seq.FilteringGuide(m, like=like, hidden=5),
    "filtering direct": lambda m, like: seq.FilteringGuide(m, like=like, hidden=5, residual=False, cell="lstm"),
    "smoothing": lambda m, like: seq.SmoothingGuide(m, like=like, hidden=5),
    "avf": lambda m, like: seq.AmortizedVariationalFilter(m, like=like, hidden=5),
    "avf paper": lambda m, like: seq.AmortizedVariationalFilter(m, like=like, hidden=5, preset="paper"),
    "avf without gradient": lambda m, like: seq.AmortizedVariationalFilter(m, like=like, hidden=5, gradient=False),
    "avf gru": lambda m, like: seq.AmortizedVariationalFilter(m, like=like, hidden=5, cell="gru"),
    "prior": lambda m, like: seq.PriorGuide(m),
}
PAIRS = [(model, guide) for model in MODELS for guide in (*OWN[model], *ANY)]


def built(model, guide, like=None, emission="bernoulli"):
    """A model and a guide with weights that depend on everything they read."""
    made = MODELS[model](emission)
    proposer = {**OWN[model], **ANY}[guide](made, like)
    for module, size in ((made, 0.2), (proposer, 0.05)):
        for p in module.parameters():
            p.data += size * torch.randn_like(p)
    return made, proposer


def frames(*shape, emission="bernoulli"):
    return torch.randn(*shape) if emission == "normal" else torch.bernoulli(torch.full(shape, 0.4))


@pytest.mark.parametrize("emission, missing", [("bernoulli", False), ("bernoulli", True), ("normal", True)])
@pytest.mark.parametrize("model, guide", PAIRS)
def test_sequential_elbo_equals_pyro(model, guide, emission, missing, monkeypatch, row_noise):
    x = ragged(frames(4, 6, 3, emission=emission), LENGTHS)
    if emission == "bernoulli":
        x[x > 1] = 1.0
    batch = seq.Sequences.of(with_gaps(x) if missing else x, LENGTHS)
    model, guide = built(model, guide, batch, emission)
    replayed = Replayed(guide, batch, monkeypatch, row_noise)
    binary_gaps = missing and emission == "bernoulli" and model.missing_feeds_state  # drawn, without a pathwise gradient
    losses = ((False, Trace_ELBO()), (True, TraceMeanField_ELBO()))
    for analytic, pyros in losses[:1] if isinstance(guide, seq.PriorGuide) or binary_gaps else losses:
        expected = pyros.differentiable_loss(model, replayed, batch)
        actual = seq.SequentialELBO(analytic_kl=analytic).differentiable_loss(model, guide, batch)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        # The score-function gradient of binary gaps has another baseline here, and the published AVF is greedy.
        if not guide.greedy and not binary_gaps:
            assert_same(gradients(actual, model, guide), gradients(expected, model, guide), 1e-9)


@pytest.mark.parametrize("model, guide", PAIRS)
def test_padding_changes_nothing(model, guide, row_noise):
    x = ragged(frames(4, 6, 3), LENGTHS)
    model, guide = built(model, guide, seq.Sequences.of(x.clamp(max=1), LENGTHS))
    whole = terms_of(model, guide, x.clamp(max=1), LENGTHS, {}, 2)
    longer = torch.cat([x, torch.full_like(x[:, :3], 1.0)], 1).clamp(max=1)
    assert_close(terms_of(model, guide, longer, LENGTHS, {}, 2), whole)
    alone = []
    for b, n in enumerate(LENGTHS):
        row_noise.ids = [b]
        alone.append(terms_of(model, guide, x[b:b + 1, :n], [n], {}, 2))
    assert_close((sum(loss for loss, _ in alone), [sum(g) for g in zip(*(g for _, g in alone))]), whole)


def proposals(model, guide, x):
    """The parameters of the guide's proposal of each step."""
    sequences = seq.Sequences.of(x)

    def run(_):
        return torch.stack([Family(step.sites["z"].q, "z").parameters(step.sites["z"].q)
                            for step in forward(model, guide, sequences)], 1)

    return entered(model, guide, sequences, run)


@pytest.mark.parametrize("model, guide", [pair for pair in PAIRS if pair[1] != "prior"])
def test_what_a_filter_proposes_does_not_depend_on_later_frames(model, guide, row_noise):
    x = frames(8, 6, 3)  # of two latents the paper's AVF reads which has the larger gradient, and that alone
    model, guide = built(model, guide, seq.Sequences.of(x))
    changed = x.clone()
    changed[:, 4:] = 1 - x[:, 4:]
    before, after = proposals(model, guide, x), proposals(model, guide, changed)
    assert guide.reads_future == (not torch.equal(before[:, :4], after[:, :4]))
    assert (before[:, 4:] != after[:, 4:]).any()


# Evidence.


@pytest.mark.parametrize("model, guide", PAIRS)
def test_the_bound_lies_below_the_evidence(model, guide):
    """One-sided at 4 standard errors, 3e-5 a test; the filter through the guide agrees with the bootstrap filter, two-sided
    at 5."""
    x = frames(2, 3, 3)
    model, guide = built(model, guide, seq.Sequences.of(x))
    if isinstance(guide, seq.PriorGuide):
        guide = None
    else:
        found = seq.Variational(model, guide, num_samples=2000).run(x)
    evidence = seq.ParticleFilter(model, 500, num_runs=40).run(x)
    guided = seq.ParticleFilter(model, 500, num_runs=40, guide=guide).run(x)
    both = (evidence.standard_error**2 + guided.standard_error**2).sqrt()
    assert ((evidence.log_evidence - guided.log_evidence).abs() < 5 * both).all()
    if guide is not None:
        both = (evidence.standard_error**2 + found.standard_error**2).sqrt()
        assert (found.log_evidence < evidence.log_evidence + 4 * both).all()


def test_a_deep_markov_model_that_is_linear_has_the_exact_evidence():
    """With a closed gate and rectifiers far above zero, a DMM is a linear system, whose frames are jointly normal."""
    model = DeepMarkovModel(2, 2, 2, 2, emission="normal")
    a, c = torch.tensor([[0.9, 0.2], [-0.1, 0.7]]), torch.tensor([[1.0, 0.5], [0.3, -0.8]])
    q, r = 0.6, 0.8
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.z_0.copy_(torch.tensor([0.5, -1.0]))
        model.gated.gate[2].bias.fill_(-1e3)
        model.gated.linear.weight.copy_(a)
        model.gated.spread.bias.fill_(math.log(math.expm1(q)))
        first, second, last = model.emit.network[0], model.emit.network[2], model.emit.network[4]
        first.weight.copy_(torch.eye(2))
        first.bias.fill_(50.0)
        second.weight.copy_(torch.eye(2))
        last.weight[:2] = c
        last.bias[:2] = -50 * c.sum(1)
        last.bias[2:] = math.log(math.expm1(r))
    x = model.simulate([4, 4])["x"]
    mean, means, covariance = model.z_0.detach(), [], torch.zeros(8, 8)
    state = torch.zeros(2, 2)
    blocks = []
    for t in range(4):
        mean = a @ mean
        means.append(c @ mean)
        state = a @ state @ a.T + q**2 * torch.eye(2)
        blocks.append(state)
        for s in range(t + 1):
            cross = c @ torch.linalg.matrix_power(a, t - s) @ blocks[s] @ c.T + (r**2 * torch.eye(2) if s == t else 0)
            covariance[2 * t:2 * t + 2, 2 * s:2 * s + 2] = cross
            covariance[2 * s:2 * s + 2, 2 * t:2 * t + 2] = cross.T
    exact = dist.MultivariateNormal(torch.cat(means), covariance).log_prob(x.flatten(1))
    torch.testing.assert_close(seq.KalmanFilter(model, assume_linear=True).run(x).log_evidence, exact, rtol=1e-9, atol=1e-9)
    found = seq.ParticleFilter(model, 1000, num_runs=40).run(x)
    assert ((found.log_evidence - exact).abs() < 5 * found.standard_error).all()


# Beginnings, endings and keeping.


def test_match_marginals_of_notes():
    x = frames(5, 8, 3)
    x[..., 2] = 0.0
    x[1, 2, 0] = torch.nan
    lengths = torch.tensor([8, 3, 8, 1, 6])
    for make in MODELS.values():
        model = make()
        last = model.emit.network[-1]
        weight = last.weight.clone()
        match_marginals(model, seq.Sequences.of(ragged(x, lengths), lengths))
        kept = torch.cat([x[b, :n] for b, n in enumerate(lengths)])
        expected = (kept.nansum(0) + 0.5) / ((~kept.isnan()).sum(0) + 1)
        torch.testing.assert_close(torch.sigmoid(last.bias), expected)
        assert torch.equal(last.weight, weight)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e5])
def test_match_marginals_of_real_frames(scale):
    torch.set_default_dtype(torch.float32)
    x = scale * (torch.randn(6, 50, 3) + 2)
    x[0, 0] = torch.nan
    model = MODELS["SRNN"]("normal")
    match_marginals(model, x)
    loc, spread = model.emit.network[-1].bias.chunk(2)
    kept = x.flatten(0, 1)[1:]
    torch.testing.assert_close(loc, kept.mean(0))
    torch.testing.assert_close(torch.nn.functional.softplus(spread), kept.std(0, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("emission", ["bernoulli", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_simulation_prediction_and_types(name, dtype, emission):
    torch.set_default_dtype(dtype)
    model = MODELS[name](emission)
    drawn = model.simulate([5, 3])
    assert drawn["x"].shape == (2, 5, 3) and drawn["z"].shape == (2, 5, 2) and drawn["x"].dtype == dtype
    assert (drawn["x"][1, 3:] == 0).all() and (emission == "normal" or set(drawn["x"].unique().tolist()) <= {0.0, 1.0})
    for make in {**OWN[name], **ANY}.values():
        pyro.clear_param_store()
        guide = make(model, None)
        loss = seq.SequentialELBO().differentiable_loss(model, guide, drawn["x"], [5, 3])
        assert loss.dtype == dtype and loss.isfinite()
    posterior = seq.ParticleFilter(model, 20, guide=guide).run(drawn["x"], [5, 3])
    ahead = posterior.predict(4, num_samples=7)
    assert ahead.samples["x"].shape == (7, 2, 4, 3) and ahead.times.tolist() == [[6, 7, 8, 9], [4, 5, 6, 7]]


def test_simulated_frames_follow_the_last_frame_where_the_model_reads_it():
    """An augmented model whose frames repeat the last: what is simulated does so."""
    model = MODELS["DMM-Aug"]()
    with torch.no_grad():
        for p in model.emit.network.parameters():
            p.zero_()
        for i in range(3):
            model.emit.network[0].weight[i, 2 + i] = model.emit.network[2].weight[i, i] = 1.0
            model.emit.network[4].weight[i, i] = 2e3
        model.emit.network[4].bias.fill_(-1e3)
    assert (model.simulate([6])["x"] == 0).all()
    state = {"z": torch.zeros(1, 2), "x": torch.tensor([[1.0, 0.0, 1.0]])}
    with poutine.block():
        assert torch.equal(model.step(state)["x"], state["x"])


@pytest.mark.parametrize("model, guide", PAIRS)
def test_state_dicts_hold_all_there_is(model, guide, tmp_path):
    """Loaded into a model and guide that began elsewhere, on other data, they give the same bound."""
    x = frames(3, 5, 3)
    first, second = built(model, guide, seq.Sequences.of(x)), built(model, guide, None)
    for k, module in enumerate(first):
        torch.save(module.state_dict(), tmp_path / str(k))
        second[k].load_state_dict(torch.load(tmp_path / str(k), weights_only=True))
    losses = []
    for pair in (first, second):
        pyro.clear_param_store()
        torch.manual_seed(1)
        losses.append(seq.SequentialELBO().loss(*pair, x))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("guide", ["filtering", "smoothing", "avf"])
def test_state_dicts_hold_whether_a_latent_follows_its_past(guide):
    """A guide looks at the model it is built on; loaded, it is the one that was saved and not the one it would now be."""
    walking = MODELS["DMM"]()
    with torch.no_grad():
        walking.gated.gate[-1].bias.fill_(-10.0)
        walking.gated.linear.weight.mul_(1.5)
        walking.gated.spread.weight.zero_()
        walking.gated.spread.bias.fill_(-3.0)
    resting = MODELS["DMM"]()
    with torch.no_grad():
        resting.gated.gate[-1].bias.fill_(10.0)
        resting.gated.proposed[-1].weight.zero_()
    x = frames(3, 5, 3)
    saved, fresh = ANY[guide](walking, x), ANY[guide](resting, x)
    assert saved.follows["z"] and not fresh.follows["z"]
    for p in saved.parameters():
        p.data += 0.05 * torch.randn_like(p)
    losses = []
    fresh.load_state_dict(saved.state_dict())
    resting.load_state_dict(walking.state_dict())
    for pair in ((walking, saved), (resting, fresh)):
        pyro.clear_param_store()
        torch.manual_seed(1)
        losses.append(seq.SequentialELBO().loss(*pair, x))
    assert losses[0] == losses[1]


MISTAKES = {
    "reads": (ValueError, "reads='present'; it is 'past'", lambda: StructuredInference(MODELS["DMM"](), reads="present")),
    "structured on VRNN": (TypeError, "made for a deep Markov model, not VRNN: use FilteringGuide",
                           lambda: StructuredInference(MODELS["VRNN"]())),
    "VRNN's on SRNN": (TypeError, "made for a VRNN, not SRNN: use FilteringGuide", lambda: VRNNInference(MODELS["SRNN"]())),
    "SRNN's on DMM": (TypeError, "made for an SRNN, not DeepMarkovModel: use", lambda: SRNNInference(MODELS["DMM"]())),
    "emission": (ValueError, "emission='poisson'; it is 'bernoulli' for binary frames", lambda: MODELS["VRNN"]("poisson")),
    "cell": (ValueError, "cell='tcn'; it is one of", lambda: seq.AmortizedVariationalFilter(MODELS["DMM"](), cell="tcn")),
    "cell with paper": (ValueError, "None with preset='paper'",
                        lambda: seq.AmortizedVariationalFilter(MODELS["DMM"](), cell="gru", preset="paper")),
    "marginals of another model": (TypeError, "knows the models whose emission is `emit`, not PriorGuide",
                                   lambda: match_marginals(seq.PriorGuide(MODELS["DMM"]()), frames(2, 3, 3))),
    "marginals of other frames": (ValueError, r"shape \(2, 3, 4\).*frames of 3 entries, x \(B, T, 3\)",
                                  lambda: match_marginals(MODELS["DMM"](), frames(2, 3, 4))),
    "marginals of scalars": (ValueError, r"shape \(2, 3\).*frames of 3 entries", lambda: match_marginals(
        MODELS["DMM"](), frames(2, 3))),
    "marginals of images": (ValueError, r"shape \(2, 5, 3, 3\).*3 entries",
                            lambda: match_marginals(MODELS["DMM"](), frames(2, 5, 3, 3))),
    "marginals of another name": (ValueError, r"the data is \['y'\]", lambda: match_marginals(
        MODELS["DMM"](), {"y": frames(2, 3, 3)})),
    "frames of another width": (ValueError, r"'x' has shape \(2, 3, 4\); DeepMarkovModel has frames of 3",
                                lambda: seq.SequentialELBO().loss(
        *(lambda m: (m, seq.PriorGuide(m)))(MODELS["DMM"]()), frames(2, 3, 4))),
    "nothing selected": (ValueError, "no sequence is selected", lambda: seq.Sequences.of(frames(2, 3, 3)).select([])),
    "another type": (TypeError, "torch.float32 and the parameters of VRNN are torch.float64",
                     lambda: seq.SequentialELBO().loss(*(lambda m: (m, VRNNInference(m)))(MODELS["VRNN"]()),
                                                       frames(2, 3, 3).float())),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    kind, says, program = MISTAKES[name]
    with pytest.raises(kind, match=says):
        program()
