"""Missing values at an observed site, and rows that have finished.

Missing entries are marked by NaN in the data, so that they follow whatever slicing the user's step does. Here they are
taken out again: a distribution never sees NaN, and a missing entry contributes exactly zero to a score and a gradient.
"""

from __future__ import annotations

import torch
from pyro.distributions import NanMaskedMultivariateNormal, TorchDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MultivariateNormal,
    constraints,
    kl_divergence,
    register_kl,
)

from pyro_seq.engine.families import in_support

__all__ = ["FrozenRows", "GapRead", "SomeEntries", "fill", "require_imputable", "score_entries"]


def fill(fn: Distribution, value: Tensor, present: Tensor, filler: Tensor | None = None) -> Tensor:
    """``value`` with its missing entries replaced by ``filler``, or by a fixed value inside the support."""
    filler = in_support(fn) if filler is None else filler
    return torch.where(present, value, filler.to(value.dtype))


def score_entries(fn: Distribution, value: Tensor, present: Tensor, name: str) -> Tensor:
    """``(rows,)`` log density of the entries of ``value`` where ``present``; ``value`` holds no NaN.

    :raises ValueError: if ``fn`` cannot be marginalised over single entries and some row is partly observed.
    """
    if isinstance(fn, Independent):
        inner = fn.base_dist
        if not inner.event_shape:
            log_prob = torch.where(present, inner.log_prob(value), 0.0)
            return log_prob.flatten(fn.base_dist.batch_shape.__len__() - fn.reinterpreted_batch_ndims).sum(-1)
        kept = present.flatten(len(inner.batch_shape)).all(-1)
        if (kept == present.flatten(len(inner.batch_shape)).any(-1)).all():
            log_prob = torch.where(kept, inner.log_prob(value), 0.0)
            return log_prob.flatten(len(inner.batch_shape) - fn.reinterpreted_batch_ndims).sum(-1)
    elif not fn.event_shape:
        return torch.where(present, fn.log_prob(value), 0.0)
    else:
        kept = present.flatten(len(fn.batch_shape)).all(-1)
        if (kept == present.flatten(len(fn.batch_shape)).any(-1)).all():
            return torch.where(kept, fn.log_prob(value), 0.0)
        if isinstance(fn, MultivariateNormal):
            marginal = NanMaskedMultivariateNormal(fn.loc, scale_tril=fn.scale_tril, validate_args=False)
            return marginal.log_prob(value.masked_fill(~present, torch.nan))
    raise ValueError(
        f"site {name!r}: some rows of {type(fn).__name__} with event_shape {tuple(fn.event_shape)} are partly missing, "
        "and it cannot be marginalised over single entries. Use an emission with independent entries (.to_event) or a "
        "MultivariateNormal, or mark the whole frame as missing")


def require_imputable(fn: Distribution, present: Tensor, name: str) -> None:
    """Raise if a row is partly missing and its entries are not independent.

    The missing entries of a frame that feeds the state are drawn given the others; only independent ones can be drawn from
    the emission itself.
    """
    base, kept = fn, len(fn.batch_shape)
    while isinstance(base, Independent):
        base = base.base_dist
    if base.event_shape:
        rows = present.flatten(kept)
        if not (rows.all(-1) == rows.any(-1)).all():
            raise ValueError(
                f"site {name!r}: some rows of {type(base).__name__} with event_shape {tuple(fn.event_shape)} are partly "
                "missing in a model whose state reads the data: its entries are not independent, so the missing ones cannot be "
                "drawn. Use an emission with independent entries (.to_event), or mark the whole frame as missing")


class SomeEntries(TorchDistribution):
    """``fn`` scored on some of its entries only; it samples all of them.

    :param fn: a distribution with a batch dimension of rows.
    :param entries: booleans of the full shape of ``fn``: the entries that count.
    """

    arg_constraints: dict = {}

    def __init__(self, fn: Distribution, entries: Tensor, name: str):
        self.fn, self.entries, self.name = fn, entries, name
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.fn.has_rsample

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return self.fn.support

    def sample(self, sample_shape=()):
        return self.fn.sample(sample_shape)

    def rsample(self, sample_shape=()):
        return self.fn.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return score_entries(self.fn, fill(self.fn, value, self.entries), self.entries, self.name)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape)
        return SomeEntries(self.fn.expand(shape), self.entries.expand(shape + self.event_shape), self.name)


class FrozenRows(TorchDistribution):
    """``fn`` with a fixed value inside its support on the rows of finished sequences."""

    arg_constraints: dict = {}

    def __init__(self, fn: Distribution, running: Tensor):
        self.fn, self.running = fn, running
        super().__init__(fn.batch_shape, fn.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.fn.has_rsample

    @property
    def has_enumerate_support(self) -> bool:
        return self.fn.has_enumerate_support

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return self.fn.enumerate_support(expand=expand)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return self.fn.support

    def _freeze(self, value: Tensor) -> Tensor:
        running = self.running.reshape(self.running.shape + (1,) * self.event_dim)
        return torch.where(running, value, in_support(self.fn).to(value.dtype))

    def sample(self, sample_shape=()):
        return self._freeze(self.fn.sample(sample_shape))

    def rsample(self, sample_shape=()):
        return self._freeze(self.fn.rsample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(self.running, self.fn.log_prob(value), 0.0)

    def expand(self, batch_shape, _instance=None):
        return FrozenRows(self.fn.expand(torch.Size(batch_shape)), self.running)


@register_kl(FrozenRows, FrozenRows)
def _kl_frozen(q: FrozenRows, p: FrozenRows) -> Tensor:
    return torch.where(q.running, kl_divergence(q.fn, p.fn), 0.0)


class GapRead(ValueError):
    """Data is missing that the model reads, and the method does not integrate it out."""
