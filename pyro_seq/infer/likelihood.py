"""The exact likelihood of a model without latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_seq.engine.loop import Step, Window, forward
from pyro_seq.engine.rows import check_rows, refuse_random
from pyro_seq.engine.score import score_contexts, scores_in_one_call, stepwise_terms, terms
from pyro_seq.engine.state import State, join_states, map_state
from pyro_seq.guide import PriorGuide
from pyro_seq.infer.posterior import EXACT, Posterior
from pyro_seq.infer.run import GapRead, Stopwatch, entered, refuse_scaled
from pyro_seq.module import require_model
from pyro_seq.sequences import Packed, Sequences, repeat_rows

__all__ = ["ExactLikelihood", "reads_gaps"]


class ExactLikelihood:
    r"""The likelihood of a declared model whose only sites are its data, :math:`\prod_t p(x_t \mid x_{<t}, u_{\le t})`.

    An :class:`~pyro_seq.AutoregressiveModel` (such as :class:`~pyro_seq.models.RecurrentNetwork`) is scored without a loop over
    time; for any other the loop advances the state, and all steps are then scored in one call.

    Frames that are wholly missing at the end of a sequence cost nothing. A gap before data is exact only where the model does
    not read its data: otherwise the likelihood takes an integral over the gap, which
    :class:`~pyro_seq.ParticleFilter` estimates.

    :param model: a declared model without latents.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Autoregression(seq.SequentialModel):
        ...     def start(self, rows):
        ...         return torch.zeros(rows)
        ...     def step(self, last, x=None):
        ...         return pyro.sample("x", dist.Normal(0.9 * last, 1.0), obs=x)
        >>> posterior = seq.ExactLikelihood(Autoregression()).run(torch.tensor([1.0, 0.9]))
        >>> posterior.log_evidence_by_step
        tensor([[-1.4189, -0.9189]])
        >>> posterior.predict(horizon=3, num_samples=10).samples["x"].shape
        torch.Size([10, 1, 3])
    """

    def __init__(self, model: Any):
        require_model(model, "ExactLikelihood")
        self.model = model

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Posterior:
        """The likelihood of a batch, and by way of ``predict`` its future; the arguments are those of
        :class:`~pyro_seq.ParticleFilter`.

        :raises ValueError: if a site is latent, or data is missing that the model reads.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return entered(self.model, None, sequences, lambda values: self._run(sequences, values, watch))

    def log_evidence(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Tensor:
        """``(B,)`` nats, differentiable in the model's parameters.

        Inside ``model.within`` the parameters of that call stand.
        """
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return entered(self.model, None, sequences, lambda _: self._by_step(sequences)[0].sum(1), learning=True)

    def _run(self, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> Posterior:
        refuse_random(self.model)
        by_step, state = self._by_step(sequences)
        grows, packed = self.model.state_grows, sequences.packed
        draws = sequences.has_missing and self.model.missing_feeds_state

        def final_state(num_samples: int) -> State:
            if draws:  # the future begins after a gap
                steps = list(forward(self.model, PriorGuide(self.model), sequences, num_samples, score=False))
                return map_state(lambda leaf: packed.unsort(leaf.unflatten(0, (-1, num_samples))).flatten(0, 1),
                                 _ended(steps, packed, num_samples))
            return map_state(lambda leaf: repeat_rows(packed.unsort(leaf), num_samples), state)

        evidence = by_step.sum(1)
        return Posterior(
            method="exact likelihood", kind=EXACT, log_evidence=evidence, standard_error=torch.zeros_like(evidence),
            sequences=sequences, seconds=watch.seconds, parameters=parameters, log_evidence_by_step=by_step,
            final_state=None if grows else final_state, model=self.model)

    def _by_step(self, sequences: Sequences) -> tuple[Tensor, State]:
        """``(B, T)`` log densities, zero past a sequence's end, and the final states in packed order."""
        model, packed = self.model, sequences.packed
        model.check_inputs(sequences)
        _refuse_gaps(model, sequences)
        one_call = False
        if model.has_contexts():
            steps = [score_contexts(model, sequences, Window(1, sequences.num_steps))]
            state = steps[0].state
        else:
            one_call, steps = scores_in_one_call(model), []
            for step in forward(model, PriorGuide(model), sequences, score=not one_call):
                _refuse_latents(model, step)
                if len(steps) < 2 and not torch.is_grad_enabled():
                    check_rows(model, step.sites, step.before, step.state, step.frame, exact=True)
                steps.append(step)
            state = None if model.state_grows else _ended(steps, packed)
        found = terms(model, packed, steps, 1, False) if one_call else stepwise_terms(model, steps, False)
        refuse_scaled(model, steps[0])
        by_step = packed.unsort(packed.by_time(sum(term.log_p for term in found))[..., 0].transpose(0, 1))
        if by_step.isnan().any():
            b, t = by_step.isnan().nonzero()[0].tolist()
            raise ValueError(f"the log density of sequence {b} at time {t + 1} is not a number: look for parameters or a state "
                             f"of {type(model).__name__} that have become infinite or NaN")
        return by_step, state


def _ended(steps: list[Step], packed: Packed, num_particles: int = 1) -> State:
    """The state after each sequence's last frame, in packed order."""
    after = [*packed.counts[1:], 0]
    return join_states([map_state(lambda leaf, n=n: leaf[n * num_particles:], step.state)
                        for step, count, n in zip(steps, packed.counts, after, strict=True) if n < count][::-1])


def _refuse_latents(model: Any, step: Step) -> None:
    for name, site in step.sites.items():
        if not site.observed:
            raise ValueError(f"site {name!r} of {type(model).__name__} is latent, and the likelihood is an integral over it: "
                             "use seq.ParticleFilter for an estimate or, if all is linear and Gaussian, seq.KalmanFilter"
                             f"{f'. If {name!r} is data, pass it' if name in model.data_names() else ''}")


def reads_gaps(model: Any, sequences: Sequences) -> bool:
    """Whether data is missing that the model reads to predict what is observed."""
    return bool(_gaps(model, sequences).any())


def _gaps(model: Any, sequences: Sequences) -> Tensor:
    """``(B, T)``: frames with a gap that data follows, the frame's own included, in a model that reads its data."""
    if not sequences.has_missing or not model.missing_feeds_state:
        return torch.zeros_like(sequences.active)
    absent = [sequences.observed[name].logical_not() if name in sequences.observed else value.isnan()
              for name, value in sequences.x.items()]
    absent = torch.cat([value[:, :sequences.num_steps].reshape(*sequences.active.shape, -1) for value in absent], -1)
    data = ~absent.all(-1) & sequences.active
    followed = data.flip(1).cummax(1).values.flip(1)
    return absent.any(-1) & sequences.active & followed


def _refuse_gaps(model: Any, sequences: Sequences) -> None:
    bad = _gaps(model, sequences)
    if bad.any():
        b, t = bad.nonzero()[0].tolist()
        raise GapRead(
            f"data is missing in sequence {b} at time {t + 1}, and {type(model).__name__} reads it to predict what is observed "
            "after: the likelihood is an integral over the gap. Use seq.ParticleFilter, which draws it from the model, or "
            "leave the sequence out; if the model does not read its data, say so by missing_feeds_state = False in its class")
