"""Draw the latents of a window and score all its times, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.compiled.compiler import Compiler, Run
from pyro_seq.engine.compiled.gradients import call
from pyro_seq.engine.compiled.rollout import Rollout, roll
from pyro_seq.engine.families import apart, rebuilt
from pyro_seq.engine.loop import Plan, Step, Window, draw_step, weighted_step
from pyro_seq.engine.score import Term, join, step_terms, term_of, terms
from pyro_seq.engine.sites import Site, StepSites, check_support
from pyro_seq.engine.state import State, map_state
from pyro_seq.sequences import Frame, Packed, Sequences, first_rows, repeat_rows

__all__ = ["Whole", "draw_and_score", "draw_and_weigh", "remembered"]


class Whole(NamedTuple):
    """What was drawn and scored."""

    terms: list[Term]
    state: State
    """After the last step, of the sequences that run there."""
    auxiliary: Tensor | None
    """The sum of the guide's further objective."""
    first: list[Step]
    """Steps that were run as written."""


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
    plan: Plan
    frames: list[Frame]
    """Of all steps; sequences that have ended keep their rows."""
    encodings: State
    """``(T, rows, ...)``"""
    state: State
    """Before the first step; ``None`` for a state-space model, whose first step is another than the later ones."""
    checked: bool
    """Whether the data has been checked: otherwise the first step, run as written, does."""
    functions: _Functions
    generator: _Generator

    def first_encoding(self) -> State:
        return map_state(lambda leaf: leaf[0], self.encodings)

    def arguments(self, begun: int) -> tuple[State, _Data]:
        """What the steps from place ``begun`` on read beside the state, ``(T, rows, ...)``."""
        return map_state(lambda leaf: leaf[begun:], self.encodings), _stacked(self.frames[begun:])


def ready(compiler: Compiler, model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int) -> Loop | None:
    """``None`` where the window is left to the loop as written: when that has not yet run once, and checked the model and the
    data; where gaps have to be drawn; and where the data has a gradient."""
    plan = compiler.plans.setdefault((model, guide), Plan())
    packed, (start, stop) = sequences.packed, window[:2]
    missing = any(packed.missing[start - 1:stop])
    if plan.seen < 2 or missing and model.missing_feeds_state or any(v.requires_grad for v in (
            *sequences.x.values(), *sequences.covariates.values())):
        return None
    model.check_inputs(sequences)
    run, generator = compiler.run(model, guide), remembered(sequences.device)
    encodings = window.encodings
    if encodings is None:
        encodings = guide.prepare_rows(sequences)
        if stop - start + 1 < sequences.num_steps:
            encodings = map_state(lambda leaf: leaf[:, start - 1:stop], encodings)
    # By time first, so that each step's rows lie together.
    running = packed.counts[start - 1]
    encodings = map_state(lambda leaf: repeat_rows(first_rows(packed.sort(leaf), running), num_particles).transpose(
        0, 1).contiguous(), encodings)
    frames = list(packed.frames(num_particles, start, stop, finished=True))
    state = model.begin(frames[0]) if start == 1 else map_state(lambda leaf: leaf[:frames[0].rows], window.state)
    checked = start > 1 or state is not None and plan.supports is not None
    if start == 1 and checked:
        for name, p in plan.supports.items():
            check_support(name, p, frames[0])
    functions = _Functions(model, guide, plan, missing, frames[0].device)
    return Loop(run, plan, frames, encodings, state, checked, functions, generator)


def draw_and_score(compiler: Compiler, model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int,
                   analytic_kl: bool) -> Whole | None:
    """As the loop that only draws, followed by :func:`~pyro_seq.engine.score.terms`; ``None`` where that is left to them."""
    loop = ready(compiler, model, guide, sequences, window, num_particles)
    if loop is None or not loop.checked and window.start == window.stop:
        return None
    packed, state, first = sequences.packed, loop.state, []
    if not loop.checked:
        sites, after, further = draw_step(model, guide, state, loop.frames[0], loop.first_encoding(), loop.plan)
        first, state = [Step(loop.frames[0], sites, state, after, None, None, further)], after
    begun = window.start + len(first)
    counts = [count * num_particles for count in packed.counts[begun - 1:window.stop]]
    rolled = roll(loop.run, "the step that draws", loop.functions.draw, state, loop.arguments(len(first)), counts)
    if rolled is None:
        loop.generator.rewind()
        return None
    begins = {term.name: term for term in terms(model, packed, first, num_particles, analytic_kl)} if first else {}
    found = call(loop.run, "the step that scores", loop.functions.score, rolled.before,
                 _data(packed.flat(begun, window.stop, num_particles)), rolled.found["drawn"], analytic_kl)
    if any(bool(term.log_p.detach().sum().isnan()) for term in found):  # the loop as written says where
        loop.generator.rewind()
        return None
    if first:
        found = [join([begins[term.name], term]) for term in found]
    return Whole(found, _running(rolled, packed, window.stop, num_particles), _further(first, rolled), first)


def draw_and_weigh(compiler: Compiler, model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int,
                   between: Callable[[Frame, list[Term] | None], Tensor | None]) -> Whole | None:
    """As the loop that scores each step, with particles that are selected between the steps.

    :param between: given the frame to come and the terms of the step before, the ancestors ``(n, N)`` of the running sequences;
        ``None`` where particles go on from themselves. Before the first step of the window there are no terms.
    """
    loop = ready(compiler, model, guide, sequences, window, num_particles)
    if loop is None or not loop.checked and window.start == window.stop:
        return None
    packed, state, first = sequences.packed, loop.state, []
    if not loop.checked:
        sites, after, _, further = weighted_step(model, guide, state, loop.frames[0], loop.first_encoding())
        first, state = [Step(loop.frames[0], sites, state, after, None, None, further)], after
    begins = step_terms(model, first[0].sites) if first else None
    begun = window.start + len(first)
    counts = [count * num_particles for count in packed.counts[begun - 1:window.stop]]
    rows, frames = counts[0], loop.frames[len(first):]

    def select(place: int, found: Any) -> Tensor | None:
        ancestors = between(frames[place], found["terms"] if place else begins)
        if ancestors is None:
            return None
        own = torch.arange(rows, device=ancestors.device)
        chosen = ancestors + torch.arange(len(ancestors), device=ancestors.device)[:, None] * num_particles
        return torch.cat([chosen.reshape(-1), own[chosen.numel():]])

    rolled = roll(loop.run, "the step that weighs", loop.functions.weigh, state, loop.arguments(len(first)), counts, select)
    if rolled is None:
        loop.generator.rewind()
        return None
    found = rolled.found["terms"]
    if first:
        known = {term.name: term for term in begins}
        found = [join([known[term.name], term]) for term in found]
    return Whole(found, _running(rolled, packed, window.stop, num_particles), _further(first, rolled), first)


def _running(rolled: Rollout, packed: Packed, stop: int, num_particles: int) -> State:
    """The state after the last step, of the sequences that run there."""
    return map_state(lambda leaf: leaf[:packed.counts[stop - 1] * num_particles], rolled.state)


def _further(first: list[Step], rolled: Rollout) -> Tensor | None:
    """The sum of the guide's further objective."""
    parts = [part.sum() for part in (*(step.auxiliary for step in first), rolled.found["auxiliary"]) if part is not None]
    return sum(parts) if parts else None


def _stacked(frames: list[Frame]) -> _Data:
    """The data of several steps, ``(T, rows, ...)``."""
    def stack(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    return _Data(stack([frame.x for frame in frames]), stack([frame.covariates for frame in frames]),
                 stack([frame.observed for frame in frames]), torch.stack([frame.sequence for frame in frames]),
                 torch.stack([frame.time for frame in frames]))


def _data(frame: Frame) -> _Data:
    return _Data(dict(frame.x), dict(frame.covariates), dict(frame.observed), frame.sequence, frame.time)


def remembered(device: torch.device) -> _Generator:
    """The state of torch's random numbers on a device, to go back to."""
    return _Generator(device)


class _Generator:

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None
        self.state = torch.get_rng_state() if self.device is None else torch.cuda.get_rng_state(device)

    def rewind(self) -> None:
        if self.device is None:
            torch.set_rng_state(self.state)
        else:
            torch.cuda.set_rng_state(self.state, self.device)


class _Functions:
    """What is compiled, of a model and a guide."""

    def __init__(self, model: Any, guide: Any, plan: Plan, missing: bool, device: torch.device):
        self.model, self.guide, self.plan, self.missing, self.device = model, guide, plan, missing, device

    def frame(self, data: _Data) -> Frame:
        return Frame(data.t, len(data.t), data.x, data.covariates, self.missing, data.sequence, False, data.observed,
                     self.device)

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
