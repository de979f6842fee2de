"""The carried state: a tensor, or a (named) tuple or dict of tensors, rows first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["by_step", "check_state", "flatten_state", "join_states", "leaves", "map_state", "versions"]

State = Any
"""``None`` (before the first step of a state-space model), a tensor, or a nested tuple, list or dict of tensors."""


def map_state(fn: Callable[..., Any], *states: State) -> State:
    """Apply ``fn`` to corresponding tensors of states of the same structure."""
    head = states[0]
    if head is None:
        return None
    if isinstance(head, Tensor):
        return fn(*states)
    if isinstance(head, dict):
        return {key: map_state(fn, *(s[key] for s in states)) for key in sorted(head)}
    if isinstance(head, tuple) and hasattr(head, "_fields"):
        return type(head)(*(map_state(fn, *parts) for parts in zip(*states, strict=True)))
    if isinstance(head, (tuple, list)):
        return type(head)(map_state(fn, *parts) for parts in zip(*states, strict=True))
    raise TypeError(f"a state is made of tensors in (named) tuples, lists or dicts, not {type(head).__name__}: wrap "
                    "numbers with torch.full((rows,), value)")


def leaves(state: State) -> list[Tensor]:
    """The tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    found: list[Tensor] = []
    map_state(lambda leaf: found.append(leaf) or leaf, state)
    return found


def versions(state: State) -> list[int]:
    """Counts of the changes made to each tensor in place, of which those made in ``torch.inference_mode`` have none."""
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves(state)]


def join_states(states: list[State]) -> State:
    """Concatenate the rows of several states."""
    return states[0] if len(states) == 1 else map_state(lambda *parts: torch.cat(parts), *states)


def flatten_state(state: State, rows: int) -> Tensor | None:
    """The floating entries of a state as one ``(rows, width)`` matrix, or ``None`` if it has none."""
    floating = [leaf if leaf.dim() == 2 else leaf.reshape(rows, -1) for leaf in leaves(state) if leaf.is_floating_point()]
    return None if not floating else floating[0] if len(floating) == 1 else torch.cat(floating, -1)


def check_state(state: State, rows: int, where: str, like: State = None) -> None:
    """Raise unless every tensor has ``rows`` rows and, given ``like``, the shape it had one step before."""
    found = leaves(state)
    for leaf in found:
        if leaf.dim() == 0 or leaf.shape[0] != rows:
            raise ValueError(f"{where} returned a state of shape {tuple(leaf.shape)}, but {rows} rows are being run: "
                             f"the first dimension of every state tensor is the rows, ({rows}, ...)")
    if like is not None:
        before = leaves(like)
        if [tuple(v.shape[1:]) for v in found] != [tuple(v.shape[1:]) for v in before]:
            raise ValueError(f"{where} changed the shape of the state from {[tuple(v.shape) for v in before]} to "
                             f"{[tuple(v.shape) for v in found]}: a state keeps its structure and shapes")


def by_step(encodings: State, steps: int) -> list[State]:
    """Encodings ``(B, T, ...)`` as one state ``(B, ...)`` a step. Unbound once, since indexing costs a copy of the whole
    in every step's backward pass."""
    if encodings is None:
        return [None] * steps
    if isinstance(encodings, Tensor):
        return list(encodings.unbind(1))
    if isinstance(encodings, dict):
        parts = {key: by_step(value, steps) for key, value in encodings.items()}
        return [{key: parts[key][t] for key in parts} for t in range(steps)]
    parts = zip(*(by_step(value, steps) for value in encodings), strict=True)
    return [type(encodings)(*part) if hasattr(encodings, "_fields") else type(encodings)(part) for part in parts]
