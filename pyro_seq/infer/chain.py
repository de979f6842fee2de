r"""Recursions over a batch of finite Markov chains given their tables: filter, smoother, pairs, Viterbi, sampling.

Two ways to the same numbers. *Scaled*: probabilities, normalised at every step, so that a step is one matrix product.
*Logged*: logarithms, which no chain can leave, by a loop or by a parallel scan over time; some ten times slower per
number.

Scaled numbers below 1e-308 are lost. Whether that matters is bounded on the way, not assumed: with ``U_t(k)`` an upper
bound of the mass that filtering has lost in state ``k``,

.. math:: U_t = ((U_{t-1} + \delta) A \circ g_t + \delta) / c_t, \qquad \delta = K \cdot 10^{-307},

since emissions are divided by their maximum over the states and the rows of A sum to at most one. A sequence for which
it ever exceeds 1e-12 is done again in logarithms. (The smoother only redistributes what the filter has at the last step,
so that the bound at the end is one for it too.) Where every transition has a probability above 1e-100, each predicted
probability has a relative error below 1e-200 whatever was lost before, and :math:`\delta / c_t` alone is the bound.

Source: Rabiner, *A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition*, 1989; Särkkä and
García-Fernández, *Temporal Parallelization of Inference in Hidden Markov Models*, 2021 (the scan).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_seq.infer.enumerate import Tables
from pyro_seq.sequences import first_rows

__all__ = ["Passes", "log_evidence", "sample_paths", "viterbi"]

_TOLERANCE = 1e-12
_LOG_DENSE = -230.0
_SCAN_NUMBERS = {"cpu": 1000, "cuda": 1_000_000}
"""``B * K**3`` up to which a scan beats a loop: what a step of the loop costs beside its arithmetic."""


class Passes:
    """Filtered, smoothed and pairwise probabilities of a batch.

    :param scan: by a parallel scan over time or not; the faster way for the shape when omitted.
    """

    def __init__(self, tables: Tables, scan: bool | None = None):
        steps, batch, states = tables.log_emission.shape
        if scan is None:
            scan = steps > 32 and batch * states**3 <= _SCAN_NUMBERS.get(tables.log_emission.device.type, 1_000_000)
        self.tables = tables
        self.main: Any = _Logged(tables, True) if scan else _Scaled(tables)
        hard = torch.zeros(0, dtype=torch.long) if scan else self.main.lossy.nonzero()[:, 0]
        self.hard = hard
        self.exact = _Logged(_select(tables, hard), False) if len(hard) else None
        if self.exact is not None:
            self.main.forget(hard)

    def _merged(self, value: Tensor, exact: Tensor | None) -> Tensor:
        return value if exact is None else value.index_copy(1, self.hard, exact)

    def _get(self, name: str) -> Tensor:
        return self._merged(getattr(self.main, name), None if self.exact is None else getattr(self.exact, name))

    @property
    def by_step(self) -> Tensor:
        """``(T, B)`` log predictive density of each frame; -inf where the data is impossible, zero in padding."""
        return self._get("by_step")

    @property
    def filtered(self) -> Tensor:
        """``(T, B, K)``"""
        return self._get("filtered")

    @property
    def log_filtered(self) -> Tensor:
        """``(T, B, K)``"""
        return self._get("log_filtered")

    def smooth(self) -> Tensor:
        """``(T, B, K)``; the pairs and gradients can be asked for after it."""
        return self._merged(self.main.smooth(), None if self.exact is None else self.exact.smooth())

    def pairs(self) -> Tensor:
        """``(T - 1, B, K, K)`` probabilities of z_t (rows) and z_{t+1} (columns) given all data."""
        return self._merged(self.main.pairs(), None if self.exact is None else self.exact.pairs())

    def transition_counts(self, weights: Tensor) -> Tensor:
        """The weighted pairs, summed to the shape of the transition table. ``weights`` is ``(B,)``."""
        if self.exact is None:
            return self.main.transition_counts(weights)
        others = weights.index_fill(0, self.hard, 0.0)
        counts = self.main.transition_counts(others)
        found = self.exact.transition_counts(weights[self.hard])
        return counts + found if found.shape[1] == counts.shape[1] else counts.index_add(1, self.hard, found)


class _Scaled:
    """Probabilities, normalised at every step."""

    def __init__(self, tables: Tables):
        log_initial, log_transition, log_emission, counts = tables
        self.counts, self.steps = counts, len(counts)
        states = log_emission.shape[-1]
        top = log_emission.amax(-1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0.0)
        emission = (log_emission - top).exp_()
        self.transition = _Matrices(log_transition.exp(), counts)
        self.prediction, self.filtered = (torch.zeros_like(log_emission) for _ in range(2))
        total = torch.ones_like(top)
        rows = [self._rows(v) for v in (emission, self.prediction, self.filtered, total)]
        self.prediction[0] = log_initial.exp()
        smallest = states * 1e-307
        # Mass can stay lost only where a transition is all but forbidden.
        dense = bool((log_transition > _LOG_DENSE).all())
        lost, worst = torch.zeros_like(self.prediction[0]), torch.zeros_like(top[0])
        before = None
        for t, (emit, predicted, now, norm) in enumerate(zip(*rows)):
            if t:
                _times(first_rows(before, counts[t]), self.transition(t), predicted)
            torch.mul(predicted, emit, out=now)
            torch.sum(now, -1, keepdim=True, out=norm)
            now.div_(norm)
            if not dense:
                lost = first_rows(lost, counts[t])
                if t:
                    lost = _times(lost, self.transition(t))
                lost = (lost + smallest).mul_(emit).add_(smallest).div_(norm)
                first_rows(worst, counts[t]).copy_(torch.maximum(first_rows(worst, counts[t]), lost.sum(-1, keepdim=True)))
            before = now
        if dense:
            worst = (smallest * states / total).amax(0)
        self.lossy = ~(worst[:, 0] < _TOLERANCE) | ~(total > 0).all(0)[:, 0]
        self.by_step = torch.where(_running(tables), (total.log() + top)[..., 0], 0.0)
        self.ratio: Tensor | None = None

    def _rows(self, value: Tensor) -> list[Tensor]:
        return [first_rows(v, n) for v, n in zip(value.unbind(0), self.counts)]

    def forget(self, sequences: Tensor) -> None:
        """Clear what was lost of some sequences, so that it spoils no sum over the others."""
        self.filtered[:, sequences] = 0.0
        self.prediction[:, sequences] = 0.0

    @property
    def log_filtered(self) -> Tensor:
        return self.filtered.log()

    def smooth(self) -> Tensor:
        """By the kernels p(z_t | z_{t+1}, x_1..x_t), as Rauch, Tung and Striebel do for a Gaussian."""
        smoothed = self.filtered.clone()
        self.ratio = torch.zeros_like(smoothed)
        prediction = self.prediction.clamp(min=1e-307)
        rows = zip(*(self._rows(v) for v in (self.filtered, smoothed, prediction, self.ratio)))
        after = None
        for t, (now, found, predicted, ratio) in reversed(list(enumerate(rows))):
            if after is not None:
                count = self.counts[t + 1]
                _times(after, self.transition(t + 1).transpose(-1, -2), first_rows(found, count))
                first_rows(found, count).mul_(first_rows(now, count))
            if t:
                torch.div(found, predicted, out=ratio)
            after = ratio
        return smoothed

    def pairs(self) -> Tensor:
        if self.ratio is None:
            self.smooth()
        outer = self.filtered[:-1, :, :, None] * self.ratio[1:, :, None]
        return outer.mul_(self.transition.table)

    def transition_counts(self, weights: Tensor) -> Tensor:
        if self.ratio is None:
            self.smooth()
        table = self.transition.table
        if self.steps == 1:
            return torch.zeros_like(table)
        weighted = self.filtered[:-1] * weights[:, None]
        if table.shape[:2] == (1, 1):
            return table * (weighted.flatten(0, 1).T @ self.ratio[1:].flatten(0, 1))
        if table.shape[1] == 1:
            return table * (weighted.transpose(-1, -2) @ self.ratio[1:])[:, None]
        return table * weighted[..., None] * self.ratio[1:, :, None]


class _Logged:
    """Logarithms throughout."""

    def __init__(self, tables: Tables, scan: bool):
        self.tables, self.scan = tables, scan
        self.steps, self.batch, self.states = tables.log_emission.shape
        unnormalised, self.by_step = _log_forward_scan(tables) if scan else _log_forward(tables)
        self.log_filtered = unnormalised
        self.ratio: Tensor | None = None

    @property
    def filtered(self) -> Tensor:
        return self.log_filtered.exp() * _running(self.tables)[..., None]

    def smooth(self) -> Tensor:
        counts, log_filtered = self.tables.counts, self.log_filtered
        if self.scan:
            joint = log_filtered + _log_backward_scan(self.tables)
            norm = joint.logsumexp(-1, keepdim=True)
            smoothed = joint - torch.where(norm > -torch.inf, norm, 0.0)
            prediction = self._predictions()
            self.ratio = torch.where(prediction > -torch.inf, smoothed - prediction, -torch.inf)
        else:
            matrix = _Matrices(self.tables.log_transition, counts)
            smoothed, self.ratio = log_filtered.clone(), torch.full_like(log_filtered, -torch.inf)
            prediction = self._predictions()
            for t in reversed(range(1, self.steps)):
                n = counts[t]
                gap = torch.where(prediction[t, :n] > -torch.inf, smoothed[t, :n] - prediction[t, :n], -torch.inf)
                self.ratio[t, :n] = gap
                smoothed[t - 1, :n] = log_filtered[t - 1, :n] + (matrix(t) + gap[:, None]).logsumexp(-1)
        return smoothed.exp() * _running(self.tables)[..., None]

    def _predictions(self) -> Tensor:
        """``(T, B, K)``, from the second step on."""
        out = torch.full_like(self.log_filtered, -torch.inf)
        if self.steps > 1:
            out[1:] = _log_times(self.log_filtered[:-1], self.tables.log_transition)
        return out

    def pairs(self) -> Tensor:
        if self.ratio is None:
            self.smooth()
        running = _running(self.tables)[1:]
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


class _Matrices:
    """The transition matrix into each step, two-dimensional where the sequences share it."""

    def __init__(self, table: Tensor, counts: list[int]):
        self.table, self.counts = table, counts
        self.each = [m[0] if table.shape[1] == 1 else m for m in table.unbind(0)]

    def __call__(self, t: int) -> Tensor:
        matrix = self.each[0 if len(self.each) == 1 else t - 1]
        return matrix if matrix.dim() == 2 else first_rows(matrix, self.counts[t])


def _times(rows: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """``(n, K)`` times ``(K, K)`` or ``(n, K, K)``."""
    if matrix.dim() == 2:
        return torch.matmul(rows, matrix, out=out)
    return torch.matmul(rows[:, None], matrix, out=None if out is None else out[:, None])[:, 0]


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


def _log_forward(tables: Tables) -> tuple[Tensor, Tensor]:
    """``(T, B, K)`` log filtered and ``(T, B)`` log evidence by step, in a loop that can be differentiated twice."""
    log_initial, log_transition, log_emission, counts = tables
    batch = counts[0]
    matrix = _Matrices(log_transition, counts)
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
    later = torch.where(_running(tables)[1:, :, None, None], later, identity)
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
    return joint - torch.where(dead, 0.0, norm)[..., None], torch.where(_running(tables), by_step, 0.0)


def _log_backward_scan(tables: Tables) -> Tensor:
    """``(T, B, K)`` log density of the frames after each step given its state."""
    later = _elements(tables)[1:].transpose(-1, -2).flip(0)
    last = torch.zeros_like(tables.log_emission[0])[:, None].expand(-1, tables.log_emission.shape[-1], -1)
    return _prefixes(torch.cat([last[None], later])).flip(0)


def _running(tables: Tables) -> Tensor:
    """``(T, B)`` booleans."""
    counts = torch.tensor(tables.counts, device=tables.log_emission.device)
    return torch.arange(tables.counts[0], device=counts.device) < counts[:, None]


def _select(tables: Tables, index: Tensor) -> Tables:
    """Some of the sequences, in increasing order."""
    log_initial, log_transition, log_emission, counts = tables
    fewer = [int((index < n).sum()) for n in counts]
    return Tables(log_initial if len(log_initial) == 1 else log_initial[index],
                  log_transition if log_transition.shape[1] == 1 else log_transition[:, index],
                  log_emission[:, index], fewer)


def log_evidence(tables: Tables) -> Tensor:
    """``(B,)``, in packed order, differentiable in the tables."""
    return _Evidence.apply(*tables)


class _Evidence(torch.autograd.Function):
    """Its gradient is the expected number of times each entry of a table is used (Fisher's identity), from one backward
    pass: nothing of the loop is kept, and no logarithm of zero is differentiated."""

    @staticmethod
    def forward(ctx: Any, log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(log_initial, log_transition, log_emission)
        ctx.passes = Passes(Tables(log_initial, log_transition, log_emission, counts))
        return ctx.passes.by_step.sum(0)

    @staticmethod
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of the derivative is asked for
            evidence = _log_forward(Tables(*inputs, ctx.counts))[1].sum(0)
            wanted = [v for v, needed in zip(inputs, ctx.needs_input_grad) if needed]
            found = iter(torch.autograd.grad(evidence, wanted, weights, create_graph=True, allow_unused=True))
            return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None)
        passes = ctx.passes
        possible = passes.by_step.sum(0) > -torch.inf
        emission = torch.where(possible[:, None], passes.smooth(), 0.0) * weights[:, None]
        initial = emission[0] if len(inputs[0]) > 1 or emission.shape[1] == 1 else emission[0].sum(0, keepdim=True)
        transition = passes.transition_counts(torch.where(possible, weights, 0.0)) if ctx.needs_input_grad[1] else None
        return initial, transition, emission, None


def viterbi(tables: Tables) -> tuple[Tensor, Tensor]:
    """The most probable path ``(T, B)`` and its joint log probability ``(B,)``; of equals, the state with the lowest index,
    the last step first.

    Source: Viterbi, *Error bounds for convolutional codes and an asymptotically optimum decoding algorithm*, 1967.
    """
    log_initial, log_transition, log_emission, counts = tables
    steps, batch, _ = log_emission.shape
    matrix = _Matrices(log_transition, counts)
    best = log_initial + log_emission[0]
    back = []
    for t in range(1, steps):
        n = counts[t]
        found, origin = (first_rows(best, n)[..., None] + matrix(t)).max(-2)
        found = found + first_rows(log_emission[t], n)
        best = found if n == batch else torch.cat([found, best[n:]])
        back.append(origin)
    log_prob, state = best.max(-1)
    path = state.new_zeros(steps, batch)
    path[-1, :counts[-1]] = state[:counts[-1]]
    for t in reversed(range(steps - 1)):
        n, running = counts[t + 1], counts[t]
        path[t, :n] = back[t].gather(-1, path[t + 1, :n, None])[:, 0]
        path[t, n:running] = state[n:running]
    return path, log_prob


def sample_paths(passes: Passes, num_samples: int) -> Tensor:
    """``(S, T, B)`` draws of the states given all data: forward filtering, backward sampling.

    Source: Scott, *Bayesian Methods for Hidden Markov Models*, 2002.
    """
    tables = passes.tables
    steps, batch, _ = tables.log_emission.shape
    log_filtered = passes.log_filtered
    matrix = _Matrices(tables.log_transition, tables.counts)
    out = torch.zeros(num_samples, steps, batch, dtype=torch.long, device=log_filtered.device)
    for t in reversed(range(steps)):
        running, n = tables.counts[t], tables.counts[t + 1] if t + 1 < steps else 0
        logits = log_filtered[t, :running].expand(num_samples, -1, -1)
        if n:
            into = matrix(t + 1).transpose(-1, -2)
            after = out[:, t + 1, :n]
            kernel = into[after] if into.dim() == 2 else into[torch.arange(n, device=after.device), after]
            logits = torch.cat([logits[:, :n] + kernel, logits[:, n:]], 1)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        out[:, t, :running] = torch.multinomial(weights.flatten(0, 1), 1).reshape(num_samples, running)
    return out
