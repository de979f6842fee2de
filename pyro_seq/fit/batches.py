"""Mini-batches of sequences of like length, the same for the same seed whatever came before."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_seq.engine.loop import Window

__all__ = ["bucketed", "epoch_generator", "windows"]


def epoch_generator(*key: int) -> torch.Generator:
    """A generator that depends on the key alone, so that an epoch can be begun anew without the ones before.

    Example::

        >>> int(torch.randint(100, (), generator=epoch_generator(0, 7))) == int(
        ...     torch.randint(100, (), generator=epoch_generator(0, 7)))
        True
    """
    seed = 0
    for part in key:  # a linear congruential step a part, so that (0, 1) and (1, 0) differ
        seed = (seed * 6364136223846793005 + int(part) + 1442695040888963407) % 2**63
    return torch.Generator("cpu").manual_seed(seed)


def bucketed(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """Indices of all sequences in batches of similar length, in random order.

    Little is padded, yet no two epochs have the same batches: the lengths are sorted with a tenth of their spread as noise.

    :param lengths: ``(B,)``.

    Example::

        >>> import torch
        >>> batches = bucketed(torch.tensor([3, 90, 4, 88, 5]), 2, epoch_generator(0))
        >>> sorted(sum(batches, []))
        [0, 1, 2, 3, 4]
    """
    lengths = lengths.cpu().double()
    spread = float(lengths.std()) if len(lengths) > 1 else 0.0
    noisy = lengths + (0.1 * spread + 1e-3) * torch.randn(
        len(lengths), generator=generator, dtype=torch.double, device="cpu")
    order = noisy.argsort()
    batches = [part.tolist() for part in order.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator, device="cpu")]


def windows(steps: int, size: int | None) -> list[Window]:
    """The windows of at most ``size`` steps that cover ``1..steps``.

    Example::

        >>> [(w.start, w.stop) for w in windows(250, 100)]
        [(1, 100), (101, 200), (201, 250)]
    """
    size = steps if size is None else size
    return [Window(start, min(start + size - 1, steps)) for start in range(1, steps + 1, size)]
