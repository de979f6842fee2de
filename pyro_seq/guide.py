"""Propose: guides, which say where the latents of one step are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from pyro_seq.engine.sites import Proposal, PyroSites, StepSites
from pyro_seq.engine.state import State, leaves
from pyro_seq.engine.unroll import unroll
from pyro_seq.module import SequentialModule, accepted
from pyro_seq.sequences import Frame, Sequences

__all__ = ["PriorGuide", "SequentialGuide"]


class SequentialGuide(SequentialModule):
    """A guide, one step at a time.

    Subclasses write :meth:`step` in plain Pyro: it samples every latent site of one step of the model, under the names
    the model gives them. What reads the whole sequence, such as a recurrent encoding, goes into :meth:`prepare`.

    Called as ``guide(x, lengths)`` it is an ordinary Pyro guide with the sites ``z_1, z_2, ...``.

    :param model: the declared model; kept by reference, not as a submodule.
    :param global_guide: a Pyro guide for the model's global parameters (its ``PyroSample`` attributes), for example
        ``AutoNormal(poutine.block(model, expose=model.global_sites()))``. Needed if there are any.
    :param name: prefix of the parameters in Pyro's store; the class name by default.

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
        >>> class Halfway(seq.SequentialGuide):
        ...     def step(self, state, x):
        ...         before = torch.zeros_like(x) if state is None else state
        ...         pyro.sample("z", dist.Normal((before + x) / 2, 0.5))
        >>> model = LocalLevel()
        >>> x = model.simulate([20] * 4)["x"]
        >>> loss = seq.SequentialELBO().loss(model, Halfway(model), x)
    """

    reads_prior = True
    """Whether proposals need the prior that they are given; if not, a loop that only draws need not compute it."""
    greedy = False
    """Whether each step's latents are trained on that step alone, the future not reaching back through the state."""
    look_ahead: Callable[[State, Frame, Any], Tensor] | None = None
    """Optional method: given the states, the frame to come and its encoding, its log predictive density ``(rows,)`` or an
    approximation of it, by which :class:`~pyro_seq.AuxiliaryParticleFilter` resamples. Exact in a locally optimal guide."""

    @property
    def reads_future(self) -> bool:
        """Whether a step's proposal may depend on later frames, so that its draws smooth rather than filter. Taken to be so
        where :meth:`prepare` is defined; set ``reads_future = False`` in the class if it reads the past only."""
        return type(self).prepare is not SequentialGuide.prepare

    def __init__(self, model: Any, *, global_guide: Any = None, name: str | None = None):
        super().__init__(type(self).__name__ if name is None else name)
        self._model = (model,)
        self.global_guide = global_guide

    @property
    def model(self) -> Any:
        return self._model[0]

    def prepare(self, x: Any, lengths: Tensor) -> Any:
        """Optional: encodings of the whole batch, ``(B, T, ...)`` (a tensor, or a tuple or dict of them).

        :param x: the data ``(B, T, ...)``, missing entries replaced by zero.
        :param lengths: ``(B,)``.
        """
        return None

    def step(self, state: State, x: Any = None, **inputs: Any) -> None:
        """Sample the latents of one step.

        :param state: the model's state ``(rows, ...)``; ``None`` at the first step of a state-space model.
        :param x: the frame ``(rows, ...)``, missing entries replaced by zero.
        :param inputs: ``encoding`` (this frame's part of what :meth:`prepare` returned), covariates, the time ``t`` and
            the booleans ``observed``, if the signature names them.
        """
        raise TypeError(f"{type(self).__name__} does not define step(self, state, x), which samples the latents of one "
                        "step")

    def forward(self, x: Any = None, lengths: Any = None, *, mask: Any = None, plate_size: int | None = None,
                **covariates: Any) -> dict[str, Tensor]:
        """The whole guide as a Pyro program; the arguments are the model's."""
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        return self.within(self._unroll, sequences, plate_size)

    def _unroll(self, sequences: Sequences, plate_size: int | None) -> dict[str, Tensor]:
        values = self.draw_globals(sequences)
        self.refuse_unguided([] if values else self.model.global_sites())
        unrolled = self.model.within(unroll, self.model, sequences, self, plate_size=plate_size, globals=values)
        return {**values, **unrolled}

    # The engine's side.

    def draw_globals(self, sequences: Sequences) -> dict[str, Tensor]:
        """Draw the model's global parameters from ``global_guide``, as sites of the guide."""
        names = self.model.global_sites()
        if not names or self.global_guide is None:
            return {}
        with poutine.trace() as tr:
            self.global_guide(sequences)
        drawn = {name: node["value"] for name, node in tr.trace.nodes.items() if node["type"] == "sample"}
        missing = sorted(set(names) - set(drawn))
        if missing:
            raise ValueError(f"global_guide does not sample the model's global parameters {missing}")
        return {name: drawn[name] for name in names}

    def refuse_unguided(self, names: list[str]) -> None:
        """Raise if there are global parameters that nothing proposes."""
        if names:
            raise ValueError(
                f"the model has the global parameters {names}, which {type(self).__name__} does not propose: pass "
                "global_guide=, e.g. AutoNormal(poutine.block(model, expose=model.global_sites()))")

    def prepare_rows(self, sequences: Sequences) -> Any:
        """What :meth:`prepare` says of the batch, in the user's order."""
        encodings = self.prepare(_single(_zero_where_missing(sequences.x, sequences.observed)), sequences.lengths)
        expected = (sequences.num_sequences, sequences.num_steps)
        for leaf in leaves(encodings):
            if tuple(leaf.shape[:2]) != expected:
                raise ValueError(f"{type(self).__name__}.prepare returned a tensor of shape {tuple(leaf.shape)}; encodings are "
                                 f"(B, T, ...) = ({expected[0]}, {expected[1]}, ...), one for each frame")
        return encodings

    def stream_rows(self, sequences: Sequences, carry: State) -> tuple[Any, State]:
        """What :meth:`prepare_rows` would say of further frames, for a filter that is fed them as they come.

        A guide with :meth:`prepare` that reads the past only can define this to be streamed: run what it prepares on from
        ``carry``.

        :param sequences: the next frames of each sequence, ``x[name]`` being ``(B, T, ...)``, NaN where missing.
        :param carry: what the last call returned beside the encodings, tensors in (named) tuples, lists or dicts; ``None`` at
            the first.
        :returns: the encodings of these frames, ``(B, T, ...)``, and what to carry on.
        """
        if type(self).prepare is not SequentialGuide.prepare or type(self).prepare_rows is not SequentialGuide.prepare_rows:
            raise ValueError(f"{type(self).__name__} prepares its encodings from the whole series, and a stream is fed one "
                             "frame at a time: define stream_rows(self, sequences, carry) -> (encodings, carry), which runs on "
                             "from what it carries")
        return None, None

    @property
    def streams(self) -> bool:
        """Whether encodings can be computed a stretch of frames at a time, by :meth:`stream_rows`."""
        return not self.reads_future and type(self).stream_rows is not SequentialGuide.stream_rows

    def window_rows(self, sequences: Sequences, start: int, stop: int, carry: State) -> tuple[Any, State] | None:
        """The encodings ``(B, stop - start + 1, ...)`` of the steps ``start..stop``, and what to carry to the next ones, where
        there is no need to encode the whole batch for them; ``None`` otherwise. Arguments as for :meth:`stream_rows`."""
        return self.stream_rows(sequences.between(start, stop), carry) if self.streams else None

    def propose(self, state: State, frame: Frame, encoding: Any, emit: PyroSites | None = None) -> Proposal:
        """What this step's latents are drawn from.

        :param encoding: this frame's rows ``(rows, ...)`` of what :meth:`prepare_rows` returned.
        :param emit: in a Pyro program, the messenger that lets the sites of :meth:`step` out as the guide's.
        """
        names, required, anything = accepted(self.step, 1)
        given: dict[str, Any] = {**_zero_where_missing(frame.x, frame.observed), **frame.covariates}
        if not anything:
            given = {k: v for k, v in given.items() if k in names}
        if "t" in names:
            given["t"] = frame.time
        if "observed" in names:
            given["observed"] = _single({k: frame.observed.get(k, ~v.isnan()) for k, v in frame.x.items()})
        if "encoding" in names:
            if encoding is None:
                raise TypeError(f"{type(self).__name__}.step asks for encoding, but prepare returns None: return the encodings "
                                "(B, T, ...) there")
            given["encoding"] = encoding
        if lacking := sorted(required - set(given)):
            raise ValueError(f"{type(self).__name__}.step asks for {lacking}; it can have {sorted(frame.x)} (data), "
                             f"{sorted(frame.covariates)} (covariates), 'encoding', 'observed' and 't'")
        with StepSites(frame) if emit is None else emit as sites:
            self.step(state, **given)
        observed = [n for n, site in sites.sites.items() if site.observed] if emit is None else list(sites.observed)
        if observed:
            raise ValueError(f"{type(self).__name__}.step observes {observed} (obs=...), but a guide draws its sites: sample "
                             "them, from a narrow distribution if they are all but known")
        drawn = {name: (site.p, site.value) for name, site in sites.sites.items()} if emit is None else sites.drawn
        return DrawnSites(type(self).__name__, drawn)


class DrawnSites:
    """The proposal of a guide whose step has already sampled every latent."""

    def __init__(self, guide: str, sites: Mapping[str, tuple[Distribution, Tensor]]):
        self.guide, self.sites, self.left = guide, sites, set(sites)

    def __call__(self, name: str, prior: Distribution | None) -> tuple[Distribution, Tensor]:
        if name not in self.sites:
            shape = "" if prior is None else f" (prior {type(prior).__name__}, shape {tuple(prior.shape())})"
            raise ValueError(
                f"{self.guide}.step does not sample the model's latent site {name!r}{shape}; it samples {sorted(self.sites)}. "
                f"If {name!r} is data, the model forgot obs={name}")
        self.left.discard(name)
        q, value = self.sites[name]
        if prior is not None and value.shape != prior.shape():
            raise ValueError(f"site {name!r}: the guide draws shape {tuple(value.shape)} and the model expects "
                             f"{tuple(prior.shape())}")
        return q, value

    def check_all_used(self) -> None:
        """Raise if the guide sampled what the model does not."""
        if self.left:
            raise ValueError(f"{self.guide}.step samples {sorted(self.left)}, which the model does not have as latent "
                             "sites of this step: a guide samples the model's latents and nothing else")


class PriorGuide(SequentialGuide):
    """The model's own prior as a guide: the proposal of the bootstrap particle filter."""

    def prepare_rows(self, sequences: Sequences) -> None:
        return None

    def stream_rows(self, sequences: Sequences, carry: State) -> tuple[None, None]:
        return None, None

    def propose(self, state: State, frame: Frame, encoding: Any, emit: Any = None) -> Proposal:
        return from_prior


def from_prior(name: str, prior: Distribution) -> tuple[None, None]:
    """The proposal that draws a latent from the model."""
    return None, None


def _zero_where_missing(x: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.nan_to_num() if v.is_floating_point() else v * observed[k] if k in observed else v for k, v in x.items()}


def _single(values: Mapping[str, Any]) -> Any:
    return values["x"] if list(values) == ["x"] else dict(values) or None
