"""Piano rolls: which of the 88 keys sound at each step."""

from __future__ import annotations

from typing import NamedTuple

from pyro_seq.sequences import Sequences

__all__ = ["HIGHEST", "LOWEST", "NUM_NOTES", "SPLITS", "Polyphonic"]

LOWEST, HIGHEST = 21, 108
"""MIDI numbers of the outermost keys of a piano, A0 and C8."""
NUM_NOTES = HIGHEST - LOWEST + 1
SPLITS = ("train", "valid", "test")


class Polyphonic(NamedTuple):
    """Polyphonic music as piano rolls, in three splits.

    Each split is a :class:`~pyro_seq.Sequences` of values ``x``, ``(B, T, 88)``, 0 or 1 in torch's default floating type,
    on the CPU: column ``n``, from 0, is MIDI note ``21 + n``. Pass it to a model whole, ``model(data.test)``, or in
    mini-batches, ``model(x[rows], lengths[rows])`` with ``x, lengths = data.train.x["x"], data.train.lengths``.
    """

    name: str
    train: Sequences
    valid: Sequences
    test: Sequences
