"""Entering a model and a guide for one run of an inference method."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_seq.engine.handlers import look_around
from pyro_seq.engine.loop import refuse_scaled
from pyro_seq.engine.missing import GapRead
from pyro_seq.module import own_parameters
from pyro_seq.sequences import Sequences

__all__ = ["GapRead", "Stopwatch", "entered", "refuse_scaled"]


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


def entered(model: Any, guide: Any, sequences: Sequences, fn: Callable[[dict[str, Tensor]], Any],
            learning: bool = False) -> Any:
    """Run ``fn(parameters)`` inside guide and model, without touching the parameter store.

    Global parameters come from a handler outside (``poutine.condition``), else from the guide, else from their prior,
    with a warning. Inside a model that has been entered already (its own ``within``) the values of that call stand.

    :param learning: keep the gradients of what ``fn`` computes, where the caller has them.
    """
    if learning and model.__dict__["_values"] is not None:
        return fn({})
    if not sequences.x:
        raise ValueError("inference needs data, and none was given; to draw from the model call model.simulate(lengths)")
    outside = look_around()
    if isinstance(outside.scale, Tensor) or outside.scale != 1.0 or outside.mask is not None or outside.plates:
        raise ValueError("inference is run inside poutine.scale, poutine.mask or a plate, which would change the evidence: run "
                         "it outside of them")

    def inside() -> Any:
        values = guide.draw_globals(sequences) if guide is not None else {}
        with poutine.trace() as tr:
            return model.within(lambda: fn(_globals(model, tr.trace, values)), globals=values)

    with torch.set_grad_enabled(learning and torch.is_grad_enabled()), own_parameters(model, guide):
        return inside() if guide is None else guide.within(inside)


def _globals(model: Any, trace: poutine.Trace, values: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(values)
    drawn = []
    for name in model.global_sites():
        if name not in found:
            site = trace.nodes[name]
            found[name] = site["value"]
            if not site["is_observed"]:
                drawn.append(name)
    if drawn:
        warnings.warn(f"global parameters {drawn} were drawn from their prior, and the result is conditional on the draw: "
                      "fix them with poutine.condition(data={...}), or give the guide a global_guide", stacklevel=4)
    return found
