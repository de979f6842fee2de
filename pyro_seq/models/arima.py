"""Seasonal autoregressive integrated moving averages, with regression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.nn.functional import conv1d, pad

from pyro_seq.model import StateSpaceModel
from pyro_seq.models.classical import WithRegression, require_order
from pyro_seq.models.stationary import invertible, stationary, stationary_covariance
from pyro_seq.module import require_count

__all__ = ["ARIMA"]

_TRENDS = {"n": 0, "c": 1, "t": 1, "ct": 2}


class ARIMA(WithRegression, StateSpaceModel):
    r"""ARIMA :math:`(p, d, q) \times (P, D, Q)_s`, the noise of a regression on covariates.

    With the lag operator :math:`L`,

    .. math::

        x_t &= \beta \cdot u_t + y_t, \qquad (1 - L)^d (1 - L^s)^D y_t = w_t, \qquad \varepsilon_t \sim N(0, \sigma^2) \\
        \varphi(L) \Phi(L^s) w_t &= c + b (t - 1) + \theta(L) \Theta(L^s) \varepsilon_t

    It is declared in its state-space form, so that gaps need no care. The frames are scalars, ``x`` ``(B, T)``. :math:`w_1`
    is at rest under the drift :math:`c + b`; the :math:`d + s D` levels before the first frame are exactly diffuse. Latent
    sites: ``innovation``, :math:`\varepsilon_t`; ``level``, :math:`y_t`, which fills the gaps of the data; ``arma``, what the
    past adds to :math:`w_t`, its first entry, and to Harvey's state; ``lags``, the levels before.

    Parameters: ``ar``, ``ma``, ``seasonal_ar``, ``seasonal_ma``, which stay stationary and invertible; ``trend``;
    ``regression``; ``scale``, the standard deviation :math:`\sigma`. Each may be replaced by a prior, as in ``model.scale =
    PyroSample(dist.LogNormal(0.0, 1.0))``.

    :param order: ``(p, d, q)``.
    :param seasonal_order: ``(P, D, Q, s)``.
    :param str trend: of :math:`w_t`: ``"n"``, none; ``"c"``, a constant; ``"t"``, in proportion to the time; ``"ct"``, both.
    :param int num_covariates: entries of the covariate ``u``, ``(B, T, num_covariates)``.
    :param coefficients: parameters by name, to start from.
    :param initial: ``{"lags": ...}``, a distribution for each of the levels before the first frame, the latest first, or for
        all of them together, in place of the diffuse one.

    Source: Box and Jenkins, *Time Series Analysis: Forecasting and Control*, 1970; Harvey, *Forecasting, Structural Time
    Series Models and the Kalman Filter*, 1989; Durbin and Koopman, *Time Series Analysis by State Space Methods*, 2012,
    section 3.4. The meaning of the parameters is that of SARIMAX in statsmodels.

    Example::

        >>> import torch
        >>> import pyro_seq as seq
        >>> from pyro_seq.models import ARIMA
        >>> model = ARIMA((2, 0, 1), coefficients={"ar": [0.5, 0.3], "scale": 2.0})
        >>> x = model.simulate([50, 40])["x"]
        >>> seq.KalmanFilter(model).run(x, [50, 40]).log_evidence.shape
        torch.Size([2])
        >>> airline = ARIMA((0, 1, 1), (0, 1, 1, 12))
        >>> airline.num_lags
        13
    """

    def __init__(self, order: Sequence[int], seasonal_order: Sequence[int] = (0, 0, 0, 0), trend: str = "n",
                 num_covariates: int = 0, coefficients: Mapping[str, Any] | None = None, initial: Any = None, name: str = ""):
        super().__init__(name)
        p, d, q = require_order("order", order, "p, d, q")
        seasonal_p, seasonal_d, seasonal_q, self.period = require_order("seasonal_order", seasonal_order, "P, D, Q, s")
        if any(seasonal_order[:3]) and self.period < 2:
            raise ValueError(f"seasonal_order={tuple(seasonal_order)}: a season has at least 2 steps, (P, D, Q, s) with s >= 2")
        if trend not in _TRENDS:
            raise ValueError(f"trend={trend!r}; it is 'n', 'c', 't' or 'ct'")
        require_count("num_covariates", num_covariates, 0)
        self.declare(coefficients, {
            "ar": (_small(p, stationary), stationary),
            "ma": (_small(q, invertible), invertible),
            "seasonal_ar": (_small(seasonal_p, stationary), stationary),
            "seasonal_ma": (_small(seasonal_q, invertible), invertible),
            "trend": (torch.zeros(_TRENDS[trend]), constraints.real),
            "regression": (torch.zeros(num_covariates), constraints.real),
            "scale": (1.0, constraints.positive)})
        self.num_lags = d + self.period * seasonal_d
        self.start_at(initial, {"lags": self.num_lags} if self.num_lags else {})
        self.trends, self.num_covariates = trend, num_covariates
        difference = torch.ones(1)
        for step in [1] * d + [self.period] * seasonal_d:
            difference = _product(difference, pad(torch.tensor([-1.0]), (step, 0)) + pad(torch.tensor([1.0]), (0, step)))
        self.register_buffer("differences", -difference[1:])

    def initial(self) -> dict[str, Tensor]:
        ar, gain = self._harvey()
        transition = torch.cat([ar[:, None], torch.eye(len(ar)).to(ar)[:, :-1]], 1)
        noise = self.scale.square() * torch.outer(gain, gain)
        covariance = transition @ stationary_covariance(transition, noise) @ transition.mT
        drift = self._drift(torch.ones_like(self.scale))
        mean = drift / (1 - ar.sum()) * ar.flip(0).cumsum(0).flip(0) + pad(drift[None], (0, len(ar) - 1))
        innovation = pyro.sample("innovation", dist.Normal(torch.zeros_like(self.scale), self.scale))
        arma = pyro.sample("arma", dist.MultivariateNormal(mean, _full_rank(covariance, noise)))
        lags = pyro.sample("lags", self.starts["lags"]) if self.num_lags else None
        return self._arrive(innovation, arma, lags, torch.ones_like(innovation))

    def transition(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        ar, _ = self._harvey()
        arma, time = state["arma"], state["time"]
        moved = arma[:, :1] * ar + pad(arma[:, 1:], (0, 1)) + pad(self._drift(time)[:, None], (0, len(ar) - 1))
        innovation = pyro.sample("innovation", dist.Normal(torch.zeros_like(self.scale), self.scale))
        arma = pyro.sample("arma", dist.Delta(moved, event_dim=1))
        lags = None
        if self.num_lags:
            lags = torch.cat([state["level"][:, None], state["lags"][:, :-1]], -1)
            lags = pyro.sample("lags", dist.Delta(lags, event_dim=1))
        return self._arrive(innovation, arma, lags, time + 1)

    def emission(self, state: dict[str, Tensor], x: Tensor | None = None, u: Tensor | None = None) -> Tensor:
        return pyro.sample("x", dist.Delta(state["level"] + self.effect(u)), obs=x)

    def _arrive(self, innovation: Tensor, arma: Tensor, lags: Tensor | None, time: Tensor) -> dict[str, Tensor]:
        arma = arma + innovation[:, None] * self._harvey()[1]
        level = arma[:, 0] if lags is None else arma[:, 0] + lags @ self.differences
        state = {"level": pyro.sample("level", dist.Delta(level)), "arma": arma, "time": time}
        return state if lags is None else {**state, "lags": lags}

    def _harvey(self) -> tuple[Tensor, Tensor]:
        """The first column of the transition of the stationary part and the effect of an innovation on it, ``(r,)`` each."""
        one = torch.ones_like(self.scale)[None]
        ar = -_product(torch.cat([one, -self.ar]), torch.cat([one, -self._seasons(self.seasonal_ar)]))[1:]
        ma = _product(torch.cat([one, self.ma]), torch.cat([one, self._seasons(self.seasonal_ma)]))
        width = max(len(ar), len(ma))
        return pad(ar, (0, width - len(ar))), pad(ma, (0, width - len(ma)))

    def _seasons(self, coefficients: Tensor) -> Tensor:
        """Coefficients of lags s, 2 s, ... as coefficients of all lags."""
        return pad(coefficients[:, None], (self.period - 1, 0)).reshape(-1) if len(coefficients) else coefficients

    def _drift(self, time: Tensor) -> Tensor:
        """The trend at some times, of their shape."""
        return sum((b * (time if kind == "t" else 1.0) for kind, b in zip(self.trends, self.trend.unbind())),
                   torch.zeros_like(time))


def _small(size: int, constraint: constraints.Constraint) -> Tensor:
    """Where learning starts: off zero, where a factor of each kind would cancel the other and neither could move alone."""
    return biject_to(constraint)(torch.full((size,), 0.1)) if size else torch.zeros(0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Coefficients of the product of two polynomials."""
    return conv1d(a[None, None], b.flip(0)[None, None], padding=len(b) - 1)[0, 0]


def _full_rank(covariance: Tensor, scale: Tensor) -> Tensor:
    """A covariance that may be singular, as where factors cancel, raised by rounding errors so that it can be factored."""
    size = (covariance + scale).diagonal().max()
    return covariance + 100 * torch.finfo(covariance.dtype).eps * size * torch.eye(len(covariance)).to(covariance)
