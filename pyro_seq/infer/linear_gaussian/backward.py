"""The smoother, covariances between neighbours, and draws of whole paths."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.compiled.scan import scan
from pyro_seq.infer.linear_gaussian.diffuse import add_diffuse
from pyro_seq.infer.linear_gaussian.forward import Forward
from pyro_seq.infer.linear_gaussian.gains import roots
from pyro_seq.infer.linear_gaussian.steps import Means, Stretch, recursion, rows, shifted

__all__ = ["Backward", "Joint"]

_STEPS = 16
_MOST_NUMBERS = 8000
"""Products of numbers in a step up to which several in one compiled call take less time than as many calls of a library."""


def _inform(value: Tensor, own: Tensor, closed: Tensor) -> tuple[Tensor]:
    """The information before a frame, from that after it and the frame's own."""
    return (own + closed.mT @ value @ closed,)


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
            own = (seen.mT @ seen).flip(0)
            small = 0 < own[0].numel() * own.shape[-1] <= _MOST_NUMBERS and value.shape == own.shape[1:]
            values = scan(f.run if small else None, "information", _STEPS, _inform, value, len(own), own,
                          stretch.closed.flip(0))[0]
            self.information.insert(0, shifted(value, values).flip(0))
            value = values[-1]

    def adjoints(self, means: Means) -> list[Tensor]:
        """A stretch each, ``(T, B, n, S')``: derivative of the log density of the frames to come by the state after each."""
        f, found = self.forward, []
        value = torch.zeros_like(means.last)
        weighted = rows(rows(means.residuals, f.whiten), f.whiten.mT)
        for stretch in reversed(f.stretches):
            push = rows(weighted[stretch.where], stretch.seen.mT)
            values = recursion(stretch.closed.mT.flip(0), value, push.flip(0))
            found.insert(0, shifted(value, values).flip(0))
            value = values[-1]
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
            filtered = rows(means.before(i), carry) + drift + rows(means.residuals[stretch.where], self.gain[i])
            found.append((filtered, filtered + rows(rows(adjoint, next_matrix.mT), self.covariance[i])))
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
        return add_diffuse(precision, score, effect, mean, covariance, self.forward.carry.proper)

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
            own = rows(torch.randn(shape, dtype=f.data.dtype, device=f.data.device), roots(noise))
            if state is None:
                state = own.new_zeros(batch, num_samples, carry.shape[-1])
            after = recursion((next_matrix @ carry).expand(count, -1, -1, -1), state, rows(own, next_matrix))
            drawn.append((rows(shifted(state, after), carry) + own, step.observed))
            state = after[-1]
        coefficients = 0.0
        theirs = f.filter(torch.cat([u[..., data] for u, data in drawn]), centred=True)
        if f.num_diffuse:  # a vague prior has a share in what is drawn of them; one that is flat has none
            noise = torch.randn(batch, f.num_diffuse, num_samples, dtype=f.data.dtype, device=f.data.device)
            own = torch.cholesky_solve(f.carry.precision @ noise, f.at_end[1]).mT
            coefficients = f.diffuse_mean(f.means) - f.diffuse_mean(theirs) + own
        found = []
        for i, ((_, ours), (_, own)) in enumerate(zip(self.joint_means(f.means), self.joint_means(theirs, 0.0), strict=True)):
            mean = ours - own
            if f.num_diffuse:
                mean = mean + coefficients @ self.columns[i][1]
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
