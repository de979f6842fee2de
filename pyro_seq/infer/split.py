"""Which latents of a step are integrated out, and where in the state they are felt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Delta, ImproperUniform
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.families import in_support, sample
from pyro_seq.engine.gaussian import innermost, is_gaussian
from pyro_seq.engine.sites import Proposal, Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.sequences import Frame, Sequences

__all__ = ["COPIES", "Split", "copies", "find_split", "longest", "origin", "require_marginal", "spread"]

COPIES = 8


class Split(NamedTuple):
    """Which latents are integrated out, and where in the state they are felt."""

    conditioning: tuple[str, ...]
    """Sites that are drawn."""
    marginal: tuple[str, ...]
    """Sites that are integrated out."""
    masks: tuple[Tensor, ...]
    """For each tensor of the state, ``(numel,)`` booleans: the entries that depend on marginal sites."""

    def take(self, state: State, rows: int, device: torch.device) -> Tensor:
        """``(rows, S)`` those entries of a state, in double precision."""
        parts = [leaf.reshape(rows, -1)[:, mask].double() for leaf, mask in zip(leaves(state), self.masks)]
        return torch.cat(parts, -1) if parts else torch.zeros(rows, 0, dtype=torch.float64, device=device)

    def put(self, state: State, values: Tensor) -> State:
        """The state with those entries replaced by ``(rows, S)`` values."""
        masks, at = iter(self.masks), 0

        def replace(leaf: Tensor) -> Tensor:
            nonlocal at
            mask = next(masks)
            width = int(mask.sum())
            if not width:
                return leaf
            at += width
            flat = leaf.reshape(len(leaf), -1).clone()
            flat[:, mask] = values[:, at - width:at].to(leaf.dtype)
            return flat.reshape(leaf.shape)

        return map_state(replace, state)


def require_marginal(name: str, fn: Distribution, kind: str) -> None:
    """Raise unless a latent can be integrated out by a Kalman filter."""
    if isinstance(innermost(fn), ImproperUniform):
        raise ValueError(f"site {name!r} of {kind} is ImproperUniform: an evidence that is estimated needs a proper "
                         "distribution of the first state")
    if not is_gaussian(fn) and not isinstance(innermost(fn), Delta):
        raise ValueError(f"site {name!r} of {kind} is {type(innermost(fn)).__name__}, not Gaussian: a Kalman filter cannot "
                         "marginalise it. Leave it out of marginal=")


def origin(p: Distribution, frame: Frame) -> Tensor:
    """Zero, of the shape and type of a draw."""
    if isinstance(innermost(p), ImproperUniform):
        like = next((v for v in frame.x.values() if v.is_floating_point()), None)
        return torch.zeros(p.shape(), dtype=None if like is None else like.dtype, device=frame.device)
    return torch.zeros_like(innermost(p).v if isinstance(innermost(p), Delta) else in_support(p))


def spread(frame: Frame) -> Proposal:
    """A proposal for tests: every value of a finite support alike, others from the model, flat ones at zero."""
    def propose(name: str, p: Distribution) -> tuple[None, Tensor]:
        base = innermost(p)
        if isinstance(base, ImproperUniform):
            return None, origin(p, frame)
        if base.has_enumerate_support and p is base:
            values = p.enumerate_support(expand=False).reshape(-1, *p.event_shape)
            return None, values[torch.randint(len(values), tuple(p.batch_shape), device=values.device)]
        return None, sample(p)

    return propose


def find_split(model: Any, sequences: Sequences, marginal: Iterable[str], conditioning: Iterable[str]) -> Split:
    """Where the marginal sites are felt in the state: run steps twice, with all else the same.

    :param model: a declared model, entered.
    """
    split, kind = Split(tuple(conditioning), tuple(marginal), ()), type(model).__name__
    frames = list(copies(model, sequences).packed.frames(1, 1, min(2, sequences.num_steps)))
    frame, state, masks = frames[0], model.begin(frames[0]), None
    if state is not None:
        masks = tuple(torch.zeros(leaf[0].numel(), dtype=torch.bool, device=frame.device) for leaf in leaves(state))
        split = split._replace(masks=masks)
    while True:
        sites, after = _atorigin(model, split, state, frame)
        for name in split.marginal:
            if name not in sites or sites[name].observed:
                raise ValueError(f"{kind} has no latent site {name!r} at time {frame.t}; it has {list(sites)}")
            require_marginal(name, sites[name].p, kind)
        elsewhere = _moved(model, split, state, frame, sites)
        found = tuple(_differs(a, b) for a, b in zip(leaves(after), leaves(elsewhere), strict=True))
        for leaf, differs in zip(leaves(after), found):
            if not leaf.is_floating_point() and differs.any():
                raise ValueError(f"{kind} carries a state of type {leaf.dtype} that depends on {list(split.marginal)}, which "
                                 "are to be marginalised: that is not Gaussian")
        known = masks is not None and not any(bool((b & ~a).any()) for a, b in zip(masks, found, strict=True))
        masks = found if masks is None else tuple(a | b for a, b in zip(masks, found, strict=True))
        split = split._replace(masks=masks)
        if len(frames) == 1 or known and frame is frames[1]:
            return split
        frame = frames[1]
        state = map_state(lambda leaf: leaf[:frames[1].rows], after)


def _atorigin(model: Any, split: Split, state: State, frame: Frame) -> tuple[dict[str, Site], State]:
    """A step with marginal sites at zero and the others wherever they may be."""
    visit = spread(frame)

    def propose(name: str, p: Distribution) -> tuple[None, Tensor]:
        return (None, origin(p, frame)) if name in split.marginal else visit(name, p)

    with pyro.settings.context(validate_distributions_torch=False), StepSites(frame, propose) as step:
        after = model.apply(state, frame)
    return step.sites, after


def _moved(model: Any, split: Split, state: State, frame: Frame, sites: dict[str, Site]) -> State:
    """The state after the same step with all that is marginal elsewhere: sites, entries of the state, gaps."""
    values = {name: torch.randn_like(site.value) if name in split.marginal or site.observed else site.value
              for name, site in sites.items() if not site.observed or is_gaussian(site.p)}
    if state is not None:
        moved = split.take(state, frame.rows, frame.device)
        state = split.put(state, moved + torch.randn_like(moved))
    with pyro.settings.context(validate_distributions_torch=False), StepSites(frame, values=values):
        return model.apply(state, frame)


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """``(numel,)`` booleans: the entries of a row that differ in any."""
    return ~((a == b) | (a != a) & (b != b)).reshape(len(a), -1).all(0)


def longest(sequences: Sequences) -> Sequences:
    return sequences.select(sequences.lengths.argsort(descending=True, stable=True)[:4])


def copies(model: Any, sequences: Sequences) -> Sequences:
    """Some of the sequences, several times; without their data where gaps feed the state."""
    some = longest(sequences).repeat(COPIES)
    if not (some.has_missing and model.missing_feeds_state):
        return some
    blank = {k: torch.full_like(v, torch.nan) if v.is_floating_point() else v for k, v in some.x.items()}
    return Sequences(blank, some.lengths, some.covariates, some.observed, True)
