"""The sites of a step that ``torch.func.vmap`` runs for many parameter values, with draws that are made outside of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, constraints
from torch.distributions.utils import lazy_property

from pyro_seq.engine.families import sample, settings
from pyro_seq.engine.sites import Proposal, Site, StepSites
from pyro_seq.sequences import Frame

__all__ = ["Draws", "MappedSites", "in_range"]


class Draws:
    """Draws for all values at once.

    :param marker: one number a value, so that values that share a distribution do not share its draws.
    :param reached: takes down the sites met.
    """

    def __init__(self, marker: Tensor, reached: list[str]):
        self.marker, self.reached = marker, reached

    def __call__(self, name: str, fn: Distribution) -> Tensor:
        if isinstance(fn, (Independent, MaskedDistribution)):
            return self(name, fn.base_dist)
        if isinstance(fn, TransformedDistribution) and not fn.arg_constraints:
            value = self(name, fn.base_dist)
            for transform in fn.transforms:
                value = transform(value)
            return value
        made, tensors = _take_apart(fn)
        return sample(fn) if made is None else _Draw.apply(made, self.marker, *tensors)

    def from_prior(self, name: str, fn: Distribution) -> tuple[None, Tensor]:
        self.reached.append(name)
        return None, self(name, fn)


class MappedSites(StepSites):
    """The step of all values at once."""

    def __init__(self, frame: Frame, draws: Draws, proposal: Proposal, impute: bool):
        super().__init__(frame, self._propose, impute=impute)
        self.draws, self.inner = draws, proposal

    def _propose(self, name: str, prior: Distribution) -> tuple[Distribution | None, Tensor]:
        self.draws.reached.append(name)
        q, value = self.inner(name, prior)
        return q, self.draws(name, prior if q is None else q) if value is None else value

    def fill_gaps(self, name: str, p: Distribution, value: Tensor, present: Tensor) -> Tensor:
        if self.impute:
            self.values = {**self.values, name: self.draws(name, p)}
        return super().fill_gaps(name, p, value, present)


class _Draw(torch.autograd.Function):
    """A draw from a distribution made of tensors; under vmap, from one with the values as a further batch dimension."""

    @staticmethod
    def forward(make: Callable[..., Distribution], marker: Tensor, *tensors: Tensor) -> Tensor:
        return sample(make(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, make: Callable[..., Distribution], marker: Tensor, *tensors: Tensor
             ) -> tuple[Tensor, int]:
        moved = [value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
                 for value, dim in zip(tensors, in_dims[2:], strict=True)]
        return sample(make(*moved)), 0


def in_range(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Whether each argument of each distribution is in its range, without a branch."""
    found = {}
    for site in sites.values():
        for whose, fn in (("the model's", site.p), ("the guide's", site.q)):
            while fn is not None and hasattr(fn, "base_dist"):
                fn = fn.base_dist
            for name, constraint in {} if fn is None else fn.arg_constraints.items():
                derived = name not in fn.__dict__ and isinstance(getattr(type(fn), name, None), lazy_property)
                if not derived and not constraints.is_dependent(constraint):
                    found[f"argument {name!r} of {whose} distribution of site {site.name!r}"] = constraint.check(
                        getattr(fn, name)).all()
    return found


def _take_apart(fn: Distribution) -> tuple[Callable[..., Distribution] | None, list[Tensor]]:
    """The tensors of a distribution with a batch dimension of rows, and what makes it of them again; ``None`` where its
    arguments are not all tensors with that dimension."""
    names, kind, own = list(fn.arg_constraints), type(fn), settings(fn)
    if "scale_tril" in names:
        names = [name for name in names if name not in ("covariance_matrix", "precision_matrix")]
    for one, other in (("probs", "logits"), ("gate", "gate_logits")):
        if {one, other} <= set(names):  # whichever it was made of
            names.remove(other if one in fn.__dict__ or other not in fn.__dict__ else one)
    values = {name: getattr(fn, name, None) for name in names}
    fixed = {name: value for name, value in values.items() if isinstance(value, (int, float)) or (
        isinstance(value, Tensor) and not value.dim() and fn.arg_constraints[name].is_discrete)}
    tensors = {name: value.expand(fn.batch_shape) if isinstance(value, Tensor) and not value.dim() else value
               for name, value in values.items() if name not in fixed}
    rows = len(fn.batch_shape)
    if not tensors or own is None or any(
            not isinstance(v, Tensor) or v.shape[:rows] != fn.batch_shape for v in tensors.values()):
        return None, []
    return lambda *values: kind(**dict(zip(tensors, values, strict=True)), **fixed, **own, validate_args=False), [
        *tensors.values()]
