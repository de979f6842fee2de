"""Is a row of the step the same alone as among others? Rows are sequences, particles, times: none may read another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.reads import parameters
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.sequences import Frame

__all__ = ["ROWS_MIXED", "check_rows", "is_random", "refuse_random", "rows_checked"]

ROWS_MIXED = (
    "{what} in the step of {model} is not the same for a row alone as among others: the step mixes its rows, or draws random "
    "numbers of its own. Rows are sequences, particles and times: look for sum(), mean(), softmax() or cumsum() over dim 0, or "
    "without dim=-1, and for a distribution of vectors that lacks .to_event(1); for dropout in training mode, model.eval(); "
    "and sample what is random with pyro.sample")
_RANDOM_OR_BATCHED = (
    torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm, torch.nn.RReLU)


def is_random(model: Any) -> bool:
    """Whether a module of the model is random, or reads the batch, in the mode it is in."""
    return any(module.training and (isinstance(module, _RANDOM_OR_BATCHED) or isinstance(module, torch.nn.RNNBase)
                                    and module.dropout > 0) for module in model.modules())


def refuse_random(model: Any) -> None:
    """Raise if a module makes what is called exact random."""
    if is_random(model):
        names = sorted({type(m).__name__ for m in model.modules() if is_random(torch.nn.ModuleList([m]))})
        raise ValueError(f"{type(model).__name__} is in training mode with {names}, under which its step is random or reads "
                         "the batch, and no answer is exact: call model.eval() first")


def check_rows(model: Any, sites: dict[str, Site], before: State, after: State, frame: Frame, exact: bool = False,
               drawn: Mapping[str, Tensor] | None = None) -> None:
    """Run a step once more on two of its rows, one of them twice, with the same latents: all distributions and the next state
    are as they were. Done once a model, for its first step and for a later one.

    :param exact: refuse steps that draw random numbers of their own, too.
    :param drawn: latents that are not among the sites.
    """
    known, key = model.__dict__.setdefault("_rows_apart", set()), (frame.first, exact, model.training)
    if frame.rows < 2 or model.state_grows or key in known or not exact and is_random(model):
        return
    last = frame.rows - 1
    index = torch.tensor([0, 0, last] if last != 2 else [0, 0, 1, 2], device=frame.device)  # of another number of rows
    values = {**(drawn or {}), **{name: site.value for name, site in sites.items()}}
    found = _different(model, sites, values, before, after, frame, index)
    if found is not None and (exact or _different(model, sites, values, before, after, frame, torch.arange(
            frame.rows, device=frame.device)) is None):
        raise ValueError(ROWS_MIXED.format(what=found, model=type(model).__name__))
    known.add(key)


def rows_checked(model: Any, exact: bool) -> bool:
    """Whether that has been done."""
    return {(True, exact, model.training), (False, exact, model.training)} <= model.__dict__.get("_rows_apart", set())


def _different(model: Any, sites: dict[str, Site], values: dict[str, Tensor], before: State, after: State, frame: Frame,
               index: Tensor) -> str | None:
    """What differs when only some rows are run, if anything."""
    def some(values: Any) -> dict[str, Tensor]:
        return {k: v[index] for k, v in values.items()}

    part = frame._replace(
        t=frame.t if isinstance(frame.t, int) else frame.t[index], rows=len(index), x=some(frame.x),
        covariates=some(frame.covariates), sequence=frame.sequence[index], observed=some(frame.observed), first=False)
    values = {name: value.detach()[index] for name, value in values.items()}
    try:
        with torch.no_grad(), StepSites(part, values=values, impute=model.missing_feeds_state) as step:
            reached = model.apply(map_state(lambda leaf: leaf.detach()[index], before), part)
        state = list(zip(leaves(after), leaves(reached), strict=True))
    except (RuntimeError, ValueError):
        return None  # a step that takes so many rows and no other says so where it is run on others
    for name, site in sites.items():
        if name in step.sites:
            here = parameters(step.sites[name].p)
            for key, value in parameters(site.p).items():
                if key in here and value.shape[:1] == (frame.rows,) and not _close(value[index], here[key]):
                    return f"site {name!r}"
    return None if all(_close(a[index], b) for a, b in state) else "the next state"


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return True
    if not a.is_floating_point():
        return bool((a == b).all())
    size = torch.where(a.isfinite(), a, 0.0).abs().amax() if a.numel() else 0.0
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-3
    return bool(((a == b) | ((a - b).abs() <= tolerance * size) | ~a.isfinite()).all())
