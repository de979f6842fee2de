"""The bound taken apart by step adds up to the bound, and reconstructions are the emission's means."""

import cases
import models
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_seq as seq
from pyro_seq.models import DeepMarkovModel, StructuredInference

BATCH, STEPS, LENGTHS = 4, 6, [6, 2, 5, 2]


@pytest.mark.parametrize("name", sorted(cases.all_models()))
def test_adds_up_to_the_bound(name):
    """The same draws go into both, so that they agree to rounding."""
    model, x, covariates = cases.all_models()[name]()
    data = seq.Sequences.of(x, LENGTHS, covariates=covariates)
    guide = seq.FilteringGuide(model, like=data, hidden=6)
    model.eval(), guide.eval()
    parts = seq.elbo_by_step(model, guide, data, num_samples=3, seed=5)
    torch.manual_seed(5)
    bound = -seq.SequentialELBO(num_particles=3).loss(model, guide, data)
    torch.testing.assert_close((parts.reconstruction - parts.kl).sum().item(), bound)
    assert not parts.reconstruction[~data.active].any() and not parts.kl[~data.active].any()
    assert parts.kl.shape == (BATCH, STEPS) and parts.lengths.tolist() == LENGTHS


class Emitted(seq.StateSpaceModel):
    """Latents without dynamics, and an emission whose mean is known."""

    def initial(self):
        return pyro.sample("z", dist.Normal(1.5, 1e-9))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(1.5, 1e-9))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)


def test_the_prior_as_guide_costs_nothing():
    model, x = Emitted(), torch.randn(BATCH, STEPS)
    parts = seq.elbo_by_step(model, seq.PriorGuide(model), x)
    assert not parts.kl.any()
    torch.testing.assert_close(parts.reconstruction, dist.Normal(3.0, 1.0).log_prob(x))


def test_closed_form_kl():
    class Shifted(seq.SequentialGuide):
        def step(self, state, x):
            pyro.sample("z", dist.Normal(1.5 + 2e-9, 1e-9))

    model = Emitted()
    parts = seq.elbo_by_step(model, Shifted(model), torch.randn(BATCH, STEPS), num_samples=1)
    torch.testing.assert_close(parts.kl, torch.full((BATCH, STEPS), 2.0), rtol=1e-5, atol=0)


def test_reconstruction_is_the_mean_of_the_emission():
    model = Emitted()
    data = seq.Sequences.of(torch.randn(BATCH, STEPS), LENGTHS)
    found = seq.reconstruct(model, seq.PriorGuide(model), data)["x"]
    torch.testing.assert_close(found, torch.where(data.active, 3.0, 0.0))


def test_reconstructs_missing_values():
    model = models.LocalLevel(0.0, 1.0, 0.1, 1.0)
    x = torch.randn(2, 5)
    x[0, 2] = torch.nan
    guide = seq.PriorGuide(model)
    assert seq.reconstruct(model, guide, x)["x"].isfinite().all()
    parts = seq.elbo_by_step(model, guide, x)
    assert parts.reconstruction[0, 2] == 0 and (parts.reconstruction != 0).sum() == 9


def test_leaves_no_trace():
    model = DeepMarkovModel(5, latent=2, hidden=4, emission_hidden=4)
    guide = StructuredInference(model, hidden=4)
    x = model.simulate([4] * 3)["x"]
    before = torch.get_rng_state()
    first = seq.reconstruct(model, guide, x)["x"]
    assert torch.equal(first, seq.reconstruct(model, guide, x)["x"])
    assert torch.equal(torch.get_rng_state(), before) and model.training and guide.training
    assert not first.requires_grad and len(pyro.get_param_store()) == 0
    assert ((first > 0) & (first < 1)).all()


class Categories(Emitted):
    def emission(self, z, x=None):
        return pyro.sample("x", dist.Categorical(logits=torch.zeros(3)), obs=x)


@pytest.mark.parametrize("call, error, message", [
    (lambda m: seq.reconstruct(m, seq.PriorGuide(m), torch.zeros(2, 3)), ValueError, "'x' is Categorical, which has no mean"),
    (lambda m: seq.reconstruct(m, m, torch.zeros(2, 3)), TypeError, "guide"),
    (lambda m: seq.elbo_by_step(m, seq.PriorGuide(m), torch.zeros(2, 3), num_samples=0), ValueError, "num_samples=0"),
    (lambda m: seq.elbo_by_step(torch.nn.Linear(1, 1), seq.PriorGuide(m), torch.zeros(2, 3)), TypeError, "elbo_by_step"),
])
def test_mistakes(call, error, message):
    with pytest.raises(error, match=message):
        call(Categories())
