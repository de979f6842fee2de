"""The course of training."""

from __future__ import annotations

from typing import Any

import pandas as pd

from pyro_seq.fit.train import Fit
from pyro_seq.plot.axes import finish, named, new_axes

__all__ = ["training_curves"]

_STYLES = {"train": ":", "valid": "-"}


def training_curves(fits: Any, *, ax: Any = None) -> Any:
    """Nats per frame by epoch, lower being better: dotted the objective as met in training, solid the validation data.

    While the weight of the KL is below 1 (``kl_annealing=``) the objective is not the bound: the legend says until when.

    A circle marks the epoch whose weights were kept. Other data (``also=`` of :func:`~pyro_seq.fit`) is dashed.

    :param fits: what :func:`~pyro_seq.fit` or :func:`~pyro_seq.restore` returned, or its history (a data frame, such as
        ``pyro-seq fit`` leaves as ``seed-0.csv``); or several by name.
    :returns: the matplotlib axes.
    :raises TypeError: on anything else.
    :raises ValueError: if a history lacks its columns, or any row.

    Example::

        >>> import pandas as pd
        >>> from pyro_seq.plot import training_curves
        >>> history = pd.DataFrame({"epoch": [1, 2, 3], "train": [9.0, 8.5, 8.1], "valid": [9.1, 8.8, 8.9]})
        >>> ax = training_curves({"DMM": history})
        >>> ax.lines[0].get_label()
        'DMM, train'
    """
    histories = {name: _history(name, fit) for name, fit in named(fits).items()}
    ax = new_axes(ax)
    for i, (name, history) in enumerate(histories.items()):
        annealed = history["epoch"][history.get("kl_weight", pd.Series(1.0, history.index)) < 1]
        for column in history.columns.difference(["epoch", "updates", "seconds", "kl_weight"], sort=False):
            label = f"{name}, {column}" if name else column
            if column == "train" and len(annealed):
                label += f" (objective, KL weight < 1 until epoch {annealed.iloc[-1]})"
            ax.plot(history["epoch"], history[column], color=f"C{i}", linestyle=_STYLES.get(column, "--"), label=label)
        if "valid" in history and history["valid"].notna().any():
            best = history.loc[history["valid"].idxmin()]
            ax.plot(best["epoch"], best["valid"], "o", color=f"C{i}", markerfacecolor="white")
    ax.set(xlabel="epoch", ylabel="minus the bound, nats per frame")
    finish(ax, ["with names"])
    return ax


def _history(name: str, fit: Any) -> pd.DataFrame:
    what = f"fits {name!r}" if name else "fits"
    history = fit.history if isinstance(fit, Fit) else fit
    if not isinstance(history, pd.DataFrame):
        raise TypeError(f"{what} is a {type(fit).__name__}; pass what seq.fit returned, or its history")
    if missing := sorted({"epoch", "train"} - set(history)):
        raise ValueError(f"{what} has the columns {list(history)} and lacks {missing}: it is not a history of seq.fit")
    if history.empty:
        raise ValueError(f"{what} has no rows: training was not evaluated yet")
    return history
