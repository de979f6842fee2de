"""Evidence of a linear-Gaussian model by a parallel scan over time, through ``pyro.ops.gaussian``."""

from __future__ import annotations

import math

import torch
from pyro.ops.gaussian import Gaussian, mvn_to_gaussian, sequential_gaussian_tensordot
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_seq.infer.linear import LinearStep
from pyro_seq.infer.linear_gaussian import StepJoint

__all__ = ["scan_evidence"]


def scan_evidence(first: LinearStep, later: LinearStep | None, data: Tensor, start: Tensor) -> Tensor:
    """``(B,)``: each frame is a Gaussian factor of the states before and after it, multiplied in ``log T`` rounds.

    :param data: ``(B, T, X)``, NaN where missing or past the end.
    :param start: ``(B, S)``: the state before the first frame.

    Source: Särkkä and García-Fernández, *Temporal Parallelization of Bayesian Smoothers*, 2021.
    """
    if first.diffuse.shape[-1]:
        raise ValueError("parallel=True needs a proper first state, and a latent is ImproperUniform: use parallel=False")
    noise = [step.noise.detach().diagonal(dim1=-2, dim2=-1) for step in (first, later) if step is not None]
    largest = max(float(data.nan_to_num().square().max()), *(float(v.max()) for v in noise))
    smallest = min(float(v[v > 0].min()) for v in noise)
    if largest > 1e10 * smallest:
        raise ValueError(f"parallel=True multiplies densities by their precisions, and would lose most digits where squared "
                         f"data and variances go from {smallest:.1e} to {largest:.1e}: use parallel=False, or scale the data")
    absent = 0.5 * math.log(2 * math.pi) * data.isnan().sum((1, 2))
    matrix, loc, factor = _factors(first, data[:, :1])
    opening = _gaussian((matrix[:, 0] @ start[..., None])[..., 0] + loc[:, 0], factor[:, 0])
    opening = opening.condition(data[:, 0].nan_to_num(0.0))
    if later is None:
        return opening.event_logsumexp() + absent
    matrix, loc, factor = _factors(later, data[:, 1:])
    own = _gaussian(loc, factor)
    cross = -matrix.mT @ own.precision
    joint = Gaussian(  # of (state before, state after, data): a density of the last two given the first
        own.log_normalizer, torch.cat([-(matrix.mT @ own.info_vec[..., None])[..., 0], own.info_vec], -1),
        torch.cat([torch.cat([-cross @ matrix, cross], -1), torch.cat([cross.mT, own.precision], -1)], -2))
    product = sequential_gaussian_tensordot(joint.condition(data[:, 1:].nan_to_num(0.0)))
    return (opening.event_pad(right=opening.dim()) + product).event_logsumexp() + absent


def _factors(step: LinearStep, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix, offset and Cholesky factor of (state after, data) given the state before, each ``(B, T, ...)``.

    A missing entry becomes a standard normal of its own, observed at zero.
    """
    joint = StepJoint.of(step, data.dtype)
    matrix, offset, noise = (v.transpose(0, 1).expand(*data.shape[:2], *v.shape[2:]) for v in joint[:3])
    after = offset.shape[-1] - data.shape[-1]
    present = torch.cat([torch.ones_like(offset[..., :after], dtype=torch.bool), ~data.isnan()], -1)
    noise = torch.where(present[..., :, None] & present[..., None, :], noise, torch.diag_embed((~present).to(noise)))
    factor, failed = torch.linalg.cholesky_ex(noise)
    if failed.any():
        raise ValueError("parallel=True needs noise of full rank, and some of the model's states or data have no noise of "
                         "their own: use parallel=False")
    return torch.where(present[..., None], matrix, 0.0), torch.where(present, offset, 0.0), factor


def _gaussian(loc: Tensor, factor: Tensor) -> Gaussian:
    return mvn_to_gaussian(MultivariateNormal(loc, scale_tril=factor))
