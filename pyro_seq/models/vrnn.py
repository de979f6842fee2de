"""The variational recurrent neural network and its inference network."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_seq.guide import SequentialGuide
from pyro_seq.model import SequentialModel
from pyro_seq.models.layers import Emission, Framed, GatedResidual, NormalHead, require_sizes
from pyro_seq.sequences import Sequences

__all__ = ["VRNN", "VRNNInference"]


class VRNN(Framed, SequentialModel):
    r"""The variational recurrent neural network.

    .. math:: z_t \sim N(\mu(h_{t-1}), \sigma^2(h_{t-1})), \qquad x_t \sim g(\varphi_z(z_t), h_{t-1}), \qquad
              h_t = \mathrm{GRU}(\varphi_x(x_t), \varphi_z(z_t), h_{t-1})

    :param int observed: entries of a frame.
    :param int latent: entries of :math:`z_t`.
    :param int hidden: units of the recurrence and of every network.
    :param str emission: ``"bernoulli"`` or ``"normal"``.

    Source: Chung et al., *A Recurrent Latent Variable Model for Sequential Data*, 2015.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import VRNN, VRNNInference
        >>> model = VRNN(observed=88, latent=8, hidden=16)
        >>> guide = VRNNInference(model)
        >>> rolls = model.simulate([10, 7])["x"]
        >>> loss = seq.SequentialELBO().loss(model, guide, rolls, [10, 7])
    """

    def __init__(self, observed: int, latent: int = 64, hidden: int = 128, emission: str = "bernoulli", name: str = ""):
        super().__init__(name)
        require_sizes(observed=observed, latent=latent, hidden=hidden)
        self.sizes = (observed, latent, hidden)
        self.h_0 = nn.Parameter(torch.zeros(hidden))
        self.prior = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), NormalHead(hidden, latent))
        self.embed_x = nn.Sequential(nn.Linear(observed, hidden), nn.ReLU())
        self.embed_z = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU())
        self.emit = Emission(2 * hidden, hidden, observed, emission, layers=1)
        self.gru = nn.GRUCell(2 * hidden, hidden)

    def start(self, rows: int) -> Tensor:
        return self.h_0.expand(rows, -1)

    def step(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        z = pyro.sample("z", dist.Normal(*self.prior(h)).to_event(1))
        x = pyro.sample("x", self.emit(self.embed_z(z), h), obs=x)
        return self.advance(h, {"z": z}, x)

    def advance(self, h: Tensor, z: dict[str, Tensor], x: Tensor) -> Tensor:
        return self.gru(torch.cat([self.embed_x(x), self.embed_z(z["z"])], -1), h)


class VRNNInference(SequentialGuide):
    r"""The published inference of the VRNN, :math:`q(z_t \mid \varphi_x(x_t), h_{t-1})`: a filter that shares the model's
    features :math:`\varphi_x`.

    :param model: a :class:`VRNN`.
    :param bool residual: gate the moments between the prior's and the network's own, instead of the latter outright.

    Source: Chung et al., *A Recurrent Latent Variable Model for Sequential Data*, 2015.

    Example::

        >>> from pyro_seq.models import VRNN, VRNNInference
        >>> VRNNInference(VRNN(observed=4, latent=3, hidden=8), residual=True).reads_future
        False
    """

    reads_prior = False
    reads_future = False

    def __init__(self, model: Any, *, residual: bool = False, name: str | None = None):
        super().__init__(model, name=name)
        if not isinstance(model, VRNN):
            raise TypeError(f"VRNNInference is made for a VRNN, not {type(model).__name__}: use FilteringGuide or "
                            "AmortizedVariationalFilter")
        _, latent, hidden = model.sizes
        self.residual = residual
        self.features = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.ReLU())
        self.head = GatedResidual(hidden, latent) if residual else NormalHead(hidden, latent)

    def prepare(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.model.embed_x(x)

    def stream_rows(self, sequences: Sequences, carry: Any) -> tuple[Tensor, None]:
        return self.prepare_rows(sequences), None

    def step(self, h: Tensor, encoding: Tensor) -> None:
        features = self.features(torch.cat([encoding, h], -1))
        moments = self.head(features, *self.model.prior(h)) if self.residual else self.head(features)
        pyro.sample("z", dist.Normal(*moments).to_event(1))
