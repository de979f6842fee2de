"""Maximise a smooth function of a vector: limited-memory BFGS.

The line search halves and doubles until the weak Wolfe conditions hold. It compares function values only where they are
finite, so that a step into a region where the function is not defined is simply too long.

Source: Nocedal and Wright, *Numerical Optimization*, 2006, algorithm 7.4 (the directions); Lewis and Overton, *Nonsmooth
optimization via quasi-Newton methods*, 2013, algorithm 2.6 (the line search).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Maximum", "maximise"]

_MEMORY = 20
_ARMIJO, _CURVATURE = 1e-4, 0.9
_TRIALS = 50


class Maximum(NamedTuple):
    """Where the search ended: never below where it began."""

    point: Tensor
    value: float
    gradient: Tensor
    iterations: int
    converged: bool
    reason: str
    """Why it ended."""


def maximise(fn: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, max_iter: int, tol: float,
             each: Callable[[int, float], None] | None = None, pairs: list[tuple[Tensor, Tensor]] | None = None) -> Maximum:
    """Climb from ``start``.

    :param fn: value and gradient at a point ``(n,)``; a value that is not finite marks a point outside the domain.
    :param tol: largest entry of the gradient at the end, relative to ``max(1, |value|)``.
    :param each: called with the number and the value of each iteration.
    :param pairs: (move, fall of the gradient) of the last moves, added to in place: what a search of a similar function has
        learnt of its curvature.
    """
    point = start.clone()
    value, gradient = fn(point)
    pairs = [] if pairs is None else pairs
    rounding = torch.finfo(start.dtype).eps ** 0.5
    for iteration in range(max_iter):
        size = max(1.0, abs(value))
        steepness = gradient.abs().max().item()
        if steepness <= tol * size:
            return Maximum(point, value, gradient, iteration, True, "the gradient vanishes")
        direction = _direction(gradient, pairs)
        slope = float(direction @ gradient)
        if not slope > 0:
            pairs.clear()
            direction, slope = gradient, float(gradient @ gradient)
        length = 1.0 if pairs else min(1.0, 1.0 / float(gradient.abs().sum()))
        found = _search(fn, point, value, direction, slope, length)
        if found is None and pairs:
            pairs.clear()
            length = min(1.0, 1.0 / float(gradient.abs().sum()))
            found = _search(fn, point, value, gradient, float(gradient @ gradient), length)
        if found is None:
            done = steepness <= max(tol, rounding) * size
            return Maximum(point, value, gradient, iteration, done, "the gradient vanishes but for rounding" if done else
                           "the line search found no better point")
        after, value, slopes = found
        move, bend = after - point, gradient - slopes
        if float(move @ bend) > 1e-12 * float(bend.norm() * move.norm()):
            pairs.append((move, bend))
            del pairs[:-_MEMORY]
        point, gradient = after, slopes
        if each is not None:
            each(iteration + 1, value)
    size = max(1.0, abs(value))
    done = gradient.abs().max().item() <= tol * size
    return Maximum(point, value, gradient, max_iter, done,
                   "the gradient vanishes" if done else f"max_iter={max_iter} iterations were not enough")


def _direction(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse of minus the Hessian, as far as the last moves tell, times the gradient."""
    direction, kept = gradient.clone(), []
    for move, bend in reversed(pairs):
        weight = (move @ direction) / (move @ bend)
        direction = direction - weight * bend
        kept.append(weight)
    if pairs:
        move, bend = pairs[-1]
        direction = direction * (move @ bend) / (bend @ bend)
    for (move, bend), weight in zip(pairs, reversed(kept)):
        direction = direction + move * (weight - (bend @ direction) / (move @ bend))
    return direction


def _search(fn: Callable[[Tensor], tuple[float, Tensor]], point: Tensor, value: float, direction: Tensor, slope: float,
            length: float) -> tuple[Tensor, float, Tensor] | None:
    """A point that meets the weak Wolfe conditions; the best one that rises enough if none does; ``None`` if none rises."""
    low, high, best = 0.0, torch.inf, None
    for _ in range(_TRIALS):
        trial = point + length * direction
        if bool((trial == point).all()):
            break
        there, gradient = fn(trial)
        if not (math.isfinite(there) and there >= value + _ARMIJO * length * slope and bool(gradient.isfinite().all())):
            high = length
        else:
            if there > value and (best is None or there > best[1]):
                best = trial, there, gradient
            if float(gradient @ direction) <= _CURVATURE * slope:
                return best
            low = length
        length = 2 * low if high == torch.inf else 0.5 * (low + high)
    return best
