"""Several steps as one graph: copies of a step's graph, one after the other.

Each step has its own tensors, none of them a part of a larger one: then the machine code of one copy is that of the others too,
and is made once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from pyro_seq.engine.compiled.products import turned_weights

__all__ = ["Backward", "backward", "forward"]

_aten = torch.ops.aten


class Backward(NamedTuple):
    """Takes the gradient by the state, the live tensors that it needs, and those that it needs turned over; then for each step
    booleans ``(rows,)`` of what runs, the values that it needs, the gradients by what was found, and those by the state before;
    gives the gradient by the state before the first step; then for each step the gradients by the inputs, deltas, and the
    gradients by the state after it that are asked for."""

    module: fx.GraphModule
    live: list[str]
    turned: list[str]
    values: list[str]
    reached: list[bool]
    """Which of the inputs have a gradient."""


def _holders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _take(graph: fx.Graph, name: str, like: fx.Node | None = None) -> fx.Node:
    node = graph.placeholder(name)
    if like is not None:
        node.meta = dict(like.meta)
    return node


def _copy(graph: fx.Graph, module: fx.GraphModule, there: dict[fx.Node, fx.Node]) -> list[fx.Node | None]:
    """Add a graph's operators, given where its placeholders are; its results."""
    for node in module.graph.nodes:
        if node not in there and node.op not in ("placeholder", "output"):
            there[node] = graph.node_copy(node, lambda n: there[n])
    return [None if node is None else there[node] for node in module.graph.output_node().args[0]]


def _take_turned(graph: fx.Graph, module: fx.GraphModule, live: list[fx.Node]) -> tuple[dict[fx.Node, fx.Node], list[str]]:
    """Placeholders for the transposes of live tensors that products ask for, by rows; and the names of what they are of."""
    there, of = {}, []
    for node in turned_weights(module, live):
        there[node] = _take(graph, f"turned_{len(of)}", node)
        there[node].meta["val"] = node.meta["val"].contiguous()
        of.append(node.args[0].name)
    return there, of


def forward(module: fx.GraphModule, steps: int, width: int, inputs: int, live: int) -> tuple[fx.GraphModule, list[str]]:
    """Takes the state, the live tensors, and those that it needs turned over, which are the second result; then for each step
    inputs and noise; gives each step's results.

    :param module: one step: state, inputs, live tensors and noise to the state after, what is found, and saved values.
    :param width: leaves of the state.
    :param inputs: arguments beside the state.
    """
    graph, holders = fx.Graph(), _holders(module)
    state = [_take(graph, f"state_{i}", node) for i, node in enumerate(holders[:width])]
    alike = holders[width + inputs:width + inputs + live]
    own = [*holders[width:width + inputs], *holders[width + inputs + live:]]
    shared = [_take(graph, f"live_{i}", node) for i, node in enumerate(alike)]
    transposed, turned = _take_turned(graph, module, alike)
    given = [[_take(graph, f"{node.name}_{place}", node) for node in own] for place in range(steps)]
    results: list[fx.Node] = []
    for values in given:
        there = transposed | dict(zip([*holders[:width], *alike, *own], [*state, *shared, *values], strict=True))
        results.extend(_copy(graph, module, there))
        state = [there[node] for node in module.graph.output_node().args[0][:width]]
    graph.output(results)
    return fx.GraphModule(module, graph), turned


def backward(module: fx.GraphModule, steps: int, live: list[str], of_after: list[str | None], of_found: list[str],
             deltas: int, kept: list[int]) -> Backward:
    """
    :param module: one step's gradients: what it needs, to the gradients by the state, those by other inputs, and deltas.
    :param live: names of what it needs that is the same at each step.
    :param of_after: by leaf of the state that has a gradient, the name of the gradient by it after the step, ``None`` where
        nothing depends on it.
    :param of_found: names of the gradients by what was found.
    :param kept: which of those leaves' gradients after each step are asked for.
    """
    graph = fx.Graph()
    holders = {node.name: node for node in _holders(module)}
    results = list(module.graph.output_node().args[0])
    leaves, others = range(len(of_after)), range(len(of_after), len(results) - deltas)
    forms = [results[leaf] or holders.get(of_after[leaf]) for leaf in leaves]
    adjoint = [_take(graph, f"adjoint_{leaf}", like) for leaf, like in enumerate(forms)]
    shared = {name: _take(graph, name, holders[name]) for name in live if name in holders}
    transposed, turned = _take_turned(graph, module, [holders[name] for name in shared])
    apart = {*shared, *of_found, *(name for name in of_after if name)}
    values = [name for name in holders if name not in apart]
    given = [(_take(graph, f"running_{place}"),
              {name: _take(graph, f"{name}_{place}", holders.get(name)) for name in [*values, *of_found]},
              [_take(graph, f"direct_{leaf}_{place}", like) for leaf, like in enumerate(forms)]) for place in range(steps)]
    found: list[list[fx.Node]] = []
    for runs, own, direct in reversed(given):
        there = transposed | {holders[name]: node for name, node in {**own, **shared}.items() if name in holders}
        there.update((holders[name], node) for name, node in zip(of_after, adjoint, strict=True) if name in holders)
        copied = _copy(graph, module, there)

        def masked(node: fx.Node, like: fx.Node, runs: fx.Node = runs) -> fx.Node:
            shape = graph.call_function(_aten.reshape.default, (runs, [-1, *[1] * (like.meta["val"].dim() - 1)]))
            found = graph.call_function(_aten.where.ScalarOther, (shape, node, 0.0))
            found.meta = dict(like.meta)
            return found

        found.append([*[masked(copied[other], results[other]) for other in others if copied[other] is not None],
                      *copied[len(results) - deltas:], *[adjoint[leaf] for leaf in kept]])
        adjoint = [direct[leaf] if copied[leaf] is None else
                   masked(graph.call_function(_aten.add.Tensor, (copied[leaf], direct[leaf])), results[leaf])
                   for leaf in leaves]
    graph.output([*adjoint, *(node for nodes in reversed(found) for node in nodes)])
    reached = [results[other] is not None for other in others]
    return Backward(fx.GraphModule(module, graph), list(shared), turned, values, reached)
