"""A particle filter that is handed one frame at a time."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.loop import Checked, advance, same_latents
from pyro_seq.engine.sites import check_support
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.posterior import Draws, Moments, draw_future
from pyro_seq.infer.run import entered, refuse_scaled
from pyro_seq.infer.smc.record import Record
from pyro_seq.infer.stream import one_frame
from pyro_seq.module import own_parameters, require_count
from pyro_seq.sequences import Sequences, repeat_rows

if TYPE_CHECKING:
    from pyro_seq.infer.particle_filter import ParticleFilter

__all__ = ["FilteredParticles", "ParticleStream"]

_FORMAT = "pyro_seq particle stream 1"


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
        sequences = one_frame({} if x is None else x, mask, covariates)
        if self.time:
            self._require_like_before(sequences)
        model, guide = self.method.model, self.guide
        generators = _generators(sequences.device)
        try:
            if self.time == 0:
                return entered(model, guide, sequences, lambda values: self._update(sequences, values))
            with torch.no_grad(), own_parameters(model, guide):
                return guide.within(lambda: model.within(lambda: self._update(sequences, self.parameters),
                                                         globals=self.parameters))
        except BaseException:
            _set_generators(generators, sequences.device)
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
            "format": _FORMAT, "model": type(self.method.model).__name__, "guide": type(self.guide).__name__,
            "num_particles": self.method.num_particles, "time": self.time, "log_weights": copy(self._log_weights),
            "log_evidence": copy(self.log_evidence), "state": _to_plain(self._state), "carry": _to_plain(self._carry),
            "parameters": {name: copy(value) for name, value in self.parameters.items()},
            "latents": None if self._latents is None else sorted(self._latents), "inputs": dict(self._inputs),
            "generators": _generators(device)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a snapshot of a stream of the same model, guide and number of particles; torch's generators are set.

        :raises ValueError: if it is no such snapshot; the stream is then as it was.
        """
        found = dict(state_dict) if isinstance(state_dict, Mapping) else {}
        if found.get("format") != _FORMAT:
            raise ValueError(f"this is no snapshot of a particle stream (format {found.get('format')!r}, not {_FORMAT!r}): "
                             "load what ParticleStream.state_dict returned")
        if lacking := sorted(set(self.state_dict()) - set(found)):
            raise ValueError(f"the snapshot is damaged: it lacks {lacking}")
        ours = {"model": type(self.method.model).__name__, "guide": type(self.guide).__name__,
                "num_particles": self.method.num_particles}
        for what, value in ours.items():
            if found[what] != value:
                raise ValueError(f"the snapshot is of a stream with {what} {found[what]!r}, and this one has {value!r}: make "
                                 "the ParticleFilter as it was")
        try:
            state, carry = _of_plain(found["state"]), _of_plain(found["carry"])
            time, log_weights, log_evidence = found["time"], found["log_weights"], found["log_evidence"]
            _require_sound(time, log_weights, log_evidence, state, carry, found["generators"], self.method.num_particles)
            parameters = {str(name): value.clone() for name, value in found["parameters"].items()}
            inputs = {str(name): [int(n) for n in shape] for name, shape in found["inputs"].items()}
            latents = None if found["latents"] is None else set(found["latents"])
            _set_generators(found["generators"], torch.device("cpu") if log_weights is None else log_weights.device)
        except (TypeError, KeyError, IndexError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(f"the snapshot is damaged: {error}") from error
        self.time, self.parameters, self._inputs, self._latents = time, parameters, inputs, latents
        self._log_weights, self.log_evidence = log_weights, log_evidence
        self._state, self._carry = state, carry
        self._checks.entered = time

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
        self.time, self.parameters, self._latents, self._carry = t, parameters, latents, carry
        self._log_weights, self._state = step.log_weights, step.state
        self.log_evidence = factor if self.log_evidence is None else self.log_evidence + factor
        self._inputs = _shapes(sequences)
        drawn = {name: site.value.unflatten(0, (-1, particles)) for name, site in step.sites.items() if not site.observed}
        return FilteredParticles(moments, weights.ess, factor, drawn, weights.normalised)

    def _require_like_before(self, sequences: Sequences) -> None:
        where = f"the frame at time {self.time + 1}"
        batch = len(self._log_weights)
        if not sequences.x:
            raise ValueError(f"{where} holds no data: pass x, NaN or mask= where it is missing")
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


def _shapes(sequences: Sequences) -> dict[str, list[int]]:
    return {name: list(value.shape[2:]) for name, value in sorted({**sequences.x, **sequences.covariates}.items())}


def _listed(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {('B', *shape)}".replace("'", "") for name, shape in shapes.items())


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a run on ``device`` draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def _to_plain(state: State) -> Any:
    """A state as tensors in lists and dicts, which can be loaded with ``weights_only``."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {"kind": "dict", "names": list(state), "parts": [_to_plain(part) for part in state.values()]}
    parts = [_to_plain(part) for part in state]
    if hasattr(state, "_fields"):
        return {"kind": type(state).__name__, "names": list(state._fields), "parts": parts}
    return {"kind": type(state).__name__, "parts": parts}


def _of_plain(plain: Any) -> State:
    """The reverse; a named tuple comes back as one of its name and fields, until the next step makes the user's own."""
    if plain is None:
        return None
    if isinstance(plain, Tensor):
        return plain.clone()
    kind, parts = plain["kind"], [_of_plain(part) for part in plain["parts"]]
    if kind == "dict":
        return dict(zip(plain["names"], parts, strict=True))
    if "names" in plain:
        return namedtuple(kind, plain["names"])(*parts)
    return tuple(parts) if kind == "tuple" else parts


def _require_sound(time: Any, log_weights: Any, log_evidence: Any, state: State, carry: State, generators: Any, particles: int
                   ) -> None:
    if not isinstance(time, int) or time < 0:
        raise ValueError(f"time={time!r}; it is a count of frames")
    if not isinstance(generators, Mapping) or "cpu" not in generators:
        raise ValueError("generators holds no state of the CPU's generator")
    if time == 0:
        return
    if log_weights.dim() != 2 or log_weights.shape[1] != particles or bool(log_weights.isnan().any()):
        raise ValueError(f"log_weights has shape {tuple(log_weights.shape)}, or entries that are NaN; it is (B, {particles})")
    batch = len(log_weights)
    if log_evidence.shape != (batch,):
        raise ValueError(f"log_evidence has shape {tuple(log_evidence.shape)}; it is ({batch},)")
    if any(leaf.shape[:1] != (batch * particles,) for leaf in leaves(state)):
        raise ValueError(f"the state has tensors of shapes {[tuple(leaf.shape) for leaf in leaves(state)]}; each has "
                         f"{batch} * {particles} rows")
    leaves(carry)
