"""What the user's code may read beside its arguments: tensors, which are inputs of a graph, and Python's values, which a graph
is made for.

Attributes of the modules, and the global and enclosing variables that their methods name, are looked at once a run.
"""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Reads"]

_DEEPEST = 4
_LIBRARIES = ("torch", "pyro", "pyro_seq", "numpy", "pandas", "builtins")
# What modules keep for themselves.
_OWN = {*vars(nn.Module()), "_values", "_pyro_context", "_rows_apart", "_reads_gaps", "_model", "_pyro_samples", "_pyro_params",
        "_pyro_name", "_flat_weights", "_flat_weight_refs"}


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The parameters that a tensor was computed from."""
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(inner for inner, _ in node.next_functions)


class _Same:
    """A key for an object that is equal to itself alone, and lives as long as the key."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


class Reads:
    """Of some modules."""

    def __init__(self, *modules: nn.Module):
        self.modules = list(dict.fromkeys(inner for module in modules if isinstance(module, nn.Module)
                                          for inner in module.modules()))
        self.roots = [module for module in modules if isinstance(module, nn.Module)]
        self.variables = list(_variables(self.modules))

    def now(self) -> tuple[list[Tensor], Hashable]:
        """The tensors there are, and a key of all other values."""
        tensors: list[Tensor] = []
        key: list[Hashable] = []
        for root in self.roots:
            entered = root.__dict__.get("_values") or {}
            tensors.extend(value for value in entered.values() if isinstance(value, Tensor))
        for module in self.modules:
            key.append(module.training)
            tensors.extend(value for value in module._parameters.values() if value is not None)
            tensors.extend(value for value in module._buffers.values() if value is not None)
            for name in (*getattr(module, "_pyro_samples", ()), *getattr(module, "_pyro_params", ())):
                if module not in self.roots:
                    tensors.append(getattr(module, name))
            for name, value in module.__dict__.items():
                if name not in _OWN:
                    key.append(_look(value, tensors, _DEEPEST))
        for read in self.variables:
            key.append(_look(read(), tensors, _DEEPEST))
        unique = {id(value): value for value in tensors}
        return list(unique.values()), tuple(key)


    def computed(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        """What this run's entered modules hold that was computed from parameters, as constrained parameters are."""
        for root in self.roots:
            held = root.__dict__.get("_values") or {}
            yield from [(held, name, value) for name, value in held.items()
                        if isinstance(value, Tensor) and value.grad_fn is not None]

    @contextmanager
    def cut_off(self) -> Iterator[dict[int, Tensor]]:
        """Hand out what was computed without its past: by ``id``, the tensors that stand in for it."""
        held = list(self.computed())
        stand_in = {id(value): value.detach().requires_grad_() for _, _, value in held}
        for where, name, value in held:
            where[name] = stand_in[id(value)]
        try:
            yield stand_in
        finally:
            for where, name, value in held:
                where[name] = value

    def behind(self) -> set[int]:
        """Of inner modules, the ``id`` of parameters that are only read as what is computed from them."""
        return {id(leaf) for module in self.modules if module not in self.roots
                for name in (*getattr(module, "_pyro_samples", ()), *getattr(module, "_pyro_params", ()))
                for leaf in _leaves(getattr(module, name))}


def _look(value: Any, tensors: list[Tensor], deep: int) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, Tensor):
        tensors.append(value)
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes() if value.nbytes <= 4096 else _Same(value)
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, nn.Module) or isinstance(value, type) or deep == 0:
        return _Same(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), tuple([_look(part, tensors, deep - 1) for part in value])
    if isinstance(value, dict):
        return tuple([(str(name), _look(part, tensors, deep - 1)) for name, part in value.items()])
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return getattr(value, "__func__", value).__code__
    if type(value).__module__.split(".")[0] in _LIBRARIES or not hasattr(value, "__dict__"):
        return _Same(value)
    return _Same(value), tuple([(name, _look(part, tensors, deep - 1)) for name, part in vars(value).items()])


def _variables(modules: list[nn.Module]) -> Iterator[Callable[[], Any]]:
    """Readers of the global and enclosing variables that the modules' methods name."""
    seen: set[types.CodeType] = set()
    found: set[tuple[int, str]] = set()
    stack = [fn for kind in dict.fromkeys(base for module in modules for base in type(module).__mro__)
             if kind.__module__.split(".")[0] not in _LIBRARIES for fn in vars(kind).values()]
    for module in modules:  # functions that are attributes
        stack.extend(value for name, value in module.__dict__.items() if isinstance(value, types.FunctionType))
    while stack:
        fn = stack.pop()
        fn = getattr(fn, "fget", None) or getattr(fn, "__func__", None) or getattr(fn, "__wrapped__", fn)
        if not isinstance(fn, types.FunctionType) or fn.__code__ in seen:
            continue
        seen.add(fn.__code__)
        for cell in fn.__closure__ or ():
            yield lambda cell=cell: _contents(cell)
            stack.append(_contents(cell))
        for name in _names(fn.__code__):
            if name in fn.__globals__ and (id(fn.__globals__), name) not in found:
                found.add((id(fn.__globals__), name))
                value = fn.__globals__[name]
                if isinstance(value, types.FunctionType) and value.__module__.split(".")[0] not in _LIBRARIES:
                    stack.append(value)
                if not isinstance(value, types.ModuleType):
                    yield lambda where=fn.__globals__, name=name: where.get(name)


def _names(code: types.CodeType) -> set[str]:
    """The variables that a function names, and those inside it."""
    return set(code.co_names).union(*(_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
