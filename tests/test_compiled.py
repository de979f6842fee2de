"""Compiled steps give what the steps as written give: values, gradients and random draws."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import all_models, guides
from models import ragged

import pyro_seq as seq
from pyro_seq.engine.loop import Window
from pyro_seq.engine.state import map_state

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


def loss_of(loss, model, guide, batch):
    torch.manual_seed(3)
    return loss.loss(model, guide, batch)


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


# Compiling takes seconds a graph, and a loss has some ten of them: make test-slow runs over everything.
@pytest.mark.parametrize(("name", "guide"), [
    pytest.param(name, guide, marks=[] if (name, guide) == ("deep Markov", "avf") else pytest.mark.slow)
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
    pytest.param(name, guide, loss, marks=[] if (name, guide, loss) == ("VRNN", "filtering", "fivo") else pytest.mark.slow)
    for name in all_models() for guide in GUIDES for loss in ("iwae", "fivo", "vsmc")])
def test_bounds_of_particles(name, guide, loss):
    model, guide, x, covariates = case(name, guide)
    require_equal(LOSSES[loss], model, guide, seq.Sequences.of(x, LENGTHS, covariates=covariates))


@pytest.mark.slow
def test_gaps_and_single_precision():
    torch.set_default_dtype(torch.float32)
    model, guide, x, covariates = case("deep Markov", "filtering")
    x[1, 2], x[0, 1, 2], x[1, 5, 0] = torch.nan, torch.nan, torch.nan
    require_equal(LOSSES["elbo"], model, guide, seq.Sequences.of(x, LENGTHS, covariates=covariates), rtol=1e-5)


def test_gaps_that_have_to_be_drawn_are_left_as_written():
    model, guide, x, _ = case("VRNN", "filtering")
    x[1, 2] = torch.nan
    batch, written, compiled = seq.Sequences.of(x, LENGTHS), seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    for _ in range(3):
        torch.testing.assert_close(value_and_gradients(compiled, model, guide, batch),
                                   value_and_gradients(written, model, guide, batch), rtol=0.0, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["elbo", "fivo"])
def test_windows(loss):
    """Truncated back-propagation, in windows that begin in the middle."""
    model, guide, x, _ = case("deep Markov", "filtering")
    batch = seq.Sequences.of(x, LENGTHS)

    def run(loss):
        torch.manual_seed(3)
        state, found = None, []
        for start, stop in ((1, 3), (4, 6)):
            value, state = loss.window_loss(model, guide, batch, Window(start, stop, state))
            state = map_state(lambda leaf: leaf.detach(), state)
            parameters = [*model.parameters(), *guide.parameters()]
            found.append((value.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(
                parameters, torch.autograd.grad(value, parameters, allow_unused=True))]))
        return found

    expected, compiled = run(LOSSES[loss](False)), LOSSES[loss](True)
    for _ in range(2):
        torch.testing.assert_close(run(compiled), expected, rtol=1e-9, atol=1e-9)


def test_other_numbers_of_sequences_and_steps():
    """Each is filled up to one that is known: few are compiled."""
    model, guide, *_ = case("deep Markov", "direct")
    written, compiled = seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    for steps in (6, 6, 9, 30, 31, 32, 33):
        batch = seq.Sequences.of(torch.bernoulli(torch.full((4, steps, 4), 0.5)))
        torch.testing.assert_close(loss_of(compiled, model, guide, batch), loss_of(written, model, guide, batch),
                                   rtol=1e-9, atol=1e-9)
    assert sum(entry is not None for entry in compiled.compiler.known.values()) == 7


SCALE = 1.0


class Read(seq.StateSpaceModel):
    """Reads a parameter, attributes of all kinds and a global variable."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.plain, self.number, self.options = torch.tensor(0.3), 0.2, {"shift": 0.1}
        self.register_buffer("fixed", torch.tensor(0.7))

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z, t):
        shift = self.number + self.options["shift"] + self.plain + self.fixed + 0.01 * t
        return pyro.sample("z", dist.Normal(self.weight * z + shift, SCALE))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_whatever_the_step_reads_may_change():
    model = Read()
    guide = seq.FilteringGuide(model, hidden=4)
    batch = seq.Sequences.of(torch.randn(3, 5))
    written, compiled = seq.SequentialELBO(), seq.SequentialELBO(compile=True)

    def require_same():
        for _ in range(2):
            torch.testing.assert_close(loss_of(compiled, model, guide, batch), loss_of(written, model, guide, batch),
                                       rtol=1e-9, atol=1e-9)

    def set_global(value):
        global SCALE
        SCALE = value

    require_same()
    before = len(compiled.compiler.known)
    for change in (lambda: model.weight.data.add_(0.1), lambda: model.fixed.fill_(1.5),
                   lambda: setattr(model, "plain", torch.tensor(-2.0)), lambda: model.plain.mul_(3.0)):
        change()
        require_same()
    assert len(compiled.compiler.known) == before  # tensors are inputs
    for change in (lambda: setattr(model, "number", 5.0), lambda: model.options.update(shift=3.0), lambda: set_global(2.0)):
        change()
        require_same()
    set_global(1.0)


def _untraceable():
    """Ten steps that have no graph, and what the warning says."""
    import random

    import numpy as np

    counter = [0]

    def on_a_value(self, z):
        return z + 1.0 if z.sum() > 0 else z

    def as_a_number(self, z):
        return z * float(z.abs().max().clamp(max=1.0))

    def an_item(self, z):
        return z + 0.1 * round(z.detach().mean().item())

    def while_large(self, z):
        while (z.abs() > 2).any():
            z = z / 2
        return z

    def by_numpy(self, z):
        return z + torch.as_tensor(np.sign(z.detach().numpy()))

    def pythons_random(self, z):
        return z + 0 * random.random()

    def numpys_random(self, z):
        return z + 0 * np.random.rand()

    def a_counter(self, z):
        counter[0] += 1
        return z

    def a_mask(self, z):
        return z + 0.1 * z[z > 0].sum()

    def a_list(self, z):
        return z + 0.1 * max(z.tolist())

    said = {on_a_value: "value of a tensor", as_a_number: "value of a tensor", an_item: "value of a tensor",
            while_large: "value of a tensor", by_numpy: "by .numpy()", pythons_random: "random numbers of Python",
            numpys_random: "random numbers of Python or numpy", a_counter: "changes an attribute or a variable",
            a_mask: "by a mask", a_list: "by .tolist()"}
    return said


@pytest.mark.parametrize("disturb", _untraceable(), ids=lambda fn: fn.__name__)
def test_a_step_that_cannot_be_traced_runs_as_written(disturb):
    class Disturbed(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(0.9 * disturb(self, z), 1.0))

        def emission(self, z, x=None):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model = Disturbed()
    guide = seq.FilteringGuide(model, hidden=4)
    batch = seq.Sequences.of(torch.randn(3, 5))
    compiled = seq.SequentialELBO(compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [value_and_gradients(compiled, model, guide, batch) for _ in range(3)]
        expected = value_and_gradients(seq.SequentialELBO(), model, guide, batch)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    said = {str(warning.message) for warning in caught if "not compiled" in str(warning.message)}
    assert said and all(_untraceable_reason(disturb) in text for text in said), said


def _untraceable_reason(disturb):
    return next(reason for fn, reason in _untraceable().items() if fn.__name__ == disturb.__name__)
