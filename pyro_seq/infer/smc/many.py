"""One particle filter for each of many parameter values, side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from pyro_seq.engine.loop import Checked, Step, select, step_log_weight, weighted_step
from pyro_seq.engine.sites import GuideSites
from pyro_seq.engine.state import State, by_step, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.run import refuse_scaled
from pyro_seq.infer.smc.mapped import Draws, MappedSites, in_range
from pyro_seq.module import own_parameters, require_count
from pyro_seq.sequences import Frame, Sequences, first_rows, repeat_rows

if TYPE_CHECKING:
    from pyro_seq.infer.particle_filter import ParticleFilter

__all__ = ["ManyParticles", "log_evidence_at"]


def log_evidence_at(method: ParticleFilter, parameters: Mapping[str, Tensor], sequences: Sequences,
                    chunk_size: int | None = None) -> Tensor:
    """``(M, B)`` log evidence of each sequence under each of M parameter values, from filters of their own; see
    :meth:`ParticleFilter.log_evidence_at`."""
    _sorted_out(method.model, parameters)
    many = len(next(iter(parameters.values())))
    if chunk_size is not None:
        require_count("chunk_size", chunk_size, 1)
    found = []
    for start in range(0, many, chunk_size or many):
        part = {name: value[start:start + (chunk_size or many)] for name, value in parameters.items()}
        particles = ManyParticles(method, part, sequences)
        total = torch.zeros(len(particles), sequences.num_sequences, device=sequences.device)
        with particles.entered():
            for factor in particles.run():
                total = total.to(factor)
                total[:, :factor.shape[1]] += factor
        found.append(sequences.packed.unsort(total.mT).mT)
    return torch.cat(found)


class ManyParticles:
    """``M`` particle filters of a batch, each with its own parameter value, particles, weights and ancestors.

    The states are ``(M, n * N, ...)`` and the log weights ``(M, n, N)``. Between the steps all are resampled as so many
    sequences. The step is run by ``torch.func.vmap`` over the values, its random numbers drawn outside of it; a single value is
    run as it is.

    :param method: model, guide, number of particles and resampling.
    :param parameters: by name, ``(M, ...)``.
    :param sequences: the data.
    """

    def __init__(self, method: ParticleFilter, parameters: Mapping[str, Tensor], sequences: Sequences):
        self.method, self.sequences = method, sequences
        self.guide = PriorGuide(method.model) if method.guide is None else method.guide
        self.globals, self.attributes = _sorted_out(method.model, parameters)
        self.state: State = None
        self.log_weights: Tensor | None = None
        self.dead: Tensor | None = None
        """``(M, n)`` booleans: the data so far is impossible under the value."""
        self._checks = Checked()

    def __len__(self) -> int:
        return len(next(iter((*self.globals.values(), *self.attributes.values()))))

    def select(self, index: Tensor) -> ManyParticles:
        """The filters of some of the values, by ``(M',)`` indices that may repeat: what resampling of the values needs."""
        found = copy(self)
        found.globals = {name: value[index] for name, value in self.globals.items()}
        found.attributes = {name: value[index] for name, value in self.attributes.items()}
        found.state = map_state(lambda leaf: leaf[index], self.state)
        if self.log_weights is not None:
            found.log_weights, found.dead = self.log_weights[index], self.dead[index]
        return found

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Everything else is called in here: Pyro's parameter store is as it was afterwards."""
        with torch.no_grad(), own_parameters(self.method.model, self.guide):
            self._at(0, lambda: _read_all(self.method.model))
            yield

    def run(self) -> Iterator[Tensor]:
        """``(M, n)`` log of each step's factor of the evidence, in packed order, for the n sequences that still run."""
        guide, particles = self.guide, self.method.num_particles
        packed = self.sequences.packed
        encodings = guide.within(self._at, 0, lambda: self._prepare(packed))
        for frame in packed.frames(particles):
            encoding = map_state(lambda leaf, n=packed.counts[frame.t - 1]: repeat_rows(first_rows(leaf, n), particles),
                                 encodings[frame.t - 1])
            yield guide.within(self.advance, frame, encoding)

    def advance(self, frame: Frame, encoding: Any) -> Tensor:
        """Take one frame in: ``(M, n)`` log factors of the evidence, minus infinity from the first impossible frame on."""
        many, particles = len(self), self.method.num_particles
        n = frame.rows // particles
        if frame.first:
            state, log_weights, base = None, torch.zeros((), device=frame.device), 0.0
            self._probe(frame, encoding)
        else:
            state = map_state(lambda leaf: leaf[:, :frame.rows].flatten(0, 1), self.state)
            flat = self.log_weights[:, :n].flatten(0, 1)
            population = self.method.population(self.guide)
            if population.look_ahead is not None:
                raise ValueError("a look-ahead is not run for many parameter values at once: leave it out here")
            population.weights = Weights.of(flat)
            ancestors, flat = population.between(frame, state, None, flat)
            base = population.base.reshape(many, n) if isinstance(population.base, Tensor) else population.base
            state = state if ancestors is None else select(state, ancestors)
            state = map_state(lambda leaf: leaf.unflatten(0, (many, frame.rows)), state)
            log_weights = flat.reshape(many, n, particles)
        after, weight = self._alone(frame, encoding, state) if many == 1 else self._mapped(frame, encoding, state)
        log_weights = log_weights + weight.reshape(many, n, particles)
        return self._weigh(frame, after, log_weights, base)

    def _weigh(self, frame: Frame, state: State, log_weights: Tensor, base: Tensor | float) -> Tensor:
        highest = log_weights.amax(-1)
        dead = highest == -torch.inf
        if self.dead is not None:
            dead = dead | self.dead[:, :dead.shape[1]]
        if not (dead | highest.isfinite()).all():
            value, sequence = (~(dead | highest.isfinite())).nonzero()[0].tolist()
            row = int(frame.sequence[sequence * log_weights.shape[2]])
            raise ValueError(f"a log weight is NaN or infinite at time {frame.t} in sequence {row} under parameter value "
                             f"{value}: look for a value outside its range, as a negative scale, or a state that has diverged")
        log_weights = torch.where(dead[..., None], 0.0, log_weights)
        self.state, self.log_weights, self.dead = state, log_weights, dead
        return torch.where(dead, -torch.inf, Weights.of(log_weights.flatten(0, 1)).log_mean.reshape(dead.shape) - base)

    def _at(self, index: int, fn: Callable[[], Any]) -> Any:
        """Run ``fn`` with one of the values in place."""
        return self.method.model.within(fn, globals={name: value[index] for name, value in self.globals.items()},
                                        attributes={name: value[index] for name, value in self.attributes.items()})

    def _prepare(self, packed: Any) -> list[State]:
        self.method.model.check_inputs(self.sequences)
        return by_step(map_state(packed.sort, self.guide.prepare_rows(self.sequences)), self.sequences.num_steps)

    def _probe(self, frame: Frame, encoding: Any) -> None:
        """The first step at the first value, with every check, for what it may say; its draws are taken back."""
        model = self.method.model
        with poutine.trace() as tr, poutine.condition(data={name: value[0] for name, value in self.globals.items()}):
            model.within(lambda: None)
        for name, value in self.globals.items():
            shape = tuple(tr.trace.nodes[name]["fn"].shape())
            if tuple(value.shape[1:]) != shape:
                raise ValueError(f"parameters[{name!r}] has shape {tuple(value.shape)}; one value of it is of shape {shape}, "
                                 f"so that M of them are {(len(value), *shape)}")
        with torch.random.fork_rng([frame.device] if frame.device.type == "cuda" else []):
            sites, after, *_ = self._at(0, lambda: weighted_step(model, self.guide, model.begin(frame), frame, encoding))
        refuse_scaled(model, Step(frame, sites, None, after, None, None, None))

    def _alone(self, frame: Frame, encoding: Any, state: State) -> tuple[State, Tensor]:
        model = self.method.model

        def run() -> tuple[State, Tensor]:
            before = model.begin(frame) if frame.first else map_state(lambda leaf: leaf[0], state)
            with self._checks:
                _, after, weight, _ = weighted_step(model, self.guide, before, frame, encoding)
            return after, weight

        after, weight = self._at(0, run)
        return map_state(lambda leaf: leaf[None], after), weight[None]

    def _mapped(self, frame: Frame, encoding: Any, state: State) -> tuple[State, Tensor]:
        model, guide = self.method.model, self.guide
        inner = frame._replace(first=False)  # the checks of the first step have been made
        reached: list[str] = []
        due = self._checks.due()

        def one(marker: Tensor, globals: dict[str, Tensor], attributes: dict[str, Tensor], state: State
                ) -> tuple[State, Tensor, dict[str, Tensor]]:
            def run() -> tuple[State, Tensor, dict[str, Tensor]]:
                before = model.begin(inner) if frame.first else state
                draws = Draws(marker, reached)
                proposal = guide.propose(before, inner, encoding, GuideSites(inner, draws.from_prior))
                with MappedSites(inner, draws, proposal, model.missing_feeds_state) as step:
                    after = model.apply(before, inner)
                with torch.enable_grad():  # densities are then computed without writing in place, which vmap refuses
                    weight = step_log_weight(step.sites, inner)
                return after, weight.detach(), in_range(step.sites) if due else {}

            return model.within(run, globals=globals, attributes=attributes)

        mapped = torch.func.vmap(one, in_dims=(0, 0, 0, None if state is None else 0), randomness="different")
        try:
            # No checks, which branch on tensors. What has no batching rule (torch's GRU cell) is run value by value: no news.
            with pyro.settings.context(validate_distributions_torch=False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop because")
                after, weight, right = mapped(torch.arange(len(self), device=frame.device), self.globals, self.attributes,
                                              state)
        except (RuntimeError, ValueError) as error:
            self._require_alone(frame, encoding, state)
            where = f"after site {reached[-1]!r}" if reached else "before its first site"
            what = str(error).strip().split("\n")[0]
            whose = "" if self.method.guide is None else f", or its guide, a {type(guide).__name__},"
            raise ValueError(f"the step of {type(model).__name__}{whose} at time {frame.t}, {where}, cannot be run for many "
                             f"parameter values at once by torch.func.vmap: {what} Write it without Python branches on "
                             "tensors, .item() and writing in place, or run one value after another, chunk_size=1") from error
        for name, fine in right.items():
            if not fine.all():
                raise ValueError(f"{name} is out of its range at time {frame.t} under parameter value "
                                 f"{int((~fine).nonzero()[0])}")
        return after, weight

    def _require_alone(self, frame: Frame, encoding: Any, state: State) -> None:
        """Raise what the step says to the first of the values that it cannot take even alone."""
        model = self.method.model
        for value in range(len(self)):
            before = None if frame.first else map_state(lambda leaf, value=value: leaf[value], state)
            try:
                with pyro.settings.context(validate_distributions_torch=True):
                    self._at(value, lambda before=before: weighted_step(
                        model, self.guide, model.begin(frame) if frame.first else before, frame, encoding))
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"parameter value {value} at time {frame.t}: {error}") from error


def _sorted_out(model: Any, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which of the values are of global sites, and which of the model's own parameters."""
    name = type(model).__name__
    if model.state_grows:
        raise TypeError("a model from seq.from_pyro is not run for many parameter values: declare it as a StateSpaceModel")
    if not parameters:
        raise ValueError(f"parameters is empty: give tensors (M, ...) by name, of {_known(model) or 'a model with parameters'}")
    sites = model.global_sites()
    found, own = {}, {}
    own_names = _own_parameters(model)
    for key, value in parameters.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) == 0:
            raise ValueError(f"parameters[{key!r}] is not a tensor (M, ...) of M values")
        if key in sites:
            found[key] = value.detach()
        elif key in own_names:
            expected = tuple(own_names[key].shape)
            if tuple(value.shape[1:]) != expected:
                raise ValueError(f"parameters[{key!r}] has shape {tuple(value.shape)}; one value of it is of shape {expected}, "
                                 f"so that M of them are {(len(value), *expected)}")
            own[key] = value.detach()
        else:
            hint = " (that of a module inside it cannot be given: make it a PyroSample)" if "." in key else ""
            raise ValueError(f"{name} has no global site or parameter {key!r}{hint}; there are {_known(model)}")
    if lacking := sorted(set(sites) - set(found)):
        raise ValueError(f"parameters lacks the global parameters {lacking} of {name}: give M values of each")
    if len({len(value) for value in parameters.values()}) > 1:
        raise ValueError(f"parameters holds {({k: len(v) for k, v in parameters.items()})} values: as many of each")
    return found, own


def _own_parameters(model: Any) -> dict[str, Tensor]:
    plain = (name for name, value in model._parameters.items() if value is not None and not name.endswith("_unconstrained"))
    names = [*model._pyro_params, *plain]
    with own_parameters(model):
        return {name: getattr(model, name).detach() for name in names}


def _read_all(model: Any) -> None:
    """Read every parameter, so that Pyro's store holds them before vmap, inside of which it cannot take them up."""
    for module in model.modules():
        if isinstance(module, PyroModule):
            plain = (name for name, value in module._parameters.items() if value is not None)
            for name in (*module._pyro_params, *plain, *module._modules):
                getattr(module, name)


def _known(model: Any) -> list[str]:
    return [*model.global_sites(), *_own_parameters(model)]
