"""A recursion over time, several of its steps in one compiled call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_seq.engine.compiled.compiler import Run
from pyro_seq.engine.compiled.gradients import call
from pyro_seq.engine.compiled.small import WrittenOut

__all__ = ["scan"]

Step = Callable[..., tuple[Tensor, ...]]


def scan(run: Run | None, name: str, steps: int, step: Step, state: Tensor, count: int, *inputs: Any) -> tuple[Tensor, ...]:
    """``state, *found = step(state, *now)`` for one time after the other.

    :param run: as written if ``None``, and on a GPU.
    :param steps: how many are compiled together.
    :param step: a function of a module, which reads nothing but its arguments and decides nothing by their values.
    :param state: of the same shape after each step as before.
    :param count: number of times, ``T``.
    :param inputs: ``(T, ...)``; or ``(1, ...)``, the same at all times; or no tensor.
    :returns: the state after each time and what was found, ``(T, ...)`` each.
    """
    if run is None or count == 1 or state.device.type != "cpu":  # elsewhere each small product would be a kernel of its own
        return _several(count, step, state, inputs)[1]
    inputs = tuple([_plain(v) if isinstance(v, Tensor) else v for v in inputs])
    learning = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in (state, *inputs))
    if learning and not state.requires_grad:  # as those of later steps do
        state = state.detach().requires_grad_()
    with torch.set_grad_enabled(learning):
        found = []
        for now in zip(*[_parts(v, count, steps) for v in inputs], strict=True):
            state, part = call(run, name, _together, _plain(state[None]), *now, steps, step)
            found.append(part)
        found = [torch.cat(values) if len(values) > 1 else values[0] for values in zip(*found, strict=True)]
    return tuple(found) if count % steps == 0 else tuple([value[:count] for value in found])


def _plain(value: Tensor) -> Tensor:
    """With the strides that its shape has by default, since others would be compiled for again."""
    return value.reshape(-1).view(value.shape)


def _parts(value: Any, count: int, steps: int) -> list[Any]:
    """Some times of an input after the others; past its end, the last of them again."""
    if not isinstance(value, Tensor) or len(value) == 1:
        return [value] * -(-count // steps)
    *parts, last = value.split(steps)
    return [*parts, last if len(last) == steps else torch.cat([last, last[-1:].expand(steps - len(last), *last.shape[1:])])]


def _together(state: Tensor, *arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    *inputs, steps, step = arguments
    with nullcontext() if get_proxy_mode() is None else WrittenOut():  # which pays where it is traced
        return _several(steps, step, state[0], inputs)


def _several(count: int, step: Step, state: Tensor, inputs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The state after the last of them; and after each, and what was found."""
    each = [v.unbind(0) if isinstance(v, Tensor) else (v,) for v in inputs]
    results = []
    for t in range(count):
        results.append(step(state, *[v[t if len(v) > 1 else 0] for v in each]))
        state = results[-1][0]
    return state, tuple([torch.stack(values) for values in zip(*results, strict=True)])
