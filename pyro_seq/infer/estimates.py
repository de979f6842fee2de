"""What learning by maximum likelihood returns: estimates, how sure they are, and how the search ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import IndependentTransform, SoftmaxTransform, constraints, transform_to

from pyro_seq.module import own_parameters
from pyro_seq.sequences import Sequences

__all__ = ["Estimates", "Parameters", "estimates_at", "refuse_unfit"]

_QUANTILE = 1.959963984540054
_MOST = 1000
"""Parameters up to which a Hessian is computed unasked."""
_EDGE = 10.0
"""Standard error on the unconstrained scale (of a log variance, say) beyond which the data puts no bound on one side."""


@dataclass(frozen=True, repr=False)
class Estimates:
    """Maximum likelihood estimates of a model's parameters, which the model now has.

    Made by :func:`~pyro_seq.maximum_likelihood` and :func:`~pyro_seq.expectation_maximization`. Standard errors are from
    the observed information, minus the Hessian of the exact log evidence, and by the delta method where a parameter is
    constrained (Efron and Hinkley, *Assessing the accuracy of the maximum likelihood estimator*, 1978).
    """

    method: str
    log_likelihood: float
    """Nats, over all sequences."""
    num_observations: int
    """Frames with at least one observed entry, over all sequences."""
    num_parameters: int
    """Free dimensions: a probability vector of K entries has K - 1."""
    converged: bool
    num_iterations: int
    table: pd.DataFrame
    """A row per entry of each parameter: estimate, standard error, z, and the ends of a 95 % interval."""
    covariance: pd.DataFrame
    """Of the estimates, rows and columns as the rows of ``table``."""
    trace: tuple[float, ...] = ()
    """Log likelihood at the start and after each iteration."""
    notes: tuple[str, ...] = field(default=())

    @property
    def aic(self) -> float:
        """Akaike's information criterion."""
        return 2 * self.num_parameters - 2 * self.log_likelihood

    @property
    def bic(self) -> float:
        """Schwarz's criterion, for ``num_observations``."""
        return math.log(self.num_observations) * self.num_parameters - 2 * self.log_likelihood

    def __repr__(self) -> str:
        end = "converged" if self.converged else "NOT converged"
        lines = [f"{self.method}: log likelihood {self.log_likelihood:.4f}, {self.num_observations} observations, "
                 f"AIC {self.aic:.2f}, BIC {self.bic:.2f}, {end} after {self.num_iterations} iterations",
                 self.table.to_string(float_format=lambda v: f"{v:.4g}")]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class Free(NamedTuple):
    """One trainable parameter."""

    name: str
    unconstrained: torch.nn.Parameter
    constrain: Callable[[Tensor], Tensor]
    is_free: bool
    """Whether it can be any real number."""


class Parameters:
    """The trainable parameters of a model as one unconstrained vector ``(n,)``."""

    def __init__(self, model: torch.nn.Module):
        self.items: list[Free] = []
        seen: set[int] = set()
        for prefix, module in model.named_modules():
            declared = module._pyro_params if isinstance(module, PyroModule) else {}
            for name, value in module.named_parameters(prefix="", recurse=False):
                if not value.requires_grad or id(value) in seen or not value.numel():
                    continue
                seen.add(id(value))
                name = name.removesuffix("_unconstrained")
                constraint = declared[name][0] if name in declared else constraints.real
                self.items.append(Free(f"{prefix}.{name}" if prefix else name, value, transform_to(constraint),
                                       _is_real(constraint)))
        if not self.items:
            raise ValueError(f"{type(model).__name__} has no trainable parameter: declare what is to be estimated as "
                             "torch.nn.Parameter, or as pyro.nn.PyroParam(value, constraint=...), in its constructor")

    @property
    def tensors(self) -> list[torch.nn.Parameter]:
        return [item.unconstrained for item in self.items]

    def get(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.tensors])

    def set(self, vector: Tensor) -> None:
        with torch.no_grad():
            for p, part in zip(self.tensors, vector.split([p.numel() for p in self.tensors])):
                p.copy_(part.reshape(p.shape))

    def gradient(self, value: Tensor, create_graph: bool = False, keep: bool = False) -> Tensor:
        """``(n,)``; zero for what ``value`` does not depend on."""
        if not value.requires_grad:
            return torch.zeros_like(self.get())
        found = torch.autograd.grad(value, self.tensors, create_graph=create_graph, retain_graph=create_graph or keep,
                                    allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(found, self.tensors)])

    def evaluate(self, fn: Callable[[], Tensor], vector: Tensor) -> tuple[float, Tensor]:
        """Value and gradient of ``fn()`` at ``vector``; minus infinity where it has none."""
        self.set(vector)
        try:
            value = fn()
            return float(value.detach()), self.gradient(value)
        except (ValueError, torch.linalg.LinAlgError):
            return -math.inf, torch.full_like(vector, torch.nan)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """If interrupted, put the parameters back to what they were."""
        before = self.get()
        try:
            yield
        except BaseException:
            self.set(before)
            raise


def refuse_unfit(method: Any, sequences: Sequences, who: str) -> float:
    """The log likelihood at the start, or an error that says why the model cannot be estimated."""
    model = method.model
    with torch.no_grad(), own_parameters(model), poutine.trace() as tr:
        model.within(lambda: None)
    drawn = [name for name in model.global_sites() if not tr.trace.nodes[name]["is_observed"]]
    if drawn:
        raise ValueError(f"{who} estimates parameters, and {drawn} of {type(model).__name__} are random, with a prior: sample "
                         "them with MCMC(NUTS(seq.Marginal(method))), fix them with poutine.condition(data={...}), or declare "
                         "them as pyro.nn.PyroParam")
    with poutine.trace(param_only=True) as tr:
        value = method.log_evidence(sequences).sum()
    stray = sorted(set(tr.trace.param_nodes) - set(model.store_names()))
    if stray:
        raise ValueError(f"{type(model).__name__} has the pyro.param statements {stray} in its step, which {who} cannot see: "
                         "declare them in the constructor, self.scale = pyro.nn.PyroParam(value, constraint=...)")
    if not value.isfinite():
        raise ValueError(f"the log evidence at the starting values is {value.item()}: start from parameters under which the "
                         "data is possible")
    if not Parameters(model).gradient(value).isfinite().all():
        raise ValueError("the gradient of the log evidence at the starting values is NaN or infinite: look for a scale of "
                         "zero, a square root at zero, or torch.where over an invalid branch")
    return value.item()


def estimates_at(exact: Any, sequences: Sequences, parameters: Parameters, standard_errors: bool | None = None,
                 **how: Any) -> Estimates:
    """The table at the model's present parameters.

    :param exact: what computes the evidence.
    :param standard_errors: whether to compute a Hessian; for up to 1000 parameters by default.
    :param how: further fields of the answer.
    """
    size = len(parameters.get())
    if standard_errors is None and size > _MOST or standard_errors is False:
        how["notes"] = (*how.get("notes", ()), "no standard errors: none were asked for" if standard_errors is False else
                        f"no standard errors: with {size} parameters their Hessian is large; standard_errors=True computes it")
        return _without_errors(exact, sequences, parameters, **how)
    value = exact.log_evidence(sequences).sum()
    gradient = parameters.gradient(value, create_graph=True)
    information = -torch.stack([parameters.gradient(g, keep=True) for g in gradient]).double()
    information = 0.5 * (information + information.T)
    bases = [_identified(item).to(information) for item in parameters.items]
    basis = torch.block_diag(*bases)
    blocks = [block for item in parameters.items for block in _blocks(item)]
    owners = torch.tensor([b for b, (_, size, free) in enumerate(blocks) for _ in range(free)], device=basis.device)
    entries = torch.tensor([b for b, (_, size, free) in enumerate(blocks) for _ in range(size)], device=basis.device)
    reduced, unknown, at_edge, notes = _invert_inside(
        basis.T @ information @ basis, owners, [None if item.is_free else item.name for item, _, _ in blocks],
        [item.name for item, own in zip(parameters.items, bases, strict=True) for _ in range(own.shape[1])])
    covariance, unknown = basis @ reduced @ basis.T, (basis[:, unknown] != 0).any(1)
    unknown |= torch.isin(entries, torch.tensor(sorted(at_edge), dtype=entries.dtype, device=basis.device))
    names, values, jacobians = [], [], []
    for item in parameters.items:
        u = item.unconstrained.detach()
        value_here = item.constrain(u)
        jacobian = torch.autograd.functional.jacobian(item.constrain, u).reshape(value_here.numel(), u.numel()).double()
        names += [name for name, _ in _entries(item)]
        values.append(value_here.reshape(-1).double())
        jacobians.append(jacobian)
    jacobian = torch.block_diag(*jacobians)
    estimate = torch.cat(values)
    covariance = jacobian @ covariance @ jacobian.T
    unknown = (jacobian[:, unknown] != 0).any(1)
    covariance[unknown] = covariance[:, unknown] = torch.nan
    error = covariance.diagonal().sqrt()
    columns = {"estimate": estimate, "std_error": error, "z": estimate / error, "lower": estimate - _QUANTILE * error,
               "upper": estimate + _QUANTILE * error}
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()}, index=names)
    return Estimates(
        log_likelihood=value.item(), num_observations=_observed_frames(sequences), num_parameters=basis.shape[1], table=table,
        covariance=pd.DataFrame(covariance.cpu().numpy(), index=names, columns=names),
        notes=(*how.pop("notes", ()), *notes), **how)


def _without_errors(exact: Any, sequences: Sequences, parameters: Parameters, **how: Any) -> Estimates:
    with torch.no_grad():
        value = exact.log_evidence(sequences).sum()
    found = {name: entry for item in parameters.items for name, entry in _entries(item)}
    table = pd.DataFrame({"estimate": found.values()}, index=list(found))
    for column in ("std_error", "z", "lower", "upper"):
        table[column] = math.nan
    free = sum(block[2] for item in parameters.items for block in _blocks(item))
    return Estimates(log_likelihood=value.item(), num_observations=_observed_frames(sequences), num_parameters=free,
                     table=table, covariance=pd.DataFrame(index=table.index, columns=[], dtype=float), **how)


def _entries(item: Free) -> Iterator[tuple[str, float]]:
    """The name and value of each entry of a parameter."""
    value = item.constrain(item.unconstrained.detach())
    for index, entry in zip(product(*map(range, value.shape)), value.double().reshape(-1).tolist(), strict=True):
        yield item.name + (f"[{','.join(map(str, index))}]" if index else ""), entry


def _identified(item: Free) -> Tensor:
    """``(n, r)`` orthonormal: the directions of the unconstrained entries that the parameter depends on. A soft-max has one
    fewer than its entries."""
    shape = item.unconstrained.shape
    if not isinstance(item.constrain, SoftmaxTransform):
        return torch.eye(shape.numel(), dtype=torch.float64, device=item.unconstrained.device)
    width = shape[-1]
    ones = torch.ones(width, 1, dtype=torch.float64, device=item.unconstrained.device)
    rest = torch.linalg.qr(ones, mode="complete").Q[:, 1:]
    return torch.block_diag(*[rest] * (shape.numel() // width))


def _blocks(item: Free) -> list[tuple[Free, int, int]]:
    """The parts of a parameter that can be at an edge each by itself, with their numbers of entries and of free dimensions: an
    entry where each is constrained by itself, a row of probabilities, or the whole."""
    n, transform = item.unconstrained.numel(), item.constrain
    if isinstance(transform, SoftmaxTransform):
        width = item.unconstrained.shape[-1]
        return [(item, width, width - 1)] * (n // width)
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return [(item, n, n)] if transform.domain.event_dim else [(item, 1, 1)] * n


def _invert_inside(information: Tensor, owners: Tensor, constrained: list[str | None], names: list[str]
                   ) -> tuple[Tensor, Tensor, set[int], list[str]]:
    """The inverse, as if the blocks at the edge of their constraint were known; which entries that leaves out; which blocks
    are at the edge; and a word on why.

    :param owners: the block of each row.
    :param constrained: of each block the name, or ``None`` if it has no edge.
    :param names: of each row.
    """
    edge = set()
    for b, name in enumerate(constrained):
        own = information[owners == b][:, owners == b]
        if name is not None and len(own) and (
                not own.isfinite().all() or torch.linalg.eigvalsh(own).abs().min() < _EDGE**-2):
            edge.add(b)
    while True:
        inside = torch.tensor([b not in edge for b in owners.tolist()], dtype=torch.bool, device=owners.device)
        found, lost, notes = _invert(information[inside][:, inside], [n for n, kept in zip(names, inside.tolist()) if kept])
        wide = torch.where(lost, 0.0, found.diagonal())
        for b in range(len(constrained)):
            if constrained[b] is None:
                wide = torch.where(owners[inside] == b, 0.0, wide)
        if not len(wide) or not wide.max() > _EDGE**2:
            break
        edge.add(int(owners[inside][wide.argmax()]))
    covariance, unknown = torch.zeros_like(information), ~inside
    covariance[inside.nonzero(), inside.nonzero()[:, 0]] = found
    unknown[inside] = lost
    if edge:
        which = sorted({constrained[b] for b in edge})
        notes = [*notes, f"{which}: as far as the data tells at the edge of what the constraint allows (a scale of zero, "
                 "say), where standard errors do not apply (NaN); those of the others hold it fixed"]
    return covariance, unknown, edge, notes


def _invert(information: Tensor, names: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """The inverse where it is positive definite; which entries that leaves out, and a word on why."""
    n = len(information)
    if not information.isfinite().all():
        return torch.full_like(information, torch.nan), torch.ones(n, dtype=torch.bool, device=information.device), [
            "the Hessian of the log evidence is NaN or infinite: no standard errors"]
    size = information.diagonal().abs().sqrt()
    size = torch.where(size > 0, size, 1.0)
    values, vectors = torch.linalg.eigh(information / size / size[:, None])
    good = values > 1e-9 * max(float(values.abs().max()), 1e-300)
    inverse = torch.where(good, 1 / torch.where(good, values, 1.0), 0.0)
    found = (vectors * inverse) @ vectors.T / size / size[:, None]
    unknown = (vectors[:, ~good].square().sum(1) > 1e-8) if not good.all() else torch.zeros_like(good)
    notes = []
    if unknown.any():
        which = sorted({name for name, bad in zip(names, unknown.tolist()) if bad})
        notes.append(f"the observed information is not positive definite: the likelihood is flat, or not at a maximum, in "
                     f"{which}, whose standard errors are NaN; they are not identified by the data, or the search ended too "
                     "early")
    return found, unknown, notes


def _observed_frames(sequences: Sequences) -> int:
    present = torch.zeros_like(sequences.active)
    for name, value in sequences.x.items():
        seen = ~value.isnan() if value.is_floating_point() else sequences.observed.get(name, torch.ones_like(value).bool())
        present |= seen[:, :sequences.num_steps].reshape(*present.shape, -1).any(-1)
    return int((present & sequences.active).sum())


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real or constraint is constraints.real_vector
