r"""Recursions over a batch of finite Markov chains given their tables: filter, smoother, pairs, Viterbi, sampling.

Two ways to the same numbers. *Scaled*: probabilities, normalised every few steps, so that a step is one matrix product
and one product by the emission. *Logged*: logarithms, which cannot underflow, by a loop or by a parallel scan over time.

Scaled numbers below 1e-308 are lost. Whether that matters is bounded on the way, not assumed. Emissions are divided by
their maximum over the states and the rows of A sum to at most one, so that the mass :math:`U_t(k)` which filtering has
lost in state ``k`` is at most

.. math:: U_t = (U_{t-1} A + \delta) \circ g_t + \delta, \qquad \delta = K \cdot 10^{-307},

in the units of the unnormalised forward probabilities. A sequence where it ever exceeds 1e-12 of their sum is done again
in logarithms. The smoother only redistributes what the filter has at the last step, so that the bound there is one for it
too. Where every transition has a probability above 1e-100, each predicted probability has a relative error below 1e-200
whatever was lost before, and :math:`K \delta` alone is the bound.

Source: Rabiner, *A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition*, 1989.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_seq.infer.enumerate import Tables
from pyro_seq.infer.log_chain import Logged, Matrices, is_running, log_forward
from pyro_seq.sequences import first_rows

__all__ = ["Passes", "log_evidence", "sample_paths", "viterbi"]

_TOLERANCE = 1e-12
_STRIDE = 8
_LOG_DENSE = -230.0
_SCAN_STEPS = 100
_SCAN_NUMBERS = {"cpu": 64, "cuda": 2000}
"""``B * K**2`` up to which a scan is taken. On a CPU core they break even near 100 for 500 and 5000 steps: one chain of 8
states takes half the time, one of 2 a tenth to a quarter. The number for a GPU is reckoned from what launching a kernel
costs, not measured."""


class Passes:
    """Filtered, smoothed and pairwise probabilities of a batch.

    :param scan: by a parallel scan over time or not; the faster way for the shape when omitted.
    """

    def __init__(self, tables: Tables, scan: bool | None = None):
        steps, batch, states = tables.log_emission.shape
        if scan is None:
            scan = steps > _SCAN_STEPS and batch * states**2 <= _SCAN_NUMBERS.get(tables.log_emission.device.type, 64)
        self.tables = tables
        self.main: Any = Logged(tables, True) if scan else _Scaled(tables)
        hard = torch.zeros(0, dtype=torch.long) if scan else self.main.lossy.nonzero()[:, 0]
        self.hard = hard
        self.exact = Logged(_select(tables, hard), False) if len(hard) else None
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
    """Probabilities. ``gain`` is filtered over predicted, ``back`` smoothed over filtered, or smoothed where some transitions
    are forbidden."""

    def __init__(self, tables: Tables):
        log_initial, log_transition, log_emission, counts = tables
        self.counts, self.steps = counts, len(counts)
        top = log_emission.amax(-1, keepdim=True)
        top = torch.where(top > -torch.inf, top, 0.0)
        emission = (log_emission - top).exp_()
        self.transition = Matrices(log_transition.exp(), counts)
        # Mass can stay lost only where a transition is all but forbidden.
        self.dense = bool((log_transition > _LOG_DENSE).all())
        self.filtered = torch.zeros_like(log_emission)
        self.prediction = None if self.dense else torch.zeros_like(log_emission)
        smallest = log_emission.shape[-1] * 1e-307
        losses = torch.full_like(top, smallest * log_emission.shape[-1])
        before = lost = torch.zeros_like(log_emission[0])
        predicted = log_initial.exp().expand_as(lost)
        if not self.dense:
            self.prediction[0] = predicted
        for t, (emit, now) in enumerate(zip(self._rows(emission), self._rows(self.filtered))):
            n = counts[t]
            if t:
                predicted = _times(first_rows(before, n), self.transition(t), None if self.dense else self.prediction[t, :n])
            before = torch.mul(predicted, emit, out=now)
            if not self.dense:
                lost = _times(first_rows(lost, n), self.transition(t)) if t else lost
                lost = (lost + smallest).mul_(emit).add_(smallest)
                losses[t, :n] = lost.sum(-1, keepdim=True)
            if t % _STRIDE == 0:
                norm = now.sum(-1, keepdim=True)
                before, lost = now / norm, lost if self.dense else lost / norm
        total = self.filtered.sum(-1, keepdim=True)
        entered = torch.cat([torch.ones_like(total[:1]), total[:-1]])  # the sum that each step has started from
        entered[1::_STRIDE] = 1.0
        running = is_running(tables)
        if not running.all():
            total, entered = (torch.where(running[..., None], v, 1.0) for v in (total, entered))
            emission.mul_(running[..., None])
        norms = total / entered
        self.filtered.div_(total)
        self.gain = emission.div_(norms)  # filtered over predicted
        if not self.dense:
            self.prediction.div_(entered).clamp_(min=1e-307)
        self.lossy = ~(losses / total < _TOLERANCE).all(0)[:, 0]
        self.by_step = torch.where(running, (norms.log() + top)[..., 0], 0.0)
        self.back: Tensor | None = None

    def _rows(self, value: Tensor) -> tuple[Tensor, ...] | list[Tensor]:
        rows = value.unbind(0)
        return rows if self.counts[-1] == self.counts[0] else [first_rows(v, n) for v, n in zip(rows, self.counts)]

    def forget(self, sequences: Tensor) -> None:
        """Clear what was lost of some sequences, so that it spoils no sum over the others."""
        self.filtered[:, sequences] = self.gain[:, sequences] = 0.0

    @property
    def log_filtered(self) -> Tensor:
        return self.filtered.log()

    def smooth(self) -> Tensor:
        """By taking the ratio of smoothed to predicted back through the transitions, as Rauch, Tung and Striebel do for a
        Gaussian; that gives the ratio of smoothed to filtered one step before."""
        self.back = torch.ones_like(self.filtered) if self.dense else self.filtered.clone()
        found, ratio = self._rows(self.back), self._ratio(-1)
        for t in reversed(range(self.steps - 1)):
            n = self.counts[t + 1]
            rows = first_rows(found[t], n)
            _times(first_rows(ratio, n), self.transition.transposed(t + 1), rows)
            if not self.dense:
                rows.mul_(self.filtered[t, :n])
            ratio = self._ratio(t)
        return self.filtered * self.back if self.dense else self.back

    def _ratio(self, t: int | slice) -> Tensor:
        """Smoothed over predicted. Where transitions are forbidden it may be zero over zero, and is formed from its parts."""
        return self.back[t] * self.gain[t] if self.dense else self.back[t] / self.prediction[t]

    def pairs(self) -> Tensor:
        if self.back is None:
            self.smooth()
        outer = self.filtered[:-1, :, :, None] * self._ratio(slice(1, None))[:, :, None]
        return outer.mul_(self.transition.table)

    def transition_counts(self, weights: Tensor) -> Tensor:
        if self.back is None:
            self.smooth()
        table = self.transition.table
        if self.steps == 1:
            return torch.zeros_like(table)
        weighted, ratio = self.filtered[:-1] * weights[:, None], self._ratio(slice(1, None))
        if table.shape[:2] == (1, 1):
            return table * (weighted.flatten(0, 1).T @ ratio.flatten(0, 1))
        if table.shape[1] == 1:
            return table * (weighted.transpose(-1, -2) @ ratio)[:, None]
        return table * weighted[..., None] * ratio[:, :, None]


def _times(rows: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """``(n, K)`` times ``(K, K)`` or ``(n, K, K)``."""
    if matrix.dim() == 2:
        return torch.matmul(rows, matrix, out=out)
    return torch.matmul(rows[:, None], matrix, out=None if out is None else out[:, None])[:, 0]


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
            evidence = log_forward(Tables(*inputs, ctx.counts))[1].sum(0)
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
    matrix = Matrices(log_transition, counts)
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
    matrix = Matrices(tables.log_transition, tables.counts)
    out = torch.zeros(num_samples, steps, batch, dtype=torch.long, device=log_filtered.device)
    for t in reversed(range(steps)):
        running, n = tables.counts[t], tables.counts[t + 1] if t + 1 < steps else 0
        logits = log_filtered[t, :running].expand(num_samples, -1, -1)
        if n:
            into = matrix.transposed(t + 1)
            after = out[:, t + 1, :n]
            kernel = into[after] if into.dim() == 2 else into[torch.arange(n, device=after.device), after]
            logits = torch.cat([logits[:, :n] + kernel, logits[:, n:]], 1)
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        out[:, t, :running] = torch.multinomial(weights.flatten(0, 1), 1).reshape(num_samples, running)
    return out
