"""The filter."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from pyro_seq.engine.compiled.compiler import Run
from pyro_seq.infer.linear import LinearStep
from pyro_seq.infer.linear_gaussian.diffuse import add_diffuse, identified
from pyro_seq.infer.linear_gaussian.gains import Gains
from pyro_seq.infer.linear_gaussian.steps import Carry, Means, StepJoint, Stretch, recursion, rows, shifted

__all__ = ["Forward"]

_LOG_2PI = math.log(2 * math.pi)


class Forward:
    """The filter over a stretch of frames.

    :param first: the step of the sequence's first frame, where the frames begin with it.
    :param later: the steps of the other frames.
    :param data: ``(B, T, X)``, NaN where missing.
    :param active: ``(B, T)``: the frames inside each sequence.
    :param alone: let covariances past a sequence's end be its own, as smoothing needs; otherwise they are shared.
    :param run: what compiles the recursions.
    """

    def __init__(self, first: LinearStep | None, later: LinearStep | None, data: Tensor, active: Tensor, carry: Carry,
                 alone: bool, run: Run | None = None):
        batch, steps = active.shape
        parts = [(step, count) for step, count in ((first, 1), (later, steps - (first is not None)))
                 if step is not None and count]
        joints = [(StepJoint.of(step, data.dtype), count) for step, count in parts]
        self.active, self.carry, self.run = active, carry, run
        self.whole = bool(data.sum().isfinite()) or not data.isnan().any()  # what lies past an end is NaN
        self.present = (torch.ones_like(data[:1, :1], dtype=torch.bool).expand(data.shape) if self.whole else
                        ~data.isnan()).transpose(0, 1)  # (T, B, X)
        self.data = data.transpose(0, 1).contiguous() if self.whole else torch.where(self.present, data.transpose(0, 1), 0.0)
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
        self.gains = Gains(joints, patterns, carry.covariance, rooted, run)
        self.gain, factor = (self._each(self.gains.stacked(v)) for v in (self.gains.gain, self.gains.factor))
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
        after, residuals, value = [], [], start
        for stretch in self.stretches:
            joint, gain, width = stretch.joint, self.gain[stretch.where], stretch.closed.shape[-2]
            offset = joint.offset[:, :, None] * offsets
            if flat is not None and stretch is self.stretches[0]:
                offset = flat
            here = data[stretch.where] - offset[..., width:]
            found = recursion(stretch.closed, value, rows(here, gain).add_(offset[..., :width]))
            rest = here - rows(shifted(value, found), stretch.seen)
            residuals.append(rest if self.whole else torch.where(present[stretch.where], rest, 0.0))
            after.append(found)
            value = found[-1]
        return Means(start, after, torch.cat(residuals))

    @cached_property
    def whitened(self) -> Tensor:
        """``(T, B, X)``"""
        return rows(self.means.residuals, self.whiten)[:, :, 0]

    @cached_property
    def base(self) -> Tensor:
        """``(B, T)`` log density of each frame given the ones before, for diffuse coefficients of zero."""
        squares = self.whitened.square()
        squares = squares[..., 0] if squares.shape[-1] == 1 else squares.sum(-1)
        return self.scales - 0.5 * squares.mT

    @cached_property
    def scales(self) -> Tensor:
        """``(B, T)``: the part of that which does not depend on the data's values."""
        if self.whole:
            found = 0.5 * _LOG_2PI * self.data.shape[-1] + self.log_scale
            return -found.expand(self.data.shape[:2]).mT
        return -(0.5 * _LOG_2PI * self.present.sum(-1) + torch.where(self.present.any(-1), self.log_scale, 0.0)).mT

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
        factor, known = identified(self.at_last(self.diffuse[0]), self.carry.proper)
        if not known.all():
            raise ValueError(f"sequence {int((~known).nonzero()[0])} does not identify the diffuse (ImproperUniform) latents "
                             "of the first step: it has too few observed frames for the number of their entries, or no frame "
                             "depends on one of them; give them a proper distribution")
        return self.diffuse_mean(self.means)[:, 0], factor

    def diffuse_mean(self, means: Means) -> Tensor:
        """``(B, n, d)`` given all data of each data set."""
        factor, _ = identified(self.at_last(self.diffuse[0]), self.carry.proper)
        score = (rows(means.residuals, self.whiten) @ self.effect.mT).sum(0) + self.carry.score[:, None]
        return torch.cholesky_solve(score.mT, factor).mT

    def at_last(self, value: Tensor) -> Tensor:
        """Of ``(T, B or 1, ...)``, each sequence's last frame."""
        row = torch.arange(len(self.active), device=self.active.device)
        return value[self.active.sum(1) - 1, row if value.shape[1] > 1 else 0]

    @cached_property
    def effect(self) -> Tensor:
        """``(T, B or 1, d, X)`` of the diffuse coefficients on the data, whitened."""
        return -rows(self.columns.residuals, self.whiten)

    def evidence(self) -> Tensor:
        """``(B,)``"""
        if not self.num_diffuse:
            return self.scales.sum(1) - 0.5 * self.whitened.square().sum((0, 2))
        # The squares are of what the coefficients leave of the data: those of the data itself, less what the coefficients
        # explain of them, would lose the digits that the two have in common.
        mean, factor = self.at_end
        left = self.whitened - (mean[:, None] @ self.effect)[..., 0, :]
        squares = torch.where(self.active.T[..., None], left, 0.0).square().sum((0, 2))
        prior = ((mean[:, None] @ self.carry.precision)[:, 0] - 2 * self.carry.score) * mean
        return self.scales.sum(1) - 0.5 * (squares + prior.sum(-1)) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

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
        factor, known = identified(precision, self.carry.proper)
        mean = torch.cholesky_solve(score[..., None], factor)[..., 0]
        total = self.carry.evidence[:, None] + torch.cat([torch.zeros_like(base[:, :1]), base.cumsum(1)], 1)
        total = torch.where(known.mT, total + self._of_diffuse(mean, factor).mT, 0.0)
        return torch.where(self.active, total.diff(dim=1), 0.0)

    def predicted(self) -> tuple[Tensor, Tensor]:
        """Mean ``(T, B, X)`` and variance ``(T, B or 1, X)`` of each frame given the ones before it."""
        means, variances, effects = [], [], []
        for i, (stretch, before) in enumerate(zip(self.stretches, self.covariances_before(), strict=True)):
            joint, after = stretch.joint, stretch.closed.shape[-2]
            mean = rows(self.means.before(i), stretch.seen)[:, :, 0] + joint.offset[..., after:]
            covariance = stretch.seen @ before @ stretch.seen.mT + joint.noise[..., after:, after:]
            if self.num_diffuse:
                effect = rows(self.columns.before(i), stretch.seen)
                effects.append(effect + joint.flat[after:].mT if i == 0 and joint.flat.shape[-1] else effect)
            means.append(mean)
            variances.append(covariance)
        mean, variance = torch.cat(means), torch.cat(variances)
        if self.num_diffuse:
            precision, score = (torch.cat([start.expand(1, *now.shape[1:]), now[:-1]]) for start, now in zip(
                (self.carry.precision, self.carry.score), self.diffuse, strict=True))
            mean, variance = add_diffuse(precision, score, torch.cat(effects), mean, variance, self.carry.proper)
        return mean, variance.diagonal(dim1=-2, dim2=-1)

    def last_state(self) -> tuple[Tensor, Tensor]:
        """Mean ``(B, S)`` and covariance ``(B, S, S)`` of the state after each sequence's last frame."""
        mean = self.at_last(torch.cat(self.means.after)[:, :, 0])
        covariance = self.at_last(self._each(self.gains.stacked(self.gains.covariances))).expand(len(mean), -1, -1)
        if self.num_diffuse:
            precision, score = (self.at_last(v) for v in self.diffuse)
            effect = self.at_last(torch.cat(self.columns.after))
            return add_diffuse(precision, score, effect, mean, covariance, self.carry.proper)
        return mean, covariance

    def some_states(self, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Points about the filtered states ``(n, S)`` that frames of the last stretch begin from, two standard deviations off,
        and those frames, numbered within it, and their sequences, ``(n,)`` each. None if no sequence has such a frame.

        Not under ``no_grad``: what is computed here is kept.
        """
        where, index = self.stretches[-1].where, torch.arange(count, device=self.data.device)
        left = self.active.sum(1) - where.start
        rows = (left > 0).nonzero()[:, 0]
        if not len(rows) or not self.means.last.shape[-1]:
            return None
        sequence = rows[index * len(rows) // count]
        frame = ((index % max(8, count // len(rows)) * 0.618).frac() * left[sequence]).long()
        group = sequence if self.group is None else self.group[sequence]
        mean = self.means.at(frame, sequence)[:, 0]
        if self.num_diffuse:
            effect = self.columns.at(frame, sequence if len(self.columns.start) > 1 else sequence * 0)
            mean = mean + (self.diffuse_mean(self.means)[sequence] @ effect)[:, 0]
        times, which = (frame + where.start - 1).clamp(max=self.gains.n - 1).unique(return_inverse=True)
        start = self.carry.covariance @ self.carry.covariance.mT if self.gains.rooted else self.carry.covariance
        covariances = self.gains.covariances
        found = [covariances[t] if t >= 0 else start for t in times.tolist()]
        if len({len(part) for part in found}) > 1:
            found = [part.expand(max(map(len, found)), -1, -1) for part in found]
        variance = torch.stack(found).diagonal(dim1=-2, dim2=-1)
        variance = variance[which, group if variance.shape[1] > 1 else 0].detach()
        noise = torch.randn(mean.shape, generator=torch.Generator("cpu").manual_seed(3), device="cpu").to(mean)
        return frame, sequence, mean.detach() + 2 * variance.clamp(min=0).sqrt() * noise

    def carried(self) -> Carry:
        """What the next frame begins with."""
        columns = self.columns.last.mT if self.num_diffuse else self.carry.columns[:1, :0].new_zeros(
            1, self.means.last.shape[-1], 0)
        precision, score = (v[-1] for v in self.diffuse) if self.num_diffuse else (self.carry.precision, self.carry.score)
        return Carry(self.means.last[:, 0], columns, self._each(self.gains.last, 0), precision, score,
                     self.carry.evidence + self.base.sum(1), self.carry.proper)
