"""Is the declared step linear and Gaussian? Look, and if so return its matrices.

One step is run on many rows at once: at zero, along each coordinate of (state, latents, data), at random points of several
scales, and at draws of its own latents. If the means of all sites and the next state are affine at all of them, and the
covariances constant, the step is taken to be linear-Gaussian, *at the points tested*: no finite number of points proves it.
After a filter has run, :func:`require_linear_at` tests again where the data has put the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Delta, ImproperUniform
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints

from pyro_seq.engine.gaussian import innermost, is_gaussian, moments, root
from pyro_seq.engine.rows import ROWS_MIXED
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.module import accepted
from pyro_seq.sequences import Frame, Sequences

__all__ = ["LinearStep", "NotLinear", "linearise", "linearise_later", "require_linear_at"]

SCALES = (1e-3, 1.0, 30.0, 1e3, 1e6)
_POINTS = 6
_DRAWN = 8
_TOLERANCE = {torch.float64: (1e-12, 1e-9), torch.float32: (4e-6, 2e-4)}
"""What rounding can be of the numbers at hand, and what of their differences counts as nothing."""


class NotLinear(ValueError):
    """A step is found not to be linear and Gaussian, at finite numbers."""


class LinearStep(NamedTuple):
    """One step as a joint Gaussian of ``u = (state, latents, data)`` and an affine map to the next state.

    Each tensor has leading dimensions ``(T,)`` and ``(B,)``, of size one where nothing varies.
    """

    state_width: int
    latents: dict[str, tuple[Tensor, torch.Size]]
    """Where each latent site lies in ``u``, and its event shape."""
    observed: slice
    carry: Tensor
    """``(..., D, S)``: mean of u = carry @ mean of state + drift."""
    drift: Tensor
    """``(..., D)``"""
    noise: Tensor
    """``(..., D, D)``: covariance of u given the state."""
    diffuse: Tensor
    """``(D, d)``: what the ``d`` entries of the first latents that have no distribution (ImproperUniform) add to u."""
    next_matrix: Tensor
    """``(..., S', D)``: next state = next_matrix @ u + next_offset."""
    next_offset: Tensor
    """``(..., S')``"""
    template: State
    """One row of the next state, for its structure."""
    solve: Tensor | None = None
    """``(1, B, D, D)`` of the first step: what the noise of each site adds to u."""
    own: Tensor | None = None
    """``(1, B, D, D)`` of the first step: covariance of each site's own noise; noise = solve @ own @ solve.mT."""
    probe: Any = None
    """What found it, for :func:`require_linear_at`."""


def linearise(model: Any, sequences: Sequences, check: bool = True) -> tuple[LinearStep, LinearStep | None]:
    """Matrices of the first step and of the later ones, in float64, with their gradients.

    :param check: test linearity; otherwise the user's word is taken and the matrices are those at zero.
    :raises ValueError: naming the site that is not Gaussian, or not linear.
    """
    probe = _Probe(model, sequences, None, check)
    first = probe.matrices()
    if sequences.num_steps == 1:
        return first, None
    times = range(2, sequences.num_steps + 1)
    later = _Probe(model, sequences, first.template, check, times, probe.reached).matrices()
    if set(first.latents) != set(later.latents):
        raise ValueError(f"{type(model).__name__} samples the latent sites {sorted(first.latents)} at the first step and "
                         f"{sorted(later.latents)} later: give them the same names")
    return first, later


def linearise_later(model: Any, sequences: Sequences, before: LinearStep, times: range, check: bool = True) -> LinearStep:
    """Matrices of the steps at some ``times``, which are those of the last frames of ``sequences``.

    :param before: an earlier step, for the structure of its state.
    """
    return _Probe(model, sequences, before.template, check, times).matrices()


def require_linear_at(step: LinearStep, time: Tensor, sequence: Tensor, state: Tensor) -> None:
    """Run a step once more from states that a filter has reached, each with latents that may follow and the data of its frame.

    :param time: ``(n,)`` of the steps, 1-based.
    :param sequence: ``(n,)``
    :param state: ``(n, S)`` before the step.
    :raises NotLinear: if its means, covariances or next state there are not those of the matrices.
    """
    with torch.no_grad():
        step.probe.require_linear_at(step, time, sequence, state.detach().double())


class _Ran(NamedTuple):
    """A step run on many points ``(..., n)``."""

    values: Tensor
    """``(..., n, W)``: the means of its sites one after the other, and the next state."""
    where: dict[str, Tensor]
    """The entries of u that each site holds."""
    widths: dict[str, int]
    covariances: dict[str, Tensor]
    """By site, ``(..., n, w, w)``."""
    template: State

    def what(self, column: int) -> tuple[str, str]:
        """The site that a column of the values is of, if any, and what to call it."""
        for name, width in self.widths.items():
            if column < width:
                return name, f"site {name!r}"
            column -= width
        return "", "the next state"


class _Probe:
    """The runs of one step that reveal it. ``state`` is a row of the state it starts from, ``None`` at the start.

    :param reached: rows of states that the step may start from, where any are known.
    """

    def __init__(self, model: Any, sequences: Sequences, state: State, check: bool, times: range = range(1, 2),
                 reached: State = None):
        self.model, self.sequences, self.check, self.device = model, sequences, check, sequences.device
        self.first = state is None
        names: set[str] = set()
        for method, positional in model.methods():
            known, _, anything = accepted(method, positional)
            names |= known | (set(sequences.covariates) if anything else set())
        self.varies = bool(names & ({"t"} | set(sequences.covariates)))
        self.last = times[-1] if not self.first else sequences.num_steps
        if not self.varies:
            times = times[:1]
        self.times = times
        differ = any((v != v[:1]).any() for name, v in sequences.covariates.items() if name in names)
        self.batch = sequences.num_sequences if differ else 1
        self.state = state if state is not None else model.begin(self._frame(1, {}))
        if self.first and self.state is not None:
            self.state = map_state(lambda leaf: leaf[:1], self.state)
        self.starts = self.state if self.first else reached
        self.state_width = sum(leaf.numel() for leaf in leaves(self.state))
        for leaf in leaves(self.state):
            if not leaf.is_floating_point():
                raise ValueError(f"{type(model).__name__} carries a state of type {leaf.dtype}, which is not Gaussian")
        self.x = {k: v[0, 0] for k, v in sequences.x.items()}
        if not self.x:
            raise ValueError("a Kalman filter needs data")
        if any(not v.is_floating_point() for v in self.x.values()):
            raise ValueError("the data is of an integer type (or boolean); a linear-Gaussian model observes real numbers: "
                             "x.float()")
        self.data_width = sum(v.numel() for v in self.x.values())
        self.latents = self._latent_sites()
        self.latent_width = sum(shape.numel() for shape in self.latents.values())
        self.width = self.state_width + self.latent_width + self.data_width
        self.stride = 1.0

    def matrices(self) -> LinearStep:
        points, tests = self._points()
        # Steps as large as the offsets, beside which a step of one would be lost in rounding.
        out = self._run(torch.cat([points, tests]) if self.check else points)
        largest = float(out.values[:, :, 0].detach().abs().nan_to_num().amax().clamp(1.0, 1e30))
        self.stride = 2.0 ** math.ceil(math.log2(largest))
        if self.stride > 1:
            points = points * self.stride
            out = self._run(torch.cat([points, tests]) if self.check else points)
        head = len(points)
        d, s = self.width, self.state_width
        shape = (len(self.times), self.batch)
        base, directions = out.values[:, :, 0], (out.values[:, :, 1:head] - out.values[:, :, :1]) / self.stride
        covariances = {name: covariance[:, :, 0] for name, covariance in out.covariances.items()}
        if self.check:
            self._require_finite(out, base, covariances)
            self._require_same(out)
            fixed, slope = base.detach(), directions.detach()
            self._require_affine(out, out.values[:, :, head:].detach(), fixed[:, :, None], lambda u: u @ slope,
                                 lambda u: u @ slope.abs(), tests, None if self.drawn is None else slice(-_DRAWN, None))
            for name, covariance in out.covariances.items():
                self._require_constant(name, covariance.detach(), covariance[:, :, :1].detach())
        self.found = base.detach(), directions.detach(), {name: value.detach() for name, value in covariances.items()}
        where = torch.cat(list(out.where.values()))
        linear = torch.zeros(*shape, d, d, dtype=torch.float64, device=self.device)
        drift = torch.zeros(*shape, d, dtype=torch.float64, device=self.device)
        noise = torch.zeros(*shape, d, d, dtype=torch.float64, device=self.device)
        linear[:, :, where, :] = directions[..., :len(where)].transpose(-1, -2)
        drift[:, :, where] = base[..., :len(where)]
        for name, own in covariances.items():
            noise[:, :, out.where[name][:, None], out.where[name]] = own
        self._require_causal(out.where, linear)
        # u = E_s state + L u + drift + noise, with L strictly lower triangular by blocks.
        solve = torch.linalg.inv(torch.eye(d, dtype=torch.float64, device=self.device) - linear)
        flat = [own for name, own in out.where.items() if name in self.flat]
        return LinearStep(
            s, {name: (own, self.latents[name]) for name, own in out.where.items() if name in self.latents},
            slice(s + self.latent_width, d), solve[..., :s], (solve @ drift[..., None])[..., 0],
            solve @ noise @ solve.transpose(-1, -2),
            solve[0, 0][:, torch.cat(flat)] if flat else solve.new_zeros(d, 0),
            directions[..., len(where):].transpose(-1, -2), base[..., len(where):], out.template,
            *((solve, noise) if self.first else (None, None)), self)

    def _require_causal(self, sites: dict[str, Tensor], linear: Tensor) -> None:
        """A site reads the state and the sites before it; data read ahead of its site would make no generative model."""
        ahead = torch.ones(self.width, dtype=torch.bool, device=self.device)
        ahead[:self.state_width] = False
        for name, where in sites.items():
            if (linear[:, :, where][..., ahead] != 0).any():
                raise ValueError(f"site {name!r} of {type(self.model).__name__} reads data of its own frame that is observed "
                                 "at or after it: that is no generative model, and has no evidence. If it is an input, pass it "
                                 "as a covariate, by another name")
            ahead[where] = False

    def _latent_sites(self) -> dict[str, torch.Size]:
        """Run the step on draws of its latents, which are kept as further points to test at."""
        count, u = 1, torch.zeros(1, self.state_width + self.data_width, device=self.device)
        # From a state that the model can be in, where one is known, as zero may be none: probabilities, say.
        state = self._unflatten_state(u[:, :self.state_width], 1)
        if self.first or self.starts is not None:
            count = _DRAWN if self.check else 1
            state = map_state(lambda leaf: leaf.detach().expand(count, *leaf.shape[1:]) if self.first else leaf, self.starts)
        x, frame = self._some_data(count), None
        generator = torch.Generator("cpu").manual_seed(1)

        def draw(name: str, p: Distribution) -> tuple[None, Tensor | None]:
            """Those without a distribution are put at zero, the first row of the others at their mean."""
            base = innermost(p)
            if isinstance(base, ImproperUniform):
                return None, next(iter(x.values())).new_zeros(p.shape())
            if not is_gaussian(p):
                return None, None
            spread = base.scale.reshape(count, -1) if isinstance(base, Normal) else root(p)
            noise = torch.randn(count, spread.shape[1], generator=generator, device="cpu").to(spread) * 2
            noise[0] = 0.0
            off = spread * noise if spread.dim() == 2 else (spread @ noise[..., None])[..., 0]
            value = p.mean + off.reshape(p.shape())  # plain numbers follow data of more digits, as they do in the runs below
            return None, value.to(torch.promote_types(value.dtype, next(iter(x.values())).dtype))

        frame = self._frame(count, x)._replace(first=True)  # on which types are checked
        with StepSites(frame, proposal=draw) as step:  # with gradients: Pyro keeps the parameters that are first read here
            after = self.model.apply(state, frame)
        _require_continuous(step.latents, type(self.model).__name__)
        for site in step.sites.values():
            _require_gaussian(site.p, site.name, type(self.model).__name__, flat=self.first and not site.observed)
        self.flat = {name for name, site in step.sites.items() if isinstance(site.p, ImproperUniform)}
        observed = [site for site in step.sites.values() if site.observed]
        self.dtype = observed[0].value.dtype if observed else torch.get_default_dtype()
        if self.dtype not in _TOLERANCE:
            raise ValueError(f"the data is {self.dtype}, in which nothing can be found linear: convert data and model, "
                             "x.float() or x.double()")
        sizes = [site.value[0].numel() for site in observed]
        if sum(sizes) != self.data_width:
            raise ValueError(
                f"the observed sites {[s.name for s in observed]} of {type(self.model).__name__} have {sum(sizes)} entries a "
                f"frame and its data {sorted(self.x)} {self.data_width}: each entry of the data is observed once, with obs= in "
                "pyro.sample")
        self.drawn = self.reached = None
        if count > 1:
            parts = [*leaves(state), *(site.value for site in step.latents.values()), *x.values()]
            self.drawn = torch.cat([part.detach().double().reshape(count, -1) for part in parts], -1)
            self.reached = map_state(Tensor.detach, after)
            means = [moments(site.p, self.device)[0] for site in step.sites.values()]
            self.at_drawn = torch.cat([value.double().reshape(count, -1) for value in (*means, *leaves(after))], -1).detach()
        return {name: site.value.shape[1:] for name, site in step.latents.items()}

    def _some_data(self, count: int) -> dict[str, Tensor]:
        """Frames ``(count, ...)`` from all over the data, its gaps at zero."""
        index = torch.arange(count, device=self.device)
        sequence = index * self.sequences.num_sequences // count
        time = (index * 0.618).frac() * self.sequences.lengths[sequence]
        return {k: v[sequence, time.long()].nan_to_num() for k, v in self.sequences.x.items()}

    def _require_finite(self, out: _Ran, base: Tensor, covariances: dict[str, Tensor]) -> None:
        bad = [out.what(int(at))[0] for at in (~base.isfinite()).flatten(0, 1).any(0).nonzero()[:1]] + [
            name for name, value in covariances.items() if not value.isfinite().all()]
        if bad and bad[0]:
            raise ValueError(f"the mean or covariance of site {bad[0]!r} of {type(self.model).__name__} is NaN or infinite: "
                             "look for a parameter that is, or a scale that overflows")

    def _require_same(self, out: _Ran) -> None:
        """Raise unless the draws' rows give the same among others as alone."""
        if self.drawn is None:
            return
        among = out.values[0, 0, -_DRAWN:].detach()
        size = self.at_drawn.abs() + among.abs() + self.drawn.abs().amax(-1, keepdim=True)
        same = (self.at_drawn - among).abs() <= 10 * _TOLERANCE[self.dtype][0] * size
        wrong = ~(same | ~among.isfinite()).all(0)
        if wrong.any():
            raise ValueError(ROWS_MIXED.format(what=out.what(int(wrong.nonzero()[0]))[1], model=type(self.model).__name__))

    def _columns(self, name: str, value: Tensor) -> Tensor:
        """``(width,)``: the entries of u that an observed site holds. It observes the data itself, whole or in part."""
        zero = value[:, :, :1]
        directions = ((value[:, :, 1:self.width + 1] - zero) / self.stride).round(decimals=6)
        columns = directions[0, 0].abs().argmax(0)
        expected = torch.zeros_like(directions[0, 0])
        expected[columns, torch.arange(len(columns), device=columns.device)] = 1.0
        if zero.any() or not (directions == expected).all() or (columns < self.width - self.data_width).any():
            raise ValueError(f"site {name!r} of {type(self.model).__name__} observes a function of the data, such as x - 5. "
                             "A Kalman filter conditions on the data itself; transform the data beforehand")
        return columns

    def _points(self) -> tuple[Tensor, Tensor]:
        """Zero and one step along each coordinate; and the points to test at."""
        points = torch.eye(self.width + 1, dtype=torch.float64, device=self.device)[:, 1:]
        generator = torch.Generator("cpu").manual_seed(0)
        scale = self.sequences.largest or 1.0
        scales = torch.tensor([*SCALES, scale], dtype=torch.float64, device="cpu")[:, None, None]
        tests = torch.randn(len(scales), _POINTS // 2, self.width, generator=generator, dtype=torch.float64, device="cpu")
        tests = (scales * torch.cat([tests, -tests], 1)).flatten(0, 1).to(self.device)  # on both sides of zero
        return points, tests if self.drawn is None else torch.cat([tests, self.drawn])

    def require_linear_at(self, step: LinearStep, time: Tensor, sequence: Tensor, state: Tensor) -> None:
        count, at = len(time), time - self.times[0] if self.varies else torch.zeros_like(time)
        row = sequence if self.batch > 1 else torch.zeros_like(sequence)

        def here(value: Tensor) -> Tensor:
            return value.detach()[at if len(value) > 1 else at * 0, row if value.shape[1] > 1 else row * 0]

        frame_of = time - 1 - self.last + self.sequences.num_steps
        x = {k: v[sequence, frame_of].nan_to_num() for k, v in self.sequences.x.items()}
        latent = slice(self.state_width, self.state_width + self.latent_width)
        variance = step.noise.diagonal(dim1=-2, dim2=-1)[..., latent]
        u = (here(step.carry[..., latent, :]) @ state[..., None])[..., 0] + here(step.drift[..., latent])
        noise = torch.randn(u.shape, generator=torch.Generator("cpu").manual_seed(2), device="cpu").to(u)
        u = u + 2 * here(variance.clamp(min=0).sqrt()) * noise
        u = torch.cat([state, u, *(v.double().reshape(count, -1) for v in x.values())], -1).to(self.dtype).double()
        covariates = {k: v[sequence, frame_of] for k, v in self.sequences.covariates.items()}
        frame = Frame(time, count, {}, covariates, False, sequence, False, {}, self.sequences.device)
        out, (base, directions, covariances) = self._apply(u, frame), self.found
        slope = here(directions)
        self._require_affine(out, out.values, here(base), lambda u: (u[:, None] @ slope)[:, 0],
                             lambda u: (u[:, None] @ slope.abs())[:, 0], u, slice(None))
        for name, covariance in out.covariances.items():
            self._require_constant(name, covariance, here(covariances[name]))

    def _run(self, points: Tensor) -> _Ran:
        """Run the step at every point, time and sequence: means and covariances of the sites, and the next state."""
        count, blocks = len(points), len(self.times) * self.batch
        return self._apply(points.to(self.dtype).repeat(blocks, 1), self._frame(count, {}, repeat=True),
                           (len(self.times), self.batch, count))

    def _apply(self, u: Tensor, frame: Frame, shape: tuple[int, ...] | None = None) -> _Ran:
        """:param shape: of what is returned; ``(rows,)``, without a look at the columns, when omitted."""
        rows, u, look, shape = len(u), u.to(self.dtype), shape is not None, shape or (len(u),)
        state = self._unflatten_state(u[:, :self.state_width], rows)
        values, start = {}, self.state_width
        for name, size in self.latents.items():
            values[name] = u[:, start:start + size.numel()].reshape(rows, *size)
            start += size.numel()
        frame = frame._replace(x=self._unflatten_data(u, start, rows))
        with pyro.settings.context(validate_distributions_torch=False), StepSites(frame, values=values) as step:
            after = self.model.apply(state, frame)
        where, means, covariances, start = {}, {}, {}, self.state_width
        for name, site in step.sites.items():
            width = site.value[0].numel()
            if site.scale is not None and (isinstance(site.scale, Tensor) or site.scale != 1.0) or site.mask is not None:
                raise ValueError(f"site {name!r} stands under poutine.scale or poutine.mask, which a Kalman filter does not "
                                 "know: mark missing data with NaN or mask=")
            if not site.observed:
                where[name] = torch.arange(start, start + width, device=self.device)
                start += width
            elif look:
                where[name] = self._columns(name, site.value.double().reshape(*shape, width))
            _require_gaussian(site.p, name, type(self.model).__name__, flat=self.first and not site.observed)
            mean, covariance = moments(site.p, self.device)
            means[name] = mean.double().reshape(*shape, width)
            covariances[name] = covariance.double().reshape(*shape, width, width)
        if look:
            seen = torch.cat([own for name, own in where.items() if name not in self.latents])
            if len(seen.unique()) < len(seen):
                raise ValueError(f"an entry of the data of {type(self.model).__name__} is observed twice in one step")
        following = [leaf.double().reshape(*shape, -1) for leaf in leaves(after)]
        return _Ran(torch.cat([*means.values(), *following], -1), where, {k: v.shape[-1] for k, v in means.items()},
                    covariances, map_state(lambda leaf: leaf[:1], after))

    def _frame(self, count: int, x: dict[str, Tensor], repeat: bool = False) -> Frame:
        times = torch.tensor(list(self.times), device=self.device)
        blocks = len(self.times) * self.batch if repeat else 1
        t = times[:, None, None].expand(len(self.times), self.batch, count).reshape(-1)
        sequence = torch.arange(self.batch, device=self.device)[None, :, None].expand(
            len(self.times), self.batch, count).reshape(-1)
        t, sequence = (t, sequence) if repeat else (t[:1].expand(count), sequence[:1].expand(count))
        covariates = {k: v[sequence, t - 1 - self.last + self.sequences.num_steps]
                      for k, v in self.sequences.covariates.items()}
        return Frame(t, count * blocks, x, covariates, False, sequence, False, {}, self.sequences.device)

    def _unflatten_state(self, flat: Tensor, rows: int) -> State:
        if self.state is None:
            return None
        at = 0

        def take(leaf: Tensor) -> Tensor:
            nonlocal at
            at += leaf.numel()
            return flat[:, at - leaf.numel():at].to(leaf.dtype).reshape(rows, *leaf.shape[1:])

        return map_state(take, self.state)

    def _unflatten_data(self, flat: Tensor, start: int, rows: int) -> dict[str, Tensor]:
        found = {}
        for name, like in self.x.items():
            found[name] = flat[:, start:start + like.numel()].to(like.dtype).reshape(rows, *like.shape)
            start += like.numel()
        return found

    def _require_affine(self, out: _Ran, at: Tensor, base: Tensor, slope: Callable[[Tensor], Tensor],
                        size: Callable[[Tensor], Tensor], u: Tensor, near: slice | None) -> None:
        """Values ``(..., n, W)`` at ``n`` points against the affine map; and those ``near`` one another against the first of
        them, since where all numbers are large a share of them would hide what they differ by.

        :param slope: the product with the directions; ``size`` with their absolute values.
        """
        rounding, share = _TOLERANCE[self.dtype]
        moved, off, total = at - base, at - base - slope(u), size(u.abs())
        level = rounding * (base.abs() + total + at.abs() + 1e-12)
        wrong = ~(off.abs() <= level + share * (total + moved.abs()))
        if near is not None:
            off, level, moved, v = off[..., near, :], level[..., near, :], moved[..., near, :], u[..., near, :]
            apart = size((v - v[..., :1, :]).abs()) + (moved - moved[..., :1, :]).abs()
            wrong[..., near, :] |= ~((off - off[..., :1, :]).abs() <= level + level[..., :1, :] + share * apart)
        if wrong.any():
            *_, row, column = wrong.nonzero()[0].tolist()
            name, what = out.what(column)
            raise (NotLinear if at.isfinite().all() else ValueError)(
                f"{what}{': its mean' if name else ''} in {type(self.model).__name__} is not linear in the state (tested at "
                f"{wrong.shape[-2]} points of scales {SCALES[0]:g} to {SCALES[-1]:g}, and where model and data put it; it "
                f"fails at {u[row].abs().max().item():.2g}): the Kalman filter is not exact here. Use ParticleFilter or a "
                "guide; or, if it is linear wherever the data can take it, KalmanFilter(model, assume_linear=True)")

    def _require_constant(self, name: str, covariance: Tensor, expected: Tensor) -> None:
        size = covariance.abs().amax((-1, -2), keepdim=True)
        if not ((covariance - expected).abs() <= _TOLERANCE[self.dtype][1] * size).all():
            raise (NotLinear if covariance.isfinite().all() else ValueError)(
                f"site {name!r} of {type(self.model).__name__} is Gaussian, but its covariance depends on the state: the model "
                "is not linear-Gaussian. Use ParticleFilter or a guide")


def _require_continuous(latents: dict[str, Site], model: str) -> None:
    """Raise if there is a discrete latent, naming what is exact then."""
    discrete = [name for name, site in latents.items() if innermost(site.p).has_enumerate_support]
    if discrete:
        instead = ("ForwardBackward is exact" if len(discrete) == len(latents) else
                   "Use RaoBlackwellisedFilter, if the other latents are linear and Gaussian given it, or ParticleFilter")
        raise ValueError(f"latent site {discrete[0]!r} of {model} is {type(innermost(latents[discrete[0]].p)).__name__}: it is "
                         f"discrete, not Gaussian, and no Kalman filter takes it. {instead}")


def _require_gaussian(fn: Distribution, name: str, model: str, flat: bool = False) -> None:
    """:param flat: whether a distribution without information will do as well."""
    base = innermost(fn)
    if isinstance(base, ImproperUniform) and flat and _is_real(base.support):
        return
    if isinstance(base, ImproperUniform):
        raise ValueError(f"site {name!r} of {model} is ImproperUniform: only latents of the first step, without "
                         "constraints, can be diffuse")
    if not is_gaussian(base) and not isinstance(base, Delta):
        raise ValueError(f"site {name!r} of {model} is {type(base).__name__}, not Gaussian: the Kalman filter is not exact "
                         "here. Use ParticleFilter or a guide")


def _is_real(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector
