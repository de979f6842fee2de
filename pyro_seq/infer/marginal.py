"""A declared model with its states summed out: an ordinary Pyro model of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_seq.infer.linear import NotLinear
from pyro_seq.infer.posterior import Draws
from pyro_seq.module import require_model
from pyro_seq.sequences import Sequences

__all__ = ["Marginal", "require_exact", "unchecked"]


class Marginal:
    r"""The Pyro model :math:`p(\theta) \, p(x \mid \theta)`, in which the states do not appear.

    Called as ``Marginal(method)(x, lengths)`` it draws the model's global parameters (``PyroSample``, under the names they
    have in the model), registers its parameters, and adds the exact log evidence as ``pyro.factor("log_evidence", ...)``.
    So NUTS, SVI with an autoguide, Predictive and ``poutine.condition`` work on the parameters alone, in a space whose
    dimension does not grow with the data.

    Whether the step is linear is checked at calls 1, 2, 8, 32, ... with data of each shape, since it can be linear at some
    parameters and not at others (a coefficient of zero). At parameter values where the evidence cannot be computed (a scale
    that has overflown, say), after a call in which it could, it is taken to be zero, so that a sampler turns back.

    :param method: what computes the evidence: :class:`~pyro_seq.KalmanFilter`, :class:`~pyro_seq.ForwardBackward`, or any
        object with ``log_evidence`` and ``model``.

    Source: Andrieu, Doucet and Holenstein, *Particle Markov chain Monte Carlo methods*, 2010, section 2.4 (the marginal
    sampler that particle methods approximate); Durbin and Koopman, *Time Series Analysis by State Space Methods*, 2012,
    section 13.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> import pyro_seq as seq
        >>> class Level(seq.StateSpaceModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, self.scale))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> marginal = seq.Marginal(seq.KalmanFilter(Level()))
        >>> mcmc = MCMC(NUTS(marginal), num_samples=5, warmup_steps=5, disable_progbar=True)
        >>> x = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
        >>> mcmc.run(x)
        >>> mcmc.get_samples()["scale"].shape
        torch.Size([5])
        >>> marginal.states(mcmc.get_samples(), x).samples["z"].shape
        torch.Size([5, 1, 4])
    """

    def __init__(self, method: Any):
        require_exact(method, "Marginal")
        self.method, self.model = method, method.model
        self._unchecked = unchecked(method)
        self._calls: dict[Any, int] = {}

    def __call__(self, x: Any, lengths: Any = None, *, mask: Any = None, plate_size: int | None = None,
                 **covariates: Any) -> Tensor:
        """The Pyro program.

        :param plate_size: sequences in the whole data set when ``x`` is a mini-batch; the evidence is scaled by
            ``plate_size / B``.
        :returns: ``(B,)`` log evidence of each sequence given the parameters of this call.
        """
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        if not sequences.x:
            raise ValueError("Marginal needs data, and none was given: with the states summed out there is nothing to "
                             "simulate; call the model itself, model(lengths=[...])")
        batch = sequences.num_sequences
        if plate_size is not None and plate_size < batch:
            raise ValueError(f"plate_size={plate_size} is smaller than the batch of {batch} sequences: it is the number of "
                             "sequences in the whole data set")

        def program() -> Tensor:
            found = self._evidence(sequences)
            pyro.factor("log_evidence", found.sum() * (1.0 if plate_size is None else plate_size / batch))
            return found

        return self.model.within(program)

    def states(self, samples: Mapping[str, Tensor], x: Any, lengths: Any = None, *, mask: Any = None,
               **covariates: Any) -> Draws:
        """States given the data, the parameters integrated out: one path for each draw of the parameters.

        :param samples: ``(S, ...)`` draws by global site, as ``MCMC.get_samples()`` or ``Predictive`` gives them.
        :returns: ``(S, B, T, ...)`` of every latent site, zero past a sequence's end.
        """
        sites = self.model.global_sites()
        if missing := sorted(set(sites) - set(samples)):
            raise ValueError(f"samples has no draws of the global parameters {missing}: it holds {sorted(samples)}")
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        found = []
        for i in range(len(next(iter(samples.values())))):
            with poutine.condition(data={name: samples[name][i] for name in sites}):
                method = self.method if _due(i + 1) else self._unchecked
                found.append(method.run(sequences).trajectories(1))
        return Draws({name: torch.cat([draw.samples[name] for draw in found]) for name in found[0].samples}, found[0].times)

    def _evidence(self, sequences: Sequences) -> Tensor:
        shape = tuple((name, value.shape) for name, value in {**sequences.x, **sequences.covariates}.items())
        calls, quiet = self._calls.get(shape, 0), not torch.is_grad_enabled()
        try:
            with torch.enable_grad():  # under which the method takes the values of this call
                found = (self.method if _due(calls + 1) else self._unchecked).log_evidence(sequences)
        except ValueError as error:
            if not calls or isinstance(error, NotLinear):
                raise
            return torch.full((sequences.num_sequences,), -torch.inf, device=sequences.device)
        self._calls[shape] = calls + 1
        return found.detach() if quiet else found


def _due(call: int) -> bool:
    """Whether a call checks the step: 1, 2, 8, 32, ..."""
    return call == 1 or call & (call - 1) == 0 and call.bit_length() % 2 == 0


def require_exact(method: Any, who: str) -> None:
    """Raise unless ``method`` computes the evidence of a declared model exactly, with gradients."""
    if isinstance(method, type):
        raise TypeError(f"{who} takes a method, not the class {method.__name__}: make one, {method.__name__}(model)")
    if hasattr(method, "apply") and hasattr(method, "within"):
        raise TypeError(f"{who} takes a method that computes the evidence, not a model: KalmanFilter(model) or "
                        "ForwardBackward(model)")
    if not hasattr(method, "log_evidence") or not hasattr(method, "model"):
        raise TypeError(f"{who} takes a method with an exact log_evidence, such as KalmanFilter(model) or "
                        f"ForwardBackward(model), not {type(method).__name__}")
    require_model(method.model, type(method).__name__)


def unchecked(method: Any) -> Any:
    """The same method without the test of linearity, for use after a call that passed it."""
    if not hasattr(method, "assume_linear"):
        return method
    found = copy.copy(method)
    found.assume_linear = True
    return found
