"""An autoregression whose mean, and more, switch between regimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import one_hot

from pyro_seq.model import SequentialModel
from pyro_seq.models.classical import Classical
from pyro_seq.module import require_count

__all__ = ["MarkovSwitchingAutoregression"]


class MarkovSwitchingAutoregression(Classical, SequentialModel):
    r"""Hamilton's autoregression around a mean that follows a Markov chain of regimes.

    .. math:: x_t = \mu_{s_t} + \sum_{i=1}^p \varphi_i (x_{t-i} - \mu_{s_{t-i}}) + \sigma \varepsilon_t, \qquad
              P(s_t = k \mid s_{t-1} = j) = A_{jk}

    The frames are scalars, ``x`` ``(B, T)``. Latent sites: ``regime``, :math:`s_t`, and ``regime_1`` to ``regime_p``, those of
    the ``p`` steps before, since the density of a frame reads them too. The chain begins at its stationary distribution.
    Deviations of frames before the first one count as zero, unless they are given.

    Parameters: ``mean``, ``(K,)``; ``ar``, ``(p,)``, or ``(K, p)`` if it switches; ``scale``, one number, or ``(K,)`` if it
    switches; ``transition``, ``(K, K)``, whose rows sum to one. Each may be replaced by a prior, as in ``model.mean =
    PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))``.

    :param int num_regimes: K.
    :param int order: p.
    :param bool switching_ar: whether each regime has autoregressive coefficients of its own.
    :param bool switching_scale: whether each regime has a scale of its own.
    :param past: the ``p`` frames before the first one, the latest first, on which the evidence is then conditional.
    :param coefficients: parameters by name, to start from. Regimes that start alike stay alike: the means start apart.

    Source: Hamilton, *A New Approach to the Economic Analysis of Nonstationary Time Series and the Business Cycle*, 1989. The
    meaning of the parameters is that of MarkovAutoregression in statsmodels, whose matrix of transitions is transposed.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import MarkovSwitchingAutoregression
        >>> model = MarkovSwitchingAutoregression(2, order=1, coefficients={"mean": [-2.0, 2.0], "scale": 0.5})
        >>> drawn = model.simulate([50])
        >>> posterior = seq.ParticleFilter(model, num_particles=50).run(drawn["x"])
        >>> posterior.filtered["regime"].mean.shape
        torch.Size([1, 50])
    """

    def __init__(self, num_regimes: int, order: int = 0, switching_ar: bool = False, switching_scale: bool = False,
                 past: Sequence[float] | Tensor | None = None, coefficients: Mapping[str, Any] | None = None, name: str = ""):
        super().__init__(name)
        require_count("num_regimes", num_regimes, 2)
        require_count("order", order, 0)
        k, p = num_regimes, order
        self.declare(coefficients, {
            "mean": (torch.linspace(-1.0, 1.0, k), constraints.real),
            "ar": (torch.zeros(k, p) if switching_ar else torch.zeros(p), constraints.real),
            "scale": (torch.ones(k) if switching_scale else 1.0, constraints.positive),
            "transition": (0.8 * torch.eye(k) + 0.2 / k, constraints.simplex)})
        self.sizes = (k, p)
        self.knows_past = past is not None
        past = torch.zeros(p) if past is None else torch.as_tensor(past, dtype=torch.get_default_dtype())
        if past.shape != (p,):
            raise ValueError(f"past has shape {tuple(past.shape)}; with order={p} it is ({p},), the latest frame first")
        self.register_buffer("past", past)

    def start(self, rows: int) -> dict[str, Tensor]:
        k, p = self.sizes
        # Of each regime given the one before it, the oldest first; before the first step none is known.
        table = torch.cat([self._stationary().expand(1, k, k), self.transition.expand(p, k, k)])
        state = {"table": table.expand(rows, p + 1, k, k)}
        return {**state, "past": self.past.expand(rows, p)} if p else state

    def step(self, state: dict[str, Tensor], t: Tensor, x: Tensor | None = None) -> dict[str, Tensor]:
        k, p = self.sizes
        table = state["table"]
        regime, regimes = torch.zeros(len(table), dtype=torch.long, device=table.device), []
        row = torch.arange(len(table), device=table.device)
        for lag in range(p, -1, -1):
            name = f"regime_{lag}" if lag else "regime"
            regime = pyro.sample(name, dist.Categorical(table[row, p - lag, regime]))
            regimes.append(regime)
        mean = self.mean[regime]
        if p:
            deviation = state["past"] - self.mean[torch.stack(regimes[-2::-1], -1)]
            known = self.knows_past | (t[:, None] > torch.arange(1, p + 1, device=t.device))
            ar = self.ar[regime] if self.ar.dim() > 1 else self.ar
            mean = mean + (torch.where(known, deviation, 0.0) * ar).sum(-1)
        scale = self.scale[regime] if self.scale.dim() else self.scale
        x = pyro.sample("x", dist.Normal(mean, scale), obs=x)
        # The regimes of the past are known from now on; the next one follows the last in the chain.
        if not p:
            return {"table": self.transition[regime][:, None, None].expand(-1, 1, k, k)}
        certain = one_hot(torch.stack(regimes[1:], -1), k).to(self.transition)[:, :, None].expand(-1, -1, k, -1)
        return {"table": torch.cat([certain, self.transition.expand(len(table), 1, k, k)], 1),
                "past": torch.cat([x[:, None], state["past"]], -1)[:, :p]}

    def _stationary(self) -> Tensor:
        """``(K,)``: the distribution that the chain keeps."""
        ones = torch.ones_like(self.transition)
        return torch.linalg.solve(torch.eye(len(ones)).to(ones) - self.transition.T + ones, ones[0])
