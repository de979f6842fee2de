"""Products and factors of small matrices, written out number by number: a compiler makes one loop of these and what is around
them, where a call of a library costs more than the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["WrittenOut"]

_WIDEST = 4
"""Of the matrices whose factors are written out."""


class WrittenOut(TorchFunctionMode):
    """What is computed inside has the same values, but for rounding, and gradients of any order."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            return _product(*args)
        if func is torch.linalg.cholesky_ex and args[0].shape[-1] <= _WIDEST:
            return _cholesky(*args)
        if func is torch.cholesky_solve and args[1].shape[-1] <= _WIDEST and not kwargs:
            return _solve(*args)
        return func(*args, **kwargs)


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return (left[..., :, :, None] * right[..., None, :, :]).sum(-2)


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor and, by matrix, whether there is none."""
    n = matrix.shape[-1]
    entries: list[list[Tensor]] = [[] for _ in range(n)]
    failed = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for i in range(n):
        for j in range(i + 1):
            rest = matrix[..., i, j]
            for k in range(j):
                rest = rest - entries[i][k] * entries[j][k]
            if i == j:
                failed = failed | ~(rest > 0)
            entries[i].append(rest.sqrt() if i == j else rest / entries[j][j])
    zero = torch.zeros_like(matrix[..., 0, 0])
    return torch.stack([torch.stack(row + [zero] * (n - len(row)), -1) for row in entries], -2), failed


def _solve(right: Tensor, factor: Tensor) -> Tensor:
    """From a lower factor, the inverse of its matrix times ``right``."""
    n, found = factor.shape[-1], list(right.unbind(-2))
    for i in range(n):
        for k in range(i):
            found[i] = found[i] - factor[..., i, k, None] * found[k]
        found[i] = found[i] / factor[..., i, i, None]
    for i in reversed(range(n)):
        for k in range(i + 1, n):
            found[i] = found[i] - factor[..., k, i, None] * found[k]
        found[i] = found[i] / factor[..., i, i, None]
    return torch.stack(found, -2)
