"""Piano rolls."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_seq.data.pianoroll import LOWEST
from pyro_seq.infer.posterior import Draws
from pyro_seq.plot.axes import named, new_axes, numbers, require_axes
from pyro_seq.sequences import Sequences

__all__ = ["piano_roll"]


def piano_roll(rolls: Any, lengths: Any = None, *, sequence: int = 0, site: str = "x", lowest: int = LOWEST,
               axes: Any = None) -> Any:
    """Which notes sound at each step, or how probably: a panel a roll, on one axis of time and one of notes.

    Time is in steps from 1; a tick of the other axis is a C, C4 (MIDI note 60) the middle one. The axis covers the notes that
    have some probability, a twentieth, in any panel.

    :param rolls: one roll, or several by title: data or probabilities ``(B, T, notes)`` or ``(T, notes)``, a
        :class:`~pyro_seq.Sequences`, or what :meth:`Posterior.predict` gives, which is drawn at its own times.
    :param lengths: ``(B,)`` of rolls that are tensors; a ``Sequences`` has its own.
    :param int sequence: index in the batch.
    :param str site: of a ``Sequences`` or of draws.
    :param int lowest: MIDI number of the first column.
    :param axes: matplotlib axes, one a roll; new ones by default.
    :returns: the axes: one for a single roll, a list otherwise.
    :raises ValueError: on other shapes, a sequence that is not there, or values that are no probabilities.

    Example::

        >>> import torch
        >>> from pyro_seq.plot import piano_roll
        >>> x = torch.bernoulli(torch.full((2, 16, 88), 0.05))
        >>> ax = piano_roll(x, [16, 12], sequence=1)
        >>> above, below = piano_roll({"data": x, "reconstruction": 0.9 * x})
    """
    panels = {title: _panel(title, roll, lengths, sequence, site, lowest) for title, roll in named(rolls).items()}
    if axes is None:
        axes = new_axes(None, len(panels), sharex=True, sharey=True, figsize=(9, 1 + 1.8 * len(panels)))
    axes = require_axes(axes, len(panels))
    sounding = [note for _, roll in panels.values() for note in (roll >= 0.05).any(0).nonzero()[0] + lowest]
    low, high = (min(sounding), max(sounding)) if sounding else (lowest, lowest + 87)
    last = max(first + len(roll) for first, roll in panels.values())
    certain = all(np.isin(roll, (0, 1)).all() for _, roll in panels.values())
    for ax, (title, (first, roll)) in zip(axes, panels.items(), strict=True):
        edges = np.arange(first, first + len(roll) + 1) - 0.5, np.arange(lowest, lowest + roll.shape[1] + 1) - 0.5
        drawn = ax.pcolormesh(*edges, roll.T, cmap="Greys", vmin=0, vmax=1)
        octaves = [note for note in range(0, 128, 12) if low - 2 <= note <= high + 2]
        ax.set_yticks(octaves, [f"C{note // 12 - 1}" for note in octaves])
        ax.set(title=title, ylim=(low - 2.5, high + 2.5), xlim=(min(f for f, _ in panels.values()) - 0.5, last - 0.5))
        ax.grid(axis="y", color="C0", alpha=0.3, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("time, steps")
    if not certain:
        axes[0].figure.colorbar(drawn, ax=axes, label="probability", fraction=0.03, pad=0.02)
    return axes[0] if len(axes) == 1 else axes


def _panel(title: str, roll: Any, lengths: Any, sequence: int, site: str, lowest: int) -> tuple[int, np.ndarray]:
    """The time of the first step, and probabilities ``(T, notes)``."""
    what = f"roll {title!r}" if title else "the roll"
    first, batch = 1, lengths
    if isinstance(roll, Draws):
        _check_sequence(what, sequence, len(roll.times))
        first, roll, batch = int(roll.times[sequence, 0]), roll.mean(site), None
    elif isinstance(roll, Sequences):
        if site not in roll.x:
            raise ValueError(f"{what} has no data {site!r}; there are {sorted(roll.x)}: choose by site=")
        roll, batch = roll.x[site], roll.lengths
    values = numbers(roll)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(f"{what} has shape {values.shape}; it is (B, T, notes) or (T, notes)")
    _check_sequence(what, sequence, len(values))
    if not 0 <= lowest <= 128 - values.shape[2]:
        raise ValueError(f"{what} has {values.shape[2]} columns and begins at MIDI note {lowest}, of 0 to 127: pass lowest=, "
                         "the note of its first column")
    values = values[sequence]
    if batch is not None:
        if len(batch) <= sequence or not 1 <= int(batch[sequence]):
            raise ValueError(f"lengths={list(map(int, batch))} has no length for sequence {sequence}")
        values = values[:int(batch[sequence])]
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"{what} has values from {values.min():g} to {values.max():g}; notes, 0 or 1, or their probabilities "
                         "are drawn: make logits such by torch.sigmoid, and fill missing values, .nan_to_num()")
    return first, values


def _check_sequence(what: str, sequence: int, count: int) -> None:
    if not 0 <= sequence < count:
        raise ValueError(f"sequence={sequence}: {what} has {count}, counted from 0")
