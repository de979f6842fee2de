"""Matrix products of compiled steps: our kernel's are exact to rounding, and are where they are thought to be."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from models import ragged
from test_compiled import value_and_gradients
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_seq as seq
from pyro_seq.engine.compiled import microkernel, products
from pyro_seq.engine.compiled.compiler import Compiler
from pyro_seq.models import SRNN, VRNN, DeepMarkovModel

DEVICE_IS_CPU = torch.device(torch.get_default_device()).type == "cpu"
EPSILON = torch.finfo(torch.float32).eps


def is_installed():
    """Whether there is a compiler for the kernel."""
    try:
        return bool(microkernel._installed())
    except Exception:
        return False


@pytest.fixture
def ours(monkeypatch):
    """Our kernel, wherever it can be, whether or not it is faster here."""
    if not is_installed():
        pytest.skip("no C++ compiler that makes the kernel")
    monkeypatch.setattr(microkernel, "is_faster", lambda *_: True)


@pytest.fixture
def theirs(monkeypatch):
    monkeypatch.setattr(microkernel, "is_faster", lambda *_: False)
    monkeypatch.setattr(products, "faster", lambda: False)


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float32, device="cpu")


def require_rounding(found, left, right):
    """A sum of K products, in whatever order, is off by at most about K roundings of the sum of their sizes (Higham, *Accuracy
    and stability of numerical algorithms*, 2002, section 3.5)."""
    left, right = left.double(), right.double()
    allowed = (left.shape[1] + 2) * EPSILON * (left.abs() @ right.abs())
    assert ((found.double() - left @ right).abs() <= allowed).all()


@pytest.mark.parametrize("inner", [0, 1, 7, 256, 257, 600])
def test_products_of_all_sizes(ours, inner):
    """Rows and columns around the blocks; operands that are parts of larger ones, and turned over on the left."""
    product = torch.ops.pyro_seq.blocked_product
    for rows in (1, 2, 3, 4, 5, 6, 9, 20):
        for columns in (16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 130):
            left, right = numbers(rows, inner + 3)[:, :inner], numbers(inner, columns + 5)[:, 2:columns + 2]
            require_rounding(product(left, right), left, right)
            left = numbers(inner + 1, rows)[1:].t()
            require_rounding(product(left, right), left, right)
            left = numbers(1, inner).expand(rows, inner)
            require_rounding(product(left, right), left, right)


def test_long_sums_do_not_gather_roundings(ours):
    """Equal terms, whose roundings all go the same way: parts of 256, and their sum, are each off by half a rounding a term."""
    left, right = torch.full((5, 2**16), 0.1, dtype=torch.float32), torch.full((2**16, 64), 0.7, dtype=torch.float32)
    found, exact = torch.ops.pyro_seq.blocked_product(left, right), left.double() @ right.double()
    assert ((found - exact).abs() <= (256 + 2**16 / 256) / 2 * EPSILON * exact).all()


def test_nothing_is_written_beside_the_result(ours):
    for rows, columns in ((3, 17), (20, 100), (7, 64)):
        left, right, out = numbers(rows, 9), numbers(9, columns), torch.full((rows + 2, columns), 7.0, dtype=torch.float32)
        microkernel._installed()(left, right, out[1:], rows, 9, columns, 9, 1, columns)
        assert (out[0] == 7).all() and (out[-1] == 7).all()
        require_rounding(out[1:-1], left, right)


def test_what_is_not_a_number_stays_in_its_row_and_column(ours):
    left, right = numbers(6, 20), numbers(20, 40)
    left[2, 3], right[5, 7], left[4, 1] = torch.nan, torch.inf, torch.inf
    found, expected = torch.ops.pyro_seq.blocked_product(left, right), left @ right
    torch.testing.assert_close(found.isnan(), expected.isnan())
    torch.testing.assert_close(found.nan_to_num(), expected.nan_to_num(), rtol=1e-5, atol=1e-5)


def graph_of(fn, *arguments):
    """A graph with its products exchanged, and how many of each operator there are."""
    module = make_fx(fn, tracing_mode="fake")(*arguments)
    products.use_faster_products(module)
    return module, Counter(node.target for node in module.graph.nodes if node.op == "call_function")


SMALL, LARGE = torch.ops.pyro_seq.blocked_product.default, torch.ops.pyro_seq.product.default
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


@pytest.mark.parametrize(("rows", "fn", "expected"), [
    (20, lambda x, w, b: x @ w, {SMALL: 1}),
    (20, lambda x, w, b: torch.addmm(b, x, w), {SMALL: 1}),
    (20, lambda x, w, b: torch.addmm(x[:, :1], x, w), {SMALL: 1}),
    (20, lambda x, w, b: torch.addmm(b, x, w, beta=0.5), {ADDMM: 1}),
    (20, lambda x, w, b: x.double() @ w.double(), {MM: 1}),
    (20, lambda x, w, b: x @ w[:, :15], {MM: 1}),
    (20, lambda x, w, b: x @ (x.t() @ x), {SMALL: 2}),
    (20, lambda x, w, b: (x @ w) @ w.t(), {SMALL: 1, MM: 1}),  # a transpose is worth more rows
    (64, lambda x, w, b: (x @ w) @ w.t(), {SMALL: 2}),
])
def test_which_products_are_exchanged(ours, rows, fn, expected):
    arguments = numbers(rows, 24), numbers(24, 40), numbers(40)
    module, found = graph_of(fn, *arguments)
    assert {kind: found[kind] for kind in (SMALL, LARGE, MM, ADDMM) if found[kind]} == expected
    value, wanted = module(*arguments), fn(*arguments)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_machine_code_of_exchanged_products(ours):
    """With what stands around them, and operands that are laid out otherwise."""
    def fn(x, w, b):
        both = torch.cat([x @ w, x], -1)
        left, right = both.chunk(2, -1)
        return [left @ w.relu() + b, (x.t() @ left).t() @ w, x[:1].expand(20, -1) @ w, right]

    arguments = numbers(20, 40), numbers(40, 40), numbers(40)
    module, found = graph_of(fn, *arguments)
    assert found[SMALL] == 5 and found[MM] == 0
    with torch.no_grad():
        machine_code = Compiler("a test").build(module, list(arguments))
        for value, wanted in zip(machine_code(*arguments), fn(*arguments), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_large_products_go_to_the_one_that_is_faster(ours, monkeypatch):
    """Ours is on one thread: with more of them, oneDNN's, with a bias of its own where that is a vector."""
    x, w, b = numbers(2000, 80), numbers(80, 64), numbers(64)
    threads = torch.get_num_threads()
    monkeypatch.setattr(products, "faster", lambda: True)
    try:
        torch.set_num_threads(1)
        assert graph_of(torch.addmm, b, x, w)[1][SMALL] == 1
        torch.set_num_threads(2)
        for bias in (b, numbers(2000, 64), numbers(1, 1)):
            module, found = graph_of(torch.addmm, bias, x, w)
            assert found[LARGE] == 1 and found[ADDMM] == 0
            torch.testing.assert_close(module(bias, x, w), torch.addmm(bias, x, w), rtol=1e-5, atol=1e-4)
        monkeypatch.setattr(products, "faster", lambda: False)
        assert graph_of(torch.addmm, b, x, w)[1][ADDMM] == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("fn", "expected"), [
    (lambda x, w: x @ w.t(), 1),
    (lambda x, w: torch.relu(x @ w.T) @ w.transpose(-1, 0), 1),
    (lambda x, w: x @ w.permute(1, -2), 1),
    (lambda x, w: x @ w.t() + w.t().as_strided((1, 24), (1, 1)), 1),  # which reads it as it lies
    (lambda x, w: x @ w.permute(0, 1), 0),
    (lambda x, w: x @ w.movedim(0, 0), 0),
    (lambda x, w: x @ w.transpose(1, 1), 0),
    (lambda x, w: x @ x.t(), 0),  # of no weight
])
def test_which_weights_are_turned_over(ours, fn, expected):
    """Whatever else reads a transpose reads the weight's own."""
    for w in (numbers(24, 24), numbers(24, 24).t()):
        x = numbers(20, 24)
        module = make_fx(fn, tracing_mode="fake")(x, w)
        weight = [node for node in module.graph.nodes if node.op == "placeholder"][1]
        found = products.turned_weights(module, [weight])
        assert len(found) == expected * w.is_contiguous()
        torch.testing.assert_close(module(x, w), fn(x, w), rtol=1e-5, atol=1e-4)
        readers = {user.target for node in found for user in node.users}
        assert readers <= {MM}


def test_python_without_assertions_compiles_nothing():
    """Some of Inductor's do work: without them it leaves out parts of a loop."""
    script = ("import torch; from torch import fx; from pyro_seq.engine.compiled.compiler import Compiler\n"
              "from pyro_seq.engine.compiled.trace import Untraceable\n"
              "try: Compiler('a test').build(fx.symbolic_trace(lambda x: [x + 1]), [torch.ones(2)])\n"
              "except Untraceable as error: print(error)")
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True, check=True)
    assert "leave -O out" in done.stdout


def test_without_a_kernel_products_are_torchs(theirs):
    _, found = graph_of(lambda x, w: x @ w, numbers(20, 24), numbers(24, 40))
    assert found[MM] == 1 and found[SMALL] == 0


def test_a_failing_compiler_leaves_products_to_torch(monkeypatch):
    def fail():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(microkernel, "_installed", fail)
    assert not microkernel.is_faster.__wrapped__(20, 128)


MODELS = {
    "DMM": lambda: DeepMarkovModel(20, 17, 18, 19),
    "VRNN": lambda: VRNN(20, 17, 33),
    "SRNN": lambda: SRNN(20, 17, 33),
}
GUIDES = {
    "network": lambda model, x: seq.FilteringGuide(model, like=x, hidden=32),
    "AVF": lambda model, x: seq.AmortizedVariationalFilter(model, 2, hidden=32),
}


def apart(found, expected):
    """The largest difference of gradients, each relative to its largest entry."""
    return max(((one - other).abs().max() / (1 + other.abs().max())).item()
               for one, other in zip(found[1], expected[1], strict=True))


def sensitivity(parameters, run, expected):
    """What rounding alone may do: how far gradients move if each weight does by its last digit, at most of eight trials.

    Networks' move by 1e-6, but those of an AVF, which reads logarithms of gradients that may be next to zero, by up to 1e-3.
    """
    kept, moved = [parameter.data.clone() for parameter in parameters], []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        for parameter, value in zip(parameters, kept, strict=True):
            up = torch.rand(value.shape, generator=generator, dtype=value.dtype) < 0.5
            parameter.data = value * torch.where(up, 1 + EPSILON, 1 - EPSILON / 2)
        moved.append(apart(run(), expected))
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data = value
    return max(moved)


@pytest.mark.skipif(not DEVICE_IS_CPU, reason="the kernel is a processor's")
@pytest.mark.parametrize(("model", "guide"), [
    pytest.param(model, guide, marks=[] if (model, guide) == ("SRNN", "network") else pytest.mark.slow)
    for model in MODELS for guide in GUIDES])
def test_steps_with_products_by_our_kernel(ours, monkeypatch, model, guide):
    """Value and gradients are those of the steps as written, ragged, while the weights change, and the loops call it.

    Gradients to within 1e-5, those of an AVF beside ten times what rounding the weights does.
    """
    from torch._inductor.select_algorithm import extern_kernels

    torch.set_default_dtype(torch.float32)
    lengths = torch.tensor([9, 12, 2, 5])
    batch = seq.Sequences.of(ragged(torch.bernoulli(torch.full((4, 12, 20), 0.3)), lengths), lengths)
    model = MODELS[model]()
    guide = GUIDES[guide](model, batch)
    sizes, call = [], extern_kernels.pyro_seq_blocked_product
    monkeypatch.setattr(extern_kernels, "pyro_seq_blocked_product", lambda *a, **k: (sizes.append(k["sizes"]), call(*a, **k)))
    written, compiled = seq.SequentialELBO(), seq.SequentialELBO(compile=True)
    parameters = [*model.parameters(), *guide.parameters()]
    for parameter in parameters:
        parameter.data += 0.02 * torch.randn_like(parameter)
    is_avf = isinstance(guide, seq.AmortizedVariationalFilter)
    for _ in range(4):
        for parameter in parameters:
            parameter.data *= 1.03
        found, expected = (value_and_gradients(loss, model, guide, batch) for loss in (compiled, written))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0.0)
        allowed = 1e-5
        if is_avf:
            allowed += 10 * sensitivity(parameters, lambda: value_and_gradients(written, model, guide, batch), expected)
        assert apart(found, expected) <= allowed
    assert sum(rows == 4 for rows, *_ in sizes) >= 2 * 2 * 12  # in the last two rounds, at each step, there and back
