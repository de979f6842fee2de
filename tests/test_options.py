"""Options of the bound and of the guides."""

import math

import pyro
import pytest
import torch
from models import Driven, TwoSites, Video
from pyro.infer import SVI
from pyro.optim import Adam
from test_agreement import Replayed

import pyro_seq as seq
from pyro_seq.engine.loop import forward
from pyro_seq.engine.score import terms


def parts(model, guide, batch):
    """Reconstruction and KL of the bound, from the terms themselves."""
    def run():
        steps = list(forward(model, guide, batch, score=False))
        return terms(model, batch.packed, steps, 1, True)

    found = guide.within(model.within, run)
    return sum(t.log_p.sum() for t in found if t.observed), [t.kl for t in found if not t.observed]


def test_annealing_and_free_bits(monkeypatch, row_noise):
    model = TwoSites()
    batch = seq.Sequences.of(torch.randn(3, 4, 3), [4, 2, 3])
    guide = seq.FilteringGuide(model, hidden=4, like=batch)
    for parameter in guide.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    Replayed(guide, batch, monkeypatch, row_noise)
    reconstruction, kls = parts(model, guide, batch)
    for weight in (0.0, 0.3, 1.0):
        loss = seq.SequentialELBO(kl_weight=weight).loss(model, guide, batch)
        assert abs(loss + (reconstruction - weight * sum(kl.sum() for kl in kls)).item()) < 1e-9
    loss = seq.SequentialELBO(free_bits=0.05).loss(model, guide, batch)
    clamped = sum(kl.clamp(min=0.05).sum() for kl in kls)
    assert abs(loss + (reconstruction - clamped).item()) < 1e-9
    assert (torch.cat(kls) < 0.05).any() and (torch.cat(kls) > 0.05).any()


def test_several_particles_average():
    """The bound with many particles is the mean of the bound with one, on the same model and guide."""
    model = TwoSites()
    x = torch.randn(2, 3, 3)
    guide = seq.FilteringGuide(model, hidden=4, like=x)
    one = torch.tensor([seq.SequentialELBO().loss(model, guide, x) for _ in range(400)])
    many = seq.SequentialELBO(4000).loss(model, guide, x)
    assert abs(one.mean() - many) < 5 * one.std() / math.sqrt(400)


@pytest.mark.parametrize("make", [seq.FilteringGuide, seq.SmoothingGuide, seq.AmortizedVariationalFilter])
def test_encoder_of_frames(make):
    model = Video()
    x = torch.bernoulli(torch.full((3, 4, 1, 4, 4), 0.5))
    x[0, 1] = torch.nan
    encoder = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2, stride=2), torch.nn.Flatten(), torch.nn.ELU())
    guide = make(model, like=x, encoder=encoder, hidden=4)
    svi = SVI(model, guide, Adam({"lr": 1e-2}), seq.SequentialELBO())
    before = encoder[0].weight.detach().clone()
    for _ in range(3):
        assert math.isfinite(svi.step(x, [4, 2, 3]))
    assert not torch.equal(before, encoder[0].weight)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", None])
def test_cells(cell):
    model = Driven()
    batch = seq.Sequences.of(torch.randn(2, 4), covariates={"u": torch.randn(2, 4, 2)})
    guide = seq.FilteringGuide(model, like=batch, cell=cell, hidden=4)
    assert math.isfinite(seq.SequentialELBO().loss(model, guide, batch))


def test_a_filtering_guide_does_not_see_the_future_and_a_smoothing_guide_does():
    model = Driven()
    u = torch.randn(1, 6, 2)
    x = torch.randn(1, 6)
    other = x.clone()
    other[0, 4:] += 1.0
    for make, sees in ((seq.FilteringGuide, False), (seq.AmortizedVariationalFilter, False), (seq.SmoothingGuide, True)):
        pyro.clear_param_store()
        guide = make(model, like=seq.Sequences.of(x, covariates={"u": u}), hidden=4)
        for parameter in guide.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        found = []
        for data in (x, other):
            pyro.set_rng_seed(0)
            nodes = pyro.poutine.trace(guide).get_trace(data, u=u).nodes
            found.append([nodes[f"z_{t}"]["value"] for t in range(1, 7)])
        same = [torch.equal(a, b) for a, b in zip(*found)]
        assert all(same[:4]) is not sees
        assert not same[4]
