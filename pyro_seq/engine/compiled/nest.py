"""Arguments and results as flat lists of tensors, and what is needed to put them together again."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["put_together", "take_apart"]


def take_apart(nest: Any, tensors: list[Tensor]) -> Hashable:
    """Add the tensors of (named) tuples, lists and dicts to ``tensors``; the rest of it is returned, and can be hashed."""
    if isinstance(nest, Tensor):
        tensors.append(nest)
        return Tensor
    if isinstance(nest, (tuple, list)):
        return type(nest), tuple([take_apart(part, tensors) for part in nest])
    if isinstance(nest, dict):
        return dict, tuple(nest), tuple([take_apart(part, tensors) for part in nest.values()])
    hash(nest)
    return None, nest


def put_together(plan: Any, tensors: Iterator[Tensor]) -> Any:
    """What was taken apart, of other tensors."""
    if plan is Tensor:
        return next(tensors)
    kind = plan[0]
    if kind is None:
        return plan[1]
    if kind is dict:
        return dict(zip(plan[1], [put_together(part, tensors) for part in plan[2]], strict=True))
    parts = [put_together(part, tensors) for part in plan[1]]
    return parts if kind is list else kind(*parts) if hasattr(kind, "_fields") else kind(parts)
