"""Tables of a declared model with discrete latents, read off its step by running it on every value they can take.

    log pi(k)           the latents of the first step                        (1 or B, K)
    log A_t(j, k)       those of step t given those of step t - 1            (1 or T - 1, 1 or B, K, K)
    log g_t(k)          the data of step t                                   (T, B, K)

``k`` runs over the product of the supports of a step's latent sites, in the order they are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.enumerated import check_latents, latent_log_p, observed_log_p, run_step, same
from pyro_seq.engine.loop import Checked
from pyro_seq.engine.rows import check_rows, rows_checked
from pyro_seq.engine.sites import LatentsDrawn, Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.engine.support import Support
from pyro_seq.model import StateSpaceModel
from pyro_seq.module import accepted
from pyro_seq.sequences import Frame, Packed, Sequences, first_rows, repeat_rows

__all__ = ["Tables", "first_step", "later_step", "read_tables"]

_MOST_NUMBERS = {"cpu": 2**16, "cuda": 2**24}  # in a flat call: what a cache holds, or a GPU does in one go


class Tables(NamedTuple):
    """A batch of hidden Markov chains, in packed order and double precision; padding holds zeros."""

    log_initial: Tensor
    """``(1 or B, K)``"""
    log_transition: Tensor
    """``(1 or T - 1, 1 or B, K, K)`` from row to column. With the part of the emission that depends on both, where one does;
    rows then sum to less than one."""
    log_emission: Tensor
    """``(T, B, K)``"""
    counts: list[int]
    """Running sequences at each step."""


def read_tables(model: Any, sequences: Sequences, support: Support, state_is_latents: bool) -> tuple[Tables, State]:
    """The tables of a batch, and the state after each sequence's last frame: ``(B * K, ...)`` rows in packed order, or
    ``(K, ...)`` where it is the same for all of them."""
    reads_gaps = sequences.has_missing and model.missing_feeds_state
    if isinstance(model, StateSpaceModel) and type(model).apply is StateSpaceModel.apply and not reads_gaps:
        whole = _Whole(model, sequences, support)
        if whole.applies(state_is_latents):
            return whole.tables(), whole.states
    return _step_by_step(model, sequences, support)


class _Whole:
    """A state-space model whose state is known for each joint value: all times are scored in one call."""

    def __init__(self, model: StateSpaceModel, sequences: Sequences, support: Support):
        self.model, self.packed, self.support = model, sequences.packed, support
        self.alone = sequences.select([int(sequences.lengths.argmax())]).packed
        self.covariates = set(sequences.covariates)
        self.states: State = None

    def applies(self, state_is_latents: bool) -> bool:
        """Whether the state is a function of the current latents alone, found by running every pair of values."""
        k, model = self.support.num_states, self.model
        _, self.states = self._run(None, self.alone.flat(1, 1, k), self.support.joint)
        steps = () if rows_checked(model, exact=True) else (None, self.states)[:len(self.alone.counts)]
        for t, state in enumerate(steps, start=1):
            frame = self.alone.flat(t, t, k)
            with StepSites(frame, values=self.support.joint) as step:
                after = model.apply(state, frame)
            check_rows(model, step.sites, state, after, frame, exact=True)
        if set(self._run_latents) != set(self.support.values):
            return False  # one is sampled in the emission
        if state_is_latents or len(self.alone.counts) == 1 and not self._reads(model.initial):
            return True
        if self._reads(model.initial) or self._reads(model.transition):
            return False
        _, after = self._run(map_state(lambda leaf: repeat_rows(leaf, k), self.states), self.alone.flat(2, 2, k * k),
                             self.support.rows(k))
        again = map_state(lambda leaf: leaf.repeat(k, *(1,) * (leaf.dim() - 1)), self.states)
        return all(bool(same(a, b).all()) for a, b in zip(leaves(after), leaves(again), strict=True))

    def tables(self) -> Tables:
        packed, model, steps = self.packed, self.model, len(self.packed.counts)
        first = packed if self._reads(model.initial) else self.alone
        initial = self._latents(None, first.flat(1, 1, self._prefixes))
        k = self.support.num_states
        transition = initial.new_zeros(1, 1, k, k)
        if steps > 1:
            names = accepted(model.transition, 1)[0]
            later = packed if self._reads_covariates(model.transition) else self.alone
            stop = steps if later is packed or "t" in names else 2
            parts = [self._latents(self.states, later.flat(*window, k * self._prefixes))
                     for window in self._windows(later, 2, stop, k * k)]
            transition = _unpack(torch.cat(parts).reshape(-1, k, k), later.running[1:stop])
        width = max(v[0, 0].numel() for v in packed.x.values())
        parts = [self._emission(packed.flat(*window, k)) for window in self._windows(packed, 1, steps, k * width)]
        return Tables(initial.double(), transition.double(),
                      _unpack(torch.cat(parts).reshape(-1, k), packed.running).double(), packed.counts)

    @property
    def _prefixes(self) -> int:
        return self.support.num_states // self.support.sizes[-1]

    def _reads_covariates(self, method: Any) -> bool:
        names, _, anything = accepted(method, 0 if method == self.model.initial else 1)
        return bool(names & self.covariates) or anything and bool(self.covariates)

    def _reads(self, method: Any) -> bool:
        return self._reads_covariates(method) or "t" in accepted(method, 0 if method == self.model.initial else 1)[0]

    def _run(self, state: State, frame: Frame, values: dict[str, Tensor]) -> tuple[dict[str, Site], State]:
        sites, after = self.model.draw_latents(state, frame, lambda name, p: (None, values[name]), len(values), False)
        self._run_latents = sites
        return sites, after

    def _latents(self, states: State, frame: Frame) -> Tensor:
        """``(rows, K)``: log probability of the joint values from each of the ``rows`` (row, state before).

        The step is run on the values of all sites but the last one, which is scored on its whole support.
        """
        support, count = self.support, self._prefixes
        before = map_state(lambda leaf: repeat_rows(leaf, count), states)
        before = map_state(lambda leaf: leaf.repeat(frame.rows // leaf.shape[0], *(1,) * (leaf.dim() - 1)), before)
        last = support.values[support.last]
        values = {n: v.repeat(frame.rows // count, *(1,) * (v.dim() - 1)) for n, v in support.prefix.items()}
        values[support.last] = last[:1].expand(frame.rows, *last.shape[1:])
        with suppress(LatentsDrawn):
            sites, _ = self._run(before, frame, values)
        check_latents(self.model, support, sites)
        site = sites[support.last]
        every = last[:, None].expand(len(last), frame.rows, *last.shape[1:])
        total = latent_log_p(site, every).transpose(0, 1)
        for name in support.prefix:
            total = total + latent_log_p(sites[name], sites[name].value)[:, None]
        return total.reshape(-1, support.num_states)

    @staticmethod
    def _windows(packed: Packed, start: int, stop: int, per_sequence: int) -> Iterator[tuple[int, int]]:
        """Stretches of ``start..stop`` that are fast in one call, at ``per_sequence`` numbers a step."""
        most, size = _MOST_NUMBERS.get(packed.sequences.device.type, 2**24), 0
        for t in range(start, stop + 1):
            size += packed.counts[t - 1] * per_sequence
            if t == stop or size + packed.counts[t] * per_sequence > most:
                yield start, t
                start, size = t + 1, 0

    def _emission(self, frame: Frame) -> Tensor:
        """``(rows,)`` log density of the data."""
        times = frame.rows // self.support.num_states
        states = map_state(lambda leaf: leaf.repeat(times, *(1,) * (leaf.dim() - 1)), self.states)
        with StepSites(frame) as step:
            self.model.apply_emission(states, frame)
        return observed_log_p(step.sites, frame)


def _step_by_step(model: Any, sequences: Sequences, support: Support) -> tuple[Tables, State]:
    """The general case: a loop over time, each step run on every pair of joint values."""
    packed, k, checks = sequences.packed, support.num_states, Checked()
    transitions, emissions, ended, state = [], [], [], None
    for frame in chain(packed.frames(k, 1, 1), packed.frames(k * k, 2)):
        t, count = frame.t, packed.counts[frame.t - 1]
        with checks:
            if t == 1:
                initial, observed, state = first_step(model, support, frame)
            else:
                state = map_state(lambda leaf, n=count * k: first_rows(leaf, n), state)
                transition, observed, state = later_step(model, support, state, frame)
                transitions.append(_padded(transition, packed.counts[0]))
        emissions.append(_padded(observed, packed.counts[0]))
        following = packed.counts[t] if t < len(packed.counts) else 0
        if following < count:
            ended.insert(0, map_state(lambda leaf, a=following * k, b=count * k: leaf[a:b], state))
    transition = torch.stack(transitions) if transitions else initial.new_zeros(1, 1, k, k)
    final = map_state(lambda *parts: torch.cat(parts), *ended)
    return Tables(initial.double(), transition.double(), torch.stack(emissions).double(), packed.counts), final


def first_step(model: Any, support: Support, frame: Frame) -> tuple[Tensor, Tensor, State]:
    """The first step on rows ``(n, K)``: ``(n, K)`` log pi, ``(n, K)`` log g, and the state of each row."""
    latent, observed, state = run_step(model, support, model.begin(frame), frame)
    return latent.reshape(-1, support.num_states), observed.reshape(-1, support.num_states), state


def later_step(model: Any, support: Support, state: State, frame: Frame) -> tuple[Tensor, Tensor, State]:
    """A later step on rows ``(n, K, K)``, from a state of rows ``(n, K)``: log A ``(n, K, K)``, log g ``(n, K)`` and the state
    of rows ``(n, K)``. The density of the data may depend on the state before too: g is its maximum over that, A has the rest.

    :raises ValueError: if the state that the step leaves depends on the state before.
    """
    k = support.num_states
    latent, observed, after = run_step(model, support, map_state(lambda leaf: repeat_rows(leaf, k), state), frame)
    latent, observed = latent.reshape(-1, k, k), observed.reshape(-1, k, k)
    likeliest = latent.detach().argmax(1)  # of the states before: impossible ones may have left anything

    def merge(leaf: Tensor, name: str) -> Tensor:
        pairs = leaf.reshape(-1, k, k, *leaf.shape[1:])
        index = likeliest.reshape(-1, 1, k, *(1,) * (leaf.dim() - 1)).expand(-1, 1, k, *leaf.shape[1:])
        one = pairs.gather(1, index)
        differs = ~same(pairs, one.expand_as(pairs)).reshape(*pairs.shape[:3], -1).all(-1) & (latent > -torch.inf)
        if differs.any():
            when = f" at time {frame.t}" if isinstance(frame.t, int) else ""
            raise ValueError(
                f"{name} that {type(model).__name__} leaves{when} depends on the latents {list(support.values)} of the step "
                "before, not on the current ones and the data alone, so there is no finite table of transitions. If the model "
                f"remembers several steps of them, carry them as one: a Categorical over pairs of regimes, {k}**2 values")
        return one.reshape(-1, *leaf.shape[1:])

    names = iter(_names(after))
    after = map_state(lambda leaf: merge(leaf, next(names)), after)
    shift = observed.detach().amax(1)
    shift = torch.where(shift > -torch.inf, shift, 0.0)
    return latent + observed - shift[:, None], shift, after


def _names(state: State, name: str = "the state") -> list[str]:
    """What to call each tensor of a state."""
    if isinstance(state, dict):
        return [found for key, part in state.items() for found in _names(part, f"{name}[{key!r}]")]
    if isinstance(state, (tuple, list)):
        keys = getattr(state, "_fields", range(len(state)))
        return [found for key, part in zip(keys, state) for found in _names(part, f"{name}[{key!r}]")]
    return [] if state is None else [name]


def _unpack(rows: Tensor, running: Tensor) -> Tensor:
    """Rows of the running sequences, one step after the other, as ``(T, B, ...)``."""
    if rows.shape[0] == running.numel():
        return rows.reshape(*running.shape, *rows.shape[1:])
    out = rows.new_zeros(*running.shape, *rows.shape[1:])
    return out.index_put((running,), rows)


def _padded(value: Tensor, batch: int) -> Tensor:
    """``(n, ...)`` as ``(B, ...)``, with zeros."""
    return value if value.shape[0] == batch else torch.cat([value, value.new_zeros(batch - value.shape[0], *value.shape[1:])])

