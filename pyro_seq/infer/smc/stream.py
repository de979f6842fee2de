"""A particle filter that is handed one frame at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.generators import generator_states, set_generators
from pyro_seq.engine.loop import Checked, Step, advance, same_latents
from pyro_seq.engine.sites import check_support
from pyro_seq.engine.state import State, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.posterior import Draws, Moments, draw_future
from pyro_seq.infer.run import entered, refuse_scaled
from pyro_seq.infer.smc.record import Record
from pyro_seq.infer.smc.snapshot import Snapshot, read_snapshot, to_plain
from pyro_seq.infer.stream import one_frame
from pyro_seq.module import own_parameters, require_count
from pyro_seq.resampling import named
from pyro_seq.sequences import Sequences, repeat_rows

if TYPE_CHECKING:
    from pyro_seq.infer.particle_filter import ParticleFilter

__all__ = ["FilteredParticles", "ParticleStream"]

_FORMAT = "pyro_seq particle stream 1"
_HELD = frozenset(("model", "guide", "num_particles", "time", "log_weights", "log_evidence", "state", "carry", "parameters",
                   "latents", "inputs", "generators"))
"""What every snapshot of this format holds."""


class FilteredParticles(NamedTuple):
    """What one frame has told a :class:`ParticleStream`."""

    moments: Mapping[str, Moments]
    """By latent site, mean and variance ``(B, ...)`` of z_t given x_1..x_t."""
    ess: Tensor
    """``(B,)`` effective sample size, before resampling."""
    log_predictive: Tensor
    """``(B,)`` log of the estimate of p(x_t | x_1..x_t-1), in nats; their sum over time is ``log_evidence``."""
    particles: Mapping[str, Tensor]
    """By latent site, ``(B, N, ...)``."""
    weights: Tensor
    """``(B, N)`` of sum one."""
    expectation: Tensor | None = None
    """From :class:`~pyro_seq.Paris`, ``(B, ...)``: the sum of the functional so far, expected given x_1..x_t."""


class ParticleStream:
    """A particle filter for data as it comes, B sequences side by side; made by :meth:`ParticleFilter.stream`.

    It holds the particles and their weights, and nothing of the past. Fed the frames of a series it gives what
    :meth:`ParticleFilter.run` gives on the whole, from the same seed. The guide must read no frame but the present one and
    those before.

    ``state_dict`` is a snapshot that goes on bit for bit where it was taken, also in another process: it holds the state of
    torch's generators, of the CPU and of the CUDA device of the data, and ``load_state_dict`` sets these. The parameters of
    model and guide are saved apart, by their own ``state_dict``.

    Example::

        >>> import io, torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> method = seq.ParticleFilter(LocalLevel(), num_particles=100)
        >>> stream = method.stream()
        >>> for x_t in torch.tensor([[0.3, 1.0], [0.1, 2.0]]):  # two sequences
        ...     filtered = stream.update(x_t)
        >>> filtered.moments["z"].mean.shape, stream.log_evidence.shape
        (torch.Size([2]), torch.Size([2]))
        >>> file = io.BytesIO()
        >>> torch.save(stream.state_dict(), file), file.seek(0)
        (None, 0)
        >>> other = method.stream()
        >>> other.load_state_dict(torch.load(file, weights_only=True))
        >>> other.time
        2
    """

    def __init__(self, method: ParticleFilter):
        guide = PriorGuide(method.model) if method.guide is None else method.guide
        if method.model.state_grows:
            raise TypeError("a model from seq.from_pyro has no Markov state to stream: declare it as a StateSpaceModel")
        if method.num_runs != 1 or method.history:
            raise ValueError("a stream is one filter that keeps nothing of the past: make the ParticleFilter with num_runs=1 "
                             "and history=False")
        if guide.reads_future:
            raise ValueError(f"{type(guide).__name__} reads frames to come, which a stream does not have: use a guide that "
                             "filters. (One with prepare is taken to; if it reads the past only, set reads_future = False in "
                             "the class and define stream_rows)")
        self.method, self.guide = method, guide
        self.time = 0
        """Frames seen."""
        self.log_evidence: Tensor | None = None
        """``(B,)`` log of the unbiased estimate of p(x_1..x_t), in nats; ``None`` before the first frame."""
        self.parameters: dict[str, Tensor] = {}
        """The global parameters that all this is conditional on."""
        self._log_weights: Tensor | None = None
        self._state: State = None
        self._carry: State = None
        self._latents: set[str] | None = None
        self._inputs: dict[str, list[int]] = {}
        self._types: dict[str, str] = {}
        self._checks = Checked()

    def update(self, x: Any, *, mask: Any = None, **covariates: Any) -> FilteredParticles:
        """Take in the next frame of every sequence.

        :param x: one frame, ``(B, ...)`` for B sequences side by side (``(1, ...)`` for a single one), or a dict of them; NaN
            where missing.
        :param mask: True where observed, ``(B,)`` or of the shape of ``x``.
        :param covariates: of this frame, ``(B, ...)`` each.
        :raises ValueError: if the frame is impossible, or not like the ones before; the stream, and torch's generators, are
            then as they were.
        """
        sequences = one_frame(x, mask, covariates, self.time + 1)
        if self.time:
            self._require_like_before(sequences)
        model, guide = self.method.model, self.guide
        generators = generator_states(sequences.device)
        try:
            if self.time == 0:
                return entered(model, guide, sequences, lambda values: self._update(sequences, values))
            with torch.no_grad(), own_parameters(model, guide):
                return guide.within(lambda: model.within(lambda: self._update(sequences, self.parameters),
                                                         globals=self.parameters))
        except BaseException:
            set_generators(generators, sequences.device)
            raise

    def predict(self, horizon: int, num_samples: int = 1000, **covariates: Any) -> Draws:
        """Draw the future of every sequence from the particles held now, as :meth:`Posterior.predict` does. It uses torch's
        generator, as what comes after it will.

        :param int num_samples: futures drawn of each sequence.
        :param covariates: inputs of the steps to come, ``(B, horizon, ...)`` each.
        :returns: samples ``(S, B, horizon, ...)`` of every site.
        """
        require_count("horizon", horizon, 1)
        require_count("num_samples", num_samples, 1)
        if self.time == 0:
            raise ValueError("the stream has seen no frame yet: feed it by update, or draw from the model by simulate")
        batch, particles = self._log_weights.shape
        device = self._log_weights.device

        def final_state(count: int) -> State:
            index = torch.multinomial(self._log_weights.softmax(-1).double(), count, replacement=True)
            index = (index + torch.arange(batch, device=device)[:, None] * particles).reshape(-1)
            return map_state(lambda leaf: leaf[index], self._state)

        lengths = torch.full((batch,), self.time, device=device)
        return draw_future(self.method.model, self.parameters, final_state, lengths, horizon, num_samples, covariates)

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of tensors, numbers and strings, for ``torch.save``; ``torch.load(..., weights_only=True)`` reads it."""
        def copy(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().clone()

        device = torch.device("cpu") if self._log_weights is None else self._log_weights.device
        return {
            "format": _FORMAT, **self._settings(), "time": self.time, "log_weights": copy(self._log_weights),
            "log_evidence": copy(self.log_evidence), "state": to_plain(self._state), "carry": to_plain(self._carry),
            "parameters": {name: copy(value) for name, value in self.parameters.items()},
            "latents": None if self._latents is None else sorted(self._latents), "inputs": dict(self._inputs),
            "types": dict(self._types), **self._held(), "generators": generator_states(device)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a snapshot of a stream of the same model and guide, filtered in the same way; torch's generators are set.

        :raises ValueError: if it is no such snapshot, or damaged: what it holds is checked and, on a CPU, compared with two
            steps of the model run without data. The stream is then as it was.
        """
        found = dict(state_dict) if isinstance(state_dict, Mapping) else {}
        if found.get("format") != _FORMAT:
            raise ValueError(f"this is no snapshot of a particle stream (format {found.get('format')!r}, not {_FORMAT!r}): "
                             "load what ParticleStream.state_dict returned")
        if lacking := sorted(_HELD - set(found)):
            raise ValueError(f"the snapshot is damaged: it lacks {lacking}")
        for what, value in self._settings().items():
            if what in found and (type(found[what]) is not type(value) or found[what] != value):  # early ones tell of fewer
                raise ValueError(f"the snapshot is of a stream with {what} {found[what]!r}, and this one has {value!r}: make "
                                 "the ParticleFilter as it was")
        try:
            sound = read_snapshot(found, self.method.model, self.guide, self.method.num_particles)
            held = self._read_held(found, sound)
            device = torch.device("cpu") if sound.log_weights is None else sound.log_weights.device
            before = generator_states(device)
            try:
                set_generators(sound.generators, device)
            except BaseException:
                set_generators(before, device)
                raise
        except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(f"the snapshot is damaged: {error}") from error
        self.time, self.parameters, self._latents = sound.time, sound.parameters, sound.latents
        self._inputs, self._types = sound.inputs, sound.types
        self._log_weights, self.log_evidence = sound.log_weights, sound.log_evidence
        self._state, self._carry = sound.state, sound.carry
        self._checks.entered = sound.time
        self._keep(held)

    def _settings(self) -> dict[str, Any]:
        """What makes a stream another one."""
        method = self.method
        return {"filter": type(method).__name__, "model": type(method.model).__name__, "guide": type(self.guide).__name__,
                "num_particles": method.num_particles, "ess_threshold": float(method.ess_threshold),
                "resampling": named(method.resampler)}

    def _update(self, sequences: Sequences, parameters: dict[str, Tensor]) -> FilteredParticles:
        method, t = self.method, self.time + 1
        model, particles = method.model, method.num_particles
        model.check_inputs(sequences)
        frame = next(sequences.packed.frames(particles))._replace(t=t, first=t == 1)
        encoding, carry = self.guide.stream_rows(sequences, self._carry)
        encoding = map_state(lambda leaf: repeat_rows(leaf[:, 0], particles), encoding)
        population = method.population(self.guide)
        if t > 1:
            population.weights = Weights.of(self._log_weights)
        before = model.begin(frame) if t == 1 else self._state
        step = advance(model, self.guide, frame, before, encoding, self._log_weights, particles, population.between,
                       self._checks)
        latents = same_latents(model, self._latents, step.sites, frame)
        refuse_scaled(model, step)
        for name, site in step.sites.items():
            if site.observed:
                check_support(name, site.p, frame)
        factor = population.weigh(step)
        weights = population.weights
        record = Record(sequences.packed, particles, method.measured)
        record.add(step, weights, factor)
        moments = {name: Moments(mean[:, 0], variance[:, 0]) for name, (mean, variance) in record.moments().items()}
        kept, expectation = self._smooth(step, weights)
        self._keep(kept)
        self.time, self.parameters, self._latents, self._carry = t, parameters, latents, carry
        self._log_weights, self._state = step.log_weights, step.state
        self.log_evidence = factor if self.log_evidence is None else self.log_evidence + factor
        self._inputs, self._types = _shapes(sequences), _types(sequences) | _floating(self._types)
        drawn = {name: site.value.unflatten(0, (-1, particles)) for name, site in step.sites.items() if not site.observed}
        return FilteredParticles(moments, weights.ess, factor, drawn, weights.normalised, expectation)

    # What a subclass adds to the filter: what it makes of a step, keeps until the next, and writes to a snapshot.

    def _smooth(self, step: Step, weights: Weights) -> tuple[Any, Tensor | None]:
        return None, None

    def _keep(self, found: Any) -> None:
        pass

    def _held(self) -> dict[str, Any]:
        return {}

    def _read_held(self, found: Mapping[str, Any], snapshot: Snapshot) -> Any:
        """:raises ValueError: or another error, on what cannot be."""

    def _require_like_before(self, sequences: Sequences) -> None:
        where = f"the frame at time {self.time + 1}"
        batch = len(self._log_weights)
        if sequences.num_sequences != batch:
            raise ValueError(f"{where} holds {sequences.num_sequences} sequences and the ones before {batch}: a stream is fed "
                             "one frame (B, ...) of the same sequences")
        if sequences.device != self._log_weights.device:
            raise ValueError(f"{where} is on {sequences.device} and the particles on {self._log_weights.device}: move it with "
                             f".to({str(self._log_weights.device)!r})")
        found = _shapes(sequences)
        if found != self._inputs:
            raise ValueError(f"{where} has data and covariates of shapes {_listed(found)}, and the ones before "
                             f"{_listed(self._inputs)}: a stream is fed the same at every time, NaN where data is missing")
        before = _floating(self._types)
        for name, found in _floating(_types(sequences)).items():
            if found != before.get(name, found):
                raise TypeError(f"{where} has {name!r} of type {found}, and the ones before of {before[name]}: convert it with "
                                f".to(torch.{before[name]})")


def _shapes(sequences: Sequences) -> dict[str, list[int]]:
    return {name: list(value.shape[2:]) for name, value in sorted({**sequences.x, **sequences.covariates}.items())}


def _types(sequences: Sequences) -> dict[str, str]:
    return {name: str(value.dtype).removeprefix("torch.") for name, value in {**sequences.x, **sequences.covariates}.items()}


def _floating(types: Mapping[str, str]) -> dict[str, str]:
    return {name: kind for name, kind in types.items() if "float" in kind}


def _listed(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {('B', *shape)}".replace("'", "") for name, shape in shapes.items())
