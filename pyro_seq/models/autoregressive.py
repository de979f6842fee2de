"""Autoregressive networks: models without latents, whose likelihood is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_seq.engine.state import State
from pyro_seq.model import AutoregressiveModel
from pyro_seq.models.causal import DilatedConvolutions, Recurrence, SelfAttention
from pyro_seq.models.layers import require_sizes
from pyro_seq.models.outputs import BernoulliOutput, Output
from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["AutoregressiveNetwork", "CausalConvolution", "CausalTransformer", "RecurrentNetwork"]


class Past(NamedTuple):
    """What an autoregressive network carries."""

    frame: Tensor
    """``(rows, hidden)``: what was read of the last frame; learned before the first."""
    network: State
    """The causal network's state before it takes that in."""


class AutoregressiveNetwork(AutoregressiveModel):
    r"""A causal network that predicts each frame from all those before it.

    .. math:: p(x_{1:T} \mid u) = \prod_t p(x_t \mid f(x_{<t}, u_{\le t}))

    It is a :class:`~pyro_seq.AutoregressiveModel`. It draws a frame a step from the state that the network keeps,
    and scores all frames at once: :class:`~pyro_seq.ExactLikelihood` gives the likelihood, and ``seq.fit(model,
    seq.PriorGuide(model), x)`` maximises it.

    Covariates are taken in by their sum with what is read of the last frame, linear in all of them side by side in the order of
    their names; those of time t are known when frame t is predicted.

    :param output: what a frame is, an :class:`Output`; a number stands for so many binary entries.
    :param network: a causal network, as those of ``pyro_seq.models.causal``.
    :param int hidden: features of the network.
    :param int num_covariates: entries of all covariates of a time together.
    :param name: prefix of the parameters in Pyro's store.
    """

    def __init__(self, output: Output | int, network: nn.Module, hidden: int, num_covariates: int = 0, name: str = ""):
        super().__init__(name)
        require_count("num_covariates", num_covariates, 0)
        if not isinstance(output, Output):
            require_count("output", output, 1)
            output = BernoulliOutput(output)
        self.output, self.network = output, network
        self.first = nn.Parameter(torch.zeros(hidden))
        self.reader = output.reader(hidden)
        self.driven = nn.Linear(num_covariates, hidden, bias=False) if num_covariates else None
        self.head = nn.Linear(hidden, output.size)

    def start(self, rows: int) -> Past:
        return Past(self.first.expand(rows, -1), self.network.start(rows))

    def step(self, past: Past, x: Tensor | None = None, **covariates: Tensor) -> Past:
        features, network = self.network(past.network, self._inputs_of(past.frame, covariates)[:, None])
        x = pyro.sample("x", self.output.distribution(self.head(features[:, 0])), obs=x)
        return Past(self._frames_of(x), network)

    def advance(self, past: Past, z: dict[str, Tensor], x: Tensor, **covariates: Tensor) -> Past:
        _, network = self.network(past.network, self._inputs_of(past.frame, covariates)[:, None])
        return Past(self._frames_of(x), network)

    def contexts(self, past: Past, x: Tensor, lengths: Tensor | None, **covariates: Tensor) -> tuple[Tensor, Past]:
        read = self._frames_of(x)
        frames = torch.cat([past.frame[:, None], read[:, :-1]], 1)
        features, network = self.network(past.network, self._inputs_of(frames, covariates), lengths)
        last = read[:, -1] if lengths is None else read[torch.arange(len(read), device=read.device), lengths - 1]
        return features, Past(last, network)

    def emission(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        return pyro.sample("x", self.output.distribution(self.head(features)), obs=x)

    def _frames_of(self, x: Tensor) -> Tensor:
        return self.reader(self.output.units(x))

    def _inputs_of(self, frames: Tensor, covariates: dict[str, Tensor]) -> Tensor:
        """What is read of the frames before, ``(..., hidden)``, and what drives the frames now."""
        if self.driven is None:
            return frames
        leading = frames.dim() - 1
        parts = [covariates[name].flatten(leading) if covariates[name].dim() > leading else covariates[name][..., None]
                 for name in sorted(covariates)]
        return frames + self.driven(torch.cat([part.to(frames.dtype) for part in parts], -1))

    def check_inputs(self, sequences: Sequences) -> None:
        super().check_inputs(sequences)
        if unknown := sorted(set(sequences.x) - {"x"}):
            raise ValueError(f"{type(self).__name__} has one kind of data, 'x', and {unknown} was given")
        shape = tuple(self.output.frame_shape)
        if "x" in sequences.x and tuple(sequences.x["x"].shape[2:]) != shape:
            expected = ", ".join(("B", "T", *map(str, shape)))
            raise ValueError(f"'x' has shape {tuple(sequences.x['x'].shape)}; this {type(self).__name__} has the frames of its "
                             f"{type(self.output).__name__}, ({expected})")
        width = 0 if self.driven is None else self.driven.in_features
        found = {name: value[0, 0].numel() for name, value in sequences.covariates.items()}
        if sum(found.values()) != width:
            raise ValueError(f"the covariates have {found or 'no'} entries and {type(self).__name__} was made with "
                             f"num_covariates={width}")


class RecurrentNetwork(AutoregressiveNetwork):
    r"""A recurrent network that predicts each frame: a GRU's or an LSTM's language model, of frames of any kind.

    .. math:: h_t = \mathrm{GRU}(W x_{t-1} + V u_t, h_{t-1}), \qquad x_t \sim p(x_t \mid h_t)

    :param output: what a frame is, an :class:`Output`; a number stands for so many binary entries.
    :param int hidden: units of a layer.
    :param str cell: ``"gru"`` or ``"lstm"``.
    :param int layers: one on top of the other.
    :param int num_covariates: entries of all covariates of a time together.
    :param name: prefix of the parameters in Pyro's store.

    Source: Graves, *Generating Sequences With Recurrent Neural Networks*, 2013; Boulanger-Lewandowski, Bengio and Vincent,
    *Modeling Temporal Dependencies in High-Dimensional Sequences*, 2012.

    Example::

        >>> import pyro_seq as seq
        >>> from pyro_seq.models import RecurrentNetwork
        >>> model = RecurrentNetwork(88, hidden=16)
        >>> rolls = model.simulate([10, 7])["x"]
        >>> posterior = seq.ExactLikelihood(model).run(rolls, [10, 7])
        >>> posterior.kind, posterior.predict(horizon=4, num_samples=5).samples["x"].shape
        ('exact', torch.Size([5, 2, 4, 88]))
    """

    def __init__(self, output: Output | int, hidden: int = 128, cell: str = "gru", layers: int = 1, num_covariates: int = 0,
                 name: str = ""):
        require_sizes(hidden=hidden)
        super().__init__(output, Recurrence(hidden, cell, layers), hidden, num_covariates, name)


class CausalConvolution(AutoregressiveNetwork):
    r"""Dilated causal convolutions that predict each frame, WaveNet.

    A frame depends on the ``1 + (kernel - 1) * sum(dilations)`` inputs before it.

    :param output: what a frame is, an :class:`Output`; a number stands for so many binary entries.
    :param int hidden: channels.
    :param int kernel: inputs that a convolution reads.
    :param dilations: how far apart they are, a block each.
    :param int num_covariates: entries of all covariates of a time together.
    :param name: prefix of the parameters in Pyro's store.

    Source: van den Oord et al., *WaveNet: A Generative Model for Raw Audio*, 2016.

    Example, of audio in 256 levels::

        >>> from pyro_seq.models import CausalConvolution, LogisticMixtureOutput
        >>> model = CausalConvolution(LogisticMixtureOutput(levels=256), hidden=16, dilations=(1, 2, 4))
        >>> model.simulate([50])["x"].shape
        torch.Size([1, 50])
    """

    def __init__(self, output: Output | int, hidden: int = 64, kernel: int = 2,
                 dilations: Sequence[int] = (1, 2, 4, 8, 16, 32), num_covariates: int = 0, name: str = ""):
        require_sizes(hidden=hidden)
        super().__init__(output, DilatedConvolutions(hidden, kernel, dilations), hidden, num_covariates, name)


class CausalTransformer(AutoregressiveNetwork):
    r"""Causal self-attention that predicts each frame, a decoder-only transformer normalised before each part.

    :param output: what a frame is, an :class:`Output`; a number stands for so many binary entries.
    :param int hidden: features, a multiple of ``heads`` and even.
    :param int layers: of attention, each with a network of ``4 * hidden`` units after it.
    :param int heads: of each layer's attention.
    :param int context: inputs that a layer attends to.
    :param int num_covariates: entries of all covariates of a time together.
    :param name: prefix of the parameters in Pyro's store.

    Source: Vaswani et al., *Attention Is All You Need*, 2017; Xiong et al., *On Layer Normalization in the Transformer
    Architecture*, 2020.

    Example, of text in 27 characters::

        >>> from pyro_seq.models import CategoricalOutput, CausalTransformer
        >>> model = CausalTransformer(CategoricalOutput(None, classes=27), hidden=16, heads=2, context=32)
        >>> model.simulate([20, 30])["x"].shape
        torch.Size([2, 30])
    """

    def __init__(self, output: Output | int, hidden: int = 64, layers: int = 2, heads: int = 4, context: int = 256,
                 num_covariates: int = 0, name: str = ""):
        require_sizes(hidden=hidden)
        super().__init__(output, SelfAttention(hidden, layers, heads, context), hidden, num_covariates, name)
