"""Distributions as points of their own family: unconstrained parameters out, a distribution of the family back in.

This is what lets a guide start at a model's prior and move away from it without knowing which distribution it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable
from functools import cache
from typing import Any

import pyro
import torch
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    ExpTransform,
    Independent,
    Transform,
    TransformedDistribution,
    biject_to,
    constraints,
    transform_to,
)

from pyro_seq.engine.native import fill_normal, normal_log_density

__all__ = ["Family", "apart", "concatenate", "expand_rows", "has_moving_support", "in_support", "log_density", "rebuilt",
           "sample", "settings"]

# Of redundant arguments (probs and logits, three forms of a covariance) the one with the simplest unconstrained form.
_DROPPED = {"logits": {"probs"}, "scale_tril": {"covariance_matrix", "precision_matrix"}}


_NORMALS = (torch.distributions.Normal, pyro.distributions.Normal)
# Families whose support moves with their parameters and whose density does not vanish outside by itself.
_BOUNDED = (torch.distributions.Binomial, torch.distributions.Pareto, pyro.distributions.AffineBeta)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_NOT_REBUILT = ("site {name!r}: a {kind} cannot be made anew from its parameters {arguments}, which a guide that learns them "
                "has to do; use a family such as Normal, LogNormal, Gamma, Beta or Categorical for the latent, or write a "
                "SequentialGuide")
_NO_FAMILY = ("site {name!r}: {kind} cannot be learned in its own family (argument {argument!r} has no fixed range); use a "
              "family such as Normal, LogNormal, Gamma, Beta or Categorical for the latent, or write a SequentialGuide")


def _arguments(fn: Distribution) -> dict[str, Any]:
    """The constructor arguments that describe ``fn``, each with its constraint."""
    names = dict(fn.arg_constraints)
    for kept, dropped in _DROPPED.items():
        if kept in names:
            names = {k: v for k, v in names.items() if k not in dropped}
    return names


@cache
def _settings_of(kind: type) -> tuple[tuple[str, bool], ...]:
    """Constructor arguments that are no parameters, and whether they have a default."""
    known = {"self", "validate_args", *(() if isinstance(kind.arg_constraints, property) else kind.arg_constraints)}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple((argument.name, argument.default is not argument.empty)
                 for argument in inspect.signature(kind.__init__).parameters.values()
                 if argument.name not in known and argument.kind in named)


def settings(fn: Distribution) -> dict[str, Any] | None:
    """What a distribution was made with beside its parameters, as a multinomial's number of trials; ``None`` where that cannot
    be told, or may differ between rows.

    Example::

        >>> import torch, pyro.distributions as dist
        >>> settings(dist.Multinomial(4, probs=torch.ones(2, 3))), settings(dist.Gamma(1.0, 1.0))
        ({'total_count': 4}, {})
    """
    found = {}
    for name, optional in _settings_of(type(fn)):
        value = getattr(fn, name, None)
        if isinstance(value, Tensor) and value.dim() or value is None and not optional:
            return None
        if value is not None:
            found[name] = value
    return found


def _is_real(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real


def _chart(constraint: constraints.Constraint) -> Transform | None:
    """From the real line to an argument's range; ``None`` for the real line itself.

    ``transform_to`` would add and multiply by constants for a bound of zero, twice the work at every step.
    """
    if _is_real(constraint):
        return None
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    return ExpTransform() if base in (constraints.positive, constraints.nonnegative) else transform_to(constraint)


class Family:
    """The parametric family of a distribution and a chart of it by one flat real vector a row.

    :param fn: a distribution with batch shape ``(rows,)``.
    :param name: the site, for messages.
    :raises ValueError: if the family has no such chart (its support moves with its parameters, or its arguments are
        not tensors).

    Example::

        >>> import torch, pyro.distributions as dist
        >>> prior = dist.Gamma(torch.tensor([2.0]), torch.tensor([1.0]))
        >>> family = Family(prior, "z")
        >>> family.width
        2
        >>> family.distribution(family.parameters(prior)).mean
        tensor([2.])
    """

    def __init__(self, fn: Distribution, name: str):
        self.name = name
        self.kind = type(fn)
        self.event = tuple(fn.event_shape)
        if isinstance(fn, Independent):
            self.inner: Family | None = Family(fn.base_dist, name)
            self.reinterpreted = fn.reinterpreted_batch_ndims
        elif isinstance(fn, MaskedDistribution):
            raise ValueError(f"site {name!r}: a masked latent has no family to learn in; mask by the data instead")
        elif isinstance(fn, Delta):
            raise ValueError(f"site {name!r} is a Delta, a function of what came before it, and has no density to learn: use "
                             "KalmanFilter, if the model is linear; or let the state carry the value instead of sampling it")
        elif isinstance(fn, TransformedDistribution) and not fn.arg_constraints:
            self.inner = Family(fn.base_dist, name)
            self.transforms = fn.transforms
        else:
            self.inner = None
            if isinstance(type(fn).arg_constraints, property):  # Uniform: each argument bounds the other
                raise ValueError(_NO_FAMILY.format(name=name, kind=self.kind.__name__, argument="their range"))
            self.arguments = _arguments(fn)
            tensors = {a: getattr(fn, a, None) for a in self.arguments}
            for argument, constraint in self.arguments.items():
                if (constraint is constraints.dependent or getattr(constraint, "is_discrete", False)
                        or not isinstance(tensors[argument], Tensor)):
                    raise ValueError(_NO_FAMILY.format(name=name, kind=self.kind.__name__, argument=argument))
            if not self.arguments:
                raise ValueError(f"site {name!r}: {self.kind.__name__} has no parameters to learn; write a "
                                 "SequentialGuide for it")
            self.shapes = {a: tuple(v.shape[1:]) for a, v in tensors.items()}
            self.width = sum(torch.Size(s).numel() for s in self.shapes.values())
            self.charts = {a: _chart(c) for a, c in self.arguments.items()}
            self.sizes = [torch.Size(s).numel() for s in self.shapes.values()]
            self.settings = settings(fn)
            self._require_rebuilt(fn)
        if self.inner is not None:
            self.width, self.shapes = self.inner.width, self.inner.shapes

    def parameters(self, fn: Distribution) -> Tensor:
        """``(rows, width)`` unconstrained parameters of ``fn``, a member of this family."""
        if self.inner is not None:
            return self.inner.parameters(fn.base_dist)
        parts = []
        for argument, chart in self.charts.items():
            value = getattr(fn, argument)
            parts.append((value if chart is None else chart.inv(value)).reshape(value.shape[0], -1))
        return torch.cat(parts, -1)

    def distribution(self, flat: Tensor) -> Distribution:
        """The member of the family with the ``(rows, width)`` unconstrained parameters ``flat``."""
        if self.inner is not None:
            inner = self.inner.distribution(flat)
            if issubclass(self.kind, Independent):
                return self.kind(inner, self.reinterpreted)
            return self.kind(inner, self.transforms)
        rows, values = flat.shape[0], {}
        parts = torch.split_with_sizes(flat, self.sizes, -1)
        for (argument, chart), part in zip(self.charts.items(), parts, strict=True):
            part = part if len(self.shapes[argument]) == 1 else part.reshape(rows, *self.shapes[argument])
            values[argument] = part if chart is None else chart(part)
        return self.kind(**values, **self.settings)

    def _require_rebuilt(self, fn: Distribution) -> None:
        """Raise unless the distribution that its parameters make is the one that they are of."""
        same = self.settings is not None
        if same:
            try:
                with torch.no_grad(), torch.random.fork_rng(
                        [v.device for v in (self._leaf(fn),) if v.device.type == "cuda"]):
                    torch.manual_seed(0)
                    value, again = fn.sample(), self.distribution(self.parameters(fn))
                    same = torch.allclose(again.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-2, equal_nan=True)
            except NotImplementedError:  # of a density that nobody knows
                pass
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
                same = False
        if not same:
            raise ValueError(_NOT_REBUILT.format(name=self.name, kind=self.kind.__name__, arguments=list(self.arguments)))

    def slices(self) -> dict[str, slice]:
        """Where each argument lies in the flat vector."""
        if self.inner is not None:
            return self.inner.slices()
        found, start = {}, 0
        for argument in self.arguments:
            size = torch.Size(self.shapes[argument]).numel()
            found[argument] = slice(start, start + size)
            start += size
        return found

    def log_scales(self) -> Tensor:
        """``(width,)`` booleans: which entries are logarithms of positive arguments."""
        if self.inner is not None:
            return self.inner.log_scales()
        out = torch.zeros(self.width, dtype=torch.bool, device="cpu")
        for argument, where in self.slices().items():
            out[where] = isinstance(self.charts[argument], ExpTransform)
        return out

    def unit(self, fn: Distribution) -> Tensor:
        """``(rows, width)``: how far one unit of a guide's step moves each parameter.

        Locations move in units of the scale and all else by one, so that a guide's steps do not depend on the units
        of the data.
        """
        if self.inner is not None:
            return self.inner.unit(fn.base_dist)
        rows, like, parts = fn.batch_shape[0], self._leaf(fn), []
        for argument, size in zip(self.arguments, self.sizes, strict=True):
            if argument == "loc" and "scale" in self.arguments:
                parts.append(fn.scale.detach().reshape(rows, -1))
            elif argument == "loc" and "scale_tril" in self.arguments:
                parts.append(fn.variance.detach().sqrt().reshape(rows, -1))
            else:
                parts.append(torch.ones(rows, size, dtype=like.dtype, device=like.device))
        return torch.cat(parts, -1)

    def _leaf(self, fn: Distribution) -> Tensor:
        return getattr(fn, next(iter(self.arguments)))

    def same(self, fn: Distribution) -> bool:
        """Whether ``fn`` can be a member: same kind, same event shape, same settings."""
        return type(fn) is self.kind and tuple(fn.event_shape) == self.event and (
            self.inner is not None or settings(fn) == self.settings)


def expand_rows(fn: Any, rows: int, name: str) -> Distribution:
    """Give a distribution without batch dimension one of ``rows``, as a plate would; refuse any other batch shape."""
    shape = tuple(getattr(fn, "batch_shape", (None,)))
    if shape == (rows,):
        return fn
    if shape in ((), (1,)):
        return fn.expand((rows,))
    if shape == (None,):
        raise TypeError(f"site {name!r}: {type(fn).__name__} is not a distribution")
    raise ValueError(
        f"site {name!r} has batch_shape {shape} and event_shape {tuple(fn.event_shape)}, but the step is run on "
        f"({rows},) rows. If the other dimensions belong to one observation, add .to_event({max(len(shape) - 1, 1)}); a plate "
        "inside a step is such a dimension too")


def has_moving_support(fn: Distribution) -> bool:
    """Whether the support moves with the parameters, as a uniform's; that of a categorical has a fixed size."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, _BOUNDED):
            return True
        fn = fn.base_dist
    return isinstance(getattr(type(fn), "support", None), property) and not isinstance(fn, torch.distributions.Categorical)


def _right(flag: Tensor, like: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))


def log_density(fn: Distribution, value: Tensor) -> Tensor:
    """``fn.log_prob(value)``, in fewer passes over memory for normal distributions."""
    events, base = 0, fn
    while isinstance(base, Independent):
        events, base = events + base.reinterpreted_batch_ndims, base.base_dist
    if type(base) not in _NORMALS:
        if isinstance(base, _BOUNDED):
            inside = fn.support.check(value)
            return torch.where(inside, fn.log_prob(torch.where(_right(inside, value), value, in_support(fn))), -torch.inf)
        return fn.log_prob(value)
    if torch.is_grad_enabled():
        deviation = (value - base.loc) / base.scale
        half = torch.addcmul(base.scale.log(), deviation, deviation, value=0.5)
    elif (found := normal_log_density(value, base.loc, base.scale)) is not None:
        return found.flatten(found.dim() - events).sum(-1) if events else found
    else:  # in place, where that is a saving
        loc = base.loc
        if value.dim() and value.stride(0) == 0 == loc.stride(0):  # all rows alike, as one frame for many particles is
            value, loc = value[:1], loc[:1]
        deviation = (value - loc) / base.scale
        half = base.scale.log().addcmul_(deviation, deviation, value=0.5)
    if events:
        half = half.flatten(half.dim() - events)
        return -_HALF_LOG_2PI * half.shape[-1] - half.sum(-1)
    return -_HALF_LOG_2PI - half if torch.is_grad_enabled() else half.add_(_HALF_LOG_2PI).neg_()


def sample(fn: Distribution) -> Tensor:
    """A draw from ``fn``, reparameterised where it can be; in fewer passes over memory for normal distributions."""
    base = fn
    while isinstance(base, Independent):
        base = base.base_dist
    if type(base) not in _NORMALS:
        return fn.rsample() if fn.has_rsample else fn.sample()
    noise = _standard_normal(base.loc)
    if torch.is_grad_enabled():
        return torch.addcmul(base.loc, noise, base.scale)
    return torch.addcmul(base.loc, noise, base.scale, out=noise)


def _standard_normal(like: Tensor) -> Tensor:
    """Standard normal numbers of the shape of ``like``.

    In double precision on a CPU by the inverse of the distribution function, since torch's own generator is not
    vectorised there and takes twice as long; from the middle of each of the 2^53 cells, so that none is infinite.
    """
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if like.dtype == torch.float64 and like.device.type == "cpu":
        return noise.uniform_().add_(2.0**-54).mul_(2).sub_(1).erfinv_().mul_(math.sqrt(2))
    return fill_normal(noise)


def in_support(fn: Distribution) -> Tensor:
    """A fixed value inside the support of ``fn``, of its full shape; it uses no random numbers."""
    shape = fn.batch_shape + fn.event_shape
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(fn, Independent):
        base = fn
        while isinstance(base, Independent):
            base = base.base_dist
        return in_support(base)
    if fn.has_enumerate_support:
        return fn.enumerate_support(expand=True)[0].detach()
    if hasattr(fn, "component_distribution"):  # a mixture
        return fn.component_distribution.mean.select(-1 - fn.event_dim, 0).detach()
    if getattr(support, "is_discrete", False):
        like = next(v for a in fn.arg_constraints if isinstance(v := getattr(fn, a, None), Tensor))
        low = torch.as_tensor(getattr(support, "lower_bound", 0), dtype=like.dtype, device=like.device)
        return low.expand(shape)
    with torch.no_grad():
        draw = biject_to(support)
        parameter = fn
        while not parameter.arg_constraints and hasattr(parameter, "base_dist"):
            parameter = parameter.base_dist
        like = next(v for a in parameter.arg_constraints if isinstance(v := getattr(parameter, a, None), Tensor))
        return draw(torch.zeros(draw.inverse_shape(shape), dtype=like.dtype, device=like.device)).expand(shape)


def apart(fn: Distribution) -> tuple[Hashable, list[Tensor]] | None:
    """What a distribution is made of: its kind and settings, and its parameters, each with a batch dimension; ``None`` if it
    cannot be made anew from them."""
    if isinstance(fn, Independent):
        inner = apart(fn.base_dist)
        return None if inner is None else ((type(fn), inner[0], fn.reinterpreted_batch_ndims), inner[1])
    if not fn.arg_constraints:
        return None
    arguments, own = _arguments(fn), settings(fn)
    if not arguments or own is None:
        return None
    values = [getattr(fn, argument, None) for argument in arguments]
    if not all(isinstance(value, Tensor) and value.dim() > 0 for value in values):
        return None
    return (type(fn), tuple(arguments), tuple(own.items())), values


def rebuilt(plan: Any, values: list[Tensor]) -> Distribution:
    """The distribution of a kind that :func:`apart` found, with other parameters."""
    kind, inner, last = plan
    if issubclass(kind, Independent):
        return kind(rebuilt(inner, values), last)
    return kind(**dict(zip(inner, values, strict=True)), **dict(last))


def concatenate(fns: list[Distribution]) -> Distribution | None:
    """One distribution over the rows of several of the same family, or ``None`` if they cannot be joined."""
    if len(fns) == 1:
        return fns[0]
    found = [apart(fn) for fn in fns]
    if any(part is None or part[0] != found[0][0] for part in found):
        return None
    try:
        return rebuilt(found[0][0], [torch.cat(parts) for parts in zip(*(values for _, values in found), strict=True)])
    except TypeError:
        return None
