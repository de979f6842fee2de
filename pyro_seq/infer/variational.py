"""The posterior of a trained guide."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.loop import forward
from pyro_seq.engine.padded import pad_rows
from pyro_seq.engine.state import State, map_state
from pyro_seq.infer.posterior import LOWER_BOUND, Draws, Moments, Posterior
from pyro_seq.infer.run import Stopwatch, entered, refuse_scaled
from pyro_seq.module import require_count, require_guide, require_model
from pyro_seq.sequences import Sequences

__all__ = ["Variational"]


class Variational:
    r"""What a sequential guide, trained by SVI, says: the weighted loop with nothing between the steps.

    :param model: a declared model.
    :param guide: a sequential guide for it.
    :param int num_samples: trajectories drawn a sequence.
    :param str bound: ``"elbo"``, the mean log weight, or ``"iwae"``, the log mean weight of all samples together
        (Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, 2016). Both are lower bounds in
        expectation.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class LocalLevel(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 0.1))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> model = LocalLevel()
        >>> posterior = seq.Variational(model, seq.FilteringGuide(model)).run(torch.zeros(2, 10))
        >>> posterior.kind
        'lower bound (ELBO)'
    """

    def __init__(self, model: Any, guide: Any, *, num_samples: int = 1000, bound: str = "elbo"):
        require_model(model, "Variational")
        require_guide(guide, model, "Variational")
        require_count("num_samples", num_samples, 2)
        if bound not in ("elbo", "iwae"):
            raise ValueError(f"bound={bound!r}; it is 'elbo' or 'iwae'")
        self.model, self.guide, self.num_samples, self.bound = model, guide, num_samples, bound

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Posterior:
        """Draw from the guide and weigh; the arguments are those of :class:`~pyro_seq.ParticleFilter`."""
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return entered(self.model, self.guide, sequences, lambda values: self._run(sequences, values, watch))

    def _run(self, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        packed, count = sequences.packed, self.num_samples
        values: dict[str, list[Tensor]] = {}
        ended: list[State] = []
        weights: list[Tensor] = []
        last: Any = None
        for step in forward(self.model, self.guide, sequences, count):
            refuse_scaled(self.model, step)
            running = step.log_weights.shape[0]
            if last is not None and running < last.log_weights.shape[0]:
                ended.insert(0, map_state(lambda leaf, n=running: leaf[n * count:], last.state))
                weights.insert(0, last.log_weights[running:])
            for name, site in step.sites.items():
                if not site.observed:
                    values.setdefault(name, []).append(site.value)
            last = step
        ended.insert(0, last.state)
        weights.insert(0, last.log_weights)
        log_weights = packed.unsort(torch.cat(weights))
        if not log_weights.isfinite().all():
            bad = int((~log_weights.isfinite()).any(-1).nonzero()[0])
            raise ValueError(f"a log weight of sequence {bad} is not finite: the guide draws values where the model's or its "
                             "own density is zero, infinite or NaN")
        if self.bound == "elbo":
            evidence, error = log_weights.mean(-1), log_weights.std(-1) / math.sqrt(count)
        else:
            evidence = log_weights.logsumexp(-1) - math.log(count)
            error = (log_weights - evidence[:, None]).exp().std(-1) / math.sqrt(count)
        paths = {name: pad_rows(parts, packed.counts, packed, count) for name, parts in values.items()}
        moments = {name: Moments(value.to(log_weights.dtype).mean(2), value.to(log_weights.dtype).var(2))
                   for name, value in paths.items()}
        smooths = self.guide.reads_future
        grows = self.model.state_grows
        states = None if grows else map_state(lambda *parts: torch.cat(parts), *ended)
        states = map_state(lambda leaf: packed.unsort(leaf.reshape(-1, count, *leaf.shape[1:])), states)

        def final_state(num_samples: int) -> State:
            index = torch.randint(count, (sequences.num_sequences, num_samples), device=sequences.device)
            row = torch.arange(sequences.num_sequences, device=sequences.device)[:, None]
            return map_state(lambda leaf: leaf[row, index].flatten(0, 1), states)

        def draws(num_samples: int) -> dict[str, Tensor]:
            index = torch.randint(count, (num_samples,), device=sequences.device)
            return {name: value[:, :, index].movedim(2, 0) for name, value in paths.items()}

        def quantile(site: str, q: Any) -> Tensor:
            return Draws({site: paths[site].movedim(2, 0)}, sequences.lengths).quantile(site, q)

        return Posterior(
            method=type(self.guide).__name__, kind=f"{LOWER_BOUND} ({self.bound.upper()})", log_evidence=evidence,
            standard_error=error, sequences=sequences, seconds=watch.seconds, num_samples=count,
            filtered={} if smooths else moments, smoothed=moments if smooths else {}, parameters=parameters,
            final_state=None if grows else final_state, paths=draws, cloud=quantile,
            model=self.model, notes=("moments are of the guide's samples, not reweighted",))
