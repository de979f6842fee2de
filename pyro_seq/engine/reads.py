"""Does a site of a step read what another one observes? Then a gap there must be drawn, not filled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.families import sample
from pyro_seq.engine.sites import StepSites
from pyro_seq.sequences import Sequences

__all__ = ["another", "parameters", "reads_observed"]


def reads_observed(model: Any, sequences: Sequences) -> bool:
    """Run the first step twice with every frame missing and all latents the same, but other values in the gaps: does a
    distribution change?

    :param model: a declared model, entered.
    """
    some = sequences.select(range(min(4, sequences.num_sequences)))
    floating = {k: v for k, v in some.x.items() if v.is_floating_point()}
    whole = {k: v for k, v in some.x.items() if k not in floating}
    blank = Sequences({**whole, **{k: torch.full_like(v, torch.nan) for k, v in floating.items()}}, some.lengths,
                      some.covariates, {k: torch.zeros_like(v, dtype=torch.bool) for k, v in whole.items()}, True)
    frame = next(blank.packed.frames())
    devices = [sequences.device] if sequences.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            with StepSites(frame, impute=True) as first:
                model.apply(model.begin(frame), frame)
            values = {name: another(site.p, site.value) if site.observed else site.value for name, site in first.sites.items()}
            with StepSites(frame, values=values, impute=True) as second:
                model.apply(model.begin(frame), frame)
    except (ValueError, RuntimeError, TypeError):
        return False  # the run itself says what is wrong, with the data's own frames
    return any(not torch.equal(value, after[key]) for name, site in first.sites.items()
               for after in [parameters(second.sites[name].p)] for key, value in parameters(site.p).items() if key in after)


def another(fn: Distribution, value: Tensor) -> Tensor:
    """A value that differs in every entry, where there is one."""
    other = sample(fn)
    if value.is_floating_point() and not fn.support.is_discrete:
        return other
    up = value + 1
    inside = fn.support.check(up)
    if inside.shape == value.shape:
        return torch.where(inside, up, value - 1)
    return value.roll(1, -1)  # one-hot vectors and the like


def parameters(fn: Distribution) -> dict[str, Tensor]:
    """The arguments of a distribution, by name, inside any wrapping."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return {k: v.nan_to_num() for k in fn.arg_constraints if isinstance(v := fn.__dict__.get(k), Tensor)}
