"""Bootstrap particle filter: stochastic volatility, T = 100, against ``particles``, Pyro's ``SMCFilter`` and ``cuthbert``.

Protocol: the first 100 returns of a series simulated from the model (seed 0), systematic resampling when the effective
sample size is below half, no history; median of interleaved runs. ``particles`` computes in float64. Ours always gives the
filtering mean and variance of every step, so ``particles`` is asked to collect them too; once more it gives the evidence
alone. Pyro's filter keeps neither evidence nor moments; it runs in float64, since in float32 its resampling fails with an
IndexError at 100 000 particles. ``cuthbert``, where it is installed, runs jitted in float32, after its compilation, up to
100 000 particles (it keeps all of every step). The floor is N normal numbers of torch a step and one pass over
memory; the kernels in C++, left out once for comparison, draw them faster.
``many``: 1000 series of 25 steps, 100 particles each, at once and one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_seq as seq
from benchmarks.timing import interleaved
from pyro_seq.engine import native

__all__ = ["many", "run"]

MU, RHO, SIGMA, STEPS = -1.02, 0.9702, 0.178, 100


class StochasticVolatility(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("z", dist.Normal(MU, SIGMA / math.sqrt(1 - RHO**2)))

    def transition(self, z):
        return pyro.sample("z", dist.Normal(MU + RHO * (z - MU), SIGMA))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(0.0, torch.exp(0.5 * z)), obs=x)


def run(num_particles: int, rounds: int) -> dict[str, float]:
    """Seconds a filter of each contestant."""
    import particles
    from particles import collectors, state_space_models

    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float64)
    model = StochasticVolatility()
    x = model.simulate([STEPS])["x"]
    theirs = state_space_models.StochVol(mu=MU, rho=RHO, sigma=SIGMA)
    data = x[0].numpy()
    evidence: dict[str, float] = {}

    def ours(dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)
        evidence[str(dtype)] = seq.ParticleFilter(model, num_particles).run(x.to(dtype)).total_log_evidence

    def by_torch() -> None:
        with patch.object(native, "_kernels", lambda: None):
            ours(torch.float32)

    def package(collect: list | None = None) -> None:
        filter_ = particles.SMC(fk=state_space_models.Bootstrap(ssm=theirs, data=data), N=num_particles,
                                resampling="systematic", ESSrmin=0.5, collect=collect)
        filter_.run()
        evidence["particles"] = filter_.logLt

    def floor() -> None:
        z = torch.empty(num_particles, dtype=torch.float32)
        for _ in range(STEPS):
            z = z + torch.randn(num_particles, dtype=torch.float32)

    contestants: dict[str, Callable[[], Any]] = {
        "float32": lambda: ours(torch.float32), "float32, without kernels in C++": by_torch,
        "float64": lambda: ours(torch.float64),
        "particles": lambda: package([collectors.Moments()]), "particles, evidence alone": package,
        "Pyro SMCFilter, float64": lambda: pyro_filter(num_particles, data), "floor": floor}
    if num_particles <= 100_000 and (jitted := cuthbert_filter(num_particles, data)) is not None:
        contestants["cuthbert, jitted"] = lambda: evidence.update(cuthbert=float(jitted()))
    np.random.seed(0)
    found = interleaved(contestants, rounds)
    torch.set_default_dtype(torch.float32)
    return found | {f"log evidence, {name}": value for name, value in evidence.items()}


def many(rounds: int, series: int = 1000, steps: int = 25, num_particles: int = 100) -> dict[str, float]:
    """Seconds for many short series."""
    import particles
    from particles import state_space_models

    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float32)
    model = StochasticVolatility()
    x = model.simulate([steps] * series)["x"]
    theirs = state_space_models.StochVol(mu=MU, rho=RHO, sigma=SIGMA)

    def package() -> None:
        for data in x.double().numpy():
            particles.SMC(fk=state_space_models.Bootstrap(ssm=theirs, data=data), N=num_particles, resampling="systematic",
                          ESSrmin=0.5, collect="off").run()

    return interleaved({"float32": lambda: seq.ParticleFilter(model, num_particles).run(x),
                        "particles, evidence alone, one by one": package}, rounds)


class _Volatility:
    """The same model for Pyro's filter: its step, and as a guide the transition alone."""

    def __init__(self, observe: bool):
        self.observe = observe

    def init(self, state: Any, x: torch.Tensor) -> None:
        state["z"] = pyro.sample("z_0", dist.Normal(MU, SIGMA / math.sqrt(1 - RHO**2)))
        self.t = 0
        self._emit(state, x)

    def step(self, state: Any, x: torch.Tensor) -> None:
        self.t += 1
        z = pyro.sample(f"z_{self.t}", dist.Normal(MU + RHO * (state["z"] - MU), SIGMA))
        if self.observe:
            state["z"] = z
        self._emit(state, x)

    def _emit(self, state: Any, x: torch.Tensor) -> None:
        if self.observe:
            pyro.sample(f"x_{self.t}", dist.Normal(0.0, torch.exp(0.5 * state["z"])), obs=x)


class _Transition(_Volatility):
    def init(self, state: Any, x: torch.Tensor) -> None:
        pyro.sample("z_0", dist.Normal(MU, SIGMA / math.sqrt(1 - RHO**2)))
        self.t = 0


def pyro_filter(num_particles: int, data: np.ndarray) -> None:
    """Pyro's own sequential Monte Carlo filter."""
    from pyro.infer import SMCFilter

    torch.set_default_dtype(torch.float64)
    x = torch.tensor(data)
    with torch.no_grad():
        smc = SMCFilter(_Volatility(True), _Transition(False), num_particles, max_plate_nesting=0)
        smc.init(x[0])
        for x_t in x[1:]:
            smc.step(x_t)


def cuthbert_filter(num_particles: int, data: np.ndarray) -> Callable[[], Any] | None:
    """A compiled run of ``cuthbert``'s filter, which returns its log evidence; ``None`` where it is not installed."""
    try:
        import jax
        from cuthbert.filtering import filter as run_filter
        from cuthbert.smc.particle_filter import build_filter
        from cuthbertlib.resampling import adaptive, systematic
    except ImportError:
        return None
    from jax.scipy.stats import norm

    built = build_filter(
        lambda key: MU + SIGMA / math.sqrt(1 - RHO**2) * jax.random.normal(key),
        lambda key, z, _: MU + RHO * (z - MU) + SIGMA * jax.random.normal(key),
        lambda _, z, x: norm.logpdf(x, 0.0, jax.numpy.exp(0.5 * z)),
        num_particles, adaptive.ess_decorator(systematic.resampling, 0.5))

    @jax.jit
    def go(key: Any, x: Any) -> Any:
        first, rest = jax.random.split(key)
        return run_filter(built, x, built.init_prepare(key=first), key=rest).log_normalizing_constant[-1]

    x = jax.numpy.asarray(data, dtype="float32")
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    go(next(keys), x).block_until_ready()
    return lambda: go(next(keys), x).block_until_ready()
