"""The one door into a model or guide: parameters read, and global parameters drawn, once per call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from pyro.params import param_with_module_name
from torch import Tensor

from pyro_seq.engine.handlers import outside_inference_mode

__all__ = ["SequentialModule", "accepted", "own_parameters", "require_count", "require_guide", "require_model"]


_NO_INIT = "{name}.__init__ does not call super().__init__(): do so before anything else"


class SequentialModule(PyroModule):
    """A :class:`~pyro.nn.PyroModule` whose attributes are read once per call.

    Reading a parameter in Pyro sends a message through every handler, and reading a ``PyroSample`` outside of a call
    draws it anew. A sequence model reads the same attributes at every step, so :meth:`within` reads them all once and
    hands the values out until it returns.
    """

    def __init__(self, name: str = ""):
        super().__init__(name)
        self.__dict__["_values"] = None

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values")
        if values is not None and name in values:
            return values[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_values") is not None:
            raise TypeError(f"{type(self).__name__} sets its attribute {name!r} while a step runs: what a step "
                            "remembers goes into the state it returns, since rows are resampled and scored out of order")
        if isinstance(value, (Tensor, torch.nn.Module, PyroParam, PyroSample)):
            self._refuse_method_name(name)
        super().__setattr__(name, value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        self._refuse_method_name(name)
        super().register_buffer(name, tensor, persistent)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        self._refuse_method_name(name)
        super().register_parameter(name, param)

    def _refuse_method_name(self, name: str) -> None:
        """Reading the attribute would find the method, or the method's caller the attribute."""
        if inspect.isfunction(inspect.getattr_static(type(self), name, None)):
            raise ValueError(f"{type(self).__name__} sets an attribute {name!r}, which is the name of one of its methods: give "
                             f"it another name, such as self.{name}_value")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "_values" not in self.__dict__:
            raise TypeError(_NO_INIT.format(name=type(self).__name__))
        return super().__call__(*args, **kwargs)

    @pyro_method
    def within(self, fn: Callable[..., Any], *args: Any, globals: Mapping[str, Tensor] | None = None,
               attributes: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """Run ``fn(*args, **kwargs)`` with this call's parameters and global parameters in place.

        :param globals: values of global sites drawn elsewhere (by a guide); they are not sampled again.
        :param attributes: values of this module's own parameters, by attribute, to be read in their place.
        """
        if self.__dict__["_values"] is not None:
            return fn(*args, **kwargs)
        self._refuse_collisions()
        self._store_frozen()
        if globals is None:
            values = self._read()
        else:
            with poutine.block(hide=list(globals)), poutine.condition(data=dict(globals)):
                values = self._read()
        self.__dict__["_values"] = {**values, **(attributes or {})}
        try:
            return fn(*args, **kwargs)
        finally:
            self.__dict__["_values"] = None

    def global_sites(self) -> list[str]:
        """Names of the ``PyroSample`` attributes, of this module and of those inside it."""
        if "_values" not in self.__dict__:
            raise TypeError(_NO_INIT.format(name=type(self).__name__))
        return [".".join(filter(None, (self._pyro_name, prefix, name)))
                for prefix, module in self.named_modules() if isinstance(module, PyroModule)
                for name in module._pyro_samples]

    def _read(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self._pyro_samples}
        for module in self.modules():
            if module is not self and isinstance(module, PyroModule):
                for name in module._pyro_samples:
                    getattr(module, name)
        values.update({name: getattr(self, name) for name, child in self._modules.items() if child is not None})
        values.update({name: getattr(self, name) for name in self._pyro_params})
        values.update({name: getattr(self, name) for name in self._parameters
                       if not name.endswith("_unconstrained") and self._parameters[name] is not None})
        return values

    def store_names(self) -> dict[str, torch.nn.Parameter]:
        """This module's parameters by the names they have in Pyro's store."""
        if "_values" not in self.__dict__:
            raise TypeError(_NO_INIT.format(name=type(self).__name__))
        return {_store_name(self, self._pyro_name, prefix, name): value for prefix, module in self.named_modules()
                for name, value in module.named_parameters(prefix="", recurse=False)}

    def _store_frozen(self) -> None:
        """Pyro's store turns on the gradient of a parameter that enters it: frozen ones enter here, and are frozen again."""
        if all(p.requires_grad for p in self.parameters()) or pyro.settings.get("module_local_params"):
            return
        for prefix, module in self.named_modules():
            if isinstance(module, PyroModule):  # those of plain modules do not enter when frozen
                for name, value in module.named_parameters(recurse=False):
                    if not value.requires_grad and not name.endswith("_unconstrained"):
                        pyro.get_param_store().setdefault(_store_name(self, self._pyro_name, prefix, name), value)
                        value.requires_grad_(False)

    def _refuse_collisions(self) -> None:
        """Two modules with one name would share, or silently never train, their parameters."""
        if pyro.settings.get("module_local_params"):
            return
        stored = dict(pyro.get_param_store().named_parameters())
        if not stored:
            return
        for key, value in self.store_names().items():
            if key in stored and stored[key] is not value:
                raise ValueError(
                    f"parameter {key!r} of this {type(self).__name__} is already in Pyro's parameter store, put there by "
                    "another model or guide of the same name: training one would silently leave the other as it is. Give "
                    f"this one a name, {type(self).__name__}(..., name='other'), or call pyro.clear_param_store() first (to "
                    "restore saved parameters, use state_dict() and load_state_dict())")


def _store_name(root_module: PyroModule, root: str, prefix: str, name: str) -> str:
    """The name under which Pyro stores a parameter: plain modules are stored whole, by the attribute that holds them."""
    owner: torch.nn.Module = root_module
    path = [root] if root else []
    parts = prefix.split(".") if prefix else []
    while parts and isinstance(owner, PyroModule):
        owner = owner._modules[parts[0]]
        path.append(parts.pop(0))
    name = name.removesuffix("_unconstrained")
    if isinstance(owner, PyroModule):
        return ".".join([*path, name])
    return param_with_module_name(".".join(path), ".".join([*parts, name]))


@contextmanager
def own_parameters(*modules: SequentialModule | None) -> Iterator[None]:
    """Run with the parameters that the modules hold, leaving Pyro's store as it is; outside of ``torch.inference_mode``.

    Two models of one name can thus be filtered and compared in one process. Parameters of plain ``pyro.param`` statements
    keep the values they have in the store.
    """
    store = pyro.get_param_store()
    state = store.get_state()
    own = {name for module in modules if module is not None for name in module.store_names()}
    kept = {what: {name: value for name, value in values.items() if name not in own} for what, values in state.items()}
    # A module that was made in inference mode cannot leave it.
    made = torch.is_inference_mode_enabled() and any(
        value.is_inference() for module in modules if module is not None for value in module.parameters())
    with store.scope(kept), nullcontext() if made else outside_inference_mode():
        yield


@cache
def _signature(fn: Callable[..., Any], positional: int) -> tuple[frozenset[str], frozenset[str], bool]:
    parameters = list(inspect.signature(fn).parameters.values())[1 + positional:]
    keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return (frozenset(p.name for p in keyword), frozenset(p.name for p in keyword if p.default is p.empty),
            any(p.kind is p.VAR_KEYWORD for p in parameters))


def accepted(method: Callable[..., Any], positional: int) -> tuple[frozenset[str], frozenset[str], bool]:
    """Of a bound method, after ``positional`` arguments: the keywords it takes, those it requires, whether it takes any."""
    return _signature(method.__func__, positional)


def require_model(model: Any, who: str) -> None:
    """Raise unless ``model`` is a declared model."""
    if isinstance(model, type):
        raise TypeError(f"{who} takes a model, not the class {model.__name__}: make one, {model.__name__}()")
    if not hasattr(model, "apply") or not hasattr(model, "within"):
        raise TypeError(f"{who} takes a SequentialModel or StateSpaceModel, not {type(model).__name__}: declare one, or wrap a "
                        "plain Pyro function with seq.from_pyro")


def require_guide(guide: Any, model: Any, who: str) -> None:
    """Raise unless ``guide`` is a sequential guide made for ``model``."""
    if isinstance(guide, type):
        raise TypeError(f"{who} takes a guide, not the class {guide.__name__}: make one, {guide.__name__}(model)")
    if not hasattr(guide, "propose"):
        raise TypeError(f"guide is a {type(guide).__name__}; {who} takes a SequentialGuide, which says how one step is "
                        "proposed")
    if guide.model is not model:
        raise ValueError(f"the guide was made for another {type(guide.model).__name__}: build it on the model that {who} "
                         "is given")


def require_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if hasattr(value, "propose"):
        raise TypeError(f"{name} is a {type(value).__name__}: pass it by name, guide=...")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not an integer")
    if value < least:
        raise ValueError(f"{name}={value}; it is at least {least}")
