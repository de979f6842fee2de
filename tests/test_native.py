"""The kernels in C++ do what torch does."""

import math
import shutil
import sys
import threading

import pyro.distributions as dist
import pytest
import torch
from models import StochasticVolatility
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_seq as seq
from pyro_seq.engine import native
from pyro_seq.engine.compiled.trace import Noise
from pyro_seq.engine.families import log_density, sample
from pyro_seq.engine.weights import Weights

MANY = 2**15 + 5


@pytest.fixture
def kernels():
    found = native._kernels()
    if found is None:
        pytest.skip("no kernels were compiled when the package was installed, or torch draws other numbers here")
    return found


@pytest.fixture
def called(kernels, monkeypatch):
    """The names of the kernels, as they are called."""

    class Watched(list):
        def __getattr__(self, name):
            return lambda *arguments: (self.append(name), getattr(kernels, name)(*arguments))[1]

    watched = Watched()
    monkeypatch.setattr(native, "_kernels", lambda: watched)
    return watched


@pytest.fixture(autouse=True)
def numbers_and_threads_that_kernels_take(clean_slate):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("c++") is None or
                    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
                    reason="kernels draw what torch does with AVX2, and need a compiler when the package is installed")
def test_kernels_are_there_where_they_can_be():
    assert native._kernels() is not None


@pytest.mark.parametrize("before", [0, 1, 623, 624, 1000])
@pytest.mark.parametrize("count", [2**14, 2**14 + 1, 2**14 + 15, 2**14 + 16, 2**14 + 17, 100_003, 2048 * 16])
def test_normal_numbers_are_those_of_torch(called, before, count):
    """Bit for bit, wherever the generator stands; and it goes on alike."""
    found = []
    for fill in (native.fill_normal, torch.Tensor.normal_):
        torch.manual_seed(count)
        torch.rand(before)
        found.append((fill(torch.empty(count)), torch.rand(3), torch.randn(17)))
    assert called == ["standard_normal"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_part_of_a_tensor_is_drawn_and_nothing_beside_it(kernels):
    whole = torch.zeros(3, MANY)
    torch.manual_seed(0)
    assert native.fill_normal(whole[1]).data_ptr() == whole[1].data_ptr()
    torch.manual_seed(0)
    assert torch.equal(whole[1], torch.randn(MANY)) and not whole[0].any() and not whole[2].any()


@pytest.mark.parametrize("out", [lambda: torch.empty(MANY, dtype=torch.float64), lambda: torch.empty(MANY, 2)[:, 0],
                                 lambda: torch.empty(100)], ids=["double", "strided", "few"])
def test_what_the_kernel_does_not_take_is_torchs(called, out):
    out = out()
    torch.manual_seed(1)
    found = native.fill_normal(out).clone()
    torch.manual_seed(1)
    assert not called and torch.equal(found, out.normal_())


def test_numbers_that_another_thread_draws_meanwhile_are_not_drawn_again(kernels):
    """The kernel works on a copy of the generator's state; here torch draws while it does, once."""

    class Interrupted:
        times = 0

        def standard_normal(self, *arguments):
            if self.times == 0:
                torch.rand(700)
            self.times += 1
            kernels.standard_normal(*arguments)

    torch.manual_seed(2)
    out, program = torch.empty(MANY), Interrupted()
    native._draw(program, out, torch.default_generator)
    after = torch.rand(3)
    torch.manual_seed(2)
    torch.rand(700)
    assert program.times == 2 and torch.equal(out, torch.randn(MANY)) and torch.equal(after, torch.rand(3))


def test_threads_that_draw_at_once_share_no_numbers(kernels):
    """Uniform numbers of 24 bits agree by chance now and then; a run of four never (2^-96)."""
    out = [torch.empty(MANY) for _ in range(8)]
    threads = [threading.Thread(target=native.fill_normal, args=(part,)) for part in out]
    torch.manual_seed(3)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.manual_seed(3)
    expected = {tuple(torch.randn(MANY)[:4].tolist()) for _ in range(8)}
    assert {tuple(part[:4].tolist()) for part in out} == expected


def test_a_signal_may_draw_during_a_draw(kernels):
    """What interrupts a draw in its own thread finds no lock, and the draw is done again after it."""

    class Interrupted:
        times = 0

        def standard_normal(self, *arguments):
            self.times += 1
            if self.times == 1:
                native.fill_normal(torch.empty(MANY))
            kernels.standard_normal(*arguments)

    torch.manual_seed(2)
    out = torch.empty(MANY)
    native._draw(Interrupted(), out, torch.default_generator)
    torch.manual_seed(2)
    torch.randn(MANY)
    assert torch.equal(out, torch.randn(MANY))


def test_zeros_are_positive_as_torchs_are(kernels):
    """A uniform number of zero comes once in 2^24, and leaves a radius of zero. Here a state is made that gives some."""
    generators = [torch.Generator("cpu").manual_seed(0) for _ in range(2)]
    state = generators[0].get_state()
    state[24:24 + 8 * 624] = 0
    found = torch.empty(64), torch.empty(64)
    for generator in generators:
        generator.set_state(state)
    native._draw(kernels, found[0], generators[0])
    found[1].normal_(generator=generators[1])
    assert not found[0].any() and torch.equal(*[part.view(torch.int32) for part in found])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, which goes row by row
def test_transforms_and_graphs_see_torchs_operators(called):
    zeros, scales = torch.zeros(MANY), torch.tensor([1.0, 2.0])
    normal = dist.Normal(zeros, 1.0)
    drawn = torch.func.vmap(lambda x: sample(dist.Normal(x, 1.0)), randomness="same")(torch.zeros(2, MANY))
    assert torch.equal(*drawn)
    with torch.no_grad():
        densities = torch.func.vmap(lambda s: log_density(dist.Normal(zeros, s), zeros + s))(scales)
        weights = torch.func.vmap(lambda s: Weights.of(s * drawn).normalised)(scales)
        graph = make_fx(lambda x: (log_density(normal, x) + sample(normal), Weights.of(x[None])))(drawn[0])
    assert torch.allclose(densities[:, 0], -0.5 - scales.log() - math.log(2 * math.pi) / 2)
    assert torch.allclose(weights, (scales[:, None, None] * drawn).softmax(-1))
    aten = torch.ops.aten
    assert {aten.normal_.default, aten.log.default, aten._softmax.default} <= {node.target for node in graph.graph.nodes}
    assert not called


def test_another_default_device_is_left_alone(kernels):
    """Results lie where the arguments do."""
    native._kernels.cache_clear()
    log, x, p = torch.zeros(2, 40), torch.zeros(MANY), dist.Normal(torch.zeros(MANY), 1.0)
    with torch.device("meta"), torch.no_grad():
        assert Weights.of(log).ess.allclose(torch.tensor([40.0, 40.0], device="cpu"))
        assert log_density(p, x).device.type == sample(p).device.type == "cpu"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch about torch
def test_forward_derivatives_are_not_lost(kernels):
    log = torch.randn(1, MANY)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(log, torch.ones_like(log))
        assert forward_ad.unpack_dual(Weights.of(dual).log_mean).tangent.allclose(torch.ones(1))
        assert forward_ad.unpack_dual(log_density(dist.Normal(torch.zeros(1, MANY), 1.0), dual)).tangent.allclose(-log)


def test_torch_compile_sees_torchs_operators(called):
    normal = torch.zeros(MANY), torch.ones(MANY)

    def fn(x, log):
        p = dist.Normal(*normal, validate_args=False)
        return log_density(p, x), sample(p), Weights.of(log).normalised

    with torch.no_grad():
        found = torch.compile(fn, backend="eager", fullgraph=True)(torch.zeros(MANY), torch.zeros(1, 50))
    assert not called and found[0].allclose(torch.tensor(-math.log(2 * math.pi) / 2)) and found[2].allclose(torch.tensor(0.02))


def test_negative_views_are_read_as_what_they_are(kernels):
    log = torch._neg_view(torch.randn(2, 40))
    assert Weights.of(log).normalised.allclose(log.softmax(-1))


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value, loc, scale", [
    ("all", "all", "all"), ("one", "all", "all"), ("all", "one", "all"), ("all", "all", "one"), ("one", "one", "one")])
@pytest.mark.parametrize("shape", [(2**12,), (2**12 + 15,), (50, 101), (2**12 - 1, 1, 3)])
def test_density_is_that_of_torch(called, value, loc, scale, shape):
    """To roundings of the terms: some units in the last place of the largest of them."""
    torch.manual_seed(4)

    def make(which, like):
        return like if which == "all" else like.flatten()[0].expand(shape)

    x, mean = make(value, torch.randn(shape)), make(loc, torch.randn(shape))
    spread = make(scale, torch.exp(4 * torch.randn(shape)))
    with torch.no_grad():
        found = log_density(dist.Normal(mean, spread), x)
    half = ((x - mean).double() / spread).square() / 2
    exact = -half - spread.double().log() - math.log(2 * math.pi) / 2
    largest = half + spread.double().log().abs() + 1
    assert called == ["normal_log_density"] and found.dtype == torch.float32 and found.shape == shape
    assert ((found - exact).abs() <= 8 * EPS * largest).all()


def test_a_density_depends_neither_on_its_place_nor_on_its_neighbours(kernels):
    torch.manual_seed(9)
    for _ in range(50):
        x, mean, scale = torch.randn(()), torch.randn(()), torch.rand(()) + 0.01
        x, mean, scale = (value * torch.ones(2**12 + 13) for value in (x, mean, scale))
        scale[::1000] = math.inf
        with torch.no_grad():
            found = log_density(dist.Normal(mean, scale, validate_args=False), x)
        assert len(found[scale.isfinite()].unique()) == 1 and (found[::1000] == -math.inf).all()


def test_a_weight_does_not_depend_on_its_place(kernels):
    torch.manual_seed(10)
    log = torch.randn(50, 1).expand(50, 45).clone()
    log[:, 0] = 1.0
    assert all(len(row[1:].unique()) == 1 for row in Weights.of(log).normalised)


def test_density_of_vectors_is_a_sum(called):
    torch.manual_seed(5)
    x, p = torch.randn(2000, 5), dist.Normal(torch.randn(2000, 5), torch.rand(2000, 5) + 0.1)
    with torch.no_grad():
        found = log_density(p.to_event(1), x)
    expected = dist.Normal(p.loc.double(), p.scale.double()).log_prob(x.double()).sum(-1)
    assert called and torch.allclose(found.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 2**12 - 1, 2**12 + 3])
@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, math.nan, math.inf, 1e-40, 2.0**-126])
@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_density_of_numbers_that_are_none(kernels, place, scale, value):
    scales, values = torch.ones(2**12 + 4), torch.zeros(2**12 + 4)
    scales[place], values[place] = scale, value
    p = dist.Normal(torch.zeros(()).expand(len(scales)), scales, validate_args=False)
    with torch.no_grad():
        found, expected = log_density(p, values), p.log_prob(values)
    # Torch squares the scale, which underflows: there the logarithm and the quotient, as they are written, decide.
    expected[place] = -((values / scales) ** 2 / 2 + scales.log() + math.log(2 * math.pi) / 2)[place]
    assert torch.allclose(found, expected, rtol=1e-6, equal_nan=True)


def test_density_has_its_gradient():
    x = torch.randn(MANY, requires_grad=True)
    log_density(dist.Normal(0.0, torch.ones(MANY)), x).sum().backward()
    assert torch.equal(x.grad, -x.detach())


@pytest.mark.parametrize("n, particles, spread", [(1, 1, 1.0), (3, 15, 1.0), (3, 16, 1.0), (2, 1000, 30.0), (2, 2**17 + 3, 2.0),
                                                  (1, 4096, 0.0)])
def test_weights_are_those_of_torch(called, n, particles, spread):
    torch.manual_seed(6)
    log = spread * torch.randn(n, particles) - 1000
    if particles > 1:
        log[:, ::3] = -math.inf
    found = Weights.of(log)
    exact = Weights.of(log.double())
    assert called == ["normalise"]
    # Differences of such log weights are exact, and sums are in double precision; below exp(-87) a weight counts as zero.
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert torch.allclose(one.double(), other, rtol=1e-6, atol=math.exp(-87))


@pytest.mark.parametrize("place", [0, 31, 33])
@pytest.mark.parametrize("what", [math.nan, -math.nan, math.inf])
def test_weights_that_are_none_say_so_in_their_row_alone(kernels, place, what):
    log = torch.zeros(3, 34)
    log[1, place] = what
    found = Weights.of(log)
    assert found.normalised[1].isnan().all() and all(part[1].isnan() for part in found[2:])
    assert torch.equal(found.normalised[::2], torch.full((2, 34), 1 / 34)) and found.ess[::2].allclose(torch.tensor(34.0))
    assert Weights.of(torch.full((1, 40), -math.inf)).log_mean.isnan().all()


def test_weights_of_another_form_are_torchs():
    assert native.normalised(torch.zeros(40)) is native.normalised(torch.zeros(0, 40)) is None
    assert native.normalised(torch.zeros(2, 0)) is native.normalised(torch.zeros(2, 2, 40)) is None


def test_weights_have_their_gradient():
    log = torch.randn(2, 50, requires_grad=True)
    Weights.of(log).log_mean.sum().backward()
    assert torch.allclose(log.grad, log.detach().softmax(-1))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_filter_is_the_same_without_kernels(called, monkeypatch, compiled):
    """Without resampling, where a weight's last digit would decide an ancestor, the particles are the same bit for bit, and the
    estimates to the roundings of torch's sums in float32."""
    x = torch.tensor([[0.3, -1.0, 2.0, 0.1, 0.5]])
    found = []
    for there in (called, None):
        monkeypatch.setattr(native, "_kernels", lambda there=there: there)
        torch.manual_seed(7)
        filter_ = seq.ParticleFilter(StochasticVolatility(), 20_000, ess_threshold=0.0, history=True, compile=compiled)
        for _ in range(2 if compiled else 1):  # the first run is as written
            torch.manual_seed(7)
            posterior = filter_.run(x)
        found.append(posterior)
    ours, theirs = found
    assert called.count("standard_normal") >= 5
    for one, other in zip(ours.particles.steps, theirs.particles.steps, strict=True):
        assert torch.equal(one.sites["z"].value, other.sites["z"].value)
    assert torch.allclose(ours.log_evidence, theirs.log_evidence, rtol=1e-5)
    assert torch.allclose(ours.ess, theirs.ess, rtol=1e-4)
    assert torch.allclose(ours.filtered["z"].mean, theirs.filtered["z"].mean, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16,), (20, 64), (3, 16, 5), (400, 64)])
def test_numbers_of_several_steps_at_once_are_those_of_one_after_the_other(dtype, shape):
    noise = Noise("normal_", (), shape, dtype, torch.device("cpu"))
    torch.manual_seed(8)
    one_by_one = torch.stack([noise.draw() for _ in range(7)])
    torch.manual_seed(8)
    assert noise.is_divisible and torch.equal(noise.fill(torch.empty(7, *shape, dtype=dtype)), one_by_one)
    assert not noise._replace(shape=(20, 3)).is_divisible and not noise._replace(method="exponential_").is_divisible
