"""The weighted step, and the one forward loop over it.

    h_1 .. h_N  carried states          draw    z ~ q(z | h, x_t)         the guide
                                        weigh   log p(x_t, z | h) - log q(z | h, x_t)
                                        between nothing, or resample

Every forward method is this loop with its own guide and its own ``between``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.families import apart, rebuilt
from pyro_seq.engine.padded import pad_rows
from pyro_seq.engine.rows import check_rows
from pyro_seq.engine.sites import Site, StepSites, draw
from pyro_seq.engine.state import State, by_step, check_state, leaves, map_state, versions
from pyro_seq.sequences import Frame, Sequences, first_rows, repeat_rows

__all__ = ["Between", "Checked", "Plan", "Step", "Weigh", "Window", "advance", "draw_step", "forward", "is_due", "propagate",
           "refuse_scaled", "same_latents", "simulate", "weighted_step"]

Between = Callable[[Frame, State, Any, Tensor], tuple[Tensor | None, Tensor]]
"""Called before step ``t >= 2`` with the frame to come, the states, the guide's encoding of the frame and the log weights
``(n, N)`` of the running sequences. Returns where the particles come from: ancestors ``(n, N)``, a transport matrix
``(n, N, N)``, or ``None``, each from itself; and the log weights to go on with."""

Weigh = Callable[[dict[str, Site], Frame], Tensor]
"""``(rows,)`` log weight of one step, from its sites."""


class Step(NamedTuple):
    """What one step of the loop did, in packed order: ``n`` running sequences, ``N`` particles, ``n * N`` rows."""

    frame: Frame
    sites: dict[str, Site]
    before: State
    """The state the step started from."""
    state: State
    log_weights: Tensor | None
    """``(n, N)`` accumulated since the last resampling; ``None`` when the loop only draws."""
    ancestors: Tensor | None
    """``(n, N)`` indices of the particles of the previous step, or a transport matrix ``(n, N, N)``; ``None`` when nothing was
    resampled."""
    auxiliary: Tensor | None
    """``(n * N,)`` a further objective of the guide's own, to be minimised, where it has one."""


class Window(NamedTuple):
    """A stretch of a batch: steps ``start..stop`` (1-based, inclusive), begun from the state that step ``start - 1`` left."""

    start: int
    stop: int
    state: State = None
    """As in :class:`Step`: packed rows of at least the sequences that run at ``start``; unused at the first step."""
    log_weights: Tensor | None = None
    """``(n, N)`` accumulated before; ``None`` at the first step, or to begin at zero."""
    encodings: State = None
    """The guide's encodings of these steps, ``(B, stop - start + 1, ...)`` in the user's order, where they are at hand;
    computed from the whole batch otherwise."""


def weighted_step(model: Any, guide: Any, state: State, frame: Frame, encoding: Any, weigh: Weigh | None = None
                  ) -> tuple[dict[str, Site], State, Tensor, Tensor | None]:
    """Draw the latents from the guide, score the model's step: ``(sites, new state, (rows,) log weights, auxiliary)``."""
    proposal = guide.propose(state, frame, encoding)
    counts = versions(state)
    with StepSites(frame, proposal, impute=model.missing_feeds_state) as step:
        after = model.apply(state, frame)
    if hasattr(proposal, "check_all_used"):
        proposal.check_all_used()
    check_step(model, step.sites, state, after, frame, counts)
    return step.sites, after, (weigh or step_log_weight)(step.sites, frame), getattr(proposal, "auxiliary", None)


def step_log_weight(sites: dict[str, Site], frame: Frame) -> Tensor:
    """``(rows,)`` log p - log q of one step. A latent drawn from the model cancels."""
    total: Tensor | None = None
    for site in sites.values():
        if site.q is None and not site.observed:
            continue
        term = site.log_p()
        if site.q is not None:
            term = term - site.log_q()
        total = term if total is None else total + term
    return torch.zeros(frame.rows, device=frame.device) if total is None else total


def forward(model: Any, guide: Any, sequences: Sequences, num_particles: int = 1, between: Between | None = None,
            score: bool = True, window: Window | None = None, weigh: Weigh | None = None, plan: Plan | None = None
            ) -> Iterator[Step]:
    """The forward loop over a packed batch, or over a window of it.

    :param model: a declared model, entered.
    :param guide: a sequential guide, entered.
    :param between: what happens between steps; nothing when omitted.
    :param score: compute weights; otherwise only draw the latents and advance the state, as cheaply as the model
        allows.
    :param weigh: what a step's log weight is, where its value or gradient is not that of log p - log q.
    :param plan: for a loop that only draws, what earlier ones have shown of the model.
    """
    model.check_inputs(sequences)
    packed = sequences.packed
    start, stop, state, log_weights, encodings = window or Window(1, sequences.num_steps)
    if encodings is None:
        encodings = guide.prepare_rows(sequences)
        if stop - start + 1 < sequences.num_steps:
            encodings = map_state(lambda leaf: leaf[:, start - 1:stop], encodings)
    encodings = by_step(map_state(packed.sort, encodings), stop - start + 1)
    plan, checks, names = Plan() if plan is None else plan, Checked(), None
    for frame in packed.frames(num_particles, start, stop):
        running = packed.counts[frame.t - 1]
        encoding = map_state(lambda leaf, n=running: repeat_rows(first_rows(leaf, n), num_particles),
                             encodings[frame.t - start])
        if frame.first:
            state = model.begin(frame)
        else:
            state = map_state(lambda leaf, rows=frame.rows: first_rows(leaf, rows), state)
        if score:
            log_weights = None if log_weights is None else log_weights[:running]
            step = advance(model, guide, frame, state, encoding, log_weights, num_particles, between, checks, weigh)
            log_weights = step.log_weights
        else:
            with checks:
                sites, after, auxiliary = draw_step(model, guide, state, frame, encoding, plan)
            step = Step(frame, sites, state, after, None, None, auxiliary)
        state = step.state
        names = same_latents(model, names, step.sites, frame)
        yield step


def advance(model: Any, guide: Any, frame: Frame, state: State, encoding: Any, log_weights: Tensor | None, num_particles: int,
            between: Between | None, checks: Checked, weigh: Weigh | None = None) -> Step:
    """One turn of the scoring loop: what happens between the steps, then the weighted step.

    :param log_weights: ``(n, N)`` accumulated; ``None`` before the first step.
    """
    ancestors = None
    if log_weights is not None and between is not None:
        ancestors, log_weights = between(frame, state, encoding, log_weights)
        if ancestors is not None:
            state = select(state, ancestors)
    with checks:
        sites, after, weight, auxiliary = weighted_step(model, guide, state, frame, encoding, weigh)
    weight = weight.reshape(-1, num_particles)
    return Step(frame, sites, state, after, weight if log_weights is None else log_weights + weight, ancestors, auxiliary)


def same_latents(model: Any, names: set[str] | None, sites: dict[str, Site], frame: Frame) -> set[str]:
    """The latent names of a step, which are those of the first one."""
    found = {name for name, site in sites.items() if not site.observed}
    if names is not None and found != names:
        absent = sorted((names ^ found) & model.data_names() - set(frame.x))
        hint = f" {absent} is data that was not given: pass it, NaN where it is missing." if absent else ""
        raise ValueError(f"{type(model).__name__} samples the latent sites {sorted(names)} at the first step and "
                         f"{sorted(found)} at time {frame.t}.{hint} Sites at some steps only cannot be: a step samples the "
                         "same sites each time, under the same names")
    return found


_CHECKED = frozenset((1, *(2 * 4**k for k in range(20))))


def is_due(count: int) -> bool:
    """Whether what is checked now and then is checked at the ``count``-th time: 1, 2, 8, 32, 128, ..."""
    return count in _CHECKED


class Checked:
    """Steps 1, 2, 8, 32, 128, ... check every argument of every distribution; the others run without, for speed.

    :param later: whether any but the first do.
    """

    def __init__(self, later: bool = True) -> None:
        self.later = later
        self.usual = bool(pyro.settings.get("validate_distributions_torch"))
        self.entered = 0

    def due(self) -> bool:
        """Whether the step that now begins checks; asked once a step."""
        self.entered += 1
        return self.usual and is_due(self.entered) and (self.later or self.entered == 1)

    def __enter__(self) -> None:
        Distribution.set_default_validate_args(self.due())

    def __exit__(self, *error: Any) -> None:
        Distribution.set_default_validate_args(self.usual)


class Plan:
    """What the first whole steps of a drawing loop have shown of the model."""

    def __init__(self) -> None:
        self.seen = 0
        self.supports: dict[str, Distribution] | None = {}
        """Of one row, what the observed sites were observed from, to check other data by; ``None`` if it cannot be kept."""
        self.latents: tuple[str, ...] = ()
        """Names, in the order they are sampled."""
        self.state_is_latent = True
        """Whether a step returns the very value of its one latent."""

    def see(self, sites: dict[str, Site], after: State) -> None:
        values = [site.value for site in sites.values() if not site.observed]
        if self.seen == 0:
            kept = {name: apart(site.p) for name, site in sites.items() if site.observed}
            self.supports = None if None in kept.values() else {
                name: rebuilt(kind, [value[:1].detach() for value in parameters]) for name, (kind, parameters) in kept.items()}
        self.seen += 1
        self.latents = tuple(name for name, site in sites.items() if not site.observed)
        self.state_is_latent = self.state_is_latent and len(values) == 1 and after is values[0]


def draw_step(model: Any, guide: Any, state: State, frame: Frame, encoding: Any, plan: Plan
               ) -> tuple[dict[str, Site], State, Tensor | None]:
    """Draw the latents and advance the state.

    The first two steps, and steps with gaps that feed the state, run whole. After that the emission is not run, and
    neither is the prior if the guide does not read it.
    """
    proposal = guide.propose(state, frame, encoding)
    gaps = frame.missing and model.missing_feeds_state
    reads_prior = guide.reads_prior and plan.latents
    if plan.seen >= 2 and not gaps and not reads_prior and (plan.state_is_latent or model.has_advance()):
        sites = {}
        for name in plan.latents:
            q, value = proposal(name, None)
            sites[name] = Site(name, draw(q, name, frame) if value is None else value, None, q, False, None, 1.0, None)
        values = {name: site.value.detach() if guide.greedy else site.value for name, site in sites.items()}
        after = values[plan.latents[0]] if plan.state_is_latent else model.advance_from(state, values, frame)
    elif plan.seen >= 2 and not gaps and model.can_draw_latents():
        sites, after = model.draw_latents(state, frame, proposal, len(plan.latents), guide.greedy)
    else:
        counts = versions(state)
        with StepSites(frame, proposal, impute=model.missing_feeds_state, detach=guide.greedy) as step:
            after = model.apply(state, frame)
        sites = step.sites
        check_step(model, sites, state, after, frame, counts)
        plan.see(sites, after)
    if hasattr(proposal, "check_all_used"):
        proposal.check_all_used()
    return sites, after, getattr(proposal, "auxiliary", None)


def select(state: State, ancestors: Tensor) -> State:
    """The rows of each sequence's ``(n, N)`` ancestors, or the mixtures of rows of its ``(n, N, N)`` transport."""
    n, particles = ancestors.shape[:2]
    if ancestors.is_floating_point():
        return map_state(lambda leaf: _transport(leaf, ancestors), state)
    if n > 1:
        ancestors = ancestors + torch.arange(n, device=ancestors.device)[:, None] * particles
    flat = ancestors.reshape(-1)
    return map_state(lambda leaf: leaf.index_select(0, flat), state)


def _transport(leaf: Tensor, plan: Tensor) -> Tensor:
    if not leaf.is_floating_point():
        raise ValueError(f"the state holds whole numbers (shape {tuple(leaf.shape)}, {leaf.dtype}), and a transport mixes "
                         "states: use a resampling by ancestors, such as 'systematic'")
    return (plan.to(leaf.dtype) @ leaf.reshape(*plan.shape[:2], -1)).reshape(leaf.shape)


def check_step(model: Any, sites: dict[str, Site], before: State, after: State, frame: Frame, counts: list[int],
               exact: bool = False) -> None:
    """What a user can get wrong in a step, checked where it is cheap: at the first two, and wherever values are missing.

    :param exact: whether the answer is called exact, so that the step may draw no random numbers of its own.
    """
    if isinstance(frame.t, int) and frame.t <= 2:
        observed = {name for name, site in sites.items() if site.observed}
        check_shape_of_step(model, observed, set(sites) - observed, before, after, frame, counts)
        if isinstance(model, torch.nn.Module):
            check_rows(model, sites, before, after, frame, exact)
    if frame.missing and model.missing_feeds_state:
        check_not_nan(model, after)


def check_shape_of_step(model: Any, observed: set[str], latent: set[str], before: State, after: State, frame: Frame,
                        counts: list[int]) -> None:
    """Raise if a step forgot to observe its data, or returns a state that cannot be carried on."""
    name = type(model).__name__
    forgotten = sorted(latent & set(frame.x))
    if frame.x and (forgotten or not observed):
        raise ValueError(f"{name} was given data {sorted(frame.x)} but does not observe {forgotten or 'any of it'}; its sites "
                         f"{sorted(latent)} are latent: pass obs= in pyro.sample, e.g. pyro.sample('x', ..., obs=x)")
    if not model.state_grows:
        check_state(after, frame.rows, f"the step of {name}", before)
    if counts != versions(before):
        raise ValueError(f"the step of {name} changes its state in place (as in h += 1): return a new tensor, h = h + 1, since "
                         "the old one is still needed")


def refuse_scaled(model: Any, step: Step) -> None:
    """Raise if a site of the step stands under ``poutine.scale``: the weights would be those of another model."""
    for name, site in step.sites.items():
        if isinstance(site.scale, Tensor) or site.scale != 1.0:
            raise ValueError(f"site {name!r} of {type(model).__name__} stands under poutine.scale, which would change the "
                             "evidence: take it out of the step; to anneal training, use SequentialELBO(kl_weight=...)")


def check_not_nan(model: Any, after: State) -> None:
    """Raise if missing data has reached the state."""
    if any(bool(leaf.isnan().any()) for leaf in leaves(after) if leaf.is_floating_point()):
        raise ValueError(f"the state of {type(model).__name__} is NaN after a step with missing data: the recurrence read the "
                         "data as given. Let it read the value that pyro.sample returns, x = pyro.sample('x', ..., obs=x), in "
                         "which missing entries are drawn from the model")


def propagate(model: Any, state: State, frames: Iterator[Frame]) -> Iterator[tuple[dict[str, Site], State]]:
    """Run the model forward from ``state`` by its own distributions, drawing what is not observed."""
    for frame in frames:
        if frame.first:
            state = model.begin(frame)
        else:
            state = map_state(lambda leaf, rows=frame.rows: first_rows(leaf, rows), state)
        with StepSites(frame) as step:
            state = model.apply(state, frame)
        yield step.sites, state


def simulate(model: Any, sequences: Sequences) -> dict[str, Tensor]:
    """Every site of sequences drawn from the model, ``(B, T, ...)`` in the user's order, zero past their ends."""
    model.check_inputs(sequences)
    packed = sequences.packed
    drawn: dict[str, list[Tensor]] = {}
    for sites, _ in propagate(model, None, packed.frames()):
        for name, site in sites.items():
            drawn.setdefault(name, []).append(site.value)
    return {name: pad_rows(values, packed.counts, packed) for name, values in drawn.items()}
