"""Piano rolls: which of the 88 keys sound at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from pyro_seq.sequences import Sequences

__all__ = ["HIGHEST", "LOWEST", "NUM_NOTES", "SPLITS", "Polyphonic", "padded"]

LOWEST, HIGHEST = 21, 108
"""MIDI numbers of the outermost keys of a piano, A0 and C8."""
NUM_NOTES = HIGHEST - LOWEST + 1
SPLITS = ("train", "valid", "test")


class Polyphonic(NamedTuple):
    """Polyphonic music as piano rolls, in three splits.

    Each split is a :class:`~pyro_seq.Sequences` of values ``x``, ``(B, T, 88)``, 0 or 1 in torch's default floating type
    and on its default device: column ``n``, from 0, is MIDI note ``21 + n``. Pass it to a model whole,
    ``model(data.test)``, or in mini-batches, ``model(x[rows], lengths[rows])`` with ``x = data.train.x["x"]`` and
    ``lengths = data.train.lengths``.
    """

    name: str
    train: Sequences
    valid: Sequences
    test: Sequences


def padded(rolls: Sequence[np.ndarray]) -> Sequences:
    """Songs as one batch.

    The rolls were checked as they were made, so they go straight into place: ``Sequences.of`` would need several copies of
    what is, padded, a gigabyte for MuseData.

    :param rolls: each ``(T_b, 88)``, 0 or 1.
    """
    lengths = torch.tensor([len(roll) for roll in rolls])
    x = torch.empty(len(rolls), int(lengths.max()), NUM_NOTES)
    for row, roll in zip(x, rolls):
        row[:len(roll)] = torch.from_numpy(roll)
        row[len(roll):] = row[len(roll) - 1]
    return Sequences({"x": x}, lengths)
