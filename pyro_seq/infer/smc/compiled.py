"""A run of the particle filter with compiled turns: what is decided by values, and what cannot be compiled, is done here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_seq.engine.compiled.compiler import Compiled, Run
from pyro_seq.engine.compiled.nest import put_together, take_apart
from pyro_seq.engine.compiled.padding import filled
from pyro_seq.engine.compiled.recurrence import encoded
from pyro_seq.engine.compiled.trace import Noise
from pyro_seq.engine.loop import Checked, Step, advance, refuse_scaled, same_latents
from pyro_seq.engine.sites import Site
from pyro_seq.engine.state import State, by_step, map_state
from pyro_seq.engine.weights import Weights
from pyro_seq.infer.smc.families import Families
from pyro_seq.infer.smc.population import Population, Resampled, resample, which
from pyro_seq.infer.smc.record import Record, Told
from pyro_seq.infer.smc.turn import Carried, Given, Kind, Turn, turn
from pyro_seq.resampling import Ancestral, multinomial, residual, stratified, systematic
from pyro_seq.sequences import Frame, Packed, Sequences, first_rows, repeat_rows

if TYPE_CHECKING:
    from pyro_seq.infer.particle_filter import ParticleFilter

__all__ = ["Failed", "filter_compiled"]


_COMPILED = (multinomial, residual, stratified, systematic)
_NAMES = {"none": "the step", "some": "the step after resampling some sequences", "all": "the step after resampling"}


class Failed(Exception):
    """A weight is no number, or all of a sequence are zero: the run as written says where, and why."""


def filter_compiled(method: ParticleFilter, guide: Any, sequences: Sequences, record: Record, batch: int) -> Population:
    """Filter a batch, and let ``record`` keep of it what it keeps.

    :param guide: a sequential guide, entered, as is the model.
    :param batch: the number of sequences that an error counts by, where they are repeated.
    :raises Failed: where the run as written raises an error.
    """
    found = _Run(method, guide, sequences, record, batch)
    for t in tqdm(range(1, sequences.num_steps + 1), disable=not method.progress, desc="particle filter"):
        found.step(t)
    found.hand_over()
    record.finish()
    return found.population


class _Turn:
    """A compiled turn, and where in its results things are."""

    def __init__(self, compiled: Compiled, live: list[Tensor]):
        self.compiled, self.live = compiled, [live[index] for index in compiled.live]
        self.where: Turn = put_together(compiled.plan, count())
        self.plan = compiled.plan[1][0]
        """Of what is carried on, the first ``carried`` results."""
        self.carried = len(_places(self.where.carried))
        self.form: Hashable = None


class _Run:
    def __init__(self, method: ParticleFilter, guide: Any, sequences: Sequences, record: Record, batch: int):
        model, packed = method.model, sequences.packed
        model.check_inputs(sequences)
        self.method, self.model, self.guide, self.record, self.batch = method, model, guide, record, batch
        self.packed, self.particles, self.population = packed, method.num_particles, method.population(guide)
        self.run: Run = method.compiler.run(*((model,) if method.guide is None else (model, guide)))
        self.ragged = packed.counts[-1] < packed.counts[0]
        encodings = encoded(self.run, lambda: guide.prepare_rows(sequences), sequences.device)
        encodings = map_state(lambda leaf: _in_order(packed.sort(leaf).transpose(0, 1)).transpose(0, 1), encodings)
        self.encodings = by_step(encodings, sequences.num_steps)
        self.given = _Given(packed, self.encodings, self.ragged)
        if model.state_grows:
            method.compiler.warn("the step", "the state of a from_pyro model is its path, longer at each step")
        self.checks, self.names = Checked(), None
        self.turns: dict[Hashable, _Turn] = {}
        self.flat: list[Tensor] = []
        """What is carried: of the sequences that run, and of some that have ended."""
        self.plan: Any = None
        self.form: Hashable = None
        self.running = packed.counts[0]
        self.ess = self.largest = torch.empty(0)
        self.sizes: list[float] = []
        """``ess``"""
        self.least = 0.0
        """The effective sample size below which particles are resampled."""
        self.inside = isinstance(method.resampler, Ancestral) and method.resampler.scheme in _COMPILED
        """Whether what resamples is part of a turn; a function that the user wrote, or that takes its time, runs as written."""
        self.exact = False
        """Whether graphs draw random numbers themselves, so that no row may be there for nothing."""

    def step(self, t: int) -> None:
        running, missing = self.packed.counts[t - 1], self.packed.missing[t - 1]
        if t == 1 or self.model.state_grows or missing and self.model.missing_feeds_state:
            return self.as_written(t)
        looked = chosen = None
        if self.population.look_ahead is not None:
            frame, state, encoding = self.before(t)
            weights = self.weights().first(running)
            looked = self.population.looked(frame, state, encoding, weights.log)
            chosen = self.population.choose(weights, looked)
            how = which(chosen)
        elif self.method.ess_threshold == 1.0:
            how = "all"
        else:
            low = [ess < self.least for ess in self.sizes[:running]]
            how = "none" if True not in low else "all" if False not in low else "some"
            chosen = torch.tensor(low, device=self.ess.device) if how == "some" else None
        kind, resampled = Kind(how, missing, self.record.reads_steps), None
        if how != "none" and not self.inside:
            weights = self.weights().first(running)
            resampled = resample(self.method.resampler, weights, looked, self.before(t)[1], chosen, how)
        extra = chosen if how == "some" and self.inside else None, looked, resampled
        found = self.turn(kind, t, running, extra)
        if found is None:
            return self.as_written(t, resampled, looked)
        if running < self.running:
            self.hand_over()
            self.record.set_aside(running)
            self.running = running
            self.hand_over()
        self.compiled(found, t, extra)

    def turn(self, kind: Kind, t: int, running: int, extra: tuple[Any, ...]) -> _Turn | None:
        """A turn as compiled, if it is."""
        size = self.size(running)
        key = kind, size, self.form
        if key not in self.turns:
            carried = put_together(self.plan, iter(_resized(self.flat, size)))
            tensors: list[Tensor] = []
            plan = take_apart(extra, tensors)
            extra = put_together(plan, iter([filled(value, size) for value in tensors]))
            given = self.given.at(t, size)._replace(chosen=extra[0], looked=extra[1], resampled=extra[2])
            compiled = self.run.find(_NAMES[kind.how], self._turn, self.method.resampler, kind, carried, given)
            if compiled is None:
                return None
            if compiled.drawn_inside and not self.exact:
                self.exact = True
                return self.turn(kind, t, running, extra)
            self.turns[key] = _Turn(compiled, self.run.live)
        return self.turns[key]

    def _turn(self, resampler: Any, kind: Kind, carried: Carried, given: Given) -> Any:
        return turn(self.model, self.guide, self.method.measured, resampler, kind, carried, given)

    def size(self, running: int) -> int:
        """A number of sequences, at least ``running``, that turns are compiled for: all, a quarter of them, ..."""
        if self.exact:
            return running
        size = self.packed.counts[0]
        while size // 4 >= running:
            size //= 4
        return size

    def compiled(self, found: _Turn, t: int, extra: tuple[Any, ...]) -> None:
        running, size, where = self.running, self.size(self.running), found.where
        flat = self.flat if len(self.flat[-1]) == size else _resized(self.flat, size)
        tensors = [filled(value, size) for value in _tensors(extra)] if any(part is not None for part in extra) else []
        if size == running:
            noise = [part.draw() for part in found.compiled.noise]
        else:
            noise = [_some(part, running, size, self.particles) for part in found.compiled.noise]
        try:
            results = found.compiled.call(*flat, *self.given.flat(t, size), *tensors, *found.live, *noise)
        except RuntimeError as error:  # an index out of range
            raise Failed from error
        self.flat, self.plan = list(results[:found.carried]), found.plan
        if found.form is None:
            found.form = _form(found.plan, self.flat)
        self.form = found.form
        factor, self.ess, self.largest = results[where.factor], results[where.ess], results[where.largest]
        ess, largest = self.ess, self.largest
        moments = {name: (results[mean], results[variance]) for name, (mean, variance) in where.moments.items()}
        if size > running:
            factor, ess, largest = factor[:running], ess[:running], largest[:running]
            moments = {name: (mean[:running], variance[:running]) for name, (mean, variance) in moments.items()}
        self.sizes = ess.tolist()
        if not math.isfinite(sum(self.sizes)):
            raise Failed
        if where.adapted is not None:
            self.population.adapted = self.population.adapted and bool(results[where.adapted][:running].all())
        if self.record.reads_steps:
            self.tell(t, put_together(found.compiled.plan, iter(results)), factor, moments)
        else:
            self.record.keep(factor, ess, largest, moments)

    def tell(self, t: int, found: Turn, factor: Tensor, moments: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Hand the step over to a record that wants it whole."""
        rows, carried, weights = self.running * self.particles, self.carried(), self.weights()
        sites = {name: Site(name, first_rows(value, rows), None, None, False, None, 1.0, None)
                 for name, value in found.latents.items()}
        ancestors = None if found.ancestors is None else first_rows(found.ancestors, self.running)
        step = Step(self.frame(t), sites, map_state(lambda leaf: first_rows(leaf, rows), found.before), carried.state,
                    weights.log, ancestors, None)
        self.record.add(step, weights, factor, None, Told(Families(carried.eve, carried.log_correction), moments))

    def as_written(self, t: int, resampled: Resampled | None = None, looked: Tensor | None = None) -> None:
        """A step as the run as written does it.

        :param resampled: what has been, if anything, with ``looked``.
        """
        running, population, record = self.packed.counts[t - 1], self.population, self.record
        frame, state, encoding = self.before(t)
        log = None
        if t > 1:
            self.hand_over()
            population.weights = self.weights()
            log = population.weights.log[:running]
        between = population.between
        if resampled is not None:
            population.base, population.chances = resampled.base, resampled.chances
            population.foreseen = 0.0 if looked is None else resampled.foreseen(looked)

            def between(*_: Any) -> tuple[Tensor | None, Tensor]:
                return resampled.plan, resampled.log_weights

        step = advance(self.model, self.guide, frame, state, encoding, log, self.particles, between, self.checks)
        self.names = same_latents(self.model, self.names, step.sites, frame)
        refuse_scaled(self.model, step)
        factor = population.weigh(step, self.batch)
        weights = population.weights
        record.add(step, weights, factor, population.chances)
        self.running, self.ess, self.largest, self.flat = running, weights.ess, weights.largest, []
        self.sizes = weights.ess.tolist()
        families = record.families
        self.plan = take_apart(Carried(step.state, weights.log, weights.normalised, weights.log_mean, families.eve,
                                       families.log_correction), self.flat)
        self.flat = [_in_order(value) for value in self.flat]
        self.form = _form(self.plan, self.flat)
        self.least = float(torch.tensor(self.method.ess_threshold * self.particles, dtype=weights.ess.dtype))

    def before(self, t: int) -> tuple[Frame, State, State]:
        """The frame, the states and the encodings with which a step begins as written."""
        running = self.packed.counts[t - 1]
        frame, rows = self.frame(t), running * self.particles
        state = self.model.begin(frame) if t == 1 else map_state(lambda leaf: first_rows(leaf, rows), self.carried().state)
        encoding = map_state(lambda leaf: repeat_rows(first_rows(leaf, running), self.particles), self.encodings[t - 1])
        return frame, state, encoding

    def frame(self, t: int) -> Frame:
        return next(self.packed.frames(self.particles, t, t))

    def carried(self) -> Carried:
        """Of the sequences that run."""
        return put_together(self.plan, iter(_resized(self.flat, self.running)))

    def weights(self) -> Weights:
        carried = self.carried()
        return Weights(carried.log, carried.normalised, carried.log_mean, self.ess[:self.running], self.largest[:self.running])

    def hand_over(self) -> None:
        """Let the record know what it would, had the steps been done as written."""
        if self.plan is not None:
            carried = self.carried()
            self.record.last = carried.state, self.weights()
            self.record.families = Families(carried.eve, carried.log_correction)


class _Given:
    """What the turns of a batch are given."""

    def __init__(self, packed: Packed, encodings: list[State], ragged: bool):
        def by_time(values: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
            return {name: _in_order(value.transpose(0, 1)).unbind(0) for name, value in values.items()}

        self.x, self.covariates, self.observed = by_time(packed.x), by_time(packed.covariates), by_time(packed.observed)
        self.encodings, self.order, steps = encodings, packed.order, len(packed.counts)
        self.times = torch.arange(1, steps + 1, device=packed.order.device).unbind(0)
        self.running = packed.running.unbind(0) if ragged else (None,) * steps
        self.tensors: dict[int, list[tuple[Tensor, ...]]] = {}

    def at(self, t: int, size: int) -> Given:
        def rows(values: dict[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
            return {name: first_rows(value[t - 1], size) for name, value in values.items()}

        running = self.running[t - 1]
        return Given(rows(self.x), rows(self.covariates), rows(self.observed),
                     map_state(lambda leaf: first_rows(leaf, size), self.encodings[t - 1]), first_rows(self.order, size),
                     self.times[t - 1], None if running is None else first_rows(running, size), None, None, None)

    def flat(self, t: int, size: int) -> tuple[Tensor, ...]:
        """The tensors of that, in order."""
        if size not in self.tensors:
            columns = [*self.x.values(), *self.covariates.values(), *self.observed.values()]
            whole = len(self.order) == size
            columns = columns if whole else [[first_rows(value, size) for value in column] for column in columns]
            if self.encodings[0] is not None:
                columns.extend(zip(*[map(lambda leaf: first_rows(leaf, size), _tensors(part)) for part in self.encodings]))
            columns.extend(([first_rows(self.order, size)] * len(self.times), self.times))
            if self.running[0] is not None:
                columns.append(self.running if whole else [value[:size] for value in self.running])
            self.tensors[size] = list(zip(*columns, strict=True))
        return self.tensors[size][t - 1]


def _tensors(nest: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    take_apart(nest, tensors)
    return tensors


def _places(nest: Any) -> list[int]:
    if isinstance(nest, int):
        return [nest]
    parts = nest.values() if isinstance(nest, dict) else nest if isinstance(nest, (tuple, list)) else ()
    return [place for part in parts for place in _places(part)]


def _form(plan: Hashable, flat: list[Tensor]) -> Hashable:
    return plan, tuple([(value.shape[1:], value.dtype) for value in flat])


def _in_order(value: Tensor) -> Tensor:
    """With the strides of its shape, also those of dimensions of one entry: graphs are made for them."""
    return value if value.is_contiguous() and 1 not in value.shape else value.clone(memory_format=torch.contiguous_format)


def _resized(flat: list[Tensor], size: int) -> list[Tensor]:
    """Of another number of sequences, the last tensor being ``(n,)``."""
    now = len(flat[-1])
    return flat if now == size else [filled(value, len(value) // now * size) for value in flat]


def _some(noise: Noise, running: int, size: int, particles: int) -> Tensor:
    """Random numbers of the rows that run, as the run as written draws them, among others that mean nothing."""
    if noise.shape[:1] not in ((size,), (size * particles,)):
        return noise.draw()
    drawn = noise.draw(noise.shape[0] // size * running)
    return torch.cat([drawn, drawn.new_full((noise.shape[0] - len(drawn), *noise.shape[1:]), 0.5)])
