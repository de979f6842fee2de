"""What was found of a declared model: what kind it is, and which methods it is within reach of."""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Applies", "SiteSummary", "Structure"]

_EXACT = ("KalmanFilter", "ForwardBackward", "ExactLikelihood")


class SiteSummary(NamedTuple):
    """One sample site of the step."""

    name: str
    family: str
    """Its distribution; both, where the first step has another than the later ones."""
    event_shape: tuple[int, ...]
    observed: bool
    size: int | None
    """Number of values of a finite support."""


class Applies(NamedTuple):
    """Whether a method can be used on the model."""

    method: str
    applies: bool
    why: str
    """What stands in the way; or a remark."""


@dataclass(frozen=True, repr=False)
class Structure:
    """What :func:`inspect` found. Printed, it is a summary; in a notebook, a table."""

    model: Any
    kind: str
    """``"no latents"``, ``"discrete"``, ``"linear-Gaussian"``, ``"conditionally linear-Gaussian"``, ``"nonlinear Gaussian"`` or
    ``"none"``."""
    sites: tuple[SiteSummary, ...]
    methods: tuple[Applies, ...]
    marginal: tuple[str, ...] = ()
    """Latents that are linear and Gaussian given the others."""
    conditioning: tuple[str, ...] = ()
    """The others, if that is what the model is."""
    notes: tuple[str, ...] = ()
    assumed: bool = field(default=False)
    """Whether linearity is the user's word."""

    def applies(self, method: str) -> bool:
        """Whether a method of this name applies."""
        return self._of(method).applies

    def why(self, method: str) -> str:
        """What stands in the way of a method."""
        return self._of(method).why

    def method(self) -> Any:
        """The exact method for the model: a KalmanFilter, ForwardBackward or ExactLikelihood on it.

        :raises ValueError: if there is none, with the reasons.
        """
        import pyro_seq

        for name in ("ExactLikelihood", "ForwardBackward", "KalmanFilter"):
            if self.applies(name):
                options = {"assume_linear": True} if self.assumed and name == "KalmanFilter" else {}
                return getattr(pyro_seq, name)(self.model, **options)
        reasons = "\n".join(f"  {m.method}: {m.why}" for m in self.methods if m.method in _EXACT)
        raise ValueError(f"{type(self.model).__name__} has no exact method, being {self.headline}:\n{reasons}")

    @property
    def headline(self) -> str:
        """The kind in words, and how it is known."""
        if self.kind == "conditionally linear-Gaussian":
            given = f" given {list(self.conditioning)}" if self.conditioning else ", whatever else is observed"
            return f"linear-Gaussian in {list(self.marginal)}{given}, at the points tested"
        if self.kind == "linear-Gaussian":
            return "linear-Gaussian, as the user says" if self.assumed else "linear-Gaussian at the points tested"
        if self.kind == "discrete":
            states = math.prod(site.size for site in self.sites if not site.observed)
            return f"discrete, with {states} joint state{'s' if states > 1 else ''} a step"
        return {"none": "of no special structure"}.get(self.kind, self.kind)

    def __repr__(self) -> str:
        lines = [f"{type(self.model).__name__}: {self.headline}"]
        width = max(len(site.name) for site in self.sites)
        for site in self.sites:
            size = "" if site.size is None else f", {site.size} values"
            lines.append(f"  {site.name:<{width}}  {'observed' if site.observed else 'latent':<8}  {site.family} "
                         f"{site.event_shape}{size}")
        for method in self.methods:
            head = f"  {'yes' if method.applies else 'no':<3}  {method.method:<28}"
            lines += textwrap.wrap(f"{head}{method.why}".rstrip(), 120, subsequent_indent=" " * len(head),
                                   break_on_hyphens=False)
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
            cells = "".join(f"<th>{h}</th>" for h in head)
            body = "".join("<tr>" + "".join(f"<td style='text-align:left'>{html.escape(str(v))}</td>" for v in row) + "</tr>"
                           for row in rows)
            return f"<table><tr>{cells}</tr>{body}</table>"

        sites = [(s.name, "observed" if s.observed else "latent", s.family, s.event_shape, s.size or "") for s in self.sites]
        methods = [(m.method, "yes" if m.applies else "no", m.why) for m in self.methods]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (f"<p><b>{html.escape(type(self.model).__name__)}</b>: {html.escape(self.headline)}</p>"
                + table(("site", "", "family", "event shape", "values"), sites)
                + table(("method", "applies", "why"), methods) + notes)

    def _of(self, method: str) -> Applies:
        for found in self.methods:
            if found.method == method:
                return found
        raise ValueError(f"no method {method!r}; there are {[m.method for m in self.methods]}")
