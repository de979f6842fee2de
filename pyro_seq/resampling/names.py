"""Resampling by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_seq.resampling.ancestral import SCHEMES, Ancestral, Scheme, Soft, StopGradient
from pyro_seq.resampling.base import Resampler
from pyro_seq.resampling.transport import OptimalTransport

__all__ = ["NAMES", "named", "resolve"]

_OTHERS: dict[str, Callable[[], Resampler]] = {
    "soft": Soft, "stop_gradient": StopGradient, "optimal_transport": OptimalTransport}

NAMES = (*SCHEMES, *_OTHERS)
"""What ``resampling=`` takes as a string."""


def resolve(resampling: str | Scheme | Resampler) -> Resampler:
    """The resampler that is meant by a name, a scheme, or itself: for methods with an argument ``resampling``.

    :raises ValueError: if there is none of that name.
    :raises TypeError: if it is none of these.

    Example::

        >>> resolve("soft").alpha, resolve("residual").unbiased
        (0.5, True)
    """
    if isinstance(resampling, Resampler):
        return resampling
    if isinstance(resampling, str):
        if resampling not in NAMES:
            raise ValueError(f"no resampling {resampling!r}; there are {list(NAMES)}")
        return _OTHERS[resampling]() if resampling in _OTHERS else Ancestral(resampling)
    if isinstance(resampling, type):
        raise TypeError(f"resampling={resampling.__name__} is a class: make one, resampling={resampling.__name__}(...)")
    if not callable(resampling):
        raise TypeError(f"resampling={_shown(resampling)}; it is one of {list(NAMES)}, a function from probabilities (n, N) to "
                        "ancestors (n, N), or a pyro_seq.resampling.Resampler")
    return Ancestral(resampling)


def named(resampling: str | Scheme | Resampler) -> str:
    """What tells a resampling from others: its name, or its class with the numbers it was made of."""
    if isinstance(resampling, str):
        return resampling
    if not isinstance(resampling, Resampler):
        return getattr(resampling, "__name__", type(resampling).__name__)
    numbers = [f"{name}={value!r}" for name, value in sorted(vars(resampling).items()) if isinstance(value, (int, float))]
    scheme = getattr(resampling, "scheme", None)
    return f"{type(resampling).__name__}({', '.join([*([] if scheme is None else [named(scheme)]), *numbers])})"


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
