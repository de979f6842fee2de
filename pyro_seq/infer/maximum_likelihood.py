"""Maximum likelihood: the parameters under which the exact evidence is largest."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from pyro_seq.infer.estimates import Estimates, Parameters, estimates_at, refuse_unfit
from pyro_seq.infer.marginal import require_exact, unchecked
from pyro_seq.infer.quasi_newton import maximise
from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["maximum_likelihood"]


def maximum_likelihood(method: Any, x: Any, lengths: Any = None, *, mask: Any = None, max_iter: int = 500, tol: float = 1e-7,
                       standard_errors: bool | None = None, progress: bool = False, **covariates: Any) -> Estimates:
    r"""Maximise the exact log evidence over the model's parameters, by limited-memory BFGS.

    All trainable parameters of ``method.model`` are moved, on the unconstrained scale of their ``PyroParam``; those with
    ``requires_grad=False`` stay. The model is left with the best parameters found.

    :param method: what computes the evidence, such as ``KalmanFilter(model)`` or ``ForwardBackward(model)``.
    :param x: data as accepted by :meth:`pyro_seq.Sequences.of`, with ``lengths`` and ``mask``.
    :param max_iter: iterations at most.
    :param tol: the largest entry of the gradient on the unconstrained scale, relative to ``max(1, |log likelihood|)``, at
        which the search ends.
    :param standard_errors: of the estimates, from a Hessian whose cost grows with the square of their number; of up to 1000
        parameters by default. NaN otherwise.
    :param progress: show a bar.
    :raises ValueError: if the evidence or its gradient is not finite at the start, or there is nothing to estimate.

    A search that ends before the gradient vanishes warns, and says so in the answer's ``converged`` and ``notes``.

    Source: Durbin and Koopman, *Time Series Analysis by State Space Methods*, 2012, chapter 7.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Level(seq.StateSpaceModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = pyro.nn.PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, self.scale))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = Level().simulate([200])["x"].double()
        >>> found = seq.maximum_likelihood(seq.KalmanFilter(Level().double()), x)
        >>> found.converged, found.num_observations, list(found.table.index)
        (True, 200, ['scale'])
        >>> bool(found.table.lower["scale"] < 1.0 < found.table.upper["scale"])
        True
    """
    require_exact(method, "maximum_likelihood")
    require_count("max_iter", max_iter, 1)
    sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
    trace = [refuse_unfit(method, sequences, "maximum_likelihood")]
    parameters, quick = Parameters(method.model), unchecked(method)
    best, top = parameters.get(), trace[0]

    def evaluate(vector: Tensor) -> tuple[float, Tensor]:
        nonlocal best, top
        value, gradient = parameters.evaluate(lambda: quick.log_evidence(sequences).sum(), vector)
        if top < value < float("inf") and bool(gradient.isfinite().all()):
            best, top = vector, value
        return value, gradient

    with tqdm(total=max_iter, disable=not progress, desc="maximum likelihood") as bar:
        def each(iteration: int, value: float) -> None:
            trace.append(value)
            bar.update()
            bar.set_postfix_str(f"log likelihood {value:.4f}")

        try:
            found = maximise(evaluate, parameters.get(), max_iter, tol, each)
            best = found.point
        finally:
            parameters.set(best)  # kept even if the user interrupts
    if not found.converged:
        warnings.warn(f"maximum_likelihood has not converged: {found.reason}; the largest entry of the gradient is "
                      f"{found.gradient.abs().max().item():.2g}. Start elsewhere, rescale the data, or raise max_iter",
                      stacklevel=2)
    notes = () if found.converged else (f"not converged: {found.reason}",)
    return estimates_at(method, sequences, parameters, method="maximum likelihood", converged=found.converged,
                        num_iterations=found.iterations, trace=tuple(trace), notes=notes,
                        standard_errors=standard_errors)
