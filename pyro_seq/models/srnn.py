"""The stochastic recurrent neural network and its inference networks."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_seq.guide import SequentialGuide
from pyro_seq.guides.recurrent import backward_rnn
from pyro_seq.model import SequentialModel
from pyro_seq.models.layers import Emission, Framed, NormalHead, mlp, require_sizes

__all__ = ["SRNN", "SRNNInference"]


class SRNN(Framed, SequentialModel):
    r"""The stochastic recurrent neural network: a layer of stochastic units on a deterministic recurrence of the data.

    .. math:: d_t = \mathrm{GRU}(d_{t-1}, x_{t-1}), \qquad z_t \sim N(\mu(z_{t-1}, d_t), \sigma^2(z_{t-1}, d_t)), \qquad
              x_t \sim g(z_t, d_t)

    with :math:`z_0 = 0` and :math:`x_0 = 0`, :math:`d_0 = 0`.

    :param int observed: entries of a frame.
    :param int latent: entries of :math:`z_t`.
    :param int hidden: units of the recurrence and of every network.
    :param str emission: ``"bernoulli"`` or ``"normal"``.

    Source: Fraccaro, Sønderby, Paquet and Winther, *Sequential Neural Models with Stochastic Layers*, 2016.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import SRNN, SRNNInference
        >>> model = SRNN(observed=88, latent=8, hidden=16)
        >>> guide = SRNNInference(model)
        >>> rolls = model.simulate([10, 7])["x"]
        >>> loss = seq.SequentialELBO().loss(model, guide, rolls, [10, 7])
    """

    def __init__(self, observed: int, latent: int = 64, hidden: int = 128, emission: str = "bernoulli", name: str = ""):
        super().__init__(name)
        require_sizes(observed=observed, latent=latent, hidden=hidden)
        self.sizes = (observed, latent, hidden)
        self.gru = nn.GRU(observed, hidden, batch_first=True)
        self.prior = nn.Sequential(nn.Linear(latent + hidden, hidden), nn.ReLU(), NormalHead(hidden, latent))
        self.emit = Emission(latent + hidden, hidden, observed, emission, layers=1)

    def start(self, rows: int) -> dict[str, Tensor]:
        observed, latent, hidden = self.sizes
        zeros = self.gru.weight_ih_l0.new_zeros
        return {"z": zeros(rows, latent), "d": self.recur(zeros(rows, observed), zeros(rows, hidden))}

    def recur(self, x: Tensor, d: Tensor) -> Tensor:
        """One step of the recurrence over the data, rows at a time."""
        return self.gru(x[:, None], d[None])[1][0]

    def step(self, state: dict[str, Tensor], x: Tensor | None = None) -> dict[str, Tensor]:
        z = pyro.sample("z", dist.Normal(*self.prior(torch.cat([state["z"], state["d"]], -1))).to_event(1))
        x = pyro.sample("x", self.emit(z, state["d"]), obs=x)
        return self.advance(state, {"z": z}, x)

    def advance(self, state: dict[str, Tensor], z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"z": z["z"], "d": self.recur(x, state["d"])}

    def recurrence(self, x: Tensor) -> Tensor:
        """``(B, T, hidden)``: :math:`d_1 .. d_T` from data ``(B, T, observed)``, at once."""
        return self.gru(nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))[0]


class SRNNInference(SequentialGuide):
    r"""The published inference of the SRNN, a residual on the prior's mean.

    .. math:: a_t = \mathrm{GRU}(a_{t+1}, [d_t, x_t]), \qquad
              q(z_t \mid z_{t-1}, a_t) = N(\mu_p(z_{t-1}, d_t) + \mu(z_{t-1}, a_t), \sigma^2(z_{t-1}, a_t))

    :param model: an :class:`SRNN`.
    :param bool smoothing: the backward recurrence; without it :math:`a_t` is a network of :math:`[d_t, x_t]` alone, and the
        guide a filter.

    Source: Fraccaro, Sønderby, Paquet and Winther, *Sequential Neural Models with Stochastic Layers*, 2016.

    Example::

        >>> from pyro_seq.models import SRNN, SRNNInference
        >>> SRNNInference(SRNN(observed=4, latent=3, hidden=8), smoothing=False).reads_future
        False
    """

    reads_prior = False

    def __init__(self, model: Any, *, smoothing: bool = True, name: str | None = None):
        super().__init__(model, name=name)
        if not isinstance(model, SRNN):
            raise TypeError(f"SRNNInference is made for an SRNN, not {type(model).__name__}: use FilteringGuide, "
                            "SmoothingGuide or AmortizedVariationalFilter")
        observed, latent, hidden = model.sizes
        self.smoothing = smoothing
        self.encode = (nn.GRU(hidden + observed, hidden, batch_first=True) if smoothing else
                       mlp(hidden + observed, hidden, hidden))
        self.head = nn.Sequential(nn.Linear(latent + hidden, hidden), nn.ReLU(), NormalHead(hidden, latent))

    @property
    def reads_future(self) -> bool:
        return self.smoothing

    def prepare(self, x: Tensor, lengths: Tensor) -> Tensor:
        inputs = torch.cat([self.model.recurrence(x), x], -1)
        return backward_rnn(self.encode, inputs, lengths) if self.smoothing else self.encode(inputs)

    def step(self, state: dict[str, Tensor], encoding: Tensor) -> None:
        prior, _ = self.model.prior(torch.cat([state["z"], state["d"]], -1))
        shift, scale = self.head(torch.cat([state["z"], encoding], -1))
        pyro.sample("z", dist.Normal(prior + shift, scale).to_event(1))
