"""What a guide does at each step: how much of the frame it explains, and what that costs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.loop import Step, forward
from pyro_seq.engine.padded import pad_rows
from pyro_seq.engine.score import stepwise_terms
from pyro_seq.infer.run import entered, refuse_scaled
from pyro_seq.module import require_count, require_guide, require_model
from pyro_seq.sequences import Sequences

__all__ = ["ElboByStep", "elbo_by_step", "reconstruct"]


class ElboByStep(NamedTuple):
    """The two parts of the evidence lower bound at each step, zero past a sequence's end."""

    reconstruction: Tensor
    """``(B, T)`` nats: E_q log p(x_t | z_t, ...), summed over the observed sites."""
    kl: Tensor
    """``(B, T)`` nats: E_q KL(q(z_t) || p(z_t)) given the past that the guide drew, summed over the latent sites."""
    lengths: Tensor
    """``(B,)``"""


def elbo_by_step(model: Any, guide: Any, data: Any, *, num_samples: int = 10, seed: int = 0) -> ElboByStep:
    """The evidence lower bound taken apart: reconstruction minus KL, at each step of each sequence.

    Their sum is the bound that :class:`~pyro_seq.SequentialELBO` and the ELBO of :func:`~pyro_seq.evaluate` estimate. The KL of
    one step is in closed form where that is known, and the guide's own samples estimate the rest. A guide whose latents say
    nothing has a KL near zero at every step.

    :param model: a declared model; it and the guide are run in evaluation mode.
    :param guide: a sequential guide for it.
    :param data: as accepted by :meth:`pyro_seq.Sequences.of`.
    :param int num_samples: trajectories a sequence, averaged.
    :param int seed: of the noise; torch's own generator is left as it was.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import VRNN, VRNNInference
        >>> model = VRNN(observed=4, latent=2, hidden=4)
        >>> parts = seq.elbo_by_step(model, VRNNInference(model), model.simulate([5, 8])["x"])
        >>> parts.kl.shape, bool((parts.kl >= 0).all())
        (torch.Size([2, 8]), True)
    """
    def read(step: Step) -> dict[str, Tensor]:
        zeros = torch.zeros(step.frame.rows, dtype=step.log_weights.dtype, device=step.frame.device)
        found = {"reconstruction": zeros, "kl": zeros}
        for term in stepwise_terms(model, [step], analytic_kl=True):
            if term.observed:
                found["reconstruction"] = found["reconstruction"] + term.log_p
            elif term.log_q is not None:  # a latent drawn from the model itself costs nothing
                found["kl"] = found["kl"] + (term.log_q - term.log_p if term.kl is None else term.kl)
        return found

    sequences = Sequences.of(data)
    return ElboByStep(**_averaged(model, guide, sequences, num_samples, seed, read, "elbo_by_step"), lengths=sequences.lengths)


def reconstruct(model: Any, guide: Any, data: Any, *, num_samples: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """The mean of each observed site given the latents that the guide draws, averaged over the draws.

    For binary frames these are probabilities. It is no forecast: the guide has seen the frame that is reconstructed, and a
    smoothing guide those after it. :meth:`Posterior.predict` looks ahead.

    :param data: as accepted by :meth:`pyro_seq.Sequences.of`; the other parameters are those of :func:`elbo_by_step`.
    :returns: by site, ``(B, T, ...)``, zero past a sequence's end.
    :raises ValueError: if a site's distribution has no mean, as a categorical one.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import VRNN, VRNNInference
        >>> model = VRNN(observed=4, latent=2, hidden=4)
        >>> seq.reconstruct(model, VRNNInference(model), model.simulate([5, 8])["x"])["x"].shape
        torch.Size([2, 8, 4])
    """
    def read(step: Step) -> dict[str, Tensor]:
        found = {}
        for name, site in step.sites.items():
            if site.observed and site.p.event_shape != (0,):  # not a pyro.factor
                try:
                    found[name] = site.p.mean
                except NotImplementedError:
                    found[name] = torch.full_like(site.value, torch.nan, dtype=step.log_weights.dtype)
                if found[name].isnan().any():
                    raise ValueError(f"site {name!r} is {type(site.p).__name__}, which has no mean to reconstruct by: draw "
                                     "trajectories of the latents from seq.Variational(model, guide).run(x) instead")
        return found

    return _averaged(model, guide, Sequences.of(data), num_samples, seed, read, "reconstruct")


def _averaged(model: Any, guide: Any, sequences: Sequences, num_samples: int, seed: int,
              read: Callable[[Step], dict[str, Tensor]], who: str) -> dict[str, Tensor]:
    """``(B, T, ...)`` of what is read of each step, ``(rows, ...)``, averaged over the samples of a sequence."""
    require_model(model, who)
    require_guide(guide, model, who)
    require_count("num_samples", num_samples, 1)
    found: dict[str, list[Tensor]] = {}

    def run(_: Any) -> None:
        for step in forward(model, guide, sequences, num_samples):
            refuse_scaled(model, step)
            for name, value in read(step).items():
                found.setdefault(name, []).append(value.unflatten(0, (-1, num_samples)).mean(1))

    modes = model.training, guide.training
    model.eval(), guide.eval()
    try:
        with torch.random.fork_rng([sequences.device] if sequences.device.type == "cuda" else []):
            torch.manual_seed(seed)
            entered(model, guide, sequences, run)
    finally:
        model.train(modes[0]), guide.train(modes[1])
    return {name: pad_rows(values, sequences.packed.counts, sequences.packed) for name, values in found.items()}
