"""Structural time series: a level, its trend, a season and a cycle, each moving on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_seq.model import StateSpaceModel
from pyro_seq.models.classical import WithRegression
from pyro_seq.module import require_count

__all__ = ["BasicStructural", "LocalLevel", "LocalLinearTrend", "StructuralModel"]

_CAN_BE_FIXED = ("level", "trend", "seasonal")


class StructuralModel(WithRegression, StateSpaceModel):
    r"""A sum of components, each a latent site of its own, and noise.

    .. math::

        x_t &= \mu_t + \gamma_t + \psi_t + \beta \cdot u_t + \varepsilon_t \\
        \mu_{t+1} &= \mu_t + \nu_t + \eta_t, \qquad \nu_{t+1} = \nu_t + \zeta_t, \qquad
            \gamma_{t+1} = -\sum_{j=0}^{s-2} \gamma_{t-j} + \omega_t \\
        \begin{pmatrix} \psi_{t+1} \\ \psi^*_{t+1} \end{pmatrix} &= \rho
            \begin{pmatrix} \cos\lambda & \sin\lambda \\ -\sin\lambda & \cos\lambda \end{pmatrix}
            \begin{pmatrix} \psi_t \\ \psi^*_t \end{pmatrix} + \begin{pmatrix} \kappa_t \\ \kappa^*_t \end{pmatrix}

    The frames are scalars, ``x`` ``(B, T)``. Latent sites: ``level``, :math:`\mu_t`; ``trend``, :math:`\nu_t`; ``seasonal``,
    :math:`\gamma_t`, and ``seasonal_past``, the ``s - 2`` before it; ``cycle``, :math:`\psi_t`, and ``cycle_conjugate``. The
    cycle begins stationary, the others exactly diffuse.

    Parameters: ``scale``, ``level_scale``, ``trend_scale``, ``seasonal_scale`` and ``cycle_scale``, the standard deviations of
    :math:`\varepsilon, \eta, \zeta, \omega` and of each of :math:`\kappa, \kappa^*`; ``cycle_frequency``, :math:`\lambda`, in
    radians a step, and ``cycle_damping``, :math:`\rho`; ``regression``, :math:`\beta`. Each may be replaced by a prior, as in
    ``model.level_scale = PyroSample(dist.HalfNormal(1.0))``.

    :param bool level: whether there is a level.
    :param bool trend: whether the level has a trend.
    :param seasonal: steps in a season, if there is one.
    :param cycle: the period, in steps, at which learning a damped cycle starts, if there is one.
    :param num_covariates: entries of the covariate ``u``, ``(B, T, num_covariates)``.
    :param fixed: components without noise of their own, among ``"level"``, ``"trend"`` and ``"seasonal"``. A fixed level with a
        trend is the smooth trend.
    :param coefficients: parameters by name, to start from.
    :param initial: distributions by site, in place of the diffuse ones; each of one number, or of the whole site.

    Source: Harvey, *Forecasting, Structural Time Series Models and the Kalman Filter*, 1989; Durbin and Koopman, *Time Series
    Analysis by State Space Methods*, 2012, section 3.2. The meaning of the parameters is that of UnobservedComponents in
    statsmodels.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> from pyro_seq.models import StructuralModel
        >>> model = StructuralModel(trend=True, seasonal=4, fixed=["trend"])
        >>> x = torch.arange(12.0) + torch.tensor([1.0, 2.0, -1.0, -2.0]).repeat(3)
        >>> posterior = seq.KalmanFilter(model).run(x)
        >>> posterior.smoothed["seasonal"].mean[0, :4].round(decimals=3)
        tensor([ 1.,  2., -1., -2.])
        >>> posterior.smoothed["trend"].mean[0, -1].round(decimals=3)
        tensor(1.)
    """

    def __init__(self, level: bool = True, trend: bool = False, seasonal: int | None = None, cycle: float | None = None,
                 num_covariates: int = 0, fixed: Sequence[str] = (), coefficients: Mapping[str, Any] | None = None,
                 initial: Mapping[str, Distribution] | None = None, name: str = ""):
        super().__init__(name)
        require_count("num_covariates", num_covariates, 0)
        if trend and not level:
            raise ValueError("trend=True with level=False: a trend is what the level moves by")
        if seasonal is not None:
            require_count("seasonal", seasonal, 2)
        if cycle is not None and not (isinstance(cycle, (int, float)) and not isinstance(cycle, bool) and cycle > 2):
            raise ValueError(f"cycle={cycle!r}; it is a period of more than 2 steps, at which learning starts")
        present = {"level": level, "trend": trend, "seasonal": seasonal, "cycle": cycle}
        self.components = [component for component, there in present.items() if there]
        if not self.components:
            raise ValueError("a structural model has at least one of level, seasonal and cycle")
        allowed = [component for component in self.components if component in _CAN_BE_FIXED]
        if isinstance(fixed, str) or (unknown := sorted(set(fixed) - set(allowed))):
            raise ValueError(f"fixed={fixed if isinstance(fixed, str) else unknown!r}; it is a list of components, here of "
                             f"{allowed}")
        self.fixed, self.season, self.num_covariates = frozenset(fixed), seasonal, num_covariates
        scales = {f"{c}_scale": (1.0, constraints.positive) for c in self.components if c not in fixed}
        wave = {"cycle_frequency": (2 * math.pi / cycle, constraints.interval(0.0, math.pi)),
                "cycle_damping": (0.9, constraints.unit_interval)} if cycle else {}
        self.declare(coefficients, {"scale": (1.0, constraints.positive), **scales, **wave,
                                    "regression": (torch.zeros(num_covariates), constraints.real)})
        sizes: dict[str, int | None] = {c: None for c in allowed}
        if seasonal is not None and seasonal > 2:
            sizes["seasonal_past"] = seasonal - 2
        self.start_at(initial, sizes)

    def initial(self) -> dict[str, Tensor]:
        state = {name: pyro.sample(name, fn) for name, fn in self.starts.items()}
        if "cycle" in self.components:
            at_rest = self.cycle_scale / (1 - self.cycle_damping.square()).sqrt()
            for name in ("cycle", "cycle_conjugate"):
                state[name] = pyro.sample(name, dist.Normal(torch.zeros_like(at_rest), at_rest))
        return state

    def transition(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        after = {}
        if "level" in self.components:
            after["level"] = self._move("level", state["level"] + state.get("trend", 0.0))
        if "trend" in self.components:
            after["trend"] = self._move("trend", state["trend"])
        if "seasonal" in self.components:
            past = torch.cat([state["seasonal"][:, None], *([state["seasonal_past"]] if self.season > 2 else [])], -1)
            after["seasonal"] = self._move("seasonal", -past.sum(-1))
            if self.season > 2:
                after["seasonal_past"] = pyro.sample("seasonal_past", dist.Delta(past[:, :-1], event_dim=1))
        if "cycle" in self.components:
            c, s = self.cycle_damping * self.cycle_frequency.cos(), self.cycle_damping * self.cycle_frequency.sin()
            wave, conjugate = state["cycle"], state["cycle_conjugate"]
            after["cycle"] = pyro.sample("cycle", dist.Normal(c * wave + s * conjugate, self.cycle_scale))
            after["cycle_conjugate"] = pyro.sample("cycle_conjugate", dist.Normal(c * conjugate - s * wave, self.cycle_scale))
        return after

    def emission(self, state: dict[str, Tensor], x: Tensor | None = None, u: Tensor | None = None) -> Tensor:
        mean = sum(state[name] for name in self.components if name != "trend") + self.effect(u)
        return pyro.sample("x", dist.Normal(mean, self.scale), obs=x)

    def _move(self, name: str, mean: Tensor) -> Tensor:
        if name in self.fixed:
            return pyro.sample(name, dist.Delta(mean))
        return pyro.sample(name, dist.Normal(mean, getattr(self, f"{name}_scale")))


class LocalLevel(StructuralModel):
    r"""A random walk in noise, :math:`x_t = \mu_t + \varepsilon_t`, :math:`\mu_{t+1} = \mu_t + \eta_t`.

    Arguments, parameters and sites are those of :class:`StructuralModel`.

    Source: Durbin and Koopman, *Time Series Analysis by State Space Methods*, 2012, chapter 2.

    Example::

        >>> import torch
        >>> import pyro_seq as seq
        >>> from pyro_seq.models import LocalLevel
        >>> model = LocalLevel(coefficients={"scale": 2.0, "level_scale": 0.5})
        >>> seq.KalmanFilter(model).run(torch.tensor([1.0, 2.0, 3.0])).smoothed["level"].mean.shape
        torch.Size([1, 3])
    """

    def __init__(self, num_covariates: int = 0, coefficients: Mapping[str, Any] | None = None,
                 initial: Mapping[str, Distribution] | None = None, name: str = ""):
        super().__init__(num_covariates=num_covariates, coefficients=coefficients, initial=initial, name=name)


class LocalLinearTrend(StructuralModel):
    r"""A level that moves by a trend, in noise.

    .. math:: x_t = \mu_t + \varepsilon_t, \qquad \mu_{t+1} = \mu_t + \nu_t + \eta_t, \qquad \nu_{t+1} = \nu_t + \zeta_t

    Arguments, parameters and sites are those of :class:`StructuralModel`.

    Source: Durbin and Koopman, *Time Series Analysis by State Space Methods*, 2012, section 3.2.1.

    Example::

        >>> from pyro_seq.models import LocalLinearTrend
        >>> sorted(name for name, _ in LocalLinearTrend().named_pyro_params())
        ['level_scale', 'scale', 'trend_scale']
    """

    def __init__(self, num_covariates: int = 0, fixed: Sequence[str] = (), coefficients: Mapping[str, Any] | None = None,
                 initial: Mapping[str, Distribution] | None = None, name: str = ""):
        super().__init__(trend=True, num_covariates=num_covariates, fixed=fixed, coefficients=coefficients, initial=initial,
                         name=name)


class BasicStructural(StructuralModel):
    """A level with a trend and a season, in noise.

    :param int season: steps in a season. The other arguments, parameters and sites are those of :class:`StructuralModel`.

    Source: Harvey, *Forecasting, Structural Time Series Models and the Kalman Filter*, 1989, section 2.3.

    Example::

        >>> from pyro_seq.models import BasicStructural
        >>> BasicStructural(12).components
        ['level', 'trend', 'seasonal']
    """

    def __init__(self, season: int, num_covariates: int = 0, fixed: Sequence[str] = (),
                 coefficients: Mapping[str, Any] | None = None, initial: Mapping[str, Distribution] | None = None,
                 name: str = ""):
        super().__init__(trend=True, seasonal=season, num_covariates=num_covariates, fixed=fixed, coefficients=coefficients,
                         initial=initial, name=name)
