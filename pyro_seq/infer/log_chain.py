"""The recursions of a finite Markov chain in logarithms: by a loop, or by a parallel scan over time.

Source: Särkkä and García-Fernández, *Temporal Parallelization of Inference in Hidden Markov Models*, 2021 (the scan).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.infer.enumerate import Tables
from pyro_seq.sequences import first_rows

__all__ = ["Logged", "Matrices", "is_running", "log_forward"]


class Logged:
    """Logarithms throughout."""

    def __init__(self, tables: Tables, scan: bool):
        self.tables, self.scan = tables, scan
        self.steps, self.batch, self.states = tables.log_emission.shape
        unnormalised, self.by_step = _log_forward_scan(tables) if scan else log_forward(tables)
        self.log_filtered = unnormalised
        self.ratio: Tensor | None = None

    @property
    def filtered(self) -> Tensor:
        return self.log_filtered.exp() * is_running(self.tables)[..., None]

    def smooth(self) -> Tensor:
        counts, log_filtered = self.tables.counts, self.log_filtered
        if self.scan:
            joint = log_filtered + _log_backward_scan(self.tables)
            norm = joint.logsumexp(-1, keepdim=True)
            smoothed = joint - torch.where(norm > -torch.inf, norm, 0.0)
            prediction = self._predictions()
            self.ratio = torch.where(prediction > -torch.inf, smoothed - prediction, -torch.inf)
        else:
            matrix = Matrices(self.tables.log_transition, counts)
            smoothed, self.ratio = log_filtered.clone(), torch.full_like(log_filtered, -torch.inf)
            prediction = self._predictions()
            for t in reversed(range(1, self.steps)):
                n = counts[t]
                gap = torch.where(prediction[t, :n] > -torch.inf, smoothed[t, :n] - prediction[t, :n], -torch.inf)
                self.ratio[t, :n] = gap
                smoothed[t - 1, :n] = log_filtered[t - 1, :n] + (matrix(t) + gap[:, None]).logsumexp(-1)
        return smoothed.exp() * is_running(self.tables)[..., None]

    def _predictions(self) -> Tensor:
        """``(T, B, K)``, from the second step on."""
        out = torch.full_like(self.log_filtered, -torch.inf)
        if self.steps > 1:
            out[1:] = _log_times(self.log_filtered[:-1], self.tables.log_transition)
        return out

    def pairs(self) -> Tensor:
        if self.ratio is None:
            self.smooth()
        running = is_running(self.tables)[1:]
        found = self.log_filtered[:-1, :, :, None] + self.tables.log_transition + self.ratio[1:, :, None]
        return found.exp() * running[..., None, None]

    def transition_counts(self, weights: Tensor) -> Tensor:
        table = self.tables.log_transition
        if self.steps == 1:
            return torch.zeros_like(table)
        found = self.pairs() * weights[:, None, None]
        for shared in (i for i in range(2) if table.shape[i] == 1):
            found = found.sum(shared, keepdim=True)
        return found


class Matrices:
    """The transition matrix into each step, two-dimensional where the sequences share it."""

    def __init__(self, table: Tensor, counts: list[int]):
        self.table, self.counts = table, counts
        self.each = [m[0] if table.shape[1] == 1 else m for m in table.unbind(0)]
        self.flipped = [m.transpose(-1, -2) for m in self.each]

    def __call__(self, t: int) -> Tensor:
        return self._into(self.each, t)

    def transposed(self, t: int) -> Tensor:
        """From column to row."""
        return self._into(self.flipped, t)

    def _into(self, matrices: list[Tensor], t: int) -> Tensor:
        matrix = matrices[0 if len(matrices) == 1 else t - 1]
        return matrix if matrix.dim() == 2 else first_rows(matrix, self.counts[t])


def _safe_logsumexp(value: Tensor, dim: int) -> Tensor:
    """With a gradient of zero, not NaN, where all entries are -inf."""
    if not value.requires_grad:
        return value.logsumexp(dim)
    top = value.detach().amax(dim, keepdim=True)
    top = torch.where(top > -torch.inf, top, 0.0)
    total = (value - top).exp().sum(dim)
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).log() + top.squeeze(dim), -torch.inf)


def _log_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """``(..., K)`` times ``(..., K, K)``."""
    return _safe_logsumexp(rows[..., None] + matrix, -2)


def _log_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``(..., K, K)`` both."""
    return (a[..., None] + b[..., None, :, :]).logsumexp(-2)


def log_forward(tables: Tables) -> tuple[Tensor, Tensor]:
    """``(T, B, K)`` log filtered and ``(T, B)`` log evidence by step, in a loop that can be differentiated twice."""
    log_initial, log_transition, log_emission, counts = tables
    batch = counts[0]
    matrix = Matrices(log_transition, counts)
    filtered, by_step, before = [], [], None
    for t, (emission, n) in enumerate(zip(log_emission.unbind(0), counts)):
        predicted = log_initial.expand(batch, -1) if t == 0 else _log_times(first_rows(before, n), matrix(t))
        joint = predicted + first_rows(emission, n)
        norm = _safe_logsumexp(joint, -1)
        before = joint - torch.where(norm > -torch.inf, norm, 0.0)[:, None]
        filtered.append(torch.cat([before, before.new_zeros(batch - n, before.shape[-1])]) if n < batch else before)
        by_step.append(torch.cat([norm, norm.new_zeros(batch - n)]) if n < batch else norm)
    return torch.stack(filtered), torch.stack(by_step)


def _elements(tables: Tables) -> Tensor:
    """``(T, B, K, K)`` log potentials of each step; beyond a sequence's end they change nothing."""
    log_initial, log_transition, log_emission, _ = tables
    steps, batch, states = log_emission.shape
    first = (log_initial + log_emission[0])[:, None].expand(batch, states, states)
    later = (log_transition + log_emission[1:, :, None]).expand(steps - 1, batch, states, states)
    identity = torch.full((states, states), -torch.inf, dtype=later.dtype, device=later.device).fill_diagonal_(0.0)
    later = torch.where(is_running(tables)[1:, :, None, None], later, identity)
    return torch.cat([first[None], later])


def _prefixes(elements: Tensor) -> Tensor:
    """``(T, B, K)``: products of the first 1, 2, ... of ``(T, B, K, K)`` elements, the first of which has equal rows."""
    steps = elements.shape[0]
    if steps == 1:
        return elements[:, :, 0]
    even = _prefixes(_log_matmul(elements[0:steps - 1:2], elements[1::2]))
    out = elements.new_empty(elements.shape[:-1])
    out[0], out[1::2] = elements[0, :, 0], even
    if steps > 2:
        out[2::2] = _log_times(even[:(steps - 1) // 2], elements[2::2])
    return out


def _log_forward_scan(tables: Tables) -> tuple[Tensor, Tensor]:
    joint = _prefixes(_elements(tables))
    norm = joint.logsumexp(-1)
    by_step = norm.diff(dim=0, prepend=torch.zeros_like(norm[:1]))
    dead = norm == -torch.inf
    by_step = torch.where(dead, -torch.inf, by_step)
    return joint - torch.where(dead, 0.0, norm)[..., None], torch.where(is_running(tables), by_step, 0.0)


def _log_backward_scan(tables: Tables) -> Tensor:
    """``(T, B, K)`` log density of the frames after each step given its state."""
    later = _elements(tables)[1:].transpose(-1, -2).flip(0)
    last = torch.zeros_like(tables.log_emission[0])[:, None].expand(-1, tables.log_emission.shape[-1], -1)
    return _prefixes(torch.cat([last[None], later])).flip(0)


def is_running(tables: Tables) -> Tensor:
    """``(T, B)`` booleans."""
    counts = torch.tensor(tables.counts, device=tables.log_emission.device)
    return torch.arange(tables.counts[0], device=counts.device) < counts[:, None]
