"""Particle filters fed one frame at a time: the numbers of the whole run, snapshots, mistakes."""

import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import VRNN, Bayesian, DeepMarkov, Driven, GammaRate, HiddenMarkov, LocalLevel, TwoSites
from pyro import poutine
from torch import Tensor

import pyro_seq as seq
from pyro_seq.models import DeepMarkovModel, StochasticVolatility, StructuredInference, VRNNInference


class Halfway(seq.SequentialGuide):
    def step(self, state, x):
        before = torch.zeros_like(x) if state is None else state
        pyro.sample("z", dist.Normal((before + x) / 2, 0.8))


class Smoothed(seq.SequentialGuide):
    """Reads a running mean of the data, made by ``prepare`` or, in a stream, carried on."""

    reads_future = False

    def prepare(self, x, lengths):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)

    def stream_rows(self, sequences, carry):
        x = sequences.x["x"].nan_to_num()
        total, count = (torch.zeros_like(x[:, 0]), 0 * x[:, 0]) if carry is None else (carry["total"], carry["count"])
        totals = total[:, None] + x.cumsum(1)
        counts = count[:, None] + torch.arange(1, x.shape[1] + 1)
        return totals / counts, {"total": totals[:, -1], "count": counts[:, -1]}

    def step(self, state, x, encoding):
        pyro.sample("z", dist.Normal((x + encoding) / 2, 0.8))


class Pair(NamedTuple):
    level: Tensor
    slope: Tensor


class Trend(seq.SequentialModel):
    """A named tuple for a state."""

    def start(self, rows):
        return Pair(torch.zeros(rows), torch.zeros(rows))

    def step(self, state, x=None):
        slope = pyro.sample("slope", dist.Normal(state.slope, 0.1))
        level = pyro.sample("level", dist.Normal(state.level + slope, 0.5))
        pyro.sample("x", dist.Normal(level, 1.0), obs=x)
        return Pair(level, slope)


def level():
    return LocalLevel(0.0, 1.0, 0.5, 1.0)


def with_guide(make, guide, shape=(3, 7), **like):
    def build():
        model = make()
        x = torch.randn(shape)
        return model, guide(model, x), x, {}
    return build


CASES = {
    "prior": with_guide(level, lambda m, x: None),
    "kalman": with_guide(level, lambda m, x: seq.KalmanGuide(m)),
    "unscented": with_guide(level, lambda m, x: seq.KalmanGuide(m, "unscented")),
    "hand-written": with_guide(level, lambda m, x: Halfway(m)),
    "prepared": with_guide(level, lambda m, x: Smoothed(m)),
    "filtering": with_guide(level, lambda m, x: seq.FilteringGuide(m, like=x, hidden=6)),
    "lstm": with_guide(level, lambda m, x: seq.FilteringGuide(m, like=x, hidden=6, cell="lstm")),
    "frame alone": with_guide(level, lambda m, x: seq.FilteringGuide(m, like=x, hidden=6, cell=None)),
    "avf": with_guide(level, lambda m, x: seq.AmortizedVariationalFilter(m, like=x, hidden=6)),
    "avf gru": with_guide(level, lambda m, x: seq.AmortizedVariationalFilter(m, like=x, hidden=6, cell="gru")),
    "avf paper": with_guide(level, lambda m, x: seq.AmortizedVariationalFilter(m, like=x, hidden=6, preset="paper")),
    "deep Markov": with_guide(lambda: DeepMarkov(gaussian=True), lambda m, x: seq.FilteringGuide(m, like=x), (3, 7, 4)),
    "VRNN": with_guide(VRNN, lambda m, x: seq.FilteringGuide(m, like=x), (3, 7, 4)),
    "published VRNN": lambda: published(seq.models.VRNN(observed=4, latent=2, hidden=5), VRNNInference),
    "published DMM": lambda: published(DeepMarkovModel(observed=4, latent=2, hidden=5),
                                       lambda m: StructuredInference(m, reads="past", hidden=5)),
    "two sites": with_guide(TwoSites, lambda m, x: None, (3, 7, 3)),
    "discrete": with_guide(HiddenMarkov, lambda m, x: None),
    "named tuple": with_guide(Trend, lambda m, x: None),
    "covariates": lambda: (Driven(), None, torch.randn(3, 7), {"u": torch.randn(3, 7, 2)}),
    "globals": lambda: (Bayesian(), None, torch.randn(3, 7), {}),
}


def published(model, guide):
    return model, guide(model), torch.bernoulli(torch.full((3, 7, 4), 0.5)), {}


def at_fixed_globals(model):
    """A Bayesian model is run at values that the test fixes."""
    return poutine.condition(data={"phi": torch.tensor(0.7), "noise": torch.tensor(1.2)}) if model.global_sites() else (
        lambda fn: fn)


def feed(stream, x, covariates, times=None, mask=None):
    out = []
    for t in range(x.shape[1]) if times is None else times:
        more = {} if mask is None else {"mask": mask[:, t]}
        out.append(stream.update(x[:, t], **more, **{k: v[:, t] for k, v in covariates.items()}))
    return out


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_stream_gives_what_a_run_gives(name, missing):
    model, guide, x, covariates = CASES[name]()
    if missing:
        x[0, 2], x[2, 4:6] = torch.nan, torch.nan
    method = seq.ParticleFilter(model, 40, guide=guide)
    fixed = at_fixed_globals(model)
    pyro.set_rng_seed(1)
    whole = fixed(lambda: method.run(x, **covariates))()
    pyro.set_rng_seed(1)
    stream = method.stream()
    found = fixed(lambda: feed(stream, x, covariates))()
    torch.testing.assert_close(torch.stack([f.log_predictive for f in found], 1), whole.log_evidence_by_step)
    torch.testing.assert_close(torch.stack([f.ess for f in found], 1), whole.ess)
    torch.testing.assert_close(stream.log_evidence, whole.log_evidence)
    for site, moments in whole.filtered.items():
        torch.testing.assert_close(torch.stack([f.moments[site].mean for f in found], 1), moments.mean)
        torch.testing.assert_close(torch.stack([f.moments[site].variance for f in found], 1), moments.variance)
        last = found[-1].particles[site]
        weights = found[-1].weights.reshape(*found[-1].weights.shape, *(1,) * (last.dim() - 2))
        torch.testing.assert_close((weights * last).sum(1), moments.mean[:, -1])
    assert stream.time == 7 and stream.parameters.keys() == whole.parameters.keys()


NEWER = ("filter", "ess_threshold", "resampling", "types")


def equal(a, b):
    return torch.equal(a.log_predictive, b.log_predictive) and torch.equal(a.weights, b.weights) and all(
        torch.equal(a.particles[k], b.particles[k]) for k in a.particles)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_goes_on_bit_for_bit(name, early):
    """Early snapshots tell less of the filter."""
    model, guide, x, covariates = CASES[name]()
    method = seq.ParticleFilter(model, 20, guide=guide)
    stream = method.stream()
    at_fixed_globals(model)(lambda: feed(stream, x, covariates, range(3)))()
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    first = feed(stream, x, covariates, range(3, 7))
    file.seek(0)
    torch.randn(5)
    other = method.stream()
    saved = torch.load(file, weights_only=True)
    other.load_state_dict({k: v for k, v in saved.items() if not (early and k in NEWER)})
    second = feed(other, x, covariates, range(3, 7))
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(stream.log_evidence, other.log_evidence) and stream.time == other.time


GUIDES = {"kalman": lambda model, x: seq.KalmanGuide(model),
          "avf": lambda model, x: seq.AmortizedVariationalFilter(model, like=x, cell="gru", hidden=8)}

RESUME = """
import sys, torch
sys.path.insert(0, {tests!r})
import test_particle_stream as here
torch.set_default_dtype(torch.float64)
torch.set_num_threads({threads})
for saved in torch.load({path!r}, weights_only=True):
    print(*here.resumed(saved))
"""


def resumed(saved):
    """Make everything anew, load a snapshot taken at time 4, and go on; exact numbers."""
    model = DeepMarkov(gaussian=True)
    guide = GUIDES[saved["name"]](model, saved["x"])
    stream = seq.ParticleFilter(model, 30, guide=guide).stream()
    model.load_state_dict(saved["model"]), guide.load_state_dict(saved["guide"]), stream.load_state_dict(saved["stream"])
    return finished(stream, saved["x"])


def finished(stream, x):
    last = feed(stream, x, {}, range(4, x.shape[1]))[-1]
    return [v.hex() for value in (stream.log_evidence, last.weights, last.moments["z"].mean) for v in value.flatten().tolist()]


def test_a_snapshot_goes_on_bit_for_bit_in_another_process(tmp_path):
    saved, expected = [], []
    for name, make in GUIDES.items():
        model, x = DeepMarkov(gaussian=True), torch.randn(2, 8, 4)
        guide = make(model, x)
        stream = seq.ParticleFilter(model, 30, guide=guide).stream()
        feed(stream, x, {}, range(4))
        saved.append({"name": name, "x": x, "model": model.state_dict(), "guide": guide.state_dict(),
                      "stream": stream.state_dict()})
        expected.append(finished(stream, x))
    path = tmp_path / "streams.pt"
    torch.save(saved, path)
    script = RESUME.format(tests=str(Path(__file__).parent), path=str(path), threads=torch.get_num_threads())
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in found.splitlines()] == expected


def test_the_evidence_of_a_bayesian_model_keeps_the_first_draw_of_its_globals():
    stream = seq.ParticleFilter(Bayesian(), 10).stream()
    with pytest.warns(UserWarning, match="were drawn from their prior"):
        stream.update(torch.zeros(2))
    drawn = dict(stream.parameters)
    stream.update(torch.zeros(2))
    assert {"phi", "noise"} == set(drawn) and all(torch.equal(stream.parameters[k], drawn[k]) for k in drawn)


def test_a_stream_is_constant_memory_and_leaves_the_parameter_store_alone():
    model = DeepMarkov(gaussian=True)
    stream = seq.ParticleFilter(model, 5).stream()
    sizes = []
    for _ in range(6):
        stream.update(torch.randn(2, 4))
        sizes.append(len(str({k: v for k, v in stream.state_dict().items() if k != "generators"}.keys())) + sum(
            leaf.untyped_storage().nbytes() for leaf in (stream._state, stream._log_weights)))
    assert len(set(sizes)) == 1
    assert not list(pyro.get_param_store())


def resident():
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory held from /proc")
def test_a_million_streamed_steps_of_a_hundred_particles_hold_no_more_memory():
    stream = seq.ParticleFilter(StochasticVolatility(), 100).stream()
    x = torch.randn(1000, 1)
    for k in range(1_000_000):
        stream.update(x[k % 1000])
        if k == 20_000:
            before = resident()
    assert stream.time == 1_000_000 and stream.log_evidence.isfinite().all()
    assert resident() < before + 10e6  # ten bytes a step would be as much


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory held from /proc")
def test_a_million_particles_for_a_hundred_steps_hold_no_more_memory():
    """In a process of its own, whose C library gives every large block back: Linux's otherwise leaves holes between aligned
    blocks (its bug 14581, mended in version 2.38), and what the process holds varies from run to run."""
    program = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
import pyro_seq as seq
from pyro_seq.models import StochasticVolatility
method, x = seq.ParticleFilter(StochasticVolatility(), 1_000_000), torch.randn(1, 100)
method.run(x[:, :10])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
method.run(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run(
        [sys.executable, "-c", program.format(tests=str(Path(__file__).parent))], check=True, capture_output=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}).stdout)  # kilobytes
    assert grown < 90 * 4_000 / 3  # a number a particle for every third of the further steps would be as much


def test_masked_whole_numbers():
    x = torch.poisson(torch.full((3, 6), 2.0)).long()
    mask = torch.rand(3, 6) > 0.4
    method = seq.ParticleFilter(GammaRate(), 30)
    pyro.set_rng_seed(1)
    whole = method.run(x, mask=mask)
    pyro.set_rng_seed(1)
    stream = method.stream()
    feed(stream, x, {}, mask=mask)
    torch.testing.assert_close(stream.log_evidence, whole.log_evidence)


def test_predictions_are_those_of_a_run():
    """The same particles: of 20000 futures each the means agree within 4.5 standard errors (two-sided 7e-6 each)."""
    method = seq.ParticleFilter(level(), 200)
    x = torch.randn(2, 5)
    pyro.set_rng_seed(1)
    whole = method.run(x).predict(3, 20000)
    pyro.set_rng_seed(1)
    stream = method.stream()
    feed(stream, x, {})
    future = stream.predict(3, 20000)
    assert future.times.tolist() == [[6, 7, 8]] * 2 and future.samples["x"].shape == (20000, 2, 3)
    for site in ("x", "z"):
        error = (whole.std(site) ** 2 + future.std(site) ** 2).div(20000).sqrt()
        assert ((whole.mean(site) - future.mean(site)).abs() < 4.5 * error).all()


def test_predictions_read_covariates_and_time():
    stream = seq.ParticleFilter(Driven(), 10).stream()
    feed(stream, torch.randn(2, 3), {"u": torch.randn(2, 3, 2)})
    far = torch.tensor([100.0, 0.0]).expand(2, 2, 2)
    assert (stream.predict(2, 50, u=far).mean("z")[:, 0] > 90).all()


class Bounded(seq.StateSpaceModel):
    """Uniform noise: a frame further than one from every particle is impossible."""

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 0.1))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, 0.1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Uniform(z - 1, z + 1), obs=x)


@pytest.mark.parametrize("at", [0, 2])
def test_a_frame_that_fails_leaves_all_as_it_was(at):
    stream = seq.ParticleFilter(Bounded(), 20).stream()
    feed(stream, torch.zeros(2, at), {})
    before, generator = stream.state_dict(), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"all 20 particles have weight zero at time {at + 1} in sequence 1"):
        stream.update(torch.tensor([0.0, 50.0]))
    after = stream.state_dict()
    assert torch.equal(torch.get_rng_state(), generator) and stream.time == at
    assert {k: v for k, v in before.items() if not isinstance(v, (Tensor, dict))} == {
        k: v for k, v in after.items() if not isinstance(v, (Tensor, dict))}
    if at:
        assert all(torch.equal(before[k], after[k]) for k in ("log_weights", "log_evidence", "state"))
    stream.update(torch.tensor([0.0, 0.1]))
    assert stream.time == at + 1


def test_data_outside_the_support_is_met_as_it_comes():
    stream = seq.ParticleFilter(GammaRate(), 10).stream()
    feed(stream, torch.ones(2, 2), {})
    with pytest.raises(ValueError, match="site 'x': the data of sequence 1 at time 3 lies outside the support of Poisson"):
        stream.update(torch.tensor([1.0, -2.0]))
    assert stream.time == 2


class Whole(seq.SequentialGuide):
    def prepare(self, x, lengths):
        return x

    def step(self, state, x, encoding):
        pyro.sample("z", dist.Normal(x, 1.0))


class Past(Whole):
    reads_future = False


@pytest.mark.parametrize("make, error, message", [
    (lambda: seq.ParticleFilter(level(), 5, num_runs=2), ValueError, "a stream is one filter"),
    (lambda: seq.ParticleFilter(level(), 5, history=True), ValueError, "a stream is one filter"),
    (lambda: (lambda m: seq.ParticleFilter(m, 5, guide=seq.SmoothingGuide(m)))(level()), ValueError,
     "SmoothingGuide reads frames to come"),
    (lambda: (lambda m: seq.ParticleFilter(m, 5, guide=Whole(m)))(level()), ValueError, "set reads_future = False"),
    (lambda: seq.ParticleFilter(seq.from_pyro(lambda x: None), 5), TypeError, "no Markov state to stream"),
])
def test_what_cannot_be_streamed(make, error, message):
    with pytest.raises(error, match=message):
        make().stream()


def test_a_guide_that_prepares_must_say_how_to_go_on():
    model = level()
    stream = seq.ParticleFilter(model, 5, guide=Past(model)).stream()
    with pytest.raises(ValueError, match="Past prepares its encodings from the whole series.*define stream_rows"):
        stream.update(torch.zeros(2))


@pytest.mark.parametrize("x, covariates, message", [
    (torch.zeros(3), {"u": torch.zeros(3, 2)}, "time 3 holds 3 sequences and the ones before 2"),
    (torch.zeros(2), {}, "has data and covariates of shapes x \\(B,\\), and the ones before u \\(B, 2\\), x \\(B,\\)"),
    (torch.zeros(2), {"u": torch.zeros(2, 3)}, "shapes u \\(B, 3\\), x \\(B,\\), and the ones before u \\(B, 2\\)"),
    (torch.zeros(2), {"u": torch.zeros(2, 2), "w": torch.zeros(2)}, "and the ones before"),
    (torch.zeros(2, 1), {"u": torch.zeros(2, 2)}, "and the ones before"),
    (None, {"u": torch.zeros(2, 2)}, "holds no data: pass x"),
    (torch.tensor(1.0), {"u": torch.zeros(2, 2)}, "use x\\[None\\]"),
    (torch.tensor([1.0, torch.inf]), {"u": torch.zeros(2, 2)}, "infinite"),
])
def test_mistakes_in_a_frame(x, covariates, message):
    stream = seq.ParticleFilter(Driven(), 5).stream()
    feed(stream, torch.zeros(2, 2), {"u": torch.zeros(2, 2, 2)})
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        stream.update(x, **covariates)
    assert stream.time == 2 and torch.equal(torch.get_rng_state(), generator)


def test_a_stream_without_frames_cannot_predict():
    with pytest.raises(ValueError, match="has seen no frame yet"):
        seq.ParticleFilter(level(), 5).stream().predict(2)
    with pytest.raises(ValueError, match="data"):
        seq.ParticleFilter(level(), 5).stream().update(None)


@pytest.mark.parametrize("spoil, message", [
    (lambda s: None, "no snapshot of a particle stream"),
    (lambda s: {"weight": torch.zeros(2)}, "no snapshot of a particle stream"),
    (lambda s: {k: v for k, v in s.items() if k != "carry"}, "it lacks \\['carry'\\]"),
    (lambda s: {**s, "model": "Other"}, "a stream with model 'Other', and this one has 'LocalLevel'"),
    (lambda s: {**s, "guide": "Other"}, "a stream with guide 'Other'"),
    (lambda s: {**s, "num_particles": 6}, "num_particles 6, and this one has 5"),
    (lambda s: {**s, "filter": "AuxiliaryParticleFilter"}, "with filter 'AuxiliaryParticleFilter', and this .*'ParticleF"),
    (lambda s: {**s, "ess_threshold": 0.9}, "with ess_threshold 0.9, and this one has 0.5"),
    (lambda s: {**s, "ess_threshold": torch.ones(2)}, "with ess_threshold tensor"),
    (lambda s: {**s, "resampling": "Soft"}, "with resampling 'Soft', and this one has 'Ancestral\\(systematic"),
    (lambda s: {**s, "state": None}, "damaged: it holds no state, at time 2"),
    (lambda s: {**s, "state": torch.zeros(10).bool()}, "the state is bool \\(10,\\), and that of LocalLevel is float64"),
    (lambda s: {**s, "state": torch.zeros(10).float()}, "the state is float32 \\(10,\\)"),
    (lambda s: {**s, "state": torch.zeros(10, 2)}, "the state is float64 \\(10, 2\\), and that of .* is float64 \\(10,\\)"),
    (lambda s: {**s, "state": {"kind": "tuple", "parts": [torch.zeros(10)]}}, "the state is \\('tuple'"),
    (lambda s: {**s, "state": {"kind": "set", "parts": [torch.zeros(10)]}}, "a state of kind 'set'"),
    (lambda s: {**s, "carry": torch.zeros(2)}, "carry is float64 \\(2,\\), and that of PriorGuide is None"),
    (lambda s: {**s, "latents": ["w"]}, "latents are \\['w'\\], and those of LocalLevel \\['z'\\]"),
    (lambda s: {**s, "latents": None}, "latents are \\[\\]"),
    (lambda s: {**s, "inputs": {}}, "types are .* and inputs {}"),
    (lambda s: {**s, "inputs": {"y": []}, "types": {"y": "float64"}}, "'y' is not an argument of any method of LocalLevel"),
    (lambda s: {**s, "inputs": {"x": "?"}}, "damaged"),
    (lambda s: {**s, "types": {"x": "nn"}}, "types are {'x': 'nn'}"),
    (lambda s: {**s, "parameters": {"phi": torch.zeros(())}}, "parameters are of \\['phi'\\], and the global parameters of L"),
    (lambda s: {**s, "log_weights": torch.zeros(2, 5).long()}, "log_weights is torch.int64; it is a tensor of a fl"),
    (lambda s: {**s, "log_weights": torch.zeros(2, 5) + 0j}, "log_weights is torch.complex128"),
    (lambda s: {**s, "log_weights": torch.full((2, 5), -torch.inf)}, "log_weights of sequence 0 are NaN, infinite, or all m"),
    (lambda s: {**s, "log_weights": torch.full((2, 5), torch.inf)}, "log_weights of sequence 0 are NaN, infinite"),
    (lambda s: {**s, "log_weights": torch.full((2, 5), torch.nan)}, "log_weights of sequence 0 are NaN"),
    (lambda s: {**s, "log_evidence": torch.tensor([0.0, torch.nan])}, "log_evidence is \\[0.0, nan\\]; it is finite"),
    (lambda s: {**s, "log_evidence": [0.0, 0.0]}, "log_evidence is list"),
    (lambda s: {**s, "time": True}, "damaged: time=True"),
    (lambda s: {**s, "time": -1}, "damaged: time=-1"),
    (lambda s: {**s, "time": 0}, "time=0, before the first frame, and yet it holds \\['log_weights', 'log_evidence', 'state'"),
    (lambda s: {**s, "log_weights": torch.zeros(2, 4)}, "damaged: log_weights has shape \\(2, 4\\)"),
    (lambda s: {**s, "log_weights": None}, "damaged"),
    (lambda s: {**s, "log_evidence": torch.zeros(3)}, "damaged: log_evidence has shape \\(3,\\)"),
    (lambda s: {**s, "state": torch.zeros(7)}, "damaged: the state has tensors of shapes \\[\\(7,\\)\\]"),
    (lambda s: {**s, "state": {"kind": "dict"}}, "damaged"),
    (lambda s: {**s, "time": "3"}, "damaged: time='3'"),
    (lambda s: {**s, "generators": {}}, "damaged: generators"),
    (lambda s: {**s, "generators": {"cpu": torch.zeros(3)}}, "damaged"),
])
def test_snapshots_that_cannot_be_loaded(spoil, message):
    method = seq.ParticleFilter(level(), 5)
    stream = method.stream()
    feed(stream, torch.zeros(2, 2), {})
    saved = stream.state_dict()
    fresh = method.stream()
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(spoil(saved))
    assert fresh.time == 0 and fresh.log_evidence is None and torch.equal(torch.get_rng_state(), generator)


def moved(state, change):
    """A state in a snapshot, with other tensors."""
    if isinstance(state, Tensor):
        return change(state)
    return {**state, "parts": [moved(part, change) for part in state["parts"]]}


@pytest.mark.parametrize("name", CASES)
def test_the_state_and_the_carry_in_a_snapshot_are_those_of_the_model_and_the_guide(name):
    model, guide, x, covariates = CASES[name]()
    method = seq.ParticleFilter(model, 20, guide=guide)
    stream = method.stream()
    at_fixed_globals(model)(lambda: feed(stream, x, covariates, range(3)))()
    saved, generator = stream.state_dict(), torch.get_rng_state()
    guides = set(stream.guide.__dict__)
    spoilt = [{"state": moved(saved["state"], change)} for change in (lambda v: v[..., None], torch.Tensor.bool)]
    if saved["carry"] is not None:
        spoilt += [{"carry": None}, {"carry": moved(saved["carry"], lambda v: v[..., None])},
                   {"carry": moved(saved["carry"], torch.Tensor.int)}]
    for spoil in spoilt:
        with pytest.raises(ValueError, match=f"damaged: (the )?{next(iter(spoil))} is"):
            method.stream().load_state_dict({**saved, **spoil})
    assert torch.equal(torch.get_rng_state(), generator) and set(stream.guide.__dict__) == guides


@pytest.mark.parametrize("parameters, message", [
    ({}, "parameters are of \\[\\], and the global parameters of Bayesian are \\['noise', 'phi'\\]"),
    ({"phi": torch.tensor(0.5), "noise": torch.tensor(-30.0)}, "parameters\\['noise'\\] lies outside the support of its prior"),
    ({"phi": torch.tensor(torch.nan), "noise": torch.tensor(1.0)}, "parameters\\['phi'\\] lies outside the support"),
    ({"phi": torch.zeros(2), "noise": torch.tensor(1.0)}, "parameters\\['phi'\\] has shape \\(2,\\); its prior has \\(\\)"),
    ({"phi": 0.5, "noise": 1.0}, "damaged"),
])
def test_the_parameters_in_a_snapshot_are_possible_ones(parameters, message):
    method = seq.ParticleFilter(Bayesian(), 10)
    stream = method.stream()
    at_fixed_globals(Bayesian())(lambda: feed(stream, torch.zeros(2, 3), {}))()
    saved = stream.state_dict()
    with pytest.raises(ValueError, match=message):
        method.stream().load_state_dict({**saved, "parameters": parameters})


class Awkward(Driven):
    """Its step cannot be run where a covariate is zero."""

    def transition(self, z, u):
        if not u.any():
            raise RuntimeError
        return super().transition(z, u)


def test_a_snapshot_of_a_model_that_cannot_be_run_without_data_goes_on():
    method, x, u = seq.ParticleFilter(Awkward(), 10), torch.randn(2, 4), torch.randn(2, 4, 2)
    stream, other = method.stream(), method.stream()
    feed(stream, x, {"u": u}, range(2))
    saved = stream.state_dict()
    first = feed(stream, x, {"u": u}, range(2, 4))
    other.load_state_dict(saved)
    assert equal(first[-1], feed(other, x, {"u": u}, range(2, 4))[-1])


class Twice(Halfway):
    """Draws in double precision, whatever the model's."""

    def step(self, state, x):
        super().step(state, x.double())


class Counted(LocalLevel):
    def __init__(self):
        super().__init__(0.0, 1.0, 0.5, 1.0)

    def emission(self, z, x=None):
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


def test_a_guide_that_draws_in_another_precision_has_its_snapshots_back():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        model = Counted()
        method = seq.ParticleFilter(model, 10, guide=Twice(model))
        stream, other = method.stream(), method.stream()
        feed(stream, torch.ones(2, 3).long(), {})
        assert stream._state.dtype == torch.float64
        other.load_state_dict(stream.state_dict())
        with pytest.raises(ValueError, match="the state is bool"):
            other.load_state_dict({**stream.state_dict(), "state": torch.zeros(20).bool()})
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("options", [{"resampling": "multinomial"}, {"resampling": seq.resampling.Soft(0.3)},
                                     {"ess_threshold": 0.9}])
def test_a_snapshot_of_another_filter_is_refused(options):
    stream = seq.ParticleFilter(level(), 5, **options).stream()
    feed(stream, torch.zeros(2, 2), {})
    for method in (seq.ParticleFilter(level(), 5), seq.AuxiliaryParticleFilter(level(), 5, **options)):
        with pytest.raises(ValueError, match="make the ParticleFilter as it was"):
            method.stream().load_state_dict(stream.state_dict())


def test_a_generator_that_cannot_be_set_leaves_the_others():
    method = seq.ParticleFilter(level(), 5)
    saved, generator = method.stream().state_dict(), torch.get_rng_state()
    with pytest.raises(ValueError, match="damaged"):
        method.stream().load_state_dict({**saved, "generators": {"cpu": torch.zeros(5056)}})
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_frame_takes_the_type_that_a_run_would_take():
    plain = seq.ParticleFilter(Plain(), 5)
    stream = plain.stream()
    with pytest.raises(TypeError, match="the data is torch.float32 and the model torch.float64"):
        stream.update(torch.zeros(2).float())
    stream.update(torch.zeros(2).double())
    saved = stream.state_dict()
    for again in (stream, plain.stream()):
        again.load_state_dict(saved)
        with pytest.raises(TypeError, match="the frame at time 2 has 'x' of type float32, and the ones before of float64"):
            again.update(torch.zeros(2).float())
    numbers = torch.randn(3, dtype=torch.float64)
    found = []
    for frame in (numbers, numbers.numpy(), numbers.tolist(), {"x": numbers.numpy()}):
        pyro.set_rng_seed(1)
        found.append(plain.stream().update(frame))
    assert all(equal(found[0], other) for other in found)


class Plain(seq.StateSpaceModel):
    """No parameters, so no type of its own."""

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, 0.5))

    def emission(self, z, x=None):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("make", [lambda: seq.ParticleFilter(Plain(), 5).stream(),
                                  lambda: seq.ForwardBackward(HiddenMarkov()).stream()])
def test_mistakes_in_a_frame_are_told_with_its_time(make):
    stream = make()
    feed(stream, torch.zeros(2, 3), {})
    for nothing in (None, {}):
        with pytest.raises(ValueError, match="the frame at time 4 holds no data: pass x"):
            stream.update(nothing)
    with pytest.raises(ValueError, match="'x' is infinite in sequence 1 at time 4"):
        stream.update(torch.tensor([0.0, torch.inf]))
    assert stream.time == 3


def test_a_snapshot_before_the_first_frame():
    method = seq.ParticleFilter(level(), 5)
    saved = method.stream().state_dict()
    first = method.stream().update(torch.zeros(2))
    other = method.stream()
    other.load_state_dict(saved)
    assert equal(first, other.update(torch.zeros(2)))
