"""Resampling by moving the particles: mixtures of them that carry equal weights."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from pyro_seq.engine.state import State, flatten_state
from pyro_seq.engine.weights import Weights
from pyro_seq.module import require_count
from pyro_seq.resampling.base import Resampler

__all__ = ["OptimalTransport"]


class OptimalTransport(Resampler):
    r"""Resampling by entropy-regularised optimal transport.

    The coupling P of the equal weights 1/N (rows) and the weights W (columns) that minimises

    .. math:: \sum_{ij} P_{ij} |x_i - x_j|^2 / \delta^2 - \varepsilon H(P), \qquad
              \delta^2 = d \max_k \operatorname{var}_i(x_{ik}),

    is found by Sinkhorn's iterations on log scale, and particle i becomes the mixture :math:`\sum_j N P_{ij} x_j`. No random
    number is used. The particles' mean is their weighted mean, but they are drawn together: evidence estimates are **biased**,
    and with a fixed :math:`\varepsilon` the bias does not vanish as N grows. Everything is differentiable in weights and
    states; gradients are those of the coupling itself, by the implicit function theorem at the fixed point, not of the
    iterations.

    All floating entries of the state are moved alike; a state that holds whole numbers, one that looks at its past, or a
    look-ahead cannot be transported. A step costs :math:`N^2` time and memory an iteration, and its gradient :math:`N^3` time.

    :param float epsilon: :math:`\varepsilon`, in units of :math:`\delta^2`. Smaller ones are less biased, and slower.
    :param float tolerance: iterations end when the column sums are this close to W, in sum of absolute differences.
    :param int max_iterations: a warning is given where they end before.

    Source: Corenflos, Thornton, Deligiannidis and Doucet, *Differentiable particle filtering via entropy-regularized optimal
    transport*, 2021.

    Example::

        >>> import torch
        >>> from pyro_seq.engine.weights import Weights
        >>> z, weights = torch.randn(10, 2), Weights.of(torch.randn(1, 10))
        >>> transport, log_weights = OptimalTransport(epsilon=0.3)(weights, z)
        >>> torch.allclose(transport.sum(-1), torch.ones(1, 10))
        True
        >>> torch.allclose((transport @ z).mean(1), weights.normalised @ z, atol=1e-3)
        True
    """

    unbiased = False
    differentiable = True
    ancestral = False

    def __init__(self, epsilon: float = 0.5, tolerance: float = 1e-4, max_iterations: int = 1000):
        for name, value in (("epsilon", epsilon), ("tolerance", tolerance)):
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}; it is a positive number")
        require_count("max_iterations", max_iterations, 1)
        self.epsilon, self.tolerance, self.max_iterations = epsilon, tolerance, max_iterations

    def __call__(self, weights: Weights, state: State, look_ahead: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        :raises ValueError: if the state has no floating entries, or the particles are to be favoured by a look-ahead.
        """
        if look_ahead is not None:
            raise ValueError("OptimalTransport mixes particles, so no weights make up for a look-ahead: use a resampling by "
                             "ancestors, such as 'systematic'")
        values = flatten_state(state, weights.log.numel())
        if values is None:
            raise ValueError("the state holds no floating numbers for OptimalTransport to mix: use a resampling by "
                             "ancestors, such as 'systematic'")
        log_weights = weights.log.log_softmax(-1)
        cost = self._cost(values.reshape(*log_weights.shape, -1).to(log_weights.dtype))
        potential = _potential(self._fixed_point(log_weights.detach(), cost.detach()), log_weights, cost)
        return _couple(potential, log_weights, cost), torch.zeros_like(log_weights)

    def _cost(self, x: Tensor) -> Tensor:
        """``(n, N, N)`` squared distances in units of epsilon."""
        x = x - x.mean(1, keepdim=True)
        scale = x.shape[-1] * x.square().mean(1).amax(-1)
        # Particles that are all the same are no distance apart, in any unit.
        scale = torch.where(scale > 0, scale, 1.0)[:, None, None] * self.epsilon
        squared = x.square().sum(-1)
        return (squared[:, :, None] + squared[:, None, :] - 2 * x @ x.mT) / scale

    def _fixed_point(self, log_weights: Tensor, cost: Tensor) -> Tensor:
        """``(n, N)`` the potential of the weights, by Sinkhorn's iterations. A sequence that has converged is left alone, so
        that its numbers do not depend on the others."""
        weights, potential = log_weights.exp(), torch.zeros_like(log_weights)
        log_n = math.log(log_weights.shape[-1])
        for _ in range(self.max_iterations):
            other = -((log_weights + potential)[:, None, :] - cost).logsumexp(-1)
            following = log_n - (other[:, :, None] - cost).logsumexp(1)
            excess = ((log_weights + potential - following).exp() - weights).abs().sum(-1)
            going = excess > self.tolerance
            if not going.any():
                return potential
            potential = torch.where(going[:, None], following, potential)
        warnings.warn(f"OptimalTransport stopped after {self.max_iterations} iterations with column sums that are off by "
                      f"{excess.max():.1g}, not {self.tolerance:g}: use a larger epsilon, tolerance or max_iterations",
                      stacklevel=2)
        return potential


def _couple(potential: Tensor, log_weights: Tensor, cost: Tensor) -> Tensor:
    """``(n, N, N)`` N times the coupling, its rows of sum one by construction."""
    return ((log_weights + potential)[:, None, :] - cost).softmax(-1)


def _potential(found: Tensor, log_weights: Tensor, cost: Tensor) -> Tensor:
    """The potential that was found, with its gradient.

    It solves ``r(g) = W - mean_i T_ij(g) = 0``, so that ``dg = -(dr/dg)^-1 dr``: with Newton's step the gradient comes along.
    """
    if not (torch.is_grad_enabled() and (log_weights.requires_grad or cost.requires_grad)):
        return found
    transport = _couple(found, log_weights, cost)
    columns = transport.mean(1)
    unmet = (log_weights.exp() - columns).double()
    with torch.no_grad():
        columns = columns.double()
        root = columns.sqrt()
        inverse = torch.where(root > 0, 1 / root, 0.0)
        # -dr/dg = diag(c) - T'T / N, which is singular along a constant added to the potential. Scaled by the roots of c it
        # has eigenvalues in [0, 1], and the added product puts the zero at one. Modes that the iterations cannot see either
        # are damped by the last term.
        scaled = transport.double() * inverse[:, None, :]
        matrix = root[:, :, None] * root[:, None, :] - scaled.mT @ scaled / root.shape[-1]
        matrix.diagonal(dim1=-2, dim2=-1).add_(1 + 1e-9)
        factor = torch.linalg.cholesky(matrix)
    step = (inverse * torch.cholesky_solve((inverse * unmet)[..., None], factor)[..., 0]).to(found.dtype)
    return found + step - step.detach()
