"""A graph that computes a step and its gradients, cut in three.

    forward    the step's outputs, and what the other two need of its values
    states     from the gradients of the outputs to those of the inputs: what a loop runs backwards, step by step
    weights    the rest, which only the gradients of parameters need: matrix products over rows, done for all steps at once
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import fx

from pyro_seq.engine.compiled.trace import is_random

__all__ = ["Parts", "cut"]

_aten = torch.ops.aten
# What costs nothing to do again.
_FREE = {
    _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten.reshape.default,
    _aten._unsafe_view.default, _aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.detach.default, _aten.alias.default, _aten.slice.Tensor, _aten.select.int, _aten.ones.default, _aten.zeros.default,
    _aten.full.default, _aten.scalar_tensor.default, _aten.arange.default, _aten.ones_like.default, _aten.zeros_like.default,
    _aten.full_like.default, _aten.empty_like.default, _aten.new_zeros.default, _aten.new_ones.default}


class Parts(NamedTuple):
    """By name of node, so that two traces of one function at different numbers of rows can be compared."""

    forward: fx.GraphModule
    """Placeholders but for the gradients to the step's outputs, then ``saved``."""
    states: fx.GraphModule
    """``saved_states``, then gradients of outputs, to the inputs' gradients, then ``deltas``."""
    weights: fx.GraphModule
    """``saved_weights``, then ``deltas``, to the parameters' gradients."""
    saved: list[str]
    """Values by rows."""
    for_states: list[str]
    """What ``states`` takes: saved values, parameters, gradients of outputs."""
    for_weights: list[str]
    deltas: list[str]


def cut(module: fx.GraphModule, outputs: int, inputs: int, given: list[fx.Node], of_rows: list[fx.Node]) -> Parts:
    """
    :param module: its outputs are those of the step, then the gradients of inputs, then those of parameters.
    :param outputs: how many are the step's.
    :param inputs: how many are gradients of inputs.
    :param given: placeholders of the gradients of the step's outputs.
    :param of_rows: placeholders with a dimension of rows.
    """
    graph = module.graph
    results = list(graph.output_node().args[0])
    out, to_inputs, to_weights = results[:outputs], results[outputs:outputs + inputs], results[outputs + inputs:]
    # What is drawn, and what depends on it, is not to be had again.
    drawn = [n for n in graph.nodes if is_random(n)]
    backward, rows = _after(graph, given), _after(graph, [*of_rows, *drawn])
    nodes = list(graph.nodes)
    before_states, before_weights = _before(to_inputs), _before(to_weights)
    computed = [n for n in nodes if n in backward and n.op != "placeholder"]
    states = [n for n in computed if n in before_states or n.target is operator.getitem and n.args[0] in before_states]
    of_states = set(states)
    weights = [n for n in computed if n in before_weights and n not in of_states]

    def roots(part: Iterable[fx.Node], ends: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """What is done again in a part, and what it takes from outside."""
        inside, again, taken = set(part), set(), set()
        stack = [a for n in inside for a in n.all_input_nodes] + [n for n in ends if isinstance(n, fx.Node)]
        while stack:
            node = stack.pop()
            if node in inside or node in again or node in taken:
                continue
            free = node.op == "get_attr" or node.op == "call_function" and node not in backward and (
                node.target in _FREE or node not in rows)
            (again if free else taken).add(node)
            if free:
                stack.extend(node.all_input_nodes)
        return [n for n in nodes if n in again], [n for n in nodes if n in taken]

    again_states, for_states = roots(states, to_inputs)
    again_weights, for_weights = roots(weights, to_weights)
    deltas = [n for n in for_weights if n in of_states]
    taken = {*for_states, *for_weights}
    saved = [n for n in nodes if n in taken and n.op == "call_function" and n not in backward]
    placeholders = [n for n in nodes if n.op == "placeholder" and n not in given]
    ahead = [n for n in nodes if n not in backward and n.op != "placeholder" and n.op != "output"]
    return Parts(
        _part(module, placeholders, ahead, [*out, *saved]),
        _part(module, for_states, _in_order(nodes, again_states, states), [*to_inputs, *deltas]),
        _part(module, for_weights, _in_order(nodes, again_weights, weights), to_weights),
        [n.name for n in saved], [n.name for n in for_states], [n.name for n in for_weights], [n.name for n in deltas])


def _in_order(nodes: list[fx.Node], *parts: list[fx.Node]) -> list[fx.Node]:
    wanted = {n for part in parts for n in part}
    return [n for n in nodes if n in wanted]


def _after(graph: fx.Graph, starts: Iterable[fx.Node]) -> set[fx.Node]:
    found = set(starts)
    for node in graph.nodes:
        if node.op != "output" and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def _before(ends: Iterable[fx.Node | None]) -> set[fx.Node]:
    found, stack = set(), [n for n in ends if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _part(module: fx.GraphModule, taken: list[fx.Node], nodes: list[fx.Node], results: list[fx.Node | None]) -> fx.GraphModule:
    graph, there = fx.Graph(), {}
    for node in taken:
        there[node] = graph.placeholder(node.name)
        there[node].meta = dict(node.meta)
    for node in nodes:
        there[node] = graph.node_copy(node, lambda n: there[n])
    graph.output([None if n is None else there[n] for n in results])
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)
