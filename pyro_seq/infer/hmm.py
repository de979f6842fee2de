"""Exact inference where the latents of a declared step take finitely many values: hidden Markov models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_seq.engine.state import State, map_state
from pyro_seq.engine.support import Support, read_support
from pyro_seq.infer.chain import Passes, log_evidence, sample_paths, viterbi
from pyro_seq.infer.enumerate import read_tables
from pyro_seq.infer.posterior import EXACT, Moments, Posterior
from pyro_seq.infer.run import Stopwatch, entered
from pyro_seq.infer.stream import Stream, floating_type
from pyro_seq.module import require_model
from pyro_seq.sequences import Sequences

__all__ = ["DiscretePosterior", "ForwardBackward", "MostProbablePath"]


@dataclass(frozen=True, repr=False)
class DiscretePosterior(Posterior):
    """What :class:`~pyro_seq.ForwardBackward` returns: the probabilities beside the moments.

    A step's *joint state* numbers the product of the supports of its latent sites, in the order they are sampled.
    """

    filtered_probabilities: Mapping[str, Tensor] = field(default_factory=dict)
    """By site, ``(B, T, K_site)``: p(z_t | x_1..x_t), zero past a sequence's end."""
    smoothed_probabilities: Mapping[str, Tensor] = field(default_factory=dict)
    """By site, ``(B, T, K_site)``: p(z_t | all of x)."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """By site, ``(K_site, *event)``: the value that each entry of the above is the probability of."""
    support: Mapping[str, Tensor] = field(default_factory=dict)
    """By site, ``(K, *event)``: its value in each joint state."""
    pairs: Callable[[], Tensor] | None = field(default=None, repr=False)

    @property
    def pairwise(self) -> Tensor:
        """``(B, T - 1, K, K)`` probabilities of the joint states at t (rows) and t + 1 (columns) given all of x, zero past a
        sequence's end. Computed when asked for, since there are many."""
        return self.pairs()


class MostProbablePath(NamedTuple):
    """The latents of highest joint probability with the data."""

    sites: Mapping[str, Tensor]
    """By site, ``(B, T, *event)``, zero past a sequence's end."""
    log_prob: Tensor
    """``(B,)`` log p(x, z) of the path, in nats."""
    states: Tensor
    """``(B, T)`` the path as joint states."""


class ForwardBackward:
    r"""Exact evidence, filtered, smoothed and pairwise probabilities of a model with discrete latents.

    Any declared model whose latent sites have a finite support (Categorical, Bernoulli, several of them a step, vectors
    of independent ones) and whose state after a step is a function of that step's latents and of the data: hidden Markov
    models with emissions of any kind, transitions driven by covariates or time, Markov-switching autoregressions,
    factorial models. The step is run once on every value of the latents, which gives tables, and the rest is recursion
    over these in double precision. Missing entries are integrated out; where the model goes on to read them, which no
    finite table can express, an error says so.

    A probability of zero in ``Categorical(probs)`` or ``Bernoulli(probs)`` is exactly that, where torch has about 1e-16.

    :param model: a declared model.

    Source: Baum, Petrie, Soules and Weiss, *A maximization technique occurring in the statistical analysis of
    probabilistic functions of Markov chains*, 1970; Rabiner, *A Tutorial on Hidden Markov Models and Selected
    Applications in Speech Recognition*, 1989; Hamilton, *A New Approach to the Economic Analysis of Nonstationary Time
    Series and the Business Cycle*, 1989 (Markov switching).

    Example, rain inferred from umbrellas::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Umbrella(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("rain", dist.Bernoulli(0.5))
        ...     def transition(self, rain):
        ...         return pyro.sample("rain", dist.Bernoulli(0.3 + 0.4 * rain))
        ...     def emission(self, rain, x=None):
        ...         return pyro.sample("x", dist.Bernoulli(0.2 + 0.7 * rain), obs=x)
        >>> x = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]])
        >>> posterior = seq.ForwardBackward(Umbrella()).run(x)
        >>> round(posterior.total_log_evidence, 4)
        -3.3725
        >>> posterior.filtered["rain"].mean[0, :2]
        tensor([0.8182, 0.8834])
        >>> seq.ForwardBackward(Umbrella()).viterbi(x).sites["rain"]
        tensor([[1., 1., 0., 1., 1.]])
    """

    def __init__(self, model: Any):
        require_model(model, "ForwardBackward")
        if model.state_grows:
            raise TypeError("a model from seq.from_pyro has no Markov state to run through: declare it as a StateSpaceModel")
        self.model = model

    def run(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> DiscretePosterior:
        """Filter and smooth a batch; the arguments are those of :class:`~pyro_seq.ParticleFilter`.

        :raises ValueError: if a latent has no finite support, if the state remembers latents of earlier steps, if missing
            data feeds the state, or if the data is impossible, naming the site or the sequence and time.
        """
        watch = Stopwatch()
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return entered(self.model, None, sequences, lambda values: self._run(sequences, values, watch))

    def log_evidence(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Tensor:
        """``(B,)`` log evidence, differentiable in the model's parameters; ``-inf`` for impossible data.

        Inside a Pyro program that has entered the model, it is that of the program's own parameter values.
        """
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)

        def evidence(_: dict[str, Tensor]) -> Tensor:
            self.model.check_inputs(sequences)
            tables, _ = read_tables(self.model, sequences, *read_support(self.model, sequences))
            return sequences.packed.unsort(log_evidence(tables))

        return entered(self.model, None, sequences, evidence, learning=True)

    def viterbi(self, x: Any, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> MostProbablePath:
        """The most probable latent paths; of equally probable ones, the states that come first in the support.

        Source: Viterbi, *Error bounds for convolutional codes and an asymptotically optimum decoding algorithm*, 1967.
        """
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)

        def decode(_: dict[str, Tensor]) -> MostProbablePath:
            self.model.check_inputs(sequences)
            support, state_is_latents = read_support(self.model, sequences)
            tables, _ = read_tables(self.model, sequences, support, state_is_latents)
            states, log_prob = viterbi(tables)
            if not (log_prob > -torch.inf).all():
                self._refuse_impossible(Passes(tables).by_step, sequences)
            states, log_prob = _batch_first(states, sequences), sequences.packed.unsort(log_prob)
            return MostProbablePath(_values(support, states, sequences.active), log_prob, states)

        return entered(self.model, None, sequences, decode)

    def stream(self) -> Stream:
        """Filter frames as they come, in memory that does not grow."""
        return Stream(self.model)

    def _run(self, sequences: Sequences, parameters: dict[str, Tensor], watch: Stopwatch) -> DiscretePosterior:
        self.model.check_inputs(sequences)
        support, state_is_latents = read_support(self.model, sequences)
        tables, states = read_tables(self.model, sequences, support, state_is_latents)
        passes, dtype = Passes(tables), floating_type(self.model, sequences)
        if not (passes.by_step > -torch.inf).all():
            self._refuse_impossible(passes.by_step, sequences)
        by_step = _batch_first(passes.by_step, sequences)
        probabilities, moments = {}, {}
        for what, joint in (("filtered", passes.filtered), ("smoothed", passes.smooth())):
            sites = {name: support.marginal(joint, name).to(dtype) for name in support.values}
            probabilities[what] = {name: _batch_first(p, sequences) for name, p in sites.items()}
            moments[what] = {name: Moments(*(_batch_first(v, sequences) for v in _moments(p, support.values[name])))
                             for name, p in sites.items()}

        def paths(num_samples: int) -> dict[str, Tensor]:
            drawn = sample_paths(passes, num_samples).movedim(1, 2)
            drawn = sequences.packed.unsort(drawn.transpose(0, 1)).transpose(0, 1)
            return _values(support, drawn, sequences.active)

        def quantile(site: str, q: float | list[float]) -> Tensor:
            return _quantile(probabilities["filtered"][site], support.values[site], q)

        return DiscretePosterior(
            method="forward-backward", kind=EXACT, log_evidence=by_step.sum(1),
            standard_error=by_step.new_zeros(len(by_step)), sequences=sequences, seconds=watch.seconds,
            filtered=moments["filtered"], smoothed=moments["smoothed"], log_evidence_by_step=by_step, parameters=parameters,
            final_state=_final_state(support, states, _batch_first(passes.filtered, sequences), sequences), paths=paths,
            cloud=quantile, model=self.model, filtered_probabilities=probabilities["filtered"],
            smoothed_probabilities=probabilities["smoothed"], values=support.values, support=support.joint,
            pairs=lambda: _batch_first(passes.pairs(), sequences).to(dtype))

    def _refuse_impossible(self, by_step: Tensor, sequences: Sequences) -> None:
        """Name the first frame whose density is zero. ``by_step`` is ``(T, B)`` in packed order."""
        dead = _batch_first(by_step, sequences) == -torch.inf
        sequence = int(dead.any(1).nonzero()[0])
        time = int(dead[sequence].nonzero()[0]) + 1
        raise ValueError(f"the data of sequence {sequence} at time {time} is impossible: every state that "
                         f"{type(self.model).__name__} can be in after the frames before gives it density zero. Give the "
                         "emission heavier tails, or allow the transition; log_evidence() returns -inf")


def _batch_first(value: Tensor, sequences: Sequences) -> Tensor:
    """``(T, B, ...)`` in packed order to ``(B, T, ...)`` in the user's."""
    return sequences.packed.unsort(value.transpose(0, 1))


def _values(support: Support, states: Tensor, active: Tensor) -> dict[str, Tensor]:
    """Joint states ``(..., B, T)`` as the values of each site, zero past a sequence's end."""
    return {name: torch.where(active.reshape(*active.shape, *(1,) * (v.dim() - 1)), v[states], torch.zeros_like(v[0]))
            for name, v in support.joint.items()}


def _moments(probabilities: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, of the shape of ``probabilities`` less its last dimension, and the event's."""
    numbers = values.reshape(len(values), -1).to(probabilities.dtype)
    centre = numbers.mean(0)
    numbers = numbers - centre
    constant = torch.ones_like(numbers) * centre  # a probability of one times the centre; zero past a sequence's end
    mean, square, centre = (probabilities @ torch.cat([numbers, numbers.square(), constant], 1)).chunk(3, -1)
    shape = (*probabilities.shape[:-1], *values.shape[1:])
    return (mean + centre).reshape(shape), (square - mean.square()).clamp_(min=0).reshape(shape)


def _quantile(probabilities: Tensor, values: Tensor, q: float | list[float]) -> Tensor:
    """The smallest value whose cumulative probability reaches q, entry by entry; zero past a sequence's end."""
    levels = torch.as_tensor(q, dtype=probabilities.dtype, device=probabilities.device)
    numbers, order = values.reshape(len(values), -1).to(probabilities.dtype).sort(dim=0, stable=True)
    cumulative = probabilities[..., order.T].cumsum(-1)
    total = cumulative[..., -1:]
    index = (cumulative < levels.reshape(-1, *(1,) * cumulative.dim()) * total * (1 - 1e-9)).sum(-1).clamp(max=len(values) - 1)
    found = numbers.T[torch.arange(numbers.shape[1], device=index.device), index] * (total[..., 0] > 0)
    found = found.reshape(-1, *probabilities.shape[:2], *values.shape[1:])
    return found[0] if levels.dim() == 0 else found


def _final_state(support: Support, states: State, filtered: Tensor, sequences: Sequences) -> Callable[[int], State]:
    """A sampler of the state after each sequence's last frame."""
    batch, k, packed = sequences.num_sequences, support.num_states, sequences.packed
    row = torch.arange(batch, device=filtered.device)
    last = filtered[row, sequences.lengths - 1]

    def in_users_order(leaf: Tensor) -> Tensor:
        if leaf.shape[0] == k:  # the same for every sequence
            return leaf.repeat(batch, *(1,) * (leaf.dim() - 1))
        return packed.unsort(leaf.reshape(batch, k, *leaf.shape[1:])).flatten(0, 1)

    def sample(num_samples: int) -> State:
        drawn = torch.multinomial(last, num_samples, replacement=True)
        index = (row[:, None] * k + drawn).reshape(-1)
        return map_state(lambda leaf: in_users_order(leaf)[index], states)

    return sample


