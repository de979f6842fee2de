"""Models, guides and losses by name, for the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyro_seq.guides.avf import AmortizedVariationalFilter
from pyro_seq.guides.recurrent import FilteringGuide, SmoothingGuide
from pyro_seq.infer.elbo import SequentialELBO
from pyro_seq.infer.fivo import FIVO
from pyro_seq.infer.iwae import IWAE
from pyro_seq.infer.loss import SequenceLoss
from pyro_seq.infer.wake_sleep import ReweightedWakeSleep
from pyro_seq.models import (
    SRNN,
    VRNN,
    AugmentedDeepMarkovModel,
    DeepMarkovModel,
    SRNNInference,
    StructuredInference,
    VRNNInference,
)

__all__ = ["GUIDES", "LOSSES", "MODELS", "make_guide", "make_loss", "make_model"]

MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "dmm": (DeepMarkovModel, StructuredInference),
    "dmm-aug": (AugmentedDeepMarkovModel, StructuredInference),
    "srnn": (SRNN, SRNNInference),
    "vrnn": (VRNN, VRNNInference),
}
"""Each model with its published inference."""

GUIDES: dict[str, Callable[..., Any] | None] = {
    "own": None, "filtering": FilteringGuide, "smoothing": SmoothingGuide, "avf": AmortizedVariationalFilter}
"""Guides that work with any model, and ``own``: the model's published inference."""

LOSSES: dict[str, Callable[..., SequenceLoss]] = {
    "elbo": SequentialELBO, "fivo": FIVO, "iwae": IWAE, "wake-sleep": ReweightedWakeSleep}


def make_model(name: str, observed: int, options: Mapping[str, Any]) -> Any:
    """A fresh model for frames of ``observed`` entries.

    Example::

        >>> type(make_model("dmm", 88, {"latent": 4})).__name__
        'DeepMarkovModel'
    """
    kind = MODELS[name][0]
    _refuse_unknown(kind, options, {"observed", "name"})
    return kind(observed, **options)


def make_guide(name: str, model: Any, options: Mapping[str, Any], like: Any = None) -> Any:
    """A fresh guide for ``model``.

    :param like: data whose shapes and units the guide will meet.

    Example::

        >>> type(make_guide("own", make_model("vrnn", 4, {}), {"residual": True})).__name__
        'VRNNInference'
    """
    kind = GUIDES[name]
    if kind is None:
        kind = next(own for declared, own in MODELS.values() if isinstance(model, declared))
        _refuse_unknown(kind, options, {"model", "name"})
        return kind(model, **options)
    _refuse_unknown(kind, options, {"model", "name", "like", "encoder", "global_guide"})
    return kind(model, like=like, **options)


def make_loss(name: str, num_particles: int, options: Mapping[str, Any]) -> SequenceLoss:
    """A loss.

    Example::

        >>> make_loss("fivo", 4, {"ess_threshold": 1.0})
        FIVO(num_particles=4, ess_threshold=1.0, resampling='systematic', resampling_gradient=False)
    """
    _refuse_unknown(LOSSES[name], options, {"num_particles", "kl_weight", "compile"})
    return LOSSES[name](num_particles, **options)


def _refuse_unknown(kind: Callable[..., Any], options: Mapping[str, Any], ours: set[str]) -> None:
    parameters = inspect.signature(kind).parameters
    known = set(parameters) - ours
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{unknown} is not an option of {kind.__name__}; it has {sorted(known)}")
    for name, value in options.items():  # a word such as "no" would be true
        if isinstance(parameters[name].default, bool) and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} for {kind.__name__}; it is True or False")
