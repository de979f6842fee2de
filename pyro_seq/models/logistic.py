"""A mixture of logistic distributions on the whole numbers below a bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

__all__ = ["DiscretisedLogisticMixture"]


class DiscretisedLogisticMixture(TorchDistribution):
    r"""A mixture of logistics, rounded to the whole numbers :math:`0, \dots, L - 1`; the outer ones take the tails.

    .. math:: P(x) = \sum_k \pi_k \left[ \sigma\!\left(\tfrac{x + 1/2 - \mu_k}{s_k}\right)
              - \sigma\!\left(\tfrac{x - 1/2 - \mu_k}{s_k}\right) \right]

    with :math:`x + 1/2 = \infty` at the last level and :math:`x - 1/2 = -\infty` at the first. Computed as
    :math:`\sigma(b) - \sigma(a) = \sigma(b) \, \sigma(-a) \, (1 - e^{a - b})`, which neither cancels nor underflows in logs.

    :param logits: ``(..., K)`` unnormalised log weights.
    :param loc: ``(..., K)`` in units of a level.
    :param scale: ``(..., K)`` positive, in units of a level.
    :param int levels: L.

    Source: Salimans, Karpathy, Chen and Kingma, *PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
    Likelihood and Other Modifications*, 2017.

    Example::

        >>> import torch
        >>> mixture = DiscretisedLogisticMixture(torch.zeros(2), torch.tensor([3.0, 10.0]), torch.tensor([0.5, 2.0]), levels=16)
        >>> mixture.log_prob(mixture.enumerate_support()).exp().sum()
        tensor(1.0000)
    """

    arg_constraints = {"logits": constraints.real_vector, "loc": constraints.real_vector,
                       "scale": constraints.independent(constraints.positive, 1)}
    has_enumerate_support = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, levels: int, *, validate_args: bool | None = None):
        self.logits, self.loc, self.scale = torch.broadcast_tensors(logits, loc, scale)
        self.levels = levels
        super().__init__(self.logits.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = value[..., None]
        upper = logsigmoid((value + 0.5 - self.loc) / self.scale)
        lower = logsigmoid((self.loc - value + 0.5) / self.scale)
        first, last = value < 0.5, value > self.levels - 1.5
        # The factor 1 - exp(a - b) belongs to two finite borders; logsigmoid(inf) is 0.
        width = torch.where(first | last, 0.0, (-torch.expm1(-1 / self.scale)).log())
        inside = torch.where(last, 0.0, upper) + torch.where(first, 0.0, lower) + width
        return torch.logsumexp(self.logits.log_softmax(-1) + inside, -1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            weights = torch.distributions.Categorical(logits=self.logits, validate_args=False)
            which = weights.sample(torch.Size(sample_shape))[..., None]
            loc, scale = (v.expand(*shape, -1).gather(-1, which)[..., 0] for v in (self.loc, self.scale))
            uniform = torch.rand(shape, dtype=loc.dtype, device=loc.device).clamp(min=torch.finfo(loc.dtype).tiny)
            return torch.addcmul(loc, scale, uniform.logit()).round().clamp(0, self.levels - 1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = torch.arange(self.levels, dtype=self.loc.dtype, device=self.loc.device)
        values = values.reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    @property
    def mean(self) -> Tensor:
        borders = torch.arange(0.5, self.levels - 1, dtype=self.loc.dtype, device=self.loc.device)
        above = torch.sigmoid((self.loc[..., None] - borders) / self.scale[..., None]).sum(-1)
        return (self.logits.softmax(-1) * above).sum(-1)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> DiscretisedLogisticMixture:
        shape = (*batch_shape, self.logits.shape[-1])
        return DiscretisedLogisticMixture(self.logits.expand(shape), self.loc.expand(shape), self.scale.expand(shape),
                                          self.levels, validate_args=False)
