"""Resampling: which particles of a weighted set go on."""

from __future__ import annotations

from pyro_seq.resampling.base import Ancestral, Resampler
from pyro_seq.resampling.inversion import multinomial, systematic
from pyro_seq.resampling.names import resolve

__all__ = ["Ancestral", "Resampler", "multinomial", "resolve", "systematic"]
