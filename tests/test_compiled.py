"""Compiled steps give what the steps as written give: values, gradients and random draws."""

import pytest
import torch
from cases import all_models, guides
from models import ragged

import pyro_seq as seq

LENGTHS = torch.tensor([4, 6, 2, 5])
GUIDES = ["filtering", "direct", "smoothing", "avf"]


def value_and_gradients(loss, model, guide, batch):
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    torch.manual_seed(3)
    found = loss.differentiable_loss(model, guide, batch)
    if not found.requires_grad:
        return found, []
    gradients = torch.autograd.grad(found, parameters, allow_unused=True)
    return found.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)]


def require_equal(make, model, guide, batch, rtol=1e-10):
    """Twice, since the first run of a compiled loss is as written."""
    written, compiled = make(compile=False), make(compile=True)
    expected = value_and_gradients(written, model, guide, batch)
    for _ in range(2):
        value, gradients = value_and_gradients(compiled, model, guide, batch)
        torch.testing.assert_close(value, expected[0], rtol=rtol, atol=0.0)
        for found, wanted in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * (1 + wanted.abs().max().item()))
    with torch.no_grad():
        for loss in (compiled, compiled):
            torch.manual_seed(3)
            torch.testing.assert_close(torch.tensor(loss.loss(model, guide, batch)), expected[0], rtol=rtol, atol=0.0)
    assert any(entry is not None for entry in compiled.compiler.known.values())


def case(name, guide):
    model, x, covariates = all_models()[name]()
    guide = guides(model, seq.Sequences.of(x, covariates=covariates))[guide]()
    for parameter in guide.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, guide, ragged(x, LENGTHS), covariates


QUICK = [("deep Markov", "avf"), ("VRNN", "filtering"), ("covariates", "smoothing"), ("gamma", "direct")]


@pytest.mark.parametrize(("name", "guide"), [
    pytest.param(name, guide, marks=[] if (name, guide) in QUICK else pytest.mark.slow)
    for name in all_models() for guide in GUIDES])
def test_a_loss_with_its_gradients(name, guide):
    model, guide, x, covariates = case(name, guide)
    batch = seq.Sequences.of(x, LENGTHS, covariates=covariates)
    require_equal(lambda compile: seq.SequentialELBO(2, compile=compile), model, guide, batch)


LOSSES = {
    "elbo": lambda compile: seq.SequentialELBO(2, compile=compile),
    "iwae": lambda compile: seq.IWAE(3, compile=compile),
    "fivo": lambda compile: seq.FIVO(3, compile=compile),
    "vsmc": lambda compile: seq.FIVO(3, 1.0, "stratified", compile=compile),
}


@pytest.mark.parametrize(("name", "guide", "loss"), [
    pytest.param(name, guide, loss, marks=[] if (name, guide) in QUICK[:2] else pytest.mark.slow)
    for name in all_models() for guide in GUIDES for loss in ("iwae", "fivo", "vsmc")])
def test_bounds_of_particles(name, guide, loss):
    model, guide, x, covariates = case(name, guide)
    require_equal(LOSSES[loss], model, guide, seq.Sequences.of(x, LENGTHS, covariates=covariates))
