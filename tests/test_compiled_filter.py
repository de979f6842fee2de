"""A compiled filter says what the one as written says, of the same random draws."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_seq as seq
from pyro_seq.engine.compiled.compiler import Compiler
from pyro_seq.models import VRNN
from pyro_seq.models.vrnn import VRNNInference

LENGTHS = [16, 11, 4]


class Volatility(seq.StateSpaceModel):
    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(-1.0))
        self.scale = 0.5

    def initial(self):
        return pyro.sample("z", dist.Normal(self.mean, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(self.mean + 0.9 * (z - self.mean), self.scale))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(0.0, torch.exp(z / 2)), obs=x)


class Level(seq.StateSpaceModel):
    """Two dimensions, a covariate and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.tensor([[0.9, 0.1], [-0.1, 0.8]]))

    def initial(self):
        return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def transition(self, z, u, t):
        loc = z @ self.turn.mT + 0.1 * u[:, None] + 0.01 * t[:, None]
        return pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


class Switching(seq.StateSpaceModel):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("chances", torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]))

    def initial(self):
        return pyro.sample("k", dist.Categorical(self.chances[0]))

    def transition(self, k):
        return pyro.sample("k", dist.Categorical(self.chances[k]))

    def emission(self, k, x=None):
        return pyro.sample("x", dist.Normal(k.to(self.chances.dtype), 0.8), obs=x)


class Counts(seq.StateSpaceModel):
    """Torch's way to draw these cannot be done outside of a graph."""

    def initial(self):
        return pyro.sample("n", dist.Poisson(3.0))

    def transition(self, n):
        return pyro.sample("n", dist.Poisson(1.0 + 0.7 * n))

    def emission(self, n, x=None):
        return pyro.sample("x", dist.Normal(n, 1.0), obs=x)


class Scaled(seq.StateSpaceModel):
    """What scale the data has is said with it: zero or less makes a frame impossible, or no frame at all."""

    def initial(self):
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(z, 1.0))

    def emission(self, z, u, x=None):
        return pyro.sample("x", dist.Normal(z, u), obs=x)


class Deciding(Volatility):
    def transition(self, z):
        scale = 0.5 if self.mean < 0 else 1.0
        return pyro.sample("z", dist.Normal(0.9 * z, scale))


def data(*shape: int, gaps: bool = False) -> Tensor:
    x = torch.randn(3, 16, *shape)
    if gaps:
        x[0, 5] = math.nan
        x[1, 2:9] = math.nan
    return x


def both(make: Callable[[bool], Any], x: Tensor, lengths: list[int] | None = None, runs: int = 2, tolerance: float = 1e-10,
         **covariates: Tensor) -> tuple[Any, Any]:
    """Run a filter as written and compiled, compare all they say and the generators they leave; returns the last posteriors."""
    plain, compiled = make(False), make(True)
    for seed in range(runs):
        pyro.set_rng_seed(seed)
        a, after = plain.run(x, lengths, **covariates), torch.rand(())
        pyro.set_rng_seed(seed)
        b = compiled.run(x, lengths, **covariates)
        assert torch.rand(()) == after
        pairs = [(a.log_evidence, b.log_evidence), (a.log_evidence_by_step, b.log_evidence_by_step), (a.ess, b.ess),
                 (a.standard_error, b.standard_error)]
        for moments, others in ((a.filtered, b.filtered), (a.smoothed, b.smoothed)):
            assert list(moments) == list(others)
            for name in moments:
                pairs += [(moments[name].mean, others[name].mean), (moments[name].variance, others[name].variance)]
        for found, expected in pairs:
            torch.testing.assert_close(expected, found, rtol=tolerance, atol=tolerance, equal_nan=True)
        assert a.notes == b.notes and a.method == b.method
    return a, b


def filtered(model: Any, num_particles: int = 40, kind: Callable[..., Any] = seq.ParticleFilter, **options: Any
             ) -> Callable[[bool], Any]:
    return lambda compile: kind(model, num_particles, compile=compile, **options)


def compiled_graphs(method: Any) -> int:
    return sum(value is not None for value in method.compiler.known.values())


def guided(guide: Callable[[Any], Any], model: Any) -> Callable[[bool], Any]:
    return filtered(model, 20, guide=guide(model))


slow = pytest.mark.slow
CASES = {
    "ragged, with gaps": lambda: both(filtered(Volatility()), data(gaps=True), LENGTHS),
    "discrete": lambda: both(filtered(Switching()), data(), LENGTHS),
}
SLOW = {
    "float32": lambda: both(filtered(Volatility().float()), data().float(), LENGTHS, tolerance=1e-5),
    "several runs, always": lambda: both(filtered(Volatility(), num_runs=2, ess_threshold=1.0), data(), LENGTHS),
    "two dimensions, covariate, time": lambda: both(filtered(Level()), data(2, gaps=True), LENGTHS, u=torch.randn(3, 16)),
    "drawn inside": lambda: both(filtered(Counts()), data(), LENGTHS),
    "recurrent": lambda: both(filtered(VRNN(2, 3, 8, emission="normal")), data(2), LENGTHS),
    "recurrent, guided, gaps": lambda: both(guided(VRNNInference, VRNN(2, 3, 8, emission="normal")), data(2, gaps=True),
                                            LENGTHS),
    "network": lambda: both(guided(seq.FilteringGuide, Volatility()), data(), LENGTHS),
    "AVF": lambda: both(guided(seq.AmortizedVariationalFilter, Volatility()), data(gaps=True), LENGTHS),
    "auxiliary": lambda: both(filtered(Volatility(), kind=seq.AuxiliaryParticleFilter), data(), LENGTHS),
    "auxiliary, at times": lambda: both(filtered(Volatility(), kind=seq.AuxiliaryParticleFilter, ess_threshold=0.6), data(),
                                        LENGTHS),
    "backward": lambda: both(filtered(Volatility(), kind=seq.BackwardSampler, num_trajectories=7), data(), LENGTHS),
    "fixed lag": lambda: both(filtered(Volatility(), kind=seq.FixedLagSmoother, lag=3), data(), LENGTHS),
    **{scheme: lambda scheme=scheme: both(filtered(Volatility(), resampling=scheme), data(), LENGTHS)
       for scheme in ("multinomial", "stratified", "residual", "metropolis")},
    "soft": lambda: both(filtered(Volatility(), resampling=seq.resampling.Soft()), data(), LENGTHS),
    "optimal transport": lambda: both(filtered(Volatility(), resampling=seq.resampling.OptimalTransport()), data(), LENGTHS),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=slow) for name in SLOW)])
def test_same_numbers(case, monkeypatch):
    made = []
    monkeypatch.setattr(Compiler, "build", lambda self, *given, build=Compiler.build: made.append(1) or build(self, *given))
    {**CASES, **SLOW}[case]()
    assert made


def test_paths_and_quantiles():
    x = data()[:1]
    make = filtered(Volatility(), history=True)
    a, b = both(make, x)
    for read in (lambda p: p.quantile("z", [0.1, 0.5]), lambda p: p.trajectories(5).samples["z"],
                 lambda p: p.predict(3, 10).samples["z"],
                 lambda p: torch.from_numpy(p.diagnostics().select_dtypes("number").to_numpy())):
        pyro.set_rng_seed(3)
        found = read(a)
        pyro.set_rng_seed(3)
        torch.testing.assert_close(read(b), found, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_what_has_changed_since_is_seen():
    model, x = Volatility(), data()[:1]
    plain, compiled = (filtered(model, ess_threshold=0.0)(compile) for compile in (False, True))

    def same() -> None:
        both(lambda compile: compiled if compile else plain, x, runs=1)

    same()
    assert compiled_graphs(compiled) == 1
    with torch.no_grad():
        model.mean += 0.5
    same()
    assert compiled_graphs(compiled) == 1
    model.scale = 2.0
    same()
    assert compiled_graphs(compiled) == 2


def test_series_of_other_lengths_need_no_other_code():
    compiled = filtered(Level(), ess_threshold=0.0)(True)
    for steps in (5, 9, 12):
        compiled.run(torch.randn(1, steps, 2), u=torch.randn(1, steps))
    assert compiled_graphs(compiled) == 1


def test_a_step_that_decides_by_a_value_runs_as_written():
    with pytest.warns(UserWarning, match="ParticleFilter: the step.* runs as written, not compiled, since it decides by the "
                      r"value .*test_compiled_filter\.py, line \d+: scale = 0\.5 if self\.mean < 0"):
        both(filtered(Deciding()), data(), LENGTHS)


def test_errors_are_those_of_the_run_as_written():
    plain, compiled = (filtered(Scaled(), ess_threshold=0.0)(compile) for compile in (False, True))
    for wrong, message in ((1e-300, "all 40 particles have weight zero at time 9 in sequence 1"),
                           (-1.0, "the model's log density of site 'x' is NaN or infinite at time 9 in sequence 1")):
        u = torch.ones(3, 16)
        u[1, 8] = wrong
        said = []
        for method in (plain, compiled):
            pyro.set_rng_seed(0)
            with pytest.raises(ValueError, match=message) as error:
                method.run(data(), u=u)
            said.append(str(error.value))
        assert said[0] == said[1]
    assert compiled_graphs(compiled) == 1
    both(lambda compile: compiled if compile else plain, data(), u=torch.ones(3, 16))


def test_resampling_of_ones_own_is_looked_at():
    def shifted(weights: Tensor) -> Tensor:
        return seq.resampling.systematic(weights).flip(-1)

    def wrong(weights: Tensor) -> Tensor:
        return seq.resampling.systematic(weights) + 1

    x = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(filtered(Volatility(), resampling=shifted, ess_threshold=1.0), x)
    with pytest.raises(ValueError, match="the resampling function wrong returned the ancestor 40"):
        seq.ParticleFilter(Volatility(), 40, resampling=wrong, ess_threshold=1.0, compile=True).run(x)


def test_wrapped_models_run_as_written():
    def random_walk(x, lengths=None):
        z = 0.0
        with pyro.plate("series", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    with pytest.warns(UserWarning, match="the state of a from_pyro model is its path"):
        both(filtered(seq.from_pyro(random_walk)), torch.randn(1, 6))
