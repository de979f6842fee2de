"""Draw the latents of a window and score all its times, compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.compiled.compiler import Compiler, Run
from pyro_seq.engine.compiled.gradients import call
from pyro_seq.engine.compiled.rollout import Rollout, roll
from pyro_seq.engine.families import apart, rebuilt
from pyro_seq.engine.loop import Plan, Step, Window, draw_step
from pyro_seq.engine.score import Term, join, term_of, terms
from pyro_seq.engine.sites import Site, StepSites, check_support
from pyro_seq.engine.state import State, by_step, map_state
from pyro_seq.sequences import Frame, Sequences, first_rows, repeat_rows

__all__ = ["Whole", "draw_and_score"]


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


def draw_and_score(compiler: Compiler, model: Any, guide: Any, sequences: Sequences, window: Window, num_particles: int,
                   analytic_kl: bool) -> Whole | None:
    """As the loop that only draws, followed by :func:`~pyro_seq.engine.score.terms`; ``None`` where that is left to them."""
    plan = compiler.plans.setdefault((model, guide), Plan())
    packed, (start, stop) = sequences.packed, window[:2]
    missing = any(packed.missing[start - 1:stop])
    if plan.seen < 2 or missing and model.missing_feeds_state or any(v.requires_grad for v in (
            *sequences.x.values(), *sequences.covariates.values())):
        return None
    model.check_inputs(sequences)
    run, generator = compiler.run(model, guide), _Generator(sequences.device)
    encodings = window.encodings
    if encodings is None:
        encodings = guide.prepare_rows(sequences)
        if stop - start + 1 < sequences.num_steps:
            encodings = map_state(lambda leaf: leaf[:, start - 1:stop], encodings)
    # By time first, so that each step's rows lie together.
    running = packed.counts[start - 1]
    encodings = by_step(map_state(lambda leaf: repeat_rows(first_rows(packed.sort(leaf), running), num_particles)
                                  .transpose(0, 1).contiguous().transpose(0, 1), encodings), stop - start + 1)
    frames = list(packed.frames(num_particles, start, stop, finished=True))
    state, first, begun = window.state, [], start
    if start == 1:
        state = model.begin(frames[0])
        if state is None or plan.supports is None:
            sites, state, auxiliary = draw_step(model, guide, state, frames[0], encodings[0], plan)
            first, begun = [Step(frames[0], sites, model.begin(frames[0]), state, None, None, auxiliary)], 2
        else:
            for name, p in plan.supports.items():
                check_support(name, p, frames[0])
    else:
        state = map_state(lambda leaf: leaf[:frames[0].rows], state)
    if begun > stop:
        return None
    whole = _Whole(model, guide, plan, missing, frames[0].device)
    steps = [(encodings[frame.t - start], _data(frame)) for frame in frames[begun - start:]]
    counts = [count * num_particles for count in packed.counts[begun - 1:stop]]
    rolled = roll(run, "the step that draws", whole.draw, state, steps, counts)
    if rolled is None:
        generator.rewind()
        return None
    found = whole.scored(run, rolled, packed.flat(begun, stop, num_particles), analytic_kl)
    if first:
        begins = {term.name: term for term in terms(model, packed, first, num_particles, analytic_kl)}
        found = [join([begins[term.name], term]) for term in found]
    running = packed.counts[stop - 1] * num_particles
    after = map_state(lambda leaf: leaf[:running], rolled.state)
    auxiliary = [part.sum() for part in (*(step.auxiliary for step in first), rolled.found["auxiliary"]) if part is not None]
    return Whole(found, after, sum(auxiliary) if auxiliary else None, first)


def _data(frame: Frame) -> _Data:
    return _Data(dict(frame.x), dict(frame.covariates), dict(frame.observed), frame.sequence, frame.time)


class _Generator:
    """The state of torch's random numbers, to go back to."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None
        self.state = torch.get_rng_state() if self.device is None else torch.cuda.get_rng_state(device)

    def rewind(self) -> None:
        if self.device is None:
            torch.set_rng_state(self.state)
        else:
            torch.cuda.set_rng_state(self.state, self.device)


class _Whole:
    """The functions that are compiled, of a model and a guide."""

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

    def scored(self, run: Run, rolled: Rollout, frame: Frame, analytic_kl: bool) -> list[Term]:
        return call(run, "the step that scores", self.score, rolled.before, _data(frame), rolled.found["drawn"], analytic_kl)


def _proposed(site: Site) -> Any:
    """What a latent was drawn from, as tensors: its parameters where it can be made of them, else its log density."""
    if site.q is None:
        return None
    found = apart(site.q)
    return ("log_q", site.log_q(), site.q.has_rsample) if found is None else ("q", found[0], found[1])
