"""The locally optimal proposal of discrete latents, by enumeration."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints

from pyro_seq.engine.enumerated import run_step
from pyro_seq.engine.noise import repeat_frame
from pyro_seq.engine.sites import Proposal, PyroSites, StepSites
from pyro_seq.engine.state import State, map_state
from pyro_seq.engine.support import Support, read_support
from pyro_seq.guide import DrawnSites, SequentialGuide
from pyro_seq.module import require_model
from pyro_seq.sequences import Frame, Sequences, repeat_rows

__all__ = ["EnumeratedGuide", "Finite"]


class EnumeratedGuide(SequentialGuide):
    r"""The locally optimal proposal :math:`p(z_t \mid h_{t-1}, x_t)` of latents with finitely many values.

    For each particle the step is run on every joint value of its latents. A particle then weighs
    :math:`p(x_t \mid h_{t-1})`, whatever was drawn, which :meth:`look_ahead` says beforehand: in
    :class:`~pyro_seq.AuxiliaryParticleFilter` this is the fully adapted filter. The state may be anything, such as a whole past
    of regimes of which :class:`~pyro_seq.ForwardBackward` could keep no table. A step costs as many runs of the model's step
    as there are joint values.

    :param model: a declared model whose latents have a finite support, as Categorical and Bernoulli; at most 4096 joint values.
    :param global_guide: a guide for the model's global parameters.
    :raises ValueError: in a run, if a latent has no finite support, naming the site.

    Source: Doucet, Godsill and Andrieu, *On sequential Monte Carlo sampling methods for Bayesian filtering*, 2000.

    Example, two regimes of which the state counts the switches::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Switches(seq.SequentialModel):
        ...     def start(self, rows):
        ...         return {"k": torch.zeros(rows, dtype=torch.long), "count": torch.zeros(rows)}
        ...     def step(self, state, x=None):
        ...         k = pyro.sample("k", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[state["k"]]))
        ...         count = state["count"] + (k != state["k"])
        ...         pyro.sample("x", dist.Normal(3.0 * k, 1 + 0.1 * count), obs=x)
        ...         return {"k": k, "count": count}
        >>> _ = pyro.set_rng_seed(0)
        >>> model = Switches()
        >>> x = model.simulate([50])["x"]
        >>> prior = seq.ParticleFilter(model, num_particles=100).run(x)
        >>> optimal = seq.ParticleFilter(model, num_particles=100, guide=seq.EnumeratedGuide(model)).run(x)
        >>> bool(optimal.ess.mean() > prior.ess.mean())
        True
    """

    def __init__(self, model: Any, *, global_guide: Any = None, name: str | None = None):
        require_model(model, "EnumeratedGuide")
        super().__init__(model, global_guide=global_guide, name=name)

    def prepare_rows(self, sequences: Sequences) -> None:
        self.__dict__["_support"] = read_support(self.model, sequences, "EnumeratedGuide")[0]

    def stream_rows(self, sequences: Sequences, carry: State) -> tuple[None, None]:
        if "_support" not in self.__dict__:
            self.prepare_rows(sequences)
        return None, None

    def look_ahead(self, state: State, frame: Frame, encoding: Any) -> Tensor:
        r"""``(rows,)`` :math:`\log p(x_t \mid h_{t-1})`."""
        latent, observed = self._scored(state, frame)
        return (latent + observed).logsumexp(-1)

    def propose(self, state: State, frame: Frame, encoding: Any, emit: PyroSites | None = None) -> Proposal:
        support: Support = self.__dict__["_support"]
        latent, observed = self._scored(state, frame)
        impossible = (latent + observed).amax(-1, keepdim=True) == -torch.inf
        table = torch.where(impossible, latent, latent + observed).unflatten(-1, support.sizes)
        drawn: dict[str, tuple[Distribution, Tensor]] = {}
        for name, values in support.values.items():
            q = Finite(values, table.flatten(2).logsumexp(-1) if table.dim() > 2 else table)
            with StepSites(frame) if emit is None else emit as sites:
                value = pyro.sample(name, q)
            drawn[name] = (sites.sites[name].p, value) if emit is None else sites.drawn[name]
            table = table[torch.arange(frame.rows, device=frame.device), q.index(value)]
        return DrawnSites(type(self).__name__, drawn)

    def _scored(self, state: State, frame: Frame) -> tuple[Tensor, Tensor]:
        """``(rows, K)`` each: log probability of each joint value of the latents, log density of the frame given it."""
        support: Support = self.__dict__["_support"]
        k = support.num_states
        latent, observed, _ = run_step(self.model, support, map_state(lambda leaf: repeat_rows(leaf, k), state),
                                       repeat_frame(frame, k), carried=False)
        return latent.reshape(frame.rows, k), observed.reshape(frame.rows, k)


class Finite(TorchDistribution):
    """A distribution over finitely many values of any shape.

    :param values: ``(K, *event)``, no two alike.
    :param logits: ``(rows, K)`` log probabilities, up to a constant of each row.

    Example::

        >>> import torch
        >>> coins = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> Finite(coins, torch.tensor([[0.2, 0.3, 0.5]]).log()).log_prob(torch.tensor([[0.0, 1.0]])).exp()
        tensor([0.3000])
    """

    arg_constraints: dict = {}

    def __init__(self, values: Tensor, logits: Tensor):
        self.values, self.logits = values, logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], values.shape[1:], validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def index(self, value: Tensor) -> Tensor:
        """Which of the values each ``(rows, *event)`` is: ``(rows,)``."""
        return self._matches(value).long().argmax(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.values[Categorical(logits=self.logits, validate_args=False).sample(sample_shape)]

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(self._matches(value), self.logits, -torch.inf).amax(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Finite:
        return Finite(self.values, self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-1:]))

    def _matches(self, value: Tensor) -> Tensor:
        events = len(self.event_shape)
        found = value.unsqueeze(-1 - events) == self.values
        return found.flatten(found.dim() - events).all(-1) if events else found
