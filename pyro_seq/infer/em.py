r"""Expectation maximisation: alternately find the exact posterior of the states, and the parameters that make the complete
data most likely on average under it.

    E   q(z) = p(z | x, theta)                       KalmanFilter or ForwardBackward
    M   theta' = argmax E_q log p(x, z | theta')     limited-memory BFGS

The M-step starts at theta and never goes below it, so log p(x | theta) never falls (Dempster, Laird and Rubin's theorem 1):
this is a generalised EM, whether or not the M-step reaches the maximum.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_seq.engine.state import leaves
from pyro_seq.engine.support import read_support
from pyro_seq.infer.chain import log_evidence
from pyro_seq.infer.enumerate import Tables, read_tables
from pyro_seq.infer.estimates import Estimates, Parameters, estimates_at, refuse_unfit
from pyro_seq.infer.hmm import ForwardBackward
from pyro_seq.infer.kalman import KalmanFilter
from pyro_seq.infer.linear import LinearStep, linearise
from pyro_seq.infer.linear_gaussian import Joint
from pyro_seq.infer.marginal import unchecked
from pyro_seq.infer.quasi_newton import maximise
from pyro_seq.infer.run import entered
from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["expectation_maximization"]

_M_STEPS = 30


def expectation_maximization(method: KalmanFilter | ForwardBackward, x: Any, lengths: Any = None, *, mask: Any = None,
                             max_iter: int = 1000, tol: float = 1e-8, standard_errors: bool | None = None,
                             progress: bool = False,
                             **covariates: Any) -> Estimates:
    r"""Maximum likelihood by expectation maximisation, for any declared model with an exact method.

    The E-step is exact; the M-step climbs the expected complete-data log density of the declared step to its top, so that
    no formula has to be derived. The log likelihood never falls: this is checked at every iteration. Missing entries are
    part of what is averaged over. Near the maximum the steps become small:
    :func:`~pyro_seq.maximum_likelihood` then is the faster way to the same numbers.

    :param method: a :class:`~pyro_seq.KalmanFilter` or :class:`~pyro_seq.ForwardBackward`.
    :param max_iter: iterations at most.
    :param tol: stop when an iteration gains less than ``tol * max(1, |log likelihood|)``.
    :param standard_errors: as of :func:`~pyro_seq.maximum_likelihood`.
    :returns: estimates as of :func:`~pyro_seq.maximum_likelihood`, with the log likelihood after each iteration in
        ``trace``. A search that ran out of iterations warns, and says so in ``converged`` and ``notes``.
    :raises ValueError: if a site has no density (a ``Delta``), or the state that a step returns is computed with parameters.

    Source: Dempster, Laird and Rubin, *Maximum Likelihood from Incomplete Data via the EM Algorithm*, 1977; Shumway and
    Stoffer, *An approach to time series smoothing and forecasting using the EM algorithm*, 1982; Baum, Petrie, Soules and
    Weiss, *A maximization technique occurring in the statistical analysis of probabilistic functions of Markov chains*,
    1970.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Coins(seq.StateSpaceModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stay = pyro.nn.PyroParam(torch.tensor(0.8), constraint=dist.constraints.unit_interval)
        ...     def initial(self):
        ...         return pyro.sample("k", dist.Bernoulli(0.5))
        ...     def transition(self, k):
        ...         return pyro.sample("k", dist.Bernoulli(k * self.stay + (1 - k) * (1 - self.stay)))
        ...     def emission(self, k, x=None):
        ...         return pyro.sample("x", dist.Normal(k, 0.5), obs=x)
        >>> found = seq.expectation_maximization(seq.ForwardBackward(Coins()), Coins().simulate([100])["x"], tol=1e-5)
        >>> found.converged, all(after >= before - 1e-3 for before, after in zip(found.trace, found.trace[1:]))
        (True, True)
    """
    if not isinstance(method, (KalmanFilter, ForwardBackward)):
        raise TypeError("expectation_maximization takes a KalmanFilter or a ForwardBackward, whose posterior of the states is "
                        f"exact, not {getattr(method, '__name__', type(method).__name__)}; for other methods with a "
                        "log_evidence use maximum_likelihood")
    require_count("max_iter", max_iter, 1)
    sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
    value = refuse_unfit(method, sequences, "expectation_maximization")
    parameters, quick = Parameters(method.model), unchecked(method)
    expect = _expect_gaussian if isinstance(method, KalmanFilter) else _expect_discrete
    if isinstance(method, KalmanFilter):
        _refuse_incomplete(method, sequences, parameters)
    trace, converged, pairs = [value], False, []
    slack = 100 * torch.finfo(next((v.dtype for v in sequences.x.values() if v.is_floating_point()), torch.float32)).eps
    with tqdm(total=max_iter, disable=not progress, desc="expectation maximization") as bar, parameters.restored():
        for _ in range(max_iter):
            complete = expect(quick, sequences)
            before = parameters.get()

            def evaluate(vector: Tensor, complete: Callable[[], Tensor] = complete) -> tuple[float, Tensor]:
                return parameters.evaluate(complete, vector)

            # What is left to gain is of second order in the gradient: well below what an iteration is asked to gain.
            parameters.set(maximise(evaluate, before, _M_STEPS, 0.01 * tol**0.5, pairs=pairs).point)
            with torch.no_grad():
                after = quick.log_evidence(sequences).sum().item()
            size = max(1.0, abs(value))
            if not after >= value - slack * size:
                raise RuntimeError(f"the log likelihood fell from {value!r} to {after!r} in an EM iteration, which cannot "
                                   f"be if the step of {type(method.model).__name__} is a fixed function of its inputs: look "
                                   "for dropout or other randomness in it")
            gain, value = after - value, after
            trace.append(value)
            bar.update()
            bar.set_postfix_str(f"log likelihood {value:.4f}")
            if gain <= tol * size:
                converged = True
                break
    notes: tuple[str, ...] = ()
    if not converged:
        notes = (f"not converged: the last of {max_iter} iterations still gained {gain:.2g} nats",)
        warnings.warn(f"expectation_maximization has {notes[0]}; raise max_iter, or go on with maximum_likelihood",
                      stacklevel=2)
    return estimates_at(method, sequences, parameters, method="expectation maximization", converged=converged,
                        num_iterations=len(trace) - 1, trace=tuple(trace), notes=notes,
                        standard_errors=standard_errors)


def _expect_discrete(method: ForwardBackward, sequences: Sequences) -> Callable[[], Tensor]:
    """Baum-Welch: the expected number of times each entry of the tables is used (the gradient of the log evidence in them, by
    Fisher's identity) times its logarithm."""
    model = method.model

    def tables() -> Tables:
        def read(_: dict[str, Tensor]) -> Tables:
            return read_tables(model, sequences, *read_support(model, sequences))[0]

        return entered(model, None, sequences, read, learning=True)

    found = tables()
    here = [table.detach().requires_grad_() for table in found[:3]]
    with torch.enable_grad():
        total = log_evidence(Tables(*here, found.counts)).sum()
    expected = torch.autograd.grad(total, here)

    def complete() -> Tensor:
        return sum(torch.where(count > 0, count * torch.where(count > 0, table, 0.0), 0.0).sum()
                   for count, table in zip(expected, tables()[:3]))

    return complete


def _expect_gaussian(method: KalmanFilter, sequences: Sequences) -> Callable[[], Tensor]:
    """The expected log density of each step's sites given its state, from the smoothed moments of u = (state, latents,
    data)."""
    model = method.model
    joints = [joint for _, joint in method.run(sequences).joints]

    def complete() -> Tensor:
        steps = entered(model, None, sequences, lambda _: linearise(model, sequences, check=False), learning=True)
        parts, start = [], 0
        for step, joint in zip(steps, joints):
            count = len(joint.smoothed_mean)
            active = sequences.active[:, start:start + count].transpose(0, 1)
            parts.append(_gaussian_terms(model, step, joint, active))
            start += count
        return sum(parts)

    return complete


def _refuse_incomplete(method: KalmanFilter, sequences: Sequences, parameters: Parameters) -> None:
    """Raise if the complete data has no density, or the carried state is not a function of the latents and data alone."""
    model = method.model

    def carried(_: dict[str, Tensor]) -> list[Tensor]:
        steps = [step for step in linearise(model, sequences, check=False) if step is not None]
        return [*(part for step in steps for part in (step.next_matrix, step.next_offset)),
                *leaves(model.begin(sequences.frame(1)))]

    for value in entered(model, None, sequences, carried, learning=True):
        weights = torch.arange(1, value.numel() + 1, dtype=value.dtype, device=value.device).sin().reshape(value.shape)
        if (parameters.gradient((value * weights).sum(), keep=True) != 0).any():
            raise ValueError(f"the state that {type(model).__name__} carries is computed with its parameters, so that it is "
                             "not known once the latents are, which EM needs: let the latents carry the parameters (in the "
                             "distributions they are drawn from), or use maximum_likelihood")
    with torch.no_grad():
        _expect_gaussian(method, sequences)()


def _gaussian_terms(model: Any, step: LinearStep, joint: Joint, active: Tensor) -> Tensor:
    """Summed over the ``(T, B)`` frames of one stretch that are inside their sequences.

    Latents without a distribution (diffuse ones) have no term of their own: the others are taken given their values.
    """
    width, state = step.carry.shape[-2], step.state_width
    eye = torch.eye(width, dtype=step.carry.dtype, device=step.carry.device)
    flat = torch.zeros(width, dtype=torch.bool, device=eye.device)
    for where, _ in step.latents.values():
        flat[where] = (step.diffuse[where] != 0).any(-1) & (step.noise[..., where, where] == 0).all(0).all(0)
    own = (~flat & (torch.arange(width, device=eye.device) >= state)).nonzero()[:, 0]
    given = flat.nonzero()[:, 0]
    residual = eye[own].expand(*step.carry.shape[:2], -1, -1)
    pick = torch.cat([eye[:state], eye[given]])
    slope = torch.cat([step.carry[..., own, :], step.diffuse[own].expand(*step.carry.shape[:2], -1, -1)
                       @ torch.linalg.pinv(step.diffuse[given])], -1)
    residual = residual - slope @ pick
    noise = step.noise[..., own[:, None], own]
    factor = _factor(model, step, noise, own)
    half = torch.linalg.solve_triangular(factor, residual, upper=False)  # (T or 1, B or 1, W, D)
    covariance = joint.smoothed_covariance.to(half).expand(*active.shape, -1, -1) * active[..., None, None]
    weights = active.to(half)
    for dim, size in enumerate(half.shape[:2]):
        if size == 1:
            covariance, weights = covariance.sum(dim, keepdim=True), weights.sum(dim, keepdim=True)
    offset = torch.linalg.solve_triangular(factor, step.drift[..., own, None], upper=False)[..., 0]
    mean = (half @ joint.smoothed_mean.to(half)[..., None])[..., 0] - offset
    spread = (half @ covariance * half).sum((-1, -2))
    log_scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * len(own) * math.log(2 * math.pi)
    return -0.5 * spread.sum() - 0.5 * (mean.square().sum(-1) * active).sum() - (log_scale * weights).sum()


def _factor(model: Any, step: LinearStep, noise: Tensor, own: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(noise)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square()
    known = pivots > 1e-14 * noise.detach().diagonal(dim1=-2, dim2=-1)
    if failed.any() or not known.all():
        first = int((~known).flatten(0, -2).any(0).nonzero()[0]) if not known.all() else int(failed.max()) - 1
        at = int(own[first])
        names = [name for name, (where, _) in step.latents.items() if at in where.tolist()]
        what = f"site {names[0]!r}" if names else "an observed site"
        raise ValueError(f"{what} of {type(model).__name__} has no density given the state and the sites before it (a Delta, "
                         "or a scale of zero), which EM maximises on average: give it noise, carry it in the state instead of "
                         "sampling it, or use maximum_likelihood")
    return factor
