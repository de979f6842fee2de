"""What resampling does: which particles go on, and with which weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_seq.engine.state import State
from pyro_seq.engine.weights import Weights

__all__ = ["Ancestral", "Resampler", "draw_uniform"]


class Resampler(ABC):
    """From weighted particles to as many that go on.

    Called with the weights of ``n`` sequences of ``N`` particles it returns how the new particles come from the old ones,
    ancestors ``(n, N)`` (integers) or a transport matrix ``(n, N, N)`` (floating, rows of sum one), and their log weights
    ``(n, N)``, of mean weight one in expectation.
    """

    unbiased: bool = True
    """Whether evidence estimates stay unbiased for any number of particles."""
    differentiable: bool = False
    """Whether gradients of what comes after reach the weights."""

    @abstractmethod
    def __call__(self, weights: Weights, state: State, look_ahead: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        :param weights: of the particles.
        :param state: their states, ``n * N`` rows.
        :param look_ahead: ``(n, N)`` log factors by which to favour particles (Pitt and Shephard, *Filtering via simulation:
            auxiliary particle filters*, 1999); the new weights make up for them.
        """


class Ancestral(Resampler):
    """Resampling by ancestors alone.

    :param scheme: from probabilities ``(n, N)`` of sum one to ancestors ``(n, N)``, of which each particle is ``N`` times its
        probability on average.
    """

    def __init__(self, scheme: Callable[[Tensor], Tensor], unbiased: bool = True):
        self.scheme, self.unbiased = scheme, unbiased

    def __call__(self, weights: Weights, state: State, look_ahead: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if look_ahead is None:
            return self.scheme(weights.normalised), torch.zeros_like(weights.log)
        log_chances = (weights.log + look_ahead).log_softmax(-1)
        ancestors = self.scheme(log_chances.exp())
        kept = weights.log - weights.log_mean[:, None] - log_chances - math.log(log_chances.shape[-1])
        return ancestors, kept.gather(-1, ancestors)


def draw_uniform(shape: int | tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers in [0, 1): all the randomness of resampling by ancestors."""
    return torch.rand(shape, dtype=like.dtype, device=like.device)
