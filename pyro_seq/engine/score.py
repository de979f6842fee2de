"""Score a whole sequence in one call.

The loop has drawn every latent and produced every state, so the model's step is run once more on the rows of all times
together: one matrix product where a loop needs ``T`` small ones. This is exact for a step that is deterministic given
its sites.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_seq.engine.families import concatenate
from pyro_seq.engine.loop import Checked, Step, Window
from pyro_seq.engine.missing import score_entries
from pyro_seq.engine.rows import is_random
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import check_state, join_states, map_state
from pyro_seq.sequences import Packed, Sequences, first_rows

__all__ = ["Term", "join", "score_contexts", "scores_in_one_call", "step_terms", "stepwise_terms", "term_of", "terms"]


class Term(NamedTuple):
    """One site over all running rows: steps one after the other, ``n_t * N`` rows each."""

    name: str
    observed: bool
    log_p: Tensor
    """``(rows,)``"""
    log_q: Tensor | None
    """``(rows,)``; ``None`` where the value was drawn from the model or observed."""
    kl: Tensor | None
    """``(rows,)`` analytic KL(q || p) at the drawn past, where asked for and known."""
    score_function: Tensor | None
    """``(rows,)`` log density of draws that carry no pathwise gradient; ``None`` where all do."""


def scores_in_one_call(model: Any) -> bool:
    """Whether the step is deterministic given its sites, as far as its modules tell."""
    return not model.state_grows and not is_random(model)


def terms(model: Any, packed: Packed, steps: list[Step], num_particles: int, analytic_kl: bool) -> list[Term]:
    """The terms of the bound from a loop that only drew."""
    found: dict[str, list[Term]] = {}
    first = steps[0].frame
    split = 1 if first.first and model.begin(first) is None else 0
    checks = Checked(later=False)  # the loop that drew has checked; from here on an error could not say the time
    for start, stop in ((0, split), (split, len(steps))):
        if start == stop:
            continue
        part = steps[start:stop]
        frame = packed.flat(first.t + start, first.t + stop - 1, num_particles)
        values = {name: torch.cat([step.sites[name].value for step in part]) for name in part[0].sites
                  if not part[0].sites[name].observed}
        if model.missing_feeds_state:
            values.update(_imputed(part))
        with checks, StepSites(frame, values=values) as scored:
            try:
                model.apply(join_states([step.before for step in part]), frame)
            except RuntimeError as error:
                sites = ", ".join(repr(name) for name in part[0].sites)
                raise ValueError(
                    f"the step of {type(model).__name__} runs on {part[0].frame.rows} rows but not on {frame.rows} ({error}): "
                    f"a size that equals the number of rows was taken for the rows. Look at site {sites}: does a distribution "
                    "lack .to_event(1), or does the step use a fixed batch size?") from error
            _same_sites({n for n, site in part[-1].sites.items() if not site.observed}, scored.sites)
            for name, site in scored.sites.items():
                drawn = [] if site.observed else [step.sites[name] for step in part]
                found.setdefault(name, []).append(term_of(site, drawn, analytic_kl, model.missing_feeds_state))
    return [join(parts) for parts in found.values()]


def score_contexts(model: Any, sequences: Sequences, window: Window) -> Step:
    """All steps of a window, of a model that has contexts, as one: its rows are those of all times, and its states, before and
    after each sequence's frames, those of the sequences.

    Nothing is drawn: a missing entry contributes nothing, and what is read of it after is of no meaning.
    """
    model.check_inputs(sequences)
    packed, name = sequences.packed, type(model).__name__
    block, lengths = packed.block(window.start, window.stop)
    state = model.begin(block) if block.first else map_state(lambda leaf: first_rows(leaf, block.rows), window.state)
    contexts, after = model.contexts_of(state, block, lengths)
    check_state(contexts, block.rows, f"{name}.contexts")
    check_state(after, block.rows, f"{name}.contexts", state)
    frame = packed.flat(window.start, window.stop)
    with StepSites(frame) as scored:
        model.apply_emission(map_state(lambda leaf: packed.by_row(leaf, window.start), contexts), frame)
    if latent := [key for key, site in scored.sites.items() if not site.observed]:
        raise ValueError(f"site {latent[0]!r} of {name} is not observed by its emission: a model with contexts has no "
                         f"latents. Pass obs={latent[0]} if it is data, or define step and advance alone")
    return Step(frame, scored.sites, state, after, None, None, None)


def stepwise_terms(model: Any, steps: list[Step], analytic_kl: bool) -> list[Term]:
    """The same terms from a loop that scored each step."""
    found: dict[str, list[Term]] = {}
    for step in steps:
        for term in step_terms(model, step.sites, analytic_kl):
            found.setdefault(term.name, []).append(term)
    return [join(parts) for parts in found.values()]


def step_terms(model: Any, sites: dict[str, Site], analytic_kl: bool = False) -> list[Term]:
    """The terms of one step that the loop has scored."""
    return [term_of(site, [] if site.observed else [site], analytic_kl, model.missing_feeds_state) for site in sites.values()]


def term_of(scored: Site, drawn: list[Site], analytic_kl: bool, imputed: bool) -> Term:
    """What one site adds, from the site as the model sampled it and as it was drawn."""
    log_p = scored.log_p()
    if scored.observed:
        score = None
        if imputed and scored.present is not None and not scored.p.has_rsample:
            score = score_entries(scored.p, scored.value, ~scored.present, scored.name)
        return Term(scored.name, True, log_p, None, None, score)
    if drawn[0].q is None:
        return Term(scored.name, False, log_p, None, None, None if scored.p.has_rsample else log_p)
    q = concatenate([site.q for site in drawn])
    log_q = torch.cat([site.log_q() for site in drawn]) if q is None else scored.log_q(q)
    kl = None
    if analytic_kl:
        kl = None if q is None else _kl(q, scored.p)
        kl = None if kl is None else scale_and_mask(kl, scored.scale, scored.mask)
    return Term(scored.name, False, log_p, log_q, kl, None if drawn[0].q.has_rsample else log_q)


def _kl(q: Distribution, p: Distribution) -> Tensor | None:
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def join(parts: list[Term]) -> Term:
    """The rows of several terms of one site, one after the other."""
    head = parts[0]
    if len(parts) == 1:
        return head

    def cat(field: str) -> Tensor | None:
        values = [getattr(part, field) for part in parts]
        if all(v is None for v in values):
            return None
        if field == "log_q":  # a latent drawn from the model at some steps
            values = [part.log_p if part.log_q is None else part.log_q for part in parts]
        if field == "score_function":
            values = [torch.zeros_like(part.log_p) if v is None else v for part, v in zip(parts, values, strict=True)]
        return None if any(v is None for v in values) else torch.cat(values)

    return Term(head.name, head.observed, cat("log_p"), cat("log_q"), cat("kl"), cat("score_function"))


def _imputed(steps: list[Step]) -> dict[str, Tensor]:
    """Values drawn for missing entries. Steps without gaps did not run the emission and need none."""
    drawn = {name: site.value for step in steps for name, site in step.sites.items() if site.present is not None}
    return {name: torch.cat([
        step.sites[name].value if name in step.sites else like.new_zeros(step.frame.rows, *like.shape[1:])
        for step in steps]) for name, like in drawn.items()}


def _same_sites(drawn: set[str], scored: dict[str, Site]) -> None:
    missing = sorted(drawn - set(scored))
    extra = sorted(n for n, site in scored.items() if not site.observed and n not in drawn)
    if missing or extra:
        raise ValueError(f"latent sites {missing + extra} appear at some steps only: a step samples the same sites each time")
