"""Machine code for a graph, by Inductor, without the layers that autograd needs around it, as slow as a small step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_seq.engine.compiled.trace import unchanged_generator

__all__ = ["compiled"]


def compiled(module: fx.GraphModule, examples: list[Tensor], **options: Any) -> Callable[..., list[Tensor]]:
    """A function of tensors like ``examples``; it computes no gradients."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    module = fx.GraphModule(module, module.graph)  # without the tensors that nothing reads
    kept: list[Any] = []

    def keep(*arguments: Any, **settings: Any) -> Any:
        kept.append(compile_fx_inner(*arguments, **settings))
        return kept[-1]

    whole = compile_fx(module, examples, inner_compile=keep, config_patches=options)
    inner = getattr(kept[0], "current_callable", None) if len(kept) == 1 else None
    if inner is None or any(node.op == "get_attr" for node in module.graph.nodes) or not _same(whole, inner, examples):
        return whole

    def call(*given: Tensor) -> list[Tensor]:
        if not torch.is_grad_enabled():
            return inner(list(given))
        with torch.no_grad():
            return inner(list(given))

    return call


def _same(whole: Callable[..., Any], inner: Callable[..., Any], examples: list[Tensor]) -> bool:
    """Whether the layers around the code change nothing."""
    with torch.no_grad():
        with unchanged_generator(examples):
            expected = whole(*examples)
        with unchanged_generator(examples):
            found = inner(list(examples))
    return len(found) == len(expected) and all(
        a is b or isinstance(a, Tensor) and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))
