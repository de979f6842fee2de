"""The joint density of parameters, latents and data, when all of them are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_seq.engine.sites import StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.module import own_parameters
from pyro_seq.sequences import Sequences

__all__ = ["CompleteData"]


class CompleteData:
    """A batch with its latents, as a function of the global parameters, in double precision.

    All times are scored in one call. For that each step must be given the state it starts from. These states are the
    fixed point of running every step at once on the states that the last run left: exactly so, and after one run if a
    state is made of the latents of its own step, as most are.

    :param latents: ``(B, T, ...)`` by site.
    """

    def __init__(self, model: Any, sequences: Sequences, latents: Mapping[str, Tensor]):
        sequences = sequences.to(dtype=torch.float64)
        latents = {name: value.double() if value.is_floating_point() else value for name, value in latents.items()}
        self.model, self.sequences = model, sequences
        packed = sequences.packed
        sort = {name: packed.sort(value).transpose(0, 1) for name, value in latents.items()}
        running = packed.running
        self.first = {name: value[0] for name, value in sort.items()}
        self.later = {name: value[1:][running[1:]] for name, value in sort.items()}
        self.frames = [packed.flat(1, 1)]
        if sequences.num_steps > 1:
            self.frames.append(packed.flat(2, sequences.num_steps))
        self.before: State = None
        counts = packed.counts
        starts = torch.tensor([0, *counts[:-1]], device=sequences.device).cumsum(0)
        rows = torch.arange(counts[0], device=sequences.device)
        # Row (t, b) of the later steps starts from row (t - 1, b) of all.
        self.source = (starts[:, None] + rows)[:-1][running[1:]]

    def log_joint(self, parameters: Mapping[str, Tensor]) -> float:
        """log p(parameters) + log p(latents, data | parameters); minus infinity or NaN outside the support."""
        with torch.no_grad(), own_parameters(self.model), pyro.settings.context(validate_distributions_torch=False), \
                poutine.trace() as tr, poutine.condition(data={name: value.double() for name, value in parameters.items()}):
            found = self.model.within(self._score)
        for name in parameters:
            node = tr.trace.nodes[name]
            found = found + node["fn"].log_prob(node["value"]).sum()
        return float(found)

    def _score(self) -> Tensor:
        first, total = self._run(self.model.begin(self.frames[0]), 0, self.first)
        if len(self.frames) == 1:
            return total
        if self.before is None:
            self.before = map_state(lambda leaf: leaf[self.source % len(leaf)], first)
        for _ in range(self.sequences.num_steps):
            after, scored = self._run(self.before, 1, self.later)
            before = map_state(lambda a, b: torch.cat([a, b])[self.source], first, after)
            same = all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(self.before)))
            self.before = before
            if same:
                break
        return total + scored

    def _run(self, state: State, part: int, values: Mapping[str, Tensor]) -> tuple[State, Tensor]:
        frame = self.frames[part]
        with StepSites(frame, values=values) as step:
            after = self.model.apply(state, frame)
        return after, sum(site.log_p().sum() for site in step.sites.values())
