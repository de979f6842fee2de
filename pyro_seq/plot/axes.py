"""What the figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyro_seq.sequences import Sequences

__all__ = ["finish", "named", "new_axes", "numbers", "one_entry", "require_axes", "time_axis",
           "time_ticks"]


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


def one_entry(value: Any, entry: int, name: str) -> np.ndarray:
    """``(T,)`` of one entry of frames ``(T, ...)``."""
    value = numbers(value)
    value = value.reshape(len(value), -1)
    if not 0 <= entry < value.shape[1]:
        raise ValueError(f"entry={entry}: a frame of {name!r} has {value.shape[1]}, counted from 0")
    return value[:, entry]


def time_axis(sequences: Sequences | None, sequence: int, times: np.ndarray) -> Any:
    """1-based times as the data's own index calls them, where it had one."""
    labels = None if sequences is None else sequences.labels(sequence, times)
    if labels is None:
        return times
    return (labels.to_timestamp() if isinstance(labels, pd.PeriodIndex) else labels).to_numpy()


def time_ticks(ax: Any) -> None:
    """Whole numbers below, or dates that do not run into each other."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.ticker import MaxNLocator

    locator = ax.xaxis.get_major_locator()
    if isinstance(locator, AutoDateLocator):
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    elif isinstance(locator, MaxNLocator):  # not where the user, or another panel, has set the ticks
        locator.set_params(integer=True)


def finish(ax: Any, names: Sequence[str]) -> None:
    """An open frame, time below, and a legend where there is something to tell apart."""
    time_ticks(ax)
    ax.spines[["top", "right"]].set_visible(False)
    if any(names):
        ax.legend(frameon=False)
