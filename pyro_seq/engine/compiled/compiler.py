"""Compiled functions of one inference object, by what they were compiled for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from tqdm import tqdm

from pyro_seq.engine.compiled.inductor import compiled
from pyro_seq.engine.compiled.nest import put_together, take_apart
from pyro_seq.engine.compiled.padding import rounded
from pyro_seq.engine.compiled.products import use_faster_products
from pyro_seq.engine.compiled.reads import Reads
from pyro_seq.engine.compiled.trace import Graph, Noise, Untraceable, trace, unchanged_generator

__all__ = ["Compiled", "Compiler", "Run"]

_MOST = 16
"""Shapes that one function is compiled for; others run as written."""


class Compiled(NamedTuple):
    """A function that has been compiled."""

    call: Callable[..., Any]
    live: list[int]
    """Which of the tensors that the modules hold it takes."""
    noise: list[Noise]
    plan: Any
    """How its results are put together."""
    drawn_inside: bool
    """Whether it draws random numbers itself."""


class Compiler:
    """What one inference object has compiled, for all of its runs.

    A function is compiled for the shapes, types and device of its arguments and for the Python values that the user's code may
    read, and once more when these change. What cannot be compiled runs as written, with one warning that says why.
    """

    def __init__(self, what: str):
        self.what = what
        self.known: dict[Hashable, Any] = {}
        self.counts: dict[Hashable, int] = {}
        self.warned: set[str] = set()
        self.reads: dict[tuple[Any, ...], Reads] = {}
        self.sizes: dict[Hashable, set[int]] = {}
        self.plans: dict[tuple[Any, ...], Any] = {}
        """By model and guide, what their first steps, run as written, have shown."""
        self.cells: dict[tuple[Any, ...], Any] = {}
        """By modules, the step of their recurrent networks: one for all runs, since a compiled loop traces it again for other
        numbers of rows."""
        self.declined: set[tuple[Any, ...]] = set()
        """What methods have found not to be for compiled steps."""

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code stays where it is.
        return {**self.__dict__, "known": {}, "counts": {}, "reads": {}, "sizes": {}, "plans": {}, "cells": {},
                "declined": set()}

    def run(self, *modules: Any) -> Run:
        """One run of the method, on modules that have been entered."""
        if modules not in self.reads:
            self.reads[modules] = Reads(*modules)
        return Run(self, self.reads[modules], modules)

    def warn(self, name: str, reason: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"{self.what}: {name} runs as written, not compiled, since {reason}", stacklevel=2)

    def build(self, module: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        """Machine code for a graph.

        :raises Untraceable: if there is no compiler, or it fails.
        """
        with tqdm(total=1, desc=f"compiling {self.what}", leave=False, disable=None) as bar:
            found = _build(module, examples)
            bar.update()
        return found


class Run:
    """One run: the tensors and values that the modules hold now are looked up once."""

    def __init__(self, compiler: Compiler, reads: Reads, modules: tuple[Any, ...]):
        self.compiler, self.reads, self.modules = compiler, reads, modules
        self.live, values = reads.now()
        self.entered = reads.entered()
        self.state = (modules, values, tuple(map(_form, self.live)), torch.get_num_threads(), torch.is_grad_enabled(),
                      torch.get_default_dtype(), _autocast())
        self.state_hash = hash(self.state)

    @contextmanager
    def leaves(self) -> Iterator[list[Tensor]]:
        """The live tensors, and the modules entered with them, those that were computed before the step without what they were
        computed from: their gradients are asked for, and go on from there by themselves. So do gradients with hooks, which are
        taken off meanwhile."""
        known = {id(value): value.detach().requires_grad_() for value in self.live if value.requires_grad and not value.is_leaf}
        hooked = [(value, value._backward_hooks) for value in self.live if value.is_leaf and value._backward_hooks]
        try:
            for value, _ in hooked:
                value._backward_hooks = None
            with self.reads.enter(self.entered, known):
                yield [known.get(id(value), value) for value in self.live]
        finally:
            for value, hooks in hooked:
                value._backward_hooks = hooks

    def unchanged(self) -> bool:
        """Whether the Python values are still those that the run began with."""
        with self.reads.enter(self.entered, {}):  # left, a module would draw its global parameters anew
            return self.reads.now()[1] == self.state[1]

    def decline(self, what: str) -> None:
        """Leave these modules to the loop as written from now on."""
        self.compiler.declined.add((*self.modules, what))

    def declined(self, what: str) -> bool:
        return (*self.modules, what) in self.compiler.declined

    def size(self, name: str, rows: int) -> int:
        """A number of rows, at least ``rows``, that a function is compiled for: the first two as they are, then every eighth of
        a power of two."""
        sizes = self.compiler.sizes.setdefault((name, self.reads), set())
        if rows not in sizes and len(sizes) >= 2:
            return rounded(rows)
        sizes.add(rows)
        return rows

    def key(self, name: str, plan: Hashable, inputs: list[Tensor]) -> Hashable:
        return _Key(self, (name, plan, tuple([(v.shape, v.stride(), v.dtype, v.device) for v in inputs])))

    def look_up(self, name: str, key: Hashable, make: Callable[[], Any], checked: bool = False) -> Any:
        """What is known under ``key``, made where nothing is: the second time, since the first run as written checks what the
        user wrote; ``None`` where there is nothing but the function as written.

        :param checked: that has been done already.
        """
        known, counts = self.compiler.known, self.compiler.counts
        if key in known:
            return known[key]
        family = (name, self.reads)
        if key not in counts and not checked:
            counts[key] = 1
            return None
        if counts.get(family, 0) >= _MOST:
            self.compiler.warn(name, f"it has been compiled for {_MOST} different shapes or values already: what changes from "
                               "run to run can be made a tensor, such as a buffer or a covariate")
            known[key] = None
            return None
        counts[family] = counts.get(family, 0) + 1
        learning = torch.is_grad_enabled()
        try:
            # Tensors made under inference mode could not be traced.
            with torch.inference_mode(False), torch.set_grad_enabled(learning), unchanged(self), unchanged_generator(self.live):
                known[key] = make()
        except Untraceable as error:
            self.compiler.warn(name, str(error))
            known[key] = None
        return known[key]

    def find(self, name: str, fn: Callable[..., Any], *arguments: Any) -> Compiled | None:
        """``fn`` as compiled for arguments like these, for whoever calls it at once many times."""
        inputs: list[Tensor] = []
        plan = take_apart(arguments, inputs)
        return self.look_up(name, self.key(name, plan, inputs), lambda: self.compiled(fn, plan, inputs))

    def traced(self, fn: Callable[..., Any], plan: Any, inputs: list[Tensor]) -> tuple[Graph, Any]:
        """The graph of a function of nests, and how its results are put together."""
        result: list[Any] = []

        def flat(*given: Tensor) -> list[Tensor]:
            tensors: list[Tensor] = []
            result[:] = [take_apart(fn(*put_together(plan, iter(given))), tensors)]
            return tensors

        graph = trace(flat, inputs, self.live)
        return graph, result[0]

    def compiled(self, fn: Callable[..., Any], plan: Any, inputs: list[Tensor]) -> Compiled:
        graph, results = self.traced(fn, plan, inputs)
        with unchanged_generator(inputs):
            examples = [*inputs, *(self.live[index] for index in graph.live), *(part.draw() for part in graph.noise)]
            call = self.compiler.build(graph.module, examples)
        return Compiled(call, graph.live, graph.noise, results, graph.random)


class _Key:
    """Of a run and a call; the run's own, which is long, is hashed once."""

    def __init__(self, run: Run, call: Hashable):
        self.state, self.call = run.state, call
        self.value = hash((run.state_hash, call))

    def __hash__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.call == other.call and (self.state is other.state or self.state == other.state)


def _form(value: Tensor) -> Hashable:
    return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad


@contextmanager
def unchanged(run: Run):
    """Raise if the step changes what it reads."""
    yield
    if not run.unchanged():
        raise Untraceable("the step changes an attribute or a variable, such as a counter: what a step remembers goes into the "
                          "state that it returns")


def _autocast() -> tuple[Any, ...]:
    """By kind of device, the type that products are computed in, if ``torch.autocast`` lowers it."""
    return tuple([torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")])


def _build(module: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    if not __debug__:  # it gives wrong numbers then: some of its assertions do work
        raise Untraceable("Python runs with -O, which strips assertions that torch's Inductor needs: leave -O out")
    examples = [value.detach() for value in examples]
    use_faster_products(module)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compiled(module, examples, fallback_random=True)
    except Exception as error:
        text = str(error).split("\n")[0]
        if "nonzero" in text:
            text = "it picks values by a mask, z[z > 0] or nonzero(), how many depending on them: choose by torch.where"
        elif "compiler" in text.lower() or "CXX" in text:
            text = (f"there is no working C++ compiler ({text}): install g++ or clang, or name one by the environment variable "
                    f"CXX, which is {os.environ.get('CXX')!r}")
        raise Untraceable(text) from error
