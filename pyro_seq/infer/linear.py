"""Is the declared step linear and Gaussian? Look, and if so return its matrices.

One step is run on many rows at once: at zero, along each coordinate of (state, latents, data), and at random points of
several scales. If the means of all sites and the next state are affine at all of them, and the covariances constant,
the step is taken to be linear-Gaussian, *at the points tested*: no finite number of points proves it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Delta, ImproperUniform
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_seq.engine.gaussian import innermost, is_gaussian, moments
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.module import accepted
from pyro_seq.sequences import Frame, Sequences

__all__ = ["LinearStep", "linearise", "linearise_later"]

SCALES = (1e-3, 1.0, 30.0, 1e3, 1e6)
_POINTS = 6


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


def linearise(model: Any, sequences: Sequences, check: bool = True) -> tuple[LinearStep, LinearStep | None]:
    """Matrices of the first step and of the later ones, in float64, with their gradients.

    :param check: test linearity; otherwise the user's word is taken and the matrices are those at zero.
    :raises ValueError: naming the site that is not Gaussian, or not linear.
    """
    first = _Probe(model, sequences, None, check).matrices()
    if sequences.num_steps == 1:
        return first, None
    later = linearise_later(model, sequences, first, range(2, sequences.num_steps + 1), check)
    if set(first.latents) != set(later.latents):
        raise ValueError(f"{type(model).__name__} samples the latent sites {sorted(first.latents)} at the first step and "
                         f"{sorted(later.latents)} later: give them the same names")
    return first, later


def linearise_later(model: Any, sequences: Sequences, before: LinearStep, times: range, check: bool = True) -> LinearStep:
    """Matrices of the steps at some ``times``, which are those of the last frames of ``sequences``.

    :param before: an earlier step, for the structure of its state.
    """
    return _Probe(model, sequences, before.template, check, times).matrices()


class _Probe:
    """The runs of one step that reveal it. ``state`` is a row of the state it starts from, ``None`` at the start."""

    def __init__(self, model: Any, sequences: Sequences, state: State, check: bool, times: range = range(1, 2)):
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
        model = type(self.model).__name__
        points, tests = self._points()
        # Steps as large as the offsets, beside which a step of one would be lost in rounding.
        out = self._run(torch.cat([points, tests]) if self.check else points)
        offsets = [mean[:, :, 0] for _, mean, _ in out["sites"].values()] + [out["next"][:, :, 0]]
        largest = torch.cat([v.detach().flatten() for v in offsets]).abs().nan_to_num().max().clamp(1.0, 1e30)
        self.stride = 2.0 ** math.ceil(math.log2(largest))
        if self.stride > 1:
            points = points * self.stride
            out = self._run(torch.cat([points, tests]) if self.check else points)
        head = len(points)
        d, s = self.width, self.state_width
        shape = (len(self.times), self.batch)
        linear = torch.zeros(*shape, d, d, dtype=torch.float64, device=self.device)
        drift = torch.zeros(*shape, d, dtype=torch.float64, device=self.device)
        noise = torch.zeros(*shape, d, d, dtype=torch.float64, device=self.device)
        tolerance = 1e-9 if self.dtype == torch.float64 else 2e-4
        for name, (where, mean, covariance) in out["sites"].items():
            if self.check and not (mean[:, :, 0].isfinite().all() and covariance[:, :, 0].isfinite().all()):
                raise ValueError(f"the mean or covariance of site {name!r} of {model} is NaN or infinite: look for a parameter "
                                 "that is, or a scale that overflows")
            base, directions = mean[:, :, 0], (mean[:, :, 1:head] - mean[:, :, :1]) / self.stride
            linear[:, :, where, :] = directions.transpose(-1, -2)
            drift[:, :, where] = base
            noise[:, :, where[:, None], where] = covariance[:, :, 0]
            if self.check:
                self._require_affine(f"site {name!r}: its mean", mean[:, :, head:], base, directions, tests, tolerance)
                size = covariance.abs().amax((-1, -2), keepdim=True)
                if not ((covariance - covariance[:, :, :1]).abs() <= tolerance * size).all():
                    raise ValueError(f"site {name!r} of {model} is Gaussian, but its covariance depends on the state: the "
                                     "model is not linear-Gaussian. Use ParticleFilter or a guide")
        after = out["next"]
        base, directions = after[:, :, 0], (after[:, :, 1:head] - after[:, :, :1]) / self.stride
        if self.check:
            self._require_affine("the next state", after[:, :, head:], base, directions, tests, tolerance)
        self._require_causal(out["sites"], linear)
        # u = E_s state + L u + drift + noise, with L strictly lower triangular by blocks.
        solve = torch.linalg.inv(torch.eye(d, dtype=torch.float64, device=self.device) - linear)
        flat = [where for name, (where, _, _) in out["sites"].items() if name in self.flat]
        return LinearStep(
            s, {name: (where, self.latents[name]) for name, (where, _, _) in out["sites"].items() if name in self.latents},
            slice(s + self.latent_width, d), solve[..., :s], (solve @ drift[..., None])[..., 0],
            solve @ noise @ solve.transpose(-1, -2),
            solve[0, 0][:, torch.cat(flat)] if flat else solve.new_zeros(d, 0), directions.transpose(-1, -2), base,
            out["template"], *((solve, noise) if self.first else ()))

    def _require_causal(self, sites: dict[str, Any], linear: Tensor) -> None:
        """A site reads the state and the sites before it; data read ahead of its site would make no generative model."""
        ahead = torch.ones(self.width, dtype=torch.bool, device=self.device)
        ahead[:self.state_width] = False
        for name, (where, _, _) in sites.items():
            if (linear[:, :, where][..., ahead] != 0).any():
                raise ValueError(f"site {name!r} of {type(self.model).__name__} reads data of its own frame that is observed "
                                 "at or after it: that is no generative model, and has no evidence. If it is an input, pass it "
                                 "as a covariate, by another name")
            ahead[where] = False

    def _latent_sites(self) -> dict[str, torch.Size]:
        zero = torch.zeros(1, self.state_width + self.data_width, device=self.device)
        # The model's own first state, as zero may be none that it can be in: probabilities, say.
        state = self.state if self.first else self._unflatten_state(zero[:, :self.state_width], 1)
        x = self._unflatten_data(zero, self.state_width, 1)
        with StepSites(self._frame(1, x, repeat=False), proposal=self._draw) as step:
            self.model.apply(state, self._frame(1, x, repeat=False))
        _require_continuous(step.latents, type(self.model).__name__)
        for site in step.sites.values():
            _require_gaussian(site.p, site.name, type(self.model).__name__, flat=self.first and not site.observed)
        self.flat = {name for name, site in step.sites.items() if isinstance(site.p, ImproperUniform)}
        observed = [site for site in step.sites.values() if site.observed]
        self.dtype = observed[0].value.dtype if observed else torch.get_default_dtype()
        sizes = [site.value[0].numel() for site in observed]
        if sum(sizes) != self.data_width:
            raise ValueError(
                f"the observed sites {[s.name for s in observed]} of {type(self.model).__name__} have {sum(sizes)} entries a "
                f"frame and its data {sorted(self.x)} {self.data_width}: each entry of the data is observed once, with obs= in "
                "pyro.sample")
        return {name: site.value.shape[1:] for name, site in step.latents.items()}

    def _draw(self, name: str, p: Distribution) -> tuple[None, Tensor | None]:
        """Latents come from the model; those without a distribution are put at zero."""
        like = next(iter(self.sequences.x.values()))
        return None, like.new_zeros(p.shape()) if isinstance(p, ImproperUniform) else None

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
        tests = [s * torch.randn(_POINTS, self.width, generator=generator, dtype=torch.float64, device="cpu")
                 for s in (*SCALES, scale)]
        return points, torch.cat(tests).to(self.device)

    def _run(self, points: Tensor) -> dict[str, Any]:
        """Run the step at every point, time and sequence: means and covariances of the sites, and the next state."""
        count, blocks = len(points), len(self.times) * self.batch
        u = points.to(self.dtype).repeat(blocks, 1)
        rows = len(u)
        state = self._unflatten_state(u[:, :self.state_width], rows)
        values, start = {}, self.state_width
        for name, shape in self.latents.items():
            values[name] = u[:, start:start + shape.numel()].reshape(rows, *shape)
            start += shape.numel()
        x = self._unflatten_data(u, start, rows)
        frame = self._frame(count, x, repeat=True)
        with pyro.settings.context(validate_distributions_torch=False), StepSites(frame, values=values) as step:
            after = self.model.apply(state, frame)
        shape = (len(self.times), self.batch, count)
        sites, start = {}, self.state_width
        for name, site in step.sites.items():
            width = site.value[0].numel()
            if site.scale is not None and (isinstance(site.scale, Tensor) or site.scale != 1.0) or site.mask is not None:
                raise ValueError(f"site {name!r} stands under poutine.scale or poutine.mask, which a Kalman filter does not "
                                 "know: mark missing data with NaN or mask=")
            if site.observed:
                where = self._columns(name, site.value.double().reshape(*shape, width))
            else:
                where = torch.arange(start, start + width, device=self.device)
                start += width
            _require_gaussian(site.p, name, type(self.model).__name__, flat=self.first and not site.observed)
            mean, covariance = moments(site.p, self.device)
            sites[name] = (where, mean.double().reshape(*shape, width), covariance.double().reshape(*shape, width, width))
        seen = torch.cat([where for name, (where, _, _) in sites.items() if name not in self.latents])
        if len(seen.unique()) < len(seen):
            raise ValueError(f"an entry of the data of {type(self.model).__name__} is observed twice in one step")
        flat = torch.cat([leaf.double().reshape(*shape, -1) for leaf in leaves(after)], -1) if leaves(after) else (
            torch.zeros(*shape, 0, dtype=torch.float64, device=self.device))
        return {"sites": sites, "next": flat, "template": map_state(lambda leaf: leaf[:1], after)}

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

    def _require_affine(self, what: str, at_tests: Tensor, base: Tensor, directions: Tensor, tests: Tensor,
                        tolerance: float) -> None:
        expected = base[:, :, None] + tests @ directions
        size = base.abs()[:, :, None] + tests.abs() @ directions.abs() + at_tests.abs() + 1e-12
        wrong = ~((at_tests - expected).abs() <= tolerance * size)
        if wrong.any():
            row = int(wrong.any(-1).nonzero()[0, -1])
            raise ValueError(
                f"{what} in {type(self.model).__name__} is not linear in the state (tested at {len(tests)} points of scales "
                f"{SCALES[0]:g} to {SCALES[-1]:g}; it fails at {tests[row].abs().max().item():.2g}): the Kalman filter is "
                "not exact here. Use ParticleFilter or a guide; or, if it is linear wherever the data can take it, "
                "KalmanFilter(model, assume_linear=True)")


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
