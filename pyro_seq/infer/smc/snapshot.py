"""What a stream's snapshot holds, looked at before a stream goes on from it."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_seq.engine.sites import StepSites
from pyro_seq.engine.state import State, leaves
from pyro_seq.guide import PriorGuide
from pyro_seq.module import own_parameters
from pyro_seq.sequences import Sequences

__all__ = ["Snapshot", "of_plain", "read_snapshot", "to_plain"]


class Snapshot(NamedTuple):
    """The sound contents of one."""

    time: int
    log_weights: Tensor | None
    log_evidence: Tensor | None
    state: State
    carry: State
    parameters: dict[str, Tensor]
    latents: set[str] | None
    inputs: dict[str, list[int]]
    """By name of data or covariate, the shape of a frame's entry."""
    types: dict[str, str]
    """Their types; empty in snapshots of the first versions."""
    generators: Mapping[str, Tensor]


def to_plain(state: State) -> Any:
    """A state as tensors in lists and dicts, which can be loaded with ``weights_only``."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {"kind": "dict", "names": list(state), "parts": [to_plain(part) for part in state.values()]}
    parts = [to_plain(part) for part in state]
    if hasattr(state, "_fields"):
        return {"kind": type(state).__name__, "names": list(state._fields), "parts": parts}
    return {"kind": type(state).__name__, "parts": parts}


def of_plain(plain: Any) -> State:
    """The reverse; a named tuple comes back as one of its name and fields, until the next step makes the user's own."""
    if plain is None:
        return None
    if isinstance(plain, Tensor):
        return plain.clone()
    kind, parts = plain["kind"], [of_plain(part) for part in plain["parts"]]
    if kind == "dict":
        return dict(zip(plain["names"], parts, strict=True))
    if "names" in plain:
        return namedtuple(kind, plain["names"])(*parts)
    if kind not in ("tuple", "list"):
        raise ValueError(f"a state of kind {kind!r}; it is made of tensors in (named) tuples, lists or dicts")
    return tuple(parts) if kind == "tuple" else parts


def read_snapshot(found: Mapping[str, Any], model: Any, guide: Any, particles: int) -> Snapshot:
    """The contents of a snapshot, each checked against the others, and against a step of the model.

    :param model: a declared model, as ``guide`` not entered.
    :raises ValueError: or another error, on what cannot be.
    """
    time, generators = found["time"], found["generators"]
    if isinstance(time, bool) or not isinstance(time, int) or time < 0:
        raise ValueError(f"time={time!r}; it is a count of frames")
    if not isinstance(generators, Mapping) or not isinstance(generators.get("cpu"), Tensor):
        raise ValueError("generators holds no state of the CPU's generator")
    latents = found["latents"]
    snapshot = Snapshot(
        time, found["log_weights"], found["log_evidence"], of_plain(found["state"]), of_plain(found["carry"]),
        {str(name): value.clone() for name, value in found["parameters"].items()},
        None if latents is None else {str(name) for name in latents},
        {str(name): [int(n) for n in shape] for name, shape in found["inputs"].items()},
        {str(name): str(kind) for name, kind in found.get("types", {}).items()}, generators)
    if time == 0:
        if held := [name for name, value in zip(snapshot._fields, snapshot) if name not in ("time", "generators") and not (
                value is None or isinstance(value, Mapping) and not value)]:
            raise ValueError(f"time=0, before the first frame, and yet it holds {held}")
        return snapshot
    _require_weights(snapshot, particles)
    _require_rows(snapshot, particles)
    with (pyro.settings.context(validate_distributions_torch=False), warnings.catch_warnings(), poutine.block(),
          torch.no_grad(), torch.random.fork_rng(_cuda(snapshot)), own_parameters(model, guide)):
        warnings.simplefilter("ignore")
        _require_parameters(snapshot, model)
        if not snapshot.log_weights.is_cuda:  # where a step that fails may take the process with it
            _require_like_a_step(snapshot, model, guide, particles)
    return snapshot


def _cuda(snapshot: Snapshot) -> list[torch.device]:
    return [snapshot.log_weights.device] if snapshot.log_weights.is_cuda else []


def _require_weights(snapshot: Snapshot, particles: int) -> None:
    log_weights, log_evidence = snapshot.log_weights, snapshot.log_evidence
    for name, value in (("log_weights", log_weights), ("log_evidence", log_evidence)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            what = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} is {what}; it is a tensor of a floating type")
    if log_weights.dim() != 2 or log_weights.shape[1] != particles or not len(log_weights):
        raise ValueError(f"log_weights has shape {tuple(log_weights.shape)}; it is (B, {particles})")
    highest = log_weights.amax(-1)  # NaN where one is
    if not bool(highest.isfinite().all()):
        row = int((~highest.isfinite()).nonzero()[0])
        raise ValueError(f"log_weights of sequence {row} are NaN, infinite, or all minus infinity")
    if log_evidence.shape != (len(log_weights),):
        raise ValueError(f"log_evidence has shape {tuple(log_evidence.shape)}; it is ({len(log_weights)},)")
    if not bool(log_evidence.isfinite().all()):
        raise ValueError(f"log_evidence is {log_evidence.tolist()}; it is finite")


def _require_rows(snapshot: Snapshot, particles: int) -> None:
    batch, found = len(snapshot.log_weights), leaves(snapshot.state)
    if snapshot.state is None:
        raise ValueError(f"it holds no state, at time {snapshot.time}")
    if any(leaf.shape[:1] != (batch * particles,) for leaf in found):
        raise ValueError(f"the state has tensors of shapes {[tuple(leaf.shape) for leaf in found]}; each has {batch} * "
                         f"{particles} rows")
    leaves(snapshot.carry)
    if snapshot.types and (snapshot.types.keys() != snapshot.inputs.keys() or not all(
            isinstance(getattr(torch, kind, None), torch.dtype) for kind in snapshot.types.values())):
        raise ValueError(f"types are {snapshot.types} and inputs {snapshot.inputs}: they are of the same data and covariates")


def _require_parameters(snapshot: Snapshot, model: Any) -> None:
    """Raise unless there is a possible value of every global parameter."""
    found, expected = snapshot.parameters, set(model.global_sites())
    if set(found) != expected:
        raise ValueError(f"parameters are of {sorted(found)}, and the global parameters of {type(model).__name__} are "
                         f"{sorted(expected)}")
    if not found:
        return
    with poutine.trace() as tr, poutine.condition(data=found):
        model.within(lambda: None)
    for name, value in found.items():
        prior = tr.trace.nodes[name]["fn"]
        if value.shape != prior.shape():
            raise ValueError(f"parameters[{name!r}] has shape {tuple(value.shape)}; its prior has {tuple(prior.shape())}")
        if not bool(prior.support.check(value).all()):
            raise ValueError(f"parameters[{name!r}] lies outside the support of its prior {type(prior).__name__}")


def _require_like_a_step(snapshot: Snapshot, model: Any, guide: Any, particles: int) -> None:
    """Raise unless state, carry and latents are made as those of steps that see no data. Of a model whose step cannot be run
    so, nothing is known."""
    blank = _blank(snapshot, model)
    model.check_inputs(Sequences(blank.x, blank.lengths, blank.covariates))
    # A guide may draw in another precision than the model.
    precise = None if not snapshot.types else isinstance(guide, PriorGuide)
    try:
        states, latents = model.within(lambda: _two_steps(model, blank, particles), globals=snapshot.parameters)
    except _FAILS:
        return
    name = type(model).__name__
    if snapshot.latents != latents:
        raise ValueError(f"latents are {sorted(snapshot.latents or ())}, and those of {name} {sorted(latents)}")
    # Either: the first may be of another type than those after.
    if _form(snapshot.state, precise) not in (forms := [_form(state, precise) for state in states]):
        raise ValueError(f"the state is {_form(snapshot.state, precise)}, and that of {name} is {forms[-1]}")
    try:
        first, second = (_form(carry, precise) for carry in _two_carries(guide, model, blank, snapshot.parameters))
    except _FAILS:
        return
    # What a guide carries may grow.
    if first == second != _form(snapshot.carry, precise):
        raise ValueError(f"carry is {_form(snapshot.carry, precise)}, and that of {type(guide).__name__} is {first}")


_FAILS = (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError)


def _blank(snapshot: Snapshot, model: Any) -> Sequences:
    """A frame of the data with nothing observed, and covariates of zero."""
    batch, device = len(snapshot.log_weights), snapshot.log_weights.device
    x: dict[str, Tensor] = {}
    covariates: dict[str, Tensor] = {}
    observed: dict[str, Tensor] = {}
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), snapshot.log_weights.dtype)
    for name, shape in snapshot.inputs.items():
        kind = getattr(torch, snapshot.types[name]) if snapshot.types else usual
        value = torch.zeros(batch, 1, *shape, dtype=kind, device=device)
        if name not in model.data_names():
            covariates[name] = value
            continue
        x[name] = value.fill_(torch.nan) if value.is_floating_point() else value
        if not value.is_floating_point():
            observed[name] = torch.zeros_like(value, dtype=torch.bool)
    return Sequences(x, torch.ones(batch, dtype=torch.long, device=device), covariates, observed, True)


def _two_steps(model: Any, blank: Sequences, particles: int) -> tuple[list[State], set[str]]:
    """The states that the first two steps leave, and the names of the latents."""
    frame = next(blank.packed.frames(particles))
    states = [model.begin(frame)]
    for t in (1, 2):
        with StepSites(frame._replace(t=t, first=t == 1), impute=model.missing_feeds_state) as step:
            states.append(model.apply(states[-1], step.frame))
    return states[1:], set(step.latents)


def _two_carries(guide: Any, model: Any, blank: Sequences, parameters: dict[str, Tensor]) -> list[State]:
    """What the guide carries after one and two frames; it is left as it was."""
    before = set(guide.__dict__)

    def run() -> list[State]:
        _, first = guide.stream_rows(blank, None)
        return [first, guide.stream_rows(blank, first)[1]]

    try:
        return guide.within(lambda: model.within(run, globals=parameters))
    finally:
        for name in set(guide.__dict__) - before:
            del guide.__dict__[name]


def _form(state: State, precise: bool | None) -> Any:
    """How a state is made: its kinds of containers, and its tensors' shapes and types.

    :param precise: whether floating types are told apart; ``None`` where no types are.
    """
    if state is None:
        return None
    if isinstance(state, Tensor):
        kind = "" if precise is None else "floating" if state.is_floating_point() and not precise else (
            str(state.dtype).removeprefix("torch."))
        return f"{kind} {tuple(state.shape)}".lstrip()
    if isinstance(state, Mapping):
        return {name: _form(part, precise) for name, part in state.items()}
    kind, parts = type(state).__name__, [_form(part, precise) for part in state]
    return (kind, dict(zip(state._fields, parts, strict=True))) if hasattr(state, "_fields") else (kind, parts)
