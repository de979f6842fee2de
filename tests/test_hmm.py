"""Exact inference over discrete latents: brute force, other libraries, other routes to the same number."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import HiddenMarkov, ragged
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

import pyro_seq as seq
from pyro_seq.infer import chain, log_chain
from pyro_seq.infer.enumerate import Tables

INF = torch.inf


# Models. Each is small enough to enumerate every path.


class Tabular(seq.StateSpaceModel):
    """A hidden Markov model from its tables."""

    def __init__(self, initial, transition, emission, scale=None):
        super().__init__()
        self.pi, self.a, self.b, self.scale = initial, transition, emission, scale

    def initial(self):
        return pyro.sample("k", dist.Categorical(self.pi))

    def transition(self, k):
        return pyro.sample("k", dist.Categorical(self.a[k]))

    def emission(self, k, x=None):
        fn = dist.Categorical(self.b[k]) if self.scale is None else dist.Normal(self.b[k], self.scale[k])
        return pyro.sample("x", fn, obs=x)


class Driven(seq.StateSpaceModel):
    """Covariates in every part, time in the transition, a vector of data, a derived state."""

    derived = False

    def __init__(self):
        super().__init__()
        self.w = torch.randn(3, 3)
        self.locs = torch.randn(3, 2)

    def initial(self, u):
        return self.leave(pyro.sample("k", dist.Categorical(logits=u[:, :1] * self.w[0])))

    def transition(self, k, u, t):
        k = k.argmax(-1) if self.derived else k
        return self.leave(pyro.sample("k", dist.Categorical(logits=self.w[k] * u[:, 1:] + torch.sin(t[:, None] * self.w[0]))))

    def leave(self, k):
        return torch.eye(3)[k] if self.derived else k

    def emission(self, k, u, x=None):
        k = k.argmax(-1) if self.derived else k
        return pyro.sample("x", dist.Normal(self.locs[k] + u[:, :1], 0.7).to_event(1), obs=x)


class DrivenDerived(Driven):
    derived = True


class OnlyTime(HiddenMarkov):
    """Transitions that vary with time and with nothing else."""

    def transition(self, k, t):
        return pyro.sample("k", dist.Categorical(logits=self.logits[k] * torch.cos(t[:, None].to(self.logits))))


class Embedded(HiddenMarkov):
    """The state is a function of the latent."""

    def initial(self):
        return torch.eye(2)[pyro.sample("k", dist.Categorical(logits=self.start_logits))]

    def transition(self, e):
        return torch.eye(2)[pyro.sample("k", dist.Categorical(logits=e @ self.logits))]

    def emission(self, e, x=None):
        return pyro.sample("x", dist.Normal(e @ self.locs, 0.8), obs=x)


class TwoLatents(seq.StateSpaceModel):
    """A vector of switches, then a regime that depends on it; two observed sites of different kinds."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.locs = torch.randn(3, 2), torch.randn(3, 3), torch.randn(3)

    def _regime(self, s, base):
        return pyro.sample("k", dist.Categorical(logits=base + s @ self.w.T))

    def initial(self):
        s = pyro.sample("s", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        return {"k": self._regime(s, torch.zeros(3)), "s": s}

    def transition(self, state):
        s = pyro.sample("s", dist.Bernoulli(0.2 + 0.5 * state["s"]).to_event(1))
        return {"k": self._regime(s, self.v[state["k"]]), "s": s}

    def emission(self, state, x=None, n=None):
        pyro.sample("x", dist.Normal(self.locs[state["k"]] + state["s"][:, 0], 0.5), obs=x)
        pyro.sample("n", dist.Poisson(torch.exp(0.3 * state["k"] + state["s"][:, 1])), obs=n)


class SwitchingAR(seq.SequentialModel):
    """Hamilton's form: x_t - m(s_t) = phi (x_{t-1} - m(s_{t-1})) + noise."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(2, 2))
        self.m = nn.Parameter(torch.randn(2))
        self.phi = nn.Parameter(torch.tensor(0.6))

    def start(self, rows):
        return {"s": torch.zeros(rows, dtype=torch.long), "x": torch.zeros(rows)}

    def step(self, state, x=None):
        s = pyro.sample("s", dist.Categorical(logits=self.logits[state["s"]]))
        loc = self.m[s] + self.phi * (state["x"] - self.m[state["s"]])
        x = pyro.sample("x", dist.Normal(loc, 0.5 + 0.3 * s), obs=x)
        return {"s": s, "x": x}


class Mixture(HiddenMarkov):
    """A latent inside the emission."""

    def emission(self, k, x=None):
        c = pyro.sample("c", dist.Categorical(logits=self.logits[k]))
        return pyro.sample("x", dist.Normal(self.locs[k] + 2.0 * c, 0.8), obs=x)


def cases():
    u = torch.randn(3, 4, 4)
    x = torch.randn(3, 4)
    gaps = x.clone()
    gaps[0, 1] = gaps[2, 0] = torch.nan
    vectors = torch.randn(3, 4, 2)
    vectors[0, 1, 0] = torch.nan
    vectors[1, 2] = torch.nan
    two = {"x": gaps, "n": torch.randint(0, 4, (3, 4)).double()}
    return {
        "hidden Markov": (HiddenMarkov(3), gaps, {}),
        "one state": (HiddenMarkov(1), gaps, {}),
        "covariates and time": (Driven(), vectors, {"u": u}),
        "covariates, derived state": (DrivenDerived(), vectors, {"u": u}),
        "time": (OnlyTime(3), gaps, {}),
        "embedded state": (Embedded(), gaps, {}),
        "two latents": (TwoLatents(), two, {}),
        "switching autoregression": (SwitchingAR(), x, {}),
        "latent in the emission": (Mixture(2), gaps, {}),
    }


CASES = ["hidden Markov", "one state", "covariates and time", "covariates, derived state", "time", "embedded state",
         "two latents", "switching autoregression", "latent in the emission"]
LENGTHS = [4, 2, 3]


def enumerated(model, x, covariates, support, b, length, upto=None):
    """Log joint of every path of a sequence, by the model as a Pyro program: ``(K**length,)`` and the paths."""
    names = list(support)
    states = len(support[names[0]])
    upto = length if upto is None else upto
    paths = list(itertools.product(range(states), repeat=upto))
    cut = {k: v[b:b + 1, :upto] for k, v in (x if isinstance(x, dict) else {"x": x}).items()}
    inputs = {k: v[b:b + 1, :upto] for k, v in covariates.items()}
    index = torch.tensor(paths)
    many = {k: v.expand(len(paths), *v.shape[1:]) for k, v in cut.items()}
    inputs = {k: v.expand(len(paths), *v.shape[1:]) for k, v in inputs.items()}
    data = {f"{name}_{t + 1}": support[name][index[:, t]] for name in names for t in range(upto)}
    trace = poutine.trace(poutine.condition(model, data=data)).get_trace(many, **inputs)
    trace.compute_log_prob()
    total = sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample" and site["is_observed"])
    return total.detach(), index


@pytest.mark.parametrize("name", CASES)
def test_against_every_path(name):
    """Evidence, by step and in total; filtered, smoothed and pairwise probabilities; the best path; the gradient."""
    model, x, covariates = cases()[name]
    padded = {k: ragged(v, LENGTHS) for k, v in x.items()} if isinstance(x, dict) else ragged(x, LENGTHS)
    method = seq.ForwardBackward(model)
    posterior = method.run(padded, LENGTHS, **covariates)
    best = method.viterbi(padded, LENGTHS, **covariates)
    states = len(next(iter(posterior.support.values())))
    pairwise = posterior.pairwise
    assert pairwise.shape == (3, 3, states, states) and posterior.kind == "exact"
    torch.testing.assert_close(method.log_evidence(padded, LENGTHS, **covariates).detach(), posterior.log_evidence)
    for b, length in enumerate(LENGTHS):
        total, paths = enumerated(model, x, covariates, posterior.support, b, length)
        torch.testing.assert_close(posterior.log_evidence[b], total.logsumexp(0))
        weights = total.softmax(0)

        def joint(weights, state, states=states):
            return torch.zeros(states).index_add(0, state, weights)

        def by_site(p, site, posterior=posterior):
            values, own = posterior.support[site].flatten(1) if posterior.support[site].dim() > 1 else \
                posterior.support[site][:, None], posterior.values[site]
            own = own.reshape(len(own), -1)
            return torch.stack([p[(values == v).all(-1)].sum() for v in own])

        for t in range(length):
            now, upto = enumerated(model, x, covariates, posterior.support, b, length, t + 1)
            filtered, smoothed = joint(now.softmax(0), upto[:, t]), joint(weights, paths[:, t])
            torch.testing.assert_close(posterior.log_evidence_by_step[b, :t + 1].sum(), now.logsumexp(0))
            for site in posterior.support:
                torch.testing.assert_close(posterior.filtered_probabilities[site][b, t], by_site(filtered, site))
                torch.testing.assert_close(posterior.smoothed_probabilities[site][b, t], by_site(smoothed, site))
                value = posterior.support[site].double()
                p = smoothed.reshape(-1, *(1,) * (value.dim() - 1))
                mean = (p * value).sum(0)
                torch.testing.assert_close(posterior.smoothed[site].mean[b, t], mean)
                torch.testing.assert_close(posterior.smoothed[site].variance[b, t], (p * (value - mean)**2).sum(0))
            if t + 1 < length:
                flat = joint(weights, paths[:, t] * states + paths[:, t + 1], states**2)
                torch.testing.assert_close(pairwise[b, t], flat.reshape(states, states))
        torch.testing.assert_close(best.log_prob[b], total.max())
        assert best.states[b, :length].tolist() == paths[total.argmax()].tolist()
        for site, value in posterior.support.items():
            assert torch.equal(best.sites[site][b, :length], value[best.states[b, :length]])
        assert (best.states[b, length:] == 0).all() and (pairwise[b, max(length - 1, 0):] == 0).all()
        for p in (posterior.filtered_probabilities, posterior.smoothed_probabilities):
            assert all((v[b, length:] == 0).all() for v in p.values())
        assert (posterior.log_evidence_by_step[b, length:] == 0).all()


# Numbers of the literature, and other libraries.


def test_umbrella_world():
    model = Tabular(torch.tensor([0.5, 0.5]), torch.tensor([[0.7, 0.3], [0.3, 0.7]]), torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    posterior = seq.ForwardBackward(model).run(torch.tensor([[1, 1, 0, 1, 1]]))
    assert abs(posterior.total_log_evidence + 3.3725) < 5e-5


def test_rainy_sunny():
    model = Tabular(torch.tensor([0.6, 0.4]), torch.tensor([[0.7, 0.3], [0.4, 0.6]]),
                    torch.tensor([[0.1, 0.4, 0.5], [0.6, 0.3, 0.1]]))
    best = seq.ForwardBackward(model).viterbi(torch.tensor([[0, 1, 2]]))
    assert best.sites["k"].tolist() == [[1, 0, 0]] and abs(best.log_prob.exp().item() - 0.01344) < 1e-9


def random_tables(states, kind):
    g = np.random.default_rng(states)
    pi, a = g.dirichlet(np.ones(states)), g.dirichlet(np.ones(states), states)
    b = g.dirichlet(np.ones(4), states) if kind == "categorical" else 2 * g.normal(size=states)
    return pi, a, b, 0.5 + g.random(states)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_hmmlearn(kind):
    hmm = pytest.importorskip("hmmlearn.hmm")
    pi, a, b, scale = random_tables(5, kind)
    lengths = [30, 12, 21]
    if kind == "categorical":
        theirs = hmm.CategoricalHMM(5, init_params="", n_features=4)
        theirs.emissionprob_ = b
        x = torch.randint(0, 4, (3, 30))
    else:
        theirs = hmm.GaussianHMM(5, "diag", init_params="")
        theirs.means_, theirs.covars_ = b[:, None], scale[:, None]**2
        x = 2 * torch.randn(3, 30)
    theirs.startprob_, theirs.transmat_ = pi, a
    model = Tabular(*(torch.tensor(v) for v in (pi, a, b)), None if kind == "categorical" else torch.tensor(scale))
    method = seq.ForwardBackward(model)
    posterior, best = method.run(x, lengths), method.viterbi(x, lengths)
    flat = torch.cat([x[i, :n] for i, n in enumerate(lengths)])[:, None].numpy()
    score, probabilities = theirs.score_samples(flat, lengths)
    assert abs(posterior.total_log_evidence - score) < 1e-8
    ours = torch.cat([posterior.smoothed_probabilities["k"][i, :n] for i, n in enumerate(lengths)])
    torch.testing.assert_close(ours, torch.from_numpy(probabilities), atol=1e-9, rtol=0)
    score, path = theirs.decode(flat, lengths)
    assert abs(best.log_prob.sum() - score) < 1e-8
    if kind == "gaussian":  # with few symbols two paths may use the same factors in another order: a tie
        assert torch.cat([best.states[i, :n] for i, n in enumerate(lengths)]).tolist() == path.tolist()


def test_pyro_discrete_hmm():
    """Its first transition comes before the first frame: start it from a distribution that steps into pi."""
    model = HiddenMarkov(3)
    x = torch.randn(2, 7)
    log_a = model.logits.log_softmax(-1)
    theirs = dist.DiscreteHMM(model.start_logits, torch.cat([
        model.start_logits.expand(1, 3, 3), log_a.expand(6, 3, 3)]), dist.Normal(model.locs, 0.8), duration=7)
    found = seq.ForwardBackward(model).log_evidence(x)
    torch.testing.assert_close(found, theirs.log_prob(x))
    for ours, other in zip(torch.autograd.grad(found.sum(), list(model.parameters())),
                           torch.autograd.grad(theirs.log_prob(x).sum(), list(model.parameters()))):
        torch.testing.assert_close(ours, other)


def test_trace_enum_elbo():
    """The unrolled model is an ordinary Pyro program, which Pyro can enumerate too."""
    model, x, lengths = HiddenMarkov(3), torch.randn(4, 5), [5, 2, 4, 1]
    model.enumerate = "parallel"
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.differentiable_loss(config_enumerate(model), lambda *args: None, x, lengths)
    found = seq.ForwardBackward(model).log_evidence(x, lengths).sum()
    torch.testing.assert_close(found, -loss)
    for ours, theirs in zip(torch.autograd.grad(found, list(model.parameters())),
                            torch.autograd.grad(-loss, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs)


def test_statsmodels_switching_mean():
    regression = pytest.importorskip("statsmodels.tsa.regime_switching.markov_regression")
    x = torch.cat([torch.randn(40), 3 + torch.randn(40)])
    a, means, scale = torch.tensor([[0.9, 0.1], [0.25, 0.75]]), torch.tensor([0.2, 2.8]), torch.tensor([1.1, 1.1])
    stationary = torch.tensor([0.25, 0.1]) / 0.35
    theirs = regression.MarkovRegression(x.numpy(), 2)
    result = theirs.smooth([0.9, 0.25, 0.2, 2.8, 1.21])
    posterior = seq.ForwardBackward(Tabular(stationary, a, means, scale)).run(x)
    assert abs(posterior.total_log_evidence - result.llf) < 1e-8
    np.testing.assert_allclose(posterior.smoothed_probabilities["k"][0], result.smoothed_marginal_probabilities, atol=1e-9)


class HamiltonAR(SwitchingAR):
    """As statsmodels has it: conditional on the first observation, the regime before it stationary."""

    def __init__(self, a, stationary, x0, scale):
        super().__init__()
        self.a, self.stationary, self.x0, self.scale = a, stationary, x0, scale

    def start(self, rows):
        return {"pair": torch.zeros(rows, dtype=torch.long), "x": torch.full((rows,), self.x0), "t": torch.zeros(rows)}

    def step(self, state, x=None):
        old = state["pair"] % 2
        first = (self.stationary[:, None] * self.a).reshape(4)  # (s_0, s_1)
        later = torch.zeros(len(old), 2, 2).scatter(1, old[:, None, None].expand(-1, 1, 2), self.a[old][:, None]).flatten(1)
        pair = pyro.sample("s", dist.Categorical(torch.where(state["t"][:, None] == 0, first, later)))
        loc = self.m[pair % 2] + self.phi * (state["x"] - self.m[pair // 2])
        x = pyro.sample("x", dist.Normal(loc, self.scale), obs=x)
        return {"pair": pair, "x": x, "t": state["t"] + 1}


def test_statsmodels_switching_autoregression():
    autoregression = pytest.importorskip("statsmodels.tsa.regime_switching.markov_autoregression")
    x = torch.cat([torch.randn(20), 3 + torch.randn(20)])
    a, stationary = torch.tensor([[0.9, 0.1], [0.25, 0.75]]), torch.tensor([0.25, 0.1]) / 0.35
    model = HamiltonAR(a, stationary, x[0].item(), 0.9)
    model.m.data, model.phi.data = torch.tensor([0.2, 2.8]), torch.tensor(0.4)
    theirs = autoregression.MarkovAutoregression(x.numpy(), 2, 1, switching_ar=False)
    assert theirs.param_names == ["p[0->0]", "p[1->0]", "const[0]", "const[1]", "sigma2", "ar.L1"]
    expected = theirs.loglike([0.9, 0.25, 0.2, 2.8, 0.81, 0.4])
    assert abs(seq.ForwardBackward(model).run(x[1:]).total_log_evidence - expected) < 1e-8


# The recursions themselves.


def random_chain(steps=40, batch=5, states=3, counts=None, zeros=False, vary=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def table(*shape):
        logits = torch.randn(*shape, generator=g)
        if zeros:
            logits = logits.masked_fill(torch.rand(*shape, generator=g) < 0.4, -INF)
            logits[..., 0] = torch.where(logits.isfinite().any(-1), logits[..., 0], 0.0)
        return logits.log_softmax(-1)

    shape = {None: (1, 1), "time": (steps - 1, 1), "both": (steps - 1, batch)}[vary]
    counts = counts or [batch] * steps
    emission = 3 * torch.randn(steps, batch, states, generator=g)
    emission = torch.where((torch.arange(batch) < torch.tensor(counts)[:, None])[..., None], emission, 0.0)
    return Tables(table(1 if vary != "both" else batch, states), table(*shape, states, states), emission, counts)


RAGGED = [5] * 10 + [4] * 7 + [2] * 3 + [1] * 20


@pytest.mark.parametrize("vary", [None, "time", "both"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("counts", [None, RAGGED], ids=["full", "ragged"])
def test_scan_and_loop_and_logarithms_agree(vary, zeros, counts):
    tables = random_chain(counts=counts, zeros=zeros, vary=vary)
    scaled, scan = chain.Passes(tables, scan=False), chain.Passes(tables, scan=True)
    logged = chain.Passes(tables, scan=False)
    logged.main, logged.exact = log_chain.Logged(tables, False), None
    assert len(scaled.hard) == 0
    for other in (scan, logged):
        torch.testing.assert_close(scaled.by_step, other.by_step)
        torch.testing.assert_close(scaled.filtered, other.filtered)
        torch.testing.assert_close(scaled.smooth(), other.smooth())
        torch.testing.assert_close(scaled.pairs(), other.pairs())
        weights = torch.rand(5)
        torch.testing.assert_close(scaled.transition_counts(weights), other.transition_counts(weights))


@pytest.mark.parametrize("vary", [(1, 1), (399, 1), (399, 2)], ids=str)
def test_a_path_that_probabilities_have_lost_comes_back(vary):
    """Two regimes that never meet: the data speaks against the second by e^-2000, then for it by e^4000 (or by e^200)."""
    never = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    emission = torch.zeros(400, 2, 2)
    emission[:200, :, 1] = -10.0
    emission[200:, 0, 0] = -20.0
    emission[200:, 1, 0] = -1.0  # not enough to come back
    tables = Tables(torch.tensor([[0.5, 0.5]]).log(), never.expand(*vary, 2, 2), emission, [2] * 400)
    passes = chain.Passes(tables, scan=False)
    assert passes.hard.tolist() == [0]
    expected = emission.sum(0) + math.log(0.5)
    torch.testing.assert_close(passes.by_step.sum(0), expected.logsumexp(-1))
    torch.testing.assert_close(passes.smooth()[0], expected.softmax(-1))
    torch.testing.assert_close(chain.sample_paths(passes, 3)[:, :, 0], torch.ones(3, 400, dtype=torch.long))
    scan = chain.Passes(tables, scan=True)
    torch.testing.assert_close(passes.filtered, scan.filtered)
    torch.testing.assert_close(passes.pairs(), scan.pairs())
    torch.testing.assert_close(passes.transition_counts(torch.tensor([0.3, 0.8])), scan.transition_counts(
        torch.tensor([0.3, 0.8])))


def test_unlikely_frames_after_a_forbidden_transition():
    """The only reachable state explains the frame e^-1000 times as well as the others."""
    log_a = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    emission = torch.tensor([[0.0, -INF], [-1000.0, 0.0], [0.0, 0.0]])[:, None]
    passes = chain.Passes(Tables(torch.zeros(1, 2).log_softmax(-1), log_a[None, None], emission, [1, 1, 1]), scan=False)
    assert passes.hard.tolist() == [0]
    torch.testing.assert_close(passes.by_step[:, 0], torch.tensor([math.log(0.5), -1000.0, 0.0]))


@pytest.mark.parametrize("states", [2, 20])
def test_long_chain(states):
    """5000 steps whose evidence is far below the smallest double."""
    model = HiddenMarkov(states)
    x = model.simulate([5000])["x"]
    posterior = seq.ForwardBackward(model).run(x)
    assert posterior.total_log_evidence < -2000
    tables = Tables(model.start_logits.log_softmax(-1)[None], model.logits.log_softmax(-1)[None, None],
                    dist.Normal(model.locs, 0.8).log_prob(x[0, :, None])[:, None], [1] * 5000)
    with torch.no_grad():
        expected = log_chain.log_forward(tables)[1].sum()
        torch.testing.assert_close(posterior.log_evidence[0], expected, rtol=1e-12, atol=0)
    total = posterior.smoothed_probabilities["k"].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-10)


@pytest.mark.parametrize("vary", [None, "time", "both"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_gradient_of_the_evidence(zeros, vary, scan, monkeypatch):
    """First and second derivatives by finite differences, where transitions are forbidden too."""
    monkeypatch.setattr(chain, "_SCAN_NUMBERS", {"cpu": 10**6 if scan else 0})
    monkeypatch.setattr(chain, "_SCAN_STEPS", 1)
    shape = (12, 2, 2, [2] * 3 + [1] * 9) if scan else (4, 3, 3, [3, 3, 2, 1])
    tables = random_chain(*shape, zeros, vary)
    open_entries = [v.isfinite() for v in tables[:3]]
    free = [v[where].clone().requires_grad_() for v, where in zip(tables[:3], open_entries)]

    def evidence(*values):
        filled = [torch.full(where.shape, -INF).masked_scatter(where, v) for where, v in zip(open_entries, values)]
        return chain.log_evidence(Tables(*filled, tables.counts))

    assert torch.autograd.gradcheck(evidence, free)
    if not scan:
        assert torch.autograd.gradgradcheck(evidence, free)
    full = [v.clone().requires_grad_() for v in tables[:3]]
    found = torch.autograd.grad(chain.log_evidence(Tables(*full, tables.counts)).sum(), full)
    assert all(g.isfinite().all() for g in found)
    assert all((g[~where] == 0).all() for g, where in zip(found, open_entries))


def test_gradient_of_the_evidence_of_a_lost_path():
    never = torch.tensor([[0.0, -INF], [-INF, 0.0]])[None, None].requires_grad_()
    emission = torch.zeros(400, 2, 2)
    emission[:200, :, 1], emission[200:, 0, 0] = -10.0, -20.0
    emission.requires_grad_()
    evidence = chain.log_evidence(Tables(torch.tensor([[0.5, 0.5]]).log(), never, emission, [2] * 400))
    _, by_emission = torch.autograd.grad(evidence.sum(), [never, emission])
    torch.testing.assert_close(by_emission[:, 0], torch.tensor([0.0, 1.0]).expand(400, 2))
    torch.testing.assert_close(by_emission[:, 1], torch.tensor([1.0, 0.0]).expand(400, 2))


def test_gradient_through_the_model():
    """By finite differences in the parameters of a model, forbidden transitions and data in the recurrence included."""
    class LeftRight(HiddenMarkov):
        def transition(self, k):
            logits = self.logits.masked_fill(torch.ones(3, 3).tril(-1).bool(), -INF)
            return pyro.sample("k", dist.Categorical(logits=logits[k]))

    for model, x in ((LeftRight(3), torch.randn(3, 4)), (SwitchingAR(), torch.randn(3, 4))):
        values = list(model.parameters())
        method = seq.ForwardBackward(model)

        if not isinstance(model, SwitchingAR):
            x[0, 3] = torch.nan
        for i, value in enumerate(values):
            found = torch.autograd.grad(method.log_evidence(x, [4, 2, 3]).sum(), values)[i]
            expected = torch.zeros_like(found)
            for j in range(value.numel()):
                for sign in (1, -1):
                    value.data.view(-1)[j] += sign * 1e-5
                    expected.view(-1)[j] += sign * method.log_evidence(x, [4, 2, 3]).sum().item() / 2e-5
                    value.data.view(-1)[j] -= sign * 1e-5
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


# The answer.


def test_draws_of_paths_have_the_pairwise_probabilities():
    """Frequencies of each pair against its probability: with 20 000 draws and 4.5 standard errors, 60 comparisons fail once in
    2000 runs."""
    model = HiddenMarkov(2)
    lengths, count = [4, 2, 3], 20_000
    posterior = seq.ForwardBackward(model).run(torch.randn(3, 4), lengths)
    drawn = posterior.trajectories(count).samples["k"]
    assert drawn.shape == (count, 3, 4) and (drawn[:, 1, 2:] == 0).all()
    for b, length in enumerate(lengths):
        for t in range(length - 1):
            for j, k in itertools.product(range(2), repeat=2):
                p = posterior.pairwise[b, t, j, k].item()
                share = ((drawn[:, b, t] == j) & (drawn[:, b, t + 1] == k)).double().mean().item()
                assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / count) + 1e-12


def test_draws_of_paths_of_several_sites():
    model, x, _ = cases()["two latents"]
    posterior = seq.ForwardBackward(model).run(x, LENGTHS)
    drawn = posterior.trajectories(4000).samples
    assert drawn["s"].shape == (4000, 3, 4, 2) and drawn["k"].shape == (4000, 3, 4)
    error = (posterior.smoothed["s"].variance / 4000).sqrt()
    assert ((drawn["s"].mean(0) - posterior.smoothed["s"].mean).abs() < 5 * error + 1e-12).all()


@pytest.mark.parametrize("name", CASES)
def test_padding_order_and_splitting(name):
    model, x, covariates = cases()[name]
    method, lengths = seq.ForwardBackward(model), torch.tensor(LENGTHS)
    data = x if isinstance(x, dict) else {"x": x}
    whole = method.run(data, lengths, **covariates)

    def same(found, index, steps):
        torch.testing.assert_close(found.log_evidence, whole.log_evidence[index], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.pairwise, whole.pairwise[index][:, :steps - 1], rtol=1e-9, atol=1e-12)
        for site in whole.support:
            torch.testing.assert_close(found.smoothed_probabilities[site], whole.smoothed_probabilities[site][index][:, :steps])

    def spoiled(value):
        value = torch.cat([value, value[:, :2]], 1)
        for b, n in enumerate(LENGTHS):
            value[b, n:] = 1e9 if value.dtype != torch.long else 0
        return value

    same(method.run({k: spoiled(v) for k, v in data.items()}, lengths,
                    **{k: torch.cat([v, 9 + v[:, :2]], 1) for k, v in covariates.items()}), slice(None), 4)
    order = torch.tensor([2, 0, 1])
    same(method.run({k: v[order] for k, v in data.items()}, lengths[order], **{k: v[order] for k, v in covariates.items()}),
         order, 4)
    for b, n in enumerate(LENGTHS):
        same(method.run({k: v[b:b + 1, :n] for k, v in data.items()}, **{k: v[b:b + 1, :n] for k, v in covariates.items()}),
             [b], n)


@pytest.mark.parametrize("name", CASES)
def test_stream_equals_the_whole(name):
    model, x, covariates = cases()[name]
    whole = seq.ForwardBackward(model).run(x, **covariates)
    stream = seq.ForwardBackward(model).stream()
    for t in range(4):
        frame = {k: v[:, t] for k, v in x.items()} if isinstance(x, dict) else x[:, t]
        found = stream.update(frame, **{k: v[:, t] for k, v in covariates.items()})
        torch.testing.assert_close(found.log_predictive, whole.log_evidence_by_step[:, t])
        for site in whole.support:
            torch.testing.assert_close(found.probabilities[site], whole.filtered_probabilities[site][:, t])
    assert stream.time == 4


@pytest.mark.parametrize("name", ["hidden Markov", "switching autoregression", "two latents"])
def test_prediction(name):
    """The first predicted latent against the last filtered one times the transitions."""
    model, x, covariates = cases()[name]
    method = seq.ForwardBackward(model)
    posterior = method.run(x, LENGTHS, **covariates)
    drawn = posterior.predict(2, num_samples=4000).samples
    longer = {k: torch.cat([ragged(v, LENGTHS), v[:, :1]], 1) for k, v in (x if isinstance(x, dict) else {"x": x}).items()}
    blank = {k: torch.where(torch.arange(5)[None] >= torch.tensor(LENGTHS)[:, None], torch.nan, v) for k, v in longer.items()}
    if name == "switching autoregression":  # a gap would feed the state: any frame does, for the latent before it
        return torch.testing.assert_close(drawn["s"].double().mean(0)[:, 0], torch.stack([
            posterior.filtered_probabilities["s"][b, n - 1] @ model.logits.softmax(-1)[:, 1].detach()
            for b, n in enumerate(LENGTHS)]), atol=5 * 0.5 / math.sqrt(4000), rtol=0)
    ahead = method.run(blank, torch.tensor(LENGTHS) + 1)
    for site in posterior.support:
        moments = ahead.filtered[site]
        mean = torch.stack([moments.mean[b, n] for b, n in enumerate(LENGTHS)])
        error = torch.stack([moments.std[b, n] for b, n in enumerate(LENGTHS)]) / math.sqrt(4000)
        assert ((drawn[site].double().mean(0)[:, 0] - mean).abs() < 5 * error + 1e-12).all()


def test_the_answer_has_the_interface():
    model, x, _ = cases()["two latents"]
    posterior = seq.ForwardBackward(model).run(x, LENGTHS)
    assert posterior.total_standard_error == 0 and posterior.num_samples is None
    assert set(posterior.to_dataframe()) >= {"filtered_mean", "smoothed_std"} and len(posterior.to_dataframe()) == 27
    assert "exact" in repr(posterior)
    for name, shape in (("k", (3, 4)), ("s", (3, 4, 2))):
        low, high = posterior.quantile(name, [0.0, 1.0])
        assert low.shape == shape and (low == 0).all()
        median = posterior.quantile(name, 0.5)
        assert ((median == 0) | (high >= median)).all()
    p = posterior.filtered_probabilities["k"][0]
    expected = (p.cumsum(-1) < 0.7).sum(-1).double()
    assert torch.equal(posterior.quantile("k", 0.7)[0], expected)


def test_single_precision():
    """Tables of a model in single precision, recursions in double."""
    torch.set_default_dtype(torch.float32)
    model = HiddenMarkov(3)
    x = torch.randn(2, 50)
    posterior = seq.ForwardBackward(model).run(x)
    double = seq.ForwardBackward(model.double()).run(x.double())
    assert posterior.filtered["k"].mean.dtype == posterior.smoothed_probabilities["k"].dtype == torch.float32
    torch.testing.assert_close(posterior.log_evidence, double.log_evidence, rtol=1e-5, atol=0)


def test_forbidden_means_forbidden():
    """Probabilities of zero are zero, not the 1e-16 that torch scores: impossible data says so."""
    class Absorbing(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("alive", dist.Bernoulli(torch.tensor(0.5)))

        def transition(self, alive):
            return pyro.sample("alive", dist.Bernoulli(0.9 * alive))

        def emission(self, alive, x=None):
            return pyro.sample("x", dist.Normal(1000 * alive, 1.0), obs=x)

    x = torch.tensor([[1000.0, 0.0, 1000.0], [1000.0, 1000.0, 0.0]])
    posterior = seq.ForwardBackward(Absorbing()).run(x)
    assert posterior.log_evidence[0] < -4e5  # one frame must be an outlier of a thousand standard deviations
    assert posterior.log_evidence[1] > -10
    model = Tabular(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.0, 0.0]),
                    torch.tensor([1.0, 1.0]))
    posterior = seq.ForwardBackward(model).run(torch.randn(1, 5))
    assert posterior.smoothed["k"].mean.tolist() == [[0, 1, 0, 1, 0]]


def test_gaps_in_whole_numbers():
    """A mask over integers, which cannot hold NaN: a masked frame is as if its symbol told nothing."""
    g = [torch.tensor(v) for v in random_tables(3, "categorical")[:3]]
    x, mask = torch.randint(0, 4, (2, 5)), torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1]]).bool()
    found = seq.ForwardBackward(Tabular(*g)).run(x, mask=mask)
    blank = torch.cat([g[2], torch.ones(3, 1)], 1).log()

    stream = seq.ForwardBackward(Tabular(*g)).stream()
    log_pi, log_a = g[0].log()[None], g[1].log()[None, None]
    symbols = torch.where(mask, x, 4)
    tables = Tables(log_pi, log_a, blank.T[symbols].transpose(0, 1), [2] * 5)
    torch.testing.assert_close(found.log_evidence, chain.log_evidence(tables))
    for t in range(5):
        step = stream.update(x[:, t], mask=mask[:, t])
        torch.testing.assert_close(step.log_predictive, found.log_evidence_by_step[:, t])


def test_inside_a_pyro_program():
    """The evidence at the program's own values, with its gradient, for NUTS and SVI over global parameters."""
    class Bayesian(HiddenMarkov):
        def __init__(self):
            super().__init__(2)
            self.shift = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

        def emission(self, k, x=None):
            return pyro.sample("x", dist.Normal(self.locs[k] + self.shift, 0.8), obs=x)

    model, x = Bayesian(), torch.randn(3, 5)
    method = seq.ForwardBackward(model)

    def marginal():
        return model.within(lambda: pyro.factor("evidence", method.log_evidence(x).sum()))

    shift = torch.tensor(0.7, requires_grad=True)
    trace = poutine.trace(poutine.condition(marginal, data={"shift": shift})).get_trace()
    factor = trace.nodes["evidence"]["fn"].log_factor
    plain = HiddenMarkov(2)
    plain.load_state_dict(model.state_dict())
    plain.locs.data += 0.7
    torch.testing.assert_close(factor, seq.ForwardBackward(plain).log_evidence(x).sum())
    expected = torch.autograd.grad(seq.ForwardBackward(plain).log_evidence(x).sum(), plain.locs)[0].sum()
    torch.testing.assert_close(torch.autograd.grad(factor, shift)[0], expected)


# What a user gets wrong.


class Continuous(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("level", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("level", dist.Normal(z, 1.0))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Wide(HiddenMarkov):
    def initial(self):
        return pyro.sample("bits", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))


class Product(HiddenMarkov):
    def initial(self):
        pyro.sample("a", dist.Categorical(torch.ones(100)))
        return pyro.sample("b", dist.Categorical(torch.ones(100)))

    transition = lambda self, k: Product.initial(self)  # noqa: E731


class Grows(HiddenMarkov):
    def transition(self, k):
        return pyro.sample("k", dist.Categorical(torch.ones(3)))


class Remembers(seq.SequentialModel):
    def start(self, rows):
        return {"now": torch.zeros(rows, dtype=torch.long), "old": torch.zeros(rows, dtype=torch.long)}

    def step(self, state, x=None):
        k = pyro.sample("k", dist.Categorical(logits=torch.eye(2)[state["now"]] + torch.eye(2)[state["old"]]))
        pyro.sample("x", dist.Normal(k.double(), 1.0), obs=x)
        return {"now": k, "old": state["now"]}


class Accumulates(HiddenMarkov):
    def transition(self, k, u):
        return k + pyro.sample("k", dist.Categorical(logits=torch.zeros(2)))

    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(k.double(), 0.8), obs=x)


class Scaled(HiddenMarkov):
    def emission(self, k, x=None):
        with poutine.scale(scale=0.5):
            return pyro.sample("x", dist.Normal(self.locs[k], 0.8), obs=x)


class NoLatent(seq.SequentialModel):
    def start(self, rows):
        return torch.zeros(rows)

    def step(self, h, x=None):
        return pyro.sample("x", dist.Normal(h, 1.0), obs=x)


class Overflows(HiddenMarkov):
    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(self.locs[k], 0.8 * torch.where(x > 5, torch.nan, 1.0), validate_args=False), obs=x)


MISTAKES = {
    "continuous latent": (Continuous, {}, r"site 'level' is Normal, which has no finite support.*KalmanFilter"),
    "many bits": (Wide, {}, r"site 'bits' holds 20 independent Bernoulli variables.*2\*\*20.*ParticleFilter"),
    "many joint states": (Product, {}, r"\['a', 'b'\] of Product have 10000 joint values a step, more than the 4096"),
    "support that changes": (Grows, {}, r"\{'k': 2\} at the first step and \{'k': 3\} at the second.*same supports"),
    "state remembers regimes": (Remembers, {}, r"the state\['old'\] that Remembers leaves at time 2 depends on the latents "
                                r"\['k'\] of the step before.*Categorical over pairs of regimes"),
    "state adds latents up": (Accumulates, {"u": [[0.0] * 4]}, r"the state that Accumulates leaves at time 2 depends"),
    "gap feeds the state": (SwitchingAR, {"x": [[0.1, math.nan, 0.3, 0.2]]}, r"the data of site \['x'\] is missing at time 2 "
                            "and SwitchingAR reads it.*not be exact.*ParticleFilter"),
    "scaled site": (Scaled, {}, r"site 'x' of Scaled stands under poutine.scale"),
    "no latent": (NoLatent, {}, r"NoLatent samples no latent site"),
    "not a number": (Overflows, {"x": [[0.0, 1.0, 9.0, 0.0]]}, r"log density of site 'x' is NaN or infinite at "
                     "time 3 in sequence 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, inputs, message = MISTAKES[name]
    inputs = {k: torch.tensor(v) for k, v in {"x": [[0.0] * 4], **inputs}.items()}
    method = seq.ForwardBackward(make())
    for way in (method.run, method.log_evidence, method.viterbi):
        with pytest.raises(ValueError, match=message):
            way(**inputs)


def test_impossible_data():
    """Minus infinity as evidence, with the other sequences as they are; an error in run and viterbi; no NaN gradient."""
    pi, a = nn.Parameter(torch.tensor([0.5, 0.5])), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = nn.Parameter(torch.tensor([[0.0, -INF], [-INF, 0.0]]))

    class Model(Tabular):
        def emission(self, k, x=None):
            return pyro.sample("x", dist.Categorical(logits=self.b[k]), obs=x)

    model = Model(pi, a, b)
    method, x = seq.ForwardBackward(model), torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]])
    evidence = method.log_evidence(x)
    assert evidence[1] == -INF and abs(evidence[0] - math.log(0.5)) < 1e-12
    assert all(g.isfinite().all() for g in torch.autograd.grad(evidence[0], [pi]))
    for way in (method.run, method.viterbi):
        with pytest.raises(ValueError, match="sequence 1 at time 3 is impossible.*every state that Model"):
            way(x)
    stream = method.stream()
    stream.update(x[:, 0]), stream.update(x[:, 1])
    with pytest.raises(ValueError, match="frame of sequence 1 at time 3 is impossible"):
        stream.update(x[:, 2])
    assert stream.time == 2


def test_mistakes_of_a_stream():
    stream = seq.ForwardBackward(HiddenMarkov()).stream()
    with pytest.raises(ValueError, match=r"a frame is a single number.*x\[None\]"):
        stream.update(torch.tensor(1.0))
    stream.update(torch.zeros(2))
    with pytest.raises(ValueError, match="time 2 holds 3 sequences and the ones before 2"):
        stream.update(torch.zeros(3))


def test_functions_have_no_markov_state():
    def program(x=None, lengths=None):
        return None

    with pytest.raises(TypeError, match="declare it as a StateSpaceModel"):
        seq.ForwardBackward(seq.from_pyro(program))
    with pytest.raises(TypeError, match="ForwardBackward takes a model, not the class HiddenMarkov"):
        seq.ForwardBackward(HiddenMarkov)


def test_data_of_probability_zero_is_impossible():
    """Where torch would give it about 1e-16."""
    class Certain(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("k", dist.Bernoulli(0.0))

        def transition(self, k):
            return pyro.sample("k", dist.Bernoulli(0.0))

        def emission(self, k, x=None):
            return pyro.sample("x", dist.Bernoulli(k[:, None].expand(-1, 2)).to_event(1), obs=x)

    method = seq.ForwardBackward(Certain())
    x = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])
    assert method.log_evidence(x)[0] == -torch.inf
    with pytest.raises(ValueError, match="impossible"):
        method.run(x)
    x[0, 1, 1] = torch.nan
    assert method.run(x).log_evidence[0] == 0.0
