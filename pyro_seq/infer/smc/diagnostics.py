"""Whether the particles can be trusted, in numbers and in words."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_seq.infer.smc.record import Record

__all__ = ["notes", "table"]

_MORE = "use a guide that reads the data, an emission with heavier tails, or more particles"
_ALL = 0.99
_FEW_ANCESTORS = 10
_PARETO = 0.7


def low_ess(particles: int) -> float:
    """The effective sample size below which moments mean little: 10, or a tenth of fewer than a hundred particles."""
    return max(1.5, min(10.0, particles / 10))


def notes(record: Record, batch: int) -> tuple[str, ...]:
    """What is wrong with a run, in words; nothing where nothing is. Warns once where the run is of no use.

    :param batch: the number of sequences, where they are repeated.
    """
    if record.particles == 1:
        return ()
    found = []
    active, ess = record.packed.sequences.active, record.ess()
    low = (ess < low_ess(record.particles)) & active
    often = low.sum(1) >= torch.clamp(0.05 * record.packed.sequences.lengths, min=2)
    if often.any():
        worst = int(torch.where(often, low.sum(1), 0).argmax())
        time = int(torch.where(active[worst], ess[worst], torch.inf).argmin())
        found.append(
            f"effective sample size below {low_ess(record.particles):g} at {int(low[worst].sum())} of "
            f"{int(active[worst].sum())} times in sequence {worst % batch}, {ess[worst, time]:.1f} at time {time + 1}: moments "
            f"and evidence cannot be trusted; {_MORE}")
    alone = (record.largest() > _ALL) & active
    if alone.any():
        b, t = (int(i) for i in alone.nonzero()[0])
        found.append(f"one particle has all the weight at time {t + 1} of sequence {b % batch} ({int(alone.sum())} times in "
                     f"all): what comes before is known from that one alone; {_MORE}")
    useless = (alone.sum(1) > 0.5 * active.sum(1)) & (active.sum(1) > 1)
    useless = useless.reshape(-1, batch).float().mean(0) > 0.5  # in most of the runs that are averaged
    if record.particles >= 10 and useless.any():
        warnings.warn(f"one of {record.particles} particles has all the weight at most times of sequence "
                      f"{int(useless.nonzero()[0])}: the answer is of no use; {_MORE}", stacklevel=_level_of_caller())
    if record.smooths_by_ancestors and record.lineage:
        few = (record.distinct() < min(_FEW_ANCESTORS, record.particles / 2)) & active
        if few.any():
            b = int(few.sum(1).argmax())
            time = int(few[b].nonzero().max()) + 1
            found.append(f"smoothed moments and trajectories rest on fewer than {min(_FEW_ANCESTORS, record.particles // 2)} "
                         f"distinct particles up to time {time} of sequence {b % batch}: use BackwardSampler or "
                         "FixedLagSmoother")
    return tuple(found)


def _level_of_caller() -> int:
    """For ``stacklevel``: how far up the line is that called the library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("pyro_seq", "pyro"):
        level, frame = level + 1, frame.f_back
    return level


def table(record: Record) -> pd.DataFrame:
    """One row per run, sequence and time; see :meth:`pyro_seq.Posterior.diagnostics`."""
    sequences = record.packed.sequences
    active = sequences.active.cpu()
    b, t = (index.numpy() for index in active.nonzero(as_tuple=True))

    def column(value: Tensor) -> np.ndarray:
        return value.detach().cpu()[active].double().numpy()

    frame = pd.DataFrame({"sequence": b, "time": t + 1, "ess": column(record.ess()),
                          "largest_weight": column(record.largest())})
    if record.history:
        if record.lineage:
            frame["distinct_ancestors"] = column(record.distinct()).astype(int)
        frame["pareto_k"] = column(_pareto_k(record))
    frame["advice"] = _advice(frame, record.particles, record.smooths_by_ancestors)
    return frame


def _advice(frame: pd.DataFrame, particles: int, by_ancestors: bool) -> list[str]:
    said = [""] * len(frame)
    if particles == 1:
        return said
    columns = {name: frame[name].to_numpy() for name in frame}
    for i in range(len(frame)):
        parts = []
        if columns["largest_weight"][i] > _ALL:
            parts.append(f"one particle has all the weight: {_MORE}")
        elif columns["ess"][i] < low_ess(particles):
            parts.append(f"few particles have weight: {_MORE}")
        elif "pareto_k" in columns and columns["pareto_k"][i] > _PARETO:
            parts.append(f"the weights have so heavy a tail that their average may miss what matters: {_MORE}")
        few = min(_FEW_ANCESTORS, particles / 2)
        if by_ancestors and "distinct_ancestors" in columns and columns["distinct_ancestors"][i] < few:
            parts.append("few of these particles have descendants at the end: smooth by BackwardSampler or FixedLagSmoother")
        said[i] = "; ".join(parts)
    return said


def _pareto_k(record: Record) -> Tensor:
    """``(B, T)`` shape of the generalised Pareto distribution of the largest weights; NaN where it has none, since too few
    weights differ."""
    if record.particles == 1:
        return torch.full_like(record.ess(), math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arviz, that it is about to be another library, and of ties among the weights
        import arviz

        found = []
        for step in record.steps:
            log_weights = step.log_weights.detach().cpu().double().numpy()
            k = np.atleast_1d(arviz.psislw(np.array(log_weights))[1])
            found.append(torch.from_numpy(np.where(np.isfinite(k), k, math.nan)))
    return record.padded(found)
