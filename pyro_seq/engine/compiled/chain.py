"""Several steps as one graph: copies of a step's graph, one after the other, whose arguments and results are stacked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import fx

__all__ = ["Backward", "backward", "forward"]

_aten = torch.ops.aten


class Backward(NamedTuple):
    """Takes the gradient by the state, booleans ``(steps, rows)`` of what runs, the live tensors that it needs, then stacked:
    the values that it needs, the gradients by what was found, those by the states before; gives the gradient by the state, then
    stacked: those by the inputs, deltas, and the gradients by the states after that are asked for."""

    module: fx.GraphModule
    live: list[str]
    values: list[str]
    reached: list[bool]
    """Which of the inputs have a gradient."""


class _Builder:
    def __init__(self) -> None:
        self.graph = fx.Graph()

    def take(self, name: str, like: fx.Node | None = None) -> fx.Node:
        node = self.graph.placeholder(name)
        if like is not None:
            node.meta = dict(like.meta)
        return node

    def pick(self, stack: fx.Node, place: int, like: fx.Node | None = None) -> fx.Node:
        node = self.graph.call_function(_aten.select.int, (stack, 0, place))
        if like is not None:
            node.meta = dict(like.meta)
        return node

    def stacks(self, results: list[list[fx.Node]]) -> list[fx.Node]:
        """Of each step's results; what is the same is stacked once."""
        known: dict[tuple[fx.Node, ...], fx.Node] = {}
        for nodes in zip(*results, strict=True):
            if nodes not in known:
                known[nodes] = self.graph.call_function(_aten.stack.default, (list(nodes),))
        return [known[nodes] for nodes in zip(*results, strict=True)]

    def copy(self, nodes: Iterable[fx.Node], there: dict[fx.Node, fx.Node]) -> None:
        for node in nodes:
            if node not in there and node.op not in ("placeholder", "output"):
                there[node] = self.graph.node_copy(node, lambda n: there[n])


def _holders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def forward(module: fx.GraphModule, steps: int, width: int, inputs: int, live: int) -> fx.GraphModule:
    """Takes the state, stacked inputs, live tensors, stacked noise; gives the state, then stacked: states before, what was
    found, saved values.

    :param module: one step: state, inputs, live tensors and noise to the state after, what is found, and saved values.
    :param width: leaves of the state.
    :param inputs: arguments beside the state.
    """
    build, holders = _Builder(), _holders(module)
    state = [build.take(f"state_{i}", node) for i, node in enumerate(holders[:width])]
    stacks = [build.take(f"input_{i}") for i in range(inputs)]
    shared = [build.take(f"live_{i}", node) for i, node in enumerate(holders[width + inputs:width + inputs + live])]
    noises = [build.take(f"noise_{i}") for i in range(len(holders) - width - inputs - live)]
    before: list[list[fx.Node]] = []
    results: list[list[fx.Node]] = []
    for place in range(steps):
        picked = [build.pick(stack, place, like) for stack, like in zip(stacks, holders[width:], strict=False)]
        drawn = [build.pick(stack, place, like) for stack, like in zip(noises, holders[width + inputs + live:], strict=True)]
        there = dict(zip(holders, [*state, *picked, *shared, *drawn], strict=True))
        build.copy(module.graph.nodes, there)
        outputs = [there[node] for node in module.graph.output_node().args[0]]
        before.append(state)
        state = outputs[:width]
        results.append(outputs[width:])
    build.graph.output([*state, *build.stacks(before), *build.stacks(results)])
    return fx.GraphModule(module, build.graph)


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
    build = _Builder()
    holders = {node.name: node for node in _holders(module)}
    results = list(module.graph.output_node().args[0])
    adjoint: list[fx.Node] = [build.take(f"adjoint_{i}") for i in range(len(of_after))]
    running = build.take("running")
    shared = {name: build.take(name, holders[name]) for name in live if name in holders}
    given = {*(name for name in of_after if name), *of_found}
    values = [name for name in holders if name not in shared and name not in given]
    stacks = {name: build.take(name) for name in [*values, *of_found]}
    direct = [build.take(f"direct_{i}") for i in range(len(of_after))]
    others = range(len(of_after), len(results) - deltas)
    reached = [results[place] is not None for place in others]
    found: list[list[fx.Node]] = []
    for place in reversed(range(steps)):
        there = {node: build.pick(stacks[name], place, node) for name, node in holders.items() if name in stacks}
        there.update((holders[name], node) for name, node in shared.items())
        there.update((holders[name], node) for name, node in zip(of_after, adjoint, strict=True) if name in holders)
        build.copy(module.graph.nodes, there)
        runs = build.pick(running, place)

        def masked(node: fx.Node, of: fx.Node, runs: fx.Node = runs) -> fx.Node:
            shape = build.graph.call_function(_aten.reshape.default, (runs, [-1, *[1] * (of.meta["val"].dim() - 1)]))
            return build.graph.call_function(_aten.where.ScalarOther, (shape, node, 0.0))

        moved = []
        for leaf in range(len(of_after)):
            gradient = build.pick(direct[leaf], place)
            if results[leaf] is not None:
                gradient = build.graph.call_function(_aten.add.Tensor, (there[results[leaf]], gradient))
                gradient = masked(gradient, of=results[leaf])
            moved.append(gradient)
        found.append([*[masked(there[results[other]], of=results[other]) for other in others if results[other] is not None],
                      *[there[node] for node in results[len(results) - deltas:]], *[adjoint[leaf] for leaf in kept]])
        adjoint = moved
    build.graph.output([*adjoint, *build.stacks(found[::-1])])
    return Backward(fx.GraphModule(module, build.graph), list(shared), values, reached)
