"""How well a trained model and guide predict: nats per frame, in a stated protocol."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_seq.engine.loop import forward
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.likelihood import ExactLikelihood, reads_gaps
from pyro_seq.infer.particle_filter import ParticleFilter
from pyro_seq.infer.run import entered, refuse_scaled
from pyro_seq.module import require_count, require_guide, require_model
from pyro_seq.sequences import Sequences

__all__ = ["evaluate"]


def evaluate(model: Any, guide: Any, data: Any, *, num_samples: int = 10, num_particles: int = 128, batch_rows: int = 2000,
             seed: int = 0, progress: bool = False) -> pd.DataFrame:
    r"""Negative log likelihood of the data, in nats per frame, exact or bounded in two ways; lower is better.

    Every frame is scored, the first from an empty past, and padding is not. A model without latents has one row,
    ``log likelihood``: it is exact (:class:`~pyro_seq.ExactLikelihood`), and nothing is drawn. Else a row a bound:

    * ``ELBO``: the mean log weight of ``num_samples`` draws from the guide;
    * ``particle bound``: minus the mean log evidence of a particle filter with the guide as its proposal, resampling when the
      effective sample size falls below half (Maddison et al., *Filtering Variational Objectives*, 2017). A guide that reads the
      future is as valid a proposal.

    Both are upper bounds of the negative log likelihood in expectation, and of a model without latents, too, where data is
    missing that it reads. The columns weigh differently:

    * ``nats per frame``: the sum over all frames by the number of frames, the headline;
    * ``by sequence``: the mean over sequences of their own averages;
    * ``skip first``: the first frame of each sequence left out of sum and count;
    * ``standard error``: of the headline, from the noise of the draws alone; NaN where that is not known, or nothing is drawn.

    :param data: as accepted by :meth:`pyro_seq.Sequences.of`.
    :param int num_samples: draws of the ELBO.
    :param int num_particles: of the filter; 0 leaves its row out.
    :param int batch_rows: rows (sequences times samples) that are run at once.
    :param int seed: of the noise; torch's own generator is left as it was.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import VRNN, VRNNInference
        >>> model = VRNN(observed=4, latent=2, hidden=4)
        >>> table = seq.evaluate(model, VRNNInference(model), model.simulate([5, 8])["x"], num_particles=16)
        >>> list(table.index), list(table.columns)[:3]
        (['ELBO', 'particle bound'], ['samples', 'nats per frame', 'by sequence'])
        >>> from pyro_seq.models import RecurrentNetwork
        >>> model = RecurrentNetwork(4, hidden=4)
        >>> list(seq.evaluate(model, seq.PriorGuide(model), model.simulate([5, 8])["x"]).index)
        ['log likelihood']
    """
    require_model(model, "evaluate")
    require_guide(guide, model, "evaluate")
    require_count("num_samples", num_samples, 1)
    require_count("num_particles", num_particles, 0)
    data = Sequences.of(data)
    modes = model.training, guide.training
    model.eval(), guide.eval()
    try:
        with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []):
            exact = _is_exact(model, data)
            torch.manual_seed(seed)
            rows = {"log likelihood": _likelihood(model, data, batch_rows, progress)} if exact else {
                "ELBO": _elbo(model, guide, data, num_samples, batch_rows, progress)}
            if num_particles and not exact:
                rows["particle bound"] = _particle_bound(model, guide, data, num_particles, batch_rows, progress)
    finally:
        model.train(modes[0]), guide.train(modes[1])
    return pd.DataFrame({name: _averages(*found, data.lengths) for name, found in rows.items()}).T.astype({"samples": int})


def _batches(data: Sequences, samples: int, batch_rows: int, progress: bool, what: str) -> Any:
    """Indices of sequences of like length, few enough to run together."""
    parts = data.lengths.argsort().split(max(1, batch_rows // samples))
    return tqdm(parts, disable=not progress, desc=what, unit="batch")


def _is_exact(model: Any, data: Sequences) -> bool:
    """Whether the model has no latents, and reads no data that is missing."""
    start = data.select([int(data.lengths.argmax())]).until(2)

    def latents(_: Any) -> bool:
        return any(not site.observed for step in forward(model, PriorGuide(model), start, score=False)
                   for site in step.sites.values())

    return not (model.global_sites() or reads_gaps(model, data) or entered(model, None, start, latents))


def _likelihood(model: Any, data: Sequences, batch_rows: int, progress: bool) -> tuple[int, Tensor, Tensor, Tensor]:
    total, first = (torch.zeros(data.num_sequences, dtype=torch.double) for _ in range(2))
    for index in _batches(data, 1, batch_rows, progress, "log likelihood"):
        by_step = ExactLikelihood(model).run(data.select(index)).log_evidence_by_step.double().cpu()
        total[index.cpu()], first[index.cpu()] = by_step.sum(1), by_step[:, 0]
    return 0, total, first, torch.full_like(total, torch.nan)


def _elbo(model: Any, guide: Any, data: Sequences, samples: int, batch_rows: int, progress: bool
          ) -> tuple[int, Tensor, Tensor, Tensor]:
    """``(samples, bounds (B,), those of the first frames (B,), their variances (B,))``."""
    total, first, variance = (torch.zeros(data.num_sequences, dtype=torch.double) for _ in range(3))
    for index in _batches(data, samples, batch_rows, progress, "ELBO"):
        part = data.select(index)
        weights, begun = entered(model, guide, part, lambda _, part=part: _final_log_weights(model, guide, part, samples))
        total[index.cpu()], first[index.cpu()] = weights.mean(-1), begun.mean(-1)
        variance[index.cpu()] = weights.var(-1) / samples if samples > 1 else torch.nan
    return samples, total, first, variance


def _final_log_weights(model: Any, guide: Any, sequences: Sequences, samples: int) -> tuple[Tensor, Tensor]:
    """``(B, N)`` log weights of whole sequences and of their first frames, in the user's order."""
    ended, last, first = [], None, None
    for step in forward(model, guide, sequences, samples):
        refuse_scaled(model, step)
        weights = step.log_weights.double().cpu()
        first = weights if first is None else first
        if last is not None and len(weights) < len(last):
            ended.insert(0, last[len(weights):])
        last = weights
    order = sequences.packed.inverse.cpu() if (sequences.lengths < sequences.num_steps).any() else slice(None)
    return torch.cat([last, *ended])[order], first[order]


def _particle_bound(model: Any, guide: Any, data: Sequences, particles: int, batch_rows: int, progress: bool
                    ) -> tuple[int, Tensor, Tensor, Tensor]:
    total, first = (torch.zeros(data.num_sequences, dtype=torch.double) for _ in range(2))
    method = ParticleFilter(model, particles, guide=guide)
    for index in _batches(data, particles, batch_rows, progress, "particle bound"):
        posterior = method.run(data.select(index))
        total[index.cpu()] = posterior.log_evidence.double().cpu()
        first[index.cpu()] = posterior.log_evidence_by_step[:, 0].double().cpu()
    return particles, total, first, torch.full_like(total, torch.nan)


def _averages(samples: int, total: Tensor, first: Tensor, variance: Tensor, lengths: Tensor) -> dict[str, float]:
    lengths = lengths.cpu().double()
    frames, later = lengths.sum(), (lengths - 1).sum()
    return {"samples": samples, "nats per frame": -float(total.sum() / frames), "by sequence": -float((total / lengths).mean()),
            "skip first": -float((total - first).sum() / later) if later > 0 else math.nan,
            "standard error": math.sqrt(float(variance.sum())) / float(frames)}
