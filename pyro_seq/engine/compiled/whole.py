"""Draw the latents of a window and score all its times, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.compiled.compiler import Compiler, Run
from pyro_seq.engine.compiled.gradients import OWN_NOISE, call
from pyro_seq.engine.compiled.recurrence import encoded
from pyro_seq.engine.compiled.rollout import Rollout, roll
from pyro_seq.engine.families import apart, rebuilt
from pyro_seq.engine.generators import generator_states, set_generators
from pyro_seq.engine.loop import Plan, Window, draw_step, weighted_step
from pyro_seq.engine.score import Term, join, step_terms, term_of
from pyro_seq.engine.sites import Site, StepSites, check_support
from pyro_seq.engine.state import State, map_state
from pyro_seq.sequences import Frame, Packed, Sequences, first_rows, repeat_rows

__all__ = ["Whole", "draw_and_score", "draw_and_weigh", "window_rows"]


class Whole(NamedTuple):
    """What was drawn and scored."""

    terms: list[Term]
    state: State
    """After the last step, of the sequences that run there."""
    auxiliary: Tensor | None
    """The sum of the guide's further objective."""


class _Data(NamedTuple):
    """A frame's tensors."""

    x: dict[str, Tensor]
    covariates: dict[str, Tensor]
    observed: dict[str, Tensor]
    sequence: Tensor
    t: Tensor


class Loop(NamedTuple):
    """A window of a batch, ready for compiled steps."""

    run: Run
    packed: Packed
    window: Window
    encodings: State
    """``(T, rows, ...)``"""
    data: _Data
    """``(T, rows, ...)``; sequences that have ended keep their rows."""
    state: State
    """Before the first step; ``None`` for a state-space model, whose first step is another than the later ones."""
    functions: _Functions
    generators: dict[str, Tensor]
    """The states of the random numbers before."""

    def first(self) -> tuple[State, _Data]:
        """What the first step reads beside the state, ``(rows, ...)``."""
        return map_state(lambda leaf: leaf[0], self.encodings), map_data(lambda value: value[0], self.data)

    def later(self, begun: int) -> tuple[State, _Data]:
        """What the steps from place ``begun`` on read, ``(T, rows, ...)``."""
        return map_state(lambda leaf: leaf[begun:], self.encodings), map_data(lambda value: value[begun:], self.data)

    def counts(self, begun: int, num_particles: int) -> list[int]:
        """Rows that run, from place ``begun`` on."""
        return [count * num_particles for count in self.packed.counts[self.window.start - 1 + begun:self.window.stop]]

    def found(self, first: Any, rolled: Rollout, terms: list[Term], num_particles: int) -> Whole:
        """The first step's terms, if it was run apart, with the others'."""
        auxiliary = [rolled.found["auxiliary"]]
        if first is not None:
            known = {term.name: term for term in first["terms"]}
            terms = [join([known[term.name], term]) for term in terms]
            auxiliary.append(first["auxiliary"])
        running = self.packed.counts[self.window.stop - 1] * num_particles
        parts = [part.sum() for part in auxiliary if part is not None]
        return Whole(terms, map_state(lambda leaf: leaf[:running], rolled.state), sum(parts) if parts else None)


def window_rows(compiler: Compiler | None, model: Any, guide: Any, sequences: Sequences, window: Window, carry: State) -> Any:
    """The guide's own, with compiled networks once the model and the guide have run as written."""
    plan = None if compiler is None else compiler.plans.get((model, guide))

    def rows() -> Any:
        return guide.window_rows(sequences, window.start, window.stop, carry)

    return rows() if plan is None or plan.seen < 2 else encoded(compiler.run(model, guide), rows, sequences.device)


def ready(compiler: Compiler, model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int) -> Loop | None:
    """``None`` where the window is left to the loop as written: when that has not yet run once, and checked the model and the
    data; where gaps have to be drawn; where the data has a gradient; and where it cannot be checked but by that loop."""
    plan = compiler.plans.setdefault((model, guide), Plan())
    packed, (start, stop) = sequences.packed, window[:2]
    missing = any(packed.missing[start - 1:stop])
    unknown = plan.seen < 2 or plan.supports is None or (model, guide, OWN_NOISE) in compiler.declined
    if unknown or missing and model.missing_feeds_state or any(
            value.requires_grad for value in (*sequences.x.values(), *sequences.covariates.values())):
        return None
    model.check_inputs(sequences)
    run, generators = compiler.run(model, guide), generator_states(sequences.device)
    encodings = window.encodings
    if encodings is None:
        encodings = encoded(run, lambda: guide.prepare_rows(sequences), sequences.device)
        if stop - start + 1 < sequences.num_steps:
            encodings = map_state(lambda leaf: leaf[:, start - 1:stop], encodings)
    running = packed.counts[start - 1]

    def by_time(value: Tensor) -> Tensor:
        """By time first, so that each step's rows lie together."""
        return repeat_rows(first_rows(value, running), num_particles).transpose(0, 1).contiguous()

    def part(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: by_time(value[:, start - 1:stop]) for name, value in values.items()}

    frame = next(packed.frames(num_particles, start, start))
    state = model.begin(frame) if start == 1 else map_state(lambda leaf: leaf[:frame.rows], window.state)
    for name, p in plan.supports.items() if start == 1 else ():
        check_support(name, p, frame)
    shape = (stop - start + 1, frame.rows)
    times = torch.arange(start, stop + 1, device=frame.device)[:, None].expand(shape)
    data = _Data(part(packed.x), part(packed.covariates), part(packed.observed), frame.sequence.expand(shape), times)
    return Loop(run, packed, window, map_state(lambda leaf: by_time(packed.sort(leaf)), encodings), data, state,
                _Functions(model, guide, plan, missing, frame.device), generators)


def draw_and_score(compiler: Compiler, model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int,
                   analytic_kl: bool) -> Whole | None:
    """As the loop that only draws, followed by :func:`~pyro_seq.engine.score.terms`; ``None`` where that is left to them."""
    loop = ready(compiler, model, guide, sequences, window, num_particles)
    if loop is None or loop.state is None and window.start == window.stop:
        return None
    state, first = loop.state, None
    if state is None:
        state, first = call(loop.run, "the first step", loop.functions.draw_and_score, *loop.first(), analytic_kl)
    begun = int(first is not None)
    counts = loop.counts(begun, num_particles)
    rolled = roll(loop.run, "the step that draws", loop.functions.draw, state, loop.later(begun), counts)
    if rolled is None:
        set_generators(loop.generators, sequences.device)
        return None
    flat = _data(sequences.packed.flat(window.start + begun, window.stop, num_particles))
    terms = call(loop.run, "the step that scores", loop.functions.score, rolled.before, flat, rolled.found["drawn"],
                 analytic_kl, fill=True)
    # Of what is not a number, the loop as written says where.
    if loop.run.declined(OWN_NOISE) or any(bool(term.log_p.detach().sum().isnan()) for term in terms):
        set_generators(loop.generators, sequences.device)
        return None
    return loop.found(first, rolled, terms, num_particles)


def draw_and_weigh(compiler: Compiler, model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int,
                   between: Callable[[int, list[Term] | None], Tensor | None]) -> Whole | None:
    """As the loop that scores each step, with particles that are selected between the steps.

    :param between: given the time of the step to come and the terms of the one before, the ancestors ``(n, N)`` of the running
        sequences; ``None`` where particles go on from themselves. Before the first step of the window there are no terms.
    """
    loop = ready(compiler, model, guide, sequences, window, num_particles)
    if loop is None or loop.state is None and window.start == window.stop:
        return None
    state, first = loop.state, None
    if state is None:
        state, first = call(loop.run, "the first step", loop.functions.weigh, None, *loop.first())
    begun = int(first is not None)
    counts, rows = loop.counts(begun, num_particles), sequences.packed.counts[window.start - 1] * num_particles

    def select(place: int, found: Any) -> Tensor | None:
        found = first if place == 0 else found
        ancestors = between(window.start + begun + place, None if found is None else found["terms"])
        if ancestors is None:
            return None
        own = torch.arange(rows, device=ancestors.device)
        chosen = ancestors + torch.arange(len(ancestors), device=ancestors.device)[:, None] * num_particles
        return torch.cat([chosen.reshape(-1), own[chosen.numel():]])

    rolled = roll(loop.run, "the step that weighs", loop.functions.weigh, state, loop.later(begun), counts, select)
    if rolled is None:
        set_generators(loop.generators, sequences.device)
        return None
    return loop.found(first, rolled, rolled.found["terms"], num_particles)


def map_data(fn: Callable[[Tensor], Tensor], data: _Data) -> _Data:
    return _Data(*({name: fn(value) for name, value in part.items()} if isinstance(part, dict) else fn(part) for part in data))


def _data(frame: Frame) -> _Data:
    return _Data(dict(frame.x), dict(frame.covariates), dict(frame.observed), frame.sequence, frame.time)


class _Functions:
    """What is compiled, of a model and a guide."""

    def __init__(self, model: Any, guide: Any, plan: Plan, missing: bool, device: torch.device):
        self.model, self.guide, self.plan, self.missing, self.device = model, guide, plan, missing, device

    def frame(self, data: _Data) -> Frame:
        return Frame(data.t, len(data.t), data.x, data.covariates, self.missing, data.sequence, False, data.observed,
                     self.device)

    def draw_and_score(self, encoding: Any, data: _Data, analytic_kl: bool) -> tuple[State, dict[str, Any]]:
        """The first step of a state-space model."""
        after, found = self.draw(None, encoding, data)
        return after, {"terms": self.score(None, data, found["drawn"], analytic_kl), "auxiliary": found["auxiliary"]}

    def draw(self, state: State, encoding: Any, data: _Data) -> tuple[State, dict[str, Any]]:
        """One step: the state after it, and what was drawn."""
        sites, after, auxiliary = draw_step(self.model, self.guide, state, self.frame(data), encoding, self.plan)
        drawn = {name: (site.value, _proposed(site)) for name, site in sites.items() if not site.observed}
        return after, {"drawn": drawn, "auxiliary": auxiliary}

    def weigh(self, state: State, encoding: Any, data: _Data) -> tuple[State, dict[str, Any]]:
        """One step: the state after it, and the terms of its weight."""
        sites, after, _, auxiliary = weighted_step(self.model, self.guide, state, self.frame(data), encoding)
        return after, {"terms": step_terms(self.model, sites), "auxiliary": auxiliary}

    def score(self, state: State, data: _Data, drawn: dict[str, Any], analytic_kl: bool) -> list[Term]:
        """All steps: the terms of the bound."""
        values = {name: value for name, (value, _) in drawn.items()}
        with StepSites(self.frame(data), values=values) as scored:
            self.model.apply(state, self.frame(data))
        found = []
        for name, site in scored.sites.items():
            if site.observed:
                found.append(term_of(site, [], analytic_kl, False))
                continue
            value, q = drawn[name]
            if q is None or q[0] == "q":
                proposal = None if q is None else rebuilt(q[1], q[2])
                found.append(term_of(site, [Site(name, value, None, proposal, False, None, 1.0, None)], analytic_kl, False))
            else:
                found.append(Term(name, False, site.log_p(), q[1], None, None if q[2] else q[1]))
        return found


def _proposed(site: Site) -> Any:
    """What a latent was drawn from, as tensors: its parameters where it can be made of them, else its log density."""
    if site.q is None:
        return None
    found = apart(site.q)
    return ("log_q", site.log_q(), site.q.has_rsample) if found is None else ("q", found[0], found[1])
