"""What a declared model is, as far as running its step can tell, and which methods it is within reach of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta, ImproperUniform
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from pyro_seq.engine.families import Family
from pyro_seq.engine.gaussian import innermost, is_gaussian
from pyro_seq.engine.sites import Site, StepSites
from pyro_seq.engine.state import State, leaves, map_state
from pyro_seq.infer.conditional import marginalise
from pyro_seq.infer.declared_filter import unmoved
from pyro_seq.infer.linear import linearise
from pyro_seq.infer.split import spread
from pyro_seq.infer.structure import Applies, SiteSummary, Structure
from pyro_seq.infer.unscented_kalman import UnscentedKalmanFilter
from pyro_seq.module import own_parameters, require_model
from pyro_seq.sequences import Sequences, first_rows

__all__ = ["exact", "inspect"]

_ROWS, _STEPS, _TESTED_STEPS = 2, 4, 50
_MOST_STATES = 4096
_FROM_PYRO = "a model from seq.from_pyro has no Markov state: declare it as a StateSpaceModel"


def inspect(model: Any, x: Any = None, lengths: Any = None, *, mask: Any = None, assume: str | None = None,
            **covariates: Any) -> Structure:
    """Recognise the structure of a declared model, and say which methods apply to it and why others do not.

    The step is run at many points. That it is linear at all of them does not prove that it is everywhere, or at other
    parameters; what is found is said to be found *at the points tested*.

    :param model: a declared model.
    :param x: data as accepted by :meth:`pyro_seq.Sequences.of`; a short series is drawn from the model when omitted. Fifty
        steps of the four longest sequences are used.
    :param lengths: ``(B,)`` integers.
    :param mask: True where observed.
    :param assume: ``"linear-Gaussian"`` takes the user's word for it, as ``KalmanFilter(model, assume_linear=True)`` does.
    :param covariates: ``(B, T, ...)`` each, where the model takes any.
    :raises ValueError: if the model needs covariates, or data whose shape cannot be told from its sites, and has none.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Level(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 1.0))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.StudentT(3.0, z, 1.0), obs=x)
        >>> found = seq.inspect(Level())
        >>> found.kind, found.applies("ParticleFilter")
        ('nonlinear Gaussian', True)
        >>> found
        Level: nonlinear Gaussian
          z  latent    Normal ()
          x  observed  StudentT ()
          no   KalmanFilter                site 'x' of Level is StudentT, not Gaussian: ...
    """
    require_model(model, "inspect")
    if assume not in (None, "linear-Gaussian"):
        raise ValueError(f"assume={assume!r}; what can be assumed is 'linear-Gaussian'")
    if x is None and model.state_grows:
        raise ValueError("a model from seq.from_pyro runs on its data: pass x, seq.inspect(model, x)")
    if x is None and lengths is None and not covariates:
        lengths = [_STEPS] * _ROWS
    sequences = _some(Sequences.of(x, lengths, mask=mask, covariates=covariates))
    devices = [sequences.device] if sequences.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), own_parameters(model):
        torch.manual_seed(0)
        return model.within(lambda: _Inspection(model, sequences, assume).structure())


def exact(model: Any, x: Any = None, lengths: Any = None, *, mask: Any = None, **covariates: Any) -> Any:
    """The exact method for a declared model: a KalmanFilter, ForwardBackward or ExactLikelihood on it.

    The arguments are those of :func:`inspect`.

    :raises ValueError: if there is none, with the reasons.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_seq as seq
        >>> class Level(seq.StateSpaceModel):
        ...     def initial(self):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     def transition(self, z):
        ...         return pyro.sample("z", dist.Normal(z, 1.0))
        ...     def emission(self, z, x=None):
        ...         return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> seq.exact(Level()).run(torch.tensor([1.0, 2.0])).kind
        'exact'
    """
    return inspect(model, x, lengths, mask=mask, **covariates).method()


class _Inspection:
    """Of an entered model. ``seen[name]`` are the forms in which a site was met, one a step."""

    def __init__(self, model: Any, sequences: Sequences, assume: str | None):
        self.model, self.assume, self.kind = model, assume, type(model).__name__
        model.check_inputs(sequences)
        self.notes: list[str] = []
        if not sequences.x:
            sequences = self._simulated(sequences)
            model.check_inputs(sequences)
        if names := model.global_sites():
            self.notes.append(f"given one value of the global parameters {names}")
        self.sequences = sequences
        self.seen: dict[str, list[Site]] = {}
        self.states: list[State] = []
        copies = sequences.repeat(8)
        for _, sites, state in self._steps(copies, 2):
            self.states.append(state)
            for name, site in sites.items():
                self.seen.setdefault(name, []).append(site)
        self.latents = {name: [site.p for site in sites] for name, sites in self.seen.items() if not sites[0].observed}
        sizes = {name: {_size(site.p) for site in sites} for name, sites in self.seen.items()}
        self.sizes = {name: None if len(found) > 1 else found.pop() for name, found in sizes.items()}

    def structure(self) -> Structure:
        no_kalman = self._reason(self._linear)
        no_tables = self._reason(self._discrete)
        if self.model.state_grows:
            split, no_split = None, _FROM_PYRO
        elif not self.latents:
            split, no_split = None, f"{self.kind} has no latent site"
        else:
            try:
                split, no_split = marginalise(self.model, self.sequences, steps=self.sequences.num_steps).split, None
            except (ValueError, RuntimeError) as error:
                split, no_split = None, _one_line(error)
        no_split = no_split or self._reason(self._require_noisy_data)
        if not self.latents:
            kind = "no latents"
        elif no_tables is None:
            kind = "discrete"
        elif no_kalman is None:
            kind = "linear-Gaussian"
        elif split is not None:
            kind = "conditionally linear-Gaussian"
        elif not self.model.state_grows and self._reason(self._gaussian) is None:
            kind = "nonlinear Gaussian"
        else:
            kind = "none"
        marginal, conditioning = (split.marginal, split.conditioning) if split else ((), ())
        if kind == "linear-Gaussian":
            marginal, conditioning = tuple(self.latents), ()
        if kind == "discrete":
            marginal, conditioning, split, no_split = (), (), None, no_split or "ForwardBackward is exact"
        return Structure(self.model, kind, self._summaries(), self._methods(no_kalman, no_tables, split, no_split), marginal,
                         conditioning, tuple(self.notes), self.assume is not None)

    def _methods(self, no_kalman: str | None, no_tables: str | None, split: Any, no_split: str | None) -> tuple[Applies, ...]:
        names = list(self.latents)
        no_likelihood = f"the sites {names} are latent, and the likelihood is an integral over them" if names else None
        approximate = self._reason(self._approximable)
        blind = [] if approximate else self._blind()
        unseen = "" if not blind else (
            f"but the data does not move {blind}, having no covariance with them: their filtered moments are the prior's, and "
            "the evidence can be far off")
        drawn = self._reason(self._drawable)
        learned, refined = self._reason(self._learnable), self._reason(self._pathwise)
        remark = ""
        if split is not None:
            given = f", draws {list(split.conditioning)}" if split.conditioning else "; one particle will do"
            remark = f"marginalises {list(split.marginal)}{given}"
        globals = self.model.global_sites()
        beside = f"with global_guide= for {globals}" if globals else ""
        rows = [("KalmanFilter", no_kalman, ""), ("ForwardBackward", no_tables, ""), ("ExactLikelihood", no_likelihood, ""),
                *((f"{name}KalmanFilter", approximate, unseen) for name in ("Extended", "Unscented", "Ensemble")),
                ("RaoBlackwellisedFilter", no_split, remark), ("ParticleFilter", drawn, ""),
                ("TwistedParticleFilter", drawn or approximate and self._reason(self._noisy), ""),
                ("BackwardSampler", drawn or self._reason(self._forgetful), ""),
                ("FilteringGuide", learned, beside), ("AmortizedVariationalFilter", learned or refined, beside),
                ("SequentialELBO", self._reason(self._boundable), self._guides(learned, refined))]
        return tuple(Applies(name, reason is None, remark if reason is None else reason) for name, reason, remark in rows)

    def _steps(self, sequences: Sequences, most: int) -> Any:
        """Run the first steps with latents that visit every finite value alike."""
        state = None
        for frame in sequences.packed.frames(1, 1, min(most, sequences.num_steps)):
            state = self.model.begin(frame) if frame.first else map_state(lambda v, n=frame.rows: first_rows(v, n), state)
            with StepSites(frame, spread(frame), impute=self.model.missing_feeds_state) as step:
                state = self.model.apply(state, frame)
            yield frame, step.sites, state

    def _simulated(self, sequences: Sequences) -> Sequences:
        drawn: dict[str, list[Tensor]] = {}
        for _, sites, _ in self._steps(sequences, sequences.num_steps):
            for name, site in sites.items():
                drawn.setdefault(name, []).append(site.value)
        names = self.model.data_names() - set(sequences.covariates)
        found = sorted(names & set(drawn))
        if not found:
            raise ValueError(f"cannot tell the shape of the data {sorted(names) or '(none found)'} of {self.kind} from its "
                             f"sites {sorted(drawn)}: pass some, seq.inspect(model, x)")
        if left := sorted(names - set(found)):
            self.notes.append(f"inspected without the arguments {left}")
        return Sequences.of({name: torch.stack(drawn[name], 1) for name in found}, covariates=sequences.covariates)

    def _summaries(self) -> tuple[SiteSummary, ...]:
        found = []
        for name, sites in self.seen.items():
            families = list(dict.fromkeys(type(innermost(site.p)).__name__ for site in sites))
            found.append(SiteSummary(name, ", then ".join(families), tuple(sites[-1].p.event_shape), sites[0].observed,
                                     self.sizes[name]))
        return tuple(found)

    # Each raises with what stands in the way.

    @staticmethod
    def _reason(check: Callable[[], Any]) -> str | None:
        try:
            check()
        except (ValueError, RuntimeError) as error:
            return _one_line(error)
        return None

    def _linear(self) -> None:
        if self.model.state_grows:
            raise ValueError(_FROM_PYRO)
        if not self.latents:
            raise ValueError(f"{self.kind} has no latent site to filter")
        linearise(self.model, self.sequences, check=self.assume is None)

    def _discrete(self) -> None:
        if self.model.state_grows:
            raise ValueError(_FROM_PYRO)
        if not self.latents:
            raise ValueError(f"{self.kind} has no latent site")
        for name, ps in self.latents.items():
            if self.sizes[name] is None:
                kinds = dict.fromkeys(type(innermost(p)).__name__ for p in ps)
                raise ValueError(f"site {name!r} of {self.kind} is {', then '.join(kinds)}, which has no finite support to "
                                 f"enumerate{', the same at every step' if len(kinds) > 1 else ''}")
        if (states := math.prod(self.sizes[name] for name in self.latents)) > _MOST_STATES:
            raise ValueError(f"the latents of {self.kind} have {states} joint values a step, more than the {_MOST_STATES} "
                             "that exact inference takes on")
        self._require_markov("there is no finite table of transitions")

    def _noisy(self) -> None:
        if self.model.state_grows:
            raise ValueError(_FROM_PYRO)
        for name, ps in self.latents.items():
            if not all(is_gaussian(p) for p in ps):
                raise ValueError(f"latent site {name!r} of {self.kind} is {type(innermost(ps[-1])).__name__}, not Gaussian")

    def _forgetful(self) -> None:
        if self.model.state_grows:
            raise ValueError(_FROM_PYRO)
        if not self.latents:
            raise ValueError(f"{self.kind} has no latent site to filter")
        self._require_markov("there is no p(z_t | z_t-1) to draw backwards by")

    def _require_markov(self, hence: str) -> None:
        """The state after a step is a function of the step's latents and the data: other latents before it change nothing."""
        one, state = self.sequences.select([int(self.sequences.lengths.argmax())]).repeat(64), None
        for frame, sites, after in self._steps(one, _TESTED_STEPS):
            if not frame.first:
                values = {name: site.value for name, site in sites.items()}
                others = map_state(lambda leaf: leaf.roll(1, 0), state)
                found = []
                for before in (state, others):
                    with StepSites(frame, values=values) as step:
                        reached = self.model.apply(before, frame)
                    possible = torch.stack([site.log_p() > -torch.inf for site in step.latents.values()]).all(0)
                    found.append((reached, possible))
                (one_way, a), (other_way, b) = found
                for left, right in zip(leaves(one_way), leaves(other_way), strict=True):
                    differs = ~((left == right) | (left != left) & (right != right)).reshape(frame.rows, -1).all(1)
                    if (differs & a & b).any():
                        raise ValueError(f"the state that {self.kind} leaves depends on latents of earlier steps, not on the "
                                         f"current ones and the data alone: {hence}")
            state = after

    def _gaussian(self) -> None:
        for name, ps in self.latents.items():
            for p in ps:
                if not is_gaussian(p) and not isinstance(innermost(p), (Delta, ImproperUniform)):
                    raise ValueError(f"latent site {name!r} of {self.kind} is {type(innermost(p)).__name__}, not Gaussian")

    def _approximable(self) -> None:
        if self.model.state_grows:
            raise ValueError(_FROM_PYRO)
        if not self.latents:
            raise ValueError(f"{self.kind} has no latent site to filter")
        for name, ps in self.latents.items():
            for p in ps:
                if not is_gaussian(p):
                    raise ValueError(f"latent site {name!r} of {self.kind} is {type(innermost(p)).__name__}, not Gaussian")
        for leaf in (leaf for state in self.states for leaf in leaves(state)):
            if not leaf.is_floating_point():
                raise ValueError(f"{self.kind} carries a state of type {leaf.dtype}, not of real numbers")
        for name, sites in self.seen.items():
            if sites[0].observed and not is_gaussian(sites[0].p):
                _require_moments(name, sites[0].p)

    def _blind(self) -> list[str]:
        """The latents that the data does not move when the step is linearised, at a few frames."""
        try:
            return unmoved(UnscentedKalmanFilter(self.model)._filter(self.sequences.until(_STEPS)))
        except (ValueError, RuntimeError, TypeError):
            return []

    def _drawable(self) -> None:
        for name, ps in self.latents.items():
            if any(isinstance(innermost(p), ImproperUniform) for p in ps):
                raise ValueError(f"site {name!r} of {self.kind} is ImproperUniform and cannot be drawn: give it a proper "
                                 "distribution")
        self._require_noisy_data()

    def _require_noisy_data(self) -> None:
        for name, sites in self.seen.items():
            if any(site.observed and isinstance(innermost(site.p), Delta) for site in sites):
                raise ValueError(f"the data of site {name!r} of {self.kind} is a Delta of the state, which no drawn state "
                                 "meets")

    def _learnable(self) -> None:
        if not self.latents:
            raise ValueError(f"{self.kind} has no latent site to propose: its likelihood needs no guide")
        self._require_noisy_data()
        for name, ps in self.latents.items():
            if any(isinstance(innermost(p), Delta) for p in ps):
                raise ValueError(f"site {name!r} of {self.kind} is a Delta, which has no density to bound")
            family = Family(ps[0], name)
            for p in ps:
                if not family.same(p):
                    raise ValueError(f"site {name!r} is {family.kind.__name__} at the first step and {type(p).__name__} "
                                     "later: a learned guide needs one family for all steps")
                if self.sizes[name] is not None and _rules_out(innermost(p)):
                    raise ValueError(f"site {name!r} of {self.kind} gives some of its values probability zero; a learned guide "
                                     "proposes every value, and its bound would be -inf")

    def _guides(self, learned: str | None, refined: str | None) -> str:
        """The guides by which a bound can be had."""
        if learned is not None:
            return f"only with a hand-written SequentialGuide for {list(self.latents)}: no learned guide proposes them"
        if refined is None:
            return "with FilteringGuide, SmoothingGuide or AmortizedVariationalFilter, or a hand-written SequentialGuide"
        scored = [name for name, ps in self.latents.items() if not ps[0].has_rsample]
        return ("with FilteringGuide or SmoothingGuide, or a hand-written SequentialGuide; gradients of "
                f"{scored} by the score function, which are noisy")

    def _boundable(self) -> None:
        if not self.latents:
            raise ValueError("there is no latent site to bound over: maximise the likelihood")
        self._require_noisy_data()

    def _pathwise(self) -> None:
        for name, ps in self.latents.items():
            if not ps[0].has_rsample:
                raise ValueError(f"site {name!r} of {self.kind} is {type(innermost(ps[0])).__name__}, which has no pathwise "
                                 "gradient")


def _some(sequences: Sequences) -> Sequences:
    """The longest four sequences, and fifty steps of them."""
    some, steps = sequences.select(sequences.lengths.argsort(descending=True, stable=True)[:4]), _TESTED_STEPS

    def cut(values: Any) -> dict[str, Tensor]:
        return {k: v[:, :steps] for k, v in values.items()}

    return Sequences(cut(some.x), some.lengths.clamp(max=steps), cut(some.covariates), cut(some.observed), some.has_missing)


def _size(p: Distribution) -> int | None:
    """The number of values of a distribution; ``None`` if there is no end to them, or it differs from row to row."""
    base = innermost(p)
    if not base.has_enumerate_support:
        return None
    try:
        count = len(base.enumerate_support(expand=False))
    except NotImplementedError:
        return None
    return count ** p.event_shape[:len(p.event_shape) - len(base.event_shape)].numel()


def _rules_out(p: Distribution) -> bool:
    """Whether a distribution over finitely many values gives any of them probability zero."""
    probs = getattr(p, "probs", None)
    if probs is None:
        return False
    return bool((probs == 0).any() or isinstance(p, Bernoulli) and (probs == 1).any())


def _require_moments(name: str, p: Distribution) -> None:
    kind = type(innermost(p)).__name__
    if innermost(p).event_shape:
        raise ValueError(f"observed site {name!r} is {kind}, whose entries are not independent: only the mean and variance "
                         "of single numbers can be matched")
    try:
        finite = p.mean.isfinite().all() and p.variance.isfinite().all()
    except (AttributeError, NotImplementedError):
        finite = False
    if not finite:
        raise ValueError(f"observed site {name!r} is {kind} without a finite mean and variance that could be matched")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
