"""What the figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["finish", "named", "new_axes", "numbers", "require_axes"]


def new_axes(ax: Any, *shape: int, **options: Any) -> Any:
    """The axes given, or new ones."""
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, layout="constrained", **options)[1] if ax is None else ax


def require_axes(axes: Any, count: int) -> list[Any]:
    """The axes as a list; raises unless there are ``count`` of them."""
    found = np.atleast_1d(np.asarray(axes, dtype=object)).ravel().tolist()
    if len(found) != count:
        raise ValueError(f"axes= has {len(found)} matplotlib axes; {count} are drawn on, as plt.subplots({count}) makes them")
    return found


def named(values: Any) -> dict[str, Any]:
    """By name, or alone without one."""
    found = dict(values) if isinstance(values, Mapping) else {"": values}
    if not found:
        raise ValueError("there is nothing to draw: the dict is empty")
    return found


def numbers(value: Any) -> np.ndarray:
    """A tensor or array as an array of double precision."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value, dtype=float)


def finish(ax: Any, names: Sequence[str]) -> None:
    """An open frame, whole numbers below, and a legend where there is something to tell apart."""
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    if any(names):
        ax.legend(frameon=False)
