"""Stationary autoregressions and invertible moving averages: their coefficients as Pyro constraints, and their moments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

__all__ = ["InvertibleTransform", "StationaryTransform", "invertible", "stationary", "stationary_covariance"]


class _Stationary(constraints.Constraint):
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (partial_autocorrelations(value).abs() < 1).all(-1)


class _Invertible(_Stationary):
    def check(self, value: Tensor) -> Tensor:
        return super().check(-value)


stationary = _Stationary()
r"""Coefficients :math:`\varphi`, ``(..., p)``, of a stationary :math:`w_t = \sum_i \varphi_i w_{t-i} + \varepsilon_t`."""
invertible = _Invertible()
r"""Coefficients :math:`\theta`, ``(..., q)``, of invertible :math:`w_t = \varepsilon_t + \sum_i \theta_i \varepsilon_{t-i}`."""


class StationaryTransform(Transform):
    r"""Real vectors onto the coefficients of stationary autoregressions, one to one.

    Each entry becomes a partial autocorrelation :math:`r_k = u_k / \sqrt{1 + u_k^2}`, and the Durbin-Levinson recursion makes
    coefficients of them,

    .. math:: \varphi^{(k)}_k = r_k, \qquad \varphi^{(k)}_j = \varphi^{(k-1)}_j - r_k \varphi^{(k-1)}_{k-j}

    Source: Monahan, *A note on enforcing stationarity in autoregressive-moving average models*, 1984.

    Example::

        >>> import torch
        >>> from pyro_seq.models.stationary import StationaryTransform, stationary
        >>> coefficients = StationaryTransform()(torch.tensor([9.0, -3.0, 0.5]))
        >>> stationary.check(coefficients)
        tensor(True)
    """

    domain = constraints.real_vector
    codomain = stationary
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    __hash__ = Transform.__hash__

    def _call(self, u: Tensor) -> Tensor:
        r = _squash(u)
        found = r[..., :1]
        for k in range(1, r.shape[-1]):
            last = r[..., k:k + 1]
            found = torch.cat([found - last * found.flip(-1), last], -1)
        return found

    def _inverse(self, coefficients: Tensor) -> Tensor:
        r = partial_autocorrelations(coefficients)
        return r * (1 - r.square()).rsqrt()

    def log_abs_det_jacobian(self, u: Tensor, coefficients: Tensor) -> Tensor:
        # Step k multiplies k - 1 coefficients by 1 - r_k J, where J reverses them: its eigenvalues are 1 and -1 in turn.
        r = _squash(u)
        before = torch.arange(u.shape[-1], device=u.device)
        return (-1.5 * u.square().log1p() + (before + 1) // 2 * (-r).log1p() + before // 2 * r.log1p()).sum(-1)


class InvertibleTransform(StationaryTransform):
    """Real vectors onto the coefficients of invertible moving averages: those of :class:`StationaryTransform`, negated."""

    codomain = invertible

    def _call(self, u: Tensor) -> Tensor:
        return -super()._call(u)

    def _inverse(self, coefficients: Tensor) -> Tensor:
        return super()._inverse(-coefficients)

    def log_abs_det_jacobian(self, u: Tensor, coefficients: Tensor) -> Tensor:
        return super().log_abs_det_jacobian(u, -coefficients)


for _registry in (biject_to, transform_to):
    _registry.register(stationary, lambda _: StationaryTransform())
    _registry.register(invertible, lambda _: InvertibleTransform())


def _squash(u: Tensor) -> Tensor:
    """Onto (-1, 1), more slowly than tanh, which rounding takes to the ends at 9 in single precision."""
    return u * (1 + u.square()).rsqrt()


def partial_autocorrelations(coefficients: Tensor) -> Tensor:
    """Partial autocorrelations ``(..., p)`` of an autoregression; one of them is outside of (-1, 1) if it is not stationary."""
    found = []
    for _ in range(coefficients.shape[-1]):
        last, rest = coefficients[..., -1:], coefficients[..., :-1]
        found.insert(0, last)
        coefficients = (rest + last * rest.flip(-1)) / (1 - last.square())
    return torch.cat(found, -1) if found else coefficients


def stationary_covariance(transition: Tensor, noise: Tensor) -> Tensor:
    r"""The solution ``(n, n)`` of :math:`P = T P T' + Q`, by doubling: :math:`\sum_{k < 2^j} T^k Q T'^k` for j = 1, 2, ...

    Source: Anderson and Moore, *Optimal Filtering*, 1979, section 6.7.
    """
    for _ in range(52):  # a root may be as close to the unit circle as double precision tells
        noise = noise + transition @ noise @ transition.mT
        transition = transition @ transition
    return noise
