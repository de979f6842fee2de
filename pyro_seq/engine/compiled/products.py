"""Large matrix products by oneDNN, where that is faster than what torch takes for them on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["linear", "use_faster_products"]

_aten = torch.ops.aten
_LARGE = 2**21
"""Multiplications below which a product's overhead is what counts."""


def use_faster_products(module: fx.GraphModule) -> None:
    """Exchange the large products of a graph, in float32 on a CPU."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _aten.mm.default:
            bias, (left, right) = None, node.args
        elif node.target is _aten.addmm.default and not node.kwargs and len(node.args) == 3:
            bias, left, right = node.args
        else:
            continue
        a, b = left.meta["val"], right.meta["val"]
        large = a.shape[0] * a.shape[1] * b.shape[1] >= _LARGE
        broadcast = bias is not None and bias.meta["val"].shape != b.shape[1:]
        if not large or a.dtype != torch.float32 or a.device.type != "cpu" or broadcast:
            continue
        if not faster():
            return
        with graph.inserting_before(node):
            if a.stride(1) != 1:  # turned over in a loop of its own, which is quicker than what the product would do
                turned = graph.call_function(_aten.clone.default, (left,), {"memory_format": torch.contiguous_format})
                turned.meta, left = dict(left.meta), turned
            product = graph.call_function(torch.ops.pyro_seq.product.default, (left, right, bias))
        product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    module.recompile()


torch.library.define("pyro_seq::product", "(Tensor left, Tensor right, Tensor? bias) -> Tensor")


@torch.library.impl("pyro_seq::product", "CPU")
def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


@torch.library.register_fake("pyro_seq::product")
def _form(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return torch.ops.pyro_seq.product(inputs, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        # Where a derivative of the derivative may be asked for, by operators that have one.
        product = torch.mm if torch.is_grad_enabled() else lambda left, right: torch.ops.pyro_seq.product(left, right, None)
        return (product(gradient, weight) if of_inputs else None,
                product(gradient.t().contiguous(), inputs) if of_weight else None,
                gradient.sum(0) if of_bias else None)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, by the faster product."""
    plain = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in (input, weight)) and (
        weight.dim() == 2 and input.dim() > 0 and input.shape[-1] == weight.shape[1] > 0
        and (bias is None or bias.dtype == torch.float32 and bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu"))
    if not plain or input.numel() * weight.shape[0] < _LARGE or not faster():
        return torch.nn.functional.linear(input, weight, bias)
    return _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias).reshape(*input.shape[:-1], -1)


@cache
def faster() -> bool:
    """Whether oneDNN multiplies large matrices faster here, by a third or more: a trial of a few milliseconds."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, w = (torch.ones(rows, 256, dtype=torch.float32, device="cpu") for rows in (1024, 256))
    return _seconds(lambda: torch.ops.pyro_seq.product(a, w, None)) * 4 < _seconds(lambda: a @ w) * 3


def _seconds(fn: Callable[[], Tensor]) -> float:
    found = []
    for _ in range(8):
        start = time.perf_counter()
        fn()
        found.append(time.perf_counter() - start)
    return min(found)
