"""What resampling does: which particles go on, and with which weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyro_seq.engine.state import State
from pyro_seq.engine.weights import Weights

__all__ = ["Resampler", "draw_uniform"]


class Resampler(ABC):
    """From weighted particles to as many that go on.

    Called with the weights of ``n`` sequences of ``N`` particles it returns how the new particles come from the old ones,
    ancestors ``(n, N)`` (integers) or a transport matrix ``(n, N, N)`` (floating, rows of sum one), and their log weights
    ``(n, N)``, of mean weight one in expectation.
    """

    unbiased: bool | None = True
    """Whether evidence estimates stay unbiased for any number of particles; ``None`` where that depends on a function of the
    user's that does not say."""
    differentiable: bool = False
    """Whether gradients of what comes after reach the weights."""
    unbiased_gradient: bool = False
    """Whether the gradient of an evidence estimate is then an unbiased estimate of the evidence's gradient."""
    ancestral: bool = True
    """Whether each new particle is a copy of an old one; otherwise it is a mixture of them, and has no path behind it."""

    @abstractmethod
    def __call__(self, weights: Weights, state: State, look_ahead: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        :param weights: of the particles.
        :param state: their states, ``n * N`` rows.
        :param look_ahead: ``(n, N)`` log factors by which to favour particles (Pitt and Shephard, *Filtering via simulation:
            auxiliary particle filters*, 1999); the new weights make up for them.
        """

    def log_chances(self, weights: Weights, look_ahead: Tensor | None = None) -> Tensor | None:
        """``(n, N)`` log chances by which ancestors are drawn; ``None`` where these are the weights."""
        return None


def draw_uniform(shape: int | tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers in [0, 1): all the randomness of resampling by ancestors."""
    return torch.rand(shape, dtype=like.dtype, device=like.device)
