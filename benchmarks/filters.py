"""Bootstrap particle filter: stochastic volatility, T = 100, against the ``particles`` package.

Protocol: the first 100 returns of a series simulated from the model (seed 0), systematic resampling when the effective
sample size is below half, no history; median of interleaved runs. ``particles`` computes in float64. Ours always gives the
filtering mean and variance of every step, so ``particles`` is asked to collect them too; once more it gives the evidence
alone. The floor is N normal numbers a step and one pass over memory.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_seq as seq
from benchmarks.timing import interleaved

__all__ = ["run"]

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

    def package(collect: list | None = None) -> None:
        filter_ = particles.SMC(fk=state_space_models.Bootstrap(ssm=theirs, data=data), N=num_particles,
                                resampling="systematic", ESSrmin=0.5, collect=collect)
        filter_.run()
        evidence["particles"] = filter_.logLt

    def floor() -> None:
        z = torch.empty(num_particles, dtype=torch.float32)
        for _ in range(STEPS):
            z = z + torch.randn(num_particles, dtype=torch.float32)

    np.random.seed(0)
    found = interleaved({
        "float32": lambda: ours(torch.float32), "float64": lambda: ours(torch.float64),
        "particles": lambda: package([collectors.Moments()]), "particles, evidence alone": package, "floor": floor}, rounds)
    torch.set_default_dtype(torch.float32)
    return found | {f"log evidence, {name}": value for name, value in evidence.items()}
