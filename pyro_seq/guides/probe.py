"""What a learned guide must know of a model before it can build its networks: sites, shapes, units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_seq.engine.families import Family
from pyro_seq.engine.loop import propagate
from pyro_seq.engine.state import flatten_state
from pyro_seq.module import own_parameters, require_model
from pyro_seq.sequences import Sequences

__all__ = ["Moments", "Probe", "probe"]

_ROWS, _STEPS = 32, 8


class Moments(NamedTuple):
    """Centre and spread of some features, each ``(width,)``, to bring them to unit size."""

    center: Tensor
    spread: Tensor


class Probe(NamedTuple):
    families: dict[str, Family]
    """Of each latent site, in the order the step samples them."""
    parameters: dict[str, Moments]
    """Of the unconstrained parameters of each latent's prior."""
    reach: dict[str, Moments]
    """Of the parameters of each latent's proposals: spread by one of the prior's units (:meth:`Family.unit`) more, since a
    posterior lies about so far from its prior."""
    follows: dict[str, bool]
    """Of each latent, whether its past says most of what it will be (three quarters of its variance, as in a random walk): a
    guide then moves away from the prior; elsewhere it makes a proposal of its own."""
    frame: Moments
    """Of the data and covariates of one frame, flattened."""
    state: Moments | None
    """Of the floating entries of the state; ``None`` if it has none."""
    dtype: torch.dtype
    device: torch.device


def probe(model: Any, like: Any, who: str) -> Probe:
    """Run a few steps of the model and look.

    :param like: data, or a :class:`~pyro_seq.Sequences`, whose shapes and units the guide will meet; simulated from the
        model when ``None``.
    """
    require_model(model, who)
    parameter = next((p for p in model.parameters()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), poutine.block(), own_parameters(model):
        torch.manual_seed(0)
        if not isinstance(like, Sequences):
            like = Sequences.of(like) if like is not None else Sequences.of(None, [_STEPS] * _ROWS)
        return model.within(_probe, model, like)


def _probe(model: Any, like: Sequences) -> Probe:
    data = dict(like.x) or _simulated(model, like)
    steps = min(like.num_steps, 200)
    some = Sequences.of({k: v[:_ROWS, :steps] for k, v in data.items()}, like.lengths[:_ROWS].clamp(max=steps),
                        covariates={k: v[:_ROWS, :steps] for k, v in like.covariates.items()})
    model.check_inputs(some)
    families: dict[str, Family] = {}
    parameters: dict[str, list[Tensor]] = {}
    units: dict[str, list[Tensor]] = {}
    states, frames = [], []
    for frame, (sites, state) in zip(some.packed.frames(), propagate(model, None, some.packed.frames()), strict=True):
        for name, site in sites.items():
            if site.observed:
                continue
            family = families.setdefault(name, Family(site.p, name))
            if not family.same(site.p):
                raise ValueError(f"site {name!r} is {family.kind.__name__} at the first step and {type(site.p).__name__} "
                                 "later: a learned guide needs one family for all steps; write a SequentialGuide")
            parameters.setdefault(name, []).append(family.parameters(site.p))
            units.setdefault(name, []).append(family.unit(site.p))
        states.append(flatten_state(model.read_state(state), frame.rows))
        frames.append(flat_frame(frame.x, frame.covariates, frame.rows))
    if not families:
        raise ValueError(f"{type(model).__name__} has no latent site to propose: its likelihood needs no guide")
    first = next(iter(parameters.values()))[0]
    priors = {k: _moments(v) for k, v in parameters.items()}
    reach = {k: _widened(v, torch.cat(units[k])) for k, v in priors.items()}
    follows = {k: _follows(families[k], priors[k], torch.cat(units[k])) for k in families}
    return Probe(families, priors, reach, follows, _moments(frames),
                 None if states[0] is None else _moments(states), first.dtype, first.device)


def _simulated(model: Any, like: Sequences) -> dict[str, Tensor]:
    """Data drawn from the model, under the names of its data arguments."""
    names = model.data_names() - set(like.covariates)
    try:
        model.check_inputs(like.simulated())
    except ValueError as error:
        raise ValueError(f"{error}. A learned guide sees their shapes with like=Sequences.of(x, covariates=...)") from error
    drawn: dict[str, list[Tensor]] = {}
    for sites, _ in propagate(model, None, like.simulated().packed.frames()):
        for name, site in sites.items():
            drawn.setdefault(name, []).append(site.value)
    # Arguments that are no sites may be left out, as covariates that default to None are.
    found = sorted(names & set(drawn))
    if not found:
        raise ValueError(f"cannot tell the shape of the data arguments {sorted(names) or '(none found)'} of "
                         f"{type(model).__name__} from its sites {sorted(drawn)}: pass like=x, some data, to the guide")
    if len(set(like.lengths.tolist())) > 1:
        raise ValueError("like without data needs sequences of one length")
    return {name: torch.stack(drawn[name], 1) for name in found}


def flat_frame(x: Mapping[str, Tensor], covariates: Mapping[str, Tensor], rows: int) -> Tensor:
    """``(rows, width)``: all data and covariates of one frame, NaN where missing."""
    dtype = next((v.dtype for v in (*x.values(), *covariates.values()) if v.is_floating_point()),
                 torch.get_default_dtype())
    return torch.cat([v.reshape(rows, -1).to(dtype) for v in (*x.values(), *covariates.values())], -1)


def _follows(family: Family, prior: Moments, units: Tensor) -> bool:
    """A location's own spread against what the prior usually leaves open (the first step is another matter); families
    without a location follow."""
    where = family.slices().get("loc")
    if where is None:
        return True
    explained = prior.spread[where].square()
    return bool((explained / (explained + units[:, where].square().median(0).values)).mean() > 0.75)


def _widened(moments: Moments, units: Tensor) -> Moments:
    return Moments(moments.center, (moments.spread.square() + units.square().mean(0)).sqrt())


def _moments(parts: list[Tensor]) -> Moments:
    """Robust centre and spread; a constant feature keeps unit spread."""
    values = torch.cat(parts)
    finite = values.isfinite()
    count = finite.sum(0).clamp(min=1)
    values = torch.where(finite, values, 0.0)
    center = values.sum(0) / count
    spread = (torch.where(finite, values - center, 0.0).square().sum(0) / count).sqrt()
    spread = torch.where((spread > 1e-6 * (1 + center.abs())) & spread.isfinite(), spread, 1.0)
    return Moments(center, spread)
