"""What a particle filter keeps of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.ops.stats import weighed_quantile
from torch import Tensor

from pyro_seq.engine.loop import Step, pad_rows
from pyro_seq.engine.state import State, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.sequences import Packed

__all__ = ["Measured", "Record", "values_of"]

Measured = Callable[[Step], dict[str, tuple[Tensor, Tensor | None]]]
"""By latent site, what each particle says of it, ``(rows, ...)``: a value, and a variance about it if it has one."""


def values_of(step: Step) -> dict[str, tuple[Tensor, None]]:
    """What each particle says of the latents: their values."""
    return {name: (site.value, None) for name, site in step.sites.items() if not site.observed}


class Record:
    """Evidence, effective sample sizes, moments and final states of a run; with ``history``, every step.

    Steps are handed over in packed order, and asked for in the user's.
    """

    def __init__(self, packed: Packed, particles: int, measured: Measured = values_of, history: bool = False):
        self.packed, self.particles, self.measured, self.history = packed, particles, measured, history
        self.factors: list[Tensor] = []
        self.ess_found: list[Tensor] = []
        self.means: dict[str, list[Tensor]] = {}
        self.variances: dict[str, list[Tensor]] = {}
        self.steps: list[Step] = []
        self.ended: list[tuple[State, Tensor]] = []
        self.last: tuple[State, Tensor] | None = None

    def add(self, step: Step, weights: Weights, factor: Tensor) -> None:
        """
        :param factor: ``(n,)`` log of the step's factor of the evidence.
        """
        self._set_aside(len(factor))
        self.last = step.state, weights.normalised
        self.factors.append(factor)
        self.ess_found.append(weights.ess)
        for name, (value, spread) in self.measured(step).items():
            mean, variance = _moments(weights.normalised, value, spread)
            self.means.setdefault(name, []).append(mean)
            self.variances.setdefault(name, []).append(variance)
        if self.history:
            self.steps.append(step)

    def finish(self) -> None:
        self._set_aside(0)

    def evidence(self) -> Tensor:
        """``(B, T)`` log of each step's factor of the evidence; zero past a sequence's end."""
        return pad_rows(self.factors, self.packed.counts, self.packed)

    def ess(self) -> Tensor:
        return pad_rows(self.ess_found, self.packed.counts, self.packed)

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        counts = self.packed.counts
        return {name: (pad_rows(self.means[name], counts, self.packed), pad_rows(self.variances[name], counts, self.packed))
                for name in self.means}

    def _set_aside(self, running: int) -> None:
        """Keep the particles of the sequences that end here."""
        if self.last is not None and running < len(self.last[1]):
            state, weights = self.last
            rows = slice(running * self.particles, None)
            self.ended.insert(0, (map_state(lambda leaf: leaf[rows], state), weights[running:]))

    def final_weights(self) -> Tensor:
        """``(B, N)`` in packed order."""
        return torch.cat([weights for _, weights in self.ended])

    def final_state(self, share: Tensor) -> Any:
        """A sampler of the final state of each sequence, over all runs. ``share`` is each run's part, ``(R, B)``."""
        states = map_state(lambda *parts: torch.cat(parts), *(state for state, _ in self.ended))
        weights = self.packed.unsort(self.final_weights())
        states = map_state(lambda leaf: self.packed.unsort(leaf.reshape(*weights.shape, *leaf.shape[1:])), states)
        runs, batch = share.shape
        pooled = (weights.reshape(runs, batch, -1) * share[..., None]).transpose(0, 1).reshape(batch, -1)

        def sample(num_samples: int) -> State:
            index = torch.multinomial(pooled.double(), num_samples, replacement=True)
            run, particle = index // self.particles, index % self.particles
            row = run * batch + torch.arange(batch, device=index.device)[:, None]
            return map_state(lambda leaf: leaf[row, particle].reshape(batch * num_samples, *leaf.shape[2:]), states)

        return sample

    def trajectories(self, num_samples: int) -> dict[str, Tensor]:
        """Draws of latent paths by tracing the ancestors back.

        :raises ValueError: if particles were mixed.
        """
        counts, out = self.packed.counts, {}
        index: Tensor | None = None
        paths: dict[str, list[Tensor]] = {}
        weights = self.final_weights()
        for t in reversed(range(len(self.steps))):
            step, count = self.steps[t], counts[t]
            done = 0 if index is None else index.shape[0]
            fresh = torch.multinomial(weights[done:count].double(), num_samples, replacement=True) if count > done else None
            index = fresh if index is None else index if fresh is None else torch.cat([index, fresh])
            row = torch.arange(count, device=index.device)[:, None]
            for name, site in step.sites.items():
                if not site.observed:
                    value = site.value.reshape(count, self.particles, *site.value.shape[1:])
                    paths.setdefault(name, []).append(value[row, index].flatten(0, 1))
            if step.ancestors is not None and step.ancestors.is_floating_point():
                raise ValueError("particles that were mixed by a transport have no ancestors, hence no trajectories: use a "
                                 "resampling by ancestors, such as 'systematic'")
            if step.ancestors is not None:
                index = step.ancestors[row, index]
        for name, values in paths.items():
            value = pad_rows(values[::-1], counts, self.packed, num_samples)
            out[name] = value[None] if num_samples == 1 else value.movedim(2, 0)
        return out

    def quantile(self, site: str, q: float | list[float]) -> Tensor:
        like = self.last[1]
        levels = torch.as_tensor(q, dtype=like.dtype, device=like.device)
        found = []
        for step in self.steps:
            count = step.log_weights.shape[0]
            value, spread = self.measured(step)[site]
            value = value.reshape(count, self.particles, *value.shape[1:])
            if spread is None:
                per = [torch.stack([weighed_quantile(v.to(levels), level.reshape(1), w, dim=0)[0]
                                    for level in levels.reshape(-1)]) for v, w in zip(value, step.log_weights, strict=True)]
            else:
                weights, scale = step.log_weights.softmax(-1), spread.reshape(value.shape).sqrt()
                per = [_mixture_quantile(w, m, s, levels) for w, m, s in zip(weights, value, scale, strict=True)]
            found.append(torch.stack(per))
        out = pad_rows(found, self.packed.counts, self.packed).movedim(2, 0)
        return out[0] if levels.dim() == 0 else out


def _moments(weights: Tensor, value: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(n, ...)`` mean and variance of values ``(n * N, ...)`` under ``(n, N)`` weights."""
    shape = (len(weights), *value.shape[1:])
    value = value.reshape(*weights.shape, -1)
    value = value if value.is_floating_point() else value.to(weights.dtype)
    chances = weights[:, None].to(value.dtype)
    mean = torch.bmm(chances, value)
    variance = torch.bmm(chances, (value - mean).square_())
    if spread is not None:
        variance = variance + torch.bmm(chances, spread.reshape(value.shape))
    return mean.reshape(shape).to(weights.dtype), variance.reshape(shape).to(weights.dtype)


def _mixture_quantile(weights: Tensor, means: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """``(Q, ...)`` quantiles of a mixture of ``N`` Gaussians ``(N, ...)``, by bisection."""
    levels = levels.reshape(-1, *(1,) * (means.dim() - 1))
    low, high = (means - 40 * scales).amin(0), (means + 40 * scales).amax(0)
    low, high = low.expand(levels.shape[0], *low.shape), high.expand(levels.shape[0], *high.shape)
    for _ in range(64):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - means) / scales.clamp(min=torch.finfo(scales.dtype).tiny))
        share = torch.einsum("n,qn...->q...", weights.to(below), below)
        low, high = torch.where(share < levels, middle, low), torch.where(share < levels, high, middle)
    return ((low + high) / 2).to(levels)
