"""Bring your own Pyro model: a plain function with its own time loop, run by the same engine."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_seq.engine.state import State
from pyro_seq.model import SequentialModel
from pyro_seq.sequences import Frame, Sequences

__all__ = ["from_pyro"]

_NUMBERED = re.compile(r"^(.*?)_?(\d+)$")


class _StepDone(Exception):
    """The user's loop has reached the step after the one that is run."""


def from_pyro(model: Callable[..., Any], *, name: str = "") -> PyroFunction:
    """Wrap an existing Pyro model ``model(x, lengths)`` that has its own loop over time.

    The function is run as it is. Its per-step sites are recognised by the number their names end in (``z_3``, ``x_3``);
    they may stand in a plate over the sequences, of size ``len(x)``, at dim -1, and be masked with ``poutine.mask``.
    Every guide, :class:`~pyro_seq.SequentialELBO` and :class:`~pyro_seq.ParticleFilter` can then be used; a guide's
    sites bear the function's own names, so that ``SVI(model, guide, ...)`` takes the function itself.

    Step t is reached by replaying the t - 1 steps before it, so a pass costs time in proportion to the square of T.
    Declare a :class:`~pyro_seq.StateSpaceModel` where that matters.

    :param model: a function, or an ``nn.Module``, of the data ``(B, T, ...)``, ``lengths (B,)`` if it takes a second
        argument, and any covariates by name.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> def random_walk(x, lengths=None):
        ...     z = 0.0
        ...     with pyro.plate("series", len(x)):
        ...         for t in pyro.markov(range(x.shape[1])):
        ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 0.5))
        ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
        >>> model = seq.from_pyro(random_walk)
        >>> posterior = seq.ParticleFilter(model, num_particles=100).run(torch.zeros(2, 5))
        >>> posterior.filtered["z"].mean.shape
        torch.Size([2, 5])
    """
    if isinstance(model, SequentialModel):
        raise TypeError(f"{type(model).__name__} is declared already: use it as it is")
    if not callable(model):
        raise TypeError(f"from_pyro takes a function or module, not {type(model).__name__}")
    return PyroFunction(model, name)


class PyroFunction(SequentialModel):
    """A plain Pyro function behind the interface of a declared model. Its state is the values drawn so far."""

    state_grows = True
    missing_feeds_state = False

    def __init__(self, function: Callable[..., Any], name: str = ""):
        super().__init__(name)
        if isinstance(function, nn.Module):
            self.function = function
        else:
            self._function = (function,)
        self._warned = False
        self._names: dict[str, dict[int, str]] = {}

    def begin(self, frame: Frame) -> State:
        return {}

    def step(self, state: State, **inputs: Tensor) -> State:
        raise TypeError("a model from from_pyro is run by its own function")

    def methods(self) -> tuple[tuple[Callable[..., Any], int], ...]:
        return ()

    def check_inputs(self, sequences: Sequences) -> None:
        if not sequences.x:
            raise ValueError("a model from from_pyro runs on data; to simulate, call the function itself")
        if not self._warned:
            self.__dict__["_warned"] = True
            warnings.warn("a model from from_pyro replays its past at every step, which costs time in proportion to T**2; a "
                          "declared StateSpaceModel or SequentialModel costs T", stacklevel=3)

    def apply(self, state: State, frame: Frame) -> State:
        data = frame.whole
        x = {k: v[frame.sequence] for k, v in data.x.items()}
        if data.has_missing:
            raise ValueError("a model from from_pyro indexes the data itself, so gaps cannot be taken out for it: handle them "
                             "in the function, or declare a StateSpaceModel")
        lengths = data.lengths[frame.sequence]
        covariates = {k: v[frame.sequence] for k, v in data.covariates.items()}
        replay = _Replay(frame.t, state, self._names)
        with suppress(_StepDone), replay:
            self._call(x["x"] if list(x) == ["x"] else x, lengths, covariates)
        if replay.reached < frame.t:
            raise ValueError(f"the function sampled {replay.reached} numbered steps and the data has {frame.t} or more: sites "
                             "of one step end in its number, as in f'z_{t}'")
        return {**state, **{(name, frame.t): value for name, value in replay.drawn.items()}}

    def _call(self, x: Any, lengths: Tensor, covariates: dict[str, Tensor]) -> None:
        function = self.function if not hasattr(self, "_function") else self._function[0]
        target = function.forward if isinstance(function, nn.Module) else function
        positional = [p for p in inspect.signature(target).parameters.values()
                      if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in covariates]
        function(*((x, lengths) if len(positional) > 1 else (x,)), **covariates)

    def read_state(self, state: State) -> State:
        last = max((t for _, t in state), default=None)
        return None if last is None else {name: value for (name, t), value in state.items() if t == last}

    def site_name(self, name: str, t: int) -> str:
        return self._names[name][t]


class _Replay(Messenger):
    """Give the sites of past steps their values, strip the number from those of step ``t``, and stop after it."""

    def __init__(self, t: int, state: State, names: dict[str, dict[int, str]]):
        super().__init__()
        self.t, self.state, self.names = t, state, names
        self.reached = 0
        self.number: int | None = None
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        match = _NUMBERED.match(msg["name"])
        if type(msg["fn"]).__name__ == "_Subsample":  # the function's plate, met again at every step
            msg["stop"] = True
            return
        if match is None or msg["done"]:
            if match is None and not msg["infer"].get("_deterministic"):
                raise ValueError(
                    f"site {msg['name']!r} has no step number at the end of its name: from_pyro takes models whose sample "
                    "sites are all per step; give global parameters as pyro.param, or declare a model with PyroSample")
            return
        name, number = match.group(1), int(match.group(2))
        if number != self.number:
            self.reached, self.number = self.reached + 1, number
        if self.reached > self.t:
            raise _StepDone
        self.names.setdefault(name, {})[self.reached] = msg["name"]
        if self.reached < self.t:
            msg["done"] = msg["stop"] = True
            if not msg["is_observed"]:
                msg["value"] = self.state[name, self.reached]
            return
        msg["name"] = name
        msg["infer"] = {**msg["infer"], "_step": name}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if "_step" in msg["infer"] and not msg["is_observed"]:
            self.drawn[msg["infer"]["_step"]] = msg["value"]
