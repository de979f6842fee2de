"""Amortized variational filtering: refine the prior at each step from the gradient of that step's free energy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from pyro_seq.engine.sites import StepSites
from pyro_seq.engine.state import State, by_step, map_state
from pyro_seq.guides.network import CELLS, Head, NetworkGuide
from pyro_seq.module import own_parameters, require_count
from pyro_seq.sequences import Frame, Sequences, first_rows, repeat_rows

__all__ = ["AmortizedVariationalFilter"]


class AmortizedVariationalFilter(NetworkGuide):
    r"""Amortized variational filtering (AVF): at each step an optimiser that has learned to filter.

    The proposal of a latent has the family of its prior and unconstrained parameters :math:`\lambda`. At each step it
    starts at the prior and is refined ``iterations`` times,

    .. math:: \lambda \leftarrow f_\phi(\lambda, \nabla_\lambda F_t), \qquad
              F_t = E_q[\log q(z_t) - \log p(x_t, z_t \mid h_{t-1})]

    and then :math:`z_t` is drawn with noise of its own, so that AVF is a valid proposal for particle filters too. It
    works on any declared model whose latents are reparameterisable, without a line of code about the model.

    :param model: the declared model.
    :param int iterations: refinements a step (K).
    :param like: data whose shapes and units the guide will meet; simulated from the model when omitted.
    :param str preset: ``"default"``: a step gated between :math:`\lambda` and the network's own proposal, which reads the
        frame, the state, the prior and the sign and log magnitude of the gradient, trained on the whole sequence's bound
        through all iterations, whose gradients are inputs only.
        ``"paper"``: as published, a highway network of :math:`\lambda` and its layer-normalised gradient alone, trained on
        each step's free energy, averaged over iterations, with the state detached (with
        :class:`~pyro_seq.SequentialELBO`; under Pyro's own losses the gradient also flows through time).
    :param bool gradient: False leaves the gradient out of the inputs and everything else in place: the control that
        belongs beside every figure of AVF.
    :param int hidden: units of the network.
    :param cell: ``"gru"``, ``"lstm"`` or ``"rnn"``: the default preset's network also reads a recurrent encoding of the frames
        so far, as :class:`~pyro_seq.FilteringGuide` does; ``None``: the current frame alone.
    :param encoder: a module from one frame ``(rows, ...)`` to features ``(rows, width)``.
    :param global_guide: a guide for the model's global parameters.

    Source: Marino, Cvitkovic and Yue, *A General Method for Amortizing Variational Filtering*, 2018.

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
        >>> guide = seq.AmortizedVariationalFilter(LocalLevel(), iterations=2)
        >>> guide.free_energy(torch.zeros(4, 10)).shape
        torch.Size([3, 4, 10])
    """

    def __init__(self, model: Any, iterations: int = 1, *, like: Any = None, preset: str = "default",
                 gradient: bool = True, hidden: int | None = None, cell: str | None = None, encoder: nn.Module | None = None,
                 global_guide: Any = None, name: str | None = None):
        require_count("iterations", iterations, 1)
        if preset not in ("default", "paper"):
            raise ValueError(f"preset={preset!r}; it is 'default' or 'paper'")
        if cell is not None and (cell not in CELLS or preset == "paper"):
            raise ValueError(f"cell={cell!r}; it is one of {sorted(CELLS)} or None, and None with preset='paper'")
        super().__init__(model, like=like, encoder=encoder, global_guide=global_guide, name=name)
        self.iterations, self.preset, self.gradient = iterations, preset, gradient
        self.greedy = preset == "paper"
        width = sum(family.width for family in self.families.values())
        self.slices, start = {}, 0
        for site, family in self.families.items():
            self.slices[site] = slice(start, start + family.width)
            start += family.width
        self.register_buffer("follow", None, persistent=False)
        self._derive()
        size = 128 if hidden is None else hidden
        encoded = self.frame_width + (0 if cell is None else size)
        added = {"state": self.state_width, "prior": width, "moved": width} | ({"gradient": 2 * width} if gradient else {})
        with self.device:
            self.rnn = None if cell is None else CELLS[cell](self.frame_width, size, batch_first=True)
            self.update = (_Highway(width, 1024 if hidden is None else hidden) if preset == "paper" else
                           Head(encoded, added, size, 2 * width))
        self.to(self.dtype)

    def _derive(self) -> None:
        super()._derive()
        dtype = self.dtype if self.follow is None else self.follow.dtype
        follow = [float(self.follows[site]) for site, family in self.families.items() for _ in range(family.width)]
        self.follow = torch.tensor(follow, dtype=dtype, device=self.following.device)

    def prepare_rows(self, sequences: Sequences) -> Tensor | None:
        """``(B, T, hidden + outputs)``: what each frame adds to the update network."""
        return self.stream_rows(sequences, None)[0]

    def stream_rows(self, sequences: Sequences, carry: State) -> tuple[Tensor | None, State]:
        if self.preset == "paper":
            return None, None
        frames = self.all_frames(sequences)
        if self.rnn is not None:
            encoded, carry = self.rnn(frames, carry)
            frames = torch.cat([frames, encoded], -1)
        return self.update.prepare(frames), carry

    def propose(self, state: State, frame: Frame, encoding: Tensor | None, emit: Any = None) -> _Moved:
        return self._refine(state, frame, encoding)[0]

    def free_energy(self, x: Any = None, lengths: Any = None, *, num_particles: int = 1, mask: Any = None,
                    **covariates: Any) -> Tensor:
        """The free energy after each iteration of each step, in nats, each from one fresh draw a particle.

        A guide trained greedily (``preset="paper"``) lowers it from one iteration to the next. The default is trained on
        the whole series, so that its last iteration may give up a little at a step for what comes after.

        :returns: ``(iterations + 1, B, T)``; the first is the prior's; zero past a sequence's end.
        """
        sequences = Sequences.of(x, lengths, mask=mask, covariates=covariates)
        with torch.no_grad(), own_parameters(self.model, self):
            return self.within(self.model.within, self._free_energy, sequences, num_particles)

    def _free_energy(self, sequences: Sequences, num_particles: int) -> Tensor:
        packed, model = sequences.packed, self.model
        model.check_inputs(sequences)
        encodings = by_step(map_state(packed.sort, self.prepare_rows(sequences)), sequences.num_steps)
        out = torch.zeros(self.iterations + 1, sequences.num_sequences, sequences.num_steps, dtype=self.dtype,
                          device=sequences.device)
        state = None
        for frame in packed.frames(num_particles):
            state = model.begin(frame) if frame.first else map_state(
                lambda leaf, n=frame.rows: first_rows(leaf, n), state)
            count = packed.counts[frame.t - 1]
            encoding = map_state(lambda leaf, n=count: repeat_rows(first_rows(leaf, n), num_particles), encodings[frame.t - 1])
            proposal, energies = self._refine(state, frame, encoding, every=True)
            out[:, :count, frame.t - 1] = torch.stack(energies).reshape(-1, count, num_particles).mean(-1)
            with StepSites(frame, proposal, impute=model.missing_feeds_state):
                state = model.apply(state, frame)
        return packed.unsort(out.transpose(0, 1)).transpose(0, 1)

    def _refine(self, state: State, frame: Frame, encoding: Tensor | None, every: bool = False
                ) -> tuple[_Moved, list[Tensor]]:
        """The refined proposal of one step, and the free energies met on the way."""
        state = map_state(lambda leaf: leaf.detach(), state) if self.greedy else state
        training, greedy = torch.is_grad_enabled(), self.greedy
        # Or the gradient by this step's parameters would be looked for in the graph of all steps before.
        past = map_state(lambda leaf: leaf.detach(), state)
        # lambda = kept * prior + own, starting at the prior.
        kept = torch.ones(frame.rows, self._width(), dtype=self.dtype, device=frame.device)
        own = torch.zeros_like(kept)
        energies, auxiliary, known = [], None, None
        for k in range(self.iterations + every):
            last = k == self.iterations
            proposal, gradient = _Moved(self, kept.detach(), own.detach()), None
            if self.gradient or every:
                with torch.enable_grad():
                    proposal.nudge = torch.zeros_like(own, requires_grad=True)
                    energy = self._step_free_energy(past, frame, proposal)
                    gradient = None if last else torch.autograd.grad(energy.sum(), proposal.nudge)[0]
                energies.append(energy.detach())
                if last:
                    break
            else:
                with torch.no_grad():
                    self._step_free_energy(past, frame, proposal)
            start, unit = proposal.joined(proposal.starts), proposal.joined(proposal.units)
            if training and greedy and k > 0:
                # Each iteration is trained on its own free energy.
                term = ((kept * start + own) / unit * gradient.nan_to_num()).sum(-1)
                auxiliary = term if auxiliary is None else auxiliary + term
            if k == 0 and self.preset != "paper":
                known = self._known(state, frame, encoding, proposal)
            with torch.set_grad_enabled(training):
                if greedy:
                    kept, own = kept.detach(), own.detach()
                moved = None if k == 0 else ((kept - 1) * start + own) / unit
                kept, own = self._update(known, start, unit, kept, own, moved, gradient)
        result = _Moved(self, kept, own)
        result.auxiliary = auxiliary
        return result, energies

    def _step_free_energy(self, state: State, frame: Frame, proposal: _Moved) -> Tensor:
        """``(rows,)`` one-draw estimate of this step's free energy, with KL in closed form where known."""
        model = self.model
        with StepSites(frame, proposal, impute=model.missing_feeds_state) as step:
            model.apply(state, frame)
        total = torch.zeros(frame.rows, dtype=self.dtype, device=frame.device)
        for site in step.sites.values():
            if site.observed:
                total = total - site.log_p()
            else:
                try:
                    total = total + kl_divergence(site.q, site.p)
                except NotImplementedError:
                    total = total + site.log_q() - site.log_p()
        return total

    def _width(self) -> int:
        return next(reversed(self.slices.values())).stop

    def _known(self, state: State, frame: Frame, encoding: Tensor, proposal: _Moved) -> Tensor:
        """What the update network is told at every iteration."""
        starts = torch.cat([self.parameter_units[name](proposal.starts[name]) for name in self.families], -1)
        return self.update.add(encoding, state=self.state_features(state, frame.rows), prior=starts)

    def _update(self, known: Tensor | None, start: Tensor, unit: Tensor, kept: Tensor, own: Tensor, moved: Tensor | None,
                gradient: Tensor | None) -> tuple[Tensor, Tensor]:
        """One iteration: ``lambda <- (1 - g) lambda + g f``.

        :param moved: how far the proposal is from the prior, in units of its scale; ``None`` where it is not.
        """
        if gradient is not None:
            gradient = gradient.detach().nan_to_num(nan=0.0, posinf=1e10, neginf=-1e10)
        if self.preset == "paper":
            return torch.zeros_like(own), self._published_update(start, unit, kept * start + own, gradient)
        signals = {"gradient": torch.cat(_sign_and_magnitude(gradient), -1)} if self.gradient else {}
        target, gate = self.update(known, moved=moved, **signals).chunk(2, -1)
        parts = [self.target(name, torch.zeros_like(target[:, where]), unit[:, where], target[:, where], gate[:, where])
                 for name, where in self.slices.items()]
        target, gate = parts[0] if len(parts) == 1 else (torch.cat(part, -1) for part in zip(*parts, strict=True))
        return torch.lerp(kept, self.follow, gate), torch.lerp(own, target, gate)

    def _published_update(self, start: Tensor, unit: Tensor, point: Tensor, gradient: Tensor) -> Tensor:
        inputs = [part for name, family in self.families.items() for part in _layer_norms(
            self.slices[name], family, gradient / unit, point)]
        gate, target = self.update(torch.cat(inputs, -1))
        point = gate * point + (1 - gate) * target
        # The published range of a log variance, for a log scale.
        positive = torch.cat([family.log_scales() for family in self.families.values()]).to(point.device)
        return torch.where(positive, point.clamp(-7.5, 2.5), point)


class _Moved:
    """The proposal that has each latent's prior moved, in its own family, to ``kept * prior + own``."""

    auxiliary: Tensor | None = None
    nudge: Tensor | None = None
    """A zero to differentiate by: a further move, in units of the prior's scale."""

    def __init__(self, guide: AmortizedVariationalFilter, kept: Tensor, own: Tensor):
        self.guide, self.kept, self.own = guide, kept, own
        self.starts: dict[str, Tensor] = {}
        self.units: dict[str, Tensor] = {}

    def __call__(self, name: str, prior: Distribution) -> tuple[Distribution, None]:
        if not prior.has_rsample:
            raise ValueError(f"site {name!r} is {type(prior).__name__}, which has no pathwise gradient: amortized "
                             "variational filtering needs reparameterisable latents; use FilteringGuide or a "
                             "hand-written SequentialGuide")
        family, where = self.guide.family(name, prior), self.guide.slices[name]
        start, unit = family.parameters(prior), family.unit(prior)
        if self.guide.greedy:
            start = start.detach()
        self.starts[name], self.units[name] = start.detach(), unit.detach()
        point = torch.addcmul(self.own[:, where], self.kept[:, where], start)
        return family.distribution(point if self.nudge is None else point + unit * self.nudge[:, where]), None

    def joined(self, parts: dict[str, Tensor]) -> Tensor:
        """``(rows, width)``: all sites' parts side by side."""
        return torch.cat([parts[name] for name in self.guide.families], -1) if len(parts) > 1 else next(iter(parts.values()))


class _Highway(nn.Module):
    """The published update network: ELU layers with highway connections, and a gated output."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.first = nn.Linear(2 * width, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.carry = nn.Linear(hidden, hidden)
        self.target = nn.Linear(hidden, width)
        self.gate = nn.Linear(hidden, width)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = nn.functional.elu(self.first(inputs))
        carry = torch.sigmoid(self.carry(hidden))
        hidden = carry * hidden + (1 - carry) * nn.functional.elu(self.second(hidden))
        return torch.sigmoid(self.gate(hidden)), self.target(hidden)


def _layer_norms(where: slice, family: Any, gradient: Tensor, point: Tensor) -> list[Tensor]:
    """Gradient and parameters of one site, each argument of its distribution normalised by itself."""
    parts = []
    for value in (gradient[:, where], point[:, where]):
        for part in family.slices().values():
            piece = value[:, part]
            parts.append(nn.functional.layer_norm(piece, piece.shape[-1:]) if piece.shape[-1] > 1 else piece)
    return parts


def _sign_and_magnitude(gradient: Tensor, p: float = 10.0) -> tuple[Tensor, Tensor]:
    """Two bounded features of a gradient of any size (Andrychowicz et al., *Learning to learn by gradient descent by
    gradient descent*, 2016): the log magnitude over p, and the sign; small gradients keep their value instead."""
    size = gradient.abs()
    large = size >= math.exp(-p)
    magnitude = torch.where(large, size.clamp(min=math.exp(-p)).log() / p, -1.0)
    return magnitude, torch.where(large, gradient.sign(), gradient * math.exp(p))
