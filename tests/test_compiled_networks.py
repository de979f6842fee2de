"""Recurrent networks of a guide's encoder as compiled loops: the same numbers and gradients, or torch's own."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import LocalLevel
from test_compiled_products import is_installed
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import pyro_seq as seq
from pyro_seq.engine.compiled import microkernel, products, recurrence
from pyro_seq.engine.compiled.compiler import Compiler
from pyro_seq.engine.compiled.recurrence import encoded

NETWORKS = {
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "lstm": lambda: nn.LSTM(3, 4),
    "rnn, tanh, both ways": lambda: nn.RNN(3, 4, bidirectional=True),
    "rnn, relu, without biases": lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False, batch_first=True),
    "two layers of a gru, both ways": lambda: nn.GRU(3, 4, 2, batch_first=True, bidirectional=True),
    "two layers of an lstm": lambda: nn.LSTM(3, 4, 2, batch_first=True),
}


class Holder(seq.SequentialGuide):
    """A guide that has a network."""

    def __init__(self, model, network, name=""):
        super().__init__(model, name=name)
        self.network = network

    def step(self, state, x):
        pyro.sample("z", dist.Normal(x, 1.0))


def level():
    return LocalLevel(0.0, 1.0, 0.25, 1.0)


def counted(monkeypatch):
    """The compiled loops that were run to their end."""
    done = []

    def roll(*arguments, **keywords):
        found = recurrence_roll(*arguments, **keywords)
        if found is not None:
            done.append(found)
        return found

    recurrence_roll = recurrence.roll
    monkeypatch.setattr(recurrence, "roll", roll)
    return done


def results(guide, inputs, start, compiler=None):
    """Outputs, last state and all gradients of a random function of them."""
    inputs = inputs.detach().requires_grad_()

    def run():
        output, last = guide.network(inputs, start)
        return [output, *(last if isinstance(last, tuple) else (last,))]

    found = guide.within(run if compiler is None else lambda: encoded(compiler.run(guide), run, inputs.device))
    pyro.set_rng_seed(5)
    total = sum((value * torch.randn_like(value)).sum() for value in found)
    return found, torch.autograd.grad(total, [inputs, *guide.network.parameters()])


@pytest.mark.parametrize("name", ["lstm", *(pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name != "lstm")])
def test_networks_and_their_gradients(name, monkeypatch):
    done, compiler = counted(monkeypatch), Compiler("test")
    guide = Holder(level(), NETWORKS[name]())
    network = guide.network
    directions = network.num_layers * (2 if network.bidirectional else 1)
    for steps in (11, 3):
        inputs = torch.randn(5, steps, 3) if network.batch_first else torch.randn(steps, 5, 3)
        one = torch.randn(directions, 5, 4)
        start = (one, one.sin()) if isinstance(network, nn.LSTM) else one
        written, compiled = results(guide, inputs, start), results(guide, inputs, start, compiler)
        torch.testing.assert_close(compiled, written, rtol=1e-10, atol=1e-12)
    assert len(done) == 2 * directions


@pytest.mark.slow
def test_batches_of_other_sizes_are_filled_up(monkeypatch):
    done, compiler = counted(monkeypatch), Compiler("test")
    guide = Holder(level(), NETWORKS["gru"]())
    for batch in (7, 9, 21, 22):
        inputs = torch.randn(batch, 6, 3)
        torch.testing.assert_close(results(guide, inputs, None, compiler), results(guide, inputs, None), rtol=1e-10, atol=1e-12)
    assert [rolled.state[0].shape[0] for rolled in done] == [7, 9, 22, 22]


def test_what_is_left_to_torch(monkeypatch):
    """Dropout between layers, projections, packed sequences, and networks that are not the guide's."""
    done, compiler = counted(monkeypatch), Compiler("test")
    guide, inputs = Holder(level(), nn.GRU(3, 4, 2, dropout=0.5)), torch.randn(5, 2, 3)
    projected, stranger = Holder(level(), nn.LSTM(3, 4, proj_size=2), "projected"), nn.GRU(3, 4)

    def run(guide, fn):
        pyro.set_rng_seed(2)
        found = guide.within(lambda: encoded(compiler.run(guide), fn, inputs.device))
        pyro.set_rng_seed(2)
        torch.testing.assert_close(found, guide.within(fn), rtol=0, atol=0)

    run(guide, lambda: guide.network(inputs)[0])
    run(projected, lambda: projected.network(inputs)[0])
    run(guide, lambda: stranger(inputs)[0])
    packed = pack_padded_sequence(inputs, torch.tensor([5, 3]))
    run(guide, lambda: pad_packed_sequence(guide.network(packed)[0])[0])
    assert not done


class Written(seq.SequentialGuide):
    """A user's own encoder."""

    def __init__(self, model):
        super().__init__(model)
        self.encoder, self.head = nn.LSTM(1, 5, batch_first=True, bidirectional=True), nn.Linear(10, 2)

    def prepare(self, x, lengths):
        return self.head(self.encoder(x[..., None])[0])

    def step(self, state, x, encoding):
        pyro.sample("z", dist.Normal(encoding[:, 0], encoding[:, 1].exp()))


GUIDES = {
    "filtering": lambda model: seq.FilteringGuide(model, hidden=6),
    "smoothing": lambda model: seq.SmoothingGuide(model, hidden=6, cell="lstm"),
    "AVF": lambda model: seq.AmortizedVariationalFilter(model, hidden=6, cell="gru"),
    "a user's": Written,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_guides_run_them_compiled(name, monkeypatch):
    """Ragged, also in windows, in training and in a filter."""
    done, model = counted(monkeypatch), level()
    guide, x, lengths = GUIDES[name](model), torch.randn(4, 12), [12, 9, 9, 5]
    for parameter in guide.parameters():
        nn.init.normal_(parameter, std=0.4)
    ways = {compile: seq.SequentialELBO(compile=compile) for compile in (False, True)}
    for _ in range(3):
        found = {}
        for compile, loss in ways.items():
            guide.zero_grad()
            pyro.set_rng_seed(1)
            value = loss.loss_and_grads(model, guide, x, lengths)
            gradients = {key: parameter.grad for key, parameter in guide.named_parameters()}
            # With one iteration an AVF never reads how far the one before has moved.
            assert {key for key, value in gradients.items() if value is None} <= {"update.added_moved"}
            found[compile] = value, {key: value.clone() for key, value in gradients.items() if value is not None}
        torch.testing.assert_close(found[True], found[False], rtol=1e-10, atol=1e-10)
    trained = len(done)
    filters = [seq.ParticleFilter(model, 30, guide=guide, compile=compile) for compile in (False, True)]
    for _ in range(2):
        found = []
        for method in filters:
            pyro.set_rng_seed(1)
            found.append(method.run(x, lengths).log_evidence)
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert 0 < trained < len(done)


@pytest.fixture(params=["oneDNN", "ours"])
def exchanged(request, monkeypatch):
    """By whichever product, on one thread."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    if request.param == "ours" and not is_installed():
        pytest.skip("no C++ compiler that makes the kernel")
    monkeypatch.setattr(products, "faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(microkernel, "is_faster", lambda *_: request.param == "ours")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_large_linear_maps(exchanged):
    """Float32, to the rounding of sums of 256 terms."""
    inputs, weight, bias = (torch.randn(shape, dtype=torch.float32, requires_grad=True)
                            for shape in ((2, 80, 256), (128, 256), (128,)))
    found = products.linear(inputs, weight, bias)
    assert "Linear" in type(found.grad_fn.next_functions[0][0]).__name__
    expected = nn.functional.linear(inputs, weight, bias)
    upstream = torch.randn_like(found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    ours, theirs = (torch.autograd.grad(value, (inputs, weight, bias), upstream) for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    twice = [torch.autograd.grad(torch.autograd.grad(value.square().sum(), weight, create_graph=True)[0].square().sum(), inputs)
             for value in (products.linear(inputs, weight, bias), nn.functional.linear(inputs, weight, bias))]
    torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-4 * twice[1][0].abs().max().item())


def test_linear_maps_that_are_left_to_torch(exchanged):
    """Biases that broadcast, no inputs, other names of arguments, other types; few outputs."""
    inputs, weight = torch.randn(4, 40, 256, dtype=torch.float32), torch.randn(128, 256, dtype=torch.float32)
    for bias in (torch.randn(()), torch.randn(1), torch.randn(1, 128), torch.randn(128)):
        bias = bias.float()
        torch.testing.assert_close(products.linear(input=inputs, weight=weight, bias=bias),
                                   functional.linear(inputs, weight, bias), rtol=1e-5, atol=1e-4)
    assert products.linear(inputs[..., :0], weight[:, :0]).shape == (4, 40, 128)
    few = [torch.randn(shape, dtype=torch.float32, requires_grad=True) for shape in ((60000, 9), (8, 9))]
    torch.testing.assert_close(products.linear(*few), functional.linear(*few), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError):
        products.linear(inputs, weight[:, :3])
    with pytest.raises(RuntimeError):
        products.linear(inputs, weight.double())


def by_checkpoint(guide, inputs):
    return checkpoint(lambda x: guide.network(x)[0], inputs, use_reentrant=False)


def with_own_gradient(guide, inputs):
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        hidden = guide.network(inputs)[0]
        return hidden + torch.autograd.grad(hidden.sum(), inputs, create_graph=True)[0].sum(-1, keepdim=True)


def by_transform(guide, inputs):
    return torch.func.grad(lambda x: guide.network(x)[0].sum())(inputs)


@pytest.mark.parametrize("way", [by_checkpoint, with_own_gradient, by_transform])
def test_gradients_within_an_encoder_are_left_to_torch(way, monkeypatch):
    done, compiler = counted(monkeypatch), Compiler("test")
    guide, inputs = Holder(level(), nn.RNN(3, 4, batch_first=True)), torch.randn(2, 4, 3)

    def gradients(found):
        return found, torch.autograd.grad(found.square().sum(), list(guide.network.parameters()), allow_unused=True)

    written = guide.within(lambda: gradients(way(guide, inputs)))
    for _ in range(2):
        compiled = guide.within(lambda: gradients(encoded(compiler.run(guide), lambda: way(guide, inputs), inputs.device)))
        torch.testing.assert_close(compiled, written, rtol=1e-10, atol=1e-12)
    assert len(done) == (way is with_own_gradient)  # until it was known


class Hooked(LocalLevel):
    def __init__(self):
        super().__init__(0.0, 1.0, 0.25, 1.0)
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.factor.register_hook(lambda gradient: 3 * gradient)

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.factor * z, 0.5))


def test_hooks_on_gradients_run_once():
    model, x = Hooked(), torch.randn(3, 4)
    guide, found = Holder(model, nn.Linear(1, 1)), []
    for compile in (False, True):
        loss = seq.SequentialELBO(compile=compile)
        for _ in range(3):
            model.zero_grad()
            pyro.set_rng_seed(1)
            loss.loss_and_grads(model, guide, x)
        found.append(model.factor.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


@pytest.mark.slow
def test_fivo_where_sequences_end_at_once():
    model, x = level(), torch.randn(3, 4)
    guide = Holder(model, nn.Linear(1, 1))
    losses = seq.FIVO(3, 1.0), seq.FIVO(3, 1.0, compile=True)
    for lengths in ([4, 4, 4], [4, 1, 1], [4, 4, 1], [4, 1, 1]):
        found = []
        for loss in losses:
            pyro.set_rng_seed(1)
            found.append(loss.loss_and_grads(model, guide, x, lengths))
        assert found[0] == pytest.approx(found[1], rel=1e-10)
