"""What happens at each ``pyro.sample`` of one step.

Two messengers read the user's step. :class:`StepSites` runs it for the engine on flat rows: it draws, or is given, the
latents and records every site. :class:`PyroSites` runs it as part of an ordinary Pyro program: it adds the time to the
names, masks finished sequences, and lets every site go on to the handlers outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import ImproperUniform
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.compiled.trace import is_traced
from pyro_seq.engine.families import expand_rows, has_moving_support, in_support, log_density, sample
from pyro_seq.engine.missing import FrozenRows, SomeEntries, fill, require_imputable, score_entries
from pyro_seq.sequences import Frame

__all__ = ["GuideSites", "LatentsDrawn", "Proposal", "PyroSites", "Site", "StepSites", "check_support", "draw"]

Proposal = Callable[[str, Distribution], tuple[Distribution | None, Tensor | None]]
"""Given a latent site and its prior: the distribution to draw it from (``None``: the prior) and, where it is drawn
already, its value."""


class LatentsDrawn(Exception):
    """Ends a step early: every latent has its value and the rest was asked not to run."""


class Site(NamedTuple):
    """One sample site of one step, on flat rows."""

    name: str
    value: Tensor
    p: Distribution
    """The model's distribution, batch shape ``(rows,)``."""
    q: Distribution | None
    """What the value was drawn from; ``None`` for the model's own distribution or an observed value."""
    observed: bool
    present: Tensor | None
    """Observed sites with gaps: booleans of the shape of ``value``. The other entries were drawn from ``p`` if the state
    reads them, and hold a fixed value otherwise."""
    scale: float | Tensor
    mask: bool | Tensor | None

    def log_p(self) -> Tensor:
        """``(rows,)`` log density under the model."""
        if self.present is not None:
            log_prob = score_entries(self.p, self.value, self.present, self.name)
        else:
            log_prob = log_density(self.p, self.value)
        return scale_and_mask(log_prob, self.scale, self.mask)

    def log_q(self, q: Distribution | None = None) -> Tensor:
        """``(rows,)`` log density under the proposal."""
        return scale_and_mask(log_density(q or self.q, self.value), self.scale, self.mask)


def draw(fn: Distribution, name: str, frame: Frame) -> Tensor:
    """The one place where the engine uses random numbers for a site: reparameterised where ``fn`` can be."""
    if isinstance(fn, ImproperUniform):
        raise ValueError(f"site {name!r} is ImproperUniform, which says nothing of its values and cannot be drawn: give it a "
                         "proper distribution, or use KalmanFilter, which takes the limit of no information")
    return sample(fn)


_TWICE = "site {name!r} is sampled twice in one step: a site appears once a step; the time index is added for you"


class StepSites(Messenger):
    """Run one step of a model on flat rows, for the engine.

    :param frame: the rows.
    :param proposal: where latents are drawn from; the model's prior when omitted.
    :param values: latents (and the imputed values of observed sites) that are given instead.
    :param impute: draw the missing entries of observed sites from the model, since they may feed the recurrence; fill
        them with a fixed value otherwise.
    :param stop_after: the number of latents after which to raise :class:`LatentsDrawn`.
    :param detach: let the step read its latents without their gradient, so that the future does not train the guide.
    """

    def __init__(self, frame: Frame, proposal: Proposal | None = None, values: Mapping[str, Tensor] | None = None,
                 impute: bool = False, stop_after: int | None = None, detach: bool = False):
        super().__init__()
        self.frame, self.proposal, self.values = frame, proposal, values or {}
        self.impute, self.stop_after, self.detach = impute, stop_after, detach
        self.sites: dict[str, Site] = {}

    @property
    def latents(self) -> dict[str, Site]:
        return {name: site for name, site in self.sites.items() if not site.observed}

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> Any:
        done = super().__exit__(kind, error, traceback)
        _explain(error, self.frame)
        if isinstance(error, ValueError) and str(error).startswith("Expected parameter"):
            time = f" at time {self.frame.t}" if isinstance(self.frame.t, int) else ""
            after = f"after site {list(self.sites)[-1]!r}" if self.sites else "before its first site"
            raise ValueError(f"a distribution in the step{time}, {after}, has an argument that it cannot have: look for a "
                             "scale that is zero or negative, a probability outside 0 to 1, or a state that has become NaN. "
                             f"{error}") from error
        return done

    def fill_gaps(self, name: str, p: Distribution, value: Tensor, present: Tensor) -> Tensor:
        """An observed value with something at its missing entries."""
        filler = self.values.get(name)
        if self.impute:
            require_imputable(p, present, name)
            if filler is None:
                filler = draw(p, name, self.frame)
        return fill(p, value, present, filler)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":  # a plate of the user's own: none of the handlers' outside
            msg["stop"] = True
        if msg["done"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        msg["stop"] = msg["done"] = True
        if msg["infer"].get("_deterministic"):
            return
        name, frame, present, q = msg["name"], self.frame, None, None
        if name in self.sites:
            raise ValueError(_TWICE.format(name=name))
        p = expand_rows(msg["fn"], frame.rows, name)
        if msg["is_observed"]:
            value = _observed_value(name, p, msg["value"], frame)
            present = _present(name, msg["value"], frame) if frame.missing else None
            if present is not None and self.impute and present.all():  # nothing to draw
                present = None
            if present is not None:
                value = self.fill_gaps(name, p, value, present)
        elif name in self.values:
            value = self.values[name]
        else:
            if self.proposal is not None:
                q, value = self.proposal(name, p)
            if self.proposal is None or value is None:
                value = draw(p if q is None else q, name, frame)
        msg["value"] = value.detach() if self.detach and not msg["is_observed"] else value
        self.sites[name] = Site(name, value, p, q, msg["is_observed"], present, msg["scale"], msg["mask"])
        if self.stop_after is not None and not msg["is_observed"]:
            self.stop_after -= 1
            if self.stop_after == 0:
                raise LatentsDrawn


class GuideSites(StepSites):
    """The step of a guide that draws there itself, handed to its ``propose`` to draw as ``proposal`` says.

    Later draws of the step are thus given the values of the earlier ones.
    """

    @property
    def drawn(self) -> dict[str, tuple[Distribution, Tensor]]:
        return {name: (site.p, site.value) for name, site in self.latents.items()}

    @property
    def observed(self) -> list[str]:
        return [name for name, site in self.sites.items() if site.observed]


def _explain(error: BaseException | None, frame: Frame) -> None:
    """Raise what an error of torch or Python in the user's step means here."""
    if isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error) and not frame.x:
        raise ValueError(f"the step reads data where none is given, as in simulating and predicting ({error}): let it read the "
                         "value that pyro.sample returns, x = pyro.sample('x', ..., obs=x)") from error
    if isinstance(error, RuntimeError) and "Boolean value of Tensor" in str(error):
        raise ValueError("the step has an if (or and, or, not, max, min of Python) on a tensor. The time t, states and data "
                         "are tensors over the rows, of which some may meet the condition and some not: choose by row, as in "
                         "torch.where(t < 5, a, b)") from error


class PyroSites(Messenger):
    """Run one step of a model or guide inside an ordinary Pyro program.

    :param suffix: what is added to each name, such as ``"_3"``.
    :param frame: the rows, here the sequences of the batch in the user's order.
    :param running: ``(B,)`` booleans, ``None`` when no sequence has finished.
    :param proposal: given in a guide: turns the model's latents into the guide's and hides the observed sites.
    :param impute: as for :class:`StepSites`; here the missing entries become a site ``NAME_t_missing``.
    """

    def __init__(self, rename: Callable[[str], str], frame: Frame, running: Tensor | None,
                 proposal: Proposal | None = None, impute: bool = False):
        super().__init__()
        self.rename, self.frame, self.running = rename, frame, running
        self.proposal, self.impute = proposal, impute
        self.drawn: dict[str, tuple[Distribution, Tensor]] = {}
        self.observed: dict[str, Tensor] = {}
        self.hidden: set[str] = set()
        self.enumerates = False
        self._emitting = False

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> Any:
        done = super().__exit__(kind, error, traceback)
        _explain(error, self.frame)
        return done

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["done"] or self._emitting or type(msg["fn"]).__name__ == "_Subsample":
            return
        name = msg["name"]
        if name in self.drawn or name in self.observed:
            raise ValueError(_TWICE.format(name=name))
        if msg["infer"].get("_deterministic"):
            msg["name"] = self.rename(name)
            if self.proposal is not None:
                msg["stop"] = msg["done"] = True
            return
        raw, shape = msg["value"], tuple(getattr(msg["fn"], "batch_shape", (None,)))
        if len(shape) < 2 or shape[-1] not in (1, self.frame.rows):
            msg["fn"] = expand_rows(msg["fn"], self.frame.rows, name)
            if msg["is_observed"]:
                msg["value"] = _observed_value(name, msg["fn"], msg["value"], self.frame)
        if "enumerate" in msg["infer"]:
            self.enumerates = True
        if msg["is_observed"]:
            self._observe(name, msg, raw)
        else:
            self._draw(name, msg)
        msg["name"] = self.rename(name)
        if self.running is not None:
            msg["mask"] = self.running if msg["mask"] is None else self.running & msg["mask"]
        msg["infer"] = {**msg["infer"], "_site": name}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        name = msg["infer"].get("_site") if msg["infer"] else None
        if name is not None:
            (self.observed.__setitem__(name, msg["value"]) if msg["is_observed"] else
             self.drawn.__setitem__(name, (msg["fn"], msg["value"])))

    def _observe(self, name: str, msg: dict[str, Any], raw: Tensor) -> None:
        if self.frame.missing and (present := _present(name, raw, self.frame)) is not None and not present.all():
            p = _rows_last(msg["fn"], self.frame.rows)
            filler = None
            if self.impute:
                require_imputable(p, present, name)
                self._emitting = True
                absent = ~present
                if self.running is not None:
                    absent = absent & self.running.reshape(-1, *(1,) * p.event_dim)
                filler = pyro.sample(f"{self.rename(name)}_missing", SomeEntries(p, absent, name))
                self._emitting = False
            msg["value"] = fill(p, msg["value"], present, filler)
            msg["fn"] = SomeEntries(p, present, name)
        if self.proposal is not None:
            msg["stop"] = msg["done"] = True
            self.hidden.add(name)

    def _draw(self, name: str, msg: dict[str, Any]) -> None:
        if self.proposal is not None:
            if len(msg["fn"].batch_shape) > 1:
                raise ValueError(
                    f"site {name!r} has batch_shape {tuple(msg['fn'].batch_shape)} in a guide that runs on flat rows: "
                    "for several particles use SequentialELBO(num_particles=), or leave vectorize_particles off")
            q, value = self.proposal(name, expand_rows(msg["fn"], self.frame.rows, name))
            if value is not None:
                msg["value"], msg["stop"], msg["done"] = value, True, True
                return
            if q is not None:
                msg["fn"] = q
        if self.running is not None and "enumerate" not in msg["infer"]:
            msg["fn"] = FrozenRows(_rows_last(msg["fn"], self.frame.rows), self.running)


def _rows_last(fn: Distribution, rows: int) -> Distribution:
    """Expand the last batch dimension to the rows; others, of enumeration or of Pyro's particles, stay."""
    shape = tuple(fn.batch_shape)
    return fn if shape and shape[-1] == rows else fn.expand(shape[:-1] + (rows,))


def _observed_value(name: str, p: Distribution, value: Tensor, frame: Frame) -> Tensor:
    """Check an observed value against its distribution; whole numbers take the type of its parameters."""
    if p.event_shape == (0,):  # pyro.factor
        return value
    expected = p.shape()
    if value.shape != expected:
        hint = (": data of shape (B, T) are scalars, use (B, T, 1) for vectors of one entry"
                if value.dim() == 1 and p.event_dim == 1 else
                ": data of shape (B, T, 1) are vectors of one entry, use x[..., 0] for scalars, or .to_event(1) in the model"
                if tuple(value.shape[1:]) == (1,) and p.event_dim == 0 else
                ": add .to_event() to the distribution if each frame is a vector" if value.dim() > len(expected) else "")
        raise ValueError(f"site {name!r} has frames of shape {tuple(expected[1:])} but the data has frames of shape "
                         f"{tuple(value.shape[1:])}{hint}")
    if frame.first or not value.is_floating_point():
        like = p
        while hasattr(like, "base_dist"):
            like = like.base_dist
        parameters = [v for a in like.arg_constraints if isinstance(v := like.__dict__.get(a), Tensor)]
        if parameters:
            first = parameters[0]
            if not value.is_floating_point() and first.is_floating_point():
                value = value.to(first.dtype)
            if first.device != value.device:
                raise ValueError(f"site {name!r}: the data is on {value.device} and the model on {first.device}; move "
                                 f"the data with x.to({str(first.device)!r}) or the model with model.to(...)")
            if value.is_floating_point() and first.is_floating_point() and first.dtype != value.dtype:
                raise TypeError(f"site {name!r}: the data is {value.dtype} and the model {first.dtype}; convert the "
                                f"data with x.to({first.dtype}) or the model with model.to({value.dtype})")
        if frame.first:
            check_support(name, p, frame)
    if not frame.first:
        _without_check(p)  # all of the data has been checked at the first step
    return value


def _without_check(fn: Distribution) -> None:
    """Let ``fn`` score values outside its support: their density is zero, which is for the weights to say."""
    while True:
        fn.__dict__["_validate_args"] = False
        if not hasattr(fn, "base_dist"):
            return
        fn = fn.base_dist


def check_support(name: str, p: Distribution, frame: Frame) -> None:
    """Check all data of a site against its support at once, at the first step, where the support is fixed.

    Where it moves with the parameters, as a uniform's, a value outside has density zero: that is for the weights to say.
    """
    if has_moving_support(p):
        return _without_check(p)
    like = p
    while hasattr(like, "base_dist"):
        like = like.base_dist
    if frame.whole is None or name not in frame.x or (name, type(like)) in frame.whole.inside_support:
        return
    x = frame.whole.x[name]
    filled = torch.where(x.isnan(), in_support(p)[:1, None].to(x), x) if x.is_floating_point() else x
    inside = p.support.check(filled).reshape(*x.shape[:2], -1) | ~frame.whole.active[..., None]
    if x.is_floating_point():
        missing = x.isnan().reshape(*x.shape[:2], -1)
        inside = inside | (missing if missing.shape == inside.shape else missing.any(-1, keepdim=True))
    elif name in frame.whole.observed:
        masked = ~frame.whole.observed[name].reshape(*x.shape[:2], -1)
        inside = inside | (masked if masked.shape == inside.shape else masked.any(-1, keepdim=True))
    inside = inside.all(-1)
    if not inside.all():
        b, t = (~inside).nonzero()[0].tolist()
        time = t + (frame.t if isinstance(frame.t, int) else 1)
        raise ValueError(f"site {name!r}: the data of sequence {b} at time {time} lies outside the support of "
                         f"{type(like).__name__}: transform the data, or choose another distribution")
    frame.whole.inside_support.add((name, type(like)))


def _present(name: str, value: Tensor, frame: Frame) -> Tensor | None:
    """Booleans of the shape of ``value``, or ``None`` where nothing is missing, if that can be seen."""
    if value.is_floating_point():
        missing = value.isnan()
        return ~missing if value.numel() and (is_traced() or missing.any()) else None
    for key, data in frame.x.items():
        if data is value:
            observed = frame.observed.get(key)
            return None if observed is None or not is_traced() and observed.all() else observed
    if frame.observed:
        raise ValueError(f"site {name!r} observes a function of integer data with gaps: observe the data itself "
                         "(obs=x), or pass floating data with NaN")
    return None
