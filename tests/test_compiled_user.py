"""What users do between runs of compiled steps: settings of all kinds that change, parameters of all kinds, own randomness."""

import functools
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_seq as seq
from pyro_seq.engine.compiled.reads import Reads

settings = types.ModuleType("settings")
settings.scale = 1.0


class Config:
    scale = 1.0


class Holder:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0

    def times(self, z):
        return self.scale * z


def scaled(scale):
    return lambda z: scale * z


def decorated(factors):
    def decorate(fn):
        @functools.wraps(fn)
        def run(*given):
            return factors[0] * fn(*given)
        return run
    return decorate


FACTORS = [1.0]


@decorated(FACTORS)
def by_decorator(z):
    return z


class Model(seq.StateSpaceModel):
    """The transition is a function that the test gives."""

    factor = 1.0

    def __init__(self, move):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.move, self.turn, self.turns = move, scaled(1.0), [scaled(1.0)]
        self.holder, self.deep = Holder(), {"a": [{"b": types.SimpleNamespace(c=[{"d": 1.0}])}]}

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.weight * self.move(self, z), 0.5))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


CHANGES = {
    "an attribute of a module of Python": (lambda m, z: settings.scale * z, lambda m: setattr(settings, "scale", 2.0)),
    "an attribute of the model's class": (lambda m, z: m.factor * z, lambda m: setattr(Model, "factor", 2.0)),
    "an attribute of another class": (lambda m, z: Config.scale * z, lambda m: setattr(Config, "scale", 2.0)),
    "a function with another closure": (lambda m, z: m.turn(z), lambda m: setattr(m, "turn", scaled(2.0))),
    "such a function in a list": (lambda m, z: m.turns[0](z), lambda m: m.turns.__setitem__(0, scaled(2.0))),
    "slots": (lambda m, z: m.holder.times(z), lambda m: setattr(m.holder, "scale", 2.0)),
    "a decorator's closure": (lambda m, z: by_decorator(z), lambda m: FACTORS.__setitem__(0, 2.0)),
    "far inside": (lambda m, z: m.deep["a"][0]["b"].c[0]["d"] * z, lambda m: m.deep["a"][0]["b"].c[0].update(d=2.0)),
}


@pytest.mark.parametrize(("move", "change"), CHANGES.values(), ids=list(CHANGES))
def test_no_python_value_is_baked(move, change):
    """The key of what a graph is made for changes with whatever the step reads, and with nothing else."""
    model = Model(move)
    reads = Reads(model)
    before = reads.now()[1]
    assert reads.now()[1] == before and hash(reads.now()[1]) == hash(before)
    change(model)
    assert reads.now()[1] != before


def test_a_global_variable_with_the_name_of_an_attribute_is_not_read():
    model, name = Model(lambda m, z: m.holder.times(z)), "times"
    reads = Reads(model)
    before = reads.now()[1]
    globals()[name] = 1
    assert reads.now()[1] == before
    globals().pop(name)


def test_a_submodule_that_is_exchanged():
    model = Model(lambda m, z: z)
    model.net = nn.Linear(1, 1)
    reads = Reads(model)
    other = nn.Linear(1, 1)
    model.net = other
    assert any(value is other.weight for value in reads.now()[0])


def value_and_gradients(loss, model, guide, x):
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    torch.manual_seed(3)
    found = loss.differentiable_loss(model, guide, x)
    gradients = torch.autograd.grad(found, parameters, allow_unused=True)
    after = torch.rand(())
    return found.detach(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients)], after


def require_same(model, guide, x, runs=3):
    written, compiled = seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    for _ in range(runs):
        torch.testing.assert_close(value_and_gradients(compiled, model, guide, x),
                                   value_and_gradients(written, model, guide, x), rtol=1e-9, atol=1e-9)
    assert any(job is not None for job in compiled.compiler.known.values())


class Bayesian(seq.StateSpaceModel):
    """Constrained parameters and global parameters, of the model and of a module inside it."""

    def __init__(self):
        super().__init__()
        self.scale = pyro.nn.PyroParam(torch.tensor(0.8), constraint=dist.constraints.positive)
        self.rho = pyro.nn.PyroSample(dist.Beta(2.0, 2.0))
        self.inner = pyro.nn.PyroModule()
        self.inner.gain = pyro.nn.PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)
        self.inner.bias = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.rho * self.inner.gain * z + self.inner.bias, self.scale))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Normal(z, self.scale), obs=x)


def test_constrained_and_global_parameters():
    model, x = Bayesian(), torch.randn(3, 5)
    guide = seq.FilteringGuide(model, hidden=3, global_guide=AutoNormal(poutine.block(model, expose=model.global_sites())))
    with torch.no_grad():
        guide(x)
    pyro.clear_param_store()
    require_same(model, guide, x)


def test_a_value_that_changes_before_the_way_back():
    class Annealed(Model):
        beta = 1.0

        def transition(self, z):
            return pyro.sample("z", dist.Normal(self.beta * self.weight * z, 0.5))

    model, x = Annealed(lambda m, z: z), torch.randn(3, 5)
    model.beta = 1.0
    guide = seq.FilteringGuide(model, hidden=3)

    class ChangesAfter:
        def __init__(self, loss):
            self.loss = loss

        def differentiable_loss(self, *arguments):
            found = self.loss.differentiable_loss(*arguments)
            model.beta = 5.0
            return found

    written, compiled = seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    for loss in (compiled, ChangesAfter(compiled), compiled):
        model.beta = 1.0
        found = value_and_gradients(loss, model, guide, x)
        model.beta = 1.0
        torch.testing.assert_close(found, value_and_gradients(written, model, guide, x), rtol=1e-9, atol=1e-9)


def test_draws_inside_a_graph_leave_the_generator_as_the_run_as_written_does():
    class Counts(Model):
        def initial(self):
            return pyro.sample("n", dist.Poisson(2.0))

        def transition(self, n):
            return pyro.sample("n", dist.Poisson(1.0 + self.weight.exp() * n))

        def emission(self, n, x=None):
            pyro.sample("x", dist.Normal(self.weight * n, 1.0), obs=x)

    model = Counts(lambda m, z: z)
    require_same(model, seq.PriorGuide(model), torch.randn(3, 5))


@pytest.mark.parametrize("make", [lambda compile: seq.SequentialELBO(compile=compile),
                                  lambda compile: seq.FIVO(3, compile=compile)], ids=["elbo", "fivo"])
def test_parameters_that_are_not_numbers_are_reported_as_by_steps_as_written(make):
    model, x = Model(lambda m, z: z), torch.randn(3, 5)
    guide, compiled = seq.FilteringGuide(model, hidden=3), make(True)
    for _ in range(2):
        compiled.loss_and_grads(model, guide, x)
    model.weight.data.fill_(torch.nan)
    said = []
    for loss in (make(False), compiled):
        torch.manual_seed(0)
        with pytest.raises(ValueError, match="time 2") as caught:
            loss.loss_and_grads(model, guide, x)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_step_with_noise_of_its_own_runs_as_written():
    class Noisy(seq.StateSpaceModel):
        def initial(self):
            return pyro.sample("z", dist.Normal(0.0, 1.0))

        def transition(self, z):
            return pyro.sample("z", dist.Normal(z, 1.0))

        def emission(self, z, x=None):
            pyro.sample("x", dist.Normal(z + 0.1 * torch.randn_like(z), 1.0), obs=x)

    model = Noisy()
    guide = seq.FilteringGuide(model, hidden=4)
    batch, written, compiled = torch.randn(3, 5), seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    value_and_gradients(written, model, guide, batch)  # the first run of a model checks its rows, and draws for that
    with pytest.warns(UserWarning, match="random numbers of its own"):
        found = [value_and_gradients(compiled, model, guide, batch) for _ in range(3)]
    for one in found:
        torch.testing.assert_close(one, value_and_gradients(written, model, guide, batch), rtol=1e-12, atol=1e-12)


class Mixed(seq.StateSpaceModel):
    """A network whose products a user may lower to bfloat16; densities stay as they are."""

    def __init__(self):
        super().__init__()
        self.move = nn.Linear(3, 3)

    def initial(self):
        return pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float32), 1.0).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.move(z).float(), 0.5).to_event(1))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.slow
def test_products_of_a_lower_type_are_compiled_apart():
    """Rounding differs: a rounding of a product is 1 in 256, and what it feeds is of the size of one."""
    model, x = Mixed().float(), torch.randn(2, 5, 3, dtype=torch.float32)
    guide = seq.FilteringGuide(model, like=x, hidden=4)
    for parameter in guide.parameters():
        nn.init.normal_(parameter, std=0.3)
    losses = seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    found = {}
    for lower in (False, True, False, True, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            for loss in losses:
                pyro.set_rng_seed(1)
                found[lower, loss] = loss.loss_and_grads(model, guide, x)
        assert found[lower, losses[0]] == pytest.approx(found[lower, losses[1]], rel=1e-2 if lower else 1e-5)
    for loss in losses:  # a graph of the other type would give its value
        assert abs(found[True, loss] - found[False, loss]) > 1e-4 * abs(found[False, loss])
