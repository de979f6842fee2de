r"""A declared step that is linear and Gaussian in some of its latents, given the others: these are integrated out.

With the conditioning latents c drawn and u = (state, marginal latents, data), each site of the step that is left is Gaussian
with a mean affine in what of u comes before it, and the next state is affine in u. Both maps are read off by running the step
at zero and along each coordinate of u, for all rows at once, each at its own c. What is carried from step to step is then the
mean and covariance of the part of the state that depends on marginal latents, beside the state itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations, islice
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Delta, ImproperUniform
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.gaussian import innermost, is_gaussian, moments
from pyro_seq.engine.loop import is_due
from pyro_seq.engine.reads import another
from pyro_seq.engine.rows import check_rows
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.infer.linear import SCALES
from pyro_seq.infer.split import COPIES, Split, copies, find_split, longest, origin, require_marginal, spread
from pyro_seq.module import accepted
from pyro_seq.sequences import Frame, Sequences, repeat_rows

__all__ = ["Marginalised", "marginalise"]

_LOG_2PI = math.log(2 * math.pi)
_TESTED_ROWS = 256
_MOST_TRIES = 64


class Marginalised:
    """A declared model whose marginal latents are integrated out: a model of the conditioning ones alone.

    The engine runs it as it runs any other. Its state is a dict: the declared model's ``state``, the ``mean``
    ``(rows, S)`` and ``covariance`` ``(rows, S, S)`` of the entries that depend on marginal sites, and the ``filtered`` moments
    of those sites. Its one observed site is the density of the frame given the conditioning latents and all data before.

    :param declared: a declared model, entered.
    :param always: test linearity at every step.
    """

    missing_feeds_state = False
    state_grows = False

    def __init__(self, declared: Any, split: Split, always: bool = False):
        self.declared, self.split, self.always = declared, split, always
        self.kind = type(declared).__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.declared, name)

    def begin(self, frame: Frame) -> None:
        return None

    def apply(self, carried: dict[str, Any] | None, frame: Frame) -> dict[str, Any]:
        state, mean, covariance = self._carried(carried, frame)
        base = self._draw(state, frame)
        columns, width = self._columns(base, mean.shape[-1])
        step = _Affine(self, base, state, frame, columns, mean.shape[-1], width)
        (u, spread), log_density = step.condition(mean, covariance)
        # At the conditioning latents that the particles have here.
        if self.always or base.feeds or is_due(frame.t):
            step.require_affine(u, spread.diagonal(dim1=-2, dim2=-1))
        for name in base.plain:
            log_density = log_density + base.sites[name].log_p().double()
        like = next((v.dtype for v in frame.x.values() if v.is_floating_point()), torch.get_default_dtype())
        pyro.factor(", ".join(name for name, site in base.sites.items() if site.observed), log_density.to(like))
        matrix, offset = step.next_state()
        after = offset + (matrix @ u[..., None])[..., 0]
        after_covariance = matrix @ spread @ matrix.mT
        variance, filtered = spread.diagonal(dim1=-2, dim2=-1).clamp(min=0), {}
        for name in self.split.marginal:
            shape = base.sites[name].value.shape
            filtered[name] = {"mean": u[:, columns[name]].reshape(shape), "variance": variance[:, columns[name]].reshape(shape)}
        return {"state": base.after, "mean": after, "covariance": 0.5 * (after_covariance + after_covariance.mT),
                "filtered": filtered}

    def declared_state(self, carried: dict[str, Any], draw: bool = False) -> State:
        """The declared model's state, with the marginal entries at their means or drawn."""
        mean = carried["mean"]
        if draw and mean.shape[-1]:
            values, vectors = torch.linalg.eigh(carried["covariance"])
            root = vectors * values.clamp(min=0).sqrt()[:, None]
            mean = mean + (root @ torch.randn_like(mean)[..., None])[..., 0]
        return self.split.put(carried["state"], mean)

    def _carried(self, carried: dict[str, Any] | None, frame: Frame) -> tuple[State, Tensor, Tensor]:
        """State with zero at the marginal entries, their mean and covariance."""
        if carried is None:
            state = self.declared.begin(frame)
            mean = self.split.take(state, frame.rows, frame.device)
            covariance = mean.new_zeros(*mean.shape, mean.shape[-1])
        else:
            state, mean, covariance = carried["state"], carried["mean"], carried["covariance"]
        return self.split.put(state, torch.zeros_like(mean)), mean, covariance

    def _draw(self, state: State, frame: Frame) -> _Base:
        """Run the step at u = 0, the conditioning latents drawn by whoever stands outside."""
        with _Conditioning(frame, self.split.conditioning, lambda name, p: (None, origin(p, frame))) as step:
            after = self.declared.apply(state, frame)
        if set(step.drawn) != set(self.split.conditioning) or set(step.latents) != set(self.split.marginal):
            expected = sorted({*self.split.conditioning, *self.split.marginal})
            raise ValueError(f"{self.kind} samples the latent sites {sorted({*step.drawn, *step.latents})} at time {frame.t} "
                             f"and {expected} at others: give them the same names")
        gaussian, plain = [], []
        for name, site in step.sites.items():
            if isinstance(site.scale, Tensor) or site.scale != 1.0 or site.mask is not None:
                raise ValueError(f"site {name!r} stands under poutine.scale or poutine.mask, which a Kalman filter does not "
                                 "know: mark missing data with NaN or mask=")
            if site.observed and not is_gaussian(site.p):
                plain.append(name)
            else:
                if not site.observed:
                    require_marginal(name, site.p, self.kind)
                gaussian.append(name)
        check_rows(self.declared, step.sites, state, after, frame, drawn=step.drawn)
        feeds = frame.missing and self.declared.missing_feeds_state
        return _Base(step.sites, step.drawn, after, tuple(gaussian), tuple(plain), feeds)

    @staticmethod
    def _columns(base: _Base, start: int) -> tuple[dict[str, slice], int]:
        columns = {}
        for name in base.gaussian:
            width = base.sites[name].value[0].numel()
            columns[name] = slice(start, start + width)
            start += width
        return columns, start


class _Base(NamedTuple):
    """A step at u = 0."""

    sites: dict[str, Site]
    drawn: dict[str, Tensor]
    after: State
    gaussian: tuple[str, ...]
    """Sites with entries in u: marginal latents, and data that is Gaussian."""
    plain: tuple[str, ...]
    """Other observed sites."""
    feeds: bool
    """Whether missing entries of this frame may be read further on."""


class _Conditioning(StepSites):
    """Let conditioning sites go on to the handlers outside, and take note of what they draw."""

    def __init__(self, frame: Frame, names: tuple[str, ...], proposal: Any):
        super().__init__(frame, proposal)
        self.names = names
        self.drawn: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.names:
            super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names and not msg["is_observed"]:
            self.drawn[msg["name"]] = msg["value"]


class _Affine:
    """The matrices of a step, each row at its own conditioning latents."""

    def __init__(self, model: Marginalised, base: _Base, state: State, frame: Frame, columns: dict[str, slice],
                 state_width: int, width: int):
        self.model, self.base, self.state, self.frame = model, base, state, frame
        self.columns, self.state_width, self.width = columns, state_width, width
        rows = frame.rows
        # Data that is there is not moved: whatever reads it, reads it as it is.
        moved = [torch.arange(state_width)] + [torch.arange(where.start, where.stop) for name, where in columns.items()
                                               if not base.sites[name].observed or base.feeds]
        self.moved = torch.cat(moved).to(frame.device)
        means, self.covariances = {}, {}
        for name in columns:
            mean, covariance = moments(base.sites[name].p, frame.device)
            means[name] = mean.double().reshape(rows, -1)
            self.covariances[name] = covariance.double()
        self.means = means
        self.after = model.split.take(base.after, rows, frame.device)
        # A step as large as the offsets, beside which a step of one would be lost in rounding.
        sizes = [value.abs().nan_to_num().max() for value in (*means.values(), self.after) if value.numel()]
        self.stride = 2.0 ** math.ceil(math.log2(float(max(sizes, default=torch.tensor(1.0)).clamp(1.0, 1e30))))
        points = torch.zeros(len(self.moved), width, dtype=torch.float64, device=frame.device)
        points[torch.arange(len(self.moved)), self.moved] = self.stride
        self.matrix = points.new_zeros(rows, width, width)
        self.next_matrix = self.matrix.new_zeros(rows, self.after.shape[-1], width)
        if len(points):
            ran = self._run(points, torch.arange(rows, device=frame.device))
            for name, where in columns.items():
                self.matrix[:, where, self.moved] = (ran.means[name] - means[name][:, None]).mT / self.stride
            self.next_matrix[:, :, self.moved] = (ran.after - self.after[:, None]).mT / self.stride

    def next_state(self) -> tuple[Tensor, Tensor]:
        """``(rows, S', W)`` and ``(rows, S')``: the marginal entries of the next state, affine in u."""
        return self.next_matrix, self.after

    def condition(self, mean: Tensor, covariance: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Mean and covariance of u given the data, and the log density of the data ``(rows,)``."""
        s, rows = self.state_width, len(mean)
        drift, noise = mean.new_zeros(rows, self.width), mean.new_zeros(rows, self.width, self.width)
        drift[:, :s], noise[:, :s, :s] = mean, covariance
        data, values, present = [], [], []
        for name, where in self.columns.items():
            drift[:, where], noise[:, where, where] = self.means[name], self.covariances[name]
            site = self.base.sites[name]
            if site.observed:
                data.append(torch.arange(where.start, where.stop))
                values.append(site.value.double().reshape(rows, -1))
                present.append(torch.ones_like(values[-1], dtype=torch.bool) if site.present is None
                               else site.present.reshape(rows, -1))
        # u = matrix u + drift + noise, the matrix strictly lower triangular: each site reads those before it.
        system = torch.eye(self.width, dtype=mean.dtype, device=mean.device) - self.matrix
        right = torch.cat([drift[..., None], noise], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        u = solved[..., 0]
        joint = torch.linalg.solve_triangular(system, solved[..., 1:].mT, upper=False, unitriangular=True)
        if not data:
            return (u, joint), mean.new_zeros(rows)
        at, value, there = torch.cat(data).to(mean.device), torch.cat(values, -1), torch.cat(present, -1)
        cross = torch.where(there[:, None], joint[:, :, at], 0.0)
        own = torch.where(there[:, :, None] & there[:, None], joint[:, at[:, None], at], torch.diag_embed((~there).to(mean)))
        factor, failed = torch.linalg.cholesky_ex(own)
        if failed.any() or not (factor.diagonal(dim1=-2, dim2=-1) > 0).all():
            raise ValueError(f"the data has a singular or infinite predictive covariance at time {self.frame.t}: some "
                             "combination of its entries is predicted without noise, or the state grows beyond all bounds; "
                             "give the emission a positive scale")
        residual = torch.where(there, value - u[:, at], 0.0)
        gain = torch.cholesky_solve(cross.mT, factor).mT
        white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
        log_density = (-0.5 * (white.square().sum(-1) + _LOG_2PI * there.sum(-1))
                       - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))
        # Joseph's form, positive whatever the rounding of the gain.
        keep = torch.eye(self.width, dtype=mean.dtype, device=mean.device).repeat(rows, 1, 1)
        keep[:, :, at] -= gain
        return (u + (gain @ residual[..., None])[..., 0], keep @ joint @ keep.mT), log_density

    def require_affine(self, u: Tensor, variance: Tensor) -> None:
        """Test, at random points of several scales and about the filtered moments ``(rows, W)`` of u, that the step is what its
        matrices say.

        :raises ValueError: naming the site that is not.
        """
        rows = torch.linspace(0, self.frame.rows - 1, min(self.frame.rows, _TESTED_ROWS), device=self.frame.device).long()
        generator = torch.Generator("cpu").manual_seed(0)
        tests = torch.cat([scale * torch.randn(4, self.width, generator=generator, dtype=torch.float64, device="cpu")
                           for scale in SCALES]).to(self.frame.device)
        fixed = torch.ones(self.width, dtype=torch.bool, device=tests.device)
        fixed[self.moved] = False
        tests[:, fixed] = 0.0
        noise = torch.randn(len(rows), 4, self.width, generator=generator, dtype=torch.float64, device="cpu").to(tests)
        near = u[rows, None] + 2 * variance[rows, None].clamp(min=0).sqrt() * noise
        tests = torch.cat([tests.expand(len(rows), -1, -1), near.masked_fill(fixed, 0.0).detach()], 1)
        ran = self._run(tests, rows, whole=True)
        kind, where = self.model.kind, f"(tested at {tests.shape[1]} points of scales {SCALES[0]:g} to {SCALES[-1]:g})"
        given = f" given {list(self.model.split.conditioning)}" if self.model.split.conditioning else ""
        marginal = f"{list(self.model.split.marginal)}{' or on data that is missing' if self.base.feeds else ''}"
        for name, values in ran.densities.items():
            if not _same(values, values[:, :1]):
                what = "observed and not Gaussian" if name in self.base.plain else "to be drawn"
                raise ValueError(f"site {name!r} of {kind} is {what}, and depends on {marginal}, which are to be "
                                 f"marginalised {where}: the model is not linear-Gaussian in the latter{given}")
        exact = next((v for v in self.frame.x.values() if v.is_floating_point()), torch.zeros(())).dtype == torch.float64
        tolerance = 1e-9 if exact else 2e-4
        for name, columns in self.columns.items():
            self._require(f"site {name!r} of {kind}: its mean", ran.means[name], self.means[name][rows],
                          self.matrix[rows][:, columns], tests, tolerance, given, where)
            spread, found = self.covariances[name][rows][:, None], ran.covariances[name]
            if not ((found - spread).abs() <= tolerance * spread.abs().amax((-1, -2), keepdim=True)).all():
                raise ValueError(f"site {name!r} of {kind} is Gaussian, but its covariance depends on {marginal} {where}: "
                                 f"the model is not linear-Gaussian in the latter{given}")
        self._require(f"the next state of {kind}", ran.after, self.after[rows], self.next_matrix[rows], tests, tolerance, given,
                      where)
        for leaf in ran.others:
            if not _same(leaf, leaf[:, :1]):
                raise ValueError(f"the next state of {kind} depends on {marginal}, which are to be marginalised, in an entry "
                                 f"that did not at the first steps {where}")

    def _require(self, what: str, found: Tensor, base: Tensor, matrix: Tensor, tests: Tensor, tolerance: float, given: str,
                 where: str) -> None:
        expected = base[:, None] + tests @ matrix.mT
        size = base.abs()[:, None] + tests.abs() @ matrix.abs().mT + found.abs() + 1e-12
        if not ((found - expected).abs() <= tolerance * size).all():
            gaps = " or in data that is missing" if self.base.feeds else ""
            raise ValueError(f"{what} is not linear in {list(self.model.split.marginal)}{gaps}{given} {where}: a Kalman filter "
                             "is not exact for them. Use ParticleFilter, or marginalise fewer sites")

    def _run(self, points: Tensor, rows: Tensor, whole: bool = False) -> _Ran:
        """Run the step on ``rows``, each at all the ``(P, W)`` points of u, or at its own of ``(rows, P, W)``."""
        count = points.shape[-2]
        total = count * len(rows)
        u = points.expand(len(rows), -1, -1).flatten(0, 1)
        base, split, frame = self.base, self.model.split, self.frame

        def repeated(value: Tensor) -> Tensor:
            return repeat_rows(value[rows] if len(rows) < frame.rows else value, count)

        state = split.put(map_state(repeated, self.state), u[:, :self.state_width])
        values = {name: repeated(value) for name, value in base.drawn.items()}
        for name, where in self.columns.items():
            like = base.sites[name].value
            values[name] = u[:, where].to(like.dtype).reshape(total, *like.shape[1:])
        for name in base.plain:
            if whole and base.feeds and (site := base.sites[name]).present is not None:
                values[name] = repeated(another(site.p, site.value))  # whoever reads the gap will show it
        many = Frame(frame.t if isinstance(frame.t, int) else repeated(frame.t), total,
                     {k: repeated(v) for k, v in frame.x.items()}, {k: repeated(v) for k, v in frame.covariates.items()},
                     frame.missing, repeated(frame.sequence), frame.first, {k: repeated(v) for k, v in frame.observed.items()},
                     frame.device, frame.whole)
        with pyro.settings.context(validate_distributions_torch=False), StepSites(many, values=values) as step:
            after = self.model.declared.apply(state, many)
        shape = (len(rows), count)
        means, covariances = {}, {}
        for name in self.columns:
            p = step.sites[name].p
            if not whole:
                means[name] = p.mean.double().reshape(*shape, -1)
                continue
            mean, covariance = moments(p, frame.device)
            means[name] = mean.double().reshape(*shape, -1)
            covariances[name] = covariance.double().reshape(*shape, *covariance.shape[1:])
        moved = split.take(after, total, frame.device).reshape(*shape, -1)
        if not whole:
            return _Ran(means, covariances, moved, {}, [])
        with pyro.settings.context(validate_distributions_torch=False):
            densities = {name: step.sites[name].log_p().reshape(shape) for name in (*base.plain, *base.drawn)}
        others = [leaf.reshape(total, -1)[:, ~mask].reshape(*shape, -1) for leaf, mask in zip(leaves(after), split.masks)]
        return _Ran(means, covariances, moved, densities, others)


class _Ran(NamedTuple):
    """The step on ``n`` rows at ``P`` points each."""

    means: dict[str, Tensor]
    covariances: dict[str, Tensor]
    after: Tensor
    densities: dict[str, Tensor]
    """``(n, P)`` of the sites that should not move."""
    others: list[Tensor]
    """``(n, P, ...)`` entries of the next state that should not."""


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding."""
    if not a.is_floating_point():
        return bool((a == b).all())
    tolerance = 1e-9 if a.dtype == torch.float64 else 2e-4
    return bool(((a == b) | ((a - b).abs() <= tolerance * (a.abs() + b.abs()))).all())


def marginalise(model: Any, sequences: Sequences, marginal: Iterable[str] | None = None, steps: int = 2) -> Marginalised:
    """The model with some latents integrated out, tested at the first ``steps``.

    :param model: a declared model, entered.
    :param marginal: names of sites; the largest set that will do when omitted.
    :raises ValueError: naming the site that stands in the way.
    """
    kind = type(model).__name__
    latents = _latents(model, sequences)
    if marginal is not None:
        names = [marginal] if isinstance(marginal, str) else list(marginal)
        if unknown := sorted(set(names) - set(latents)):
            raise ValueError(f"marginal names {unknown}, but the latent sites of {kind} are {sorted(latents)}")
        if not names:
            raise ValueError(f"marginal is empty: name the latent sites of {kind} to integrate out, of {sorted(latents)}, or "
                             "use ParticleFilter")
        return _tested(model, sequences, tuple(n for n in latents if n in names), latents, steps)
    # One that is ImproperUniform at first is named in the error.
    candidates = [name for name, fns in latents.items()
                  if all(is_gaussian(p) or isinstance(innermost(p), (Delta, ImproperUniform)) for p in fns)
                  and not all(isinstance(innermost(p), Delta) for p in fns)]
    always = [name for name, fns in latents.items() if all(isinstance(innermost(p), Delta) for p in fns)]
    if not candidates:
        raise ValueError(f"{kind} has no Gaussian latent to marginalise; its latent sites are "
                         f"{ {name: type(innermost(fns[-1])).__name__ for name, fns in latents.items()} }: use ParticleFilter")
    reasons: list[str] = []
    for names in islice((names for n in range(len(candidates), 0, -1) for names in combinations(candidates, n)), _MOST_TRIES):
        for kept in ({*names, *always}, {*names}) if always else ({*names},):
            tried = tuple(n for n in latents if n in kept)
            try:
                return _tested(model, sequences, tried, latents, steps)
            except ValueError as error:
                reasons.append(f"{list(tried)}: {error}")
    raise ValueError(f"no latent of {kind} can be marginalised given the others. {'; '.join(reasons[:3])}")


def _latents(model: Any, sequences: Sequences) -> dict[str, list[Distribution]]:
    """The latent sites, with their distributions at the first two steps."""
    found: dict[str, list[Distribution]] = {}
    state = None
    with pyro.settings.context(validate_distributions_torch=False):
        for frame in copies(model, sequences).packed.frames(1, 1, min(2, sequences.num_steps)):
            state = model.begin(frame) if frame.first else map_state(lambda leaf, n=frame.rows: leaf[:n], state)
            with StepSites(frame, spread(frame), impute=model.missing_feeds_state) as step:
                state = model.apply(state, frame)
            for name, site in step.latents.items():
                found.setdefault(name, []).append(site.p)
    return found


def _tested(model: Any, sequences: Sequences, names: tuple[str, ...], latents: dict[str, Any], steps: int) -> Marginalised:
    split = find_split(model, sequences, names, tuple(n for n in latents if n not in names))
    found, state = Marginalised(model, split, always=True), None
    some = longest(sequences).repeat(COPIES)
    for frame in some.packed.frames(1, 1, min(steps, sequences.num_steps)):
        state = map_state(lambda leaf, n=frame.rows: leaf[:n], state)
        with StepSites(frame, spread(frame)):
            state = found.apply(state, frame)
    reads = [accepted(method, positional) for method, positional in model.methods()]
    varies = any(names & {"t", *sequences.covariates} or anything and sequences.covariates for names, _, anything in reads)
    return Marginalised(model, split, always=varies)
