"""The data: a padded batch of sequences, their lengths, what is missing, and the covariates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_seq.engine.handlers import outside_inference_mode
from pyro_seq.raw import as_tensor, check_lengths, continued, index_of, pad_with_last, present_of, right

__all__ = ["Frame", "Packed", "Sequences"]


class Frame(NamedTuple):
    """What one step of a model sees: flat rows of data and covariates.

    A row is one particle of one sequence (and of one time, when a whole sequence is scored in one call).
    """

    t: int | Tensor
    """1-based time: an int inside the loop, a ``(rows,)`` tensor when rows of several times are scored together."""
    rows: int
    x: Mapping[str, Tensor]
    """Observed values by argument name, each ``(rows, ...)``; NaN marks a missing entry. Empty when simulating."""
    covariates: Mapping[str, Tensor]
    missing: bool
    """Whether any entry of ``x`` may be missing."""
    sequence: Tensor
    """``(rows,)`` index of the sequence, in the user's order, that each row belongs to."""
    first: bool
    """Whether this is the first step."""
    observed: Mapping[str, Tensor]
    """For data of an integer type, which cannot hold NaN: booleans of the shape of ``x``."""
    device: torch.device
    whole: Sequences | None = None
    """The batch the rows come from."""

    @property
    def time(self) -> Tensor:
        """``(rows,)`` long tensor of 1-based times."""
        if isinstance(self.t, Tensor):
            return self.t
        return torch.full((self.rows,), self.t, dtype=torch.long, device=self.device)


@dataclass(frozen=True, eq=False)
class Sequences:
    """A batch of ``B`` sequences of at most ``T`` frames, checked once.

    Build it with :meth:`of`, which accepts what users have at hand. Every inference method takes either raw data or
    a ``Sequences``. Padding is never read: it holds a copy of each sequence's last frame, so that it is always a
    plausible value.

    :param x: values by argument name, each ``(B, T, ...)``; NaN marks missing entries of floating data.
    :param lengths: ``(B,)`` long, from 1 to ``T``.
    :param observed: for data of an integer type with gaps, booleans of the shape of the values.
    :param covariates: values by argument name, each ``(B, T, ...)``.
    :param index: the pandas index of each sequence, where the data had one; :meth:`labels` reads it.

    Example::

        >>> import torch
        >>> batch = Sequences.of([torch.zeros(3, 2), torch.ones(5, 2)])
        >>> batch.num_sequences, batch.num_steps, batch.lengths.tolist()
        (2, 5, [3, 5])
    """

    x: Mapping[str, Tensor]
    lengths: Tensor
    covariates: Mapping[str, Tensor] = field(default_factory=dict)
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    has_missing: bool = False
    index: tuple[pd.Index, ...] = ()

    @staticmethod
    @outside_inference_mode()
    def of(
        x: Any = None,
        lengths: Any = None,
        *,
        mask: Any = None,
        covariates: Mapping[str, Any] | None = None,
    ) -> Sequences:
        """Check and pad raw data.

        :param x: observed values: a tensor or array ``(B, T, ...)``, one series ``(T,)``, a list of ragged
            ``(T_b, ...)`` sequences, a pandas Series (one scalar sequence) or frame (one sequence, a column per
            dimension), a dict of any of these by argument name, or ``None`` to simulate.
        :param lengths: ``(B,)`` integers from 1 to ``T``; all ``T`` when omitted (taken from a ragged list).
        :param mask: True where observed: ``(B, T)`` for whole frames or the shape of ``x`` for single entries
            (a dict of these when ``x`` is one). NaN in ``x`` marks missing entries as well.
        :param covariates: inputs by argument name, each ``(B, T, ...)``, without missing values.
        :raises ValueError: on an empty batch, impossible lengths, infinite values, or shapes that disagree.
        """
        if isinstance(x, Sequences):
            if lengths is not None or mask is not None or covariates:
                raise ValueError("x is a Sequences already: pass lengths, mask and covariates to Sequences.of instead")
            return x
        given = {} if x is None else dict(x) if isinstance(x, Mapping) else {"x": x}
        if isinstance(mask, Mapping) and (unknown := sorted(set(mask) - set(given))):
            raise ValueError(f"mask names {unknown}, which is not among the data {sorted(given)}")
        values: dict[str, Tensor] = {}
        for name, value in given.items():
            values[name], lengths = as_tensor(name, value, lengths)
        inputs: dict[str, Tensor] = {}
        for name, value in (covariates or {}).items():
            if name in values or name == "t":
                raise ValueError(f"covariate {name!r} has the name of {'the time index' if name == 't' else 'the data'}"
                                 ": rename it")
            inputs[name], _ = as_tensor(name, value, None)
        # The data says how many sequences of what length there are; covariates follow, or say so when simulating.
        batch, steps, lengths = check_lengths(values or ({} if lengths is not None else inputs), lengths)
        for name, value in {**values, **inputs}.items():
            shape = tuple(value.shape)
            if name in inputs and value.dim() >= 2 and value.shape[0] == 1:
                value = inputs[name] = value.expand(batch, *value.shape[1:])
            if value.shape[0] != batch or value.shape[1] < steps:
                raise ValueError(
                    f"{name!r} has shape {shape}, but (B, T, ...) = ({batch}, {steps}, ...) is expected: "
                    "all data and covariates share the batch and time dimensions (a value without time is repeated, "
                    "u[:, None].expand(B, T))")
        if len({v.device for v in (*values.values(), *inputs.values())}) > 1:
            where = {n: str(v.device) for n, v in {**values, **inputs}.items()}
            raise ValueError(f"data and covariates are on different devices: {where}; move them with .to(device)")

        device = next(iter((*values.values(), *inputs.values())), lengths).device
        lengths = lengths.to(device)
        ragged, now = bool((lengths < steps).any()), torch.arange(steps, device=device)
        last = torch.minimum(now, lengths[:, None] - 1) if ragged else now[None]
        inside = now < lengths[:, None] if ragged else torch.ones_like(now, dtype=torch.bool)[None]
        observed: dict[str, Tensor] = {}
        has_missing = False
        for name, value in values.items():
            full = value.shape[1]
            value = pad_with_last(value[:, :steps], last) if ragged else value[:, :steps]
            present = present_of(name, mask, value, steps, full)
            if present is not None:
                present = present | ~right(inside, present)
            if value.is_floating_point():
                # A finite sum has finite terms, and is quick.
                if not value.sum().isfinite() and (infinite := value.isinf() & right(inside, value)).any():
                    b, t = infinite.flatten(2).any(-1).nonzero()[0].tolist() if value.dim() > 2 else (
                        infinite.nonzero()[0].tolist())
                    raise ValueError(f"{name!r} is infinite in sequence {b} at time {t + 1}: data must be finite; "
                                     "mark missing values with NaN or mask=")
                if present is not None:
                    value = value.masked_fill(~present, torch.nan)
                has_missing |= not value.sum().isfinite() and bool(value.isnan().any())
            elif present is not None and not present.all():
                observed[name] = present
                has_missing = True
            values[name] = value
        for name, value in inputs.items():
            value = pad_with_last(value[:, :steps], last) if ragged else value[:, :steps]
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"covariate {name!r} has NaN or infinite entries: covariates cannot be missing; "
                                 "fill them, or model them as data")
            inputs[name] = value
        return Sequences(values, lengths, inputs, observed, has_missing, next(filter(None, map(index_of, given.values())), ()))

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_steps(self) -> int:
        return int(self.lengths.max())

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @cached_property
    def active(self) -> Tensor:
        """``(B, T)`` booleans: True inside each sequence's length."""
        return torch.arange(self.num_steps, device=self.device) < self.lengths[:, None]

    @cached_property
    def largest(self) -> float:
        """The largest absolute value of the data."""
        return max((float((v.nan_to_num() if self.has_missing else v).abs().max()) for v in self.x.values()), default=0.0)

    @cached_property
    def inside_support(self) -> set[tuple[str, type]]:
        """Data names and families whose support has been found to hold all of the data."""
        return set()

    @cached_property
    def packed(self) -> Packed:
        """The same data ordered by length, so that the running sequences of each step are a prefix."""
        return Packed(self)

    def frame(self, t: int) -> Frame:
        """All ``B`` rows at time ``t`` (1-based), in the user's order, finished sequences showing their last frame."""
        return Frame(
            t, self.num_sequences, {k: v[:, t - 1] for k, v in self.x.items()},
            {k: v[:, t - 1] for k, v in self.covariates.items()}, self.has_missing,
            torch.arange(self.num_sequences, device=self.device), t == 1,
            {k: v[:, t - 1] for k, v in self.observed.items()}, self.device, self)

    def select(self, index: Any) -> Sequences:
        """Some of the sequences, in the order of ``index`` (integers ``(n,)``), as short as they can be.

        Example::

            >>> import torch
            >>> batch = Sequences.of([torch.zeros(3, 2), torch.ones(5, 2)])
            >>> batch.select([0])
            Sequences(x=(1, 3, 2), lengths 3..3)
        """
        index = torch.as_tensor(index, device=self.device)
        if index.numel() == 0:
            raise ValueError("no sequence is selected: index is empty")
        lengths = self.lengths[index]
        steps = int(lengths.max())

        def rows(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v[index, :steps] for k, v in values.items()}

        return Sequences(rows(self.x), lengths, rows(self.covariates), rows(self.observed), self.has_missing,
                         tuple(self.index[i] for i in index.tolist()) if self.index else ())

    def until(self, t: int) -> Sequences:
        """The first ``t`` frames of every sequence, fewer where it is shorter.

        Example::

            >>> import torch
            >>> Sequences.of([torch.zeros(3, 2), torch.ones(5, 2)]).until(4)
            Sequences(x=(2, 4, 2), lengths 3..4)
        """
        if t < 1:
            raise ValueError(f"t={t}: sequences keep at least one frame")

        def early(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v[:, :t] for k, v in values.items()}

        x, observed = early(self.x), early(self.observed)
        missing = self.has_missing and (any(bool(v.isnan().any()) for v in x.values() if v.is_floating_point())
                                        or any(not bool(v.all()) for v in observed.values()))
        return Sequences(x, self.lengths.clamp(max=t), early(self.covariates), observed, missing, self.index)

    def between(self, start: int, stop: int) -> Sequences:
        """The frames ``start..stop`` (1-based, inclusive) of every sequence, for what reads frames only: one that ends before
        keeps a frame of padding.

        Example::

            >>> import torch
            >>> Sequences.of([torch.zeros(3, 2), torch.ones(5, 2)]).between(2, 4)
            Sequences(x=(2, 3, 2), lengths 2..3)
        """
        def part(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v[:, start - 1:stop] for k, v in values.items()}

        lengths = (self.lengths - start + 1).clamp(1, stop - start + 1)
        return Sequences(part(self.x), lengths, part(self.covariates), part(self.observed), self.has_missing)

    def labels(self, sequence: int, times: Any) -> pd.Index | None:
        """What the user's pandas index calls some 1-based times of a sequence, continued past its end.

        :returns: ``None`` if the data had no index, or one without a fixed step to be continued by.

        Example::

            >>> import pandas as pd
            >>> batch = Sequences.of(pd.Series([1.0, 2.0], index=pd.period_range("2000-11", periods=2, freq="M")))
            >>> [str(month) for month in batch.labels(0, [2, 3, 4])]
            ['2000-12', '2001-01', '2001-02']
        """
        if not self.index:
            return None
        index, times = self.index[sequence], np.asarray(times)
        ahead = int(times.max()) - len(index)
        if ahead > 0:
            more = continued(index, ahead)
            if more is None:
                return None
            index = index.append(more)
        return index[times - 1]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Sequences:
        """The same data on another device, its floating values and covariates of another type."""
        def move(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in values.items()}

        return Sequences(move(self.x), self.lengths.to(device), move(self.covariates), move(self.observed), self.has_missing,
                         self.index)

    def repeat(self, times: int) -> Sequences:
        """The whole batch ``times`` times over, one copy after the other."""
        if times == 1:
            return self

        def tile(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.repeat(times, *(1,) * (v.dim() - 1)) for k, v in values.items()}

        return Sequences(tile(self.x), self.lengths.repeat(times), tile(self.covariates), tile(self.observed),
                         self.has_missing, self.index * times)

    def simulated(self) -> Sequences:
        """The same lengths and covariates without the observed values."""
        return Sequences({}, self.lengths, self.covariates)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{k}={tuple(v.shape)}" for k, v in {**self.x, **self.covariates}.items())
        return (f"Sequences({shapes or 'no data'}, lengths {int(self.lengths.min())}..{self.num_steps}"
                f"{', with missing values' if self.has_missing else ''})")


class Packed:
    """Sequences ordered by decreasing length: step ``t`` runs the first ``counts[t - 1]`` of them and no others.

    A finished sequence is thus never shown to the user's code: it costs nothing, uses no random numbers and cannot
    contribute to a score or a gradient.
    """

    def __init__(self, sequences: Sequences):
        self.sequences = sequences
        lengths = sequences.lengths
        self.order = torch.argsort(lengths, descending=True, stable=True)
        """``(B,)`` the user's index of each packed row."""
        self.inverse = torch.argsort(self.order)
        ends = torch.bincount(lengths.cpu(), minlength=sequences.num_steps + 1).flip(0).cumsum(0).flip(0)
        self.counts: list[int] = ends[1:].tolist()
        """Running sequences at each step."""
        self.x = {k: self.sort(v) for k, v in sequences.x.items()}
        self.observed = {k: self.sort(v) for k, v in sequences.observed.items()}
        self.covariates = {k: self.sort(v) for k, v in sequences.covariates.items()}
        missing = torch.zeros(sequences.num_steps, dtype=torch.bool, device="cpu")
        if sequences.has_missing:
            for value in self.x.values():
                if value.is_floating_point():
                    missing |= value.isnan().transpose(0, 1).flatten(1).any(1).cpu()
            for value in self.observed.values():
                missing |= (~value).transpose(0, 1).flatten(1).any(1).cpu()
        self.missing: list[bool] = missing.tolist()

    def sort(self, value: Tensor) -> Tensor:
        """Reorder ``(B, ...)`` from the user's order to the packed one."""
        return value if self.sequences.lengths.min() == self.sequences.num_steps else value[self.order]

    def unsort(self, value: Tensor) -> Tensor:
        """Reorder ``(B, ...)`` from the packed order to the user's."""
        return value if self.sequences.lengths.min() == self.sequences.num_steps else value[self.inverse]

    @cached_property
    def running(self) -> Tensor:
        """``(T, B)`` booleans in packed order."""
        counts = torch.tensor(self.counts, device=self.sequences.device)
        return torch.arange(self.sequences.num_sequences, device=self.sequences.device) < counts[:, None]

    def frames(self, num_particles: int = 1, start: int = 1, stop: int | None = None, finished: bool = False
               ) -> Iterator[Frame]:
        """One frame a step of ``start..stop`` (1-based, inclusive; all by default), each running sequence repeated
        ``num_particles`` times (a sequence's rows together).

        :param finished: with the rows of sequences that have ended since ``start``, which show their last frame.
        """
        def by_time(values: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
            return {k: v[:, start - 1:stop].unbind(1) for k, v in values.items()}

        x, covariates, observed = by_time(self.x), by_time(self.covariates), by_time(self.observed)
        batch, device = self.counts[0], self.sequences.device
        sequence = repeat_rows(self.order, num_particles)
        for t, count in enumerate(self.counts[start - 1:stop], start=start):
            count = self.counts[start - 1] if finished else count

            def rows(values: dict[str, tuple[Tensor, ...]], t: int = t, count: int = count) -> dict[str, Tensor]:
                return {k: repeat_rows(first_rows(v[t - start], count), num_particles) for k, v in values.items()}

            yield Frame(
                t, count * num_particles, rows(x), rows(covariates), self.missing[t - 1],
                sequence if count == batch else sequence[:count * num_particles], t == 1, rows(observed), device,
                self.sequences)

    def by_row(self, value: Tensor, start: int = 1) -> Tensor:
        """``(n, T, ...)`` from step ``start`` on, of at least the sequences that run there, in packed order: as rows of all
        steps, one step after the other."""
        stop, value = start - 1 + value.shape[1], value.transpose(0, 1)
        full = all(count == value.shape[1] for count in self.counts[start - 1:stop])
        return value.flatten(0, 1) if full else value[self.running[start - 1:stop, :value.shape[1]]]

    def by_time(self, rows: Tensor, start: int = 1, stop: int | None = None, num_particles: int = 1) -> Tensor:
        """The reverse: rows ``(n,)`` as ``(T, B, N)`` in packed order, with zeros past the sequences' ends."""
        running = self.running[start - 1:stop]
        out = rows.new_zeros(*running.shape, num_particles)
        return out.masked_scatter(running[..., None].expand_as(out), rows)

    def block(self, start: int, stop: int) -> tuple[Frame, Tensor | None]:
        """The data of steps ``start..stop`` (1-based, inclusive) of the sequences that run at ``start``, ``(n, T, ...)``, zero
        where missing, and their lengths there, ``None`` if all are the same."""
        count = self.counts[start - 1]

        def part(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: first_rows(v, count)[:, start - 1:stop] for k, v in values.items()}

        observed = part(self.observed)
        x = {k: v.nan_to_num() if v.is_floating_point() else v * observed[k] if k in observed else v
             for k, v in part(self.x).items()}
        times = torch.arange(start, stop + 1, device=self.sequences.device).expand(count, -1)
        lengths = None if self.counts[stop - 1] == count else (
            self.sequences.lengths[self.order[:count]].clamp(max=stop) - start + 1)
        return Frame(times, count, x, part(self.covariates), any(self.missing[start - 1:stop]), self.order[:count], start == 1,
                     observed, self.sequences.device, self.sequences), lengths

    def flat(self, start: int, stop: int, num_particles: int = 1) -> Frame:
        """One frame with the rows of steps ``start..stop`` (1-based, inclusive) one step after the other."""
        running = self.running[start - 1:stop]

        def rows(value: Tensor) -> Tensor:
            return repeat_rows(self.by_row(value[:, start - 1:stop], start), num_particles)

        times = torch.arange(start, stop + 1, device=self.sequences.device)[:, None].expand(running.shape)
        order = self.order.expand(running.shape)
        times, order = (self.by_row(v.mT, start) for v in (times, order))
        return Frame(
            repeat_rows(times, num_particles), len(times) * num_particles, {k: rows(v) for k, v in self.x.items()},
            {k: rows(v) for k, v in self.covariates.items()}, any(self.missing[start - 1:stop]),
            repeat_rows(order, num_particles), start == 1, {k: rows(v) for k, v in self.observed.items()},
            self.sequences.device, self.sequences)


def first_rows(value: Tensor, count: int) -> Tensor:
    """The first ``count`` rows; a slice of all of them would still cost a copy in every backward pass."""
    return value if value.shape[0] == count else value[:count]


def repeat_rows(value: Tensor, times: int) -> Tensor:
    """``(n, ...)`` to ``(n * times, ...)``, the copies of a row next to each other."""
    if times == 1:
        return value
    return value[:, None].expand(value.shape[0], times, *value.shape[1:]).reshape(-1, *value.shape[1:])
