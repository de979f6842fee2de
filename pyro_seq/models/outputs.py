"""What a frame is: how a network reads one, and the distribution that it predicts the next one by."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_seq.models.logistic import DiscretisedLogisticMixture
from pyro_seq.module import require_count
from pyro_seq.sequences import Sequences

__all__ = ["BernoulliOutput", "CategoricalOutput", "LogisticMixtureOutput", "NormalOutput", "Output"]

_LEAST = 1e-4
"""The smallest scale, in units of the data: the likelihood of data that repeats itself has no upper bound."""


class Output(nn.Module):
    """A kind of frame, of independent entries unless said otherwise.

    Subclasses write :meth:`distribution`; :meth:`units` and :meth:`reader` where frames are not real numbers.

    :param width: entries of a frame, ``(B, T, width)``; ``None`` for scalar frames, ``(B, T)``.
    :param int numbers: what a network has to say of one entry.
    """

    def __init__(self, width: int | None, numbers: int):
        super().__init__()
        require_count("width", 1 if width is None else width, 1)
        self.frame_shape = torch.Size(() if width is None else (width,))
        self.entries, self.numbers = self.frame_shape.numel(), numbers

    @property
    def size(self) -> int:
        """Numbers that a network gives to predict a frame."""
        return self.entries * self.numbers

    def units(self, x: Tensor) -> Tensor:
        """Frames ``(..., *frame_shape)`` as what the reader takes, ``(..., entries)``."""
        return x if self.frame_shape else x[..., None]

    def reader(self, features: int) -> nn.Module:
        """A fresh module from :meth:`units` to ``(..., features)``."""
        return nn.Linear(self.entries, features)

    def distribution(self, numbers: Tensor) -> dist.Distribution:
        """Of a frame, given the network's ``(rows, size)``."""
        raise TypeError(f"{type(self).__name__} does not define distribution(self, numbers), of a frame given (rows, size)")

    def by_entry(self, numbers: Tensor) -> Tensor:
        """``(rows, size)`` as ``(rows, *frame_shape, numbers)``."""
        return numbers.unflatten(-1, (*self.frame_shape, self.numbers))

    def joined(self, fn: dist.Distribution) -> dist.Distribution:
        """Independent entries as one frame."""
        return fn.to_event(1) if self.frame_shape else fn


class BernoulliOutput(Output):
    """Binary entries.

    :param width: entries of a frame, ``None`` for scalar frames.

    Example::

        >>> BernoulliOutput(88).distribution(torch.zeros(5, 88)).shape()
        torch.Size([5, 88])
    """

    def __init__(self, width: int | None = None):
        super().__init__(width, 1)

    def distribution(self, numbers: Tensor) -> dist.Distribution:
        return self.joined(dist.Bernoulli(logits=self.by_entry(numbers)[..., 0]))


class CategoricalOutput(Output):
    """Entries that are one of ``classes`` whole numbers from zero, each with its own embedding.

    :param width: entries of a frame, ``None`` for scalar frames, such as the characters of a text.
    :param int classes: at least 2.

    Example::

        >>> output = CategoricalOutput(None, classes=27)
        >>> output.distribution(torch.zeros(5, 27)).shape()
        torch.Size([5])
    """

    def __init__(self, width: int | None, classes: int):
        require_count("classes", classes, 2)
        super().__init__(width, classes)

    def units(self, x: Tensor) -> Tensor:
        # What is no class is refused where it is scored.
        index = super().units(x).long().clamp(0, self.numbers - 1)
        return index + self.numbers * torch.arange(self.entries, device=x.device)

    def reader(self, features: int) -> nn.Module:
        return _Embedding(self.size, features)

    def distribution(self, numbers: Tensor) -> dist.Distribution:
        return self.joined(dist.Categorical(logits=self.by_entry(numbers)))


class NormalOutput(Output):
    """Real entries, normal given the past.

    :param width: entries of a frame, ``None`` for scalar frames.
    :param bool correlated: one normal distribution of the whole frame, with a full covariance.
    :param like: data of such frames, ragged or with gaps too: the network then reads, and predicts in, units of each entry's
        mean and standard deviation there.

    Example::

        >>> NormalOutput(3, correlated=True).distribution(torch.zeros(5, 9)).shape()
        torch.Size([5, 3])
    """

    def __init__(self, width: int | None = None, *, correlated: bool = False, like: Any = None):
        super().__init__(width, 2)
        if correlated and width is None:
            raise ValueError("correlated=True with scalar frames, which have one entry: leave it out, or give the width")
        self.correlated = correlated
        _keep_units(self, like)

    @property
    def size(self) -> int:
        return self.entries * (self.entries + 3) // 2 if self.correlated else super().size

    def units(self, x: Tensor) -> Tensor:
        return super().units((x - self.center) / self.spread)

    def distribution(self, numbers: Tensor) -> dist.Distribution:
        if not self.correlated:
            loc, spread = self.by_entry(numbers).unbind(-1)
            return self.joined(dist.Normal(self.center + self.spread * loc, self.spread * (softplus(spread) + _LEAST)))
        loc, diagonal, below = numbers.split([self.entries, self.entries, self.size - 2 * self.entries], -1)
        row, column = torch.tril_indices(self.entries, self.entries, -1, device=numbers.device)
        identity = torch.eye(self.entries, dtype=numbers.dtype, device=numbers.device)
        mix = identity.repeat(len(numbers), 1, 1)
        mix[:, row, column] = below
        scale = self.spread * (softplus(diagonal) + _LEAST)
        return dist.MultivariateNormal(self.center + self.spread * loc, scale_tril=scale[..., None] * mix)


class LogisticMixtureOutput(Output):
    """Entries with any shape of density: a mixture of logistic distributions given the past.

    With ``levels`` entries are whole numbers from zero, such as quantised audio, and the mixture is rounded to them; without,
    they are real.

    :param width: entries of a frame, ``None`` for scalar frames.
    :param int components: of each entry's mixture.
    :param levels: the number of values an entry can have, at least 2; ``None`` for real entries.
    :param like: for real entries, data in whose units the network reads and predicts, as for :class:`NormalOutput`.

    Source: Salimans, Karpathy, Chen and Kingma, *PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
    Likelihood and Other Modifications*, 2017.

    Example::

        >>> output = LogisticMixtureOutput(None, components=5, levels=256)
        >>> output.distribution(torch.zeros(4, 15)).sample().shape
        torch.Size([4])
    """

    def __init__(self, width: int | None = None, components: int = 10, *, levels: int | None = None, like: Any = None):
        require_count("components", components, 1)
        super().__init__(width, 3 * components)
        if levels is not None:
            require_count("levels", levels, 2)
            if like is not None:
                raise ValueError("like= is for real entries: those of levels= have the units of their range")
        self.levels = levels
        _keep_units(self, like, None if levels is None else (levels - 1) / 2)
        # The components begin apart: alike they would stay alike.
        self.register_buffer("apart", torch.linspace(-1.0, 1.0, components) if components > 1 else torch.zeros(1))

    def units(self, x: Tensor) -> Tensor:
        return super().units((x - self.center) / self.spread)

    def distribution(self, numbers: Tensor) -> dist.Distribution:
        logits, loc, scale = self.by_entry(numbers).chunk(3, -1)
        center, spread = self.center[..., None], self.spread[..., None]
        loc, scale = center + spread * (self.apart + loc), spread * (softplus(scale) + _LEAST)
        if self.levels is not None:
            return self.joined(DiscretisedLogisticMixture(logits, loc, scale, self.levels))
        return self.joined(dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Logistic(loc, scale)))


class _Embedding(nn.Embedding):
    """Indices ``(..., entries)`` to the sum of their embeddings, ``(..., features)``."""

    def forward(self, index: Tensor) -> Tensor:
        found = super().forward(index)
        return found[..., 0, :] if index.shape[-1] == 1 else found.sum(-2)


def _keep_units(output: Output, like: Any, half: float | None = None) -> None:
    """Buffers ``center`` and ``spread``, of the shape of a frame: from data, of levels from 0 to ``2 * half``, or 0 and 1."""
    shape = output.frame_shape
    center, spread = (0.0, 1.0) if half is None else (half, half)
    center, spread = torch.full(shape, center), torch.full(shape, spread)
    if like is not None:
        data = Sequences.of(like)
        if list(data.x) != ["x"] or data.x["x"].shape[2:] != shape or not data.x["x"].is_floating_point():
            raise ValueError(f"like= has data of shapes {[tuple(v.shape) for v in data.x.values()]}; it is one tensor of real "
                             f"frames of shape {tuple(shape)}")
        frames = data.x["x"][data.active].double()
        mean = frames.nanmean(0)
        if not mean.isfinite().all():
            raise ValueError("like= has an entry of the frames that is missing throughout")
        std = (frames - mean).square().nanmean(0).sqrt()
        center, spread = mean.to(center), torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0).to(center)
    output.register_buffer("center", center)
    output.register_buffer("spread", spread)
