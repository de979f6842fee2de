"""Training with compiled steps, as users do it: annealed, in windows, interrupted, with layers switched and weights frozen."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Bayesian, DeepMarkov
from pyro import poutine
from torch import nn

import pyro_seq as seq

LENGTHS = [9, 9, 8, 7, 5, 3]


def pair():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, x = DeepMarkov(gaussian=True), torch.randn(6, 9, 4)
    guide = seq.FilteringGuide(model, like=x, hidden=6)
    for parameter in guide.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model, guide, x


def values_of(model, guide):
    return [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]


def require_same_steps(model, guide, *batches):
    """Losses and gradients of a loss as written and of a compiled one, one batch after the other."""
    losses = seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    for prepare, *batch in batches:
        prepare()
        found = []
        for loss in losses:
            parameters = [*model.parameters(), *guide.parameters()]
            for parameter in parameters:
                parameter.grad = None
            pyro.set_rng_seed(1)
            value = loss.loss_and_grads(model, guide, *batch)
            found.append((torch.tensor(value), [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]))
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_fit_annealed_in_windows():
    found = []
    for compile in (False, True):
        model, guide, x = pair()
        seq.fit(model, guide, seq.Sequences.of(x, LENGTHS), epochs=5, batch_size=3, kl_annealing=3, window=4, progress=False,
                loss=seq.SequentialELBO(compile=compile))
        found.append(values_of(model, guide))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)


class Interrupted(seq.SequentialELBO):
    left = 6

    def window_loss(self, *arguments, **keywords):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().window_loss(*arguments, **keywords)


@pytest.mark.slow
def test_fit_goes_on_after_an_interruption(tmp_path):
    found = []
    for kind in (seq.SequentialELBO, Interrupted):
        model, guide, x = pair()
        options = {"epochs": 4, "batch_size": 3, "progress": False, "checkpoint": tmp_path / kind.__name__}
        data = seq.Sequences.of(x, LENGTHS)
        if kind is Interrupted:
            with pytest.raises(KeyboardInterrupt):
                seq.fit(model, guide, data, loss=Interrupted(compile=True), **options)
        loss = kind(compile=True)
        loss.left = -1
        seq.fit(model, guide, data, loss=loss, **options)
        found.append(values_of(model, guide))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)


class Dropped(seq.StateSpaceModel):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))

    def initial(self):
        return pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.net(z), 0.5).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.slow
def test_dropout_switched_on_and_off():
    model, x = Dropped(), torch.randn(4, 6, 3)
    guide = seq.FilteringGuide(model, like=x, hidden=4)
    require_same_steps(model, guide, *[(lambda mode=mode: model.train(mode), x)
                                       for mode in (True, True, False, False, False, True, False)])


@pytest.mark.slow
def test_weights_frozen_and_thawed():
    model, guide, x = pair()
    guide.eval()  # of frozen weights of a module in training Pyro says that it does not store them

    def freeze(learns):
        for parameter in guide.parameters():
            parameter.requires_grad_(learns)

    require_same_steps(model, guide, *[(lambda learns=learns: freeze(learns), x, LENGTHS)
                                       for learns in (False, False, False, True, True)])


@pytest.mark.slow
def test_a_recurrent_network_exchanged():
    """Also where more rows are met afterwards."""
    model, guide, x = pair()

    def exchange():
        guide.rnn = nn.GRU(guide.rnn.input_size, guide.rnn.hidden_size, batch_first=True)
        pyro.clear_param_store()

    require_same_steps(model, guide, *[(lambda: None, x)] * 3, (exchange, x), (lambda: None, x), (lambda: None, x[:, :6]))


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [[(2, 2000)] * 3, [(1, 2)] * 3 + [(1, 1)] * 3 + [(1, 3)]], ids=["long", "short"])
def test_long_and_short_series(shapes):
    model, guide, _ = pair()
    require_same_steps(model, guide, *[(lambda: None, torch.randn(*shape, 4)) for shape in shapes])


@pytest.mark.slow
def test_a_copied_loss():
    model, guide, x = pair()
    loss = seq.SequentialELBO(compile=True)
    for _ in range(2):
        loss.loss_and_grads(model, guide, x)
    found = []
    for other in (copy.deepcopy(loss), seq.SequentialELBO()):
        for _ in range(2):
            pyro.set_rng_seed(1)
            value = other.loss_and_grads(model, guide, x)
        found.append(value)
    assert found[0] == pytest.approx(found[1], rel=1e-8)


@pytest.mark.slow
def test_conditions_that_change():
    model, x = Bayesian(), torch.randn(3, 7)
    filters = [seq.ParticleFilter(model, 30, compile=compile) for compile in (False, True)]
    for value in (0.3, 0.6, 0.3, 0.9):
        found = []
        with poutine.condition(data={"phi": torch.tensor(value), "noise": torch.tensor(1.2)}):
            for method in filters:
                pyro.set_rng_seed(2)
                found.append(method.run(x).log_evidence)
        torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)
