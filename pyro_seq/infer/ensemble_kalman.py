"""The ensemble Kalman filter and smoother: the declared step on an ensemble of states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.gaussian import condition, semidefinite_inverse, semidefinite_root
from pyro_seq.engine.noise import Layout, NoisyStep, unflatten_state
from pyro_seq.engine.state import State
from pyro_seq.infer.declared_filter import DeclaredFilter, at_the_ends, refuse, told
from pyro_seq.module import require_count
from pyro_seq.sequences import Packed

__all__ = ["EnsembleKalmanFilter"]


class EnsembleKalmanFilter(DeclaredFilter):
    r"""Approximate evidence, filtered and smoothed moments of a model whose latents are Gaussian given the state.

    Each sequence has an ensemble of states. A step runs each member with its own noise, and moves it towards the frame by a
    gain that is estimated from the ensemble, each member seeing the frame with noise of its own (perturbed observations:
    Burgers, van Leeuwen and Evensen, *Analysis scheme in the ensemble Kalman filter*, 1998). The smoother goes back by
    regression of one step's members on the next one's (Raanes, *On the ensemble Rauch-Tung-Striebel smoother and its
    equivalence to the ensemble Kalman smoother*, 2016). Covariances may depend on the state: each latent has its member's, and
    that of the data is averaged. Of observed sites that are not Gaussian (Poisson, Bernoulli, Student's t, ...) the
    conditional mean and variance are matched; the notes of the posterior say so.

    Where the step is linear and Gaussian this tends to the Kalman filter as the members grow in number, with errors of the
    order of one over their square root, and a bias in the evidence of the order of one over their number; elsewhere to
    something else than the truth. Its ``standard_error`` is NaN, since one run cannot tell. Everything but the step itself is
    computed in float64.

    :param model: a declared model; its carried state is made of real numbers.
    :param int num_members: members of each sequence's ensemble; more than there are entries in the state.

    Source: Evensen, *Sequential data assimilation with a nonlinear quasi-geostrophic model using Monte Carlo methods to
    forecast error statistics*, 1994.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Lorenz96(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(torch.full((8,), 8.0), 1.0).to_event(1))
        ...     def transition(self, z):
        ...         slope = (z.roll(-1, -1) - z.roll(2, -1)) * z.roll(1, -1) - z + 8
        ...         return pyro.sample("z", dist.Normal(z + 0.02 * slope, 0.1).to_event(1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z[:, ::2], 1.0).to_event(1), obs=x)
        >>> x = Lorenz96().simulate([20])["x"]
        >>> seq.EnsembleKalmanFilter(Lorenz96(), num_members=50).run(x).filtered["z"].mean.shape
        torch.Size([1, 20, 8])
    """

    method = "ensemble"

    def __init__(self, model: Any, num_members: int = 100):
        super().__init__(model)
        require_count("num_members", num_members, 2)
        self.num_samples = num_members

    def _begin(self, state: Tensor, packed: Packed, layout: Layout) -> _Ensembles:
        return _Ensembles(packed, layout, state[:, None].expand(-1, self.num_samples, -1))

    def _step(self, step: NoisyStep, passes: _Ensembles) -> State:
        n, s = step.frame.rows, step.state_width
        state = passes.state[:n]
        noise = torch.randn(n, self.num_samples, step.noise_width, dtype=state.dtype, device=state.device)
        ran = step(torch.cat([state, noise], -1))
        members = torch.cat([state, ran.latents, ran.filled], -1)
        moved, evidence, gain, failed = self._analyse(members, ran.mean, ran.covariance, ran.value, ran.present)
        z = slice(s, s + step.layout.latent_width)
        data = ran.mean.var(1) + ran.covariance.mean(1).diagonal(dim1=-2, dim2=-1)
        passes.told = told(passes.told, gain[:, z], members[..., z].var(1), data, ran.present)
        sites = ", ".join(repr(name) for name in step.layout.observed)
        refuse(failed | ~evidence.isfinite(), step, f"the predictive covariance of site {sites}",
               "give the emission a positive scale, and look for a state that has diverged")
        where = step.selected(ran)
        passes.evidences.append(evidence)
        passes.steps.append(_Step(moved, step.next_state(moved) if where is None else moved[..., where], s))
        return ran.after

    def _analyse(self, members: Tensor, means: Tensor, noise: Tensor, value: Tensor, present: Tensor
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Move the members ``(n, N, W)`` towards the frame."""
        both = torch.cat([members, means], -1)
        root, failed = semidefinite_root(noise.flatten(0, 1))
        seen = means + (root.reshape(noise.shape) @ torch.randn_like(means)[..., None])[..., 0]
        found = condition(both.mean(1), _covariance(both, both), noise.mean(1), value, present)
        residual = torch.where(present[:, None], value[:, None] - seen, 0.0)
        return (members + residual @ found.gain.mT, found.log_density, found.gain,
                found.failed | failed.reshape(len(members), -1).any(-1))


class _Step(NamedTuple):
    """An ensemble after one step, ``(n, N, ...)`` each."""

    members: Tensor
    """(state before, latents, gaps that the state reads) given the data so far."""
    state: Tensor
    """The next state given the same data."""
    state_width: int


class _Ensembles:
    """The steps of an ensemble filter, and the backward pass through them."""

    def __init__(self, packed: Packed, layout: Layout, start: Tensor):
        self.packed, self.layout, self.start = packed, layout, start
        self.evidences: list[Tensor] = []
        self.steps: list[_Step] = []
        self.like: State = None
        self.told: Tensor | None = None

    @property
    def state(self) -> Tensor:
        return self.steps[-1].state if self.steps else self.start

    def filtered(self) -> list[tuple[Tensor, Tensor]]:
        return [self._moments(self._latents(step, step.members)) for step in self.steps]

    def smoothed(self) -> list[tuple[Tensor, Tensor]]:
        return [self._moments(latents) for latents in self._smoothed_members()]

    def paths(self, num_samples: int) -> list[Tensor]:
        members = self._smoothed_members()
        batch, count = members[0].shape[:2]
        chosen = torch.randint(count, (batch, num_samples, 1), device=members[0].device)
        return [latents.gather(1, chosen[:len(latents)].expand(-1, -1, latents.shape[-1])) for latents in members]

    def final_state(self, num_samples: int) -> State:
        state = at_the_ends([step.state for step in self.steps], self.packed)
        chosen = torch.randint(state.shape[1], (len(state), num_samples, 1), device=state.device)
        return unflatten_state(state.gather(1, chosen.expand(-1, -1, state.shape[-1])).flatten(0, 1), self.like)

    def _smoothed_members(self) -> list[Tensor]:
        found, after = [], None
        for step in reversed(self.steps):
            members = step.members
            if after is not None:
                n = len(after)
                state = step.state[:n]
                gain = _covariance(members[:n], state) @ semidefinite_inverse(_covariance(state, state))
                members = torch.cat([members[:n] + (after - state) @ gain.mT, members[n:]])
            found.append(self._latents(step, members))
            after = members[..., :step.state_width]
        return found[::-1]

    def _latents(self, step: _Step, members: Tensor) -> Tensor:
        return members[..., step.state_width:step.state_width + self.layout.latent_width]

    @staticmethod
    def _moments(members: Tensor) -> tuple[Tensor, Tensor]:
        return members.mean(1), members.var(1)


def _covariance(first: Tensor, second: Tensor) -> Tensor:
    """``(n, V, W)`` of ensembles ``(n, N, V)`` and ``(n, N, W)``."""
    return (first - first.mean(1, keepdim=True)).mT @ (second - second.mean(1, keepdim=True)) / (first.shape[1] - 1)
