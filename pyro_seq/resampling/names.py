"""Resampling by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyro_seq.resampling.base import Ancestral, Resampler
from pyro_seq.resampling.inversion import multinomial, systematic

__all__ = ["resolve"]

_SCHEMES = {"multinomial": multinomial, "systematic": systematic}


def resolve(resampling: str | Callable[[Tensor], Tensor] | Resampler) -> Resampler:
    """The resampler that is meant by a name, a scheme, or itself: for methods with an argument ``resampling``."""
    if isinstance(resampling, Resampler):
        return resampling
    if isinstance(resampling, str):
        if resampling not in _SCHEMES:
            raise ValueError(f"no resampling {resampling!r}; there are {list(_SCHEMES)}")
        return Ancestral(_SCHEMES[resampling])
    if not callable(resampling):
        raise TypeError(f"resampling={resampling!r}; it is one of {list(_SCHEMES)}, a function from probabilities (n, N) to "
                        "ancestors (n, N), or a pyro_seq.resampling.Resampler")
    return Ancestral(resampling)
