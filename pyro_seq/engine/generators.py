"""The states of torch's random numbers, to keep and to go back to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["generator_states", "set_generators"]


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a run on ``device`` draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go back to ``states``."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
