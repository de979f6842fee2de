"""What a function of resampling is given, and what it returns, looked at."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["ancestors_of", "of_weights", "require_weights"]


def of_weights(scheme: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The scheme for whoever calls it: weights are looked at first. Filters, whose weights are sound, call ``unchecked``."""
    @wraps(scheme)
    def checked(weights: Tensor, *arguments: Any) -> Tensor:
        require_weights(scheme.__name__, weights)
        return scheme(weights, *arguments)

    checked.unchecked = scheme
    checked.unbiased = True
    return checked


def require_weights(name: str, weights: Any) -> None:
    """Raise unless these are weights ``(n, N)``.

    :param name: of the function that is given them.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} was given weights as a {type(weights).__name__}; they are a tensor (n, N)")
    if weights.dim() != 2 or weights.shape[-1] == 0:
        hint = ": for one set of particles pass weights[None]" if weights.dim() == 1 else ""
        raise ValueError(f"{name} was given weights of shape {tuple(weights.shape)}; they are (n, N){hint}")
    if not weights.is_floating_point():
        raise TypeError(f"{name} was given weights of dtype {weights.dtype}; they are floating: weights.double()")
    total = weights.sum(-1)
    sound = (weights >= 0).all(-1) & total.isfinite() & (total > 0)
    if not bool(sound.all()):
        row = int((~sound).nonzero()[0])
        of = weights[row]
        what = ("NaN" if of.isnan().any() else "negative" if (of < 0).any() else "infinite" if of.isinf().any() else
                "zero, all of them" if not of.any() else "of an infinite sum")
        raise ValueError(f"{name} was given weights that are {what} in row {row}: they are non-negative numbers of a positive "
                         "sum" + (" (of log weights take softmax(-1))" if what == "negative" else ""))


def ancestors_of(scheme: Callable[[Tensor], Tensor], weights: Tensor) -> Tensor:
    """The ancestors ``(n, N)`` that a scheme draws by probabilities ``(n, N)``; a function of the user's is looked at.

    :raises TypeError: if it returns no tensor of indices.
    :raises ValueError: if it returns another number of them, or some that are no particle.
    """
    unchecked = getattr(scheme, "unchecked", None)
    # A wrapper of the user's has the attribute too, by functools.wraps, but another function inside.
    if unchecked is not None and getattr(scheme, "__wrapped__", unchecked) is unchecked:
        return unchecked(weights)
    ancestors, name = scheme(weights), getattr(scheme, "__name__", type(scheme).__name__)
    if not isinstance(ancestors, Tensor):
        raise TypeError(f"the resampling function {name} returned a {type(ancestors).__name__}; it returns ancestors, a "
                        f"tensor {tuple(weights.shape)} of integers: torch.as_tensor(...)")
    if ancestors.shape != weights.shape:
        raise ValueError(f"the resampling function {name} returned ancestors of shape {tuple(ancestors.shape)}; they "
                         f"are (n, N) = {tuple(weights.shape)}, one for each new particle")
    if ancestors.dtype != torch.long:
        raise TypeError(f"the resampling function {name} returned ancestors of dtype {ancestors.dtype}; they are "
                        "indices of particles, torch.int64: ancestors.long()")
    if ancestors.device != weights.device:
        raise ValueError(f"the resampling function {name} returned ancestors on {ancestors.device}, and the weights "
                         f"are on {weights.device}: make them there")
    low, high = (int(v) for v in ancestors.aminmax())
    if low < 0 or high >= weights.shape[-1]:
        raise ValueError(f"the resampling function {name} returned the ancestor {low if low < 0 else high}; of "
                         f"{weights.shape[-1]} particles they are from 0 to {weights.shape[-1] - 1}")
    return ancestors
