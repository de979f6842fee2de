"""A declared model is an ordinary Pyro model, and its guides are ordinary guides."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import VRNN, Bayesian, DeepMarkov, HiddenMarkov, LocalLevel, TwoSites
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam

import pyro_seq as seq


def test_sites_and_shapes():
    model = TwoSites()
    nodes = poutine.trace(model).get_trace(torch.randn(3, 2, 3), [2, 1, 2]).nodes
    sites = [name for name, node in nodes.items() if node["type"] == "sample" and name != "sequences"]
    assert sites == ["level_1", "rate_1", "a_1", "b_1", "level_2", "rate_2", "a_2", "b_2"]
    assert nodes["level_2"]["value"].shape == (3, 2) and nodes["rate_2"]["value"].shape == (3,)
    assert nodes["a_1"]["is_observed"] and not nodes["level_1"]["is_observed"]
    assert [frame.name for frame in nodes["a_1"]["cond_indep_stack"]] == ["sequences"]


def test_simulation_is_the_model():
    """Moments of simulated series against their closed form."""
    model = LocalLevel(2.0, 1.0, 0.5, 0.25)
    drawn = model.simulate([4] * 20_000)
    unrolled = model(lengths=[4] * 20_000)
    for x in (drawn["x"], unrolled):
        assert x.shape == (20_000, 4)
        for t in range(4):
            variance = 1.0 + 0.5 * t + 0.25
            assert abs(x[:, t].mean() - 2) < 5 * math.sqrt(variance / 20_000)
            assert abs(x[:, t].var() / variance - 1) < 5 * math.sqrt(2 / 20_000)


def test_losses_of_pyro_accept_model_and_guide():
    model = DeepMarkov()
    guide = seq.AmortizedVariationalFilter(model, hidden=6)
    x = torch.bernoulli(torch.full((3, 4, 4), 0.5))
    for loss in (Trace_ELBO(), TraceGraph_ELBO(), RenyiELBO(alpha=0.0, num_particles=2), seq.SequentialELBO()):
        svi = SVI(model, guide, Adam({"lr": 1e-3}), loss)
        before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
        assert math.isfinite(svi.step(x, [4, 2, 3]))
        after = [*model.parameters(), *guide.parameters()]
        moved = sum(not torch.equal(a, b) for a, b in zip(before, after))
        assert moved > 0.8 * len(before), "some parameters do not train"
        assert math.isfinite(svi.evaluate_loss(x, [4, 2, 3]))


def test_predictive():
    model = LocalLevel(0.0, 1.0, 0.1, 1.0)
    guide = seq.FilteringGuide(model, hidden=4)
    x = torch.zeros(2, 3)
    prior = Predictive(model, num_samples=7)(lengths=[3, 3])
    assert prior["z_2"].shape == (7, 2) and prior["x_3"].shape == (7, 2)
    posterior = Predictive(model, guide=guide, num_samples=5)(x)
    assert posterior["z_3"].shape == (5, 2)


def test_vectorised_particles_where_the_step_broadcasts():
    model = DeepMarkov()

    def guide(x, lengths=None):
        with pyro.plate("sequences", len(x), dim=-1):
            for t in pyro.markov(range(1, x.shape[1] + 1)):
                pyro.sample(f"z_{t}", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    x = torch.bernoulli(torch.full((3, 4, 4), 0.5))
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(model, guide, x)
    one = Trace_ELBO(num_particles=300).loss(model, guide, x)
    assert abs(many - one) < 0.1 * abs(one)


def test_nuts_on_a_declared_model():
    """One short series: the posterior mean of the state by NUTS against the Kalman smoother."""
    model = LocalLevel(0.0, 1.0, 0.5, 0.5)
    x = torch.tensor([[0.5, 1.0, -0.3]])
    mcmc = MCMC(NUTS(model), num_samples=400, warmup_steps=150, disable_progbar=True)
    mcmc.run(x)
    smoothed = seq.KalmanFilter(model).run(x).smoothed["z"]
    for t in range(3):
        draws = mcmc.get_samples()[f"z_{t + 1}"][:, 0]
        # 400 draws of NUTS on three Gaussians: at least 100 effective ones.
        assert abs(draws.mean() - smoothed.mean[0, t]) < 4 * smoothed.std[0, t] / 10


def exact_hmm(model, x, lengths):
    total = 0.0
    for b, n in enumerate(lengths):
        score = torch.distributions.Normal(model.locs, 0.8).log_prob(x[b, :n, None])
        alpha = model.start_logits.log_softmax(-1) + score[0]
        for t in range(1, n):
            alpha = (alpha[:, None] + model.logits.log_softmax(-1)).logsumexp(0) + score[t]
        total = total + alpha.logsumexp(0)
    return total


def test_enumeration_is_exact():
    model = HiddenMarkov(states=3)
    model.enumerate = "parallel"
    x, lengths = torch.randn(2, 5), [5, 3]
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda *a, **k: None, x, lengths)
    torch.testing.assert_close(-loss, exact_hmm(model, x, lengths))


def test_particle_filter_of_a_discrete_model_is_unbiased():
    model = HiddenMarkov(states=3)
    x = torch.randn(1, 5)
    exact = exact_hmm(model, x, [5])
    ratio = (seq.ParticleFilter(model, 50).run(x.expand(800, -1)).log_evidence - exact).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(800)


def test_score_function_gradient_of_discrete_latents():
    """Averaged over many draws, the gradient of SequentialELBO is that of the exact bound, by enumerating all paths."""
    model = HiddenMarkov(states=2)
    x = torch.randn(1, 3)
    guide = seq.FilteringGuide(model, like=x, hidden=3, cell=None)
    for parameter in guide.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    parameters = [*model.parameters(), *guide.heads.parameters()]
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)

    def forced(values):
        def draw(fn, name, frame):
            return values[:, frame.t - 1]
        return draw

    import pyro_seq.engine.loop as loop
    import pyro_seq.engine.sites as sites

    original = sites.draw
    sites.draw = loop.draw = forced(paths)
    try:
        from pyro_seq.engine.loop import forward

        batch = seq.Sequences.of(x.expand(8, 3))
        steps = list(guide.within(model.within, lambda: list(forward(model, guide, batch))))
    finally:
        sites.draw = loop.draw = original
    log_q = sum(site.log_q() for step in steps for site in step.sites.values() if not site.observed)
    bound = (log_q.exp() * steps[-1].log_weights[:, 0]).sum()
    expected = torch.autograd.grad(bound, parameters, allow_unused=True)
    many, rounds = 4000, 10
    found = []
    for _ in range(rounds):
        loss = seq.SequentialELBO(many, analytic_kl=False).differentiable_loss(model, guide, x)
        found.append([torch.zeros_like(p) if g is None else -g for p, g in zip(parameters, torch.autograd.grad(
            loss, parameters, allow_unused=True))])
    worst = 0.0
    for i, exact in enumerate(expected):
        if exact is None:
            continue
        draws = torch.stack([f[i] for f in found])
        error = draws.std(0) / math.sqrt(rounds)
        worst = max(worst, ((draws.mean(0) - exact).abs() / (error + 1e-3)).max().item())
    assert worst < 6  # Student t with 9 degrees of freedom, about 100 numbers: exceeded once in 50 at the most


class Echo(seq.SequentialModel):
    """Each bit given the last one."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.3, -0.8]))

    def start(self, rows):
        return self.logits.new_zeros(rows)

    def step(self, last, x=None):
        logits = torch.where(last > 0.5, self.logits[1], self.logits[0])
        return pyro.sample("x", dist.Bernoulli(logits=logits), obs=x)


def test_score_function_gradient_of_missing_discrete_data():
    """A gap that the state reads is drawn; the gradient of the bound E[log p(x_3 | x_2)] is known by enumeration."""
    model = Echo()
    x = torch.tensor([[1.0, torch.nan, 1.0]])
    on = model.logits.sigmoid()
    bound = on[0].log() + on[1] * on[1].log() + (1 - on[1]) * on[0].log()
    expected, = torch.autograd.grad(bound, model.logits)
    loss = seq.SequentialELBO(10_000)
    guide = seq.PriorGuide(model)
    draws = torch.stack([-torch.autograd.grad(loss.differentiable_loss(model, guide, x), model.logits)[0]
                         for _ in range(30)])
    error = draws.std(0) / math.sqrt(30)
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()  # Student t, 29 degrees: fails once in 20 000


def bayesian():
    model = Bayesian()
    guide = seq.FilteringGuide(model, hidden=4, global_guide=AutoNormal(
        poutine.block(model, expose=["phi", "noise"])))
    return model, guide


def test_global_parameters_are_drawn_once_a_call():
    model = Bayesian()
    with poutine.trace() as tr:
        model(torch.randn(2, 4))
    nodes = [name for name, node in tr.trace.nodes.items() if node["type"] == "sample" and name != "sequences"]
    assert nodes[:2] == ["phi", "noise"] and len(nodes) == 10
    assert tr.trace.nodes["phi"]["cond_indep_stack"] == ()
    counted = []

    class Counting(Bayesian):
        def __init__(self):
            super().__init__()
            self.noise = pyro.nn.PyroSample(lambda self: counted.append(1) or dist.LogNormal(0.0, 0.1))

    pyro.clear_param_store()
    model = Counting()
    guide = seq.AmortizedVariationalFilter(model, 2, hidden=4, global_guide=AutoDelta(
        poutine.block(model, expose=["phi", "noise"])))
    guide(torch.randn(2, 4))
    counted.clear()
    seq.ParticleFilter(model, 10, guide=guide).run(torch.randn(2, 4))
    assert len(counted) <= 2


def test_sequential_elbo_with_global_parameters_equals_trace_elbo():
    """The same global and local draws, with mini-batch scaling."""
    model, guide = bayesian()
    x = torch.randn(3, 4)
    for plate_size in (None, 12):
        guide(x)  # the autoguide makes its parameters at the first call
        with poutine.trace() as tr:
            guide(x, plate_size=plate_size)
        values = {name: node["value"].detach() for name, node in tr.trace.nodes.items() if node["type"] == "sample"}
        expected = Trace_ELBO().loss(model, lambda *a, **k: poutine.replay(guide, trace=tr.trace)(*a, **k), x,
                                     plate_size=plate_size)
        import pyro_seq.engine.loop as loop
        import pyro_seq.engine.sites as sites

        original = sites.draw
        sites.draw = loop.draw = lambda fn, name, frame, values=values: values[f"{name}_{frame.t}"]
        try:
            replayed = guide.draw_globals
            guide.__dict__["draw_globals"] = poutine.replay(replayed, trace=tr.trace)
            actual = seq.SequentialELBO(analytic_kl=False).loss(model, guide, x, plate_size=plate_size)
        finally:
            sites.draw = loop.draw = original
            del guide.__dict__["draw_globals"]
        assert abs(actual - expected) < 1e-9 * abs(expected)


def test_global_parameters_are_learned():
    """SVI over a parameter with a prior, states by a filtering guide: the coefficient is found."""
    torch.manual_seed(3)
    data = {"phi": torch.tensor(0.7), "noise": torch.tensor(0.3)}
    model = Bayesian()
    with poutine.condition(data=data):
        x = model.simulate([30] * 40)["x"]
    guide = seq.FilteringGuide(model, hidden=8, like=x, global_guide=AutoNormal(
        poutine.block(model, expose=["phi", "noise"]), init_scale=0.05))
    svi = SVI(model, guide, Adam({"lr": 0.02}), seq.SequentialELBO())
    for _ in range(150):
        svi.step(x)
    median = guide.global_guide.median(x)
    assert abs(median["phi"] - 0.7) < 0.12


def test_fixed_global_parameters():
    model = Bayesian()
    x = torch.randn(1, 4)
    with poutine.condition(data={"phi": torch.tensor(0.9), "noise": torch.tensor(1.0)}):
        exact = seq.KalmanFilter(model).run(x)
        filtered = seq.ParticleFilter(model, 2000, num_runs=10).run(x)
    assert set(exact.parameters) == {"phi", "noise"} and exact.parameters["phi"] == 0.9
    assert abs(exact.total_log_evidence - filtered.total_log_evidence) < 4 * filtered.total_standard_error
    with pytest.warns(UserWarning, match="drawn from their prior"):
        seq.ParticleFilter(model, 10).run(x)


def test_save_and_load(tmp_path):
    x = torch.randn(2, 4, 4)
    model = VRNN()
    guide = seq.AmortizedVariationalFilter(model, hidden=6)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), seq.SequentialELBO())
    for _ in range(3):
        svi.step(x)
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, tmp_path / "saved.pt")
    pyro.set_rng_seed(1)
    before = seq.Variational(model, guide, num_samples=10).run(x).log_evidence
    pyro.clear_param_store()
    other = VRNN()
    other_guide = seq.AmortizedVariationalFilter(other, hidden=6)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    other_guide.load_state_dict(saved["guide"])
    pyro.set_rng_seed(1)
    after = seq.Variational(other, other_guide, num_samples=10).run(x).log_evidence
    assert torch.equal(before, after)

    import copy
    import pickle

    for again in (copy.deepcopy((other, other_guide)), pickle.loads(pickle.dumps((other, other_guide)))):
        pyro.set_rng_seed(1)
        assert torch.equal(seq.Variational(*again, num_samples=10).run(x).log_evidence, before)


def test_dropout_is_scored_inside_the_loop():
    class Dropped(DeepMarkov):
        def __init__(self):
            super().__init__()
            self.decoder.append(torch.nn.Dropout(0.5))

    from pyro_seq.engine.score import scores_in_one_call

    model = Dropped()
    assert not scores_in_one_call(model)
    guide = seq.FilteringGuide(model, hidden=4)
    x = torch.bernoulli(torch.full((3, 4, 4), 0.5))
    assert math.isfinite(seq.SequentialELBO().loss(model, guide, x))
    model.eval()
    assert scores_in_one_call(model)


def test_inner_gradients_work_without_grad():
    model = LocalLevel(0.0, 1.0, 0.5, 1.0)
    guide = seq.AmortizedVariationalFilter(model, 2, hidden=4)
    with torch.no_grad():
        assert math.isfinite(seq.SequentialELBO().loss(model, guide, torch.randn(2, 4)))
        assert math.isfinite(Trace_ELBO().loss(model, guide, torch.randn(2, 4)))
        assert Predictive(model, guide=guide, num_samples=3)(torch.randn(2, 4))["z_4"].shape == (3, 2)


def test_seed_reproduces_everything():
    model = TwoSites()
    x = torch.randn(2, 4, 3)
    found = []
    for _ in range(2):
        pyro.set_rng_seed(5)
        found.append(seq.ParticleFilter(model, 20, num_runs=2).run(x).log_evidence)
    assert torch.equal(*found)
