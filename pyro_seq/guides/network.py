"""What the learned guides share: unit-sized inputs, and a head that moves each latent away from its prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_seq.engine.state import State, flatten_state
from pyro_seq.guide import SequentialGuide
from pyro_seq.guides.probe import Moments, flat_frame, probe
from pyro_seq.sequences import Frame, Sequences

__all__ = ["CELLS", "BySite", "Head", "NetworkGuide", "Standardise"]


CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
"""Recurrent encoders by name."""


def _after_load(module: Standardise | NetworkGuide, _: Any) -> None:
    module._derive()


class Standardise(nn.Module):
    """``(v - center) / spread``, and back; the moments are saved with the guide.

    Features that are of unit size already, within a factor of two, are left as they are: a step has few operations to lose.
    """

    def __init__(self, moments: Moments):
        super().__init__()
        unit = bool((moments.center.abs() <= 0.5).all() and (moments.spread >= 0.5).all() and (moments.spread <= 2).all())
        center = torch.zeros_like(moments.center) if unit else moments.center.clone()
        spread = torch.ones_like(moments.spread) if unit else moments.spread.clone()
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)
        self._derive()
        self.register_load_state_dict_post_hook(_after_load)

    def _derive(self) -> None:
        self.unit = bool((self.center == 0).all() and (self.spread == 1).all())
        self.register_buffer("shift", -self.center / self.spread, persistent=False)
        self.register_buffer("scale", 1 / self.spread, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        return value if self.unit else torch.addcmul(self.shift, value, self.scale)

    def inverse(self, value: Tensor) -> Tensor:
        return value if self.unit else torch.addcmul(self.center, value, self.spread)


class BySite(nn.ModuleDict):
    """Modules by site; a site may have any name, while a module's may not hold a dot or be that of a method."""

    def __init__(self, modules: dict[str, nn.Module]):
        super().__init__({f"site_{name.replace('.', '_')}": module for name, module in modules.items()})
        self.names = {name: f"site_{name.replace('.', '_')}" for name in modules}

    def __getitem__(self, site: str) -> nn.Module:
        return self._modules[self.names[site]]


class Head(nn.Module):
    """A one-hidden-layer network beside a linear map, both from zero: features to ``outputs``.

    What is known of all times beforehand goes through :meth:`prepare` at once, what is known before others through :meth:`add`;
    the rest through the call.

    :param known: width of the features known beforehand.
    :param added: widths of the features added at each step, by name.
    """

    def __init__(self, known: int, added: Mapping[str, int], hidden: int, outputs: int):
        super().__init__()
        self.sizes = (hidden, outputs)
        both = nn.Linear(known + sum(added.values()), hidden + outputs)
        with torch.no_grad():
            both.weight[hidden:].zero_()
            both.bias[hidden:].zero_()
        self.known = nn.Linear(known, hidden + outputs)
        of_known, *of_added = both.weight.data.split([known, *added.values()], 1)
        self.known.weight.data = of_known.clone()
        self.known.bias.data = both.bias.data.clone()
        # Each by itself: most have no gradient to be told, and some stay the same while others change.
        for name, weight in zip(added, of_added, strict=True):
            if weight.numel():
                self.register_parameter(f"added_{name}", nn.Parameter(weight.T.contiguous()))
        self.output = nn.Parameter(torch.zeros(hidden, outputs))

    def prepare(self, known: Tensor) -> Tensor:
        """``(..., known)`` to ``(..., hidden + outputs)``."""
        return self.known(known)

    def add(self, prepared: Tensor, **added: Tensor | None) -> Tensor:
        """``(rows, hidden + outputs)`` and what features by name, ``(rows, width)``, add to it; ``None`` adds nothing."""
        for name, value in added.items():
            if value is not None:
                prepared = torch.addmm(prepared, value, getattr(self, f"added_{name}"))
        return prepared

    def forward(self, prepared: Tensor, **added: Tensor | None) -> Tensor:
        """To ``(rows, outputs)``."""
        hidden, direct = torch.split_with_sizes(self.add(prepared, **added), self.sizes, -1)
        out = torch.addmm(direct, nn.functional.elu(hidden), self.output)
        return out.to(self.output.dtype)  # products may be of a lower type, under torch.autocast


class NetworkGuide(SequentialGuide):
    """A guide whose proposals come from networks built for the model's latent sites.

    The networks see everything in units of its spread, and a location moves in units of the prior's scale, so that the
    units of the data do not matter.

    :param like: data whose shapes and units the guide will meet; simulated from the model when omitted (models with
        covariates need it).
    :param encoder: a module from one frame ``(rows, ...)`` to features ``(rows, width)``, for images and the like; the
        flattened frame by default.
    :param residual: whether proposals are gated between the prior and the network, see :meth:`target`.
    """

    def __init__(self, model: Any, *, like: Any = None, encoder: nn.Module | None = None, global_guide: Any = None,
                 name: str | None = None, residual: bool = True):
        found = probe(model, like, type(self).__name__)
        super().__init__(model, global_guide=global_guide, name=name)
        self.families = found.families
        self.dtype = found.dtype
        self.frame_units = Standardise(found.frame)
        self.state_units = None if found.state is None else Standardise(found.state)
        self.follows = {k: residual and v for k, v in found.follows.items()}
        # Kept with the weights, which were trained for it: on another model the probe may find otherwise.
        self.register_buffer("following", torch.tensor(list(self.follows.values()), device=found.device))
        self.register_load_state_dict_post_hook(_after_load)
        self.parameter_units = BySite({k: Standardise((found.parameters if follows else found.reach)[k])
                                       for k, follows in self.follows.items()})
        self.encoder = encoder
        self.state_width = 0 if found.state is None else len(found.state.center)
        self.frame_width = len(found.frame.center) + 1
        self.device = found.device
        if encoder is not None:
            if like is None:
                raise ValueError("encoder= needs like=, some data, to size the networks")
            encoder.to(found.device, found.dtype)
            with torch.no_grad():
                self.frame_width = self.frame_features(Sequences.of(like).frame(1)).shape[-1]

    def _derive(self) -> None:
        self.follows = dict(zip(self.families, self.following.tolist(), strict=True))

    def frame_features(self, frame: Frame) -> Tensor:
        """``(rows, frame_width)``: the frame in unit size, zero where missing, and the share that is observed."""
        flat = flat_frame(frame.x, frame.covariates, frame.rows).to(self.dtype)
        if frame.missing:
            present = ~flat.isnan()
            share = present.to(self.dtype).mean(-1, keepdim=True)
        else:
            present, share = None, flat.new_ones(frame.rows, 1)
        features = self.frame_units(flat)
        features = features if present is None else torch.where(present, features, 0.0)
        if self.encoder is None:
            return torch.cat([features, share], -1)
        value = next(iter(frame.x.values())).to(self.dtype)
        encoded = self.encoder(value.nan_to_num() if frame.missing else value)
        width = sum(v[0].numel() for v in frame.x.values())
        return torch.cat([encoded, features[:, width:], share], -1)  # covariates go beside the encoding

    def state_features(self, state: State, rows: int) -> Tensor | None:
        """``(rows, state_width)`` in unit size; zero before the first step of a state-space model."""
        if self.state_units is None:
            return None
        state = self.model.read_state(state)
        if state is None:
            return self.state_units.center.new_zeros(rows, self.state_width)
        return self.state_units(flatten_state(state, rows))

    def all_frames(self, sequences: Sequences) -> Tensor:
        """``(B, T, frame_width)``: the features of every frame of the batch."""
        batch, steps = sequences.num_sequences, sequences.num_steps
        rows = batch * steps
        flat = sequences.frame(1)._replace(
            rows=rows, x={k: v[:, :steps].flatten(0, 1) for k, v in sequences.x.items()},
            covariates={k: v[:, :steps].flatten(0, 1) for k, v in sequences.covariates.items()})
        self._check_width(flat)
        return self.frame_features(flat).reshape(batch, steps, -1)

    def _check_width(self, frame: Frame) -> None:
        if not frame.x:
            raise ValueError(f"{type(self).__name__} reads data and is called without: a learned guide proposes given x")
        width = flat_frame(frame.x, frame.covariates, frame.rows).shape[-1]
        if width != len(self.frame_units.center):
            raise ValueError(f"{type(self).__name__} was built for frames of {len(self.frame_units.center)} numbers (data "
                             f"and covariates) and is given {width}: build it with like= such data")

    def target(self, name: str, start: Tensor, unit: Tensor, own: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """What a gated step goes to: ``(own target, gate)``, the step being ``lerp(start, target, gate)``.

        A latent that follows its past moves away from the prior, in units of the prior's scale, the gate begun halfway. For
        others the target is the network's own, and the gate begins there: begun halfway, a guide could follow a prior that
        runs away, or close the gate before the latents have come to mean anything.
        """
        if self.follows[name]:
            return start + unit * own, torch.sigmoid(gate)
        return self.parameter_units[name].inverse(own), torch.sigmoid(gate + 4)

    def family(self, name: str, prior: Distribution | None) -> Any:
        """The family of a latent site, checked against the prior it has now, if that was computed."""
        family = self.families.get(name)
        if family is None:
            raise ValueError(f"the model samples the latent site {name!r}, which it did not when this guide was built "
                             f"(sites {sorted(self.families)}). If {name!r} is data, the model forgot obs={name}")
        if prior is not None and not family.same(prior):
            raise ValueError(f"site {name!r} is {type(prior).__name__} with event_shape {tuple(prior.event_shape)}; the "
                             f"guide was built for {family.kind.__name__} with {family.event}")
        return family
