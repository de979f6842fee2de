"""Resampling: which particles of a weighted set go on."""

from __future__ import annotations

from pyro_seq.resampling.base import Ancestral, Resampler
from pyro_seq.resampling.inversion import systematic

__all__ = ["Ancestral", "Resampler", "systematic"]
