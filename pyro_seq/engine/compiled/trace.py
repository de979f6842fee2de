"""A step as a graph of torch's operators: what Pyro's handlers and Python's objects do is done once, while it is traced.

The random numbers of a step become inputs of its graph, drawn before it runs in the order in which the step draws them, so that
eager and compiled steps draw the same.
"""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch.distributions import Distribution
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode

from pyro_seq.engine.native import fill_normal
from pyro_seq.engine.state import versions

__all__ = ["Graph", "Noise", "Untraceable", "is_random", "is_traced", "trace", "unchanged_generator", "unvalidated"]

_aten = torch.ops.aten
# Random operators whose numbers depend on nothing that is computed, and the method that draws them in place.
_DRAWN = {
    _aten.normal_functional.default: "normal_", _aten.uniform.default: "uniform_", _aten.exponential.default: "exponential_",
    _aten.randn.default: "normal_", _aten.rand.default: "uniform_"}


_HANDS_OUT = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__}


class Untraceable(Exception):
    """Why a step has no graph."""


class Noise(NamedTuple):
    """Random numbers that a graph is given."""

    method: str
    arguments: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def is_divisible(self) -> bool:
        """Whether several such tensors drawn at once are what they are one by one: torch makes 16 normal numbers at a time on a
        CPU, and begins anew with each tensor."""
        return self.method == "normal_" and self.device.type == "cpu" and math.prod(self.shape) % 16 == 0

    def draw(self, rows: int | None = None) -> Tensor:
        """:param rows: of the first dimension; all by default."""
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        return self.fill(torch.empty(shape, dtype=self.dtype, device=self.device))

    def fill(self, where: Tensor) -> Tensor:
        """Draw them into ``where``."""
        if self.method == "normal_" and self.arguments in ((), (0.0, 1.0)):
            return fill_normal(where)
        return getattr(where, self.method)(*self.arguments)


class Graph(NamedTuple):
    """A function of tensors, by its operators."""

    module: fx.GraphModule
    """Takes the inputs, then the live tensors at ``live``, then the noise."""
    live: list[int]
    noise: list[Noise]
    random: bool
    """Whether it draws random numbers itself."""


def trace(fn: Callable[..., list[Tensor]], inputs: list[Tensor], live: list[Tensor]) -> Graph:
    """The graph of ``fn(*inputs)``.

    :param live: the tensors that ``fn`` may read beside its inputs.
    :raises Untraceable: if it decides by the values of tensors, draws numbers of its own, changes or reads tensors unknown.
    """
    counts = versions(live)
    others = _other_generators()

    def run(*given: Tensor) -> list[Tensor]:
        with _NoValues():
            return fn(*given[:len(inputs)])

    with unchanged_generator(inputs), unvalidated():
        try:
            found = make_fx(run)(*inputs, *live)
        except Exception as error:
            raise Untraceable(_reason(error)) from error
    if _other_generators() != others:
        raise Untraceable("it draws random numbers of Python or numpy, which a graph would draw once and for all: use "
                          "pyro.sample")
    if counts != versions(live):
        raise Untraceable("it changes a tensor in place, as batch normalisation in training mode does its averages")
    _refuse_strangers(found)
    with unchanged_generator(inputs), torch.no_grad():
        found = make_fx(functionalize(found))(*(value.detach() for value in (*inputs, *live)))
    _simplify(found)
    return _gathered(found, len(inputs))


def unchanged_generator(tensors: list[Tensor]) -> AbstractContextManager[None]:
    """Random numbers drawn inside are as if they had not been."""
    return torch.random.fork_rng(sorted({value.device for value in tensors if value.device.type == "cuda"}, key=str))


def _other_generators() -> tuple[Any, ...]:
    """The states of Python's and numpy's random numbers."""
    _, key, place, *_ = np.random.get_state()
    return random.getstate(), key.tobytes(), place


class _NoValues(TorchFunctionMode):
    """Refuses to hand out the values of tensors, which would be taken for constants."""

    def __torch_function__(self, fn: Any, kinds: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if fn in _HANDS_OUT:
            raise Untraceable(f"it takes values out of a tensor by .{fn.__name__.strip('_')}(): stay with tensors, of torch")
        return fn(*arguments, **(keywords or {}))


@contextmanager
def unvalidated() -> Iterator[None]:
    """Distributions do not look at the values of their arguments."""
    usual = bool(pyro.settings.get("validate_distributions_torch"))
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(usual)


def is_traced() -> bool:
    """Whether a step is being traced, so that no value can be looked at."""
    return get_proxy_mode() is not None


def _refuse_strangers(module: fx.GraphModule) -> None:
    """Numbers that the step writes are constants; a tensor from elsewhere would be taken for one."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                if user.target not in (_aten.lift_fresh_copy.default, _aten.lift_fresh.default):
                    shape = tuple(getattr(module, node.target).shape)
                    raise Untraceable(f"it reads a tensor of shape {shape} that is no attribute of the model or guide: keep it "
                                      "as a parameter, a buffer or another attribute")


def _simplify(module: fx.GraphModule) -> None:
    """Numbers as numbers, and what is computed twice only once."""
    graph, seen = module.graph, {}
    for node in list(graph.nodes):
        if node.target is _aten.lift_fresh_copy.default and node.args[0].op == "get_attr":
            value = getattr(module, node.args[0].target)
            if value.dim() == 0:
                with graph.inserting_before(node):
                    number = graph.call_function(_aten.full.default, ([], value.item()), {
                        "dtype": value.dtype, "layout": torch.strided, "device": value.device, "pin_memory": False})
                number.meta = dict(node.meta)
                node.replace_all_uses_with(number)
                graph.erase_node(node)
                node = number
        if node.target in (_aten.detach.default, _aten.alias.default):  # gradients have been taken: it changes nothing
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.op != "call_function" or is_random(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
    graph.eliminate_dead_code()


def _gathered(module: fx.GraphModule, inputs: int) -> Graph:
    """Leave out the live tensors that are not read, and take the random numbers out."""
    graph = module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    live = [index for index, node in enumerate(placeholders[inputs:]) if node.users]
    for node in placeholders[inputs:]:
        if not node.users:
            graph.erase_node(node)
    noise = _hoist(graph)
    module.recompile()
    return Graph(module, live, noise, any(map(is_random, graph.nodes)))


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _hoist(graph: fx.Graph) -> list[Noise]:
    """Make inputs of the random numbers, if that can be said of all of them: else the graph draws them all, in order."""
    for node in graph.nodes:
        _by_exponentials(graph, node)
    drawn = [node for node in graph.nodes if is_random(node)]
    if any(node.target not in _DRAWN and node.target is not _aten.normal.Tensor_Tensor for node in drawn):
        return []
    noise = []
    last = [node for node in graph.nodes if node.op == "placeholder"]
    anchor = last[-1] if last else next(iter(graph.nodes))
    for node in drawn:
        value = node.meta["val"]
        with graph.inserting_after(anchor):
            given = anchor = graph.placeholder(f"noise_{len(noise)}")
        given.meta["val"] = value
        arguments = tuple(a for a in node.args[1:] if isinstance(a, (int, float)))
        noise.append(Noise(_DRAWN.get(node.target, "normal_"), arguments, tuple(value.shape), value.dtype, value.device))
        if node.target is _aten.normal.Tensor_Tensor:
            with graph.inserting_after(node):
                scaled = graph.call_function(_aten.mul.Tensor, (given, node.args[1]))
            with graph.inserting_after(scaled):
                given = graph.call_function(_aten.add.Tensor, (scaled, node.args[0]))
        node.replace_all_uses_with(given)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    return noise


def _by_exponentials(graph: fx.Graph, node: fx.Node) -> None:
    """A choice by probabilities as torch makes it: the largest ratio of probability to an exponential number."""
    if node.target is _aten.multinomial.default and node.args[1] == 1:
        chances = node.args[0]
        value = chances.meta["val"]
        if value.is_contiguous():
            with graph.inserting_before(node):
                drawn = graph.call_function(_aten.exponential.default, (chances, 1.0))
                drawn.meta["val"] = value
                ratio = graph.call_function(_aten.div.Tensor, (chances, drawn))
                node.replace_all_uses_with(graph.call_function(_aten.argmax.default, (ratio, -1, True)))
            graph.erase_node(node)


def _reason(error: Exception) -> str:
    """What stood in the way, and the user's line."""
    text = str(error).split("\n")[0]
    if "_local_scalar_dense" in text or "data-dependent" in text or "Boolean value" in text:
        text = "it decides by the value of a tensor (if, and, or, min, max of Python, float(), .item()): choose by torch.where"
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not _of_library(line.filename)]
    where = f" at {Path(lines[-1].filename).name}, line {lines[-1].lineno}: {lines[-1].line}" if lines else ""
    return f"{text}{where}"


_LIBRARIES = tuple(str(Path(module.__file__).parent) for module in (torch, pyro, np)) + (str(Path(__file__).parents[2]),)


def _of_library(filename: str) -> bool:
    return filename.startswith((*_LIBRARIES, "<")) or "/lib/python" in filename and "site-packages" not in filename
