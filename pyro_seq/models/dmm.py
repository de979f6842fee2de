"""The deep Markov model, with and without edges from the last frame, and its structured inference networks."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_seq.guide import SequentialGuide
from pyro_seq.guides.recurrent import backward_rnn, state_after
from pyro_seq.model import SequentialModel, StateSpaceModel
from pyro_seq.models.layers import Emission, Framed, GatedResidual, NormalHead, mlp, require_sizes
from pyro_seq.sequences import Sequences

__all__ = ["AugmentedDeepMarkovModel", "DeepMarkovModel", "StructuredInference"]


class GatedTransition(nn.Module):
    r"""The location and scale of :math:`z_t` given the inputs, which begin with :math:`z_{t-1}`.

    .. math:: g = \sigma(\mathrm{MLP}(u)),\quad h = \mathrm{MLP}(u),\quad \mu = (1 - g) (W z_{t-1} + b) + g h,\quad
              \sigma = \mathrm{softplus}(W' \mathrm{ReLU}(h) + b')

    with :math:`W` starting at the identity: a gate of zero makes the latents a random walk.
    """

    def __init__(self, latent: int, hidden: int, extra: int = 0):
        super().__init__()
        self.gate = mlp(latent + extra, hidden, latent)
        self.proposed = mlp(latent + extra, hidden, latent)
        self.linear = nn.Linear(latent, latent)
        self.spread = nn.Linear(latent, latent)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(latent))
            self.linear.bias.zero_()

    def forward(self, z: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([z, *extra], -1) if extra else z
        gate, proposed = torch.sigmoid(self.gate(inputs)), self.proposed(inputs)
        return (1 - gate) * self.linear(z) + gate * proposed, softplus(self.spread(proposed.relu()))


class DeepMarkovModel(Framed, StateSpaceModel):
    r"""The deep Markov model: a Markov chain of normal latents with a gated transition, and a neural emission.

    .. math:: z_t \sim N(\mu(z_{t-1}), \sigma^2(z_{t-1})), \qquad x_t \sim g(z_t), \qquad z_0 \text{ learned}

    :param int observed: entries of a frame.
    :param int latent: entries of :math:`z_t`.
    :param int hidden: units of the transition's networks.
    :param int emission_hidden: units of the emission's two layers.
    :param str emission: ``"bernoulli"`` or ``"normal"``.

    Source: Krishnan, Shalit and Sontag, *Structured Inference Networks for Nonlinear State Space Models*, 2017.

    Example::

        >>> import torch
        >>> import pyro_seq as seq
        >>> from pyro_seq.models import DeepMarkovModel, StructuredInference
        >>> model = DeepMarkovModel(observed=88, latent=8, hidden=16)
        >>> guide = StructuredInference(model)
        >>> rolls = model.simulate([10, 7])["x"]
        >>> rolls.shape
        torch.Size([2, 10, 88])
        >>> loss = seq.SequentialELBO().loss(model, guide, rolls, [10, 7])
    """

    def __init__(self, observed: int, latent: int = 64, hidden: int = 128, emission_hidden: int = 128,
                 emission: str = "bernoulli", name: str = ""):
        super().__init__(name)
        require_sizes(observed=observed, latent=latent, hidden=hidden, emission_hidden=emission_hidden)
        self.sizes = (observed, latent)
        self.z_0 = nn.Parameter(torch.zeros(latent))
        self.gated = GatedTransition(latent, hidden)
        self.emit = Emission(latent, emission_hidden, observed, emission)

    def initial(self) -> Tensor:
        return self.transition(self.z_0[None])

    def transition(self, z: Tensor) -> Tensor:
        return pyro.sample("z", dist.Normal(*self.gated(z)).to_event(1))

    def emission(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        return pyro.sample("x", self.emit(z), obs=x)

    def prior(self, state: Tensor | None, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last latent and the moments of the next, for the inference networks: ``(z, loc, scale)``."""
        z = self.z_0.expand(rows, -1) if state is None else state
        return z, *self.gated(z)


class AugmentedDeepMarkovModel(Framed, SequentialModel):
    r"""The deep Markov model in which the last frame also feeds the transition and the emission (DMM-Aug).

    .. math:: z_t \sim N(\mu(z_{t-1}, x_{t-1}), \sigma^2(z_{t-1}, x_{t-1})), \qquad x_t \sim g(z_t, x_{t-1}), \qquad x_0 = 0

    The parameters are those of :class:`DeepMarkovModel`.

    Source: Krishnan, Shalit and Sontag, *Structured Inference Networks for Nonlinear State Space Models*, 2017.

    Example::

        >>> from pyro_seq.models import AugmentedDeepMarkovModel
        >>> AugmentedDeepMarkovModel(observed=88, latent=8).simulate([5])["x"].shape
        torch.Size([1, 5, 88])
    """

    def __init__(self, observed: int, latent: int = 64, hidden: int = 128, emission_hidden: int = 128,
                 emission: str = "bernoulli", name: str = ""):
        super().__init__(name)
        require_sizes(observed=observed, latent=latent, hidden=hidden, emission_hidden=emission_hidden)
        self.sizes = (observed, latent)
        self.z_0 = nn.Parameter(torch.zeros(latent))
        self.gated = GatedTransition(latent, hidden, extra=observed)
        self.emit = Emission(latent + observed, emission_hidden, observed, emission)

    def start(self, rows: int) -> dict[str, Tensor]:
        return {"z": self.z_0.expand(rows, -1), "x": self.z_0.new_zeros(rows, self.sizes[0])}

    def step(self, state: dict[str, Tensor], x: Tensor | None = None) -> dict[str, Tensor]:
        z = pyro.sample("z", dist.Normal(*self.gated(state["z"], state["x"])).to_event(1))
        x = pyro.sample("x", self.emit(z, state["x"]), obs=x)
        return {"z": z, "x": x}

    def advance(self, state: dict[str, Tensor], z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"z": z["z"], "x": x}

    def prior(self, state: dict[str, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The last latent and the moments of the next, for the inference networks: ``(z, loc, scale)``."""
        return state["z"], *self.gated(state["z"], state["x"])


class StructuredInference(SequentialGuide):
    r"""The published inference of the deep Markov model, :math:`q(z_t \mid z_{t-1}, x)`.

    Recurrent encodings of the data are averaged with a function of the last latent (the combiner),

    .. math:: h = \tfrac{1}{n} (\tanh(W z_{t-1} + b) + h^{\mathrm{left}}_t + h^{\mathrm{right}}_t), \qquad
              q = N(W_\mu h + b_\mu, \mathrm{softplus}(W_\sigma h + b_\sigma)^2)

    :param model: a :class:`DeepMarkovModel` or :class:`AugmentedDeepMarkovModel`.
    :param str reads: ``"past"``: a filter (ST-L); ``"future"``: frames from t on (ST-R, the published default); ``"both"``
        (ST-LR).
    :param int hidden: units of the recurrent encodings.
    :param bool residual: gate the moments between the prior's and the network's own, instead of the latter outright.

    Source: Krishnan, Shalit and Sontag, *Structured Inference Networks for Nonlinear State Space Models*, 2017.

    Example::

        >>> from pyro_seq.models import DeepMarkovModel, StructuredInference
        >>> guide = StructuredInference(DeepMarkovModel(observed=4, latent=3), reads="future", hidden=8)
        >>> guide.reads_future
        True
    """

    reads_prior = False

    def __init__(self, model: Any, *, reads: str = "past", hidden: int = 128, residual: bool = False,
                 name: str | None = None):
        super().__init__(model, name=name)
        if reads not in ("past", "future", "both"):
            raise ValueError(f"reads={reads!r}; it is 'past' (a filter), 'future' or 'both'")
        if not isinstance(model, (DeepMarkovModel, AugmentedDeepMarkovModel)):
            raise TypeError(f"StructuredInference is made for a deep Markov model, not {type(model).__name__}: use "
                            "FilteringGuide, SmoothingGuide or AmortizedVariationalFilter")
        self.reads = reads
        require_sizes(hidden=hidden)
        observed, latent = model.sizes
        self.left = nn.LSTM(observed, hidden, batch_first=True) if reads != "future" else None
        self.right = nn.LSTM(observed, hidden, batch_first=True) if reads != "past" else None
        self.from_latent = nn.Linear(latent, hidden)
        self.head = GatedResidual(hidden, latent) if residual else NormalHead(hidden, latent)
        self.residual = residual

    @property
    def reads_future(self) -> bool:
        return self.reads != "past"

    def prepare(self, x: Tensor, lengths: Tensor) -> Tensor:
        parts = []
        if self.left is not None:
            parts.append(self.left(x)[0])
        if self.right is not None:
            parts.append(backward_rnn(self.right, x, lengths))
        return sum(parts)

    def stream_rows(self, sequences: Sequences, carry: Any) -> tuple[Tensor, Any]:
        return self.left(sequences.x["x"].nan_to_num(), carry)

    def window_rows(self, sequences: Sequences, start: int, stop: int, carry: Any) -> tuple[Tensor, Any]:
        if self.right is None:
            return super().window_rows(sequences, start, stop, carry)
        x, window, after = sequences.x["x"].nan_to_num(), sequences.between(start, stop), None
        here = x[:, start - 1:stop]
        if stop < sequences.num_steps:
            after = state_after(self.right, x[:, stop:], sequences.lengths - stop)
        encoding = backward_rnn(self.right, here, window.lengths, after)
        if self.left is not None:
            past, carry = self.left(here, carry)
            encoding = past + encoding
        return encoding, carry

    def step(self, state: Any, x: Tensor, encoding: Tensor) -> None:
        z, *prior = self.model.prior(state, len(x))
        combined = (torch.tanh(self.from_latent(z)) + encoding) / (3 if self.reads == "both" else 2)
        moments = self.head(combined, *prior) if self.residual else self.head(combined)
        pyro.sample("z", dist.Normal(*moments).to_event(1))
