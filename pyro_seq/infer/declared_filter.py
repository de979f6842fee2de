"""What the approximate Kalman filters have in common: how they enter the model, and the answer they give."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_seq.engine.loop import Checked
from pyro_seq.engine.noise import Layout, NoisyStep
from pyro_seq.engine.padded import pad_rows
from pyro_seq.engine.state import State, map_state
from pyro_seq.infer.posterior import Moments, Posterior
from pyro_seq.infer.run import Stopwatch, entered
from pyro_seq.module import require_model
from pyro_seq.sequences import Packed, Sequences

__all__ = ["DeclaredFilter", "Passes", "at_the_ends", "refuse", "told", "unmoved"]


class Passes(Protocol):
    """What a forward pass leaves behind, by step in packed order, and what a backward pass makes of it."""

    layout: Layout
    like: State
    """A row of the state, for its structure."""
    told: Tensor | None
    """``(Z,)`` whether the data of any frame has moved each entry of its latents, of the frames that had data."""
    evidences: list[Tensor]
    """``(n_t,)`` log predictive density of each frame."""

    def filtered(self) -> list[tuple[Tensor, Tensor]]:
        """Means and variances ``(n_t, Z)`` of the latents given the data so far."""

    def smoothed(self) -> list[tuple[Tensor, Tensor]]:
        """The same given all data."""

    def paths(self, num_samples: int) -> list[Tensor]:
        """Draws of the latents given all data, ``(n_t, num_samples, Z)``."""

    def final_state(self, num_samples: int) -> State:
        """Draws of the state after each sequence's last frame, ``(B * num_samples, ...)``."""


class DeclaredFilter:
    """A filter that runs the declared step with its noise as an argument; subclasses say at which points.

    :param model: a declared model.
    """

    method = ""
    num_samples: int | None = None

    def __init__(self, model: Any):
        require_model(model, type(self).__name__)
        if model.state_grows:
            raise TypeError("a model from seq.from_pyro has no Markov state to filter: declare it as a StateSpaceModel")
        self.model = model

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Posterior:
        """Filter and smooth a batch; the arguments are those of :class:`~pyro_seq.ParticleFilter`.

        :raises ValueError: if a latent is not Gaussian given the state, the state is not made of real numbers, or a covariance
            is not positive definite, naming the site and the time.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return entered(self.model, None, sequences, lambda values: self._posterior(sequences, values, watch))

    def log_evidence(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Tensor:
        """``(B,)`` the approximate log evidence that :meth:`run` reports, differentiable in the model's parameters."""
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return entered(self.model, None, sequences, lambda _: _padded(self._filter(sequences).evidences, sequences).sum(-1),
                       learning=True)

    def _filter(self, sequences: Sequences) -> Any:
        """The forward pass."""
        self.model.check_inputs(sequences)
        checks, like, layout, passes = Checked(), None, None, None
        for frame in sequences.packed.frames():
            with checks:
                if frame.first:
                    state = self.model.begin(frame)
                    layout = Layout.of(self.model, state, frame)
                    like = map_state(lambda leaf: leaf[:1], state)
                step = NoisyStep(self.model, like, frame, layout)
                if frame.first:
                    passes = self._begin(step.flat(state, frame.rows, 1)[:, 0], sequences.packed, layout)
                like = map_state(lambda leaf: leaf[:1].detach(), self._step(step, passes))
        passes.like = like
        return passes

    def _begin(self, state: Tensor, packed: Packed, layout: Layout) -> Passes:
        """The passes before the first step.

        :param state: ``(B, S)`` the state there, known.
        """
        raise TypeError(f"{type(self).__name__} does not say how it begins")

    def _step(self, step: NoisyStep, passes: Any) -> State:
        """Take one step; returns rows of the next state, for its structure."""
        raise TypeError(f"{type(self).__name__} does not say how it takes a step")

    def _posterior(self, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        passes, packed = self._filter(sequences), sequences.packed
        shapes, columns = passes.layout.latents, passes.layout.columns()
        by_step = _padded(passes.evidences, sequences)

        def by_site(found: list[Tensor], copies: int = 1) -> dict[str, Tensor]:
            return {name: pad_rows([value[..., columns[name]].reshape(-1, *shapes[name]) for value in found], packed.counts,
                                   packed, copies).to(by_step.dtype) for name in shapes}

        def moments(found: list[tuple[Tensor, Tensor]]) -> dict[str, Moments]:
            means, variances = by_site([mean for mean, _ in found]), by_site([variance for _, variance in found])
            return {name: Moments(means[name], variances[name]) for name in shapes}

        def paths(num_samples: int) -> dict[str, Tensor]:
            drawn = by_site(passes.paths(num_samples), num_samples)
            return {name: value[None] if num_samples == 1 else value.movedim(2, 0) for name, value in drawn.items()}

        def quantile(site: str, q: float | list[float]) -> Tensor:
            levels = torch.as_tensor(q, dtype=torch.double, device=sequences.device)
            units = math.sqrt(2) * torch.erfinv(2 * levels - 1).to(by_step)
            mean = filtered[site].mean
            return mean + filtered[site].std * units.reshape(levels.shape + (1,) * mean.dim())

        filtered, evidence = moments(passes.filtered()), by_step.sum(-1)
        notes = ["the evidence is that of a Gaussian approximation, neither exact nor a bound; its error is not known"]
        if passes.layout.matched:
            notes.append(f"the sites {list(passes.layout.matched)} are not Gaussian: their conditional mean and variance are "
                         "matched, and the evidence is a density of that Gaussian")
        if blind := unmoved(passes):
            notes.append(f"the data does not move {blind}: its mean has no covariance with them, and that is all a Kalman "
                         "filter sees (a volatility moves the variance alone). Their filtered moments are the prior's, and "
                         "the evidence can be far off: use ParticleFilter, or observe a transform, such as the log of the "
                         "squared data")
        return Posterior(
            method=f"{self.method} Kalman filter", kind=f"approximation ({self.method} Kalman)", log_evidence=evidence,
            standard_error=torch.full_like(evidence, 0.0 if self.num_samples is None else torch.nan), sequences=sequences,
            seconds=watch.seconds, num_samples=self.num_samples, filtered=filtered, smoothed=moments(passes.smoothed()),
            parameters=parameters, log_evidence_by_step=by_step, cloud=quantile, paths=paths, notes=tuple(notes),
            final_state=passes.final_state, model=self.model)


def _padded(evidences: list[Tensor], sequences: Sequences) -> Tensor:
    """``(B, T)`` in the type of the data."""
    dtype = next((v.dtype for v in sequences.x.values() if v.is_floating_point()), torch.get_default_dtype())
    return pad_rows(evidences, sequences.packed.counts, sequences.packed).to(dtype)


def unmoved(passes: Passes) -> list[str]:
    """The latent sites of which no frame's data has moved an entry."""
    if passes.told is None:
        return []
    return [name for name, where in passes.layout.columns().items()
            if name in passes.layout.latents and where.stop > where.start and not passes.told[where].any()]


def told(before: Tensor | None, gain: Tensor, variance: Tensor, data: Tensor, present: Tensor) -> Tensor | None:
    """Which latents have been moved, after one more frame.

    :param before: ``(Z,)`` after the frames before.
    :param gain: ``(n, Z, D)``
    :param variance: ``(n, Z)`` of the latents; ``data``, ``(n, D)``, of the data, expected beforehand.
    :param present: booleans: what there is of the data.
    """
    if not bool(present.any()):
        return before
    share = gain.detach().abs() * data.detach().clamp(min=0).sqrt()[:, None]
    moved = (share > 1e-6 * variance.detach().clamp(min=0).sqrt()[..., None]).any(-1).any(0)
    return moved if before is None else before | moved


def at_the_ends(parts: list[Tensor], packed: Packed) -> Tensor:
    """Of what each step has, ``(n_t, ...)``, what each sequence has at its last step: ``(B, ...)`` in the user's order."""
    ended = [part[after:] for part, after in zip(parts, [*packed.counts[1:], 0], strict=True)]
    return packed.unsort(torch.cat(ended[::-1]))


def refuse(bad: Tensor, step: NoisyStep, what: str, mend: str) -> None:
    """Raise if a row of a step is ``bad``, naming its sites, time and sequence."""
    if bool(bad.any()):
        sequence = int(step.frame.sequence[int(bad.nonzero()[0])])
        raise ValueError(f"{what} at time {step.frame.t} in sequence {sequence} is not positive definite: {mend}")
