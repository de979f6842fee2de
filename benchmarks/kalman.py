"""Kalman filter of a local linear trend: 1000 series at once, and one series, against statsmodels.

Protocol: T = 200, proper first state, variances (1, 0.1, 2), series simulated from the model (seed 0), float64, interleaved
medians. ``evidence`` is the log likelihood alone; ``smoothing`` gives filtered and smoothed moments too. statsmodels takes its
series one by one, its model objects made beforehand; in a further row its shortcut for covariances that have converged is
off (``tolerance = 0``), as ours is for a transition that is said to depend on time. dynamax, where it is installed, runs
jitted, after its compilation. The floor is the recursion of the means alone: T products of a 2 x 2 matrix.
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

STEPS, LEVEL, SLOPE, NOISE, START = 200, 1.0, 0.1, 2.0, 10.0


class Trend(seq.StateSpaceModel):
    def initial(self):
        return pyro.sample("z", dist.Normal(torch.zeros(2), math.sqrt(START)).to_event(1))

    def transition(self, z):
        mean = torch.stack([z[:, 0] + z[:, 1], z[:, 1]], -1)
        return pyro.sample("z", dist.Normal(mean, torch.tensor([LEVEL, SLOPE]).sqrt()).to_event(1))

    def emission(self, z, x=None):
        return pyro.sample("x", dist.Normal(z[:, 0], math.sqrt(NOISE)), obs=x)


class VaryingTrend(Trend):
    """The same, said to depend on time: no covariance is taken to stand still."""

    def transition(self, z, t):
        return super().transition(z)


def run(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each contestant, by task."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float64)
    x = Trend().simulate([STEPS] * batch)["x"]
    ours, varying = seq.KalmanFilter(Trend()), seq.KalmanFilter(VaryingTrend())
    parameters = [NOISE, LEVEL, SLOPE]

    def package(shortcut: bool) -> list[UnobservedComponents]:
        found = []
        for series in x.numpy():
            model = UnobservedComponents(series, "local linear trend")
            model.ssm.initialize_known(np.zeros(2), START * np.eye(2))
            model.ssm.loglikelihood_burn = 0
            if not shortcut:
                model.ssm.tolerance = 0.0
            found.append(model)
        return found

    theirs, whole = package(True), package(False)
    matrix, mean = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(batch, 2)

    def floor() -> None:
        value = mean
        for _ in range(STEPS):
            value = value @ matrix

    def evidence(models: list[UnobservedComponents]) -> float:
        return sum(model.loglike(parameters) for model in models)

    with torch.no_grad():
        exact = float(ours.log_evidence(x).sum())
        np.testing.assert_allclose([evidence(theirs), evidence(whole), float(varying.log_evidence(x).sum())], exact, rtol=1e-8)
        found = {
            "evidence": interleaved({
                "KalmanFilter": lambda: ours.log_evidence(x), "KalmanFilter, no shortcut": lambda: varying.log_evidence(x),
                "statsmodels": lambda: evidence(theirs), "statsmodels, no shortcut": lambda: evidence(whole),
                **_dynamax(x.numpy(), exact), "floor": floor}, rounds),
            "smoothing": interleaved({
                "KalmanFilter": lambda: ours.run(x), "statsmodels": lambda: [m.smooth(parameters) for m in theirs],
                "statsmodels, no shortcut": lambda: [m.smooth(parameters) for m in whole], "floor": floor}, rounds)}
    torch.set_default_dtype(torch.float32)
    return found


def _dynamax(x: np.ndarray, exact: float) -> dict[str, object]:
    """The same evidence by dynamax, jitted over the batch, if it is here."""
    try:
        import jax
        from dynamax.linear_gaussian_ssm import inference
    except ImportError:
        return {}
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    parameters = inference.make_lgssm_params(
        jnp.zeros(2), START * jnp.eye(2), jnp.array([[1.0, 1.0], [0.0, 1.0]]), jnp.diag(jnp.array([LEVEL, SLOPE])),
        jnp.array([[1.0, 0.0]]), jnp.array([[NOISE]]))
    data = jnp.asarray(x)[..., None]
    filter_ = jax.jit(jax.vmap(lambda y: inference.lgssm_filter(parameters, y).marginal_loglik))
    np.testing.assert_allclose(float(filter_(data).sum()), exact, rtol=1e-8)
    return {"dynamax": lambda: filter_(data).block_until_ready()}
