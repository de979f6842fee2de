"""What classical time-series models share: parameters given by name, a diffuse start, and regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_seq.models.stationary import invertible, stationary
from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["Classical", "WithRegression", "require_order"]

_RANGES = {stationary: "stationary", invertible: "invertible"}


class Classical:
    """Of a model of scalar frames, ``x`` ``(B, T)``, with named parameters."""

    def declare(self, coefficients: Mapping[str, Any] | None,
                parameters: Mapping[str, tuple[Any, constraints.Constraint]]) -> None:
        """Make parameters, each from its default value and constraint, or from the value given for it.

        An empty one becomes a buffer, as there is nothing to learn.

        :raises ValueError: if a name, shape or value given cannot be.
        """
        given = dict(coefficients or {})
        if unknown := sorted(set(given) - set(parameters)):
            raise ValueError(f"coefficients has {unknown}; the parameters of this {type(self).__name__} are "
                             f"{list(parameters)}")
        for name, (default, constraint) in parameters.items():
            default = torch.as_tensor(default, dtype=torch.get_default_dtype())
            value = torch.as_tensor(given.get(name, default), dtype=default.dtype).detach().clone()
            if value.shape != default.shape:
                raise ValueError(f"coefficients[{name!r}] has shape {tuple(value.shape)}; in this {type(self).__name__} it is "
                                 f"{tuple(default.shape)}")
            if not value.numel():
                self.register_buffer(name, value)
                continue
            if not constraint.check(value).all():
                raise ValueError(f"coefficients[{name!r}] = {value.tolist()} is not {_RANGES.get(constraint, constraint)}")
            setattr(self, name, PyroParam(value, constraint))

    def check_inputs(self, sequences: Sequences) -> None:
        super().check_inputs(sequences)
        for key, value in sequences.x.items():
            if value.dim() != 2:
                raise ValueError(f"{key!r} has shape {tuple(value.shape)}; {type(self).__name__} has scalar frames, (B, T): "
                                 "several series are several sequences of one batch")


class WithRegression(Classical):
    """Of a model with a diffuse start, and a covariate ``u`` ``(B, T, num_covariates)`` with coefficients ``regression``."""

    num_covariates: int

    def start_at(self, initial: Mapping[str, Distribution] | None, sizes: Mapping[str, int | None]) -> None:
        """Keep the distributions of the first step's integrated sites, ``sizes`` being their entries (``None``: a scalar)."""
        given = dict(initial or {})
        if unknown := sorted(set(given) - set(sizes)):
            raise ValueError(f"initial has {unknown}; the sites of this {type(self).__name__} without a stationary "
                             f"distribution are {list(sizes)}")
        self.starts = {}
        for name, size in sizes.items():
            shape = () if size is None else (size,)
            fn = given.get(name, dist.ImproperUniform(constraints.independent(constraints.real, len(shape)), (), shape))
            if size is not None and not fn.event_shape:
                fn = fn.expand(shape).to_event(1)
            if fn.event_shape != shape or fn.batch_shape:
                raise ValueError(f"initial[{name!r}] has batch_shape {tuple(fn.batch_shape)} and event_shape "
                                 f"{tuple(fn.event_shape)}; it is a distribution of one number, or of {shape}")
            self.starts[name] = fn

    def effect(self, u: Tensor | None) -> Tensor | float:
        """Of the covariates on the frame, ``(rows,)``."""
        return 0.0 if u is None else u @ self.regression

    def check_inputs(self, sequences: Sequences) -> None:
        super().check_inputs(sequences)
        name = type(self).__name__
        width, u = self.num_covariates, sequences.covariates.get("u")
        if width and u is None:
            raise ValueError(f"this {name} has num_covariates={width} and was given none: pass u=tensor (B, T, {width})")
        if u is not None and tuple(u.shape[2:]) != (width,):
            raise ValueError(f"'u' has shape {tuple(u.shape)} and this {name} has num_covariates={width}: u is (B, T, {width})"
                             if width else f"'u' was given to a {name} without covariates: build it with num_covariates=")


def require_order(what: str, order: Any, entries: str) -> tuple[int, ...]:
    """Raise unless ``order`` is a tuple of as many counts as ``entries`` names."""
    if not isinstance(order, (tuple, list)) or len(order) != len(entries.split(",")):
        raise ValueError(f"{what}={order!r}; it is a tuple ({entries})")
    for value in order:
        require_count(what, value, 0)
    return tuple(order)
