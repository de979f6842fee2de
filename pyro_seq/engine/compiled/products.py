"""Matrix products in float32 by a kernel of our own, or large ones by oneDNN, where that is faster on this processor than what
torch takes for them."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from pyro_seq.engine.compiled import microkernel

__all__ = ["linear", "turned_weights", "use_faster_products"]

_aten = torch.ops.aten
_LARGE = 2**21
"""Multiplications below which a product's overhead is what counts."""
_MANY = 64
"""Rows of which a product is worth a transpose."""


def _is_ours(rows: int, inner: int, columns: int) -> bool:
    """Whether a product is one for our kernel, which has one thread, once its right operand lies by rows."""
    if columns < microkernel.LEAST_COLUMNS:
        return False
    if rows * inner * columns < 2 * _LARGE:
        return microkernel.is_faster(20, 128)
    return torch.get_num_threads() == 1 and microkernel.is_faster(1024, 256)


class _Product(NamedTuple):
    """A matrix product of a graph, in float32 on a CPU."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    bias: fx.Node | None

    @staticmethod
    def of(node: fx.Node) -> _Product | None:
        if node.target is _aten.mm.default:
            found = _Product(node, *node.args, None)
        elif node.target is _aten.addmm.default and not node.kwargs and len(node.args) == 3:
            found = _Product(node, *node.args[1:], node.args[0])
        else:
            return None
        forms = [part.meta.get("val") for part in (found.left, found.right)]
        known = all(form is not None and form.dtype == torch.float32 and form.device.type == "cpu" for form in forms)
        return found if known else None

    @property
    def sizes(self) -> tuple[int, int, int]:
        return *self.left.meta["val"].shape, self.right.meta["val"].shape[1]

    def exchange(self) -> None:
        """For an operator of ours, where that is faster."""
        graph, left, right, bias = self.node.graph, self.left, self.right, self.bias
        with graph.inserting_before(self.node):
            if _is_ours(*self.sizes) and (_by_rows(right) or self.sizes[0] >= _MANY):
                product = graph.call_function(
                    torch.ops.pyro_seq.blocked_product.default, (left, right if _by_rows(right) else _turned_over(right)))
            elif math.prod(self.sizes) >= _LARGE and faster():
                own = bias if bias is not None and bias.meta["val"].shape == right.meta["val"].shape[1:] else None
                left = left if _by_rows(left) else _turned_over(left)  # quicker than what the product would do
                product = graph.call_function(torch.ops.pyro_seq.product.default, (left, right, own))
                bias = None if own is not None else bias
            else:
                return
            product.meta = dict(self.node.meta)
            if bias is not None:
                product = graph.call_function(_aten.add.Tensor, (product, bias))
                product.meta = dict(self.node.meta)
        self.node.replace_all_uses_with(product)
        graph.erase_node(self.node)


def _by_rows(node: fx.Node) -> bool:
    return node.meta["val"].stride(1) == 1


def _turned_over(node: fx.Node) -> fx.Node:
    """The same by rows, in a loop of its own."""
    turned = node.graph.call_function(_aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    turned.meta = dict(node.meta)
    return turned


def use_faster_products(module: fx.GraphModule) -> None:
    """Exchange the products of a graph, in float32 on a CPU, for those of oneDNN and our own."""
    for node in list(module.graph.nodes):
        if (product := _Product.of(node)) is not None:
            product.exchange()
    module.recompile()


def turned_weights(module: fx.GraphModule, live: Collection[fx.Node]) -> list[fx.Node]:
    """Transposes of live tensors that our products read, and nothing else does, and would read faster if they lay by rows."""
    found: dict[fx.Node, fx.Node] = {}
    for node in list(module.graph.nodes):
        product = _Product.of(node)
        if product is None or _by_rows(product.right) or not _is_transpose(product.right) or not _is_ours(*product.sizes):
            continue
        weight = product.right.args[0]
        if weight not in live:
            continue
        if weight not in found:
            with module.graph.inserting_before(node):
                found[weight] = module.graph.call_function(_aten.t.default, (weight,))
            found[weight].meta = dict(product.right.meta)
        node.args = (*node.args[:-1], found[weight])
    module.recompile()
    return list(found.values())


def _is_transpose(node: fx.Node) -> bool:
    """Whether it is the transpose of a matrix, however it is written."""
    if node.target is _aten.t.default:
        return True
    dims = node.args[1] if node.target is _aten.permute.default else node.args[1:] if (
        node.target is _aten.transpose.int) else ()
    return sorted(dim % 2 for dim in dims) == [0, 1] and (node.target is _aten.transpose.int or dims[0] % 2 == 1)


torch.library.define("pyro_seq::product", "(Tensor left, Tensor right, Tensor? bias) -> Tensor")


@torch.library.impl("pyro_seq::product", "CPU")
def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")


@torch.library.register_fake("pyro_seq::product")
def _form(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _multiplied(left: Tensor, right: Tensor) -> Tensor:
    if _is_ours(*left.shape, right.shape[1]):
        return torch.ops.pyro_seq.blocked_product(left, right.contiguous())
    return torch.ops.pyro_seq.product(left.contiguous(), right, None) if faster() else left @ right


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        found = _multiplied(inputs, weight.t())
        return found if bias is None else found.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        # Where a derivative of the derivative may be asked for, by operators that have one.
        product = torch.mm if torch.is_grad_enabled() else _multiplied
        return (product(gradient, weight) if of_inputs else None,
                product(gradient.t(), inputs) if of_weight else None,
                gradient.sum(0) if of_bias else None)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`, by the faster product."""
    plain = all(value.device.type == "cpu" and value.dtype == torch.float32 for value in (input, weight)) and (
        weight.dim() == 2 and input.dim() > 0 and input.shape[-1] == weight.shape[1] > 0
        and (bias is None or bias.dtype == torch.float32 and bias.shape == weight.shape[:1])
        and not torch.is_autocast_enabled("cpu"))
    if not plain or input.numel() * weight.shape[0] < _LARGE:
        return torch.nn.functional.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    if not _is_ours(*rows.shape, weight.shape[0]) and not faster():
        return torch.nn.functional.linear(input, weight, bias)
    return _Linear.apply(rows, weight, bias).reshape(*input.shape[:-1], -1)


@cache
def faster() -> bool:
    """Whether oneDNN multiplies large matrices faster here, by a third or more: a trial of a few milliseconds."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, w = (torch.ones(rows, 256, dtype=torch.float32, device="cpu") for rows in (1024, 256))
    return microkernel.seconds(lambda: torch.ops.pyro_seq.product(a, w, None)) * 4 < microkernel.seconds(lambda: a @ w) * 3
