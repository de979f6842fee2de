"""What the user's code may read beside its arguments: tensors, which are inputs of a graph, and Python's values, which a graph
is made for.

Attributes of the modules and of their classes, the global and enclosing variables that their methods name, and what lies in
these are looked at once a run.
"""

from __future__ import annotations

import dis
import enum
import functools
import itertools
import random
import sys
import types
import zlib
from collections import deque
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Reads"]

_LIBRARIES = ("torch", "pyro", "pyro_seq", "numpy", "pandas", "builtins")
# Modules of Python whose objects are there to hold what the user puts into them.
_HOLDERS = ("types", "argparse", "collections")
# What modules keep for themselves.
_OWN = {*vars(nn.Module()), "_values", "_pyro_context", "_rows_apart", "_reads_gaps", "_model", "_pyro_samples", "_pyro_params",
        "_pyro_name", "_flat_weights", "_flat_weight_refs"}
_DRAWS = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState, itertools.count)
_LARGE = 2**20
"""Bytes of an array beyond which it is known by itself, not by its numbers."""


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
        self.roots = [module for module in modules if isinstance(module, nn.Module)]

    def now(self) -> tuple[list[Tensor], Hashable]:
        """The tensors there are, and a key of all other values."""
        look = _Look()
        for root in self.roots:
            entered = root.__dict__.get("_values") or {}
            look.tensors.extend(value for value in entered.values() if isinstance(value, Tensor))
        key = [look.module(root, root=True) for root in self.roots]
        unique = {id(value): value for value in look.tensors}
        return list(unique.values()), tuple(key)

    def entered(self) -> list[_Entered]:
        """What the roots hold while they are entered: values of their parameters, and of global parameters."""
        return [_Entered(root.__dict__.get("_values"), dict(getattr(root, "_pyro_context", _Context).cache))
                for root in self.roots]

    @contextmanager
    def enter(self, entered: list[_Entered], others: dict[int, Tensor]) -> Iterator[None]:
        """As if the roots were entered (again).

        :param others: what to read in the place of a tensor, by its ``id``.
        """
        def exchanged(values: dict[str, Any]) -> dict[str, Any]:
            return {name: others.get(id(value), value) for name, value in values.items()}

        with ExitStack() as stack:
            for root, (values, drawn) in zip(self.roots, entered, strict=True):
                if "_values" in root.__dict__:
                    stack.callback(root.__dict__.__setitem__, "_values", root.__dict__["_values"])
                    root.__dict__["_values"] = None if values is None else exchanged(values)
                if drawn:  # global parameters of modules inside
                    context = root._pyro_context
                    for name, value in (("cache", exchanged(drawn)), ("active", max(context.active, 1))):
                        stack.callback(setattr, context, name, getattr(context, name))
                        setattr(context, name, value)
            yield


class _Entered(NamedTuple):
    values: dict[str, Any] | None
    drawn: dict[str, Tensor]


class _Context:
    """Of a module that is none of Pyro's."""

    cache: dict[str, Tensor] = {}


class _Look:
    """One look at all there is: each object once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.seen: set[int] = set()

    def first(self, value: Any) -> bool:
        """Whether an object is met for the first time."""
        known = len(self.seen)
        self.seen.add(id(value))
        return len(self.seen) > known

    def module(self, module: nn.Module, root: bool = False) -> Hashable:
        if not self.first(module):
            return _Same(module)
        key: list[Hashable] = [module.training, self.kind(type(module)), *module._parameters, *module._buffers]
        self.tensors.extend(value for value in module._parameters.values() if value is not None)
        self.tensors.extend(value for value in module._buffers.values() if value is not None)
        if not root:
            for name in (*getattr(module, "_pyro_samples", ()), *getattr(module, "_pyro_params", ())):
                self.tensors.append(getattr(module, name))
        for name, value in module.__dict__.items():
            if name not in _OWN:
                key.append((name, self(value)))
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            key.extend(self(hook) for hook in hooks.values())
        key.extend((name, inner if inner is None else self.module(inner)) for name, inner in module._modules.items())
        return tuple(key)

    def __call__(self, value: Any) -> Hashable:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
            return type(value), value
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return tuple(value.shape), value.dtype, value.device
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, (enum.Enum, types.ModuleType, torch.jit.ScriptModule)):
            return _Same(value)
        if isinstance(value, np.ndarray):
            return value.shape, str(value.dtype), zlib.crc32(value.tobytes()) if value.nbytes <= _LARGE else _Same(value)
        if isinstance(value, _DRAWS):
            return _state(value)
        if isinstance(value, type):
            return self.kind(value)
        if not self.first(value):
            return _Same(value)
        return self.inside(value)

    def inside(self, value: Any) -> Hashable:
        """Of an object that holds others."""
        if isinstance(value, nn.Module):
            self.seen.discard(id(value))
            return self.module(value)
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            return type(value), tuple([self(part) for part in value])
        if isinstance(value, (dict, types.MappingProxyType)):
            return type(value), tuple([(self(name), self(part)) for name, part in value.items()])
        if isinstance(value, types.MethodType):
            return self(value.__func__), self(value.__self__)
        if isinstance(value, functools.partial):
            return self(value.func), self(value.args), self(value.keywords)
        if isinstance(value, property):
            return self(value.fget)
        if isinstance(value, (staticmethod, classmethod)) or hasattr(value, "__wrapped__"):
            return _Same(value), self(value.__wrapped__)
        if _closed(type(value).__module__):
            return _Same(value)
        return _Same(value), self.kind(type(value)), tuple([(name, self(part)) for name, part in _attributes(value)])

    def kind(self, kind: type) -> Hashable:
        """Of a class: what its methods name, and its attributes."""
        if not self.first(kind):
            return _Same(kind)
        key: list[Hashable] = [_Same(kind)]
        for base in kind.__mro__:
            if not _closed(base.__module__) and (base is kind or self.first(base)):
                key.extend((name, self(value)) for name, value in vars(base).items()
                           if name != "__init__" and (callable(value) or not name.startswith("__")))
        return tuple(key)

    def function(self, fn: types.FunctionType) -> Hashable:
        """Of a function: its defaults and the variables that it names."""
        if not self.first(fn):
            return fn.__code__
        wrapped = getattr(fn, "__wrapped__", None)
        key: list[Hashable] = [fn.__code__] if wrapped is None else [fn.__code__, self(wrapped)]
        if _closed(fn.__module__ or ""):
            return tuple(key)
        if fn.__defaults__ or fn.__kwdefaults__:
            key.append((self(fn.__defaults__), self(fn.__kwdefaults__)))
        enclosing = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        for is_global, name, *attributes in _named(fn.__code__):
            if name not in (fn.__globals__ if is_global else enclosing):
                continue
            value = fn.__globals__[name] if is_global else _contents(enclosing[name])
            for attribute in attributes:
                if not isinstance(value, types.ModuleType) or _closed(value.__name__):
                    break
                value = getattr(value, attribute, None)
            key.append((name, self(value)))
        return tuple(key)


def _state(value: Any) -> Hashable:
    """Of what gives another value each time."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.RandomState):
        return tuple([part.tobytes() if isinstance(part, np.ndarray) else part for part in value.get_state()])
    return repr(value.bit_generator.state if isinstance(value, np.random.Generator) else value)


@cache
def _closed(name: str) -> bool:
    """Whether what a Python module defines is not looked into."""
    head = name.split(".")[0]
    return head in _LIBRARIES or head in sys.stdlib_module_names and head not in (*_HOLDERS, "__main__")


def _attributes(value: Any) -> list[tuple[str, Any]]:
    slots = [name for base in type(value).__mro__ for name in _names(vars(base).get("__slots__", ()))]
    found = [(name, getattr(value, name)) for name in slots if name not in ("__dict__", "__weakref__") and hasattr(value, name)]
    return [*found, *getattr(value, "__dict__", {}).items()]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


@cache
def _named(code: types.CodeType) -> tuple[tuple[Any, ...], ...]:
    """The global and enclosing variables that a function, and those inside it, name: whether it is a global one, its name, and
    the attributes that are read of it."""
    found: dict[tuple[Any, ...], None] = {}
    chain: list[Any] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(instruction.argval)
            continue
        if chain:
            found[tuple(chain)] = None
        is_global = instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        chain = [is_global, instruction.argval] if is_global or "DEREF" in instruction.opname else []
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found.update(dict.fromkeys(_named(inner)))
    return tuple(found)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
