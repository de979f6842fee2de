"""One step of a model with discrete latents, run on values that are given: the log densities of what it samples and observes,
with zero probabilities as zeros."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent

from pyro_seq.engine.families import log_density
from pyro_seq.engine.gaussian import innermost
from pyro_seq.engine.loop import check_step
from pyro_seq.engine.missing import GapRead
from pyro_seq.engine.reads import another
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, versions
from pyro_seq.engine.support import Support
from pyro_seq.sequences import Frame

__all__ = ["check_latents", "latent_log_p", "observed_log_p", "run_step", "same"]


def run_step(model: Any, support: Support, state: State, frame: Frame, carried: bool = True) -> tuple[Tensor, Tensor, State]:
    """One whole step with every latent given: log p of the latents, of the data, and the state, a row each.

    :param carried: whether the state goes on from here; if not, it may read what is missing.
    """
    values = support.rows(frame.rows // support.num_states)
    counts = versions(state)
    with StepSites(frame, values=values) as step:
        after = model.apply(state, frame)
    check_latents(model, support, step.latents)
    check_step(model, step.sites, state, after, frame, counts, exact=True)
    latent = sum(latent_log_p(site, site.value) for site in step.latents.values())
    observed = observed_log_p(step.sites, frame)
    gaps = {name: site for name, site in step.sites.items() if site.present is not None}
    if gaps:
        _refuse_read_gaps(model, state, frame, values, gaps, (latent, observed, *(leaves(after) if carried else ())))
    return latent, observed, after


def _refuse_read_gaps(model: Any, state: State, frame: Frame, values: dict[str, Tensor], gaps: dict[str, Site],
                      found: tuple[Tensor, ...]) -> None:
    """Raise if other values in the gaps change anything: then these would have to be integrated over."""
    devices = [frame.device] if frame.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        others = {name: another(site.p, site.value) for name, site in gaps.items()}
        with StepSites(frame, values={**values, **others}) as step:
            after = model.apply(state, frame)
        latent = sum(latent_log_p(site, site.value) for site in step.latents.values())
        again = (latent, observed_log_p(step.sites, frame), *leaves(after))
    if not all(bool(same(a, b).all()) for a, b in zip(found, again)):
        when = f" at time {frame.t}" if isinstance(frame.t, int) else ""
        raise GapRead(f"the data of site {sorted(gaps)} is missing{when} and {type(model).__name__} reads it: what it "
                      "would have been is not one of finitely many values, so the answer would not be exact. Use "
                      "ParticleFilter with the prior as its guide, which draws it, or fill the gaps first")


def observed_log_p(sites: dict[str, Site], frame: Frame) -> Tensor:
    """``(rows,)`` log density of the observed sites."""
    total: Tensor | None = None
    for name, site in sites.items():
        if not site.observed:
            continue
        zero = _never(innermost(site.p), site.value)
        term = site.log_p()
        if zero is not None:
            zero = zero if site.present is None else zero & site.present
            term = term.masked_fill(zero.reshape(frame.rows, -1).any(-1), -torch.inf)
        if not (term < torch.inf).all():
            row = int((~(term < torch.inf)).nonzero()[0])
            t = frame.t if isinstance(frame.t, int) else int(frame.t[row])
            raise ValueError(f"the model's log density of site {name!r} is NaN or infinite at time {t} in sequence "
                             f"{int(frame.sequence[row])}: look for a scale that is zero or negative, or for an overflow")
        total = term if total is None else total + term
    return total


def latent_log_p(site: Site, value: Tensor) -> Tensor:
    """Log probability of a latent; of the shape of the batch of ``value``."""
    zero = _never(site.p, value)
    log_prob = log_density(site.p, value)
    if log_prob.isnan().any():
        raise ValueError(f"the log probability of site {site.name!r} is NaN: look for logits that are all -inf, or NaN")
    return scale_and_mask(log_prob if zero is None else log_prob.masked_fill(zero, -torch.inf), site.scale, site.mask)


def _never(p: Distribution, value: Tensor) -> Tensor | None:
    """Where a value has the probability zero that the user wrote. Torch never draws it, but scores it as about 1e-16, or
    1e-7 in single precision, which a chain with forbidden transitions would notice."""
    if isinstance(p, Independent):
        zero = _never(p.base_dist, value)
        return None if zero is None else zero.flatten(zero.dim() - p.reinterpreted_batch_ndims).any(-1)
    probs = p.__dict__.get("probs")
    if probs is None or "logits" in p.__dict__ or not isinstance(p, (Categorical, Bernoulli)):
        return None
    if isinstance(p, Bernoulli):
        return torch.where(value == 1, probs, 1 - probs) == 0
    probs = probs.expand(*value.shape, probs.shape[-1])
    return (probs.gather(-1, value.long()[..., None]) == 0)[..., 0]


def check_latents(model: Any, support: Support, sites: dict[str, Site]) -> None:
    if list(sites) != list(support.values):
        raise ValueError(f"{type(model).__name__} samples the latent sites {list(support.values)} at the first step and "
                         f"{list(sites)} at another: sample the same sites in the same order at every step")


def same(a: Tensor, b: Tensor) -> Tensor:
    """Entries that differ by no more than rounding."""
    if not a.is_floating_point():
        return a == b
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-4
    size = torch.where(b.isfinite(), b, 0.0).abs().amax() if b.numel() else 0.0
    return (a == b) | ((a - b).abs() <= tolerance * size) | (a.isnan() & b.isnan())
