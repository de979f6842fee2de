"""Given the same noise for each row, how sequences are batched changes nothing."""

import pytest
import torch
from cases import all_models, guides
from models import VRNN, DeepMarkov, HiddenMarkov, LocalLevel, ragged

import pyro_seq as seq

LENGTHS = torch.tensor([4, 6, 2, 5])


def terms_of(model, guide, x, lengths, covariates, num_particles=1):
    """Loss and gradients of one batch."""
    batch = seq.Sequences.of(x, lengths, covariates=covariates)
    loss = seq.SequentialELBO(num_particles, analytic_kl=False).differentiable_loss(model, guide, batch)
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    if not loss.requires_grad:
        return loss, []
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


def assert_close(first, second):
    torch.testing.assert_close(first[0], second[0], rtol=1e-9, atol=1e-9)
    for a, b in zip(first[1], second[1]):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("guide", ["filtering", "direct", "smoothing", "avf"])
@pytest.mark.parametrize("name", all_models())
def test_padding_order_and_splitting(name, guide, num_particles, row_noise):
    model, x, covariates = all_models()[name]()
    guide = guides(model, seq.Sequences.of(x, covariates=covariates))[guide]()
    for parameter in guide.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    x = ragged(x, LENGTHS)
    whole = terms_of(model, guide, x, LENGTHS, covariates, num_particles)

    # More padding, and other padding.
    longer = torch.cat([x, torch.ones_like(x[:, :3])], 1)
    more = {k: torch.cat([v, torch.full_like(v[:, :3], 9.0)], 1) for k, v in covariates.items()}
    assert_close(terms_of(model, guide, longer, LENGTHS, more, num_particles), whole)

    # Another order.
    order = torch.tensor([2, 0, 3, 1])
    row_noise.ids = order.tolist()
    assert_close(terms_of(model, guide, x[order], LENGTHS[order], {k: v[order] for k, v in covariates.items()},
                          num_particles), whole)

    # The batch in two parts.
    parts = []
    for part in ([0, 1], [2, 3]):
        row_noise.ids = part
        parts.append(terms_of(model, guide, x[part], LENGTHS[part], {k: v[part] for k, v in covariates.items()},
                              num_particles))
    assert_close((parts[0][0] + parts[1][0], [a + b for a, b in zip(parts[0][1], parts[1][1])]), whole)


@pytest.mark.parametrize("guide", [None, "filtering", "avf"])
@pytest.mark.parametrize("name", ["local level", "VRNN", "gamma"])
def test_filter_of_one_sequence_does_not_see_the_others(name, guide, row_noise, monkeypatch):
    model, x, _ = all_models()[name]()
    guide = None if guide is None else guides(model, seq.Sequences.of(x))[guide]()

    monkeypatch.setattr("pyro_seq.resampling.inversion.draw_uniform", lambda n, like: torch.full((n,), 0.37).to(like))
    method = seq.ParticleFilter(model, 16, guide=guide, ess_threshold=0.9)
    both = method.run(ragged(x, LENGTHS), LENGTHS)
    for b in range(4):
        row_noise.ids = [b]
        alone = method.run(x[b:b + 1, :LENGTHS[b]])
        torch.testing.assert_close(alone.log_evidence[0], both.log_evidence[b], rtol=1e-9, atol=1e-9)
        for site in alone.filtered:
            torch.testing.assert_close(alone.filtered[site].mean[0], both.filtered[site].mean[b, :LENGTHS[b]],
                                       rtol=1e-8, atol=1e-8)


def test_padding_and_gaps_give_exactly_zero_gradient():
    """NaN and huge values in padding and gaps reach neither the loss nor any gradient."""
    for make in (lambda: DeepMarkov(gaussian=True), lambda: VRNN()):
        model = make()
        guide = seq.FilteringGuide(model, hidden=5, name=f"guide{id(model)}")
        model_name = dict(model.named_parameters())
        x = torch.randn(3, 5, 4)
        x[0, 3:] = 1e300
        x[1, 2] = torch.nan
        loss = seq.SequentialELBO().differentiable_loss(model, guide, x, [3, 5, 5])
        found = torch.autograd.grad(loss, list(model_name.values()), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in found)
        import pyro

        pyro.clear_param_store()


def test_a_missing_entry_contributes_exactly_zero():
    """The score of a frame with a gap is that of the frame without the entry, in value and gradient."""
    model = DeepMarkov(gaussian=True, observed=4)
    z = torch.randn(2, 3)
    x = torch.randn(2, 4)
    x[0, 1] = torch.nan
    from pyro_seq.engine.sites import StepSites

    def score(keep):
        frame = seq.Sequences.of(x[:, None]).frame(1)
        with StepSites(frame, values={"z": z}) as step:
            model.apply(None, frame)
        log_p = step.sites["x"].log_p()
        if keep is None:
            return log_p
        loc = model.decoder(z)
        entries = torch.distributions.Normal(loc, 0.7).log_prob(x.nan_to_num())
        return (entries * keep).sum(-1)

    keep = (~x.isnan()).double()
    actual, expected = score(None), score(keep)
    assert torch.equal(actual, torch.distributions.Normal(model.decoder(z), 0.7).log_prob(x.nan_to_num()).where(
        keep.bool(), torch.zeros(())).sum(-1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    weight = model.decoder[-1].weight
    first = torch.autograd.grad(actual[0], weight, retain_graph=True)[0]
    assert torch.equal(first[1], torch.zeros_like(first[1]))


def test_missing_data_in_a_recurrence_is_drawn_from_the_model():
    """A VRNN's missing frame becomes a latent of the Pyro program, and its evidence is that of the marginal."""
    from pyro import poutine

    model = VRNN(latent=1, observed=1, hidden=2)
    x = torch.randn(1, 3, 1)
    x[0, 1] = torch.nan
    nodes = poutine.trace(model).get_trace(x).nodes
    assert nodes["x_2_missing"]["value"].isfinite().all() and not nodes["x_2_missing"]["is_observed"]
    assert nodes["x_2"]["fn"].log_prob(nodes["x_2"]["value"]).item() == 0.0


def test_evidence_with_gaps_is_the_marginal():
    """The particle filter of a VRNN with a missing frame integrates it out: average over drawn frames, by brute force."""
    model = VRNN(latent=1, observed=1, hidden=2)
    x = torch.randn(1, 3, 1)
    x[0, 1] = torch.nan
    actual = seq.ParticleFilter(model, 2000, num_runs=20).run(x)
    grid = torch.linspace(-8, 8, 400)
    filled = x.expand(400, 3, 1).clone()
    filled[:, 1, 0] = grid
    found = seq.ParticleFilter(model, 2000).run(filled).log_evidence
    expected = (found.exp().sum() * (grid[1] - grid[0])).log()
    # Each grid value has its own error; their average is far more precise than the estimate.
    assert abs(actual.total_log_evidence - expected.item()) < 5 * actual.total_standard_error


def test_finished_rows_of_a_discrete_model_do_not_count_under_enumeration():
    from pyro.infer import TraceEnum_ELBO

    model = HiddenMarkov(states=3)
    model.enumerate = "parallel"
    x = torch.randn(3, 5)
    lengths = [5, 2, 3]
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    total = -elbo.loss(model, lambda *a, **k: None, x, lengths)
    expected = 0.0
    for b, n in enumerate(lengths):
        log_alpha = model.start_logits.log_softmax(-1) + emission(model, x[b, 0])
        for t in range(1, n):
            log_alpha = (log_alpha[:, None] + model.logits.log_softmax(-1)).logsumexp(0) + emission(model, x[b, t])
        expected += log_alpha.logsumexp(0).item()
    assert abs(total - expected) < 1e-9


def emission(model, x):
    return torch.distributions.Normal(model.locs, 0.8).log_prob(x)


def test_local_level_kalman_ragged_and_missing_equals_one_by_one():
    model = LocalLevel(0.0, 1.0, 0.3, 1.0)
    x = torch.randn(3, 6)
    x[1, 2] = torch.nan
    lengths = [6, 4, 1]
    both = seq.KalmanFilter(model).run(x, lengths)
    for b, n in enumerate(lengths):
        alone = seq.KalmanFilter(model).run(x[b:b + 1, :n])
        torch.testing.assert_close(alone.log_evidence[0], both.log_evidence[b])
        torch.testing.assert_close(alone.smoothed["z"].mean[0], both.smoothed["z"].mean[b, :n])
