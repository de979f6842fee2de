"""A declared model, or a guide for one, as an ordinary Pyro program: one plate, one ``pyro.markov`` loop.

This is the view that Pyro's own losses, MCMC, Predictive and handlers see. The engine's fast path is in ``loop.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_seq.engine.handlers import look_around
from pyro_seq.engine.loop import check_not_nan, check_shape_of_step
from pyro_seq.engine.sites import PyroSites
from pyro_seq.engine.state import State, by_step, map_state, versions
from pyro_seq.sequences import Sequences

__all__ = ["unroll"]


def unroll(model: Any, sequences: Sequences, guide: Any = None, *, plate_size: int | None = None
           ) -> Tensor | dict[str, Tensor]:
    """Run every step of ``model`` (of ``guide``, if given) on the batch, in the user's order.

    Finished sequences stay in the batch, since a Pyro site has one shape: they are masked, their latents take a fixed
    value and their state stays what it was.
    """
    model.check_inputs(sequences)
    batch, steps = sequences.num_sequences, sequences.num_steps
    if plate_size is not None and plate_size < batch:
        raise ValueError(f"plate_size={plate_size} is smaller than the batch of {batch} sequences: it is the number of "
                         "sequences in the whole data set")
    encodings = by_step(guide.prepare_rows(sequences) if guide is not None else None, steps)
    subsample = None if plate_size is None else torch.arange(batch, device=sequences.device)
    plate = nullcontext() if model.state_grows else pyro.plate(
        "sequences", batch if plate_size is None else plate_size, dim=-1, subsample=subsample)
    history = steps if model.markov_history is None else model.markov_history
    outside = list(look_around().plates)
    if guide is not None and outside:
        raise ValueError(f"{type(guide).__name__} runs on flat rows, not inside the outer plate(s) {outside}: use "
                         "SequentialELBO(num_particles=) for several particles, or leave vectorize_particles off")
    drawn: dict[str, list[Tensor]] = {}
    with plate:
        frame = sequences.frame(1)
        state = model.begin(frame)
        ranks = map_state(lambda leaf: leaf.dim() - 1, state)
        for t in pyro.markov(range(1, steps + 1), history=history):
            frame = sequences.frame(t)
            running = sequences.active[:, t - 1]
            running = None if t == 1 or bool(running.all()) else running

            def rename(name: str, t: int = t) -> str:
                return model.site_name(name, t)

            options: dict[str, Any] = {"impute": model.missing_feeds_state}
            if guide is not None:
                emit = PyroSites(rename, frame, running)
                options["proposal"] = guide.propose(state, frame, encodings[t - 1], emit)
            counts = versions(state)
            sites = PyroSites(rename, frame, running, **options)
            try:
                with sites:
                    after = model.apply(state, frame)
            except RuntimeError as error:
                if not outside:
                    raise
                raise ValueError(
                    f"{type(model).__name__} could not run step {t} inside the outer plate(s) {outside}: its step does not "
                    "broadcast over dimensions left of the rows. Use SequentialELBO(num_particles=) for several particles"
                ) from error
            if hasattr(sites.proposal, "check_all_used"):
                sites.proposal.check_all_used()
            if t <= 2 and not outside and not sites.enumerates:
                check_shape_of_step(model, set(sites.observed) | sites.hidden, set(sites.drawn), state, after, frame, counts)
            if frame.missing and model.missing_feeds_state:
                check_not_nan(model, after)
            state = _keep(running, after, state, ranks)
            if not sequences.x:
                for name, (_, value) in sites.drawn.items():
                    drawn.setdefault(name, []).append(value)
    if guide is not None:
        return {}
    values = dict(sequences.x) or {
        name: torch.stack(parts, dim=parts[0].dim() - _event_dim(parts[0], batch)) for name, parts in drawn.items()
        if name in model.data_names() or model.data_names().isdisjoint(drawn)}
    return next(iter(values.values())) if len(values) == 1 else values


def _event_dim(value: Tensor, batch: int) -> int:
    return value.dim() - 1 if value.shape and value.shape[0] == batch else 0


def _keep(running: Tensor | None, after: State, before: State, ranks: State) -> State:
    """The state of finished rows stays what it was."""
    if running is None or ranks is None or ranks == {}:
        return after
    return map_state(lambda new, old, rank: torch.where(running.reshape(-1, *(1,) * rank), new, old),
                     after, before, ranks)
