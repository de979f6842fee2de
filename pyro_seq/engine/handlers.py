"""What stands around a call: Pyro's handlers, torch's inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.distributions import Normal
from pyro.poutine.runtime import apply_stack
from torch import Tensor

__all__ = ["Surroundings", "look_around", "outside_inference_mode"]


class Surroundings(NamedTuple):
    """What handlers outside would do to a sample site."""

    scale: float | Tensor
    mask: bool | Tensor | None
    plates: tuple[str, ...]
    """Names of vectorised plates."""


def look_around() -> Surroundings:
    """Send a message that handlers take note of and none records."""
    message: dict[str, Any] = {
        "type": "sample", "name": "_look_around", "fn": Normal(0.0, 1.0, validate_args=False), "args": (), "kwargs": {},
        "value": torch.zeros(()), "is_observed": False, "scale": 1.0, "mask": None, "cond_indep_stack": (), "done": True,
        "infer": {"_do_not_trace": True, "is_auxiliary": True}, "stop": False, "continuation": None}
    apply_stack(message)
    plates = tuple(frame.name for frame in message["cond_indep_stack"] if frame.vectorized)
    return Surroundings(message["scale"], message["mask"], plates)


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode``, from whose tensors no gradient can be taken, and without gradients some proposals
    cannot be made; whether they are recorded stays as it is."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield
