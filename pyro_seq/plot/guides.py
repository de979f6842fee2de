"""What a guide does within a step and from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_seq.infer.by_step import ElboByStep
from pyro_seq.plot.axes import finish, named, new_axes, numbers, require_axes

__all__ = ["free_energy", "per_step"]


def free_energy(values: Any, lengths: Any = None, *, ax: Any = None) -> Any:
    """The free energy of a step after each inference iteration, in nats averaged over all frames.

    The first point is the prior's, before any iteration.

    :param values: ``(K + 1, B, T)`` as :meth:`AmortizedVariationalFilter.free_energy` returns it, or several by name.
    :param lengths: ``(B,)``: padding is left out of the average; all ``T`` when omitted.
    :returns: the matplotlib axes.
    :raises ValueError: on another shape, or lengths that do not fit.

    Source: Marino, Cvitkovic and Yue, *A General Method for Amortizing Variational Filtering*, 2018 (the figure).

    Example::

        >>> import torch
        >>> from pyro_seq.plot import free_energy
        >>> ax = free_energy({"AVF": torch.tensor([3.0, 2.0, 1.5])[:, None, None].expand(3, 4, 10)})
        >>> ax.lines[0].get_ydata()
        array([3. , 2. , 1.5])
    """
    averages = {name: _by_iteration(name, value, lengths) for name, value in named(values).items()}
    ax = new_axes(ax)
    for i, (name, average) in enumerate(averages.items()):
        ax.plot(np.arange(len(average)), average, marker="o", color=f"C{i}", label=name)
    ax.set(xlabel="inference iteration", ylabel="free energy, nats per frame")
    finish(ax, list(averages))
    return ax


def _by_iteration(name: str, value: Any, lengths: Any) -> np.ndarray:
    what = f"the free energy {name!r}" if name else "the free energy"
    value = numbers(value)
    if value.ndim != 3 or 0 in value.shape:
        raise ValueError(f"{what} has shape {value.shape}; it is (K + 1, B, T), as AmortizedVariationalFilter.free_energy "
                         "returns it")
    inside = _inside(what, lengths, *value.shape[1:])
    return value[:, inside].mean(1)


def per_step(parts: Any, *, sequence: int | None = None, axes: Any = None) -> Any:
    """Reconstruction and KL over time: what the latents of each step explain, and what they cost.

    :param parts: what :func:`~pyro_seq.elbo_by_step` returns, or several by name.
    :param int sequence: index in the batch; the average over the sequences that still run at each step when omitted.
    :param axes: two matplotlib axes; new ones by default.
    :returns: the two matplotlib axes, reconstruction first.
    :raises ValueError: if the sequence is not there.

    Example::

        >>> import torch
        >>> from pyro_seq.infer.by_step import ElboByStep
        >>> from pyro_seq.plot import per_step
        >>> parts = ElboByStep(torch.tensor([[-2.0, -1.0]]), torch.tensor([[0.5, 0.7]]), torch.tensor([2]))
        >>> above, below = per_step(parts)
    """
    found = named(parts)
    curves = {name: _over_time(name, part, sequence) for name, part in found.items()}
    if axes is None:
        axes = new_axes(None, 2, sharex=True, figsize=(8, 4.5))
    above, below = axes = require_axes(axes, 2)
    for i, (name, curve) in enumerate(curves.items()):
        for ax, values in zip(axes, curve, strict=True):
            ax.plot(np.arange(1, len(values) + 1), values, color=f"C{i}", label=name, marker="." if len(values) < 50 else None)
    above.set_ylabel("reconstruction, nats")
    below.set(xlabel="time, steps", ylabel="KL, nats", ylim=(min(0.0, *(kl.min() for _, kl in curves.values())), None))
    above.set_title("mean of the sequences" if sequence is None else f"sequence {sequence}", fontsize="medium")
    finish(above, list(curves))
    finish(below, [])
    return axes


def _over_time(name: str, part: Any, sequence: int | None) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(part, ElboByStep):
        raise TypeError(f"parts{f' {name!r}' if name else ''} is a {type(part).__name__}; pass what "
                        "seq.elbo_by_step(model, guide, data) returns")
    lengths = part.lengths.tolist()
    if sequence is not None:
        if not 0 <= sequence < len(lengths):
            raise ValueError(f"sequence={sequence}: there are {len(lengths)}, counted from 0")
        return tuple(numbers(value)[sequence, :lengths[sequence]] for value in part[:2])
    inside = _inside("the bound", lengths, *part.kl.shape)
    return tuple((numbers(value) * inside).sum(0) / inside.sum(0) for value in part[:2])


def _inside(what: str, lengths: Any, batch: int, steps: int) -> np.ndarray:
    """``(B, T)`` booleans: True inside each sequence's length."""
    lengths = np.full(batch, steps) if lengths is None else numbers(lengths)
    if lengths.shape != (batch,) or not ((lengths >= 1) & (lengths <= steps)).all():
        raise ValueError(f"{what} is of {batch} sequences of at most {steps} steps, and lengths={lengths.tolist()}: one from 1 "
                         "to T for each")
    return np.arange(steps) < lengths[:, None]
