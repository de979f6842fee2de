r"""Gibbs sampling of states and parameters: each is drawn from its exact distribution given the other, where that has a name.

Which name it has is found by testing. As a function of one parameter v, with the states and all other parameters known, the
log joint density is

    a log v - b / v            inverse gamma
    a log v - b v              gamma
    a log v + b log(1 - v)     beta
    sum_k a_k log v_k          Dirichlet
    -v' P v / 2 + h' v         normal

up to a constant. It is evaluated at more points than such a function has coefficients, every time; where the points do not
lie on one, the parameter is moved by slice sampling. Either leaves the posterior as it is, so that no derivation, and no
declaration of conjugacy, is needed.

Source: Gelfand and Smith, *Sampling-Based Approaches to Calculating Marginal Densities*, 1990; Carter and Kohn, *On Gibbs
sampling for state space models*, 1994; Neal, *Slice sampling*, 2003.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_seq.infer.complete import CompleteData
from pyro_seq.infer.marginal import require_exact, unchecked
from pyro_seq.module import own_parameters
from pyro_seq.sequences import Sequences

__all__ = ["Gibbs"]

_EXACT = 1e-7
_WIDEST_NORMAL = 12
_PRIOR_DRAWS = 15


class Gibbs(MCMCKernel):
    """A kernel for ``pyro.infer.MCMC`` that draws whole state paths, then each ``PyroSample`` of the model in turn.

    :param method: what draws the states given the parameters: :class:`~pyro_seq.KalmanFilter`,
        :class:`~pyro_seq.ForwardBackward`, or any method with ``run`` and exact trajectories.

    After a run, ``kernel.updates`` (and ``mcmc.diagnostics()``) says how each parameter was drawn. The chain starts from
    medians of prior draws, or from ``MCMC(initial_params=...)``, given on the model's own scale. States for the draws are
    had from :meth:`Marginal.states`. Where a variance and the states it drives are nearly determined by each other, the
    chain moves slowly: NUTS on :class:`~pyro_seq.Marginal` does not draw the states, and does not suffer from it.

    Source: Carter and Kohn, *On Gibbs sampling for state space models*, 1994; Frühwirth-Schnatter, *Data augmentation and
    dynamic linear models*, 1994; Chib, *Calculating posterior distributions and modal estimates in Markov mixture models*,
    1996.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import MCMC
        >>> import pyro_seq as seq
        >>> class Level(seq.StateSpaceModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.variance = pyro.nn.PyroSample(dist.InverseGamma(3.0, 2.0))
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 1.0))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, self.variance.sqrt()), obs=x)
        >>> kernel = seq.Gibbs(seq.KalmanFilter(Level()))
        >>> mcmc = MCMC(kernel, num_samples=10, warmup_steps=2, disable_progbar=True)
        >>> mcmc.run(torch.tensor([[0.0, 1.0, 3.0, 2.0]]))
        >>> kernel.updates
        {'variance': 'inverse gamma'}
        >>> mcmc.get_samples()["variance"].shape
        torch.Size([10])
    """

    transforms: dict[str, Any] = {}

    def __init__(self, method: Any):
        require_exact(method, "Gibbs")
        if not hasattr(method, "run"):
            raise TypeError(f"Gibbs draws states, which {type(method).__name__} does not: it needs a method with run, such as "
                            "KalmanFilter or ForwardBackward")
        self.method, self.model = method, method.model
        self._quick = method
        self.updates: dict[str, str] = {}
        """How each parameter was drawn at the last sweep."""
        self._initial: dict[str, Tensor] | None = None
        self._sequences: Sequences | None = None
        self._scales: dict[Any, float] = {}
        self._warm = True

    # What MCMC asks of a kernel.

    def setup(self, warmup_steps: int, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> None:
        """Called by ``MCMC.run(x, lengths, ...)``, whose arguments are those of ``method.run``."""
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        name = type(self.model).__name__
        if not sequences.x:
            raise ValueError("Gibbs needs data, and none was given")
        prior = self._prior()
        if not prior:
            raise ValueError(f"{name} has no global parameter to draw: declare one as pyro.nn.PyroSample(prior)")
        for site, node in prior.items():
            if node["fn"].support.is_discrete:
                raise ValueError(f"global parameter {site!r} of {name} is discrete, which Gibbs does not draw")
        self._sequences, self._quick = sequences, self.method
        self._scales, self._warm, self.updates = {}, warmup_steps > 0, {}
        if self._initial is None:
            draws = [self._prior() for _ in range(_PRIOR_DRAWS)]
            self._initial = {}
            for site, node in prior.items():
                middle = torch.stack([draw[site]["value"] for draw in draws]).median(0).values
                inside = node["fn"].support.check(middle).all()
                self._initial[site] = middle if inside else node["value"]
        elif missing := sorted(set(prior) ^ set(self._initial)):
            raise ValueError(f"initial_params and the global parameters of {name} differ in {missing}: it has {sorted(prior)}")

    @property
    def initial_params(self) -> dict[str, Tensor]:
        return self._initial

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial = params

    def end_warmup(self) -> None:
        self._warm = False

    def diagnostics(self) -> dict[str, Any]:
        return {"update": dict(self.updates)}

    def logging(self) -> dict[str, str]:
        return {}

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One sweep: states, then each parameter."""
        complete = CompleteData(self.model, self._sequences, self._draw_states(params))
        values = {name: value.double() for name, value in params.items()}  # a family is told from its neighbours by small terms
        try:
            start = complete.log_joint(values)
        except (RuntimeError, TypeError) as error:
            raise TypeError(f"Gibbs scores {type(self.model).__name__} in double precision, which failed ({error}): convert "
                            "the model with model.double() and the data with x.double()") from error
        if not math.isfinite(start):
            raise ValueError(self._why_not(start))
        for name in values:
            self._update(name, values, complete)
        return {name: value.to(params[name].dtype) for name, value in values.items()}

    def _draw_states(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        with poutine.condition(data=params):
            posterior = self._quick.run(self._sequences)
        if self._quick is self.method:
            self._quick = unchecked(self.method)
            if self._sequences.has_missing and self.model.missing_feeds_state:
                raise ValueError(f"the state of {type(self.model).__name__} reads data that is missing, and the missing "
                                 "entries are not drawn: sample its parameters with MCMC(NUTS(seq.Marginal(method)))")
        return {name: value[0] for name, value in posterior.trajectories(1).samples.items()}

    def _why_not(self, value: float) -> str:
        return (f"the log joint density of parameters, states and data of {type(self.model).__name__} is {value}: either a "
                "latent is a Delta, or has a scale of zero, so that it has no density (carry it in the state instead of "
                "sampling it, or use NUTS on seq.Marginal), or the parameters are where the data is impossible (give MCMC "
                "initial_params)")

    def _prior(self) -> dict[str, Any]:
        """The global sites that are free, with a draw of each."""
        with torch.no_grad(), own_parameters(self.model), poutine.trace() as tr:
            self.model.within(lambda: None)
        return {name: tr.trace.nodes[name] for name in self.model.global_sites() if not tr.trace.nodes[name]["is_observed"]}

    # One parameter.

    def _update(self, name: str, values: dict[str, Tensor], complete: CompleteData) -> None:
        with torch.no_grad(), own_parameters(self.model), poutine.trace() as tr, poutine.condition(data=values):
            self.model.within(lambda: None)
        support = tr.trace.nodes[name]["fn"].support
        base = support
        while isinstance(base, constraints.independent):
            base = base.base_constraint
        shape = values[name].shape

        def density(value: Tensor) -> float:
            return complete.log_joint({**values, name: value.reshape(shape)})

        used: set[str] = set()
        if base is constraints.simplex:
            for row in range(values[name].numel() // shape[-1]):
                self._block(name, values, density, slice(row * shape[-1], (row + 1) * shape[-1]), _dirichlet, "Dirichlet", used,
                            support)
        elif base is constraints.real or base is constraints.real_vector:
            whole = slice(0, values[name].numel())
            if not 1 < values[name].numel() <= _WIDEST_NORMAL or not self._block(
                    name, values, density, whole, _normal, "normal", used, None):
                self._entries(name, values, density, (("normal", _normal),), used, support)
        elif base is constraints.unit_interval:
            self._entries(name, values, density, (("beta", _beta),), used, support)
        elif base in (constraints.positive, constraints.nonnegative):
            self._entries(name, values, density, (("inverse gamma", _inverse_gamma), ("gamma", _gamma)), used, support)
        else:
            self._slice(name, values, density, support, range(biject_to(support).inv(values[name]).numel()))
            used.add("slice")
        self.updates[name] = ", ".join(sorted(used))

    def _entries(self, name: str, values: dict[str, Tensor], density: Callable[[Tensor], float],
                 families: tuple[tuple[str, Any], ...], used: set[str], support: Any) -> None:
        for i in range(values[name].numel()):
            if not any(self._block(name, values, density, slice(i, i + 1), family, label, used, None)
                       for label, family in families):
                self._slice(name, values, density, support, range(i, i + 1))
                used.add("slice")

    def _block(self, name: str, values: dict[str, Tensor], density: Callable[[Tensor], float], where: slice, family: Any,
               label: str, used: set[str], support: Any) -> bool:
        """Draw some entries from their family, if the density is found to be of it."""
        flat = values[name].reshape(-1)

        def at(points: Tensor) -> Tensor:
            """``(n, k)`` values of the entries to ``(n,)`` densities."""
            found = []
            for point in points:
                trial = flat.clone()
                trial[where] = point
                found.append(density(trial))
            return torch.tensor(found, dtype=torch.float64, device=flat.device)

        key = (name, where.start, where.stop, label)
        drawn = family(at, flat[where], self._scales, key)
        if drawn is None:
            if support is not None:
                self._slice(name, values, density, support, self._unconstrained_rows(name, where, values[name].shape[-1]))
                used.add("slice")
            return False
        trial = flat.clone()
        trial[where] = drawn
        values[name] = trial.reshape(values[name].shape)
        used.add(label)
        return True

    @staticmethod
    def _unconstrained_rows(name: str, where: slice, width: int) -> range:
        row = where.start // width
        return range(row * (width - 1), (row + 1) * (width - 1))

    def _slice(self, name: str, values: dict[str, Tensor], density: Callable[[Tensor], float], support: Any,
               entries: range) -> None:
        """Neal's stepping out and shrinkage, one unconstrained entry after the other."""
        transform = biject_to(support)
        point = transform.inv(values[name]).clone()
        flat = point.reshape(-1)

        def target(value: float) -> float:
            flat[i] = value
            constrained = transform(point)
            jacobian = transform.log_abs_det_jacobian(point, constrained).sum()
            found = density(constrained) + float(jacobian)
            return found if math.isfinite(found) else -math.inf

        for i in entries:
            now = float(flat[i])
            width = self._scales.get((name, "slice", i), 1.0)
            level = target(now) + math.log(float(torch.rand(()).clamp(min=1e-300)))
            low = now - width * float(torch.rand(()))
            high = low + width
            while target(low) > level and high - low < 1e6 * width:
                low -= width
            while target(high) > level and high - low < 1e6 * width:
                high += width
            found, left, right = now, low, high
            while right - left > 1e-14 * max(1.0, abs(now)):
                trial = left + (right - left) * float(torch.rand(()))
                if target(trial) > level:
                    found = trial
                    break
                left, right = (trial, right) if trial < now else (left, trial)
            flat[i] = found
            if self._warm:
                self._scales[name, "slice", i] = 0.9 * width + 0.1 * (high - low)
        values[name] = transform(point)


# Families. Each is given the density at points (n, k) of some entries and their present value (k,), and returns a draw, or
# None if the density is not of the family.


def _coefficients(features: Tensor, density: Tensor) -> Tensor | None:
    """Least squares of the densities on the features and a constant; ``None`` unless they lie on it exactly."""
    if not density.isfinite().all():
        return None
    centre = density - density.mean()
    features = features - features.mean(0)
    size = features.abs().amax(0).clamp(min=1e-300)
    found = torch.linalg.lstsq(features / size, centre[:, None], driver="gelsd" if features.device.type == "cpu" else None
                               ).solution[:, 0]
    error = (centre - features / size @ found).abs().max()
    exact = _EXACT * centre.abs().max() + 1e3 * torch.finfo(density.dtype).eps * density.abs().max()
    return found / size if error <= exact else None


def _around(value: Tensor) -> Tensor:
    """``(6, 1)``"""
    return value * torch.tensor([-1.2, -0.7, -0.3, 0.3, 0.8, 1.1], dtype=value.dtype, device=value.device)[:, None].exp()


def _inverse_gamma(at: Any, value: Tensor, scales: dict[Any, float], key: Any) -> Tensor | None:
    points = _around(value)
    found = _coefficients(torch.cat([points.log(), 1 / points], -1), at(points))
    if found is None:
        return None
    shape, scale = -found[0] - 1, -found[1]
    return dist.InverseGamma(shape, scale).sample()[None] if shape > 0 and scale > 0 else None


def _gamma(at: Any, value: Tensor, scales: dict[Any, float], key: Any) -> Tensor | None:
    points = _around(value)
    found = _coefficients(torch.cat([points.log(), points], -1), at(points))
    if found is None:
        return None
    shape, rate = found[0] + 1, -found[1]
    return dist.Gamma(shape, rate).sample()[None] if shape > 0 and rate > 0 else None


def _beta(at: Any, value: Tensor, scales: dict[Any, float], key: Any) -> Tensor | None:
    points = torch.tensor([0.08, 0.25, 0.4, 0.6, 0.75, 0.92], dtype=value.dtype, device=value.device)[:, None]
    found = _coefficients(torch.cat([points.log(), (-points).log1p()], -1), at(points))
    if found is None or not (found > -1).all():
        return None
    return dist.Beta(found[0] + 1, found[1] + 1).sample()[None]


def _dirichlet(at: Any, value: Tensor, scales: dict[Any, float], key: Any) -> Tensor | None:
    size = len(value)
    generator = torch.Generator("cpu").manual_seed(0)
    logits = torch.randn(size + 3, size, dtype=value.dtype, generator=generator, device="cpu").to(value.device)
    points = logits.softmax(-1)
    density = at(points)
    # The logarithms of a probability vector are not collinear, so that each has its own coefficient.
    found = _coefficients(points.log(), density)
    if found is None or not (found > -1).all():
        return None
    return dist.Dirichlet(found + 1).sample()


def _normal(at: Any, value: Tensor, scales: dict[Any, float], key: Any) -> Tensor | None:
    size = len(value)
    scale = scales.get(key, float(1 + value.abs().max()))
    generator = torch.Generator("cpu").manual_seed(0)
    count = (size + 1) * (size + 2) // 2 + 3
    offsets = torch.randn(count, size, dtype=value.dtype, generator=generator, device="cpu").to(value.device)
    if size == 1:
        offsets = torch.tensor([-2.0, -1.2, -0.4, 0.5, 1.1, 1.9], dtype=value.dtype, device=value.device)[:, None]
    upper = torch.triu_indices(size, size, device=value.device)
    squares = offsets[:, upper[0]] * offsets[:, upper[1]]
    found = _coefficients(torch.cat([offsets, squares], -1), at(value + scale * offsets))
    if found is None:
        return None
    precision = torch.zeros(size, size, dtype=value.dtype, device=value.device)
    precision[upper[0], upper[1]] = -found[size:]
    precision = precision + precision.T
    factor, failed = torch.linalg.cholesky_ex(precision)
    if failed:
        return None
    mean = torch.cholesky_solve(found[:size, None], factor)[:, 0]
    noise = torch.linalg.solve_triangular(factor.T, torch.randn(size, 1, dtype=value.dtype, device=value.device), upper=True)
    scales[key] = scale * 2 * float(torch.linalg.inv(precision).diagonal().max().sqrt())
    return value + scale * (mean + noise[:, 0])
