"""One step of a model with its randomness made an argument.

Every Gaussian latent is written ``mean + root @ noise`` with standard normal noise, so that a step is a function of its
state and its noise, however many sites it has and whichever of them read one another:

    (state, noise)  ->  latents, moments of the data given them, next state

This is what can be linearised, or put through sigma points, or run on an ensemble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.nn.functional import pad

from pyro_seq.engine.gaussian import covariance, innermost, is_gaussian, root, semidefinite_root
from pyro_seq.engine.loop import check_step
from pyro_seq.engine.missing import fill
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state, versions
from pyro_seq.sequences import Frame, repeat_rows

__all__ = ["Data", "Layout", "NoisySites", "NoisyStep", "Ran", "moments", "repeat_frame", "unflatten_state"]

Noise = Callable[[str, int], Tensor]
"""Given a site and its number of entries, standard normal numbers ``(rows, entries)``, of any type."""


class NoisySites(StepSites):
    """Run one step with each Gaussian latent at ``mean + root @ noise``.

    :param noise: says where, for each site in turn.
    :param impute: place the missing entries of observed sites alike, given the entries that are there, since the state reads
        them.
    """

    def __init__(self, frame: Frame, noise: Noise, impute: bool, values: Mapping[str, Tensor] | None = None,
                 stop_after: int | None = None):
        super().__init__(frame, self._place, values, impute, stop_after)
        self.noise = noise

    def _place(self, name: str, prior: Distribution) -> tuple[None, Tensor]:
        if not is_gaussian(prior):
            raise ValueError(
                f"latent site {name!r} is {type(innermost(prior)).__name__}, not Gaussian: Kalman filters, their proposals "
                "and twisted particle filters are for models whose latents are Normal or MultivariateNormal given the state. "
                "Use ParticleFilter with another guide, or declare the latent as a function of a Normal one")
        return None, _shifted(prior, self.noise(name, prior.event_shape.numel()))

    def fill_gaps(self, name: str, p: Distribution, value: Tensor, present: Tensor) -> Tensor:
        if not self.impute:
            return super().fill_gaps(name, p, value, present)
        noise = self.noise(name, p.event_shape.numel())
        mean, spread = moments(p, name)
        noise = noise.to(mean.dtype)
        if not is_gaussian(p) or isinstance(innermost(p), Normal):
            filler = mean + spread.diagonal(dim1=-2, dim2=-1).sqrt() * noise
        else:  # given the entries of the row that are there
            seen = present.reshape(mean.shape)
            within = torch.where(seen[:, :, None] & seen[:, None, :], spread, 0.0) + torch.diag_embed((~seen).to(mean.dtype))
            cross = torch.where(seen[:, None], spread, 0.0)
            gain = torch.linalg.solve(within, cross.mT).mT
            left = torch.where(seen[:, :, None] | seen[:, None, :], 0.0, spread - gain @ cross.mT)
            residual = torch.where(seen, value.reshape(mean.shape) - mean, 0.0)
            filler = mean + (gain @ residual[..., None] + semidefinite_root(left)[0] @ noise[..., None])[..., 0]
        return fill(p, value, present, filler.reshape(value.shape))


def _shifted(fn: Distribution, noise: Tensor) -> Tensor:
    """``mean + root @ noise``, ``(rows, ...)``."""
    base = innermost(fn)
    shape = fn.shape()
    if isinstance(base, Normal):
        return base.loc.reshape(shape) + base.scale.reshape(shape) * noise.to(base.loc.dtype).reshape(shape)
    noise = noise.to(base.loc.dtype)
    return fn.mean + (root(fn) @ noise[..., None])[..., 0].reshape(shape)


def moments(fn: Distribution, name: str) -> tuple[Tensor, Tensor]:
    """Mean ``(rows, D)`` and covariance ``(rows, D, D)`` of an observed site, its entries flattened.

    :raises ValueError: if the site is not Gaussian and its moments are not those of independent entries, or not finite.
    """
    rows = fn.batch_shape[0]
    if is_gaussian(fn):
        return fn.mean.reshape(rows, -1), covariance(fn)
    kind = type(innermost(fn)).__name__
    advice = "Use ParticleFilter, or another family at this site"
    if innermost(fn).event_shape:
        raise ValueError(f"observed site {name!r} is {kind}, whose entries are not independent: a Kalman filter matches mean "
                         f"and variance of families of single numbers only. {advice}")
    try:
        mean, variance = fn.mean.reshape(rows, -1), fn.variance.reshape(rows, -1)
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"observed site {name!r} is {kind}, whose mean and variance are not known: a Kalman filter needs "
                         f"them. {advice}") from error
    if not bool(variance.isfinite().all()) or not bool(mean.isfinite().all()):
        raise ValueError(f"observed site {name!r} is {kind} without a finite mean and variance: a Kalman filter matches them. "
                         f"{advice}")
    return mean, torch.diag_embed(variance)


class Data(NamedTuple):
    """The observed sites of a step as one vector, in float64."""

    mean: Tensor
    """``(rows, D)``"""
    covariance: Tensor
    """``(rows, D, D)``; given the latents and the sites before, those are independent of one another."""
    value: Tensor
    """``(rows, D)``"""
    present: Tensor
    """``(rows, D)`` booleans."""

    @staticmethod
    def of(sites: Sequence[Site], rows: int, device: torch.device) -> Data:
        found = [moments(site.p, site.name) for site in sites]
        width, at, blocks = sum(mean.shape[-1] for mean, _ in found), 0, []
        for _, spread in found:
            blocks.append(pad(spread.double(), (at, width - at - spread.shape[-1])))
            at += spread.shape[-1]
        present = [torch.ones_like(site.value, dtype=torch.bool) if site.present is None else site.present for site in sites]
        return Data(_side_by_side([mean for mean, _ in found], rows, device),
                    torch.cat(blocks, 1) if blocks else torch.zeros(rows, 0, 0, dtype=torch.float64, device=device),
                    _side_by_side([site.value for site in sites], rows, device),
                    _side_by_side(present, rows, device) == 1)


def _side_by_side(parts: Sequence[Tensor], rows: int, device: torch.device) -> Tensor:
    """``(rows, width)`` in float64."""
    if not parts:
        return torch.zeros(rows, 0, dtype=torch.float64, device=device)
    return torch.cat([part.double().reshape(rows, -1) for part in parts], -1)


class Layout(NamedTuple):
    """The sites of a step in the order they run, and their shapes."""

    latents: dict[str, torch.Size]
    observed: dict[str, torch.Size]
    matched: tuple[str, ...]
    """The observed sites that are not Gaussian, of which mean and variance are matched."""

    @staticmethod
    def of(model: Any, state: State, frame: Frame) -> Layout:
        """What one run of the step shows."""
        sites = NoisySites(frame, lambda _, n: torch.zeros(frame.rows, n, device=frame.device),
                           frame.missing and model.missing_feeds_state)
        _run(model, state, sites)
        shapes = {name: (site.observed, site.value.shape[1:]) for name, site in sites.sites.items()}
        matched = tuple(name for name, site in sites.sites.items() if site.observed and not is_gaussian(site.p))
        return Layout({k: s for k, (seen, s) in shapes.items() if not seen},
                      {k: s for k, (seen, s) in shapes.items() if seen}, matched)

    @property
    def latent_width(self) -> int:
        return sum(shape.numel() for shape in self.latents.values())

    @property
    def data_width(self) -> int:
        return sum(shape.numel() for shape in self.observed.values())

    def columns(self) -> dict[str, slice]:
        """Where each site lies in a vector of all latents, and all observed sites after them."""
        found, start = {}, 0
        for name, shape in {**self.latents, **self.observed}.items():
            found[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return found

    def noise(self, rows: Tensor, where: str) -> Noise:
        """The parts of ``(rows, noise_width)`` numbers, by site.

        :param where: the step, for messages.
        """
        columns = self.columns()

        def part(name: str, width: int) -> Tensor:
            if name not in columns or columns[name].stop - columns[name].start != width:
                raise ValueError(_MOVED.format(name=name, where=where))
            return rows[:, columns[name]]

        return part


class Ran(NamedTuple):
    """A step run at ``k`` points for each of ``n`` sequences."""

    latents: Tensor
    """``(n, k, Z)``"""
    filled: Tensor
    """``(n, k, D)`` the data with its gaps filled; ``(n, k, 0)`` where the state does not read them."""
    mean: Tensor
    """``(n, k, D)`` of the data given state and latents."""
    covariance: Tensor
    """``(n, k, D, D)``"""
    value: Tensor
    """``(n, D)`` the data."""
    present: Tensor
    """``(n, D)`` booleans."""
    after: State
    """``(n * k, ...)``"""
    sites: dict[str, Site]


class NoisyStep:
    """One step of a model as a function of its state and noise, in float64.

    :param like: a row of the state that the step starts from; ``None`` before the first one of a state-space model.
    :param frame: one row for each of ``n`` sequences.
    """

    def __init__(self, model: Any, like: State, frame: Frame, layout: Layout):
        self.model, self.like, self.frame, self.layout = model, like, frame, layout
        self.gaps = frame.missing and model.missing_feeds_state
        """Whether the data has missing entries that the state reads, and which are thus placed by noise too."""
        self.state_width = sum(leaf.numel() for leaf in leaves(like))
        self.filled_width = layout.data_width if self.gaps else 0
        self.noise_width = layout.latent_width + self.filled_width
        self.types: dict[str, torch.dtype] = {}

    def __call__(self, points: Tensor) -> Ran:
        """Run the step.

        :param points: ``(n, k, state_width + noise_width)``
        """
        n, k, _ = points.shape
        rows = points.reshape(n * k, -1)
        where = f"{type(self.model).__name__} at time {self.frame.t}"
        noise = self.layout.noise(rows[:, self.state_width:], where)
        before, sites = self.state(rows), NoisySites(repeat_frame(self.frame, k), noise, self.gaps)
        counts = versions(before)
        after = _run(self.model, before, sites)
        check_step(self.model, sites.sites, before, after, sites.frame, counts)
        for name, shape in {**self.layout.latents, **self.layout.observed}.items():
            if name not in sites.sites or sites.sites[name].value.shape[1:] != shape:
                raise ValueError(_MOVED.format(name=name, where=where))
        _refuse_scaled(sites.sites, where)
        self.types = {name: site.value.dtype for name, site in sites.sites.items()}
        data = Data.of([sites.sites[name] for name in self.layout.observed], n * k, self.frame.device)
        value = data.value.reshape(n, k, -1)
        return Ran(
            self._joined([sites.sites[name].value for name in self.layout.latents], n, k),
            value if self.gaps else value[..., :0], data.mean.reshape(n, k, -1),
            data.covariance.reshape(n, k, *data.covariance.shape[1:]), value[:, 0],
            data.present.reshape(n, k, -1)[:, 0], after, sites.sites)

    def next_state(self, points: Tensor) -> Tensor:
        """``(n, k, S')``: the next state, given state, latents and, where the state reads them, the gaps.

        :param points: ``(n, k, state_width + latent_width + filled_width)``
        """
        n, k, _ = points.shape
        rows = points.reshape(n * k, -1)
        values, at = {}, self.state_width
        for name, shape in {**self.layout.latents, **(self.layout.observed if self.gaps else {})}.items():
            values[name] = rows[:, at:at + shape.numel()].to(self.types[name]).reshape(-1, *shape)
            at += shape.numel()
        return self.flat(_run(self.model, self.state(rows), StepSites(repeat_frame(self.frame, k), values=values)), n, k)

    def state(self, rows: Tensor) -> State:
        return unflatten_state(rows[:, :self.state_width], self.like)

    def flat(self, state: State, n: int, k: int) -> Tensor:
        """``(n, k, S)``"""
        return self._joined(_floating(self.model, state), n, k)

    def selected(self, ran: Ran) -> Tensor | None:
        """Where the next state lies among (state, latents), if it is made of the very values of latents."""
        columns, found = self.layout.columns(), []
        for leaf in leaves(ran.after):
            name = next((name for name in self.layout.latents if ran.sites[name].value is leaf), None)
            if name is None:
                return None
            where = columns[name]
            found.append(torch.arange(where.start, where.stop, device=leaf.device) + self.state_width)
        return torch.cat(found) if found else None

    def _joined(self, parts: list[Tensor], n: int, k: int) -> Tensor:
        return _side_by_side(parts, n * k, self.frame.device).reshape(n, k, -1)


_MOVED = ("site {name!r} of {where} is not as it was at the first step: a step samples the same sites each time, under the "
          "same names and of the same shapes")


def _run(model: Any, state: State, sites: StepSites) -> State:
    """Run the step under a messenger: the next state; the messenger has the sites."""
    frame = sites.frame
    try:
        with sites:
            after = model.apply(state, frame)
    except torch.linalg.LinAlgError as error:
        last = f"after site {list(sites.sites)[-1]!r}" if sites.sites else "before its first site"
        raise ValueError(f"a covariance in the step of {type(model).__name__} at time {frame.t}, {last}, is not positive "
                         f"definite. {error}") from error
    return after


def _refuse_scaled(sites: Mapping[str, Site], where: str) -> None:
    for name, site in sites.items():
        if site.mask is not None or isinstance(site.scale, Tensor) or site.scale != 1.0:
            raise ValueError(f"site {name!r} of {where} stands under poutine.scale or poutine.mask, which a Kalman filter does "
                             "not know: mark missing data with NaN or mask=")


def _floating(model: Any, state: State) -> list[Tensor]:
    found = leaves(state)
    for leaf in found:
        if not leaf.is_floating_point():
            raise ValueError(f"{type(model).__name__} carries a state of type {leaf.dtype}: a Kalman filter needs a state of "
                             "real numbers. For a count of steps name the time t among the arguments; for discrete states use "
                             "ParticleFilter")
    return found


def unflatten_state(flat: Tensor, like: State) -> State:
    """Rows ``(rows, S)`` as a state with the structure and types of ``like``."""
    at = 0

    def take(leaf: Tensor) -> Tensor:
        nonlocal at
        at += leaf[:1].numel()
        return flat[:, at - leaf[:1].numel():at].to(leaf.dtype).reshape(len(flat), *leaf.shape[1:])

    return map_state(take, like)


def repeat_frame(frame: Frame, times: int) -> Frame:
    """Each row ``times`` times, the copies next to each other."""
    if times == 1:
        return frame

    def rows(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: repeat_rows(value, times) for name, value in values.items()}

    return frame._replace(rows=frame.rows * times, x=rows(frame.x), covariates=rows(frame.covariates),
                          sequence=repeat_rows(frame.sequence, times), observed=rows(frame.observed))
