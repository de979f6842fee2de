"""Jacobians of functions of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["jacobian", "require_differentiable"]


def jacobian(fn: Callable[[Tensor], Tensor], point: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Value ``(n, O)`` and Jacobian ``(n, O, V)`` of a function whose rows do not depend on one another.

    Differentiable in turn where gradients are enabled. ``fn`` is called once and on plain tensors, so that Pyro's handlers can
    stand in it; only the backward pass is vectorised over the outputs.

    :param point: ``(n, V)``
    :param what: the function, for messages.
    :raises ValueError: if an operation in ``fn`` has no derivative.
    """
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        point = point if training and point.requires_grad else point.detach().requires_grad_()
        value = fn(point)
        slope = _slope(value, point, training, what)
    return (value, slope) if training else (value.detach(), slope)


def _slope(value: Tensor, point: Tensor, training: bool, what: str) -> Tensor:
    n, outputs = value.shape
    if not value.requires_grad or not outputs:
        return value.new_zeros(n, outputs, point.shape[-1])
    directions = torch.eye(outputs, dtype=value.dtype, device=value.device)[:, None].expand(-1, n, -1)
    options = {"create_graph": training, "retain_graph": True, "allow_unused": True}
    try:
        try:
            found = torch.autograd.grad(value, point, directions, is_grads_batched=True, **options)[0]
        except RuntimeError:  # an operation whose backward pass cannot be vectorised
            rows = [torch.autograd.grad(value, point, direction, **options)[0] for direction in directions]
            found = None if rows[0] is None else torch.stack(rows)
    except RuntimeError as error:
        raise ValueError(f"{what} cannot be differentiated: {error}. Use UnscentedKalmanFilter, EnsembleKalmanFilter or "
                         "ParticleFilter") from error
    return value.new_zeros(n, outputs, point.shape[-1]) if found is None else found.transpose(0, 1)


def require_differentiable(fn: Callable[[Tensor], Tensor], point: Tensor, groups: Sequence[slice], what: str) -> None:
    """Raise if a function moves between two points at both of which its derivative is zero.

    :param groups: columns of ``point`` that are moved together.
    """
    with torch.no_grad():
        value, slope = jacobian(fn, point, what)
        generator = torch.Generator("cpu").manual_seed(0)
        step = torch.randn(point.shape, generator=generator, dtype=point.dtype, device="cpu").to(point.device)
        for group in groups:
            flat = (slope[..., group] == 0).all(-1).all(0)
            if step[:, group].numel() == 0 or not flat.any():
                continue
            there = point.clone()
            there[:, group] += step[:, group]
            moved, slope_there = jacobian(fn, there, what)
            flat = flat & (slope_there[..., group] == 0).all(-1).all(0)
            if (flat & ((moved - value).abs() > 1e-6 * (1 + value.abs()))).any():
                raise ValueError(
                    f"{what} moves with its state or latents, but its derivative is zero: look for detach(), torch.no_grad(), "
                    "numpy or rounding in it; or use UnscentedKalmanFilter, EnsembleKalmanFilter or ParticleFilter, which need "
                    "no derivative")
