"""Recursions of linear-Gaussian models, on matrices.

Each step is a joint Gaussian of u = (state before, latents, data) given the state before, and an affine map to the state
after (:class:`~pyro_seq.infer.linear.LinearStep`). The forward pass needs no more of it than the joint of (state after,
data). Covariances and gains do not depend on the data, only on which of it is missing: they are computed once for all
sequences with the same gaps, and no more once they stand still. What is left is a linear recursion for the means.

A diffuse first state is carried as further columns of the mean, its coefficients; what the data says of them is a Gaussian
likelihood, and the limit of an infinite prior variance is taken in closed form (Rosenberg, *Random coefficients models*,
1973; de Jong, *The diffuse Kalman filter*, 1991).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_seq.infer.linear import LinearStep

__all__ = ["Backward", "Carry", "Forward", "Joint", "StepJoint"]

_LOG_2PI = math.log(2 * math.pi)


class StepJoint(NamedTuple):
    """(state after, data) given the state before: leading dimensions ``(T or 1, B or 1)``, ``S' + X`` rows."""

    matrix: Tensor
    offset: Tensor
    noise: Tensor
    flat: Tensor
    """``(S' + X, d)``"""

    @classmethod
    def of(cls, step: LinearStep, dtype: torch.dtype) -> StepJoint:
        pick = torch.eye(step.carry.shape[-2], dtype=step.carry.dtype, device=step.carry.device)[step.observed]
        rows = torch.cat([step.next_matrix, pick.expand(*step.next_matrix.shape[:-2], *pick.shape)], -2)
        offset = (rows @ step.drift[..., None])[..., 0]
        after = step.next_matrix.shape[-2]
        offset = torch.cat([offset[..., :after] + step.next_offset, offset[..., after:]], -1)
        parts = (rows @ step.carry, offset, rows @ step.noise @ rows.mT, rows[0, 0] @ step.diffuse)
        return cls(*(part.to(dtype) for part in parts))


class Gains:
    """What does not depend on the data's values: covariances and gains of ``n <= T`` frames, the last one standing for the
    rest. ``G`` is 1, or ``B``.

    :param present: ``(G, T, X)`` booleans.
    :param covariance: of the state before the first of the frames.
    :param rooted: carry a square root (covariance = root @ root.mT), which stays positive in single precision.
    """

    def __init__(self, joints: list[tuple[StepJoint, int]], present: Tensor, covariance: Tensor, rooted: bool):
        self.covariances: list[Tensor] = []
        self.gains: list[Tensor] = []
        self.factors: list[Tensor] = []
        self.rooted, self.last = rooted, covariance
        """The covariance after the last frame; its square root if ``rooted``."""
        whole, t = bool(present.all()), 0
        for joint, count in joints:
            fixed = joint.matrix.shape[0] == 1
            noise, condition = (_roots(joint.noise), _condition_root) if rooted else (joint.noise, _condition)
            for i in range(count):
                at = 0 if fixed else i
                self.last, gain, factor = condition(joint.matrix[at], noise[at], self.last, present[:, t], whole)
                self.covariances.append(self.last @ self.last.mT if rooted else self.last)
                self.gains.append(gain)
                self.factors.append(factor)
                t += 1
                if fixed and whole and i % 8 == 7 and _still(*self.covariances[-2:]):
                    t += count - i - 1
                    break
        self.n = len(self.gains)
        self.index = torch.arange(t, device=present.device).clamp(max=self.n - 1)

    def stacked(self, values: list[Tensor]) -> Tensor:
        """``(T, G, ...)``"""
        if values[0].shape != values[-1].shape:  # groups that differ from the second frame on
            values = [value.expand(values[-1].shape) for value in values]
        found = torch.stack(values)
        return found if len(self.index) == self.n else found[self.index]


def _still(last: Tensor, now: Tensor) -> bool:
    """Whether a covariance has stopped moving, but for rounding."""
    if last.shape != now.shape:
        return False
    size = now.detach().diagonal(dim1=-2, dim2=-1).abs().clamp(min=torch.finfo(now.dtype).tiny).sqrt()
    return bool(((now - last).detach().abs() <= 4 * torch.finfo(now.dtype).eps * size[..., :, None] * size[..., None, :]).all())


def _condition(matrix: Tensor, noise: Tensor, covariance: Tensor, present: Tensor, whole: bool
               ) -> tuple[Tensor, Tensor, Tensor]:
    """One frame: covariance of the state after given the data, gain ``(G, S', X)``, Cholesky factor of the data's covariance.

    Joseph's form: [I, -K] J [I, -K]' of the joint covariance J is positive whatever the rounding of K.
    """
    after = matrix.shape[-2] - present.shape[-1]
    joint = matrix @ covariance @ matrix.mT + noise
    cross, own = joint[..., :after, after:], joint[..., after:, after:]
    if not whole:
        cross = torch.where(present[:, None, :], cross, 0.0)
        own = torch.where(present[:, :, None] & present[:, None, :], own, torch.diag_embed((~present).to(own)))
    factor = _factor(own)
    gain = torch.cholesky_solve(cross.mT, factor).mT
    keep = torch.cat([torch.eye(after, dtype=gain.dtype, device=gain.device).expand(*gain.shape[:-2], after, after), -gain], -1)
    found = keep @ joint @ keep.mT
    return 0.5 * (found + found.mT), gain, factor


def _factor(own: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(own)
    if failed.any() or not (factor.detach().diagonal(dim1=-2, dim2=-1) > 0).all():
        raise ValueError("the data has a singular predictive covariance: some combination of its entries is predicted "
                         "without noise; give the emission a positive scale" if own.isfinite().all() else
                         "a predictive covariance is NaN or infinite: the model's state grows beyond all bounds")
    return factor


def _roots(noise: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(noise.double())
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]).to(noise.dtype)


def _condition_root(matrix: Tensor, noise: Tensor, root: Tensor, present: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same by an orthogonal transformation of square roots: the array algorithm of Kailath, Sayed and Hassibi, *Linear
    Estimation*, 2000, chapter 12."""
    after = matrix.shape[-2] - present.shape[-1]
    groups = max(len(root), len(matrix), len(present))
    array = torch.cat([(matrix @ root).expand(groups, -1, -1), noise.expand(groups, -1, -1)], -1)
    data = array[:, after:]
    if not whole:
        data = torch.where(present[..., None], data, 0.0)
        unit = torch.diag_embed((~present).to(data)).expand(groups, -1, -1)
        data = torch.cat([data, unit], -1)
        array = torch.cat([array, array.new_zeros(groups, array.shape[1], unit.shape[-1])], -1)
    lower = torch.linalg.qr(torch.cat([data, array[:, :after]], -2).mT, mode="r").R.mT
    width = present.shape[-1]
    factor = lower[:, :width, :width]
    sign = torch.where(factor.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(factor)[:, None]
    factor, cross = factor * sign, lower[:, width:, :width] * sign
    if not (factor.diagonal(dim1=-2, dim2=-1) > 0).all():
        _factor(torch.full_like(factor, torch.nan) if not factor.isfinite().all() else torch.zeros_like(factor))
    gain = torch.linalg.solve_triangular(factor, cross, upper=False, left=False)
    return lower[:, width:, width:width + after], gain, factor



class Carry(NamedTuple):
    """What one frame hands to the next: the state after it, given the data so far."""

    mean: Tensor
    """``(B, S)``, for diffuse coefficients of zero."""
    columns: Tensor
    """``(B or 1, S, d)``: what each diffuse coefficient adds to the mean."""
    covariance: Tensor
    """``(B or 1, S, S)``; its square root in single precision."""
    precision: Tensor
    """``(B or 1, d, d)`` of the diffuse coefficients, given the data so far."""
    score: Tensor
    """``(B, d)``: that precision times their mean."""
    evidence: Tensor
    """``(B,)`` log density of the data so far, for diffuse coefficients of zero."""

    @classmethod
    def start(cls, mean: Tensor, diffuse: int) -> Carry:
        """A known state."""
        size = mean.shape[-1]
        return cls(mean, mean.new_zeros(1, size, diffuse), mean.new_zeros(1, size, size),
                   mean.new_zeros(1, diffuse, diffuse), mean.new_zeros(len(mean), diffuse), mean.new_zeros(len(mean)))


def _rows(values: Tensor, matrix: Tensor) -> Tensor:
    """``(T, B, n, I)`` times the transpose of ``(T or 1, B or 1, O, I)``: ``(T, B, n, O)``."""
    if matrix.shape[-1] == 1:  # a product of numbers, for which matmul is slow
        return values * matrix[..., 0][:, :, None]
    if matrix.shape[1] == 1:
        return (values.flatten(1, 2) @ matrix[:, 0].mT).unflatten(1, values.shape[1:3])
    return values @ matrix.mT


def _recursion(matrices: Tensor, start: Tensor, pushes: Tensor) -> list[Tensor]:
    """m_t = push_t + matrix_t m_{t-1}, on rows: ``(T, B or 1, O, I)``, ``(B, n, I)`` and ``(T, B, n, O)``."""
    found, value = [], start
    if matrices.shape[1] == 1:
        value = value.flatten(0, 1)
        for matrix, push in zip(matrices[:, 0].mT.unbind(0), pushes.flatten(1, 2).unbind(0), strict=True):
            value = torch.addmm(push, value, matrix)
            found.append(value)
        return [value.unflatten(0, start.shape[:2]) for value in found]
    for matrix, push in zip(matrices.mT.unbind(0), pushes.unbind(0), strict=True):
        value = torch.baddbmm(push, value, matrix)
        found.append(value)
    return found


class Stretch(NamedTuple):
    """The frames of one part (the first of a sequence, or all later ones), ready for the recursions."""

    step: LinearStep
    joint: StepJoint
    where: slice
    """Its frames."""
    closed: Tensor
    """``(T, G, S', S)``: state after on state before, the data given."""
    seen: Tensor
    """``(T, G or 1, X, S)``: data on state before."""


class Means(NamedTuple):
    """What depends on the data's values, for ``n`` data sets at once (and, for columns, for each diffuse coefficient)."""

    before: list[Tensor]
    """A stretch each: ``(T, B, n, S)`` of the state before each frame given the data before it."""
    residuals: Tensor
    """``(T, B, n, X)``: the data less its prediction, zero where missing."""
    last: Tensor
    """``(B, n, S')`` of the state after the last frame given all data."""

    @property
    def after(self) -> Tensor:
        """``(T, B, n, S')`` of the state after each frame given the data so far."""
        ends = [*(part[:1] for part in self.before[1:]), self.last[None]]
        parts = [torch.cat([part[1:], end]) if len(part) > 1 else end for part, end in zip(self.before, ends, strict=True)]
        return torch.cat(parts)


class Forward:
    """The filter over a stretch of frames.

    :param first: the step of the sequence's first frame, where the frames begin with it.
    :param later: the steps of the other frames.
    :param data: ``(B, T, X)``, NaN where missing.
    :param active: ``(B, T)``: the frames inside each sequence.
    :param alone: let covariances past a sequence's end be its own, as smoothing needs; otherwise they are shared.
    """

    def __init__(self, first: LinearStep | None, later: LinearStep | None, data: Tensor, active: Tensor, carry: Carry,
                 alone: bool):
        batch, steps = active.shape
        parts = [(step, count) for step, count in ((first, 1), (later, steps - (first is not None)))
                 if step is not None and count]
        joints = [(StepJoint.of(step, data.dtype), count) for step, count in parts]
        self.active, self.carry = active, carry
        self.whole = not bool(data.isnan().any())  # what lies past an end is NaN
        self.present = (torch.ones_like(data[:1, :1], dtype=torch.bool).expand(data.shape) if self.whole else
                        ~data.isnan()).transpose(0, 1)  # (T, B, X)
        self.data = data.transpose(0, 1) if self.whole else torch.where(self.present, data.transpose(0, 1), 0.0)
        patterns = self.present.transpose(0, 1)
        if not alone:
            patterns = patterns | ~active[..., None]
        each = max(len(carry.covariance), *(joint.noise.shape[1] for joint, _ in joints))
        self.group = None
        if each == 1 and (self.whole or bool((patterns == patterns[:1]).all())):
            patterns = patterns[:1]
        elif each == 1:
            patterns, self.group = patterns.unique(dim=0, return_inverse=True)
            if len(patterns) == batch:
                patterns, self.group = patterns[self.group], None
        rooted = data.dtype == torch.float32 and not torch.is_grad_enabled()
        self.gains = Gains(joints, patterns, carry.covariance, rooted)
        self.gain, factor = (self._each(self.gains.stacked(v)) for v in (self.gains.gains, self.gains.factors))
        self.log_scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        self.whiten = torch.linalg.solve_triangular(factor, eye.expand(factor.shape), upper=False)
        self.stretches, at = [], 0
        for (step, count), (joint, _) in zip(parts, joints, strict=True):
            where = slice(at, at + count)
            after = joint.matrix.shape[-2] - data.shape[-1]
            closed = joint.matrix[..., :after, :] - self.gain[where] @ joint.matrix[..., after:, :]
            seen = joint.matrix[..., after:, :].expand(count, -1, -1, -1)
            self.stretches.append(Stretch(step, joint, where, closed, seen))
            at += count
        self.means = self.filter(self.data[:, :, None])

    def _each(self, value: Tensor, dim: int = 1) -> Tensor:
        """Values of each group of sequences as values of each sequence."""
        return value if self.group is None else value.index_select(dim, self.group)

    def filter(self, data: Tensor, centred: bool = False) -> Means:
        """Means for the ``n`` data sets ``(T, B, n, X)``, of the model without its offsets if ``centred``."""
        start = self.carry.mean[:, None].expand(-1, data.shape[2], -1)
        return self._filter(data, start * 0.0 if centred else start, self.present[:, :, None], 0.0 if centred else 1.0)

    def covariances_before(self) -> list[Tensor]:
        """A stretch each, ``(T, G, S, S)``: of the state before each frame given the data before it."""
        start = self.carry.covariance @ self.carry.covariance.mT if self.gains.rooted else self.carry.covariance
        after = self._each(self.gains.stacked(self.gains.covariances))
        found = []
        for stretch in self.stretches:
            here = after[stretch.where]
            found.append(torch.cat([start.expand(here.shape[1], -1, -1)[None], here[:-1]]) if len(here) > 1 else
                         start.expand(here.shape[1], -1, -1)[None])
            start = here[-1]
        return found

    @cached_property
    def columns(self) -> Means:
        """What each diffuse coefficient adds to the means; ``residuals`` are what it takes from them, with a minus."""
        width, flat = self.num_diffuse, self.stretches[0].joint.flat.mT
        flat = flat if len(flat) else flat.new_zeros(width, flat.shape[-1])  # of later frames
        zeros = self.data.new_zeros(len(self.data), self.gain.shape[1], width, self.data.shape[-1])
        present = self.present if self.gain.shape[1] > 1 else self.present.any(1, keepdim=True)
        return self._filter(zeros, self.carry.columns.mT.expand(self.gain.shape[1], -1, -1), present[:, :, None], 0.0, flat)

    def _filter(self, data: Tensor, start: Tensor, present: Tensor, offsets: float, flat: Tensor | None = None) -> Means:
        before, residuals, value = [], [], start
        for stretch in self.stretches:
            joint, gain, after = stretch.joint, self.gain[stretch.where], stretch.closed.shape[-2]
            offset = joint.offset[:, :, None] * offsets
            if flat is not None and stretch is self.stretches[0]:
                offset = flat
            moved, predicted = offset[..., :after], offset[..., after:]
            here = data[stretch.where] - predicted
            push = _rows(here, gain) + moved
            found = _recursion(stretch.closed, value, push)
            before.append(torch.stack([value, *found[:-1]]))
            value = found[-1]
            rest = here - _rows(before[-1], stretch.seen)
            residuals.append(rest if self.whole else torch.where(present[stretch.where], rest, 0.0))
        return Means(before, torch.cat(residuals), value)

    @cached_property
    def whitened(self) -> Tensor:
        """``(T, B, X)``"""
        return _rows(self.means.residuals, self.whiten)[:, :, 0]

    @cached_property
    def base(self) -> Tensor:
        """``(B, T)`` log density of each frame given the ones before, for diffuse coefficients of zero."""
        if self.whole:
            constant, scale = _LOG_2PI * self.data.shape[-1], self.log_scale
        else:
            constant, scale = _LOG_2PI * self.present.sum(-1), torch.where(self.present.any(-1), self.log_scale, 0.0)
        squares = self.whitened.square()
        squares = squares[..., 0] if squares.shape[-1] == 1 else squares.sum(-1)
        return (-0.5 * squares - (0.5 * constant + scale)).mT

    @property
    def num_diffuse(self) -> int:
        return self.carry.columns.shape[-1]

    @cached_property
    def diffuse(self) -> tuple[Tensor, Tensor]:
        """Precision ``(T, B or 1, d, d)`` and score ``(T, B, d)`` of the diffuse coefficients given the frames so far."""
        precision = (self.effect @ self.effect.mT).cumsum(0) + self.carry.precision
        score = (self.effect @ self.whitened[..., None])[..., 0].cumsum(0) + self.carry.score
        return precision, score

    @cached_property
    def at_end(self) -> tuple[Tensor, Tensor]:
        """Mean ``(B, d)`` and Cholesky factor of the precision ``(B or 1, d, d)`` of the diffuse coefficients given all data.

        :raises ValueError: if the data does not say what they are.
        """
        factor, known = identified(self.at_last(self.diffuse[0]))
        if not known.all():
            raise ValueError(f"sequence {int((~known).nonzero()[0])} does not identify the diffuse (ImproperUniform) latents "
                             "of the first step: it has too few observed frames for the number of their entries; give them a "
                             "proper distribution")
        return self.diffuse_mean(self.means)[:, 0], factor

    def diffuse_mean(self, means: Means) -> Tensor:
        """``(B, n, d)`` given all data of each data set."""
        factor, _ = identified(self.at_last(self.diffuse[0]))
        score = (_rows(means.residuals, self.whiten) @ self.effect.mT).sum(0) + self.carry.score[:, None]
        return torch.cholesky_solve(score.mT, factor).mT

    def at_last(self, value: Tensor) -> Tensor:
        """Of ``(T, B or 1, ...)``, each sequence's last frame."""
        row = torch.arange(len(self.active), device=self.active.device)
        return value[self.active.sum(1) - 1, row if value.shape[1] > 1 else 0]

    @cached_property
    def effect(self) -> Tensor:
        """``(T, B or 1, d, X)`` of the diffuse coefficients on the data, whitened."""
        return -_rows(self.columns.residuals, self.whiten)

    def evidence(self) -> Tensor:
        """``(B,)``"""
        total = self.base.sum(1)
        return total + self._of_diffuse(*self.at_end) if self.num_diffuse else total

    def _of_diffuse(self, mean: Tensor, factor: Tensor) -> Tensor:
        """What integrating the diffuse coefficients out adds to the log evidence."""
        half = (factor.mT @ mean[..., None])[..., 0]
        return 0.5 * half.square().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def evidence_by_step(self) -> Tensor:
        """``(B, T)``; the frames that go to identify a diffuse state count with the one after which it is identified."""
        base = self.base
        if not self.num_diffuse:
            return base
        precision, score = (torch.cat([first.expand(1, *now.shape[1:]), now]) for first, now in zip(
            (self.carry.precision, self.carry.score), self.diffuse, strict=True))
        factor, known = identified(precision)
        mean = torch.cholesky_solve(score[..., None], factor)[..., 0]
        total = self.carry.evidence[:, None] + torch.cat([torch.zeros_like(base[:, :1]), base.cumsum(1)], 1)
        total = torch.where(known.mT, total + self._of_diffuse(mean, factor).mT, 0.0)
        return torch.where(self.active, total.diff(dim=1), 0.0)

    def predicted(self) -> tuple[Tensor, Tensor]:
        """Mean ``(T, B, X)`` and variance ``(T, B or 1, X)`` of each frame given the ones before it."""
        means, variances, effects = [], [], []
        for i, (stretch, before) in enumerate(zip(self.stretches, self.covariances_before(), strict=True)):
            joint, after = stretch.joint, stretch.closed.shape[-2]
            mean = _rows(self.means.before[i], stretch.seen)[:, :, 0] + joint.offset[..., after:]
            covariance = stretch.seen @ before @ stretch.seen.mT + joint.noise[..., after:, after:]
            if self.num_diffuse:
                effect = _rows(self.columns.before[i], stretch.seen)
                effects.append(effect + joint.flat[after:].mT if i == 0 and joint.flat.shape[-1] else effect)
            means.append(mean)
            variances.append(covariance)
        mean, variance = torch.cat(means), torch.cat(variances)
        if self.num_diffuse:
            precision, score = (torch.cat([start.expand(1, *now.shape[1:]), now[:-1]]) for start, now in zip(
                (self.carry.precision, self.carry.score), self.diffuse, strict=True))
            mean, variance = add_diffuse(precision, score, torch.cat(effects), mean, variance)
        return mean, variance.diagonal(dim1=-2, dim2=-1)

    def last_state(self) -> tuple[Tensor, Tensor]:
        """Mean ``(B, S)`` and covariance ``(B, S, S)`` of the state after each sequence's last frame."""
        mean = self.at_last(self.means.after[:, :, 0])
        covariance = self.at_last(self._each(self.gains.stacked(self.gains.covariances))).expand(len(mean), -1, -1)
        if self.num_diffuse:
            precision, score = (self.at_last(v) for v in self.diffuse)
            effect = self.at_last(self.columns.after)
            return add_diffuse(precision, score, effect, mean, covariance)
        return mean, covariance

    def carried(self) -> Carry:
        """What the next frame begins with."""
        columns = self.columns.last.mT if self.num_diffuse else self.carry.columns[:1, :0].new_zeros(
            1, self.means.last.shape[-1], 0)
        precision, score = (v[-1] for v in self.diffuse) if self.num_diffuse else (self.carry.precision, self.carry.score)
        return Carry(self.means.last[:, 0], columns, self._each(self.gains.last, 0), precision, score,
                     self.carry.evidence + self.base.sum(1))


def identified(precision: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of a precision, where it is not singular (the identity otherwise), and where that is."""
    factor, failed = torch.linalg.cholesky_ex(precision)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square() / precision.detach().diagonal(dim1=-2, dim2=-1).clamp(
        min=torch.finfo(precision.dtype).tiny)
    known = (failed == 0) & (pivots > 1e3 * torch.finfo(precision.dtype).eps).all(-1)
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    if not known.all():  # the factor of a singular matrix has no gradient
        factor = torch.linalg.cholesky(torch.where(known[..., None, None], precision, eye))
    return factor, known


class Joint(NamedTuple):
    """Moments of u, the joint vector of each frame, for the ``T`` frames of one stretch."""

    filtered_mean: Tensor
    """``(T, B, D)``"""
    filtered_covariance: Tensor
    """``(T, B or 1, D, D)``; infinite variances where the data so far does not identify a diffuse state."""
    smoothed_mean: Tensor
    smoothed_covariance: Tensor


class Backward:
    """The smoother: moments of every u given all data.

    The recursion is for the derivatives of the log density of the frames to come (Bryson and Frazier, *Smoothing for linear
    and nonlinear dynamic systems*, 1963; Durbin and Koopman, 2012, section 4.4). It inverts no covariance of the state, so
    singular ones will do, and gives what Rauch, Tung and Striebel's (1965) gives.

    :param forward: a filter with ``alone=True``.
    """

    def __init__(self, forward: Forward):
        self.forward = f = forward
        self.covariance: list[Tensor] = []
        """A stretch each, ``(T, G, D, D)``: of u given the data so far, and a diffuse state."""
        self.gain: list[Tensor] = []
        """``(T, G, D, X)``"""
        self.keep: list[Tensor] = []
        """``(T, G, D, D)``: I - gain @ (rows of the data)."""
        self.information: list[Tensor] = []
        """``(T, G, S', S')``: precision of the frames to come, about the state after each frame."""
        present = f.present if f.gain.shape[1] > 1 else f.present.any(1, keepdim=True)
        for stretch, before in zip(f.stretches, f.covariances_before(), strict=True):
            carry, noise = stretch.step.carry.to(before.dtype), stretch.step.noise.to(before.dtype)
            joint = carry @ before @ carry.mT + noise
            whiten, data = f.whiten[stretch.where], stretch.step.observed
            cross = torch.where(present[stretch.where][:, :, None], joint[..., data], 0.0)
            gain = cross @ whiten.mT @ whiten
            keep = torch.eye(joint.shape[-1], dtype=joint.dtype, device=joint.device).repeat(*gain.shape[:2], 1, 1)
            keep[..., data] -= gain
            self.gain.append(gain)
            self.keep.append(keep)
            self.covariance.append(keep @ joint @ keep.mT)
        value = f.whiten.new_zeros(f.whiten.shape[1], *(f.means.last.shape[-1],) * 2)
        for stretch in reversed(f.stretches):
            seen = torch.where(present[stretch.where][..., None], f.whiten[stretch.where] @ stretch.seen, 0.0)
            own, found = seen.mT @ seen, []
            for here, closed in zip(own.flip(0).unbind(0), stretch.closed.flip(0).unbind(0), strict=True):
                found.append(value)
                value = here + closed.mT @ value @ closed
            self.information.insert(0, torch.stack(found[::-1]))

    def adjoints(self, means: Means) -> list[Tensor]:
        """A stretch each, ``(T, B, n, S')``: derivative of the log density of the frames to come by the state after each."""
        f, found = self.forward, []
        value = torch.zeros_like(means.last)
        weighted = _rows(_rows(means.residuals, f.whiten), f.whiten.mT)
        for stretch in reversed(f.stretches):
            push = _rows(weighted[stretch.where], stretch.seen.mT)
            values = [value, *_recursion(stretch.closed.mT.flip(0), value, push.flip(0))]
            value = values.pop()
            found.insert(0, torch.stack(values[::-1]))
        return found

    def joint_means(self, means: Means, offsets: float = 1.0, columns: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Filtered and smoothed means of u, ``(T, B, n, D)`` each, a stretch each.

        :param columns: ``means`` are those of the diffuse coefficients.
        """
        found = []
        for i, (stretch, adjoint) in enumerate(zip(self.forward.stretches, self.adjoints(means), strict=True)):
            step, count = stretch.step, len(adjoint)
            drift = step.drift.to(adjoint)[:, :, None] * offsets
            if columns and i == 0:
                drift = step.diffuse.to(adjoint).mT
            carry, next_matrix = (v.to(adjoint).expand(count, -1, -1, -1) for v in (step.carry, step.next_matrix))
            filtered = _rows(means.before[i], carry) + drift + _rows(means.residuals[stretch.where], self.gain[i])
            found.append((filtered, filtered + _rows(_rows(adjoint, next_matrix.mT), self.covariance[i])))
        return found

    @cached_property
    def columns(self) -> list[tuple[Tensor, Tensor]]:
        """What each diffuse coefficient adds to the means of u."""
        return self.joint_means(self.forward.columns, 0.0, columns=True)

    def moments(self) -> list[Joint]:
        """A stretch each."""
        f, found = self.forward, []
        for i, (means, stretch) in enumerate(zip(self.joint_means(f.means), f.stretches, strict=True)):
            covariance = self.covariance[i]
            down = stretch.step.next_matrix.to(covariance) @ covariance
            smoothed = covariance - down.mT @ self.information[i] @ down
            filtered_mean, smoothed_mean = (mean[:, :, 0] for mean in means)
            if f.num_diffuse:
                filtered, effect = self.columns[i]
                filtered_mean, covariance = self._add_diffuse(stretch, filtered, filtered_mean, covariance)
                mean, factor = f.at_end
                smoothed_mean = smoothed_mean + (mean[:, None] @ effect)[..., 0, :]
                half = torch.linalg.solve_triangular(factor, effect, upper=False)
                smoothed = smoothed + half.mT @ half
            found.append(Joint(filtered_mean, covariance, smoothed_mean, smoothed))
        return found

    def _add_diffuse(self, stretch: Stretch, effect: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        precision, score = (v[stretch.where] for v in self.forward.diffuse)
        return add_diffuse(precision, score, effect, mean, covariance)

    def draw(self, num_samples: int) -> list[Tensor]:
        """Draws of u given all data, ``(T, B, n, D)``, a stretch each.

        A path is drawn from the model, and what the data draws the mean of such a path to is put in place of what that
        path's own data does: Durbin and Koopman, *A simple and efficient simulation smoother*, 2002.
        """
        f, drawn, state = self.forward, [], None
        batch = len(f.active)
        for stretch in f.stretches:
            step, count = stretch.step, len(stretch.closed)
            carry, next_matrix, noise = (v.to(f.data) for v in (step.carry, step.next_matrix, step.noise))
            shape = (count, batch, num_samples, carry.shape[-2])
            own = _rows(torch.randn(shape, dtype=f.data.dtype, device=f.data.device), _roots(noise))
            if state is None:
                state = own.new_zeros(batch, num_samples, carry.shape[-1])
            after = _recursion((next_matrix @ carry).expand(count, -1, -1, -1), state, _rows(own, next_matrix))
            before = torch.stack([state, *after[:-1]])
            drawn.append((_rows(before, carry) + own, step.observed))
            state = after[-1]
        theirs = f.filter(torch.cat([u[..., data] for u, data in drawn]), centred=True)
        found = []
        for i, ((_, ours), (_, own)) in enumerate(zip(self.joint_means(f.means), self.joint_means(theirs, 0.0), strict=True)):
            mean = ours - own
            if f.num_diffuse:
                mean = mean + (f.diffuse_mean(f.means) - f.diffuse_mean(theirs)) @ self.columns[i][1]
            found.append(mean + drawn[i][0])
        return found

    def lag_one(self, where: list[Tensor]) -> Tensor:
        """``(T - 1, B or 1, W, W)``: covariance, given all data, of some entries of u with the same of the next frame.

        :param where: of each stretch, which entries ``(W,)``.
        """
        f, found = self.forward, []

        def pairs(i: int, j: int, now: slice, following: slice) -> Tensor:
            after = f.stretches[j].step
            next_matrix, carry, last_matrix = (
                matrix[at if len(matrix) > 1 else slice(None)].to(f.data) for matrix, at in (
                    (f.stretches[i].step.next_matrix, now), (after.carry, following), (after.next_matrix, following)))
            ahead = self.covariance[i][now] @ next_matrix.mT @ carry.mT @ self.keep[j][following].mT
            down = last_matrix @ self.covariance[j][following]
            cross = ahead - ahead @ last_matrix.mT @ self.information[j][following] @ down
            if f.num_diffuse:
                _, factor = f.at_end
                one, two = (torch.linalg.solve_triangular(factor, self.columns[k][1][at], upper=False)
                            for k, at in ((i, now), (j, following)))
                cross = cross + one.mT @ two
            return cross[..., where[i][:, None], where[j]]

        for j, stretch in enumerate(f.stretches):
            if j:
                found.append(pairs(j - 1, j, slice(-1, None), slice(0, 1)))
            if len(stretch.closed) > 1:
                found.append(pairs(j, j, slice(0, -1), slice(1, None)))
        return torch.cat(found) if found else f.data.new_zeros(0, 1, len(where[0]), len(where[0]))


def add_diffuse(precision: Tensor, score: Tensor, effect: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Moments where a diffuse state is what the data so far says it is.

    :param precision: ``(..., d, d)`` of the coefficients; singular where the data does not say, and then variances are
        infinite.
    :param score: ``(..., d)``
    :param effect: ``(..., d, D)`` of the coefficients on the mean.
    """
    scale = precision.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(precision.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(precision * scale[..., :, None] * scale[..., None, :])
    known = values > 1e3 * torch.finfo(precision.dtype).eps
    inverse = torch.where(known, 1 / torch.where(known, values, 1.0), 0.0)
    effect = scale[..., None] * effect
    half = vectors.mT @ effect
    estimate = inverse[..., None] * (vectors.mT @ (scale * score)[..., None])
    size = effect.abs().sum(-2, keepdim=True)
    infinite = (torch.where(known[..., None], 0.0, half).abs() > 1e-6 * size).any(-2)
    covariance = covariance + half.mT @ (inverse[..., None] * half)
    return mean + (half.mT @ estimate)[..., 0], covariance + torch.diag_embed(torch.where(infinite, torch.inf, 0.0))
