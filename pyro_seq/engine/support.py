"""The values that the latents of a step can take, and all of them jointly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_seq.engine.loop import check_step, refuse_scaled
from pyro_seq.engine.sites import StepSites
from pyro_seq.engine.state import State, leaves, versions
from pyro_seq.sequences import Sequences

__all__ = ["Support", "read_support"]

_MOST_STATES = 4096


class Support:
    """The values that the latent sites of one step can take.

    :param values: by site, in the order sampled, ``(K_site, *event)``.
    """

    def __init__(self, values: dict[str, Tensor]):
        self.values = values
        self.sizes = [len(v) for v in values.values()]
        self.num_states = math.prod(self.sizes)
        index = torch.cartesian_prod(*(torch.arange(n, device=v.device) for n, v in zip(self.sizes, values.values())))
        index = index.reshape(self.num_states, len(values))
        self.joint = {name: v[index[:, i]] for i, (name, v) in enumerate(values.items())}
        """By site, ``(K, *event)``: what each joint state stands for."""
        self.last = list(values)[-1]
        self.prefix = {name: v[::self.sizes[-1]] for name, v in self.joint.items() if name != self.last}
        """The sites before the last one, over the product of their supports."""

    def marginal(self, probabilities: Tensor, site: str) -> Tensor:
        """``(..., K)`` over joint states to ``(..., K_site)``."""
        if len(self.sizes) == 1:
            return probabilities
        kept = list(self.values).index(site)
        others = [i - len(self.sizes) for i in range(len(self.sizes)) if i != kept]
        return probabilities.unflatten(-1, self.sizes).sum(others)

    def rows(self, times: int) -> dict[str, Tensor]:
        """The joint values, all of them ``times`` times over."""
        return {name: v.repeat(times, *(1,) * (v.dim() - 1)) for name, v in self.joint.items()}


def read_support(model: Any, sequences: Sequences, who: str = "ForwardBackward") -> tuple[Support, bool]:
    """The support of the latents, and whether the state that a step leaves is made of their very values.

    :param who: takes only latents with a finite support, for messages.
    :raises ValueError: naming the site whose support cannot be enumerated.
    """
    longest = sequences.select([int(sequences.lengths.argmax())])
    found: list[tuple[dict[str, Tensor], tuple[str | None, ...]]] = []
    state: State = None
    for frame in longest.packed.frames(1, 1, min(2, longest.num_steps)):
        values: dict[str, Tensor] = {}

        def propose(name: str, p: Distribution, values: dict[str, Tensor] = values) -> tuple[None, Tensor]:
            values[name] = _enumerate(name, p, who)
            return None, values[name][:1]

        before = model.begin(frame) if frame.first else state
        counts = versions(before)
        with StepSites(frame, propose) as step:
            state = model.apply(before, frame)
        check_step(model, step.sites, before, state, frame, counts)
        refuse_scaled(model, step)
        made_of = tuple(next((name for name, site in step.latents.items() if site.value is leaf), None)
                        for leaf in leaves(state))
        found.append((values, made_of))
    first, last = found[0], found[-1]
    if not first[0]:
        raise ValueError(f"{type(model).__name__} samples no latent site: there is nothing to infer")
    if list(first[0]) != list(last[0]) or not all(torch.equal(v, last[0][name]) for name, v in first[0].items()):
        sizes = [{name: len(v) for name, v in values.items()} for values, _ in (first, last)]
        raise ValueError(f"the latent sites of {type(model).__name__} and the sizes of their supports are {sizes[0]} at the "
                         f"first step and {sizes[1]} at the second: sample the same sites with the same supports, in the same "
                         "order, at every step")
    if (states := math.prod(len(v) for v in first[0].values())) > _MOST_STATES:
        raise ValueError(f"the latent sites {list(first[0])} of {type(model).__name__} have {states} joint values a step, more "
                         f"than the {_MOST_STATES} that exact inference takes on: use ParticleFilter")
    return Support(first[0]), first[1] == last[1] and None not in first[1]


def _enumerate(name: str, p: Distribution, who: str) -> Tensor:
    """``(K, *event)``: every value of a site."""
    base = p
    while isinstance(base, Independent):
        base = base.base_dist
    kind = type(base).__name__
    if not base.has_enumerate_support:
        raise ValueError(f"site {name!r} is {kind}, which has no finite support to enumerate: {who} takes latents such as "
                         "Categorical and Bernoulli. Use KalmanFilter for a linear-Gaussian model, else ParticleFilter")
    try:
        values = base.enumerate_support(expand=False).detach()
    except NotImplementedError as error:
        raise ValueError(f"site {name!r}: the support of {kind} differs from row to row ({error}): give it one size") from error
    values = values.reshape(len(values), *base.event_shape)
    if p is base:
        return values
    width = p.event_shape[:len(p.event_shape) - len(base.event_shape)].numel()
    if len(values)**width > _MOST_STATES:
        raise ValueError(f"site {name!r} holds {width} independent {kind} variables, which have {len(values)}**{width} joint "
                         f"values, more than the {_MOST_STATES} that exact inference takes on: use ParticleFilter")
    index = torch.cartesian_prod(*[torch.arange(len(values), device=values.device)] * width).reshape(-1, width)
    return values[index].reshape(len(index), *p.event_shape)
