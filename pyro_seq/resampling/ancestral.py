"""Resampling by ancestors: particles are copied, and weights make up for the chances with which they were."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_seq.engine.state import State
from pyro_seq.engine.weights import Weights
from pyro_seq.resampling.base import Resampler
from pyro_seq.resampling.checks import ancestors_of
from pyro_seq.resampling.inversion import multinomial, residual, stratified, systematic
from pyro_seq.resampling.metropolis import Metropolis

__all__ = ["SCHEMES", "Ancestral", "Scheme", "Soft", "StopGradient"]

Scheme = Callable[[Tensor], Tensor]
"""From probabilities ``(n, N)`` of sum one to ancestors ``(n, N)``, of which each particle is ``N`` times its probability on
average; or nearly, if the scheme has an attribute ``unbiased = False``. A function of one's own that is unbiased says so by
``unbiased = True``; where it says nothing, evidence estimates are called unbiased on that condition."""

SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial, "stratified": stratified, "systematic": systematic, "residual": residual,
    "metropolis": Metropolis()}


class Ancestral(Resampler):
    """Resampling by ancestors alone. Weights are one afterwards; gradients do not reach those before.

    :param scheme: a name (``'multinomial'``, ``'stratified'``, ``'systematic'``, ``'residual'``, ``'metropolis'``) or a
        function from probabilities ``(n, N)`` of sum one to ancestors ``(n, N)``, of which each particle is ``N`` times its
        probability on average.

    Example::

        >>> import torch
        >>> from pyro_seq.engine.weights import Weights
        >>> ancestors, log_weights = Ancestral("systematic")(Weights.of(torch.tensor([[0.0, -99.0, 0.0, -99.0]])), None)
        >>> ancestors, log_weights
        (tensor([[0, 0, 2, 2]]), tensor([[0., 0., 0., 0.]]))
    """

    def __init__(self, scheme: str | Scheme = "systematic"):
        self.scheme = find_scheme(scheme)
        self.unbiased = getattr(self.scheme, "unbiased", None)

    def __call__(self, weights: Weights, state: State, look_ahead: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_chances = self.log_chances(weights, look_ahead)
        if log_chances is None:
            return ancestors_of(self.scheme, weights.normalised.detach()), torch.zeros_like(weights.log)
        # Weights make up for how much likelier the ancestors should have been.
        ancestors = ancestors_of(self.scheme, log_chances.detach().exp())
        chances = log_chances.gather(-1, ancestors)
        log_normalised = weights.log - weights.log_mean[:, None] - math.log(ancestors.shape[-1])
        # A biased scheme can be left with a particle that had no chance, for which no weight makes up.
        return ancestors, (log_normalised.gather(-1, ancestors) - chances).masked_fill(chances == -torch.inf, -torch.inf)

    def log_chances(self, weights: Weights, look_ahead: Tensor | None = None) -> Tensor | None:
        return None if look_ahead is None else _favoured(weights, look_ahead)


class Soft(Ancestral):
    r"""Soft resampling: ancestors are drawn from a mixture of the weights and the uniform distribution.

    With the chances :math:`c = \alpha W + (1 - \alpha) / N`, an ancestor a goes on with weight :math:`W^a / c^a`. The evidence
    stays unbiased, and gradients reach the weights before. They are biased: that the ancestors themselves depend on the weights
    is left out of them.

    :param float alpha: between 0 and 1.
    :param scheme: as for :class:`Ancestral`.

    Source: Karkus, Hsu and Lee, *Particle filter networks with application to visual localization*, 2018.

    Example::

        >>> import torch
        >>> from pyro_seq.engine.weights import Weights
        >>> ancestors, log_weights = Soft(0.5)(Weights.of(torch.tensor([[0.6, 0.2, 0.1, 0.1]]).log()), None)
        >>> ancestors.shape, log_weights.exp().max() < 2
        (torch.Size([1, 4]), tensor(True))
    """

    differentiable = True

    def __init__(self, alpha: float = 0.5, scheme: str | Scheme = "systematic"):
        super().__init__(scheme)
        if not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha!r}; it is the share of the weights in the chances, between 0 and 1 "
                             "(at 1 they are all of it: use Ancestral)")
        self.alpha = alpha

    def log_chances(self, weights: Weights, look_ahead: Tensor | None = None) -> Tensor:
        chances = weights.normalised if look_ahead is None else _favoured(weights, look_ahead).exp()
        return (self.alpha * chances + (1 - self.alpha) / chances.shape[-1]).log()


class StopGradient(Ancestral):
    r"""Resampling by ancestors whose weights are one, with the gradient of their logarithm.

    An ancestor a goes on with weight :math:`W^a / \bot(W^a)`, where :math:`\bot` stops gradients. Nothing changes but the
    gradient, to which the weights now add the score of the choice: that of an evidence estimate is an unbiased estimate of
    the evidence's gradient, if the particles are reparameterised or proposed by a guide that does not depend on what is
    differentiated. Its variance is that of a score.

    :param scheme: as for :class:`Ancestral`.

    Source: Ścibior and Wood, *Differentiable particle filtering without modifying the forward pass*, 2021.

    Example::

        >>> import torch
        >>> from pyro_seq.engine.weights import Weights
        >>> log = torch.tensor([[0.6, 0.4]]).log().requires_grad_()
        >>> ancestors, log_weights = StopGradient()(Weights.of(log), None)
        >>> bool((log_weights == 0).all()), log_weights.requires_grad
        (True, True)
    """

    differentiable = True

    def __init__(self, scheme: str | Scheme = "systematic"):
        super().__init__(scheme)
        self.unbiased_gradient = bool(self.unbiased)

    def log_chances(self, weights: Weights, look_ahead: Tensor | None = None) -> Tensor:
        return (weights.log.log_softmax(-1) if look_ahead is None else _favoured(weights, look_ahead)).detach()


def find_scheme(scheme: str | Scheme) -> Scheme:
    """A scheme by its name, or itself.

    :raises ValueError: if there is none of that name.
    :raises TypeError: if it is a resampler, or cannot be called.
    """
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise ValueError(f"no scheme {scheme!r}; there are {sorted(SCHEMES)}")
        return SCHEMES[scheme]
    if isinstance(scheme, (Resampler, type)) or not callable(scheme):
        raise TypeError(f"scheme={scheme!r}; it is one of {sorted(SCHEMES)}, or a function from probabilities (n, N) to "
                        "ancestors (n, N)")
    return scheme


def _favoured(weights: Weights, look_ahead: Tensor) -> Tensor:
    return (weights.log + look_ahead).log_softmax(-1)
